import copy
import itertools
import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from tuning_networks import LABELS, PATTERN, PIXELS, SAMPLES, Killed, killer, networks, same, tune

from mpdeploy.errors import CorruptArtifact, RecipeError, StageFailed
from mpdeploy.pruning.patterns import bad_groups
from mpdeploy.tuning import checkpoint, distillation_loss, learning_rate


def test_tuning_brings_the_student_closer_to_the_teacher_and_keeps_the_pattern():
    student, teacher, masks = networks()
    start = copy.deepcopy(student)
    kept = copy.deepcopy(teacher)
    history = tune(student, teacher, masks, epochs=6, hard_weight=0.0)
    with torch.no_grad():
        goal = teacher(PIXELS)
        before, after = ((network.eval()(PIXELS) - goal).square().mean() for network in (start, student))
    assert after < 0.5 * before
    assert same(teacher, kept)
    assert not student.training
    for layer, mask in masks.items():
        weight = student.get_submodule(layer).weight
        assert bad_groups(weight, PATTERN) == 0
        assert not weight[~mask].any()
        assert not torch.equal(weight, start.get_submodule(layer).weight)
    assert history.steps == tuple(range(1, 31))
    assert len(history.losses) == 30
    assert (history.epochs, history.resumed_at) == (6, None)
    assert np.mean(history.losses[-5:]) < np.mean(history.losses[:5])


def test_no_epochs_leave_the_student_untouched_without_reading_an_image():
    student, teacher, masks = networks()
    start = copy.deepcopy(student)
    history = tune(student, teacher, masks, epochs=0, images=None)
    assert same(student, start)
    assert (history.steps, history.losses, history.epochs) == ((), (), 0)


@pytest.mark.parametrize("after", [1, 3, 6, 9])
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_killed_run_resumes_to_the_bits_of_an_unbroken_one(tmp_path, after, ema):
    options = {"flip": True, "ema": ema, "weight_decay": 0.01, "checkpoint": tmp_path / "kept", "checkpoint_every": 2}
    whole, teacher, masks = networks()
    unbroken = tune(whole, teacher, masks, **{**options, "checkpoint": None})
    student, _, _ = networks()
    with pytest.raises(Killed):
        tune(student, teacher, masks, progress=killer(after), **options)
    student, _, _ = networks()
    torch.manual_seed(after)  # the caller's generator must not matter
    resumed = tune(student, teacher, masks, **options)
    assert same(student, whole)
    assert resumed.losses == unbroken.losses
    assert resumed.resumed_at == (after // 2 * 2 or None)


def test_a_finished_run_is_taken_from_its_checkpoint_without_a_step(tmp_path):
    student, teacher, masks = networks()
    first = tune(student, teacher, masks, checkpoint=tmp_path)
    again, _, _ = networks()
    history = tune(again, teacher, masks, checkpoint=tmp_path, images=None)
    assert same(again, student)
    assert history.losses == first.losses
    assert history.resumed_at == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state.json", "step-00000010.safetensors"]


def test_a_crash_between_the_tensors_and_the_state_leaves_the_older_checkpoint(tmp_path, monkeypatch):
    student, teacher, masks = networks()
    with pytest.raises(Killed):
        tune(student, teacher, masks, checkpoint=tmp_path, checkpoint_every=2, progress=killer(2))
    state = (tmp_path / "state.json").read_bytes()
    student, _, _ = networks()

    real = checkpoint.dumps

    def crash_at_the_state(value):
        if "tensors" in value:
            raise Killed
        return real(value)

    monkeypatch.setattr(checkpoint, "dumps", crash_at_the_state)
    with pytest.raises(Killed):
        tune(student, teacher, masks, checkpoint=tmp_path, checkpoint_every=2)
    monkeypatch.undo()
    assert len(list(tmp_path.glob("step-*"))) == 2
    assert (tmp_path / "state.json").read_bytes() == state
    whole, _, _ = networks()
    tune(whole, teacher, masks)
    student, _, _ = networks()
    assert tune(student, teacher, masks, checkpoint=tmp_path).resumed_at == 2
    assert same(student, whole)


def test_an_edited_or_foreign_checkpoint_is_refused_by_name(tmp_path):
    student, teacher, masks = networks()
    tune(student, teacher, masks, checkpoint=tmp_path)
    fresh, _, _ = networks()
    with pytest.raises(StageFailed, match=r"(?s)belongs to a run with other settings.*delete the folder"):
        tune(fresh, teacher, masks, checkpoint=tmp_path, lr=1e-4)
    tensors = tmp_path / "step-00000010.safetensors"
    damaged = bytearray(tensors.read_bytes())
    damaged[-1] ^= 1
    tensors.write_bytes(damaged)
    with pytest.raises(CorruptArtifact, match=r"step-00000010.safetensors is not what was written"):
        tune(fresh, teacher, masks, checkpoint=tmp_path)
    tensors.unlink()
    with pytest.raises(CorruptArtifact, match="can't be read"):
        tune(fresh, teacher, masks, checkpoint=tmp_path)
    (tmp_path / "state.json").write_text(json.dumps({"schema": 1}))
    with pytest.raises(CorruptArtifact, match="identity"):
        tune(fresh, teacher, masks, checkpoint=tmp_path)


def test_every_sample_is_seen_once_an_epoch_in_an_order_set_by_the_seed():
    orders = []
    for seed in (3, 3, 4):
        student, teacher, masks = networks()
        seen = []
        tune(
            student,
            teacher,
            masks,
            seed=seed,
            batch=12,
            images=lambda some, seen=seen: seen.append(some) or PIXELS[some],
        )
        orders.append(np.concatenate(seen))
        assert [len(some) for some in seen] == [12, 12, 12, 4] * 2
        for epoch in (orders[-1][:SAMPLES], orders[-1][SAMPLES:]):
            assert sorted(epoch) == list(range(SAMPLES))
        assert orders[-1][:SAMPLES].tolist() != orders[-1][SAMPLES:].tolist()
    assert orders[0].tolist() == orders[1].tolist() != orders[2].tolist()


def test_flips_mirror_some_images_and_change_the_result():
    plain, teacher, masks = networks()
    tune(plain, teacher, masks)
    flipped, _, _ = networks()
    tune(flipped, teacher, masks, flip=True)
    assert not same(plain, flipped)
    # Mirror images of themselves can't tell: then flipping must change nothing at all.
    even = (PIXELS + PIXELS.flip(-1)) / 2
    results = []
    for flip in (False, True):
        student, teacher, masks = networks()
        tune(student, teacher, masks, flip=flip, images=lambda some: even[some])
        results.append(student)
    assert same(*results)


def test_the_moving_average_is_the_result_when_asked_for():
    last, teacher, masks = networks()
    tune(last, teacher, masks)
    averaged, _, _ = networks()
    tune(averaged, teacher, masks, ema=0.5)
    assert not same(last, averaged)
    nearly, _, _ = networks()
    tune(nearly, teacher, masks, ema=1e-7)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(nearly.parameters(), last.parameters(), strict=True))


