"""Inputs of a layer that cost nothing to remove: dead, constant, and linearly dependent on the others.

With x_R = A x_K + c on every calibration row, W_K += W_R A and b += W_R c leave the outputs equal, so the budget that
pruning those columns spends is 0 up to rounding. Behind a LayerNorm one input always depends on the rest; behind the
patch embedding of grey images, whose three channels carry the same, many do (138 of 384 in a ViT-S with 14-pixel
patches: rank 246 = 14^2 + 49 positions + 1).

That rank is a fact about a layer, rarely a reason to rewrite it: the refit of `solve` uses such freedom by itself, and
spreading one column over all others left 1.1 to 10 times the error on three layers of that ViT-S. So dependent inputs
go only where the mask loses less without them, as with duplicated channels.

Moments only say whether to look: their noise hides what is dependent and what is nearly so. Calibration rows decide, by
a factorisation in float64, and prove it twice: each identity x_j = A_j x_K + c_j must hold up to the rounding of its
float32 terms, and so must each output.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from mpdeploy.errors import StageFailed
from mpdeploy.pruning.capture import Stream, layer_nodes, state_of
from mpdeploy.pruning.layers import Layer, weight_of
from mpdeploy.pruning.moments import Moments, layer_rows
from mpdeploy.pruning.patterns import Pattern, as_rows, from_rows, project

EPS = torch.finfo(torch.float32).eps
NOISE = 1e-5  # share of an input's variance that moments may leave unexplained though nothing is: 1e-6 on a ViT-S
UNEXPLAINED = 1e-10  # the same for rows in float64: 1e-12 behind the LayerNorms of a ViT-S, whose outputs are rounded
IDENTITY = 32 * EPS  # of the sum of magnitudes of an identity's terms
COEFFICIENT = 8.0  # of standardised inputs: a larger one would amplify rounding and any shift of the inputs
ROWS_PER_INPUT = 2  # with fewer rows dependence may only mean too few of them
FITTED = 4  # rows per input that coefficients are fitted to; all rows judge
MOST_ROWS = 1 << 13  # calibration rows that prove a layer, or 4 per input if that is more
SLICE = 1 << 12  # rows judged at a time


@dataclass(frozen=True)
class ZeroBudget:
    """Inputs that can be removed exactly; all indices int64 and ascending.

    Args:
        dead: inputs that are zero on every row.
        constant: inputs that never change, dead ones not among them.
        dependent: inputs that are affine functions of kept ones.
        kept: every other input.
        coefficients: A, float64 [dependent, kept].
        offset: c, float64 [dependent].
        mean: the inputs' means, float64 [m]: the values of constant inputs.
        rank: numerical rank of the inputs about their mean, whatever is removed of them.
        note: full sentences on what was left alone and why, or "".
    """

    dead: Tensor
    constant: Tensor
    dependent: Tensor
    kept: Tensor
    coefficients: Tensor
    offset: Tensor
    mean: Tensor
    rank: int
    note: str

    @property
    def removed(self) -> int:
        """Number of columns that `apply` makes zero."""
        return len(self.dead) + len(self.constant) + len(self.dependent)


def find(moments: Moments, rows: Tensor) -> ZeroBudget:
    """Find removable inputs.

    Args:
        moments: of the layer's inputs.
        rows: inputs on calibration images [r, m], the rows that `moments` took in or more; they decide.

    Raises:
        StageFailed: a moment or a row is NaN or infinite.
    """
    mean, scatter = moments.mean, moments.centred()
    if not bool(torch.isfinite(mean).all() and torch.isfinite(scatter).all() and torch.isfinite(rows).all()):
        raise StageFailed("The inputs of a layer hold NaN or infinity.", hint="check the calibration images.")
    spread = scatter.diagonal().clamp_min(0)
    still = spread <= moments.count * (8 * EPS * mean).square()
    alive = (~still).nonzero()[:, 0]
    scale = spread[alive].sqrt()
    pivots = _pivoted_cholesky(scatter[alive][:, alive] / scale / scale[:, None], NOISE)[0]
    plain = _without_dependents(still, mean, len(alive))
    doubtful = len(alive) - len(pivots)
    if not doubtful:
        return plain
    if len(rows) < ROWS_PER_INPUT * len(mean):
        why = f"{len(rows)} rows are too few to call {doubtful} of {len(mean)} inputs dependent."
        return replace(plain, rank=len(pivots), note=why)
    some = _sample(rows, len(mean))[:, alive] - mean[alive]
    some /= some.norm(dim=0).clamp_min(1e-300)
    pivots, factor = _pivoted_cholesky(some.T @ some, UNEXPLAINED)
    others = torch.ones(len(alive), dtype=torch.bool, device=mean.device)
    others[pivots] = False
    standard = torch.linalg.solve_triangular(factor[pivots], factor[others], upper=False, left=False)
    return _proven(plain, alive[others], alive[pivots], (standard.abs() <= COEFFICIENT).all(dim=1), rows)


def _sample(rows: Tensor, inputs: int) -> Tensor:
    """FITTED rows per input, in float64; drawn, since evenly spaced ones may miss half of a network's tokens."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return rows[order[: FITTED * inputs].to(rows.device)].double()


