"""Labelled images that Python packages and Debian ship. Their code is never imported, only their files are read."""

import csv
import gzip
import hashlib
import re
import struct
import zlib
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpdeploy.data.files import file_digest
from mpdeploy.data.images import read_image
from mpdeploy.data.splits import Dataset, Split, stratified
from mpdeploy.errors import RecipeError, Unavailable

ELPV, ELPV_PIN = "elpv-dataset", "elpv-dataset==1.0.0.post1"
FOOLBOX, FOOLBOX_PIN = "foolbox", "foolbox==3.3.4"
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"
)  # fmt: skip
ELPV_VAL_SHARE, ELPV_SEED = 0.25, 0


def open_packaged(name: str, path: str = "") -> Dataset:
    """Open a set by name; `path` is only for fashion-mnist, where its files lie elsewhere than Debian puts them.

    Raises:
        RecipeError: there is no such set, or its files are wrong.
        Unavailable: the package is not installed.
    """
    if name not in OPENERS:
        raise RecipeError(f"data.name: no packaged set {name!r}; there are {', '.join(OPENERS)}.")
    if path and name != "fashion-mnist":
        raise RecipeError(f"data.path: the set {name!r} lies in its package; leave data.path out.")
    return OPENERS[name](path)


def _elpv(_: str) -> Dataset:
    """Solar cells, 300 x 300 gray, 2,624 images: defect probability >= 0.5 is "defective".

    The set has no split of its own. Here: 25 % of every stratum (probability, cell type), by seed 0, is validation.
    Images: CC BY-NC-SA 4.0 (non-commercial).
    """
    root, version = _package(ELPV, ELPV_PIN, "elpv_dataset/data")
    index = root / "labels.csv"
    with _readable(index).open(encoding="utf-8") as stream:
        rows = [row for row in csv.reader(stream, delimiter=" ", skipinitialspace=True) if row]
    try:
        cells = [(file, float(probability), kind) for file, probability, kind in rows]
    except ValueError as error:
        raise RecipeError(f"{index}: expected lines of file, probability and type: {error}.") from error
    labels = np.array([probability >= 0.5 for _, probability, _ in cells], dtype=np.int64)
    held_out = stratified([(probability, kind) for _, probability, kind in cells], ELPV_VAL_SHARE, ELPV_SEED)
    train, val = (
        _files_split(name, root, [cells[i][0] for i in np.flatnonzero(mask)], labels[mask])
        for name, mask in (("train", ~held_out), ("val", held_out))
    )
    rule = f"val {ELPV_VAL_SHARE} of (probability, type), seed {ELPV_SEED}"
    digest = partial(_digest, [ELPV, version, rule, *train.ids, "/", *val.ids], [index])
    return Dataset("elpv", ("functional", "defective"), train, val, digest)


def _imagenet_samples(_: str) -> Dataset:
    """Twenty photos with ImageNet-1k labels: even numbers train, odd ones val.

    A smoke test and a measure of how far logits move; ten images give no accuracy. Labels index the 1,000 classes.
    """
    root, version = _package(FOOLBOX, FOOLBOX_PIN, "foolbox/data")
    found = [(m, f) for f in sorted(root.glob("imagenet_*.jpg")) if (m := re.fullmatch(r"imagenet_\d+_(\d+)", f.stem))]
    if len(found) != 20:
        raise RecipeError(f"{root} holds {len(found)} files imagenet_<number>_<label>.jpg; expected 20.")
    train, val = (
        _files_split(
            name, root, [file.name for _, file in part], np.array([int(m[1]) for m, _ in part], dtype=np.int64)
        )
        for name, part in (("train", found[::2]), ("val", found[1::2]))
    )
    digest = partial(_digest, [FOOLBOX, version], [file for _, file in found])
    return Dataset("imagenet-samples", tuple(str(k) for k in range(1000)), train, val, digest)


