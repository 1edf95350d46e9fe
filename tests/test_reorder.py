import copy
from dataclasses import replace

import pytest
import torch
from pruning_networks import captured, correlated_images, quiet, small_convnext, small_resnet, small_swin, small_vit
from torch import nn
from torch.nn import functional as F

from mpdeploy.errors import StageFailed
from mpdeploy.pruning import reorder as module
from mpdeploy.pruning.layers import choose
from mpdeploy.pruning.permute import Search
from mpdeploy.pruning.reorder import reorder

IMAGES = correlated_images(32)


def reordered(model, *, pattern="2:4", images=IMAGES, iterations=12, skip=(), size=32, progress=quiet):
    layers = choose(model, pattern, list(skip), (3, size, size))
    return reorder(
        model, captured(model, size), images.split(8), layers, iterations=iterations, seed=0, progress=progress
    )


def logits(model, images):
    with torch.no_grad():
        return model(images)


def same_bits(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def with_search(monkeypatch, order_of):
    """Replace the search by orders of one's own: `order_of(channels, blocks)`."""

    def search(score, pattern, *, blocks, iterations, seed):
        return Search(order_of(score.shape[1], blocks), 1.0, 1.0, 1)

    monkeypatch.setattr(module, "search", search)


def identity(channels, blocks):
    return torch.arange(channels)


def by_chance(channels, blocks):
    generator = torch.Generator().manual_seed(5)
    width = channels // blocks
    return torch.cat([block * width + torch.randperm(width, generator=generator) for block in range(blocks)])


@pytest.fixture(scope="module")
def vit():
    """A ViT before and after, with what was told."""
    model, ticks = small_vit(), []
    before = copy.deepcopy(model)
    return before, model, reordered(model, progress=lambda done, total: ticks.append((done, total))), ticks


def test_the_logits_stay_and_orders_are_folded_that_lower_the_held_out_error(vit):
    before, after, found, ticks = vit
    images = correlated_images(16, seed=8)  # others than those that decided
    dense = logits(before, images)
    assert float((logits(after, images) - dense).abs().max()) <= 1e-5 * float(dense.max() - dense.min())
    assert 0 <= found.logit_change <= 1e-5
    assert not same_bits(before, after)
    folded = [one for one in found.reorderings if one.order is not None]
    assert len(folded) >= 3
    for one in folded:
        assert one.error_after < one.error_before
        assert one.kept_before <= one.kept_after <= 1
        assert one.reason == ""
        assert sorted(one.order.tolist()) == list(range(len(one.order)))
        assert one.order.tolist() != list(range(len(one.order)))
    assert [(coupling.name, order.tolist()) for coupling, order in found.couplings] == [
        (one.name, one.order.tolist()) for one in folded
    ]
    assert {layer for one in found.reorderings for layer in one.layers} == {
        f"blocks.{block}.{name}" for block in (0, 1) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    assert ticks == [(place + 1, len(found.reorderings)) for place in range(len(found.reorderings))]


def test_attention_heads_stay_whole(vit):
    heads = [one for one in vit[2].reorderings if one.kind == "attention value"]
    assert len(heads) == 2
    for one in heads:
        if one.order is not None:
            assert torch.equal(one.order // 32, torch.arange(64) // 32)


def test_the_error_of_an_order_is_the_one_found_when_it_has_been_folded(vit, monkeypatch):
    _, after, found, _ = vit
    with_search(monkeypatch, identity)
    again = reordered(copy.deepcopy(after))
    for told, seen in zip(found.reorderings, again.reorderings, strict=True):
        assert told.name == seen.name
        expected = told.error_before if told.order is None else told.error_after
        assert seen.error_before == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("build", [small_resnet, small_convnext])
def test_so_it_is_in_other_networks(build, monkeypatch):
    model = build()
    dense = logits(model, IMAGES)
    found = reordered(model)
    assert float((logits(model, IMAGES) - dense).abs().max()) <= 1e-4 * float(dense.max() - dense.min())
    assert found.couplings
    with_search(monkeypatch, identity)
    again = reordered(copy.deepcopy(model))
    for told, seen in zip(found.reorderings, again.reorderings, strict=True):
        expected = told.error_before if told.order is None else told.error_after
        if expected is None:
            assert seen.error_before is None
        else:
            assert seen.error_before == pytest.approx(expected, rel=1e-2), told.name


def test_an_order_that_raises_the_held_out_error_is_refused_and_nothing_moves(vit, monkeypatch):
    _, after, first, _ = vit
    good = {one.name for one in first.reorderings if one.order is not None}
    with_search(monkeypatch, by_chance)  # after a good order an order by chance is a bad one
    model = copy.deepcopy(after)
    found = reordered(model)
    worse = [one for one in found.reorderings if one.name in good and one.order is None]
    assert len(worse) >= len(good) - 1
    for one in worse:
        assert one.error_after >= one.error_before
        assert one.reason == "The order found does not lower the error on the held-out images."
    if len(worse) == len(found.reorderings):
        assert same_bits(model, after)


def test_an_order_that_changes_nothing_is_not_folded(vit, monkeypatch):
    before = vit[0]
    with_search(monkeypatch, identity)
    model = copy.deepcopy(before)
    found = reordered(model)
    assert not found.couplings
    assert same_bits(model, before)
    assert all(one.error_after == one.error_before for one in found.reorderings)


def test_no_iterations_change_nothing_bit_for_bit():
    model = small_vit()
    before = copy.deepcopy(model)
    found = reordered(model, iterations=0)
    assert same_bits(model, before)
    assert found.logit_change == 0.0
    assert found.couplings == ()
    assert found.reorderings
    for one in found.reorderings:
        assert (one.order, one.error_before, one.error_after) == (None, None, None)
        assert one.reason == "The recipe asks for no search."


def test_a_rerun_gives_the_same_bits(vit):
    model = small_vit()
    found = reordered(model)
    assert same_bits(model, vit[1])
    assert [one.error_after for one in found.reorderings] == [one.error_after for one in vit[2].reorderings]


class Fixed(nn.Module):
    """Between its first two layers channels are told apart, between the last two they are free."""

    def __init__(self):
        super().__init__()
        self.stem, self.first, self.second = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, images):
        hidden = self.stem(images.flatten(1)).cumsum(dim=1)
        return self.head(self.second(F.relu(self.first(hidden))))


def test_layers_whose_inputs_are_fixed_are_refused_with_the_reason_and_dense_ones_not_named():
    torch.manual_seed(0)
    model = Fixed().eval()
    found = reordered(model, images=torch.randn(64, 3, 2, 2), size=2)
    assert list(found.refused) == ["first"]
    assert found.refused["first"].startswith("The order of its inputs is fixed:")
    assert [one.layers for one in found.reorderings] == [("second",)]


def test_a_coupling_that_misses_a_producer_is_caught_by_the_logits(monkeypatch):
    real = module.find

    def careless(graph, state):
        found = real(graph, state)
        lame = [
            replace(one, producers=one.producers[1:]) if "mlp.fc1" in one.name.partition(" -> ")[0] else one
            for one in found.couplings
        ]
        assert lame != list(found.couplings)
        return replace(found, couplings=tuple(lame))

    monkeypatch.setattr(module, "find", careless)
    with pytest.raises(StageFailed, match=r"changed a logit by .* of their range, more than rounding") as caught:
        reordered(small_vit())
    assert "prune.permute = 0" in caught.value.hint


def test_groups_that_do_not_fit_the_blocks_are_refused_with_the_sentence():
    model = small_vit(depth=1, num_heads=8)  # heads of 8 channels
    found = reordered(model, pattern="12:16")
    reasons = {one.kind: one.reason for one in found.reorderings}
    assert reasons["attention value"] == "Groups of 16 don't fit its 8 blocks of channels."
    assert [one.order for one in found.reorderings if one.kind == "attention value"] == [None]
    assert any(one.order is not None for one in found.reorderings)


def test_readers_with_different_patterns_are_refused():
    model = small_vit(depth=1)
    layers = choose(model, "2:4", [], (3, 32, 32))
    mixed = [replace(layer, pattern="4:8") if layer.name.endswith("fc1") else layer for layer in layers]
    found = reorder(
        model, captured(model, 32), [IMAGES], mixed, iterations=4, seed=0, progress=quiet
    )  # fmt: skip
    (stream,) = [one for one in found.reorderings if one.kind == "residual"]
    assert stream.reason == "The layers that read these channels have different patterns."
    assert stream.order is None


def test_a_dead_network_a_nan_and_too_few_images():
    model = small_vit(depth=1)
    with pytest.raises(StageFailed, match="at least 4 calibration images; 3 were given"):
        reordered(model, images=IMAGES[:3])
    spoilt = IMAGES[:8].clone()
    spoilt[2, 0, 3, 3] = float("nan")
    with pytest.raises(StageFailed, match=r"inputs of layer 'blocks.0.attn.qkv' hold NaN"):
        reordered(model, images=spoilt)
    with torch.no_grad():
        model.blocks[0].mlp.fc2.weight.zero_()
    reasons = {one.layers: one.reason for one in reordered(model, images=IMAGES[:8]).reorderings}
    assert reasons[("blocks.0.mlp.fc2",)] == "Its consumers' inputs or weights are all zero."


def test_only_the_first_images_decide_and_all_layers_may_stay_dense():
    model = small_vit(depth=1)
    before = copy.deepcopy(model)
    found = reordered(model, skip=["*"])
    assert found.reorderings == found.couplings == ()
    assert same_bits(model, before)
    many = correlated_images(80, seed=2)
    first, second = small_vit(depth=1), small_vit(depth=1)
    reordered(first, images=many)
    reordered(second, images=many[: module.IMAGES])
    assert same_bits(first, second)


def test_a_layer_that_takes_the_channels_in_at_several_places_is_judged_at_all_of_them(monkeypatch):
    # Swin's patch merging reads four neighbours side by side.
    model, skip = small_swin(), ("*attn*", "*mlp*")
    dense = logits(model, IMAGES)
    with_search(monkeypatch, by_chance)
    (told,) = [one for one in reordered(model, skip=skip).reorderings if "reduction" in one.layers[0]]
    assert told.order is not None
    assert float((logits(model, IMAGES) - dense).abs().max()) <= 1e-4 * float(dense.max() - dense.min())
    with_search(monkeypatch, identity)
    (again,) = [one for one in reordered(model, skip=skip).reorderings if "reduction" in one.layers[0]]
    assert again.error_before == pytest.approx(told.error_after, rel=1e-3)
