"""build: engines of the exported files, each with its dense twin, and a manifest of what was asked and read back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mpdeploy.artifact import Artifact, sha256_of
from mpdeploy.errors import StageFailed
from mpdeploy.recipe import Build, Data, Engine, Table
from mpdeploy.stage import Facts, Given, Stage
from mpdeploy.stages.environment import needs, versions
from mpdeploy.stages.export import file_name
from mpdeploy.stages.images import open_images

PACKAGES = {"onnxruntime": ("onnxruntime", "onnxruntime-gpu"), "tensorrt": ("tensorrt",)}
PACKAGES["tensorrt_rtx"] = ("tensorrt-rtx",)

QUANTISED = "quantised.onnx"
"""The graph an int8 engine was built from stays beside it: what its precision should cost is computed from that."""


class Params(Table):
    """Which engines, and where the calibration images are."""

    build: Build
    data: Data


def asks(params: Params) -> Mapping[str, Any]:
    """The images are pinned by the source artefact."""
    return params.build.model_dump(mode="json")


def environment(params: Params) -> Mapping[str, str]:
    """An engine depends on the runtime's version and, for TensorRT, on the GPU it is built on."""
    found: dict[str, str] = {}
    for engine in params.build.engines:
        found |= versions(*PACKAGES[engine.runtime])
        if engine.runtime == "tensorrt":
            from mpdeploy.runtimes import probe

            found |= probe("tensorrt").identity
    return found


def run(params: Params, given: Given, out: Path) -> Facts:
    """Build every engine and its dense twin."""
    needs("build", "onnx")
    engines = params.build.engines
    built = 0
    for engine in engines:
        for weights in ("sparse", "dense"):
            name = engine.id if weights == "sparse" else f"{engine.id}.dense"
            given.progress(f"building {name}", built, 2 * len(engines))
            _build(engine, weights, params, given, out / "engines" / name)
            built += 1
    given.progress("building", built, built)
    return {"engines": [engine.id for engine in engines]}


def _build(engine: Engine, weights: str, params: Params, given: Given, folder: Path) -> None:
    """Build one engine into its own folder."""
    from mpdeploy.runtimes import EngineRequest, build

    folder.mkdir(parents=True)
    base = "fp32" if engine.precision == "int8" else engine.precision
    exported = given["export"].path(file_name(weights, base))
    quantised = None
    if engine.precision == "int8":
        quantised = _quantise(exported, folder / QUANTISED, engine.runtime, params, given)
    build(
        EngineRequest(
            onnx=quantised or exported,
            runtime=engine.runtime,
            target=engine.target,
            precision=engine.precision,
            weights=weights,
            batch=engine.batch,
            threads=engine.threads,
            exported=exported if quantised else None,
        ),
        folder,
    )


def _quantise(fp32: Path, out: Path, runtime: str, params: Params, given: Given) -> Path:
    """Quantise with the calibration images; never with validation images.

    TensorRT reads symmetric int8 activations only; ONNX Runtime's CPU kernels lose half as much with uint8 ones.
    """
    from mpdeploy.graph.quantize import to_int8

    images = open_images(params.data, given["source"])
    calibration = np.concatenate(list(images.drawn("calibration", 64)))
    to_int8(fp32, out, calibration, activations="uint8" if runtime == "onnxruntime" else "int8")
    return out


def ensures(made: Artifact) -> None:
    """Every engine file is the one its manifest describes, and every engine has its twin."""
    for name in made.facts["engines"]:
        for folder in (name, f"{name}.dense"):
            manifest = made.json(f"engines/{folder}/engine.json")
            if sha256_of(made.path(f"engines/{folder}/{manifest['file']}")) != manifest["sha256"]:
                raise StageFailed(f"The engine file of {folder} is not the one its manifest describes.")


STAGE = Stage(
    name="build",
    summary="build the engines and their dense twins, and read back what was built",
    takes=("source", "export"),
    params=lambda recipe: Params(build=recipe.build, data=recipe.data),
    asks=asks,
    environment=environment,
    run=run,
    ensures=ensures,
)
