"""Distillation: bring a pruned network back towards its dense original with the mask frozen.

Every random number is a function of (seed, epoch, step), so a checkpoint needs no generator state: a killed run that
resumes gives, on the CPU, the bits of a run that was never killed.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from mpdeploy.artifact import dumps, read_json, sha256_of, sync
from mpdeploy.errors import CorruptArtifact, RecipeError, StageFailed

WARM_UP = 0.05  # share of the steps over which the learning rate rises
SCHEMA = 1
STATE = "state.json"


@dataclass(frozen=True)
class TuneHistory:
    """What a distillation did.

    Args:
        steps: step numbers, 1-based, one per optimiser step.
        losses: the loss before that step; as long as `steps`.
        epochs: epochs asked for and done.
        resumed_at: steps that a checkpoint had already done, or None for a run from the start.
    """

    steps: tuple[int, ...]
    losses: tuple[float, ...]
    epochs: int
    resumed_at: int | None


@dataclass(frozen=True)
class _Settings:
    """What decides the result, beside the networks and the samples."""

    epochs: int
    lr: float
    batch: int
    seed: int
    temperature: float
    hard_weight: float
    weight_decay: float
    flip: bool
    ema: float

    def steps(self, samples: int) -> int:
        """Optimiser steps in all."""
        return self.epochs * -(-samples // self.batch)


class _Run:
    """All that changes from step to step: the student, its optimiser, the moving average, the losses so far."""

    def __init__(self, student: nn.Module, settings: _Settings) -> None:
        parameters = list(student.parameters())
        groups = [
            {"params": [value for value in parameters if value.ndim >= 2], "weight_decay": settings.weight_decay},
            {"params": [value for value in parameters if value.ndim < 2], "weight_decay": 0.0},
        ]
        self.student = student
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr)
        named = student.named_parameters() if settings.ema else ()
        self.average = {name: value.detach().clone() for name, value in named}
        self.losses: list[float] = []

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that a resumed run needs, by name, on the CPU."""
        found = {f"student/{name}": value for name, value in self.student.state_dict().items()}
        found |= {f"average/{name}": value for name, value in self.average.items()}
        for name, parameter in self.student.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                found[f"adamw/{key}/{name}"] = value
        # Cloned, because tied parameters share storage, which safetensors refuses.
        return {name: value.detach().cpu().contiguous().clone() for name, value in found.items()}

    def adopt(self, tensors: Mapping[str, Tensor], losses: list[float]) -> None:
        """Go on from what `tensors` returned."""
        state = {name.removeprefix("student/"): value for name, value in tensors.items() if name.startswith("student/")}
        self.student.load_state_dict(state)
        for name in self.average:
            self.average[name].copy_(tensors[f"average/{name}"])
        for name, parameter in self.student.named_parameters():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                value = tensors.get(f"adamw/{key}/{name}")
                if value is not None:
                    # AdamW keeps its step counter on the CPU whatever the parameter's device.
                    self.optimizer.state[parameter][key] = value.to("cpu" if key == "step" else parameter.device)
        self.losses = list(losses)


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


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Learning rate of 0-based `step`: a linear rise over the first 5 % of the steps, then a half cosine towards 0."""
    rise = max(1, round(WARM_UP * steps))
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


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
    weight_decay: float = 0.0,
    flip: bool = False,
    ema: float = 0.0,
    device: str = "cpu",
    checkpoint: Path | None = None,
    checkpoint_every: int = 100,
    progress: Callable[[int, int], None],
) -> TuneHistory:
    """Train the student in place towards the teacher; pruned weights stay zero.

    BatchNorm keeps its running statistics (eval mode); dropout works as the student defines it.

    Args:
        student: the pruned network; on its own device and in eval mode afterwards.
        teacher: the dense network; unchanged.
        masks: for each pruned layer the boolean mask of its weight, true where a weight may be nonzero.
        images: preprocessed float32 [b, C, H, W] of the sample indices it is given.
        labels: int64 [n], n samples in all.
        epochs: passes over the samples; 0 returns at once.
        lr: peak learning rate of AdamW.
        batch: samples per step; the last batch of an epoch may be smaller.
        seed: decides the order of samples, flips and dropout.
        temperature: softens both networks' outputs.
        hard_weight: weight of the cross-entropy with the labels.
        weight_decay: decoupled weight decay of weights with two or more axes.
        flip: mirror each image left to right with probability one half.
        ema: decay of a moving average of the weights, which then is the result; 0 switches it off.
        device: where to train.
        checkpoint: folder for a checkpoint, made if missing; None keeps none. A finished run leaves its last one.
        checkpoint_every: steps between checkpoints.
        progress: told (steps done, steps in all).

    Raises:
        RecipeError: a setting is out of range.
        StageFailed: the loss or a weight becomes NaN or infinite, a mask doesn't fit, there are no samples, or the
            checkpoint belongs to another run.
        CorruptArtifact: the checkpoint's files are not what was written.
    """
    settings = _Settings(epochs, lr, batch, seed, temperature, hard_weight, weight_decay, flip, ema)
    _check_settings(settings, checkpoint_every)
    if epochs == 0:
        return TuneHistory((), (), 0, None)
    if not len(labels):
        raise StageFailed("There are no samples to tune on.")
    _check_masks(student, masks)
    homes = [next(network.parameters()).device for network in (student, teacher)]
    saver = _Saver(checkpoint, checkpoint_every, _identity(settings, student, masks, labels)) if checkpoint else None
    student.to(device), teacher.to(device)
    run = _Run(student, settings)
    resumed_at = saver.restore(run) if saver else None
    try:
        with torch.random.fork_rng():
            _train(run, teacher, masks, images, labels, settings, saver, progress)
        _finish(run, masks)
    finally:
        student.eval()
        student.to(homes[0]), teacher.to(homes[1])
    return TuneHistory(tuple(range(1, len(run.losses) + 1)), tuple(run.losses), epochs, resumed_at)


def _train(
    run: _Run,
    teacher: nn.Module,
    masks: Mapping[str, Tensor],
    images: Callable[[NDArray[np.int64]], Tensor],
    labels: NDArray[np.int64],
    settings: _Settings,
    saver: "_Saver | None",
    progress: Callable[[int, int], None],
) -> None:
    device = next(run.student.parameters()).device
    dropped = {f"{name}.weight": ~mask.to(device) for name, mask in masks.items()}
    parameters = dict(run.student.named_parameters())
    per_epoch, total = -(-len(labels) // settings.batch), settings.steps(len(labels))
    teacher.eval()
    run.student.train()
    for child in run.student.modules():
        if isinstance(child, _BatchNorm):
            child.eval()
    for step in range(len(run.losses), total):
        epoch, position = divmod(step, per_epoch)
        some, mirrored = _samples(len(labels), settings, epoch, position)
        batch = images(some).to(device)
        if settings.flip:
            turn = torch.from_numpy(mirrored).to(device)
            batch = torch.where(turn[:, None, None, None], batch.flip(-1), batch)
        torch.manual_seed(int(np.random.SeedSequence([settings.seed, step]).generate_state(1, np.uint64)[0] >> 1))
        rate = learning_rate(step, total, settings.lr)
        loss = _step(run, teacher, batch, torch.from_numpy(labels[some]).to(device), settings, rate)
        if not math.isfinite(loss):
            raise StageFailed(
                f"The distillation loss became {loss} at step {step + 1} of {total} (learning rate {rate:.3g}).",
                hint="lower the learning rate, or look for NaN in the weights and images.",
            )
        with torch.no_grad():
            for name, drop in dropped.items():
                parameters[name].masked_fill_(drop, 0.0)
            for name, value in run.average.items():
                value.lerp_(parameters[name], 1 - settings.ema)
        run.losses.append(loss)
        if saver and ((step + 1) % saver.every == 0 or step + 1 == total):
            saver.save(run)
        progress(step + 1, total)


def _step(run: _Run, teacher: nn.Module, batch: Tensor, labels: Tensor, settings: _Settings, rate: float) -> float:
    """One optimiser step; returns the loss before it, and takes no step if that is NaN or infinite."""
    with torch.no_grad():
        goal = teacher(batch)
    logits = run.student(batch)
    if int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]:
        raise StageFailed(f"A label lies outside the network's {logits.shape[1]} classes.")
    loss = distillation_loss(logits, goal, labels, temperature=settings.temperature, hard_weight=settings.hard_weight)
    value = float(loss.detach())
    if math.isfinite(value):
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        run.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        run.optimizer.step()
    return value


def _samples(count: int, settings: _Settings, epoch: int, position: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Sample indices of one batch and which of them to mirror: a function of seed, epoch and position alone."""
    generator = np.random.default_rng([settings.seed, epoch])
    order = generator.permutation(count).astype(np.int64)
    mirrored = generator.random(count) < 0.5
    part = slice(position * settings.batch, (position + 1) * settings.batch)
    return order[part], mirrored[part]


