"""Decide whether an engine's label may be used. Copy this file and abstain.json beside the engine.

    from abstain import decide
    label, keep = decide(logits)      # logits of one sample, [K], as the engine returned them

keep is True where the largest logit exceeds the second largest by more than the tau in abstain.json; what that is worth
is written there under "statement". It needs Python's standard library and numpy, and nothing of mpdeploy.
"""

import json
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np


@lru_cache(maxsize=1)
def rule() -> tuple[float | None, int]:
    """Read tau (None: never keep) and the number of classes from abstain.json beside this file."""
    read = json.loads(Path(__file__).with_name("abstain.json").read_text(encoding="utf-8"))
    tau, classes = read["tau"], read["classes"]
    if read["schema"] != 1 or type(classes) is not int or classes < 2:
        raise ValueError("abstain.json is not of schema 1, or has fewer than two classes.")
    if tau is not None and not (type(tau) in (int, float) and math.isfinite(tau) and tau >= 0):
        raise ValueError(f"abstain.json: tau is {tau!r}; expected a finite number of at least 0, or null.")
    return tau, classes


def decide(logits: Any) -> tuple[int | None, bool]:
    """Return the label and whether to keep it; (None, False) where a logit is not finite.

    Args:
        logits: [K] floating-point logits of one sample, before any softmax.

    Raises:
        ValueError: not K numbers.
        TypeError: not floating-point numbers: labels or quantised values have no margin that was certified.
    """
    tau, classes = rule()
    values = np.asarray(logits)
    if values.shape != (classes,):
        raise ValueError(f"Logits have shape {values.shape}; expected ({classes},): one sample at a time.")
    if values.dtype.kind != "f":
        raise TypeError(f"Logits are {values.dtype}; expected floating-point numbers, as the engine returns them.")
    exact = values.astype(np.float64)  # float16 has to be subtracted where it was certified: in float64
    if not np.isfinite(exact).all():
        return None, False
    second, first = np.sort(exact)[-2:]
    return int(exact.argmax()), tau is not None and bool(first - second > tau)
