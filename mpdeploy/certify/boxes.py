"""A proved enclosure of everything that can happen to one sample inside a program.

State per value: the centre c that float64 computed, and bounds of x' - c for every admissible x': elementwise `radius`,
and `norm`, the Frobenius norm of the whole tensor. Admissible is every x' that the same operators make from the same
image in real arithmetic, when each of them may also err by its share of an `Arithmetic` and by what `inject` allows.
With neither, the enclosure still holds the rounding of the centre itself: it is then a bound of float64's own error.

The centre's rounding model: dot products and sums of n terms in any order, with or without fused multiply-add, but no
Strassen or Winograd forms; erf, exp and tanh within 8 units (Higham, Accuracy and Stability, ch. 3; two-pass or
Welford variance). All rules hold for displacements of any size, none is a linearisation. No derivative is taken at a
point: a slope is the largest on the whole segment.

The bound's own arithmetic is float64 too. Every bound is made of at most 2^19 additions, products and quotients of
non-negative numbers, and then multiplied by 1 + 2^-32: for n <= 2^19 roundings of relative size u = 2^-53 the computed
value is at least (1 - u)^n >= 1 - 2^-34 times the exact one. TINY outweighs all that underflow can lose.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpdeploy.certify.program import Op, Program, evaluate, evaluate_unrounded, quantization_grid

UP, DOWN, TINY = 1 + 2.0**-32, 1 - 2.0**-32, 1e-300
_LONGEST = 2**19
_LIBM = 8  # units of error of erf, exp and tanh


@dataclass(frozen=True)
class Arithmetic:
    """How far an operator's stored result may be from the exact result of its inputs.

    Attributes:
        inner: unit roundoff of a single operation inside an operator.
        accumulate: unit roundoff of the additions of a dot product, in any order.
        operand: unit roundoff of the operands of a product before it is made.
        store: unit roundoff of a stored result.
        smallest: absolute error of a stored result where it underflows.
        largest: above it a stored result overflows.
        exact_integers: products of dequantised operands are summed as integers, without error.
    """

    inner: float
    accumulate: float
    operand: float = 0.0
    store: float = 0.0
    smallest: float = TINY
    largest: float = math.inf
    exact_integers: bool = False

    def __add__(self, other: "Arithmetic") -> "Arithmetic":
        """Both errors at once: that of the centre's arithmetic and that of the one spoken about.

        gamma_n(u) + gamma_n(v) <= gamma_n(u + v), because gamma_n is convex with gamma_n(0) = 0.
        """
        return Arithmetic(
            inner=self.inner + other.inner,
            accumulate=self.accumulate + other.accumulate,
            operand=self.operand + other.operand,
            store=self.store + other.store,
            smallest=self.smallest + other.smallest,
            largest=min(self.largest, other.largest),
            exact_integers=self.exact_integers or other.exact_integers,
        )


FLOAT64 = Arithmetic(inner=2.0**-53, accumulate=2.0**-53)


@dataclass(frozen=True)
class Box:
    """The enclosure of one value; all tensors are float64.

    Attributes:
        centre: what float64 computed.
        radius: like `centre`, |x' - c| elementwise; inf where there is no bound.
        norm: scalar, Frobenius norm of x' - c.
        gain: like `centre`, or None: |a - b| <= gain * d for any two admissible values a and b whose injected
            displacements differ by at most d in every element: a Lipschitz constant on the whole enclosure.
        added: like `centre`: the part of `radius` that arose at the operator that made it.
        why: names the operator for which no rule is known, where one took part; else "".
    """

    centre: Tensor
    radius: Tensor
    norm: Tensor
    gain: Tensor | None = None
    added: Tensor | None = None
    why: str = ""

    @property
    def magnitude(self) -> Tensor:
        """|x'| is never larger."""
        return _up(self.centre.abs() + self.radius)

    @property
    def ends(self) -> tuple[Tensor, Tensor]:
        """Lower and upper end of every element."""
        slack = (self.centre.abs() + self.radius) * 2.0**-50 + TINY
        low, high = self.centre - self.radius - slack, self.centre + self.radius + slack
        return low.nan_to_num(-math.inf), high.nan_to_num(math.inf)


Value = Box | Tensor
Values = Sequence[Value | None]
Deviations = Sequence[Tensor | None]
Inject = Callable[[Op, Tensor], Tensor | float | None]
"""Operator and its output's centre -> radius to add there, or None."""


@dataclass(frozen=True)
class Rule:
    """What one operator does to displacements.

    Attributes:
        between: deviations of the inputs -> bound of |f(a) - f(b)| for any two a, b in the boxes that differ by them.
        reach: further bound of |f(x') - f(c)|, or None.
        norm: bound of its Frobenius norm, or None.
        error: bound of the rounding that the operator does inside, before its result is stored.
    """

    between: Callable[[Deviations], Tensor]
    reach: Tensor | None = None
    norm: Tensor | None = None
    error: Tensor | float = 0.0


class Prepared:
    """A program and what its bounds need of its constants, computed once.

    Attributes:
        program: the program.
        constants: its constants, floating-point ones as float64.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.constants = {name: _float64(torch.from_numpy(_plain(value))) for name, value in program.constants.items()}
        self._memory: dict[tuple[str, str], Tensor] = {}

    def remember(self, op: Op, what: str, make: Callable[[], Tensor]) -> Tensor:
        """Return what was made of this operator's constants before, or make it now."""
        key = (op.name, what)
        if key not in self._memory:
            self._memory[key] = make()
        return self._memory[key]


def _plain(array: NDArray[Any]) -> NDArray[Any]:
    exact = array if array.dtype.kind in "iub" or array.dtype in (np.float16, np.float32) else array.astype(np.float64)
    return np.array(exact)


