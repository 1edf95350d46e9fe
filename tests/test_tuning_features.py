"""What tuning can do beside the plain distillation: kept teacher outputs, features, mixed precision, better masks."""

import copy

import numpy as np
import pytest
import timm
import torch
from conftest import QUICKSTART
from tuning_networks import PATTERN, PIXELS, SAMPLES, Killed, chain, killer, networks, same, tune

from mpdeploy.errors import RecipeError, StageFailed
from mpdeploy.pruning.patterns import bad_groups
from mpdeploy.recipe import load_recipe
from mpdeploy.stages.tune import usable_precision, with_rate
from mpdeploy.tuning import teacher as teachers
from mpdeploy.tuning.features import Tapped, find_blocks
from mpdeploy.tuning.loss import feature_loss
from mpdeploy.tuning.samples import Course


def logits(network):
    with torch.no_grad():
        return network(PIXELS)


def seen_by(network):
    """Every image that goes through a network from now on, as bytes."""
    seen = []
    network.register_forward_pre_hook(lambda _, inputs: seen.extend(image.numpy().tobytes() for image in inputs[0]))
    return seen


@pytest.mark.parametrize(("flip", "variants"), [(False, 1), (True, 2)])
def test_the_teacher_sees_each_variant_of_an_image_at_most_once(flip, variants):
    student, teacher, masks = chain()
    seen = seen_by(teacher)
    tune(student, teacher, masks, epochs=3, flip=flip)
    assert len(seen) == len(set(seen))
    assert SAMPLES * (variants > 1) < len(seen) <= SAMPLES * variants


def test_without_room_for_logits_the_result_is_the_same_to_rounding(monkeypatch):
    kept, teacher, masks = chain()
    tune(kept, teacher, masks, epochs=3, flip=True, batch=12)
    monkeypatch.setattr(teachers, "LIMIT", 4 * SAMPLES * 2 * 5 - 1)
    plain, teacher, _ = chain()
    seen = seen_by(teacher)
    tune(plain, teacher, masks, epochs=3, flip=True, batch=12)
    assert len(seen) == 3 * SAMPLES
    assert torch.allclose(logits(kept), logits(plain), atol=1e-5)


def test_a_single_epoch_keeps_nothing_because_nothing_would_be_asked_twice():
    student, teacher, masks = chain()
    seen = seen_by(teacher)
    tune(student, teacher, masks, epochs=1)
    assert len(seen) == SAMPLES


@pytest.mark.parametrize("after", [2, 9, 12])
def test_resuming_in_any_epoch_gives_the_same_bits_with_kept_logits_and_moving_masks(tmp_path, after):
    options = {"epochs": 3, "flip": True, "batch": 10, "ema": 0.9, "refresh": 1, "checkpoint_every": 1}
    whole, teacher, masks = chain()
    unbroken = tune(whole, teacher, masks, **options)
    student, _, _ = chain()
    with pytest.raises(Killed):
        tune(student, teacher, masks, checkpoint=tmp_path, progress=killer(after), **options)
    student, _, _ = chain()
    resumed = tune(student, teacher, masks, checkpoint=tmp_path, **options)
    assert same(student, whole)
    assert (resumed.losses, resumed.refreshes, resumed.resumed_at) == (unbroken.losses, unbroken.refreshes, after)


def test_first_steps_name_the_step_that_meets_a_variant_first():
    course = Course(count=7, batch=3, epochs=3, seed=5, flip=True)
    first = course.first_steps()
    met = np.full((7, 2), course.steps)
    for step in reversed(range(course.steps)):
        met[course.at(step)] = step
    assert (first == met).all()
    assert sorted(np.concatenate([course.at(step)[0] for step in range(3)])) == list(range(7))


def features_of(network, blocks):
    tapped = Tapped(network, blocks)
    try:
        with torch.no_grad():
            return tapped(PIXELS)[1]
    finally:
        tapped.release()


