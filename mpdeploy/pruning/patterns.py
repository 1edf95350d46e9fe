"""N:M structured sparsity: which weights of each group of inputs stay.

A group is M consecutive input channels of one output row. That is the axis sparse tensor cores read: a Linear's inputs,
and for a convolution the input channels at one kernel position (not the flattened C*kh*kw axis, whose groups mix
kernel positions and which no backend can use).
"""

import re
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from mpdeploy.errors import RecipeError, StageFailed

WRITTEN = re.compile(r"(\d+):(\d+)")


@dataclass(frozen=True)
class Pattern:
    """Keep at most `keep` of every `group` consecutive inputs, written "keep:group" (2:4, 12:16).

    Args:
        keep: weights that stay in each group; at least 1 and fewer than `group`.
        group: consecutive inputs that form one group.

    Raises:
        RecipeError: the two numbers are no pattern.
    """

    keep: int
    group: int

    def __post_init__(self) -> None:
        if not 0 < self.keep < self.group:
            raise RecipeError(
                f"{self.keep}:{self.group} is no sparsity pattern: it must keep at least 1 and drop at least 1.",
                hint='write N:M with 0 < N < M, as in "2:4".',
            )

    @classmethod
    def parse(cls, text: str) -> "Pattern":
        """Read "2:4".

        Raises:
            RecipeError: the text is no pattern.
        """
        match = WRITTEN.fullmatch(text.strip())
        if match is None:
            raise RecipeError(f"{text!r} is no sparsity pattern.", hint='write N:M with 0 < N < M, as in "2:4".')
        return cls(int(match[1]), int(match[2]))

    @property
    def density(self) -> float:
        """Share of the weights that stay."""
        return self.keep / self.group

    def __str__(self) -> str:
        return f"{self.keep}:{self.group}"


def as_rows(weight: Tensor) -> Tensor:
    """View a weight so that groups run along the last axis.

    Args:
        weight: a Linear's [O, I] or a Conv2d's [O, I, kh, kw].

    Returns:
        [O, I], or [O*kh*kw, I] with the kernel position varying fastest over rows.

    Raises:
        StageFailed: the weight has another number of axes.
    """
    if weight.ndim == 2:
        return weight
    if weight.ndim == 4:
        return weight.permute(0, 2, 3, 1).reshape(-1, weight.shape[1])
    raise StageFailed(f"A weight of shape {list(weight.shape)} is neither [O, I] nor [O, I, kh, kw].")


def from_rows(rows: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """Undo `as_rows`: bring [rows, inputs] back to a weight's own `shape`."""
    if len(shape) == 2:
        return rows.reshape(shape)
    outputs, inputs, height, width = shape
    return rows.reshape(outputs, height, width, inputs).permute(0, 3, 1, 2).contiguous()


def _grouped(rows: Tensor, pattern: Pattern) -> Tensor:
    if rows.ndim != 2 or rows.shape[1] % pattern.group:
        raise StageFailed(
            f"Groups of {pattern.group} ({pattern}) don't fit rows of shape {list(rows.shape)}: "
            f"a matrix whose number of inputs is a multiple of {pattern.group} is expected."
        )
    return rows.reshape(rows.shape[0], -1, pattern.group)


def project(score: Tensor, pattern: Pattern) -> Tensor:
    """Keep the `keep` highest scores of each group.

    For a cost that is a sum over single weights (magnitude, or |w| times the input's root mean square) this is the
    exact minimiser over all masks of the pattern, so 8:16 needs no enumeration of its 12870 patterns.

    Args:
        score: [rows, inputs], higher is kept; infinity keeps.
        pattern: the pattern.

    Returns:
        Boolean mask of the same shape with exactly `keep` entries per group; of equal scores the lower index stays.

    Raises:
        StageFailed: a score is NaN, or the groups don't fit.
    """
    if bool(torch.isnan(score).any()):
        raise StageFailed("A pruning score is NaN: the weights or the calibration inputs hold NaN.")
    groups = _grouped(score, pattern)
    mask = groups >= _nth_largest(groups, pattern.keep).unsqueeze(-1)
    if int(mask.sum()) != mask.shape[0] * mask.shape[1] * pattern.keep:
        # Equal scores: a stable sort decides between them, which is slower by far.
        order = torch.sort(groups, dim=-1, descending=True, stable=True).indices
        mask = torch.zeros_like(mask).scatter_(-1, order[..., : pattern.keep], True)
    return mask.reshape(score.shape)


def _nth_largest(groups: Tensor, keep: int) -> Tensor:
    """The `keep`-th largest of each group, [rows, groups].

    A sorting network over whole planes: for groups this small many times faster than `topk` or `sort` on the last axis.
    Source: K. E. Batcher, "Sorting networks and their applications", 1968 (odd-even merge sort).
    """
    planes = [plane.contiguous() for plane in groups.unbind(-1)]
    for low, high in _network(len(planes)):
        a, b = planes[low], planes[high]
        planes[low], planes[high] = torch.maximum(a, b), torch.minimum(a, b)
    return planes[keep - 1]


@cache
def _network(size: int) -> tuple[tuple[int, int], ...]:
    """Comparators (i, j), i < j, that sort any `size` values."""
    pairs = []
    merge = 1
    while merge < size:
        gap = merge
        while gap >= 1:
            for start in range(gap % merge, size - gap, 2 * gap):
                for low in range(start, min(start + gap, size - gap)):
                    if low // (2 * merge) == (low + gap) // (2 * merge):
                        pairs.append((low, low + gap))
            gap //= 2
        merge *= 2
    return tuple(pairs)


def bad_groups(weight: Tensor, pattern: Pattern) -> int:
    """Count the groups that hold more than `keep` nonzeros along the input-channel axis; NaN counts as nonzero.

    Args:
        weight: a Linear's [O, I] or a Conv2d's [O, I, kh, kw].
        pattern: the pattern that the weight should follow.

    Raises:
        StageFailed: the weight's inputs are no multiple of the group.
    """
    nonzeros = (_grouped(as_rows(weight), pattern) != 0).sum(dim=-1)
    return int((nonzeros > pattern.keep).sum())
