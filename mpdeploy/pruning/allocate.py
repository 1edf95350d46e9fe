"""Which layer gets which pattern under a budget of multiply-accumulates or weights, by four rankings to compare.

A ranking is a table of numbers, one per layer and pattern, that add up over layers; the least sum within the budget
wins. `by_error` uses what pruning that layer was measured to cost, `by_edge` only weights and Marchenko-Pastur edges,
`by_slack` the share of the samples' margins that the layer's displacement spends, `by_adjoint` what a backward pass
says that the margins lose. `compare` solves all of them and says what each choice costs in measured error, so that a
reader sees when a prior helps and when it misleads.

On the quickstart network at half of the multiply-accumulates (12:16, 2:4 and 1:4; three draws of 256 images) the
finished networks moved the logits by 0.009 to 0.010 (squared, per image) when chosen by error, 0.009 to 0.012 by slack,
0.016 to 0.017 by edge, and 0.013 to 0.015 with 2:4 everywhere: the edge did worse there than no choice at all. All of
them kept at least 99.4 % of 2,000 labels, too many for labels to tell them apart. In two other draws, on 1,000 images,
it was 0.018 to 0.019 by adjoint, 0.009 to 0.011 by error, 0.012 to 0.015 by slack, 0.017 to 0.018 by edge and 0.014 to
0.016 with 2:4 everywhere: the adjoint puts single choices into nearly the measured order (Spearman 0.96), but its sum
allocates no better than the edge's.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpdeploy.errors import RecipeError, StageFailed
from mpdeploy.pruning.patterns import Pattern, as_rows, project

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Values = Mapping[tuple[str, str], float]

DENSE = ""  # the pattern of a layer that stays dense
MOST_STATES = 1 << 17  # partial choices kept at a time: beyond, the result may miss the optimum and says by how much


@dataclass(frozen=True)
class Candidate:
    """What one pattern would do to one layer.

    Args:
        layer: the layer's name.
        pattern: "2:4" and the like, or "" for dense.
        cost: what is left of the budgeted quantity: multiply-accumulates per image, or weights.
        relative: squared error of the layer's outputs on held-out images over their own spread; 0 for dense.
        energy: the same error absolute, per image, summed over outputs and positions; 0 for dense.
    """

    layer: str
    pattern: str
    cost: int
    relative: float
    energy: float


@dataclass(frozen=True)
class Allocation:
    """One pattern per layer.

    Args:
        ranking: the ranking that chose.
        chosen: pattern by layer, "" for dense, in the candidates' order.
        cost: what is left in these layers, at most `budget`.
        budget: the limit.
        predicted: sum of the ranking's own numbers over the choice.
        bound: no choice within the budget has a smaller sum; equals `predicted` where the choice is proved the best.
        measured: what `by_error` gives for the choice.
    """

    ranking: str
    chosen: dict[str, str]
    cost: int
    budget: int
    predicted: float
    bound: float
    measured: float

    @property
    def gap(self) -> float:
        """How far `predicted` may be above the optimum; 0 where it is the optimum."""
        return self.predicted - self.bound


def by_error(
    candidates: Sequence[Candidate], sensitivity: Mapping[str, float] | None = None
) -> dict[tuple[str, str], float]:
    """Rank by measured error.

    With sensitivities the errors are in one unit, squared logits, and add up if the layers' errors are about
    independent. Without them relative errors are added, as if a percent of any layer's output mattered alike, which it
    does not.

    Args:
        candidates: every layer's choices.
        sensitivity: by layer, at least 0, as `sensitivities` returns it; None adds relative errors.

    Raises:
        StageFailed: a layer has no sensitivity, or an error or sensitivity is negative, NaN or infinite.
    """
    values = {}
    for item in candidates:
        weight = 1.0 if sensitivity is None else sensitivity.get(item.layer, math.nan)
        value = item.relative if sensitivity is None else weight * item.energy
        if not 0 <= value < math.inf:
            raise StageFailed(
                f"Layer {item.layer!r} as {item.pattern or 'dense'} has the error {value}; a finite number of at "
                "least 0 is expected."
            )
        values[item.layer, item.pattern] = value
    return values


def sensitivities(candidates: Sequence[Candidate], moved: Values) -> dict[str, float]:
    """Squared change of the logits per unit of a layer's squared output error, from runs with one layer pruned.

    Args:
        candidates: every layer's choices.
        moved: squared change of the logits per image (summed over classes, mean over images) that a choice alone
            causes; one measured choice per layer is enough, several are pooled.

    Returns:
        The sensitivity of every layer; 0 where it has no choice but dense, or one that changes its output.

    Raises:
        StageFailed: none of a layer's choices was measured, or a change is negative, NaN or infinite.
    """
    found = {}
    for layer in dict.fromkeys(item.layer for item in candidates):
        pruned = [item for item in candidates if item.layer == layer and item.pattern != DENSE]
        measured = [item for item in pruned if _key(item) in moved]
        energy = math.fsum(item.energy for item in measured)
        change = math.fsum(moved[_key(item)] for item in measured)
        if (pruned and not measured) or not 0 <= change < math.inf:
            raise StageFailed(f"No finite change of the logits was measured for a pattern of layer {layer!r}.")
        found[layer] = change / energy if energy > 0 else 0.0
    return found


def by_edge(
    candidates: Sequence[Candidate], weights: Mapping[str, Tensor], layer_weights: Mapping[str, float]
) -> dict[tuple[str, str], float]:
    """Rank by spectral edge budgeting, without any data.

    The number is sum |W_ij| / w_l over the entries that the pattern drops by magnitude. Without patterns, the least sum
    for a given count of dropped entries is reached by dropping the smallest |W_ij| / w_l of all layers, which is SEB:
    so this is SEB's rule, restricted to the patterns. A layer with a larger w_l is cheaper to prune.

    Args:
        candidates: every layer's choices.
        weights: [O, I] or [O, I, kh, kw] by layer, needed where a layer has patterns.
        layer_weights: w_l of `unstructured.seb_weights`; 1 everywhere ranks by plain magnitude.

    Raises:
        StageFailed: a weight or its w_l is missing, or NaN.
    """
    values = {}
    for item in candidates:
        if item.pattern == DENSE:
            values[item.layer, DENSE] = 0.0
            continue
        if item.layer not in weights or not layer_weights.get(item.layer, 0.0) > 0:
            raise StageFailed(f"Layer {item.layer!r} has no weight tensor or no positive layer weight to rank it by.")
        size = as_rows(weights[item.layer].detach()).abs()
        dropped = ~project(size, Pattern.parse(item.pattern))
        values[item.layer, item.pattern] = float(size[dropped].sum(dtype=torch.float64)) / layer_weights[item.layer]
    return values


def by_slack(
    candidates: Sequence[Candidate],
    displacement: Mapping[tuple[str, str], Floats],
    margins: Floats,
    quantile: float = 0.5,
) -> dict[tuple[str, str], float]:
    """Rank by the share of the samples' margins that a layer's displacement spends.

    A sample's label is safe while 2 * (sum over layers of its displacements) stays below its margin, so each layer's
    share 2 eta / margin adds up, and the number is a quantile of that share over samples. With quantile = 1, and
    displacements that hold along the path of removals, a sum below 1 would prove every label kept. Displacements
    measured with only one layer pruned don't hold along that path: then it is a ranking, and the certificate is
    measured on the finished network.

    Args:
        candidates: every layer's choices.
        displacement: float64 [samples], the largest change of a logit that this choice alone causes; needed for
            every choice but dense.
        margins: float64 [samples], dense top-1 minus top-2 logit; ties (0) are left out, nothing can save them.
        quantile: over samples, in (0, 1]; 1 is the largest share, which the sample with the least margin decides.

    Raises:
        RecipeError: the quantile is out of range.
        StageFailed: a displacement is missing, of another length, negative or NaN, or no sample has a margin.
    """
    if not 0 < quantile <= 1:
        raise RecipeError(f"The quantile of the margin's share is {quantile:g}; expected a number above 0, up to 1.")
    with_margin = margins > 0
    if not with_margin.any() or not np.isfinite(margins).all():
        raise StageFailed("No sample has a positive margin, or one is NaN or infinite, so there is no slack to spend.")
    values = {}
    for item in candidates:
        if item.pattern == DENSE:
            values[item.layer, DENSE] = 0.0
            continue
        eta = displacement.get((item.layer, item.pattern))
        if eta is None or eta.shape != margins.shape or not (np.isfinite(eta) & (eta >= 0)).all():
            raise StageFailed(
                f"Layer {item.layer!r} as {item.pattern} lacks {margins.size} finite displacements of at least 0."
            )
        share = 2 * eta[with_margin] / margins[with_margin]
        values[item.layer, item.pattern] = float(np.quantile(share, quantile))
    return values


def by_adjoint(candidates: Sequence[Candidate], scores: Values) -> dict[tuple[str, str], float]:
    """Rank by what each choice alone would cost the margin to the runner-up to first order, without running it.

    First-order changes of layers add up, so the sum estimates what the whole choice costs. Signs are dropped, and
    what the layers do to each other is not counted: nothing is bounded.

    Args:
        candidates: every layer's choices.
        scores: logits, needed for every choice but dense; see `adjoint.adjoint_scores`.

    Raises:
        StageFailed: a score is missing, negative, NaN or infinite.
    """
    values = {}
    for item in candidates:
        score = 0.0 if item.pattern == DENSE else scores.get(_key(item), math.nan)
        if not 0 <= score < math.inf:
            raise StageFailed(f"Layer {item.layer!r} as {item.pattern} has the adjoint score {score}; one is expected.")
        values[_key(item)] = score
    return values


def allocate(
    candidates: Sequence[Candidate],
    budget: int,
    values: Values,
    *,
    ranking: str = "error",
    measured: Values | None = None,
) -> Allocation:
    """Choose one candidate per layer: the least sum of `values` with a sum of costs within the budget.

    The choice is exact: partial choices are extended layer by layer, and one is dropped only if another costs no more
    and is no worse, or if the linear relaxation shows that it can't beat the best choice known. Should more than
    131,072 partial choices stay open, the least promising go, and `bound` says what may have been lost. Of equal sums
    the one with the lower cost wins. The result depends on the order of layers in no more than ties, and not at all on
    the order within a layer.

    Args:
        candidates: every layer's choices; a layer that must stay dense has only its dense one.
        budget: largest sum of costs over these layers.
        values: the ranking's number for each candidate.
        ranking: its name.
        measured: measured error of each candidate, to report; None if `values` are that.

    Raises:
        RecipeError: no choice fits the budget; the message names the least that can be reached.
        StageFailed: a candidate is given twice, has no value, or a cost or value is negative or not finite.
    """
    layers = _by_layer(candidates, values)
    least = sum(min(item.cost for item in items) for items in layers)
    if budget < least:
        raise RecipeError(
            f"The budget of {budget:,} can't be met: the sparsest choice of all layers still needs {least:,}.",
            hint=f"raise the budget to at least {least:,}, or allow a sparser pattern in more layers.",
        )
    problem = [
        (np.array([item.cost for item in items], np.int64), np.array([values[_key(item)] for item in items]))
        for items in layers
    ]
    picks, unseen = _solve(problem, budget)
    chosen = [items[pick] for items, pick in zip(layers, picks, strict=True)]
    predicted = math.fsum(values[_key(item)] for item in chosen)
    truth = values if measured is None else measured
    return Allocation(
        ranking=ranking,
        chosen={item.layer: item.pattern for item in chosen},
        cost=sum(item.cost for item in chosen),
        budget=budget,
        predicted=predicted,
        bound=min(unseen, predicted),
        measured=math.fsum(truth[_key(item)] for item in chosen),
    )


def compare(
    candidates: Sequence[Candidate], budget: int, rankings: Mapping[str, Values], measured: Values
) -> tuple[Allocation, ...]:
    """Allocate by each ranking, and by measured error first; no other costs less in measured error.

    Args:
        candidates: as for `allocate`.
        budget: as for `allocate`.
        rankings: the numbers of each other ranking, by its name.
        measured: what `by_error` returned.

    Raises:
        RecipeError, StageFailed: as `allocate`.
    """
    all_rankings = {"error": measured, **rankings}
    return tuple(
        allocate(candidates, budget, values, ranking=name, measured=measured) for name, values in all_rankings.items()
    )


def differences(allocations: Sequence[Allocation]) -> dict[str, dict[str, str]]:
    """The layers for which the rankings chose different patterns: pattern by ranking, by layer."""
    first = allocations[0].chosen
    table = {layer: {one.ranking: one.chosen[layer] for one in allocations} for layer in first}
    return {layer: choices for layer, choices in table.items() if len(set(choices.values())) > 1}


def _key(item: Candidate) -> tuple[str, str]:
    return item.layer, item.pattern


def _by_layer(candidates: Sequence[Candidate], values: Values) -> list[list[Candidate]]:
    """Check the candidates and group them by layer, in an order that doesn't depend on how they came."""
    layers: dict[str, list[Candidate]] = {}
    seen = set()
    for item in candidates:
        value = values.get(_key(item), math.nan)
        if _key(item) in seen:
            raise StageFailed(f"Layer {item.layer!r} has two candidates as {item.pattern or 'dense'}.")
        if item.cost < 0 or not 0 <= value < math.inf:
            raise StageFailed(
                f"Layer {item.layer!r} as {item.pattern or 'dense'} has the cost {item.cost} and the value {value}; "
                "finite numbers of at least 0 are expected."
            )
        seen.add(_key(item))
        layers.setdefault(item.layer, []).append(item)
    return [sorted(items, key=lambda c: (values[_key(c)], c.cost, c.pattern)) for items in layers.values()]


