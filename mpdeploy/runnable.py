"""Whatever gives logits behind one face: an ONNX file, a network by name, a recipe's, a bundle's; and images."""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mpdeploy.artifact import MANIFEST, check_files, read_json, sha256_of
from mpdeploy.bundle import check_is_bundle
from mpdeploy.data import draw, open_dataset
from mpdeploy.errors import RecipeError, StageFailed, reworded
from mpdeploy.init import kind_and_name
from mpdeploy.preprocessing import Preprocessing
from mpdeploy.recipe import Data, Source, load_recipe
from mpdeploy.runtimes import Session, open_engine
from mpdeploy.stages.environment import needs
from mpdeploy.stages.images import exact_logits, exact_logits_of_graph

if TYPE_CHECKING:
    from torch import nn

    from mpdeploy.certify.program import Program

Floats = NDArray[np.float32]
STATES = ("dense", "pruned", "tuned")
# What the library calls the recipe's keys is called otherwise where there is no recipe.
_WORDS = (
    ("name the .safetensors or .pth file in source.weights", "write MODEL=FILE with the .safetensors or .pth file"),
    ("a folder works as model = 'local-dir:/folder'", "a folder works as local-dir:/folder"),
    ('Or write "pretrained" or "random".', "MODEL=pretrained and MODEL=random work too."),
    ("; strict = false loads only what fits", ""),
    ("set num_classes", "pass --arg num_classes=N"),
    ("source.weights: ", ""),
    ("source.model: ", ""),
    ("source: ", ""),
)
BATCH = 64


@dataclass(frozen=True)
class Runnable:
    """A network that can be run.

    Attributes:
        name: as it was asked for.
        what: what it is, in words.
        digest: SHA-256 of its file, or of its weights.
        session: runs it.
        batch: images per call that it takes at most; exactly, where `exactly`.
        exactly: whether it takes no fewer.
        size: channels, height, width; a name or None where it takes any.
        preprocessing: what it wants, None where the file doesn't say.
        exact: images -> float64 logits, None where it can't be run in float64.
        program: returns its graph, None where there is none to be had.
    """

    name: str
    what: str
    digest: str
    session: Session
    batch: int
    exactly: bool
    size: tuple[int | str | None, ...]
    preprocessing: Preprocessing | None
    exact: Callable[[Floats], NDArray[np.float64]] | None
    program: "Callable[[], Program] | None"

    def run(self, images: Floats) -> Floats:
        """Return float32 logits [n, K] of any number of images, float32 [n, C, H, W]."""
        pieces = []
        for start in range(0, len(images), self.batch):
            piece = images[start : start + self.batch]
            short = self.batch - len(piece) if self.exactly else 0
            filled = np.concatenate([piece, np.repeat(piece[-1:], short, axis=0)]) if short else piece
            pieces.append(self.session.run(filled)[: len(piece)])
        return np.concatenate(pieces)


@contextlib.contextmanager
def opened(text: str, args: Mapping[str, Any]) -> Iterator[Runnable]:
    """Open what a user names.

    Args:
        text: an .onnx file; a recipe; a bundle's folder; a timm name, torchvision:NAME or package.module:function.
            What follows the last "=" says which weights: "pretrained" (taken if nothing follows), "random" or a file;
            of a bundle "dense" (taken if nothing follows), "pruned", "tuned" or the id of one of its engines.
        args: passed to the constructor of a network given by name.

    Raises:
        RecipeError: there is nothing of that name, or its weights don't fit.
        Unavailable: a package, a GPU or pretrained weights are not to be had here.
        CorruptArtifact: a bundle is not what was written.
    """
    needs("certify", "torch", "timm", "safetensors")
    whole = Path(text)
    name, _, which = (text, "", "") if whole.exists() else text.rpartition("=") if "=" in text else (text, "", "")
    path = Path(name)
    with reworded(_WORDS):
        if path.suffix == ".onnx":
            runnable = _onnx(path, name, which)
        elif path.suffix == ".toml":
            runnable = _recipe(path, text, which, args)
        elif (path / MANIFEST).is_file() or path.is_dir():
            runnable = _bundle(path, text, which)
        else:
            runnable = _named(name, text, which, args)
    with runnable.session:
        yield runnable


def _onnx(path: Path, name: str, which: str) -> Runnable:
    from mpdeploy.runtimes.onnxruntime import OnnxSession

    if which or not path.is_file():
        raise RecipeError(f"{path} is not an ONNX file that is there." if not which else f"{name} has its own weights.")
    session = OnnxSession(path)
    return Runnable(
        name=name,
        what="ONNX Runtime on the CPU",
        digest=sha256_of(path),
        session=session,
        batch=session.fixed_batch or BATCH,
        exactly=session.fixed_batch > 0,
        size=session.input_size,
        preprocessing=None,
        exact=partial(_exact_of_graph, path),
        program=partial(_graph, path),
    )


