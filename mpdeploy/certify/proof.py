"""The outcome of a proof for every sample: one of three states, and the numbers behind it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class State(IntEnum):
    """What a bound says of one sample."""

    VACUOUS = 0  # no bound, or one that is no smaller than the range of the sample's logits
    NOT_CERTIFIED = 1
    CERTIFIED = 2


@dataclass(frozen=True)
class Proof:
    """The outcome for n samples.

    Attributes:
        label: int64 [n], the class spoken about.
        state: uint8 [n], values of `State`.
        bound: float64 [n], largest bound over the competitors j of the displacement of z_y - z_j; inf: no bound.
        slack: float64 [n], smallest over the competitors of margin minus bound; positive where certified.
        range: float64 [n], largest minus smallest logit: a bound that reaches it is vacuous, because no competitor's
            margin is larger, so that it could have certified nothing, whatever the network.
        why: operators for which there is no rule, each once.
    """

    label: NDArray[np.int64]
    state: NDArray[np.uint8]
    bound: NDArray[np.float64]
    slack: NDArray[np.float64]
    range: NDArray[np.float64]
    why: tuple[str, ...]

    def counts(self) -> dict[str, int]:
        """Return how many samples are in each state."""
        return {state.name.lower(): int((self.state == state).sum()) for state in State}

    def facts(self) -> dict[str, Any]:
        """Return the counts and a summary of the bounds, None where there is none."""
        known = self.bound[np.isfinite(self.bound)]
        return {
            "samples": len(self.label),
            **self.counts(),
            "bound_median": float(np.median(known)) if known.size else None,
            "bound_max": float(known.max()) if known.size == len(self.bound) and known.size else None,
            "range_median": float(np.median(self.range)) if self.range.size else None,
            "no_rule_for": list(self.why),
        }


@dataclass(frozen=True)
class Sample:
    """One sample's share of a `Proof`."""

    label: int
    state: State
    bound: float
    slack: float
    range: float
    why: str = ""


def decide(label: int, slack: Tensor, bound: Tensor, logits: Tensor, why: str = "") -> Sample:
    """Put a sample into one of the three states.

    Args:
        label: y.
        slack: float64 [K], margin minus bound of each competitor; what stands at y is ignored.
        bound: float64 [K], of the displacement of each pair; 0 at y.
        logits: float64 [K], whose range makes a bound vacuous.
        why: names operators without a rule.
    """
    others = torch.cat([slack[:label], slack[label + 1 :]])
    least = float(others.min()) if others.numel() and bool(torch.isfinite(others).all()) else -math.inf
    most, span = float(bound.max()), float(logits.max() - logits.min())
    state = State.CERTIFIED if least > 0 else State.NOT_CERTIFIED if most < span else State.VACUOUS
    return Sample(label, state, most if math.isfinite(most) else math.inf, least, span, why)


def proof_of(samples: Sequence[Sample]) -> Proof:
    """Collect samples."""
    return Proof(
        label=np.array([s.label for s in samples], np.int64),
        state=np.array([s.state for s in samples], np.uint8),
        bound=np.array([s.bound for s in samples], np.float64),
        slack=np.array([s.slack for s in samples], np.float64),
        range=np.array([s.range for s in samples], np.float64),
        why=tuple(sorted({s.why for s in samples} - {""})),
    )
