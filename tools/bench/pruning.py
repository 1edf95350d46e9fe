"""Compare one-shot pruning methods on pretrained networks with real images: error per layer, labels kept, time, memory.

    python tools/bench/pruning.py --modelopt /path/to/environment/bin/python [--seeds 3] [--threads 2] [--only vit]

NVIDIA ModelOpt is the reference of magnitude and SparseGPT; it runs in an environment of its own (pip install
nvidia-modelopt torch timm safetensors requests), on the same weights and calibration images. torch.ao.pruning is a
second reference of magnitude. Every arm is a process of its own, so that its peak memory is its own.

Two things are measured. `layer error`: each layer by itself on the dense network's inputs, sum |W_hat x + b_hat - W x -
b|^2 / sum |W x|^2 over held-out images. `network`: all layers pruned, on held-out images: labels equal to the dense
network's, top-1 where there are labels, rms logit change over rms logit. Nothing is trained.

ModelOpt's SparseGPT returns a mask and drops the weights that it updated (see `weights_updated` in the results), so
`sparsegpt` is our own implementation of the published algorithm, with its update; both are compared.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.ao.pruning as pruning
import torchvision
from PIL import Image
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mpdeploy.data import Split, draw, open_dataset
from mpdeploy.models import load
from mpdeploy.pruning.branches import landing
from mpdeploy.pruning.capture import Stream, capture, layer_nodes, state_of
from mpdeploy.pruning.layers import Layer, choose, weight_of
from mpdeploy.pruning.masks import choose_mask
from mpdeploy.pruning.moments import Moments, layer_rows
from mpdeploy.pruning.patterns import Pattern, as_rows, from_rows
from mpdeploy.pruning.reorder import reorder
from mpdeploy.pruning.solve import Settings, look, prune_network, solve_layer, split_images
from mpdeploy.recipe import load_recipe

HERE = Path(__file__).resolve().parent
RECIPES = HERE.parents[1] / "recipes"
OURS = "ours"
BATCH = 32
JUDGES = 48  # held-out images on which the layer error is measured
ROWS = 1 << 13  # positions per layer on which the layer error is measured
ITERATIONS = 8  # of the search for channel orders
DAMPING = 0.01  # of SparseGPT, its paper's default


@dataclass(frozen=True)
class Network:
    """A pretrained network and its images.

    Args:
        key: its name in the results.
        recipe: where weights and data come from.
        calibration: images.
        what: one line for the reader.
    """

    key: str
    recipe: str
    calibration: int
    what: str


NETWORKS = (
    Network(
        "vit", "elpv.toml", 256, "DINOv2 ViT-S/14 at 98 px with a linear head; ELPV solar cells, 654 held-out images"
    ),
    Network(
        "cnn",
        "efficientnet_lite0.toml",
        96,
        "EfficientNet-Lite0, ImageNet-1k; random crops of ten photos to calibrate, 400 crops of ten others to judge",
    ),
)


def crops(split: Split, count: int, seed: int, edge: int) -> Tensor:
    """Random square crops of a split's photos, 40 to 100 % of the shorter side, mirrored at random, [-1, 1]."""
    generator = np.random.default_rng(seed)
    photos = [np.asarray(photo) for photo in split.load(np.arange(len(split.ids)))]
    found = []
    for index in range(count):
        photo = photos[index % len(photos)]
        side = int(min(photo.shape[:2]) * generator.uniform(0.4, 1.0))
        y, x = (int(generator.integers(0, size - side + 1)) for size in photo.shape[:2])
        crop = Image.fromarray(photo[y : y + side, x : x + side]).resize((edge, edge), Image.Resampling.BICUBIC)
        pixels = np.asarray(crop, np.float32) / 127.5 - 1
        found.append(pixels[:, :: 1 - 2 * int(generator.integers(0, 2))].transpose(2, 0, 1).copy())
    return torch.from_numpy(np.stack(found))


def images_of(network: Network, seed: int) -> tuple[nn.Module, Tensor, Tensor, Tensor | None]:
    """The dense network, calibration images of one seed, held-out images and their labels."""
    recipe = load_recipe(RECIPES / network.recipe).recipe
    loaded, data = load(recipe.source), open_dataset(recipe.data)
    if network.key == "cnn":
        edge = loaded.preprocessing.input_size[1]
        return (
            loaded.module.eval(),
            crops(data.train, network.calibration, seed, edge),
            crops(data.val, 400, 1_000, edge),
            None,
        )
    chosen = draw(data.train, network.calibration, seed)
    everything = np.arange(len(data.val.ids))
    calibration, held = (
        torch.from_numpy(loaded.preprocessing.apply(split.load(indices)))
        for split, indices in ((data.train, chosen), (data.val, everything))
    )
    return loaded.module.eval(), calibration, held, torch.from_numpy(np.asarray(data.val.labels))


