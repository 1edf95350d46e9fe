"""What tuning minimises: a mean over samples of one number per sample, so that any split of a batch adds up to it."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def distillation_loss(
    student: Tensor, teacher: Tensor, labels: Tensor, *, temperature: float, hard_weight: float
) -> Tensor:
    """Cross-entropy with the labels plus temperature^2 KL(teacher || student) of the softened outputs, weighted.

    Source: Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network", 2015; temperature^2 keeps the
    gradient's size independent of the temperature.

    Args:
        student: logits [b, K].
        teacher: logits [b, K].
        labels: int64 [b].
        temperature: above 0.
        hard_weight: weight of the cross-entropy in [0, 1]; the rest is the divergence's.
    """
    soft = F.kl_div(
        F.log_softmax(student / temperature, dim=1),
        F.log_softmax(teacher / temperature, dim=1),
        log_target=True,
        reduction="batchmean",
    )
    return hard_weight * F.cross_entropy(student, labels) + (1 - hard_weight) * temperature**2 * soft


def feature_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Squared error of the student's features relative to the teacher's mean square, summed over blocks.

    Each sample is divided by its own teacher's mean square: 1 means "as wrong as zeros would be", for every block of
    every network, and the mean over a batch does not depend on how processes share it.

    Args:
        student: one [b, ...] per block, at least one block.
        teacher: the same of the dense network.
    """
    return torch.stack([_relative_error(s.float(), t.float()) for s, t in zip(student, teacher, strict=True)]).sum()


def _relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    error = (student - teacher).square().flatten(1).mean(dim=1)
    size = teacher.square().flatten(1).mean(dim=1)
    return (error / size.clamp_min(torch.finfo(torch.float32).tiny)).mean()
