"""ONNX file -> the program that the certificates run."""

import importlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import AttributeProto, ModelProto, NodeProto, helper, numpy_helper

from mpdeploy.certify.program import Op, Program
from mpdeploy.errors import CorruptArtifact, StageFailed

_ELEMENT_TYPES = frozenset({"to", "dtype", "output_dtype"})  # attributes that hold an element type as a number
_CONSTANTS = ("value", "value_float", "value_floats", "value_int", "value_ints")


def read_program(model: ModelProto | Path) -> Program:
    """Read a graph with its constants; nodes of type Constant become constants.

    Raises:
        CorruptArtifact: The file is no ONNX model.
        StageFailed: The graph has not one input and one output, calls local functions or holds sub-graphs (If, Loop),
            or a node reads a value that no node before it makes.
    """
    if isinstance(model, Path):
        model = _load(model)
    graph = model.graph
    if model.functions:
        raise StageFailed(
            f"The graph calls the local function {model.functions[0].name}, which the certificate can't read.",
            hint="inline functions before the file is written (onnx.inliner)",
        )
    constants = {tensor.name: _array(tensor) for tensor in graph.initializer}
    inputs = [value.name for value in graph.input if value.name not in constants]
    outputs = [value.name for value in graph.output]
    if len(inputs) != 1 or len(outputs) != 1:
        raise StageFailed(
            f"The graph has the inputs {', '.join(inputs) or 'none'} and the outputs {', '.join(outputs) or 'none'}; "
            "the certificate needs one of each, images and logits.",
            hint="export the network with one image input and one output of logits",
        )
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    ops: list[Op] = []
    for index, node in enumerate(graph.node):
        if node.op_type == "Constant":
            constants[node.output[0]] = _constant(node)
        else:
            ops.append(_op(node, index, opset))
    _check_names(ops)
    _check_order(ops, constants, inputs[0], outputs[0])
    return Program(tuple(ops), constants, inputs[0], outputs[0])


def read_rewritten(path: Path) -> Program:
    """Read a float16 graph as ONNX Runtime's CPU provider computes it.

    The provider has no float16 kernels for most operators: it puts casts round them, computes in float32, and drops the
    casts in between, so that only few values are ever rounded to float16. Which ones is visible in the graph that it
    writes with all optional optimisations off, and in that graph alone.

    Raises:
        StageFailed: ONNX Runtime can't load the file, or as in `read_program`.
    """
    library: Any = importlib.import_module("onnxruntime")
    with tempfile.TemporaryDirectory(prefix="mpdeploy-rewritten-") as folder:
        written = Path(folder) / "rewritten.onnx"
        options = library.SessionOptions()
        options.log_severity_level = 4  # an error is raised as well; its text goes into our sentence
        options.graph_optimization_level = library.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.optimized_model_filepath = str(written)
        try:
            library.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions share no base class but Exception
            reason = str(error).strip().splitlines()[0][:300]
            raise StageFailed(f"ONNX Runtime can't load {path.name} on its CPU provider: {reason}.") from error
        return read_program(written)


def _load(path: Path) -> ModelProto:
    try:
        return onnx.load(path)
    except Exception as error:  # protobuf's decode error is no public class; a missing file is an OSError
        raise CorruptArtifact(f"{path} cannot be read as an ONNX model: {error}.") from error


def _array(tensor: onnx.TensorProto) -> NDArray[Any]:
    return np.asarray(numpy_helper.to_array(tensor))


def _constant(node: NodeProto) -> NDArray[Any]:
    attribute = node.attribute[0]
    if attribute.name not in _CONSTANTS:
        raise StageFailed(
            f"The graph's Constant {node.output[0]} holds a {attribute.name}, expected a tensor of numbers."
        )
    value = helper.get_attribute_value(attribute)
    if isinstance(value, onnx.TensorProto):
        return _array(value)
    return np.asarray(value, np.int64 if attribute.name in ("value_int", "value_ints") else np.float32)


def _op(node: NodeProto, index: int, opset: int) -> Op:
    name = node.name or f"{node.op_type}_{index}"
    kind = f"{node.domain}.{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type
    attributes = {attribute.name: _attribute(attribute, name, kind) for attribute in node.attribute}
    if kind in ("Softmax", "LogSoftmax"):
        attributes["opset"] = opset  # opset 13 changed their meaning, not their form
    return Op(name, kind, tuple(node.input), tuple(node.output), attributes)


def _attribute(attribute: AttributeProto, name: str, kind: str) -> Any:
    if attribute.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS):
        raise StageFailed(
            f"The graph's node {name} ({kind}) holds a sub-graph, which the certificate can't follow.",
            hint="export the network without control flow that depends on values",
        )
    value = helper.get_attribute_value(attribute)
    if attribute.name in _ELEMENT_TYPES:
        return str(helper.tensor_dtype_to_np_dtype(value).name) if value else None
    if isinstance(value, onnx.TensorProto):
        return _array(value)
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, list):
        return tuple(item.decode() if isinstance(item, bytes) else item for item in value)
    return value


def _check_names(ops: list[Op]) -> None:
    seen: set[str] = set()
    for op in ops:
        if op.name in seen:
            raise StageFailed(f"The graph has two nodes of the name {op.name}, so neither can be spoken of.")
        seen.add(op.name)


def _check_order(ops: list[Op], constants: Mapping[str, NDArray[Any]], source: str, result: str) -> None:
    known = {source, *constants}
    for op in ops:
        for name in op.inputs:
            if name and name not in known:
                raise StageFailed(f"The graph's node {op.name} ({op.kind}) reads {name} before any node makes it.")
        known.update(op.outputs)
    if result not in known:
        raise StageFailed(f"The graph's output {result} is made by no node.")
