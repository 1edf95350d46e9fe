"""What every kind of operator does to the enclosure of its inputs: one small rule each, in one table.

A rule bounds displacements of any size; none is a linearisation, and no derivative is taken at a point: a slope is the
largest on the whole segment. An operator without a rule has no bound, and neither has one that is used in a way that
its rule does not know. See `boxes` for the arithmetic in which the bounds themselves are computed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpdeploy.certify.program import Op, Program, evaluate, quantization_grid

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
        level: scalar, or None: norm of x' - c after the mean over its last axis is subtracted.
        factors: the enclosures whose product this is, apart from what is in `added`, or None.
        weights: where this is a softmax over its last axis, or None. Then x' - c, apart from what is in `added`, sums
            up to 0 over that axis, and so does what `gain` bounds.
    """

    centre: Tensor
    radius: Tensor
    norm: Tensor
    gain: Tensor | None = None
    added: Tensor | None = None
    why: str = ""
    level: Tensor | None = None
    factors: "tuple[Box, Box] | None" = None
    weights: "Weights | None" = None

    @property
    def magnitude(self) -> Tensor:
        """|x'| is never larger."""
        return up(self.centre.abs() + self.radius)

    @property
    def ends(self) -> tuple[Tensor, Tensor]:
        """Lower and upper end of every element."""
        slack = (self.centre.abs() + self.radius) * 2.0**-50 + TINY
        low, high = self.centre - self.radius - slack, self.centre + self.radius + slack
        return low.nan_to_num(-math.inf), high.nan_to_num(math.inf)


@dataclass(frozen=True)
class Weights:
    """A softmax over the last axis.

    Attributes:
        largest: float64 like its output, the largest value of every weight on the box of scores.
        deviation: scalar, bound of sqrt(sum over rows of the variance of the scores' displacement), under the weights
            of any point between the centre and x'.
    """

    largest: Tensor
    deviation: Tensor


Value = Box | Tensor
Values = Sequence[Value | None]
Deviations = Sequence[Tensor | None]


@dataclass(frozen=True)
class Rule:
    """What one operator does to displacements.

    Attributes:
        between: deviations of the inputs -> bound of |f(a) - f(b)| for any two a, b in the boxes that differ by them.
        reach: further bound of |f(x') - f(c)|, or None.
        norm: bound of its Frobenius norm, or None.
        error: bound of the rounding that the operator does inside, before its result is stored.
        level: see `Box.level`.
        factors: see `Box.factors`.
        weights: see `Box.weights`.
        inherited: what of the inputs' radius `factors` does not account for; it becomes part of `Box.added`.
    """

    between: Callable[[Deviations], Tensor]
    reach: Tensor | None = None
    norm: Tensor | None = None
    error: Tensor | float = 0.0
    level: Tensor | None = None
    factors: tuple[Box, Box] | None = None
    weights: Weights | None = None
    inherited: Tensor | None = None


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


def up(value: Tensor) -> Tensor:
    """An upper bound of what exact arithmetic would have made of non-negative numbers; see `boxes`."""
    return value * UP + TINY


def safe(value: Tensor) -> Tensor:
    """0 times infinity is no bound."""
    return value.nan_to_num(math.inf, math.inf)


def frobenius(value: Tensor) -> Tensor:
    """An upper bound of a tensor's 2-norm, however many elements it has."""
    return up(value.square().sum().sqrt() * (1 + value.numel() * 2.0**-52))


def gamma(count: int, unit: float) -> float:
    """The relative error n u / (1 - n u) of a sum of n products in any order; inf where it says nothing."""
    spent = count * unit
    return math.inf if spent >= 1 else spent / (1 - spent) * UP


def spectral_norm(matrix: Tensor, squarings: int = 5) -> Tensor:
    """Proved upper bound of the largest singular value of each matrix [..., a, b].

    lambda(G) = lambda(G^n)^(1/n) <= ||G^n||_F^(1/n), n = 2^squarings, for the Gram matrix G: rank^(1/4n) above it at
    most, 5 % for rank 512. Each computed square of Q differs from the exact one by at most gamma_n ||Q||_F^2. No
    iteration that has to converge is trusted.
    """
    scale = torch.linalg.vector_norm(matrix, math.inf, (-2, -1), keepdim=True).clamp_min(TINY)
    unit = matrix / scale
    gram = unit.mT @ unit if unit.shape[-2] > unit.shape[-1] else unit @ unit.mT
    # gamma of a few more terms covers the division by the scale.
    loss = gamma(max(matrix.shape[-2:]) + 4, FLOAT64.inner)
    squared = _largest(gram, squarings) + loss * _trace(gram, loss)
    return up(squared.sqrt() * scale[..., 0, 0])


