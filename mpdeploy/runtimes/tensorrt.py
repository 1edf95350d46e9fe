"""TensorRT 10.12 and newer, TensorRT 11, and TensorRT-RTX: one module, the library's name is a parameter.

Only the part of the builder API that all three share is used. Networks are strongly typed: precision is what the ONNX
graph says (TensorRT 11 has no other way), so it is checked in the parsed network and never set by a flag. TensorRT-RTX
compiles ahead of time for SM80, SM86, ... on a machine with no GPU; TensorRT builds only for the GPU it sees.
"""

import importlib
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpdeploy.errors import RecipeError, StageFailed, Unavailable
from mpdeploy.runtimes import (
    EngineRequest,
    Gpu,
    Probe,
    Session,
    checked_images,
    find_gpu,
    seconds_per_call,
    write_manifest,
)
from mpdeploy.runtimes.tensorrt_log import errors_of, log_facts, logger_of, text_of
from mpdeploy.runtimes.tensorrt_network import check_precision, network_facts

FILE = "model.engine"
LOG = "build.log"
_HINTS = {
    "tensorrt": "pip install 'mpdeploy[tensorrt]' on a machine with an NVIDIA GPU and driver",
    "tensorrt_rtx": "pip install 'mpdeploy[cpu]' on Linux x86-64",
}
_TITLES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}


