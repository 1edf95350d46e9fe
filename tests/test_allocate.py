import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpdeploy.errors import RecipeError, StageFailed
from mpdeploy.pruning import allocate as al
from mpdeploy.pruning.allocate import Candidate
from mpdeploy.pruning.spectrum import fit
from mpdeploy.pruning.unstructured import seb_weights

PATTERNS = ("", "12:16", "2:4", "1:4")
DENSITY = {"": 1.0, "12:16": 0.75, "2:4": 0.5, "1:4": 0.25}


@st.composite
def problems(draw):
    """A few layers with a few choices each, small integers so that ties and dominated choices are common."""
    candidates = []
    for layer in range(draw(st.integers(1, 4))):
        for pattern in PATTERNS[: draw(st.integers(1, 4))]:
            cost, error = draw(st.integers(0, 9)), draw(st.integers(0, 6)) / 3
            candidates.append(Candidate(f"layer{layer}", pattern, cost, error, error))
    return candidates


def choices(candidates):
    layers = {}
    for item in candidates:
        layers.setdefault(item.layer, []).append(item)
    return list(itertools.product(*layers.values()))


@settings(max_examples=150, deadline=None)
@given(problems(), st.integers(0, 36))
def test_no_choice_within_the_budget_is_better(candidates, budget):
    values = al.by_error(candidates)
    possible = [picked for picked in choices(candidates) if sum(item.cost for item in picked) <= budget]
    if not possible:
        least = min(sum(item.cost for item in picked) for picked in choices(candidates))
        with pytest.raises(RecipeError, match=f"still needs {least}") as caught:
            al.allocate(candidates, budget, values)
        assert str(least) in caught.value.hint
        return
    found = al.allocate(candidates, budget, values)
    best = min(possible, key=lambda picked: (sum(i.relative for i in picked), sum(i.cost for i in picked)))
    assert found.predicted == pytest.approx(sum(item.relative for item in best), abs=1e-12)
    assert found.gap == pytest.approx(0.0, abs=1e-12)
    assert found.cost <= budget
    assert found.cost == sum(
        next(i.cost for i in candidates if (i.layer, i.pattern) == key) for key in found.chosen.items()
    )


@settings(max_examples=60, deadline=None)
@given(problems(), st.randoms())
def test_a_larger_budget_is_never_worse_and_the_order_within_layers_does_not_matter(candidates, random):
    values = al.by_error(candidates)
    least = sum(min(i.cost for i in candidates if i.layer == layer) for layer in {i.layer for i in candidates})
    before = math.inf
    shuffled = sorted(random.sample(candidates, len(candidates)), key=lambda item: item.layer)
    for budget in range(least, 40, 3):
        found = al.allocate(candidates, budget, values)
        assert found.predicted <= before + 1e-12
        assert found == al.allocate(shuffled, budget, values)
        before = found.predicted


@settings(max_examples=60, deadline=None)
@given(problems(), st.integers(36, 60), st.integers(0, 10_000))
def test_ranking_by_error_is_never_worse_in_measured_error(candidates, budget, seed):
    generator = np.random.default_rng(seed)
    other = {key: float(generator.integers(0, 5)) for key in al.by_error(candidates)}
    first, second = al.compare(candidates, budget, {"edge": other}, al.by_error(candidates))
    assert (first.ranking, second.ranking) == ("error", "edge")
    assert first.measured <= second.measured + 1e-12
    assert first.predicted == first.measured


def network(layers, seed=0):
    """Choices of a network of the size of a vision transformer, with errors that grow faster than what they save."""
    generator = np.random.default_rng(seed)
    made = []
    for layer in range(layers):
        macs, scale = int(generator.integers(50, 400)) * 1_000_003, generator.lognormal()
        for pattern, density in DENSITY.items():
            error = 0.0 if not pattern else scale * (1 - density) ** 2 * generator.uniform(0.8, 1.2)
            made.append(Candidate(f"blocks.{layer}", pattern, int(macs * density), error, error * 7))
    return made


def test_a_large_network_is_solved_exactly_and_quickly():
    candidates = network(100)
    budget = int(0.6 * sum(item.cost for item in candidates if not item.pattern))
    found = al.allocate(candidates, budget, al.by_error(candidates))
    assert found.gap == 0.0
    assert found.cost <= budget
    assert found == al.allocate(candidates, budget, al.by_error(candidates))


