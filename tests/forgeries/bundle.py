"""A tiny bundle with every file that verify.py reads, whose numbers agree because the producer's own code made them.

The network is never run: its logits are drawn, as verify.py takes them for measured. Everything else is real: weights
of two pruned layers (one with a BatchNorm folded at export), ONNX graphs, ledger, certificate, results, gates.
"""

import copy
import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save

from mpdeploy.artifact import dumps
from mpdeploy.certify.ledger import keeps, measure, pair_margins
from mpdeploy.compare import Latencies, decide, decisions, speed, top1
from mpdeploy.gates import judge
from mpdeploy.recipe import Gates

SAMPLES, VALIDATION, CLASSES = 40, 120, 5
BLOCKS, CALLS = 6, 5
CONFIDENCE = 0.95
CPU, GPU = "onnxruntime-cpu-fp32", "tensorrt_rtx-sm80-fp16"
EPSILON = 1e-3
GATES = {
    "max_accuracy_drop": 10.0,
    "min_agreement": 0.5,
    "max_violations": 0,
    "min_certified": 0.1,
    "min_speedup": 1.05,
}
RECIPE = "[gates]\n" + "".join(f"{name} = {limit}\n" for name, limit in GATES.items())
LAYERS = (("stem", "conv2d", ""), ("mix", "conv2d", "2:4"), ("fc", "linear", "2:4"), ("head", "linear", ""))
DENSE_REASON = "It is the stem or the head, which stay dense."


@dataclass
class Draft:
    """A bundle in memory: what a lie changes before it is written and hashed."""

    json: dict[str, Any]
    tensors: dict[str, dict[str, Any]]
    onnx: dict[str, onnx.ModelProto]
    raw: dict[str, bytes]

    def parts(self) -> dict[str, bytes]:
        """Every file but the manifest, as bytes. `raw` wins, so that a lie can spoil what the others wrote."""
        files = {name: json.dumps(value).encode() for name, value in self.json.items()}
        files |= {name: save(tensors) for name, tensors in self.tensors.items()}
        files |= {name: model.SerializeToString() for name, model in self.onnx.items()}
        return files | self.raw

    def write(self, root: Path) -> str:
        """Write every file and an honest manifest of them; return the bundle's digest."""
        files = self.parts()
        for name, data in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)
        return seal(root, {name: {"sha256": sha256(data), "size": len(data)} for name, data in files.items()})

    def engine(self, name: str = CPU) -> dict[str, Any]:
        """The row of results.json about one engine."""
        return next(row for row in self.json["results.json"]["engines"] if row["id"] == name)

    def gate(self, name: str) -> dict[str, Any]:
        """The row of verdict.json about one gate."""
        return next(row for row in self.json["verdict.json"]["gates"] if row["name"] == name)

    def constant(self, name: str, file: str = "model.onnx") -> onnx.TensorProto:
        return next(tensor for tensor in self.onnx[file].graph.initializer if tensor.name == name)

    def entry(self, layer: str, file: str = "model.onnx") -> dict[str, Any]:
        """The row about one layer in a copy of a graph's own manifest: hand the change to `restate`."""
        manifest = embedded(self.onnx[file])
        return next(row for row in [*manifest["weights"], *manifest["dense"]] if row["layer"] == layer)

    def restate(self, change: Any, file: str = "model.onnx") -> None:
        """Change the sparsity manifest in a graph and in the sidecar, so that both still agree."""
        manifest = embedded(self.onnx[file])
        change(manifest)
        embed(self.onnx[file], manifest)
        if file == "model.onnx":
            self.json["sparsity.json"] = manifest

    def set_constant(self, name: str, array: np.ndarray, file: str = "model.onnx") -> None:
        """Put other values into a graph, and their hash and density into its manifest."""
        self.constant(name, file).CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), name))

        def rehash(manifest: dict[str, Any]) -> None:
            for row in [*manifest["weights"], *manifest["dense"]]:
                if row["initializer"] == name:
                    row["sha256"] = sha256(np.ascontiguousarray(array).tobytes())
                    if "density" in row:
                        row["density"] = np.count_nonzero(array) / array.size

        self.restate(rehash, file)

    def rebind(self) -> None:
        """Hash again whatever names the hash of another file: weights in the certificate, files in engine.json."""
        files = self.parts()
        for stage in ("dense", "pruned", "tuned"):
            digest = sha256(files[f"weights/{stage}.safetensors"])
            self.json["certificate.json"]["digests"][stage] = digest
        for name, value in self.json.items():
            if name.endswith("/engine.json"):
                data = files[f"{name.rpartition('/')[0]}/{value['file']}"]
                value |= {"sha256": sha256(data), "size": len(data)}

    def rederive(self) -> None:
        """Compute certificate, results and verdict again from logits and times, as an honest producer would."""
        derive_certificate(self)
        derive_results(self)
        derive_verdict(self)
        self.rebind()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def seal(root: Path, files: dict[str, Any]) -> str:
    """Write manifest.json and return its digest."""
    text = dumps({"schema": 1, "kind": "mpdeploy-bundle", "name": "tiny", "mpdeploy": "0", "chain": {}, "files": files})
    (root / "manifest.json").write_text(text, encoding="utf-8")
    return sha256(text.encode())


