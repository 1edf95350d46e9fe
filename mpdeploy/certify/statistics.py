"""Exact binomial intervals, paired tests, and bounds on disagreement for inputs not run (L5): functions of counts."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from decimal import ROUND_CEILING, Decimal, localcontext
from fractions import Fraction
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpdeploy.errors import StageFailed


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


@dataclass(frozen=True)
class DisagreementBound:
    """An upper bound on how often an engine's label differs from the dense one on inputs that were not run (L5).

    Attributes:
        disagreements: how many of `n` differ.
        n: independent trials: samples, or clusters of samples.
        unit: "sample" or "cluster": what one trial is.
        rate: disagreements / n; None for n = 0.
        upper: one-sided upper bound; 1.0 claims nothing.
        confidence: what the claim holds with, after the correction for `candidates`.
        candidates: how many engines were compared on these same trials before this one was chosen.
        status: "bounded", or "unchecked" where there was no trial.
        statement: the exact claim in words.
    """

    disagreements: int
    n: int
    unit: str
    rate: float | None
    upper: float
    confidence: float
    candidates: int
    status: str
    statement: str

    def json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


_SAMPLES = (
    "P(engine label != dense label) <= {upper} for one new sample, with confidence {confidence:g} over the draw of "
    "the {n} samples ({k} of them disagreed; one-sided Clopper-Pearson{corrected}). It holds for samples drawn "
    "independently from the distribution that new ones come from and not used to choose anything but among the "
    "candidates counted, and for this engine file on this device only."
)
_CLUSTERS = (
    "P(a new cluster holds a disagreement) <= {upper}, so also P(engine label != dense label) <= {upper} for a "
    "sample drawn uniformly from a new cluster, with confidence {confidence:g} over the draw of the {n} clusters ({k} "
    "of them held a disagreement; one-sided Clopper-Pearson on clusters{corrected}). It holds for clusters drawn "
    "independently from the distribution that new ones come from and not used to choose anything but among the "
    "candidates counted, and for this engine file on this device only. {sizes}"
)


def disagreement(k: int, n: int, confidence: float, candidates: int = 1) -> DisagreementBound:
    """Bound the probability that the engine's label differs from the dense one, by Clopper-Pearson, one-sided.

    upper = sup { p : P(Bin(n, p) <= k) >= delta / M } with delta = 1 - confidence and M candidates: the (1 - delta/M)
    quantile of Beta(k + 1, n - k) (Clopper and Pearson, Biometrika 1934). Dividing by M (Bonferroni) makes all M
    bounds hold at once, so that of the one that was chosen, by whatever rule, does too.

    Args:
        k: samples whose labels differ; an engine's answer that is not finite counts as one.
        n: samples, independent draws. Of correlated ones use `clustered`.
        confidence: in (0, 1).
        candidates: engines or settings compared on these same samples, those thrown away included; at least 1.

    Raises:
        StageFailed: counts or levels that mean nothing.
    """
    return _bound(k, n, confidence, candidates, "sample", _SAMPLES, "")


def clustered(
    disagree: NDArray[np.bool_], clusters: Sequence[Hashable], confidence: float, candidates: int = 1
) -> DisagreementBound:
    """Bound disagreement where samples come in correlated groups: augmented copies, frames of a video, patches.

    The independent trials are the clusters, c = 1..C, with d_ci = 1 where member i disagrees. A cluster fails where
    any member does: F_c = max_i d_ci. Clopper-Pearson on the F_c bounds E[F], the probability that a new cluster holds
    a disagreement. Since the share of a cluster's members that disagree is at most F_c, the same number bounds
    E[mean_i d_ci]: the probability that a member drawn uniformly from a new cluster disagrees. Dependence inside a
    cluster may be anything.

    What it does not bound, where sizes differ, is the pooled rate sum d_ci / sum size_c, which weighs clusters by
    size: E[size F] / E[size] exceeds E[F] if large clusters fail more often. Where all sizes are equal, the two are
    the same. A bounded-mean inequality on the shares (Hoeffding-Bentkus) answers the second question only: it equals
    this bound where nothing disagrees, pays a factor e of the error level elsewhere, and gains only where failing
    clusters hold few disagreements each.

    Args:
        disagree: bool [n].
        clusters: n ids: which group each sample is of.
        confidence: in (0, 1).
        candidates: as in `disagreement`.

    Raises:
        StageFailed: different lengths, not booleans, or levels that mean nothing.
    """
    flags = np.asarray(disagree)
    if flags.ndim != 1 or flags.dtype != np.bool_ or len(flags) != len(clusters):
        raise StageFailed(
            f"A bound from clusters needs one boolean and one cluster id per sample; got {flags.dtype} "
            f"{list(flags.shape)} and {len(clusters)} ids."
        )
    sizes = Counter(clusters)
    failed = {cluster for cluster, flag in zip(clusters, flags.tolist(), strict=True) if flag}
    return _bound(len(failed), len(sizes), confidence, candidates, "cluster", _CLUSTERS, _sizes(sizes))


def _sizes(sizes: Mapping[Hashable, int]) -> str:
    """Say what the sizes of the clusters mean for the rate over all samples."""
    low, high = min(sizes.values(), default=0), max(sizes.values(), default=0)
    if low == high:
        return f"All clusters hold {high} samples, so it is the rate over all samples too."
    return f"Clusters hold {low} to {high} samples: a rate that weighs them by size is not bounded."


def _bound(
    k: int, n: int, confidence: float, candidates: int, unit: str, statement: str, sizes: str
) -> DisagreementBound:
    check_counts(k, n)
    level = error_level(confidence, candidates)
    if n == 0:
        nothing = f"Nothing is claimed: no {unit} was looked at."
        return DisagreementBound(0, 0, unit, None, 1.0, confidence, candidates, "unchecked", nothing)
    from scipy.special import betainccinv

    upper = 1.0 if k == n else float(betainccinv(k + 1, n - k, level))
    corrected = f" at level {level:.3g}, Bonferroni for {candidates} candidates" if candidates > 1 else ""
    text = statement.format(upper=rounded_up(upper), confidence=confidence, n=n, k=k, corrected=corrected, sizes=sizes)
    return DisagreementBound(k, n, unit, k / n, upper, confidence, candidates, "bounded", text)


def rounded_up(value: float) -> str:
    """Return a number in [0, 1] with three significant digits that are never less than it: a claim rounds upwards."""
    with localcontext(prec=3, rounding=ROUND_CEILING):
        return f"{+Decimal(repr(value)):g}"


def check_counts(k: int, n: int) -> None:
    """Refuse counts that can't be.

    Raises:
        StageFailed: not 0 <= k <= n.
    """
    if not 0 <= k <= n:
        raise StageFailed(f"{k} disagreements among {n} trials can't be; expected a count from 0 to {n}.")


def error_level(confidence: float, candidates: int) -> float:
    """Return (1 - confidence) / candidates: the level that one of several tests on the same samples may use up.

    Raises:
        StageFailed: a confidence outside (0, 1), or no candidate.
    """
    if not 0 < confidence < 1:
        raise StageFailed(f"The confidence is {confidence:g}; expected a number between 0 and 1, such as 0.95.")
    if candidates < 1:
        raise StageFailed(f"{candidates} candidates were counted; expected at least the one that was chosen.")
    return (1 - confidence) / candidates


def samples_needed(target: float, confidence: float, rate: float = 0.0) -> int:
    """Return the smallest n for which `disagreement(floor(rate * n), n, confidence)` is at most `target`.

    To plan with. With a rate above 0 the bound is no falling function of n: it jumps up where floor(rate * n) does, so
    a few samples more can miss a target that n meets. The runs of n with the same count are searched in order.

    Args:
        target: the bound to reach, in (0, 1).
        confidence: in (0, 1); for several candidates, 1 - (1 - confidence) / candidates.
        rate: expected share of disagreements, in [0, target).

    Raises:
        StageFailed: levels that mean nothing, or a rate that no number of samples bounds by the target.
    """
    from scipy.special import betaincc

    level = error_level(confidence, 1)
    if not 0 < target < 1 or not 0 <= rate < target:
        raise StageFailed(
            f"No number of samples bounds a rate of {rate:g} by {target:g}; expected 0 <= rate < target < 1."
        )
    # repr is the shortest decimal that means this float: 0.005 * 800 has to be 4, not 3.9999.
    step, per = Fraction(repr(float(rate))).as_integer_ratio()
    k, most = 0, 2**52

    def reaches(n: int) -> bool:
        # P(Bin(n, target) <= k), which is what Clopper-Pearson's bound turns round.
        return n > k and float(betaincc(k + 1, n - k, target)) <= level

    while not reaches(last := min(((k + 1) * per - 1) // step, most) if step else most):
        k += 1
    # An n with a smaller count would have reached the target in its own run: the search may start at 0.
    return bisect_left(range(last + 1), True, key=reaches)


def check_splits(splits: Mapping[str, Sequence[str]]) -> None:
    """Refuse sets of samples that share one, or hold one twice.

    A bound on samples that also calibrated or selected the engine covers far less often than it says: of the best of
    100 candidates by the same 1000 samples, the nominal 95 % bound covers about 5 %.

    Args:
        splits: name of the set -> the ids of its samples, for example of "calibration", "selection", "evaluation".

    Raises:
        StageFailed: fewer than two sets, or a shared or repeated id; it names them.
    """
    if len(splits) < 2:
        raise StageFailed(f"Splits are compared with each other; got {len(splits)}, expected at least two.")
    problems = [
        f"{name} holds {_some(twice)} more than once"
        for name, ids in splits.items()
        if (twice := [i for i, times in Counter(ids).items() if times > 1])
    ]
    problems += [
        f"{one} and {other} share {_some(shared)}"
        for (one, first), (other, second) in combinations(splits.items(), 2)
        if (shared := sorted(set(first) & set(second)))
    ]
    if problems:
        raise StageFailed(
            f"The sets of samples are not apart: {'; '.join(problems)}.",
            hint="draw calibration, selection and evaluation samples from different images.",
        )


def _some(ids: Sequence[str], shown: int = 5) -> str:
    more = f" and {len(ids) - shown} more" if len(ids) > shown else ""
    return f"{len(ids)} id{'s' if len(ids) > 1 else ''} ({', '.join(ids[:shown])}{more})"
