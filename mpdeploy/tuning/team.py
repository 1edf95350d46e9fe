"""One process, or several that take every step together: how they share a batch and make sure that they agree.

Several processes do what one would: the same batches in the same order, the gradient of the same mean. What differs is
the order in which floating-point numbers are added, so weights agree to rounding (and, with dropout in the student,
only in distribution, because each process draws for its own samples).
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from mpdeploy.errors import StageFailed


@dataclass(frozen=True)
class Team:
    """The processes of torch's default group, which must take CPU tensors; alone where there is no group.

    Attributes:
        rank: this process, 0 leads.
        size: how many there are.
    """

    rank: int
    size: int

    @classmethod
    def current(cls) -> "Team":
        """The group that is initialised, or this process alone."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls(0, 1)

    def rows(self, count: int) -> tuple[NDArray[np.int64], float]:
        """Return this process's rows of a batch of `count` and the weight of its mean.

        The average over processes of weight times mean is the mean over the batch. A process without rows gets the
        first one with weight 0, because every process has to take part in every step.
        """
        rows = np.arange(self.rank * count // self.size, (self.rank + 1) * count // self.size)
        if not len(rows):
            return np.zeros(1, np.int64), 0.0
        return rows, len(rows) * self.size / count

    def mean(self, value: float) -> float:
        """Return the average over processes, the same bits on each."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(total)
        return float(total) / self.size

    def add(self, values: Tensor) -> None:
        """Replace a CPU tensor by its sum over processes."""
        if self.size > 1:
            dist.all_reduce(values)

    def copy_from_first(self, values: Iterable[Tensor]) -> None:
        """Overwrite tensors by those of process 0."""
        if self.size > 1:
            for value in values:
                dist.broadcast(value, src=0)

    def agree(self, what: str, digest: str) -> None:
        """Compare a hex SHA-256 over processes.

        Raises:
            StageFailed: some process has another one.
        """
        if self.size == 1:
            return
        own = torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8)
        every = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(every, own)
        apart = [rank for rank, other in enumerate(every) if not torch.equal(other, every[0])]
        if apart:
            raise StageFailed(
                f"The {what} of process {', '.join(map(str, apart))} differ from those of process 0.",
                hint="the processes need the same store, images, GPU model and package versions.",
            )


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Return the hex SHA-256 of named tensors."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
