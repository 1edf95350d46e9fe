"""torch network -> ONNX file: dynamic batch, one LayerNormalization op per layer, no trace of the exporting machine."""

import copy
import hashlib
import tempfile
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import ModelProto, TensorProto, helper
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mpdeploy.certify.program import Program
from mpdeploy.errors import StageFailed
from mpdeploy.graph.program import read_program
from mpdeploy.graph.quiet import quiet
from mpdeploy.graph.simplify import constant_source, simplify
from mpdeploy.graph.sparsity import LAYER_KEY, node_layer

INPUT, OUTPUT, BATCH = "images", "logits", "batch"
DEFAULT_OPSET = 20
_SCOPES_KEY = "pkg.torch.onnx.name_scopes"
_WEIGHTED = frozenset({"Conv", "MatMul", "Gemm"})
_TRACE_BATCH = 2  # the exporter treats 0 and 1 as constants
_PROTOBUF_LIMIT = 2**31 - 1
_GRAPH_ALLOWANCE = 16 * 2**20  # nodes, names and the manifest beside the weights


@dataclass(frozen=True)
class ExportFacts:
    """What was written.

    Attributes:
        precision: "fp32" or "fp16": the type of weights and compute; input and output are float32 in both.
        opset: Read back from the file.
        layer_norm_ops: LayerNormalization nodes, equal to the layer norms that the network executes.
        bytes: Size of the file.
        sha256: Of the file.
        layers: Weight initializer -> torch layer, for each Conv, MatMul and Gemm with a constant weight.
    """

    precision: str
    opset: int
    layer_norm_ops: int
    bytes: int
    sha256: str
    layers: Mapping[str, str]


def export_onnx(
    module: nn.Module,
    input_size: tuple[int, int, int],
    path: Path,
    *,
    precision: Literal["fp32", "fp16"] = "fp32",
    opset: int = DEFAULT_OPSET,
) -> ExportFacts:
    """Write `module` as one ONNX file; the same module gives the same bytes, and is left untouched.

    The graph has one input "images" float32 [batch, C, H, W] and one output "logits" float32 [batch, K]. It depends
    on the weights' shapes only, so a pruned network and its dense twin get the same graph.

    Args:
        module: float32 network that maps [n, C, H, W] to [n, K]. Exported in eval mode, on the CPU.
        input_size: (C, H, W).
        path: The file to write; its folder exists.
        precision: "fp16" stores weights and computes in float16, with a cast at both ends.
        opset: ONNX operator set, 18 or newer.

    Raises:
        StageFailed: The network cannot be exported, holds NaN or infinite parameters, does not fit float16 or the
            2 GiB of one ONNX file, fixes the batch size, or a layer norm was split into several ops.
    """
    _refuse_unfit(module, precision)
    network = copy.deepcopy(module).cpu().eval()
    images = torch.zeros(_TRACE_BATCH, *input_size)
    expected_norms = _count_layer_norms(network, images)
    exact = {name: value.numpy() for name, value in network.state_dict().items() if value.is_floating_point()}
    if precision == "fp16":
        exact = {name: value.copy() for name, value in exact.items()}
        network, images = network.half(), images.half()
    program = _capture(network, images, opset)
    _label_weights(program, {name for name, _ in network.named_modules()})
    simplify(program, exact)
    model = ir.serde.serialize_model(program)
    _strip(model)
    if precision == "fp16":
        _float32_ends(model)
    _check(model, opset, expected_norms, precision)
    payload = model.SerializeToString(deterministic=True)
    path.write_bytes(payload)
    return ExportFacts(
        precision=precision,
        opset=opset,
        layer_norm_ops=expected_norms,
        bytes=len(payload),
        sha256=hashlib.sha256(payload).hexdigest(),
        layers=_weight_layers(model),
    )


def exported_program(module: nn.Module, input_size: tuple[int, int, int]) -> Program:
    """Return the graph that `export_onnx` writes of a module in fp32, without keeping the file."""
    with tempfile.TemporaryDirectory(prefix="mpdeploy-export-") as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(module, input_size, path)
        return read_program(path)


