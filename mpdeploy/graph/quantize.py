"""Static int8: QuantizeLinear/DequantizeLinear around Conv, MatMul and Gemm, ranges from calibration images."""

import tempfile
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto

from mpdeploy.errors import CorruptArtifact, RecipeError, StageFailed
from mpdeploy.graph import sparsity
from mpdeploy.graph.quiet import quiet

_OPS = ("Conv", "Gemm", "MatMul")
_CALIBRATION_BATCH = 8


def to_int8(
    fp32: Path,
    out: Path,
    calibration: NDArray[np.float32],
    *,
    method: Literal["minmax", "percentile"] = "minmax",
    percentile: float = 99.99,
    activations: Literal["int8", "uint8"] = "int8",
    exclude: Sequence[str] = (),
) -> dict[str, Any]:
    """Quantise the layers of an fp32 model; every zero weight stays zero, and the manifest is derived again.

    Weights are int8 with one scale per output channel and zero point 0, biases stay float32. A MatMul of two
    activations (attention scores) stays float32. The sparsity manifest, where the model carries one, is checked
    before, re-attached and checked after.

    Args:
        fp32: The model to quantise; not changed.
        out: File to write.
        calibration: Preprocessed images, float32 [n, C, H, W].
        method: "minmax" takes each activation's full range; "percentile" cuts outliers at `percentile` percent.
        percentile: In (0, 100]; read by "percentile" alone.
        activations: "int8" is symmetric (zero point 0), which TensorRT asks for; "uint8" is asymmetric, which uses
            the whole range after GELU and ReLU and is what ONNX Runtime advises on x86.
        exclude: Globs on node names and torch layer names to keep in float32, such as "head".

    Returns:
        {"quantized": nodes, "kept_float32": [node names], "calibration_samples", "method", "percentile" or None,
        "activations", "sparse_weights": number of weights in the manifest or None where there is no manifest,
        "onnxruntime": version}.

    Raises:
        RecipeError: A glob of `exclude` names nothing, or `percentile` is out of range.
        StageFailed: The calibration images do not fit the model or are not finite, quantisation failed, nothing was
            left to quantise, or a weight lost its pattern.
        CorruptArtifact: `fp32` is not what its manifest says.
    """
    import onnxruntime

    if not 0 < percentile <= 100:
        raise RecipeError(f"The calibration percentile is {percentile}, expected a number above 0 and up to 100.")
    model = onnx.load(fp32)
    manifest = _manifest(model)
    _refuse_unfit(model, calibration)
    chosen, kept = _choose(model, exclude)
    del model.graph.value_info[:]  # shapes that an exporter left behind contradict those of the quantised graph
    with tempfile.TemporaryDirectory(prefix="mpdeploy-int8-") as folder:
        written = Path(folder) / "int8.onnx"
        _quantize(model, written, calibration, chosen, method, percentile, activations)
        quantized = onnx.load(written)
    found = _quantized_nodes(quantized)
    lost = sorted(set(chosen) - found)
    if lost:
        raise StageFailed(f"The quantiser left {len(lost)} of {len(chosen)} layers in float32, first {lost[0]}.")
    if manifest is not None:
        sparsity.reattach(quantized, manifest)
        sparsity.check(quantized)
    onnx.checker.check_model(quantized)
    out.write_bytes(quantized.SerializeToString(deterministic=True))
    return {
        "quantized": len(chosen),
        "kept_float32": kept,
        "calibration_samples": len(calibration),
        "method": method,
        "percentile": percentile if method == "percentile" else None,
        "activations": activations,
        "sparse_weights": None if manifest is None else len(manifest["weights"]),
        "onnxruntime": onnxruntime.__version__,
    }


def _manifest(model: ModelProto) -> sparsity.Json | None:
    """The model's manifest, checked; None for a model that never had one."""
    if all(entry.key != sparsity.MANIFEST_KEY for entry in model.metadata_props):
        return None
    sparsity.check(model)
    return sparsity.read(model)


def _refuse_unfit(model: ModelProto, calibration: NDArray[np.float32]) -> None:
    expected = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim][1:]
    if calibration.ndim != 4 or list(calibration.shape[1:]) != expected or calibration.dtype != np.float32:
        raise StageFailed(
            f"The calibration images are {calibration.dtype} {list(calibration.shape)}, "
            f"expected float32 [n, {', '.join(map(str, expected))}].",
            hint="apply the model's own preprocessing",
        )
    if not len(calibration) or not np.isfinite(calibration).all():
        raise StageFailed("The calibration images are empty or hold NaN or infinite values.")


def _choose(model: ModelProto, exclude: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names of nodes to quantise (those with a constant weight), and of those that stay float32."""
    uses = sparsity.weight_uses(model)
    layers = {use.node: use.layer for use in uses if use.op in _OPS}
    unnamed = [node.op_type for node in model.graph.node if node.op_type in _OPS and not node.name]
    if unnamed:
        raise CorruptArtifact(f"A {unnamed[0]} node of the model has no name, so it cannot be chosen or excluded.")
    for glob in exclude:
        if not any(fnmatchcase(name, glob) for item in layers.items() for name in item):
            raise RecipeError(
                f"The int8 exclusion {glob!r} names no node and no layer of the model.",
                hint=f"layers are named like {next((layer for layer in layers.values() if layer), 'head')}",
            )
    chosen = [
        node
        for node, layer in layers.items()
        if not any(fnmatchcase(n, glob) for n in (node, layer) for glob in exclude)
    ]
    if not chosen:
        raise StageFailed("The model has no Conv, MatMul or Gemm left to quantise.", hint="exclude fewer layers")
    kept = [node.name for node in model.graph.node if node.op_type in _OPS and node.name not in set(chosen)]
    return chosen, kept


def _quantize(
    model: ModelProto,
    written: Path,
    calibration: NDArray[np.float32],
    chosen: list[str],
    method: str,
    percentile: float,
    activations: str,
) -> None:
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    symmetric = activations == "int8"
    options = {
        "WeightSymmetric": True,
        "ActivationSymmetric": symmetric,
        "QuantizeBias": False,  # TensorRT's parser refuses int32 biases
        **({"CalibPercentile": percentile} if method == "percentile" else {}),
    }
    name = model.graph.input[0].name
    try:
        with quiet():
            quantize_static(
                model,
                written,
                _reader(name, calibration),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(_OPS),
                nodes_to_quantize=chosen,
                per_channel=True,
                activation_type=QuantType.QInt8 if symmetric else QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.Percentile if method == "percentile" else CalibrationMethod.MinMax,
                extra_options=options,
            )
    except Exception as error:  # the quantiser has no error class of its own: it raises whatever numpy or ONNX raise
        raise StageFailed(f"Static int8 quantisation failed: {type(error).__name__}: {error}.") from error


def _reader(name: str, calibration: NDArray[np.float32]) -> Any:
    """The calibration images in small batches, from memory."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
        def __init__(self) -> None:
            self._batches: Iterator[NDArray[np.float32]] = iter(
                calibration[start : start + _CALIBRATION_BATCH]
                for start in range(0, len(calibration), _CALIBRATION_BATCH)
            )

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            batch = next(self._batches, None)
            return None if batch is None else {name: batch}

    return Reader()


def _quantized_nodes(model: ModelProto) -> set[str]:
    """Nodes that really read an int8 weight: what was built, not what was asked for."""
    return {use.node for use in sparsity.weight_uses(model) if use.dtype == "int8" and use.zero_is_zero}
