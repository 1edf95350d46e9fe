"""Unstructured pruning with one threshold for the whole network: by magnitude, or weighted per layer (SEB).

Spectral edge budgeting (SEB) prunes the smallest |W_ij| / w_l over all layers, so a layer with a larger w_l is pruned
harder. w_l grows with the layer's Marchenko-Pastur edge; as the edge of a matrix that is mostly bulk is about
sd(W) (sqrt n + sqrt m), most of what SEB does is to make magnitudes of different layers comparable. w_l = 1 everywhere
is global magnitude pruning. No engine runs such masks faster: here they are a method to compare with, a way to rank
layers, and a prior for the masks that engines do run (`prior_bonus`, `cast_masks`).
Source: Berlyand, Bourdais, Owhadi, Shmalo, "Pruning deep neural networks via the Marchenko-Pastur distribution", 2026.
"""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mpdeploy.errors import RecipeError, StageFailed
from mpdeploy.pruning.patterns import Pattern, as_rows
from mpdeploy.pruning.spectrum import Spectrum

FLOOR = 0.1  # of a layer's weight, so that no layer is spared for good
MOST_PATTERNS = 20_000  # per group that `cast_masks` enumerates; 8:16 has 12870
COSTS_AT_ONCE = 1 << 24  # of groups times patterns: 64 MiB of float32

SIGNALS = ("hill", "edge", "kind")
ATTENTION = re.compile(r"(^|[._])(attn|attention|self_attn|self_attention|qkv|in_proj|out_proj)([._]|$)")
MLP = re.compile(r"(^|[._])(mlp|ffn|feed_forward|fc1|fc2|linear1|linear2)([._]|$)")


@dataclass(frozen=True)
class Step:
    """How SEB weighs layers at a range of sparsities.

    Args:
        upto: the largest sparsity of the range.
        signal: what ranks the layers, one of SIGNALS.
        beta: strength.
        vanishes: the sparsity s_d at which the weighting has faded out: d(s) = max(0, 1 - s / s_d).
    """

    upto: float
    signal: str
    beta: float
    vanishes: float


# The source's table. It gives no beta for the last range: 1 is our choice.
STEPS = (
    Step(0.20, "hill", 0.5, 0.30),
    Step(0.40, "edge", 1.0, 0.5),
    Step(0.55, "edge", 1.25, 0.7),
    Step(1.00, "kind", 1.0, 0.85),
)


def step_for(sparsity: float) -> Step:
    """Return the table's row for a target sparsity.

    Raises:
        RecipeError: the sparsity is not in [0, 1).
    """
    _check_sparsity(sparsity)
    return next(step for step in STEPS if sparsity <= step.upto)


def _check_sparsity(sparsity: float) -> None:
    if not 0 <= sparsity < 1:
        raise RecipeError(f"The sparsity is {sparsity:g}; expected the share of weights to drop, 0 to below 1.")


def seb_weights(spectra: Mapping[str, Spectrum], sparsity: float, *, signal: str = "") -> dict[str, float]:
    """Weigh layers by what their spectra say: w_l = max(0.1, 1 + beta d(s) z_l), z_l the standardised signal.

    Where this deviates from the source: above 55 % it ranks layers by their kind, which says something in networks of
    attention and MLP only, so any other network goes on with the edge (at the last row's beta and s_d). Signals without
    variation give w_l = 1. On the quickstart network the edge is better than the kind there too (97.6 against 96.2 % of
    2,000 labels kept at 60 %), and dividing by each layer's standard deviation, without any law, as good (97.5 %).
    After the refit (two draws of 128 images) magnitude without any weights kept more labels at 60 % (99.3 and 99.5,
    SEB 98.8 and 98.9 %), and as many at 75 % (98.2, SEB 98.0 and 98.2 %).

    Args:
        spectra: the fitted spectrum of each layer.
        sparsity: target share of weights to drop, in [0, 1).
        signal: use "hill", "edge" or "kind" whatever the sparsity; empty takes the table's.

    Returns:
        The weight of each layer.

    Raises:
        RecipeError: the sparsity is out of range, the signal unknown, or "kind" asked for where it tells nothing.
    """
    step = step_for(sparsity)
    if signal not in ("", *SIGNALS):
        raise RecipeError(f"The layer signal {signal!r} is unknown.", hint=f"choose one of {', '.join(SIGNALS)}.")
    wanted = signal or step.signal
    kinds = {name: kind_of(name) for name in spectra}
    if wanted == "kind" and set(kinds.values()) != {1, 2}:
        if signal:
            raise RecipeError(
                "Layers can't be ranked by kind: by their names they are not attention and MLP, both and nothing else.",
                hint='use the signal "edge".',
            )
        wanted = "edge"
    if wanted == "kind":
        values = {name: float(kind) for name, kind in kinds.items()}
    elif wanted == "edge":
        values = {name: fitted.edge_singular for name, fitted in spectra.items()}
    else:
        values = {name: hill_alpha(fitted) for name, fitted in spectra.items()}
    return weigh(values, step.beta * max(0.0, 1 - sparsity / step.vanishes))