def _solve(problem: Sequence[tuple[Ints, Floats]], budget: int) -> tuple[list[int], float]:
    """Pick one option per layer; returns the picks, and a lower bound of every sum that was not looked at.

    Source of the relaxation: Sinha and Zoltners, "The multiple-choice knapsack problem", 1979; of the lists of
    undominated partial choices: Nemhauser and Ullmann, "Discrete dynamic programming and capital allocation", 1969.
    """
    tails = [_hull(problem[index:]) for index in range(len(problem) + 1)]
    picks = _greedy(problem, budget)
    best = math.fsum(float(values[pick]) for (_, values), pick in zip(problem, picks, strict=True))
    # Covers rounding in the relaxation: a choice that ties with the best known one must stay.
    enough = best * (1 + 1e-9) + 1e-12 * float(tails[0][1][0])
    spent, value, lost = np.zeros(1, np.int64), np.zeros(1), math.inf
    trail: list[tuple[Ints, Ints]] = []
    for index, (costs, values) in enumerate(problem):
        spent, value, parent, pick = _extended(spent, value, costs, values)
        xs, ys = tails[index + 1]
        left = budget - spent
        relaxed = np.where(left >= xs[0], value + np.interp(left, xs, ys), math.inf)
        keep = (relaxed <= enough).nonzero()[0]
        if keep.size > MOST_STATES:
            order = keep[np.argsort(relaxed[keep], kind="stable")]
            lost = min(lost, float(relaxed[order[MOST_STATES]]))
            keep = np.sort(order[:MOST_STATES])
        if not keep.size:
            return picks, lost  # what could have beaten the greedy choice was among the least promising
        spent, value = spent[keep], value[keep]
        trail.append((parent[keep], pick[keep]))
    state = int(np.lexsort((spent, value))[0])
    found = []
    for parent, pick in reversed(trail):
        found.append(int(pick[state]))
        state = int(parent[state])
    return found[::-1], lost


