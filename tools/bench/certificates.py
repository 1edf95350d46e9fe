"""What certificates say on real networks: labels preserved, certified by each test, tightness, noise floors, and cost.

Each case is a run of the whole compiler on a shipped recipe, with another pattern or without tuning; the numbers are
read from the certificate.json and results.json that it wrote. Cost is the ledger over the bare forwards, in turns on
the same batches. Cases that results/certificates.json already holds are kept. Run from the repository:

    python tools/bench/certificates.py [--only quickstart vit cnn cost] [--scratch FOLDER]
"""

import argparse
import datetime
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from PIL import Image

import mpdeploy
from mpdeploy.artifact import read_json
from mpdeploy.certify.ledger import joined, rows_of
from mpdeploy.data import open_dataset
from mpdeploy.graph.program import read_rewritten
from mpdeploy.preprocessing import Preprocessing
from mpdeploy.recipe import Data, load_recipe
from mpdeploy.runtimes import cpu_name
from mpdeploy.runtimes.onnxruntime import OnnxSession
from mpdeploy.runtimes.torch_eager import TorchSession
from mpdeploy.stages.images import exact_logits
from mpdeploy.stages.noise import noise_of

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results" / "certificates.json"
GOAL = 1.05
REPEATS = 5
NOISE = 64
CROPS = {"train": 20, "val": 40}
ENGINES = "[" + ", ".join(f'{{runtime="onnxruntime", precision="{p}"}}' for p in ("fp32", "int8")) + "]"
COMMON = (f"build.engines={ENGINES}", "validate.blocks=4", "validate.calls=1")
OPEN_GATES = ("gates.max_accuracy_drop=100.0", "gates.min_agreement=0.0")

# Network -> recipe, what of it is changed, and the cases: (pattern, epochs of tuning, samples to try proofs on).
NETWORKS: dict[str, tuple[str, tuple[str, ...], tuple[tuple[str, int, int], ...]]] = {
    "quickstart": (
        "quickstart.toml",
        ('export.precision=["fp32", "fp16"]', "gates.min_certified=0.0"),
        (("12:16", 0, 0), ("2:4", 0, 8), ("2:4", 1, 0), ("1:4", 0, 0), ("1:4", 1, 0)),
    ),
    "vit": (
        "elpv.toml",
        ("data.certification=256", "validate.samples=256", 'export.precision=["fp32", "fp16"]'),
        (("12:16", 0, 0), ("2:4", 0, 0), ("2:4", 1, 0), ("1:4", 0, 0)),
    ),
    "cnn": (
        "efficientnet_lite0.toml",
        ('data.kind="folder"', 'data.name=""', "data.calibration=96", "data.certification=100",
         'export.precision=["fp32", "fp16"]', "validate.samples=200", "tune.hard_weight=0.0"),
        (("12:16", 0, 0), ("2:4", 0, 0), ("2:4", 1, 0)),
    ),
}  # fmt: skip


def write_crops(folder: Path) -> Path:
    """Write an image folder of random crops of the twenty photos that a package ships, ten for each split.

    A folder needs every class on both sides, and no photo is on both: all are of one class, and no top-1 is taken.
    """
    photos = open_dataset(Data.model_validate({"kind": "packaged", "name": "imagenet-samples"}))
    rng = np.random.default_rng(0)
    for split, each in CROPS.items():
        source = photos.train if split == "train" else photos.val
        for index in range(len(source.ids)):
            (photo,) = source.load([index])
            for k in range(each):
                side = int(rng.uniform(0.4, 1.0) * min(photo.shape[:2]))
                y, x = (int(rng.integers(0, size - side + 1)) for size in photo.shape[:2])
                image = Image.fromarray(photo[y : y + side, x : x + side]).resize((256, 256), Image.Resampling.BICUBIC)
                home = folder / split / "photo"
                home.mkdir(parents=True, exist_ok=True)
                image.save(home / f"{index}-{k}.png")
    return folder