def test_matching_features_brings_them_closer_than_logits_alone_do():
    errors = {}
    for weight in (0.0, 1.0):
        student, teacher, masks = chain()
        history = tune(student, teacher, masks, feature_weight=weight, epochs=3)
        blocks = find_blocks(teacher, PIXELS[:1])
        errors[weight] = float(feature_loss(features_of(student, blocks), features_of(teacher, blocks)))
        assert history.blocks == (blocks if weight else ())
    assert errors[1.0] < 0.8 * errors[0.0]


def test_feature_loss_counts_each_sample_and_block_in_units_of_the_teacher():
    teacher = [torch.full((2, 3, 4), 2.0), torch.full((2, 5), 100.0)]
    student = [torch.zeros(2, 3, 4), teacher[1].clone()]
    assert float(feature_loss(student, teacher)) == pytest.approx(1.0)
    student[1][0] = 0
    assert float(feature_loss(student, teacher)) == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("name", "size", "blocks"),
    [
        ("vit_tiny_patch16_224", 224, [f"blocks.{i}" for i in range(12)]),
        ("resnet26", 64, [f"layer{stage}.{i}" for stage in (1, 2, 3, 4) for i in (0, 1)]),
        ("resnet34", 64, [f"layer3.{i}" for i in range(6)]),
    ],
)
def test_blocks_are_the_longest_chain_of_equal_shapes(name, size, blocks):
    network = timm.create_model(name, num_classes=3).eval()
    assert list(find_blocks(network, torch.zeros(1, 3, size, size))) == blocks


def test_a_network_without_a_chain_of_blocks_says_so():
    student, teacher, masks = networks("resnet10t")
    pixels = torch.randn(SAMPLES, 3, 32, 32)
    with pytest.raises(RecipeError, match=r"no chain of blocks(?s:.*)tune\.feature_weight = 0"):
        tune(student, teacher, masks, feature_weight=1.0, images=lambda some: pixels[some])


def test_bfloat16_on_the_cpu_stays_close_and_keeps_float32_weights():
    full, teacher, masks = chain()
    tune(full, teacher, masks)
    half, _, _ = chain()
    tune(half, teacher, masks, precision="bf16")
    assert not same(full, half)
    assert all(value.dtype == torch.float32 for value in half.state_dict().values())
    error, size = (logits(half) - logits(full)).norm(), (logits(full) - logits(chain()[0])).norm()
    assert error < 0.2 * size
    assert (usable_precision("auto", "cpu"), usable_precision("bf16", "cpu")) == ("fp32", "bf16")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_bfloat16_on_the_gpu_stays_close_to_float32_on_the_cpu():
    full, teacher, masks = chain()
    tune(full, teacher, masks)
    half, _, _ = chain()
    tune(half, teacher, masks, precision="bf16", device="cuda")
    assert next(half.parameters()).device.type == "cpu"
    error, size = (logits(half) - logits(full)).norm(), (logits(full) - logits(chain()[0])).norm()
    assert error < 0.2 * size


def masks_after(student, masks):
    return {name: student.get_submodule(name).weight != 0 for name in masks}


def equal(left, right):
    return all(torch.equal(left[name], mask) for name, mask in right.items())


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_masks_move_in_the_first_epoch_only_and_the_pattern_holds_at_every_checkpoint(tmp_path, ema):
    options = {"refresh": 2, "ema": ema, "epochs": 3, "checkpoint": tmp_path, "checkpoint_every": 1}
    at = {}
    for after in (1, 2, 5, 6, 14):
        student, teacher, masks = chain()
        with pytest.raises(Killed):
            tune(student, teacher, masks, progress=killer(after), **options)
        at[after] = masks_after(student, masks)
        assert all(bad_groups(student.get_submodule(name).weight, PATTERN) == 0 for name in masks)
    student, _, _ = chain()
    history = tune(student, teacher, masks, **options)
    assert [step for step, _ in history.refreshes] == [2, 4]
    assert all(0 < moved < sum(int(mask.sum()) for mask in masks.values()) for _, moved in history.refreshes)
    assert equal(at[1], masks)
    assert not equal(at[2], masks) and not equal(at[2], at[5])
    assert equal(at[5], at[6]) and equal(at[6], at[14])
    assert equal(at[14], masks_after(student, masks))
    assert all(bad_groups(student.get_submodule(name).weight, PATTERN) == 0 for name in masks)


