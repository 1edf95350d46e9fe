"""An exported graph as a list of operators, run by differentiable torch functions in float32 or float64.

This is the graph that the certificates speak about: the same nodes and the same (already rounded) constants as the ONNX
file, in the arithmetic that is asked for here instead of the engine's. Floating-point values are all of one dtype, so a
cast between floating-point types changes nothing; the rounding it stands for is what the certificates bound. Values
that are integers in ONNX are int64 on the CPU where they are shapes and indices, and the results of QuantizeLinear are
floating-point tensors of whole numbers, so that a gradient passes straight through the rounding.

The meaning of each operator is that of the ONNX operator reference, with the argument forms of all opsets from 7 on.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mpdeploy.errors import StageFailed

Inputs = Sequence[Tensor | None]
Evaluator = Callable[["Op", Inputs], tuple[Tensor, ...]]

_FLOATS = frozenset({"float16", "bfloat16", "float32", "float64"})
_RANGES = {"int8": (-128, 127), "uint8": (0, 255), "int16": (-32768, 32767), "uint16": (0, 65535)}


@dataclass(frozen=True)
class Op:
    """One node.

    Attributes:
        name: Unique in its program.
        kind: ONNX operator type; "domain.Type" outside the default domain.
        inputs: Names of values; "" where an optional input is absent.
        outputs: Names of values; "" where an optional output is not asked for.
        attributes: Numbers, strings, tuples of them, arrays; element types by numpy name ("float16").
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class Program:
    """A graph of one input and one output.

    Attributes:
        ops: In an order in which every value is made before it is read.
        constants: Name -> array in the type that the file stores.
        input: Name of the images, [n, C, H, W].
        output: Name of the logits, [n, K].
    """

    ops: tuple[Op, ...]
    constants: Mapping[str, NDArray[Any]]
    input: str
    output: str


