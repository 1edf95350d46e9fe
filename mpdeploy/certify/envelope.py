"""L3: before an engine is run, every execution that obeys an arithmetic's rounding model keeps the label.

A proof relative to the model, not a statement about a builder: it may choose other formats, other formulas or a fast
convolution. The model: products are summed in any order; each operator's result is stored rounded to the format; layer
norm, softmax and the other functions compute in float32 inside, to a few units in the last place, and not by the
one-pass variance. A fused operator rounds less often than this and is covered.

Weights are no uncertainty: they are rounded to the format first, and the margin is that of the network so stored.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from mpdeploy.certify.box_rules import FLOAT64, Arithmetic, Box, Prepared
from mpdeploy.certify.boxes import margins, pair_bounds, propagate
from mpdeploy.certify.program import Program
from mpdeploy.certify.proof import Proof, Sample, decide, proof_of
from mpdeploy.errors import RecipeError

_FLUSHED = 1e-30  # float32 and bfloat16 may flush to zero below 2^-126; 2^19 such terms are less than this

ARITHMETICS = {
    "fp32": Arithmetic(inner=2.0**-23, accumulate=2.0**-24, store=2.0**-24, smallest=_FLUSHED, largest=3.4e38),
    # Tensor cores read 10 bits after the point, rounded or truncated, and truncate while they add.
    "tf32": Arithmetic(2.0**-23, 2.0**-23, operand=2.0**-10, store=2.0**-24, smallest=_FLUSHED, largest=3.4e38),
    "fp16": Arithmetic(2.0**-23, 2.0**-23, store=2.0**-11, smallest=2.0**-24, largest=65504.0),
    "bf16": Arithmetic(2.0**-23, 2.0**-23, store=2.0**-8, smallest=_FLUSHED, largest=3.38e38),
    # gamma_n of 2^-11 reaches 1 at n = 2048 and is far too large long before; partial sums may overflow. No bound.
    "fp16_accumulate": Arithmetic(2.0**-11, math.inf, store=2.0**-11, smallest=2.0**-24, largest=65504.0),
    # QuantizeLinear errs by half a step and what it clips; integer sums are exact; everything else is float32.
    "int8": Arithmetic(2.0**-23, 2.0**-24, store=2.0**-24, smallest=_FLUSHED, largest=3.4e38, exact_integers=True),
}
"""Precision of an engine -> the model of its arithmetic."""

_STORED = {"fp16": torch.float16, "fp16_accumulate": torch.float16, "bf16": torch.bfloat16}


def engine_envelope(program: Program, images: Tensor, precision: str, labels: Sequence[int] | None = None) -> Proof:
    """Certify labels for every execution that obeys the model of `precision`.

    Statement for a certified sample s: with m'_j(s) the exact margins of the network whose weights are stored in the
    format, m'_j(s) > bound_j(s) for every j != y, hence every execution that obeys the model returns y.

    Args:
        program: the exported graph; for int8 the graph with QuantizeLinear and DequantizeLinear.
        images: [n, C, H, W] as the engine is given them, in float32.
        precision: a key of `ARITHMETICS`.
        labels: y of each image, for instance the dense network's; the stored network's own argmax if None.

    Returns:
        Proof; vacuous where the bound is no smaller than the range of the logits, or where there is none, as for a
        sum that is too long for its accumulator's format, or where a stored value could overflow.

    Raises:
        RecipeError: no such precision, or int8 of a graph that quantises nothing.
    """
    if precision not in ARITHMETICS:
        raise RecipeError(
            f"There is no rounding model of the precision {precision!r}, expected one of {', '.join(ARITHMETICS)}."
        )
    if precision == "int8" and not any(op.kind == "QuantizeLinear" for op in program.ops):
        raise RecipeError(
            "The precision int8 needs a graph with QuantizeLinear operators; this one has none.",
            hint="give the quantised graph that is handed to the builder, not the float32 one it was made from",
        )
    prepared = Prepared(stored(program, precision))
    arithmetic = FLOAT64 + ARITHMETICS[precision]
    return proof_of(
        [
            _sample(prepared, image[None], arithmetic, None if labels is None else int(labels[index]))
            for index, image in enumerate(images)
        ]
    )


def stored(program: Program, precision: str) -> Program:
    """The program with its floating-point constants rounded to the format in which `precision` stores weights."""
    kind = _STORED.get(precision)
    if kind is None:
        return program
    rounded = {
        name: value
        if value.dtype.kind in "iub"
        else torch.from_numpy(np.array(value, np.float64)).to(kind).double().numpy()
        for name, value in program.constants.items()
    }
    return replace(program, constants=rounded)


def _sample(prepared: Prepared, image: Tensor, arithmetic: Arithmetic, label: int | None) -> Sample:
    values = propagate(prepared, image, arithmetic)
    box = values[prepared.program.output]
    assert isinstance(box, Box)
    logits = box.centre[0]
    y = int(logits.argmax()) if label is None else label
    bound = pair_bounds(prepared, values, y)
    return decide(y, margins(logits, y) - bound, bound, logits, box.why)
