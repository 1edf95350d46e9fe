"""A small bundle with made-up numbers that agree with each other: logits, ledger, certificate, results, weights.

Only tests of what reads a bundle use it. Everything is drawn from one seed and then computed by the definitions of the
bundle, so that a reader which recomputes a number finds the one that is written.
"""

import hashlib
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from scipy.stats import beta

from mpdeploy.pruning.spectrum import fit

STAGES = ("source", "prune", "tune", "certify", "export", "build", "validate")
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
DEPLOY = "onnxruntime-cpu-int8"
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


def interval(correct: int, n: int) -> dict[str, Any]:
    """Clopper-Pearson at 95 %."""
    low = float(beta.ppf(0.025, correct, n - correct + 1)) if correct else 0.0
    high = float(beta.ppf(0.975, correct + 1, n - correct)) if correct < n else 1.0
    return {"correct": correct, "n": n, "value": correct / n, "low": low, "high": high}


def slack(z: np.ndarray, y: np.ndarray) -> np.ndarray:
    """z_y minus the best rival, per sample."""
    z = z.astype(np.float64)
    rows = np.arange(len(z))
    rivals = z.copy()
    rivals[rows, y] = -np.inf
    return z[rows, y] - rivals.max(1)


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


def ledger(z: dict[str, np.ndarray], labels: np.ndarray, share: float) -> dict[str, np.ndarray]:
    """The arrays of ledger.safetensors from the logits of each stage."""
    y = z["dense"].argmax(1)
    last = slack(z["tuned"], y)
    reserve = share * (z["dense"].max(1) - z["dense"].min(1)).astype(np.float64)
    verdict = np.where(last > reserve, 2, np.where(last > 0, 1, 0)).astype(np.uint8)
    return {
        "labels": labels,
        **{k: v.astype(np.float32) for k, v in z.items()},
        "dense_label": y.astype(np.int64),
        "margin": slack(z["dense"], y),
        "slack": last,
        "reserve": reserve,
        "verdict": verdict,
    }


def spent(rungs: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Per stage after the first, what certificate.json and results.json say it spent."""
    names = list(rungs)
    dense, final = rungs[names[0]].astype(np.float64), rungs[names[-1]].astype(np.float64)
    y = dense.argmax(1)
    rows = np.arange(len(y))
    out = []
    for before, after in pairwise(names):
        change = rungs[after].astype(np.float64) - rungs[before]
        pair = change - change[rows, y][:, None]
        margins = dense[rows, y][:, None] - dense
        margins[rows, y] = np.inf
        share = np.where(margins == np.inf, -np.inf, pair / margins).max(1)
        lost = slack(final, y) <= 0
        eps = np.abs(change).max(1)
        out.append(
            {
                "stage": after,
                "eps_inf_median": float(np.median(eps)),
                "eps_inf_max": float(eps.max()),
                "share_median": float(np.median(share)),
                "share_p99": float(np.percentile(share, 99)),
                "flips_alone": int((slack(dense + change, y) <= 0).sum()),
                "flips_but_for": int((lost & (slack(final - change, y) > 0)).sum()),
            }
        )
    return out


def draw_logits(rng: np.random.Generator, n: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Logits of dense, pruned and tuned [n, 10] and labels that the dense network mostly gets right."""
    labels = rng.integers(0, 10, n)
    dense = rng.normal(0, 1.6, (n, 10)).astype(np.float32)
    dense[np.arange(n), labels] += rng.gamma(5.0, 1.5, n).astype(np.float32)
    pruned = (0.88 * dense + rng.normal(0, 0.7, dense.shape)).astype(np.float32)
    tuned = (dense + 0.55 * (pruned - dense) + rng.normal(0, 0.1, dense.shape)).astype(np.float32)
    return {"dense": dense, "pruned": pruned, "tuned": tuned}, labels


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
                "batch": [1, 8, 64],
                "threads": 1,
                "runnable_here": here,
                "why_not": "" if here else f"no NVIDIA GPU with compute capability {target[2]}.{target[3]} here",
                "notes": [],
            }
            write(folder, "engine.json", manifest)


