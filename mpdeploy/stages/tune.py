"""tune: distillation from the dense network, its N:M pattern kept; if asked for, after a prune-restore cycle."""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mpdeploy import launch
from mpdeploy.artifact import Artifact, open_artifact, write_json
from mpdeploy.errors import Unavailable
from mpdeploy.recipe import Data, Table, Tune
from mpdeploy.stage import Facts, Given, Progress, Stage
from mpdeploy.stages.environment import needs, versions
from mpdeploy.stages.images import open_images
from mpdeploy.stages.prune import check_pattern, fold_orders, usable_device

if TYPE_CHECKING:
    import torch
    from torch import nn

    from mpdeploy.pruning.patterns import Pattern
    from mpdeploy.pruning.restore import Tensors
    from mpdeploy.tuning import TuneHistory


class Params(Table):
    """How to tune, and where the training images are."""

    tune: Tune
    data: Data


def asks(params: Params) -> Mapping[str, Any]:
    """The images are pinned by the source artefact; how many processes share the work is nobody's result."""
    return params.tune.model_dump(mode="json")


def run(params: Params, given: Given, out: Path) -> Facts:
    """Tune the pruned network, or say that the recipe asks for no epoch."""
    table = params.tune
    layers = given["prune"].json("layers.json")
    if table.epochs == 0:
        shutil.copyfile(given["prune"].path("pruned.safetensors"), out / "tuned.safetensors")
        write_json(out / "layers.json", layers)
        write_json(out / "tune.json", {"epochs": 0, "loss": []})
        return {"epochs": 0, "note": "the recipe asks for no epoch: the tuned weights are the pruned ones"}
    needs("tune", "torch", "timm", "safetensors")
    from safetensors.torch import save_file

    with launch.crew(_order(params, given)):
        state, history, facts = _tuned(params, given)
    save_file(state, out / "tuned.safetensors")
    write_json(out / "layers.json", [_as_tuned(layer, state) for layer in layers])
    write_json(
        out / "tune.json",
        {
            **facts,
            "blocks": history.blocks,
            "loss": [{"step": s, "loss": x} for s, x in zip(history.steps, history.losses, strict=True)],
            "refreshes": [{"step": s, "admitted": n} for s, n in history.refreshes],
        },
    )
    return {**facts, "last_loss": history.losses[-1]}


def _as_tuned(layer: Mapping[str, Any], state: "Tensors") -> dict[str, Any]:
    """Return a row of layers.json with the density that the layer has now; its errors stay those of pruning."""
    if not layer["pattern"]:
        return dict(layer)
    return {**layer, "density": float((state[f"{layer['name']}.weight"] != 0).double().mean())}


def obey(order: Mapping[str, Any]) -> None:
    """Do on another process what `run` does on the first, and keep nothing."""
    artifacts = {name: open_artifact(Path(root)) for name, root in order["artifacts"].items()}
    given = Given(artifacts, Path(order["workspace"]), lambda *_: None)
    _tuned(Params.model_validate_json(order["params"]), given)


def _order(params: Params, given: Given) -> dict[str, Any]:
    artifacts = {name: str(artifact.root) for name, artifact in given.artifacts.items()}
    return {"params": params.model_dump_json(), "artifacts": artifacts, "workspace": str(given.workspace)}


