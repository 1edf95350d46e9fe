"""Exact binomial intervals and paired tests: functions of counts."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Proportion:
    """A share with its exact interval.

    Attributes:
        correct: how many of `n`.
        n: how many were looked at.
        value: correct / n; None for n = 0, where nothing was measured.
        low: lower end of the two-sided Clopper-Pearson interval.
        high: its upper end.
    """

    correct: int
    n: int
    value: float | None
    low: float
    high: float

    def json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


def proportion(correct: int, n: int, confidence: float) -> Proportion:
    """Return the Clopper-Pearson interval (Biometrika 1934): never narrower than its confidence, at any n."""
    # Imported here: scipy.special takes longer to load than `mpdeploy --help` may take.
    from scipy.special import betaincinv

    tail = (1 - confidence) / 2
    low = 0.0 if correct == 0 else float(betaincinv(correct, n - correct + 1, tail))
    high = 1.0 if correct == n else float(betaincinv(correct + 1, n - correct, 1 - tail))
    return Proportion(correct, n, correct / n if n else None, low, high)


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the exact two-sided McNemar p-value for paired outcomes; 1.0 where no pair disagrees."""
    from scipy.special import bdtr

    n = only_first + only_second
    return 1.0 if n == 0 else min(1.0, 2.0 * float(bdtr(min(only_first, only_second), n, 0.5)))
