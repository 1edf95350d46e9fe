"""ONNX Runtime: the optimised graph is the engine.

What is saved is optimised to the level "extended": fused and quantised operators, which every build of ONNX Runtime for
the provider knows. The last level, "all", also re-orders convolution weights into blocks as wide as this CPU's vector
registers and, where the provider lacks fp16 kernels, folds fp16 weights back to fp32; such a file neither belongs on
another CPU nor shows the precision that was asked. So "all" is applied when an engine is opened, on the machine that
runs it; the logits are bit for bit those of a session optimised to "all" in one go (tested).
"""

import importlib
import importlib.metadata
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpdeploy.errors import RecipeError, StageFailed, Unavailable
from mpdeploy.runtimes import (
    EngineRequest,
    Probe,
    Session,
    checked_images,
    cpu_name,
    find_gpu,
    seconds_per_call,
    write_manifest,
)
from mpdeploy.runtimes.onnx_weights import ComputeWeight, compute_weights, histogram, tensor_type

FILE = "model.onnx"
SPARSITY_KEY = "mpdeploy.sparsity"
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_HINTS = {"cpu": "pip install 'mpdeploy[cpu]'", "cuda": "pip install 'mpdeploy[gpu]' on a machine with an NVIDIA GPU"}
_FATAL = 4
_ELEMENT = {"fp32": "FLOAT", "fp16": "FLOAT16"}


