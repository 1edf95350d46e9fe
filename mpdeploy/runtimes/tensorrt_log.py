"""TensorRT's log: one logger per process and library, its text, and what that text says about an engine."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

_SHOWN_ERRORS = 5
_DURATION = re.compile(r"\d+(?:\.\d+)?(?:e-?\d+)?(?= ?(?:seconds|ms)\b)")
_LOGGERS: dict[str, Any] = {}


def logger_of(library: Any, runtime: str) -> Any:
    """The one logger of this process for a library; its `lines` are (severity name, text).

    TensorRT keeps the first logger it meets as long as any of its objects lives and ignores later ones, so a logger
    per build would lose lines.
    """
    if runtime not in _LOGGERS:

        class Logger(library.ILogger):  # type: ignore[misc]  # the library is known only at run time
            def __init__(self) -> None:
                library.ILogger.__init__(self)
                self.lines: list[tuple[str, str]] = []

            def log(self, severity: Any, msg: str) -> None:
                self.lines.append((severity.name, msg))

        _LOGGERS[runtime] = Logger()
    return _LOGGERS[runtime]


def log_facts(log: str) -> dict[str, Any]:
    """What a verbose build log says about sparsity and the engine's layers.

    Args:
        log: Lines "SEVERITY text" of one build.

    Returns:
        "sparsity_log": the lines that hold "(Sparsity)" or the wording of TensorRT 8 to 10.2; "warnings": the lines of
        severity WARNING, ERROR or INTERNAL_ERROR; "engine_layers": how often each layer type occurs in the engine.
    """
    lines = log.splitlines()
    sparsity = [
        line for line in lines if "(Sparsity)" in line or "sparse math:" in line or "picked sparse impl" in line
    ]
    return {
        "sparsity_log": sparsity,
        "warnings": [line for line in lines if line.startswith(("WARNING ", "ERROR ", "INTERNAL_ERROR "))],
        "engine_layers": dict(sorted(Counter(re.findall(r"\bLayerType: (\w+)", log)).items())),
    }


def errors_of(logger: Any) -> str:
    """The last errors of a build in one line, for the sentence of an exception."""
    told = [text.strip() for severity, text in logger.lines if severity in ("ERROR", "INTERNAL_ERROR")]
    return " | ".join(told[-_SHOWN_ERRORS:]) or "the library logged no error."


def text_of(logger: Any, onnx: Path) -> str:
    """The log without durations and without the path of this run, so that the same build writes the same bytes."""
    text = "\n".join(f"{severity} {message}" for severity, message in logger.lines)
    return _DURATION.sub("*", text.replace(str(onnx), onnx.name)) + "\n"
