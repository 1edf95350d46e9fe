"""The course of a run, known before it starts: which samples each step sees, which mirrored, at what learning rate."""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

WARM_UP = 0.05  # share of the steps over which the learning rate rises

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Course:
    """The order of samples and their flips, a function of the seed alone.

    Attributes:
        count: samples in all.
        batch: samples per step; the last batch of an epoch may be smaller.
        epochs: passes over the samples.
        seed: decides order and flips.
        flip: mirror each image left to right with probability one half.
        limit: steps at most, where a run ends within an epoch; None ends with the last epoch.
    """

    count: int
    batch: int
    epochs: int
    seed: int
    flip: bool
    limit: int | None = None

    @property
    def per_epoch(self) -> int:
        """Steps in one epoch."""
        return -(-self.count // self.batch)

    @property
    def steps(self) -> int:
        """Steps in all."""
        whole = self.epochs * self.per_epoch
        return whole if self.limit is None else min(whole, self.limit)

    @property
    def variants(self) -> int:
        """Forms in which one image is ever seen."""
        return 2 if self.flip else 1

    def at(self, step: int) -> tuple[Indices, Indices]:
        """Return what a 0-based step sees: sample indices [b] and the variant of each, 1 where it is mirrored."""
        epoch, position = divmod(step, self.per_epoch)
        order, variants = self._epoch(epoch)
        part = slice(position * self.batch, (position + 1) * self.batch)
        return order[part], variants[part]

    def first_steps(self) -> Indices:
        """Return the step that first sees each variant of each sample, [n, variants]; `steps` where none ever does."""
        first = np.full((self.count, self.variants), self.steps, np.int64)
        for epoch in reversed(range(self.epochs)):
            order, variants = self._epoch(epoch)
            first[order, variants] = epoch * self.per_epoch + np.arange(self.count) // self.batch
        return first

    def seed_of(self, step: int, rank: int) -> int:
        """Return the seed of the dropout of one step; the first process draws what a single process would."""
        return int(np.random.SeedSequence([self.seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)

    def _epoch(self, epoch: int) -> tuple[Indices, Indices]:
        order, mirrored = _shuffled(self.count, self.seed, epoch)
        return order, mirrored if self.flip else np.zeros_like(mirrored)


# A step looks at its own epoch, and where teacher outputs are replayed after a resume at an earlier one.
@lru_cache(maxsize=2)
def _shuffled(count: int, seed: int, epoch: int) -> tuple[Indices, Indices]:
    """Return an order of all samples and, for each place in it, 1 with probability one half, else 0."""
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(count).astype(np.int64)
    return order, (generator.random(count) < 0.5).astype(np.int64)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Learning rate of 0-based `step`: a linear rise over the first 5 % of the steps, then a half cosine towards 0."""
    rise = max(1, round(WARM_UP * steps))
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))
