"""Decisions, interleaving and the gates, with planted faults and a scripted clock."""

import numpy as np
import pytest

from mpdeploy.compare import Latencies, decide, decisions, interleave, speed, top1
from mpdeploy.gates import EVIDENCE, judge
from mpdeploy.recipe import Gates


def test_nan_agrees_with_nobody():
    logits = np.array([[np.nan, 0.0], [1.0, 0.0], [np.inf, 0.0]])
    assert decide(logits).tolist() == [-1, 0, -1]
    own = decide(logits)
    got = decisions(np.zeros(3, np.int64), own, own == 0, np.array([0, 0, 0]), 0.95)
    assert got["agreement"]["correct"] == 1
    assert got["top1"]["correct"] == 1
    assert got["flips"]["dense_right_engine_wrong"] == 2


def test_flips_are_paired():
    dense, engine, labels = np.array([0, 1, 2, 3]), np.array([0, 1, 3, 2]), np.array([0, 0, 2, 2])
    got = decisions(dense, engine, dense == engine, labels, 0.95)
    assert got["flips"] == {"dense_right_engine_wrong": 1, "dense_wrong_engine_right": 1, "mcnemar_p": 1.0}
    assert top1(engine, labels, 0.95)["correct"] == 2


def test_blocks_are_interleaved_abba_after_a_warm_up():
    order = []

    def clock(name):
        def timed(calls):
            order.append(name)
            return np.full(calls, 1.0)

        return timed

    got = interleave(clock("A"), clock("B"), blocks=2, calls=3, progress=lambda d, t: None)
    assert "".join(order) == "AB" + "ABBA" * 2
    assert got.engine.shape == got.twin.shape == (2 * 2 * 3,)


def drifting(ratio, blocks=30, calls=5, noise=0.01, seed=0):
    """A machine that slows down by half over the sitting, with the twin `ratio` times slower throughout."""
    rng = np.random.default_rng(seed)
    speed_of_block = np.linspace(1, 1.5, blocks)[:, None] * np.ones((1, 2 * calls))
    engine = speed_of_block * rng.lognormal(0, noise, speed_of_block.shape)
    twin = ratio * speed_of_block * rng.lognormal(0, noise, speed_of_block.shape)
    return Latencies(engine.ravel(), twin.ravel()), blocks


@pytest.mark.parametrize(("ratio", "expected"), [(1.5, "faster"), (0.7, "slower"), (1.0, "same")])
def test_a_drifting_machine_does_not_hide_a_ratio(ratio, expected):
    latencies, blocks = drifting(ratio, noise=0.002)
    got = speed(latencies, blocks, 0.95)
    assert got["ratio"]["low"] <= got["ratio"]["value"] <= got["ratio"]["high"]
    if expected != "same":
        assert got["verdict"] == expected
        assert got["ratio"]["low"] <= ratio <= got["ratio"]["high"]
    else:
        assert got["verdict"] in ("same", "inconclusive")


def test_a_noisy_machine_is_inconclusive_not_faster():
    rng = np.random.default_rng(1)
    noisy = rng.lognormal(0, 1.0, (2, 100))
    assert speed(Latencies(noisy[0], noisy[1]), 10, 0.95)["verdict"] == "inconclusive"


def test_quantiles_are_those_of_the_raw_samples():
    latencies = Latencies(np.arange(1, 101) / 1e3, np.arange(1, 101) / 1e3)
    got = speed(latencies, 10, 0.95)
    assert got["median_ms"] == pytest.approx(50.5)
    assert got["p99_ms"] == pytest.approx(np.quantile(np.arange(1, 101), 0.99))


def share(correct, n):
    return {"correct": correct, "n": n, "value": correct / n if n else None, "low": 0.1, "high": 0.9}


def evidence(**changes):
    engine = {
        "id": "e",
        "status": "measured",
        "why_not": "",
        "top1": share(90, 100),
        "agreement": share(95, 100),
        "certified": {"n": 50, "violations": 0},
        "finite": True,
        "batch_consistent": True,
        "noise_floor": {"ratio_rms": 0.8, "reason": "within"},
        "latency": {"batch": 1, "calls": 9, "verdict": "faster", "ratio": {"value": 1.2, "low": 1.1, "high": 1.3}},
        **changes,
    }
    results = {"confidence": 0.95, "dense_top1": share(91, 100), "engines": [engine]}
    return results, {"samples": 60, "counts": {"certified": 50, "kept": 5, "flipped": 5}}


def verdict(gates, **changes):
    return judge(Gates(**gates), "e", *evidence(**changes))


ALL = {"max_accuracy_drop": 1.5, "min_agreement": 0.9, "max_violations": 0, "min_certified": 0.8, "max_noise": 1.5}
ALL["min_speedup"] = 1.05


def test_all_gates_hold_on_good_evidence():
    got = verdict(ALL)
    assert got["verdict"] == "holds"
    assert {gate["name"] for gate in got["gates"]} == set(ALL) == set(EVIDENCE) == set(Gates.model_fields)


@pytest.mark.parametrize(
    ("gates", "changes"),
    [
        ({"max_accuracy_drop": 0.5}, {}),
        ({"min_agreement": 0.96}, {}),
        ({"max_violations": 0}, {"certified": {"n": 50, "violations": 1}}),
        ({"min_certified": 0.9}, {}),
        ({"min_speedup": 1.5}, {}),
        ({"max_noise": 0.5}, {}),
        ({"max_noise": 1.5}, {"noise_floor": {"ratio_rms": None, "reason": "not finite"}}),
        ({"min_agreement": 0.5}, {"finite": False}),
        ({"min_agreement": 0.5}, {"batch_consistent": False}),
    ],
)
def test_each_gate_refutes(gates, changes):
    assert verdict(gates, **changes)["verdict"] == "refuted"


@pytest.mark.parametrize(
    ("gates", "changes"),
    [
        ({}, {}),
        (ALL, {"status": "not run", "why_not": "no GPU"}),
        ({"min_agreement": 0.5}, {"agreement": share(0, 0)}),
        ({"max_accuracy_drop": 9}, {"top1": share(0, 0)}),
        ({"max_violations": 0}, {"certified": {"n": 0, "violations": 0}}),
        ({"min_speedup": 1.2}, {}),
        ({"min_speedup": 1.0}, {"latency": None}),
        ({"max_noise": 1.5}, {"noise_floor": None}),
    ],
)
def test_what_was_not_established_is_unchecked(gates, changes):
    assert verdict(gates, **changes)["verdict"] == "unchecked"
