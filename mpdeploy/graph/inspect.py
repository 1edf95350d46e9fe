"""What an ONNX file holds, and whether two files hold the same graph."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, TensorProto, ValueInfoProto, helper, numpy_helper

from mpdeploy.errors import CorruptArtifact

_QDQ = frozenset({"QuantizeLinear", "DequantizeLinear"})


def summary(path: Path) -> dict[str, Any]:
    """Facts about an ONNX file, JSON-ready and in a fixed order.

    Returns:
        "opset" (ai.onnx), "domains" {domain: version}, "nodes", "ops" {type: count}, "inputs" and "outputs"
        [{"name", "dtype", "shape"}] with dynamic sizes by name, "initializers" {dtype: {"tensors", "elements",
        "bytes"}}, "parameters" (elements of float and int8 constants, without quantisation scales and zero points),
        "layer_norm_ops", "bytes" (of the file).

    Raises:
        CorruptArtifact: The file is missing or is not an ONNX model.
    """
    try:
        model = onnx.load(path, load_external_data=False)
        size = path.stat().st_size
    except Exception as error:  # protobuf's decode error is no public class; a missing file is an OSError
        raise CorruptArtifact(f"{path} cannot be read as an ONNX model: {error}.") from error
    graph = model.graph
    if not graph.node:
        raise CorruptArtifact(f"{path} cannot be read as an ONNX model: it has no nodes.")
    tensors = _tensors(graph)
    ops = Counter(node.op_type for node in graph.node)
    domains = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    scales = {name for node in graph.node if node.op_type in _QDQ for name in node.input[1:]}
    weights = [
        tensor
        for tensor in tensors
        if _dtype(tensor.data_type).startswith(("float", "bfloat", "int8")) and tensor.name not in scales
    ]
    return {
        "opset": domains.get("ai.onnx", 0),
        "domains": dict(sorted(domains.items())),
        "nodes": len(graph.node),
        "ops": dict(sorted(ops.items())),
        "inputs": [_value(value) for value in graph.input],
        "outputs": [_value(value) for value in graph.output],
        "initializers": _by_dtype(tensors),
        "parameters": sum(math.prod(tensor.dims) for tensor in weights),
        "layer_norm_ops": ops["LayerNormalization"],
        "bytes": size,
    }


def _tensors(graph: GraphProto) -> list[TensorProto]:
    """Initializers and the tensors of Constant nodes."""
    constants = [attr.t for node in graph.node if node.op_type == "Constant" for attr in node.attribute]
    return [*graph.initializer, *(tensor for tensor in constants if tensor.data_type)]


def _dtype(code: int) -> str:
    return str(helper.tensor_dtype_to_np_dtype(code).name) if code else "undefined"


def _by_dtype(tensors: Iterable[TensorProto]) -> dict[str, dict[str, int]]:
    table: dict[str, dict[str, int]] = {}
    for tensor in tensors:
        row = table.setdefault(_dtype(tensor.data_type), {"tensors": 0, "elements": 0, "bytes": 0})
        elements = math.prod(tensor.dims)
        row["tensors"] += 1
        row["elements"] += elements
        row["bytes"] += elements * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return dict(sorted(table.items()))


def _shape(value: ValueInfoProto) -> list[int | str]:
    return [
        dim.dim_value if dim.HasField("dim_value") else (dim.dim_param or "?")
        for dim in value.type.tensor_type.shape.dim
    ]


def _value(value: ValueInfoProto) -> dict[str, Any]:
    return {"name": value.name, "dtype": _dtype(value.type.tensor_type.elem_type), "shape": _shape(value)}


def same_graph(a: ModelProto, b: ModelProto) -> bool:
    """Whether two models differ in nothing but their weights' values (see `first_difference`)."""
    return not first_difference(a, b)


def first_difference(a: ModelProto, b: ModelProto) -> str:
    """The first structural difference of two graphs, or "".

    Compared are operator sets, inputs and outputs, and node by node the operator, its attributes, which earlier
    result feeds which input, and type and shape of constants. Integer constants (axes, target shapes, indices) are
    structure and compared by value; other values are weights and ignored, and so is which nodes share a constant.
    """
    for what, left, right in (
        ("operator sets", _opsets(a), _opsets(b)),
        ("inputs", [_value(item) for item in a.graph.input], [_value(item) for item in b.graph.input]),
        ("outputs", [_value(item) for item in a.graph.output], [_value(item) for item in b.graph.output]),
        ("numbers of nodes", len(a.graph.node), len(b.graph.node)),
    ):
        if left != right:
            return f"the {what} differ: {left} and {right}"
    left_names, right_names = _Names(a.graph), _Names(b.graph)
    for index, (node, other) in enumerate(zip(a.graph.node, b.graph.node, strict=True)):
        mine, yours = left_names.describe(node, index), right_names.describe(other, index)
        if mine != yours:
            return f"node {index} differs: {mine} and {yours}"
    ends = [
        [names.of(item.name) for item in graph.output]
        for names, graph in ((left_names, a.graph), (right_names, b.graph))
    ]
    return "" if ends[0] == ends[1] else f"the outputs come from different nodes: {ends[0]} and {ends[1]}"


def _opsets(model: ModelProto) -> dict[str, int]:
    return {entry.domain: entry.version for entry in model.opset_import}


class _Names:
    """Gives each tensor of a graph a name that does not depend on its own: where it comes from."""

    def __init__(self, graph: GraphProto) -> None:
        self._origin: dict[str, str] = {value.name: f"input {index}" for index, value in enumerate(graph.input)}
        self._origin.update((tensor.name, _constant(tensor)) for tensor in graph.initializer)

    def of(self, name: str) -> str:
        """Origin of a tensor: a graph input, a constant's type and shape, or an output of an earlier node."""
        return self._origin.get(name, "undefined") if name else "absent"

    def describe(self, node: onnx.NodeProto, index: int) -> tuple[str, tuple[str, ...], Mapping[str, str]]:
        """Operator, origins of its inputs, attributes; registers the node's outputs."""
        self._origin.update((name, f"node {index} output {slot}") for slot, name in enumerate(node.output) if name)
        attributes = {attribute.name: _attribute(attribute) for attribute in node.attribute}
        return f"{node.domain}::{node.op_type}", tuple(self.of(name) for name in node.input), attributes


def _constant(tensor: TensorProto) -> str:
    text = f"constant {_dtype(tensor.data_type)} {list(tensor.dims)}"
    if tensor.data_type in {TensorProto.INT64, TensorProto.BOOL}:
        return f"{text} = {np.asarray(numpy_helper.to_array(tensor)).tolist()}"
    return text


def _attribute(attribute: AttributeProto) -> str:
    if attribute.type == AttributeProto.TENSOR:
        return _constant(attribute.t)
    payload: bytes = attribute.SerializeToString(deterministic=True)
    return payload.hex()