def _largest(gram: Tensor, squarings: int) -> Tensor:
    """Largest singular value; the transpose makes it right for a square that rounding left unsymmetric."""
    if squarings == 0:
        norm: Tensor = torch.linalg.vector_norm(gram, dim=(-2, -1))
        return norm * (1 + (gram.shape[-1] ** 2 + 8) * 2.0**-52)
    loss = gamma(gram.shape[-1] + 2, FLOAT64.inner)
    following = gram.mT @ gram
    return (_largest(following, squarings - 1) + loss * _trace(following, loss)).sqrt() * UP


def _trace(gram: Tensor, loss: float) -> Tensor:
    """Upper bound of the squared Frobenius norm of the matrix whose Gram matrix was computed."""
    return gram.diagonal(dim1=-2, dim2=-1).sum(-1) * (1 + 4 * loss) * UP


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


RULES: dict[str, Callable[[Context], Rule | None]] = {}


def _rule(*kinds: str) -> Callable[[Callable[[Context], Rule | None]], Callable[[Context], Rule | None]]:
    def register(make: Callable[[Context], Rule | None]) -> Callable[[Context], Rule | None]:
        RULES.update(dict.fromkeys(kinds, make))
        return make

    return register


# Moving data is exact; a norm survives where nothing is repeated.

