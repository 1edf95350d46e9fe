"""A tiny bundle with every file that verify.py reads and every claim it knows, whose numbers agree.

The network is never run: its logits are drawn, as verify.py takes them for measured. Everything else is real: weights
of two pruned layers (one with a BatchNorm folded at export) behind two folded orders of channels, ONNX graphs, ledger,
certificate, results, gates. The ledger's numbers come from `formulas`, times and gates from the producer.
"""

import copy
import hashlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save

from forgeries import formulas
from mpdeploy.artifact import dumps
from mpdeploy.compare import Latencies, speed
from mpdeploy.gates import judge
from mpdeploy.recipe import Gates

SAMPLES, VALIDATION, CLASSES = 40, 120, 12
BLOCKS, CALLS = 6, 5
CONFIDENCE = 0.95
CPU, GPU, INT8 = "onnxruntime-cpu-fp32", "tensorrt_rtx-sm80-fp16", "onnxruntime-cpu-int8"
EPSILON = 1e-3
ALPHA = 0.05
STAGES, CHAIN = ("dense", "pruned", "tuned"), ("dense", "pruned", "tuned", "onnx")
GATES = {
    "max_accuracy_drop": 10.0,
    "min_agreement": 0.5,
    "max_violations": 0,
    "min_certified": 0.1,
    "min_speedup": 1.05,
    "max_noise": 3.0,
}
RECIPE = f"""\
schema = 1
name = "tiny"

[prune]
pattern = "2:4"

[tune]
epochs = 1

[certify]
keep = 4
reference = 3

[build]
engines = [
    {{ runtime = "onnxruntime", target = "cpu", precision = "fp32" }},
    {{ runtime = "onnxruntime", target = "cpu", precision = "int8" }},
    {{ runtime = "tensorrt_rtx", target = "sm80", precision = "fp16" }},
]

[validate]
deploy = "{CPU}"
blocks = {BLOCKS}
noise = 16
alpha = {ALPHA}

[gates]
""" + "".join(f"{name} = {limit}\n" for name, limit in GATES.items())
LAYERS = (("stem", "conv2d", ""), ("mix", "conv2d", "2:4"), ("fc", "linear", "2:4"), ("head", "linear", ""))
DENSE_REASON = "It is the stem or the head, which stay dense."


@dataclass
class Draft:
    """A bundle in memory: what a lie changes before it is written and hashed.

    `full` holds all logits, of which `rederive` keeps what the files keep.
    """

    json: dict[str, Any]
    tensors: dict[str, dict[str, Any]]
    onnx: dict[str, onnx.ModelProto]
    raw: dict[str, bytes]
    full: dict[str, dict[str, Any]] = field(default_factory=dict)

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
        return seal(root, listed(files))

    def digest(self) -> str:
        """The bundle's digest, which an honest producer announces elsewhere."""
        return sha256(manifest_of(listed(self.parts())).encode())

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

    def restate(self, change: Callable[[dict[str, Any]], Any], file: str = "model.onnx") -> None:
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

    def ask(self, table: str, **keys: Any) -> None:
        """Change the recipe, as its author would: in recipe.toml by an override on record, and in the lock."""
        lock = self.json["recipe.lock.json"]
        lock.setdefault(table, {}).update(keys)
        for key, value in keys.items():
            text = json.dumps(value) if not isinstance(value, dict) else toml(value)
            lock["sets"].append(f"{table}.{key}={text}")

    def rebind(self) -> None:
        """Hash again whatever names the hash of another file, in the order in which the files are made."""
        files = self.parts()

        def digest(name: str) -> str:
            return sha256(files.get(name, b""))

        certificate, results = self.json.get("certificate.json"), self.json.get("results.json")
        engines = {}
        for name, value in self.json.items():
            if name.endswith("/engine.json"):
                folder = name.removesuffix("/engine.json")
                file = f"{folder}/{value['file']}"
                value |= {"sha256": digest(file), "size": len(files.get(file, b""))}
                value["source"]["onnx"] = digest(value["source"]["file"])
                if "quantised" in value["source"]:
                    value["source"]["quantised"] = digest(f"{folder}/quantised.onnx")
                engines[folder.partition("/")[2]] = value["sha256"]
        if isinstance(certificate, dict):
            weights = {stage: digest(f"weights/{stage}.safetensors") for stage in STAGES}
            certificate["binds"] |= {"weights": weights, "preprocessing": digest("preprocessing.json")}
            certificate["binds"]["ids"] = sha256("\n".join(certificate["ids"]).encode())
        if isinstance(results, dict):
            exported = [name for name in files if name.endswith(".onnx") and "/" not in name]
            bound = sha256(json.dumps(certificate).encode())
            results["binds"] = {"certificate": bound, "onnx": {name: digest(name) for name in exported}}
            results["binds"]["engines"] = engines

    def rederive(self) -> None:
        """Compute ledger, certificate, results and verdict again from logits and times, as an honest producer would."""
        derive_certificate(self)
        derive_results(self)
        derive_verdict(self)
        self.rebind()


