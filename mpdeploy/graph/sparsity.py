"""The N:M manifest of an ONNX graph, and the check that derives it again from the bytes.

A Linear may become MatMul with a transposed constant: its torch name is gone and its groups run along another axis.
So a weight is found from the node that consumes it, never from its name. The manifest is a hint that travels in
`ModelProto.metadata_props`; `check` believes the tensors only.
"""

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from mpdeploy.errors import CorruptArtifact, StageFailed

Json = dict[str, Any]

MANIFEST_KEY = "mpdeploy.sparsity"
LAYER_KEY = "mpdeploy.layer"
SCHEMA = 1
UNSTRUCTURED = "unstructured"  # the pattern of a layer whose zeros lie anywhere: dense to every engine
_PATTERN = re.compile(r"([1-9][0-9]*):([1-9][0-9]*)")
_QUANTIZED = "_quantized"  # ONNX Runtime's quantiser appends it to the names of weights
_PASSES = frozenset({"Identity", "Cast", "CastLike", "QuantizeLinear", "DequantizeLinear", "Transpose"})


@dataclass(frozen=True)
class WeightUse:
    """One constant as the weight of one Conv, MatMul or Gemm.

    Attributes:
        initializer: Name of the constant (initializer or output of a Constant node).
        node: Name of the consumer, or its first output where it has no name.
        op: "Conv", "MatMul" or "Gemm"; ONNX Runtime's fused forms keep their own name.
        layer: torch layer recorded at export, or "".
        axis: Axis of the stored tensor along which the consumer sums, which is where N:M groups run.
        groups: The `group` attribute of a Conv, 1 elsewhere.
        dtype: numpy name of the stored type: "float32", "float16", "bfloat16", "int8", ...
        values: The stored tensor.
        zero_is_zero: False where a quantised weight has a zero point other than 0: its stored zeros mean nothing.
    """

    initializer: str
    node: str
    op: str
    layer: str
    axis: int
    groups: int
    dtype: str
    values: NDArray[Any] = field(repr=False, compare=False)
    zero_is_zero: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the stored tensor."""
        return tuple(int(size) for size in self.values.shape)

    @property
    def nonzero(self) -> NDArray[np.bool_]:
        """Which weights are not zero; NaN is not zero."""
        if not self.zero_is_zero:
            return np.ones(self.values.shape, dtype=bool)
        return np.asarray(self.values != 0, dtype=bool)

    @property
    def density(self) -> float:
        """Share of weights that are not zero; 0 for an empty tensor."""
        return int(np.count_nonzero(self.nonzero)) / max(self.values.size, 1)

    @property
    def sha256(self) -> str:
        """Digest of the tensor's little-endian C-order bytes."""
        native = np.ascontiguousarray(self.values)
        return hashlib.sha256((native if sys.byteorder == "little" else native.byteswap()).tobytes()).hexdigest()

    def bad_groups(self, pattern: str) -> int:
        """Groups with more nonzero weights than `pattern` keeps (see `bad_groups`)."""
        return bad_groups(self.nonzero, self.axis, pattern)


def parse_pattern(pattern: str) -> tuple[int, int]:
    """("2:4") -> (2, 4): keep 2 of each 4.

    Raises:
        ValueError: Not N:M with 0 < N <= M.
    """
    match = _PATTERN.fullmatch(pattern)
    keep, group = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 0 < keep <= group:
        raise ValueError(f"{pattern!r} is not an N:M pattern such as 2:4.")
    return keep, group


