"""L4: two ReLU networks agree on a whole ball around a sample, by a differential zonotope.

Every value is c + sum_g G_g e_g + r, the noise symbols |e_g| <= 1 shared by all values, |r| <= rest elementwise. Two of
them are carried at once: the dense network's value x and the difference d = x' - x to the other network's, in the same
symbols, so that what both have in common cancels (ReluDiff, Paulsen et al. 2020; VeryDiff, Teuber et al. 2024). The
input's d is 0. A linear operator takes x to Wx + b and d to W'd + (W' - W)x + b' - b. `rest` holds the rounding of all
of it, and nothing else of note.

At a ReLU, relu(x) of an unstable neuron gets one new symbol: it lies between s x and s x + t, s = u/(u - l). The
difference has four enclosures; the one that adds least that is new is taken, neuron by neuron:

    d + [-max(0, -l), max(0, -l')]       because relu(v) = v + relu(-v); exact where both are active
    [-max(0, u), max(0, u')]             exact where both are inactive
    d/2 +- max|d|/2                      because relu(x + d) - relu(x) = c d with 0 <= c <= 1
    s' (x + d) - s x + [-t, t']          both relaxed apart; exact where one is active and the other is not

with l, u, s, t of x and l', u', s', t' of x' = x + d. It is for networks of modest depth, and costs one pass of the
network for every symbol.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpdeploy.certify.box_rules import FLOAT64, TINY, UP, gamma
from mpdeploy.certify.data_path import changed_ops
from mpdeploy.certify.program import Op, Program, evaluate, tensors
from mpdeploy.errors import StageFailed

_MOVES = frozenset({"Flatten", "Reshape", "Identity", "Dropout", "Transpose", "Squeeze", "Unsqueeze"})
_LINEAR = frozenset({"Gemm", "MatMul", "Conv", "BatchNormalization"})
_MEANS = frozenset({"AveragePool", "GlobalAveragePool", "ReduceMean"})
SUPPORTED = tuple(sorted(_MOVES | _LINEAR | _MEANS | {"Add", "Relu"}))
"""Operators that the zonotope can treat."""


@dataclass(frozen=True)
class BallProof:
    """What was proved of n samples and K classes.

    Attributes:
        label: int64 [n], y: the dense network's label at the sample.
        tau: float64 [n, K], 0 at y: sup over the ball of (z'_j - z'_y) - (z_j - z_y). Every x of the ball with dense
            label y and dense margin m_j(x) > tau_j for all j has the label y in the other network too.
        robust: bool [n], every x of the ball has the dense label y.
        same: bool [n], every x of the ball has the label y in both networks.
        generators: int64 [n], noise symbols at the end.
        multiply_adds: int64 [n], spent in linear operators.
    """

    label: NDArray[np.int64]
    tau: NDArray[np.float64]
    robust: NDArray[np.bool_]
    same: NDArray[np.bool_]
    generators: NDArray[np.int64]
    multiply_adds: NDArray[np.int64]

    def facts(self) -> dict[str, Any]:
        """Return counts and medians."""
        worst = self.tau.max(axis=1)
        return {
            "samples": len(self.label),
            "tau_median": float(np.median(worst)) if worst.size and np.isfinite(worst).all() else None,
            "robust": int(self.robust.sum()),
            "same": int(self.same.sum()),
            "generators_median": float(np.median(self.generators)) if worst.size else None,
            "multiply_adds": int(self.multiply_adds.sum()),
        }


Constants = Sequence[Tensor | None]


@dataclass(frozen=True)
class Zonotope:
    """One value.

    Attributes:
        centre: float64, [1, ...].
        generators: float64 [g, ...], of the first g symbols; later ones don't take part.
        rest: like centre, of its own for every element.
    """

    centre: Tensor
    generators: Tensor
    rest: Tensor

    def reach(self) -> Tensor:
        """Largest distance from the centre, elementwise."""
        return (self.generators.abs().sum(0, keepdim=True) + self.rest) * UP + TINY

    def size(self) -> Tensor:
        """No element's absolute value, nor that of a partial sum of its terms, is larger."""
        return (self.centre.abs() + self.reach()) * UP

    def padded(self, count: int) -> Tensor:
        """Its generators, with zeros up to `count` symbols."""
        missing = count - len(self.generators)
        return torch.cat([self.generators, self.generators.new_zeros(missing, *self.generators.shape[1:])])


