"""A bundle -> one self-contained HTML page: no network, no scripts, the same bytes for the same bundle.

What can be recounted from the bundle's bytes is recounted here; what is only quoted is called measured, and what
nobody looked at is called not checked.
"""

import json
import re
import shlex
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from mpdeploy import plots
from mpdeploy.bundle_reader import BundleReader
from mpdeploy.errors import CorruptArtifact
from mpdeploy.formats import FORMATS, NOT_MEASURED, count, interval, number, percent, si, times
from mpdeploy.page import environment
from mpdeploy.pruning.spectrum import Spectrum

MOST_SPECTRA, SHOWN_SPECTRA = 24, 12
STAGE_LABELS = {"dense": "dense", "pruned": "prune", "tuned": "tune", "onnx": "export", "engine": "engine"}
VERDICTS = {"holds": "May be released", "refuted": "Must not be released", "unchecked": "Not established"}
RANKINGS = {
    "error": "measured error",
    "edge": "MP edge (SEB)",
    "slack": "share of margins",
    "adjoint": "adjoint (first order)",
}
# What each gate of a recipe is called, which way its limit points, and the filter that prints its numbers.
GATES = {
    "max_accuracy_drop": ("Top-1 lost against the dense network", "≤", "points"),
    "min_agreement": ("Labels equal to the dense network's", "≥", "percent"),
    "max_violations": ("Certified labels that the engine lost", "≤", "count"),
    "min_certified": ("Labels certified by the ledger", "≥", "percent"),
    "max_noise": ("Engine error over the noise floor of its precision, rms", "≤", "number"),
    "min_speedup": ("Speed-up against the dense twin", "≥", "times"),
    "finite": ("Every logit is finite", "", "answer"),
    "batch_consistent": ("A label does not depend on the rest of its batch", "", "answer"),
    "max_engine_spent": ("Share of the margin that the engine spent", "≤", "percent"),
}


def render(bundle: Path) -> str:
    """Render the report of a bundle.

    Args:
        bundle: a bundle directory. Files of stages that did not run may be missing: their sections then say so.

    Returns:
        One HTML page, the same text for the same bundle.

    Raises:
        CorruptArtifact: a file can't be read, differs from the bundle's manifest, or contradicts another.
    """
    read = BundleReader(bundle)
    view = {
        "name": read.name,
        "verdict": _verdict(read),
        "claims": _claims(read),
        "figures": _key_figures(read),
        "margins": _margins(read),
        "engines": _engines(read),
        "layers": _layers(read),
        "allocation": _allocation(read),
        "orders": _orders(read),
        "spectra": _spectra(read),
        "tuning": _tuning(read),
        "provenance": _provenance(read),
        "deploy": read.deploy,
        "has_verdict": bool(read.json("verdict.json")),
        "absent": read.absent,
    }
    return environment().get_template("report.html.jinja").render(view)


def _verdict(bundle: BundleReader) -> dict[str, Any]:
    """Return headline, reason and gates; a headline that its own gates contradict is refused."""
    data = bundle.json("verdict.json")
    if not data:
        reason = bundle.absent("Verdict", "validate")
        return {"verdict": "unchecked", "headline": VERDICTS["unchecked"], "reason": reason, "gates": []}
    gates = [_gate(gate) for gate in data["gates"]]
    failing = [gate["key"] for gate in gates if gate["verdict"] != "holds"]
    if data["verdict"] not in VERDICTS or (data["verdict"] == "holds" and (failing or not gates)):
        because = f"these gates do not hold: {', '.join(failing)}" if failing else "no gate backs it"
        raise CorruptArtifact(f'verdict.json says "{data["verdict"]}", but {because}.')
    return {"verdict": data["verdict"], "headline": VERDICTS[data["verdict"]], "reason": data["reason"], "gates": gates}


def _gate(gate: Mapping[str, Any]) -> dict[str, Any]:
    label, sign, unit = GATES.get(
        gate["name"], (gate["name"], "≤" if gate["name"].startswith("max") else "≥", "number")
    )
    form = FORMATS[unit]
    return {
        "key": gate["name"],
        "label": label,
        "limit": f"{sign} {form(gate.get('limit'))}".strip(),
        "measured": form(gate.get("measured")),
        "interval": interval(gate.get("low"), gate.get("high"), unit),
        "verdict": gate["verdict"],
        "reason": gate.get("reason", ""),
    }


