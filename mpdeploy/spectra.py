"""From a network or a file of weights to the fitted spectrum of each matrix in it, and a plain word for each."""

import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpdeploy.artifact import MANIFEST, check_files, read_json
from mpdeploy.bundle import check_is_bundle
from mpdeploy.errors import RecipeError, StageFailed, reworded
from mpdeploy.init import kind_and_name
from mpdeploy.pruning.spectrum import (
    DOUBTS,
    KS_FEWEST,
    KS_OFF,
    Estimate,
    Opinions,
    Spectrum,
    check_levels,
    fit,
    opinions,
)
from mpdeploy.recipe import Source, load_recipe
from mpdeploy.stages.environment import needs

if TYPE_CHECKING:
    from torch import Tensor, nn

STATE_DICTS = (".safetensors", ".pth", ".pt", ".bin")
BUNDLED = ("dense", "pruned", "tuned")

# The rules behind the plain words, first match first; they are printed beside every table.
FEWEST, HEAVY, OFF, ABOVE = KS_FEWEST, 0.05, KS_OFF, 1.05
RULES = (
    ("too few to judge", f"fewer than {FEWEST} eigenvalues"),
    ("heavy tail", f"more than {100 * HEAVY:g} % of the eigenvalues are above the edge"),
    ("off the law", f"KS above {OFF:g}: the central eigenvalues don't follow the law"),
    ("bulk + spikes", f"the law fits, and an eigenvalue is above {ABOVE:g} times the edge"),
    ("bulk-like", "the law fits, and nothing stands out: as far as the spectrum tells, noise"),
)

# What a doubt means, and what the numbers are not; both are printed beside every table.
DOUBT = (
    "A doubt says that the matrix is not noise of one scale plus a few spikes: its rows, columns or blocks differ in "
    "scale, its entries are correlated, or its spikes are so many that the estimators share them out differently. "
    "Sigma, edges and ranks then depend on the estimator, by as much as the columns differ."
)
SIGNAL = (
    "On trained weights the edge and every budget made of it are a signal, a diagnostic, and never a probability: the "
    "entries were fitted together, and the level of an edge holds for independent noise only."
)

# What the library calls the recipe's keys is called otherwise where there is no recipe.
_WORDS = (
    ("name the .safetensors or .pth file in source.weights", "pass the .safetensors or .pth file as --weights FILE"),
    ("a folder works as model = 'local-dir:/folder'", "a folder works as MODEL local-dir:/folder"),
    ('Or write "pretrained" or "random".', "Or pass --weights pretrained or --weights random."),
    ("; strict = false loads only what fits", ""),
    ("set num_classes", "pass --arg num_classes=N"),
    ("source.weights: ", ""),
    ("source.model: ", ""),
    ("source: ", ""),
)


@dataclass(frozen=True)
class Weight:
    """One weight tensor of a network.

    Attributes:
        name: the layer's dotted name; the tensor's own where it isn't called `weight`.
        tensor: its name in the state dict.
        values: float32, [O, I] or [O, I/groups, kh, kw].
        refused: why its matrix is no subject for the law; empty where it is one.
    """

    name: str
    tensor: str
    values: "Tensor"
    refused: str


@dataclass(frozen=True)
class LayerSpectrum:
    """What became of one layer.

    Attributes:
        name: the layer's dotted name.
        shape: of its weight.
        fit: the fitted law, None where there is none.
        reason: why there is none.
        opinions: of two other estimators; None where there is no fit.
    """

    name: str
    shape: tuple[int, ...]
    fit: Spectrum | None
    reason: str
    opinions: Opinions | None = None

    @property
    def character(self) -> str:
        """The plain word that `RULES` gives it; "not fitted" where there is no fit."""
        return character(self.fit) if self.fit else "not fitted"


@dataclass(frozen=True)
class Spectra:
    """The spectra of a network.

    Attributes:
        model: the network or file that was asked for.
        weights: where the weights are from.
        alpha: share of the eigenvalues that the fit left out at each end.
        beta: significance level of the edge.
        layers: in the network's own order.
        page: the HTML page, None where none was asked for.
    """

    model: str
    weights: str
    alpha: float
    beta: float
    layers: tuple[LayerSpectrum, ...]
    page: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """Return what the table says as JSON values; the eigenvalues stay in `layers`."""
        rows = [_row(layer) for layer in self.layers]
        return {
            "model": self.model,
            "weights": self.weights,
            "alpha": self.alpha,
            "beta": self.beta,
            "rules": dict(RULES),
            "doubts": dict(DOUBTS),
            "signal": SIGNAL,
            "layers": rows,
            "page": str(self.page) if self.page else None,
        }


def character(fitted: Spectrum) -> str:
    """Return the word that `RULES` gives a spectrum."""
    words = [word for word, _ in RULES]
    p = len(fitted.eigenvalues)
    tests = (
        p < FEWEST,
        fitted.spikes > HEAVY * p,
        fitted.ks > OFF,
        float(fitted.eigenvalues[-1]) > ABOVE * fitted.edge,
        True,
    )
    return words[tests.index(True)]