def toml(value: dict[str, Any]) -> str:
    """An inline table."""
    return "{" + ", ".join(f"{key} = {json.dumps(item)}" for key, item in value.items()) + "}"


def listed(files: dict[str, bytes]) -> dict[str, Any]:
    return {name: {"sha256": sha256(data), "size": len(data)} for name, data in files.items()}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def manifest_of(files: dict[str, Any]) -> str:
    """The text of manifest.json."""
    return dumps({"schema": 1, "kind": "mpdeploy-bundle", "name": "tiny", "mpdeploy": "0", "chain": {}, "files": files})


def seal(root: Path, files: dict[str, Any]) -> str:
    """Write manifest.json and return its digest."""
    text = manifest_of(files)
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


ORDERS = (
    (
        {"name": "stem -> mix", "kind": "bottleneck", "size": 8, "blocks": 1},
        (("stem.weight", 0), ("stem.bias", 0)),
        (("mix.weight", 1),),
        [3, 0, 1, 2, 7, 6, 5, 4],
    ),
    (
        {"name": "mix -> fc", "kind": "hidden", "size": 8, "blocks": 2},
        tuple((f"{layer}.{part}", 0) for layer, part in (
            ("mix", "weight"), ("norm", "weight"), ("norm", "bias"), ("norm", "running_mean"), ("norm", "running_var"),
            ("ln", "weight"), ("ln", "bias"),
        )),
        (("fc.weight", 1),),
        [1, 0, 3, 2, 4, 5, 7, 6],
    ),
)  # fmt: skip


def make_orders() -> dict[str, Any]:
    """orders.json: two sets of channels were put into another order."""
    folded = []
    for about, producers, consumers, order in ORDERS:
        sides = {"producers": producers, "consumers": consumers}
        members = {k: [{"tensor": t, "axis": a, "start": 0} for t, a in side] for k, side in sides.items()}
        folded.append({"coupling": {**about, **members}, "order": order})
    return {"logit_change": 0.0, "tried": [{"order": True}, {"order": True}], "refused": {}, "folded": folded}


