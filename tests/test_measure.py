"""What each pattern does to each layer alone, and the choice by it."""

import copy
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from pruning_networks import captured, correlated_images, quiet, small_resnet, small_vit
from safetensors.torch import load_file
from scipy.stats import spearmanr
from torch import nn

from mpdeploy.errors import RecipeError, StageFailed
from mpdeploy.pruning.adjoint import IMAGES, Proposal, adjoint_scores, proposal, unit_of
from mpdeploy.pruning.branches import landing
from mpdeploy.pruning.capture import capture, layer_nodes, state_of
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


def lively_resnet():
    """BatchNorms that do something: of an untrained one some are the identity, and some multiply by zero."""
    model, generator = small_resnet(), torch.Generator().manual_seed(3)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            for tensor, low in (
                (part.weight, 0.5),
                (part.bias, -0.5),
                (part.running_mean, -0.5),
                (part.running_var, 1),
            ):
                tensor.data.uniform_(low, low + 1, generator=generator)
    return model


NETWORKS = {"vit": small_vit, "resnet": lively_resnet}
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
        state = state_of(model, captured(model, 32))
        node, norm = units(model)[name]
        alone = proposal(unit_of(node, norm), state_of(other, captured(model, 32)))
        [score] = adjoint_scores(captured(model, 32), state, held, {(name, pattern): alone}).values()
        assert found.adjoint[name, pattern] == pytest.approx(score, rel=2e-2) and score > 0


def test_the_choice_keeps_the_budget_and_no_ranking_beats_the_measured_error(case):
    model, layers, fitting, found = case
    budget = budget_of(layers, fitting, "macs", 0.7)
    weights = {name: model.get_parameter(f"{name}.weight") for name in fitting}
    ranked = rank(found, budget, weights, dict.fromkeys(fitting, 1.0))
    assert [one.ranking for one in ranked] == ["error", "edge", "slack", "adjoint"]
    scored = sum(found.adjoint[pick] for pick in ranked[3].chosen.items() if pick[1])
    assert ranked[3].predicted == pytest.approx(scored) and ranked[3].gap == pytest.approx(0.0, abs=1e-12)
    assert ranked == rank(found, budget, weights, dict.fromkeys(fitting, 1.0))
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


# ------------------------------------------------------------------------------------------------------ adjoint scores


def units(model):
    """Operation and name of the BatchNorm behind it, of every layer that gets a pattern and of the head."""
    graph = captured(model, 32)
    names = [*choose_among(model, PATTERNS, [], SIZE)[1], "head" if hasattr(model, "head") else "fc"]
    state = state_of(model, graph)
    return {name: (node, landing(graph, node, state).norm) for name, node in layer_nodes(graph, names).items()}


def changes(model, scale=1.0):
    """For each layer two changes of all that pruning may touch: weight, bias, mean and variance of the BatchNorm."""
    generator = torch.Generator().manual_seed(5)
    made = {}
    for name, (node, norm) in units(model).items():
        for label in ("a", "b"):
            tensors = {}
            for part in filter(None, (name, norm)):
                for key, value in model.get_submodule(part).state_dict().items():
                    if value.is_floating_point():
                        noise = torch.rand(value.shape, generator=generator).to(value)
                        tensors[f"{part}.{key}"] = value + scale * (0.3 * noise * value.abs().mean() + 0.05 * noise)
            made[name, label] = Proposal(unit_of(node, norm), tensors)
    return made


def by_brute_force(model, image, found):
    """sum_i |a_i| |(R psi)_i| of one image, with hooks on the modules and without the captured graph."""
    seen, outputs = {}, {}
    hooks = []
    for name, (_, norm) in units(model).items():

        def enter(_module, inputs, name=name):
            seen[name] = inputs[0].detach().clone()

        def leave(_module, _inputs, output, name=name):
            output.retain_grad()
            outputs[name] = output
            return output.clone()

        hooks.append(model.get_submodule(name).register_forward_pre_hook(enter))
        hooks.append(model.get_submodule(norm or name).register_forward_hook(leave))
    best, second = model(image[None])[0].sort(descending=True).values[:2]
    (second - best).backward()
    for hook in hooks:
        hook.remove()
    scores = {}
    for (name, label), one in found.items():
        other = copy.deepcopy(model)
        other.load_state_dict({**model.state_dict(), **one.tensors})
        norm = units(model)[name][1]
        with torch.no_grad():
            made = other.get_submodule(name)(seen[name])
            made = other.get_submodule(norm)(made) if norm else made
        adjoint = outputs[name].grad.double().flatten().tolist()
        moved = (made - outputs[name]).double().flatten().tolist()
        scores[name, label] = sum(abs(a) * abs(r) for a, r in zip(adjoint, moved, strict=True))
    return scores