def _key_figures(bundle: BundleReader) -> list[dict[str, str]]:
    """Return the numbers of the first screen: label, value, detail."""
    row, counts = bundle.deployed, bundle.certificate.get("counts", {})
    top1, agree = row.get("top1") or {}, row.get("agreement") or {}
    certified, latency = row.get("certified") or {}, row.get("latency") or {}
    ratio, zeros = latency.get("ratio") or {}, bundle.zeros
    whole = bundle.json("macs.json").get("total")
    macs = whole or sum(layer["macs"] for layer in bundle.layers)
    left = macs - sum(layer["macs"] - _macs_left(layer) for layer in bundle.layers)
    samples = sum(counts.values())
    pairs = [
        (
            "Top-1, dense → engine",
            f"{percent(bundle.results.get('dense_top1', {}).get('value'))} → {percent(top1.get('value'))}"
            if top1
            else None,
            f"engine's interval {interval(top1.get('low'), top1.get('high'), 'percent')}",
        ),
        (
            "Labels kept by the engine",
            percent(agree.get("value")) if agree else None,
            f"of {count(agree.get('n'))} validation images, interval "
            f"{interval(agree.get('low'), agree.get('high'), 'percent')}",
        ),
        (
            "Labels certified by the ledger",
            percent(counts["certified"] / samples) if samples else None,
            f"{count(counts.get('certified'))} of {count(samples)} certification images",
        ),
        (
            "Certified labels lost by the engine",
            count(certified["violations"]) if certified.get("n") else None,
            f"of {count(certified.get('n'))} certified",
        ),
        (
            "Speed-up against its dense twin",
            times(ratio.get("value")) if ratio else None,
            f"{latency.get('verdict')}; interval {interval(ratio.get('low'), ratio.get('high'), 'times')}, "
            f"batch {latency.get('batch')}",
        ),
        (
            "Weights that are zero",
            percent(zeros.zeros / zeros.weights) if zeros.weights else None,
            f"of {count(zeros.weights)} in Conv and Linear layers",
        ),
        (
            "MACs per image, dense → non-zero",
            f"{si(macs)} → {si(left)}" if macs else None,
            f"{'whole network' if whole else 'Conv and Linear layers'}; saved only where a kernel skips zeros",
        ),
    ]
    return [
        {"label": label, "value": value or NOT_MEASURED, "detail": detail if value else ""}
        for label, value, detail in pairs
    ]


def _macs_left(layer: Mapping[str, Any]) -> float:
    """MACs per image of a layer whose weights are not zero; all where zeros lie anywhere, as no kernel skips those."""
    return float(layer["macs"] * (layer["density"] if ":" in layer["pattern"] else 1.0))


def _claims(bundle: BundleReader) -> list[tuple[str, str]]:
    """Return (ground, sentence) for each thing the page claims: proved, measured, not checked, or refuted."""
    zeros, row, counts = bundle.zeros, bundle.deployed, bundle.certificate.get("counts", {})
    claims = []
    if any(layer["pattern"] == "unstructured" for layer in bundle.layers):
        claims.append(_unstructured_claim(bundle))
    elif not zeros.groups:
        claims.append(("not checked", "The N:M pattern of the weights: no pruned weights are in this bundle."))
    elif zeros.bad:
        claims.append(
            ("refuted", f"{count(zeros.bad)} of {count(zeros.groups)} groups in {zeros.file} break the pattern.")
        )
    else:
        text = f"All {count(zeros.groups)} groups of the pruned layers in {zeros.file} hold the N:M pattern"
        claims.append(("proved", f"{text}, recounted from the bytes for this page."))
    if counts:
        text = (
            f"{count(counts['certified'])} of {count(sum(counts.values()))} labels are certified, on these samples only"
        )
        claims.append(("measured", f"{text}; nothing follows for an image that is not among them."))
    else:
        claims.append(("not checked", bundle.absent("The ledger of margins", "certify")))
    draws = bundle.json("calibration.json")
    if draws:
        both = set(draws["calibration_ids"]) & set(draws["certification_ids"])
        total = count(len(draws["certification_ids"]))
        text = f"{count(len(both))} of {total} certification images are calibration images"
        claims.append(("refuted" if both else "proved", f"{text}, by the ids in calibration.json."))
    if row.get("status") == "measured":
        n = count(bundle.results["validation"]["samples"])
        claims.append(("measured", f"Labels and top-1 of {bundle.deploy} on {n} validation images."))
        timed = row.get("latency")
        where = f"on {bundle.results.get('machine') or 'the machine that ran validate'}" if timed else "of this engine"
        claims.append(("measured" if timed else "not checked", f"Speed {where}, against the dense twin."))
    else:
        what = f"Labels and speed of {bundle.deploy or 'an engine'}"
        claims.append(("not checked", f"{what}: {row['why_not']}." if row else bundle.absent(what, "validate")))
    claims += _unseen_claims(bundle)
    for other in _engines(bundle)["rows"]:
        if other["id"] != bundle.deploy and not other["measured"]:
            claims.append(("not checked", f"Labels and speed of {other['id']}: {other['status']}."))
    return [(ground, re.sub(r"\.\.$", ".", sentence)) for ground, sentence in claims]