def _extended(spent: Ints, value: Floats, costs: Ints, values: Floats) -> tuple[Ints, Floats, Ints, Ints]:
    """Extend each partial choice by each option and drop what another beats in cost and value."""
    total = (spent[:, None] + costs).ravel()
    summed = (value[:, None] + values).ravel()
    parent = np.repeat(np.arange(spent.size), costs.size)
    pick = np.tile(np.arange(costs.size), spent.size)
    order = np.lexsort((summed, total))
    ahead = np.minimum.accumulate(summed[order])
    better = np.concatenate([[True], summed[order][1:] < ahead[:-1]])
    kept = order[better]
    return total[kept], summed[kept], parent[kept], pick[kept]


def _steps(problem: Sequence[tuple[Ints, Floats]]) -> tuple[int, float, list[tuple[float, int, float, int, int]]]:
    """Least cost, its value, and the hull's steps (slope, cost, value, layer, option), the steepest gain first."""
    cost, value, steps = 0, 0.0, []
    for layer, (costs, values) in enumerate(problem):
        corners = _lower_hull(costs, values)
        cost += int(costs[corners[0]])
        value += float(values[corners[0]])
        for a, b in pairwise(corners):
            more, gain = int(costs[b] - costs[a]), float(values[b] - values[a])
            steps.append((gain / more, more, gain, layer, b))
    # A hull's slopes rise, so sorting by slope keeps each layer's steps in order.
    return cost, value, sorted(steps)