def reseal(root: Path) -> str:
    """Hash what lies on disk now, honestly."""
    files = {}
    for path in sorted(root.rglob("*")):
        if path.is_file() and not path.is_symlink() and path.name != "manifest.json":
            data = path.read_bytes()
            files[path.relative_to(root).as_posix()] = {"sha256": sha256(data), "size": len(data)}
    return seal(root, files)


def embedded(model: onnx.ModelProto) -> dict[str, Any]:
    return json.loads(next(entry.value for entry in model.metadata_props if entry.key == "mpdeploy.sparsity"))


def embed(model: onnx.ModelProto, manifest: dict[str, Any]) -> None:
    helper.set_model_props(model, {"mpdeploy.sparsity": dumps(manifest)})


# ------------------------------------------------------------------------------------------------------------ weights


def two_of_four(weight: np.ndarray) -> np.ndarray:
    """Zero the two smallest of every four consecutive input channels."""
    rows = np.moveaxis(weight, 1, -1)
    groups = rows.reshape(-1, 4).copy()
    np.put_along_axis(groups, np.argsort(np.abs(groups), axis=1)[:, :2], 0.0, axis=1)
    return np.ascontiguousarray(np.moveaxis(groups.reshape(rows.shape), -1, 1))


def make_weights(rng: np.random.Generator) -> dict[str, dict[str, np.ndarray]]:
    """State dicts of the dense, pruned and tuned network."""
    shapes = {"stem.weight": (8, 4, 3, 3), "mix.weight": (8, 8, 3, 3), "fc.weight": (16, 8), "head.weight": (5, 16)}
    shapes |= {"stem.bias": (8,), "norm.weight": (8,), "norm.bias": (8,), "norm.running_mean": (8,), "ln.weight": (8,)}
    shapes |= {"ln.bias": (8,), "fc.bias": (16,), "head.bias": (5,)}
    dense = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    dense["norm.running_var"] = rng.uniform(0.5, 2.0, 8).astype(np.float32)
    dense["norm.num_batches_tracked"] = np.array(7, np.int64)
    pruned = {name: two_of_four(w) if name in ("mix.weight", "fc.weight") else w.copy() for name, w in dense.items()}
    tuned = {name: (w * 1.01).astype(w.dtype) if w.dtype == np.float32 else w.copy() for name, w in pruned.items()}
    return {"dense": dense, "pruned": pruned, "tuned": tuned}


