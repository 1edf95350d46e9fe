"""The numbers of a ledger by their definitions: plain loops over samples and classes, no code of mpdeploy.

Whoever reads a bundle computes with whole arrays. Here every number is the sentence that defines it, so that both can
only agree where both are right.
"""

import math
from itertools import pairwise
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.stats import beta, binom, binomtest


def winner(z: Any) -> int:
    """The class of the largest logit, the lower one on a tie; what is not finite never wins."""
    finite = [(-value, j) for j, value in enumerate(z) if math.isfinite(value)]
    return min(finite)[1] if finite else 0


def kept_of(label: int, arrays: list[Any], keep: int) -> list[int]:
    """The classes kept of one sample, by falling dense logit."""
    dense = [float(value) for value in arrays[0]]
    most = min(len(dense), max(keep, len(arrays) + 1))
    kept = {int(label)} | {winner(z) for z in arrays}
    for j in sorted(range(len(dense)), key=lambda j: (-dense[j], j)):
        if len(kept) < most:
            kept.add(j)
    return sorted(kept, key=lambda j: (-dense[j], j))


def columns_of(z: Any, kept: list[int]) -> list[float]:
    """One sample's logits at the kept classes, and the largest of the others."""
    others = [float(value) for j, value in enumerate(z) if j not in kept]
    largest = math.nan if any(math.isnan(value) for value in others) else max(others, default=-math.inf)
    return [float(z[j]) for j in kept] + [largest]


def eps_of(before: Any, after: Any) -> float:
    """The largest change of a logit."""
    changes = [abs(float(b) - float(a)) for a, b in zip(before, after, strict=True)]
    return math.nan if any(math.isnan(change) for change in changes) else max(changes)


def share_of(dense: Any, before: Any, after: Any, y: int) -> float:
    """The largest part of a dense margin that one step uses up; inf where the dense label is tied."""
    z, change = [float(v) for v in dense], [float(b) - float(a) for a, b in zip(before, after, strict=True)]
    others = [j for j in range(len(z)) if j != y]
    if any(z[y] - z[j] <= 0 for j in others):
        return math.inf
    if not all(math.isfinite(value) for value in change):
        return math.nan
    return max(-(change[y] - change[j]) / (z[y] - z[j]) for j in others)


def slack(row: Any) -> float:
    """How far the first column is above the best other one; NaN where a logit is not finite."""
    values = [float(value) for value in row]
    if not all(math.isfinite(value) for value in values[:-1]) or not values[-1] < math.inf:
        return math.nan
    return values[0] - max(values[1:])


def decision(row: Any, kept: Any) -> int:
    """The kept class of the largest logit, -1 where another class has a larger one or a logit is not finite."""
    if math.isnan(slack(row)):
        return -1
    best = max(row[:-1])
    return -1 if row[-1] > best else min(int(j) for j, value in zip(kept, row[:-1], strict=True) if value == best)


def ledger_columns(
    labels: Any, stages: dict[str, Any], keep: int, beside: tuple[Any, ...] = ()
) -> dict[str, np.ndarray]:
    """labels, kept_classes, logits, eps, share, displacement and range of samples of all their logits."""
    arrays = list(stages.values())
    kept, logits, eps, share, moved, spread = [], [], [], [], [], []
    for i, label in enumerate(labels):
        own = [z[i] for z in arrays]
        mine = kept_of(label, [*own, *(z[i] for z in beside)], keep)
        kept.append(mine)
        logits.append([columns_of(z, mine) for z in own])
        eps.append([eps_of(a, b) for a, b in pairwise(own)])
        share.append([share_of(own[0], a, b, mine[0]) for a, b in pairwise(own)])
        change = own[-1].astype(np.float64) - own[0].astype(np.float64)
        moved.append([np.abs(change).max(), change.max() - change.min()])
        spread.append(float(own[0].max()) - float(own[0].min()))
    return {
        "labels": np.asarray(labels, np.int64),
        "kept_classes": np.array(kept, np.int32),
        "logits": np.array(logits, np.float32),
        "eps": np.array(eps),
        "share": np.array(share),
        "displacement": np.array(moved),
        "range": np.array(spread),
    }