def _pivoted_cholesky(matrix: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Pivots and factor [m, rank] of a correlation matrix, until no diagonal entry above `tolerance` is left."""
    left = matrix.diagonal().clone()
    factor = torch.zeros_like(matrix)
    pivots: list[int] = []
    while len(pivots) < len(matrix):
        pivot = int(left.argmax())
        if not float(left[pivot]) > tolerance:
            break
        step = len(pivots)
        column = matrix[:, pivot] - factor[:, :step] @ factor[pivot, :step]
        factor[:, step] = column / left[pivot].sqrt()
        factor[pivots, step] = 0
        left -= factor[:, step].square()
        pivots.append(pivot)
        left[pivots] = -float("inf")
    return torch.tensor(pivots, dtype=torch.int64, device=matrix.device), factor[:, : len(pivots)]


def _without_dependents(still: Tensor, mean: Tensor, rank: int) -> ZeroBudget:
    dead, constant = (still & (mean == 0)).nonzero()[:, 0], (still & (mean != 0)).nonzero()[:, 0]
    kept = (~still).nonzero()[:, 0]
    none = kept[:0]
    return ZeroBudget(dead, constant, none, kept, mean.new_zeros(0, len(kept)), mean.new_zeros(0), mean, rank, "")


def _proven(plain: ZeroBudget, nominated: Tensor, basis: Tensor, moderate: Tensor, rows: Tensor) -> ZeroBudget:
    """Add the nominated inputs whose identity holds on every row, if its coefficients are moderate."""
    coefficients = _fitted(plain.mean, nominated, basis, rows)
    offset = plain.mean[nominated] - coefficients @ plain.mean[basis]
    worst = torch.zeros_like(offset)
    for some in _slices(rows):
        x, terms = some[:, basis], some[:, nominated]
        left = (terms - x @ coefficients.T - offset).abs()
        size = terms.abs() + x.abs() @ coefficients.abs().T + offset.abs()
        worst = torch.maximum(worst, _share(left, size).amax(dim=0))
    holds = worst <= IDENTITY
    counts = {
        "inputs are nearly dependent on others, but not up to rounding.": int((~holds).sum()),
        f"dependent inputs stay: they need coefficients above {COEFFICIENT:g}.": int((holds & ~moderate).sum()),
    }
    taken = holds & moderate
    kept = plain.kept[~torch.isin(plain.kept, nominated[taken])]
    full = coefficients.new_zeros(len(nominated), len(plain.mean))
    full[:, basis] = coefficients
    return replace(
        plain,
        dependent=nominated[taken],
        kept=kept,
        coefficients=full[taken][:, kept],
        offset=offset[taken],
        rank=plain.rank - int(holds.sum()),
        note=" ".join(f"{count} {what}" for what, count in counts.items() if count),
    )


def _fitted(mean: Tensor, nominated: Tensor, basis: Tensor, rows: Tensor) -> Tensor:
    """Coefficients of the nominated inputs on the basis, float64, by least squares."""
    some = _sample(rows, len(mean)) - mean
    scale = some[:, basis].norm(dim=0).clamp_min(1e-300)
    solution = torch.linalg.lstsq(some[:, basis] / scale, some[:, nominated]).solution
    coefficients: Tensor = (solution / scale[:, None]).T
    return coefficients


def _slices(rows: Tensor) -> Iterator[Tensor]:
    return (some.double() for some in torch.split(rows, SLICE))


def _share(change: Tensor, size: Tensor) -> Tensor:
    """Change over size; 0 where nothing changes, infinite where something comes from nothing, NaN stays."""
    return torch.where(change == 0, change, change / size)


def apply(weight: Tensor, bias: Tensor | None, budget: ZeroBudget) -> tuple[Tensor, Tensor | None]:
    """Remove the columns: weight [O, m] and bias [O] with the same outputs on every calibration row.

    Raises:
        StageFailed: constants would have to move into a bias that the layer lacks.
    """
    wide = weight.double()
    shift = wide[:, budget.constant] @ budget.mean[budget.constant] + wide[:, budget.dependent] @ budget.offset
    if bias is None and bool((shift != 0).any()):
        raise StageFailed("Constant or dependent inputs can't be removed from a layer without a bias.")
    new = torch.zeros_like(wide)
    new[:, budget.kept] = wide[:, budget.kept] + wide[:, budget.dependent] @ budget.coefficients
    return new.to(weight.dtype), None if bias is None else (bias.double() + shift).to(bias.dtype)


def residual(
    rows: Tensor, weight_before: Tensor, bias_before: Tensor | None, weight_after: Tensor, bias_after: Tensor | None
) -> float:
    """Largest change of an output over rows [r, m], as a share of |W| |x| + |b|, in float64; NaN stays NaN."""
    change = weight_after.double() - weight_before.double()
    size = weight_before.double().abs()
    shift = start = change.new_zeros(len(change))
    if bias_before is not None and bias_after is not None:
        shift, start = bias_after.double() - bias_before.double(), bias_before.double().abs()
    worst = change.new_zeros(())
    for some in _slices(rows):
        share = _share((some @ change.T + shift).abs(), some.abs() @ size.T + start)
        worst = torch.maximum(worst, share.max())
    return float(worst)


def allowance(inputs: int) -> float:
    """Largest `residual` that counts as rounding: 4 eps sqrt(inputs).

    What float32 may do to an output when it is computed in the first place is of this size: eps sqrt(m) / 2 times a
    small factor with high probability, eps m / 2 at worst (Higham and Mary, "A new approach to probabilistic rounding
    error analysis", 2019).
    """
    return 4.0 * float(EPS) * math.sqrt(inputs)


def reduce_layer(
    weight: Tensor, bias: Tensor | None, moments: Moments, rows: Tensor, pattern: Pattern
) -> tuple[Tensor, Tensor | None, ZeroBudget, float]:
    """Remove a layer's dead, constant and dependent inputs, as far as calibration rows prove that nothing changes.

    Dead and constant inputs always go. Dependent ones go if an N:M mask then loses less. Whatever changes an output by
    more than `allowance` stays, and the note says so.

    Args:
        weight: [O, m], groups along the last axis.
        bias: [O], or None; then only dead inputs can go.
        moments: of the layer's inputs.
        rows: inputs on calibration images [r, m], in the order of `weight`'s columns: see `moments.layer_rows`.
        pattern: N:M that the layer is to hold afterwards.

    Returns:
        (weight, bias, what was removed, residual): the weight and bias that came where nothing can be removed; the
        residual is of what is returned, at most `allowance(m)`.

    Raises:
        StageFailed: a moment or a row is NaN or infinite.
    """
    found = find(moments, rows)
    for budget in _attempts(found, weight, bias, moments, pattern):
        if not budget.removed:
            return weight, bias, budget, 0.0
        changed = apply(weight, bias, budget)
        change = residual(rows, weight, bias, *changed)
        if change <= allowance(weight.shape[1]):
            return *changed, budget, change
    raise AssertionError("The last attempt removes nothing.")


def _attempts(
    found: ZeroBudget, weight: Tensor, bias: Tensor | None, moments: Moments, pattern: Pattern
) -> Iterator[ZeroBudget]:
    """What to remove, from the most to the least."""
    if bias is None:
        why = "The layer has no bias, so only dead inputs can be removed."
        found = _left(_left(found, "dependent", why), "constant", why)
    elif len(found.dependent) and not _helps(found, weight, moments, pattern):
        found = _left(
            found, "dependent", f"{len(found.dependent)} dependent inputs stay: without them {pattern} loses no less."
        )
    yield found
    for kind in ("dependent", "constant", "dead"):
        found = _left(
            found, kind, f"{kind.capitalize()} inputs stay: without them outputs change by more than rounding."
        )
        yield found


def _helps(budget: ZeroBudget, weight: Tensor, moments: Moments, pattern: Pattern) -> bool:
    """Whether a mask loses less of w^2 var(x), the error if inputs were uncorrelated, once dependents are gone."""
    lost = []
    for some in (replace(budget, dependent=budget.dependent[:0], coefficients=budget.coefficients[:0]), budget):
        wide = weight.double()
        if len(some.dependent):
            wide = apply(wide, wide.new_zeros(len(wide)), some)[0]
        score = wide.square() * moments.centred().diagonal().clamp_min(0)
        lost.append(float((score * ~project(score, pattern)).sum()))
    return lost[1] < lost[0]


def _left(budget: ZeroBudget, kind: str, why: str) -> ZeroBudget:
    """The budget with one kind of inputs kept; the note says why, if there are any."""
    inputs = getattr(budget, kind)
    if not len(inputs):
        return budget
    kept = torch.cat([budget.kept, inputs]).sort().values
    coefficients = budget.coefficients.new_zeros(len(budget.dependent), len(kept))
    coefficients[:, torch.isin(kept, budget.kept)] = budget.coefficients
    notes = budget.note if why in budget.note else f"{budget.note} {why}".strip()
    fewer = replace(budget, kept=kept, coefficients=coefficients, note=notes)
    if kind == "dead":
        return replace(fewer, dead=inputs[:0])
    if kind == "constant":
        return replace(fewer, constant=inputs[:0])
    return replace(fewer, dependent=inputs[:0], coefficients=coefficients[:0], offset=budget.offset[:0])


@dataclass(frozen=True)
class Removed:
    """What was removed of one layer's inputs, for the certificate.

    Args:
        inputs: how many the layer has.
        rank: numerical rank of the inputs about their mean.
        dead: inputs removed because they are zero on every calibration row.
        constant: inputs removed because they never change; their part went into the bias.
        dependent: inputs removed because they are affine functions of others.
        rows: calibration rows that prove it.
        residual: the largest change of an output on those rows, relative to |W||x| + |b|.
        allowance: what rounding explains; the residual is not above it.
        note: full sentences on what was left alone, or "".
    """

    inputs: int
    rank: int
    dead: int
    constant: int
    dependent: int
    rows: int
    residual: float
    allowance: float
    note: str


def reduce_network(
    module: nn.Module,
    graph: fx.Graph,
    batches: Sequence[Tensor],
    layers: Sequence[Layer],
    *,
    progress: Callable[[int, int], None],
) -> dict[str, Removed]:
    """Remove from every layer to be pruned the inputs that cost nothing, in place; outputs stay what they were.

    Args:
        module: the dense network in eval mode.
        graph: what `capture.capture` returned for it.
        batches: calibration images, float32 [b, C, H, W].
        layers: what `layers.choose` returned.
        progress: told (layers done, layers in all).

    Returns:
        {layer: what was removed}.

    Raises:
        StageFailed: an input is NaN or infinite.
    """
    chosen = {layer.name: layer for layer in layers if layer.pattern}
    state = state_of(module, graph)
    stream = Stream(graph, state, batches)
    found = {}
    for place, (name, node) in enumerate(layer_nodes(graph, list(chosen)).items()):
        stream.advance(node)
        child = module.get_submodule(name)
        weight, bias = weight_of(child), getattr(child, "bias", None)
        keep = -(-max(MOST_ROWS, 4 * weight[0].numel()) // sum(map(len, batches)))
        inputs = stream.argument(node, 0)
        stream.advance(node, through=True)
        moments, parts = Moments(), []
        for batch, (x, y) in enumerate(zip(inputs, stream.output(node), strict=True)):
            for rows, goals in layer_rows(node, x, y, keep, place * 1_000_003 + batch):
                moments.add(rows, goals[:, :0])
                parts.append(rows)
        every = torch.cat(parts)
        flat = as_rows(weight.detach()).reshape(len(weight), -1)
        pattern = Pattern.parse(chosen[name].pattern)
        own = bias.detach() if isinstance(bias, Tensor) else None
        left, shifted, budget, change = reduce_layer(flat, own, moments, every, pattern)
        with torch.no_grad():
            weight.copy_(from_rows(left.reshape(-1, weight.shape[1]), weight.shape))
            if isinstance(bias, Tensor) and shifted is not None:
                bias.copy_(shifted)
        found[name] = Removed(
            inputs=flat.shape[1],
            rank=budget.rank,
            dead=len(budget.dead),
            constant=len(budget.constant),
            dependent=len(budget.dependent),
            rows=len(every),
            residual=change,
            allowance=allowance(flat.shape[1]),
            note=budget.note,
        )
        progress(len(found), len(chosen))
    return found
