"""The margin ledger: what each stage spent of every sample's dense margin.

Notation, for one sample: z_0 are the dense logits, z_k those after stage k, y = argmax z_0, m_j = z_0[y] - z_0[j] the
dense pair margin of competitor j, d_kj = (z_k - z_{k-1})[y] - (z_k - z_{k-1})[j] what stage k adds to it. Then

    z_K[y] - z_K[j] = m_j + sum_k d_kj        for every j,

an exact telescoping identity, not a triangle inequality. All of it is float64. These are observations on the samples
at hand (level L0): they say nothing about an input that was not run.

Of many classes only some are kept per sample: the dense label, the true one, in every stage the best other one, and
the dense label's closest competitors. Of the others one number per stage is kept, their largest logit, so that every
verdict is exact however few columns there are; eps, share, displacement and range are measured over all classes before
the rest is dropped. A ledger of 50,000 samples of 1,000 classes takes 17 MB for three stages.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpdeploy.errors import StageFailed

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


class Kept(IntEnum):
    """What became of a sample's dense label."""

    FLIPPED = 0
    KEPT = 1
    CERTIFIED = 2


@dataclass(frozen=True)
class Rows:
    """What is kept of n samples of K classes through S stages; T classes are kept of each.

    Attributes:
        labels: int64 [n], the true classes.
        kept_classes: int32 [n, T]; y = argmax of the dense logits first, then by falling dense logit.
        logits: float32 [n, S, T + 1], of each stage at the kept classes; last the largest of the others, -inf if none.
        eps: float64 [n, S - 1], largest absolute change of a logit in each stage.
        share: float64 [n, S - 1], max over j of -d_kj / m_j: the part of the dense margin that the stage alone used
            up, 1 or more where it alone would lose the label; inf where the dense label is tied.
        displacement: float64 [n, 2], of z_S - z_0 the largest absolute value, and largest minus smallest.
        range: float64 [n], largest minus smallest dense logit.
    """

    labels: Ints
    kept_classes: NDArray[np.int32]
    logits: NDArray[np.float32]
    eps: Floats
    share: Floats
    displacement: Floats
    range: Floats


def rows_of(
    labels: NDArray[Any],
    stages: Mapping[str, NDArray[Any]],
    keep: int,
    beside: Sequence[NDArray[Any]] = (),
) -> Rows:
    """Reduce one batch to what the ledger keeps of it.

    Args:
        labels: [n], the true classes.
        stages: stage name -> [n, K] logits of the same samples in the same order, dense first, at least two.
        keep: how many classes to keep of each sample; raised so that the label and all winners fit.
        beside: further [n, K] logits whose winners are to be kept too.

    Raises:
        StageFailed: no samples, fewer than two classes, different shapes, labels that are no class, or dense logits
            that are not finite.
    """
    arrays = [np.asarray(z, np.float64) for z in stages.values()]
    _check(labels, arrays, list(stages))
    dense, last = arrays[0], arrays[-1]
    kept = kept_classes(labels, [*arrays, *beside], keep)
    label = kept[:, 0].astype(np.int64)
    spent = [spent_by(before, after, dense, label) for before, after in pairwise(arrays)]
    moved = last - dense
    return Rows(
        labels=np.asarray(labels, np.int64),
        kept_classes=kept,
        logits=np.stack([columns(z, kept) for z in arrays], axis=1),
        eps=np.stack([eps for eps, _ in spent], axis=1),
        share=np.stack([share for _, share in spent], axis=1),
        displacement=np.stack([np.abs(moved).max(axis=1), moved.max(axis=1) - moved.min(axis=1)], axis=1),
        range=dense.max(axis=1) - dense.min(axis=1),
    )


def joined(parts: Sequence[Rows]) -> Rows:
    """Join the rows of several batches.

    Raises:
        StageFailed: there is none.
    """
    if not parts:
        raise StageFailed("A ledger needs at least one sample; none was given.")
    return Rows(**{f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Rows)})


def _check(labels: NDArray[Any], arrays: Sequence[Floats], names: Sequence[str]) -> None:
    dense = arrays[0]
    if len(names) < 2 or dense.ndim != 2 or len(dense) == 0 or dense.shape[1] < 2:
        raise StageFailed(f"A ledger needs two stages, a sample and two classes; got {[a.shape for a in arrays]}.")
    if {a.shape for a in arrays} != {dense.shape}:
        raise StageFailed(f"The stages {', '.join(names)} gave logits of different shapes {[a.shape for a in arrays]}.")
    if len(labels) != len(dense) or not ((np.asarray(labels) >= 0) & (np.asarray(labels) < dense.shape[1])).all():
        raise StageFailed(
            f"{len(labels)} labels don't fit {len(dense)} samples of {dense.shape[1]} classes: "
            f"each has to be a class index from 0 to {dense.shape[1] - 1}."
        )
    if not np.isfinite(dense).all():
        raise StageFailed(
            "The dense network's own logits hold NaN or infinity: there is no margin to certify.",
            hint="check the weights and the preprocessing with the dense network first.",
        )