def _lower_hull(costs: Ints, values: Floats) -> list[int]:
    """Options on the lower convex hull of value over cost, from the cheapest to the one of least value."""
    hull: list[int] = []
    for option in np.lexsort((values, costs)):
        if hull and values[option] >= values[hull[-1]]:
            continue
        while len(hull) > 1 and _above(costs, values, hull[-2], hull[-1], option):
            hull.pop()
        hull.append(int(option))
    return hull


def _above(costs: Ints, values: Floats, a: int, b: int, c: int) -> bool:
    """Whether b lies on or above the line from a to c."""
    return bool((values[b] - values[a]) * (costs[c] - costs[a]) >= (values[c] - values[a]) * (costs[b] - costs[a]))


def _hull(problem: Sequence[tuple[Ints, Floats]]) -> tuple[Floats, Floats]:
    """The relaxed problem's least value over its budget: corners of a falling convex function."""
    cost, value, steps = _steps(problem)
    xs = np.cumsum([cost, *(step[1] for step in steps)], dtype=np.float64)
    ys = np.cumsum([value, *(step[2] for step in steps)], dtype=np.float64)
    return xs, ys


def _greedy(problem: Sequence[tuple[Ints, Floats]], budget: int) -> list[int]:
    """A good choice within the budget: the relaxation's whole steps, then every step that still fits."""
    cost, _, steps = _steps(problem)
    picks = [_lower_hull(costs, values)[0] for costs, values in problem]
    for _, _, _, layer, option in steps:
        more = int(problem[layer][0][option] - problem[layer][0][picks[layer]])
        if cost + more <= budget:
            cost += more
            picks[layer] = option
    return picks