def test_batch_norm_keeps_its_running_statistics():
    student, teacher, masks = networks("resnet10t")
    pixels = torch.randn(SAMPLES, 3, 32, 32, generator=torch.Generator().manual_seed(2)) * 4 + 2
    before = {name: value.clone() for name, value in student.named_buffers()}
    weights = {name: value.clone() for name, value in student.named_parameters()}
    tune(student, teacher, masks, epochs=1, images=lambda some: pixels[some])
    assert all(torch.equal(before[name], value) for name, value in student.named_buffers())
    assert not torch.equal(student.fc.weight, weights["fc.weight"])


def test_the_loss_is_hintons():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(4, 3, generator=generator), torch.randn(4, 3, generator=generator)
    labels = torch.tensor([0, 2, 1, 1])
    p, q = (torch.softmax(logits / 3.0, dim=1) for logits in (teacher, student))
    soft = (p * (p / q).log()).sum(dim=1).mean() * 9.0
    expected = 0.3 * F.cross_entropy(student, labels) + 0.7 * soft
    got = distillation_loss(student, teacher, labels, temperature=3.0, hard_weight=0.3)
    assert float(got) == pytest.approx(float(expected), rel=1e-6)
    assert float(distillation_loss(teacher, teacher, labels, temperature=2.0, hard_weight=0.0)) == pytest.approx(
        0, abs=1e-7
    )


def test_the_learning_rate_rises_then_falls_to_nearly_zero():
    rates = [learning_rate(step, 100, 1.0) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(a >= b for a, b in itertools.pairwise(rates[4:]))
    assert 0 < rates[-1] < 0.01
    assert learning_rate(0, 1, 0.5) == 0.5


def test_a_nan_loss_stops_at_once_and_says_at_which_step():
    student, teacher, masks = networks()
    pixels = PIXELS.clone()
    pixels[:] = float("nan")
    with pytest.raises(StageFailed, match=r"loss became nan at step 1 of 10 .*(?s:.*)lower the learning rate"):
        tune(student, teacher, masks, images=lambda some: pixels[some])
    with pytest.raises(StageFailed, match=r"loss became (nan|inf)|NaN or infinite after tuning"):
        tune(student, teacher, masks, lr=1e30)


def test_masks_that_do_not_fit_and_weights_that_break_them_are_refused():
    student, teacher, masks = networks()
    with pytest.raises(StageFailed, match=r"mask of layer 'blocks\.7\.fc'.*no such weight"):
        tune(student, teacher, {"blocks.7.fc": torch.ones(2, 2, dtype=torch.bool)})
    with pytest.raises(StageFailed, match="does not fit"):
        tune(student, teacher, {"head": torch.ones(2, 2, dtype=torch.bool)})
    name = "blocks.0.mlp.fc1"
    with torch.no_grad():
        student.get_submodule(name).weight[~masks[name]] = 1e-30
    bad = int((~masks[name]).sum())
    with pytest.raises(StageFailed, match=f"{bad} weights of layer '{name}' are not zero"):
        tune(student, teacher, masks)


def test_wrong_settings_are_all_named_at_once():
    student, teacher, masks = networks()
    with pytest.raises(RecipeError, match=r"lr must be a positive number; batch .*; hard_weight must lie in \[0, 1\]"):
        tune(student, teacher, masks, lr=float("nan"), batch=0, hard_weight=1.5)
    with pytest.raises(StageFailed, match="no samples"):
        tune(student, teacher, masks, labels=LABELS[:0])
    with pytest.raises(StageFailed, match="outside the network's 5 classes"):
        tune(student, teacher, masks, labels=LABELS + 5)