def layers_of(module: nn.Module, images: Tensor, pattern: str) -> list[Layer]:
    """What is pruned: all but stem, head, grouped and depthwise layers."""
    return choose(module, pattern, [], (int(images.shape[1]), int(images.shape[2]), int(images.shape[3])))


# --- the arms --------------------------------------------------------------------------------------------------------

Weights = dict[str, Tensor]
Quiet: Callable[[int, int], None] = lambda _done, _total: None  # noqa: E731


def magnitude(module: nn.Module, images: Tensor, layers: list[Layer]) -> Weights:
    """Largest |w| of each group."""
    return _masked(module, layers, lambda _name, weight: weight.abs())


def _masked(module: nn.Module, layers: list[Layer], score: Callable[[str, Tensor], Tensor]) -> Weights:
    from mpdeploy.pruning.patterns import project

    found = {}
    for layer in layers:
        weight = weight_of(module.get_submodule(layer.name)).detach()
        rows = as_rows(weight)
        mask = project(
            score(layer.name, rows.reshape(len(weight), -1)).reshape(rows.shape), Pattern.parse(layer.pattern)
        )
        found[f"{layer.name}.weight"] = from_rows(rows * mask, weight.shape)
    return found


def torch_ao(module: nn.Module, images: Tensor, layers: list[Layer]) -> Weights:
    """Magnitude 2:4 by torch.ao.pruning.WeightNormSparsifier; linear layers only (its blocks run over flat kernels)."""
    sparsifier: Any = pruning.WeightNormSparsifier(  # type: ignore[attr-defined]
        sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2
    )
    sparsifier.prepare(module, [{"tensor_fqn": f"{layer.name}.weight"} for layer in layers])
    sparsifier.step()
    sparsifier.squash_mask()
    return {f"{n.name}.weight": weight_of(module.get_submodule(n.name)).detach() for n in layers}