def test_a_cut_off_search_still_fits_the_budget_and_admits_its_gap(monkeypatch):
    candidates = network(40, seed=1)
    budget = int(0.55 * sum(item.cost for item in candidates if not item.pattern))
    exact = al.allocate(candidates, budget, al.by_error(candidates))
    for states in (1, 3):
        monkeypatch.setattr(al, "MOST_STATES", states)
        rough = al.allocate(candidates, budget, al.by_error(candidates))
        assert rough.cost <= budget
        assert rough.bound <= exact.predicted <= rough.predicted
        assert rough.gap < 0.1 * exact.predicted


def test_what_must_stay_dense_stays_and_a_free_budget_keeps_all_dense():
    candidates = [Candidate("head", "", 40, 0.0, 0.0), *network(3)]
    dense = sum(item.cost for item in candidates if not item.pattern)
    everything = al.allocate(candidates, dense, al.by_error(candidates))
    assert set(everything.chosen.values()) == {""} and everything.predicted == 0.0
    squeezed = al.allocate(candidates, dense // 2, al.by_error(candidates))
    assert squeezed.chosen["head"] == "" and "1:4" in squeezed.chosen.values()


def two_layers(errors):
    """Layers of equal size, dense or 2:4; the budget lets one of them stay dense."""
    made = []
    for layer, error in errors.items():
        made += [Candidate(layer, "", 100, 0.0, 0.0), Candidate(layer, "2:4", 50, error, error)]
    return made


def test_the_edge_helps_where_layers_differ_in_scale_only():
    # What follows normalises, so scale is of no consequence; the smaller layer matters more. Plain magnitude prunes it
    # because its weights are small, the edge sees that they are small throughout.
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: scale * torch.randn(32, 64, generator=generator) for name, scale in (("small", 0.6), ("large", 1.0))
    }
    spectra = {name: fit(weight.numpy()) for name, weight in weights.items()}
    candidates = two_layers({"small": 0.3, "large": 0.1})
    rankings = {
        "magnitude": al.by_edge(candidates, weights, dict.fromkeys(weights, 1.0)),
        "edge": al.by_edge(candidates, weights, seb_weights(spectra, 0.5)),
    }
    error, magnitude, edge = al.compare(candidates, 150, rankings, al.by_error(candidates))
    assert magnitude.chosen == {"small": "2:4", "large": ""}
    assert edge.chosen == error.chosen == {"small": "", "large": "2:4"}
    assert al.differences((error, edge)) == {}


def test_the_edge_misleads_where_small_weights_meet_large_inputs():
    # The edge sees weights only: the layer of small weights looks cheap although its inputs make it matter.
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: scale * torch.randn(32, 64, generator=generator) for name, scale in (("small", 0.1), ("large", 1.0))
    }
    candidates = two_layers({"small": 0.5, "large": 0.01})
    misled = al.by_edge(candidates, weights, dict.fromkeys(weights, 1.0))
    error, edge = al.compare(candidates, 150, {"edge": misled}, al.by_error(candidates))
    assert edge.chosen == {"small": "2:4", "large": ""}
    assert edge.measured == 0.5 and error.measured == 0.01
    assert al.differences((error, edge)) == {
        "small": {"error": "", "edge": "2:4"}, "large": {"error": "2:4", "edge": ""},
    }  # fmt: skip


def test_by_edge_is_the_dropped_magnitude_over_the_layers_weight():
    weight = torch.tensor([[1.0, -4.0, 3.0, 2.0, 0.0, 5.0, -6.0, 7.0]])
    values = al.by_edge(two_layers({"a": 0.1}), {"a": weight}, {"a": 2.0})
    assert values == {("a", ""): 0.0, ("a", "2:4"): (1 + 2 + 0 + 5) / 2}


def test_sensitivities_turn_energies_into_one_unit():
    candidates = [Candidate("a", "2:4", 1, 0.5, 10.0), Candidate("b", "2:4", 1, 0.4, 100.0)]
    assert al.by_error(candidates) == {("a", "2:4"): 0.5, ("b", "2:4"): 0.4}
    assert al.by_error(candidates, {"a": 2.0, "b": 0.1}) == {("a", "2:4"): 20.0, ("b", "2:4"): 10.0}