def at_kept(z: Any, kept: Any, kind: type = np.float32) -> np.ndarray:
    """Logits of many samples at their kept classes."""
    return np.array([columns_of(row, [int(j) for j in mine]) for row, mine in zip(z, kept, strict=True)], kind)


def verdicts(columns: dict[str, np.ndarray], reserve: float) -> np.ndarray:
    """0 flipped, 1 kept, 2 certified."""
    found = []
    for row, spread in zip(columns["logits"][:, -1], columns["range"], strict=True):
        left = slack(row)
        found.append(2 if left > reserve * spread and left > 0 else 1 if left > 0 else 0)
    return np.array(found, np.uint8)


def number(value: float) -> float | None:
    """A JSON number, None where it is not finite."""
    return float(value) if math.isfinite(value) else None


def spent(names: list[str], columns: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """What certificate.json and results.json say that each stage after the first one spent."""
    rows = []
    primary = [primary_stage(z) for z in columns["logits"]]
    for s, name in enumerate(names[1:]):
        eps, share = columns["eps"][:, s], columns["share"][:, s]
        known = [value for value in share if math.isfinite(value)]
        rows.append(
            {
                "stage": name,
                "eps_inf_median": number(np.median(eps)),
                "eps_inf_max": number(np.max(eps)),
                "share_median": number(np.median(known)) if known else None,
                "share_p99": number(np.quantile(known, 0.99)) if known else None,
                "flips_alone": sum(not value < 1 for value in share),
                "flips_but_for": sum(flips_but_for(z, s + 1) for z in columns["logits"]),
                "flips_primary": sum(stage == s + 1 for stage in primary),
            }
        )
    return rows


def flips_but_for(z: np.ndarray, stage: int) -> bool:
    """Whether the label [S, T + 1] is lost, and would be kept had one stage changed nothing."""
    last = [float(value) for value in z[-1]]
    if slack(last) > 0:
        return False
    without = [value - (float(b) - float(a)) for value, a, b in zip(last, z[stage - 1], z[stage], strict=True)]
    return last[0] > last[-1] and all(without[0] > value for value in without[1:-1])


def primary_stage(z: np.ndarray) -> int:
    """The stage that took most of the margin to the class that won, 0 where the label is kept."""
    last = [float(value) for value in z[-1]]
    if slack(last) > 0:
        return 0
    j = 1 + max(range(len(last) - 2), key=lambda at: (last[1 + at] if math.isfinite(last[1 + at]) else -math.inf, -at))
    losses = []
    for a, b in pairwise(z):
        loss = (float(b[j]) - float(a[j])) - (float(b[0]) - float(a[0]))
        losses.append(loss if math.isfinite(loss) else math.inf)
    return 1 + losses.index(max(losses))


def reference(exact: np.ndarray, dense: np.ndarray) -> dict[str, Any]:
    """What float32 costs the dense network, over all classes."""
    eps = [eps_of(a, b) for a, b in zip(exact, dense, strict=True)]
    share = [share_of(a, a, b, winner(a)) for a, b in zip(exact, dense, strict=True)]
    none = not len(exact)
    return {
        "precision": "float64",
        "samples": len(exact),
        "eps_inf_median": None if none else number(np.median(eps)),
        "eps_inf_max": None if none else number(max(eps)),
        "share_max": None if none else number(max(share)),
    }


def interval(correct: int, n: int, confidence: float = 0.95) -> dict[str, Any]:
    """The two-sided Clopper-Pearson interval, from quantiles of the beta distribution."""
    tail = (1 - confidence) / 2
    low = float(beta.ppf(tail, correct, n - correct + 1)) if correct else 0.0
    high = float(beta.ppf(1 - tail, correct + 1, n - correct)) if correct < n else 1.0
    return {"correct": correct, "n": n, "value": correct / n, "low": low, "high": high}


def flips(right: list[bool], own_right: list[bool]) -> dict[str, Any]:
    """Paired decisions, and the exact McNemar test of them."""
    b = sum(a and not o for a, o in zip(right, own_right, strict=True))
    c = sum(o and not a for a, o in zip(right, own_right, strict=True))
    p = float(binomtest(b, b + c).pvalue) if b + c else 1.0
    return {"dense_right_engine_wrong": b, "dense_wrong_engine_right": c, "mcnemar_p": p}


def disagreement(
    engines: dict[str, np.ndarray],
    deploy: str,
    alpha: float,
    scale: float,
    confidence: float,
    candidates: int,
    clusters: list[Any],
    pattern: str = "",
) -> dict[str, Any]:
    """disagreement.json for engines' columns [n, T + 1]; `deploy` gets the rule, on multiples of `scale`."""
    tail, n = (1 - confidence) / candidates, len(set(clusters))
    rows = {}
    for name, z in engines.items():
        k = len({cluster for row, cluster in zip(z, clusters, strict=True) if not slack(row) > 0})
        upper = float(beta.ppf(1 - tail, k + 1, n - k)) if k < n else 1.0
        rows[name] = {"k": k, "n": n, "upper": upper, "clusters": pattern or None, "statement": ""}
    margins = [top_two(row) for row in engines[deploy]]
    tested, tau = [], None
    for candidate in [scale * math.sqrt(2) ** j for j in range(6, -15, -1)] + [0.0]:
        rows_of = zip(engines[deploy], margins, clusters, strict=True)
        lost = {cluster for row, margin, cluster in rows_of if not slack(row) > 0 and margin > candidate}
        p = float(binom.cdf(len(lost), n, alpha))
        tested.append({"tau": candidate, "errors": len(lost), "n": n, "p": p, "rejected": p <= tail})
        if p > tail:
            break
        tau = candidate
    abstains = len(margins) if tau is None else sum(not margin > tau for margin in margins)
    rule = {"engine": deploy, "alpha": alpha, "tau": tau, "tested": tested, "abstains": abstains, "statement": ""}
    rule |= {"confidence": confidence, "candidates": candidates}
    return {"schema": 1, "confidence": confidence, "candidates": candidates, "engines": rows, "rule": rule}


def noise(sigma: np.ndarray, error: np.ndarray, delta: float) -> dict[str, Any]:
    """A noise floor's row: errors over what is predicted, and their limits in the model of independent rounding."""
    ratio = [0.0 if s == 0 and e == 0 else abs(e) / s if s else math.inf for s, e in zip(sigma, error, strict=True)]
    rms, largest, n = math.sqrt(sum(r * r for r in ratio) / len(ratio)), max(ratio), len(ratio)
    wanted = math.log(delta) / max(1.0, n / 10)
    r = brentq(lambda r: (math.log(r) + 1 - r) / 2 - wanted, 1.0, 1e6, xtol=1e-13, rtol=1e-13)
    most, limit = math.sqrt(6 * math.log(2 * n / delta)), max(1.5, math.sqrt(r))
    finite = math.isfinite(rms)
    return {
        "sigma_median": number(np.median(sigma)),
        "pairs": n,
        "ratio_rms": number(rms),
        "ratio_max": number(largest),
        "rms_limit": limit,
        "threshold": most,
        "delta": delta,
        "verdict": "within" if finite and largest <= most and rms <= limit else "beyond",
        "reason": "",
    }


def top_two(row: Any) -> float:
    """The largest logit minus the second largest, NaN where one is not finite."""
    if math.isnan(slack(row)):
        return math.nan
    values = sorted(float(value) for value in row)
    return values[-1] - values[-2]