def weigh(values: Mapping[str, float], strength: float) -> dict[str, float]:
    """Turn one number per layer into weights: max(0.1, 1 + strength * z), z standardised over layers (population sd).

    Raises:
        StageFailed: a value is NaN or infinite.
    """
    array = np.array(list(values.values()), dtype=np.float64)
    if not np.isfinite(array).all():
        bad = next(name for name, value in values.items() if not math.isfinite(value))
        raise StageFailed(f"The signal of layer {bad!r} is NaN or infinite, so it can't be weighed.")
    spread = float(array.std()) if array.size else 0.0
    # Equal up to rounding is equal: dividing by such a spread would invent differences.
    if spread <= 1e-12 * float(np.abs(array).max(initial=0.0)):
        return dict.fromkeys(values, 1.0)
    z = (array - array.mean()) / spread
    return {name: max(FLOOR, 1 + strength * float(score)) for name, score in zip(values, z, strict=True)}


def kind_of(name: str) -> int:
    """The source's number for a layer's kind, told by its dotted name: 1 attention, 2 MLP, 0 neither.

    MLPs come out with the larger weight: at high sparsity they are pruned harder than attention.
    """
    if MLP.search(name):
        return 2
    return 1 if ATTENTION.search(name) else 0


def hill_alpha(spectrum: Spectrum) -> float:
    """Exponent of the power law that the upper half of the eigenvalues follows; smaller means a heavier tail.

    alpha = 1 + k / sum_{i<k} ln(x_(i) / x_(k)) over the k = p/2 largest. Heavy tails mark layers that have learned
    much, so a larger alpha is pruned harder. Source: B. M. Hill, 1975; as in Lu et al., "AlphaPruning", 2024.

    Raises:
        StageFailed: fewer than four positive eigenvalues, or all of the upper half equal.
    """
    values = spectrum.eigenvalues[spectrum.eigenvalues > 0][::-1]
    half = len(values) // 2
    total = float(np.log(values[:half] / values[half]).sum()) if half >= 2 else 0.0
    if total <= 0:
        raise StageFailed(f"The {len(values)} positive eigenvalues of a layer show no tail to fit an exponent to.")
    return 1 + half / total


def prune(
    weights: Mapping[str, Tensor], sparsity: float, layer_weights: Mapping[str, float] | None = None
) -> dict[str, Tensor]:
    """Drop the smallest |W_ij| / w_l over all layers, to an exact count.

    Args:
        weights: any shape, by layer, all on one device.
        sparsity: share of all their entries to drop, in [0, 1); the count is rounded to the nearest.
        layer_weights: w_l; None is plain global magnitude.

    Returns:
        Boolean masks of the same shapes, true where a weight stays. Of equal scores the one earlier in the mapping, or
        at the lower index, stays.

    Raises:
        RecipeError: the sparsity is out of range.
        StageFailed: a weight is NaN, or a layer has no positive w_l.
    """
    _check_sparsity(sparsity)
    scores = scaled(weights, layer_weights)
    count = round(sparsity * sum(score.numel() for score in scores.values()))
    return {name: ~dropped for name, dropped in lowest(scores, count).items()}


