"""One pruning by NVIDIA ModelOpt, in an environment of its own, for tools/bench/pruning.py.

Needs torch, timm, safetensors and nvidia-modelopt (with requests). Reads FOLDER/spec.json, dense.safetensors and
calibration.safetensors; writes FOLDER/ARM.safetensors (the pruned state dict) and FOLDER/ARM.json.

    python tools/bench/modelopt_arm.py FOLDER magnitude|sparsegpt THREADS [DAMPING]
"""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import modelopt
import modelopt.torch.sparsity as mts
import timm
import torch
from safetensors.torch import load_file, save_file


def main(folder: Path, arm: str, threads: int, damping: float | None) -> None:
    """Prune and write what came out."""
    torch.set_num_threads(threads)
    spec = json.loads((folder / "spec.json").read_text())
    model = timm.create_model(spec["model"], **spec["args"]).eval()
    model.load_state_dict(load_file(folder / "dense.safetensors"), strict=True)
    batches = torch.split(load_file(folder / "calibration.safetensors")["images"], spec["batch"])
    before = {name: child.weight.detach().clone() for name, child in model.named_modules() if name in spec["layers"]}

    def forward(network: Any) -> None:
        with torch.no_grad():
            for batch in batches:
                network(batch)

    dense = dict.fromkeys(spec["dense"])
    rules: dict[str, Any] = {kind: {"*": {}, **dense} for kind in ("nn.Linear", "nn.Conv2d")}
    settings: dict[str, Any] = {"verbose": False}
    if arm == "sparsegpt":
        settings |= {"forward_loop": forward, "device": "cpu"}
        settings |= {} if damping is None else {"hessian_damp": damping}
    mode = "sparsegpt" if arm == "sparsegpt" else "sparse_magnitude"
    start, cpu = time.perf_counter(), time.process_time()
    pruned = mts.sparsify(model, [(mode, rules)], config=settings)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    masks = {
        n: child._weight_mask for n, child in pruned.named_modules() if n in before and child._weight_mask is not None
    }
    name = f"modelopt {arm}" + ("" if damping is None else f" {damping}")
    # Whether the library hands on the weights that SparseGPT updated, or only its mask.
    updated = any(
        not torch.equal(child.weight, before[n] * masks[n]) for n, child in pruned.named_modules() if n in masks
    )
    state = {f"{n}.weight": (before[n] * mask).contiguous() for n, mask in masks.items()}
    save_file(state, folder / f"{name}.safetensors")
    facts = {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "layers": len(masks),
        "weights_updated": updated,
        "versions": {"nvidia-modelopt": modelopt.__version__, "torch": torch.__version__},
    }
    (folder / f"{name}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4]) if len(sys.argv) > 4 else None)
