"""Which weights of a layer stay: N:M masks for a quadratic output error, by ADMM, SparseGPT, saliency or magnitude.

The error of weights W_hat on a layer's calibration inputs is tr(W_hat H W_hat^T) - 2 tr(W_hat G^T) + const, with H the
(damped) second moment of the inputs and G the joint moment of the wanted outputs and the inputs. H couples the weights
of a row, so the best mask is no matter of single weights: that is what ADMM and SparseGPT look at.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mpdeploy.pruning.patterns import Pattern, project
from mpdeploy.pruning.refit import singular

METHODS = ("admm", "sparsegpt", "activation", "magnitude")

# Chosen on the twelve layers of three blocks of a pretrained ViT-S: 15 over-relaxed steps leave the error that 30 plain
# ones leave (0.554 and 0.551 of SparseGPT's), 200 slow ones 0.532.
STEPS = 15
REFACTOR = 5  # steps between two factorisations, each with a larger penalty
PENALTY, GROWTH = 0.1, 1.2  # of the unit diagonal of the scaled H; growth per step
RELAX = 1.7
BLOCK = 128  # columns that SparseGPT updates before it touches the rest


@dataclass(frozen=True)
class Choice:
    """A mask, and weights near the least-squares fit on it.

    Args:
        mask: boolean [O, m], exactly `keep` true entries per group.
        start: [O, m], zero outside the mask: where the refit starts from; for SparseGPT its own updated weights.
    """

    mask: Tensor
    start: Tensor


def choose_mask(weight: Tensor, gram: Tensor, target: Tensor, power: Tensor, pattern: Pattern, method: str) -> Choice:
    """Choose the weights that stay.

    Args:
        weight: dense weights [O, m], groups along the last axis.
        gram: H [m, m], damped, positive definite; of `weight`'s type; float32 is enough for a mask.
        target: G [O, m].
        power: sum of squares of each input [m].
        pattern: N:M.
        method: one of METHODS. "magnitude" scores |w|, "activation" |w| times the rms of its input (Wanda, Sun et al.,
            2023), "sparsegpt" is Frantar and Alistarh, 2023, "admm" Boza, 2024, with over-relaxation.

    Raises:
        StageFailed: H is not positive definite, or a score is NaN.
    """
    if method == "admm":
        return _admm(weight, gram, target, pattern)
    if method == "sparsegpt":
        return _sparsegpt(weight, gram, pattern)
    score = weight.abs() * (power.clamp_min(0).sqrt() if method == "activation" else 1.0)
    mask = project(score, pattern)
    return Choice(mask, weight * mask)


def inverse(gram: Tensor) -> Tensor:
    """Inverse of a symmetric positive definite matrix.

    Raises:
        StageFailed: it is singular, or holds NaN.
    """
    factor, info = torch.linalg.cholesky_ex(gram)
    if int(info) != 0 or not bool(torch.isfinite(factor.diagonal()).all()):
        raise singular()
    return torch.cholesky_inverse(factor)


def _admm(weight: Tensor, gram: Tensor, target: Tensor, pattern: Pattern) -> Choice:
    """Alternate between the ridge solution and its projection on the pattern, on inputs scaled to a unit diagonal.

    Source: V. Boza, "Fast and effective weight update for pruned large language models", 2024; over-relaxation from
    Boyd et al., "Distributed optimization ... via ADMM", 2011, section 3.4.3.
    """
    scale = gram.diagonal().sqrt()
    scaled, goal = gram / scale / scale[:, None], target / scale
    sparse = weight * scale
    mask = project(sparse.abs(), pattern)
    sparse = sparse * mask
    dual = torch.zeros_like(sparse)
    penalty = PENALTY
    dense = solver = torch.empty(0)
    for step in range(STEPS):
        if step % REFACTOR == 0:
            if step:
                penalty *= GROWTH**REFACTOR
                dual /= GROWTH**REFACTOR
            damped = scaled.clone()
            damped.diagonal().add_(penalty)
            solver = inverse(damped)
        dense = (goal + penalty * (sparse - dual)) @ solver
        dual += RELAX * dense + (1 - RELAX) * sparse
        mask = project(dual.abs(), pattern)
        sparse = dual * mask
        dual -= sparse
    return Choice(mask, dense / scale * mask)


def _sparsegpt(weight: Tensor, gram: Tensor, pattern: Pattern) -> Choice:
    """Column by column: choose a group's mask by w^2 / [H^-1]_jj, then let the columns to the right make up for it."""
    factor, info = torch.linalg.cholesky_ex(inverse(gram), upper=True)
    if int(info) != 0:
        raise singular()
    left = weight.clone()
    mask = torch.ones_like(weight, dtype=torch.bool)
    width = BLOCK // pattern.group * pattern.group or pattern.group
    for first in range(0, weight.shape[1], width):
        last = min(first + width, weight.shape[1])
        block, own = left[:, first:last], factor[first:last, first:last]
        errors = torch.empty_like(block)
        for column in range(last - first):
            if column % pattern.group == 0:
                group = slice(column, column + pattern.group)
                saliency = block[:, group].square() / own.diagonal()[group].square()
                mask[:, first + column : first + column + pattern.group] = project(saliency, pattern)
            error = block[:, column] * ~mask[:, first + column] / own[column, column]
            block[:, column:] -= torch.outer(error, own[column, column:])
            errors[:, column] = error
        left[:, last:] -= errors @ factor[first:last, last:]
    return Choice(mask, left * mask)
