"""`distil`, and `grow` for some entries alone: the loop over the steps."""

import contextlib
import hashlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from mpdeploy.errors import StageFailed
from mpdeploy.pruning.patterns import Pattern
from mpdeploy.tuning.checkpoint import Folder
from mpdeploy.tuning.features import Tapped, find_blocks
from mpdeploy.tuning.loss import distillation_loss, feature_loss
from mpdeploy.tuning.masks import Masks, Reservoir, check_masks, check_search, check_shapes
from mpdeploy.tuning.run import Run
from mpdeploy.tuning.samples import Course, Indices, learning_rate
from mpdeploy.tuning.settings import Settings, check_settings, identity_of
from mpdeploy.tuning.teacher import Teacher
from mpdeploy.tuning.team import Team, digest_of

Load = Callable[[Indices, Indices], Tensor]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class TuneHistory:
    """What a distillation did.

    Args:
        steps: step numbers, 1-based, one per optimiser step.
        losses: the loss before that step; as long as `steps`.
        epochs: epochs asked for and done.
        resumed_at: steps that a checkpoint had already done, or None for a run from the start.
        refreshes: (step, weights admitted to the masks after it) of every search for better masks.
        blocks: names of the modules whose features were matched.
    """

    steps: tuple[int, ...]
    losses: tuple[float, ...]
    epochs: int
    resumed_at: int | None
    refreshes: tuple[tuple[int, int], ...] = ()
    blocks: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Loop:
    """What stays the same from step to step."""

    settings: Settings
    course: Course
    team: Team
    load: Load
    labels: NDArray[np.int64]
    device: torch.device
    identity: str
    folder: Folder | None
    every: int
    progress: Progress

    def one(self) -> Tensor:
        """One image, to see how a network uses its modules."""
        return self.load(np.zeros(1, np.int64), np.zeros(1, np.int64))

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Matrix products in bfloat16 where asked for; weights, gradients and losses stay float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16")


