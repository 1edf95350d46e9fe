"""A proved enclosure of everything that can happen to one sample inside a program.

State per value: the centre c that float64 computed, and bounds of x' - c for every admissible x': elementwise `radius`,
and `norm`, the Frobenius norm of the whole tensor. Admissible is every x' that the same operators make from the same
image in real arithmetic, when each of them may also err by its share of an `Arithmetic` and by what `inject` allows.
With neither, the enclosure still holds the rounding of the centre itself: it is then a bound of float64's own error.

The centre's rounding model: dot products and sums of n terms in any order, with or without fused multiply-add, but no
Strassen or Winograd forms; erf, exp and tanh within 8 units (Higham, Accuracy and Stability, ch. 3; two-pass or
Welford variance). All rules hold for displacements of any size, none is a linearisation. No derivative is taken at a
point: a slope is the largest on the whole segment.

The bound's own arithmetic is float64 too. What a rule computes is made of sums (of 2^19 terms at most), products and
quotients of non-negative numbers, and is then multiplied by 1 + 2^-32: for up to n = 2^20 roundings of relative size
u = 2^-53 in a row the computed value is at least (1 - u)^n >= 1 - 2^-33 times the exact one. Where a rule subtracts, it
allows for that itself. TINY outweighs all that underflow can lose.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from mpdeploy.certify.box_rules import (
    EXACT_ON_CONSTANTS,
    FLOAT64,
    MOVES,
    RULES,
    TINY,
    UP,
    Arithmetic,
    Box,
    Context,
    Prepared,
    Value,
    Values,
    centre_of,
    frobenius,
    safe,
    up,
)
from mpdeploy.certify.program import Op, Program, evaluate_unrounded

Inject = Callable[[Op, Tensor], Tensor | float | None]
"""Operator and its output's centre -> radius to add there, or None."""


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
    centre = image.double().cpu()
    zero = torch.zeros_like(centre)
    values: dict[str, Value] = dict(prepared.constants)
    values[program.input] = _stored(Box(centre, zero, zero.sum(), zero if gains else None), 0.0, arithmetic)
    for name, value in (known or {}).items():
        if gains and isinstance(value, Box) and value.gain is None:
            values[name] = replace(value, gain=torch.zeros_like(value.centre))
        else:
            values[name] = value
    for op in program.ops:
        if known is not None and all(name in known for name in op.outputs if name):
            continue
        inputs = [values[name] if name else None for name in op.inputs]
        for name, value in zip(op.outputs, step(prepared, op, inputs, arithmetic, inject, gains), strict=False):
            if name:
                values[name] = value
    return values


def step(
    prepared: Prepared,
    op: Op,
    inputs: Values,
    arithmetic: Arithmetic = FLOAT64,
    inject: Inject | None = None,
    gains: bool = False,
) -> list[Value]:
    """One operator of `propagate`: enclosures of its outputs from those of its inputs."""
    centres = [value.centre if isinstance(value, Box) else value for value in inputs]
    outputs = evaluate_unrounded(op, centres)
    if not any(isinstance(value, Box) for value in inputs):
        exact = op.kind in MOVES or op.kind in EXACT_ON_CONSTANTS or not outputs[0].is_floating_point()
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
    make = RULES.get(op.kind)
    rule = None if make is None else make(Context(prepared, op, index, inputs, centre, arithmetic))
    if rule is None:
        return _unbounded(centre, op, gains)
    radii = [value.radius if isinstance(value, Box) else None for value in inputs]
    radius = up(rule.between(radii)).expand_as(centre)
    if rule.reach is not None:
        radius = torch.minimum(radius, safe(up(rule.reach)))
    radius = safe(radius)
    norm = frobenius(radius)
    if rule.norm is not None:
        norm = torch.minimum(norm, safe(up(rule.norm)))
        radius = torch.minimum(radius, norm)
    gain = None
    if gains:
        gain = safe(up(rule.between([value.gain if isinstance(value, Box) else None for value in inputs])))
        gain = gain.expand_as(centre)
    why = next((value.why for value in inputs if isinstance(value, Box) and value.why), "")
    level = None if rule.level is None else torch.minimum(norm, safe(up(rule.level)))
    box = Box(centre, radius, norm, gain, rule.inherited, why, level, rule.factors, rule.weights)
    return box if op.kind in MOVES else _stored(box, rule.error, arithmetic)


def _stored(box: Box, error: Tensor | float, arithmetic: Arithmetic) -> Box:
    """Add an operator's own rounding to its enclosure."""
    reach = box.magnitude + error
    added = safe(up(error + arithmetic.store * reach + arithmetic.smallest))
    added = torch.where(reach * (1 + arithmetic.store) < arithmetic.largest, added, math.inf)
    return _displaced(box, added)


def _displaced(box: Box, extra: Tensor | float) -> Box:
    """Let every element lie `extra` further away; the displacement has gain 1 if gains are asked for by `ball`."""
    extra = torch.as_tensor(extra, dtype=torch.float64).expand_as(box.centre)
    added = extra if box.added is None else up(box.added + extra)
    more = frobenius(extra)
    level = None if box.level is None else safe(up(box.level + more))
    norm = safe(up(box.norm + more))
    return replace(box, radius=safe(up(box.radius + extra)), norm=norm, added=added, level=level)


def ball(box: Box, radius: Tensor | float) -> Box:
    """Every value within `radius` of each element of a box: the displacement that gains are with respect to.

    The radius may differ from element to element; gains are with respect to the largest displacement of any.
    """
    moved = _displaced(box, radius)
    return replace(moved, gain=torch.ones_like(box.centre), weights=None)


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
            size = up(rows.square().sum(1).sqrt()) * features.norm
            together = torch.minimum((rows * features.radius).sum(1), size)
            own = added + added[:, label : label + 1]
            apart = torch.minimum(apart, safe(up(together + own[0])))
    apart = safe(up(apart))
    apart[label] = 0.0
    return apart


def _last_product(program: Program, values: Mapping[str, Value]) -> tuple[Op, Tensor] | None:
    """The product that makes the logits, and what the operators from it on add to each of them."""
    makers = {name: op for op in program.ops for name in op.outputs}
    name, whole = program.output, 0.0 * centre_of(values[program.output])
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
