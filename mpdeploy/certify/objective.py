"""The pruning paper's inequalities as functions of numbers (Berlyand, Bourdais, Owhadi, Shmalo, arXiv 2606.02608).

A = S + R: the weights before, what is kept, what is removed; J(A) = CE(A) + lambda2 ||A||_F^2 + lambda1 ||A||_1, summed
over the changed tensors; ||A||_1 is the sum of absolute values. B = (2/|T|) sum_s eta_s bounds the change of CE, eta_s
that of any logit. Every theorem becomes a `Claim`: both sides, whether it holds, on what authority, and beside it what
was measured. A statement about J without its lambdas says nothing, so they are always given.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Status = Literal["proved", "model", "observed", "vacuous"]

_MORE, _LESS = 1 + 2.0**-26, 1 - 2.0**-26  # more than 2^26 roundings can change


@dataclass(frozen=True)
class Claim:
    """One inequality.

    Attributes:
        name: which.
        left: the side that has to be smaller.
        right: the other.
        holds: whether left < right (<= where it says so) was established; never where it is vacuous.
        status: "proved" from enclosures; "model" under assumptions on R that real weights break; "observed" on the
            executed numbers; "vacuous" where the bound reaches the trivial range, or there is none.
        measured: the quantity that the inequality bounds or predicts, as it came out, or None.
        meaning: one sentence.
    """

    name: str
    left: float
    right: float
    holds: bool
    status: Status
    measured: float | None
    meaning: str

    def facts(self) -> dict[str, float | str | bool | None]:
        """Return it for JSON: None where a side is not finite."""
        return {
            "name": self.name,
            "left": self.left if math.isfinite(self.left) else None,
            "right": self.right if math.isfinite(self.right) else None,
            "holds": self.holds,
            "status": self.status,
            "measured": self.measured,
            "meaning": self.meaning,
        }


@dataclass(frozen=True)
class Penalty:
    """The elastic net's weights.

    Attributes:
        lambda2: of the squared Frobenius norm, not halved.
        lambda1: of the sum of absolute values.
    """

    lambda2: float
    lambda1: float = 0.0

    def of(self, squares: float, sizes: float) -> float:
        """lambda2 * squares + lambda1 * sizes."""
        return self.lambda2 * squares + self.lambda1 * sizes


@dataclass(frozen=True)
class Change:
    """What distinguishes two sets of tensors A (before) and A' = S (after), R = A - A'; sums over all of them.

    Attributes:
        removed2: ||R||_F^2.
        removed1: ||R||_1.
        before2: ||A||_F^2.
        after2: ||A'||_F^2.
        before1: ||A||_1.
        after1: ||A'||_1.
        cross: <S, R>.
        masked: whether S and R are nowhere both nonzero, so that R was removed and nothing else changed.
    """

    removed2: float
    removed1: float
    before2: float
    after2: float
    before1: float
    after1: float
    cross: float
    masked: bool

    def __add__(self, other: "Change") -> "Change":
        """Both changes together, of different tensors."""
        return Change(
            self.removed2 + other.removed2,
            self.removed1 + other.removed1,
            self.before2 + other.before2,
            self.after2 + other.after2,
            self.before1 + other.before1,
            self.after1 + other.after1,
            self.cross + other.cross,
            self.masked and other.masked,
        )


NO_CHANGE = Change(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, True)


def change_between(before: Tensor, after: Tensor) -> Change:
    """Compare two tensors of one shape, in float64."""
    a, s = before.double(), after.double()
    r = a - s
    return Change(
        removed2=float(r.square().sum()),
        removed1=float(r.abs().sum()),
        before2=float(a.square().sum()),
        after2=float(s.square().sum()),
        before1=float(a.abs().sum()),
        after1=float(s.abs().sum()),
        cross=float((s * r).sum()),
        masked=not bool(((s != 0) & (r != 0)).any()),
    )


def norms_of(matrix: Tensor) -> dict[str, float]:
    """Return the Frobenius norm, the sum of absolute values, and an upper bound of the spectral norm of a matrix.

    The bound is the largest eigenvalue of the smaller Gram matrix, raised by more than float64 can have lost: computing
    it errs by at most about n 2^-52 of itself, and 1e-8 of it is added to the norm.
    """
    r = matrix.double()
    gram = r @ r.T if len(r) <= r.shape[1] else r.T @ r
    largest = float(torch.linalg.eigvalsh(gram)[-1].clamp(min=0))
    return {
        "frobenius": float(r.norm()),
        "l1": float(r.abs().sum()),
        "spectral_upper": math.sqrt(largest) * (1 + 1e-8),
    }


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each sample in nats, float64 [n]."""
    z = logits.double()
    chosen = z.gather(1, labels.long().reshape(-1, 1).to(z.device))[:, 0]
    return torch.logsumexp(z, 1) - chosen


