"""What each pattern does to each layer alone, and the choice by it."""

import copy

import numpy as np
import pytest
import torch
from pruning_networks import captured, correlated_images, quiet, small_resnet, small_vit

from mpdeploy.errors import RecipeError, StageFailed
from mpdeploy.pruning.layers import UNSTRUCTURED, choose
from mpdeploy.pruning.measure import (
    budget_of,
    check_budget,
    choose_among,
    described,
    left,
    measure,
    rank,
    with_patterns,
)
from mpdeploy.pruning.solve import Settings, prune_network

SIZE = (3, 32, 32)
NETWORKS = {"vit": small_vit, "resnet": small_resnet}
BATCHES = correlated_images(32).split(8)
PATTERNS = ("12:16", "2:4")


@pytest.fixture(scope="module", params=NETWORKS)
def case(request):
    """A network, its layers, their patterns, and what was measured on 6 held-out images."""
    model = NETWORKS[request.param]()
    before = copy.deepcopy(model.state_dict())
    layers, fitting = choose_among(model, PATTERNS, [], SIZE)
    told = []
    found = measure(
        model,
        captured(model, 32),
        BATCHES,
        layers,
        fitting,
        Settings(),
        images=6,
        progress=lambda done, total: told.append((done, total)),
    )
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert told[-1] == (len(fitting), len(fitting))
    return model, layers, fitting, found


def test_a_layer_has_the_patterns_that_fit_it_and_dense(case):
    _, layers, fitting, found = case
    for layer in layers:
        wanted = tuple(p for p in PATTERNS if layer.shape[1] % int(p.split(":")[1]) == 0)
        assert layer.pattern == ""
        assert fitting.get(layer.name, ()) == (() if layer.reason else wanted)
        assert bool(layer.reason) != (layer.name in fitting)
    keys = [(item.layer, item.pattern) for item in found.candidates]
    assert sorted(keys) == sorted((name, p) for name, fits in fitting.items() for p in ("", *fits))


def test_displacements_are_those_of_the_network_with_that_layer_alone_pruned(case):
    model, layers, fitting, found = case
    held = torch.cat(list(BATCHES))[3::4][:6]
    with torch.no_grad():
        dense = model(held).double()
    top = dense.topk(2, dim=1).values
    assert np.allclose(found.margins, (top[:, 0] - top[:, 1]).numpy(), atol=1e-5)
    name = list(fitting)[len(fitting) // 2]
    for pattern in fitting[name]:
        other = copy.deepcopy(model)
        only = with_patterns(layers, {**dict.fromkeys(fitting, ""), name: pattern})
        [result] = prune_network(other, captured(model, 32), BATCHES, only, settings=Settings(), progress=quiet)
        with torch.no_grad():
            change = other(held).double() - dense
        assert found.moved[name, pattern] == pytest.approx(float(change.square().sum(1).mean()), rel=1e-2)
        assert np.allclose(found.displacement[name, pattern], change.abs().amax(1).numpy(), rtol=2e-2, atol=1e-5)
        [own] = [c for c in found.candidates if (c.layer, c.pattern) == (name, pattern)]
        assert own.relative == pytest.approx(result.error_after_refit, rel=1e-2)
        assert own.energy > 0


def test_the_choice_keeps_the_budget_and_no_ranking_beats_the_measured_error(case):
    model, layers, fitting, found = case
    budget = budget_of(layers, fitting, "macs", 0.7)
    weights = {name: model.get_parameter(f"{name}.weight") for name in fitting}
    ranked = rank(found, budget, weights, dict.fromkeys(fitting, 1.0))
    assert [one.ranking for one in ranked] == ["error", "edge", "slack"]
    assert all(one.cost <= budget and one.measured >= ranked[0].measured - 1e-12 for one in ranked)
    made = described(found, ranked, "edge", "macs")
    assert made["budget"] == budget == round(0.7 * made["dense"])
    for row in made["rankings"]:
        parts = [next(c for c in made["layers"][n] if c["pattern"] == p) for n, p in row["chosen"].items()]
        assert row["cost"] == sum(part["cost"] for part in parts)
        assert row["measured"] == pytest.approx(sum(part["error"] for part in parts))
    assert {row["pattern"] for row in made["uniform"]} == set(PATTERNS)
    chosen = ranked[1].chosen
    for layer in with_patterns(layers, chosen):
        assert layer.pattern == chosen.get(layer.name, "") and bool(layer.reason) != bool(layer.pattern)


def test_a_network_with_every_layer_dense_by_choice_says_so():
    layers, fitting = choose_among(small_vit(), ("2:4",), [], SIZE)
    dense = with_patterns(layers, dict.fromkeys(fitting, ""))
    assert {layer.reason for layer in dense if layer.name in fitting} == {"The allocation leaves it dense."}


def test_what_a_pattern_leaves_is_counted_in_either_unit():
    [layer] = [x for x in choose(small_vit(), "2:4", [], SIZE) if x.name == "blocks.0.attn.qkv"]
    assert left(layer, "", "weights") == 192 * 64 and left(layer, "12:16", "weights") == 192 * 64 * 3 // 4
    assert left(layer, "2:4", "macs") == layer.macs // 2


def test_a_budget_below_the_sparsest_choice_is_refused_with_the_least_share():
    layers, fitting = choose_among(small_vit(), PATTERNS, [], SIZE)
    check_budget(layers, fitting, "macs", 0.5)
    with pytest.raises(RecipeError, match=r"budget = 0.45 can't be met.* 0.5 of the prunable layers' weights are left"):
        check_budget(layers, fitting, "weights", 0.45)


def test_weights_are_put_back_when_measuring_fails():
    model = small_vit()
    layers, fitting = choose_among(model, ("2:4",), [], SIZE)
    before = copy.deepcopy(model.state_dict())
    spoilt = [batch.clone() for batch in BATCHES]
    spoilt[0][0] = float("nan")
    with pytest.raises(StageFailed, match="NaN"):
        measure(model, captured(model, 32), spoilt, layers, fitting, Settings(), progress=quiet)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_given_mask_is_kept_and_refitted(name):
    """Rows keep different counts, one layer loses a whole row, and the refit still lowers the held-out error."""
    model = NETWORKS[name]()
    layers = choose(model, UNSTRUCTURED, [], SIZE)
    weights = {x.name: model.get_parameter(f"{x.name}.weight").detach() for x in layers if x.pattern}
    masks = {key: weight.abs() >= weight.abs().median() for key, weight in weights.items()}
    next(iter(masks.values()))[0] = False
    results = prune_network(
        model, captured(model, 32), BATCHES, layers, settings=Settings("magnitude"), progress=quiet, masks=masks
    )
    for result in results:
        assert not bool((model.get_parameter(f"{result.name}.weight")[~masks[result.name]] != 0).any())
        assert result.bad_groups == 0 and result.error_after_refit <= result.error_before_refit
    assert sum(r.error_after_refit < r.error_before_refit for r in results) > len(results) / 2


def test_unstructured_zeros_fit_any_number_of_inputs():
    layers = {x.name: x for x in choose(small_vit(), UNSTRUCTURED, [], SIZE, keep_stem_dense=False)}
    assert layers["patch_embed.proj"].pattern == UNSTRUCTURED and "head" in layers["head"].reason
