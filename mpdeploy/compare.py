"""Paired comparisons: decisions on the same inputs, latencies in interleaved blocks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpdeploy.certify.statistics import mcnemar, proportion

Seconds = NDArray[np.float64]
RESAMPLES = 2000


def decide(logits: NDArray[Any]) -> NDArray[np.int64]:
    """Return the decision per sample, -1 where a logit is not finite: NaN agrees with nobody."""
    finite = np.isfinite(logits).all(axis=1)
    return np.where(finite, np.argmax(np.where(np.isfinite(logits), logits, -np.inf), axis=1), -1)


def top1(decided: NDArray[np.int64], labels: NDArray[np.int64], confidence: float) -> dict[str, Any]:
    """Return top-1 with its exact interval, of decisions [n] and true labels [n]."""
    return proportion(int((decided == labels).sum()), len(labels), confidence).json()


def decisions(
    dense: NDArray[np.int64],
    engine: NDArray[np.int64],
    agree: NDArray[np.bool_],
    labels: NDArray[np.int64],
    confidence: float,
) -> dict[str, Any]:
    """Compare two networks' decisions on the same samples.

    Args:
        dense: decisions of the reference, [n].
        engine: decisions of the engine, [n]; -1 where its logits are not finite.
        agree: where the engine gives the reference's label, without a tie, [n].
        labels: true labels, [n].
        confidence: of every interval.

    Returns:
        top1 of the engine, agreement with the reference, and the paired flips with McNemar's exact p.
    """
    right, engine_right = dense == labels, engine == labels
    lost, won = int((right & ~engine_right).sum()), int((~right & engine_right).sum())
    return {
        "top1": top1(engine, labels, confidence),
        "agreement": proportion(int(agree.sum()), len(labels), confidence).json(),
        "flips": {
            "dense_right_engine_wrong": lost,
            "dense_wrong_engine_right": won,
            "mcnemar_p": mcnemar(lost, won),
        },
    }


@dataclass(frozen=True)
class Latencies:
    """Interleaved timings.

    Attributes:
        engine: seconds per call, in the order of the calls, float64 [blocks * 2 * calls].
        twin: the same for the dense twin, from the same blocks.
    """

    engine: Seconds
    twin: Seconds


def interleave(
    time_engine: Callable[[int], Seconds],
    time_twin: Callable[[int], Seconds],
    blocks: int,
    calls: int,
    progress: Callable[[int, int], None],
) -> Latencies:
    """Time two sessions in ABBA blocks, so that a machine that drifts drifts for both.

    Args:
        time_engine: n -> seconds of n finished calls.
        time_twin: the same for the twin.
        blocks: how many ABBA blocks.
        calls: calls per letter.
        progress: told (done, blocks).
    """
    samples: dict[str, list[Seconds]] = {"A": [], "B": []}
    timers = {"A": time_engine, "B": time_twin}
    for letter in "AB":
        timers[letter](calls)  # warm-up, thrown away
    for block in range(blocks):
        for letter in "ABBA":
            samples[letter].append(timers[letter](calls))
        progress(block + 1, blocks)
    return Latencies(np.concatenate(samples["A"]), np.concatenate(samples["B"]))


def speed(latencies: Latencies, blocks: int, confidence: float, seed: int = 0) -> dict[str, Any]:
    """Summarise interleaved timings.

    The ratio is median twin time over median engine time (above 1: the engine is faster). Its interval is a percentile
    bootstrap over whole blocks, because calls within a block share the machine's state of that moment. The verdict is
    `same` where the whole interval lies within 2 % of 1, `inconclusive` where it straddles 1 and is wider than that.
    """
    a, b = latencies.engine.reshape(blocks, -1), latencies.twin.reshape(blocks, -1)
    rng = np.random.default_rng(seed)
    ratios = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        pick = rng.integers(0, blocks, blocks)
        ratios[i] = np.median(b[pick]) / np.median(a[pick])
    tail = (1 - confidence) / 2
    low, high = (float(q) for q in np.quantile(ratios, [tail, 1 - tail]))
    return {
        "calls": int(a.size),
        **{f"{name}_ms": 1e3 * float(np.quantile(a, q)) for name, q in (("median", 0.5), ("p90", 0.9), ("p99", 0.99))},
        "twin_median_ms": 1e3 * float(np.median(b)),
        "ratio": {"value": float(np.median(b) / np.median(a)), "low": low, "high": high},
        "verdict": verdict(low, high),
    }


def verdict(low: float, high: float) -> str:
    """Name what an interval of the ratio shows."""
    if low >= 0.98 and high <= 1.02:
        return "same"
    if low > 1.0:
        return "faster"
    if high < 1.0:
        return "slower"
    return "inconclusive"
