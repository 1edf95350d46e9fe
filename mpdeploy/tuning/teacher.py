"""The dense network's outputs for each step, computed once per image and variant where they can be kept."""

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpdeploy.tuning.samples import Course, Indices
from mpdeploy.tuning.team import Team

# Bytes of logits that each process may keep: 1.28 million images of 1000 classes are 5.1e9.
LIMIT = 8 * 2**30

Outputs = tuple[Tensor, tuple[Tensor, ...]]


class Teacher:
    """Answers each step's question what the dense network says.

    Logits are kept as float32 [n, variants, K] in main memory if a second epoch can use them, no features are wanted
    (those would need the forward pass anyway) and they fit `LIMIT`. The last bits of a logit depend on the batch in
    which it was computed; a kept one is always that of the batch which meets its image first. So a resumed run, which
    starts with nothing kept, computes the batch again that the unbroken run took it from, and gets the same bits.

    Args:
        forward: images [b, C, H, W] -> logits [b, K] and features.
        load: sample indices [b] and variants [b] -> images on the training device.
        course: what each step sees.
        team: who shares the work; every process keeps all logits.
        features: whether features are wanted.
    """

    def __init__(
        self,
        forward: Callable[[Tensor], Outputs],
        load: Callable[[Indices, Indices], Tensor],
        course: Course,
        team: Team,
        *,
        features: bool,
    ) -> None:
        self._forward, self._load, self._course, self._team = forward, load, course, team
        self._keeps = course.steps > course.per_epoch and not features
        self._kept: Tensor | None = None
        self._known: NDArray[np.bool_] = np.zeros((0, 0), np.bool_)
        self._first: Indices = np.zeros((0, 0), np.int64)

    @property
    def keeps(self) -> bool:
        """Whether logits are kept; certain from the first answer on."""
        return self._keeps

    @torch.no_grad()
    def outputs(self, step: int, images: Tensor, classes: int) -> Outputs:
        """Return, without gradients, float32 logits [b, classes] and features of this process's rows of a 0-based step.

        Args:
            step: the step.
            images: what this process sees of it.
            classes: K.
        """
        if self._keeps and self._kept is None:
            self._prepare(classes)
        if not self._keeps:
            logits, features = self._forward(images)
            return logits.float(), features
        assert self._kept is not None  # prepared above
        some, variants = self._course.at(step)
        missing = ~self._known[some, variants]
        for earlier in np.unique(self._first[some, variants][missing]):
            self._fill(int(earlier), images if earlier == step else None)
        rows, _ = self._team.rows(len(some))
        return self._kept[some[rows], variants[rows]].to(images.device), ()

    def _prepare(self, classes: int) -> None:
        """Make room, or give up keeping where there would be too much."""
        shape = (self._course.count, self._course.variants, classes)
        self._keeps = 4 * math.prod(shape) <= LIMIT
        if self._keeps:
            # Pages that are never written take no memory.
            self._kept = torch.empty(shape, dtype=torch.float32)
            self._known = np.zeros(shape[:2], np.bool_)
            self._first = self._course.first_steps()

    def _fill(self, step: int, images: Tensor | None) -> None:
        """Compute what a step is the first to see; every process its own rows, then all know all."""
        assert self._kept is not None  # only called where logits are kept
        some, variants = self._course.at(step)
        new = self._first[some, variants] == step
        rows, weight = self._team.rows(len(some))
        mine = new[rows] & (weight > 0)
        logits = torch.zeros(len(some), self._kept.shape[2])
        if mine.any():
            own = rows[mine]
            seen = self._load(some[own], variants[own]) if images is None else images[torch.from_numpy(mine)]
            logits[own] = self._forward(seen)[0].float().cpu()
        self._team.add(logits)
        self._kept[some[new], variants[new]] = logits[new]
        self._known[some[new], variants[new]] = True
