"""Engines behind one small protocol: build one from an ONNX file, open one, run it, time it.

    request = EngineRequest(Path("model.onnx"), "onnxruntime", "cpu", "fp32", "sparse", (1, 8, 64), threads=1)
    manifest = build(request, folder)              # writes the engine file and folder/engine.json
    with open_engine(folder) as session:           # hash, version and device are checked before anything is loaded
        logits = session.run(images)

Importing this package imports no runtime library: each module below loads its own inside functions, so that a machine
without TensorRT can still read the manifests of TensorRT engines.
"""

import importlib
import json
import platform
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from mpdeploy.artifact import sha256_of
from mpdeploy.errors import CorruptArtifact, MpdeployError, RecipeError, StageFailed, Unavailable

RUNTIMES = ("onnxruntime", "tensorrt", "tensorrt_rtx", "torch")
PRECISIONS = ("fp32", "fp16", "int8")
WEIGHTS = ("sparse", "dense")
MANIFEST = "engine.json"
WARM_UP_CALLS = 2
"""Calls before the timed ones: the first fills caches and allocates, the second is the first ordinary one."""

_MODULES = {
    "onnxruntime": "mpdeploy.runtimes.onnxruntime",
    "tensorrt": "mpdeploy.runtimes.tensorrt",
    "tensorrt_rtx": "mpdeploy.runtimes.tensorrt",
    "torch": "mpdeploy.runtimes.torch_eager",
}


@dataclass(frozen=True)
class Probe:
    """What one runtime can do on this machine.

    Args:
        name: One of `RUNTIMES`.
        available: The library imports and can build (or, for torch, run).
        identity: Versions and device, for provenance.
        why_not: One sentence where something is missing, even if `available` (for example: builds, but cannot run).
        hint: How to get what is missing.
    """

    name: str
    available: bool
    identity: dict[str, str]
    why_not: str = ""
    hint: str = ""


@dataclass(frozen=True)
class Gpu:
    """The first NVIDIA GPU as its driver describes it."""

    name: str
    compute_capability: tuple[int, int]
    memory_bytes: int
    driver: str

    @property
    def sm(self) -> str:
        """Architecture in TensorRT's spelling: "sm80"."""
        return f"sm{self.compute_capability[0]}{self.compute_capability[1]}"


class Session(ABC):
    """An engine that is loaded and can answer; leaving its `with` block frees it."""

    @abstractmethod
    def run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits [n, K] float32 of images [n, C, H, W] float32."""

    @abstractmethod
    def time(self, images: NDArray[np.float32], calls: int) -> NDArray[np.float64]:
        """Seconds of each of `calls` finished calls on the same images, after calls that are not counted."""

    @abstractmethod
    def close(self) -> None:
        """Frees the engine; a closed session can't run."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class EngineRequest:
    """What is asked of a runtime.

    Args:
        onnx: The graph. It already has the asked precision: fp16 weights, or Q/DQ nodes for int8.
        runtime: One of "onnxruntime", "tensorrt", "tensorrt_rtx".
        target: "cpu", "cuda" (ONNX Runtime on this machine's GPU), "current" (this machine's GPU), or "smXX".
        precision: "fp32", "fp16" or "int8"; what was built is compared with it.
        weights: "sparse" allows sparse kernels; "dense" is the twin that every speed-up is measured against.
        batch: Smallest, usual and largest batch.
        threads: CPU threads inside one operator.
        exported: The exported file that `onnx` was quantised from, None where it is that file itself.

    Raises:
        RecipeError: A field has a value that no runtime knows.
    """

    onnx: Path
    runtime: str
    target: str
    precision: str
    weights: str
    batch: tuple[int, int, int]
    threads: int
    exported: Path | None = None

    def __post_init__(self) -> None:
        _one_of("runtime", self.runtime, RUNTIMES)
        _one_of("precision", self.precision, PRECISIONS)
        _one_of("weights", self.weights, WEIGHTS)
        if self.runtime == "torch":
            raise RecipeError(
                'The runtime "torch" is the dense reference: it runs a module and builds no engine.',
                hint='Ask for "onnxruntime", "tensorrt" or "tensorrt_rtx".',
            )
        smallest, usual, largest = self.batch
        if not 1 <= smallest <= usual <= largest:
            raise RecipeError(f"An engine's batch is (min, opt, max) with 1 <= min <= opt <= max, not {self.batch}.")
        if self.threads < 1:
            raise RecipeError(f"An engine needs at least one thread, not {self.threads}.")

    @property
    def source(self) -> dict[str, str]:
        """Digests of the files it is built from: the exported one and, where it was quantised, what came of that."""
        exported = self.exported or self.onnx
        source = {"file": exported.name, "onnx": sha256_of(exported)}
        return source if self.exported is None else {**source, "quantised": sha256_of(self.onnx)}

    @property
    def id(self) -> str:
        """Folder name of the engine in the bundle: "onnxruntime-cpu-int8", and ".dense" for the dense twin."""
        twin = ".dense" if self.weights == "dense" else ""
        return f"{self.runtime}-{self.target}-{self.precision}{twin}"


