"""tune: distillation from the dense network, its N:M pattern kept."""

import shutil
import time
from collections.abc import Callable, Mapping
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
    write_json(out / "layers.json", given["prune"].json("layers.json"))
    if table.epochs == 0:
        shutil.copyfile(given["prune"].path("pruned.safetensors"), out / "tuned.safetensors")
        write_json(out / "tune.json", {"epochs": 0, "loss": []})
        return {"epochs": 0, "note": "the recipe asks for no epoch: the tuned weights are the pruned ones"}
    needs("tune", "torch", "timm", "safetensors")
    from safetensors.torch import save_file

    with launch.crew(_order(params, given)):
        state, history, facts = _tuned(params, given)
    save_file(state, out / "tuned.safetensors")
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
    from mpdeploy.tuning import distil

    table = params.tune
    device = own_device(table.device)
    precision = usable_precision(table.precision, device)
    architecture = given["source"].json("model.json")
    dense = load_file(given["source"].path("dense.safetensors"))
    # The same function, but its features come in the student's order of channels.
    fold_orders(dense, given["prune"])
    teacher = rebuild(architecture, dense)
    pruned = load_file(given["prune"].path("pruned.safetensors"))
    student = rebuild(architecture, pruned)
    pruned_as = {layer["name"]: layer["pattern"] for layer in given["prune"].json("layers.json") if layer["pattern"]}
    patterns = {name: Pattern.parse(pattern) for name, pattern in pruned_as.items() if pattern != UNSTRUCTURED}
    images = open_images(params.data, given["source"])
    train, usable = images.dataset.train, images.training()

    def batch(indices: NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(images.batch(train, usable[indices]))

    history = distil(
        student,
        teacher,
        {name: pruned[f"{name}.weight"] != 0 for name in pruned_as},
        batch,
        np.asarray(train.labels)[usable],
        epochs=table.epochs,
        lr=table.lr,
        batch=table.batch,
        seed=table.seed,
        temperature=table.temperature,
        hard_weight=table.hard_weight,
        feature_weight=table.feature_weight,
        weight_decay=table.weight_decay,
        ema=table.ema,
        flip=table.flip,
        refresh=table.refresh,
        patterns=patterns,
        precision=precision,
        device=device,
        checkpoint=given.workspace,
        progress=with_rate(given.progress, table.epochs * len(usable)),
    )
    state = {name: value.detach().cpu().contiguous() for name, value in student.state_dict().items()}
    facts = {
        "epochs": table.epochs,
        "images": len(usable),
        "precision": precision,
        "processes": launch.world(),
    }
    return state, history, facts


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


def with_rate(report: Progress, images: int) -> Callable[[int, int], None]:
    """Return a progress function for steps that also says how fast images go by and how long it will take.

    Args:
        report: told the label, steps done, steps in all.
        images: in all steps together.
    """
    start: tuple[float, int] | None = None

    def progress(done: int, total: int) -> None:
        nonlocal start
        now = time.monotonic()
        if start is None:
            # A resumed run starts anywhere, and the first step pays for warming up.
            start = (now, done)
            report("tuning", done, total)
            return
        pace = (done - start[1]) / max(now - start[0], 1e-9)
        minutes, seconds = divmod(round((total - done) / pace), 60)
        report(f"tuning, {pace * images / total:.0f} images/s, {minutes}:{seconds:02d} left", done, total)

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