@dataclass(frozen=True)
class _Pair:
    x: Zonotope
    d: Zonotope


@dataclass
class _Work:
    """Symbols used so far and multiply-adds spent on one sample."""

    symbols: int
    spent: int = 0


def ball_equivalence(dense: Program, other: Program, images: Tensor, eps: float) -> BallProof:
    """Bound how far two networks can drift apart on the l_inf ball of radius `eps` around each image.

    Args:
        dense: the reference.
        other: its twin: the same operators, other constants.
        images: [n, C, H, W].
        eps: radius in the units of the network's input, after preprocessing.

    Raises:
        StageFailed: the two are no twins, or hold an operator that the zonotope can't treat.
    """
    changed_ops(dense, other)
    for op in dense.ops:
        if op.kind not in SUPPORTED:
            raise StageFailed(
                f"The operator {op.name} is a {op.kind}, which the zonotope can't treat; "
                f"it takes {', '.join(SUPPORTED)}.",
                hint="leave the ball certificate out for this network, or use it on a ReLU network of modest depth",
            )
    cpu = torch.device("cpu")
    constants = tensors(dense, torch.float64, cpu), tensors(other, torch.float64, cpu)
    return _collected([_sample(dense, constants, image[None].double().cpu(), eps) for image in images], eps)


@dataclass(frozen=True)
class _Outcome:
    label: int
    tau: NDArray[np.float64]
    robust: bool
    same: bool
    work: _Work


def _collected(found: Sequence[_Outcome], eps: float) -> BallProof:
    if not found:
        raise StageFailed(f"The ball certificate of radius {eps} needs at least one image; none was given.")
    return BallProof(
        label=np.array([one.label for one in found], np.int64),
        tau=np.stack([one.tau for one in found]),
        robust=np.array([one.robust for one in found]),
        same=np.array([one.same for one in found]),
        generators=np.array([one.work.symbols for one in found], np.int64),
        multiply_adds=np.array([one.work.spent for one in found], np.int64),
    )


def _sample(
    program: Program, constants: tuple[Mapping[str, Tensor], Mapping[str, Tensor]], image: Tensor, eps: float
) -> _Outcome:
    count = image.numel()
    ball = eps * torch.eye(count, dtype=torch.float64).reshape(count, *image.shape[1:])
    zero = torch.zeros_like(image)
    values: dict[str, _Pair] = {
        program.input: _Pair(Zonotope(image, ball, zero), Zonotope(zero, ball * 0, zero)),
    }
    work = _Work(count)
    for op in program.ops:
        pairs = [values.get(name) for name in op.inputs]
        values[op.outputs[0]] = _step(op, pairs, constants, work)
    return _outcome(values[program.output], work)


def _outcome(last: _Pair, work: _Work) -> _Outcome:
    label = int(last.x.centre[0].argmax())
    both = _sum(last.x, last.d, work.symbols)
    dense, other, tau = (_highest_pair(value, label) for value in (last.x, both, last.d))
    robust = bool((_without(dense, label) < 0).all())
    same = robust and bool((_without(other, label) < 0).all())
    return _Outcome(label, tau.numpy(), robust, same, work)


def _without(pairs: Tensor, label: int) -> Tensor:
    return torch.cat([pairs[:label], pairs[label + 1 :]])


def _highest_pair(value: Zonotope, label: int) -> Tensor:
    """Sup of v_j - v_y for every j; the symbols that both share cancel before absolute values are taken."""
    centre = value.centre[0] - value.centre[0, label]
    spread = (value.generators - value.generators[:, label : label + 1]).abs().sum(0)
    rest = value.rest[0] + value.rest[0, label]
    rounding = (value.size()[0] + value.size()[0, label]) * 2.0**-50
    result = (centre + (spread * UP + rest * UP + rounding)).nan_to_num(math.inf, math.inf, math.inf)
    result[label] = 0.0
    return result


def _sum(a: Zonotope, b: Zonotope, symbols: int) -> Zonotope:
    total = Zonotope(a.centre + b.centre, a.padded(symbols) + b.padded(symbols), a.rest + b.rest)
    return Zonotope(total.centre, total.generators, total.rest * UP + 2.0**-52 * (a.size() + b.size()) + TINY)