def _float64(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def propagate(
    prepared: Prepared,
    image: Tensor,
    arithmetic: Arithmetic = FLOAT64,
    inject: Inject | None = None,
    *,
    known: Mapping[str, Value] | None = None,
    gains: bool = False,
) -> dict[str, Value]:
    """Enclose every value of a program for one image.

    Args:
        prepared: the program.
        image: [1, C, H, W], taken as exact unless the arithmetic stores it with an error.
        arithmetic: what every operator may err by; it includes float64, the centre's own (`FLOAT64 + ...`).
        inject: further displacement at an operator's (first) output.
        known: enclosures to take over instead of making them again; they include what was injected there.
        gains: also bound the Lipschitz constant with respect to what is injected; see `Box.gain`.

    Returns:
        Name of a value -> Box, or a plain tensor where the value depends on the image's shape only.
    """
    program = prepared.program
    centre = image.double()
    zero = torch.zeros_like(centre)
    values: dict[str, Value] = dict(prepared.constants)
    values[program.input] = _stored(Box(centre, zero, zero.sum(), zero if gains else None), 0.0, arithmetic)
    values.update(known or {})
    for op in program.ops:
        if known is not None and all(name in known for name in op.outputs if name):
            continue
        inputs = [values[name] if name else None for name in op.inputs]
        for name, value in zip(op.outputs, _step(prepared, op, inputs, arithmetic, inject, gains), strict=False):
            if name:
                values[name] = value
    return values


def _step(
    prepared: Prepared, op: Op, inputs: Values, arithmetic: Arithmetic, inject: Inject | None, gains: bool
) -> list[Value]:
    centres = [value.centre if isinstance(value, Box) else value for value in inputs]
    outputs = evaluate_unrounded(op, centres)
    if not any(isinstance(value, Box) for value in inputs):
        exact = op.kind in _MOVES or op.kind in _EXACT_ON_CONSTANTS or not outputs[0].is_floating_point()
        if exact:
            return list(outputs)
        inputs = [_exact(value, gains) if index == 0 else value for index, value in enumerate(inputs)]
    if not outputs[0].is_floating_point():
        # Only shapes and comparisons: a comparison of boxes is no constant.
        if op.kind in ("Shape", "Size"):
            return list(outputs)
        return [_unbounded(output.double(), op, gains) for output in outputs]
    boxes = [
        _output(prepared, op, index, inputs, output.double(), arithmetic, gains) for index, output in enumerate(outputs)
    ]
    extra = inject(op, boxes[0].centre) if inject is not None else None
    if extra is not None:
        boxes[0] = _displaced(boxes[0], extra)
    return list(boxes)


def _exact(value: Value | None, gains: bool) -> Box:
    assert isinstance(value, Tensor)
    zero = torch.zeros_like(value.double())
    return Box(value.double(), zero, zero.sum(), zero if gains else None)


def _unbounded(centre: Tensor, op: Op, gains: bool) -> Box:
    nothing = torch.full_like(centre, math.inf)
    why = f"{op.name} ({op.kind})"
    return Box(centre, nothing, torch.tensor(math.inf, dtype=torch.float64), nothing if gains else None, nothing, why)


def _output(
    prepared: Prepared, op: Op, index: int, inputs: Values, centre: Tensor, arithmetic: Arithmetic, gains: bool
) -> Box:
    make = _RULES.get(op.kind)
    rule = None if make is None else make(Context(prepared, op, index, inputs, centre, arithmetic))
    if rule is None:
        return _unbounded(centre, op, gains)
    radii = [value.radius if isinstance(value, Box) else None for value in inputs]
    radius = _up(rule.between(radii)).expand_as(centre)
    if rule.reach is not None:
        radius = torch.minimum(radius, _safe(_up(rule.reach)))
    radius = _safe(radius)
    norm = _frobenius(radius)
    if rule.norm is not None:
        norm = torch.minimum(norm, _safe(_up(rule.norm)))
        radius = torch.minimum(radius, norm)
    gain = None
    if gains:
        gain = _safe(_up(rule.between([value.gain if isinstance(value, Box) else None for value in inputs])))
        gain = gain.expand_as(centre)
    why = next((value.why for value in inputs if isinstance(value, Box) and value.why), "")
    box = Box(centre, radius, norm, gain, None, why)
    return box if op.kind in _MOVES else _stored(box, rule.error, arithmetic)


def _stored(box: Box, error: Tensor | float, arithmetic: Arithmetic) -> Box:
    """Add an operator's own rounding to its enclosure."""
    reach = box.magnitude + error
    added = _safe(_up(error + arithmetic.store * reach + arithmetic.smallest))
    added = torch.where(reach * (1 + arithmetic.store) < arithmetic.largest, added, math.inf)
    return _displaced(box, added)


def _displaced(box: Box, extra: Tensor | float) -> Box:
    """Let every element lie `extra` further away; the displacement has gain 1 if gains are asked for by `ball`."""
    extra = torch.as_tensor(extra, dtype=torch.float64).expand_as(box.centre)
    added = extra if box.added is None else _up(box.added + extra)
    norm = _safe(_up(box.norm + _frobenius(extra)))
    return replace(box, radius=_safe(_up(box.radius + extra)), norm=norm, added=added)


def ball(box: Box, radius: float) -> Box:
    """Every value within `radius` of each element of a box: the displacement that gains are with respect to."""
    moved = _displaced(box, radius)
    return replace(moved, gain=torch.ones_like(box.centre))


def _up(value: Tensor) -> Tensor:
    return value * UP + TINY


def _safe(value: Tensor) -> Tensor:
    """0 times infinity is no bound."""
    return value.nan_to_num(math.inf, math.inf)


def _frobenius(value: Tensor) -> Tensor:
    return _up(value.square().sum().sqrt())


def gamma(count: int, unit: float) -> float:
    """The relative error n u / (1 - n u) of a sum of n products in any order; inf where it says nothing."""
    spent = count * unit
    return math.inf if spent >= 1 else spent / (1 - spent) * UP


def spectral_norm(matrix: Tensor) -> Tensor:
    """Proved upper bound of the largest singular value of each matrix [..., a, b], about 5 % above it.

    lambda(G) = lambda(G^32)^(1/32) <= ||G^32||_F^(1/32) for the Gram matrix G; each computed square Q of Q differs from
    the exact one by at most gamma_n ||Q||_F^2. No iteration that has to converge is trusted.
    """
    scale = matrix.abs().amax((-2, -1), keepdim=True).clamp_min(TINY)
    unit = matrix / scale
    tall = unit.shape[-2] > unit.shape[-1]
    gram = unit.mT @ unit if tall else unit @ unit.mT
    # gamma of one more term covers the division by the scale.
    loss = gamma(max(matrix.shape[-2:]) + 4, FLOAT64.inner)
    squared = _largest(gram, 5) + loss * unit.square().sum((-2, -1)) * UP
    return _up(squared.sqrt() * scale[..., 0, 0])


def _largest(gram: Tensor, squarings: int) -> Tensor:
    """Largest singular value; the transpose makes it right for a square that rounding left unsymmetric."""
    fro = gram.square().sum((-2, -1)) * UP
    if squarings == 0:
        return fro.sqrt() * UP
    loss = gamma(gram.shape[-1] + 2, FLOAT64.inner)
    return (_largest(gram.mT @ gram, squarings - 1) + loss * fro).sqrt() * UP


# One rule per kind of operator.


@dataclass(frozen=True)
class Context:
    """What a rule may look at.

    Attributes:
        prepared: the program.
        op: the operator.
        index: which of its outputs.
        inputs: enclosures, plain tensors where a value is constant, None where it is absent.
        centre: the output that float64 computed.
        arithmetic: what the operator may err by, float64 included.
    """

    prepared: Prepared
    op: Op
    index: int
    inputs: Values
    centre: Tensor
    arithmetic: Arithmetic

    @property
    def box(self) -> Box:
        """The only enclosure among the inputs, or the first."""
        return next(value for value in self.inputs if isinstance(value, Box))

    def again(self, inputs: Sequence[Tensor | None], **attributes: Any) -> Tensor:
        """The same operator on other inputs."""
        op = replace(self.op, attributes={**self.op.attributes, **attributes})
        return evaluate(op, inputs)[self.index]

    def magnitudes(self) -> list[Tensor | None]:
        """|x'| of every input."""
        return [v.magnitude if isinstance(v, Box) else None if v is None else v.abs() for v in self.inputs]

    def constant(self, position: int) -> Tensor | None:
        """A constant floating-point input, or None."""
        value = self.inputs[position] if position < len(self.inputs) else None
        return value if isinstance(value, Tensor) else None


_RULES: dict[str, Callable[[Context], Rule | None]] = {}


def _rule(*kinds: str) -> Callable[[Callable[[Context], Rule | None]], Callable[[Context], Rule | None]]:
    def register(make: Callable[[Context], Rule | None]) -> Callable[[Context], Rule | None]:
        _RULES.update(dict.fromkeys(kinds, make))
        return make

    return register


# Moving data is exact; a norm survives where nothing is repeated.

_KEEPS_NORM = frozenset(
    {"Identity", "Dropout", "Cast", "CastLike", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze"}
    | {"Slice", "Split", "Concat", "DepthToSpace", "SpaceToDepth"}
)
_REPEATS = frozenset({"Gather", "Expand", "Tile", "Pad", "Where"})
_MOVES = _KEEPS_NORM | _REPEATS
_EXACT_ON_CONSTANTS = frozenset({"DequantizeLinear", "ConstantOfShape", "Range", "Neg", "Abs", "Relu"})


@_rule(*_MOVES)
def _move(context: Context) -> Rule | None:
    op, inputs = context.op, context.inputs
    if op.kind == "Where" and not isinstance(inputs[0], Tensor):
        return None
    if op.kind == "Cast" and not str(op.attributes["to"]).startswith(("float", "bfloat")):
        return None

    def between(deviations: Deviations) -> Tensor:
        moved: list[Tensor | None] = []
        for value, deviation in zip(inputs, deviations, strict=True):
            floats = isinstance(value, Tensor) and value.is_floating_point()
            moved.append(
                deviation if isinstance(value, Box) else torch.zeros_like(_present(value)) if floats else value
            )
        if op.kind == "Pad":  # what fills the border is the same for both
            moved[2:3] = [torch.zeros((), dtype=torch.float64)] if len(moved) > 2 and moved[2] is not None else []
            return context.again(moved, value=0.0)
        return context.again(moved)

    norm = None
    if op.kind in _KEEPS_NORM:
        norm = torch.stack([value.norm.square() for value in inputs if isinstance(value, Box)]).sum().sqrt()
    return Rule(between, norm=norm)


# Products with constants.


def _multiplicity(op: Op, kernel: Sequence[int]) -> int:
    """In how many windows one input element takes part at most."""
    strides = op.attributes.get("strides") or [1] * len(kernel)
    if any(step != 1 for step in op.attributes.get("dilations") or []):
        return math.prod(kernel)
    return math.prod(-(-size // step) for size, step in zip(kernel, strides, strict=True))


def _dot_error(context: Context, count: int, magnitude: Tensor) -> Tensor:
    """Rounding of dot products of `count` terms whose absolute terms sum up to `magnitude`."""
    arithmetic = context.arithmetic
    units = 2 * arithmetic.operand + arithmetic.operand**2
    if arithmetic.exact_integers and _dequantised(context):
        return (gamma(count, FLOAT64.accumulate) + gamma(4, arithmetic.inner)) * magnitude
    spread = gamma(count, arithmetic.accumulate)
    return (spread + units + spread * units) * magnitude


def _dequantised(context: Context) -> bool:
    makers = {name: op.kind for op in context.prepared.program.ops for name in op.outputs}
    return all(makers.get(name) == "DequantizeLinear" for name in context.op.inputs[:2])


@_rule("Conv")
def _conv(context: Context) -> Rule | None:
    weight, op, box = context.constant(1), context.op, context.inputs[0]
    if weight is None or not isinstance(box, Box):
        return None
    count = math.prod(weight.shape[1:])
    if count > _LONGEST or not (len(context.inputs) < 3 or isinstance(context.inputs[2], Tensor | None)):
        return None
    kernel = list(weight.shape[2:])
    size = context.prepared.remember(op, "abs", weight.abs)
    rows = context.prepared.remember(op, "rows", lambda: _up(weight.flatten(1).square().sum(1).sqrt()))
    norm = context.prepared.remember(op, "norm", lambda: _conv_norm(op, weight))
    bias = context.constant(2)
    magnitude = context.again([box.magnitude, size, None if bias is None else bias.abs()])

    def between(deviations: Deviations) -> Tensor:
        return context.again([deviations[0], size])

    reach = rows.reshape(1, -1, *[1] * len(kernel)) * box.norm
    return Rule(between, reach, norm * box.norm, _dot_error(context, count + 2, magnitude))


def _conv_norm(op: Op, weight: Tensor) -> Tensor:
    """Bound of a convolution's operator norm: through im2col, or one shift per kernel position, whichever is less."""
    groups = int(op.attributes.get("group", 1))
    each = weight.reshape(groups, -1, *weight.shape[1:])
    unfolded = spectral_norm(each.flatten(2)).max() * math.sqrt(_multiplicity(op, weight.shape[2:]))
    shifts = spectral_norm(each.flatten(3).movedim(3, 0)).amax(1).sum()
    return _up(torch.minimum(unfolded, shifts))


@_rule("Gemm")
def _gemm(context: Context) -> Rule | None:
    op, box, weight = context.op, context.inputs[0], context.constant(1)
    bias = context.inputs[2] if len(context.inputs) > 2 else None
    if weight is None or not isinstance(box, Box) or isinstance(bias, Box) or op.attributes.get("transA", 0):
        return None
    alpha, beta = abs(float(op.attributes.get("alpha", 1.0))), abs(float(op.attributes.get("beta", 1.0)))
    matrix = weight.mT if op.attributes.get("transB", 0) else weight  # [inputs, outputs]
    if len(matrix) > _LONGEST:
        return None
    size = context.prepared.remember(op, "abs", weight.abs)
    columns = context.prepared.remember(op, "rows", lambda: _up(matrix.square().sum(0).sqrt()))
    norm = context.prepared.remember(op, "norm", lambda: spectral_norm(matrix))
    absolute = [box.magnitude, size, None if bias is None else bias.abs()]
    magnitude = context.again(absolute, alpha=alpha, beta=beta)

    def between(deviations: Deviations) -> Tensor:
        return context.again([deviations[0], size], alpha=alpha)

    error = _dot_error(context, len(matrix) + 4, magnitude)
    return Rule(between, alpha * columns * box.norm, alpha * norm * box.norm, error)


@_rule("MatMul")
def _matmul(context: Context) -> Rule | None:
    left, right = context.inputs
    assert left is not None
    assert right is not None
    count = _centre(left).shape[-1]
    if count > _LONGEST or min(_centre(left).ndim, _centre(right).ndim) < 2:
        return None
    if isinstance(left, Box) and isinstance(right, Box):
        return _product(context, left, right, count)
    swap = isinstance(right, Box)
    box, weight = (right, left) if swap else (left, right)
    assert isinstance(box, Box)
    assert isinstance(weight, Tensor)
    op = context.op
    size = context.prepared.remember(op, "abs", weight.abs)
    rows = context.prepared.remember(op, "rows", lambda: _up(weight.square().sum(-1 if swap else -2).sqrt()))
    # A stack of weights that meets one input repeats it: then there is no norm to be had from one matrix.
    norm = context.prepared.remember(op, "norm", lambda: spectral_norm(weight).max()) if weight.ndim == 2 else None

    def between(deviations: Deviations) -> Tensor:
        return size @ _present(deviations[1]) if swap else _present(deviations[0]) @ size

    magnitude = between([box.magnitude, box.magnitude])
    reach = rows.unsqueeze(-1 if swap else -2) * box.norm
    return Rule(between, reach, None if norm is None else norm * box.norm, _dot_error(context, count + 2, magnitude))


def _product(context: Context, a: Box, b: Box, count: int) -> Rule:
    """The product's change: a'b' - ab = da b + a db + da db."""
    big_a, big_b = a.magnitude, b.magnitude

    def between(deviations: Deviations) -> Tensor:
        da, db = deviations
        return _present(da) @ big_b + big_a @ _present(db)

    reach = a.radius @ big_b + a.centre.abs() @ b.radius
    norm = None
    if a.centre.shape[:-2] == b.centre.shape[:-2]:
        size_a, size_b = spectral_norm(a.centre).max(), spectral_norm(b.centre).max()
        norm = a.norm * size_b + size_a * b.norm + a.norm * b.norm
        # Row i of da times column j of b, by Cauchy and Schwarz.
        columns = b.centre.square().sum(-2, keepdim=True).sqrt()
        rows = a.centre.square().sum(-1, keepdim=True).sqrt()
        reach = torch.minimum(reach, _up(a.norm * columns + rows * b.norm + a.norm * b.norm))
    return Rule(between, reach, norm, _dot_error(context, count + 2, big_a @ big_b))


# Sums and elementwise products.


def _present(value: Tensor | None) -> Tensor:
    """An input that the operator can't do without."""
    assert value is not None
    return value


def _spread(box: Box, centre: Tensor) -> float:
    """By how much a norm grows when the value is broadcast to the output's shape."""
    return math.sqrt(max(1.0, centre.numel() / box.centre.numel()))


@_rule("Add", "Sub", "Sum")
def _add(context: Context) -> Rule:
    boxes = [value for value in context.inputs if isinstance(value, Box)]

    def between(deviations: Deviations) -> Tensor:
        return torch.stack([v.expand_as(context.centre) for v in deviations if v is not None]).sum(0)

    norm = torch.stack([box.norm * _spread(box, context.centre) for box in boxes]).sum()
    magnitude = torch.stack([v.expand_as(context.centre) for v in context.magnitudes() if v is not None]).sum(0)
    terms = len(context.inputs) - 1
    # A single addition errs relative to its result, which is at most the sum of the magnitudes.
    return Rule(between, norm=norm, error=gamma(terms, context.arithmetic.inner) * magnitude)


@_rule("Min", "Max")
def _extreme(context: Context) -> Rule:
    def between(deviations: Deviations) -> Tensor:
        return torch.stack([v.expand_as(context.centre) for v in deviations if v is not None]).amax(0)

    return Rule(between)


@_rule("Mul")
def _mul(context: Context) -> Rule:
    a, b = context.inputs
    big = [_present(value) for value in context.magnitudes()]
    error = context.arithmetic.inner * big[0] * big[1]

    def between(deviations: Deviations) -> Tensor:
        parts = [d * m for d, m in zip(deviations, reversed(big), strict=True) if d is not None and m is not None]
        return torch.stack([part.expand_as(context.centre) for part in parts]).sum(0)

    if not (isinstance(a, Box) and isinstance(b, Box)):
        other = big[1] if isinstance(a, Box) else big[0]
        box = context.box
        return Rule(between, norm=box.norm * other.max() * _spread(box, context.centre), error=error)
    reach = a.radius * big[1] + a.centre.abs() * b.radius
    norm = (
        a.norm * _spread(a, context.centre) * big[1].max() + b.norm * _spread(b, context.centre) * a.centre.abs().max()
    )
    return Rule(between, reach, norm, error)


@_rule("Div")
def _div(context: Context) -> Rule | None:
    a, b = context.inputs
    big = [_present(value) for value in context.magnitudes()]
    if isinstance(b, Box):
        nearest = (b.centre.abs() - b.radius) * DOWN - TINY
        nearest = torch.where(nearest > 0, nearest, 0.0)
    else:
        assert isinstance(b, Tensor)
        nearest = b.abs()
    quotient = _up(big[0] / nearest)

    def between(deviations: Deviations) -> Tensor:
        above, below = deviations
        whole = torch.zeros_like(context.centre)
        if above is not None:
            whole = whole + above / nearest
        if below is not None:
            whole = whole + quotient * below / nearest
        return whole

    norm = None
    if isinstance(a, Box) and not isinstance(b, Box):
        norm = a.norm * _spread(a, context.centre) / nearest.min()
    return Rule(between, norm=norm, error=context.arithmetic.inner * quotient)


@_rule("Pow")
def _square(context: Context) -> Rule | None:
    exponent = context.constant(1)
    if exponent is None or exponent.numel() != 1 or exponent.item() != 2:
        return None
    big = context.box.magnitude

    def between(deviations: Deviations) -> Tensor:
        return 2 * big * _present(deviations[0])

    reach = context.box.radius * (big + context.box.centre.abs())
    return Rule(between, reach, 2 * big.max() * context.box.norm, 4 * context.arithmetic.inner * big.square())


# Sums over windows and axes.


@_rule("ReduceMean", "ReduceSum", "GlobalAveragePool", "AveragePool", "MaxPool", "GlobalMaxPool", "ReduceMax")
def _window(context: Context) -> Rule | None:
    op, box = context.op, context.box
    if context.index > 0:
        return None
    rest = [value if isinstance(value, Tensor) else None for value in context.inputs[1:]]
    largest = op.kind in ("MaxPool", "GlobalMaxPool", "ReduceMax")

    def between(deviations: Deviations) -> Tensor:
        return context.again([deviations[0], *rest])

    per_output = max(1, box.centre.numel() // max(1, context.centre.numel()))
    if op.kind in ("AveragePool", "MaxPool"):
        kernel = op.attributes["kernel_shape"]
        count, factor = math.prod(kernel), math.sqrt(_multiplicity(op, kernel))
    else:
        count = per_output
        factor = 1.0 if largest else math.sqrt(count) if op.kind == "ReduceSum" else 1 / math.sqrt(count)
    if count > _LONGEST:
        return None
    error: Tensor | float = 0.0
    if not largest:
        error = gamma(count + 2, context.arithmetic.accumulate) * between([box.magnitude])
    return Rule(between, norm=box.norm * factor, error=error)


@_rule("BatchNormalization")
def _batch_norm(context: Context) -> Rule | None:
    box = context.inputs[0]
    scale, bias, mean, var = (context.constant(position) for position in range(1, 5))
    if not isinstance(box, Box) or scale is None or bias is None or mean is None or var is None or context.index:
        return None
    shape = (1, -1, *[1] * (box.centre.ndim - 2))
    slope = _up(scale.abs() / (var + float(context.op.attributes.get("epsilon", 1e-5))).sqrt()).reshape(shape)
    magnitude = slope * (box.magnitude + mean.abs().reshape(shape)) + bias.abs().reshape(shape)

    def between(deviations: Deviations) -> Tensor:
        return slope * _present(deviations[0])

    return Rule(between, norm=slope.max() * box.norm, error=gamma(10, context.arithmetic.inner) * magnitude)


# Functions of one element.


@dataclass(frozen=True)
class Curve:
    """A function of one variable.

    Attributes:
        slope: (operator, lower end, upper end) -> largest |f'| between them.
        error: (magnitude of the input, magnitude of the output) -> error in units of the inner arithmetic.
        rising: whether it never falls, so that a segment's ends give its range.
        lowest: smallest value where that is no end's, or None.
    """

    slope: Callable[[Op, Tensor, Tensor], Tensor]
    error: Callable[[Tensor, Tensor], Tensor]
    rising: bool = True
    lowest: float | None = None


def _nearest_to_zero(low: Tensor, high: Tensor) -> Tensor:
    return torch.maximum(torch.maximum(low, -high), torch.zeros_like(low))


def _gelu_slope(op: Op, low: Tensor, high: Tensor) -> Tensor:
    """Phi + x phi rises on [-sqrt 2, sqrt 2], where it goes from -0.12891 to 1.12891, and falls outside."""
    if op.attributes.get("approximate", "none") != "none":
        return torch.full_like(low, 1.13)  # the tanh form's largest slope is 1.12900
    top = math.sqrt(2)
    inside_top = (low <= top) & (high >= top)
    inside_bottom = (low <= -top) & (high >= -top)
    ends = torch.maximum(_gelu_derivative(low).abs(), _gelu_derivative(high).abs()) + 1e-14
    ends = torch.where(inside_bottom, ends.clamp_min(0.12892), ends)
    return torch.where(inside_top, torch.full_like(ends, 1.12892), ends)


def _gelu_derivative(x: Tensor) -> Tensor:
    x = x.clamp(-40, 40)
    return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _sigmoid_slope(op: Op, low: Tensor, high: Tensor) -> Tensor:
    rest = torch.sigmoid(-_nearest_to_zero(low, high))
    return (rest * (1 - rest) * (1 + 1e-12)).clamp_max(0.25)


def _tanh_slope(op: Op, low: Tensor, high: Tensor) -> Tensor:
    return 4 * _sigmoid_slope(op, 2 * low, 2 * high)


def _erf_slope(op: Op, low: Tensor, high: Tensor) -> Tensor:
    nearest = _nearest_to_zero(low, high).clamp_max(30)
    return 2 / math.sqrt(math.pi) * torch.exp(-nearest.square()) * (1 + 1e-12)


def _hard_swish_slope(op: Op, low: Tensor, high: Tensor) -> Tensor:
    inner = torch.maximum((2 * low.clamp(-3, 3) + 3).abs(), (2 * high.clamp(-3, 3) + 3).abs()) / 6 * (1 + 1e-12)
    outer = (high >= 3).double()
    return torch.where((high > -3) & (low < 3), torch.maximum(inner, outer), outer)


def _hard_sigmoid_slope(op: Op, low: Tensor, high: Tensor) -> Tensor:
    return torch.full_like(low, abs(float(op.attributes.get("alpha", 0.2))))


def _leaky_slope(op: Op, low: Tensor, high: Tensor) -> Tensor:
    alpha = abs(float(op.attributes.get("alpha", 0.01)))
    below = torch.where(low < 0, alpha, 0.0)
    return torch.where(high > 0, below.clamp_min(1.0), below)


def _one(op: Op, low: Tensor, high: Tensor) -> Tensor:
    return torch.ones_like(low)


def _relu_slope(op: Op, low: Tensor, high: Tensor) -> Tensor:
    return (high > 0).double()


def _exp_slope(op: Op, low: Tensor, high: Tensor) -> Tensor:
    return torch.exp(high) * (1 + 1e-12)


def _sqrt_slope(op: Op, low: Tensor, high: Tensor) -> Tensor:
    return torch.where(low > 0, 0.5 / low.clamp_min(TINY).sqrt() * (1 + 1e-12), math.inf)


def _nothing(x: Tensor, y: Tensor) -> Tensor:
    return torch.zeros_like(y)


def _relative(x: Tensor, y: Tensor) -> Tensor:
    return (_LIBM + 4) * y


_CURVES = {
    "Relu": Curve(_relu_slope, _nothing),
    "Clip": Curve(_one, _nothing),
    "Neg": Curve(_one, _nothing, rising=False),
    "Abs": Curve(_one, _nothing, rising=False),
    "LeakyRelu": Curve(_leaky_slope, lambda x, y: y, rising=False),
    "Sigmoid": Curve(_sigmoid_slope, _relative),
    "Tanh": Curve(_tanh_slope, _relative),
    "Erf": Curve(_erf_slope, _relative),
    "Exp": Curve(_exp_slope, _relative),
    "Sqrt": Curve(_sqrt_slope, lambda x, y: 2 * y),
    # 1 + erf cancels for negative x, so the error is relative to x.
    "Gelu": Curve(_gelu_slope, lambda x, y: 2 * _LIBM * x, rising=False, lowest=-0.17),
    "HardSwish": Curve(_hard_swish_slope, lambda x, y: 8 * x, rising=False, lowest=-0.375),
    "HardSigmoid": Curve(_hard_sigmoid_slope, lambda x, y: 4 * x + 4, rising=False),
}


@_rule(*_CURVES)
def _elementwise(context: Context) -> Rule:
    """|f(a) - f(b)| <= sup |f'| |a - b|; a rising function also stays between its values at the segment's ends."""
    curve, box, op = _CURVES[context.op.kind], context.box, context.op
    rest = [value if isinstance(value, Tensor) else None for value in context.inputs[1:]]
    low, high = box.ends
    slope = curve.slope(op, low, high)

    def between(deviations: Deviations) -> Tensor:
        return torch.where(slope == 0, 0.0, slope * _present(deviations[0]))

    reach = None
    if curve.rising or curve.lowest is not None:
        bottom, top = context.again([low, *rest]), context.again([high, *rest])
        if curve.lowest is not None:
            # Falls to its one minimum and rises after it: the ends bound it from above, the minimum from below.
            bottom, top = torch.full_like(low, curve.lowest), torch.maximum(bottom, top)
        own = FLOAT64.inner * curve.error(torch.maximum(low.abs(), high.abs()), torch.maximum(bottom.abs(), top.abs()))
        reach = torch.maximum(top - context.centre, context.centre - bottom).clamp_min(0) + 2 * own
    magnitude = box.magnitude
    result = context.centre.abs() + torch.minimum(between([box.radius]), _infinite(reach, slope))
    error = context.arithmetic.inner * curve.error(magnitude, _up(result))
    return Rule(between, reach, slope.max() * box.norm, error)


def _infinite(value: Tensor | None, like: Tensor) -> Tensor:
    return torch.full_like(like, math.inf) if value is None else value


# Softmax and layer norm.


@_rule("Softmax")
def _softmax(context: Context) -> Rule | None:
    """Each p_i on a box of scores is extreme at a corner: s_i + e_i with all others at s_j - e_j, or the reverse.

    With a = e_i, b = e_j and p the softmax of the centre, p_i is between p_i / (1 + T) and p_i / (1 - U), where
    U = sum_{j != i} p_j (1 - e^{-a-b}),  T = sum_{j != i} p_j (e^{a+b} - 1).
    Between two points the mean value theorem gives sum_j |dp_i/ds_j| v_j <= pmax_i (v_i (1 - pmin_i) + sum pmax_j v_j).
    In the 2-norm softmax is 1/2-Lipschitz: v' (diag p - p p') v is a variance, at most (max v - min v)^2 / 4.
    """
    box, op = context.box, context.op
    if op.attributes.get("opset", 13) < 13:
        return None
    axis = int(op.attributes.get("axis", -1)) % box.centre.ndim
    p, e, count = context.centre, box.radius, box.centre.shape[axis]
    if count > _LONGEST:
        return None

    def total(value: Tensor) -> Tensor:
        return value.sum(axis, keepdim=True)

    # Relative error of an evaluated p_i: exp within _LIBM, of an argument that is off by u times its size, in the
    # numerator and, weighted, in the sum.
    away = box.centre.amax(axis, keepdim=True) - box.centre
    wide = (box.centre + e).amax(axis, keepdim=True) - (box.centre - e)
    away = torch.where(p > 0, away, 0.0)
    units = 2 * _LIBM + 8 + away + total(p * away) * UP
    own = (units * FLOAT64.inner + gamma(count + 4, FLOAT64.inner)).amax(axis, keepdim=True)

    less_i, less_j = -torch.expm1(-e), total(-torch.expm1(-e) * p)
    more_i, more_j = torch.expm1(e), total(torch.expm1(e) * p)
    slack = gamma(count + 8, FLOAT64.inner) + own
    others = (1 - p).clamp_min(0) + slack
    U = others * less_i + (1 - less_i) * ((less_j - p * less_i).clamp_min(0) + slack * less_j)
    T = others * more_i + (1 + more_i) * ((more_j - p * more_i).clamp_min(0) + slack * more_j)
    left = torch.maximum(p, (1 - U) * DOWN - slack).clamp(TINY, 1.0)
    grow, shrink = p * U / left, p * torch.where(T.isfinite(), T / (1 + T), 1.0)
    reach = torch.maximum(grow, shrink) * (1 + 8 * own)
    reach = torch.minimum(reach, torch.maximum(p, 1 - p) + own)
    largest = (p * (1 + 2 * own) + reach).clamp_max(1.0)
    smallest = (p * (1 - 2 * own) - reach).clamp_min(0.0)

    def between(deviations: Deviations) -> Tensor:
        v = _present(deviations[0])
        mixed = total(largest * v) - largest * v
        return largest * ((1 - smallest) * v * UP + mixed.clamp_min(0) + slack * total(largest * v))

    # The arithmetic's error on any scores of the box, relative to the largest p_i.
    wide = _safe(wide)
    spent = 2 * _LIBM + 8 + wide + total(torch.where(largest > 0, largest * wide, 0.0))
    error = (spent * context.arithmetic.inner + gamma(count + 4, context.arithmetic.inner)) * largest
    return Rule(between, reach, 0.5 * box.norm, torch.where(largest > 0, error, 0.0))


@_rule("LayerNormalization")
def _layer_norm(context: Context) -> Rule | None:
    """With y = x minus its mean, s(y) = sqrt(mean y^2 + eps), G(y) = y / s(y), output gamma G + beta.

    s is a norm, so |s(y') - s(y)| <= rms(h) with h = y' - y, and for h of any size, with low = s(y) - rms(h) > 0:
        |G_i(y') - G_i(y)| <= (|h_i| + |G_i(y)| rms(h)) / low,      ||G(y') - G(y)|| <= 2 ||h|| / (s + low),
    the second because (y, sqrt(D eps)) is only scaled to length sqrt(D) (Dunkl and Williams 1964). Between two points
    of the box |y_i| is at most its largest value and s at least its smallest. Whatever y is, |G_i| <= sqrt(D - 1).
    The rounding of mean and variance, by two passes or by Welford, is an h of size gamma_{2D+16} rms(x).
    """
    op, box = context.op, context.inputs[0]
    scale, bias = context.constant(1), context.constant(2)
    if not isinstance(box, Box) or scale is None or context.index:
        return None
    if len(context.inputs) > 2 and context.inputs[2] is not None and bias is None:
        return None
    axes = tuple(range(int(op.attributes.get("axis", -1)) % box.centre.ndim, box.centre.ndim))
    count = math.prod(box.centre.shape[axis] for axis in axes)
    if count > _LONGEST:
        return None

    def rms(value: Tensor) -> Tensor:
        return value.square().mean(axes, keepdim=True).sqrt() * UP

    def centred(deviation: Tensor) -> Tensor:
        return deviation + (deviation.mean(axes, keepdim=True) - 2 * deviation / count).clamp_min(0)

    epsilon = float(op.attributes.get("epsilon", 1e-5))
    y = box.centre - box.centre.mean(axes, keepdim=True)
    rounded = gamma(2 * count + 16, context.arithmetic.inner) * rms(box.magnitude)
    h = _up(centred(box.radius) + rounded)
    # Centring is a projection, so it makes no norm larger.
    size = torch.minimum(rms(h), torch.minimum(rms(box.radius), box.norm / math.sqrt(count)) * UP + rounded * UP)
    # Even a constant row is divided by sqrt(eps) at least.
    least = math.sqrt(epsilon) * DOWN
    s = ((y.square().mean(axes, keepdim=True) + epsilon).sqrt() * DOWN - rounded * UP).clamp_min(least)
    low = (s * DOWN - size * UP).clamp_min(least)
    big = ((y.abs() + h) / low * UP).clamp_max(math.sqrt(count))
    weight = scale.abs()

    def between(deviations: Deviations) -> Tensor:
        v = _present(deviations[0])
        return weight * (centred(v) + big * rms(v)) / low

    plain = y.abs() / s * UP
    farthest = math.sqrt(max(count - 1, 0)) * UP
    # h holds the rounding of the mean as well, so this distance is between the exact results of x' and the centre.
    reach = weight * torch.minimum((h + plain * size) / low, plain + farthest + rounded / low)
    norm = weight.max() * 2 * box.norm / (s + low).min()
    # What the rounding of the mean does to the result, and ten more operations.
    moved = weight * (rounded + big * rounded) / low
    absolute = weight * big + (0.0 if bias is None else bias.abs())
    error = moved + gamma(count + 16, context.arithmetic.inner) * absolute
    return Rule(between, reach, norm, error)


# Quantisation: half a step, and what is clipped.


@_rule("QuantizeLinear")
def _quantize(context: Context) -> Rule | None:
    """The centre is not rounded: every grid point that the operator may choose is at most half a step away."""
    box = context.inputs[0]
    scale = context.constant(1)
    if not isinstance(box, Box) or scale is None:
        return None
    exact, step, _, (lowest, highest) = quantization_grid(context.op, [box.centre, scale, *context.inputs[2:]])  # type: ignore[list-item]
    size = _up(1 / step.abs())
    reach = box.radius * size
    excess = torch.maximum(exact + reach - highest, lowest - exact + reach).clamp_min(0)
    error = 0.5 + excess * UP + gamma(4, context.arithmetic.inner) * (exact.abs() + reach)

    def between(deviations: Deviations) -> Tensor:
        return _present(deviations[0]) * size

    return Rule(between, norm=box.norm * size.max(), error=error)


@_rule("DequantizeLinear")
def _dequantize(context: Context) -> Rule | None:
    box, scale = context.inputs[0], context.constant(1)
    if not isinstance(box, Box) or scale is None:
        return None
    zero = torch.zeros(scale.shape, dtype=torch.float64)

    def between(deviations: Deviations) -> Tensor:
        return context.again([deviations[0], scale.abs(), zero])

    magnitude = context.centre.abs() + between([box.radius])
    return Rule(between, norm=box.norm * scale.abs().max(), error=gamma(4, context.arithmetic.inner) * magnitude)


# Logits in pairs.


def pair_bounds(prepared: Prepared, values: Mapping[str, Value], label: int) -> Tensor:
    """Bound of |(z'_j - z'_y) - (z_j - z_y)| for every class j, y = `label`: float64 [K], 0 at y.

    Where the logits come from a product with constant weights, perhaps with a bias added, the difference of two rows
    meets the last features' enclosure; what arose after it counts for both classes. Elsewhere both radii are added.
    """
    program = prepared.program
    logits = values[program.output]
    assert isinstance(logits, Box)
    apart = (logits.radius + logits.radius[:, label : label + 1])[0]
    found = _last_product(program, values)
    if found is not None:
        op, added = found
        matrix, features = _matrix(prepared, op), values[op.inputs[0]]
        if matrix is not None and isinstance(features, Box) and features.centre.ndim == 2:
            rows = (matrix - matrix[label]).abs() * UP
            size = _up(rows.square().sum(1).sqrt()) * features.norm
            together = torch.minimum((rows * features.radius).sum(1), size)
            own = added + added[:, label : label + 1]
            apart = torch.minimum(apart, _safe(_up(together + own[0])))
    apart = _safe(_up(apart))
    apart[label] = 0.0
    return apart


def _last_product(program: Program, values: Mapping[str, Value]) -> tuple[Op, Tensor] | None:
    """The product that makes the logits, and what the operators from it on add to each of them."""
    makers = {name: op for op in program.ops for name in op.outputs}
    name, whole = program.output, 0.0 * _centre(values[program.output])
    while name in makers:
        op, box = makers[name], values[name]
        if not isinstance(box, Box) or box.centre.shape != whole.shape:
            return None
        whole = whole + (0.0 if box.added is None else box.added)
        moving = [entry for entry in op.inputs if isinstance(values.get(entry), Box)]
        if op.kind in ("Gemm", "MatMul"):
            return op, whole
        if op.kind not in ("Add", "Identity", "Cast") or len(moving) != 1:
            return None
        name = moving[0]
    return None


def _centre(value: Value) -> Tensor:
    return value.centre if isinstance(value, Box) else value


def _matrix(prepared: Prepared, op: Op) -> Tensor | None:
    """Weights of the last product as [K, features]; None where they are no constant matrix on the right."""
    weight = prepared.constants.get(op.inputs[1])
    if weight is None or weight.ndim != 2 or op.attributes.get("transA", 0):
        return None
    return (weight if op.attributes.get("transB", 0) else weight.mT) * float(op.attributes.get("alpha", 1.0))


def margins(logits: Tensor, label: int) -> Tensor:
    """z_y - z_j for every j, a proved lower bound in real arithmetic of the float64 numbers given: float64 [K]."""
    pairs = logits[label] - logits
    return pairs - (pairs.abs() * 2.0**-51 + TINY)


class State(IntEnum):
    """What a bound says of one sample."""

    VACUOUS = 0  # no bound, or one that is no smaller than the range of the sample's logits
    NOT_CERTIFIED = 1
    CERTIFIED = 2


@dataclass(frozen=True)
class Proof:
    """The outcome for n samples.

    Attributes:
        label: int64 [n], the class spoken about.
        state: uint8 [n], values of `State`.
        bound: float64 [n], largest bound over the competitors j of the displacement of z_y - z_j; inf: no bound.
        slack: float64 [n], smallest over the competitors of margin minus bound; positive where certified.
        range: float64 [n], largest minus smallest logit: a bound that reaches it is vacuous, because no competitor's
            margin is larger, so that it could have certified nothing, whatever the network.
        why: operators for which there is no rule, each once.
    """

    label: NDArray[np.int64]
    state: NDArray[np.uint8]
    bound: NDArray[np.float64]
    slack: NDArray[np.float64]
    range: NDArray[np.float64]
    why: tuple[str, ...]

    def counts(self) -> dict[str, int]:
        """Return how many samples are in each state."""
        return {state.name.lower(): int((self.state == state).sum()) for state in State}

    def facts(self) -> dict[str, Any]:
        """Return the counts and a summary of the bounds, None where there is none."""
        known = self.bound[np.isfinite(self.bound)]
        return {
            "samples": len(self.label),
            **self.counts(),
            "bound_median": float(np.median(known)) if known.size else None,
            "bound_max": float(known.max()) if known.size == len(self.bound) and known.size else None,
            "range_median": float(np.median(self.range)) if self.range.size else None,
            "no_rule_for": list(self.why),
        }


@dataclass(frozen=True)
class Sample:
    """One sample's share of a `Proof`."""

    label: int
    state: State
    bound: float
    slack: float
    range: float
    why: str = ""


def decide(label: int, slack: Tensor, bound: Tensor, logits: Tensor, why: str = "") -> Sample:
    """Put a sample into one of the three states.

    Args:
        label: y.
        slack: float64 [K], margin minus bound of each competitor; what stands at y is ignored.
        bound: float64 [K], of the displacement of each pair; 0 at y.
        logits: float64 [K], whose range makes a bound vacuous.
        why: names operators without a rule.
    """
    others = torch.cat([slack[:label], slack[label + 1 :]])
    least = float(others.min()) if others.numel() and bool(torch.isfinite(others).all()) else -math.inf
    most, span = float(bound.max()), float(logits.max() - logits.min())
    state = State.CERTIFIED if least > 0 else State.NOT_CERTIFIED if most < span else State.VACUOUS
    return Sample(label, state, most if math.isfinite(most) else math.inf, least, span, why)


def proof_of(samples: Sequence[Sample]) -> Proof:
    """Collect samples."""
    return Proof(
        label=np.array([s.label for s in samples], np.int64),
        state=np.array([s.state for s in samples], np.uint8),
        bound=np.array([s.bound for s in samples], np.float64),
        slack=np.array([s.slack for s in samples], np.float64),
        range=np.array([s.range for s in samples], np.float64),
        why=tuple(sorted({s.why for s in samples} - {""})),
    )