def in_order(dense: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The dense weights with both orders folded in, row by row."""
    state = {name: array.copy() for name, array in dense.items()}
    for _, producers, consumers, order in ORDERS:
        for name, axis in (*producers, *consumers):
            old = np.moveaxis(state[name], axis, 0)
            new = old.copy()
            for i, source in enumerate(order):
                new[i] = old[source]
            state[name] = np.ascontiguousarray(np.moveaxis(new, 0, axis))
    return state


def make_weights(rng: np.random.Generator) -> dict[str, dict[str, np.ndarray]]:
    """State dicts of the dense, pruned and tuned network."""
    shapes = {"stem.weight": (8, 4, 3, 3), "mix.weight": (8, 8, 3, 3), "fc.weight": (16, 8)}
    shapes |= {"head.weight": (CLASSES, 16), "stem.bias": (8,), "norm.weight": (8,), "norm.bias": (8,)}
    shapes |= {"norm.running_mean": (8,), "ln.weight": (8,), "ln.bias": (8,), "fc.bias": (16,), "head.bias": (CLASSES,)}
    dense = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    dense["norm.running_var"] = rng.uniform(0.5, 2.0, 8).astype(np.float32)
    dense["norm.num_batches_tracked"] = np.array(7, np.int64)
    pruned = {name: two_of_four(w) if name in ("mix.weight", "fc.weight") else w for name, w in in_order(dense).items()}
    # What a refit moves beside the weights: biases, and the statistics of the norm behind a layer.
    for name, by in (("fc.bias", 0.125), ("norm.running_mean", 0.25), ("norm.running_var", 0.5)):
        pruned[name] = pruned[name] + np.float32(by)
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
    """Logits of four networks, each a small step from the last, mostly right."""
    dense = rng.normal(size=(n, CLASSES)) + 3.5 * np.eye(CLASSES)[labels]
    pruned = dense + rng.normal(scale=0.35, size=dense.shape)
    tuned = pruned + rng.normal(scale=0.1, size=dense.shape)
    found = {"dense": dense, "pruned": pruned, "tuned": tuned, "onnx": tuned + rng.normal(scale=1e-6, size=dense.shape)}
    return {name: z.astype(np.float32) for name, z in found.items()}


def derive_certificate(draft: Draft) -> None:
    """ledger.safetensors and certificate.json from the certification logits."""
    full, asked = draft.full["ledger"], draft.json["recipe.lock.json"]["certify"]
    columns = formulas.ledger_columns(full["labels"], {name: full[name] for name in STAGES}, asked["keep"])
    verdict, kept = formulas.verdicts(columns, asked["reserve"]), columns["kept_classes"]
    g = min(len(verdict), asked["reference"])
    exact = formulas.at_kept(full["exact"][:g], kept[:g], np.float64).reshape(g, kept.shape[1] + 1)
    draft.tensors["ledger.safetensors"] = {**columns, "verdict": verdict, "reference": exact}
    margin, slack = ([formulas.slack(row) for row in columns["logits"][:, at]] for at in (0, -1))
    moved = columns["displacement"]
    draft.json["certificate.json"] = {
        "schema": 2,
        "samples": len(verdict),
        "classes": CLASSES,
        "kept": kept.shape[1],
        "ids": draft.json["calibration.json"]["certification_ids"],
        "reserve": asked["reserve"],
        "stages": list(STAGES),
        "counts": {kind: int((verdict == at).sum()) for at, kind in enumerate(("flipped", "kept", "certified"))},
        "tests": {
            "pairwise": sum(value > 0 for value in slack),
            "span": sum(bool(m > d) for m, d in zip(margin, moved[:, 1], strict=True)),
            "two_inf": sum(bool(m > 2 * d) for m, d in zip(margin, moved[:, 0], strict=True)),
        },
        "top1": {name: int(sum(right(columns, at))) for at, name in enumerate(STAGES)},
        "margin_median": formulas.number(np.median(margin)),
        "slack_median": formulas.number(np.median(slack)),
        "reference": formulas.reference(full["exact"][:g], full["dense"][:g]),
        "spent": formulas.spent(list(STAGES), columns),
        "binds": {
            "versions": {"numpy": "2.1.0", "torch": "2.7.0"},
            "device": "a CPU",
            "precision": "float32",
            "batch": asked["batch"],
        },
        "zero_budget": {
            "fc": {"inputs": 8, "rank": 6, "dead": 1, "constant": 0, "dependent": 1, "rows": 99, "residual": 1e-7,
                   "allowance": 4 * 2.0**-23 * math.sqrt(8), "note": ""},
        },
        "objective": {"stage": "tuned", "changed": objective(draft)},
    }  # fmt: skip


def right(columns: dict[str, np.ndarray], at: int) -> list[bool]:
    """Which samples a stage gives their true label."""
    rows = zip(columns["logits"][:, at], columns["kept_classes"], columns["labels"], strict=True)
    return [bool(formulas.decision(row, kept) == label) for row, kept, label in rows]


def objective(draft: Draft) -> list[dict[str, Any]]:
    """Norms of what went from each weight, by a singular value decomposition."""
    dense, tuned = in_order(draft.tensors["weights/dense.safetensors"]), draft.tensors["weights/tuned.safetensors"]
    rows = []
    for name, array in dense.items():
        if array.ndim > 1 and not np.array_equal(array, tuned[name]):
            rest = array.astype(np.float64) - tuned[name]
            largest = float(np.linalg.svd(rest.reshape(len(rest), -1), compute_uv=False)[0])
            norms = {"frobenius": float(np.linalg.norm(rest)), "l1": float(np.abs(rest).sum())}
            rows.append({"tensor": name, **norms, "spectral_upper": largest * (1 + 1e-9)})
    return rows


def derive_results(draft: Draft) -> None:
    """samples.safetensors, results.json and disagreement.json from the validation logits and the times."""
    full, ledger = draft.full["samples"], draft.tensors["ledger.safetensors"]
    labels, own, keep = full["labels"], full[f"engine.{CPU}"], draft.json["recipe.lock.json"]["certify"]["keep"]
    columns = formulas.ledger_columns(labels, {name: full[name] for name in CHAIN}, keep, (own,))
    kept = columns["kept_classes"]
    eps = np.array([formulas.eps_of(a, b) for a, b in zip(full["onnx"], own, strict=True)])
    steps = zip(full["dense"], full["onnx"], own, kept[:, 0], strict=True)
    share = np.array([formulas.share_of(z, a, b, int(y)) for z, a, b, y in steps])
    there = formulas.at_kept(full[f"certification.{CPU}"], ledger["kept_classes"])
    there = there.reshape(len(there), ledger["kept_classes"].shape[1] + 1)
    samples = draft.tensors["samples.safetensors"]
    for name in ("labels", "kept_classes", "logits", "eps", "share"):
        samples[name] = columns[name]
    samples |= {f"engine.{CPU}": formulas.at_kept(own, kept), f"engine.{CPU}.eps": eps, f"engine.{CPU}.share": share}
    samples[f"certification.{CPU}"] = there
    longer = {
        "logits": np.concatenate([columns["logits"], samples[f"engine.{CPU}"][:, None]], axis=1),
        "eps": np.concatenate([columns["eps"], eps[:, None]], axis=1),
        "share": np.concatenate([columns["share"], share[:, None]], axis=1),
        "kept_classes": kept,
        "labels": columns["labels"],
    }
    slacks = [formulas.slack(row) for row in samples[f"engine.{CPU}"]]
    certified = [formulas.slack(row) for row in there]
    lost = np.array([not value > 0 for value in certified], bool)
    broken = np.flatnonzero(lost & (ledger["verdict"] == 2))
    finite = all(math.isfinite(value) for value in [*slacks, *certified])
    n, dense_right, own_right = len(labels), right(longer, 0), right(longer, -1)
    seconds = [samples[f"latency.{name}"].tobytes() for name in (CPU, f"{CPU}.dense")]
    measured = {
        "id": CPU,
        "status": "measured",
        "why_not": "",
        "top1": formulas.interval(sum(own_right), n),
        "agreement": formulas.interval(sum(value > 0 for value in slacks), n),
        "flips": formulas.flips(dense_right, own_right),
        "certified": {
            "n": int((ledger["verdict"] == 2).sum()),
            "violations": len(broken),
            "violating_ids": [draft.json["certificate.json"]["ids"][i] for i in broken],
            "kept_broken": int((lost & (ledger["verdict"] == 1)).sum()),
        },
        "spent": formulas.spent([*CHAIN, "engine"], longer) if finite else [],
        "finite": finite,
        "batch_consistent": True,
        "latency": {"batch": 1, "threads": 1, "twin": f"{CPU}.dense", **copy.deepcopy(timed(*seconds))},
        "noise_floor": formulas.noise(samples[f"engine.{CPU}.sigma"], samples[f"engine.{CPU}.error"], 0.01),
    }
    draft.json["results.json"] = {
        "schema": 2,
        "confidence": CONFIDENCE,
        "validation": {"samples": n, "classes": CLASSES},
        "dense_top1": formulas.interval(sum(dense_right), n),
        "tuned_top1": formulas.interval(sum(right(columns, 2)), n),
        "export_noise": formulas.noise(samples["onnx.sigma"], samples["onnx.error"], 0.01),
        "engines": [
            measured,
            {"id": GPU, "status": "not run", "why_not": "There is no GPU here."},
            {"id": INT8, "status": "not run", "why_not": "It is only here to be looked at."},
        ],
    }
    asked, ids = draft.json["recipe.lock.json"]["validate"], draft.json["calibration.json"]["validation_ids"]
    clusters = [re.search(asked["cluster"], name)[1] for name in ids] if asked["cluster"] else ids
    scale = draft.json["certificate.json"]["margin_median"]
    logits = {CPU: samples[f"engine.{CPU}"]}
    if scale:
        draft.json["disagreement.json"] = formulas.disagreement(
            logits, CPU, asked["alpha"], scale, CONFIDENCE, 2, clusters, asked["cluster"]
        )
        rule = draft.json["disagreement.json"]["rule"]
        kept = {key: rule[key] for key in ("engine", "tau", "alpha", "confidence", "candidates")}
        draft.json["abstain.json"] = {"schema": 1, "classes": CLASSES, **kept}


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
    verdict = judge(gates, draft.json["recipe.lock.json"]["validate"]["deploy"], results, certificate)
    for row in verdict["gates"]:
        row["measured"] = None if row["measured"] is None else formulas.number(row["measured"])
    draft.json["verdict.json"] = verdict


# -------------------------------------------------------------------------------------------------------- all of it


def engine_manifest(name: str, file: str) -> dict[str, Any]:
    runtime, target, precision = name.removesuffix(".dense").split("-")
    weights = "dense" if name.endswith(".dense") else "sparse"
    row = {"schema": 1, "id": name, "runtime": runtime, "target": target, "precision": precision, "weights": weights}
    row |= {"file": file, "asked": {"precision": precision}, "read_back": {}, "batch": [1, 8, 64], "threads": 1}
    source = ("dense" if weights == "dense" else "model") + (".fp16.onnx" if precision == "fp16" else ".onnx")
    quantised = {"quantised": ""} if precision == "int8" else {}
    return row | {"source": {"file": source, "onnx": "", **quantised}}


def in_integers(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph with its matrices stored in 8 bits, which is all that is looked at."""
    small = copy.deepcopy(model)
    for tensor in small.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.ndim > 1:
            tensor.CopyFrom(numpy_helper.from_array(np.clip(32 * array, -127, 127).astype(np.int8), tensor.name))
    return small


@cache
def _made(seed: int, keep: int) -> Draft:
    """Build a consistent bundle."""
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
    draft.json["orders.json"] = make_orders()
    draft.json["preprocessing.json"] = {"input_size": [4, 8, 8], "mean": [0.5], "std": [0.25]}
    draft.json["provenance.json"] = {"packages": {"numpy": "2.1.0", "onnx": "1.17.0"}}
    draft.json["calibration.json"] = {
        "seed": 0,
        "split": "train",
        "calibration_ids": [f"train/{i}" for i in range(30)],
        "certification_ids": [f"train/{100 + i}" for i in range(SAMPLES)],
        "validation_ids": [f"val/{i}" for i in range(VALIDATION)],
    }
    engines = [dict(zip(("runtime", "target", "precision"), name.split("-"), strict=True)) for name in (CPU, INT8, GPU)]
    draft.json["recipe.lock.json"] = {
        "schema": 1,
        "name": "tiny",
        "prune": {
            "pattern": "2:4",
            "skip": [],
            "keep_stem_dense": True,
            "keep_head_dense": True,
            "reconstruct": 0,
            "allocate": None,
            "sparsity": None,
        },
        "tune": {"epochs": 1},
        "certify": {"reserve": 0.01, "keep": 4, "reference": 3, "batch": 64},
        "validate": {
            "deploy": CPU,
            "blocks": BLOCKS,
            "batch": 1,
            "calls": CALLS,
            "confidence": CONFIDENCE,
            "noise": 16,
            "alpha": ALPHA,
            "cluster": "",
        },
        "build": {"engines": engines},
        "gates": dict(GATES),
        "sets": [],
    }
    draft.raw["recipe.toml"] = RECIPE.encode()
    if keep != 4:
        draft.ask("certify", keep=keep)
    for name in (CPU, f"{CPU}.dense", INT8, f"{INT8}.dense", GPU, f"{GPU}.dense"):
        folder, exported = f"engines/{name}", draft.onnx["dense.onnx" if name.endswith(".dense") else "model.onnx"]
        file = "model.engine" if name.startswith(GPU) else "model.onnx"
        draft.json[f"{folder}/engine.json"] = engine_manifest(name, file)
        if file == "model.engine":
            draft.raw[f"{folder}/{file}"] = rng.bytes(64)
        else:
            draft.onnx[f"{folder}/{file}"] = in_integers(exported) if name.startswith(INT8) else exported
        if name.startswith(INT8):
            draft.onnx[f"{folder}/quantised.onnx"] = draft.onnx[f"{folder}/{file}"]
    draft.full["ledger"] = make_ledger(rng)
    draft.full["samples"] = make_samples(rng, draft.full["ledger"])
    draft.tensors["samples.safetensors"] = make_times(rng)
    draft.rederive()
    return draft


def make_draft(seed: int = 0, keep: int = 4) -> Draft:
    """Build a consistent bundle, to be changed at will.

    Args:
        seed: of everything that is drawn.
        keep: classes kept of each sample; CLASSES or more keeps all.
    """
    return copy.deepcopy(_made(seed, keep))


def make_ledger(rng: np.random.Generator) -> dict[str, np.ndarray]:
    labels = rng.integers(0, CLASSES, SAMPLES)
    full = {"labels": labels, **make_logits(rng, SAMPLES, labels)}
    return {**full, "exact": full["dense"] + rng.normal(scale=1e-6, size=full["dense"].shape)}


def make_samples(rng: np.random.Generator, ledger: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    labels = rng.integers(0, CLASSES, VALIDATION)
    full = {"labels": labels, **make_logits(rng, VALIDATION, labels)}
    for name, base in ((f"engine.{CPU}", full["onnx"]), (f"certification.{CPU}", ledger["tuned"])):
        full[name] = (base + rng.normal(scale=1e-4, size=base.shape)).astype(np.float32)
    return full


def make_times(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Seconds of each call, and what the engine's arithmetic predicts for a few pairs of logits."""
    samples = {}
    for name, base in ((f"latency.{CPU}", 1.0e-3), (f"latency.{CPU}.dense", 1.2e-3)):
        samples[name] = base * rng.lognormal(sigma=0.02, size=BLOCKS * 2 * CALLS)
    for name in (f"engine.{CPU}", "onnx"):
        samples[f"{name}.sigma"] = rng.uniform(1e-4, 2e-4, 16)
        samples[f"{name}.error"] = samples[f"{name}.sigma"] * rng.normal(scale=0.8, size=16)
    return samples
