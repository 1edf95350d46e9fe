"""source: the dense network, its preprocessing and the draws of calibration and certification images."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpdeploy.artifact import Artifact, sha256_of, write_json
from mpdeploy.data import content_digest, draw, open_dataset
from mpdeploy.errors import RecipeError, StageFailed
from mpdeploy.recipe import Data, Source, Table
from mpdeploy.stage import Facts, Given, Stage
from mpdeploy.stages.environment import needs, versions


class Params(Table):
    """Which network, which images."""

    source: Source
    data: Data


def asks(params: Params) -> Mapping[str, Any]:
    """Name files by their content, so that a moved folder is still the same work."""
    source, data = params.source.model_dump(mode="json"), params.data.model_dump(mode="json", exclude={"path"})
    source["weights"] = _content(params.source.weights)
    source["args"] = {key: _content(value) for key, value in params.source.args.items()}
    return {"source": source, "data": {**data, "identity": open_dataset(params.data).identity()}}


def environment(params: Params) -> Mapping[str, str]:
    """Versions of what builds the network, and what a Python entry point is made of."""
    from mpdeploy.models import identity

    return {**versions("torch", "timm", "torchvision"), **identity(params.source)}


def _content(value: Any) -> Any:
    """Return "sha256:..." for the path of a file that exists, anything else as it is."""
    if isinstance(value, str) and Path(value).is_absolute() and Path(value).is_file():
        return f"sha256:{sha256_of(Path(value))}"
    return value


def run(params: Params, given: Given, out: Path) -> Facts:
    """Load the network, pin its weights, and draw the images that later stages may see."""
    needs("source", "torch", "timm", "safetensors")
    from safetensors.torch import save_file

    from mpdeploy.models import load

    given.progress("loading the network", 0, 2)
    loaded = load(params.source)
    dataset = open_dataset(params.data)
    highest = max(int(dataset.train.labels.max()), int(dataset.val.labels.max()))
    classes = int(loaded.architecture["num_classes"])
    if highest >= classes:
        raise RecipeError(
            f"The data set {dataset.name} has label {highest}, but {params.source.model} has only {classes} outputs.",
            hint="set num_classes in source.args, or use the data that the network was trained for.",
        )
    given.progress("drawing images", 1, 2)
    train = dataset.train
    calibration = draw(train, params.data.calibration, params.data.seed)
    certification = draw(train, params.data.certification, params.data.seed + 1, exclude=set(calibration.tolist()))
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in loaded.module.state_dict().items()},
        out / "dense.safetensors",
    )
    write_json(out / "model.json", loaded.architecture)
    write_json(out / "preprocessing.json", loaded.preprocessing.to_json())
    write_json(out / "classes.json", list(dataset.classes))
    write_json(
        out / "calibration.json",
        {
            "data": dataset.name,
            "data_identity": dataset.identity(),
            "split": "train",
            "seed": params.data.seed,
            "calibration_indices": calibration.tolist(),
            "calibration_ids": [train.ids[i] for i in calibration],
            "calibration_content": content_digest(train, calibration),
            "certification_indices": certification.tolist(),
            "certification_ids": [train.ids[i] for i in certification],
            "certification_content": content_digest(train, certification),
        },
    )
    given.progress("drawing images", 2, 2)
    return {**loaded.facts, "parameters": sum(p.numel() for p in loaded.module.parameters()), "data": dataset.name}


def ensures(made: Artifact) -> None:
    """The network can be rebuilt from the files alone, its weights are finite, and no image is in both draws."""
    import torch
    from safetensors.torch import load_file

    from mpdeploy.models import rebuild

    state = load_file(made.path("dense.safetensors"))
    broken = [name for name, tensor in state.items() if not bool(torch.isfinite(tensor.float()).all())]
    if broken:
        raise StageFailed(f"The weights {', '.join(broken[:5])} hold NaN or infinity.")
    rebuild(made.json("model.json"), state)
    record = made.json("calibration.json")
    if set(record["calibration_ids"]) & set(record["certification_ids"]):
        raise StageFailed("An image is in the calibration and in the certification draw.")


STAGE = Stage(
    name="source",
    summary="load the dense network, pin its weights, draw calibration and certification images",
    takes=(),
    params=lambda recipe: Params(source=recipe.source, data=recipe.data),
    asks=asks,
    environment=environment,
    run=run,
    ensures=ensures,
)