def build(request: EngineRequest, out: Path) -> dict[str, Any]:
    """Builds one engine, reads back what was built and writes the engine's manifest beside it.

    Args:
        request: What is asked.
        out: An existing folder without an engine; receives the engine file and engine.json.

    Returns:
        The manifest, as written to out/engine.json.

    Raises:
        Unavailable: The library, provider, device or target is not to be had here.
        StageFailed: The graph can't be built, or what was built isn't what was asked.
    """
    if not request.onnx.is_file():
        raise StageFailed(
            f"There is no ONNX file {request.onnx.name} in {request.onnx.parent} to build an engine from."
        )
    if not out.is_dir() or (out / MANIFEST).exists():
        raise StageFailed(f"An engine is built into an existing folder without another engine, which {out} is not.")
    manifest: dict[str, Any] = _module(request.runtime).build(request, out)
    return manifest


def open_engine(folder: Path) -> Session:
    """Loads a built engine after checking that it is whole and belongs on this machine.

    Args:
        folder: The engine's folder: engine.json and the file it names.

    Raises:
        CorruptArtifact: The manifest can't be read, or the file isn't the one that was built.
        Unavailable: The engine needs another library version, another GPU, or a driver.
    """
    manifest = read_manifest(folder)
    session: Session = _module(manifest["runtime"]).open_session(folder, manifest)
    return session


def probe(runtime: str) -> Probe:
    """What `runtime` can do here. Never raises for a missing or broken library: that is the answer.

    Raises:
        RecipeError: There is no runtime of that name.
    """
    _one_of("runtime", runtime, RUNTIMES)
    try:
        result: Probe = _module(runtime).probe(runtime)
    except MpdeployError as error:
        return Probe(runtime, available=False, identity={}, why_not=error.what, hint=error.hint)
    except Exception as error:  # noqa: BLE001  a half-installed library can raise anything; doctor has to survive it
        why = f"The runtime {runtime} broke while it was examined: {type(error).__name__}: {error}."
        return Probe(runtime, available=False, identity={}, why_not=why, hint="Reinstall its package.")
    return result


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an engine whose file has been hashed and found to be the one that was built.

    Raises:
        CorruptArtifact: The manifest is missing or no manifest, or the file's size or SHA-256 differs.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorruptArtifact(f"The engine manifest {path} can't be read: {error}.") from error
    needed = {"schema", "id", "runtime", "target", "precision", "file", "sha256", "batch", "threads", "versions"}
    if not isinstance(manifest, dict) or not needed <= manifest.keys() or manifest["schema"] != 1:
        raise CorruptArtifact(f"{path} is not an engine manifest of schema 1.")
    if manifest["runtime"] not in _MODULES or Path(manifest["file"]).name != manifest["file"]:
        raise CorruptArtifact(f"{path} names a runtime or a file that no engine manifest can name.")
    file = folder / manifest["file"]
    if not file.is_file():
        raise CorruptArtifact(f"The engine file {file} is missing; {MANIFEST} names it.")
    if (digest := sha256_of(file)) != manifest["sha256"]:
        raise CorruptArtifact(
            f"The engine file {file} is not the one that was built: its SHA-256 is {digest[:12]}..., "
            f"its manifest says {str(manifest['sha256'])[:12]}....",
            hint="Copy the bundle again, or rebuild the engine.",
        )
    return manifest