def scaled(weights: Mapping[str, Tensor], layer_weights: Mapping[str, float] | None) -> dict[str, Tensor]:
    """Return |W| / w_l by layer.

    Raises:
        StageFailed: a layer has no w_l, or one that is not positive.
    """
    if layer_weights is None:
        return {name: weight.detach().abs() for name, weight in weights.items()}
    for name in weights:
        if not 0 < layer_weights.get(name, 0.0) < math.inf:
            raise StageFailed(f"Layer {name!r} has no positive weight to rank it by: {layer_weights.get(name)}.")
    return {name: weight.detach().abs() / layer_weights[name] for name, weight in weights.items()}


def lowest(scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Mark the `count` lowest of all scores.

    Args:
        scores: any shape, by layer, all on one device; infinities are ordinary values.
        count: how many to mark.

    Returns:
        Boolean tensors of the same shapes with `count` true entries in all. Of equal scores those later in the mapping,
        or at higher indices, are marked first.

    Raises:
        StageFailed: a score is NaN, or there are fewer than `count`.
    """
    sizes = [score.numel() for score in scores.values()]
    if not 0 <= count <= sum(sizes):
        raise StageFailed(f"{count} of {sum(sizes)} scores can't be chosen.")
    for name, score in scores.items():
        if bool(torch.isnan(score).any()):
            raise StageFailed(f"A pruning score of layer {name!r} is NaN: its weights hold NaN.")
    if not count:
        return {name: torch.zeros_like(score, dtype=torch.bool) for name, score in scores.items()}
    flat = torch.cat([score.flatten() for score in scores.values()])
    threshold = flat.kthvalue(count).values
    chosen = flat < threshold
    ties = (flat == threshold).nonzero()[:, 0]
    chosen[ties[len(ties) - (count - int(chosen.sum())) :]] = True
    parts = torch.split(chosen, sizes)
    return {name: part.reshape(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)}


def sparsities(masks: Mapping[str, Tensor]) -> dict[str, float]:
    """Share of dropped entries by layer."""
    return {name: 1 - float(mask.double().mean()) for name, mask in masks.items()}


def prior_bonus(importance: Tensor, prior: Tensor, pattern: Pattern, strength: float) -> Tensor:
    """What an unstructured mask adds to each entry's importance, for `patterns.project`.

    CAST charges a pattern m for the group's importance that it drops plus strength * c_bar * |m - M|_1, with c_bar the
    group's mean importance and M the prior mask. All patterns keep equally many, so |m - M|_1 is a constant minus
    2 sum_j m_j M_j, and `project(importance + bonus)` is the exact minimiser whenever the cost is a sum over entries.

    Args:
        importance: [rows, inputs], what dropping the entry costs: u^2 times the second moment of its input.
        prior: boolean [rows, inputs], true where the unstructured mask keeps.
        pattern: N:M.
        strength: alpha_ser; the source uses 0.1 (2:4) to 0.5 (6:12).

    Returns:
        2 * strength * c_bar where the prior keeps, else 0; [rows, inputs].

    Raises:
        RecipeError: the strength is negative.
        StageFailed: shapes differ, or the groups don't fit.
    """
    _check_prior(importance, prior, pattern, strength)
    mean = importance.reshape(len(importance), -1, pattern.group).mean(dim=2)
    return 2 * strength * mean.repeat_interleave(pattern.group, dim=1) * prior


def _check_prior(importance: Tensor, prior: Tensor, pattern: Pattern, strength: float) -> None:
    if not 0 <= strength < math.inf:
        raise RecipeError(f"The strength of the prior is {strength:g}; expected a finite number of at least 0.")
    if prior.shape != importance.shape or prior.dtype != torch.bool:
        raise StageFailed(
            f"The prior mask ({prior.dtype}, {list(prior.shape)}) does not fit the weight's {list(importance.shape)}."
        )
    if importance.ndim != 2 or importance.shape[1] % pattern.group:
        raise StageFailed(f"Groups of {pattern.group} ({pattern}) don't fit rows of shape {list(importance.shape)}.")


def group_blocks(gram: Tensor, shape: Sequence[int], pattern: Pattern) -> Tensor:
    """Cut from a layer's second moment the blocks that couple the entries of one group.

    Args:
        gram: [m, m], m = I or I*kh*kw in the order in which patches are unfolded.
        shape: the weight's, [O, I] or [O, I, kh, kw].
        pattern: N:M; I is a multiple of M.

    Returns:
        [kh*kw, I/M, M, M], kernel position varying as over the rows of `patterns.as_rows`.

    Raises:
        StageFailed: shapes contradict each other.
    """
    inputs, positions = shape[1], math.prod(shape[2:])
    if gram.shape != (inputs * positions, inputs * positions) or inputs % pattern.group:
        raise StageFailed(f"A second moment of shape {list(gram.shape)} does not fit a weight of {list(shape)}.")
    index = torch.arange(inputs * positions, device=gram.device).reshape(inputs, positions).T
    groups = index.reshape(positions, -1, pattern.group)
    return gram[groups[..., :, None], groups[..., None, :]]


def cast_masks(unit: Tensor, blocks: Tensor, prior: Tensor, pattern: Pattern, strength: float) -> Tensor:
    """Choose each group's pattern by CAST's cost, over all patterns.

    cost(m) = r^T C r + strength * c_bar * |m - M|_1, r = (1 - m) * u, C the group's second moment, c_bar the mean of
    u_j^2 C_jj, M the prior. It sees correlations inside a group only, and leaves the kept weights as they are. The
    source samples 1024 patterns where there are more than 5000; here 8:16 is enumerated too.

    Args:
        unit: the layer's weight u, [O, I] or [O, I, kh, kw].
        blocks: what `group_blocks` returned.
        prior: boolean mask of the same shape, true where the unstructured mask keeps.
        pattern: N:M.
        strength: alpha_ser, at least 0; 0 ignores the prior.

    Returns:
        Boolean [rows, inputs] in the order of `patterns.as_rows`, exactly N per group.

    Raises:
        RecipeError: the pattern has too many masks to enumerate, or the strength is negative.
        StageFailed: shapes contradict each other, or a cost is NaN.
    """
    number = math.comb(pattern.group, pattern.keep)
    if number > MOST_PATTERNS:
        raise RecipeError(
            f"{pattern} has {number} masks per group, too many to try each (at most {MOST_PATTERNS}).",
            hint="use the diagonal cost: project(importance + prior_bonus(...)).",
        )
    values, kept = as_rows(unit), as_rows(prior)
    _check_prior(values, kept, pattern, strength)
    positions, groups, size, _ = blocks.shape
    if groups * size != values.shape[1] or size != pattern.group or len(values) % positions:
        raise StageFailed(f"Blocks of shape {list(blocks.shape)} do not fit rows of shape {list(values.shape)}.")
    masks = _all_masks(pattern, values)
    lost = 1 - masks
    pairs = (lost[:, :, None] * lost[:, None, :]).flatten(1)
    chosen = torch.zeros_like(values, dtype=torch.bool)
    step = max(1, COSTS_AT_ONCE // number)
    for position, group in itertools.product(range(positions), range(groups)):
        columns = slice(group * size, (group + 1) * size)
        block = blocks[position, group].to(values.dtype)
        rows = torch.arange(position, len(values), positions, device=values.device)
        for some in torch.split(rows, step):
            u, prefer = values[some, columns], kept[some, columns].to(values.dtype)
            cost = (u[:, :, None] * u[:, None, :] * block).flatten(1) @ pairs.T
            mean = (u.square() * block.diagonal()).mean(dim=1, keepdim=True)
            apart = masks.sum(1) + prefer.sum(1, keepdim=True) - 2 * prefer @ masks.T
            cost += strength * mean * apart
            if bool(torch.isnan(cost).any()):
                raise StageFailed("A pruning cost is NaN: the weights or the calibration inputs hold NaN.")
            chosen[some, columns] = masks[cost.argmin(dim=1)].bool()
    return chosen


def _all_masks(pattern: Pattern, like: Tensor) -> Tensor:
    """Every mask of a group, [patterns, group], of the type and on the device of `like`."""
    kept = torch.tensor(list(itertools.combinations(range(pattern.group), pattern.keep)), device=like.device)
    return like.new_zeros(len(kept), pattern.group).scatter_(1, kept, 1.0)