def kept_classes(labels: NDArray[Any], arrays: Sequence[NDArray[Any]], keep: int) -> NDArray[np.int32]:
    """Choose the classes to keep of each sample: the dense label, the true one, every array's best other, and the next.

    Returns:
        int32 [n, T] with T = min(K, max(keep, len(arrays) + 1)), by falling logit of the first array, lower index
        first where they are equal: column 0 is its argmax.
    """
    dense = np.asarray(arrays[0], np.float64)
    n, k = dense.shape
    most = min(k, max(keep, len(arrays) + 1))
    wanted = dense.copy()
    rows = np.arange(n)
    label = winner(dense)
    for special in (label, np.asarray(labels), *(_rival(z, label) for z in arrays[1:])):
        wanted[rows, special] = np.inf
    chosen = np.argpartition(-wanted, most - 1, axis=1)[:, :most] if most < k else np.tile(np.arange(k), (n, 1))
    chosen.sort(axis=1)
    order = np.argsort(-np.take_along_axis(dense, chosen, axis=1), axis=1, kind="stable")
    return np.take_along_axis(chosen, order, axis=1).astype(np.int32)


def _rival(logits: NDArray[Any], label: Ints) -> Ints:
    """Return the class other than the label with the largest logit: the winner, wherever that is not the label."""
    z = np.array(logits, np.float64)
    z[np.arange(len(z)), label] = -np.inf
    return winner(z)


def winner(logits: NDArray[Any]) -> Ints:
    """Return the argmax of each row, the lower index on a tie; what is not finite wins only where nothing is."""
    z = np.asarray(logits, np.float64)
    return np.asarray(np.where(np.isfinite(z), z, -np.inf).argmax(axis=1), np.int64)


def columns(logits: NDArray[Any], kept: NDArray[np.int32], dtype: Any = np.float32) -> NDArray[Any]:
    """Return the logits at the kept classes and, last, the largest of the others: [n, T + 1] of `dtype`.

    Rounding is monotonic, so no comparison is turned round by it; a tie that it makes loses.
    """
    z = np.asarray(logits)
    own = np.take_along_axis(z, kept.astype(np.int64), axis=1)
    others = np.array(z, np.float64)
    np.put_along_axis(others, kept.astype(np.int64), -np.inf, axis=1)
    return np.concatenate([own, others.max(axis=1, keepdims=True)], axis=1).astype(dtype)


def spent_by(before: NDArray[Any], after: NDArray[Any], dense: NDArray[Any], label: Ints) -> tuple[Floats, Floats]:
    """Return eps and share of one stage, over all classes; see `Rows`."""
    change = np.asarray(after, np.float64) - np.asarray(before, np.float64)
    loss, margin = -pair_margins(change, label), pair_margins(dense, label)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.where(np.isposinf(margin), -np.inf, loss / margin).max(axis=1)
    tied = margin.min(axis=1) <= 0
    return np.abs(change).max(axis=1), np.where(tied, np.inf, share)


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


def keeps(pairs: Floats) -> Bools:
    """Tell for which samples the label beats every other one; ties and anything not finite lose."""
    kept: Bools = pairs.min(axis=1) > 0
    return kept


def slack_of(columns: NDArray[Any]) -> Floats:
    """Return the label's logit minus the best other one from kept columns [n, T + 1]; NaN where one is not finite."""
    z = np.asarray(columns, np.float64)
    # The last column is -inf where no class is left to stand behind it.
    broken = ~(np.isfinite(z[:, :-1]).all(axis=1) & (z[:, -1] < np.inf))
    slack: Floats = np.where(broken, np.nan, z[:, 0] - z[:, 1:].max(axis=1))
    return slack


def decided(columns: NDArray[Any], kept: NDArray[np.int32]) -> Ints:
    """Return the class that each sample is given, the lower index on a tie; -1 where it is not finite or not kept."""
    z = np.asarray(columns, np.float64)
    best = z[:, :-1].max(axis=1, keepdims=True)
    label = np.where(z[:, :-1] == best, kept, np.iinfo(np.int32).max).min(axis=1)
    clear = np.isfinite(z[:, :-1]).all(axis=1) & (best[:, 0] >= z[:, -1])
    return np.asarray(np.where(clear, label, -1), np.int64)