def _step(
    op: Op,
    pairs: Sequence[_Pair | None],
    constants: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    work: _Work,
) -> _Pair:
    ours, theirs = ([table.get(name) for name in op.inputs] for table in constants)
    moving = [pair for pair in pairs if pair is not None]
    if op.kind == "Relu":
        return _relu(moving[0], work)
    if op.kind == "Add":
        return _add(op, moving, ours, theirs, work)
    if len(moving) != 1 or pairs[0] is None:
        raise StageFailed(
            f"The operator {op.name} ({op.kind}) multiplies two values of the data, which the zonotope can't treat.",
            hint="leave the ball certificate out for this network",
        )
    return _affine(op, pairs[0], ours, theirs, work)


def _affine(op: Op, pair: _Pair, ours: Constants, theirs: Constants, work: _Work) -> _Pair:
    """A map that is affine in its first input: x to Wx + b, d to W'd + (W' - W)x + b' - b."""
    (weight, bias), (twin, bias_twin) = _weights(op, ours), _weights(op, theirs)

    def apply(batch: Tensor, by: Tensor | None) -> Tensor:
        return _apply(op, batch, by, ours)

    size, twin_size = (None if w is None else w.abs() for w in (weight, twin))
    unit = gamma(_terms(op, weight, pair.x.centre, ours) + 8, FLOAT64.accumulate)
    x, d = pair.x, pair.d
    x_rounding = unit * (apply(x.size(), size) + bias.abs())
    d_rounding = unit * (apply(d.size(), twin_size) + bias.abs() + bias_twin.abs())
    rest_x, rest_d = apply(x.rest, size), apply(d.rest, twin_size)
    centre, generators = apply(d.centre, twin) + (bias_twin - bias), apply(d.generators, twin)
    passes = 2 + len(x.generators) + len(d.generators)
    if weight is not None and twin is not None and not torch.equal(weight, twin):
        gap = twin - weight
        d_rounding = d_rounding + unit * apply(x.size(), gap.abs())
        rest_d = rest_d + apply(x.rest, gap.abs())
        centre = centre + apply(x.centre, gap)
        count = max(len(d.generators), len(x.generators))
        generators = Zonotope(centre, generators, rest_d).padded(count)
        generators = generators + Zonotope(centre, apply(x.generators, gap), rest_d).padded(count)
        passes += len(x.generators)
    work.spent += passes * centre.numel() * _terms(op, weight, x.centre, ours)
    return _Pair(
        Zonotope(apply(x.centre, weight) + bias, apply(x.generators, weight), (rest_x + 4 * x_rounding) * UP + TINY),
        Zonotope(centre, generators, (rest_d + 4 * d_rounding) * UP + TINY),
    )


def _weights(op: Op, constants: Constants) -> tuple[Tensor | None, Tensor]:
    """W and b of an operator, b shaped to be added to its output; W is None where the operator has no weights."""
    none = torch.zeros((), dtype=torch.float64)
    if op.kind == "BatchNormalization":
        scale, bias, mean, var = (_present(value) for value in constants[1:5])
        slope = scale / (var + float(op.attributes.get("epsilon", 1e-5))).sqrt()
        return slope, (bias - mean * slope).reshape(-1, 1, 1)
    if op.kind == "Conv":
        added = _bias(constants)
        return _present(constants[1]), none if added is None else added.reshape(-1, 1, 1)
    if op.kind == "Gemm":
        added = _bias(constants)
        return _present(constants[1]), none if added is None else float(op.attributes.get("beta", 1.0)) * added
    return (_present(constants[1]) if op.kind == "MatMul" else None), none


def _apply(op: Op, batch: Tensor, weight: Tensor | None, constants: Constants) -> Tensor:
    """The linear part of an operator, with the weights given, on a batch [k, ...]."""
    if op.kind == "BatchNormalization":
        return batch * _present(weight).reshape(-1, 1, 1)
    result = evaluate(op, [batch, *constants[1:]] if weight is None else [batch, weight])[0]
    if len(result) != len(batch) or (op.kind == "Transpose" and op.attributes.get("perm", (1,))[0] != 0):
        raise StageFailed(
            f"The operator {op.name} ({op.kind}) moves or merges the batch, which the zonotope can't treat.",
            hint="leave the ball certificate out for this network",
        )
    return result


def _bias(constants: Constants) -> Tensor | None:
    return constants[2] if len(constants) > 2 else None


def _terms(op: Op, weight: Tensor | None, x: Tensor, constants: Constants) -> int:
    """Terms of one output's sum."""
    if op.kind in _MOVES:
        return 0
    if op.kind == "BatchNormalization":
        return 1
    if op.kind == "Conv":
        return math.prod(_present(weight).shape[1:])
    if op.kind in ("Gemm", "MatMul"):
        return x.shape[-1]
    return x[0].numel()