def _unseen_claims(bundle: BundleReader) -> list[tuple[str, str]]:
    """Return (ground, sentence) about images that nobody ran, for the engine that the verdict is about."""
    stated = bundle.json("disagreement.json")
    own = stated.get("engines", {}).get(bundle.deploy)
    if own is None:
        return [
            ("not checked", f"How often {bundle.deploy or 'an engine'} differs on unseen images: it was not run here.")
        ]
    claims = [("proved", own["statement"])]
    if rule := stated.get("rule"):
        claims.append(("proved" if rule["tau"] is not None else "not checked", rule["statement"]))
    return claims


def _unstructured_claim(bundle: BundleReader) -> tuple[str, str]:
    """Return (ground, sentence) about zeros that lie anywhere, recounted from the weights."""
    state = bundle.tensors(bundle.zeros.file) if bundle.zeros.file else {}
    if not state:
        return "not checked", "The zeros of the weights: no pruned weights are in this bundle."
    rows = [layer for layer in bundle.layers if layer["pattern"] == "unstructured"]
    short = [row["name"] for row in rows if int((state[f"{row['name']}.weight"] == 0).sum()) < row["zeros"]]
    if short:
        return "refuted", f"{count(len(short))} layers in {bundle.zeros.file} have fewer zeros than layers.json states."
    text = f"All {count(len(rows))} pruned layers in {bundle.zeros.file} have the zeros that layers.json states"
    return "proved", f"{text}, recounted from the bytes for this page. They lie anywhere: no engine gains from them."


def _margins(bundle: BundleReader) -> dict[str, Any]:
    """Return plots, counts and tables of what each stage spent."""
    if not bundle.rungs:
        return {}
    finite = np.isfinite(np.stack(list(bundle.rungs.values()))).all(axis=0)
    rungs = {rung: slack[finite] for rung, slack in bundle.rungs.items()}
    names, n, certificate = list(rungs), int(finite.sum()), bundle.certificate
    figures = []
    if n:
        means = {rung: float(slack.mean()) for rung, slack in rungs.items()}
        spent = [(b, STAGE_LABELS.get(b, b), means[a] - means[b]) for a, b in pairwise(names)]
        ledger = bundle.tensors("ledger.safetensors")
        figures = [
            plots.waterfall(means[names[0]], spent, means[names[-1]], n),
            plots.slack_boxes([(rung, STAGE_LABELS.get(rung, rung), slack) for rung, slack in rungs.items()]),
            plots.margin_histogram(rungs[names[0]], rungs[names[-1]], STAGE_LABELS.get(names[-1], names[-1])),
            plots.kept_by_margin(rungs[names[0]], ledger["verdict"][finite]),
        ]
    caption = f"On {count(certificate['samples'])} certification images"
    tables = [(caption, certificate.get("reference"), certificate.get("spent", []))]
    if bundle.deployed.get("spent"):
        samples = count(bundle.results["validation"]["samples"])
        caption = f"On {samples} validation images, up to the engine {bundle.deploy}"
        tables.append((caption, None, bundle.deployed["spent"]))
    return {
        "figures": figures,
        "counts": certificate["counts"],
        "samples": certificate["samples"],
        "reserve": certificate["reserve"],
        "not_finite": int((~finite).sum()),
        "engine": bundle.deploy if "engine" in rungs else "",
        "tables": tables,
        "tests": certificate.get("tests"),
        "export_noise": bundle.results.get("export_noise"),
        "proofs": _proofs(certificate.get("proofs")),
        "labels": STAGE_LABELS,
        "median": {"margin": certificate.get("margin_median"), "slack": certificate.get("slack_median")},
    }


