"""Data sets that the user brings: ImageNet-style folders and .npz files."""

import hashlib
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from mpdeploy.data.images import read_image
from mpdeploy.data.splits import Dataset, Split
from mpdeploy.errors import RecipeError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
REQUIRED = ("train_images", "train_labels", "val_images", "val_labels")
OPTIONAL = ("class_names", "train_ids", "val_ids")
SHOWN = 10  # how many names an error lists


def open_folder(root: str) -> Dataset:
    """Open ROOT/train/<class>/<image> and ROOT/val/<class>/<image>; see `mpdeploy.data.open_dataset`."""
    folder = Path(root)
    names = {part: _class_names(folder / part) for part in ("train", "val")}
    if names["train"] != names["val"]:
        raise RecipeError(f"{folder}: train and val must hold the same classes; {_difference(**names)}.")
    classes = names["train"]
    listings = {part: [_images(folder / part / name) for name in classes] for part in ("train", "val")}
    splits = {}
    for part, listing in listings.items():
        ids = [f"{part}/{name}/{file}" for name, files in zip(classes, listing, strict=True) for file, _ in files]
        labels = np.repeat(np.arange(len(classes), dtype=np.int64), [len(files) for files in listing])
        splits[part] = Split(part, ids, labels, partial(_read_relative, folder, ids))
    sizes = [size for listing in listings.values() for files in listing for _, size in files]
    ids = [*splits["train"].ids, *splits["val"].ids]
    return Dataset(folder.name, classes, splits["train"], splits["val"], partial(_folder_digest, classes, ids, sizes))


def _difference(train: Sequence[str], val: Sequence[str]) -> str:
    sides = {"train only": set(train) - set(val), "val only": set(val) - set(train)}
    return "; ".join(f"in {where}: {_listed(names)}" for where, names in sides.items() if names)


def _read_relative(folder: Path, ids: Sequence[str], index: int) -> NDArray[np.uint8]:
    return read_image(folder / ids[index])


def _class_names(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        raise RecipeError(
            f"{folder} is not a folder; expected ROOT/train/<class>/ and ROOT/val/<class>/ under data.path."
        )
    names = tuple(sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith(".")))
    if not names:
        raise RecipeError(f"{folder} holds no class folder, so the data set is empty.")
    return names


def _images(folder: Path) -> list[tuple[str, int]]:
    """List (file name, size in bytes), sorted; at least one."""
    found = sorted(
        (entry.name, entry.stat().st_size)
        for entry in os.scandir(folder)
        if entry.is_file() and not entry.name.startswith(".") and entry.name.lower().endswith(SUFFIXES)
    )
    if not found:
        raise RecipeError(f"{folder}: a class with no image; expected files ending in {', '.join(SUFFIXES)}.")
    return found


def _folder_digest(classes: Sequence[str], ids: Sequence[str], sizes: Sequence[int]) -> str:
    digest = hashlib.sha256(repr(list(classes)).encode())
    for item in sorted(zip(ids, sizes, strict=True)):
        digest.update(repr(item).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


@dataclass(frozen=True)
class _Header:
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]


def open_npz(file: str) -> Dataset:
    """Open an .npz with train_images, train_labels, val_images, val_labels; see `mpdeploy.data.open_dataset`.

    Images are uint8 [n, H, W] or [n, H, W, 3], labels integers [n]. Optional strings: class_names [classes], train_ids
    and val_ids [n]. Shapes and types are checked from the headers; pixels are read at the first use.
    """
    path = Path(file)
    headers = _headers(path)
    if missing := [name for name in REQUIRED if name not in headers]:
        raise RecipeError(f"{path}: {', '.join(missing)} missing; it holds {_listed(headers)}.")
    if unknown := [name for name in headers if name not in REQUIRED + OPTIONAL]:
        raise RecipeError(f"{path}: unknown array {_listed(unknown)}; expected {', '.join(REQUIRED + OPTIONAL)}.")
    for part in ("train", "val"):
        _check_part(path, part, headers)
    small = {name: _array(path, name) for name in headers if not name.endswith("_images")}
    classes = _npz_classes(path, small)
    load = cache(partial(_array, path))  # one decompression per array and data set
    splits = {}
    for part in ("train", "val"):
        labels = small[f"{part}_labels"].astype(np.int64)
        ids = [str(i) for i in small[f"{part}_ids"]] if f"{part}_ids" in small else _numbered(part, len(labels))
        if len(set(ids)) != len(ids):
            raise RecipeError(f"{path}: {part}_ids holds a name more than once.")
        splits[part] = Split(part, ids, labels, partial(_row, load, f"{part}_images"))
    return Dataset(path.stem, classes, splits["train"], splits["val"], partial(file_digest, path))


