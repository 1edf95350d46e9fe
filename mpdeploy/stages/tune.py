"""tune: distillation from the dense network with the mask frozen."""

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpdeploy.artifact import Artifact, write_json
from mpdeploy.recipe import Data, Table, Tune
from mpdeploy.stage import Facts, Given, Stage
from mpdeploy.stages.environment import needs, versions
from mpdeploy.stages.images import open_images
from mpdeploy.stages.prune import check_pattern, usable_device


class Params(Table):
    """How to tune, and where the training images are."""

    tune: Tune
    data: Data


def asks(params: Params) -> Mapping[str, Any]:
    """The images are pinned by the source artefact."""
    return params.tune.model_dump(mode="json")


def run(params: Params, given: Given, out: Path) -> Facts:
    """Tune the pruned network, or say that the recipe asks for no epoch."""
    table = params.tune
    layers = given["prune"].json("layers.json")
    write_json(out / "layers.json", layers)
    if table.epochs == 0:
        shutil.copyfile(given["prune"].path("pruned.safetensors"), out / "tuned.safetensors")
        write_json(out / "tune.json", {"epochs": 0, "loss": []})
        return {"epochs": 0, "note": "the recipe asks for no epoch: the tuned weights are the pruned ones"}
    needs("tune", "torch", "timm", "safetensors")
    import torch
    from safetensors.torch import load_file, save_file

    from mpdeploy.models import rebuild
    from mpdeploy.tuning import distil

    device = usable_device(table.device)
    architecture = given["source"].json("model.json")
    teacher = rebuild(architecture, load_file(given["source"].path("dense.safetensors")))
    pruned = load_file(given["prune"].path("pruned.safetensors"))
    student = rebuild(architecture, pruned)
    images = open_images(params.data, given["source"])
    train, usable = images.dataset.train, images.training()

    def batch(indices: NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(images.batch(train, usable[indices]))

    history = distil(
        student,
        teacher,
        {layer["name"]: pruned[f"{layer['name']}.weight"] != 0 for layer in layers if layer["pattern"]},
        batch,
        np.asarray(train.labels)[usable],
        epochs=table.epochs,
        lr=table.lr,
        batch=table.batch,
        seed=table.seed,
        temperature=table.temperature,
        hard_weight=table.hard_weight,
        weight_decay=table.weight_decay,
        ema=table.ema,
        flip=table.flip,
        device=device,
        checkpoint=given.workspace,
        progress=lambda done, total: given.progress("tuning", done, total),
    )
    save_file({k: v.detach().cpu().contiguous() for k, v in student.state_dict().items()}, out / "tuned.safetensors")
    write_json(
        out / "tune.json",
        {
            "epochs": table.epochs,
            "images": len(usable),
            "loss": [{"step": s, "loss": x} for s, x in zip(history.steps, history.losses, strict=True)],
        },
    )
    record = asdict(history)
    return {"epochs": table.epochs, "images": len(usable), "last_loss": record["losses"][-1]}


def ensures(made: Artifact) -> None:
    """The pattern survived training, in the bytes on disk."""
    check_pattern(made, "tuned.safetensors", made.json("layers.json"))


STAGE = Stage(
    name="tune",
    summary="distil from the dense network with the mask frozen",
    takes=("source", "prune"),
    params=lambda recipe: Params(tune=recipe.tune, data=recipe.data),
    asks=asks,
    environment=lambda _: versions("torch", "numpy"),
    run=run,
    ensures=ensures,
)