def _proofs(found: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what was tried to prove, one row per statement."""
    if not found:
        return {}
    real, path = found["real_arithmetic"], found["data_path"]
    labels = [("Dense and tuned network agree in real arithmetic", real)]
    labels += [(f"Any {name} engine keeps the label", row) for name, row in found["envelope"].items()]
    return {"samples": real["samples"], "labels": labels, **path}


def _engines(bundle: BundleReader) -> dict[str, Any]:
    """Return one row per engine, its dense twin in the same row, and the latency plots."""
    manifests = {}
    for name in bundle.files:
        if name.startswith("engines/") and name.endswith("/engine.json"):
            manifests[name.split("/")[1]] = bundle.json(name)
    measured = {row["id"]: row for row in bundle.results.get("engines", [])}
    ids = {name.removesuffix(".dense") for name in manifests | measured}
    rows = []
    for name in sorted(ids, key=lambda name: (name != bundle.deploy, name)):
        rows.append(_engine(name, manifests.get(name, {}), manifests.get(f"{name}.dense", {}), measured.get(name, {})))
    return {
        "rows": rows,
        "figures": _latencies(bundle, [row for row in rows if row["measured"] and row["result"].get("latency")]),
        "measured": any(row["measured"] for row in rows),
        "samples": bundle.results.get("validation", {}).get("samples"),
        "confidence": bundle.results.get("confidence"),
        "machine": bundle.results.get("machine", ""),
    }


def _engine(
    name: str, manifest: Mapping[str, Any], twin: Mapping[str, Any], result: Mapping[str, Any]
) -> dict[str, Any]:
    why = result.get("why_not") or manifest.get("why_not")
    if result.get("status") == "measured":
        status = "measured"
    elif result:
        status = f"built, not run here because {why}" if why else "built, not run here"
    else:
        status = "built; validate did not run"
    asked, back, other = (manifest.get("asked", {}), manifest.get("read_back", {}), twin.get("read_back", {}))
    facts = (("file", "file"), ("size", "size"), ("SHA-256", "sha256"), ("versions", "versions"), ("batch", "batch"))
    return {
        "id": name,
        "manifest": manifest,
        "status": status,
        "measured": status == "measured",
        "result": result,
        "settings": [
            (key, _plain(asked.get(key)), _plain(back.get(key)), _plain(other.get(key))) for key in asked | back | other
        ],
        "facts": [
            (f"{label}{of}", si(made[key], "B") if key == "size" else _plain(made[key]))
            for made, of in ((manifest, ""), (twin, " of the dense twin"))
            for label, key in facts
            if key in made
        ],
        "notes": [*manifest.get("notes", []), *(f"Dense twin: {note}" for note in twin.get("notes", []))],
    }


def _plain(value: object) -> str:
    """Print a value of a manifest: text as it is, the rest as JSON, nothing as a dash."""
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _latencies(bundle: BundleReader, rows: list[dict[str, Any]]) -> list[Any]:
    samples = bundle.tensors("samples.safetensors", "latency.")
    figures = []
    for row in rows:
        engine, twin = (samples.get(f"latency.{row['id']}{end}") for end in ("", ".dense"))
        if engine is not None and twin is not None and engine.size and twin.size:
            figures.append(
                (row["id"], plots.latency_histogram(row["id"], engine, twin, str(row["result"]["latency"]["batch"])))
            )
    return figures


def _layers(bundle: BundleReader) -> dict[str, Any]:
    """Return the rows of the table of layers, and the targets that are its last columns."""
    targets = list(dict.fromkeys(target for layer in bundle.layers for target in layer.get("targets") or {}))
    rows = [{**layer, "left": _macs_left(layer), "remark": _remark(layer)} for layer in bundle.layers]
    return {"rows": rows, "targets": targets, "pruned": sum(bool(layer["pattern"]) for layer in bundle.layers)}


def _remark(layer: Mapping[str, Any]) -> str:
    """Return why a layer is dense, what was unusual, and the damping of its refit."""
    damping = "" if layer.get("damping") is None else f"damping {layer['damping']:g}"
    return "; ".join(filter(None, (layer.get("reason"), layer.get("note"), damping)))


def _allocation(bundle: BundleReader) -> dict[str, Any]:
    """Return what each ranking chose and costs, where the recipe asked for mixed patterns."""
    made = bundle.json("allocation.json")
    if not made.get("asked"):
        return {}
    rankings = [
        {**row, "label": RANKINGS[row["ranking"]], "decides": row["ranking"] == made["ranking"]}
        for row in made["rankings"]
    ]
    uniform = [{**row, "fits": row["cost"] <= made["budget"]} for row in made["uniform"]]
    rows = [
        {
            "name": name,
            "chosen": [row["chosen"][name] or "dense" for row in rankings],
            "differs": name in made["differences"],
            "choices": [(one["pattern"], one["relative_error"]) for one in choices if one["pattern"]],
        }
        for name, choices in made["layers"].items()
    ]
    bars = [(row["label"], row["measured"], row["decides"]) for row in rankings]
    bars += [(f"{row['pattern']} everywhere", row["measured"], False) for row in uniform if row["fits"]]
    return {
        **made,
        "unit": {"macs": "MACs", "weights": "weights"}[made["unit"]],
        "rows": rows,
        "rankings": rankings,
        "uniform": uniform,
        "label": RANKINGS[made["ranking"]],
        "figure": plots.allocation(bars),
    }


def _orders(bundle: BundleReader) -> dict[str, Any]:
    """Return what became of each set of channels whose order was free."""
    made = bundle.json("orders.json")
    if not made.get("tried") and not made.get("refused"):
        return {}
    return {**made, "folded": sum(bool(row["order"]) for row in made["tried"])}


def _spectra(bundle: BundleReader) -> dict[str, Any]:
    """Return a figure per pruned layer, or a summary and the most spiked ones where there are many."""
    values = bundle.tensors("spectra.safetensors")
    rows = [row for row in bundle.layers if row.get("spectrum") and row["name"] in values]
    if not rows:
        return {}
    fits = [row["spectrum"] for row in rows]
    shown, summary = list(range(len(rows))), None
    if len(rows) > MOST_SPECTRA:
        largest = [float(values[row["name"]].max()) / row["spectrum"]["edge"] for row in rows]
        columns = ([f["sigma"] for f in fits], largest, [f["spikes"] for f in fits])
        sigma, over, spikes = (np.array(x, np.float64) for x in columns)
        summary = plots.spectra_summary(sigma, over, spikes)
        shown = sorted(sorted(shown, key=lambda i: (-fits[i]["spikes"], i))[:SHOWN_SPECTRA])
    figures = []
    for i in shown:
        eigenvalues, fit = values[rows[i]["name"]].astype(np.float64), fits[i]
        law = Spectrum(**fit, eigenvalues=eigenvalues, signals=np.empty(0))
        svg = plots.spectrum(i, rows[i]["name"], law)
        figures.append(
            {"name": rows[i]["name"], "fit": fit, "largest": float(eigenvalues.max()) / fit["edge"], "svg": svg}
        )
    return {"figures": figures, "summary": summary, "total": len(rows)}


def _tuning(bundle: BundleReader) -> dict[str, Any]:
    """Return the loss curve and the facts of tune.json."""
    facts = bundle.json("tune.json")
    if not facts:
        return {}
    points = [(p["step"], p["loss"]) for p in facts.get("loss", []) if number(p["loss"]) != NOT_MEASURED]
    curve = plots.loss_curve(*np.array(points, np.float64).T) if len(points) > 1 else None
    return {"epochs": facts.get("epochs"), "top1": facts.get("top1_held_out") or [], "curve": curve}


def _provenance(bundle: BundleReader) -> dict[str, Any]:
    """Return what made the bundle, and the commands that make it again and check it."""
    recipe = bundle.root / "recipe.toml"
    facts, draws = bundle.json("provenance.json"), bundle.json("calibration.json")
    sets = "".join(f" --set {shlex.quote(item)}" for item in bundle.json("recipe.lock.json").get("sets", []))
    kinds = [kind for kind in ("calibration", "certification", "validation") if f"{kind}_ids" in draws]
    identity = [("seed of the draws", draws.get("seed")), ("identity of the data", draws.get("data_identity"))]
    classes = bundle.json("classes.json")
    return {
        "command": f"mpdeploy run recipe.toml{sets}",
        "recipe": recipe.read_text(encoding="utf-8", errors="replace") if recipe.is_file() else "",
        "facts": [(key, facts[key]) for key in ("mpdeploy", "python", "platform", "cpu") if key in facts],
        "packages": sorted(facts.get("packages", {}).items()),
        "chain": bundle.chain,
        "ids": kinds,
        "data": [
            *((f"{kind} images", count(len(draws[f"{kind}_ids"]))) for kind in kinds),
            *(pair for pair in identity if pair[1] is not None),
            *([("classes", ", ".join(map(str, classes)))] if classes else []),
        ],
        "model": [(key, _plain(value)) for key, value in bundle.json("model.json").items()],
        "preprocessing": [(key, _plain(value)) for key, value in bundle.json("preprocessing.json").items()],
        "files": bundle.files,
    }
