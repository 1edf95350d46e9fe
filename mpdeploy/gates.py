"""The gates: the recipe's policy held against what was measured. They judge files and measure nothing themselves."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mpdeploy.certify.statistics import proportion
from mpdeploy.recipe import Gates


@dataclass(frozen=True)
class Gate:
    """One gate's answer.

    Attributes:
        name: its key in the recipe.
        limit: what the recipe asks.
        measured: what was measured, None where nothing was.
        low: lower end of the measured value's interval, None where it has none.
        high: upper end.
        verdict: "holds", "refuted" or "unchecked".
        reason: one sentence.
    """

    name: str
    limit: float
    measured: float | None
    low: float | None
    high: float | None
    verdict: str
    reason: str


Evidence = tuple[float | None, float | None, float | None, str]
"""Measured value, its interval, and what was looked at."""


def _accuracy_drop(engine: Mapping[str, Any], results: Mapping[str, Any], _: Mapping[str, Any]) -> Evidence:
    dense, own = results["dense_top1"], engine["top1"]
    if not own["n"]:
        return None, None, None, "no validation image was run"
    drop = 100.0 * (dense["value"] - own["value"])
    return drop, None, None, f"dense {dense['correct']}, engine {own['correct']} of {own['n']} images right"


def _agreement(engine: Mapping[str, Any], _: Mapping[str, Any], __: Mapping[str, Any]) -> Evidence:
    own = engine["agreement"]
    if not own["n"]:
        return None, None, None, "no validation image was run"
    return own["value"], own["low"], own["high"], f"{own['correct']} of {own['n']} labels equal the dense network's"


def _violations(engine: Mapping[str, Any], _: Mapping[str, Any], __: Mapping[str, Any]) -> Evidence:
    own = engine["certified"]
    if not own["n"]:
        return None, None, None, "no sample was certified, so none could be violated"
    return float(own["violations"]), None, None, f"{own['violations']} of {own['n']} certified labels lost"


def _certified(_: Mapping[str, Any], results: Mapping[str, Any], certificate: Mapping[str, Any]) -> Evidence:
    n = certificate["samples"]
    if not n:
        return None, None, None, "there is no certification sample"
    own = proportion(certificate["counts"]["certified"], n, results["confidence"])
    return own.value, own.low, own.high, f"{own.correct} of {n} certification samples certified"


def _noise(engine: Mapping[str, Any], _: Mapping[str, Any], __: Mapping[str, Any]) -> Evidence:
    own = engine["noise_floor"]
    if own is None:
        return None, None, None, "no noise floor was computed"
    # An error that is not finite is more than any precision explains.
    return own["ratio_rms"] if own["ratio_rms"] is not None else float("inf"), None, None, own["reason"]


def _speedup(engine: Mapping[str, Any], _: Mapping[str, Any], __: Mapping[str, Any]) -> Evidence:
    own = engine["latency"]
    if own is None:
        return None, None, None, "no latency was measured"
    ratio = own["ratio"]
    seen = f"{own['verdict']} than its dense twin over {own['calls']} calls at batch {own['batch']}"
    return ratio["value"], ratio["low"], ratio["high"], seen


EVIDENCE: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]], Evidence]] = {
    "max_accuracy_drop": _accuracy_drop,
    "min_agreement": _agreement,
    "max_violations": _violations,
    "min_certified": _certified,
    "max_noise": _noise,
    "min_speedup": _speedup,
}


def judge(gates: Gates, deploy: str, results: Mapping[str, Any], certificate: Mapping[str, Any]) -> dict[str, Any]:
    """Hold every gate of the recipe against the engine that is to be released.

    Args:
        gates: the recipe's table.
        deploy: the engine's id.
        results: results.json of validate.
        certificate: certificate.json of certify.

    Returns:
        The contents of verdict.json: refuted if any gate is; else unchecked if any is or none is asked; else holds.
    """
    engine = next(row for row in results["engines"] if row["id"] == deploy)
    asked = {name: limit for name, limit in gates.model_dump().items() if limit is not None}
    answers = [_judge(name, float(limit), engine, results, certificate) for name, limit in asked.items()]
    if engine["status"] == "measured":
        answers += _always(engine)
    verdicts = [gate.verdict for gate in answers]
    if "refuted" in verdicts:
        verdict = "refuted"
    elif "unchecked" in verdicts or not asked:
        verdict = "unchecked"
    else:
        verdict = "holds"
    return {
        "verdict": verdict,
        "deploy": deploy,
        "reason": _reason(verdict, answers, bool(asked)),
        "gates": [asdict(gate) for gate in answers],
    }


def _judge(
    name: str, limit: float, engine: Mapping[str, Any], results: Mapping[str, Any], certificate: Mapping[str, Any]
) -> Gate:
    """Judge one gate. Counts on the images at hand are facts: the point decides and the interval informs.

    A latency ratio is not a fact but an estimate: its whole interval has to be on one side.
    """
    if engine["status"] != "measured":
        return Gate(name, limit, None, None, None, "unchecked", f"the engine was not run here: {engine['why_not']}")
    value, low, high, seen = EVIDENCE[name](engine, results, certificate)
    if value is None:
        return Gate(name, limit, None, None, None, "unchecked", seen)
    if name == "min_speedup":
        verdict = "holds" if low is not None and low >= limit else "unchecked"
        if high is not None and high < limit:
            verdict = "refuted"
    elif name.startswith("max_"):
        verdict = "holds" if value <= limit else "refuted"
    else:
        verdict = "holds" if value >= limit else "refuted"
    return Gate(name, limit, value if math.isfinite(value) else None, low, high, verdict, seen)


def _always(engine: Mapping[str, Any]) -> list[Gate]:
    """Gates that no recipe can switch off; named only where they fail."""
    failed = []
    if not engine["finite"]:
        failed.append(Gate("finite", 1.0, 0.0, None, None, "refuted", "the engine gives NaN or infinity"))
    if not engine["batch_consistent"]:
        reason = "an image's label depends on what else is in its batch"
        failed.append(Gate("batch_consistent", 1.0, 0.0, None, None, "refuted", reason))
    return failed


def _reason(verdict: str, answers: list[Gate], asked: bool) -> str:
    """Say in one sentence why."""
    if verdict == "holds":
        return f"All {len(answers)} gates hold."
    if not asked:
        return "The recipe asks for no gate, so nothing was established."
    gate = next(gate for gate in answers if gate.verdict == verdict)
    more = sum(1 for other in answers if other.verdict == verdict) - 1
    return f"{gate.name}: {gate.reason}" + (f" (and {more} more)." if more else ".")