def _row(load: Callable[[str], NDArray[Any]], name: str, index: int) -> NDArray[np.uint8]:
    return np.asarray(load(name)[index], dtype=np.uint8)


def _numbered(part: str, count: int) -> list[str]:
    return [f"{part}/{index:06d}" for index in range(count)]


def _headers(path: Path) -> dict[str, _Header]:
    """Read name, shape and type of every array without its data."""
    try:
        with zipfile.ZipFile(path) as archive:
            found = {}
            for item in archive.namelist():
                with archive.open(item) as stream:
                    version = npy.read_magic(stream)
                    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
                    shape, _, dtype = read(stream)
                found[item.removesuffix(".npy")] = _Header(shape, dtype)
    except FileNotFoundError as error:
        raise RecipeError(f"{path} does not exist; expected the .npz file that data.path names.") from error
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise RecipeError(f"{path} can't be read as .npz: {error}.") from error
    return found


def _check_part(path: Path, part: str, headers: Mapping[str, _Header]) -> None:
    images, labels = headers[f"{part}_images"], headers[f"{part}_labels"]
    shape = images.shape
    if images.dtype != np.uint8 or not (len(shape) == 3 or (len(shape) == 4 and shape[3] == 3)):
        raise RecipeError(
            f"{path}: {part}_images is {images.dtype} {shape}; expected uint8 [n, height, width] or the same with a"
            " last axis of 3 (RGB)."
        )
    if 0 in shape:
        raise RecipeError(f"{path}: {part}_images has shape {shape}: it is empty.")
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != shape[:1]:
        raise RecipeError(
            f"{path}: {part}_labels is {labels.dtype} {labels.shape}; expected integers of shape ({shape[0]},)."
        )
    names = headers.get(f"{part}_ids")
    if names is not None and (names.dtype.kind != "U" or names.shape != shape[:1]):
        raise RecipeError(
            f"{path}: {part}_ids is {names.dtype} {names.shape}; expected unicode strings of shape ({shape[0]},)."
        )


def _npz_classes(path: Path, small: Mapping[str, NDArray[Any]]) -> tuple[str, ...]:
    """Return the class names, and check every label against them."""
    named = small.get("class_names")
    if named is not None and (named.dtype.kind != "U" or named.ndim != 1 or len(named) == 0):
        raise RecipeError(
            f"{path}: class_names is {named.dtype} {named.shape}; expected unicode strings of shape (classes,)."
        )
    highest = max(int(small["train_labels"].max()), int(small["val_labels"].max()))
    classes = tuple(str(c) for c in named) if named is not None else tuple(str(c) for c in range(highest + 1))
    if len(set(classes)) != len(classes):
        raise RecipeError(f"{path}: class_names holds a name more than once.")
    for part in ("train", "val"):
        labels = small[f"{part}_labels"]
        wrong = np.flatnonzero((labels < 0) | (labels >= len(classes)))
        if wrong.size:
            raise RecipeError(
                f"{path}: {part}_labels holds {labels[wrong[0]]} at {wrong[0]}; expected 0 to {len(classes) - 1}"
                f" ({wrong.size} labels are out of range)."
            )
    absent = sorted(set(range(len(classes))) - set(small["train_labels"].tolist()))
    if absent and named is None:
        raise RecipeError(
            f"{path}: train_labels has no image of class {_listed(str(c) for c in absent)}.",
            hint="Where a class has no image on purpose, state all classes in class_names.",
        )
    return classes


def _array(path: Path, name: str) -> NDArray[Any]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            array: NDArray[Any] = archive[name]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise RecipeError(f"{path}: {name} can't be read: {error}.") from error
    return array


def file_digest(path: Path) -> str:
    """Return the hex sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _listed(names: Iterable[str]) -> str:
    """Join names for a sentence: the first ten, then how many more."""
    every = sorted(names)
    more = f" and {len(every) - SHOWN} more" if len(every) > SHOWN else ""
    return ", ".join(every[:SHOWN]) + more