def _graph(path: Path) -> "Program":
    from mpdeploy.graph.program import read_program

    return read_program(path)


def _exact_of_graph(path: Path, images: Floats) -> NDArray[np.float64]:
    return exact_logits_of_graph(_graph(path), images)


def _recipe(path: Path, text: str, which: str, args: Mapping[str, Any]) -> Runnable:
    source = load_recipe(path).recipe.source
    changes: dict[str, Any] = {"args": {**source.args, **args}}
    if which:
        changes["weights"] = _weights(which)
    return _torch(source.model_copy(update=changes), text)


def _named(name: str, text: str, which: str, args: Mapping[str, Any]) -> Runnable:
    if Path(name).suffix in (".safetensors", ".pth", ".pt", ".bin"):
        raise RecipeError(
            f"{name} holds weights and no network.", hint=f"write MODEL={name}, for example resnet50={name}."
        )
    kind, model = kind_and_name(name)
    weights = _weights(which or "pretrained")
    return _torch(
        Source.model_construct(kind=kind, model=model, weights=weights, args=dict(args), strict=True, seed=0), text
    )


def _weights(which: str) -> str:
    return which if which in ("pretrained", "random") else str(Path(which).absolute())


def _torch(source: Source, text: str) -> Runnable:
    from mpdeploy.models import load

    loaded = load(source)
    return _of_module(loaded.module, loaded.preprocessing, text, f"PyTorch, weights {loaded.facts['weights']}")


def _of_module(module: "nn.Module", preprocessing: Preprocessing, text: str, what: str) -> Runnable:
    from mpdeploy.runtimes.torch_eager import TorchSession

    return Runnable(
        name=text,
        what=what,
        digest=_digest_of(module),
        session=TorchSession(module),
        batch=BATCH,
        exactly=False,
        size=preprocessing.input_size,
        preprocessing=preprocessing,
        exact=partial(exact_logits, module),
        program=partial(_exported, module, preprocessing.input_size),
    )


def _exported(module: "nn.Module", size: tuple[int, int, int]) -> "Program":
    from mpdeploy.graph.export import exported_program

    return exported_program(module, size)


def _digest_of(module: "nn.Module") -> str:
    from safetensors.torch import save

    return hashlib.sha256(save({k: v.contiguous().clone() for k, v in module.state_dict().items()})).hexdigest()


def _bundle(folder: Path, text: str, which: str) -> Runnable:
    """Open one of a bundle's networks or engines, after checking that the bundle is what was written."""
    from safetensors.torch import load_file

    from mpdeploy.models import rebuild
    from mpdeploy.stages.prune import fold_orders

    check_is_bundle(folder)
    files = read_json(folder / MANIFEST)["files"]
    check_files(folder, files, "The bundle")
    preprocessing = Preprocessing.from_json(read_json(folder / "preprocessing.json"))
    which = which or STATES[0]
    if which in STATES:
        state = load_file(folder / f"weights/{which}.safetensors")
        architecture = read_json(folder / "model.json")
        network = _of_module(
            rebuild(architecture, state), preprocessing, text, f"PyTorch, the bundle's {which} weights"
        )
        if which == "dense":  # the same function in the others' channel order: operator by operator comparable
            fold_orders(state, read_json(folder / "orders.json"))
            program = partial(_exported, rebuild(architecture, state), preprocessing.input_size)
            return replace(network, program=program)
        return network
    engines = sorted({name.split("/")[1] for name in files if name.startswith("engines/")})
    if which not in engines:
        raise RecipeError(
            f"{folder} holds no {which!r}.", hint=f"it holds {', '.join(STATES)} and the engines {', '.join(engines)}."
        )
    manifest = read_json(folder / f"engines/{which}/engine.json")
    return Runnable(
        name=text,
        what=f"{manifest['runtime']} on {manifest['target']}, {manifest['precision']}",
        digest=manifest["sha256"],
        session=open_engine(folder / "engines" / which),
        batch=int(manifest["batch"][2]),
        exactly=False,
        size=preprocessing.input_size,
        preprocessing=preprocessing,
        exact=None,
        program=None,
    )


@dataclass(frozen=True)
class Inputs:
    """Images as the networks want them.

    Attributes:
        name: where they are from.
        ids: one per image.
        labels: int64 [n], None where nobody knows them.
        load: indices [m] -> float32 [m, C, H, W].
    """

    name: str
    ids: Sequence[str]
    labels: NDArray[np.int64] | None
    load: Callable[[NDArray[np.int64]], Floats]

    def batches(self, size: int) -> Iterator[Floats]:
        """Yield all images in order, at most `size` at a time."""
        for start in range(0, len(self.ids), size):
            yield self.load(np.arange(start, min(start + size, len(self.ids)), dtype=np.int64))


