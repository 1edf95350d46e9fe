"""The margin ledger: what each stage spent of every sample's dense margin.

Notation, for one sample: z_0 are the dense logits, z_k those after stage k, y = argmax z_0, m_j = z_0[y] - z_0[j] the
dense pair margin of competitor j, d_kj = (z_k - z_{k-1})[y] - (z_k - z_{k-1})[j] what stage k adds to it. Then

    z_K[y] - z_K[j] = m_j + sum_k d_kj        for every j,

an exact telescoping identity, not a triangle inequality. All of it is float64. These are observations on the samples
at hand (level L0): they say nothing about an input that was not run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpdeploy.errors import StageFailed

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Kept(IntEnum):
    """What became of a sample's dense label."""

    FLIPPED = 0
    KEPT = 1
    CERTIFIED = 2


@dataclass(frozen=True)
class Ledger:
    """Per-sample ledger of n samples.

    Attributes:
        stages: names in order, the first is the dense reference.
        dense_label: int64 [n], argmax of the dense logits, the lower index on a tie.
        margin: float64 [n], dense logit of that label minus the best other one.
        slack: float64 [n], the same difference after the last stage; not finite where those logits are not.
        reserve: float64 [n], logits set aside for later stages.
        verdict: uint8 [n], values of Kept.
        spent: one row of summary numbers per stage after the dense one.
    """

    stages: tuple[str, ...]
    dense_label: Ints
    margin: Floats
    slack: Floats
    reserve: Floats
    verdict: NDArray[np.uint8]
    spent: tuple[Mapping[str, Any], ...]

    def counts(self) -> dict[str, int]:
        """Return how many samples were flipped, kept but not certified, and certified."""
        return {kind.name.lower(): int((self.verdict == kind).sum()) for kind in Kept}


def pair_margins(logits: NDArray[Any], label: Ints) -> Floats:
    """Return z[y] - z[j] for every j as float64 [n, K].

    The column of y itself is +inf, so that a minimum skips it. A sample with any logit that is not finite is NaN in
    every other column: it can't pass a comparison.
    """
    z = np.asarray(logits, np.float64)
    rows = np.arange(len(z))
    broken = ~np.all(np.isfinite(z), axis=1, keepdims=True)
    z = np.where(broken, np.nan, z)
    pairs: Floats = z[rows, label][:, None] - z
    pairs[rows, label] = np.inf
    return pairs


def keeps(pairs: Floats) -> NDArray[np.bool_]:
    """Tell for which samples the label beats every other one; ties and anything not finite lose."""
    kept: NDArray[np.bool_] = pairs.min(axis=1) > 0
    return kept


def measure(logits: Mapping[str, NDArray[Any]], reserve: float) -> Ledger:
    """Build the ledger.

    Args:
        logits: stage name -> [n, K] logits of the same samples in the same order, dense first, at least two stages.
        reserve: share of each sample's dense logit range to set aside for later stages.

    Raises:
        StageFailed: no samples, fewer than two classes, different shapes, or dense logits that are not finite.
    """
    names = tuple(logits)
    arrays = [np.asarray(logits[name], np.float64) for name in names]
    dense = arrays[0]
    if len(names) < 2 or dense.ndim != 2 or len(dense) == 0 or dense.shape[1] < 2:
        raise StageFailed(f"A ledger needs two stages, a sample and two classes; got {[a.shape for a in arrays]}.")
    if {a.shape for a in arrays} != {dense.shape}:
        raise StageFailed(f"The stages {', '.join(names)} gave logits of different shapes {[a.shape for a in arrays]}.")
    if not np.isfinite(dense).all():
        raise StageFailed(
            "The dense network's own logits hold NaN or infinity: there is no margin to certify.",
            hint="check the weights and the preprocessing with the dense network first.",
        )
    label = dense.argmax(axis=1)
    dense_pairs, last_pairs = pair_margins(dense, label), pair_margins(arrays[-1], label)
    slack = last_pairs.min(axis=1)
    aside = reserve * (dense.max(axis=1) - dense.min(axis=1))
    kept = keeps(last_pairs)
    verdict = np.where(kept & (slack > aside), Kept.CERTIFIED, np.where(kept, Kept.KEPT, Kept.FLIPPED))
    spent = tuple(
        _spent(name, before, after, label, dense_pairs, last_pairs)
        for name, before, after in zip(names[1:], arrays[:-1], arrays[1:], strict=True)
    )
    return Ledger(names, label, dense_pairs.min(axis=1), slack, aside, verdict.astype(np.uint8), spent)


def _spent(name: str, before: Floats, after: Floats, label: Ints, dense: Floats, last: Floats) -> dict[str, Any]:
    """Summarise what one stage did.

    `share` is max over j of -d_kj / m_j: the part of the margin that this stage alone used up, above 1 where it alone
    would lose the label. Samples whose dense margin is a tie have no share and are left out of its quantiles.
    """
    rows = np.arange(len(label))
    change = after - before
    eps = np.abs(change).max(axis=1)
    added = change[rows, label][:, None] - change
    loss = -added
    loss[rows, label] = -np.inf
    clear = dense.min(axis=1) > 0
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.where(np.isposinf(dense), -np.inf, loss / dense).max(axis=1)[clear]
    added[rows, label] = 0.0
    alone = ~keeps(dense + added)
    flipped = ~keeps(last)
    without = keeps(last - added)
    return {
        "stage": name,
        "eps_inf_median": finite(np.median(eps)),
        "eps_inf_max": finite(eps.max()),
        "share_median": finite(np.median(share)) if share.size else None,
        "share_p99": finite(np.quantile(share, 0.99)) if share.size else None,
        "flips_alone": int(alone.sum()),
        "flips_but_for": int((flipped & without).sum()),
    }


def finite(value: Any) -> float | None:
    """Return a float, or None where it is not finite: JSON has no NaN, and no verdict may rest on one."""
    return float(value) if np.isfinite(value) else None