@pytest.mark.parametrize("name", NETWORKS)
def test_the_adjoint_score_is_what_autograd_on_the_modules_gives_image_by_image(name):
    """For convolutions with a BatchNorm and in-place activations behind them, and for linear layers on tokens."""
    model = NETWORKS[name]()
    images = correlated_images(IMAGES + 1, seed=2)
    proposals = changes(model)
    graph = captured(model, 32)
    scores = adjoint_scores(graph, state_of(model, graph), images, proposals)
    assert any(norm for _, norm in units(model).values()) == (name == "resnet")
    alone = [by_brute_force(model, image, proposals) for image in images]
    for key, score in scores.items():
        assert score == pytest.approx(sum(one[key] for one in alone) / len(images), rel=1e-4)
        assert score > 0
    assert scores == adjoint_scores(graph, state_of(model, graph), images, proposals)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_tiny_change_moves_no_margin_by_more_than_its_score(name):
    """To first order the signed sum is the change of the margin, and signs are dropped."""
    model = NETWORKS[name]().double()
    images = correlated_images(3, seed=4).double()
    graph = captured(model, 32)
    proposals = changes(model, scale=1e-6)
    scores = adjoint_scores(graph, state_of(model, graph), images, proposals)
    with torch.no_grad():
        logits = model(images)
    label, runner_up = logits.topk(2, dim=1).indices.T
    rows = torch.arange(len(images))
    for key, one in proposals.items():
        other = copy.deepcopy(model)
        other.load_state_dict({**model.state_dict(), **one.tensors})
        with torch.no_grad():
            change = other(images) - logits
        lost = (change[rows, runner_up] - change[rows, label]).abs().mean()
        assert 0 < float(lost) <= scores[key] * (1 + 1e-4)


def test_adjoints_leave_images_and_weights_alone_and_need_no_gradients_switched_on():
    model = NETWORKS["resnet"]()
    graph, images = captured(model, 32), correlated_images(3)
    before, pixels = copy.deepcopy(model.state_dict()), images.clone()
    proposals = changes(model)
    scores = adjoint_scores(graph, state_of(model, graph), images, proposals)
    with torch.no_grad():
        assert adjoint_scores(graph, state_of(model, graph), images, proposals) == scores
    assert torch.equal(images, pixels) and all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


class Cut(nn.Module):
    """A network that hides its first layer from gradients."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, images):
        return self.last(self.first(images.flatten(1)).detach())


def test_a_layer_that_no_gradient_reaches_and_a_change_to_nan_are_refused():
    model = Cut().eval()
    graph = capture(model, (1, 4, 4))
    state, nodes = state_of(model, graph), layer_nodes(graph, ["first", "last"])
    images = torch.rand(3, 1, 4, 4)
    with pytest.raises(StageFailed, match="No gradient of the logits reaches"):
        adjoint_scores(graph, state, images, {(n, "2:4"): proposal((node,), state) for n, node in nodes.items()})
    spoilt = Proposal((nodes["last"],), {"last.weight": torch.full((3, 16), torch.nan)})
    with pytest.raises(StageFailed, match=r"adjoint score of .* is nan"):
        adjoint_scores(graph, state, images, {("last", "2:4"): spoilt})
    same = adjoint_scores(graph, state, images, {("last", "2:4"): proposal((nodes["last"],), state)})
    assert same == {("last", "2:4"): 0.0}


def test_on_the_quickstart_network_the_adjoint_ranks_choices_almost_as_running_them_does():
    """Against the squared change of the logits that each choice alone was measured to cause."""
    home = Path(__file__).resolve().parents[1] / "recipes" / "quickstart"
    args = {"img_size": 28, "patch_size": 4, "in_chans": 1, "embed_dim": 128, "depth": 4, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, class_token=False, global_pool="avg", **args)
    model.load_state_dict(load_file(home / "vit.safetensors"))
    with np.load(home / "fashion_mnist_slice.npz") as data:
        pixels = torch.from_numpy(data["train_images"][:128]).float().reshape(-1, 1, 28, 28)
    batches = ((pixels / 255 - 0.286) / 0.353).split(32)
    size = (1, 28, 28)
    layers, fitting = choose_among(model.eval(), PATTERNS, [], size)
    found = measure(model, capture(model, size), batches, layers, fitting, Settings("magnitude"), progress=quiet)
    moved = list(found.moved.values())
    follows = {"adjoint": spearmanr([found.adjoint[key] for key in found.moved], moved).statistic}
    relative = {(item.layer, item.pattern): item.relative for item in found.candidates}
    follows["relative"] = spearmanr([relative[key] for key in found.moved], moved).statistic
    assert follows["adjoint"] > 0.9 and follows["adjoint"] > follows["relative"], follows