def test_masks_of_convolutions_move_along_input_channels():
    student, teacher, masks = networks("resnet10t")
    pixels = torch.randn(SAMPLES, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    history = tune(student, teacher, masks, refresh=1, images=lambda some: pixels[some])
    assert len(history.refreshes) == 5
    weights = {name: student.get_submodule(name).weight for name in masks}
    assert any(weight.ndim == 4 and bool((weight[~masks[name]] != 0).any()) for name, weight in weights.items())
    assert all(bad_groups(weight, PATTERN) == 0 for weight in weights.values())


def test_a_useless_mask_is_mended():
    """Zeros where the largest weights were: a search finds many of them again and fits better than the mask given."""
    errors = {}
    for refresh in (0, 1):
        student, teacher, masks = chain()
        with torch.no_grad():
            for name in masks:
                masks[name] = ~masks[name]
                weight = student.get_submodule(name).weight
                weight.copy_(teacher.get_submodule(name).weight * masks[name])
        tune(student, teacher, masks, refresh=refresh, epochs=8, hard_weight=0.0)
        errors[refresh] = float((logits(student) - logits(teacher)).square().mean())
    assert errors[1] < errors[0]


def test_a_search_that_could_never_happen_is_refused():
    student, teacher, masks = chain()
    with pytest.raises(RecipeError, match=r"every 6 steps: they may change in the first 5 steps only"):
        tune(student, teacher, masks, refresh=6)
    with pytest.raises(RecipeError, match=r"the pattern of layer '.*' isn't given"):
        tune(student, teacher, masks, refresh=1, patterns={})
    with pytest.raises(RecipeError, match=r"feature_weight .*; refresh .*; precision must be fp32 or bf16"):
        tune(student, teacher, masks, refresh=-1, precision="fp16", feature_weight=float("nan"))


@pytest.mark.parametrize("item", ["refresh=-1", 'precision="fp16"', "ema=1.0", "feature_weight=-1.0", "seed=-1"])
def test_a_bad_setting_is_one_sentence(item):
    with pytest.raises(RecipeError) as caught:
        load_recipe(QUICKSTART, [f"tune.{item}"])
    assert len(caught.value.what.splitlines()) == 1
    assert f"tune.{item.partition('=')[0]}: input should be" in caught.value.what


def test_a_full_memory_is_a_sentence_with_a_way_out():
    def greedy(some):
        return torch.empty(1 << 48)

    def full(some):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    for images in (greedy, full):
        student, teacher, masks = chain()
        with pytest.raises(
            StageFailed, match=r"Memory ran out while tuning with batches of 8\.(?s:.*)lower tune\.batch"
        ):
            tune(student, teacher, masks, images=images)


def test_progress_tells_images_per_second_and_the_time_left(monkeypatch):
    clock = iter([10.0, 12.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    told = []
    progress = with_rate(lambda *line: told.append(line), images=6400)
    progress(10, 100)
    progress(20, 100)
    assert told == [("tuning", 10, 100), ("tuning, 320 images/s, 0:16 left", 20, 100)]


def test_the_teacher_is_left_as_it_was():
    student, teacher, masks = chain()
    before = copy.deepcopy(teacher)
    tune(student, teacher, masks, feature_weight=1.0, refresh=1, precision="bf16")
    assert same(teacher, before)
    assert not any(module._forward_hooks for module in (*teacher.modules(), *student.modules()))