class OnnxSession(Session):
    """An ONNX file on ONNX Runtime, fully optimised, with one image input and one logits output.

    Args:
        path: Any ONNX file with one input and one output; an engine is opened with `mpdeploy.runtimes.open_engine`,
            which checks it first.
        target: "cpu" or "cuda".
        threads: Threads inside one operator.

    Attributes:
        input_size: channels, height, width; a name or None where the file leaves one open.
        fixed_batch: the batch that the file insists on, 0 where it takes any.

    Raises:
        Unavailable: ONNX Runtime or the provider is missing.
        StageFailed: The file doesn't load.
    """

    def __init__(self, path: Path, target: str = "cpu", threads: int = 1) -> None:
        library = _library()
        self._session: Any = _session(library, path, _provider(library, target), threads)
        self._input = self._session.get_inputs()[0].name
        batch, *size = self._session.get_inputs()[0].shape
        self.input_size: tuple[int | str | None, ...] = tuple(size)
        self.fixed_batch = batch if isinstance(batch, int) else 0
        self._output = self._session.get_outputs()[0].name

    def run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits [n, K] float32 of images [n, C, H, W] float32.

        Raises:
            StageFailed: The images don't fit, or the runtime fails.
        """
        return self._call(checked_images(images, self.input_size))

    def time(self, images: NDArray[np.float32], calls: int) -> NDArray[np.float64]:
        """Seconds of each of `calls` finished calls (transfers included), after a warm-up that is not counted."""
        ready = checked_images(images, self.input_size)
        return seconds_per_call(lambda: self._call(ready), calls)

    def close(self) -> None:
        """Frees the engine."""
        self._session = None

    def _call(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        if self._session is None:
            raise StageFailed("This ONNX Runtime session is closed.")
        try:
            logits: NDArray[np.float32] = self._session.run([self._output], {self._input: images})[0]
        except Exception as error:  # ONNX Runtime's exceptions share no base class but Exception
            raise StageFailed(f"ONNX Runtime failed on images {images.shape}: {_first_line(error)}.") from error
        return logits


def build(request: EngineRequest, out: Path) -> dict[str, Any]:
    """Optimises request.onnx into out/model.onnx, opens that file as a user would, and reads back what it is.

    Raises:
        RecipeError: ONNX Runtime has no such target.
        Unavailable: ONNX Runtime, the provider, or the provider's kernels for the precision are missing.
        StageFailed: The graph doesn't load, or the optimised file isn't what was asked.
    """
    library = _library()
    provider = _provider(library, request.target)
    path = out / FILE
    _session(library, request.onnx, provider, request.threads, save=path)
    session = _session(library, path, provider, request.threads)
    facts = _read_back(session, path)
    weights = compute_weights(path)
    _check_interface(session, request)
    _check_precision(weights, request)
    check_zeros(compute_weights(request.onnx), weights)
    facts |= _weight_facts(weights)
    identity = {"onnxruntime": str(library.__version__), "device": cpu_name()}
    asked = {
        "provider": provider,
        "precision": request.precision,
        "weights": request.weights,
        "saved_optimisation": "extended",
        "opened_optimisation": "all",
        "threads": request.threads,
    }
    return write_manifest(
        request, out, FILE, asked=asked, read_back=facts, versions=identity, notes=_notes(request, path, weights)
    )


def open_session(folder: Path, manifest: dict[str, Any]) -> OnnxSession:
    """Opens a built engine on the provider it was built for; the file's hash has been checked by `open_engine`.

    Raises:
        Unavailable: ONNX Runtime or the provider is missing, or this version can't read the file.
    """
    try:
        return OnnxSession(folder / manifest["file"], manifest["target"], int(manifest["threads"]))
    except StageFailed as error:
        built, here = manifest["versions"].get("onnxruntime", "unknown"), _library().__version__
        if built == here:
            raise
        raise Unavailable(
            f"The engine {manifest['id']} was built with ONNX Runtime {built}; version {here} here can't load it.",
            hint=f"pip install onnxruntime=={built}, or build the engine again.",
        ) from error


def probe(runtime: str) -> Probe:
    """Version, providers and device.

    Raises:
        Unavailable: ONNX Runtime can't be imported or is broken.
    """
    library = _library()
    gpu = find_gpu()
    identity = {
        "onnxruntime": str(library.__version__),
        "providers": ", ".join(library.get_available_providers()),
        "device": gpu.name if gpu and _PROVIDERS["cuda"] in library.get_available_providers() else cpu_name(),
    }
    return Probe(runtime, available=True, identity=identity)


def _library() -> Any:
    try:
        library = importlib.import_module("onnxruntime")
    except (ImportError, OSError) as error:
        raise Unavailable(f"ONNX Runtime can't be imported: {error}.", hint=_HINTS["cpu"]) from error
    if not hasattr(library, "get_available_providers"):
        raise Unavailable(
            "The installed onnxruntime is a ruin: it has no get_available_providers, which happens after onnxruntime "
            "and onnxruntime-gpu were both installed and one was removed.",
            hint="pip uninstall onnxruntime onnxruntime-gpu, then install one of them.",
        )
    return library


def _provider(library: Any, target: str) -> str:
    if target not in _PROVIDERS:
        raise RecipeError(
            f'ONNX Runtime has no target "{target}"; its targets are cpu and cuda.',
            hint='For "smXX" ask for the runtime tensorrt or tensorrt_rtx.',
        )
    provider = _PROVIDERS[target]
    if provider not in library.get_available_providers():
        raise Unavailable(
            f"ONNX Runtime {library.__version__} has no {provider} here; it has "
            f"{', '.join(library.get_available_providers())}.",
            hint=_HINTS[target],
        )
    return provider


def _session(library: Any, onnx: Path, provider: str, threads: int, save: Path | None = None) -> Any:
    """A session that really runs on `provider`; with `save`, optimised to "extended" and written there.

    Raises:
        StageFailed: The file doesn't load.
        Unavailable: The session was given other providers than the one asked for.
    """
    options = library.SessionOptions()
    options.log_severity_level = _FATAL  # an error is raised as well; its text goes into our sentence
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Idle threads that spin would take the cores from the twin in an interleaved measurement.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if provider != _PROVIDERS["cpu"]:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    level = library.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_EXTENDED if save else level.ORT_ENABLE_ALL
    if save:
        options.optimized_model_filepath = str(save)
    try:
        session = library.InferenceSession(str(onnx), options, providers=[provider])
    except Exception as error:  # ONNX Runtime's exceptions share no base class but Exception
        raise StageFailed(f"ONNX Runtime can't load {onnx.name} on {provider}: {_first_line(error)}.") from error
    check_providers(session.get_providers(), provider)
    return session


def check_providers(given: list[str], asked: str) -> None:
    """Refuses a session that fell back: ONNX Runtime drops a provider that fails to load without an error.

    Args:
        given: The session's providers. The CPU provider may follow another one: it is always appended.
        asked: The provider that was requested, alone.

    Raises:
        Unavailable: The first provider isn't the asked one, or there is one nobody asked for.
    """
    if given[:1] != [asked] or set(given) - {asked, _PROVIDERS["cpu"]}:
        raise Unavailable(
            f"ONNX Runtime was asked for {asked} and gave a session on {', '.join(given) or 'no provider'}.",
            hint="mpdeploy doctor shows what the provider lacks (driver, CUDA or cuDNN libraries).",
        )


def _read_back(session: Any, path: Path) -> dict[str, Any]:
    options = session.get_session_options()
    return {
        "providers": session.get_providers(),
        "threads": options.intra_op_num_threads,
        "spinning": options.get_session_config_entry("session.intra_op.allow_spinning") != "0",
        "inputs": [{"name": i.name, "dtype": tensor_type(i.type), "shape": i.shape} for i in session.get_inputs()],
        "outputs": [{"name": o.name, "dtype": tensor_type(o.type), "shape": o.shape} for o in session.get_outputs()],
        "operators": histogram(path),
        "bytes": path.stat().st_size,
    }


def _weight_facts(weights: list[ComputeWeight]) -> dict[str, Any]:
    return {
        "weights_stored": dict(sorted(Counter(weight.stored for weight in weights).items())),
        "weights_computed": dict(sorted(Counter(weight.computed for weight in weights).items())),
        "zero_share": sum(w.zeros for w in weights) / sum(w.elements for w in weights),
    }


def _check_interface(session: Any, request: EngineRequest) -> None:
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1 or len(outputs) != 1 or inputs[0].type != "tensor(float)" or outputs[0].type != "tensor(float)":
        raise StageFailed(
            f"{request.onnx.name} should have one float32 input and one float32 output; it has "
            f"{[(i.name, i.type) for i in inputs]} and {[(o.name, o.type) for o in outputs]}."
        )
    size = inputs[0].shape
    if len(size) != 4 or not all(isinstance(edge, int) for edge in size[1:]):
        raise StageFailed(f"{request.onnx.name} should take images [batch, C, H, W] of a fixed size, not {size}.")
    if isinstance(size[0], int) and set(request.batch) != {size[0]}:
        raise StageFailed(
            f"{request.onnx.name} has a fixed batch of {size[0]}; the engine was asked for {request.batch}."
        )


def _check_precision(weights: list[ComputeWeight], request: EngineRequest) -> None:
    """Built precision equals asked precision, else an error: a wish that was dropped must not look granted."""
    if not weights:
        raise StageFailed(f"{request.onnx.name} has no Conv, MatMul or Gemm with constant weights to deploy.")
    stored = Counter(weight.stored for weight in weights)
    if request.precision == "int8":
        if not stored["INT8"] + stored["UINT8"]:
            raise StageFailed(f"An int8 engine was asked for, but {request.onnx.name} has weights in {_words(stored)}.")
        return
    element = _ELEMENT[request.precision]
    if set(stored) != {element}:
        raise StageFailed(
            f"A {request.precision} engine was asked for, but {request.onnx.name} has weights in {_words(stored)}."
        )
    computed = Counter(weight.computed for weight in weights)
    if set(computed) != {element}:
        operators = sorted({weight.op for weight in weights if weight.computed != element})
        raise Unavailable(
            f"ONNX Runtime's provider for {request.target} has no {request.precision} kernel for "
            f"{', '.join(operators)} here: it would cast the {element} weights and compute in {_words(computed)}.",
            hint="Ask for fp32 or int8 on this target; fp16 belongs on a GPU.",
        )


def check_zeros(before: list[ComputeWeight], after: list[ComputeWeight]) -> None:
    """Refuses an optimised graph that lost zeros of the weights it was made from.

    Raises:
        StageFailed: Fewer zeros than before; the pruned pattern can't have survived whole.
    """
    had, has = sum(weight.zeros for weight in before), sum(weight.zeros for weight in after)
    if has < had:
        raise StageFailed(f"ONNX Runtime's optimiser left {has} of {had} zero weights; expected all of them.")


def _notes(request: EngineRequest, path: Path, weights: list[ComputeWeight]) -> list[str]:
    import onnx

    notes = [
        "The file is optimised to the level extended and fits any machine with this provider; the level all, whose "
        "layouts belong to one CPU model, is applied when the engine is opened."
    ]
    if request.target == "cpu" and request.weights == "sparse":
        notes.append("ONNX Runtime's CPU provider has no sparse kernels: the zeros save no time here.")
    if request.precision == "int8":
        integer = sum(weight.computed != "FLOAT" for weight in weights)
        notes.append(
            f"{integer} of {len(weights)} weighted operators compute in int8; the others dequantise their weights."
        )
    before, after = (
        {p.key: p.value for p in onnx.load(file, load_external_data=False).metadata_props}
        for file in (request.onnx, path)
    )
    if SPARSITY_KEY in before and before[SPARSITY_KEY] != after.get(SPARSITY_KEY):
        notes.append(f"The metadata {SPARSITY_KEY} of {request.onnx.name} did not survive ONNX Runtime's optimiser.")
    return notes


def _words(counts: Counter[str]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300].rstrip(".") if str(error).strip() else type(error).__name__