def test_sensitivities_pool_what_was_measured():
    candidates = [
        Candidate("a", "", 4, 0.0, 0.0), Candidate("a", "12:16", 3, 0.1, 1.0), Candidate("a", "2:4", 2, 0.3, 3.0),
        Candidate("b", "", 4, 0.0, 0.0), Candidate("b", "2:4", 2, 0.3, 5.0),
        Candidate("head", "", 4, 0.0, 0.0),
    ]  # fmt: skip
    moved = {("a", "12:16"): 0.5, ("a", "2:4"): 1.5, ("b", "2:4"): 1.0}
    assert al.sensitivities(candidates, moved) == {"a": 0.5, "b": 0.2, "head": 0.0}
    assert al.by_error(candidates, al.sensitivities(candidates, moved))["b", "2:4"] == 1.0
    del moved["a", "2:4"]
    assert al.sensitivities(candidates, moved)["a"] == 0.5
    with pytest.raises(StageFailed, match="a pattern of layer 'b'"):
        al.sensitivities(candidates, {("a", "2:4"): 1.0})


def test_slack_is_the_quantile_of_the_share_of_the_margins():
    candidates = two_layers({"a": 0.1, "b": 0.1})
    margins = np.array([2.0, 4.0, 0.0, 8.0])
    displacement = {("a", "2:4"): np.array([0.1, 0.4, 9.0, 0.4]), ("b", "2:4"): np.array([0.5, 0.1, 9.0, 0.1])}
    largest = al.by_slack(candidates, displacement, margins, quantile=1.0)
    assert largest == {
        ("a", ""): 0.0,
        ("a", "2:4"): pytest.approx(0.2),
        ("b", ""): 0.0,
        ("b", "2:4"): pytest.approx(0.5),
    }
    middle = al.by_slack(candidates, displacement, margins)
    assert middle["a", "2:4"] == pytest.approx(0.1) and middle["b", "2:4"] == pytest.approx(0.05)
    # The sum of the largest shares bounds every sample's: Cor. 8.
    total = 2 * (displacement["a", "2:4"] + displacement["b", "2:4"])[margins > 0] / margins[margins > 0]
    assert total.max() <= largest["a", "2:4"] + largest["b", "2:4"]


def test_by_adjoint_takes_the_scores_and_prunes_the_layer_that_the_margins_feel_least():
    candidates = two_layers({"a": 0.1, "b": 0.5})
    scores = {("a", "2:4"): 0.3, ("b", "2:4"): 0.2}
    values = al.by_adjoint(candidates, scores)
    assert values == {("a", ""): 0.0, ("b", ""): 0.0, **scores}
    error, adjoint = al.compare(candidates, 150, {"adjoint": values}, al.by_error(candidates))
    assert adjoint.chosen == {"a": "", "b": "2:4"} and (adjoint.predicted, adjoint.measured) == (0.2, 0.5)
    assert error.chosen == {"a": "2:4", "b": ""} and adjoint.cost == 150
    for wrong in ({}, {("a", "2:4"): -0.1, ("b", "2:4"): 0.2}, {**scores, ("b", "2:4"): math.inf}):
        with pytest.raises(StageFailed, match="has the adjoint score"):
            al.by_adjoint(candidates, wrong)


def test_what_makes_no_sense_is_refused():
    candidates = two_layers({"a": 0.1})
    values = al.by_error(candidates)
    with pytest.raises(StageFailed, match="two candidates"):
        al.allocate([*candidates, candidates[0]], 100, values)
    with pytest.raises(StageFailed, match="the value nan"):
        al.allocate(candidates, 100, {("a", ""): 0.0})
    with pytest.raises(StageFailed, match="has the error nan"):
        al.by_error(candidates, {})
    with pytest.raises(StageFailed, match="no weight tensor"):
        al.by_edge(candidates, {}, {})
    with pytest.raises(StageFailed, match="finite displacements"):
        al.by_slack(candidates, {("a", "2:4"): np.array([np.nan])}, np.ones(1))
    with pytest.raises(StageFailed, match="no slack"):
        al.by_slack(candidates, {}, np.zeros(3))
    with pytest.raises(RecipeError, match="quantile"):
        al.by_slack(candidates, {}, np.ones(3), quantile=0.0)