def budget(eta: Tensor) -> float:
    """B_T = (2/|T|) sum_s eta_s for float64 eta [n], rounded upwards; inf where a sample has no bound."""
    return float(2 * eta.mean()) * _MORE


def trivial_range(ranges: Tensor, classes: int) -> float:
    """A sample's cross-entropy is at most log K + (max z - min z), whatever its label: the mean of that over samples.

    A budget that reaches it is vacuous: it says less of CE after the change than the logits' range says before it.
    """
    return math.log(classes) + float(ranges.mean())


def critical_lambdas(spent: float, change: Change) -> tuple[float, float]:
    """lambda2* = B/||R||_F^2 with lambda1 = 0, and lambda1* = B/||R||_1 with lambda2 = 0: above it J decreases."""
    return (
        spent / change.removed2 if change.removed2 > 0 else math.inf,
        spent / change.removed1 if change.removed1 > 0 else math.inf,
    )


def lemma_1(spent: float, measured: float, theta: float = 0.0) -> Claim:
    """|CE(A_theta) - CE(A)| <= (1 - theta) B (Lemma 1); cross-entropy is 2-Lipschitz in the maximum norm."""
    right = (1 - theta) * spent
    meaning = "the change of the cross-entropy is at most the budget B"
    return Claim("ce_path", measured, right, measured <= right, "proved", measured, meaning)


def mask_form(spent: float, change: Change, penalty: Penalty, measured: float) -> Claim:
    """Full removal decreases J if B < lambda2 ||R||_F^2 + lambda1 ||R||_1, for S and R disjoint (Theorem 4)."""
    right = penalty.of(change.removed2, change.removed1) * _LESS
    holds = change.masked and spent < right
    meaning = "removing R decreases J"
    if not change.masked:
        meaning += "; the kept weights were changed too, so this form does not apply: see update"
    return Claim("mask", spent, right, holds, "proved", measured, meaning)


def additive_form(spent: float, change: Change, lambda2: float, measured: float) -> Claim:
    """Full removal decreases J with lambda1 = 0 if B + 2 lambda2 |<S, R>| < lambda2 ||R||_F^2 (Theorem 3)."""
    left = (spent + 2 * lambda2 * abs(change.cross)) * _MORE
    right = lambda2 * change.removed2 * _LESS
    return Claim(
        "additive", left, right, left < right, "proved", measured, "going from A to S decreases J with lambda1 = 0"
    )


def update_form(spent: float, change: Change, penalty: Penalty, measured: float) -> Claim:
    """J(A') - J(A) <= B + lambda2 (||A'||^2 - ||A||^2) + lambda1 (||A'||_1 - ||A||_1), for any change at all."""
    before = penalty.of(change.before2, change.before1)
    after = penalty.of(change.after2, change.after1)
    left = spent + after - before + (before + after) * 2.0**-26
    return Claim(
        "update", left, 0.0, left < 0, "proved", measured, "the change of weights decreases J; left bounds its change"
    )


def epsilon_form(eta: Tensor, change: Change, penalty: Penalty, measured: float) -> Claim:
    """If L_s ||R psi_1(s)||_inf <= eps for every s then B <= 2 eps: J decreases if the penalty falls by more."""
    left = 2 * float(eta.max()) * _MORE
    right = penalty.of(change.removed2, change.removed1) * _LESS
    holds = change.masked and left < right
    return Claim(
        "epsilon", left, right, holds, "proved", measured, "2 eps is less than what the penalty falls, so J decreases"
    )


def margin_form(eta: Tensor, margin: Tensor, kept: Tensor) -> Claim:
    """Labels with a dense margin above 2 eta_s are kept (Corollaries 2 and 8).

    Args:
        eta: float64 [n], bound of the largest change of a logit.
        margin: float64 [n], largest minus second largest dense logit.
        kept: bool [n], whether the label did stay.
    """
    certified = int((2 * eta * _MORE < margin).sum())
    n = len(margin)
    meaning = "samples not certified by margin > 2 eta; measured: labels that changed"
    return Claim("margin", n - certified, 0.0, certified == n, "proved", float((~kept).sum()), meaning)