def _dense_moments(module: nn.Module, images: Tensor, layers: list[Layer]) -> dict[str, Moments]:
    graph = capture(module, tuple(images.shape[1:]))  # type: ignore[arg-type]
    stream = Stream(graph, state_of(module, graph), torch.split(images, BATCH))
    found = {}
    for place, (name, node) in enumerate(layer_nodes(graph, [layer.name for layer in layers]).items()):
        stream.advance(node)
        weight = weight_of(module.get_submodule(name)).detach()
        keep = -(-max(1 << 15, 8 * weight[0].numel()) // len(images))
        moments, inputs = Moments(), stream.argument(node, 0)
        stream.advance(node, through=True)
        for batch, (x, y) in enumerate(zip(inputs, stream.output(node), strict=True)):
            for rows, goals in layer_rows(node, x, y, keep, place * 1_000_003 + batch):
                moments.add(rows, goals[:, :0])
        found[name] = moments
    return found


def activation(module: nn.Module, images: Tensor, layers: list[Layer]) -> Weights:
    """Wanda's score: |w| times the rms of its input."""
    moments = _dense_moments(module, images, layers)
    return _masked(module, layers, lambda name, weight: weight.abs() * moments[name].power().sqrt().float())


def sparsegpt(module: nn.Module, images: Tensor, layers: list[Layer]) -> Weights:
    """SparseGPT as published, with its weight update, on the dense network's inputs."""
    moments = _dense_moments(module, images, layers)
    found = {}
    for layer in layers:
        weight = weight_of(module.get_submodule(layer.name)).detach()
        seen = moments.pop(layer.name)
        gram = (seen.centred() + seen.count * torch.outer(seen.mean, seen.mean)).float()
        gram.diagonal().add_(DAMPING * gram.diagonal().mean())
        rows = as_rows(weight).reshape(len(weight), -1)
        choice = choose_mask(rows, gram, rows @ gram, gram.diagonal(), Pattern.parse(layer.pattern), "sparsegpt")
        found[f"{layer.name}.weight"] = from_rows(choice.start.reshape(-1, weight.shape[1]), weight.shape)
    return found


def ours(module: nn.Module, images: Tensor, layers: list[Layer], *, permute: int = ITERATIONS) -> Weights:
    """The prune stage: orders folded, ADMM masks, exact refit to the dense outputs."""
    batches, graph = list(torch.split(images, BATCH)), capture(module, tuple(images.shape[1:]))  # type: ignore[arg-type]
    if permute:
        reorder(module, graph, batches, layers, iterations=permute, seed=0, progress=Quiet)
    prune_network(module, graph, batches, layers, settings=Settings(), progress=Quiet)
    return dict(module.state_dict())


def ours_alone(module: nn.Module, images: Tensor, layers: list[Layer], *, permute: int = ITERATIONS) -> Weights:
    """The same solver, each layer by itself on the dense network's inputs; also returns the reordered dense network."""
    batches, graph = list(torch.split(images, BATCH)), capture(module, tuple(images.shape[1:]))  # type: ignore[arg-type]
    if permute:
        reorder(module, graph, batches, layers, iterations=permute, seed=0, progress=Quiet)
    state = state_of(module, graph)
    fitting, held = split_images(batches)
    walk = Stream(graph, state, [*fitting, *held])
    found: Weights = {}
    by_name = {layer.name: layer for layer in layers}
    for index, (name, node) in enumerate(layer_nodes(graph, list(by_name)).items()):
        child, landed = module.get_submodule(name), landing(graph, node, state)
        seen = look(node, walk, walk, landed, len(fitting), sum(map(len, fitting)), index)
        weight: Tensor = weight_of(child).detach()
        free = isinstance(child.bias, Tensor) or bool(landed.norm)
        rows = as_rows(weight).reshape(len(weight), -1)
        solved = solve_layer(rows, *seen, Pattern.parse(by_name[name].pattern), Settings(), free_mean=free)
        found[f"{name}.weight"] = from_rows(solved.weight.reshape(-1, weight.shape[1]), weight.shape)
        if free:
            count = seen[0].count + seen[1].count
            mean = (seen[0].count * seen[0].mean + seen[1].count * seen[1].mean) / count
            found[f"{name}.shift"] = ((rows - solved.weight).double() @ mean).float()
    return {**found, **{f"dense/{key}": value for key, value in module.state_dict().items()}}


ARMS: dict[str, Callable[[nn.Module, Tensor, list[Layer]], Weights]] = {
    "magnitude": magnitude,
    "torch.ao magnitude": torch_ao,
    "activation": activation,
    "sparsegpt": sparsegpt,
    "ours without orders": lambda m, x, k: ours(m, x, k, permute=0),
    OURS: ours,
    "ours, layers alone": ours_alone,
    "ours without orders, layers alone": lambda m, x, k: ours_alone(m, x, k, permute=0),
}
ALONE = {OURS: "ours, layers alone", "ours without orders": "ours without orders, layers alone"}


def run_arm(folder: Path, arm: str, pattern: str, threads: int) -> None:
    """Run one arm in this process and write its weights, time and peak memory."""
    torch.set_num_threads(threads)
    spec = json.loads((folder / "spec.json").read_text())
    module, images = _rebuilt(spec, folder), load_file(folder / "calibration.safetensors")["images"]
    layers = [layer for layer in layers_of(module, images, pattern) if layer.pattern]
    start, cpu = time.perf_counter(), time.process_time()
    weights = ARMS[arm](module, images, layers)
    facts = {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "layers": len(layers),
    }
    save_file({name: value.contiguous().clone() for name, value in weights.items()}, folder / f"{arm}.safetensors")
    (folder / f"{arm}.json").write_text(json.dumps(facts))


def _rebuilt(spec: Mapping[str, Any], folder: Path) -> nn.Module:
    module: nn.Module = timm.create_model(spec["model"], **spec["args"]).eval()
    module.load_state_dict(load_file(folder / "dense.safetensors"), strict=True)
    return module


# --- what came of it -------------------------------------------------------------------------------------------------


def layer_errors(module: nn.Module, weights: Weights, layers: list[Layer], images: Tensor) -> dict[str, float]:
    """Relative squared output error of each layer by itself on the dense network's inputs."""
    graph = capture(module, tuple(images.shape[1:]))  # type: ignore[arg-type]
    stream = Stream(graph, state_of(module, graph), torch.split(images, BATCH))
    found = {}
    for place, (name, node) in enumerate(layer_nodes(graph, [layer.name for layer in layers]).items()):
        stream.advance(node)
        dense = as_rows(weight_of(module.get_submodule(name)).detach())
        dense = dense.reshape(weight_of(module.get_submodule(name)).shape[0], -1)
        change = as_rows(weights[f"{name}.weight"]).reshape(dense.shape) - dense
        shift = weights.get(f"{name}.shift", torch.zeros(len(dense)))
        inputs, wrong, energy = stream.argument(node, 0), 0.0, 0.0
        stream.advance(node, through=True)
        for batch, (x, y) in enumerate(zip(inputs, stream.output(node), strict=True)):
            for rows, _ in layer_rows(node, x, y, -(-ROWS // len(images)), place * 1_000_003 + batch):
                wrong += float((rows @ change.T + shift).square().sum())
                energy += float((rows @ dense.T).square().sum())
        found[name] = wrong / energy
    return found


def judge(
    folder: Path,
    arm: str,
    facts: dict[str, Any],
    layers: list[Layer],
    held: Tensor,
    logits: Tensor,
    labels: Tensor | None,
) -> dict[str, Any]:
    """What one arm's weights do on held-out images."""
    spec = json.loads((folder / "spec.json").read_text())
    module, weights = _rebuilt(spec, folder), load_file(folder / f"{arm}.safetensors")
    row = {"arm": arm, **facts}
    if arm not in ALONE.values():
        missing, unexpected = module.load_state_dict(weights, strict=False)
        del missing, unexpected
        found = logits_of(module, held)
        row |= {
            "labels_kept": float((found.argmax(1) == logits.argmax(1)).double().mean()),
            "rms_logit_change": float((found - logits).square().mean().sqrt() / logits.square().mean().sqrt()),
            "top1": None if labels is None else float((found.argmax(1) == labels).double().mean()),
            "density": float(
                np.mean([float((weight_of(module.get_submodule(k.name)) != 0).double().mean()) for k in layers])
            ),
        }
    if arm not in ALONE:
        dense = {key.removeprefix("dense/"): value for key, value in weights.items() if key.startswith("dense/")}
        module = _rebuilt(spec, folder)
        module.load_state_dict(dense or module.state_dict(), strict=True)
        row["layer_errors"] = layer_errors(module, weights, layers, held[:: max(1, len(held) // JUDGES)][:JUDGES])
    return row


def logits_of(module: nn.Module, images: Tensor) -> Tensor:
    """Logits, float32 [n, K]."""
    with torch.no_grad():
        return torch.cat([module(some) for some in torch.split(images, BATCH)])


def specification(network: Network, module: nn.Module, layers: list[Layer]) -> dict[str, Any]:
    """How timm rebuilds the network, and what is pruned in it."""
    built = {
        "vit": (
            "vit_small_patch14_dinov2",
            {"img_size": 98, "num_classes": 2, "global_pool": "token", "fc_norm": False},
        ),
        "cnn": ("tf_efficientnet_lite0", {}),
    }
    model, args = built[network.key]
    return {
        "model": model,
        "args": args,
        "batch": BATCH,
        "layers": [layer.name for layer in layers if layer.pattern],
        "dense": [layer.name for layer in layers if not layer.pattern],
    }


def measure(
    network: Network, seed: int, pattern: str, arms: list[str], options: argparse.Namespace, tick: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Run the arms of one network, seed and pattern."""
    module, calibration, held, labels = images_of(network, seed)
    layers = layers_of(module, calibration, pattern)
    logits = logits_of(module, held)
    rows = []
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        (folder / "spec.json").write_text(json.dumps(specification(network, module, layers)))
        save_file({key: value.contiguous() for key, value in module.state_dict().items()}, folder / "dense.safetensors")
        save_file({"images": calibration}, folder / "calibration.safetensors")
        pruned = [layer for layer in layers if layer.pattern]
        for arm in arms:
            tick(f"{network.key} {pattern} seed {seed}: {arm}")
            if arm.startswith("modelopt"):
                _, kind, *damping = arm.split()
                command = [
                    str(options.modelopt),
                    str(HERE / "modelopt_arm.py"),
                    home,
                    kind,
                    str(options.threads),
                    *damping,
                ]
            else:
                command = [sys.executable, __file__, "--arm", arm, "--folder", home, "--pattern", pattern]
                command += ["--threads", str(options.threads)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{arm} failed:\n{done.stderr[-3000:]}")
            facts = json.loads((folder / f"{arm}.json").read_text())
            row = judge(folder, arm, facts, pruned, held, logits, labels)
            rows.append({"network": network.key, "pattern": pattern, "seed": seed, **row})
    dense_top1 = None if labels is None else float((logits.argmax(1) == labels).double().mean())
    return [{**row, "dense_top1": dense_top1, "images": len(held)} for row in rows]


def geometric(values: list[float]) -> float:
    """Geometric mean."""
    return float(np.exp(np.mean(np.log(values))))


def summarise(rows: list[dict[str, Any]], network: str) -> dict[str, Any]:
    """Ratios of ours to both SparseGPTs at 2:4, over all seeds, with the spread over seeds."""

    def of(arm: str, seed: int) -> dict[str, Any]:
        return next(r for r in rows if (r["network"], r["pattern"], r["arm"], r["seed"]) == (network, "2:4", arm, seed))

    seeds = sorted({r["seed"] for r in rows if r["network"] == network and r["pattern"] == "2:4"})
    found: dict[str, Any] = {"network": network, "seeds": len(seeds)}
    for label, reference in (("vs_sparsegpt", "modelopt sparsegpt"), ("vs_sparsegpt_with_update", "sparsegpt")):
        if not any(r["arm"] == reference and r["network"] == network for r in rows):
            continue
        per_seed: dict[str, list[float]] = {
            "layer_error_ratio": [],
            "agreement_drop_ratio": [],
            "time_ratio": [],
            "cpu_time_ratio": [],
        }
        for seed in seeds:
            mine, alone, theirs = of(OURS, seed), of(ALONE[OURS], seed), of(reference, seed)
            # A layer that the reference left dense has no error to compare with.
            errors = [alone["layer_errors"][k] / e for k, e in theirs["layer_errors"].items() if e > 0]
            per_seed["layer_error_ratio"].append(geometric(errors))
            per_seed["agreement_drop_ratio"].append((1 - mine["labels_kept"]) / (1 - theirs["labels_kept"]))
            per_seed["time_ratio"].append(mine["seconds"] / theirs["seconds"])
            per_seed["cpu_time_ratio"].append(mine["cpu_seconds"] / theirs["cpu_seconds"])
        for key, values in per_seed.items():
            found[f"{key}_{label}"] = float(np.mean(values))
            found[f"{key}_{label}_by_seed"] = values
    return found


def main() -> None:
    """Run everything, or one arm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modelopt", type=Path, help="Python of the environment that holds nvidia-modelopt")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", choices=[network.key for network in NETWORKS])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "pruning.json")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are in --out and run what is missing")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--pattern", default="2:4", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        run_arm(options.folder, options.arm, options.pattern, options.threads)
        return
    networks = [network for network in NETWORKS if options.only in (None, network.key)]
    reference = ["modelopt magnitude", "modelopt sparsegpt", "modelopt sparsegpt 0.01"] if options.modelopt else []
    work = []
    for network in networks:
        plain = ["magnitude", *(["torch.ao magnitude"] if network.key == "vit" else []), "activation", "sparsegpt"]
        # Reference and ours alternate, so that a change of the machine's speed meets both.
        arms = [*plain, *reference, OURS, "ours without orders", *ALONE.values()]
        again = ["sparsegpt", *reference[1:2], OURS, "ours without orders", ALONE[OURS]]
        work += [(network, seed, "2:4", again if seed else arms) for seed in range(options.seeds)]
    # The looser patterns come last: a bench that is stopped early has what it is for.
    others = ["magnitude", "sparsegpt", OURS]
    work += [(network, 0, pattern, others) for network in networks for pattern in ("4:8", "8:16", "12:16")]
    rows: list[dict[str, Any]] = json.loads(options.out.read_text())["rows"] if options.resume else []
    have = {(row["network"], row["seed"], row["pattern"], row["arm"]) for row in rows}
    work = [(n, s, p, [arm for arm in arms if (n.key, s, p, arm) not in have]) for n, s, p, arms in work]
    with Progress() as progress:
        task = progress.add_task("pruning", total=sum(len(arms) for *_, arms in work))

        def tick(label: str) -> None:
            progress.update(task, advance=1, description=label)

        for network, seed, pattern, arms in work:
            if arms:
                rows += measure(network, seed, pattern, arms, options, tick)
                write(options, rows)


def write(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Write what is known so far: a stopped run keeps its rows."""
    networks = [n for n in NETWORKS if any(r["network"] == n.key for r in rows)]
    summaries = {n.key: summarise(rows, n.key) for n in networks}
    first = summaries[networks[0].key]
    names = ("layer_error_ratio_vs_sparsegpt", "agreement_drop_ratio_vs_sparsegpt", "time_ratio_vs_sparsegpt")
    report = {
        "summary": {name: first[name] for name in names if name in first},
        "summaries": summaries,
        "networks": [asdict(network) for network in networks],
        "machine": {"cpu": _cpu(), "threads": options.threads, "system": f"{platform.system()} {platform.machine()}"},
        "versions": {
            "torch": torch.__version__,
            "timm": timm.__version__,
            "torchvision": torchvision.__version__,
            "python": platform.python_version(),
        },
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")


def _cpu() -> str:
    from mpdeploy.runtimes import cpu_name

    return cpu_name()


if __name__ == "__main__":
    main()