def open_inputs(text: str, split: str, samples: int, seed: int, preprocessing: Callable[[], Preprocessing]) -> Inputs:
    """Open the images that a user names.

    Args:
        text: a folder with train/ and val/, an .npz file, a recipe (its table data), or a packaged set's name; or an
            .npy file (or an .npz with `inputs` and perhaps `labels`) of float32 [n, C, H, W] that is fed as it is.
        split: "train" or "val".
        samples: how many, drawn class-balanced; 0 is all.
        seed: of the draw.
        preprocessing: asked for where images have to be turned into inputs.

    Raises:
        RecipeError: there is nothing of that name, or too few images.
        Unavailable: the package that holds a set is not installed.
    """
    path = Path(text)
    if split not in ("train", "val"):
        raise RecipeError(f"There is no split {split!r}; expected train or val.")
    if path.suffix in (".npy", ".npz") and (ready := _ready_inputs(path)) is not None:
        inputs, labels = ready
        count = samples or len(inputs)
        if count > len(inputs):
            raise RecipeError(f"{count} samples are asked of {path}, which holds {len(inputs)}.")
        ids = [f"{path.name}[{i}]" for i in range(count)]
        return Inputs(
            str(path), ids, None if labels is None else labels[:count], lambda at: np.ascontiguousarray(inputs[at])
        )
    dataset = open_dataset(_data_table(path, text))
    side = {"train": dataset.train, "val": dataset.val}[split]
    chosen = draw(side, samples, seed) if samples else np.arange(len(side.ids), dtype=np.int64)
    wants = preprocessing()
    return Inputs(
        f"{dataset.name} ({split})",
        [side.ids[i] for i in chosen],
        np.asarray(side.labels)[chosen],
        lambda at: wants.apply(side.load(chosen[at])),
    )


def _data_table(path: Path, text: str) -> Data:
    if path.suffix == ".toml":
        return load_recipe(path).recipe.data
    kind = "folder" if path.is_dir() else "npz" if path.suffix == ".npz" else "packaged"
    where = {"name": text} if kind == "packaged" else {"path": str(path.absolute())}
    return Data.model_validate({"kind": kind, **where})


def _ready_inputs(path: Path) -> tuple[Floats, NDArray[np.int64] | None] | None:
    """Return inputs that need no preprocessing, None where a file holds images."""
    if not path.is_file():
        raise RecipeError(f"There is no file {path}.")
    try:
        held = np.load(path, allow_pickle=False)
        if path.suffix == ".npz":
            if "inputs" not in held:
                return None
            inputs, labels = held["inputs"], held.get("labels")
        else:
            inputs, labels = held, None
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path} can't be read as numpy arrays: {error}.") from error
    if inputs.dtype != np.float32 or inputs.ndim != 4 or not len(inputs) or not np.isfinite(inputs).all():
        raise RecipeError(
            f"{path} holds {inputs.dtype} {list(inputs.shape)}; inputs are finite float32 [n, C, H, W], n above 0."
        )
    if labels is not None and (labels.shape != (len(inputs),) or labels.dtype.kind not in "iu"):
        raise RecipeError(
            f"{path} holds labels {labels.dtype} {list(labels.shape)}; expected integers [{len(inputs)}]."
        )
    return inputs, None if labels is None else labels.astype(np.int64)


def preprocessing_of(runnables: Sequence[Runnable], given: str | None) -> Preprocessing:
    """Return what turns images into inputs: what is given, or what the networks want if they agree.

    Raises:
        RecipeError: nobody says, or they don't agree.
    """
    if given is not None:
        path = Path(given) / "preprocessing.json" if Path(given).is_dir() else Path(given)
        if not path.is_file():
            raise RecipeError(f"There is no {path}.", hint="--preprocessing takes a bundle or its preprocessing.json.")
        return Preprocessing.from_json(read_json(path))
    own = [runnable.preprocessing for runnable in runnables if runnable.preprocessing is not None]
    if not own:
        raise RecipeError(
            "An ONNX file doesn't say how images become its input.",
            hint="pass --preprocessing BUNDLE (or a preprocessing.json), or --data INPUTS.npy, float32 [n, C, H, W].",
        )
    if any(one != own[0] for one in own):
        raise RecipeError(
            "The two networks preprocess images differently, so they would not see the same input.",
            hint="pass --preprocessing to choose one for both.",
        )
    return own[0]


def check_same_input(runnables: Sequence[Runnable], images: Floats) -> None:
    """Refuse images that one of the networks can't take.

    Raises:
        StageFailed: the shapes differ.
    """
    for one in runnables:
        if any(isinstance(own, int) and own != n for own, n in zip(one.size, images.shape[1:], strict=False)):
            raise StageFailed(
                f"{one.name} takes images {list(one.size)}, the data gives {list(images.shape[1:])}.",
                hint="both networks have to take the same input.",
            )
