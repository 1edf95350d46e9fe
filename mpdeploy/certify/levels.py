"""The provable levels side by side, as facts for a certificate: L1 and L3 about labels, L2 about the data path.

Each says for how many samples it holds, and for how many it is vacuous: on deep transformers all of them are, because
the enclosures grow by orders of magnitude per block. A vacuous bound is neither a pass nor a failure.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mpdeploy.certify.data_path import data_path
from mpdeploy.certify.envelope import engine_envelope
from mpdeploy.certify.objective import Penalty
from mpdeploy.certify.program import Program
from mpdeploy.certify.real_arithmetic import real_arithmetic
from mpdeploy.certify.zonotope import ball_equivalence
from mpdeploy.errors import StageFailed

ENVELOPES = ("fp32", "tf32", "fp16", "bf16")
"""Precisions that any float32 graph can be run in; int8 needs the quantised one."""


def prove_labels(dense: Program, other: Program, images: NDArray[np.float32]) -> dict[str, Any]:
    """Return L1 for the two networks and L3 for engines of the other one, not yet built.

    Args:
        dense: the reference.
        other: any network with as many classes.
        images: float32 [n, C, H, W].
    """
    x = torch.from_numpy(images)
    real = real_arithmetic(dense, other, x)
    envelopes = {name: engine_envelope(other, x, name, real.label.tolist()).facts() for name in ENVELOPES}
    return {"real_arithmetic": real.facts(), "envelope": envelopes}


def prove_data_path(
    dense: Program, pruned: Program, images: NDArray[np.float32], labels: NDArray[np.int64], penalty: Penalty
) -> dict[str, Any]:
    """Return L2 for two twins, or why there is none where they are no twins.

    Args:
        dense: the network before, in the channel order of the other.
        pruned: its twin with other constants.
        images: float32 [n, C, H, W].
        labels: int64 [n], true classes.
        penalty: the elastic net that the objective J holds.
    """
    try:
        found = data_path(dense, pruned, torch.from_numpy(images), torch.from_numpy(labels))
    except StageFailed as error:
        return {"why_not": error.what}
    return found.facts(penalty)


def prove_ball(dense: Program, other: Program, images: NDArray[np.float32], eps: float) -> dict[str, Any]:
    """Return L4 for two ReLU twins on balls of radius eps around the images, or why there is none.

    Args:
        dense: the reference.
        other: its twin with other constants.
        images: float32 [n, C, H, W].
        eps: radius in the maximum norm, in units of the network's input.
    """
    try:
        return {"eps": eps, **ball_equivalence(dense, other, torch.from_numpy(images), eps).facts()}
    except StageFailed as error:
        return {"eps": eps, "why_not": error.what}
