"""A margin below which an engine's label is not to be used: chosen on held-out samples so that a limit is proved (L5).

An engine's own margin is its largest logit minus the second largest. It needs no dense network, so a rule on it can
run beside the engine. Samples are independent draws, used neither for calibration nor to select anything but among
the candidates counted.
"""

from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpdeploy.certify.statistics import error_level
from mpdeploy.errors import StageFailed

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Tested:
    """One hypothesis H_tau: P(disagree and margin > tau) > alpha.

    Attributes:
        tau: the margin to exceed.
        errors: samples that disagree though their margin exceeds tau; or clusters that hold such a sample.
        n: all samples, those that abstain included; or all clusters.
        p: P(Bin(n, alpha) <= errors), the p-value of H_tau.
        rejected: whether p is at most the level, and every larger tau was rejected too.
    """

    tau: float
    errors: int
    n: int
    p: float
    rejected: bool


@dataclass(frozen=True)
class Rule:
    """Use the engine's label where its margin exceeds tau, and abstain elsewhere.

    Attributes:
        tau: None where no limit could be proved: always abstain.
        alpha: the limit that is proved.
        confidence: what it holds with, after the correction for `candidates`.
        candidates: engines or settings compared on these same samples.
        tested: the hypotheses in the order of testing, largest tau first; the first that is not rejected is last.
        abstains: observed share of the samples on which the rule abstains; None without samples.
        statement: the exact claim in words.
    """

    tau: float | None
    alpha: float
    confidence: float
    candidates: int
    tested: tuple[Tested, ...]
    abstains: float | None
    statement: str

    def json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {**asdict(self), "tested": [asdict(row) for row in self.tested]}


def engine_margins(logits: NDArray[Any]) -> Floats:
    """Return the largest logit minus the second largest of each row as float64 [n]; NaN where one is not finite.

    Args:
        logits: [n, K], K >= 2, in the engine's own floating-point type; the difference is taken in float64.
    """
    z = np.asarray(logits, np.float64)
    top = np.partition(z, -2, axis=1)[:, -2:]
    margins: Floats = np.full(len(z), np.nan)
    finite = np.isfinite(z).all(axis=1)
    margins[finite] = top[finite, 1] - top[finite, 0]
    return margins


def margin_grid(scale: float) -> tuple[float, ...]:
    """Return the margins to test: scale * 2^(j/2) for j = 6, 5, ..., -14, and 0; falling.

    The scale must not depend on the samples that the rule is tested on: the median dense margin of other samples does.

    Raises:
        StageFailed: the scale is not above 0 and finite.
    """
    if not (np.isfinite(scale) and scale > 0):
        raise StageFailed(f"The scale of the margins to test is {scale:g}; expected a finite number above 0.")
    return (*(scale * 2 ** (j / 2) for j in range(6, -15, -1)), 0.0)