def prune_restore_form(removed: float, pruned: Change, penalty: Penalty, measured: float) -> Claim:
    """A = S + Q + P, disjoint, P removed: J decreases if B(P) < lambda2 ||P||_F^2 + lambda1 ||P||_1 (Theorem 5)."""
    claim = mask_form(removed, pruned, penalty, measured)
    return Claim(
        "prune_restore",
        claim.left,
        claim.right,
        claim.holds,
        claim.status,
        measured,
        "removing P, with Q restored, decreases J",
    )


def restoring_form(removed: float, everything: float, restored: Change, penalty: Penalty, measured: float) -> Claim:
    """Restoring Q improves the bound on J iff B(Q + P) - B(P) > lambda2 ||Q||^2 + lambda1 ||Q||_1 (Theorem 5).

    Args:
        removed: B(P), of the network with Q restored.
        everything: B(Q + P), of the network with both removed.
        restored: Q as a change: from the restored network to the one without it.
        penalty: the elastic net.
        measured: J of the restored network minus J of the one without Q.
    """
    left = penalty.of(restored.removed2, restored.removed1)
    right = everything - removed
    holds = restored.masked and left < right
    return Claim("restoring", left, right, holds, "proved", measured, "restoring Q improves the bound on J")


def stationarity(spent: float, change: Change, penalty: Penalty, slope: float) -> Claim:
    """J falling no faster than epsilon along -R at A, 2 lambda2 ||R||_F^2 + lambda1 ||R||_1 <= B + epsilon (Thm 6).

    Args:
        spent: B of removing R from A, with L_s a Lipschitz constant on the whole segment.
        change: R, disjoint from S.
        penalty: the elastic net.
        slope: one-sided derivative of J along -R at A; epsilon = max(0, -slope).
    """
    left = (2 * penalty.lambda2 * change.removed2 + penalty.lambda1 * change.removed1) * _LESS
    right = (spent + max(0.0, -slope)) * _MORE
    holds = change.masked and left <= right
    return Claim(
        "stationarity", left, right, holds, "proved", slope, "A holds no larger removable R than its slope allows"
    )


def l2_collapse(spent: float, change: Change, lambda2: float, slope: float) -> Claim:
    """||R||_F^2 <= (B + epsilon)/(2 lambda2) + |<S, R>|, the additive model at a point of one-sided slope >= -epsilon.

    The exact form behind the paper's asymptotic one (its o_P(1) is |<S, R>|); see `stationarity`, lambda1 = 0.
    """
    right = math.inf if lambda2 == 0 else (spent + max(0.0, -slope)) / (2 * lambda2) + abs(change.cross)
    left = change.removed2 * _LESS
    return Claim(
        "l2_collapse", left, right * _MORE, left <= right * _MORE, "proved", slope, "what is removable is small"
    )


def gaussian_budget(
    lipschitz: Tensor, norms: Tensor, deviation: float, outputs: int, places: int, delta: float
) -> float:
    """Bound of B_T that holds with probability 1 - delta if R has independent N(0, deviation^2) entries.

    (2/|T|) sum_s L_s ||v_s||_2 sqrt(2 deviation^2 log(2 n tau |T| / delta)), R independent of v_s and L_s; the paper's
    g is n deviation^2. A model: removed weights are neither Gaussian nor independent of what they were trained on.

    Args:
        lipschitz: float64 [n_samples], L_s.
        norms: float64 [n_samples], the largest ||v_s||_2 over the places of a sample.
        deviation: of an entry of R.
        outputs: n, rows of R.
        places: tau, tokens or positions per sample.
        delta: what the probability of a violation may be.
    """
    samples = len(norms)
    return (
        2
        * float((lipschitz * norms).mean())
        * deviation
        * math.sqrt(2 * math.log(2 * outputs * places * samples / delta))
    )


def mp_budget(
    lipschitz: Tensor, norms: Tensor, edge: float, outputs: int, inputs: int, places: int, delta: float
) -> float:
    """The same through R's Marchenko-Pastur edge: sigma_+ = deviation (sqrt n + sqrt m), n = outputs, m = inputs."""
    return gaussian_budget(lipschitz, norms, edge / (math.sqrt(outputs) + math.sqrt(inputs)), outputs, places, delta)


def model_form(name: str, promised: float, spent: float) -> Claim:
    """Compare a budget promised by a model with the one that was established."""
    holds = spent <= promised
    return Claim(
        name, spent, promised, holds, "model", spent, "the budget stays below what independent Gaussian entries give"
    )
