import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mpdeploy.errors import RecipeError, StageFailed
from mpdeploy.pruning import restore as ser
from mpdeploy.pruning.patterns import Pattern, as_rows, bad_groups, from_rows, project

PATTERNS = st.sampled_from(["1:2", "2:4", "3:4", "4:8"]).map(Pattern.parse)
SHAPES = st.sampled_from([(6, 16), (4, 8, 3, 2)])


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def projected(weight, pattern):
    return from_rows(project(as_rows(weight).abs(), pattern), weight.shape)


def per_group(mask, pattern):
    return as_rows(mask).reshape(-1, pattern.group).sum(1)


def nudged(seed):
    """A training that moves all it may, in place, and nothing else."""

    def train(weights, may_move):
        for index, (name, weight) in enumerate(weights.items()):
            weight += normal(*weight.shape, seed=seed + index) * may_move[name]
        return weights

    return train


def as_it_is(weights, may_move):
    return weights


@settings(max_examples=60, deadline=None)
@given(PATTERNS, SHAPES, st.floats(0.01, 0.99), st.integers(0, 1000))
def test_over_pruning_drops_the_weakest_and_opens_the_groups_that_gave(pattern, shape, share, seed):
    weights = {"a": normal(*shape, seed=seed), "b": 3 * normal(*shape, seed=seed + 1)}
    masks = {name: projected(weight, pattern) for name, weight in weights.items()}
    layer_weights, patterns = {"a": 0.5, "b": 2.0}, {"a": pattern, "b": pattern}
    kept, reservoir = ser.over_prune(weights, masks, share, layer_weights, patterns)
    before = sum(int(m.sum()) for m in masks.values())
    assert before - sum(int(m.sum()) for m in kept.values()) == round(share * before)
    weakest_kept, strongest_dropped = math.inf, 0.0
    for name, weight in weights.items():
        score, gone = weight.abs() / layer_weights[name], masks[name] & ~kept[name]
        weakest_kept = min(weakest_kept, float(score[kept[name]].min()) if kept[name].any() else math.inf)
        strongest_dropped = max(strongest_dropped, float(score[gone].max()) if gone.any() else 0.0)
        assert not (kept[name] & ~masks[name]).any()
        assert not (kept[name] & reservoir[name]).any() and not (gone & ~reservoir[name]).any()
        gave = per_group(kept[name], pattern) < pattern.keep
        assert torch.equal(per_group(reservoir[name], pattern) > 0, gave)
        assert (per_group(reservoir[name] | kept[name], pattern)[gave] == pattern.group).all()
    assert strongest_dropped <= weakest_kept


@settings(max_examples=60, deadline=None)
@given(PATTERNS, SHAPES, st.floats(0.01, 0.99), st.integers(0, 1000))
def test_a_cycle_keeps_the_pattern_exactly_and_lets_only_the_reservoir_grow(pattern, shape, share, seed):
    weights = {"a": normal(*shape, seed=seed), "b": normal(*shape, seed=seed + 1)}
    masks = {name: projected(weight, pattern) for name, weight in weights.items()}
    weights = {name: weight * masks[name] for name, weight in weights.items()}
    patterns = dict.fromkeys(weights, pattern)
    kept, reservoir = ser.over_prune(weights, masks, share, None, patterns)
    seen = []

    def grow(start, may_move):
        seen.append(may_move)
        for name in start:
            assert torch.equal(start[name], weights[name] * kept[name])
        return nudged(seed + 5)(start, may_move)

    def tune(start, may_move):
        seen.append(may_move)
        return nudged(seed + 9)(start, may_move)

    done = ser.restore(weights, masks, grow, tune, share=share, patterns=patterns)
    assert all(torch.equal(seen[0][name], reservoir[name]) for name in weights)
    for name in weights:
        assert torch.equal(seen[1][name], done.masks[name])
        assert (per_group(done.masks[name], pattern) == pattern.keep).all()
        assert not (kept[name] & ~done.masks[name]).any()
        assert bad_groups(done.weights[name], pattern) == 0
        assert (done.weights[name][~done.masks[name]] == 0).all()
    assert done.dropped == done.returned + done.swapped == round(share * sum(int(m.sum()) for m in masks.values()))


