"""The bundle: everything a release needs, in one folder that can be copied to another machine.

It holds copies of the artefacts' files under plain names, the recipe, the verdict and the report, and a manifest.json
with the SHA-256 of each. `mpdeploy verify` (or verify.py alone) checks it without the store.
"""

import platform
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mpdeploy import __version__
from mpdeploy.artifact import MANIFEST, Artifact, describe_files, dumps, read_json, write_json
from mpdeploy.errors import CorruptArtifact, RecipeError
from mpdeploy.gates import judge
from mpdeploy.recipe import RecipeFile
from mpdeploy.rule_files import rule_files
from mpdeploy.runtimes import cpu_name
from mpdeploy.stages.environment import versions
from mpdeploy.store import holding
from mpdeploy.unseen import claims

KIND = "mpdeploy-bundle"
PACKAGES = (
    "numpy", "scipy", "torch", "torchvision", "timm", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu",
    "tensorrt", "tensorrt-rtx", "safetensors",
)  # fmt: skip

# Where each file of the bundle comes from: name in the bundle -> (stage, name in its artefact).
PARTS = {
    "model.json": ("source", "model.json"),
    "preprocessing.json": ("source", "preprocessing.json"),
    "classes.json": ("source", "classes.json"),
    "weights/dense.safetensors": ("source", "dense.safetensors"),
    "weights/pruned.safetensors": ("prune", "pruned.safetensors"),
    "weights/tuned.safetensors": ("tune", "tuned.safetensors"),
    "spectra.safetensors": ("prune", "spectra.safetensors"),
    "macs.json": ("prune", "macs.json"),
    "orders.json": ("prune", "orders.json"),
    "reconstruction.json": ("prune", "reconstruction.json"),
    "allocation.json": ("prune", "allocation.json"),
    "tune.json": ("tune", "tune.json"),
    "certificate.json": ("certify", "certificate.json"),
    "ledger.safetensors": ("certify", "ledger.safetensors"),
    "sparsity.json": ("export", "sparsity.json"),
    "export.json": ("export", "export.json"),
    "results.json": ("validate", "results.json"),
    "samples.safetensors": ("validate", "samples.safetensors"),
}


def chain(artifacts: Mapping[str, Artifact]) -> dict[str, str]:
    """Return {stage: digest}."""
    return {name: artifact.digest for name, artifact in artifacts.items()}