def run_case(network: str, pattern: str, epochs: int, proofs: int, scratch: Path) -> dict[str, Any]:
    """Run the compiler on one case and return what its certificate and results say."""
    recipe, changes, _ = NETWORKS[network]
    sets = [*COMMON, *OPEN_GATES, *changes, f'prune.pattern="{pattern}"', f"tune.epochs={epochs}"]
    sets.append(f"certify.proofs={proofs}")
    if network == "cnn":
        sets.append(f'data.path="{scratch / "crops"}"')
    data = load_recipe(ROOT / "recipes" / recipe, sets).recipe.data
    start = time.perf_counter()
    done = mpdeploy.run(ROOT / "recipes" / recipe, sets=sets, store=scratch / "store", out=scratch / "bundle")
    assert done.bundle is not None
    certificate, results = (read_json(done.bundle / name) for name in ("certificate.json", "results.json"))
    unseen = read_json(done.bundle / "disagreement.json")
    n = certificate["samples"]
    return {
        "network": network,
        "pattern": pattern,
        "epochs": epochs,
        "seconds": round(time.perf_counter() - start, 1),
        "samples": n,
        "classes": certificate["classes"],
        "certified_with_reserve": certificate["counts"]["certified"] / n,
        "preserved": certificate["tests"]["pairwise"] / n,
        "certified_by": {name: k / n for name, k in certificate["tests"].items()},
        "reference": certificate["reference"],
        "spent": certificate["spent"],
        "margin_median": certificate["margin_median"],
        "export_noise": results["export_noise"],
        "engines": {row["id"]: engine_row(row, unseen) for row in results["engines"]},
        "fp16_on_this_cpu": fp16_row(done.bundle, read_json(done.bundle / "calibration.json")["validation_ids"], data),
        "proofs": proofs_row(certificate["proofs"]),
    }


def fp16_row(bundle: Path, ids: list[str], data: Data) -> dict[str, Any]:
    """Return the noise floor of the float16 graph as ONNX Runtime's CPU computes it: in float32 between casts."""
    split = open_dataset(data).val
    place = {name: index for index, name in enumerate(split.ids)}
    few = split.load([place[name] for name in ids[:NOISE]])
    images = Preprocessing.from_json(read_json(bundle / "preprocessing.json")).apply(few)
    path = bundle / "model.fp16.onnx"
    with OnnxSession(path) as session:
        logits = session.run(images)
    return noise_of(read_rewritten(path), "fp16", images, logits).facts


def engine_row(row: Mapping[str, Any], unseen: Mapping[str, Any]) -> dict[str, Any]:
    """Return what one engine did to the margins, and its error over its noise floor."""
    own = unseen["engines"][row["id"]]
    return {
        "agreement": row["agreement"]["value"],
        "certified_lost": row["certified"]["violations"],
        "spent": row["spent"][-1],
        "noise_floor": row["noise_floor"],
        "disagreement_upper": own["upper"],
        "candidates": unseen["candidates"],
    }