def run(
    program: Program,
    images: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    each: Evaluator | None = None,
    keep: Collection[str] | None = (),
    constants: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Run a program in order and forget every value as soon as nothing needs it any more.

    Args:
        program: What to run.
        images: [n, C, H, W]; converted to `dtype`, and everything runs on its device.
        dtype: float32 or float64, of all floating-point values.
        each: How one operator is evaluated; `evaluate` if None.
        keep: Names of values to return beside the output; None keeps every value that an operator makes.
        constants: `tensors(program, ...)` made earlier, for a program that runs many times.

    Returns:
        Name -> value: the output, and what `keep` names.

    Raises:
        StageFailed: An operator is unknown or fails; the sentence names it.
    """
    each = each or evaluate
    values: dict[str, Tensor] = dict(tensors(program, dtype, images.device) if constants is None else constants)
    given = set(values)
    values[program.input] = images.to(dtype)
    last = last_uses(program)
    kept = None if keep is None else {*keep, program.output}
    for index, op in enumerate(program.ops):
        inputs = [values[name] if name else None for name in op.inputs]
        results = each(op, inputs)
        for name, value in zip(op.outputs, results, strict=False):
            if name:
                values[name] = value.to(dtype) if value.is_floating_point() else value
        for name in {*op.inputs, *op.outputs} - {""}:
            if kept is not None and name not in kept and name not in given and last.get(name, -1) <= index:
                del values[name]
    wanted = {name for op in program.ops for name in op.outputs if name} if kept is None else kept
    return {name: value for name, value in values.items() if name in wanted}


def tensors(program: Program, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """The constants as tensors: floating-point ones in `dtype` on `device`, all others unchanged on the CPU."""
    return {name: _tensor(array, dtype, device) for name, array in program.constants.items()}


def _tensor(array: NDArray[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    if array.dtype.kind in "iub":
        return torch.from_numpy(np.array(array))
    # numpy has no bfloat16 of its own, and the type that stands for it isn't known to torch; float32 holds it exactly.
    exact = array if array.dtype in (np.float16, np.float32, np.float64) else array.astype(np.float32)
    return torch.from_numpy(np.array(exact)).to(device, dtype)


def last_uses(program: Program) -> dict[str, int]:
    """Name of a value -> index of the last operator that reads it."""
    return {name: index for index, op in enumerate(program.ops) for name in op.inputs if name}


def evaluate(op: Op, inputs: Inputs) -> tuple[Tensor, ...]:
    """Evaluate one operator by differentiable torch functions, in the dtype of its inputs.

    QuantizeLinear rounds and saturates; its gradient is that of x / scale, straight through (Bengio et al. 2013).

    Args:
        op: What to do.
        inputs: Its inputs in order, None where one is absent.

    Returns:
        Its outputs in order; optional ones that are not asked for may be missing at the end.

    Raises:
        StageFailed: The operator, or the way it is used, is not known here, or its inputs don't fit.
    """
    function = _OPERATORS.get(op.kind)
    if function is None:
        raise StageFailed(
            f"The graph's node {op.name} is a {op.kind}, an operator that the certificate can't evaluate.",
            hint="export with opset 18 or newer, before the runtime's own optimiser; or leave this certificate out",
        )
    try:
        result = function(op, inputs)
    except (RuntimeError, IndexError, TypeError, ValueError, KeyError, AttributeError) as error:
        shapes = ", ".join("absent" if x is None else str(list(x.shape)) for x in inputs)
        raise StageFailed(
            f"The graph's node {op.name} ({op.kind}) fails on inputs of shape {shapes}: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}.",
            hint="check that the images have the size that the graph was exported for",
        ) from error
    return result if isinstance(result, tuple) else (result,)


def evaluate_unrounded(op: Op, inputs: Inputs) -> tuple[Tensor, ...]:
    """As `evaluate`, but QuantizeLinear saturates without rounding: the graph in real arithmetic.

    A pair of QuantizeLinear and DequantizeLinear then only clips. What is clipped is no rounding error: it is as much a
    part of the stored graph as its rounded weights.
    """
    if op.kind == "QuantizeLinear":
        exact, _, _, (low, high) = quantization_grid(op, inputs)
        return (exact.clamp(low, high),)
    return evaluate(op, inputs)


def quantization_grid(op: Op, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
    """What a QuantizeLinear works with.

    Returns:
        x / scale + zero point, unrounded; scale and zero point, shaped to broadcast with x; (lowest, highest) integer.
    """
    x, scale, zero = _quantization(op, inputs)
    stored = inputs[2] if len(inputs) > 2 else None
    name = str(stored.dtype).removeprefix("torch.") if stored is not None else op.attributes.get("output_dtype")
    limits = _RANGES.get(name or "uint8")
    if limits is None:
        raise StageFailed(f"The graph's node {op.name} quantises to {name}, expected one of {', '.join(_RANGES)}.")
    return x / scale + zero, scale, zero, limits


def _quantization(op: Op, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Input, scale and zero point of a Q or DQ, in the scale's dtype and broadcastable."""
    x, scale = _first(inputs), _at(inputs, 1)
    zero = inputs[2] if len(inputs) > 2 else None
    if op.attributes.get("block_size", 0):
        raise StageFailed(f"The graph's node {op.name} ({op.kind}) quantises in blocks, which is not supported.")
    shape: tuple[int, ...] = ()
    if scale.numel() > 1:
        axis = int(op.attributes.get("axis", 1)) % x.ndim
        shape = tuple(-1 if position == axis else 1 for position in range(x.ndim))
    offset = torch.zeros_like(scale) if zero is None else zero.to(scale)
    return x.to(scale), scale.reshape(shape), offset.reshape(shape)


_OPERATORS: dict[str, Callable[[Op, Inputs], Tensor | tuple[Tensor, ...]]] = {}


def _operator(*kinds: str) -> Callable[[Callable[[Op, Inputs], Any]], Callable[[Op, Inputs], Any]]:
    def register(function: Callable[[Op, Inputs], Any]) -> Callable[[Op, Inputs], Any]:
        _OPERATORS.update(dict.fromkeys(kinds, function))
        return function

    return register


def _at(inputs: Inputs, position: int) -> Tensor:
    value = inputs[position] if position < len(inputs) else None
    if value is None:
        raise ValueError(f"input {position} is absent")
    return value


def _first(inputs: Inputs) -> Tensor:
    return _at(inputs, 0)


def _maybe(inputs: Inputs, position: int) -> Tensor | None:
    return inputs[position] if position < len(inputs) else None


def _list(op: Op, inputs: Inputs, name: str, position: int) -> list[int] | None:
    """Integers that are an attribute in old opsets and an input in new ones; None where they are absent."""
    if name in op.attributes:
        return [int(item) for item in op.attributes[name]]
    value = _maybe(inputs, position)
    return None if value is None else [int(item) for item in value.reshape(-1).tolist()]


def _together(values: Sequence[Tensor]) -> list[Tensor]:
    """The same values on one device: the accelerator's, where one of them is there."""
    device = next((value.device for value in values if value.device.type != "cpu"), torch.device("cpu"))
    return [value.to(device) for value in values]


def _present(inputs: Inputs) -> list[Tensor]:
    return _together([value for value in inputs if value is not None])


# One value in, one value of the same shape out.

_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "HardSwish": F.hardswish,
    "Log": torch.log,
    "Mish": F.mish,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal,
    "Relu": torch.relu,
    "Round": torch.round,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Softplus": F.softplus,
    "Sqrt": torch.sqrt,
    "Tanh": torch.tanh,
}