def write_manifest(
    request: EngineRequest,
    out: Path,
    file: str,
    *,
    asked: Mapping[str, Any],
    read_back: Mapping[str, Any],
    versions: Mapping[str, str],
    why_not: str = "",
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Writes out/engine.json for the engine file `file`; `why_not` says why it can't run here, empty if it can."""
    path = out / file
    manifest = {
        "schema": 1,
        "id": request.id,
        "runtime": request.runtime,
        "target": request.target,
        "precision": request.precision,
        "weights": request.weights,
        "source": request.source,
        "file": file,
        "sha256": sha256_of(path),
        "size": path.stat().st_size,
        "asked": dict(asked),
        "read_back": dict(read_back),
        "versions": dict(versions),
        "batch": list(request.batch),
        "threads": request.threads,
        "runnable_here": not why_not,
        "why_not": why_not,
        "notes": list(notes),
    }
    text = json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False)
    (out / MANIFEST).write_text(text + "\n", encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def checked_images(images: NDArray[np.float32], input_size: Sequence[int | str | None]) -> NDArray[np.float32]:
    """`images` in C order, after checking that they are float32 [n, C, H, W] with n > 0 and the engine's C, H, W.

    A size that is no number (a name, or nothing) is one that the engine leaves open.

    Raises:
        StageFailed: They are not; a runtime's own complaint would not name both sides.
    """
    if (
        images.dtype != np.float32
        or images.ndim != 4
        or len(input_size) != 3
        or any(isinstance(own, int) and own != n for own, n in zip(input_size, images.shape[1:], strict=True))
        or not len(images)
    ):
        expected = ", ".join(str(size) for size in input_size)
        raise StageFailed(f"The engine takes float32 images [n > 0, {expected}], not {images.dtype} {images.shape}.")
    return np.ascontiguousarray(images)


def seconds_per_call(call: Callable[[], object], calls: int) -> NDArray[np.float64]:
    """Wall-clock seconds of each of `calls` calls, float64 [calls], after `WARM_UP_CALLS` that are not counted.

    Raises:
        StageFailed: `calls` is not positive; an empty measurement is no measurement.
    """
    if calls < 1:
        raise StageFailed(f"Timing needs at least one call, not {calls}.")
    for _ in range(WARM_UP_CALLS):
        call()
    seconds = np.empty(calls, dtype=np.float64)
    for index in range(calls):
        start = time.perf_counter()
        call()
        seconds[index] = time.perf_counter() - start
    return seconds


def find_gpu() -> Gpu | None:
    """The first NVIDIA GPU, read through the driver's management library; None without package, driver or GPU."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(0)
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
        memory = int(nvml.nvmlDeviceGetMemoryInfo(handle).total)
        name, driver = nvml.nvmlDeviceGetName(handle), nvml.nvmlSystemGetDriverVersion()
        return Gpu(_text(name), (int(major), int(minor)), memory, _text(driver))
    except nvml.NVMLError:
        return None
    finally:
        nvml.nvmlShutdown()


def cpu_name() -> str:
    """The processor's name as the kernel gives it, else as Python does."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value  # nvidia-ml-py before 11.5 returned bytes


def _module(runtime: str) -> ModuleType:
    try:
        return importlib.import_module(_MODULES[runtime])
    except ImportError as error:
        raise Unavailable(f"The runtime {runtime} can't be loaded: {error}.") from error


def _one_of(field: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        near = get_close_matches(value, allowed, n=1)
        meant = f' Did you mean "{near[0]}"?' if near else ""
        raise RecipeError(f'An engine has no {field} "{value}"; there are {", ".join(allowed)}.{meant}')
