"""What fitting a spectrum costs, against the Gram product and symmetric eigenvalues that it can't do without.

All 48 linears in the blocks of a ViT-B/16 with random weights. Per layer and repeat the arms take turns, in an order
that is reversed every other repeat, so that a slow moment of the machine falls on both. Run from the repository:

    OMP_NUM_THREADS=1 python tools/bench/spectrum.py [REPEATS]
"""

import json
import os
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import timm
import torch
from numpy.typing import NDArray

from mpdeploy.pruning.spectrum import fit
from mpdeploy.runtimes import cpu_name

MODEL, GOAL, REPEATS, WITH_SVD = "vit_base_patch16_224", 2.0, 7, 3
RESULTS = Path(__file__).parent / "results" / "spectrum.json"

Arm = Callable[[torch.Tensor, NDArray[np.float64]], object]


def gram_and_eigenvalues(_: torch.Tensor, matrix: NDArray[np.float64]) -> object:
    """The part that nothing can leave out: the smaller Gram matrix in float64 and its eigenvalues."""
    rows, cols = matrix.shape
    return scipy.linalg.eigvalsh(matrix @ matrix.T if rows <= cols else matrix.T @ matrix)


def whole_fit(weight: torch.Tensor, _: NDArray[np.float64]) -> object:
    """All that `mpdeploy spectrum` does for a layer: float32 tensor in, fitted law out."""
    return fit(weight.flatten(1).double().numpy())


def singular_values(_: torch.Tensor, matrix: NDArray[np.float64]) -> object:
    """What the eigenvalues replace: LAPACK's full decomposition."""
    return scipy.linalg.svd(matrix, full_matrices=False)


def seconds(arm: Arm, weight: torch.Tensor, matrix: NDArray[np.float64]) -> float:
    """Time one call."""
    start = time.perf_counter()
    arm(weight, matrix)
    return time.perf_counter() - start


def interleaved(arms: dict[str, Arm], weights: list[torch.Tensor], repeats: int) -> dict[str, NDArray[np.float64]]:
    """Time the arms in turn: {arm: [repeats, layers] seconds}. One call of each before it warms caches up."""
    times = {name: np.zeros((repeats, len(weights))) for name in arms}
    matrices = [weight.double().numpy() for weight in weights]
    for name in arms:
        seconds(arms[name], weights[0], matrices[0])
    for repeat in range(repeats):
        order = list(arms) if repeat % 2 == 0 else list(arms)[::-1]
        for layer, (weight, matrix) in enumerate(zip(weights, matrices, strict=True)):
            for name in order:
                times[name][repeat, layer] = seconds(arms[name], weight, matrix)
        print(f"  repeat {repeat + 1} of {repeats}", file=sys.stderr)
    return times


def main(repeats: int) -> dict[str, Any]:
    """Measure, print, and write results/spectrum.json."""
    torch.manual_seed(0)
    module = timm.create_model(MODEL, pretrained=False)
    weights = [
        child.weight.detach()
        for name, child in module.named_modules()
        if isinstance(child, torch.nn.Linear) and name.startswith("blocks.")
    ]
    times = interleaved({"gram": gram_and_eigenvalues, "fit": whole_fit}, weights, repeats)
    gram, whole = (times[name].sum(axis=1) for name in ("gram", "fit"))
    ratios = whole / gram
    few = weights[:WITH_SVD]
    svd = interleaved({"svd": singular_values, "fit": whole_fit}, few, 3)
    result = {
        "ratio": round(float(np.median(whole) / np.median(gram)), 4),
        "goal": GOAL,
        "met": bool(np.median(whole) / np.median(gram) <= GOAL),
        "ratio_per_repeat": [round(float(r), 4) for r in ratios],
        "ratio_lowest": round(float(ratios.min()), 4),
        "ratio_highest": round(float(ratios.max()), 4),
        "gram_and_eigenvalues_s": [round(float(s), 3) for s in gram],
        "whole_fit_s": [round(float(s), 3) for s in whole],
        "full_svd_over_fit": round(float(np.median(svd["svd"].sum(axis=1)) / np.median(svd["fit"].sum(axis=1))), 2),
        "full_svd_layers": [list(weight.shape) for weight in few],
        "model": MODEL,
        "layers": len(weights),
        "repeats": repeats,
        "threads": os.environ.get("OMP_NUM_THREADS", "unset"),
        "cpu": cpu_name(),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("numpy", "scipy", "torch", "timm", "mpdeploy")},
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))
    return result


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else REPEATS)
