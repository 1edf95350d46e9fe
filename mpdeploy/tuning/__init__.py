"""Distillation: bring a pruned network back towards its dense original, its N:M pattern kept.

    settings     what decides the result
    run          all that changes from step to step
    samples      which samples each step sees, and which of them mirrored
    teacher      the dense network's outputs, each computed once where they can be kept
    loss         what is minimised
    features     where inside the networks outputs are compared
    masks        which weights may be nonzero, how the first epoch may change that, and which entries move alone
    checkpoint   what a killed run goes on from
    team         one process, or several under torchrun that do the same steps together
    train        `distil` and `grow`, which put them together

Every random number is a function of (seed, epoch, step), so a checkpoint needs no generator state: a killed run that
resumes gives, on the CPU, the bits of a run that was never killed.
"""

from mpdeploy.tuning.loss import distillation_loss
from mpdeploy.tuning.samples import learning_rate
from mpdeploy.tuning.train import TuneHistory, distil, grow

__all__ = ["TuneHistory", "distil", "distillation_loss", "grow", "learning_rate"]