def _refuse_unfit(module: nn.Module, precision: str) -> None:
    for name, parameter in module.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise StageFailed(
                f"The parameter {name} holds NaN or infinite values, so the network was not exported.",
                hint="check the checkpoint: no input could give finite logits",
            )
    width = 2 if precision == "fp16" else 4
    size = width * sum(tensor.numel() for tensor in module.state_dict().values())
    if size + _GRAPH_ALLOWANCE > _PROTOBUF_LIMIT:
        raise StageFailed(
            f"The network's weights take {size / 2**30:.2f} GiB as {precision}, and one ONNX file holds at most 2 GiB.",
            hint='export with precision "fp16"' if precision == "fp32" else "use a smaller network",
        )


class _LayerNormCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Counts the layer norms that really run, whichever module or function asks for them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += func is torch.ops.aten.native_layer_norm.default
        return func(*args, **(kwargs or {}))


def _count_layer_norms(network: nn.Module, images: Tensor) -> int:
    """Layer norms in one eager forward pass, which also shows that the network runs and returns [n, K]."""
    counter = _LayerNormCounter()
    try:
        with torch.no_grad(), counter:
            logits = network(images[:1])
    except Exception as error:  # the network is the user's code: it may raise anything
        raise StageFailed(
            f"The network does not run on an input of shape {tuple(images[:1].shape)}: "
            f"{type(error).__name__}: {_first_line(error)}{_where(error, network)}.",
            hint="check the input size in the recipe, and that the network takes any number of images",
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise StageFailed(
            f"The network returns {got}, where one tensor of logits [images, classes] is expected.",
            hint="wrap the network in a module whose forward returns the logits alone",
        )
    return counter.count


def _capture(network: nn.Module, images: Tensor, opset: int) -> ir.Model:
    """Trace with a symbolic batch and translate to ONNX, unoptimised, every parameter under its torch name."""
    try:
        with quiet(), torch.no_grad():
            traced = torch.export.export(
                network,
                (images,),
                dynamic_shapes=({0: torch.export.Dim(BATCH)},),
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=True,
            )
            program = torch.onnx.export(
                traced,
                dynamo=True,
                input_names=[INPUT],
                output_names=[OUTPUT],
                opset_version=opset,
                optimize=False,
                verbose=False,
            )
    except Exception as error:  # tracing runs the network's own code: it may raise anything
        raise StageFailed(
            f"{type(network).__name__} cannot be exported to ONNX: {_reason(error)}{_where(error, network)}.",
            hint="replace that operator, or control flow that depends on values or on the batch size, by tensor code",
        ) from error
    if program is None:
        raise StageFailed(f"{type(network).__name__} cannot be exported to ONNX: the exporter returned no program.")
    model: ir.Model = program.model
    return model


def _chain(error: BaseException) -> list[BaseException]:
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    return chain


def _first_line(error: BaseException) -> str:
    return next((line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()), "no message")


def _reason(error: BaseException) -> str:
    """The first sentence of the deepest cause: the exporter wraps it in pages of advice."""
    deepest = _chain(error)[-1]
    return f"{type(deepest).__name__}: {_first_line(deepest)}"


def _where(error: BaseException, network: nn.Module) -> str:
    """` in NAME (TYPE)`: the innermost of the network's modules whose code was running, or empty."""
    names = {id(module): name for name, module in network.named_modules()}
    found = ""
    for link in _chain(error):
        for frame, _ in traceback.walk_tb(link.__traceback__):
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module) and names.get(id(module)):
                found = f" in {names[id(module)]} ({type(module).__name__})"
        if found:
            return found
    return found


def _label_weights(model: ir.Model, modules: set[str]) -> None:
    """Write each weight's torch layer on its consumer, while initializers still have their torch names."""
    for node in model.graph:
        if node.op_type not in _WEIGHTED:
            continue
        source = constant_source(node.inputs[1])
        owner = str(source.name).rpartition(".")[0] if source is not None else ""
        scopes = [scope for scope in _scopes(node) if scope and scope in modules]
        if owner and owner in modules:
            node.metadata_props[LAYER_KEY] = owner
        elif scopes:
            node.metadata_props[LAYER_KEY] = scopes[-1]


def _scopes(node: ir.Node) -> list[str]:
    text = node.metadata_props.get(_SCOPES_KEY, "[]")
    return [part.strip().strip("'\"") for part in text.strip("[]").split(",")]


