"""What this machine can do: packages, providers, GPU, disk, and one tiny real operation per runtime.

The result is data and nothing raises; `cli` prints it. An operation is checked against the same numbers in float64, so
that "imports" is never reported as "works".
"""

import importlib.metadata
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mpdeploy import runtimes
from mpdeploy.errors import MpdeployError

OK: Literal["ok"] = "ok"
MISSING: Literal["missing"] = "missing"
BROKEN: Literal["broken"] = "broken"
Status = Literal["ok", "missing", "broken"]

_CORE = "pip install mpdeploy"
_PACKAGES = {
    "numpy": _CORE,
    "scipy": _CORE,
    "pillow": _CORE,
    "pydantic": _CORE,
    "safetensors": _CORE,
    "onnx": _CORE,
    "typer": _CORE,
    "rich": _CORE,
    "jinja2": _CORE,
    "matplotlib": _CORE,
    "torch": "pip install 'mpdeploy[torch]'",
    "torchvision": "pip install 'mpdeploy[torch]'",
    "timm": "pip install 'mpdeploy[torch]'",
    "onnxscript": "pip install 'mpdeploy[torch]'",
    "nvidia-ml-py": "pip install 'mpdeploy[gpu]'",
}
_SPARE_BYTES = 2 * 10**9
"""A ViT-B bundle holds three float32 state dicts, four ONNX files and their engines: about 2 GB."""


@dataclass(frozen=True)
class Check:
    """One finding.

    Args:
        name: What was looked at.
        status: "ok", "missing" (can be had), or "broken" (is there and doesn't work).
        version: Version of a package, device or driver; empty where there is none.
        detail: What was found, in a sentence.
        hint: How to mend it.
        seconds: How long the check took.
    """

    name: str
    status: Status
    version: str = ""
    detail: str = ""
    hint: str = ""
    seconds: float = 0.0


def examine(folder: Path | None = None) -> list[Check]:
    """Every check, in the order in which a reader would ask; takes seconds, most of them importing torch.

    Args:
        folder: Where runs are to be kept; the working directory by default.
    """
    checks = [_guarded("python", _python), _guarded("mpdeploy", partial(_package, "mpdeploy", _CORE))]
    checks += [_guarded(name, partial(_package, name, hint)) for name, hint in _PACKAGES.items()]
    checks += [
        _guarded("onnxruntime", _onnxruntime),
        _guarded("tensorrt", partial(_runtime, "tensorrt")),
        _guarded("tensorrt_rtx", partial(_runtime, "tensorrt_rtx")),
        _guarded("GPU", _gpu),
        _guarded("CPU", _cpu),
        _guarded("disk", partial(_disk, folder or Path.cwd())),
        _guarded("torch: a 2:4 matrix product", _torch_product),
        _guarded("onnxruntime: a small network", _onnxruntime_network),
        _guarded("tensorrt_rtx: an engine for SM80", _rtx_engine),
    ]
    return checks


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    start = time.perf_counter()
    try:
        found = check()
    except ModuleNotFoundError as error:
        found = Check(name, MISSING, detail=f"{error}.", hint=_PACKAGES.get(error.name or "", _CORE))
    except MpdeployError as error:
        found = Check(name, MISSING if error.exit_code == 3 else BROKEN, detail=error.what, hint=error.hint)
    except Exception as error:  # noqa: BLE001  half-installed libraries raise anything; the finding is the result
        text = " ".join(str(error).split())[:300]
        found = Check(name, BROKEN, detail=f"{type(error).__name__}: {text}", hint="Reinstall the package it names.")
    return replace(found, name=name, seconds=time.perf_counter() - start)


def _python() -> Check:
    return Check("python", OK, platform.python_version(), f"{platform.system()} {platform.machine()}")