def examine(
    weights: Sequence[Weight], *, alpha: float, beta: float, progress: Callable[[int, int], None]
) -> tuple[LayerSpectrum, ...]:
    """Fit the law to each weight.

    Args:
        weights: as `read` returns them.
        alpha: share of the eigenvalues left out at each end.
        beta: significance level of the edge.
        progress: told how many of how many are done.

    Raises:
        RecipeError: a tensor holds NaN or infinity, or a level is out of range.
    """
    check_levels(alpha, beta)
    _check_finite(weights)
    layers = []
    for done, weight in enumerate(weights):
        progress(done, len(weights))
        layers.append(_examined(weight, alpha, beta))
    progress(len(weights), len(weights))
    return tuple(layers)


def _examined(weight: Weight, alpha: float, beta: float) -> LayerSpectrum:
    shape = tuple(weight.values.shape)
    if weight.refused:
        return LayerSpectrum(weight.name, shape, None, weight.refused)
    try:
        fitted = fit(weight.values.flatten(1).double().numpy(), alpha=alpha, beta=beta)
    except StageFailed as error:
        return LayerSpectrum(weight.name, shape, None, error.what)
    return LayerSpectrum(weight.name, shape, fitted, "", opinions(fitted))


def _check_finite(weights: Sequence[Weight]) -> None:
    for weight in weights:
        bad = int((~weight.values.isfinite()).sum())
        if bad:
            raise RecipeError(
                f"{weight.tensor} holds {bad} values that are NaN or infinite; a spectrum needs finite weights.",
                hint="--layers GLOB picks the layers to look at.",
            )


def _row(layer: LayerSpectrum) -> dict[str, Any]:
    row: dict[str, Any] = {"layer": layer.name, "shape": list(layer.shape), "character": layer.character}
    own, others = layer.fit, layer.opinions
    if own is None or others is None:
        return {**row, "reason": layer.reason}
    return {
        **row,
        "rows": own.rows,
        "cols": own.cols,
        "gamma": own.aspect,
        "sigma": own.sigma,
        "edge": own.edge,
        "edge_singular": own.edge_singular,
        "largest_singular": own.largest_singular,
        "spikes": own.spikes,
        "signals": own.signals.tolist(),
        "bulk_fraction": own.bulk_fraction,
        "ks": own.ks,
        "trace": _numbers(others.trace),
        "evbmf": _numbers(others.evbmf),
        "doubts": list(others.doubts),
    }


def _numbers(estimate: Estimate | None) -> dict[str, Any] | None:
    return asdict(estimate) if estimate else None


def read(
    model: "str | Path | nn.Module", weights: str | None = None, args: Mapping[str, Any] | None = None
) -> tuple[str, str, list[Weight]]:
    """Find the weights of a model.

    Args:
        model: a timm name, "torchvision:NAME", "package.module:function", a recipe, a bundle, a state dict's file, or
            a network.
        weights: "pretrained", "random" or a file; None is the recipe's own, the bundle's dense ones, or "pretrained".
            Of a bundle: "dense", "pruned" or "tuned".
        args: passed to the network's constructor.

    Returns:
        What it is, where the weights are from, and the 2-D and 4-D weights in the network's own order.

    Raises:
        RecipeError: there is no such model or file, its weights don't fit, or it has no matrix.
        Unavailable: PyTorch or timm is missing, or pretrained weights can't be had here.
        CorruptArtifact: the bundle's weights are not what was written.
    """
    needs("spectrum", "torch", "timm", "safetensors")
    label, origin, found = _read(model, weights, dict(args or {}))
    if not found:
        raise RecipeError(f"{label} holds no 2-D or 4-D weight, so there is no spectrum.")
    return label, origin, found


def _read(model: "str | Path | nn.Module", weights: str | None, args: dict[str, Any]) -> tuple[str, str, list[Weight]]:
    if not isinstance(model, str | Path):
        _only_file(type(model).__name__, weights, args)
        return type(model).__name__, "as given", _of_network(model)
    path = Path(model)
    if path.suffix == ".toml":
        recipe = load_recipe(path).recipe
        changes = {"weights": _resolved(weights) or recipe.source.weights, "args": {**recipe.source.args, **args}}
        source = recipe.source.model_copy(update=changes)
        return recipe.name, _origin(source.weights), _of_network(_network(source))
    if (path / MANIFEST).is_file() or (path.is_dir() and len(path.parts) > 1):
        return _of_bundle(path, weights, args)
    if path.suffix in STATE_DICTS:
        _only_file(str(model), weights, args)
        return path.name, "the file's own", _of_state(_state(path), {})
    with reworded(_WORDS):
        kind, name = kind_and_name(str(model))
        # Not validated: a constructor called from Python takes more than a recipe can hold, and judges by itself.
        source = Source.model_construct(
            kind=kind, model=name, weights=_resolved(weights) or "pretrained", args=args, strict=True, seed=0
        )
        return name, _origin(source.weights), _of_network(_network(source))


def _only_file(what: str, weights: str | None, args: Mapping[str, Any]) -> None:
    if weights is not None or args:
        raise RecipeError(f"{what} brings its own weights; --weights and --arg are for networks given by name.")