def _fashion_mnist(path: str) -> Dataset:
    """Fashion-MNIST as Debian's dataset-fashion-mnist lays it down: four idx files, gzipped."""
    folder = Path(path) if path else FASHION_MNIST
    if not folder.is_dir() and not path:
        raise Unavailable(
            f"Fashion-MNIST is not at {folder}.",
            hint="apt-get install dataset-fashion-mnist (Debian), or name the folder of its .gz files in data.path.",
        )
    if not folder.is_dir():
        raise RecipeError(f"data.path: {folder} is not a folder; expected Fashion-MNIST's four idx .gz files in it.")
    files: list[Path] = []
    splits = []
    for name, stem in (("train", "train"), ("val", "t10k")):
        images, labels = (_readable(folder / f"{stem}-{part}-ubyte.gz") for part in ("images-idx3", "labels-idx1"))
        files += [images, labels]
        marks = read_idx(labels, 1).astype(np.int64)
        if not len(marks) or int(marks.max()) >= len(FASHION_CLASSES):
            raise RecipeError(f"{labels}: expected labels from 0 to {len(FASHION_CLASSES) - 1}, at least one.")
        ids = [f"{name}/{index:05d}" for index in range(len(marks))]
        splits.append(Split(name, ids, marks, partial(_idx_image, cache(partial(_idx_images, images, len(marks))))))
    return Dataset("fashion-mnist", FASHION_CLASSES, splits[0], splits[1], partial(_digest, ["fashion-mnist"], files))


OPENERS: dict[str, Callable[[str], Dataset]] = {
    "elpv": _elpv,
    "imagenet-samples": _imagenet_samples,
    "fashion-mnist": _fashion_mnist,
}


def _package(name: str, pin: str, folder: str) -> tuple[Path, str]:
    """Return a folder inside an installed package, and the package's version, without importing it."""
    try:
        package = distribution(name)
    except PackageNotFoundError as error:
        raise Unavailable(f"The package {name} is not installed.", hint=f"pip install {pin}") from error
    path = Path(str(package.locate_file(folder)))
    if not path.is_dir():
        raise Unavailable(f"The package {name} lacks its folder {folder}.", hint=f"pip install --force-reinstall {pin}")
    return path, package.version


def _readable(path: Path) -> Path:
    if not path.is_file():
        raise RecipeError(f"{path} is missing.")
    return path


def _files_split(name: str, root: Path, files: Sequence[str], labels: NDArray[np.int64]) -> Split:
    return Split(name, files, labels, lambda index: read_image(root / files[index]))


def _digest(facts: Sequence[str], files: Sequence[Path]) -> str:
    digest = hashlib.sha256(repr(list(facts)).encode())
    for path in files:
        digest.update(f"{path.name} {file_digest(path)}\n".encode())
    return digest.hexdigest()


def _idx_image(load: Callable[[], NDArray[np.uint8]], index: int) -> NDArray[np.uint8]:
    image: NDArray[np.uint8] = load()[index]
    return image


def _idx_images(path: Path, count: int) -> NDArray[np.uint8]:
    images = read_idx(path, 3)
    if len(images) != count:
        raise RecipeError(f"{path} holds {len(images)} images for {count} labels.")
    return images


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Read a gzipped idx file of unsigned bytes (magic 0x0000 08 <dimensions>, then big-endian sizes).

    Raises:
        RecipeError: it is damaged, or another type or number of dimensions.
    """
    try:
        with gzip.open(path) as stream:
            data = stream.read()
        zero, kind, rank = struct.unpack_from(">HBB", data)
        shape = struct.unpack_from(f">{rank}I", data, 4)
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise RecipeError(f"{path} can't be read as a gzipped idx file: {error}.") from error
    body: NDArray[np.uint8] = np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * rank)
    if (zero, kind, rank) != (0, 8, dimensions) or body.size != np.prod(shape):
        raise RecipeError(f"{path}: expected unsigned bytes in {dimensions} dimensions, all of them present.")
    array: NDArray[np.uint8] = body.reshape(shape)
    return array
