"""The dense reference: a torch module behind the session protocol. It builds nothing."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mpdeploy.errors import StageFailed, Unavailable
from mpdeploy.runtimes import EngineRequest, Probe, Session, cpu_name, seconds_per_call

if TYPE_CHECKING:
    from torch import nn

_HINT = "pip install 'mpdeploy[torch]'"


class TorchSession(Session):
    """Runs a module eagerly on the device its parameters live on.

    Args:
        module: Takes images [n, C, H, W] and returns logits [n, K]; put into eval mode.
    """

    def __init__(self, module: "nn.Module") -> None:
        self._module: nn.Module | None = module.eval()

    def run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits [n, K] float32 of images [n, C, H, W] float32."""
        import torch

        if self._module is None:
            raise StageFailed("This torch session is closed.")
        device = next((parameter.device for parameter in self._module.parameters()), torch.device("cpu"))
        with torch.inference_mode():
            # .cpu() waits for the device, so a timed call is a finished one.
            logits = self._module(torch.from_numpy(np.ascontiguousarray(images)).to(device)).float().cpu()
        result: NDArray[np.float32] = logits.numpy()
        return result

    def time(self, images: NDArray[np.float32], calls: int) -> NDArray[np.float64]:
        """Seconds of each of `calls` finished calls, transfers included, after a warm-up that is not counted."""
        return seconds_per_call(lambda: self.run(images), calls)

    def close(self) -> None:
        """Lets go of the module."""
        self._module = None


def build(request: EngineRequest, out: Path) -> dict[str, Any]:
    """Always refuses: eager torch is a reference, not an engine."""
    raise StageFailed(f"Eager torch builds no engine ({request.id} into {out}).")


def open_session(folder: Path, manifest: dict[str, Any]) -> TorchSession:
    """Always refuses: there is no torch engine to open."""
    raise StageFailed(f"{folder} holds no engine that eager torch could open ({manifest['id']}).")


def probe(runtime: str) -> Probe:
    """Versions and device of torch.

    Raises:
        Unavailable: torch can't be imported.
    """
    try:
        import torch
    except (ImportError, OSError) as error:
        raise Unavailable(f"torch can't be imported: {error}.", hint=_HINT) from error
    identity = {"torch": str(torch.__version__), "device": cpu_name()}
    if torch.cuda.is_available():
        identity["device"] = torch.cuda.get_device_name(0)
    return Probe(runtime, available=True, identity=identity)
