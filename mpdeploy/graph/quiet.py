"""Keep other libraries' chatter from the terminal: a library never prints."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop what Python code writes to stdout and stderr, warnings, and log records up to ERROR, inside the block.

    The torch exporter and ONNX Runtime's quantiser report progress on all four and have no switch for it. Process-wide
    while it lasts; errors are exceptions and pass.
    """
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
