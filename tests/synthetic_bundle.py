"""A small bundle with made-up numbers that agree with each other: logits, ledger, certificate, results, weights.

Only tests of what reads a bundle use it. Everything is drawn from one seed and then computed by the definitions of the
bundle, so that a reader which recomputes a number finds the one that is written.
"""

import copy
import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from forgeries import formulas
from safetensors.numpy import save_file

from mpdeploy.pruning.spectrum import fit

STAGES = ("source", "prune", "tune", "certify", "export", "build", "validate")
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
DEPLOY = "onnxruntime-cpu-int8"
MEASURED = (DEPLOY, "onnxruntime-cpu-fp32")
CERTIFICATION, VALIDATION, KEEP, RESERVE = 400, 600, 8, 0.01
LADDER = ("dense", "pruned", "tuned")
ALPHA = 0.01
RECIPE = """\
schema = 1
name = "{name}"   # <script>alert("a comment in a recipe")</script>

[source]
kind = "timm"
model = "vit_tiny_patch16_224"
weights = "./quickstart.safetensors"

[prune]
pattern = "2:4"
"""


def slack(z: np.ndarray) -> np.ndarray:
    """Of kept columns [n, T + 1] the dense label's logit minus the best other one."""
    z = z.astype(np.float64)
    return z[:, 0] - z[:, 1:].max(1)


def right(z: np.ndarray, kept: np.ndarray, labels: np.ndarray) -> list[bool]:
    """Which samples are given their true label, of kept columns [n, T + 1]."""
    return [bool(formulas.decision(a, b) == c) for a, b, c in zip(z, kept, labels, strict=True)]


def noise(sigma: np.ndarray, error: np.ndarray, precision: str) -> dict[str, Any]:
    """The row of a noise floor, with what only the report tells."""
    row = formulas.noise(sigma, error, 0.01)
    reason = f"The pair error is {row['ratio_rms']:.2f} sigma (rms): {row['verdict']} what {precision} explains."
    more = {"expected_flips": 0.02, "spent_on": {"MatMul": 0.7, "Softmax": 0.3}}
    return {**row, **more, "precision": precision, "reason": reason}


def write(folder: Path, name: str, value: object) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(value, indent=1, allow_nan=False), encoding="utf-8")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def seal(folder: Path) -> None:
    """Write manifest.json for what is in the folder now."""
    (folder / "manifest.json").unlink(missing_ok=True)
    files = {
        p.relative_to(folder).as_posix(): {"sha256": digest(p), "size": p.stat().st_size}
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }
    chain = json.loads((folder / "provenance.json").read_text())["chain"]
    lock = json.loads((folder / "recipe.lock.json").read_text())
    manifest = {
        "schema": 1,
        "kind": "mpdeploy-bundle",
        "name": lock["name"],
        "mpdeploy": "0.1.0",
        "chain": {stage: entry["digest"] for stage, entry in chain.items()},
        "files": files,
    }
    write(folder, "manifest.json", manifest)