class TensorRTSession(Session):
    """A deserialised engine with one image input and one logits output, on the current GPU.

    The device buffers are torch tensors. No machine with a GPU was at hand when this was written: the class is checked
    only by tests marked gpu.
    """

    def __init__(self, library: Any, engine: Any, batch: tuple[int, int, int]) -> None:
        self._library = library
        self._engine = engine
        self._context: Any = engine.create_execution_context()
        if self._context is None:
            raise StageFailed("TensorRT made no execution context for the engine; the GPU may be out of memory.")
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == library.TensorIOMode.INPUT]
        outputs = [name for name in names if name not in inputs]
        if len(inputs) != 1 or len(outputs) != 1:
            raise StageFailed(f"The engine should have one input and one output; it has {inputs} and {outputs}.")
        for name in names:
            if engine.get_tensor_dtype(name) != library.float32:
                raise StageFailed(f"The engine's tensor {name} is {engine.get_tensor_dtype(name)}; expected float32.")
        self._input, self._output = inputs[0], outputs[0]
        self._size = tuple(engine.get_tensor_shape(self._input))[1:]
        self._batch = batch

    def run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits [n, K] float32 of images [n, C, H, W] float32, n within the engine's profile.

        Raises:
            StageFailed: The images don't fit the profile, or the GPU fails.
        """
        output, execute = self._bind(images)
        execute()
        result: NDArray[np.float32] = output.cpu().numpy()
        return result

    def time(self, images: NDArray[np.float32], calls: int) -> NDArray[np.float64]:
        """Seconds of each of `calls` finished calls, after a warm-up that is not counted.

        Images and logits stay on the GPU: transfers are not part of the time. A call ends when its stream is idle.
        """
        _, execute = self._bind(images)
        return seconds_per_call(execute, calls)

    def close(self) -> None:
        """Frees context and engine, in this order."""
        self._context = None
        self._engine = None

    def _bind(self, images: NDArray[np.float32]) -> tuple[Any, Any]:
        """The output tensor on the GPU, and a function that computes it once and waits."""
        import torch

        if self._context is None:
            raise StageFailed("This TensorRT session is closed.")
        ready = checked_images(images, self._size)
        smallest, _, largest = self._batch
        if not smallest <= len(ready) <= largest:
            raise StageFailed(f"The engine was built for batches of {smallest} to {largest}, not {len(ready)}.")
        source = torch.from_numpy(ready).cuda()
        if not self._context.set_input_shape(self._input, tuple(source.shape)):
            raise StageFailed(f"TensorRT refuses the input shape {tuple(source.shape)}.")
        shape = tuple(self._context.get_tensor_shape(self._output))
        # NaN, not zeros: an execution that writes nothing must not look like an answer.
        output = torch.full(shape, float("nan"), dtype=torch.float32, device="cuda")
        self._context.set_tensor_address(self._input, source.data_ptr())
        self._context.set_tensor_address(self._output, output.data_ptr())
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())

        def execute(_keep: Any = source) -> None:
            if not self._context.execute_async_v3(stream.cuda_stream):
                raise StageFailed(f"TensorRT could not execute the engine on images {ready.shape}.")
            stream.synchronize()

        return output, execute


def build(request: EngineRequest, out: Path) -> dict[str, Any]:
    """Parses request.onnx, builds an engine into out/model.engine and writes the whole log to out/build.log.

    Raises:
        RecipeError: The target is none that the library could ever have.
        Unavailable: The library, its driver or the target is not to be had here.
        StageFailed: The graph doesn't parse or build, or has another precision than asked.
    """
    library = load_library(request.runtime)
    target = _target(library, request)
    logger = logger_of(library, request.runtime)
    logger.lines = []
    builder = make_builder(library, request.runtime, logger)
    network, parser = _parse(library, builder, logger, request)
    facts = network_facts(library, network)
    check_precision(facts, request)
    config = _config(library, builder, request, target)
    facts |= _config_facts(library, config, request) | {"profile": _profile(builder, config, network, request)}
    serialized = builder.build_serialized_network(network, config)
    del parser  # it owns the weights that the network points to, so it has to outlive the build
    if serialized is None:
        raise StageFailed(
            f"{_TITLES[request.runtime]} built no engine for {request.id} from {request.onnx.name}: {errors_of(logger)}"
        )
    (out / FILE).write_bytes(memoryview(serialized))
    log = text_of(logger, request.onnx)
    (out / LOG).write_text(log, encoding="utf-8")
    facts |= {"bytes": (out / FILE).stat().st_size} | log_facts(log)
    asked = {
        "compute_capability": target.name if target is not None else "CURRENT",
        "precision": request.precision,
        "sparse_weights": request.weights == "sparse",
        "tf32": False,
        "profile": list(request.batch),
        "strongly_typed": True,
    }
    gpu = find_gpu()
    return write_manifest(
        request,
        out,
        FILE,
        asked=asked,
        read_back=facts,
        versions={request.runtime: str(library.__version__)} | ({"gpu": gpu.name, "driver": gpu.driver} if gpu else {}),
        why_not=_why_not(facts["compute_capability"], gpu),
        notes=_notes(request, facts),
    )


def open_session(folder: Path, manifest: dict[str, Any]) -> TensorRTSession:
    """Deserialises an engine after refusing, in one sentence, a machine it can't run on.

    Raises:
        Unavailable: Another library version, no driver, another compute capability, or no torch with CUDA.
        StageFailed: The library refuses the engine all the same.
    """
    runtime = manifest["runtime"]
    library = load_library(runtime)
    built = manifest["versions"].get(runtime, "an unknown version")
    if built != str(library.__version__):
        raise Unavailable(
            f"The engine {manifest['id']} was built with {_TITLES[runtime]} {built}; here is {library.__version__}, "
            f"and an engine runs only in the version that built it.",
            hint="Install that version, or build the engine again.",
        )
    if why_not := _why_not(manifest["read_back"]["compute_capability"], find_gpu()):
        raise Unavailable(f"The engine {manifest['id']} can't run here: {why_not}", hint="Open it on its target GPU.")
    _require_torch_cuda(manifest["id"])
    logger = logger_of(library, runtime)
    logger.lines = []
    engine = library.Runtime(logger).deserialize_cuda_engine((folder / manifest["file"]).read_bytes())
    if engine is None:
        raise StageFailed(f"{_TITLES[runtime]} refuses the engine {manifest['id']}: {errors_of(logger)}")
    smallest, usual, largest = manifest["batch"]
    return TensorRTSession(library, engine, (smallest, usual, largest))


def probe(runtime: str) -> Probe:
    """Whether an engine can be built and run here.

    Raises:
        Unavailable: The library is missing, or there is no builder without a driver.
    """
    library = load_library(runtime)
    gpu = find_gpu()
    if runtime == "tensorrt" and gpu is None:
        raise Unavailable("TensorRT builds only for a GPU it sees, and there is none here.", hint=_HINTS[runtime])
    make_builder(library, runtime, logger_of(library, runtime))
    identity = {runtime: str(library.__version__)}
    if gpu is None:
        why = f"{_TITLES[runtime]} builds ahead of time here; running an engine needs an NVIDIA GPU and driver."
        return Probe(runtime, available=True, identity=identity, why_not=why, hint="Open the engines on their target.")
    return Probe(runtime, available=True, identity=identity | {"device": gpu.name, "driver": gpu.driver})


def load_library(runtime: str) -> Any:
    """The module `tensorrt` or `tensorrt_rtx`.

    Raises:
        Unavailable: It can't be imported, or is older than strongly typed networks (10.12).
    """
    try:
        library = importlib.import_module(runtime)
    except (ImportError, OSError) as error:
        raise Unavailable(f"{_TITLES[runtime]} can't be imported: {error}.", hint=_HINTS[runtime]) from error
    if runtime == "tensorrt" and _version(library) < (10, 12):
        raise Unavailable(f"TensorRT {library.__version__} is too old; expected 10.12 or newer.", hint=_HINTS[runtime])
    return library


def make_builder(library: Any, runtime: str, logger: Any) -> Any:
    """A builder.

    Raises:
        Unavailable: The library has none to give, which is how a missing driver shows (a TypeError from its bindings).
    """
    try:
        return library.Builder(logger)
    except TypeError as error:
        raise Unavailable(
            f"{_TITLES[runtime]} {library.__version__} gives no builder here, as it does without a GPU driver: "
            f"{errors_of(logger)}",
            hint=_HINTS[runtime],
        ) from error


def _target(library: Any, request: EngineRequest) -> Any:
    """The library's ComputeCapability member to compile for; None: the GPU in this machine, by default."""
    match = re.fullmatch(r"sm(\d{2,3})", request.target)
    if request.target != "current" and match is None:
        raise RecipeError(
            f'{_TITLES[request.runtime]} has no target "{request.target}"; expected "current" or "smXX", as in "sm80".'
        )
    gpu = find_gpu()
    if request.runtime == "tensorrt":
        if gpu is None or request.target not in ("current", gpu.sm):
            here = f"is a {gpu.name} ({gpu.sm})" if gpu else "has no NVIDIA GPU"
            raise Unavailable(
                f"TensorRT builds only for the GPU in the machine; {request.target} was asked and this machine {here}.",
                hint="Build there, or ask for the runtime tensorrt_rtx, which compiles ahead of time.",
            )
        return None
    if request.target == "current":
        if gpu is None:
            raise Unavailable(
                "TensorRT-RTX was asked to build for the current GPU, and this machine has none.",
                hint='Name a target instead, as in "sm80".',
            )
        return library.ComputeCapability.CURRENT
    known = sorted(name for name in dir(library.ComputeCapability) if re.fullmatch(r"SM\d+", name))
    if request.target.upper() not in known:
        raise Unavailable(
            f"TensorRT-RTX {library.__version__} has no target {request.target.upper()}; it compiles for "
            f"{', '.join(known)} (SM90, the H100 and H200, is not among them).",
            hint="Choose one of these, or build with the runtime tensorrt on the GPU itself.",
        )
    return getattr(library.ComputeCapability, request.target.upper())


