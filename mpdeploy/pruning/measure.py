"""What each pattern would do to each layer alone: one walk of the dense network, every choice solved and tried.

The numbers are what `allocate` chooses by: the layer's own output error on held-out images, how far the logits of a
few held-out images move when only this layer is pruned, and what one backward pass of the dense network says that this
would cost their margins. They are measured before channels are reordered and with dense inputs, so they rank choices;
they don't foretell the finished network's error.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from mpdeploy.errors import RecipeError, StageFailed
from mpdeploy.pruning import allocate
from mpdeploy.pruning.adjoint import Proposal, adjoint_scores, proposal, unit_of
from mpdeploy.pruning.allocate import DENSE, Allocation, Candidate
from mpdeploy.pruning.branches import landing
from mpdeploy.pruning.capture import Stream, layer_nodes, state_of
from mpdeploy.pruning.layers import Layer, choose, weight_of
from mpdeploy.pruning.moments import Moments
from mpdeploy.pruning.patterns import Pattern, as_rows
from mpdeploy.pruning.solve import Settings, held_energy, look, prune_layer, split_images

Floats = NDArray[np.float64]
BATCH = 32  # images per step of the walk whose logits are compared
UNITS = ("macs", "weights")


@dataclass(frozen=True)
class Measured:
    """What was measured.

    Args:
        candidates: dense and each fitting pattern of every layer that has one, in execution order.
        moved: by layer and pattern, the logits' squared change per image, summed over classes, when it alone is pruned.
        displacement: by layer and pattern, float64 [images], the largest change of a logit of each image.
        margins: float64 [images], dense top-1 less top-2 logit.
        adjoint: by layer and pattern, what it alone would cost these margins; see `adjoint.adjoint_scores`.
    """

    candidates: tuple[Candidate, ...]
    moved: dict[tuple[str, str], float]
    displacement: dict[tuple[str, str], Floats]
    margins: Floats
    adjoint: dict[tuple[str, str], float]


def choose_among(
    module: nn.Module,
    patterns: Sequence[str],
    skip: Sequence[str],
    input_size: tuple[int, int, int],
    *,
    keep_stem_dense: bool = True,
    keep_head_dense: bool = True,
) -> tuple[list[Layer], dict[str, tuple[str, ...]]]:
    """List every layer as `layers.choose` does, and the patterns that fit it.

    Args:
        module: the network in eval mode; the meta device is enough.
        patterns: "2:4" and the like.
        skip: as for `layers.choose`.
        input_size: channels, height, width.
        keep_stem_dense: as for `layers.choose`.
        keep_head_dense: as for `layers.choose`.

    Returns:
        The layers, each without a pattern, and with a reason where none fits; and the fitting patterns by layer, only
        of layers that have one.

    Raises:
        RecipeError, StageFailed: as `layers.choose`.
    """
    listed = [
        choose(module, pattern, skip, input_size, keep_stem_dense=keep_stem_dense, keep_head_dense=keep_head_dense)
        for pattern in patterns
    ]
    layers, fitting = [], {}
    for rows in zip(*listed, strict=True):
        fits = tuple(row.pattern for row in rows if row.pattern)
        layers.append(replace(rows[0], pattern="", reason="" if fits else rows[0].reason))
        if fits:
            fitting[rows[0].name] = fits
    return layers, fitting


def with_patterns(layers: Sequence[Layer], chosen: Mapping[str, str]) -> list[Layer]:
    """Give the layers their patterns; those left dense by the choice say so."""
    dense = "The allocation leaves it dense."
    return [
        replace(layer, pattern=chosen[layer.name], reason="" if chosen[layer.name] else dense)
        if layer.name in chosen
        else layer
        for layer in layers
    ]


def left(layer: Layer, pattern: str, unit: str) -> int:
    """Multiply-accumulates per image, or weights, that a pattern leaves of a layer."""
    dense = layer.macs if unit == "macs" else int(np.prod(layer.shape))
    if pattern == DENSE:
        return dense
    rule = Pattern.parse(pattern)
    return dense - dense * (rule.group - rule.keep) // rule.group


def budget_of(layers: Sequence[Layer], fitting: Mapping[str, Sequence[str]], unit: str, share: float) -> int:
    """Turn a share of what the layers with a fitting pattern need when dense into a number of units."""
    return round(share * sum(left(layer, DENSE, unit) for layer in layers if layer.name in fitting))


def check_budget(layers: Sequence[Layer], fitting: Mapping[str, Sequence[str]], unit: str, share: float) -> None:
    """Refuse a budget that the sparsest choice of every layer still exceeds.

    Raises:
        RecipeError: naming the least share that can be reached.
    """
    dense = budget_of(layers, fitting, unit, 1.0)
    least = sum(min(left(layer, p, unit) for p in fitting[layer.name]) for layer in layers if layer.name in fitting)
    if round(share * dense) < least:
        raise RecipeError(
            f"prune.allocate.budget = {share:g} can't be met: with the sparsest pattern in every layer "
            f"{math.ceil(1e4 * least / dense) / 1e4:g} of the prunable layers' {unit} are left.",
            hint="raise the budget, or add a sparser pattern to prune.allocate.patterns.",
        )


def measure(
    module: nn.Module,
    graph: fx.Graph,
    batches: Sequence[Tensor],
    layers: Sequence[Layer],
    fitting: Mapping[str, Sequence[str]],
    settings: Settings,
    *,
    unit: str = "macs",
    images: int = BATCH,
    progress: Callable[[int, int], None],
) -> Measured:
    """Solve every layer with every pattern that fits it, on the dense network, and put all weights back.

    Time: per layer and pattern one solution, and one pass of `images` images through the rest of the network; in the
    end one forward and one backward pass of them. Memory: as for `solve.prune_network`, and on the CPU a copy of each
    layer's weights per pattern that fits it.

    Args:
        module: the dense network in eval mode, on any device; unchanged afterwards.
        graph: what `capture.capture` returned for it.
        batches: preprocessed calibration images, float32 [b, C, H, W]; every fourth is held out.
        layers: what `choose_among` returned.
        fitting: patterns by layer, not empty, as `choose_among` returns them.
        settings: how layers are pruned.
        unit: of the candidates' costs, one of UNITS.
        images: how many held-out images (the first) the logits and margins are compared on; fewer where there are not
            as many.
        progress: told (layers done, layers in all).

    Raises:
        StageFailed: images are too few, or a weight, an input or a logit is NaN or infinite.
    """
    rows = {layer.name: layer for layer in layers if layer.name in fitting}
    fit, held = split_images(batches)
    state = state_of(module, graph)
    walk = Stream(graph, state, [*fit, *held])
    looked_at = torch.cat(held)[:images]
    probe = Stream(graph, state, list(torch.split(looked_at, BATCH)))
    dense = _logits(probe.branch(), graph)
    found = Measured((), {}, {}, _margins(dense), {})
    candidates: list[Candidate] = []
    proposals: dict[tuple[str, str], Proposal] = {}
    nodes = layer_nodes(graph, list(rows))
    for place, (name, node) in enumerate(nodes.items()):
        landed, layer = landing(graph, node, state), rows[name]
        seen = look(node, walk, walk, replace(landed, other=None), len(fit), sum(map(len, fit)), place)
        probe.advance(node)
        parts = [module.get_submodule(part) for part in (name, landed.norm) if part]
        candidates.append(Candidate(name, DENSE, left(layer, DENSE, unit), 0.0, 0.0))
        for pattern in fitting[name]:
            with _restored(parts):
                relative, energy = _solved(parts, replace(layer, pattern=pattern), seen, settings)
                change = _logits(probe.branch(), graph) - dense
                proposals[name, pattern] = proposal(unit_of(node, landed.norm), state)
            candidates.append(Candidate(name, pattern, left(layer, pattern, unit), relative, energy))
            found.moved[name, pattern] = float(change.square().sum(dim=1).mean())
            found.displacement[name, pattern] = change.abs().amax(dim=1).numpy()
        progress(place + 1, len(nodes))
    return replace(found, candidates=tuple(candidates), adjoint=adjoint_scores(graph, state, looked_at, proposals))


def _solved(
    parts: Sequence[nn.Module], layer: Layer, seen: tuple[Moments, Moments], settings: Settings
) -> tuple[float, float]:
    """Prune a layer in place; return its held-out error, relative and per image."""
    held, weight = seen[1], weight_of(parts[0]).detach()
    scale = held_energy(as_rows(weight).reshape(len(weight), -1), held) * layer.positions / held.count
    result = prune_layer(parts[0], parts[1] if len(parts) > 1 else None, layer, seen, settings)
    # No error is known only where the dense output is zero on all held-out images; the energy is zero then, too.
    relative = result.error_after_refit or 0.0
    return relative, relative * scale


@contextmanager
def _restored(parts: Sequence[nn.Module]) -> Iterator[None]:
    """Put the tensors of some modules back afterwards."""
    before = [{key: value.clone() for key, value in part.state_dict().items()} for part in parts]
    try:
        yield
    finally:
        for part, state in zip(parts, before, strict=True):
            part.load_state_dict(state)


def _logits(stream: Stream, graph: fx.Graph) -> Tensor:
    """Walk to the end: float64 [images, classes] on the CPU.

    Raises:
        StageFailed: a logit is NaN or infinite.
    """
    end = next(node for node in graph.nodes if node.op == "output").all_input_nodes[0]
    stream.advance(end, through=True)
    logits = torch.cat(stream.output(end)).double().cpu()
    if not bool(torch.isfinite(logits).all()):
        raise StageFailed("A logit is NaN or infinite on the held-out calibration images.")
    return logits


def _margins(logits: Tensor) -> Floats:
    top = logits.topk(2, dim=1).values
    margins: Floats = (top[:, 0] - top[:, 1]).numpy()
    return margins


def rank(
    measured: Measured, budget: int, weights: Mapping[str, Tensor], layer_weights: Mapping[str, float]
) -> tuple[Allocation, ...]:
    """Choose patterns by measured error, by edge, by slack and by adjoint.

    Args:
        measured: what `measure` returned.
        budget: what may be left of the layers with candidates, in the unit of their costs.
        weights: [O, I] or [O, I, kh, kw] of these layers.
        layer_weights: their SEB weights, see `unstructured.seb_weights`.

    Returns:
        Allocations "error", "edge", "slack" and "adjoint"; `measured` of each is the logits' squared change per image
        that the layers' errors would cause if they added up.

    Raises:
        RecipeError: the budget is below the sparsest choice.
        StageFailed: as the rankings of `allocate`.
    """
    candidates = measured.candidates
    return allocate.compare(
        candidates,
        budget,
        {
            "edge": allocate.by_edge(candidates, weights, layer_weights),
            "slack": allocate.by_slack(candidates, measured.displacement, measured.margins),
            "adjoint": allocate.by_adjoint(candidates, measured.adjoint),
        },
        _errors(measured),
    )


def _errors(measured: Measured) -> dict[tuple[str, str], float]:
    sensitivity = allocate.sensitivities(measured.candidates, measured.moved)
    return allocate.by_error(measured.candidates, sensitivity)


def described(measured: Measured, found: Sequence[Allocation], ranking: str, unit: str) -> dict[str, Any]:
    """Everything a reader needs to compare the rankings, as JSON values.

    Args:
        measured: what `measure` returned.
        found: what `rank` returned.
        ranking: the one that decides.
        unit: of the costs.

    Returns:
        "asked", "ranking", "unit", "budget", "dense" (cost of these layers when dense), "images"; "layers": by name the
        candidates, each with its cost and numbers; "rankings": one row each; "uniform": what one pattern in every layer
        that it fits would need and cost; "differences": pattern by ranking, of layers where they differ.
    """
    errors = _errors(measured)
    layers: dict[str, list[dict[str, Any]]] = {}
    for item in measured.candidates:
        row = {"pattern": item.pattern, "cost": item.cost, "relative_error": item.relative}
        layers.setdefault(item.layer, []).append({**row, "error": errors[item.layer, item.pattern]})
    rows = [{**asdict(one), "gap": one.gap} for one in found]
    return {
        "asked": True,
        "ranking": ranking,
        "unit": unit,
        "budget": found[0].budget,
        "dense": sum(item.cost for item in measured.candidates if item.pattern == DENSE),
        "images": len(measured.margins),
        "layers": layers,
        "rankings": rows,
        "uniform": _uniform(measured.candidates, errors),
        "differences": allocate.differences(found),
    }


def _uniform(candidates: Sequence[Candidate], errors: Mapping[tuple[str, str], float]) -> list[dict[str, Any]]:
    """One row per pattern: its cost and measured error if every layer that it fits had it."""
    rows = []
    for pattern in dict.fromkeys(item.pattern for item in candidates if item.pattern != DENSE):
        chosen = {item.layer: item for item in candidates if item.pattern == DENSE}
        chosen |= {item.layer: item for item in candidates if item.pattern == pattern}
        error = math.fsum(errors[item.layer, item.pattern] for item in chosen.values())
        rows.append({"pattern": pattern, "cost": sum(item.cost for item in chosen.values()), "measured": error})
    return rows
