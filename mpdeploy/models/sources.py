"""From the recipe's table `source` to a checked network with its preprocessing; and back from a bundle."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torchvision
from timm.data import resolve_data_config
from torch import Tensor, nn

from mpdeploy.errors import CorruptArtifact, RecipeError
from mpdeploy.models.checkpoints import check_finite, fill, read_state
from mpdeploy.models.construct import ARGUMENT_ERRORS, construct, takes_pretrained
from mpdeploy.preprocessing import Preprocessing

if TYPE_CHECKING:
    from mpdeploy.recipe import PreprocessingTable, Source

PROBE = 2  # images in the forward pass that reads the number of classes: with 1, a lost batch axis goes unseen


@dataclass
class Loaded:
    """A network and what belongs to it.

    Args:
        module: In eval mode, float32.
        preprocessing: From image to input.
        architecture: JSON from which `rebuild` makes the module again: kind, model, args, num_classes, input_size,
            versions.
        facts: JSON about this load: weights, parameters, what of a checkpoint did not fit.
    """

    module: nn.Module
    preprocessing: Preprocessing
    architecture: dict[str, Any]
    facts: dict[str, Any]


def load(source: "Source") -> Loaded:
    """Build the network with its weights, and check it.

    Raises:
        RecipeError: an unknown name, wrong arguments, a checkpoint that does not fit, weights that are not finite, no
            preprocessing, or an output that is not logits [n, K].
        Unavailable: pretrained weights are not on this machine and can't be fetched.
    """
    module = construct(
        source.kind, source.model, source.args, pretrained=source.weights == "pretrained", seed=source.seed
    ).float()
    facts: dict[str, Any] = {"weights": source.weights}
    if source.weights not in ("pretrained", "random"):
        path = Path(source.weights)
        facts["weights"] = path.name
        facts["checkpoint"] = fill(module, read_state(path), strict=source.strict, what=f"source.weights: {path}")
    check_finite(module)
    return _loaded(source, module, facts)


def describe(source: "Source") -> Loaded:
    """Build the network on the meta device: shapes only, no weights read.

    A Python entry point without a parameter `pretrained` is called as it is and moved to meta afterwards.
    """
    if source.kind == "python" and not takes_pretrained(source.model):
        module = construct(source.kind, source.model, source.args, pretrained=False).to("meta")
    else:
        with torch.device("meta"):
            module = construct(source.kind, source.model, source.args, pretrained=False)
    return _loaded(source, module.float(), {"weights": "not read"})


def rebuild(architecture: Mapping[str, Any], state: Mapping[str, Tensor]) -> nn.Module:
    """Make a network again from what a bundle holds.

    Args:
        architecture: `Loaded.architecture`.
        state: The full state dict.

    Returns:
        The module in eval mode, with the same logits as the one whose state this is.

    Raises:
        CorruptArtifact: a key of the architecture is missing.
        RecipeError: the state does not fit.
    """
    try:
        kind, model, args = (architecture[key] for key in ("kind", "model", "args"))
    except KeyError as error:
        raise CorruptArtifact(f"The architecture lacks {error}; expected kind, model and args.") from error
    module = construct(kind, model, args, pretrained=False).float()
    fill(module, state, strict=True, what=f"The state of {model}")
    return module.eval()


def _loaded(source: "Source", module: nn.Module, facts: dict[str, Any]) -> Loaded:
    module.eval()
    preprocessing = preprocessing_of(module, source)
    architecture = {
        "kind": source.kind,
        "model": source.model,
        "args": _portable_args(source),
        "num_classes": _count_classes(module, preprocessing.input_size, source.model),
        "input_size": list(preprocessing.input_size),
        "versions": {name: version(name) for name in ("torch", "timm", "torchvision")},
    }
    return Loaded(module, preprocessing, architecture, facts | {"parameters": _parameters(module)})


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _portable_args(source: "Source") -> dict[str, Any]:
    """Shorten paths to file names where `rebuild` never opens them, so that no machine's folder is stored."""
    args = dict(source.args)
    if source.kind == "python" and takes_pretrained(source.model):
        for key, value in args.items():
            if isinstance(value, str) and Path(value).is_absolute():
                args[key] = Path(value).name
    return args


