"""export: ONNX files of the tuned network and of its dense twin, with the sparsity manifest."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpdeploy.artifact import Artifact, write_json
from mpdeploy.certify.ledger import columns, decided, eps_between
from mpdeploy.errors import StageFailed
from mpdeploy.recipe import Data, Export, Table
from mpdeploy.stage import Facts, Given, Stage
from mpdeploy.stages.environment import needs, versions
from mpdeploy.stages.images import open_images

# The same float32 formula in another order differs by rounding only: a graph that is off by more than this share of
# the logits' range computes something else (a tanh GELU alone is off by ten times less than this, an epsilon of 1e-2
# in a LayerNorm by a hundred times more; the ledger shows what lies between).
FP32_LIMIT = 1e-3


class Params(Table):
    """Which precisions, and where the images are on which the graphs are compared."""

    export: Export
    data: Data


def file_name(weights: str, precision: str) -> str:
    """Return the ONNX file's name: model.onnx, model.fp16.onnx, dense.onnx, dense.fp16.onnx."""
    stem = "model" if weights == "sparse" else "dense"
    return f"{stem}.onnx" if precision == "fp32" else f"{stem}.{precision}.onnx"


def asks(params: Params) -> Mapping[str, Any]:
    """The images are pinned by the source artefact."""
    return params.export.model_dump(mode="json")


def run(params: Params, given: Given, out: Path) -> Facts:
    """Export both networks in every precision asked, annotate them, and compare each with PyTorch."""
    needs("export", "torch", "timm", "onnx", "onnxscript", "onnxruntime" if _has("onnxruntime") else "onnxruntime-gpu")
    import onnx
    from safetensors.torch import load_file

    from mpdeploy.graph.export import export_onnx
    from mpdeploy.graph.sparsity import annotate, dumps
    from mpdeploy.models import rebuild

    table, source = params.export, given["source"]
    architecture = source.json("model.json")
    layers = given["prune"].json("layers.json")
    weights = {"sparse": given["tune"].path("tuned.safetensors"), "dense": source.path("dense.safetensors")}
    images = open_images(params.data, source)
    sample = np.concatenate(list(images.drawn("certification", 64))[:4])
    record: dict[str, Any] = {}
    total = len(table.precision) * len(weights)
    for kind, path in weights.items():
        module = rebuild(architecture, load_file(path))
        reference = given["certify"]
        expected = _certified(reference, "tuned" if kind == "sparse" else "dense", len(sample))
        for precision in table.precision:
            name = file_name(kind, precision)
            given.progress(f"exporting {name}", len(record), total)
            facts = export_onnx(
                module, tuple(architecture["input_size"]), out / name, precision=precision, opset=table.opset
            )
            if kind == "sparse":
                model = onnx.load(out / name)
                manifest = annotate(model, layers)
                onnx.save(model, out / name)
                if precision == table.precision[0]:
                    (out / "sparsity.json").write_text(dumps(manifest), encoding="utf-8")
            parity = compare_with_torch(out / name, sample, expected, precision)
            record[name] = {"precision": precision, "weights": kind, "opset": table.opset, **asdict(facts), **parity}
    given.progress("exporting", total, total)
    write_json(out / "export.json", {"files": record})
    return {name: row["eps_inf_max"] for name, row in record.items()}


def _has(package: str) -> bool:
    return versions(package)[package] != "not installed"


@dataclass(frozen=True)
class Expected:
    """A network's logits of the first certification samples, at the classes that the ledger keeps.

    Attributes:
        logits: float32 [n, T + 1].
        kept_classes: int32 [n, T].
        spread: largest minus smallest dense logit of any of these samples.
    """

    logits: NDArray[np.float32]
    kept_classes: NDArray[np.int32]
    spread: float


def _certified(certificate: Artifact, stage: str, count: int) -> Expected:
    from safetensors.numpy import load_file

    ledger = load_file(certificate.path("ledger.safetensors"))
    at = certificate.json("certificate.json")["stages"].index(stage)
    return Expected(ledger["logits"][:count, at], ledger["kept_classes"][:count], float(ledger["range"][:count].max()))


def compare_with_torch(path: Path, images: NDArray[np.float32], expected: Expected, precision: str) -> dict[str, Any]:
    """Run the exported file on ONNX Runtime's CPU and compare it with PyTorch's logits of the same images.

    Raises:
        StageFailed: not finite, or in fp32 further away than rounding explains.
    """
    from mpdeploy.runtimes.onnxruntime import OnnxSession

    with OnnxSession(path) as session:
        full = np.concatenate([session.run(images[i : i + 64]) for i in range(0, len(images), 64)])
    if not np.isfinite(full).all():
        raise StageFailed(
            f"{path.name} gives NaN or infinity on the certification images where PyTorch does not.",
            hint="fp16 overflows in this network: take fp16 out of export.precision."
            if precision == "fp16"
            else "the operator set may be at fault: try another export.opset.",
        )
    got = columns(full, expected.kept_classes)
    eps = eps_between(got, expected.logits)
    if precision == "fp32" and not float(eps.max()) <= FP32_LIMIT * expected.spread:
        raise StageFailed(
            f"{path.name} computes something else than the PyTorch network: its logits are off by {eps.max():.3g}, "
            f"{eps.max() / expected.spread:.2g} of their range; rounding explains at most {FP32_LIMIT:g}.",
            hint="the exporter translated an operator differently; the model needs another formulation of it.",
        )
    same = decided(got, expected.kept_classes) == decided(expected.logits, expected.kept_classes)
    return {
        "samples": len(images),
        "eps_inf_median": float(np.median(eps)),
        "eps_inf_max": float(eps.max()),
        "label_agreement": float(same.mean()),
    }


def ensures(made: Artifact) -> None:
    """Every annotated file agrees with its own bytes, and each twin has the same graph."""
    import onnx

    from mpdeploy.graph.inspect import first_difference
    from mpdeploy.graph.sparsity import check

    for name, row in made.json("export.json")["files"].items():
        if row["weights"] == "sparse":
            model = onnx.load(made.path(name))
            check(model)
            twin = file_name("dense", row["precision"])
            if difference := first_difference(model, onnx.load(made.path(twin))):
                raise StageFailed(
                    f"{twin} is not the same graph as {name}, so a speed-up against it would mean nothing: {difference}"
                )


STAGE = Stage(
    name="export",
    summary="write ONNX files of the tuned network and its dense twin, annotated and compared with PyTorch",
    takes=("source", "prune", "tune", "certify"),
    params=lambda recipe: Params(export=recipe.export, data=recipe.data),
    asks=asks,
    environment=lambda _: versions("torch", "onnx", "onnxscript"),
    run=run,
    ensures=ensures,
)