def _parse(library: Any, builder: Any, logger: Any, request: EngineRequest) -> tuple[Any, Any]:
    flag = getattr(library.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = library.OnnxParser(network, logger)
    if not parser.parse_from_file(str(request.onnx)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        told = [f"{e.node_name() or 'the file'} ({e.node_operator() or 'no operator'}): {e.desc()}" for e in errors]
        raise StageFailed(
            f"{_TITLES[request.runtime]} can't parse {request.onnx.name}: {'; '.join(told) or errors_of(logger)}"
        )
    if network.num_inputs != 1 or network.num_outputs != 1:
        raise StageFailed(
            f"{request.onnx.name} should have one input and one output; it has {network.num_inputs} and "
            f"{network.num_outputs}."
        )
    return network, parser


def _config(library: Any, builder: Any, request: EngineRequest, target: Any) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = library.ProfilingVerbosity.DETAILED
    # On by default, and then fp32 products have 10 bits of mantissa: what is called fp32 here is fp32.
    config.clear_flag(library.BuilderFlag.TF32)
    if request.weights == "sparse":
        config.set_flag(library.BuilderFlag.SPARSE_WEIGHTS)
    if target is not None:
        config.num_compute_capabilities = 1
        if not config.set_compute_capability(target, 0):
            raise Unavailable(f"{_TITLES[request.runtime]} refuses the target {target.name}.")
    return config


def _profile(builder: Any, config: Any, network: Any, request: EngineRequest) -> list[int]:
    """Gives the engine one profile on the batch axis, and returns the batches that the library keeps.

    Raises:
        StageFailed: The graph's size isn't fixed but for the batch, or its fixed batch isn't the asked one.
    """
    source = network.get_input(0)
    size = tuple(source.shape)[1:]
    if len(size) != 3 or min(size) < 1:
        raise StageFailed(
            f"{request.onnx.name} should take [batch, C, H, W] of a fixed size, not {tuple(source.shape)}."
        )
    if source.shape[0] != -1:
        if set(request.batch) != {source.shape[0]}:
            raise StageFailed(
                f"{request.onnx.name} has a fixed batch of {source.shape[0]}; the engine was asked for {request.batch}."
            )
        return [int(source.shape[0])] * 3
    profile = builder.create_optimization_profile()
    profile.set_shape(source.name, *((count, *size) for count in request.batch))
    kept = [int(shape[0]) for shape in profile.get_shape(source.name)]
    if config.add_optimization_profile(profile) != 0 or kept != list(request.batch):
        raise StageFailed(f"{_TITLES[request.runtime]} keeps the batch profile {kept}; asked was {request.batch}.")
    return kept


def _config_facts(library: Any, config: Any, request: EngineRequest) -> dict[str, Any]:
    """Flags and target as the configuration returns them.

    Raises:
        StageFailed: One of them isn't what was set.
    """
    flags = {name: bool(config.get_flag(getattr(library.BuilderFlag, name))) for name in ("SPARSE_WEIGHTS", "TF32")}
    if flags != {"SPARSE_WEIGHTS": request.weights == "sparse", "TF32": False}:
        raise StageFailed(f"{_TITLES[request.runtime]} keeps other flags than were set for {request.id}: {flags}.")
    if request.runtime == "tensorrt_rtx":
        given = config.get_compute_capability(0).name
        if request.target != "current" and given != request.target.upper():
            raise StageFailed(f"TensorRT-RTX was asked for {request.target.upper()} and keeps {given}.")
    gpu = find_gpu()
    capability = request.target if request.target != "current" else (gpu.sm if gpu else "")
    return {
        "flags": flags,
        "profiling_verbosity": config.profiling_verbosity.name,
        "compute_capability": capability,
    }


def _why_not(capability: str, gpu: Gpu | None) -> str:
    """Why an engine for `capability` ("sm80") can't run on this machine; empty if it can."""
    if gpu is None:
        return f"It is built for {capability} and this machine has no NVIDIA GPU with a driver."
    if gpu.sm != capability:
        return f"It is built for {capability} and this machine's {gpu.name} is {gpu.sm}."
    return ""


def _notes(request: EngineRequest, facts: dict[str, Any]) -> list[str]:
    weighted, computed, stored = facts["weighted_layers"], facts["weights_computed"], facts["weights_stored"]
    if request.precision == "int8":
        note = f"{stored['INT8']} of {weighted} layers with weights have int8 weights behind a DequantizeLinear."
    else:
        note = f"All {weighted} layers with weights compute in {', '.join(computed)}."
    notes = [note]
    if request.runtime == "tensorrt_rtx":
        notes.append(
            "TensorRT-RTX accepts the flag SPARSE_WEIGHTS, and the flag has no effect on the ahead-of-time engine: its "
            "bytes are the same with and without it, so this engine is no evidence that sparse kernels run."
        )
        notes.append("TensorRT-RTX has no target SM90: an H100 or H200 needs the runtime tensorrt.")
    elif request.weights == "sparse":
        notes.append("SPARSE_WEIGHTS allows sparse kernels; sparsity_log says which layers were eligible and chosen.")
    if not facts["engine_layers"]:
        notes.append("The build log holds no layer list; another logger may be registered in this process.")
    return notes


def _version(library: Any) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", str(library.__version__))[:2])


def _require_torch_cuda(engine: str) -> None:
    try:
        import torch
    except (ImportError, OSError) as error:
        raise Unavailable(
            f"Running the engine {engine} needs torch for its GPU buffers, which can't be imported: {error}.",
            hint="pip install 'mpdeploy[torch]'",
        ) from error
    if not torch.cuda.is_available():
        raise Unavailable(f"Running the engine {engine} needs torch with CUDA; torch {torch.__version__} sees no GPU.")
