"""A stage's measured error beside the noise floor of the precision that it declares."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mpdeploy.certify.ledger import finite

if TYPE_CHECKING:
    from mpdeploy.certify.noise_floor import Precision
    from mpdeploy.certify.program import Program

Images = NDArray[np.float32]

DELTA = 0.01
"""Chance, in the noise floor's model, that a sound engine is called beyond it."""
MOST_KINDS = 5
"""Operator types whose share of the noise is told."""


@dataclass(frozen=True)
class Noise:
    """One stage's error on a few images against what its precision explains.

    Attributes:
        sigma: float64 [n], of the pair of the graph's label and its runner-up.
        error: float64 [n], measured on that pair.
        facts: what results.json says of it.
    """

    sigma: NDArray[np.float64]
    error: NDArray[np.float64]
    facts: dict[str, Any]


def noise_of(
    program: "Program",
    precision: "Precision",
    images: Images,
    after: NDArray[Any],
    before: NDArray[Any] | None = None,
    executions: int = 1,
) -> Noise:
    """Measure one stage's error and compute the noise floor that it is held against.

    Args:
        program: the graph.
        precision: what the stage declares.
        images: float32 [n, C, H, W].
        after: the stage's logits, [n, K].
        before: those of the stage before, [n, K]; None for the graph itself in float64.
        executions: how many rounded runs lie between the two: 2 where `before` was run in the same precision.
    """
    from mpdeploy.certify.noise_floor import exact_logits, forecast, judge, noise_floor, pair_errors

    floor = noise_floor(program, images, precision=precision)
    error = pair_errors(after, exact_logits(program, images) if before is None else before, floor)
    judged = judge(error, floor, delta=DELTA, executions=executions)
    kinds = sorted(floor.kinds.items(), key=lambda item: -item[1])[:MOST_KINDS]
    return Noise(
        sigma=floor.sigma[:, 0] * np.sqrt(executions),
        error=error[:, 0],
        facts={
            "precision": precision,
            "pairs": judged.comparisons,
            "sigma_median": finite(np.median(floor.sigma) * np.sqrt(executions)),
            "ratio_rms": judged.rms,
            "ratio_max": judged.largest,
            "rms_limit": judged.rms_limit,
            "threshold": judged.threshold,
            "delta": DELTA,
            "verdict": judged.verdict,
            "reason": judged.reason,
            "flips_at_most": forecast(floor)["flips_at_most"],
            "spent_on": dict(kinds),
        },
    )


def foretold(program: "Program", precision: "Precision", images: Images) -> dict[str, Any]:
    """Return what the model foretells of an engine that nobody ran: one row for results.json."""
    from mpdeploy.certify.noise_floor import forecast, noise_floor

    return forecast(noise_floor(program, images, precision=precision))
