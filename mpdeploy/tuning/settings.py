"""The settings of a distillation: what they may be, and the fingerprint that a checkpoint must carry."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mpdeploy.artifact import dumps
from mpdeploy.errors import RecipeError
from mpdeploy.tuning.samples import Course
from mpdeploy.tuning.team import digest_of

PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class Settings:
    """What decides the result, beside the networks, the samples and their course."""

    lr: float
    temperature: float
    hard_weight: float
    feature_weight: float
    weight_decay: float
    ema: float
    refresh: int
    precision: str


def check_settings(settings: Settings, course: Course, checkpoint_every: int) -> None:
    """Refuse settings out of range; written so that NaN is out of range."""
    demands = {
        "epochs must be at least 0": course.epochs >= 0,
        "steps must be at least 1": course.limit is None or course.limit >= 1,
        "lr must be a positive number": 0 < settings.lr < math.inf,
        "batch must be at least 1": course.batch >= 1,
        "seed must be at least 0": course.seed >= 0,
        "temperature must be a positive number": 0 < settings.temperature < math.inf,
        "hard_weight must lie in [0, 1]": 0 <= settings.hard_weight <= 1,
        "feature_weight must be a number of at least 0": 0 <= settings.feature_weight < math.inf,
        "weight_decay must be a number of at least 0": 0 <= settings.weight_decay < math.inf,
        "ema must lie in [0, 1)": 0 <= settings.ema < 1,
        "refresh must be at least 0": settings.refresh >= 0,
        f"precision must be {' or '.join(PRECISIONS)}": settings.precision in PRECISIONS,
        "checkpoint_every must be at least 1": checkpoint_every >= 1,
    }
    broken = [demand for demand, met in demands.items() if not met]
    if broken:
        raise RecipeError(f"Tuning can't start: {'; '.join(broken)}.")


def identity_of(
    settings: Settings, course: Course, student: nn.Module, masks: Mapping[str, Tensor], labels: NDArray[np.int64]
) -> str:
    """Hex SHA-256 of what a checkpoint must agree with: settings, starting weights, masks, labels, torch's version.

    The number of processes is no part of it: a run killed on four may go on with one.
    """
    asked = {**asdict(settings), **asdict(course), "torch": torch.__version__}
    parts = [dumps(asked), digest_of(student.state_dict()), digest_of(masks)]
    return hashlib.sha256("\n".join(parts).encode() + np.ascontiguousarray(labels).tobytes()).hexdigest()