def draw_logits(rng: np.random.Generator, n: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Logits of dense, pruned, tuned and exported [n, 10] and labels that the dense network mostly gets right."""
    labels = rng.integers(0, 10, n)
    dense = rng.normal(0, 1.6, (n, 10)).astype(np.float32)
    dense[np.arange(n), labels] += rng.gamma(5.0, 1.5, n).astype(np.float32)
    pruned = (0.88 * dense + rng.normal(0, 0.7, dense.shape)).astype(np.float32)
    tuned = (dense + 0.55 * (pruned - dense) + rng.normal(0, 0.1, dense.shape)).astype(np.float32)
    exported = (tuned + rng.normal(0, 1e-6, dense.shape)).astype(np.float32)
    return {"dense": dense, "pruned": pruned, "tuned": tuned, "onnx": exported}, labels


@cache
def _certified(seed: int) -> tuple[dict[str, np.ndarray], dict[str, Any], dict[str, np.ndarray]]:
    """ledger.safetensors, certificate.json but for what it is bound to, and the engines' logits of its samples."""
    rng = np.random.default_rng([seed, 1])
    z, labels = draw_logits(rng, CERTIFICATION)
    z.pop("onnx")
    columns = formulas.ledger_columns(labels, z, KEEP)
    verdict = formulas.verdicts(columns, RESERVE)
    exact = z["dense"][:8].astype(np.float64) + rng.normal(0, 1e-6, (8, 10))
    margin, left = slack(columns["logits"][:, 0]), slack(columns["logits"][:, -1])
    kept, moved = columns["kept_classes"], columns["displacement"]
    certificate = {
        "schema": 2,
        "samples": CERTIFICATION,
        "classes": 10,
        "kept": kept.shape[1],
        "reserve": RESERVE,
        "stages": list(LADDER),
        "counts": {kind: int((verdict == at).sum()) for at, kind in enumerate(("flipped", "kept", "certified"))},
        "tests": {
            "pairwise": int((left > 0).sum()),
            "span": int((moved[:, 1] < margin).sum()),
            "two_inf": int((2 * moved[:, 0] < margin).sum()),
        },
        "top1": {stage: sum(right(columns["logits"][:, at], kept, labels)) for at, stage in enumerate(LADDER)},
        "margin_median": float(np.median(margin)),
        "slack_median": float(np.median(left)),
        "reference": formulas.reference(exact, z["dense"][:8]),
        "spent": formulas.spent(list(LADDER), columns),
        "zero_budget": {},
    }
    ledger = {**columns, "verdict": verdict, "reference": formulas.at_kept(exact, kept[:8], np.float64)}
    noises = zip(MEASURED, (0.06, 1e-5), strict=True)
    there = {name: (z["tuned"] + rng.normal(0, e, z["tuned"].shape)).astype(np.float32) for name, e in noises}
    return ledger, certificate, {name: formulas.at_kept(own, kept) for name, own in there.items()}


@cache
def _measured(seed: int) -> tuple[dict[str, np.ndarray], list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
    """samples.safetensors, rows of results.json, the networks' own top-1, and disagreement.json."""
    rng = np.random.default_rng([seed, 2])
    z, labels = draw_logits(rng, VALIDATION)
    noises = zip(MEASURED, (0.06, 1e-5), strict=True)
    engines = {name: (z["onnx"] + rng.normal(0, e, z["onnx"].shape)).astype(np.float32) for name, e in noises}
    columns = formulas.ledger_columns(labels, z, KEEP, tuple(engines.values()))
    kept = columns["kept_classes"]
    samples = {key: columns[key] for key in ("labels", "kept_classes", "logits", "eps", "share")}
    ledger, certificate, there = _certified(seed)
    dense_right = right(columns["logits"][:, 0], kept, labels)
    samples |= {"onnx.sigma": rng.uniform(1e-6, 2e-6, 64)}
    samples |= {"onnx.error": samples["onnx.sigma"] * rng.normal(0, 0.5, 64)}
    rows = []
    for (name, logits), speed in zip(engines.items(), (1.9, 1.01), strict=True):
        own = formulas.at_kept(logits, kept)
        eps = np.array([formulas.eps_of(a, b) for a, b in zip(z["onnx"], logits, strict=True)])
        steps = zip(z["dense"], z["onnx"], logits, kept[:, 0], strict=True)
        share = np.array([formulas.share_of(d, a, b, int(y)) for d, a, b, y in steps])
        twin = 0.0061 * rng.gamma(60, 1 / 60, 400) + 0.001 * (rng.random(400) < 0.02)
        times = 0.0061 / speed * rng.gamma(60, 1 / 60, 400)
        sigma = rng.uniform(1e-4, 2e-4, 64)
        error = sigma * rng.normal(0, 0.6, 64)
        samples |= {f"engine.{name}": own, f"engine.{name}.eps": eps, f"engine.{name}.share": share}
        samples |= {f"engine.{name}.sigma": sigma, f"engine.{name}.error": error, f"certification.{name}": there[name]}
        samples |= {f"latency.{name}": times, f"latency.{name}.dense": twin}
        longer = {
            "logits": np.concatenate([columns["logits"], own[:, None]], axis=1),
            "eps": np.concatenate([columns["eps"], eps[:, None]], axis=1),
            "share": np.concatenate([columns["share"], share[:, None]], axis=1),
        }
        own_right = right(own, kept, labels)
        lost = ~(slack(there[name]) > 0)
        broken = np.flatnonzero(lost & (ledger["verdict"] == 2))
        ratio = float(np.median(twin) / np.median(times))
        rows.append(
            {
                "id": name,
                "status": "measured",
                "why_not": "",
                "top1": formulas.interval(sum(own_right), VALIDATION),
                "agreement": formulas.interval(int((slack(own) > 0).sum()), VALIDATION),
                "flips": formulas.flips(dense_right, own_right),
                "certified": {
                    "n": certificate["counts"]["certified"],
                    "violations": len(broken),
                    "violating_ids": [f"train/{1000 + i:05d}" for i in broken],
                    "kept_broken": int((lost & (ledger["verdict"] == 1)).sum()),
                },
                "spent": formulas.spent([*LADDER, "onnx", "engine"], longer),
                "finite": True,
                "batch_consistent": True,
                "noise_floor": noise(sigma, error, name.rpartition("-")[2]),
                "latency": {
                    "batch": 1,
                    "threads": 1,
                    "twin": f"{name}.dense",
                    "calls": 400,
                    "median_ms": 1e3 * float(np.median(times)),
                    "p90_ms": 1e3 * float(np.percentile(times, 90)),
                    "p99_ms": 1e3 * float(np.percentile(times, 99)),
                    "twin_median_ms": 1e3 * float(np.median(twin)),
                    "ratio": {"value": ratio, "low": 0.98 * ratio, "high": 1.02 * ratio},
                    "verdict": "faster" if ratio > 1.05 else "same",
                },
            }
        )
    tuned_right = right(columns["logits"][:, 2], kept, labels)
    top1 = {"dense": formulas.interval(sum(dense_right), VALIDATION)}
    top1["tuned"] = formulas.interval(sum(tuned_right), VALIDATION)
    logits = {name: samples[f"engine.{name}"] for name in MEASURED}
    ids = list(range(VALIDATION))
    unseen = formulas.disagreement(logits, DEPLOY, ALPHA, certificate["margin_median"], 0.95, len(MEASURED), ids)
    for row in unseen["engines"].values():
        row["statement"] = f"At most {100 * row['upper']:.2f} % of labels differ on unseen images."
    unseen["rule"]["statement"] = f"Above the margin at most {100 * ALPHA:.0f} % differ."
    return samples, rows, top1, unseen


def two_of_four(weight: np.ndarray) -> np.ndarray:
    """Keep the two largest of each four along axis 1."""
    moved = np.moveaxis(weight, 1, -1)
    groups = moved.reshape(-1, 4).copy()
    np.put_along_axis(groups, np.argsort(np.abs(groups), 1)[:, :2], 0, 1)
    return np.ascontiguousarray(np.moveaxis(groups.reshape(moved.shape), -1, 1))


def write_weights(rng: np.random.Generator, out: Path, blocks: int, width: int) -> None:
    """Weights, layers.json and spectra.safetensors of a made-up ViT with `blocks` blocks."""
    shapes = {"patch_embed.proj": (width, 1, 4, 4)}
    for i in range(blocks):
        part = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
        part |= {"mlp.fc1": (2 * width, width), "mlp.fc2": (width, 2 * width)}
        shapes |= {f"blocks.{i}.{key}": shape for key, shape in part.items()}
    shapes["head"] = (10, width)
    state: dict[str, dict[str, np.ndarray]] = {"dense": {}, "pruned": {}, "tuned": {}}
    layers, spectra = [], {}
    for position, (name, shape) in enumerate(shapes.items()):
        weight = rng.normal(0, 0.04, shape).astype(np.float32)
        dense = name in ("patch_embed.proj", "head")
        if not dense and position % 3 == 0:
            weight += 0.9 * np.outer(rng.normal(0, 0.08, shape[0]), rng.normal(0, 1, shape[1])).astype(np.float32)
        kept = weight if dense else two_of_four(weight)
        for stage, value in zip(state, (weight, kept, 1.01 * kept), strict=True):
            state[stage][f"{name}.weight"] = value.astype(np.float32)
        positions = 49 if name != "head" else 1
        row = {
            "name": name,
            "kind": "conv2d" if len(shape) == 4 else "linear",
            "shape": list(shape),
            "groups": 1,
            "positions": positions,
            "macs": int(np.prod(shape)) * positions,
            "pattern": "" if dense else "2:4",
            "reason": {"patch_embed.proj": "stem stays dense", "head": "classifier stays dense"}.get(name, ""),
            "density": 1.0 if dense else 0.5,
            "bad_groups": 0,
            "error_before_refit": None if dense else float(rng.uniform(0.1, 0.3)),
            "error_after_refit": None if dense else float(rng.uniform(0.03, 0.09)),
            "note": "",
            "targets": {
                "a100": {"eligible": not dense, "rule": "dense" if dense else "", "gain_low": 1.0, "gain_high": 1.31},
                "a40": {"eligible": not dense, "rule": "dense" if dense else "", "gain_low": 1.0, "gain_high": 1.24},
            },
            "spectrum": None,
        }
        if not dense:
            law = fit(weight)
            names = ("sigma", "edge", "ks", "spikes", "bulk_fraction", "rows", "cols")
            row["spectrum"] = {key: getattr(law, key) for key in names}
            spectra[name] = law.eigenvalues.astype(np.float32)
        layers.append(row)
    (out / "weights").mkdir(parents=True)
    for stage, tensors in state.items():
        save_file(tensors, out / "weights" / f"{stage}.safetensors")
    write(out, "layers.json", layers)
    save_file(spectra, out / "spectra.safetensors")


def write_engines(rng: np.random.Generator, out: Path) -> None:
    """Two engines for this CPU and two for GPUs, each with its dense twin."""
    for name in (DEPLOY, "onnxruntime-cpu-fp32", "tensorrt_rtx-sm80-fp16", "tensorrt_rtx-sm86-fp16"):
        runtime, target, precision = name.split("-")
        for suffix, weights in (("", "sparse"), (".dense", "dense")):
            folder = out / "engines" / f"{name}{suffix}"
            folder.mkdir(parents=True)
            file = "model.onnx" if runtime == "onnxruntime" else "model.engine"
            (folder / file).write_bytes(rng.bytes(20_000 + 3_000 * len(suffix)))
            here = target == "cpu"
            asked = {"precision": precision, "threads": 1, "sparse_weights": weights == "sparse"}
            manifest = {
                "schema": 1,
                "id": f"{name}{suffix}",
                "runtime": runtime,
                "target": target,
                "precision": precision,
                "weights": weights,
                "file": file,
                "sha256": digest(folder / file),
                "size": (folder / file).stat().st_size,
                "asked": asked,
                "read_back": {**asked, "provider": "CPUExecutionProvider" if here else "none"},
                "versions": {runtime: "1.2.3"},
                "source": {"file": "dense.onnx" if suffix else "model.onnx", "onnx": digest(out / "model.onnx")},
                "batch": [1, 8, 64],
                "threads": 1,
                "runnable_here": here,
                "why_not": "" if here else f"no NVIDIA GPU with compute capability {target[2]}.{target[3]} here",
                "notes": [],
            }
            write(folder, "engine.json", manifest)


def write_results(out: Path, seed: int) -> None:
    """results.json, samples.safetensors, disagreement.json, abstain.json and verdict.json."""
    samples, rows, top1, unseen = copy.deepcopy(_measured(seed))
    for name in ("tensorrt_rtx-sm80-fp16", "tensorrt_rtx-sm86-fp16"):
        why = f"no NVIDIA GPU with compute capability {name[15]}.{name[16]} here"
        rows.append({"id": name, "status": "not run", "why_not": why})
    folders = sorted(folder.name for folder in (out / "engines").iterdir())
    manifests = {name: json.loads((out / "engines" / name / "engine.json").read_text()) for name in folders}
    results = {
        "schema": 2,
        "confidence": 0.95,
        "machine": "a CPU with 2 cores",
        "validation": {"samples": VALIDATION, "classes": 10},
        "dense_top1": top1["dense"],
        "tuned_top1": top1["tuned"],
        "export_noise": noise(samples["onnx.sigma"], samples["onnx.error"], "fp32"),
        "engines": rows,
        "binds": {
            "certificate": digest(out / "certificate.json"),
            "onnx": {path.name: digest(path) for path in out.glob("*.onnx")},
            "engines": {name: manifest["sha256"] for name, manifest in manifests.items()},
        },
    }
    write(out, "results.json", results)
    save_file(samples, out / "samples.safetensors")
    write(out, "disagreement.json", unseen)
    rule = {key: unseen["rule"][key] for key in ("engine", "tau", "alpha", "confidence", "candidates", "statement")}
    write(out, "abstain.json", {"schema": 1, "classes": 10, **rule})
    write_verdict(out, results)


def write_verdict(out: Path, results: dict[str, Any]) -> None:
    """verdict.json in which every gate holds, with the measured values of results.json."""
    first = results["engines"][0]
    drop = 100 * (results["dense_top1"]["value"] - first["top1"]["value"])
    agree, ratio = first["agreement"], first["latency"]["ratio"]
    counts = json.loads((out / "certificate.json").read_text())["counts"]
    share = counts["certified"] / sum(counts.values())

    def gate(
        name: str, limit: float, measured: float, low: float | None, high: float | None, reason: str
    ) -> dict[str, Any]:
        values = {"limit": limit, "measured": measured, "low": low, "high": high}
        return {"name": name, **values, "verdict": "holds", "reason": reason}

    gates = [
        gate("max_accuracy_drop", 3.0, drop, None, drop + 0.9, f"At most {drop + 0.9:.2f} points are lost at 95 %."),
        gate("min_agreement", 0.9, agree["value"], agree["low"], None, "The lower bound is above the limit."),
        gate("max_violations", 0, first["certified"]["violations"], None, None, "Every certified label was kept."),
        gate("min_certified", 0.8, share, None, None, "Enough samples keep their label with the reserve to spare."),
        gate("min_speedup", 1.2, ratio["value"], ratio["low"], ratio["high"], "The whole interval is above the limit."),
    ]
    write(out, "verdict.json", {"verdict": "holds", "reason": "All 5 gates hold.", "deploy": DEPLOY, "gates": gates})


def write_bundle(
    out: Path, *, to: str = "validate", name: str = "quickstart", blocks: int = 2, width: int = 64, seed: int = 0
) -> Path:
    """Write a bundle as a run up to stage `to` leaves it.

    Args:
        out: a folder that does not exist yet.
        to: the last stage that ran, one of STAGES.
        name: the recipe's name.
        blocks: transformer blocks; each has four pruned layers.
        width: of the made-up network.
        seed: of everything drawn.
    """
    rng = np.random.default_rng(seed)
    ran = STAGES[: STAGES.index(to) + 1]
    out.mkdir(parents=True)
    (out / "recipe.toml").write_text(RECIPE.format(name=name), encoding="utf-8")
    validate = {"deploy": DEPLOY, "confidence": 0.95, "alpha": ALPHA, "cluster": ""}
    lock = {"schema": 1, "name": name, "validate": validate, "certify": {"reserve": RESERVE, "keep": KEEP}}
    write(out, "recipe.lock.json", lock)
    chain = {
        s: {"digest": hashlib.sha256(s.encode()).hexdigest(), "key": hashlib.sha256(s[::-1].encode()).hexdigest()}
        for s in ran
    }
    facts = {"mpdeploy": "0.1.0", "python": "3.12.4", "platform": "Linux x86_64", "cpu": "2 cores", "chain": chain}
    write(out, "provenance.json", {**facts, "packages": {"numpy": "2.1.0", "torch": "2.7.0", "onnxruntime": "1.22.0"}})
    write(
        out,
        "model.json",
        {"kind": "timm", "model": "vit_tiny_patch16_224", "num_classes": 10, "input_size": [1, 28, 28]},
    )
    keys = {"mean": [0.286], "std": [0.353], "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center"}
    write(out, "preprocessing.json", {"input_size": [1, 28, 28], "color": "gray", **keys})
    write(out, "classes.json", list(CLASSES))
    ids = {
        "calibration_ids": [f"train/{i:05d}" for i in range(256)],
        "certification_ids": [f"train/{i:05d}" for i in range(1000, 1000 + CERTIFICATION)],
        "validation_ids": [f"val/{i:05d}" for i in range(VALIDATION)],
    }
    write(
        out,
        "calibration.json",
        {"seed": 0, "split": "train", **ids, "data_identity": hashlib.sha256(b"data").hexdigest()},
    )
    write_weights(rng, out, blocks, width)
    if "tune" in ran:
        loss = [
            {"step": i, "loss": 0.9 * float(np.exp(-i / 60)) + 0.2 + float(rng.normal(0, 0.03))} for i in range(1, 157)
        ]
        write(out, "tune.json", {"epochs": 1, "loss": loss, "top1_held_out": [0.861, 0.902]})
    else:
        (out / "weights" / "tuned.safetensors").unlink()
    if "certify" in ran:
        ledger, certificate, _ = _certified(seed)
        save_file(ledger, out / "ledger.safetensors")
        weights = {stage: digest(out / "weights" / f"{stage}.safetensors") for stage in LADDER}
        bound = {"weights": weights, "preprocessing": digest(out / "preprocessing.json"), "precision": "float32"}
        bound["ids"] = hashlib.sha256("\n".join(ids["certification_ids"]).encode()).hexdigest()
        bound |= {"versions": {"torch": "2.7.0", "numpy": "2.1.0"}, "device": "2 cores", "batch": 64}
        write(out, "certificate.json", {**certificate, "ids": ids["certification_ids"], "binds": bound})
    if "export" in ran:
        for file in ("model.onnx", "dense.onnx"):
            (out / file).write_bytes(rng.bytes(30_000))
        write(out, "sparsity.json", {"schema": 1, "weights": [], "dense": []})
        facts = {"precision": "fp32", "weights": "sparse", "opset": 20, "eps_inf_median": 3.1e-6, "eps_inf_max": 9.4e-6}
        facts |= {"label_agreement": 1.0, "layer_norm_ops": 5, "bytes": 30_000}
        write(out, "export.json", {"files": {"model.onnx": facts, "dense.onnx": {**facts, "weights": "dense"}}})
    if "build" in ran:
        write_engines(rng, out)
    if "validate" in ran:
        write_results(out, seed)
    seal(out)
    return out