def _strip(model: ModelProto) -> None:
    """Drop source paths, stack traces and the tracer's symbol names; keep the module scope of each node."""
    for node in model.graph.node:
        kept = {entry.key: entry.value for entry in node.metadata_props if entry.key in {LAYER_KEY, _SCOPES_KEY}}
        helper.set_model_props(node, kept)
        node.doc_string = ""
    for item in (model, model.graph, *model.graph.initializer, *model.graph.input, *model.graph.output):
        del item.metadata_props[:]
        item.doc_string = ""
    symbol = _dims(model.graph.input[0])[0].dim_param if model.graph.input else ""
    for value in (*model.graph.input, *model.graph.output):
        for dim in _dims(value):
            if symbol and dim.dim_param == symbol:
                dim.dim_param = BATCH
    # Readers infer shapes themselves; stale entries with the tracer's symbols make quantisers and parsers fail.
    del model.graph.value_info[:]


def _float32_ends(model: ModelProto) -> None:
    """Give a float16 graph a float32 input and output through one Cast each."""
    graph = model.graph
    inner_in, inner_out = f"{INPUT}_fp16", f"{OUTPUT}_fp16"
    for node in graph.node:
        for names, old, new in ((node.input, INPUT, inner_in), (node.output, OUTPUT, inner_out)):
            for position, name in enumerate(names):
                if name == old:
                    names[position] = new
        for position, name in enumerate(node.input):
            if name == OUTPUT:
                node.input[position] = inner_out
    nodes = list(graph.node)
    del graph.node[:]
    graph.node.append(helper.make_node("Cast", [INPUT], [inner_in], name="cast_images", to=TensorProto.FLOAT16))
    graph.node.extend(nodes)
    graph.node.append(helper.make_node("Cast", [inner_out], [OUTPUT], name="cast_logits", to=TensorProto.FLOAT))
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT


def _check(model: ModelProto, opset: int, expected_norms: int, precision: str) -> None:
    """Re-read what is about to be written; refuse anything that is not what was asked."""
    norms = sum(node.op_type == "LayerNormalization" for node in model.graph.node)
    if norms != expected_norms:
        raise StageFailed(
            f"The network runs {expected_norms} layer norms, and its ONNX graph has {norms} LayerNormalization nodes.",
            hint="opset 18 or newer keeps a layer norm in one op",
        )
    got = {entry.domain: entry.version for entry in model.opset_import}.get("", 0)
    if got != opset:
        raise StageFailed(
            f"ONNX opset {opset} was asked for and the exporter wrote opset {got}.", hint=f"ask for opset {got}"
        )
    for kind, values, name, rank in (("input", model.graph.input, INPUT, 4), ("output", model.graph.output, OUTPUT, 2)):
        shapes = {value.name: [dim.dim_param or dim.dim_value for dim in _dims(value)] for value in values}
        shape = shapes.get(name, [])
        static = [size for size in shape[1:] if isinstance(size, int) and size > 0]
        if list(shapes) != [name] or len(shape) != rank or shape[0] != BATCH or len(static) != rank - 1:
            raise StageFailed(
                f"The exported graph's {kind} is {shapes}, expected one {name} of rank {rank} with a free batch.",
                hint="the network's forward must not fix the batch size",
            )
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        for name in node.input[1:] if node.op_type in _WEIGHTED else ():
            if name in constants and not np.isfinite(onnx.numpy_helper.to_array(constants[name])).all():
                raise StageFailed(
                    f"The constant {name} of {node_layer(node) or node.name} is not finite in {precision}.",
                    hint='float16 ends at 65504: export with precision "fp32"' if precision == "fp16" else "",
                )
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise StageFailed(f"The exported graph is not valid ONNX: {_first_line(error)}.") from error


def _dims(value: onnx.ValueInfoProto) -> list[onnx.TensorShapeProto.Dimension]:
    return list(value.type.tensor_type.shape.dim)


def _weight_layers(model: ModelProto) -> dict[str, str]:
    constants = {tensor.name for tensor in model.graph.initializer}
    return {
        node.input[1]: node_layer(node)
        for node in model.graph.node
        if node.op_type in _WEIGHTED and len(node.input) > 1 and node.input[1] in constants
    }