def test_the_entries_that_moved_most_per_layer_weight_come_back():
    kept = torch.tensor([[True, False, False, False, True, True, False, False]])
    start = torch.zeros(1, 8)
    trained = torch.tensor([[9.0, 0.1, -0.3, 0.2, 0.0, 0.0, 5.0, 5.0]])
    both = {"a": kept, "b": kept.clone()}
    reservoir = {name: ser._open_slots(mask, Pattern(2, 4)) for name, mask in both.items()}
    assert reservoir["a"].tolist() == [[False, True, True, True, False, False, False, False]]
    weights = {"start": dict.fromkeys(both, start), "trained": {"a": trained, "b": trained}}
    patterns = dict.fromkeys(both, Pattern(2, 4))
    masks = ser.select(weights["start"], weights["trained"], both, reservoir, patterns=patterns)
    assert masks["a"].tolist() == [[True, False, True, False, True, True, False, False]]
    # One only: in the layer that is to be pruned less, whose smaller w stands for a larger rho.
    one = ser.select(weights["start"], weights["trained"], both, reservoir, count=1, patterns=patterns,
                     layer_weights={"a": 1.5, "b": 0.5})  # fmt: skip
    assert torch.equal(one["a"], kept) and int(one["b"].sum()) == 4
    with pytest.raises(StageFailed, match="only 2 can be"):
        ser.select(weights["start"], weights["trained"], both, reservoir, count=3, patterns=patterns)


def test_ties_go_to_the_lower_index():
    kept = {"a": torch.zeros(1, 4, dtype=torch.bool)}
    free = {"a": torch.ones(1, 4, dtype=torch.bool)}
    zero, one = {"a": torch.zeros(1, 4)}, {"a": torch.ones(1, 4)}
    assert ser.select(zero, one, kept, free, patterns={"a": Pattern(2, 4)})["a"].tolist() == [
        [True, True, False, False]
    ]
    assert ser.select(zero, one, kept, free, count=3)["a"].tolist() == [[True, True, True, False]]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1000), st.floats(0.1, 0.8), st.floats(0.01, 0.07))
def test_an_unstructured_cycle_ends_at_the_exact_sparsity(seed, before, more):
    weights = {"a": normal(20, 30, seed=seed), "b": normal(8, 4, 3, 3, seed=seed + 1)}
    masks = {
        name: torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) > before
        for name, weight in weights.items()
    }
    weights = {name: weight * masks[name] for name, weight in weights.items()}
    total = 600 + 288
    sparsity = 1 - sum(int(mask.sum()) for mask in masks.values()) / total + more
    done = ser.restore_to(weights, masks, nudged(seed), nudged(seed + 3), sparsity=sparsity)
    assert sum(int(mask.sum()) for mask in done.masks.values()) == round((1 - sparsity) * total)
    assert done.dropped == round(0.08 * total) and done.swapped == 0
    for name, mask in done.masks.items():
        assert not (mask & ~masks[name]).any()
        assert (done.weights[name][~mask] == 0).all()


def test_a_sparsity_that_a_cycle_cannot_reach_is_refused():
    weights, masks = {"a": torch.ones(10, 10)}, {"a": torch.ones(10, 10, dtype=torch.bool)}
    for sparsity in (-0.01, 0.2):
        with pytest.raises(RecipeError, match=r"can.t be reached from 0\.00% by dropping 8\.00%"):
            ser.restore_to(weights, masks, as_it_is, as_it_is, sparsity=sparsity)


@settings(max_examples=60, deadline=None)
@given(PATTERNS, SHAPES, st.floats(0, 1), st.integers(0, 1000))
def test_refilling_fills_every_group_and_never_lowers_what_is_kept(pattern, shape, thinned, seed):
    dense = normal(*shape, seed=seed)
    mask = projected(normal(*shape, seed=seed + 1), pattern)
    mask &= torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > thinned
    weight = normal(*shape, seed=seed + 2) * mask
    filled, full = ser.refill(weight, dense, mask, pattern)
    assert (per_group(full, pattern) == pattern.keep).all()
    assert torch.equal(filled[mask], weight[mask])
    added = full & ~mask
    assert torch.equal(filled[added], dense[added])
    assert float(filled.abs().double().sum()) >= float(weight.abs().double().sum())
    # No dense entry left out of a group is larger than one let in there.
    let_in = as_rows(torch.where(added, dense.abs(), math.inf)).reshape(-1, pattern.group).amin(1)
    left_out = as_rows(torch.where(full, 0.0, dense.abs())).reshape(-1, pattern.group).amax(1)
    assert (left_out <= let_in).all()


def test_refilling_obeys_a_given_score():
    mask = torch.tensor([[True, False, False, False]])
    dense, score = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[0.0, 9.0, 1.0, 1.0]])
    filled, full = ser.refill(torch.tensor([[7.0, 0, 0, 0]]), dense, mask, Pattern(2, 4), score)
    assert filled.tolist() == [[7.0, 2.0, 0.0, 0.0]] and full.tolist() == [[True, True, False, False]]


