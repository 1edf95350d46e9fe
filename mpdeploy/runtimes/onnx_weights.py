"""Reads, in an ONNX file, which element types the weighted operators store and compute in."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# What multiplies by weights, in ONNX and in ONNX Runtime's fused and quantised spellings.
_CONVOLUTIONS = {"Conv", "ConvTranspose", "ConvInteger", "FusedConv", "NhwcFusedConv", "QLinearConv"}
_PRODUCTS = {"MatMul", "FusedMatMul", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul"}
_WEIGHTED = _CONVOLUTIONS | _PRODUCTS | {"Gemm", "FusedGemm", "QGemm", "Attention", "QAttention"}
# What may stand between a stored weight and its operator.
_TRANSPARENT = {
    "Transpose",
    "Reshape",
    "Squeeze",
    "Unsqueeze",
    "Identity",
    "Cast",
    "DequantizeLinear",
    "QuantizeLinear",
}


@dataclass(frozen=True)
class ComputeWeight:
    """One constant weight of one weighted operator.

    Args:
        op: The operator's type.
        initializer: Name of the stored tensor.
        stored: ONNX element type in the file, for example "FLOAT16".
        computed: Element type that reaches the operator: "FLOAT" where a Cast or DequantizeLinear stands between.
        elements: Number of values.
        zeros: How many of them are exactly zero.
    """

    op: str
    initializer: str
    stored: str
    computed: str
    elements: int
    zeros: int


def compute_weights(path: Path) -> list[ComputeWeight]:
    """The constant weights (two or more axes) of all weighted operators in a file, in execution order."""
    import onnx

    graph = onnx.load(path).graph
    stored = {tensor.name: tensor for tensor in graph.initializer if len(tensor.dims) >= 2}
    producers = {name: node for node in graph.node for name in node.output}
    found = []
    for node in graph.node:
        if node.op_type not in _WEIGHTED:
            continue
        for name in node.input:
            tensor, computed = _trace(name, stored, producers)
            if tensor is None:
                continue
            kind = onnx.TensorProto.DataType.Name(tensor.data_type)
            values = onnx.numpy_helper.to_array(tensor)
            zeros = int(values.size - np.count_nonzero(values))
            found.append(ComputeWeight(node.op_type, tensor.name, kind, computed or kind, int(values.size), zeros))
    return found


def histogram(path: Path) -> dict[str, int]:
    """How often each operator occurs; operators outside ONNX's own domain are spelt "domain::Operator"."""
    import onnx

    nodes = onnx.load(path, load_external_data=False).graph.node
    names = (f"{node.domain}::{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type for node in nodes)
    return dict(sorted(Counter(names).items()))


def tensor_type(text: str) -> str:
    """Numpy's name of ONNX Runtime's "tensor(float)"."""
    inner = text.removeprefix("tensor(").removesuffix(")")
    return {"float": "float32", "double": "float64"}.get(inner, inner)


def _trace(name: str, stored: dict[str, Any], producers: dict[str, Any]) -> tuple[Any, str]:
    """The stored tensor behind an operator's input, and the element type of the input if a node on the way set one."""
    import onnx

    computed = ""
    while name not in stored:
        node = producers.get(name)
        if node is None or node.op_type not in _TRANSPARENT:
            return None, ""
        if not computed and node.op_type == "Cast":
            target = next(attribute.i for attribute in node.attribute if attribute.name == "to")
            computed = onnx.TensorProto.DataType.Name(target)
        elif not computed and node.op_type == "DequantizeLinear":
            computed = "FLOAT"
        name = node.input[0]
    return stored[name], computed