def folded(state: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Weight and bias of `mix` after its BatchNorm is folded in."""
    x = {name: value.astype(np.float64) for name, value in state.items()}
    scale = x["norm.weight"] / np.sqrt(x["norm.running_var"] + EPSILON)
    return x["mix.weight"] * scale[:, None, None, None], x["norm.bias"] - x["norm.running_mean"] * scale


def make_onnx(state: dict[str, np.ndarray], kind: type) -> onnx.ModelProto:
    """The network's graph: a Linear is once a MatMul with a transposed constant and once a Gemm with transB."""
    mix, mix_bias = folded(state)
    values = {"stem.weight": state["stem.weight"], "stem.bias": state["stem.bias"], "mix.weight": mix}
    values |= {"mix.weight_bias": mix_bias, "ln.weight": state["ln.weight"], "ln.bias": state["ln.bias"]}
    values |= {"val_0": state["fc.weight"].T, "fc.bias": state["fc.bias"]}
    values |= {"head.weight": state["head.weight"], "head.bias": state["head.bias"]}
    half = kind is np.float16
    steps = [
        ("Conv", "stem", ["x", "stem.weight", "stem.bias"], {}),
        ("Relu", "relu", ["stem"], {}),
        ("Conv", "mix", ["relu", "mix.weight", "mix.weight_bias"], {}),
        ("GlobalAveragePool", "pool", ["mix"], {}),
        ("Flatten", "flat", ["pool"], {}),
        ("LayerNormalization", "ln", ["flat", "ln.weight", "ln.bias"], {}),
        ("MatMul", "fc_product", ["ln", "val_0"], {}),
        ("Add", "fc", ["fc_product", "fc.bias"], {}),
        ("Gemm", "head", ["fc", "head.weight", "head.bias"], {"transB": 1}),
    ]
    nodes = [
        helper.make_node(op, ins, [name], name=f"node_{name}", **attributes) for op, name, ins, attributes in steps
    ]
    ends = {"images": "x", "head": "logits"}
    for position, (source, target) in zip((0, len(nodes) + 1), ends.items(), strict=True):
        to = TensorProto.FLOAT16 if half and target == "x" else TensorProto.FLOAT
        nodes.insert(position, helper.make_node("Cast", [source], [target], name=f"cast_{target}", to=to))
    constants = [numpy_helper.from_array(np.ascontiguousarray(v.astype(kind)), name) for name, v in values.items()]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 4, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model


def annotate(model: onnx.ModelProto) -> dict[str, Any]:
    """Write the sparsity manifest, from the brief and not by the producer's code: axes and names by hand."""
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    places = {"stem": ("stem.weight", "Conv", "node_stem", 1), "mix": ("mix.weight", "Conv", "node_mix", 1)}
    places |= {"fc": ("val_0", "MatMul", "node_fc_product", 0), "head": ("head.weight", "Gemm", "node_head", 1)}
    manifest: dict[str, Any] = {"schema": 1, "weights": [], "dense": []}
    for layer, _, pattern in LAYERS:
        name, op, node, axis = places[layer]
        array = arrays[name]
        row = {"initializer": name, "layer": layer, "node": node, "op": op, "axis": axis, "shape": list(array.shape)}
        row |= {"dtype": array.dtype.name, "sha256": sha256(np.ascontiguousarray(array).tobytes())}
        if pattern:
            density = np.count_nonzero(array) / array.size
            manifest["weights"].append({**row, "pattern": pattern, "density": density, "permutation": None})
        else:
            manifest["dense"].append({**row, "reason": DENSE_REASON})
    embed(model, manifest)
    return manifest


def make_layers(state: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """layers.json from the pruned weights."""
    rows = []
    for name, kind, pattern in LAYERS:
        weight = state[f"{name}.weight"]
        row = {
            "name": name,
            "kind": kind,
            "shape": list(weight.shape),
            "groups": 1,
            "positions": 1,
            "macs": weight.size,
        }
        row |= {"pattern": pattern, "reason": "" if pattern else DENSE_REASON}
        if pattern:
            row |= {"density": np.count_nonzero(weight) / weight.size, "bad_groups": 0, "note": ""}
        rows.append(row)
    return rows


# ------------------------------------------------------------------------------------------------------------- logits


def make_logits(rng: np.random.Generator, n: int, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Logits of three networks, each a small step from the last, mostly right."""
    dense = rng.normal(size=(n, CLASSES)) + 2.5 * np.eye(CLASSES)[labels]
    pruned = dense + rng.normal(scale=0.35, size=dense.shape)
    tuned = pruned + rng.normal(scale=0.1, size=dense.shape)
    return {name: z.astype(np.float32) for name, z in (("dense", dense), ("pruned", pruned), ("tuned", tuned))}


def derive_certificate(draft: Draft) -> None:
    """Ledger columns and certificate.json from the certification logits."""
    arrays = draft.tensors["ledger.safetensors"]
    logits, labels = {name: arrays[name] for name in ("dense", "pruned", "tuned")}, arrays["labels"]
    ledger = measure(logits, 0.01)
    for name in ("dense_label", "margin", "slack", "reserve", "verdict"):
        arrays[name] = getattr(ledger, name)
    draft.json["certificate.json"] = {
        "schema": 1,
        "samples": len(labels),
        "classes": CLASSES,
        "ids": draft.json["calibration.json"]["certification_ids"],
        "reserve": 0.01,
        "stages": list(logits),
        "counts": ledger.counts(),
        "top1": {name: int((decide(z) == labels).sum()) for name, z in logits.items()},
        "spent": [dict(row) for row in ledger.spent],
        "margin_median": float(np.median(ledger.margin)),
        "slack_median": float(np.median(ledger.slack)),
        "digests": {},
    }


def derive_results(draft: Draft) -> None:
    """results.json from the validation logits, the certification logits and the times."""
    samples, ledger = draft.tensors["samples.safetensors"], draft.tensors["ledger.safetensors"]
    labels, dense, own = samples["labels"], samples["dense"], samples[f"engine.{CPU}"]
    certification = samples[f"certification.{CPU}"]
    lost = ~keeps(pair_margins(certification, ledger["dense_label"]))
    broken = np.flatnonzero(lost & (ledger["verdict"] == 2))
    finite = bool(np.isfinite(own).all() and np.isfinite(certification).all())
    stages = {"dense": dense, "pruned": samples["pruned"], "tuned": samples["tuned"], "engine": own}
    seconds = [samples[f"latency.{name}"].tobytes() for name in (CPU, f"{CPU}.dense")]
    measured = {
        "id": CPU,
        "status": "measured",
        "why_not": "",
        **decisions(dense, own, labels, CONFIDENCE),
        "certified": {
            "n": int((ledger["verdict"] == 2).sum()),
            "violations": len(broken),
            "violating_ids": [draft.json["certificate.json"]["ids"][i] for i in broken],
            "kept_broken": int((lost & (ledger["verdict"] == 1)).sum()),
        },
        "spent": [dict(row) for row in measure(stages, 0.0).spent] if finite else [],
        "finite": finite,
        "batch_consistent": True,
        "latency": {
            "batch": 1,
            "threads": 1,
            "twin": f"{CPU}.dense",
            **copy.deepcopy(timed(*seconds)),
        },
    }
    draft.json["results.json"] = {
        "schema": 1,
        "confidence": CONFIDENCE,
        "validation": {"samples": len(labels), "classes": CLASSES},
        "dense_top1": top1(dense, labels, CONFIDENCE),
        "tuned_top1": top1(samples["tuned"], labels, CONFIDENCE),
        "engines": [measured, {"id": GPU, "status": "not run", "why_not": "There is no GPU here."}],
    }


@cache
def timed(own: bytes, twin: bytes) -> dict[str, Any]:
    """What the producer says of these times; once, because it resamples them 2000 times."""
    return speed(Latencies(np.frombuffer(own), np.frombuffer(twin)), BLOCKS, CONFIDENCE)


def derive_verdict(draft: Draft) -> None:
    """verdict.json from the locked recipe, by the producer's own gates."""
    gates = Gates(
        **{name: limit for name, limit in draft.json["recipe.lock.json"]["gates"].items() if limit is not None}
    )
    results, certificate = draft.json["results.json"], draft.json["certificate.json"]
    draft.json["verdict.json"] = judge(
        gates, draft.json["recipe.lock.json"]["validate"]["deploy"], results, certificate
    )


# -------------------------------------------------------------------------------------------------------- all of it


def engine_manifest(name: str, file: str) -> dict[str, Any]:
    runtime, target, precision = name.removesuffix(".dense").split("-")
    weights = "dense" if name.endswith(".dense") else "sparse"
    row = {"schema": 1, "id": name, "runtime": runtime, "target": target, "precision": precision, "weights": weights}
    return row | {"file": file, "asked": {"precision": precision}, "read_back": {}, "batch": [1, 8, 64], "threads": 1}


def make_draft(seed: int = 0) -> Draft:
    """Build a consistent bundle; copy it before changing it."""
    rng = np.random.default_rng(seed)
    weights = make_weights(rng)
    draft = Draft({}, {f"weights/{stage}.safetensors": state for stage, state in weights.items()}, {}, {})
    for name, stage in (("model", "tuned"), ("dense", "dense")):
        draft.onnx[f"{name}.onnx"] = make_onnx(weights[stage], np.float32)
        draft.onnx[f"{name}.fp16.onnx"] = make_onnx(weights[stage], np.float16)
    annotate(draft.onnx["model.fp16.onnx"])
    draft.json["sparsity.json"] = annotate(draft.onnx["model.onnx"])
    draft.json["export.json"] = {
        "files": {
            name: {"precision": "fp16" if "fp16" in name else "fp32", "opset": 20, "layer_norm_ops": 1}
            for name in draft.onnx
        }
    }
    draft.json["layers.json"] = make_layers(weights["pruned"])
    draft.json["calibration.json"] = {
        "seed": 0,
        "split": "train",
        "calibration_ids": [f"train/{i}" for i in range(30)],
        "certification_ids": [f"train/{100 + i}" for i in range(SAMPLES)],
        "validation_ids": [f"val/{i}" for i in range(VALIDATION)],
    }
    runtime, target, precision = CPU.split("-")
    engines = [{"runtime": runtime, "target": target, "precision": precision}]
    engines.append({"runtime": "tensorrt_rtx", "target": "sm80", "precision": "fp16"})
    draft.json["recipe.lock.json"] = {
        "gates": GATES,
        "validate": {"deploy": CPU, "blocks": BLOCKS},
        "build": {"engines": engines},
        "sets": [],
    }
    draft.raw["recipe.toml"] = RECIPE.encode()
    for name in (CPU, f"{CPU}.dense", GPU, f"{GPU}.dense"):
        file = "model.onnx" if name.startswith(CPU) else "model.engine"
        draft.json[f"engines/{name}/engine.json"] = engine_manifest(name, file)
        if file == "model.engine":
            draft.raw[f"engines/{name}/{file}"] = rng.bytes(64)
        else:
            draft.onnx[f"engines/{name}/{file}"] = draft.onnx["dense.onnx" if "dense" in name else "model.onnx"]
    draft.tensors["ledger.safetensors"] = make_ledger(rng)
    draft.tensors["samples.safetensors"] = make_samples(rng, draft.tensors["ledger.safetensors"])
    draft.rederive()
    return copy.deepcopy(draft)


def make_ledger(rng: np.random.Generator) -> dict[str, np.ndarray]:
    labels = rng.integers(0, CLASSES, SAMPLES)
    return {"labels": labels, **make_logits(rng, SAMPLES, labels)}


def make_samples(rng: np.random.Generator, ledger: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    labels = rng.integers(0, CLASSES, VALIDATION)
    samples = {"labels": labels, **make_logits(rng, VALIDATION, labels)}
    for name, tuned in ((f"engine.{CPU}", samples["tuned"]), (f"certification.{CPU}", ledger["tuned"])):
        samples[name] = (tuned + rng.normal(scale=1e-4, size=tuned.shape)).astype(np.float32)
    for name, base in ((f"latency.{CPU}", 1.0e-3), (f"latency.{CPU}.dense", 1.2e-3)):
        samples[name] = base * rng.lognormal(sigma=0.02, size=BLOCKS * 2 * CALLS)
    return samples
