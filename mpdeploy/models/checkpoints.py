"""Reading weights from a local file and putting them into a network, without running code from the file."""

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mpdeploy.errors import RecipeError

PICKLED = (".pth", ".pt", ".bin")
# Where training scripts put the state dict; averaged weights first, since they are what gets evaluated (as in timm).
WRAPPERS = ("state_dict_ema", "state_dict", "model")
PREFIXES = ("module.", "_orig_mod.")
SHOWN = 10


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a state dict; floating-point tensors become float32.

    Args:
        path: .safetensors, or .pth, .pt, .bin read with `weights_only`: plain, or under "state_dict_ema",
            "state_dict" or "model"; the prefixes of DataParallel ("module.") and compile ("_orig_mod.") are stripped.

    Raises:
        RecipeError: the file is missing, damaged, holds code, or is no state dict.
    """
    if not path.is_file():
        raise RecipeError(f"source.weights: {path} is not a file.", hint='Or write "pretrained" or "random".')
    if path.suffix == ".safetensors":
        tree: Any = _read_safetensors(path)
    elif path.suffix in PICKLED:
        tree = _read_pickle(path)
    else:
        raise RecipeError(f"source.weights: {path} ends in none of .safetensors, {', '.join(PICKLED)}.")
    for key in WRAPPERS:
        if isinstance(tree, Mapping) and isinstance(tree.get(key), Mapping):
            tree = tree[key]
    if not isinstance(tree, Mapping) or not tree:
        raise RecipeError(f"source.weights: {path} holds {_what(tree)}; expected a state dict of named tensors.")
    if odd := [str(key) for key, value in tree.items() if not (isinstance(key, str) and isinstance(value, Tensor))]:
        raise RecipeError(f"source.weights: {path} is no state dict: {_listed(odd)} hold no tensor.")
    state = dict(tree)
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise RecipeError(f"source.weights: {path} can't be read as safetensors: {error}.") from error


def _read_pickle(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, LookupError, AttributeError) as error:
        raise RecipeError(
            f"source.weights: {path} is damaged, or holds more than tensors, which is never unpickled: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}",
            hint="Where the file is yours, save model.state_dict() alone, best as .safetensors.",
        ) from error


def fill(module: nn.Module, state: Mapping[str, Tensor], *, strict: bool, what: str) -> dict[str, Any]:
    """Copy a state dict into a network.

    Args:
        module: Changed in place.
        state: Named tensors.
        strict: Refuse any difference; otherwise load what fits and say what did not.
        what: The state's name in errors.

    Returns:
        JSON: "loaded" (count) and the names under "missing", "unexpected" and "wrong_shape".

    Raises:
        RecipeError: a difference (strict), or nothing fits at all.
    """
    own = module.state_dict()
    # A counter that old checkpoints lack and that inference never reads; it keeps its value of 0.
    missing = sorted(key for key in own.keys() - state.keys() if not key.endswith("num_batches_tracked"))
    unexpected = sorted(state.keys() - own.keys())
    wrong = sorted(key for key in own.keys() & state.keys() if own[key].shape != state[key].shape)
    shapes = [f"{key} {list(state[key].shape)} for {list(own[key].shape)}" for key in wrong]
    fits = {key: state[key] for key in own.keys() & state.keys() if key not in set(wrong)}
    if not fits or (strict and (missing or unexpected or wrong)):
        parts = [
            f"{len(names)} {label}: {_listed(names)}"
            for label, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
            if names
        ]
        raise RecipeError(
            f"{what} does not fit the network; {'; '.join(parts)}.",
            hint="A wrong model name or num_classes is the usual cause; strict = false loads only what fits.",
        )
    module.load_state_dict(fits, strict=False)
    return {"loaded": len(fits), "missing": missing, "unexpected": unexpected, "wrong_shape": shapes}


def check_finite(module: nn.Module) -> None:
    """Refuse NaN and infinity.

    Raises:
        RecipeError: a tensor of the state dict holds one; it is named.
    """
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise RecipeError(f"source.weights: {name} holds {bad} values that are NaN or infinite.")


def _what(tree: object) -> str:
    return f"an empty {type(tree).__name__}" if isinstance(tree, Mapping) else f"a {type(tree).__name__}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