def _present(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


def _relu(pair: _Pair, work: _Work) -> _Pair:
    x, d, symbols = pair.x, pair.d, work.symbols
    twin = _sum(x, d, symbols)
    (low, high), (low_twin, high_twin) = _ends(x), _ends(twin)
    (slope, above), (slope_twin, above_twin) = _chord(low, high), _chord(low_twin, high_twin)
    farthest, zero, one = d.size(), torch.zeros_like(low), torch.ones_like(low)

    # relu(x + d) - relu(x) is in p d + q x + [below, over], in four ways.
    p = torch.stack([one, zero, one / 2, slope_twin])
    q = torch.stack([zero, zero, zero, slope_twin - slope])
    below = torch.stack([-(-low).clamp_min(0), -high.clamp_min(0), -farthest / 2, -above])
    over = torch.stack([(-low_twin).clamp_min(0), high_twin.clamp_min(0), farthest / 2, above_twin])
    best = ((over - below) / 2 + q.abs() * x.reach()).argmin(0, keepdim=True)
    p, q, below, over = (table.gather(0, best)[0] for table in (p, q, below, over))

    radius = (over - below) / 2 * UP
    fresh_x, fresh_d = _fresh(above / 2), _fresh(radius)
    work.symbols = symbols + len(fresh_x) + len(fresh_d)
    rounding = 2.0**-50 * (x.size() + above)
    after = Zonotope(
        x.centre * slope + above / 2,
        torch.cat([x.padded(symbols) * slope, fresh_x]),
        (x.rest * slope + rounding) * UP + TINY,
    )
    columns = d.padded(symbols) * p + x.padded(symbols) * q
    rounding = 2.0**-50 * (d.size() + x.size() + radius + over.abs() + below.abs())
    apart = Zonotope(
        d.centre * p + x.centre * q + (over + below) / 2,
        torch.cat([columns, torch.zeros_like(fresh_x), fresh_d]),
        (d.rest * p + x.rest * q.abs() + rounding) * UP + TINY,
    )
    return _Pair(after, apart)


def _chord(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Slope s and height t with s v <= relu(v) <= s v + t on [low, high]; any slope in [0, 1] is right with its t."""
    slope = torch.where(low >= 0, 1.0, torch.where(high <= 0, 0.0, high / (high - low)))
    above = torch.maximum(slope * -low, (1 - slope) * high).clamp_min(0) * UP
    return slope, torch.where((low >= 0) | (high <= 0), 0.0, above)


def _ends(value: Zonotope) -> tuple[Tensor, Tensor]:
    reach = value.reach()
    slack = (value.centre.abs() + reach) * 2.0**-50
    return value.centre - reach - slack, value.centre + reach + slack


def _fresh(radius: Tensor) -> Tensor:
    """One new symbol for every element with a radius: float64 [new, ...]."""
    flat = radius.reshape(-1)
    where = flat.nonzero()[:, 0]
    rows = torch.zeros(len(where), flat.numel(), dtype=torch.float64)
    rows[torch.arange(len(where)), where] = flat[where]
    return rows.reshape(len(where), *radius.shape[1:])


def _add(op: Op, moving: Sequence[_Pair], ours: Constants, theirs: Constants, work: _Work) -> _Pair:
    if len(moving) == 2:
        one, two = moving
        return _Pair(_sum(one.x, two.x, work.symbols), _sum(one.d, two.d, work.symbols))
    mine, twin = (next(value for value in table if value is not None) for table in (ours, theirs))
    if mine.ndim > moving[0].x.centre.ndim or (mine.ndim == moving[0].x.centre.ndim and len(mine) != 1):
        raise StageFailed(f"The constant of the operator {op.name} (Add) has a shape that changes the batch.")
    return _Pair(_moved(moving[0].x, mine, mine.abs()), _moved(moving[0].d, twin - mine, twin.abs() + mine.abs()))


def _moved(value: Zonotope, shift: Tensor, size: Tensor) -> Zonotope:
    centre = value.centre + shift
    if centre.shape != value.centre.shape:
        raise StageFailed(f"An Add makes {list(centre.shape)} of {list(value.centre.shape)}; the zonotope can't widen.")
    return Zonotope(centre, value.generators, (value.rest + 2.0**-51 * (value.size() + size)) * UP + TINY)
