"""L1: two networks agree on a sample as functions of real numbers, whatever float64 rounded on the way.

Run both in float64, bound what each run's rounding can have done to the difference of two logits, and compare. The
statement does not depend on the order of any sum, on this machine or on a library; it is about the networks that the
graphs and their constants define, not about float32 or an engine.
"""

import torch
from torch import Tensor

from mpdeploy.certify.box_rules import Box, Prepared
from mpdeploy.certify.boxes import margins, pair_bounds, propagate
from mpdeploy.certify.program import Program
from mpdeploy.certify.proof import Proof, Sample, State, decide, proof_of


def real_arithmetic(dense: Program, other: Program, images: Tensor) -> Proof:
    """Certify that both networks, evaluated exactly, give each image the same label.

    With y the label that float64 computed for the dense network, m_j = z_y - z_j its margins, l_j what the other
    network loses of them, A_j and A'_j proved bounds of the error of m_j in either evaluation, a sample is

        certified      if m_j > A_j and m_j - l_j > A_j + A'_j for every j != y: then y is the exact argmax of both;
        vacuous        if it isn't, and max_j (A_j + A'_j) is no smaller than max z - min z, or there is no bound;
        not certified  otherwise: the bound is meaningful, and the label changes or is too close to call.

    Args:
        dense: the reference.
        other: any network with as many classes.
        images: [n, C, H, W], taken as exact.

    Returns:
        Proof with bound = max_j (A_j + A'_j).
    """
    one, two = Prepared(dense), Prepared(other)
    return proof_of([_sample(one, two, image[None]) for image in images])


def _sample(dense: Prepared, other: Prepared, image: Tensor) -> Sample:
    first, own, why = _evaluation(dense, image, None)
    label = int(first.argmax())
    margin = margins(first, label)
    alone = decide(label, margin - own, own, first, why)
    if alone.state == State.VACUOUS:
        return alone
    second, theirs, whose = _evaluation(other, image, label)
    both = (own + theirs) * (1 + 2.0**-50)
    slack = torch.minimum(margin - own, margins(second, label) - both)
    return decide(label, slack, both, first, why or whose)


def _evaluation(prepared: Prepared, image: Tensor, label: int | None) -> tuple[Tensor, Tensor, str]:
    """Logits that float64 computes [K], and the bound of each pair's error with `label`, the argmax if None."""
    values = propagate(prepared, image)
    logits = values[prepared.program.output]
    assert isinstance(logits, Box)
    chosen = int(logits.centre[0].argmax()) if label is None else label
    return logits.centre[0], pair_bounds(prepared, values, chosen), logits.why