def _resolved(weights: str | None) -> str | None:
    """Make the path of a weights file absolute, as a recipe's is."""
    return weights if weights in (None, "pretrained", "random") else str(Path(str(weights)).absolute())


def _origin(weights: str) -> str:
    return weights if weights in ("pretrained", "random") else Path(weights).name


def _network(source: Source) -> "nn.Module":
    """Build a network with its weights; unlike a stage's, it needs no classifier and no preprocessing."""
    from mpdeploy.models.checkpoints import fill, read_state
    from mpdeploy.models.construct import construct

    pretrained = source.weights == "pretrained"
    module = construct(source.kind, source.model, source.args, pretrained=pretrained, seed=source.seed)
    if source.weights not in ("pretrained", "random"):
        path = Path(source.weights)
        fill(module, read_state(path), strict=source.strict, what=f"source.weights: {path}")
    return module


def _of_network(module: "nn.Module") -> list[Weight]:
    groups = {f"{name}.weight": getattr(own, "groups", 1) for name, own in module.named_modules()}
    state = {name: tensor for name, tensor in module.named_parameters() if name.endswith("weight")}
    return _of_state(state, {name: own if isinstance(own, int) else 1 for name, own in groups.items()})


def _of_bundle(folder: Path, weights: str | None, args: Mapping[str, Any]) -> tuple[str, str, list[Weight]]:
    """Read one of a bundle's three sets of weights, after checking that it is what was written."""
    check_is_bundle(folder)
    which = weights or BUNDLED[0]
    if which not in BUNDLED or args:
        raise RecipeError(f"Of a bundle, --weights is one of {', '.join(BUNDLED)}, and there is no --arg.")
    check_files(folder, read_json(folder / MANIFEST)["files"], "The bundle")
    groups = {f"{layer['name']}.weight": layer["groups"] for layer in read_json(folder / "layers.json")}
    return (
        folder.resolve().name,
        f"{which} (bundle)",
        _of_state(_state(folder / f"weights/{which}.safetensors"), groups),
    )


def _state(path: Path) -> "dict[str, Tensor]":
    from mpdeploy.models.checkpoints import read_state

    if not path.is_file():
        raise RecipeError(f"{path} is not a file.", hint="MODEL is a name, a recipe, a bundle or a state dict's file.")
    with reworded(_WORDS):
        return read_state(path)


def _of_state(state: "Mapping[str, Tensor]", groups: Mapping[str, int]) -> list[Weight]:
    """Pick the floating-point matrices; a convolution's [O, I/groups, kh, kw] is one by its im2col matrix."""
    chosen = {
        name: tensor.detach().cpu().float()
        for name, tensor in state.items()
        if tensor.is_floating_point() and tensor.ndim in (2, 4) and not tensor.is_meta
    }
    return [
        Weight(name.removesuffix(".weight"), name, tensor, _refused(tensor, groups.get(name)))
        for name, tensor in chosen.items()
    ]


def _refused(tensor: "Tensor", groups: int | None) -> str:
    """Say why a weight's matrix can't be compared with noise; `groups` is None where nobody knows."""
    if groups is not None and groups > 1:
        return f"A grouped convolution ({groups} groups): its matrix is block-diagonal, not one block."
    if groups is None and tensor.ndim == 4 and tensor.shape[1] == 1 and tensor.shape[2:].numel() > 1:
        return "One input channel per filter: a depthwise convolution, or a stem for gray images; a file can't tell."
    return ""


def select(weights: Sequence[Weight], layers: str) -> list[Weight]:
    """Return the weights whose layer matches a pattern with * and ?.

    Raises:
        RecipeError: none does.
    """
    chosen = [weight for weight in weights if fnmatchcase(weight.name, layers)]
    if not chosen:
        names = [weight.name for weight in weights]
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise RecipeError(f"No layer matches {layers!r}; the layers are {shown}.")
    return chosen


def parse_args(items: Sequence[str]) -> dict[str, Any]:
    """Turn "key=value" into constructor arguments, the value as TOML spells it (a bare word is a string).

    Raises:
        RecipeError: an item has no "=".
    """
    args = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise RecipeError(f"--arg {item}: expected key=value, for example --arg img_size=28.")
        try:
            args[key] = tomllib.loads(f"v = {text}")["v"]
        except tomllib.TOMLDecodeError:
            args[key] = text
    return args


def page_path(out: str | Path, model: str) -> Path:
    """Return where the page goes: `out` itself where it ends in .html, or NAME.spectrum.html in the folder `out`.

    Raises:
        RecipeError: `out` is a file that isn't a page.
    """
    path = Path(out)
    if path.suffix in (".html", ".htm"):
        return path
    if path.is_file():
        raise RecipeError(
            f"{path} is a file; it is left as it is.", hint="name a folder, or a page that ends in .html."
        )
    short = re.sub(r"[^A-Za-z0-9._-]+", "-", model).strip("-._")[:60]
    return path / f"{short or 'network'}.spectrum.html"
