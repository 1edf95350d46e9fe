"""Labelled images: ImageNet-style folders, .npz files and sets that packages ship; read without torch.

Training and validation stay two objects from the first line on, so that calibration can't reach a validation image
by an index alone.
"""

from typing import TYPE_CHECKING

from mpdeploy.data.files import open_folder, open_npz
from mpdeploy.data.packaged import open_packaged
from mpdeploy.data.splits import Dataset, Split, content_digest, draw

if TYPE_CHECKING:
    from mpdeploy.recipe import Data

__all__ = ["Dataset", "Split", "content_digest", "draw", "open_dataset"]


def open_dataset(spec: "Data") -> Dataset:
    """Open what the recipe's table `data` names; images are decoded later, when they are asked for.

    Raises:
        RecipeError: a file is missing or wrong, a split is empty, a class has no image, a label is out of range.
        Unavailable: the package that holds the set is not installed.
    """
    if spec.kind == "npz":
        return open_npz(spec.path)
    if spec.kind == "folder":
        return open_folder(spec.path)
    return open_packaged(spec.name, spec.path)