@_operator(*_UNARY)
def _unary(op: Op, inputs: Inputs) -> Tensor:
    return _UNARY[op.kind](_first(inputs))


@_operator("Identity", "Dropout")
def _identity(op: Op, inputs: Inputs) -> Tensor:
    return _first(inputs)


@_operator("Gelu")
def _gelu(op: Op, inputs: Inputs) -> Tensor:
    return F.gelu(_first(inputs), approximate=op.attributes.get("approximate", "none"))


@_operator("HardSigmoid")
def _hard_sigmoid(op: Op, inputs: Inputs) -> Tensor:
    alpha, beta = float(op.attributes.get("alpha", 0.2)), float(op.attributes.get("beta", 0.5))
    return (_first(inputs) * alpha + beta).clamp(0, 1)


@_operator("LeakyRelu")
def _leaky_relu(op: Op, inputs: Inputs) -> Tensor:
    return F.leaky_relu(_first(inputs), op.attributes.get("alpha", 0.01))


@_operator("Elu")
def _elu(op: Op, inputs: Inputs) -> Tensor:
    return F.elu(_first(inputs), op.attributes.get("alpha", 1.0))


@_operator("PRelu")
def _prelu(op: Op, inputs: Inputs) -> Tensor:
    x, slope = _present(inputs)
    return torch.where(x < 0, x * slope, x)


@_operator("Clip")
def _clip(op: Op, inputs: Inputs) -> Tensor:
    x = _first(inputs)
    for name, position, limit in (("min", 1, torch.maximum), ("max", 2, torch.minimum)):
        bound = _maybe(inputs, position)
        if bound is None and name in op.attributes:
            bound = torch.tensor(op.attributes[name])
        if bound is not None:
            x = limit(x, bound.to(x))
    return x


@_operator("Softmax")
def _softmax(op: Op, inputs: Inputs) -> Tensor:
    return _over_axis(op, _first(inputs), torch.softmax)


@_operator("LogSoftmax")
def _log_softmax(op: Op, inputs: Inputs) -> Tensor:
    return _over_axis(op, _first(inputs), torch.log_softmax)


def _over_axis(op: Op, x: Tensor, function: Callable[[Tensor, int], Tensor]) -> Tensor:
    if op.attributes.get("opset", 13) < 13:  # until opset 12 all axes from `axis` on were one
        axis = int(op.attributes.get("axis", 1)) % max(x.ndim, 1)
        flat: Tensor = function(x.flatten(axis), axis)
        return flat.reshape(x.shape)
    return function(x, int(op.attributes.get("axis", -1)))


# Several values, broadcast.

_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Add": torch.add,
    "And": torch.logical_and,
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Mul": torch.mul,
    "Or": torch.logical_or,
    "Sub": torch.sub,
}


@_operator(*_BINARY)
def _binary(op: Op, inputs: Inputs) -> Tensor:
    a, b = _present(inputs)
    return _BINARY[op.kind](a, b)


@_operator("Div")
def _div(op: Op, inputs: Inputs) -> Tensor:
    a, b = _present(inputs)
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


@_operator("Mod")
def _mod(op: Op, inputs: Inputs) -> Tensor:
    a, b = _present(inputs)
    return torch.fmod(a, b) if op.attributes.get("fmod", 0) else torch.remainder(a, b)


@_operator("Pow")
def _pow(op: Op, inputs: Inputs) -> Tensor:
    base, exponent = _present(inputs)
    if exponent.numel() == 1:
        power: float = exponent.item()
        # A square by multiplication has a gradient at 0 as well.
        return (base * base if power == 2 else base.pow(power)).expand(np.broadcast_shapes(base.shape, exponent.shape))
    return base.pow(exponent)


