"""Building the `nn.Module` that a source names, with the weights its own library provides."""

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import timm
import torch
import torchvision
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from torch import nn
from torch.nn.parameter import is_lazy

from mpdeploy.errors import MpdeployError, RecipeError, Unavailable

Args = Mapping[str, Any]
REMOTE = ("local-dir:", "hf-hub:", "hf_hub:", "native-local-dir:", "native-hf-hub:")
# What timm, huggingface_hub, httpx and urllib raise without a network or a cached file. httpx has its own tree.
HUB_ERRORS: tuple[type[Exception], ...] = (OSError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled)
try:
    import httpx  # type: ignore[import-not-found,unused-ignore]
except ImportError:  # older huggingface_hub uses requests, whose errors are OSErrors
    pass
else:
    HUB_ERRORS = (*HUB_ERRORS, httpx.HTTPError)
# What a constructor raises on arguments that it does not understand.
ARGUMENT_ERRORS = (TypeError, ValueError, KeyError, AttributeError, AssertionError, RuntimeError, IndexError)


def construct(kind: str, model: str, args: Args, *, pretrained: bool, seed: int = 0) -> nn.Module:
    """Build a network; random weights come from `seed` and leave the global generator as it was.

    Raises:
        RecipeError: there is no such network, or it refuses the arguments.
        Unavailable: its weights are not on this machine and can't be fetched.
    """
    builder = {"timm": _timm, "torchvision": _torchvision, "python": _python}[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = builder(model, dict(args), pretrained)
    if not isinstance(module, nn.Module):
        raise RecipeError(f"source.model: {model} returned {type(module).__name__}; expected a torch.nn.Module.")
    if lazy := [name for name, tensor in module.named_parameters() if is_lazy(tensor)]:
        raise RecipeError(
            f"source.model: {model} has lazy layers whose shapes are not decided yet ({lazy[0]}).",
            hint="Run one image through it before it is returned, or state the shapes.",
        )
    return module


def check_name(kind: str, model: str) -> None:
    """Refuse a network that its library does not know.

    Raises:
        RecipeError: there is none of this name; the nearest names are given.
        Unavailable: a Python entry point's module needs another one that is not installed.
    """
    if kind == "python":
        entry_point(model)
        return
    # Of torchvision only the classifiers: its detectors and segmenters lie in submodules.
    names = timm.list_models() if kind == "timm" else torchvision.models.list_models(module=torchvision.models)
    known = model.startswith(REMOTE) or timm.is_model(model) if kind == "timm" else model in names
    if not known:
        raise RecipeError(f"source.model: {kind} has no classifier {model!r}.{_nearest(model, names)}")


def takes_pretrained(model: str) -> bool:
    """Say whether a Python entry point has a parameter `pretrained`, as timm's and torchvision's do."""
    return "pretrained" in inspect.signature(entry_point(model)).parameters


def entry_point(model: str) -> Callable[..., Any]:
    """Import "package.module:function".

    Raises:
        RecipeError: there is no such module or function.
        Unavailable: the module needs another one that is not installed.
    """
    name, _, attribute = model.partition(":")
    if not name or not attribute:
        raise RecipeError(f"source.model: {model!r} is not package.module:function.")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            hint = "Install it, or set PYTHONPATH to the folder that holds it."
            raise RecipeError(f"source.model: there is no Python module {error.name}.", hint=hint) from error
        raise Unavailable(f"{name} needs the module {error.name}, which is not installed.") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        functions = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise RecipeError(f"source.model: {name} has no function {attribute!r}.{_nearest(attribute, functions)}")
    return function  # type: ignore[no-any-return]


def _timm(model: str, args: dict[str, Any], pretrained: bool) -> nn.Module:
    check_name("timm", model)
    try:
        return timm.create_model(model, pretrained=pretrained, **args)  # type: ignore[no-any-return]
    except HUB_ERRORS as error:
        raise _no_weights(model, error) from error
    except ARGUMENT_ERRORS as error:
        raise _refused(model, args, error) from error


def _torchvision(model: str, args: dict[str, Any], pretrained: bool) -> nn.Module:
    check_name("torchvision", model)
    try:
        return torchvision.models.get_model(model, weights="DEFAULT" if pretrained else None, **args)  # type: ignore[no-any-return]
    except HUB_ERRORS as error:
        raise _no_weights(model, error) from error
    except ARGUMENT_ERRORS as error:
        raise _refused(model, args, error) from error


def _python(model: str, args: dict[str, Any], pretrained: bool) -> Any:
    function = entry_point(model)
    if takes_pretrained(model):
        args = {**args, "pretrained": pretrained}
    try:
        return function(**args)
    except MpdeployError:
        raise
    except Exception as error:  # the user's own code may raise anything
        raise _refused(model, args, error) from error


def _refused(model: str, args: Args, error: Exception) -> RecipeError:
    shown = ", ".join(f"{key} = {value!r}" for key, value in args.items()) or "no args"
    return RecipeError(f"source: {model} can't be built with {shown}: {type(error).__name__}: {error}")


def _no_weights(model: str, error: Exception) -> Unavailable:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return Unavailable(
        f"The pretrained weights of {model} are not on this machine and the hub can't be reached ({first}).",
        hint="Download them on a machine with a network and name the .safetensors or .pth file in source.weights, "
        "or copy its Hugging Face cache here and set HF_HOME; a folder works as model = 'local-dir:/folder'.",
    )


def _nearest(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, 3, 0.5)
    return f" Nearest: {', '.join(near)}." if near else ""