def _tuned(params: Params, given: Given) -> "tuple[dict[str, torch.Tensor], TuneHistory, dict[str, Any]]":
    """Return the tuned weights, what happened, and facts; the same on every process."""
    import torch
    from safetensors.torch import load_file

    from mpdeploy.models import rebuild
    from mpdeploy.pruning.layers import UNSTRUCTURED
    from mpdeploy.pruning.patterns import Pattern

    table = params.tune
    device = own_device(table.device)
    precision = usable_precision(table.precision, device)
    architecture = given["source"].json("model.json")
    dense = load_file(given["source"].path("dense.safetensors"))
    # The same function, but its features come in the student's order of channels.
    fold_orders(dense, given["prune"].json("orders.json"))
    teacher = rebuild(architecture, dense)
    pruned = load_file(given["prune"].path("pruned.safetensors"))
    student = rebuild(architecture, pruned)
    layers = given["prune"].json("layers.json")
    pruned_as = {layer["name"]: layer["pattern"] for layer in layers if layer["pattern"]}
    patterns = {name: Pattern.parse(pattern) for name, pattern in pruned_as.items() if pattern != UNSTRUCTURED}
    images = open_images(params.data, given["source"])
    train, usable = images.dataset.train, images.training()

    def batch(indices: NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(images.batch(train, usable[indices]))

    labels = np.asarray(train.labels)[usable]
    bench = _Bench(table, given, student, teacher, patterns, batch, labels, precision, device)
    masks = {name: pruned[f"{name}.weight"] != 0 for name in pruned_as}
    history, counts = _restored(bench, masks, dense, layers) if table.restore else (bench.distil(masks), {})
    state = {name: value.detach().cpu().contiguous() for name, value in student.state_dict().items()}
    facts = {
        "epochs": table.epochs,
        "images": len(usable),
        "precision": precision,
        "processes": launch.world(),
        **({"restored": counts} if counts else {}),
    }
    return state, history, facts


@dataclass(frozen=True)
class _Bench:
    """What both phases of tuning work with."""

    table: Tune
    given: Given
    student: "nn.Module"
    teacher: "nn.Module"
    patterns: "dict[str, Pattern]"
    images: "Callable[[NDArray[np.int64]], torch.Tensor]"
    labels: NDArray[np.int64]
    precision: str
    device: str

    def distil(self, masks: "Tensors") -> "TuneHistory":
        """Train all that the masks keep, for the recipe's epochs."""
        from mpdeploy.tuning import distil

        table = self.table
        return distil(
            self.student,
            self.teacher,
            masks,
            self.images,
            self.labels,
            epochs=table.epochs,
            weight_decay=table.weight_decay,
            ema=table.ema,
            refresh=table.refresh,
            patterns=self.patterns,
            checkpoint=self.given.workspace,
            progress=with_rate(self.given.progress, table.epochs * len(self.labels)),
            **self._alike(),
        )

    def grow(self, moving: "Tensors") -> tuple[float, ...]:
        """Train the entries that may come back, for the recipe's steps."""
        from mpdeploy.tuning import grow

        return grow(
            self.student,
            self.teacher,
            moving,
            self.images,
            self.labels,
            steps=self.table.restore_steps,
            checkpoint=self.given.workspace / "grown",
            progress=with_rate(self.given.progress, self.table.restore_steps * self.table.batch, "growing"),
            **self._alike(),
        )

    def _alike(self) -> dict[str, Any]:
        names = ("lr", "batch", "seed", "temperature", "hard_weight", "feature_weight", "flip")
        own = {name: getattr(self.table, name) for name in names}
        return {**own, "precision": self.precision, "device": self.device}

    def weights(self) -> "dict[str, torch.Tensor]":
        """Return copies of the pruned layers' weights."""
        return {name: self.student.get_parameter(f"{name}.weight").detach().clone() for name in self.patterns}

    def put(self, weights: "Tensors") -> None:
        """Give the pruned layers these weights."""
        for name, weight in weights.items():
            self.student.get_parameter(f"{name}.weight").data.copy_(weight)


def _restored(
    bench: _Bench, masks: "Tensors", dense: "Tensors", layers: Sequence[Mapping[str, Any]]
) -> "tuple[TuneHistory, dict[str, Any]]":
    """Fill free slots from the dense weights, then over-prune, grow, restore and tune.

    Returns:
        What tuning did; and how many weights were refilled, dropped, came back or gave way to others, with the loss
        before the first and the last step of growing.
    """
    from mpdeploy.pruning.restore import refill, restore

    patterns, histories = bench.patterns, []
    losses: list[float] = []
    full = {
        name: refill(weight, dense[f"{name}.weight"], masks[name], patterns[name])
        for name, weight in bench.weights().items()
    }
    slots = {name: mask for name, (_, mask) in full.items()}

    def grow(start: "Tensors", may_move: "Tensors") -> "Tensors":
        bench.put(start)
        losses.extend(bench.grow(may_move))
        return bench.weights()

    def tune(start: "Tensors", may_move: "Tensors") -> "Tensors":
        bench.put(start)
        histories.append(bench.distil(may_move))
        return bench.weights()

    done = restore(
        {name: weight for name, (weight, _) in full.items()},
        slots,
        grow,
        tune,
        share=bench.table.restore,
        patterns=patterns,
        layer_weights=layer_weights(layers, masks),
    )
    return histories[0], {
        "refilled": sum(int((slots[name] & ~mask).sum()) for name, mask in masks.items()),
        "dropped": done.dropped,
        "returned": done.returned,
        "swapped": done.swapped,
        "growing_loss": [losses[0], losses[-1]],
    }


def layer_weights(layers: Sequence[Mapping[str, Any]], masks: "Tensors") -> dict[str, float]:
    """Return w_l of the pruned layers from the edges of their dense spectra: a larger edge puts more weights at stake.

    The edge itself is used at every sparsity, as for mixed patterns, whatever signal the source's table prefers there.

    Args:
        layers: rows of the prune stage's layers.json.
        masks: by layer, true where a weight is kept.
    """
    from mpdeploy.pruning.spectrum import Spectrum
    from mpdeploy.pruning.unstructured import seb_weights

    # The edge needs neither the eigenvalues nor the signals.
    none = np.empty(0)
    spectra = {
        row["name"]: Spectrum(**row["spectrum"], eigenvalues=none, signals=none)
        for row in layers
        if row["name"] in masks
    }
    dropped, total = sum(int((~mask).sum()) for mask in masks.values()), sum(mask.numel() for mask in masks.values())
    return seb_weights(spectra, dropped / total, signal="edge")


def own_device(name: str) -> str:
    """Return the device of this process: of several GPUs the one with its local number.

    Raises:
        Unavailable: there is no GPU for it.
    """
    import torch

    if usable_device(name) == "cpu":
        return name
    own, there = launch.local_rank(), torch.cuda.device_count()
    if own >= there:
        raise Unavailable(
            f"Process {own} of this machine has no GPU of its own: there are {there}.",
            hint=f"start torchrun with --nproc-per-node {there}.",
        )
    torch.cuda.set_device(own)
    return f"cuda:{own}"


def usable_precision(name: str, device: str) -> str:
    """Return "fp32" or "bf16"; "auto" is bf16 on a GPU that computes in it, else fp32.

    Raises:
        Unavailable: bf16 is asked for and the GPU only emulates it.
    """
    import torch

    native = device != "cpu" and torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "auto":
        return "bf16" if native else "fp32"
    if name == "bf16" and device != "cpu" and not native:
        raise Unavailable(
            f'The recipe asks for tune.precision = "bf16", which {torch.cuda.get_device_name()} has no units for.',
            hint='use "auto" or "fp32".',
        )
    return name


def with_rate(report: Progress, images: int, doing: str = "tuning") -> Callable[[int, int], None]:
    """Return a progress function for steps that also says how fast images go by and how long it will take.

    Args:
        report: told the label, steps done, steps in all.
        images: in all steps together.
        doing: the label's first word.
    """
    start: tuple[float, int] | None = None

    def progress(done: int, total: int) -> None:
        nonlocal start
        now = time.monotonic()
        if start is None:
            # A resumed run starts anywhere, and the first step pays for warming up.
            start = (now, done)
            report(doing, done, total)
            return
        pace = (done - start[1]) / max(now - start[0], 1e-9)
        minutes, seconds = divmod(round((total - done) / pace), 60)
        report(f"{doing}, {pace * images / total:.0f} images/s, {minutes}:{seconds:02d} left", done, total)

    return progress


def ensures(made: Artifact) -> None:
    """The pattern survived training, in the bytes on disk."""
    check_pattern(made, "tuned.safetensors", made.json("layers.json"))


STAGE = Stage(
    name="tune",
    summary="distil from the dense network, the N:M pattern kept",
    takes=("source", "prune"),
    params=lambda recipe: Params(tune=recipe.tune, data=recipe.data),
    asks=asks,
    environment=lambda _: versions("torch", "numpy"),
    run=run,
    ensures=ensures,
)