def deployment_rule(
    margins: NDArray[np.floating],
    disagree: Bools,
    alpha: float,
    confidence: float,
    grid: Sequence[float],
    candidates: int = 1,
    clusters: Sequence[Hashable] | None = None,
) -> Rule:
    """Find the smallest margin above which disagreement is proved rare, by fixed-sequence testing (Learn then Test).

    The hypotheses H_tau: P(disagree and margin > tau) > alpha are tested from the largest tau down, and the first that
    is not rejected at level (1 - confidence) / candidates ends it. The p-value P(Bin(n, alpha) <= errors) is valid
    under H_tau, the order doesn't depend on the samples, so the chance to reject any true H_tau is at most the level:
    all tau tested may be looked at without a further correction.
    Source: Angelopoulos, Bates, Candes, Jordan and Lei, "Learn then Test", 2021 (arXiv 2110.01052).

    What is proved is the joint statement P(disagree and margin > tau) <= alpha over all inputs. It is not the share of
    disagreements among the inputs that are kept, which is this divided by P(margin > tau).

    Of correlated samples the trials are clusters, and one fails where any of its members does, as in
    `statistics.clustered`: what is proved is P(a new cluster holds such a sample) <= alpha.

    Args:
        margins: [n], the engine's own, as `engine_margins` gives them; one that is not finite abstains at every tau.
        disagree: bool [n], whether the engine's label differs from the dense one.
        alpha: the limit to prove, in (0, 1).
        confidence: in (0, 1).
        grid: margins to test, each finite and at least 0, chosen without these samples; see `margin_grid`.
        candidates: engines or settings compared on these same samples, those thrown away included.
        clusters: n ids, which group each sample is of; None where samples are independent draws.

    Raises:
        StageFailed: arrays that don't fit, a level out of range, or a grid that is empty or holds no margin.
    """
    values, wrong = np.asarray(margins, np.float64), np.asarray(disagree)
    _check(values, wrong, alpha, grid, len(values) if clusters is None else len(clusters))
    level = error_level(confidence, candidates)
    values = np.where(np.isfinite(values), values, -np.inf)
    lost = np.where(wrong, values, -np.inf)
    worst = lost if clusters is None else _worst(lost, clusters)
    tested: list[Tested] = []
    for tau in sorted(set(map(float, grid)), reverse=True):
        tested.append(_test(tau, int((worst > tau).sum()), len(worst), alpha, level))
        if not tested[-1].rejected:
            break
    proved = [row.tau for row in tested if row.rejected]
    chosen = min(proved) if proved else None
    kept = int((values > chosen).sum()) if chosen is not None else 0
    unit = "sample" if clusters is None else "cluster"
    statement = _statement(chosen, alpha, confidence, candidates, tested[-1], unit)
    abstains = 1 - kept / len(values) if len(values) else None
    return Rule(chosen, alpha, confidence, candidates, tuple(tested), abstains, statement)


def _worst(lost: Floats, clusters: Sequence[Hashable]) -> Floats:
    """Return the largest margin with which a member of each cluster disagrees, -inf where none does."""
    worst = dict.fromkeys(clusters, -np.inf)
    for cluster, margin in zip(clusters, lost.tolist(), strict=True):
        worst[cluster] = max(worst[cluster], margin)
    return np.array(list(worst.values()), np.float64)


def _test(tau: float, errors: int, n: int, alpha: float, level: float) -> Tested:
    from scipy.special import bdtr

    p = float(bdtr(errors, n, alpha))
    # Without a sample the p-value is 1: nothing is rejected.
    return Tested(tau, errors, n, p, p <= level)


def _statement(tau: float | None, alpha: float, confidence: float, candidates: int, last: Tested, unit: str) -> str:
    if tau is None:
        return (
            f"Nothing is claimed: P(engine label != dense label and engine margin > {last.tau:g}) <= {alpha:g} could "
            f"not be proved with {last.n} {unit}s at confidence {confidence:g}. The rule always abstains."
        )
    corrected = f", Bonferroni for {candidates} candidates" if candidates > 1 else ""
    event = f"engine label != dense label and engine margin > {tau!r}"
    claim = {
        "sample": f"P({event}) <= {alpha:g} for one new sample",
        "cluster": f"P(a new cluster holds a sample with {event}) <= {alpha:g}, so also P({event}) <= {alpha:g} for a "
        "sample drawn uniformly from a new cluster",
    }[unit]
    return (
        f"{claim}, with confidence {confidence:g} over the draw of the {last.n} {unit}s (fixed-sequence testing of "
        f"exact binomial tails{corrected}). It is the joint probability over all inputs, not the share among those "
        f"that are kept. It holds for {unit}s drawn independently from the distribution that new ones come from and "
        "not used to choose anything but among the candidates counted, and for this engine file on this device only."
    )


def _check(margins: Floats, disagree: NDArray[Any], alpha: float, grid: Sequence[float], ids: int) -> None:
    if margins.ndim != 1 or margins.shape != disagree.shape or disagree.dtype != np.bool_ or ids != len(margins):
        raise StageFailed(
            f"A deployment rule needs one margin and one boolean per sample, and one id where there are clusters; got "
            f"{list(margins.shape)} margins, {disagree.dtype} {list(disagree.shape)} and {ids} ids."
        )
    if not 0 < alpha < 1:
        raise StageFailed(f"The limit alpha is {alpha:g}; expected a number between 0 and 1, such as 0.005.")
    if len(grid) == 0 or not all(np.isfinite(tau) and tau >= 0 for tau in grid):
        raise StageFailed(
            f"The margins to test are {list(grid)}; expected at least one, each finite and at least 0.",
            hint="margin_grid makes them from one scale.",
        )