_KEEPS_NORM = frozenset(
    {"Identity", "Dropout", "Cast", "CastLike", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze"}
    | {"Slice", "Split", "Concat", "DepthToSpace", "SpaceToDepth"}
)
_REPEATS = frozenset({"Gather", "Expand", "Tile", "Pad", "Where"})
MOVES = _KEEPS_NORM | _REPEATS
EXACT_ON_CONSTANTS = frozenset({"DequantizeLinear", "ConstantOfShape", "Range", "Neg", "Abs", "Relu"})


@_rule(*MOVES)
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
    rows = context.prepared.remember(op, "rows", lambda: up(weight.flatten(1).square().sum(1).sqrt()))
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
    return up(torch.minimum(unfolded, shifts))


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
    columns = context.prepared.remember(op, "rows", lambda: up(matrix.square().sum(0).sqrt()))
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
    count = centre_of(left).shape[-1]
    if count > _LONGEST or min(centre_of(left).ndim, centre_of(right).ndim) < 2:
        return None
    if isinstance(left, Box) and isinstance(right, Box):
        return _product(context, left, right, count)
    swap = isinstance(right, Box)
    box, weight = (right, left) if swap else (left, right)
    assert isinstance(box, Box)
    assert isinstance(weight, Tensor)
    op = context.op
    size = context.prepared.remember(op, "abs", weight.abs)
    rows = context.prepared.remember(op, "rows", lambda: up(weight.square().sum(-1 if swap else -2).sqrt()))
    # A stack of weights that meets one input repeats it: then there is no norm to be had from one matrix.
    norm = context.prepared.remember(op, "norm", lambda: spectral_norm(weight).max()) if weight.ndim == 2 else None

    def between(deviations: Deviations) -> Tensor:
        return size @ _present(deviations[1]) if swap else _present(deviations[0]) @ size

    magnitude = between([box.magnitude, box.magnitude])
    reach = rows.unsqueeze(-1 if swap else -2) * box.norm
    return Rule(between, reach, None if norm is None else norm * box.norm, _dot_error(context, count + 2, magnitude))


def _product(context: Context, a: Box, b: Box, count: int) -> Rule:
    """The product's change: a'b' - ab = da b' + a db.

    Where a is a softmax, da = d0 + d1: d0 sums up to 0 over the axis that is summed here, so that da b' is
    d0 (b' - v) + d1 b' for any row v, of which the mean of b is a good one; d1 is `added`. Of scores that meet a
    softmax only the deviation from each row's mean matters: for it b may be centred over its last axis.
    """
    big_a, big_b = a.magnitude, b.magnitude
    mean = b.centre.mean(-2, keepdim=True)
    apart = up((b.centre - mean).abs() + b.radius)
    loose = torch.zeros_like(mean) if a.added is None else up(a.added.sum(-1, keepdim=True) * mean.abs())

    def between(deviations: Deviations) -> Tensor:
        da, db = (_present(value) for value in deviations)
        first = da @ big_b
        if a.weights is not None:
            first = torch.minimum(first, da @ apart + loose)
        return first + big_a @ db

    # From the centre, a counts without its radius.
    reach = between([a.radius, torch.zeros_like(b.radius)]) + a.centre.abs() @ b.radius
    error = _dot_error(context, count + 2, big_a @ big_b)
    if a.centre.shape[:-2] != b.centre.shape[:-2]:
        return Rule(between, reach, error=error)
    size_a, size_b = spectral_norm(a.centre).max(), spectral_norm(b.centre).max()
    norm = a.norm * (size_b + b.norm) + size_a * b.norm
    if a.weights is not None and a.added is not None:
        norm = torch.minimum(norm, _weighted_sum(a, a.weights, b, size_a, size_b))
    # Row i of da times column j of b, by Cauchy and Schwarz.
    columns = b.centre.square().sum(-2, keepdim=True).sqrt()
    rows = a.centre.square().sum(-1, keepdim=True).sqrt()
    reach = torch.minimum(reach, up(a.norm * columns + rows * b.norm + a.norm * b.norm))
    centred = b.centre - b.centre.mean(-1, keepdim=True)
    rounded = gamma(b.centre.shape[-1] + 4, FLOAT64.inner) * frobenius(b.centre)
    level = a.norm * (spectral_norm(centred).max() + rounded + b.norm) + size_a * b.norm
    return Rule(between, reach, norm, error, level, (a, b))


def _weighted_sum(p: Box, weights: Weights, v: Box, size_p: Tensor, size_v: Tensor) -> Tensor:
    """Frobenius bound of P'V' - PV = (p(s') - p(s)) V + d1 V + P' dV, P = p(s) a softmax, d1 what is `added`.

    On the way from s to s', d(p_i V) = Cov_p(ds_i, V), whose 2-norm is at most sqrt(Var_p ds_i) times the root of the
    largest eigenvalue of Cov_p(V), itself at most that of sum_j max p_ij (v_j - o)(v_j - o)' for any row o.
    """
    assert p.added is not None
    about = v.centre.unsqueeze(-3) - (p.centre @ v.centre).unsqueeze(-2)  # [..., i, j, d]
    spread = spectral_norm(weights.largest.sqrt().unsqueeze(-1) * about, 4).max()
    extra = frobenius(p.added)
    # Rows of P sum up to 1, so its norm is at most the root of its largest column sum.
    size = torch.minimum(size_p + p.norm, weights.largest.sum(-2).max().sqrt() * UP + extra)
    return spread * weights.deviation + extra * size_v + size * v.norm


def _deviation(scores: Box, largest: Tensor, size: Tensor) -> Tensor:
    """Bound of sqrt(sum_i Var_p ds_i) over all weights p <= `largest`; `size` bounds the norm of ds.

    For scores q_i k_j the displacement is dq_i k_j + q'_i dk_j: the variance of its first part is at most |dq_i|^2
    times the largest eigenvalue of sum_j p_ij (k_j - o)(k_j - o)' for any row o, and the sum over all rows of that of
    the second at most |dK|^2 times the largest one, over j, of sum_i p_ij q'_i q'_i'.
    """
    most = largest.max().sqrt() * UP
    # A variance is at most a quarter of the squared range, and that at most twice the sum of squares.
    plain = torch.minimum((largest * scores.radius.square()).sum().sqrt(), torch.minimum(most, _HALF) * size)
    if scores.factors is None or scores.added is None:
        return up(plain)
    q, k = scores.factors
    keys, root = k.centre.mT, largest.sqrt()
    about = keys.unsqueeze(-3) - ((largest @ keys) / largest.sum(-1, keepdim=True).clamp_min(TINY)).unsqueeze(-2)
    spread_k = spectral_norm(root.unsqueeze(-1) * about, 4).max()
    spread_q = spectral_norm(root.mT.unsqueeze(-1) * q.centre.unsqueeze(-3), 4).max()
    loose = (largest * scores.added.square()).sum().sqrt()
    return up(torch.minimum(plain, spread_k * q.norm + (spread_q + most * q.norm) * k.norm + loose))


_HALF = torch.tensor(math.sqrt(0.5) * UP, dtype=torch.float64)


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
    # A constant shifts the centre only.
    alone = len(boxes) == 1 and boxes[0].centre.shape == context.centre.shape
    level, factors = (boxes[0].level, boxes[0].factors) if alone else (None, None)
    inherited = None if factors is None else boxes[0].added
    # A single addition errs relative to its result, which is at most the sum of the magnitudes.
    error = gamma(terms, context.arithmetic.inner) * magnitude
    return Rule(between, norm=norm, error=error, level=level, factors=factors, inherited=inherited)


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
    quotient = up(big[0] / nearest)

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
    slope = up(scale.abs() / (var + float(context.op.attributes.get("epsilon", 1e-5))).sqrt()).reshape(shape)
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
    error = context.arithmetic.inner * curve.error(magnitude, up(result))
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
    last, size = axis == box.centre.ndim - 1, box.norm
    if box.level is not None and last:
        # What all scores of a row have in common changes nothing.
        e, size = torch.minimum(e, box.level), torch.minimum(size, box.level)
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
    wide = safe(wide)
    spent = 2 * _LIBM + 8 + wide + total(torch.where(largest > 0, largest * wide, 0.0))
    error = (spent * context.arithmetic.inner + gamma(count + 4, context.arithmetic.inner)) * largest
    error = torch.where(largest > 0, error, 0.0)
    if not last:
        return Rule(between, reach, 0.5 * size, error)
    deviation = _deviation(box, largest, size)
    # dp_j = p_j (ds_j - mean), so the sum of squares is at most max p times the variance.
    norm = torch.minimum(0.5 * size, largest.max().sqrt() * UP * deviation)
    return Rule(between, reach, norm, error, weights=Weights(largest, deviation))


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
        return safe(deviation + (deviation.mean(axes, keepdim=True) - 2 * deviation / count).clamp_min(0))

    epsilon = float(op.attributes.get("epsilon", 1e-5))
    y = box.centre - box.centre.mean(axes, keepdim=True)
    units = 2 * count + 16
    own = gamma(units, FLOAT64.inner) * rms(box.centre)  # of y, and of the centre's own evaluation
    h = up(centred(box.radius) + own)
    # Centring is a projection, so it makes no norm larger.
    size = torch.minimum(rms(h), torch.minimum(rms(box.radius), box.norm / math.sqrt(count)) * UP + own * UP)
    # Even a constant row is divided by sqrt(eps) at least.
    least = math.sqrt(epsilon) * DOWN
    s = ((y.square().mean(axes, keepdim=True) + epsilon).sqrt() * DOWN - own * UP).clamp_min(least)
    low = (s * DOWN - size * UP).clamp_min(least)
    big = ((y.abs() + h) / low * UP).clamp_max(math.sqrt(count))
    weight = scale.abs()

    def between(deviations: Deviations) -> Tensor:
        v = _present(deviations[0])
        return weight * (centred(v) + big * rms(v)) / low

    plain = y.abs() / s * UP
    farthest = math.sqrt(max(count - 1, 0)) * UP
    # h holds the rounding of the mean as well, so this distance is between the exact results of x' and the centre.
    reach = weight * torch.minimum((h + plain * size) / low, plain + farthest + own / low)
    norm = weight.max() * 2 * box.norm / (s + low).min()
    # What the rounding of mean and variance does to the centre and, in the arithmetic spoken about, to any x'.
    error = weight * (own + big * own) / low
    further = (context.arithmetic.inner - FLOAT64.inner) * (1 + 2.0**-40)
    if further > 0:
        moved = gamma(units, further) * rms(box.magnitude)
        lower = (low - moved * UP).clamp_min(least)
        big = ((y.abs() + h + moved) / lower * UP).clamp_max(math.sqrt(count))
        error = error + weight * (moved + big * moved) / lower
    absolute = weight * big + (0.0 if bias is None else bias.abs())
    error = error + gamma(count + 16, context.arithmetic.inner) * absolute
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
    size = up(1 / step.abs())
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


def centre_of(value: Value) -> Tensor:
    """What float64 computed."""
    return value.centre if isinstance(value, Box) else value