def _version(package: str) -> str:
    """The installed version by its metadata, without importing it; empty if it isn't installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _package(name: str, hint: str) -> Check:
    version = _version(name)
    return Check(name, OK, version) if version else Check(name, MISSING, detail="It is not installed.", hint=hint)


def _onnxruntime() -> Check:
    cpu, gpu = _version("onnxruntime"), _version("onnxruntime-gpu")
    if cpu and gpu:
        return Check(
            "onnxruntime",
            BROKEN,
            f"{cpu} and gpu {gpu}",
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files.",
            "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install 'mpdeploy[cpu]' or 'mpdeploy[gpu]'.",
        )
    return _runtime("onnxruntime")


def _runtime(name: str) -> Check:
    probe = runtimes.probe(name)
    version = probe.identity.get(name, "")
    about = ", ".join(f"{key}: {value}" for key, value in probe.identity.items() if key != name)
    detail = " ".join(part for part in (about, probe.why_not) if part)
    return Check(name, OK if probe.available else MISSING, version, detail, probe.hint)


def _gpu() -> Check:
    gpu = runtimes.find_gpu()
    if gpu is None:
        why = "No NVIDIA GPU answers: no driver, no device"
        why += "." if _version("nvidia-ml-py") else ", or no nvidia-ml-py to ask with."
        return Check(
            "GPU", MISSING, detail=why, hint="Engines can be built ahead of time for sm80 and sm86 all the same."
        )
    return Check("GPU", OK, gpu.driver, f"{gpu.name}, {gpu.sm}, {gpu.memory_bytes / 1e9:.0f} GB")


def _cpu() -> Check:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Check("CPU", OK, detail=f"{runtimes.cpu_name()}, {usable} usable of {os.cpu_count()} cores")


def _disk(folder: Path) -> Check:
    while not folder.exists():  # a store is made on the first run
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    detail = f"{free / 1e9:.1f} GB free in {folder}"
    if not os.access(folder, os.W_OK):
        return Check("disk", BROKEN, detail=f"{folder} can't be written to.", hint="Choose another folder.")
    if free < _SPARE_BYTES:
        hint = f"A ViT-B bundle takes about {_SPARE_BYTES / 1e9:.0f} GB; free some space or choose another folder."
        return Check("disk", BROKEN, detail=detail, hint=hint)
    return Check("disk", OK, detail=detail)


def _torch_product() -> Check:
    """Images times a 2:4 weight in torch against numpy in float64; on a GPU, the compressed one as well."""
    import torch

    rng = np.random.default_rng(0)
    weight = rng.standard_normal((64, 128)) * np.tile([1.0, 0.0, 0.0, 1.0], 32)
    images = rng.standard_normal((64, 128))
    expected = images @ weight.T
    got = torch.from_numpy(images).float() @ torch.from_numpy(weight).float().T
    _expect_close(got.numpy(), expected, 1e-4)
    version = str(torch.__version__)
    if not torch.cuda.is_available():
        return Check("torch", OK, version, "It agrees with float64 on the CPU; compressed 2:4 needs a GPU.")
    from torch.sparse import to_sparse_semi_structured

    dense = torch.from_numpy(weight).half().cuda()
    compressed = to_sparse_semi_structured(dense)
    product = torch.nn.functional.linear(torch.from_numpy(images).half().cuda(), compressed)
    _expect_close(product.float().cpu().numpy(), expected, 0.1)
    return Check("torch", OK, version, f"Compressed 2:4 agrees with float64 on {torch.cuda.get_device_name(0)}.")


def _onnxruntime_network() -> Check:
    """Builds a network with known logits through the same code as the pipeline, opens it and compares."""
    with tempfile.TemporaryDirectory(prefix="mpdeploy-doctor-") as scratch:
        request, folder, weight = _small_request(Path(scratch), "onnxruntime", "cpu", "fp32")
        manifest = runtimes.build(request, folder)
        images = np.random.default_rng(1).standard_normal((2, 4, 2, 2)).astype(np.float32)
        with runtimes.open_engine(folder) as session:
            _expect_close(session.run(images), images.reshape(2, 16).astype(np.float64) @ weight, 1e-4)
    return Check("onnxruntime", OK, manifest["versions"]["onnxruntime"], "It agrees with float64 on the CPU.")


def _rtx_engine() -> Check:
    """Parses and compiles a network for SM80; running it needs that GPU."""
    with tempfile.TemporaryDirectory(prefix="mpdeploy-doctor-") as scratch:
        request, folder, _ = _small_request(Path(scratch), "tensorrt_rtx", "sm80", "fp16")
        manifest = runtimes.build(request, folder)
    detail = f"{manifest['size']} bytes, {manifest['read_back']['layers']} layers parsed; not run."
    return Check("tensorrt_rtx", OK, manifest["versions"]["tensorrt_rtx"], detail)


def _small_request(
    scratch: Path, runtime: str, target: str, precision: str
) -> tuple[runtimes.EngineRequest, Path, NDArray[np.float64]]:
    """A request for an engine of the small network, an empty folder for it, and the network's weight."""
    from mpdeploy.runtimes.specimen import write_small_network

    folder = scratch / "engine"
    folder.mkdir()
    weight = write_small_network(scratch / "small.onnx", precision)
    batch = (1, 2, 4)
    request = runtimes.EngineRequest(scratch / "small.onnx", runtime, target, precision, "sparse", batch, threads=1)
    return request, folder, weight


def _expect_close(got: Any, expected: Any, tolerance: float) -> None:
    worst = float(np.abs(np.asarray(got, dtype=np.float64) - expected).max())
    if not worst <= tolerance:  # written so that NaN refuses
        raise ArithmeticError(f"The result is off by {worst}; expected at most {tolerance}.")
