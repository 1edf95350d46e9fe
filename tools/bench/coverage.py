"""How often the claims about unseen inputs hold: each is simulated many times where the truth is known.

Clopper-Pearson alone; of the best of M engines on the same samples, without and with Bonferroni (independent engines
of equal quality: the worst case for choosing); correlated samples counted as independent and by cluster; the
margin-gated rule, by fixed-sequence testing and by the observed rate. The seed makes every number. Run from the
repository:

    OMP_NUM_THREADS=1 python tools/bench/coverage.py [REPEATS]
"""

import datetime
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpdeploy.certify.deployment import deployment_rule
from mpdeploy.certify.statistics import clustered, disagreement
from mpdeploy.runtimes import cpu_name

SEED, REPEATS, CONFIDENCE = 2024, 20_000, 0.95
# Rules and clusters take longer each, and get a tenth of the repeats.
FEWER = 10
RESULTS = Path(__file__).parent / "results" / "coverage.json"


def summary(held: int, repeats: int, nominal: float) -> dict[str, Any]:
    """Say how often a claim held; `holds` where that is no less than 3 standard errors below what it says."""
    error = math.sqrt(nominal * (1 - nominal) / repeats)
    return {
        "coverage": round(held / repeats, 4),
        "nominal": nominal,
        "standard_error": round(error, 4),
        "repeats": repeats,
        "holds": held / repeats >= nominal - 3 * error,
    }


def covered(counts: NDArray[np.int64], n: int, rate: float, candidates: int = 1) -> int:
    """Return for how many of the counts of disagreements among n the bound is no lower than the true rate."""
    return sum(
        int(times)
        for k, times in zip(*np.unique(counts, return_counts=True), strict=True)
        if disagreement(int(k), n, CONFIDENCE, candidates).upper >= rate
    )


def clopper_pearson(generator: np.random.Generator, repeats: int) -> list[dict[str, Any]]:
    """Simulate the plain bound."""
    cases = [(1000, 0.001), (1000, 0.017), (1000, 0.16), (50_000, 0.0005), (50_000, 0.017)]
    return [
        {"n": n, "rate": rate} | summary(covered(generator.binomial(n, rate, repeats), n, rate), repeats, CONFIDENCE)
        for n, rate in cases
    ]


def best_of_many(generator: np.random.Generator, repeats: int) -> list[dict[str, Any]]:
    """Simulate the bound of the engine with the fewest disagreements among M."""
    n, rate, rows = 1000, 0.017, []
    for m in (1, 5, 20, 100):
        best = generator.binomial(n, rate, (repeats, m)).min(axis=1)
        rows.append(
            {"n": n, "rate": rate, "candidates": m}
            | {"uncorrected": summary(covered(best, n, rate), repeats, CONFIDENCE)}
            | {"bonferroni": summary(covered(best, n, rate, m), repeats, CONFIDENCE)}
        )
    return rows


def clusters(generator: np.random.Generator, repeats: int) -> list[dict[str, Any]]:
    """Simulate photographs of which some are hard, and there a share of the patches disagrees."""
    rows = []
    for share in (0.2, 0.5, 1.0):
        photographs, patches, hard = 200, 10, 0.05
        rate, any_patch = hard * share, hard * (1 - (1 - share) ** patches)
        ids = np.repeat(np.arange(photographs), patches).tolist()
        naive = by_patch = by_photograph = 0
        for _ in range(repeats):
            flags = generator.random((photographs, patches)) < share
            flags &= generator.random((photographs, 1)) < hard
            naive += disagreement(int(flags.sum()), flags.size, CONFIDENCE).upper >= rate
            upper = clustered(flags.ravel(), ids, CONFIDENCE).upper
            by_patch += upper >= rate
            by_photograph += upper >= any_patch
        rows.append(
            {"clusters": photographs, "size": patches, "hard": hard, "share_inside": share, "rate": round(rate, 6)}
            | {"counted_as_independent": summary(naive, repeats, CONFIDENCE)}
            | {"clustered_rate_of_a_member": summary(by_patch, repeats, CONFIDENCE)}
            | {"clustered_any_in_a_cluster": summary(by_photograph, repeats, CONFIDENCE)}
        )
    return rows


def deployment(generator: np.random.Generator, repeats: int) -> list[dict[str, Any]]:
    """Simulate rules on margins of an exponential law (mean 2), with P(disagree | margin) = exp(-margin / 0.3) / 2."""
    speed = 1 / 2.0 + 1 / 0.3
    grid = np.linspace(0.0, 1.5, 61)
    risk = 0.25 / speed * np.exp(-speed * grid)
    rows = []
    for n, alpha in ((1000, 0.02), (2000, 0.01), (5000, 0.005)):
        held = observed = 0
        kept: list[float] = []
        for _ in range(repeats):
            margins = generator.exponential(2.0, n)
            wrong = generator.random(n) < np.exp(-margins / 0.3) / 2
            rule = deployment_rule(margins, wrong, alpha, CONFIDENCE, grid.tolist())
            held += rule.tau is None or 0.25 / speed * math.exp(-speed * rule.tau) <= alpha
            kept.append(1 - (rule.abstains if rule.abstains is not None else 1.0))
            # The careless way: the smallest tau at which what was observed is within the limit.
            errors = np.array([(wrong & (margins > tau)).sum() for tau in grid])
            observed += bool(risk[int(np.argmax(errors <= alpha * n))] <= alpha)
        rows.append(
            {"n": n, "alpha": alpha, "without_a_rule": round(float(risk[0]), 5), "kept_mean": round(np.mean(kept), 4)}
            | {
                "violation_rate": round(1 - held / repeats, 4),
                "violation_rate_observed": round(1 - observed / repeats, 4),
            }
            | {"fixed_sequence": summary(held, repeats, CONFIDENCE)}
            | {"observed_rate": summary(observed, repeats, CONFIDENCE)}
        )
    return rows


def main(repeats: int) -> dict[str, Any]:
    """Simulate, print, and write results/coverage.json."""
    start = time.perf_counter()
    parts: dict[str, tuple[Callable[[np.random.Generator, int], list[dict[str, Any]]], int]] = {
        "clopper_pearson": (clopper_pearson, repeats),
        "best_of_many": (best_of_many, repeats),
        "clusters": (clusters, max(1, repeats // FEWER)),
        "deployment_rule": (deployment, max(1, repeats // FEWER)),
    }
    made = {name: part(np.random.default_rng([SEED, i]), n) for i, (name, (part, n)) in enumerate(parts.items())}
    result = {
        "seed": SEED,
        "confidence": CONFIDENCE,
        **made,
        "seconds": round(time.perf_counter() - start, 1),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "threads": os.environ.get("OMP_NUM_THREADS", "unset"),
        "cpu": cpu_name(),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("numpy", "scipy", "mpdeploy")},
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))
    return result


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else REPEATS)