def is_current(folder: Path, file: RecipeFile, artifacts: Mapping[str, Artifact], candidates: int) -> bool:
    """Tell whether a bundle was made from these very artefacts and this very recipe by this version.

    What it claims of unseen images weakens with every further engine that is measured on the same validation images.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return False
    made = read_json(manifest)
    lock = folder / "recipe.lock.json"
    same = made.get("chain") == chain(artifacts) and made.get("mpdeploy") == __version__
    counted = folder / "disagreement.json"
    return bool(
        same
        and lock.is_file()
        and read_json(lock) == lock_of(file)
        and counted.is_file()
        and read_json(counted)["candidates"] == candidates
    )


def lock_of(file: RecipeFile) -> dict[str, Any]:
    """Return the resolved recipe, paths as the user wrote them."""
    return {**file.written.locked(), "sets": list(file.sets)}


def assemble(
    folder: Path,
    file: RecipeFile,
    artifacts: Mapping[str, Artifact],
    candidates: int,
    render: Callable[[Path], str],
    progress: Callable[[int, int], None],
) -> Path:
    """Write the bundle beside its place and move it there when it is whole.

    Args:
        folder: where the bundle goes; an older bundle there is replaced.
        file: the recipe.
        artifacts: one per stage.
        candidates: engines measured on the same validation images.
        render: turns the bundle's folder into the HTML report.
        progress: told (done, total).

    Raises:
        RecipeError: the folder is there and is not a bundle.
    """
    if folder.exists() and not _is_bundle(folder):
        raise RecipeError(
            f"{folder} exists and is not an mpdeploy bundle; it is left as it is.", hint="pass --out FOLDER."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft, old = folder.with_name(f".{folder.name}.draft"), folder.with_name(f".{folder.name}.old")
    with holding(folder.with_name(f".{folder.name}.lock"), lambda: None):
        # A killed run may have left either; a killed swap leaves the old bundle under its hidden name.
        for leftover in (draft, old):
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            _fill(draft, file, artifacts, candidates, render, progress)
            if folder.exists():
                folder.rename(old)
            draft.rename(folder)
        finally:
            for leftover in (draft, old):
                shutil.rmtree(leftover, ignore_errors=True)
    return folder


def _is_bundle(folder: Path) -> bool:
    manifest = folder / MANIFEST
    return manifest.is_file() and read_json(manifest).get("kind") == KIND


def _fill(
    draft: Path,
    file: RecipeFile,
    artifacts: Mapping[str, Artifact],
    candidates: int,
    render: Callable[[Path], str],
    progress: Callable[[int, int], None],
) -> None:
    """Write every file of the bundle."""
    copies = _copies(artifacts)
    for done, (name, source) in enumerate(sorted(copies.items())):
        progress(done, len(copies))
        target = draft / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    progress(len(copies), len(copies))
    (draft / "recipe.toml").write_text(file.text, encoding="utf-8")
    write_json(draft / "recipe.lock.json", lock_of(file))
    write_json(draft / "calibration.json", _draws(artifacts))
    write_json(draft / "layers.json", _layers(file, artifacts))
    results, certificate = artifacts["validate"].json("results.json"), artifacts["certify"].json("certificate.json")
    write_json(draft / "verdict.json", judge(file.recipe.gates, file.recipe.validate_.deploy, results, certificate))
    stated, rule = claims(artifacts, file.recipe.validate_, candidates)
    write_json(draft / "disagreement.json", stated)
    if rule is not None:
        for name, text in rule_files(rule, certificate["classes"], file.recipe.validate_.deploy).items():
            (draft / name).write_text(text, encoding="utf-8")
    write_json(draft / "provenance.json", _provenance(artifacts))
    (draft / "report.html").write_text(render(draft), encoding="utf-8")
    manifest = {
        "schema": 1,
        "kind": KIND,
        "name": file.recipe.name,
        "mpdeploy": __version__,
        "chain": chain(artifacts),
        "files": describe_files(draft),
    }
    (draft / MANIFEST).write_text(dumps(manifest), encoding="utf-8")


def _copies(artifacts: Mapping[str, Artifact]) -> dict[str, Path]:
    """Return where each copied file comes from."""
    copies = {name: artifacts[stage].path(file) for name, (stage, file) in PARTS.items()}
    for stage, suffix in (("export", ".onnx"), ("build", "")):
        artifact = artifacts[stage]
        copies |= {name: artifact.path(name) for name in artifact.manifest["files"] if name.endswith(suffix)}
    return copies


def _draws(artifacts: Mapping[str, Artifact]) -> dict[str, Any]:
    """Return which images each stage saw."""
    record = artifacts["source"].json("calibration.json")
    return {**record, "validation_ids": artifacts["validate"].json("validation.json")["ids"]}


def _layers(file: RecipeFile, artifacts: Mapping[str, Artifact]) -> list[dict[str, Any]]:
    """Return the layer table with what each target makes of it."""
    from mpdeploy.planning import on_targets, target_names

    names = target_names(file.recipe)
    rows = artifacts["prune"].json("layers.json")
    return [{**row, "targets": on_targets(row, names, file.recipe)} for row in rows]


def _provenance(artifacts: Mapping[str, Artifact]) -> dict[str, Any]:
    """Return what made this bundle. Time and host name are left out: equal work gives equal bytes."""
    return {
        "mpdeploy": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "packages": {name: v for name, v in versions(*PACKAGES).items() if v != "not installed"},
        "chain": {name: {"digest": a.digest, "key": a.manifest["key"]} for name, a in artifacts.items()},
    }


def check_is_bundle(folder: Path) -> None:
    """Refuse a folder that is not a bundle.

    Raises:
        RecipeError: there is no such folder, or it holds no bundle manifest.
        CorruptArtifact: its manifest can't be read.
    """
    if not (folder / MANIFEST).is_file():
        raise RecipeError(f"{folder} is not a bundle: it holds no {MANIFEST}.", hint="`mpdeploy run RECIPE` makes one.")
    if not isinstance(read_json(folder / MANIFEST), dict):
        raise CorruptArtifact(f"{folder / MANIFEST} is not a bundle manifest.")
