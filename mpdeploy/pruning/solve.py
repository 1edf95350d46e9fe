"""Prune a network layer by layer: inputs from the network as pruned so far, outputs wanted from the dense network.

The two networks walk side by side through the same captured graph, each operation once. At a layer that is pruned both
stand still: its inputs x come from the pruned network, its wanted outputs y from the dense one, so that a layer also
makes up for what the layers before it got wrong. Mask, damping, refit and bias follow from the moments of (x, y) alone.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, fx, nn

from mpdeploy.errors import RecipeError, StageFailed
from mpdeploy.pruning.branches import Landing, landing
from mpdeploy.pruning.capture import Stream, layer_nodes, state_of, weight_name
from mpdeploy.pruning.layers import Layer, weight_of
from mpdeploy.pruning.masks import METHODS, Choice, choose_mask
from mpdeploy.pruning.moments import Moments, layer_rows
from mpdeploy.pruning.patterns import Pattern, as_rows, bad_groups, from_rows
from mpdeploy.pruning.refit import Refit, refit_rows

HELD_OUT_EVERY = 4  # each fourth image judges what the other three decided
ROWS = 1 << 15  # positions that one layer's moments are taken over, or 8 per input if that is more
MOST = 100.0  # a BatchNorm's variance changes by at most this factor
STATIONARY = 1e-2  # a refit whose optimality condition misses this is not used
ROUGH = 1e-2  # residual to which a damping is tried
CLOSE = 3e-3  # residual to which the refit goes: at most 0.5 % more error than the exact minimum


@dataclass(frozen=True)
class Settings:
    """How to prune.

    Args:
        method: how masks are chosen; see `masks.choose_mask`.
        refit: whether kept weights and biases are fitted to the dense network's outputs. Without it weights are masked.
        damping: ridges towards the dense weights to choose from, as shares of the mean diagonal of H; each layer takes
            the one with the least error on the held-out images.
        precision: type of the linear algebra. In float32 a layer's error is good to about 1e-5 of its output's energy.
    """

    method: str = "admm"
    refit: bool = True
    damping: tuple[float, ...] = (0.03, 0.1)
    precision: str = "float32"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise RecipeError(
                f"The pruning method {self.method!r} is unknown.", hint=f"choose one of {', '.join(METHODS)}."
            )
        if not self.damping or not all(0 <= value < float("inf") for value in self.damping):
            raise RecipeError(f"Every damping must be a finite number of at least 0, not {self.damping}.")
        if self.precision not in ("float32", "float64"):
            raise RecipeError(f"The precision must be float32 or float64, not {self.precision!r}.")


@dataclass(frozen=True)
class LayerResult:
    """What pruning did to one layer.

    Errors are relative squared errors of the layer's outputs on the held-out images: the pruned layer on the pruned
    network's inputs against what is wanted of it, over the energy of the dense outputs.

    Args:
        name: the layer.
        density: share of nonzero weights, from the weights left in the module.
        bad_groups: groups (of a given mask: weights) that break the pattern, from the same weights; always 0.
        error_before_refit: of the bare mask; None if the dense outputs are zero on the held-out images.
        error_after_refit: of the weights left in the module (equal if no refit was asked for or kept).
        damping: the ridge that was chosen, None where nothing was refitted.
        bias_corrected: whether a bias, or the mean of a BatchNorm behind the layer, restores the wanted mean output.
        note: full sentences on anything unusual, or "".
    """

    name: str
    density: float
    bad_groups: int
    error_before_refit: float | None
    error_after_refit: float | None
    damping: float | None
    bias_corrected: bool
    note: str


class Problem:
    """The quadratic problem of one layer, as moments pose it.

    Args:
        moments: joint moments of inputs and wanted outputs.
        weight: dense weights [O, m].
        free_mean: whether something behind the weights (a bias) settles the mean output; then moments are centred.
        kind: type of the linear algebra.
    """

    def __init__(self, moments: Moments, weight: Tensor, *, free_mean: bool, kind: torch.dtype) -> None:
        self.free_mean, self.moments = free_mean, moments
        scatter, cross = moments.centred(), moments.cross()
        spread = moments.goal_spread()
        if not free_mean:
            scatter += moments.count * torch.outer(moments.mean, moments.mean)
            cross += moments.count * torch.outer(moments.goal_mean, moments.mean)
            spread = spread + moments.count * moments.goal_mean.square()
        self.weight, self.scatter, cross = weight.to(kind), scatter.to(kind), cross.to(kind)
        # What is wanted beyond W x: zero where both networks are the same, so errors don't drown in rounding.
        self.own = self.weight @ self.scatter
        self.beyond = cross - self.own
        known = (self.weight * (self.own - 2 * cross)).sum(dim=1, dtype=torch.float64)
        self.floor = float((spread + known).clamp_min(0).sum())

    def wrong(self, candidate: Tensor, offset: Tensor) -> float:
        """Squared error of weights [O, m], summed over rows and outputs.

        Args:
            candidate: the weights.
            offset: float64 [O], by which their mean output misses the wanted one; only counts where the mean is free.
        """
        change = candidate - self.weight
        quadratic = ((change @ self.scatter) * change).sum(dtype=torch.float64)
        linear = (change * self.beyond).sum(dtype=torch.float64)
        missed = self.moments.count * offset.square().sum() if self.free_mean else 0.0
        return max(float(quadratic - 2 * linear + missed) + self.floor, 0.0)

    def damped(self, share: float) -> tuple[Tensor, Tensor]:
        """H and G with a ridge towards the dense weights.

        An input that never varies gets a unit diagonal, so that its weight stays as it is instead of making H singular.
        """
        gram = self.scatter.clone()
        diagonal = gram.diagonal()
        ridge = torch.full_like(diagonal, share * float(diagonal.mean()))
        ridge[diagonal + ridge <= 0] = 1.0
        diagonal += ridge
        return gram, self.own + self.beyond + self.weight * ridge


@dataclass(frozen=True)
class Solved:
    """New weights of a layer.

    Args:
        weight: [O, m], zero outside the mask.
        before: held-out error of the bare mask, or None.
        after: held-out error of `weight`, or None.
        damping: the ridge chosen, or None.
        note: full sentences, or "".
    """

    weight: Tensor
    before: float | None
    after: float | None
    damping: float | None
    note: str


def solve_layer(
    weight: Tensor, fitting: Moments, held: Moments, pattern: Pattern | Tensor, settings: Settings, *, free_mean: bool
) -> Solved:
    """Choose a layer's mask and refit what it keeps.

    The mask is chosen with the first damping; every damping is refitted and the held-out images choose.

    Args:
        weight: dense weights [O, m], groups along the last axis.
        fitting: moments that decide.
        held: moments that judge.
        pattern: N:M, or the mask itself, boolean [O, m].
        settings: how.
        free_mean: whether a bias or a BatchNorm mean will restore the mean output.

    Raises:
        StageFailed: H is singular, or a score is NaN.
    """
    kind = getattr(torch, settings.precision)
    problem = Problem(fitting, weight, free_mean=free_mean, kind=kind)
    judge = Problem(held, weight, free_mean=free_mean, kind=kind)
    energy = held_energy(weight, held)

    def error_of(candidate: Tensor) -> float | None:
        lack = candidate.double()
        offset = (held.goal_mean - fitting.goal_mean) - lack @ (held.mean - fitting.mean)
        return judge.wrong(candidate, offset) / energy if energy > 0 else None

    gram, target = problem.damped(settings.damping[0])
    if isinstance(pattern, Tensor):
        choice = Choice(pattern, problem.weight * pattern)
    else:
        choice = choose_mask(problem.weight, gram, target, fitting.power().to(kind), pattern, settings.method)
    bare = problem.weight * choice.mask
    before = error_of(bare)
    notes = []
    dead = int((fitting.power() <= 0).sum())
    if dead:
        notes.append(f"{dead} of its {weight.shape[1]} inputs are always zero on the calibration images.")
    best = Solved(bare, before, before, None, "")
    if settings.refit:
        best, refused = _best_refit(problem, choice, settings.damping, best, error_of)
        notes += refused
    return replace(best, note=" ".join(notes))


def held_energy(weight: Tensor, held: Moments) -> float:
    """Energy of the wanted outputs less what a bias adds: sum of |y - mean y + W mean x|^2, the scale of the errors."""
    return float(held.goal_spread().sum() + held.count * (weight.double() @ held.mean).square().sum())


def _best_refit(
    problem: Problem,
    choice: Choice,
    dampings: Sequence[float],
    bare: Solved,
    error_of: Callable[[Tensor], float | None],
) -> tuple[Solved, list[str]]:
    """Refit with each damping; return the one that the held-out images prefer, or the bare mask and why."""
    if bare.before is None:
        why = "The refit was not kept: the layer's output is zero on the held-out images, so nothing can judge it."
        return bare, [why]
    tries, start = [], choice.start
    for damping in dampings:
        start = _refit(problem, choice.mask, damping, start, ROUGH).weight
        tries.append((error_of(start), damping, start))
    _, damping, start = min(tries, key=lambda found: (found[0] is None or math.isnan(found[0]), found[0]))
    fitted = _refit(problem, choice.mask, damping, start, CLOSE)
    after = error_of(fitted.weight)
    if why := _why_not_kept(fitted, bare.before, after):
        return bare, [why]
    return Solved(fitted.weight, bare.before, after, damping, ""), []


def _refit(problem: Problem, mask: Tensor, damping: float, start: Tensor, tolerance: float) -> Refit:
    gram, target = problem.damped(damping)
    return refit_rows(target, mask, gram, start=start, tolerance=tolerance)


def _why_not_kept(fitted: Refit, before: float, after: float | None) -> str:
    """Why a refit is refused, or ""."""
    if not fitted.residual <= STATIONARY:
        return (
            f"The refit was not kept: its optimality residual is {fitted.residual:.1e}, not at most {STATIONARY:.0e}."
        )
    if after is None or not after <= before:
        return f"The refit was not kept: its held-out error {after:.4g} is above the bare mask's {before:.4g}."
    return ""


def prune_network(
    module: nn.Module,
    graph: fx.Graph,
    batches: Sequence[Tensor],
    layers: Sequence[Layer],
    *,
    settings: Settings,
    progress: Callable[[int, int], None],
    masks: Mapping[str, Tensor] | None = None,
) -> list[LayerResult]:
    """Prune a network in place, layer by layer in execution order.

    Of the calibration images every fourth is held out: it fits nothing, and judges the damping and the refit. A refit
    that does not lower its layer's held-out error is dropped and the note says so. The bias of a pruned layer restores
    the wanted mean output on all calibration images; a BatchNorm right behind it takes over the wanted mean and spread.

    Where a layer's output is added to a residual stream, what is wanted of it is the dense network's sum less the
    pruned network's other summand, so that the sum is repaired and not only the branch.

    Memory, beside two copies of the network: what both walks keep alive between two operations
    (`capture.alive_bytes` per image and network), 16 m^2 + 16 O m bytes of moments for the layer at hand (m = I*kh*kw
    for a convolution), about 20 m^2 + 40 O m for its solution, and 0.2 GB of slices.

    Args:
        module: the network; it is put into eval mode; the work is done on its device.
        graph: what `capture.capture` returned for it.
        batches: preprocessed calibration images, float32 [b, C, H, W]; at least 4 images in all.
        layers: what `layers.choose` returned; those without a pattern stay as they are.
        settings: how.
        progress: told (work units done, work units in all).
        masks: for layers whose pattern is `layers.UNSTRUCTURED`, their boolean masks of the weight's shape.

    Returns:
        One result per pruned layer, in execution order.

    Raises:
        StageFailed: no layer has a pattern, images are too few, or a weight or an activation is NaN or infinite.
    """
    chosen = {layer.name: layer for layer in layers if layer.pattern}
    if not chosen:
        raise StageFailed("No layer carries a sparsity pattern, so there is nothing to prune.")
    for name in chosen:
        if not bool(torch.isfinite(weight_of(module.get_submodule(name))).all()):
            raise StageFailed(f"The weights of layer {name!r} hold NaN or infinity.")
    fitting, held = split_images(batches)
    module.eval()
    nodes = layer_nodes(graph, list(chosen))
    state = state_of(module, graph)
    before = {name: tensor.clone() for name, tensor in state.items()}
    dense, pruned = (Stream(graph, some, [*fitting, *held]) for some in (before, state))
    images = sum(map(len, fitting))
    results: list[LayerResult] = []
    for name, node in nodes.items():
        landed = landing(graph, node, state)
        seen = look(node, dense, pruned, landed, len(fitting), images, len(results))
        norm = module.get_submodule(landed.norm) if landed.norm else None
        mask = masks[name] if masks and name in masks else None
        results.append(prune_layer(module.get_submodule(name), norm, chosen[name], seen, settings, mask))
        progress(len(results), len(nodes))
    return results


def look(
    node: fx.Node,
    dense: Stream,
    pruned: Stream,
    landed: Landing,
    fitting: int,
    images: int,
    seed: int,
) -> tuple[Moments, Moments]:
    """Moments of a layer on the fitting and on the held-out batches.

    Args:
        node: the layer's operation.
        dense: the dense network's walk, up to the layer at the most; afterwards it stands behind it.
        pruned: the pruned network's walk; it may be `dense` itself.
        landed: where the output goes.
        fitting: how many of the batches, the first, fit.
        images: images in these batches.
        seed: decides which positions are looked at.
    """
    dense.advance(node)
    pruned.advance(node)
    inputs, causes = pruned.argument(node, 0), dense.argument(node, 0)
    dense.advance(node, through=True)
    wanted = landed.wanted(dense, pruned, dense.output(node))
    weight = dense.state[str(weight_name(node))]
    own = weight.ndim == 2 and landed.other is None and len(weight) > weight.shape[1]
    keep = -(-max(ROWS, 8 * weight[0].numel()) // images)
    fit, held = (Moments(weight if own else None) for _ in range(2))
    for place, (x, y, c) in enumerate(zip(inputs, wanted, causes, strict=True)):
        draw = seed * 1_000_003 + place
        reasons = [rows for rows, _ in layer_rows(node, c, y, keep, draw)] if own else repeat(None)
        for (rows, goals), reason in zip(layer_rows(node, x, y, keep, draw), reasons, strict=False):
            (fit if place < fitting else held).add(rows, goals, reason)
    return fit, held


def prune_layer(
    module: nn.Module,
    norm: nn.Module | None,
    layer: Layer,
    seen: tuple[Moments, Moments],
    settings: Settings,
    mask: Tensor | None = None,
) -> LayerResult:
    """Prune one module in place, with the BatchNorm behind it, and read back what it then holds.

    Args:
        module: a Linear or an ungrouped Conv2d.
        norm: the BatchNorm that alone reads its output, or None.
        layer: its row, with a pattern.
        seen: its moments on the fitting and on the held-out images.
        settings: how.
        mask: boolean, of the weight's shape, where it is given and not to be chosen.

    Raises:
        StageFailed: an input is NaN or infinite, H is singular, or what was written is not what was meant.
    """
    fitting, held = seen
    if not (fitting.finite() and held.finite()):
        raise StageFailed(f"The inputs of layer {layer.name!r} hold NaN or infinity on the calibration images.")
    weight = weight_of(module)
    flat = as_rows(weight.detach()).reshape(len(weight), -1)
    pattern = Pattern.parse(layer.pattern) if mask is None else as_rows(mask).reshape(flat.shape)
    has_bias = isinstance(module.bias, Tensor)
    free_mean = has_bias or norm is not None
    try:
        solved = solve_layer(flat, fitting, held, pattern, settings, free_mean=free_mean)
    except StageFailed as error:
        raise StageFailed(f"Layer {layer.name!r} could not be pruned. {error.what}", hint=error.hint) from error
    kept = solved.weight.to(flat.dtype)
    with torch.no_grad():
        weight.copy_(from_rows(kept.reshape(-1, weight.shape[1]), weight.shape))
        _settle(module, norm, kept.double(), fitting, held)
    settled = [module.bias, getattr(norm, "running_mean", None), getattr(norm, "running_var", None)]
    if not all(bool(torch.isfinite(values).all()) for values in settled if isinstance(values, Tensor)):
        raise StageFailed(f"The corrected bias or BatchNorm of layer {layer.name!r} is NaN or infinite.")
    bad = bad_groups(weight, Pattern.parse(layer.pattern)) if mask is None else int((weight[~mask] != 0).sum())
    if bad:
        raise StageFailed(f"{bad} groups of layer {layer.name!r} break the pattern {layer.pattern} after pruning.")
    notes = [solved.note] if solved.note else []
    if not free_mean:
        notes.append("It has no bias, so its mean output is not corrected.")
    return LayerResult(
        name=layer.name,
        density=float((weight != 0).double().mean()),
        bad_groups=bad,
        error_before_refit=solved.before,
        error_after_refit=solved.after,
        damping=solved.damping,
        bias_corrected=free_mean,
        note=" ".join(notes),
    )


def _settle(module: nn.Module, norm: Any, kept: Tensor, fitting: Moments, held: Moments) -> None:
    """Give the output of weights [O, m] the wanted mean, and in front of a BatchNorm the wanted spread, in place.

    With a bias: b = mean y - W_hat mean x. A BatchNorm's running variance changes by the ratio of the output's variance
    to the wanted one, and its running mean lies from the mean output as many deviations as it lay from the wanted one.
    As both are taken over the same
    images, few are enough: what is peculiar to these images cancels, where plain recalibration would learn it.
    """
    count = fitting.count + held.count
    mean = (fitting.count * fitting.mean + held.count * held.mean) / count
    goal = (fitting.count * fitting.goal_mean + held.count * held.goal_mean) / count
    output = kept @ mean
    if isinstance(module.bias, Tensor):
        module.bias.copy_(goal - output)
        output = goal
    if norm is None:
        return
    spread = sum((((kept @ part) * kept).sum(dim=1) for part in (fitting.centred(), held.centred())), start=0.0 * goal)
    wanted = fitting.goal_spread() + held.goal_spread()
    ratio = torch.where(wanted > 0, spread / wanted.clamp_min(1e-30), torch.ones_like(wanted))
    before = norm.running_var.double()
    after = before * ratio.clamp(1 / MOST, MOST)
    offset = (goal - norm.running_mean.double()) * ((after + norm.eps) / (before + norm.eps)).sqrt()
    norm.running_mean.copy_(output - offset)
    norm.running_var.copy_(after)


def split_images(batches: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Split batches by image: every fourth image judges, the others fit.

    Args:
        batches: tensors [b, ...].

    Returns:
        (fitting batches, held-out batches), none of them empty.

    Raises:
        StageFailed: fewer than four images.
    """
    fitting, held, first = [], [], 0
    for batch in batches:
        is_held = torch.arange(first, first + len(batch)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        is_held = is_held.to(batch.device)
        fitting.append(batch[~is_held])
        held.append(batch[is_held])
        first += len(batch)
    if first < HELD_OUT_EVERY:
        raise StageFailed(f"Pruning needs at least {HELD_OUT_EVERY} calibration images; {first} were given.")
    return [part for part in fitting if len(part)], [part for part in held if len(part)]
