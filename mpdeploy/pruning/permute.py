"""Which order of channels lets an N:M pattern keep most.

A group keeps the N largest of its M scores in every row, so it pays to bring channels together that are large in
different rows. The usual search (Pool and Yu, NeurIPS 2021) swaps the best pair of channels, again and again. Here one
channel is taken out of every group at once, and all of them are put back in the best possible way. With the other M - 1
scores of a row in place, a group that gets score x keeps a constant plus max(b, x), where b is the N-th largest of the
others. The sum over rows is a matrix [groups, channels], and its best assignment is a linear assignment problem, solved
exactly. An iteration thus finds the best of (number of groups)! rearrangements, and never loses.

tools/bench/permutation.py measures both on real layers. The swap search falls behind as channels grow in number: each
swap re-evaluates two groups with every channel, and it takes about one swap per two channels.
"""

from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mpdeploy.errors import StageFailed
from mpdeploy.pruning.patterns import Pattern

CACHED = 1 << 19  # entries that one comparison writes: 2 MiB, which stay in the cache
STALLED = 1e-5  # a round that gains less than this share of the kept score is the last
TOGETHER = 192  # most groups in one assignment, whose cost grows with their cube; more are parted, by chance each time
ROUNDING = 1e-7  # an assignment that gains less than this share may be no gain at all in float32


@dataclass(frozen=True)
class Search:
    """An order of channels and what it brings.

    Args:
        order: int64 [C]; new position i holds old channel order[i].
        kept_before: total score that the pattern keeps in the given order.
        kept_after: in the new order; never less.
        iterations: reassignments done.
    """

    order: Tensor
    kept_before: float
    kept_after: float
    iterations: int


def search(score: Tensor, pattern: Pattern, *, blocks: int = 1, iterations: int, seed: int = 0) -> Search:
    """Reorder channels so that the pattern keeps as much score as possible.

    Each round takes every channel of every group out once, in an order drawn by chance: always taking out the channel
    that contributes least gets stuck early, and drawing each slot anew gains a little more slowly. Starting from
    channels dealt out by size brings nothing: the first reassignment does as much.

    Args:
        score: float32 [rows, C], not negative: the rows of all consumers.
        pattern: the pattern.
        blocks: channels move only inside each of this many equal consecutive blocks.
        iterations: most reassignments to do; the search ends earlier when a round brings next to nothing.
        seed: of the order in which channels are taken out; the same seed gives the same result.

    Raises:
        StageFailed: a score is NaN or infinite, or the groups don't fit the blocks.
    """
    _check(score, pattern, blocks)
    channels = score.T.contiguous()
    groups = torch.arange(score.shape[1], device=score.device).reshape(-1, pattern.group)
    before = kept = _kept(channels, groups, pattern)
    start, generator = groups.clone(), torch.Generator().manual_seed(seed)
    done, gained = 0, 0.0
    while done < iterations and len(groups) > blocks:
        slot = done % pattern.group
        if slot == 0:
            turns = torch.rand(groups.shape, generator=generator).argsort(dim=1).to(score.device)
            gained = 0.0
        parts = _parts(len(groups), blocks, generator)
        gained += _reassign(channels, groups, turns[:, slot], pattern, parts, ROUNDING * kept)
        done += 1
        if slot == pattern.group - 1:
            kept += gained
            if gained <= STALLED * kept:
                break
    after = _kept(channels, groups, pattern)
    if after < before:  # by rounding alone
        groups, after = start, before
    return Search(groups.reshape(-1).cpu(), before, after, done)


def _check(score: Tensor, pattern: Pattern, blocks: int) -> None:
    if score.ndim != 2 or not score.shape[1] or blocks < 1 or score.shape[1] % (blocks * pattern.group):
        raise StageFailed(
            f"Groups of {pattern.group} ({pattern}) in {blocks} blocks don't fit scores of shape {list(score.shape)}: "
            f"a matrix whose number of channels is a multiple of {blocks} x {pattern.group} is expected."
        )
    if not bool(torch.isfinite(score).all()):
        raise StageFailed("A score is NaN or infinite: the weights or the calibration inputs hold such numbers.")


def _kept(channels: Tensor, groups: Tensor, pattern: Pattern) -> float:
    """Score that the pattern keeps, summed over rows and groups."""
    members = [channels[groups[:, slot]] for slot in range(pattern.group)]
    return sum(float(part.sum(dtype=torch.float64)) for part in _largest(members, pattern.keep))


def _largest(members: list[Tensor], count: int) -> list[Tensor]:
    """The `count` largest of several tensors, entry by entry, in falling order.

    Comparing whole tensors is several times faster than sorting along a short axis.
    """
    found: list[Tensor] = []
    for member in members:
        rest = member
        for place, held in enumerate(found):
            found[place], rest = torch.maximum(held, rest), torch.minimum(held, rest)
        if len(found) < count:
            found.append(rest)
    return found


def _parts(count: int, blocks: int, generator: torch.Generator) -> list[Tensor]:
    """Part the groups of each block into as few and as equal parts as `TOGETHER` allows."""
    size = count // blocks
    pieces = -(-size // TOGETHER)
    parts = []
    for first in range(0, count, size):
        mixed = torch.randperm(size, generator=generator) if pieces > 1 else torch.arange(size)
        parts += [first + mixed[piece::pieces] for piece in range(pieces)]
    return parts


def _reassign(
    channels: Tensor, groups: Tensor, slots: Tensor, pattern: Pattern, parts: list[Tensor], negligible: float
) -> float:
    """Take one channel out of every group and put all of them back in the best way, in place; returns the gain.

    Args:
        channels: scores, [C, rows].
        groups: int64 [G, M], the channels of each group.
        slots: int64 [G], which channel of each group is taken out.
        pattern: the pattern.
        parts: of the groups; each is reassigned on its own.
        negligible: a gain up to this is not taken.
    """
    every = torch.arange(len(groups), device=groups.device)
    out = groups[every, slots]
    others = [channels[groups[every, (slots + turn) % pattern.group]] for turn in range(1, pattern.group)]
    bars, candidates = _largest(others, pattern.keep)[-1], channels[out]
    gained = 0.0
    for part in parts:
        worth = _worth(bars[part], candidates[part])
        # Only differences between groups matter; with each channel's best group at zero the solver is twice as fast.
        cost = (worth.max(dim=0).values - worth).cpu().numpy()
        best = torch.from_numpy(linear_sum_assignment(cost)[1]).to(groups.device)
        gain = float((worth.gather(1, best[:, None])[:, 0] - worth.diagonal()).sum())
        if gain > negligible:
            groups[part, slots[part]] = out[part][best]
            gained += gain
    return gained


def _worth(bars: Tensor, candidates: Tensor) -> Tensor:
    """Sum over rows of max(bar of a group, score of a channel), float64 [groups, channels].

    This is (sum b + sum x + |b - x|_1) / 2, a city-block distance, but three times as fast as `torch.cdist` gets it.
    """
    count, rows = bars.shape
    worth = torch.zeros(count, count, dtype=torch.float64, device=bars.device)
    for first in range(0, rows, max(1, CACHED // count)):
        here = slice(first, first + max(1, CACHED // count))
        some = candidates[:, here].contiguous()
        larger, total = torch.empty_like(some), some.new_empty(count)
        for group, bar in enumerate(bars[:, here]):
            torch.maximum(some, bar, out=larger)
            torch.sum(larger, dim=1, out=total)
            worth[group] += total
    return worth
