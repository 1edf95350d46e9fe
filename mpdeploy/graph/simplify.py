"""Graph simplification whose result depends on the network and never on its weights.

The exporter's own optimiser looks at weight values: it drops a bias of zeros, `x + 0` and `x * 1`, and lets equal
tensors share one initializer. A pruned network and its dense twin would then differ in more than their weights, and a
latency ratio between them would compare two graphs. The passes here decide from shapes, integer constants and
operator types alone, so twins get the same graph.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes
from numpy.typing import NDArray
from onnxscript import optimizer, rewriter
from onnxscript.rewriter.rules import common as rules

_RULES = (
    rules.dropout_inference_rule,
    rules.one_reshape_matmul_reshape_rule,
    rules.two_reshapes_matmul_reshape_rule,
    rules.cast_constant_of_shape_rule,
    rules.cast_constant_of_shape_without_value_rule,
    rules.collapse_slice_rule,
    rules.collapse_slice2_rule,
    rules.materialize_reshape_shape_rule,
    rules.min_min_rule,
    rules.max_max_rule,
    rules.min_max_rule,
    rules.max_min_rule,
    rules.successive_clip_relu_rule,
    rules.successive_relu_clip_rule,
    rules.successive_relu_rule,
    rules.successive_clip_rule,
    rules.cast_cast_rule,
    rules.no_op_cast_rule,
    rules.no_op_expand_rule,
    rules.no_op_transpose_rule,
    rules.reshape_reshape_rule,
    rules.slice_split_rule,
    rules.squeeze_reshape_1d_rule,
    rules.transpose_transpose_rule,
    rules.unsqueeze_unsqueeze_rule,
    rules.no_op_dynamic_scatter_nd_rule,
    rules.no_op_static_scatter_nd_rule,
    rules.normalize_pad_format_conv_rule,
    rules.fuse_pad_into_conv_rule,
)
_ROUNDS = 2  # folding enables rewrites, which enable folding; a third round changed nothing in the networks tried


def simplify(model: ir.Model, exact: Mapping[str, NDArray[np.float32]]) -> None:
    """Fold constants, fold BatchNorm into the layer before it and remove no-op nodes, in place.

    Args:
        model: A graph as the exporter writes it without optimisation: initializers carry their torch names.
        exact: float32 parameters and buffers by torch name. BatchNorm is folded from these in float64, so that a
            float16 graph is rounded once, after folding, and not once per parameter before it.
    """
    passes.InlinePass()(model)
    for _ in range(_ROUNDS):
        optimizer.fold_constants(model, onnx_shape_inference=True)
        rewriter.rewrite(model, _RULES)
    for node in list(model.graph):
        if node.op_type == "BatchNormalization":
            _fold_batch_norm(model.graph, node, exact)
    passes.RemoveUnusedNodesPass()(model)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    _share_integers(model.graph)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.RemoveUnusedNodesPass()(model)
    passes.RemoveUnusedOpsetsPass()(model)
    passes.OutputFixPass()(model)
    passes.NameFixPass()(model)


def constant_source(value: ir.Value | None) -> ir.Value | None:
    """The constant that `value` is a copy, cast or transpose of, or None where it depends on the input."""
    while value is not None:
        if ir.convenience.get_const_tensor(value) is not None:
            return value
        node = value.producer()
        if node is None or node.op_type not in {"Transpose", "Cast", "CastLike", "Identity"}:
            return None
        value = node.inputs[0]
    return None


def _fold_batch_norm(graph: ir.Graph, norm: ir.Node, exact: Mapping[str, NDArray[np.float32]]) -> None:
    """Replace BatchNormalization(Conv(x)) or BatchNormalization(Gemm(x)) by one Conv or Gemm.

    With s = gamma / sqrt(var + eps): W' = s W along the output axis, b' = (b - mean) s + beta. A zero weight stays
    zero, so an N:M pattern along the input axis survives.
    """
    layer = norm.inputs[0].producer() if norm.inputs[0] is not None else None
    if layer is None or layer.op_type not in {"Conv", "Gemm"} or not _is_sole_reader(norm, layer):
        return
    weight_in, bias_in = layer.inputs[1], layer.inputs[2] if len(layer.inputs) > 2 else None
    stored = ir.convenience.get_const_tensor(weight_in) if weight_in is not None else None
    weight = _read(weight_in, exact)
    bias = np.zeros(1) if bias_in is None else _read(bias_in, exact)
    statistics = [array for value in norm.inputs[1:] if (array := _read(value, exact)) is not None]
    if weight_in is None or stored is None or weight is None or bias is None or len(statistics) != 4:
        return
    gamma, beta, mean, var = statistics
    scale = gamma / np.sqrt(var + _number(norm, "epsilon", 1e-5))
    output_axis = 0 if layer.op_type == "Conv" or _number(layer, "transB", 0) else 1
    shape = [-1 if axis == output_axis else 1 for axis in range(weight.ndim)]
    folded_weight = weight * (scale * _number(layer, "alpha", 1.0)).reshape(shape)
    folded_bias = (bias * _number(layer, "beta", 1.0) - mean) * scale + beta
    dtype = stored.dtype.numpy()
    suffix = f".{norm.name}" if len(weight_in.uses()) > 1 else ""  # another layer still reads the unfolded weight
    replacement = ir.Node(
        "",
        layer.op_type,
        inputs=[
            layer.inputs[0],
            _initializer(graph, f"{weight_in.name}{suffix}", folded_weight.astype(dtype)),
            _initializer(graph, f"{weight_in.name}_bias{suffix}", folded_bias.astype(dtype)),
        ],
        attributes=[attr for name, attr in layer.attributes.items() if name not in {"alpha", "beta"}],
        name=layer.name,
        metadata_props=dict(layer.metadata_props),
    )
    old, new = norm.outputs[0], replacement.outputs[0]
    new.dtype, new.shape = old.dtype or ir.DataType.FLOAT, old.shape
    ir.convenience.replace_nodes_and_values(graph, norm, [norm, layer], [replacement], [old], [new])


def _is_sole_reader(norm: ir.Node, layer: ir.Node) -> bool:
    """Whether nothing but `norm` sees the layer's output, and `norm` uses its running statistics."""
    output = layer.outputs[0]
    return len(output.uses()) == 1 and not output.is_graph_output() and not _number(norm, "training_mode", 0)