@dataclass(frozen=True)
class Ledger:
    """The rows of a chain of stages and what follows from them.

    Attributes:
        stages: names in order, the first is the dense reference.
        rows: what is kept of each sample.
        aside: share of each sample's dense logit range that is set aside for later stages.
    """

    stages: tuple[str, ...]
    rows: Rows
    aside: float

    @property
    def margin(self) -> Floats:
        """Dense margin to the best competitor, float64 [n]."""
        return slack_of(self.rows.logits[:, 0])

    @property
    def slack(self) -> Floats:
        """The dense label's margin after the last stage, float64 [n]; NaN where its logits are not finite."""
        return slack_of(self.rows.logits[:, -1])

    @property
    def verdict(self) -> NDArray[np.uint8]:
        """Values of `Kept`, uint8 [n]."""
        slack = self.slack
        kept = np.where(slack > self.aside * self.rows.range, Kept.CERTIFIED, Kept.KEPT)
        return np.where(slack > 0, kept, Kept.FLIPPED).astype(np.uint8)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the rows and verdicts under the names that they have in ledger.safetensors."""
        columns = {name: np.ascontiguousarray(value) for name, value in vars(self.rows).items()}
        return {**columns, "verdict": self.verdict}

    def counts(self) -> dict[str, int]:
        """Return how many samples were flipped, kept but not certified, and certified."""
        return {kind.name.lower(): int((self.verdict == kind).sum()) for kind in Kept}

    def tests(self) -> dict[str, int]:
        """Return how many labels each L0 test says are kept: the pairwise one, which is exact, and two weaker ones.

        span: max D - min D < margin; two_inf: 2 max |D| < margin, with D = z_S - z_0. All of them are observations.
        """
        margin, moved = self.margin, self.rows.displacement
        return {
            "pairwise": int((self.slack > 0).sum()),
            "span": int((moved[:, 1] < margin).sum()),
            "two_inf": int((2 * moved[:, 0] < margin).sum()),
        }

    def top1(self) -> dict[str, int]:
        """Return how many samples each stage gives their true label."""
        rows = self.rows
        return {
            name: int((decided(rows.logits[:, i], rows.kept_classes) == rows.labels).sum())
            for i, name in enumerate(self.stages)
        }

    def spent(self) -> list[dict[str, Any]]:
        """Return one row of summary numbers per stage after the dense one."""
        return [self._row(i) for i in range(len(self.stages) - 1)]

    def _row(self, stage: int) -> dict[str, Any]:
        eps, share = self.rows.eps[:, stage], self.rows.share[:, stage]
        clear = share[np.isfinite(share)]
        return {
            "stage": self.stages[stage + 1],
            "eps_inf_median": finite(np.median(eps)),
            "eps_inf_max": finite(eps.max()),
            "share_median": finite(np.median(clear)) if clear.size else None,
            "share_p99": finite(np.quantile(clear, 0.99)) if clear.size else None,
            "flips_alone": int((~(share < 1)).sum()),
            "flips_but_for": int(self._but_for(stage).sum()),
            "flips_primary": int((self._primary() == stage).sum()),
        }

    def _added(self) -> Floats:
        """Return d_kj at the kept classes, float64 [n, S - 1, T]; the column of y is 0."""
        change = np.diff(self.rows.logits[:, :, :-1].astype(np.float64), axis=1)
        return np.asarray(change[:, :, :1] - change)

    def _but_for(self, stage: int) -> Bools:
        """Tell which lost labels would be kept had this stage changed nothing; the classes not kept have to lose."""
        last = self.rows.logits[:, -1].astype(np.float64)
        with np.errstate(invalid="ignore"):  # NaN keeps nothing
            without = last[:, :1] - last[:, 1:-1] - self._added()[:, stage, 1:]
        return np.asarray(~(self.slack > 0) & (without > 0).all(axis=1) & (last[:, 0] > last[:, -1]))

    def _primary(self) -> Ints:
        """Return the stage that lost most at the class that won, -1 where the label is kept."""
        last = self.rows.logits[:, -1, :-1].astype(np.float64)
        best = np.where(np.isfinite(last[:, 1:]), last[:, 1:], -np.inf).argmax(axis=1) + 1
        loss = -np.take_along_axis(self._added(), best[:, None, None], axis=2)[:, :, 0]
        first = np.where(np.isfinite(loss), loss, np.inf).argmax(axis=1)
        return np.asarray(np.where(self.slack > 0, -1, first), np.int64)


def eps_between(one: NDArray[Any], other: NDArray[Any]) -> Floats:
    """Return the largest absolute difference of two stages' kept columns, float64 [n]; NaN where one is not finite."""
    a, b = np.asarray(one, np.float64), np.asarray(other, np.float64)
    # Where every class is kept, both last columns are -inf and say nothing.
    told = ~(np.isneginf(a) & np.isneginf(b))
    eps: Floats = np.abs(np.subtract(a, b, where=told, out=np.zeros(a.shape))).max(axis=1)
    return eps


def reference_gap(exact: NDArray[Any], dense: NDArray[Any]) -> dict[str, Any]:
    """Return what float32 costs the dense reference: the ledger's first row.

    Args:
        exact: float64 [g, K], logits of the dense network run in float64.
        dense: float32 [g, K], of the same samples, as the ledger's reference has them.
    """
    eps, share = spent_by(exact, dense, exact, winner(exact))
    return {
        "precision": "float64",
        "samples": len(exact),
        "eps_inf_median": finite(np.median(eps)),
        "eps_inf_max": finite(eps.max()),
        "share_max": finite(share.max()),
    }


def finite(value: Any) -> float | None:
    """Return a float, or None where it is not finite: JSON has no NaN, and no verdict may rest on one."""
    return float(value) if np.isfinite(value) else None