def _finish(run: _Run, masks: Mapping[str, Tensor]) -> None:
    """Put the moving average in place and check what will be handed on."""
    with torch.no_grad():
        for name, value in run.student.named_parameters():
            if name in run.average:
                value.copy_(run.average[name])
    for name, value in run.student.named_parameters():
        if not bool(torch.isfinite(value).all()):
            raise StageFailed(
                f"The parameter {name!r} is NaN or infinite after tuning.", hint="lower the learning rate."
            )
    _check_masks(run.student, masks)


def _check_masks(student: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Refuse masks that don't fit, and nonzero weights that a mask drops."""
    parameters = dict(student.named_parameters())
    for name, mask in masks.items():
        weight = parameters.get(f"{name}.weight")
        if weight is None or weight.shape != mask.shape or mask.dtype != torch.bool:
            found = "no such weight" if weight is None else f"a weight of shape {list(weight.shape)}"
            raise StageFailed(
                f"The mask of layer {name!r} ({mask.dtype}, {list(mask.shape)}) does not fit: the network has {found}."
            )
        bad = int(((weight != 0) & ~mask.to(weight.device)).sum())
        if bad:
            raise StageFailed(f"{bad} weights of layer {name!r} are not zero although its mask drops them.")


def _check_settings(settings: _Settings, checkpoint_every: int) -> None:
    """Refuse settings out of range; written so that NaN is out of range."""
    demands = {
        "epochs must be at least 0": settings.epochs >= 0,
        "lr must be a positive number": 0 < settings.lr < math.inf,
        "batch must be at least 1": settings.batch >= 1,
        "seed must be at least 0": settings.seed >= 0,
        "temperature must be a positive number": 0 < settings.temperature < math.inf,
        "hard_weight must lie in [0, 1]": 0 <= settings.hard_weight <= 1,
        "weight_decay must be a number of at least 0": 0 <= settings.weight_decay < math.inf,
        "ema must lie in [0, 1)": 0 <= settings.ema < 1,
        "checkpoint_every must be at least 1": checkpoint_every >= 1,
    }
    broken = [demand for demand, met in demands.items() if not met]
    if broken:
        raise RecipeError(f"Tuning can't start: {'; '.join(broken)}.")


def _identity(settings: _Settings, student: nn.Module, masks: Mapping[str, Tensor], labels: NDArray[np.int64]) -> str:
    """Hex SHA-256 of what a checkpoint must agree with: settings, starting weights, masks, labels, torch's version."""
    digest = hashlib.sha256(dumps({**asdict(settings), "torch": torch.__version__}).encode())
    for name, value in [*sorted(student.state_dict().items()), *sorted(masks.items())]:
        digest.update(name.encode() + value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    digest.update(np.ascontiguousarray(labels).tobytes())
    return digest.hexdigest()


class _Saver:
    """Checkpoints in one folder: tensors under a name of their own, then state.json, which makes them count.

    Args:
        folder: the folder, made when first written to.
        every: steps between checkpoints.
        identity: what the checkpoint must agree with.
    """

    def __init__(self, folder: Path, every: int, identity: str) -> None:
        self.folder = folder
        self.every = every
        self.identity = identity

    def save(self, run: _Run) -> None:
        """Write a checkpoint; a crash at any moment leaves the old one or the new one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = self.folder / f"step-{len(run.losses):08d}.safetensors"
        draft = tensors.with_suffix(".draft")
        save_file(run.tensors(), draft)
        sync(draft)
        draft.replace(tensors)
        state = {
            "schema": SCHEMA,
            "identity": self.identity,
            "losses": run.losses,
            "tensors": tensors.name,
            "sha256": sha256_of(tensors),
        }
        draft = self.folder / f"{STATE}.draft"
        draft.write_text(dumps(state), encoding="utf-8")
        sync(draft)
        draft.replace(self.folder / STATE)
        sync(self.folder)
        for old in self.folder.glob("step-*"):
            if old != tensors:
                old.unlink()

    def restore(self, run: _Run) -> int | None:
        """Bring a run to where the checkpoint left it; return the steps done, or None where there is no checkpoint."""
        if not (self.folder / STATE).exists():
            return None
        hint = f"delete the folder {self.folder} to tune from the start."
        try:
            state = read_json(self.folder / STATE)
            identity, losses, path = state["identity"], state["losses"], self.folder / state["tensors"]
            intact = sha256_of(path) == state["sha256"]
            tensors = load_file(path) if intact else {}
        except (OSError, KeyError, TypeError, SafetensorError) as error:
            raise CorruptArtifact(f"The checkpoint in {self.folder} can't be read: {error!r}.", hint) from error
        if not intact:
            raise CorruptArtifact(f"The checkpoint file {path} is not what was written (its SHA-256 differs).", hint)
        if identity != self.identity:
            raise StageFailed(f"The checkpoint in {self.folder} belongs to a run with other settings or weights.", hint)
        run.adopt(tensors, losses)
        return len(run.losses)
