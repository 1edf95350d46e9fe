"""A split of labelled images, and how samples are drawn from it."""

import hashlib
import operator
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpdeploy.errors import RecipeError


@dataclass(frozen=True)
class Split:
    """One side of a data set. Images are decoded by index, on demand.

    Args:
        name: "train" or "val".
        ids: One name per image, the same on every machine.
        labels: int64 [n], index into the data set's classes.
        read: Decodes one image: index -> uint8 [H, W] (gray) or [H, W, 3] (RGB).
    """

    name: str
    ids: Sequence[str]
    labels: NDArray[np.int64]
    read: Callable[[int], NDArray[np.uint8]]

    def __len__(self) -> int:
        return len(self.ids)

    def load(self, indices: Iterable[int]) -> list[NDArray[np.uint8]]:
        """Decode the images at `indices`, in that order.

        Raises:
            RecipeError: an image can't be decoded (it is named).
            IndexError: an index is outside [0, n).
        """
        chosen = [operator.index(index) for index in indices]
        for index in chosen:
            if not 0 <= index < len(self.ids):
                raise IndexError(f"{self.name}: index {index} is outside [0, {len(self.ids)}).")
        return [self.read(index) for index in chosen]


@dataclass(frozen=True)
class Dataset:
    """Two splits with the same classes.

    Args:
        name: For people.
        classes: Class names; a label is an index into them.
        train: What pruning, tuning and the certificate see.
        val: What only `validate` sees.
        digest: Computes `identity`.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    val: Split
    digest: Callable[[], str]

    def identity(self) -> str:
        """Return a hex sha256 of what shapes the data.

        .npz: the file's bytes. Packaged: the package's version and its index or data files. Folder: sorted relative
        paths, sizes and class names, NOT pixels, since hashing 150 GB on every plan is no option: an image replaced
        by one of equal name and size goes unseen here. `content_digest` covers the images that were drawn.
        """
        return self.digest()


def draw(split: Split, count: int, seed: int, exclude: Collection[int] = ()) -> NDArray[np.int64]:
    """Draw a shuffled, class-balanced sample without replacement.

    Every class gets as many images as every other, up to one; a class with too few gives all it has and the rest is
    filled from the others. Only PCG64's raw stream decides, so that the draw is the same under every numpy.

    Args:
        split: Where from.
        count: How many images.
        seed: Same seed, same draw; at least 0.
        exclude: Indices that must not be drawn.

    Returns:
        int64 [count], distinct indices in random order.

    Raises:
        RecipeError: fewer images are available than asked for, or a number is negative.
    """
    if count < 0 or seed < 0:
        raise RecipeError(f"A draw needs count and seed of at least 0, not count {count} and seed {seed}.")
    allowed = np.ones(len(split), dtype=bool)
    allowed[np.fromiter(exclude, dtype=np.int64, count=len(exclude))] = False
    available = np.flatnonzero(allowed)
    if count > len(available):
        raise RecipeError(
            f"{count} images asked of the split {split.name!r}, {len(available)} available"
            f" ({len(split)} in all, {len(split) - len(available)} set aside).",
            hint="Lower data.calibration or data.certification, or name a larger data set.",
        )
    raw = np.random.PCG64(seed).random_raw(len(available))
    shuffled = available[np.argsort(raw, kind="stable")]
    labels = split.labels[shuffled]
    # Classes in order of first appearance in the shuffle: which of them gets one image more is random, too.
    present, first, sizes = np.unique(labels, return_index=True, return_counts=True)
    order = np.argsort(first, kind="stable")
    quota = dict(zip(present[order].tolist(), _fill(sizes[order].tolist(), count), strict=True))
    taken = np.zeros(len(shuffled), dtype=bool)
    for label, share in quota.items():
        taken[np.flatnonzero(labels == label)[:share]] = True
    return shuffled[taken].astype(np.int64)


def _fill(sizes: Sequence[int], count: int) -> list[int]:
    """Share `count` among vessels of the given sizes so that the levels differ by at most one where not full."""
    levels = [0] * len(sizes)
    while count:
        room = [i for i, size in enumerate(sizes) if levels[i] < size]
        share = max(1, count // len(room))
        for i in room[:count]:
            added = min(share, sizes[i] - levels[i])
            levels[i] += added
            count -= added
    return levels


def content_digest(split: Split, indices: Iterable[int]) -> str:
    """Return the hex sha256 of the decoded pixels (shape, then bytes) at `indices`, in that order."""
    digest = hashlib.sha256()
    for index in indices:
        (image,) = split.load([index])
        digest.update(repr(image.shape).encode())
        digest.update(np.ascontiguousarray(image).tobytes())
    return digest.hexdigest()


def stratified(strata: Sequence[object], share: float, seed: int) -> NDArray[np.bool_]:
    """Mark a seeded `share` of every stratum (rounded to the nearest integer, halves to even).

    Args:
        strata: One key per sample; keys are compared by their `repr` order.
        share: In [0, 1].
        seed: Of PCG64.

    Returns:
        bool [n], true where the sample is chosen.
    """
    raw = np.random.PCG64(seed).random_raw(len(strata))
    names = np.array([repr(key) for key in strata])
    chosen = np.zeros(len(strata), dtype=bool)
    for name in np.unique(names):
        members = np.flatnonzero(names == name)
        chosen[members[np.argsort(raw[members], kind="stable")][: round(share * len(members))]] = True
    return chosen