def proofs_row(proofs: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return each proof's states and, of the data path, every bound over what was measured."""
    if proofs is None:
        return None
    path = proofs["data_path"]
    tightness = [s["eta_max"] / s["measured_max"] for s in path["steps"] if s["measured_max"] and s["eta_max"]]
    return {
        "real_arithmetic": proofs["real_arithmetic"],
        "envelope": proofs["envelope"],
        "claims": path["claims"],
        "budget": path["budget"],
        "critical_lambda2": path["critical_lambda2"],
        "bound_over_measured_per_step": {
            "lowest": min(tightness, default=None),
            "median": float(np.median(tightness)) if tightness else None,
            "highest": max(tightness, default=None),
        },
    }


def cost(name: str, size: int, classes: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """Time three networks' forwards with and without the ledger behind them, in turns on the same batches."""
    torch.manual_seed(0)
    modules = [timm.create_model(name, num_classes=classes, **options).eval() for _ in range(3)]
    stages = dict(zip(("dense", "pruned", "tuned"), map(TorchSession, modules), strict=True))
    rng = np.random.default_rng(0)
    batches = [rng.normal(size=(32, options.get("in_chans", 3), size, size)).astype(np.float32) for _ in range(4)]
    labels = rng.integers(0, classes, 32)

    def bare() -> object:
        return [[session.run(batch) for session in stages.values()] for batch in batches]

    def ledger() -> object:
        return joined([rows_of(labels, {k: s.run(batch) for k, s in stages.items()}, 16) for batch in batches])

    arms: dict[str, Callable[[], object]] = {"bare": bare, "ledger": ledger}
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    bare()
    for repeat in range(REPEATS):
        for arm in list(arms) if repeat % 2 == 0 else list(arms)[::-1]:
            start = time.perf_counter()
            arms[arm]()
            seconds[arm].append(time.perf_counter() - start)
    start = time.perf_counter()
    exact_logits(modules[0], batches[0][:8])
    double = time.perf_counter() - start
    ratios: NDArray[np.float64] = np.array(seconds["ledger"]) / np.array(seconds["bare"])
    ratio = float(np.median(seconds["ledger"]) / np.median(seconds["bare"]))
    # A run has 512 certification samples by default, and 8 of them are run in float64 too.
    per_sample = float(np.median(seconds["bare"])) / (3 * 128)
    return {
        "model": name,
        "classes": classes,
        "images": 128,
        "ratio": round(ratio, 4),
        "ratio_lowest": round(float(ratios.min()), 4),
        "ratio_highest": round(float(ratios.max()), 4),
        "goal": GOAL,
        "met": ratio <= GOAL,
        "float64_of_8_samples_over_512_samples": round(double / (3 * 512 * per_sample), 4),
    }


COSTS: tuple[tuple[str, int, int, dict[str, Any]], ...] = (
    ("vit_small_patch16_224", 224, 1000, {}),
    ("resnet18", 224, 1000, {}),
    ("vit_tiny_patch16_224", 28, 10,
     {"img_size": 28, "patch_size": 4, "in_chans": 1, "embed_dim": 128, "depth": 4, "num_heads": 2}),
)  # fmt: skip


def write(result: dict[str, Any]) -> None:
    """Write results/certificates.json with what it was measured on."""
    result["measured_on"] = {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "date": datetime.date.today().isoformat(),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("numpy", "torch", "timm", "onnxruntime", "mpdeploy")},
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[*NETWORKS, "cost"], choices=[*NETWORKS, "cost"])
    parser.add_argument("--scratch", type=Path, default=Path("bench-certificates"))
    options = parser.parse_args()
    scratch = options.scratch.absolute()
    result = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"cases": [], "cost": []}
    if "cnn" in options.only and not (scratch / "crops").is_dir():
        write_crops(scratch / "crops")
    have = {(row["network"], row["pattern"], row["epochs"]) for row in result["cases"]}
    for network in [name for name in NETWORKS if name in options.only]:
        for pattern, epochs, proofs in NETWORKS[network][2]:
            if (network, pattern, epochs) not in have:
                print(f"{network} {pattern}, {epochs} epochs", file=sys.stderr)
                result["cases"].append(run_case(network, pattern, epochs, proofs, scratch))
                write(result)
    if "cost" in options.only:
        result["cost"] = [cost(*row) for row in COSTS]
        write(result)
    for row in result["cases"]:
        tests = ", ".join(f"{name} {share:.3f}" for name, share in row["certified_by"].items())
        noise = ", ".join(
            f"{name} {own['noise_floor']['ratio_rms']:.2f}"
            for name, own in row["engines"].items()
            if own["noise_floor"]
        )
        noise += f", fp16 {row['fp16_on_this_cpu']['ratio_rms']:.2f}"
        print(f"{row['network']:10} {row['pattern']:6} {row['epochs']} epochs: {tests}; error/sigma {noise}")
    for row in result["cost"]:
        print(f"{row['model']}: ledger over bare forwards {row['ratio']:.3f} (goal {row['goal']})")


if __name__ == "__main__":
    main()