def _number(node: ir.Node, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    return default if attribute is None else float(attribute.value)


def _read(value: ir.Value | None, exact: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float64] | None:
    """The constant as float64, from the float32 original where there is one of that name and size."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    if value is None or tensor is None:
        return None
    array = np.asarray(tensor.numpy())
    original = exact.get(str(value.name))
    return (array if original is None or original.shape != array.shape else original).astype(np.float64)


def _initializer(graph: ir.Graph, name: str, array: NDArray[np.generic]) -> ir.Value:
    """A new constant of the graph; an initializer of the same name is replaced."""
    if name in graph.initializers:
        graph.initializers.pop(name)
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape))
    graph.register_initializer(value)
    return value


def _integers(graph: ir.Graph) -> Iterator[tuple[tuple[str, tuple[int, ...], bytes], ir.Value]]:
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor is not None and tensor.dtype in {ir.DataType.INT64, ir.DataType.BOOL}:
            array = np.asarray(tensor.numpy())
            yield (str(array.dtype), array.shape, array.tobytes()), value


def _share_integers(graph: ir.Graph) -> None:
    """Let equal shape and index constants share one initializer; float tensors are weights and stay apart."""
    first: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
    for key, value in _integers(graph):
        kept = first.setdefault(key, value)
        if kept is not value and not value.is_graph_output():
            ir.convenience.replace_all_uses_with(value, kept)
