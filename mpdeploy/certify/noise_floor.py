"""How far rounding alone may move a logit pair: level L3~, a model and not a proof.

For a sample with label y and a competitor j, let a_kj be the gradient of z_j - z_y with respect to the output of
operator k (the adjoint), and u_ki the half width of the error that the declared precision allows in element i of that
output. If all these errors are independent, have mean zero and are at most as spread as a uniform one, the variance of
the pair error is to first order

    sigma_j^2 = sum_k sum_i (a_kj,i u_k,i)^2 / 3 ,

one backward pass per pair. Rounding errors are in truth functions of the data: independence is assumed, not proved, and
equal values, such as the patches of an empty background, make equal errors, so that sigma is too small there. On the
engines that were run (tests/test_noise_floor.py) the root mean square of measured / sigma lies between 0.3 and 1.5.

The reference that errors are measured from is the same graph in float64 (`exact_logits`): constants that the file
stores in float16 or int8 are already rounded there, and clipping by QuantizeLinear is part of the graph. What is left
is what the engine adds. The half widths, with u the unit roundoff of the type that the graph gives a value (2^-24 for
float32, 2^-11 for float16, 2^-8 for bfloat16) and v the value:

* an operator that only moves or selects data, or doubles as ReLU: 0. A cast to a narrower type: u |v|.
* any other: u |v| where the result is stored, and what is lost inside at float32, whatever the storage: once for Add,
  Sub, Mul, Div and Sqrt; a few units for exp, erf and the functions made of them; in float16, 2^-25 below the smallest
  normal number.
* a sum of n terms p with total s: each partial sum is rounded, u^2 sum_l s_l^2. Over a random order of the terms a
  partial sum of l terms has E s_l^2 = (l/n)^2 s^2 + l (n-l) / (n (n-1)) V, V = sum p^2 - s^2/n (sampling without
  replacement). `_partial_sums` adds that over chains of 128 terms, as blocked matrix products have them, or 16, as a
  sum along a row in vector registers has them, and over the sum of the chains. This takes a product of the squares.
  A kernel that adds all terms in one chain reaches up to twice that where most terms have the same sign.
* softmax and layer norm divide a row by one number: an error in it moves the whole row, so its adjoint is summed over
  the row before it is squared.
* tf32: the operands of a product are rounded with u = 2^-11 before it, whoever reads them elsewhere. Hardware that
  drops the bits instead lies beyond this: simulated, 3.4 sigma.
* int8: half a step at each QuantizeLinear that doesn't saturate. The sums of products of int8 are exact.

Exact zeros (of a ReLU, of padding) carry no error.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpdeploy.certify.program import (
    Inputs,
    Op,
    Program,
    evaluate,
    evaluate_unrounded,
    quantization_grid,
    run,
    tensors,
)
from mpdeploy.errors import StageFailed

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Precision = Literal["fp32", "tf32", "fp16", "bf16", "int8"]

UNITS = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8, "float64": 2.0**-53}
_TF32 = 2.0**-11
_HALF_UNDERFLOW = 2.0**-25
_INSIDE = UNITS["float32"]
_SCALE = 2.0**24  # widths are kept in units of 2^-24, so that their squares stay clear of float32's underflow
_DECLARED = {"fp32": "float32", "tf32": "float32", "fp16": "float16", "bf16": "bfloat16", "int8": "float32"}
_CHAIN = 128
_LANES = 16
_RMS_LIMIT = 1.5

_PRODUCTS = frozenset({"Conv", "Gemm", "MatMul", "Einsum"})
_EXACT = frozenset({
    "Abs", "And", "CastLike", "Ceil", "Clip", "Concat", "ConstantOfShape", "DepthToSpace", "Dropout", "Equal",
    "Expand", "Flatten", "Floor", "Gather", "GatherElements", "GlobalMaxPool", "Greater", "GreaterOrEqual", "Identity",
    "Less", "LessOrEqual", "Max", "MaxPool", "Min", "Neg", "Not", "Or", "Pad", "Range", "ReduceMax", "ReduceMin",
    "Relu", "Reshape", "Round", "Shape", "Sign", "Size", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile",
    "Transpose", "Unsqueeze", "Where",
})  # fmt: skip
_ROUNDED_ONCE = frozenset({"Add", "DequantizeLinear", "Div", "LeakyRelu", "Mul", "PRelu", "Reciprocal", "Sqrt", "Sub"})
_INTEGER = frozenset({"Range", "Shape", "Size"})
_TRUTH = frozenset({"And", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "Or"})


@dataclass(frozen=True)
class NoiseFloor:
    """The rounding noise of n samples and P competitors each.

    Attributes:
        precision: As declared.
        label: int64 [n], y.
        competitors: int64 [n, P], j.
        margin: float64 [n, P], z_y - z_j of the reference.
        sigma: float64 [n, P], standard deviation of the rounding error of z_y - z_j under the model.
        shares: Operator name -> its share of sigma^2, mean over samples and competitors; they add up to 1.
        kinds: Operator type -> the same.
        saturated: Name of a QuantizeLinear -> fraction of its elements that it clips; empty where there is none.
    """

    precision: str
    label: Ints
    competitors: Ints
    margin: Floats
    sigma: Floats
    shares: Mapping[str, float]
    kinds: Mapping[str, float]
    saturated: Mapping[str, float]


@dataclass(frozen=True)
class Judged:
    """Measured pair errors against the noise floor.

    Attributes:
        verdict: "within": no more than the declared precision explains; "beyond": more; "unchecked": no sample.
        rms: Root mean square of error / sigma, None where it is not finite or there is none.
        largest: Largest |error| / sigma, likewise.
        threshold: What `largest` has to stay below, see `threshold`.
        rms_limit: What `rms` has to stay below, see `rms_limit`.
        comparisons: Pairs compared.
        worst: Index of the sample with the largest ratio or the first that is not finite, None if there is none.
        reason: One sentence.
    """

    verdict: Literal["within", "beyond", "unchecked"]
    rms: float | None
    largest: float | None
    threshold: float
    rms_limit: float
    comparisons: int
    worst: int | None
    reason: str


@dataclass
class _Error:
    """One place where an error enters: half width per element, and errors that move whole rows at once."""

    op: Op
    value: Tensor
    width: Tensor | None  # in units of 2^-24, shape of value
    rows: Sequence[tuple[Tensor, Tensor, tuple[int, ...]]]  # (direction, half width in units of 2^-24, summed axes)


def noise_floor(
    program: Program,
    images: NDArray[np.float32] | Tensor,
    *,
    precision: Precision,
    pairs: int = 1,
    classes: NDArray[Any] | None = None,
    memory: int = 2**30,
) -> NoiseFloor:
    """Compute sigma for the closest competitors of each sample: a model of independent rounding, not a proof.

    Args:
        program: The graph that the engine runs; formats are read from it. Where a runtime rewrites the graph (ONNX
            Runtime's CPU provider computes float16 graphs in float32 between few casts), pass the rewritten one.
        images: float32 [n, C, H, W].
        precision: What the engine declares. A graph with values or constants of float16 or bfloat16 fixes its own
            formats; in one of float32 alone "fp16" and "bf16" say how every value is stored. "tf32" also rounds
            operands of products.
        pairs: Competitors per sample: the runner-up, and the next ones. The others are not covered.
        classes: int [n, 1 + P], the label y and its competitors, instead of the reference's own best.
        memory: Bytes of intermediate values to hold at once; at least one sample is run.

    Raises:
        StageFailed: An operator is unknown, or there are not enough classes.
    """
    x = torch.as_tensor(images)
    if not len(x):
        raise StageFailed("A noise floor needs at least one sample; none was given.")
    tracer = _Tracer(program, precision, x.device)
    chosen = None if classes is None else np.asarray(classes, np.int64)
    parts = [tracer.trace(x[:1], pairs, None if chosen is None else chosen[:1])]
    step, done = tracer.chunk(x, memory, parts[0], pairs, chosen), 1
    while done < len(x):
        rows = slice(done, done + step)
        parts.append(tracer.trace(x[rows], pairs, None if chosen is None else chosen[rows]))
        done += step
    return _joined(parts, program, precision)


def exact_logits(program: Program, images: NDArray[np.float32] | Tensor, *, batch: int = 16) -> Floats:
    """The reference: the graph's own rounded constants, everything else in float64, nothing quantised but clipped.

    Returns:
        float64 [n, K].
    """
    x = torch.as_tensor(images)
    constants = tensors(program, torch.float64, x.device)
    with torch.no_grad():
        parts = [
            run(program, part, dtype=torch.float64, each=evaluate_unrounded, constants=constants)[program.output].cpu()
            for part in x.split(batch)  # type: ignore[no-untyped-call]
        ]
    return np.asarray(torch.cat(parts).numpy(), np.float64)


def pair_errors(after: NDArray[Any], before: NDArray[Any], floor: NoiseFloor) -> Floats:
    """Change of z_y - z_j from one stage to the next, at the floor's pairs: float64 [n, P]."""
    change = np.asarray(after, np.float64) - np.asarray(before, np.float64)
    own = np.take_along_axis(change, floor.label[:, None], axis=1)
    return np.asarray(own - np.take_along_axis(change, floor.competitors, axis=1))


def threshold(competitors: int, samples: int, delta: float) -> float:
    """How many sigmas the largest of all pair errors stays below, with probability at least 1 - delta in the model.

    If the errors of one sample are independent, have mean zero and are bounded by their half widths, then Hoeffding's
    inequality gives P(|e_j| >= t sigma_j) <= 2 exp(-t^2 / 6), since the sum of squared half widths is 3 sigma_j^2. The
    union over samples x competitors comparisons, which needs no independence between them, gives
    t = sqrt(6 ln(2 samples competitors / delta)).
    """
    return float(np.sqrt(6 * np.log(2 * competitors * samples / delta)))


def rms_limit(samples: int, delta: float) -> float:
    """What the root mean square of error / sigma over all samples stays below in the model; never less than 1.5.

    A defect that is everywhere but small shows here first. A sum of so many small errors is nearly Gaussian, with a
    variance of at most sigma^2; for m independent ones P(mean of squares >= r) <= (sqrt(r) exp((1 - r) / 2))^m
    (Chernoff). Errors of different samples are not independent, since they meet the same weights: m is taken as a
    tenth of the samples, which is a choice. The 1.5 is calibration: of engines without a defect ONNX Runtime measured
    0.5 to 1.0 in float32 and float16 and 0.7 to 1.4 in int8, torch's own kernels 0.3 to 1.6
    (above 1.5 on one untrained MobileNet).
    """
    wanted = np.log(delta) / max(1.0, samples / 10)
    low, high = 1.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if (np.log(middle) + 1 - middle) / 2 > wanted else (low, middle)
    return max(_RMS_LIMIT, float(np.sqrt(high)))


def judge(measured: NDArray[Any], floor: NoiseFloor, *, delta: float = 0.01, executions: int = 1) -> Judged:
    """Tell whether measured pair errors are what the declared precision explains.

    Args:
        measured: [n, P], errors of z_y - z_j at the floor's pairs, see `pair_errors`.
        floor: Of the same samples.
        delta: Chance, in the model, that a sound engine is called "beyond" by the largest error.
        executions: How many independently rounded runs the difference holds: 1 against `exact_logits`, 2 between two
            runs of the declared precision, which makes sigma sqrt(2) larger.

    Raises:
        StageFailed: The shapes differ.
    """
    error = np.abs(np.asarray(measured, np.float64))
    if error.shape != floor.sigma.shape:
        raise StageFailed(f"Errors of shape {error.shape} don't belong to a noise floor of shape {floor.sigma.shape}.")
    if not error.size:
        return Judged("unchecked", None, None, np.inf, np.inf, 0, None, "No sample was compared.")
    sigma = floor.sigma * np.sqrt(executions)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where((error == 0) & (sigma == 0), 0.0, error / sigma)
    most, limit = threshold(error.shape[1], error.shape[0], delta), rms_limit(error.shape[0], delta)
    broken = ~np.isfinite(ratio).all(axis=1) | ~np.isfinite(sigma).all(axis=1)
    worst = int(np.argmax(broken)) if broken.any() else int(np.argmax(ratio.max(axis=1)))
    if broken.any():
        reason = f"{int(broken.sum())} of {len(ratio)} samples have an error or a noise floor that is not finite."
        return Judged("beyond", None, None, most, limit, error.size, worst, reason)
    rms, largest = float(np.sqrt(np.mean(ratio**2))), float(ratio.max())
    verdict: Literal["within", "beyond"] = "within" if largest <= most and rms <= limit else "beyond"
    reason = (
        f"The pair error is {rms:.2f} sigma (rms, limit {limit:.2f}) and at most {largest:.2f} sigma "
        f"(limit {most:.2f}): {'as the precision' if verdict == 'within' else 'more than the precision'} "
        f"{floor.precision} explains."
    )
    return Judged(verdict, rms, largest, most, limit, error.size, worst, reason)


def flip_bounds(floor: NoiseFloor) -> Floats:
    """Bound on the probability that rounding flips a sample's label to one of its P competitors: float64 [n].

    sum_j 2 exp(-t_j^2 / 6) with t_j = margin_j / sigma_j, at most 1, and 1 where the margin is not positive: in the
    model of `threshold`. Its sum over the samples bounds the expected number of flips.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(floor.margin > 0, floor.margin / floor.sigma, 0.0)
    chance = np.where(np.isfinite(floor.sigma), 2 * np.exp(-(np.minimum(t, 1e3) ** 2) / 6), 1.0)
    return np.asarray(np.minimum(np.where(np.isnan(t), 1.0, chance).sum(axis=1), 1.0), np.float64)


def forecast(floor: NoiseFloor) -> dict[str, Any]:
    """What the model foretells of an engine that is not built yet, as one row of a table.

    Returns:
        "precision", "samples", "competitors" (per sample); "sigma_median" and "sigma_max" in logits; "headroom_min" and
        "headroom_median", margin / sigma of each sample's closest pair; "flips_at_most", a bound on the expected number
        of labels that rounding changes; "at_risk", samples whose label the model does not promise with probability 1/2.
        A number that is not finite is None.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        headroom = (floor.margin / floor.sigma).min(axis=1)
    bounds = flip_bounds(floor)
    numbers = {
        "sigma_median": np.median(floor.sigma),
        "sigma_max": floor.sigma.max(),
        "headroom_min": headroom.min(),
        "headroom_median": np.median(headroom),
        "flips_at_most": bounds.sum(),
    }
    return {
        "precision": floor.precision,
        "samples": len(floor.label),
        "competitors": floor.sigma.shape[1],
        **{name: float(value) if np.isfinite(value) else None for name, value in numbers.items()},
        "at_risk": int((bounds >= 0.5).sum()),
    }


def float_types(program: Program) -> dict[str, str]:
    """Value -> the type that the graph gives it: "float32", "float16", ..., "integer" for all that is no float."""
    types = {name: _type_name(array.dtype.name) for name, array in program.constants.items()}
    types[program.input] = "float32"  # our exporter's and most graphs' input; others cast it first
    for op in program.ops:
        given = [types[name] for name in op.inputs if name]
        made = _type_of_result(op, given)
        types.update((name, made) for name in op.outputs if name)
    return types


def _type_name(name: str) -> str:
    return name if name in UNITS else "integer"


def _type_of_result(op: Op, given: Sequence[str]) -> str:
    if op.kind == "Cast":
        return _type_name(str(op.attributes["to"]))
    if op.kind in _INTEGER and op.kind != "Range":
        return "integer"
    if op.kind in _TRUTH or op.kind == "QuantizeLinear":
        return "integer"
    if op.kind in ("DequantizeLinear", "CastLike"):
        return given[1]
    if op.kind == "ConstantOfShape":
        return _type_name(np.asarray(op.attributes.get("value", np.zeros(1, np.float32))).dtype.name)
    return next((kind for kind in given if kind in UNITS), "integer")


@dataclass(frozen=True)
class _Part:
    label: Ints
    competitors: Ints
    margin: Floats
    variance: Floats  # [n, P]
    shares: Floats  # [operators], sum over samples and pairs of the share of the variance
    saturated: Mapping[str, float]  # sum over samples


class _Tracer:
    """Runs chunks of samples forward, noting where errors enter, and back once per pair."""

    def __init__(self, program: Program, precision: str, device: torch.device) -> None:
        if precision not in _DECLARED:
            raise StageFailed(f"There is no precision {precision}; there are {', '.join(_DECLARED)}.")
        self.program = program
        self.precision = precision
        self.types = float_types(program)
        if not {"float16", "bfloat16"} & set(self.types.values()):
            declared = _DECLARED[precision]
            self.types = {name: declared if kind == "float32" else kind for name, kind in self.types.items()}
        self.constants = tensors(program, torch.float32, device)
        self.index = {op.name: position for position, op in enumerate(program.ops)}
        self.axes: dict[int, int] = {}
        self.bytes = 0

    def trace(self, images: Tensor, pairs: int, classes: Ints | None) -> _Part:
        """Sigma squared and shares of one chunk."""
        errors, saturated, logits = self._forward(images)
        z = logits.detach().double().cpu().numpy()
        chosen = _closest(z, pairs) if classes is None else classes
        y, rivals = chosen[:, 0], chosen[:, 1:]
        rows = np.arange(len(z))
        variance = np.zeros(rivals.shape)
        shares = np.zeros(len(self.program.ops))
        for pair in range(rivals.shape[1]):
            target = (logits[rows, rivals[:, pair]] - logits[rows, y]).sum()
            gradients = torch.autograd.grad(
                target, [e.value for e in errors], retain_graph=pair + 1 < rivals.shape[1], allow_unused=True
            )
            each = np.zeros((len(errors), len(z)))
            for position, (error, gradient) in enumerate(zip(errors, gradients, strict=True)):
                if gradient is not None:
                    each[position] = self._entered(position, error, gradient, len(z))
            each /= 3 * _SCALE**2
            variance[:, pair] = each.sum(axis=0)
            with np.errstate(invalid="ignore", divide="ignore"):
                part = np.nan_to_num(each / variance[:, pair]).sum(axis=1)
            np.add.at(shares, [self.index[e.op.name] for e in errors], part)
        margin = z[rows, y][:, None] - np.take_along_axis(z, rivals, axis=1)
        return _Part(y, rivals, margin, variance, shares, saturated)

    def chunk(self, images: Tensor, memory: int, alone: _Part, pairs: int, classes: Ints | None) -> int:
        """Samples per chunk: by memory, and 1 where a sample's noise can't be told from its neighbour's.

        Which axis of a value counts samples is found by running one and two of them. That is then checked: the first
        sample has to have the same sigma in company as alone.
        """
        fits = int(memory // max(self.bytes, 1))
        if fits < 2 or len(images) < 3:
            return 1
        shapes = [self._shapes(images[:count]) for count in (1, 2)]
        for position, (one, two) in enumerate(zip(*shapes, strict=True)):
            grown = [axis for axis, (a, b) in enumerate(zip(one, two, strict=True)) if b != a]
            if len(grown) != 1 or two[grown[0]] != 2 * one[grown[0]]:
                return 1
            self.axes[position] = grown[0]
        both = self.trace(images[:2], pairs, None if classes is None else classes[:2])
        same = np.allclose(both.variance[0], alone.variance[0], rtol=1e-2, atol=0)
        return fits if same and (both.competitors[0] == alone.competitors[0]).all() else 1

    def _shapes(self, images: Tensor) -> list[tuple[int, ...]]:
        return [tuple(error.value.shape) for error in self._forward(images)[0]]

    def _forward(self, images: Tensor) -> tuple[list[_Error], dict[str, float], Tensor]:
        errors: list[_Error] = []
        saturated: dict[str, float] = {}

        def each(op: Op, inputs: Inputs) -> tuple[Tensor, ...]:
            if self.precision == "tf32" and op.kind in _PRODUCTS:
                inputs = self._rounded_operands(op, inputs, errors)
            results = evaluate_unrounded(op, inputs)
            # What depends on constants alone is a constant of the engine too, and not redone for every sample.
            if results[0].requires_grad:
                if op.kind == "QuantizeLinear":
                    saturated[op.name] = _clipped(op, inputs) * len(images)
                error = self._error(op, inputs, results[0].detach())
                if error is not None:
                    errors.append(_Error(op, results[0], *error))
            return results

        x = images.float().detach().requires_grad_()
        logits = run(self.program, x, each=each, constants=self.constants)[self.program.output]
        held = sum(e.value.numel() * (1 if e.width is None else 2) for e in errors)
        self.bytes = max(self.bytes, 3 * 4 * held // len(images))  # value, width, and as much again for gradients
        return errors, saturated, logits

    def _rounded_operands(self, op: Op, inputs: Inputs, errors: list[_Error]) -> list[Tensor | None]:
        """Give each operand that depends on the images a value of its own in front of this product."""
        result: list[Tensor | None] = list(inputs)
        for position, value in enumerate(inputs[:2]):
            if value is not None and value.requires_grad and self.types[op.inputs[position]] == "float32":
                result[position] = copied = value * 1
                errors.append(_Error(op, copied, _TF32 * _SCALE * value.detach().abs(), ()))
        return result

    @torch.no_grad()
    def _error(
        self, op: Op, inputs: Inputs, v: Tensor
    ) -> tuple[Tensor | None, Sequence[tuple[Tensor, Tensor, tuple[int, ...]]]] | None:
        """Half widths of one operator's rounding in units of 2^-24, or None where it is exact."""
        if op.kind == "QuantizeLinear":
            exact, _, zero, (low, high) = quantization_grid(op, inputs)
            loose = (exact > low) & (exact < high) & (exact != zero)
            return loose * (0.5 * _SCALE), ()
        if op.kind in _EXACT or not v.is_floating_point():
            return None
        stored = UNITS[self.types[op.outputs[0]]]
        if op.kind == "Cast":
            before = UNITS.get(self.types[op.inputs[0]], 0.0)
            return (_stored(v, stored), ()) if stored > before > 0 else None
        inner, rows = _inside(op, [None if x is None else x.detach() for x in inputs], v)
        square = (inner * (_INSIDE * _SCALE)).square()
        if self.precision == "tf32" and op.kind in _PRODUCTS:
            square = square + self._rounded_weights(op, inputs)
        if stored > _INSIDE:
            square = square + _stored(v, stored).square()
        return square.sqrt() * (v != 0), rows

    def _rounded_weights(self, op: Op, inputs: Inputs) -> Tensor | float:
        """Square of the width from a constant operand stored as tf32, each product rounded for itself."""
        if all(x is None or x.requires_grad for x in inputs[:2]):
            return 0.0
        squares = [None if x is None else x.detach().square() for x in inputs[:2]]
        return (_TF32 * _SCALE) ** 2 * evaluate(op, squares)[0]

    def _entered(self, position: int, error: _Error, gradient: Tensor, samples: int) -> Floats:
        """Sum over a sample's elements of (adjoint x half width)^2: float64 [n]."""
        total = torch.zeros(samples, dtype=torch.float64, device=gradient.device)
        axis = self.axes.get(position, 0)
        terms = [] if error.width is None else [(gradient * error.width).square()]
        terms += [((gradient * way).sum(axes, keepdim=True) * half).square() for way, half, axes in error.rows]
        for term in terms:
            if samples == 1:
                total += term.sum(dtype=torch.float64)
            else:
                total += term.movedim(axis, 0).reshape(samples, -1).sum(dim=1, dtype=torch.float64)
        return np.asarray(total.cpu().numpy(), np.float64)


def _stored(v: Tensor, unit: float) -> Tensor:
    """Half width of storing v with this unit roundoff, in units of 2^-24."""
    underflow = _HALF_UNDERFLOW * _SCALE if unit == UNITS["float16"] else 0.0
    return (v.abs() * (unit * _SCALE) + underflow) * (v != 0)


def _inside(
    op: Op, inputs: Sequence[Tensor | None], v: Tensor
) -> tuple[Tensor, Sequence[tuple[Tensor, Tensor, tuple[int, ...]]]]:
    """What an operator loses inside, in units of its inner roundoff: per element, and per row (see `_Error`)."""
    if op.kind in _PRODUCTS:
        return _product(op, inputs, v), ()
    if op.kind in ("ReduceSum", "ReduceMean", "GlobalAveragePool", "AveragePool", "ReduceL1", "Sum", "Mean"):
        return _summed(op, inputs, v), ()
    if op.kind in ("ReduceL2", "ReduceSumSquare"):
        x = _given(inputs)
        return v.abs() * (1 + _partial_sums(max(x.numel() // v.numel(), 1), _LANES)[0]) ** 0.5, ()
    if op.kind in ("Softmax", "LogSoftmax"):
        return _softmax(op, _given(inputs), v)
    if op.kind == "LayerNormalization":
        return _layer_norm(op, inputs, v)
    if op.kind == "Gelu":
        # x/2 (1 + erf): erf to two units, then the addition and two products.
        return (_given(inputs).square() + 4 * v.square()).sqrt(), ()
    if op.kind in _ROUNDED_ONCE:
        return v.abs(), ()
    return 2 * v.abs(), ()


def _given(inputs: Sequence[Tensor | None]) -> Tensor:
    x = inputs[0]
    assert x is not None  # evaluate has run on the same inputs
    return x


@functools.cache
def _partial_sums(n: int, chain: int = _CHAIN) -> tuple[float, float]:
    """(c1, c2) with sum over all partial sums of E s_l^2 = c1 s^2 + c2 V; see the module's docstring."""
    lengths = np.concatenate([
        np.tile(np.arange(1, chain + 1), n // chain),
        np.arange(1, n % chain + 1),
        np.arange(2 * chain, n + 1, chain),
        [n] if n > chain and n % chain else [],
    ])  # fmt: skip
    spread = lengths * (n - lengths) / (n * (n - 1)) if n > 1 else np.zeros(1)
    return float(np.sum((lengths / n) ** 2)), float(np.sum(spread))


def _accumulated(total: Tensor, squares: Tensor, n: int, chain: int = _CHAIN) -> Tensor:
    """Half width of a sum of n terms with these totals and sums of squares, in units of its roundoff."""
    c1, c2 = _partial_sums(n, chain)
    scatter = (squares - total.square() / n).clamp_min(0)
    return (c1 * total.square() + c2 * scatter).sqrt()


def _product(op: Op, inputs: Sequence[Tensor | None], v: Tensor) -> Tensor:
    a, b = inputs[0], inputs[1]
    assert a is not None, "evaluate has run on the same inputs"
    assert b is not None, "evaluate has run on the same inputs"
    squares = evaluate(op, [a.square(), b.square()])[0]
    bias = inputs[2] if len(inputs) > 2 else None
    if bias is None:
        return _accumulated(v, squares, _terms(op, a, b))
    # A convolution's bias has one value per channel; a Gemm's broadcasts from the right.
    shift = bias.reshape(-1, *[1] * (b.ndim - 2)) if op.kind == "Conv" else bias * op.attributes.get("beta", 1.0)
    return (_accumulated(v - shift, squares, _terms(op, a, b)).square() + v.square()).sqrt()


def _terms(op: Op, a: Tensor, b: Tensor) -> int:
    """Length of the dot products."""
    if op.kind == "Conv":
        return int(np.prod(b.shape[1:]))
    if op.kind == "Gemm":
        return int(a.shape[0] if op.attributes.get("transA", 0) else a.shape[1])
    if op.kind == "Einsum":
        left, right = op.attributes["equation"].replace(" ", "").split("->")
        sizes = dict(zip(left.split(",")[0], a.shape, strict=True)) | dict(
            zip(left.split(",")[1], b.shape, strict=True)
        )
        return int(np.prod([size for letter, size in sizes.items() if letter not in right], dtype=np.int64))
    return int(a.shape[-1])


def _summed(op: Op, inputs: Sequence[Tensor | None], v: Tensor) -> Tensor:
    """A sum, or a mean as a sum of terms already divided."""
    present = [x for x in inputs if x is not None]
    if op.kind in ("Sum", "Mean"):
        n, scale = len(present), (len(present) if op.kind == "Mean" else 1)
        squares = sum(x.square() for x in present) / scale**2
        return _accumulated(v, torch.as_tensor(squares), n, _LANES)
    x = present[0]
    window = int(np.prod(op.attributes.get("kernel_shape", (0,))))
    n = window or max(x.numel() // v.numel(), 1)
    again = evaluate(op, [x.square(), *inputs[1:]])[0]
    return _accumulated(v, again if op.kind in ("ReduceSum", "ReduceL1") else again / n, n, _LANES)


def _softmax(op: Op, x: Tensor, v: Tensor) -> tuple[Tensor, Sequence[tuple[Tensor, Tensor, tuple[int, ...]]]]:
    """exp(x - max) / sum: the difference is rounded, then exp, then the quotient; the sum is common to a row."""
    axis = int(op.attributes.get("axis", -1)) % x.ndim
    below = x - x.amax(axis, keepdim=True)
    n = x.shape[axis]
    common = torch.full((1,) * x.ndim, _partial_sums(n, _LANES)[0] ** 0.5, device=x.device)
    if op.kind == "LogSoftmax":
        return (below.square() + v.square() + 1).sqrt(), [(torch.ones_like(v), common, (axis,))]
    return v * (below.square() + 5).sqrt(), [(v, common, (axis,))]


def _layer_norm(
    op: Op, inputs: Sequence[Tensor | None], v: Tensor
) -> tuple[Tensor, Sequence[tuple[Tensor, Tensor, tuple[int, ...]]]]:
    """(x - mean) r gamma + beta: mean and r are common to a row, the rest is rounded element by element.

    r is taken as computed from the mean of squares in one pass, as ONNX Runtime does it, which loses more where the
    mean is large.
    """
    x, gamma = _given(inputs), inputs[1]
    assert gamma is not None  # evaluate has run on the same inputs
    beta = inputs[2] if len(inputs) > 2 else None
    axes = tuple(range(int(op.attributes.get("axis", -1)) % x.ndim, x.ndim))
    n = int(np.prod([x.shape[axis] for axis in axes]))
    squares, total = x.square().sum(axes, keepdim=True), x.sum(axes, keepdim=True)
    variance = (squares / n - (total / n).square()).clamp_min(0) + float(op.attributes.get("epsilon", 1e-5))
    scaled = v if beta is None else v - beta
    mean_width = _accumulated(total, squares, n, _LANES) / n
    r_width = 0.5 * (_partial_sums(n, _LANES)[0] + 1) ** 0.5 * squares / n / variance + 2
    direction = (gamma * variance.rsqrt()).expand_as(v)
    inner = (3 * scaled.square() + v.square()).sqrt()
    return inner, [(direction, mean_width, axes), (scaled, r_width, axes)]


def _clipped(op: Op, inputs: Inputs) -> float:
    """Fraction of elements outside of what a QuantizeLinear can hold."""
    exact, _, _, (low, high) = quantization_grid(op, inputs)
    return float(((exact < low - 0.5) | (exact > high + 0.5)).float().mean())


def _closest(z: Floats, pairs: int) -> Ints:
    """Label and its closest competitors by logit: int64 [n, 1 + P]."""
    if not 1 <= pairs < z.shape[1]:
        raise StageFailed(f"{pairs} competitors were asked for; {z.shape[1]} classes have 1 to {z.shape[1] - 1}.")
    return np.argsort(-z, axis=1, kind="stable")[:, : pairs + 1].astype(np.int64)


def _joined(parts: Sequence[_Part], program: Program, precision: str) -> NoiseFloor:
    variance = np.concatenate([part.variance for part in parts])
    shares = np.sum([part.shares for part in parts], axis=0) / variance.size
    kinds: dict[str, float] = {}
    for op, share in zip(program.ops, shares, strict=True):
        kinds[op.kind] = kinds.get(op.kind, 0.0) + float(share)
    return NoiseFloor(
        precision=precision,
        label=np.concatenate([part.label for part in parts]),
        competitors=np.concatenate([part.competitors for part in parts]),
        margin=np.concatenate([part.margin for part in parts]),
        sigma=np.sqrt(variance),
        shares={op.name: float(share) for op, share in zip(program.ops, shares, strict=True) if share > 0},
        kinds={kind: share for kind, share in sorted(kinds.items(), key=lambda item: -item[1]) if share > 0},
        saturated={name: sum(part.saturated[name] for part in parts) / len(variance) for name in parts[0].saturated},
    )
