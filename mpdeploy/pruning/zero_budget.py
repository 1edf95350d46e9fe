"""Inputs of a layer that cost nothing to remove: dead, constant, and linearly dependent on the others.

With x_R = A x_kept + c on every calibration row, W_kept += W_R A and b += W_R c leave the outputs equal, so the budget
that pruning those columns spends is 0 up to rounding. A removed column's weights are zero; so is its score, and the
N:M mask keeps the other columns of its group in its place.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mpdeploy.errors import StageFailed

EPS = torch.finfo(torch.float32).eps
TOLERANCE = 4 * EPS  # share of an input's variance left unexplained; the float32 products hide anything smaller
COEFFICIENT = 8.0  # of standardised inputs: a larger one would amplify rounding and any shift of the inputs
ROWS_PER_INPUT = 2  # with fewer rows dependence may only mean too few of them


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
        rank: numerical rank of the centred scatter.
        mean: the inputs' means, float64 [m]: the values of constant inputs.
        note: why dependent inputs were left alone, or "".
    """

    dead: Tensor
    constant: Tensor
    dependent: Tensor
    kept: Tensor
    coefficients: Tensor
    offset: Tensor
    rank: int
    mean: Tensor
    note: str


def find(mean: Tensor, scatter: Tensor, count: int, tolerance: float = TOLERANCE) -> ZeroBudget:
    """Find removable inputs from their moments: mean [m], scatter about it [m, m], both float64, over `count` rows.

    Raises:
        StageFailed: a moment is NaN or infinite.
    """
    if not bool(torch.isfinite(mean).all() and torch.isfinite(scatter).all()):
        raise StageFailed("The moments of a layer's inputs hold NaN or infinity.", hint="check the calibration images.")
    spread = scatter.diagonal().clamp_min(0)
    still = spread <= count * (8 * EPS * mean).square()
    dead = still & (mean == 0) & (spread == 0)
    alive = (~still).nonzero()[:, 0]
    scale = spread[alive].sqrt()
    pivots, factor = _pivoted_cholesky(scatter[alive][:, alive] / scale / scale[:, None], tolerance)
    chosen = torch.zeros(len(alive), dtype=torch.bool, device=mean.device)
    chosen[pivots] = True
    others = (~chosen).nonzero()[:, 0]
    notes = []
    if len(others) and count < ROWS_PER_INPUT * len(mean):
        notes.append(f"{count} rows are too few to call {len(others)} of {len(mean)} inputs dependent.")
        others = others[:0]
    standard = torch.linalg.solve_triangular(factor[pivots], factor[others], upper=False, left=False)
    moderate = (standard.abs() <= COEFFICIENT).all(dim=1)
    if not bool(moderate.all()):
        notes.append(f"{int((~moderate).sum())} dependent inputs need coefficients above {COEFFICIENT:g}.")
    others, standard = others[moderate], standard[moderate]
    dependent = alive[others]
    kept_mask = ~still
    kept_mask[dependent] = False
    kept = kept_mask.nonzero()[:, 0]
    full = mean.new_zeros(len(dependent), len(mean))
    full[:, alive[pivots]] = standard * scale[others][:, None] / scale[pivots]
    coefficients = full[:, kept]
    offset = mean[dependent] - coefficients @ mean[kept]
    constant = (still & ~dead).nonzero()[:, 0]
    return ZeroBudget(
        dead.nonzero()[:, 0], constant, dependent, kept, coefficients, offset, len(pivots), mean, " ".join(notes)
    )


def _pivoted_cholesky(matrix: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Pivots and factor [m, rank] of a correlation matrix, until no diagonal entry above `tolerance` is left."""
    left = matrix.diagonal().clone()
    factor = matrix.new_zeros(matrix.shape)
    pivots: list[int] = []
    while len(pivots) < len(matrix):
        pivot = int(left.argmax())
        if float(left[pivot]) <= tolerance:
            break
        step = len(pivots)
        column = matrix[:, pivot] - factor[:, :step] @ factor[pivot, :step]
        factor[:, step] = column / left[pivot].sqrt()
        factor[pivots, step] = 0
        left -= factor[:, step].square()
        pivots.append(pivot)
        left[pivots] = -float("inf")
    return torch.tensor(pivots, dtype=torch.int64, device=matrix.device), factor[:, : len(pivots)]


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
    """Largest change of an output over rows [r, m], in float64, relative to the largest output; NaN stays NaN."""
    wide = rows.double()
    before, after = wide @ weight_before.double().T, wide @ weight_after.double().T
    before = before if bias_before is None else before + bias_before.double()
    after = after if bias_after is None else after + bias_after.double()
    change, scale = (after - before).abs().max(), before.abs().max()
    return float(change / scale) if float(scale) else float(change)


def allowance(inputs: int) -> float:
    """Largest `residual` that float32 rounding of inputs, weights and their moments explains: 32 eps sqrt(inputs)."""
    return 32.0 * float(EPS) * float(inputs) ** 0.5
