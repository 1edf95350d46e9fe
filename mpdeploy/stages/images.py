"""The images that stages share: which were drawn, loaded and preprocessed as the model wants them."""

import contextlib
import copy
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

    from mpdeploy.certify.program import Program

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


def exact_logits(module: "torch.nn.Module", images: NDArray[np.float32]) -> NDArray[np.float64]:
    """Run a copy of a network in eval mode and float64; returns [n, K]."""
    import torch

    with torch.inference_mode():
        logits = copy.deepcopy(module).cpu().double().eval()(torch.from_numpy(images).double())
    result: NDArray[np.float64] = logits.numpy()
    return result


def exact_logits_of_graph(program: "Program", images: NDArray[np.float32]) -> NDArray[np.float64]:
    """Run an exported graph in float64; returns [n, K]."""
    import torch

    from mpdeploy.certify.program import run

    with torch.inference_mode():
        logits = run(program, torch.from_numpy(images), dtype=torch.float64)[program.output]
    result: NDArray[np.float64] = logits.numpy()
    return result


@contextlib.contextmanager
def strict_float32() -> Iterator[None]:
    """Let no library compute float32 products in fewer bits (TF32, bf16x3) within the block."""
    import torch

    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = cudnn