def write_results(rng: np.random.Generator, out: Path, certification: dict[str, np.ndarray], claim: np.ndarray) -> None:
    """results.json, samples.safetensors and verdict.json."""
    z, labels = draw_logits(rng, 600)
    y = z["dense"].argmax(1)
    n, y0 = len(y), certification["dense"].argmax(1)
    samples: dict[str, np.ndarray] = {"labels": labels, "dense": z["dense"], "tuned": z["tuned"]}
    rows: list[dict[str, Any]] = []
    for name, noise, speed in ((DEPLOY, 0.06, 1.9), ("onnxruntime-cpu-fp32", 1e-5, 1.01)):
        logits = (z["tuned"] + rng.normal(0, noise, z["tuned"].shape)).astype(np.float32)
        there = (certification["tuned"] + rng.normal(0, noise, certification["tuned"].shape)).astype(np.float32)
        twin = 0.0061 * rng.gamma(60, 1 / 60, 400) + 0.001 * (rng.random(400) < 0.02)
        times = 0.0061 / speed * rng.gamma(60, 1 / 60, 400)
        samples |= {f"engine.{name}": logits, f"certification.{name}": there}
        samples |= {f"latency.{name}": times, f"latency.{name}.dense": twin}
        got = logits.argmax(1)
        broken = np.flatnonzero((claim == 2) & (there.argmax(1) != y0))
        ratio = float(np.median(twin) / np.median(times))
        rows.append(
            {
                "id": name,
                "status": "measured",
                "why_not": "",
                "top1": interval(int((got == labels).sum()), n),
                "agreement": interval(int((got == y).sum()), n),
                "flips": {
                    "dense_right_engine_wrong": int(((y == labels) & (got != labels)).sum()),
                    "dense_wrong_engine_right": int(((y != labels) & (got == labels)).sum()),
                    "mcnemar_p": 0.21,
                },
                "certified": {
                    "n": int((claim == 2).sum()),
                    "violations": len(broken),
                    "violating_ids": [f"train/{i:05d}" for i in broken],
                    "kept_broken": 1,
                },
                "spent": spent({**z, "engine": logits}),
                "finite": True,
                "batch_consistent": True,
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
    for name in ("tensorrt_rtx-sm80-fp16", "tensorrt_rtx-sm86-fp16"):
        why = f"no NVIDIA GPU with compute capability {name[15]}.{name[16]} here"
        rows.append({"id": name, "status": "not run", "why_not": why})
    results = {
        "schema": 1,
        "confidence": 0.95,
        "machine": "a CPU with 2 cores",
        "validation": {"samples": n, "classes": 10},
        "dense_top1": interval(int((y == labels).sum()), n),
        "tuned_top1": interval(int((z["tuned"].argmax(1) == labels).sum()), n),
        "engines": rows,
    }
    write(out, "results.json", results)
    save_file(samples, out / "samples.safetensors")
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
    lock = {"schema": 1, "name": name, "validate": {"deploy": DEPLOY, "confidence": 0.95}, "certify": {"reserve": 0.01}}
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
    n = 400
    ids = {
        "calibration_ids": [f"train/{i:05d}" for i in range(256)],
        "certification_ids": [f"train/{i:05d}" for i in range(1000, 1000 + n)],
    }
    ids["validation_ids"] = [f"val/{i:05d}" for i in range(600)]
    write(
        out,
        "calibration.json",
        {"seed": 0, "split": "train", **ids, "data_identity": hashlib.sha256(b"data").hexdigest()},
    )
    write_weights(rng, out, blocks, width)
    z, labels = draw_logits(rng, n)
    arrays = ledger(z, labels, 0.01)
    if "tune" in ran:
        loss = [
            {"step": i, "loss": 0.9 * float(np.exp(-i / 60)) + 0.2 + float(rng.normal(0, 0.03))} for i in range(1, 157)
        ]
        write(out, "tune.json", {"epochs": 1, "loss": loss, "top1_held_out": [0.861, 0.902]})
    else:
        (out / "weights" / "tuned.safetensors").unlink()
    if "certify" in ran:
        save_file(arrays, out / "ledger.safetensors")
        counts = {k: int((arrays["verdict"] == i).sum()) for i, k in enumerate(("flipped", "kept", "certified"))}
        write(
            out,
            "certificate.json",
            {
                "schema": 1,
                "samples": n,
                "classes": 10,
                "ids": ids["certification_ids"],
                "reserve": 0.01,
                "stages": list(z),
                "counts": counts,
                "top1": {k: int((v.argmax(1) == labels).sum()) for k, v in z.items()},
                "spent": spent(z),
                "margin_median": float(np.median(arrays["margin"])),
                "slack_median": float(np.median(arrays["slack"])),
                "digests": {s: digest(out / "weights" / f"{s}.safetensors") for s in z},
            },
        )
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
        write_results(rng, out, z, arrays["verdict"])
    seal(out)
    return out