class LeastSquares:
    """y = x W^T with a planted N:M support; training is gradient descent on the squared error."""

    def __init__(self, pattern, shape=(16, 32), seed=0):
        self.truth = normal(*shape, seed=seed) + 0.5 * normal(*shape, seed=seed).sign()
        self.support = from_rows(
            project(torch.rand(shape, generator=torch.Generator().manual_seed(seed)), pattern), shape
        )
        self.truth *= self.support
        self.inputs = normal(400, shape[1], seed=seed + 1)
        self.outputs = self.inputs @ self.truth.T

    def loss(self, weight):
        return float((self.inputs @ weight.T - self.outputs).square().mean())

    def train(self, steps):
        def descend(weights, may_move):
            weight = weights["layer"]
            for _ in range(steps):
                gradient = (self.inputs @ weight.T - self.outputs).T @ self.inputs / len(self.inputs)
                weight = torch.where(may_move["layer"], weight - 0.3 * gradient, weight)
            return {"layer": weight}

        return descend


@pytest.mark.parametrize("text", ["2:4", "4:8"])
def test_restoring_finds_a_planted_support_and_beats_no_restore(text):
    pattern = Pattern.parse(text)
    problem = LeastSquares(pattern)
    # A mask that is wrong in many groups, tuned to convergence: the wrong entries then carry little weight.
    mask = projected(problem.truth + normal(16, 32, seed=5), pattern)
    first = problem.train(60)({"layer": torch.zeros(16, 32)}, {"layer": mask})
    right = float((mask & problem.support).sum() / problem.support.sum())
    assert right < 0.95
    weights, masks = first, {"layer": mask}
    for _ in range(6):
        done = ser.restore(weights, masks, problem.train(5), problem.train(20), share=0.25, patterns={"layer": pattern})
        weights, masks = done.weights, done.masks
    without = problem.train(6 * 25)(first, {"layer": mask})
    assert problem.loss(weights["layer"]) < 0.02 * problem.loss(without["layer"])
    assert float((masks["layer"] & problem.support).sum() / problem.support.sum()) > 0.99


def test_a_real_module_is_trained_between_the_masks():
    """A conv and a linear: gradients masked, as a trainer would do it."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4))
    layers, pattern = {"conv": network[0], "linear": network[3]}, Pattern(2, 4)
    images, wanted = normal(32, 8, 4, 4, seed=1), normal(32, 4, seed=2)
    weights = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    masks = {name: projected(weight, pattern) for name, weight in weights.items()}
    weights = {name: weight * masks[name] for name, weight in weights.items()}

    def train(start, may_move):
        for name, layer in layers.items():
            layer.weight.data.copy_(start[name])
        for _ in range(5):
            network.zero_grad()
            (network(images) - wanted).square().mean().backward()
            for name, layer in layers.items():
                layer.weight.data -= 0.1 * torch.where(may_move[name], layer.weight.grad, 0.0)
        return {name: layer.weight for name, layer in layers.items()}

    done = ser.restore(weights, masks, train, train, share=0.2, patterns=dict.fromkeys(layers, pattern))
    assert done.swapped > 0
    assert all(bad_groups(done.weights[name], pattern) == 0 for name in layers)
    assert not any(weight.requires_grad for weight in done.weights.values())


def test_what_breaks_its_promise_is_refused():
    pattern = {"a": Pattern(2, 4)}
    weights = {"a": torch.tensor([[3.0, 2.0, 0.0, 0.0, 1.0, 4.0, 0.0, 0.0]])}
    masks = {"a": weights["a"] != 0}

    def restore(grow=as_it_is, tune=as_it_is, *, share=0.25, masks=masks, patterns=pattern):
        return ser.restore(weights, masks, grow, tune, share=share, patterns=patterns)

    with pytest.raises(StageFailed, match="moved 1 weights of layer 'a' that were frozen"):
        restore(grow=lambda w, _: {"a": w["a"] + torch.tensor([[1.0, 0, 0, 0, 0, 0, 0, 0]])})
    with pytest.raises(StageFailed, match="no finite weight"):
        restore(tune=lambda w, _: {"a": w["a"] * math.nan})
    with pytest.raises(StageFailed, match="no finite weight"):
        restore(grow=lambda w, _: {})
    with pytest.raises(RecipeError, match="share to over-prune is 1;"):
        restore(share=1.0)
    with pytest.raises(StageFailed, match="2 groups that are not 2:4"):
        restore(masks={"a": torch.ones(1, 8, dtype=torch.bool)})
    with pytest.raises(StageFailed, match="does not fit"):
        restore(masks={"a": torch.ones(8)})
    with pytest.raises(StageFailed, match="needs a pattern"):
        restore(patterns={})
    with pytest.raises(StageFailed, match="does not fit"):
        ser.refill(weights["a"], torch.ones(1, 4), masks["a"], Pattern(2, 4))
