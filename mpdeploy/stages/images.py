"""The images that stages share: which were drawn, loaded and preprocessed as the model wants them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mpdeploy.artifact import Artifact
from mpdeploy.data import Dataset, Split, content_digest, open_dataset
from mpdeploy.errors import CorruptArtifact
from mpdeploy.preprocessing import Preprocessing
from mpdeploy.recipe import Data

if TYPE_CHECKING:
    import torch

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Images:
    """A data set seen through one model's preprocessing.

    Attributes:
        dataset: where the images come from.
        preprocessing: what the model wants.
        draws: {"calibration" | "certification": indices into the training split}.
    """

    dataset: Dataset
    preprocessing: Preprocessing
    draws: dict[str, Indices]

    def batch(self, split: Split, indices: Sequence[int] | Indices) -> NDArray[np.float32]:
        """Return preprocessed images, float32 [n, C, H, W]."""
        return self.preprocessing.apply(split.load(np.asarray(indices, np.int64)))

    def drawn(self, name: str, size: int) -> Iterator[NDArray[np.float32]]:
        """Yield a draw in batches of at most `size`."""
        yield from self.batches(self.dataset.train, self.draws[name], size)

    def batches(self, split: Split, indices: Indices, size: int) -> Iterator[NDArray[np.float32]]:
        """Yield images in batches of at most `size`, in order."""
        for start in range(0, len(indices), size):
            yield self.batch(split, indices[start : start + size])

    def training(self) -> Indices:
        """Return the training images that tuning may use: all but the certification draw."""
        everything = np.arange(len(self.dataset.train.ids))
        return np.setdiff1d(everything, self.draws["certification"])


def open_images(data: Data, source: Artifact) -> Images:
    """Open the data again as the source stage saw it.

    Raises:
        CorruptArtifact: the drawn images are no longer the ones that were drawn.
    """
    dataset = open_dataset(data)
    record = source.json("calibration.json")
    draws = {name: np.array(record[f"{name}_indices"], np.int64) for name in ("calibration", "certification")}
    for name, indices in draws.items():
        if content_digest(dataset.train, indices) != record[f"{name}_content"]:
            raise CorruptArtifact(
                f"The {name} images of {dataset.name} changed since they were drawn.",
                hint="run again: the source stage notices the new data and draws anew.",
            )
    return Images(dataset, Preprocessing.from_json(source.json("preprocessing.json")), draws)


def logits_of(module: "torch.nn.Module", batches: Iterator[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Run a network in eval mode and float32, without gradients; returns [n, K]."""
    from mpdeploy.runtimes.torch_eager import TorchSession

    with TorchSession(module) as session:
        return np.concatenate([session.run(batch) for batch in batches])