@_operator("Min", "Max", "Sum", "Mean")
def _variadic(op: Op, inputs: Inputs) -> Tensor:
    first, *rest = _present(inputs)
    combine = {"Min": torch.minimum, "Max": torch.maximum}.get(op.kind, torch.add)
    for value in rest:
        first = combine(first, value)
    return first / (1 + len(rest)) if op.kind == "Mean" else first


@_operator("Where")
def _where(op: Op, inputs: Inputs) -> Tensor:
    condition, a, b = _present(inputs)
    return torch.where(condition, a, b)


# Products.


@_operator("MatMul")
def _matmul(op: Op, inputs: Inputs) -> Tensor:
    a, b = _present(inputs)
    return torch.matmul(a, b)


@_operator("Gemm")
def _gemm(op: Op, inputs: Inputs) -> Tensor:
    a, b = _together([_at(inputs, 0), _at(inputs, 1)])
    a = a.T if op.attributes.get("transA", 0) else a
    b = b.T if op.attributes.get("transB", 0) else b
    alpha, beta = op.attributes.get("alpha", 1.0), op.attributes.get("beta", 1.0)
    product = a @ b if alpha == 1 else alpha * (a @ b)
    bias = _maybe(inputs, 2)
    if bias is None:
        return product
    return product + (bias if beta == 1 else beta * bias)


@_operator("Einsum")
def _einsum(op: Op, inputs: Inputs) -> Tensor:
    return torch.einsum(op.attributes["equation"], *_present(inputs))


@_operator("Conv")
def _conv(op: Op, inputs: Inputs) -> Tensor:
    x, weight, *bias = _present(inputs)
    rank = weight.ndim - 2
    strides, dilations = _sizes(op, "strides", rank), _sizes(op, "dilations", rank)
    x = F.pad(x, _torch_padding(_pads(op, x.shape[2:], tuple(weight.shape[2:]), strides, dilations)))
    function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[rank]
    groups = int(op.attributes.get("group", 1))
    result: Tensor = function(x, weight, bias[0] if bias else None, strides, 0, dilations, groups)
    return result


def _sizes(op: Op, name: str, rank: int) -> tuple[int, ...]:
    return tuple(int(size) for size in op.attributes.get(name, (1,) * rank))