def _count_classes(module: nn.Module, input_size: tuple[int, int, int], name: str) -> int:
    """Return K of the logits [n, K] that the network gives for images of `input_size`."""
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    try:
        with torch.no_grad():
            logits = module(torch.zeros(PROBE, *input_size, device=device))
    except ARGUMENT_ERRORS as error:
        raise RecipeError(
            f"source: {name} fails on images of {'x'.join(map(str, input_size))}: {type(error).__name__}: {error}",
            hint="args (img_size, in_chans) and preprocessing.input_size must agree.",
        ) from error
    if getattr(module, "num_classes", None) == 0:
        raise RecipeError(
            f"source: {name} has no classifier, it returns features.",
            hint="Choose a network with one, or set num_classes.",
        )
    expected = f"expected logits [{PROBE}, classes] for {PROBE} images, with at least 2 classes"
    if not isinstance(logits, Tensor):
        raise RecipeError(f"source: {name} returned a {type(logits).__name__}; {expected}.")
    shape = tuple(logits.shape)
    if not logits.is_floating_point() or len(shape) != 2 or shape[0] != PROBE or shape[1] < 2:
        raise RecipeError(f"source: {name} returned {logits.dtype} {list(shape)}; {expected}.")
    return shape[1]


def preprocessing_of(module: nn.Module, source: "Source") -> Preprocessing:
    """Return the network's own preprocessing, overridden by the recipe's table.

    Raises:
        RecipeError: neither states a field, or the fields do not agree.
    """
    table = source.preprocessing
    if source.kind == "torchvision":
        own = _torchvision_config(source.model)
    elif getattr(module, "pretrained_cfg", None):
        own = _timm_config(module, source.args)
    else:
        own = {}
    fields = own | _stated(table)
    if missing := [
        n for n in ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode") if n not in fields
    ]:
        raise RecipeError(
            f"source.preprocessing: {source.model} does not say how images are prepared; {', '.join(missing)} missing.",
            hint="State them in [source.preprocessing].",
        )
    channels = fields["input_size"][0]
    fields.setdefault("color", "gray" if channels == 1 else "rgb")
    for name in ("mean", "std"):
        if channels == 1 and len(fields[name]) == 3 and name in own and name not in _stated(table):
            # The constants belong to RGB; a gray image has one channel, which takes their mean.
            fields[name] = (sum(fields[name]) / 3,)
    return Preprocessing(**fields)


def _stated(table: "PreprocessingTable | None") -> dict[str, Any]:
    return {name: value for name, value in table.model_dump().items() if value is not None} if table else {}


def _timm_config(module: nn.Module, args: Mapping[str, Any]) -> dict[str, Any]:
    """Read timm's data config; `in_chans` and `img_size` are the constructor's, which the config does not follow."""
    config = resolve_data_config(pretrained_cfg=module.pretrained_cfg)
    channels, height, width = config["input_size"]
    channels = args.get("in_chans", channels)
    if (size := args.get("img_size")) is not None:
        height, width = (size, size) if isinstance(size, int) else size
    return {
        "input_size": (channels, height, width),
        "mean": tuple(float(m) for m in config["mean"]),
        "std": tuple(float(s) for s in config["std"]),
        "interpolation": config["interpolation"],
        "crop_pct": float(config["crop_pct"]),
        "crop_mode": config["crop_mode"],
    }


def _torchvision_config(model: str) -> dict[str, Any]:
    """Read the preset of the network's default weights: it is metadata, nothing is fetched."""
    preset = torchvision.models.get_model_weights(model).DEFAULT.transforms()
    if not hasattr(preset, "crop_size") or not hasattr(preset, "resize_size"):
        raise RecipeError(f"source.model: torchvision's {model} is not an image classifier.")
    crop, resize = int(preset.crop_size[0]), int(preset.resize_size[0])
    share = crop / resize
    while math.floor(crop / share) < resize:  # rounding must not lose a pixel of the resized edge
        share = math.nextafter(share, 0.0)
    return {
        "input_size": (3, crop, crop),
        "mean": tuple(float(m) for m in preset.mean),
        "std": tuple(float(s) for s in preset.std),
        "interpolation": preset.interpolation.value,
        "crop_pct": share,
        "crop_mode": "center",
    }