def distil(
    student: nn.Module,
    teacher: nn.Module,
    masks: Mapping[str, Tensor],
    images: Callable[[NDArray[np.int64]], Tensor],
    labels: NDArray[np.int64],
    *,
    epochs: int,
    lr: float,
    batch: int,
    seed: int,
    temperature: float = 2.0,
    hard_weight: float = 0.5,
    feature_weight: float = 0.0,
    weight_decay: float = 0.0,
    flip: bool = False,
    ema: float = 0.0,
    refresh: int = 0,
    patterns: Mapping[str, Pattern] | None = None,
    precision: str = "fp32",
    device: str = "cpu",
    checkpoint: Path | None = None,
    checkpoint_every: int = 100,
    progress: Progress,
) -> TuneHistory:
    """Train the student in place towards the teacher; it obeys its N:M patterns at every step.

    BatchNorm keeps its running statistics (eval mode); dropout works as the student defines it. Inside an initialised
    torch.distributed group, which has to take CPU tensors, every process calls this with the same arguments (its own
    device; `checkpoint` on a disk that all see) and all end with the same weights: those of one process, but for the
    order of additions.

    Args:
        student: the pruned network; on its own device and in eval mode afterwards.
        teacher: the dense network; unchanged.
        masks: for each pruned layer the boolean mask of its weight, true where a weight may be nonzero.
        images: preprocessed float32 [b, C, H, W] of the sample indices it is given.
        labels: int64 [n], n samples in all.
        epochs: passes over the samples; 0 returns at once.
        lr: peak learning rate of AdamW.
        batch: samples per step over all processes; the last batch of an epoch may be smaller.
        seed: decides the order of samples, flips and dropout.
        temperature: softens both networks' outputs.
        hard_weight: weight of the cross-entropy with the labels.
        feature_weight: weight of `feature_loss` over the blocks that `find_blocks` names; 0 switches it off.
        weight_decay: decoupled weight decay of weights with two or more axes.
        flip: mirror each image left to right with probability one half.
        ema: decay of a moving average of the weights, which then is the result; 0 switches it off.
        refresh: steps between two searches for better masks, in the first epoch and the first half of the run only;
            0 keeps the masks.
        patterns: the pattern of each pruned layer, needed where `refresh` is not 0.
        precision: "fp32", or "bf16" for mixed precision.
        device: where to train.
        checkpoint: folder for a checkpoint, made if missing; None keeps none. A finished run leaves its last one.
        checkpoint_every: steps between checkpoints.
        progress: told (steps done, steps in all).

    Raises:
        RecipeError: a setting is out of range, or the network has no blocks to match.
        StageFailed: the loss or a weight becomes NaN or infinite, a mask doesn't fit, there are no samples, memory runs
            out, the processes disagree, or the checkpoint belongs to another run.
        CorruptArtifact: the checkpoint's files are not what was written.
    """
    settings = Settings(lr, temperature, hard_weight, feature_weight, weight_decay, ema, refresh, precision)
    course = Course(len(labels), batch, epochs, seed, flip)
    check_settings(settings, course, checkpoint_every)
    if epochs == 0:
        return TuneHistory((), (), 0, None)
    _check_samples(labels)
    check_masks(student, masks)
    until, patterns = min(course.per_epoch, course.steps // 2), patterns or {}
    check_search(refresh, until, masks, patterns)
    loop = _loop(student, masks, images, labels, settings, course, device, checkpoint, checkpoint_every, progress)
    with _placed(student, teacher, loop.device):
        run = Run(student, Masks(student, masks, patterns, refresh, until), settings, loop.team)
        resumed_at = _fit(run, teacher, loop)
    steps = tuple(range(1, len(run.losses) + 1))
    return TuneHistory(steps, tuple(run.losses), epochs, resumed_at, tuple(run.refreshes), run.blocks)


def grow(
    student: nn.Module,
    teacher: nn.Module,
    moving: Mapping[str, Tensor],
    images: Callable[[NDArray[np.int64]], Tensor],
    labels: NDArray[np.int64],
    *,
    steps: int,
    lr: float,
    batch: int,
    seed: int,
    temperature: float = 2.0,
    hard_weight: float = 0.5,
    feature_weight: float = 0.0,
    flip: bool = False,
    precision: str = "fp32",
    device: str = "cpu",
    checkpoint: Path | None = None,
    progress: Progress,
) -> tuple[float, ...]:
    """Train some entries of some weights in place; all else of the student stays as it is, bit for bit.

    As `distil` does it, with its order of samples and its loss, but without weight decay or a moving average: both
    would hide how far an entry moves by itself. The phase is short, so there is one checkpoint, when it is over: a run
    killed before that repeats it, one killed later takes it from there (on a GPU a repetition may differ in last bits,
    and with them in the masks that follow from it).

    Args:
        student: the pruned network; on its own device and in eval mode afterwards.
        teacher: the dense network; unchanged.
        moving: by layer the boolean mask of its weight, true where an entry may change.
        images: as for `distil`.
        labels: as for `distil`.
        steps: optimiser steps; the samples are gone through as often as that takes.
        lr: as for `distil`, as is all that follows.
        batch: samples per step.
        seed: decides order, flips and dropout.
        temperature: softens outputs.
        hard_weight: of the cross-entropy.
        feature_weight: of the features.
        flip: mirror at random.
        precision: "fp32" or "bf16".
        device: where to train.
        checkpoint: a folder of its own for the result; None keeps none.
        progress: told (steps done, steps in all).

    Returns:
        The loss before each step.

    Raises:
        RecipeError: as for `distil`.
        StageFailed: as for `distil`.
        CorruptArtifact: as for `distil`.
    """
    settings = Settings(lr, temperature, hard_weight, feature_weight, 0.0, 0.0, 0, precision)
    course = Course(len(labels), batch, 1, seed, flip, steps)
    check_settings(settings, course, 1)
    _check_samples(labels)
    check_shapes(student, moving)
    course = replace(course, epochs=-(-steps // course.per_epoch))
    loop = _loop(student, moving, images, labels, settings, course, device, checkpoint, steps, progress)
    with _placed(student, teacher, loop.device):
        reservoir = Reservoir(student, moving)
        run = Run(student, reservoir, settings, loop.team)
        with reservoir.alone(student):
            _fit(run, teacher, loop)
    return tuple(run.losses)


def _check_samples(labels: NDArray[np.int64]) -> None:
    if not len(labels):
        raise StageFailed("There are no samples to tune on.")


def _loop(
    student: nn.Module,
    masks: Mapping[str, Tensor],
    images: Callable[[NDArray[np.int64]], Tensor],
    labels: NDArray[np.int64],
    settings: Settings,
    course: Course,
    device: str,
    checkpoint: Path | None,
    every: int,
    progress: Progress,
) -> _Loop:
    place, identity = torch.device(device), identity_of(settings, course, student, masks, labels)
    folder = Folder(checkpoint, identity) if checkpoint else None
    load = _loader(images, place)
    return _Loop(settings, course, Team.current(), load, labels, place, identity, folder, every, progress)


@contextlib.contextmanager
def _placed(student: nn.Module, teacher: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside: both networks are on a device; afterwards on their own, the student in eval mode."""
    homes = [next(network.parameters()).device for network in (student, teacher)]
    try:
        student.to(device), teacher.to(device)
        yield
    finally:
        student.eval()
        student.to(homes[0]), teacher.to(homes[1])


def _fit(run: Run, teacher: nn.Module, loop: _Loop) -> int | None:
    """Do what a checkpoint left to do, check the result, and return the steps that it had done."""
    resumed_at = _resume(run, loop)
    with _memory_errors_named(loop.course.batch):
        _train(run, teacher, loop)
    _finish(run, loop.team)
    return resumed_at


def _loader(images: Callable[[NDArray[np.int64]], Tensor], device: torch.device) -> Load:
    """Return what loads samples onto a device, mirrored where their variant is 1."""

    def load(some: Indices, variants: Indices) -> Tensor:
        batch = images(some).to(device)
        if not variants.any():
            return batch
        mirrored = torch.from_numpy(variants == 1).to(device)
        return torch.where(mirrored[:, None, None, None], batch.flip(-1), batch)

    return load


def _resume(run: Run, loop: _Loop) -> int | None:
    """Bring a run to where its checkpoint left it; return the steps done, or None where there is no checkpoint."""
    found = loop.folder.load() if loop.folder else None
    if found:
        run.adopt(*found)
    resumed_at = len(run.losses) if found else None
    seen = f"{loop.identity} {resumed_at}"
    loop.team.agree("settings, weights or checkpoint", hashlib.sha256(seen.encode()).hexdigest())
    return resumed_at


def _train(run: Run, teacher: nn.Module, loop: _Loop) -> None:
    """Take the steps that are left, if any."""
    if len(run.losses) == loop.course.steps:
        return
    teacher.eval()
    run.student.train()
    for child in run.student.modules():
        if isinstance(child, _BatchNorm):
            child.eval()
    if loop.settings.feature_weight:
        run.blocks = find_blocks(teacher, loop.one())
    tapped = [Tapped(network, run.blocks) for network in (run.student, teacher)]
    try:
        with (
            torch.random.fork_rng(devices=[loop.device] if loop.device.type == "cuda" else []),
            warnings.catch_warnings(),
        ):
            # A parameter with an axis of length 1 makes DistributedDataParallel guess that it will be slow.
            warnings.filterwarnings("ignore", "Grad strides do not match")
            dense = Teacher(tapped[1], loop.load, loop.course, loop.team, features=bool(run.blocks))
            _steps(run, _shared(tapped[0], loop), dense, loop)
    finally:
        for network in tapped:
            network.release()


def _shared(network: Tapped, loop: _Loop) -> nn.Module:
    """Let the processes of a team average their gradients."""
    if loop.team.size == 1:
        return network
    return DistributedDataParallel(
        network,
        device_ids=[loop.device] if loop.device.type == "cuda" else None,
        # A head that training doesn't use gets no gradient; a single process leaves it alone, and so must several.
        find_unused_parameters=_leaves_some_unused(network, loop.one()),
    )


def _leaves_some_unused(network: nn.Module, image: Tensor) -> bool:
    parameters = [value for value in network.parameters() if value.requires_grad]
    logits, _ = network(image)
    return any(part is None for part in torch.autograd.grad(logits.sum(), parameters, allow_unused=True))


def _steps(run: Run, student: nn.Module, teacher: Teacher, loop: _Loop) -> None:
    total = loop.course.steps
    for step in range(len(run.losses), total):
        some, variants = loop.course.at(step)
        rows, weight = loop.team.rows(len(some))
        batch = loop.load(some[rows], variants[rows])
        torch.manual_seed(loop.course.seed_of(step, loop.team.rank))
        own = _loss(student, teacher, step, batch, loop.labels[some[rows]], loop)
        loss = loop.team.mean(float(own.detach()) * weight)
        rate = learning_rate(step, total, loop.settings.lr)
        if not math.isfinite(loss):
            raise StageFailed(
                f"The distillation loss became {loss} at step {step + 1} of {total} (learning rate {rate:.3g}).",
                hint="lower the learning rate, or look for NaN in the weights and images.",
            )
        run.optimizer.zero_grad(set_to_none=True)
        (own * weight).backward()  # type: ignore[no-untyped-call]
        run.update(loss, rate)
        last = step + 1 == total
        if loop.folder and loop.team.rank == 0 and ((step + 1) % loop.every == 0 or last):
            loop.folder.save(step + 1, run.tensors(), run.history())
        loop.progress(step + 1, total)


def _loss(
    student: nn.Module, teacher: Teacher, step: int, batch: Tensor, labels: NDArray[np.int64], loop: _Loop
) -> Tensor:
    """Mean loss over this process's rows of one step."""
    settings = loop.settings
    with loop.autocast():
        logits, features = student(batch)
        goal, goals = teacher.outputs(step, batch, logits.shape[1])
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise StageFailed(f"A label lies outside the network's {logits.shape[1]} classes.")
    truth = torch.from_numpy(labels).to(loop.device)
    loss = distillation_loss(
        logits.float(), goal, truth, temperature=settings.temperature, hard_weight=settings.hard_weight
    )
    return loss + settings.feature_weight * feature_loss(features, goals) if features else loss


def _finish(run: Run, team: Team) -> None:
    """Put the moving average in place and check what will be handed on."""
    if team.size > 1:
        team.agree("weights after tuning", digest_of(run.student.state_dict()))
    with torch.no_grad():
        for name, value in run.student.named_parameters():
            if name in run.average:
                value.copy_(run.average[name])
        if run.ema:
            team.copy_from_first(run.student.parameters())
    for name, value in run.student.named_parameters():
        if not bool(torch.isfinite(value).all()):
            raise StageFailed(
                f"The parameter {name!r} is NaN or infinite after tuning.", hint="lower the learning rate."
            )
    check_masks(run.student, run.masks.masks)


@contextlib.contextmanager
def _memory_errors_named(batch: int) -> Iterator[None]:
    """Turn a full memory into a sentence; every other error passes."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # The CPU's allocator raises a plain RuntimeError.
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        raise StageFailed(
            f"Memory ran out while tuning with batches of {batch}.",
            hint="lower tune.batch, or let several GPUs share it under torchrun.",
        ) from error