def _pads(
    op: Op, sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> list[tuple[int, int]]:
    """(before, after) of each spatial axis, from `pads` or `auto_pad`."""
    rank = len(kernel)
    auto = op.attributes.get("auto_pad", "NOTSET")
    if auto == "NOTSET":
        pads = [int(size) for size in op.attributes.get("pads", (0,) * (2 * rank))]
        return list(zip(pads[:rank], pads[rank:], strict=True))
    if auto == "VALID":
        return [(0, 0)] * rank
    result = []
    for size, k, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        total = max((-(-size // stride) - 1) * stride + (k - 1) * dilation + 1 - size, 0)
        small, large = total // 2, total - total // 2
        result.append((small, large) if auto == "SAME_UPPER" else (large, small))
    return result


def _torch_padding(pads: Sequence[tuple[int, int]]) -> list[int]:
    """Sizes in the order that torch takes them: from the last axis to the first."""
    return [size for pair in reversed(pads) for size in pair]


# Pooling.


@_operator("MaxPool")
def _max_pool(op: Op, inputs: Inputs) -> Tensor:
    x, kernel, strides, dilations = _pool_window(op, inputs)
    x = F.pad(x, _torch_padding(_pads(op, x.shape[2:], kernel, strides, dilations)), value=-torch.inf)
    return F.max_pool2d(x, kernel, strides, 0, dilations, bool(op.attributes.get("ceil_mode", 0)))


@_operator("AveragePool")
def _average_pool(op: Op, inputs: Inputs) -> Tensor:
    x, kernel, strides, dilations = _pool_window(op, inputs)
    if any(step != 1 for step in dilations):
        raise ValueError("dilated average pooling is not supported")
    padding = _torch_padding(_pads(op, x.shape[2:], kernel, strides, dilations))
    counted = F.pad(torch.ones_like(x[:1, :1]), padding, value=float(op.attributes.get("count_include_pad", 0)))
    ceil = bool(op.attributes.get("ceil_mode", 0))
    total, count = (
        F.avg_pool2d(value, kernel, strides, 0, ceil, divisor_override=1) for value in (F.pad(x, padding), counted)
    )
    return total / count


def _pool_window(op: Op, inputs: Inputs) -> tuple[Tensor, tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    x = _first(inputs)
    kernel = _sizes(op, "kernel_shape", 2)
    if len(kernel) != 2:
        raise ValueError(f"pooling over {len(kernel)} axes is not supported, only over 2")
    return x, kernel, _sizes(op, "strides", 2), _sizes(op, "dilations", 2)


@_operator("GlobalAveragePool")
def _global_average(op: Op, inputs: Inputs) -> Tensor:
    x = _first(inputs)
    return x.mean(dim=tuple(range(2, x.ndim)), keepdim=True)


@_operator("GlobalMaxPool")
def _global_max(op: Op, inputs: Inputs) -> Tensor:
    x = _first(inputs)
    return x.amax(dim=tuple(range(2, x.ndim)), keepdim=True)


# Reductions and normalisations.

_REDUCE: dict[str, Callable[[Tensor, tuple[int, ...], bool], Tensor]] = {
    "ReduceL1": lambda x, axes, keep: x.abs().sum(axes, keepdim=keep),
    "ReduceL2": lambda x, axes, keep: torch.linalg.vector_norm(x, dim=axes, keepdim=keep),
    "ReduceLogSumExp": lambda x, axes, keep: torch.logsumexp(x, axes, keepdim=keep),
    "ReduceMax": lambda x, axes, keep: x.amax(axes, keepdim=keep),
    "ReduceMean": lambda x, axes, keep: x.mean(axes, keepdim=keep),
    "ReduceMin": lambda x, axes, keep: x.amin(axes, keepdim=keep),
    "ReduceSum": lambda x, axes, keep: x.sum(axes, keepdim=keep),
    "ReduceSumSquare": lambda x, axes, keep: x.square().sum(axes, keepdim=keep),
}


@_operator(*_REDUCE)
def _reduce(op: Op, inputs: Inputs) -> Tensor:
    x = _first(inputs)
    axes = _list(op, inputs, "axes", 1)
    if not axes:
        if op.attributes.get("noop_with_empty_axes", 0):
            return x
        axes = list(range(x.ndim))
    return _REDUCE[op.kind](x, tuple(axes), bool(op.attributes.get("keepdims", 1)))


@_operator("ReduceProd")
def _reduce_prod(op: Op, inputs: Inputs) -> Tensor:
    x = _first(inputs)
    axes = _list(op, inputs, "axes", 1) or list(range(x.ndim))
    for axis in sorted((axis % x.ndim for axis in axes), reverse=True):
        x = x.prod(axis, keepdim=bool(op.attributes.get("keepdims", 1)))
    return x


@_operator("LayerNormalization")
def _layer_norm(op: Op, inputs: Inputs) -> tuple[Tensor, ...]:
    x, scale = _at(inputs, 0), _at(inputs, 1)
    axis = int(op.attributes.get("axis", -1)) % x.ndim
    shape, epsilon = list(x.shape[axis:]), float(op.attributes.get("epsilon", 1e-5))
    bias = _maybe(inputs, 2)
    result = F.layer_norm(x, shape, scale.expand(shape), None if bias is None else bias.expand(shape), epsilon)
    if not any(op.outputs[1:]):
        return (result,)
    axes = tuple(range(axis, x.ndim))
    mean = x.mean(axes, keepdim=True)
    return result, mean, (x.var(axes, correction=0, keepdim=True) + epsilon).rsqrt()


@_operator("BatchNormalization")
def _batch_norm(op: Op, inputs: Inputs) -> Tensor:
    if op.attributes.get("training_mode", 0):
        raise ValueError("it normalises with the statistics of the batch")
    x, scale, bias, mean, var = _present(inputs)
    return F.batch_norm(x, mean, var, scale, bias, eps=float(op.attributes.get("epsilon", 1e-5)))


@_operator("InstanceNormalization")
def _instance_norm(op: Op, inputs: Inputs) -> Tensor:
    x, scale, bias = _present(inputs)
    return F.group_norm(x, x.shape[1], scale, bias, float(op.attributes.get("epsilon", 1e-5)))


@_operator("GroupNormalization")
def _group_norm(op: Op, inputs: Inputs) -> Tensor:
    x, scale, bias = _present(inputs)
    groups = int(op.attributes["num_groups"])
    # Until opset 20 scale and bias were given per group, not per channel.
    scale, bias = (v if len(v) == x.shape[1] else v.repeat_interleave(x.shape[1] // groups) for v in (scale, bias))
    return F.group_norm(x, groups, scale, bias, float(op.attributes.get("epsilon", 1e-5)))


# Quantisation.


@_operator("QuantizeLinear")
def _quantize(op: Op, inputs: Inputs) -> Tensor:
    exact, _, _, (low, high) = quantization_grid(op, inputs)
    with torch.no_grad():
        # ONNX rounds x / scale and adds the zero point, a whole number, afterwards: half goes to even either way.
        moved = exact.round().clamp(low, high) - exact
    return exact + moved


@_operator("DequantizeLinear")
def _dequantize(op: Op, inputs: Inputs) -> Tensor:
    x, scale, zero = _quantization(op, inputs)
    return (x - zero) * scale


# Shapes, indices and moving data.


@_operator("Cast")
def _cast(op: Op, inputs: Inputs) -> Tensor:
    return _converted(_first(inputs), str(op.attributes["to"]))


@_operator("CastLike")
def _cast_like(op: Op, inputs: Inputs) -> Tensor:
    return _converted(_first(inputs), str(_at(inputs, 1).dtype).removeprefix("torch."))


def _converted(x: Tensor, name: str) -> Tensor:
    """A floating-point value stays as it is among floating-point types; from integers to them is float64, exact."""
    if name in _FLOATS:
        return x if x.is_floating_point() else x.to(torch.float64)
    return x.to({"bool": torch.bool}.get(name, torch.int64)) if name == "bool" else x.to(getattr(torch, name))


@_operator("Shape")
def _shape(op: Op, inputs: Inputs) -> Tensor:
    shape = list(_first(inputs).shape)
    start, end = int(op.attributes.get("start", 0)), op.attributes.get("end")
    return torch.tensor(shape[start : None if end is None else int(end)], dtype=torch.int64)


@_operator("Size")
def _size(op: Op, inputs: Inputs) -> Tensor:
    return torch.tensor(_first(inputs).numel())


@_operator("Reshape")
def _reshape(op: Op, inputs: Inputs) -> Tensor:
    x, shape = _first(inputs), _list(op, inputs, "shape", 1) or []
    if not op.attributes.get("allowzero", 0):
        shape = [x.shape[axis] if size == 0 else size for axis, size in enumerate(shape)]
    return x.reshape(shape)


@_operator("Flatten")
def _flatten(op: Op, inputs: Inputs) -> Tensor:
    x, axis = _first(inputs), int(op.attributes.get("axis", 1))
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(int(np.prod(x.shape[:axis], dtype=np.int64)), int(np.prod(x.shape[axis:], dtype=np.int64)))


@_operator("Transpose")
def _transpose(op: Op, inputs: Inputs) -> Tensor:
    x = _first(inputs)
    return x.permute([int(axis) for axis in op.attributes.get("perm", range(x.ndim - 1, -1, -1))])


@_operator("Squeeze")
def _squeeze(op: Op, inputs: Inputs) -> Tensor:
    x, axes = _first(inputs), _list(op, inputs, "axes", 1)
    return x.squeeze() if axes is None else x.squeeze(axes)


@_operator("Unsqueeze")
def _unsqueeze(op: Op, inputs: Inputs) -> Tensor:
    x, axes = _first(inputs), _list(op, inputs, "axes", 1) or []
    rank = x.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


@_operator("Concat")
def _concat(op: Op, inputs: Inputs) -> Tensor:
    return torch.cat(_present(inputs), int(op.attributes["axis"]))


@_operator("Split")
def _split(op: Op, inputs: Inputs) -> tuple[Tensor, ...]:
    x, axis = _first(inputs), int(op.attributes.get("axis", 0))
    sizes = _list(op, inputs, "split", 1)
    if sizes is None:
        each = -(-x.shape[axis] // len(op.outputs))
        sizes = [each] * (len(op.outputs) - 1) + [x.shape[axis] - each * (len(op.outputs) - 1)]
    ends = np.cumsum(sizes).tolist()
    return tuple(x.narrow(axis, end - size, size) for end, size in zip(ends, sizes, strict=True))


@_operator("Slice")
def _slice(op: Op, inputs: Inputs) -> Tensor:
    x = _first(inputs)
    starts, ends = _list(op, inputs, "starts", 1) or [], _list(op, inputs, "ends", 2) or []
    axes = _list(op, inputs, "axes", 3) or list(range(len(starts)))
    steps = _list(op, inputs, "steps", 4) or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        # Python's own rule for slices, negative steps included, is ONNX's; torch refuses negative steps.
        chosen = (
            range(*slice(start, end, step).indices(x.shape[axis])) if step > 0 else _backward(x, start, end, step, axis)
        )
        if step == 1:
            x = x.narrow(axis, chosen.start, len(chosen))
        else:
            x = x.index_select(axis, torch.tensor(chosen, dtype=torch.int64, device=x.device))
    return x


def _backward(x: Tensor, start: int, end: int, step: int, axis: int) -> range:
    """Indices of a slice with a negative step; an end below -size means down to and with the first."""
    size = x.shape[axis]
    return range(*slice(start, None if end < -size else end, step).indices(size))


@_operator("Gather")
def _gather(op: Op, inputs: Inputs) -> Tensor:
    x, indices, axis = _at(inputs, 0), _at(inputs, 1), int(op.attributes.get("axis", 0))
    axis %= x.ndim
    flat = indices.reshape(-1).to(x.device, torch.int64) % x.shape[axis]
    return x.index_select(axis, flat).reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


@_operator("GatherElements")
def _gather_elements(op: Op, inputs: Inputs) -> Tensor:
    x, indices, axis = _at(inputs, 0), _at(inputs, 1), int(op.attributes.get("axis", 0))
    return x.gather(axis, indices.to(x.device, torch.int64) % x.shape[axis])


@_operator("Expand")
def _expand(op: Op, inputs: Inputs) -> Tensor:
    x, shape = _first(inputs), _list(op, inputs, "shape", 1) or []
    return x.expand(np.broadcast_shapes(x.shape, tuple(shape)))


@_operator("Tile")
def _tile(op: Op, inputs: Inputs) -> Tensor:
    return _first(inputs).repeat(_list(op, inputs, "repeats", 1) or [])


@_operator("ConstantOfShape")
def _constant_of_shape(op: Op, inputs: Inputs) -> Tensor:
    value = np.asarray(op.attributes.get("value", np.zeros(1, np.float32))).reshape(-1)[0]
    return torch.full(_first(inputs).tolist(), value.item())


@_operator("Range")
def _range(op: Op, inputs: Inputs) -> Tensor:
    start, limit, delta = (_at(inputs, position) for position in range(3))
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


@_operator("Pad")
def _pad(op: Op, inputs: Inputs) -> Tensor:
    x, pads = _first(inputs), _list(op, inputs, "pads", 1) or []
    axes = [axis % x.ndim for axis in (_list(op, inputs, "axes", 3) or range(x.ndim))]
    pairs = [(0, 0)] * x.ndim
    for position, axis in enumerate(axes):
        pairs[axis] = (pads[position], pads[position + len(axes)])
    mode = op.attributes.get("mode", "constant")
    if mode == "constant":
        fill = _maybe(inputs, 2)
        value = float(op.attributes.get("value", 0.0)) if fill is None else float(fill.item())
        return F.pad(x, _torch_padding(pairs), value=value)
    for axis, (before, after) in enumerate(pairs):
        x = x.index_select(axis, _outside(mode, x.shape[axis], before, after).to(x.device))
    return x


def _outside(mode: str, size: int, before: int, after: int) -> Tensor:
    """Which index each place of a padded axis repeats."""
    place = torch.arange(-before, size + after)
    if mode == "edge":
        return place.clamp(0, size - 1)
    if mode == "wrap":
        return place % size
    if mode != "reflect":
        raise ValueError(f"there is no padding mode {mode!r}")
    period = max(2 * (size - 1), 1)
    return (size - 1) - ((place % period) - (size - 1)).abs()


@_operator("DepthToSpace")
def _depth_to_space(op: Op, inputs: Inputs) -> Tensor:
    x, size = _first(inputs), int(op.attributes["blocksize"])
    n, c, h, w = x.shape
    if op.attributes.get("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, size)
    parts = x.reshape(n, size, size, c // size**2, h, w)
    return parts.permute(0, 3, 4, 1, 5, 2).reshape(n, c // size**2, h * size, w * size)


@_operator("SpaceToDepth")
def _space_to_depth(op: Op, inputs: Inputs) -> Tensor:
    x, size = _first(inputs), int(op.attributes["blocksize"])
    n, c, h, w = x.shape
    parts = x.reshape(n, c, h // size, size, w // size, size)
    return parts.permute(0, 3, 5, 1, 2, 4).reshape(n, c * size**2, h // size, w // size)