def bad_groups(nonzero: NDArray[np.bool_], axis: int, pattern: str) -> int:
    """Groups of consecutive elements along `axis` with more than N nonzeros of M.

    Raises:
        ValueError: `pattern` is no pattern, or M does not divide the length of the axis.
    """
    keep, group = parse_pattern(pattern)
    shape = nonzero.shape
    if shape[axis] % group:
        raise ValueError(f"groups of {group} do not fit into an axis of {shape[axis]}")
    grouped = nonzero.reshape(*shape[:axis], shape[axis] // group, group, *shape[axis + 1 :])
    kept = np.zeros((*grouped.shape[: axis + 1], *grouped.shape[axis + 2 :]), dtype=np.uint16)
    for position in range(group):  # a sum over the short axis of a strided view is several times slower
        kept += grouped[(slice(None),) * (axis + 1) + (position,)]
    return int(np.count_nonzero(kept > keep))


def node_layer(node: NodeProto) -> str:
    """The torch layer that a node was exported from, or "" where none is recorded."""
    return next((entry.value for entry in node.metadata_props if entry.key == LAYER_KEY), "")


def weight_uses(model: ModelProto) -> list[WeightUse]:
    """Every constant weight of a Conv (axis 1), MatMul (K of B) or Gemm (K of B), in the order of the nodes.

    Looks through Cast, Identity, Transpose and QuantizeLinear/DequantizeLinear to the stored tensor. Weights that are
    computed from the input are no constants and are not listed; nor are the bodies of If and Loop.
    """
    return list(_uses(model))


def _uses(model: ModelProto) -> Iterator[WeightUse]:
    tensors = _constants(model)
    producers = {name: node for node in model.graph.node for name in node.output}
    arrays: dict[str, NDArray[Any]] = {}
    for node in model.graph.node:
        if len(node.input) < 2 or not _is_weighted(node):
            continue
        chain, name = [], node.input[1]
        while name not in tensors and name in producers and producers[name].op_type in _PASSES:
            chain.append(producers[name])
            name = producers[name].input[0]
        if name not in tensors:
            continue
        if name not in arrays:
            arrays[name] = numpy_helper.to_array(tensors[name])
        values = arrays[name]
        axis = _contracted_axis(node, values.ndim)
        if axis is None:
            continue
        for step in chain:
            if step.op_type == "Transpose":
                axis = int(_attributes(step).get("perm", list(range(values.ndim))[::-1])[axis])
        zero_points = [tensors.get(step.input[2]) for step in chain if _has_zero_point(step)]
        yield WeightUse(
            initializer=name,
            node=node.name or node.output[0],
            op=node.op_type,
            layer=node_layer(node),
            axis=axis,
            groups=int(_attributes(node).get("group", 1)) if "Conv" in node.op_type else 1,
            dtype=values.dtype.name,
            values=values,
            zero_is_zero=all(zero is not None and not numpy_helper.to_array(zero).any() for zero in zero_points),
        )


def _constants(model: ModelProto) -> dict[str, TensorProto]:
    found = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            found.update((node.output[0], attribute.t) for attribute in node.attribute if attribute.name == "value")
    return found


def _has_zero_point(node: NodeProto) -> bool:
    return node.op_type == "DequantizeLinear" and len(node.input) > 2 and bool(node.input[2])


def _is_weighted(node: NodeProto) -> bool:
    if node.domain in {"", "ai.onnx"}:
        return node.op_type in {"Conv", "MatMul", "Gemm"}
    # What ONNX Runtime's optimiser leaves. Its blocked nchwc layout is another domain: channels are interleaved there.
    return node.domain == "com.microsoft" and node.op_type in {"FusedConv", "FusedMatMul", "FusedGemm"}


def _attributes(node: NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _contracted_axis(node: NodeProto, rank: int) -> int | None:
    """The axis of the weight, as the node sees it, that is summed over; None where the rank fits no weight."""
    if "Conv" in node.op_type:
        return 1 if rank >= 3 else None
    transposed = bool(_attributes(node).get("transB", 0))
    if "Gemm" in node.op_type:
        return int(transposed) if rank == 2 else None
    if rank == 0:
        return None
    return rank - 1 if transposed and rank > 1 else max(rank - 2, 0)


def _entry(use: WeightUse, layer: str) -> Json:
    return {
        "initializer": use.initializer,
        "layer": layer,
        "node": use.node,
        "op": use.op,
        "axis": use.axis,
        "shape": list(use.shape),
        "dtype": use.dtype,
        "sha256": use.sha256,
    }


def dumps(manifest: Mapping[str, Any]) -> str:
    """The manifest's one spelling: the same characters in the graph and in the file beside it."""
    return json.dumps(manifest, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=True) + "\n"


def annotate(
    model: ModelProto,
    layers: Sequence[Mapping[str, Any]],
    permutations: Mapping[str, Sequence[int]] | None = None,
) -> Json:
    """Write the manifest into `model` and return it.

    Args:
        model: A graph whose weight nodes name their torch layer, as `export_onnx` writes it.
        layers: Per torch layer "name", "pattern" ("" = dense; UNSTRUCTURED is listed as dense, with its reason) and
            "reason" (why dense).
        permutations: Input-channel order per layer name, where channels were reordered before pruning.

    Raises:
        StageFailed: A pruned layer has no constant weight in the graph, or its weight breaks the pattern on the axis
            that its consumer reads.
    """
    table = {str(layer["name"]): layer for layer in layers}
    orders = permutations or {}
    weights: list[Json] = []
    dense: list[Json] = []
    for use in weight_uses(model):
        layer = table.get(use.layer, {})
        pattern = str(layer.get("pattern", ""))
        if pattern == UNSTRUCTURED:
            dense.append({**_entry(use, use.layer), "reason": "its zeros lie anywhere, so no engine gains from them"})
        elif pattern:
            order = orders.get(use.layer)
            permutation = None if order is None else [int(index) for index in order]
            weights.append(_sparse_entry(use, use.layer, pattern, permutation))
        else:
            reason = str(layer.get("reason", "")) or "not in the table of layers"
            dense.append({**_entry(use, use.layer), "reason": reason})
    found = {entry["layer"] for entry in weights}
    grouped = [name for name, layer in table.items() if layer.get("pattern") not in (None, "", UNSTRUCTURED)]
    _refuse_missing([name for name in grouped if name not in found])
    return _store(model, {"schema": SCHEMA, "weights": weights, "dense": dense})


def _sparse_entry(use: WeightUse, layer: str, pattern: str, permutation: list[int] | None) -> Json:
    fault = _pattern_fault(use, pattern)
    if fault:
        raise StageFailed(
            f"The weight {use.initializer} of {layer or use.node} is not {pattern} on axis {use.axis}, "
            f"where its {use.op} reads it: {fault}.",
            hint="prune along the input channels and keep zeros through every later step",
        )
    return {**_entry(use, layer), "pattern": pattern, "density": use.density, "permutation": permutation}


def _pattern_fault(use: WeightUse, pattern: str) -> str:
    try:
        bad = use.bad_groups(pattern)
    except ValueError as error:
        return str(error).rstrip(".")
    return f"{bad} groups hold too many nonzeros" if bad else ""


def _refuse_missing(names: Sequence[str]) -> None:
    if names:
        raise StageFailed(
            f"The pruned layer {names[0]} has no constant weight in the graph ({len(names)} such layers).",
            hint="a weight that the graph computes, or packs into a blocked layout, cannot be sparse in an engine",
        )


def _store(model: ModelProto, manifest: Json) -> Json:
    kept = {entry.key: entry.value for entry in model.metadata_props if entry.key != MANIFEST_KEY}
    helper.set_model_props(model, {**kept, MANIFEST_KEY: dumps(manifest)})
    tensors = _constants(model)
    for entry in manifest["weights"]:
        hint = {"axis": entry["axis"], "layer": entry["layer"], "pattern": entry["pattern"]}
        tensor = tensors[entry["initializer"]]
        del tensor.metadata_props[:]
        tensor.metadata_props.add(key=MANIFEST_KEY, value=json.dumps(hint, sort_keys=True))
    return manifest


def read(model: ModelProto) -> Json:
    """The manifest that the model carries, not yet compared with its bytes.

    Raises:
        CorruptArtifact: There is none, or it is not a manifest of this schema.
    """
    text = next((entry.value for entry in model.metadata_props if entry.key == MANIFEST_KEY), None)
    if text is None:
        raise CorruptArtifact(
            f"The model has no sparsity manifest: its metadata lacks {MANIFEST_KEY}.",
            hint="a graph tool dropped it; `reattach` puts the sidecar's manifest back",
        )
    try:
        manifest = json.loads(text)
    except ValueError as error:
        raise CorruptArtifact(f"The model's sparsity manifest is not JSON: {error}.") from error
    _entries(manifest)
    return dict(manifest)


def _entries(manifest: Any) -> list[Json]:
    """All entries, or CorruptArtifact where `manifest` does not have the shape of one."""
    lists = [manifest.get(key) for key in ("weights", "dense")] if isinstance(manifest, dict) else [None]
    if not all(isinstance(items, list) and all(isinstance(item, dict) for item in items) for items in lists):
        raise CorruptArtifact("The sparsity manifest is malformed: it needs the lists `weights` and `dense`.")
    if manifest.get("schema") != SCHEMA:
        raise CorruptArtifact(f"The sparsity manifest has schema {manifest.get('schema')!r}, expected {SCHEMA}.")
    for item in manifest["weights"]:
        if not isinstance(item.get("pattern"), str) or not _PATTERN.fullmatch(item["pattern"]):
            raise CorruptArtifact(f"The sparsity manifest gives {item.get('initializer')!r} no N:M pattern.")
    return [*manifest["weights"], *manifest["dense"]]


def check(model: ModelProto) -> None:
    """Derive every statement of the manifest again from the tensors and compare.

    Raises:
        CorruptArtifact: There is no manifest; a weight that it lists has no such consumer; a weight that the graph
            uses is not listed; or axis, shape, type, digest, density or pattern differ. Names the first such weight.
    """
    manifest = read(model)
    uses = {(use.initializer, use.node): use for use in weight_uses(model)}
    entries = _entries(manifest)
    listed: set[tuple[Any, Any]] = set()
    for entry in entries:
        key = (entry.get("initializer"), entry.get("node"))
        if key not in uses:
            raise CorruptArtifact(f"The manifest lists the weight {key[0]} of node {key[1]}, which the graph lacks.")
        if key in listed:
            raise CorruptArtifact(f"The manifest lists the weight {key[0]} of node {key[1]} twice.")
        listed.add(key)
        _compare(uses[key], entry)
    for key, use in uses.items():
        if key not in listed:
            raise CorruptArtifact(
                f"The weight {use.initializer} also feeds {use.op} {use.node}, which the manifest does not list."
            )


def _compare(use: WeightUse, entry: Mapping[str, Any]) -> None:
    derived = _entry(use, use.layer or str(entry.get("layer", "")))
    if "pattern" in entry:
        derived["density"] = use.density
    for key, value in derived.items():
        if entry.get(key) != value:
            raise CorruptArtifact(
                f"The weight {use.initializer} of {derived['layer'] or use.node} is not what the manifest says: "
                f"its {key} is {value}, the manifest says {entry.get(key)}."
            )
    fault = _pattern_fault(use, entry["pattern"]) if "pattern" in entry else ""
    if fault:
        raise CorruptArtifact(
            f"The weight {use.initializer} of {derived['layer'] or use.node} is not {entry['pattern']} "
            f"on axis {use.axis}: {fault}."
        )
    order = entry.get("permutation")
    inputs = use.shape[use.axis] * use.groups
    if order is not None and (not isinstance(order, list) or sorted(order) != list(range(inputs))):
        raise CorruptArtifact(f"The permutation of {use.initializer} is no order of its {inputs} input channels.")


def reattach(model: ModelProto, manifest: Mapping[str, Any]) -> Json:
    """Write the manifest of a graph that another tool has rewritten, and return it.

    A tool may rename, transpose or quantise weights and drop metadata. Each weight is matched to the old manifest by
    content, else by name (also with the quantiser's suffix), else by the layer on its node; axis, shape, type, density
    and digest are derived anew.

    Raises:
        CorruptArtifact: `manifest` is malformed.
        StageFailed: A weight that was sparse cannot be found, or is no longer sparse on the axis that is read now.
    """
    old = _entries(dict(manifest))
    weights: list[Json] = []
    dense: list[Json] = []
    found: set[tuple[Any, Any]] = set()
    for use in weight_uses(model):
        entry = _match(use, old)
        layer = use.layer or str(entry.get("layer", ""))
        found.add((entry.get("initializer"), layer))
        if "pattern" in entry:
            weights.append(_sparse_entry(use, layer, entry["pattern"], entry.get("permutation")))
        else:
            dense.append({**_entry(use, layer), "reason": str(entry.get("reason", "not in the manifest"))})
    _refuse_missing(
        [item["layer"] for item in manifest["weights"] if (item.get("initializer"), item.get("layer")) not in found]
    )
    return _store(model, {"schema": SCHEMA, "weights": weights, "dense": dense})


def _match(use: WeightUse, old: Sequence[Json]) -> Json:
    """The old entry of this weight: same content, else same name, else same layer; the node's name breaks ties."""
    digest = use.sha256
    name = use.initializer.removesuffix(_QUANTIZED)
    for candidates in (
        [item for item in old if item.get("sha256") == digest],
        [item for item in old if item.get("initializer") == name],
        [item for item in old if use.layer and item.get("layer") == use.layer],
    ):
        if candidates:
            ranked = sorted(
                candidates,
                key=lambda item: (
                    item.get("layer") != use.layer,
                    item.get("initializer") != name,
                    item.get("node") != use.node,
                ),
            )
            return ranked[0]
    return {}
