"""One function per lie. Each is written with honest hashes, so that it is not caught by the digests alone.

A lie names the claim that has to refuse it, a word of the reason, and whether it is refuted or can't be decided.
"""

import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save

from forgeries.bundle import (
    CLASSES,
    CPU,
    DENSE_REASON,
    GPU,
    Draft,
    annotate,
    embed,
    embedded,
    make_onnx,
    reseal,
    two_of_four,
)


@dataclass(frozen=True)
class Lie:
    """A lie and how it has to be found out."""

    name: str
    claim: str
    word: str
    verdict: str
    change: Callable[[Any], Any]
    on_disk: bool


LIES: list[Lie] = []


def lie(
    claim: str, word: str, verdict: str = "refuted"
) -> Callable[[Callable[[Draft], None]], Callable[[Draft], None]]:
    """Register a change of the draft; it is written and hashed afterwards."""

    def register(change: Callable[[Draft], None]) -> Callable[[Draft], None]:
        LIES.append(Lie(change.__name__, claim, word, verdict, change, on_disk=False))
        return change

    return register


def lie_on_disk(claim: str, word: str) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    """Register a change of the written files."""

    def register(change: Callable[[Path], None]) -> Callable[[Path], None]:
        LIES.append(Lie(change.__name__, claim, word, "refuted", change, on_disk=True))
        return change

    return register


# -------------------------------------------------------------------------------------------------------------- files


@lie_on_disk("files", "extra.bin is there and not listed")
def a_file_that_is_not_listed(root):
    (root / "extra.bin").write_bytes(b"x")


@lie_on_disk("files", "tune.json is listed and not there")
def a_listed_file_that_is_not_there(root):
    edit_manifest(root, lambda files: files.update({"tune.json": {"sha256": "0" * 64, "size": 1}}))


@lie_on_disk("files", "link or a device")
def a_link_instead_of_a_file(root):
    (root / "recipe.toml").rename(root.parent / "outside.toml")
    (root / "recipe.toml").symlink_to(root.parent / "outside.toml")


@lie_on_disk("files", "link or a device")
def a_link_to_a_folder(root):
    (root / "more").symlink_to(root.parent, target_is_directory=True)


@lie_on_disk("files", "link or a device")
def a_pipe(root):
    os.mkfifo(root / "pipe")


@lie_on_disk("files", "has the SHA-256")
def an_edited_file_of_the_same_size(root):
    data = (root / "recipe.toml").read_bytes()
    (root / "recipe.toml").write_bytes(data.replace(b"10.0", b"90.0"))


@lie_on_disk("files", "has the SHA-256")
def a_wrong_sha_in_the_manifest(root):
    edit_manifest(root, lambda files: files["results.json"].update({"sha256": "0" * 64}))


@lie_on_disk("files", "bytes, listed are")
def a_file_that_grew(root):
    with (root / "recipe.toml").open("ab") as file:
        file.write(b"# more\n")


@lie_on_disk("files", "no name within the bundle")
def a_name_that_climbs_out(root):
    edit_manifest(root, lambda files: files.update({"../outside": {"sha256": "0" * 64, "size": 1}}))


@lie_on_disk("files", "no name within the bundle")
def a_name_with_dots_inside(root):
    edit_manifest(root, lambda files: files.update({"weights/../model.onnx": files["model.onnx"]}))


@lie_on_disk("files", "no name within the bundle")
def an_absolute_name(root):
    edit_manifest(root, lambda files: files.update({"/etc/hostname": {"sha256": "0" * 64, "size": 1}}))


@lie_on_disk("files", "no name within the bundle")
def a_name_with_a_drive(root):
    edit_manifest(root, lambda files: files.update({"C:\\x": {"sha256": "0" * 64, "size": 1}}))


@lie_on_disk("files", "no name within the bundle")
def a_manifest_that_lists_itself(root):
    edit_manifest(root, lambda files: files.update({"manifest.json": {"sha256": "0" * 64, "size": 1}}))


@lie_on_disk("files", "without hash and size")
def a_hash_that_is_none(root):
    edit_manifest(root, lambda files: files["results.json"].update({"sha256": "not a hash"}))


@lie_on_disk("files", "lists no file at all")
def a_manifest_of_nothing(root):
    edit_manifest(root, lambda files: files.clear())


@lie_on_disk("files", "more than the 100000 allowed")
def a_manifest_bomb(root):
    edit_manifest(root, lambda files: files.update({f"f{i}": {} for i in range(100_001)}))


def edit_manifest(root: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = root / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest["files"])
    path.write_text(json.dumps(manifest))


# ------------------------------------------------------------------------------------------------------------ formats


@lie("formats", "duplicate key 'verdict'")
def json_with_a_duplicate_key(draft):
    draft.raw["verdict.json"] = b'{"verdict": "holds", "verdict": "refuted", "gates": []}'


@lie("formats", "NaN is not a number")
def json_with_nan(draft):
    draft.raw["tune.json"] = b'{"loss": NaN}'


@lie("formats", "1e999 is not finite")
def json_with_a_number_beyond_all(draft):
    draft.raw["tune.json"] = b'{"loss": 1e999}'


@lie("formats", "tune.json is not strict JSON")
def json_nested_without_end(draft):
    draft.raw["tune.json"] = b"[" * 100_000


@lie("formats", "tune.json is not strict JSON")
def json_that_is_not_text(draft):
    draft.raw["tune.json"] = b'{"a": "\xff"}'


@lie("formats", "tune.json is not strict JSON")
def json_that_is_empty(draft):
    draft.raw["tune.json"] = b""


@lie("formats", "more than the 67108864 allowed")
def json_bomb(draft):
    draft.raw["tune.json"] = b" " * ((1 << 26) + 1)


def tensor_file(header: Any, body: bytes) -> bytes:
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(data)) + data + body


def row(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@lie("formats", "announces a header of")
def tensors_with_a_header_bomb(draft):
    draft.raw["spectra.safetensors"] = struct.pack("<Q", 1 << 62) + b"{}"


@lie("formats", "is cut off")
def tensors_without_a_header(draft):
    draft.raw["spectra.safetensors"] = b"1234"


@lie("formats", "is no JSON object")
def tensors_with_a_list_as_header(draft):
    draft.raw["spectra.safetensors"] = tensor_file([], b"")


@lie("formats", "overlaps the tensor before it")
def tensors_that_overlap(draft):
    draft.raw["spectra.safetensors"] = tensor_file({"a": row("F32", [2], 0, 8), "b": row("F32", [1], 4, 8)}, bytes(8))


@lie("formats", "leaves a hole before it")
def tensors_with_a_hole(draft):
    draft.raw["spectra.safetensors"] = tensor_file({"a": row("F32", [1], 0, 4), "b": row("F32", [1], 8, 12)}, bytes(12))


@lie("formats", "its tensors end at byte 4")
def tensors_with_bytes_behind(draft):
    draft.raw["spectra.safetensors"] = tensor_file({"a": row("F32", [1], 0, 4)}, bytes(40))


@lie("formats", "its tensors end at byte")
def a_truncated_tensor(draft):
    draft.raw["weights/tuned.safetensors"] = save(draft.tensors["weights/tuned.safetensors"])[:-4]
    draft.rebind()


@lie("formats", "duplicate key 'a'")
def tensors_with_one_name_twice(draft):
    text = b'{"a": %b, "a": %b}' % tuple(json.dumps(row("F32", [1], 4 * i, 4 * i + 4)).encode() for i in range(2))
    draft.raw["spectra.safetensors"] = tensor_file(text, bytes(8))


@lie("formats", "unknown type")
def tensors_of_an_unknown_type(draft):
    draft.raw["spectra.safetensors"] = tensor_file({"a": row("F4", [1], 0, 4)}, bytes(4))


@lie("formats", "does not fit bytes")
def tensors_whose_shape_is_another(draft):
    draft.raw["spectra.safetensors"] = tensor_file({"a": row("F32", [3], 0, 8)}, bytes(8))


@lie("formats", "not sizes")
def tensors_with_a_negative_size(draft):
    draft.raw["spectra.safetensors"] = tensor_file({"a": row("F32", [-1], 0, 4)}, bytes(4))


@lie("formats", "not exactly dtype")
def tensors_with_an_extra_field(draft):
    draft.raw["spectra.safetensors"] = tensor_file({"a": {**row("F32", [1], 0, 4), "more": 1}}, bytes(4))


@lie("formats", "holds a tensor of shape")
def tensors_empty_and_enormous(draft):
    draft.raw["spectra.safetensors"] = tensor_file({"a": row("F32", [0, 1 << 47, 1 << 47], 0, 0)}, b"")


def model_bytes(draft: Draft) -> bytes:
    return draft.onnx["model.onnx"].SerializeToString()


@lie("formats", "cut off")
def a_truncated_graph(draft):
    draft.raw["model.onnx"] = model_bytes(draft)[:-100]


@lie("formats", "gives field 7 2 times")
def a_second_graph_in_one_file(draft):
    data = draft.onnx["dense.onnx"].graph.SerializeToString()
    size = helper.make_attribute("n", len(data)).SerializeToString()  # a varint, from a library that knows how
    draft.raw["model.onnx"] = model_bytes(draft) + b"\x3a" + size[size.index(b"\x18") + 1 : -3] + data


@lie("formats", "outside of the file")
def a_constant_outside_of_the_file(draft):
    tensor = draft.constant("val_0")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/hostname")


@lie("formats", "twice, raw and typed")
def a_constant_with_two_values(draft):
    draft.constant("val_0").float_data.extend([1.0] * 128)


@lie("formats", "duplicate name 'val_0'")
def two_constants_of_one_name(draft):
    draft.onnx["model.onnx"].graph.initializer.append(draft.constant("val_0"))


@lie("formats", "which is a constant")
def a_constant_that_a_node_overwrites(draft):
    draft.onnx["model.onnx"].graph.node[0].output[0] = "val_0"


@lie("formats", "sparse tensors")
def a_sparse_constant(draft):
    draft.onnx["model.onnx"].graph.sparse_initializer.add()


@lie("formats", "and 4 bytes")
def a_constant_with_too_few_bytes(draft):
    draft.constant("val_0").raw_data = bytes(4)


@lie("formats", "does not know")
def a_constant_of_an_unknown_type(draft):
    draft.constant("val_0").data_type = TensorProto.STRING


@lie("formats", "duplicate name 'mpdeploy.sparsity'")
def metadata_twice(draft):
    model = draft.onnx["model.onnx"]
    model.metadata_props.append(model.metadata_props[0])


# ------------------------------------------------------------------------------------------------------------ weights


def weights(draft: Draft, stage: str) -> dict[str, Any]:
    return draft.tensors[f"weights/{stage}.safetensors"]


def layer(draft: Draft, name: str) -> dict[str, Any]:
    return next(row for row in draft.json["layers.json"] if row["name"] == name)


def fill_group(array: np.ndarray) -> np.ndarray:
    """Put a third nonzero into one group of four input channels."""
    array = array.copy()
    group = array[0, :4] if array.ndim == 2 else array[0, :4, 0, 0]
    group[np.flatnonzero(group == 0)[0]] = 1.0
    return array


@lie("weights", r"mix in weights/tuned has 1 groups along input channels that are not 2:4")
def a_pattern_lost_in_tuning(draft):
    weights(draft, "tuned")["mix.weight"] = fill_group(weights(draft, "tuned")["mix.weight"])
    draft.rebind()


@lie("weights", r"fc in weights/pruned has 1 groups")
def a_pattern_that_pruning_never_made(draft):
    weights(draft, "pruned")["fc.weight"] = fill_group(weights(draft, "pruned")["fc.weight"])
    draft.rebind()


@lie("weights", "groups along input channels")
def a_mask_on_the_wrong_axis(draft):
    for stage in ("pruned", "tuned"):
        dense = weights(draft, "dense")["mix.weight"]
        weights(draft, stage)["mix.weight"] = np.ascontiguousarray(two_of_four(dense.swapaxes(0, 1)).swapaxes(0, 1))
    draft.rebind()


@lie("weights", "groups along input channels")
def a_mask_on_the_flattened_kernel(draft):
    for stage in ("pruned", "tuned"):
        dense = weights(draft, "dense")["mix.weight"]
        weights(draft, stage)["mix.weight"] = two_of_four(dense.reshape(8, -1)).reshape(dense.shape)
    draft.rebind()


@lie("weights", "fc.weight is not finite everywhere")
def nan_in_a_pruned_weight(draft):
    w = weights(draft, "tuned")["fc.weight"]
    w[np.nonzero(w)[0][0], np.nonzero(w)[1][0]] = np.nan
    draft.rebind()


@lie("weights", "head.bias is not finite everywhere")
def infinity_in_a_bias(draft):
    weights(draft, "pruned")["head.bias"][0] = np.inf
    draft.rebind()


@lie("weights", "other tensors or shapes")
def a_tensor_that_appears_in_tuning(draft):
    weights(draft, "tuned")["fc.scale"] = np.ones(16, np.float32)
    draft.rebind()


@lie("weights", "lists a layer twice")
def a_layer_twice(draft):
    draft.json["layers.json"].append(layer(draft, "fc"))


@lie("weights", "holds no gone.weight")
def a_layer_without_weights(draft):
    draft.json["layers.json"].append({**layer(draft, "fc"), "name": "gone"})


@lie("weights", r"stated is \[8, 16\]")
def a_layer_of_another_shape(draft):
    layer(draft, "fc")["shape"] = [8, 16]


@lie("weights", "claims the density 0.5")
def a_dense_layer_that_claims_to_be_half_empty(draft):
    layer(draft, "head")["density"] = 0.5


@lie("weights", "does not say why")
def a_dense_layer_without_a_reason(draft):
    layer(draft, "head")["reason"] = ""


@lie("weights", "states groups that break a pattern")
def a_dense_layer_with_bad_groups(draft):
    layer(draft, "head")["bad_groups"] = 3


@lie("weights", "keeps everything")
def a_pattern_that_keeps_everything(draft):
    layer(draft, "fc")["pattern"] = "4:4"


@lie("weights", "is no N:M pattern")
def a_pattern_that_is_none(draft):
    layer(draft, "fc")["pattern"] = "2:4:8"


@lie("weights", "don't fit along axis 1")
def a_pattern_that_does_not_fit(draft):
    layer(draft, "fc")["pattern"] = "2:3"


@lie("weights", "gives a reason why it is not")
def a_pruned_layer_with_a_reason(draft):
    layer(draft, "fc")["reason"] = DENSE_REASON


@lie("weights", "states 5 bad groups")
def a_pruned_layer_with_bad_groups_stated(draft):
    layer(draft, "fc")["bad_groups"] = 5


@lie("weights", "states the density 0.25")
def a_density_that_is_too_good(draft):
    layer(draft, "fc")["density"] = 0.25


@lie("weights", "field is missing")
def a_layer_without_a_pattern_field(draft):
    del layer(draft, "fc")["pattern"]


@lie("weights", "none of the 4 layers claims a pattern", "unchecked")
def nothing_pruned_at_all(draft):
    for name in ("mix", "fc"):
        layer(draft, name).update({"pattern": "", "reason": "too hard", "density": None})
    for file in ("model.onnx", "model.fp16.onnx"):
        draft.restate(everything_dense, file)


def everything_dense(manifest: dict[str, Any]) -> None:
    manifest["dense"] += [{**row, "reason": "too hard"} for row in manifest["weights"]]
    manifest["weights"] = []


# ----------------------------------------------------------------------------------------------- manifest and graphs


@lie("sidecar", "is not the metadata")
def an_edited_sidecar(draft):
    draft.json["sparsity.json"]["weights"][0]["layer"] = "other"


@lie("sidecar", "carries no metadata")
def metadata_dropped(draft):
    helper.set_model_props(draft.onnx["model.onnx"], {})


@lie("graph:model.onnx", "metadata mpdeploy.sparsity of model.onnx is not strict JSON")
def metadata_that_is_no_json(draft):
    helper.set_model_props(draft.onnx["model.onnx"], {"mpdeploy.sparsity": "{"})


@lie("graph:model.onnx", "has its inputs along axis 0, listed is axis 1")
def an_edited_axis(draft):
    draft.restate(lambda m: m["weights"][1].update(axis=1))


@lie("graph:model.onnx", "node_head multiplies by head.weight, which the sparsity manifest does not list")
def a_dense_layer_hidden_from_the_manifest(draft):
    draft.restate(lambda m: m["dense"].pop())


@lie("graph:model.onnx", "node_head multiplies by head.weight")
def a_dense_layer_hidden_everywhere(draft):
    draft.json["layers.json"] = [row for row in draft.json["layers.json"] if row["name"] != "head"]
    draft.restate(lambda m: m["dense"].pop())


@lie("graph:model.onnx", "multiplies by head.weight")
def a_hidden_layer_behind_a_transpose(draft):
    graph = draft.onnx["model.onnx"].graph
    node = next(node for node in graph.node if node.name == "node_head")
    node.input[1] = "turned"
    node.attribute[0].i = 0
    place = list(graph.node).index(node)
    graph.node.insert(place, helper.make_node("Transpose", ["same"], ["turned"], name="turn", perm=[1, 0]))
    graph.node.insert(place, helper.make_node("Identity", ["head.weight"], ["same"], name="copy"))
    draft.restate(lambda m: m["dense"].pop())


@lie("graph:model.onnx", "layers.json claims a pattern")
def a_sparse_layer_passed_off_as_dense(draft):
    draft.restate(lambda m: m["dense"].append({**m["weights"].pop(), "reason": "too hard"}))


@lie("graph:model.onnx", "fc is missing from the manifest")
def a_sparse_layer_under_another_name(draft):
    draft.restate(lambda m: m["dense"].append({**m["weights"].pop(), "reason": "too hard", "layer": "other"}))


@lie("graph:model.onnx", "has the SHA-256")
def a_weight_with_another_hash(draft):
    draft.restate(lambda m: m["weights"][0].update(sha256="0" * 64))


@lie("graph:model.onnx", "is not what the Conv node node_stem multiplies by")
def a_weight_of_another_node(draft):
    draft.restate(lambda m: m["weights"][0].update(node="node_stem"))


@lie("graph:model.onnx", "has no constant ghost")
def a_weight_that_is_not_there(draft):
    draft.restate(lambda m: m["weights"][0].update(initializer="ghost"))


@lie("graph:model.onnx", r"listed is \[16, 8\]")
def a_weight_of_another_shape(draft):
    draft.restate(lambda m: m["weights"][1].update(shape=[16, 8]))


@lie("graph:model.onnx", "is float32, listed is float16")
def a_weight_of_another_type(draft):
    draft.restate(lambda m: m["weights"][0].update(dtype="float16"))


@lie("graph:model.onnx", "states the density 0.25")
def a_weight_of_another_density(draft):
    draft.restate(lambda m: m["weights"][0].update(density=0.25))


@lie("graph:model.onnx", "claims 1:4, layers.json '2:4'")
def a_weight_of_another_pattern(draft):
    draft.restate(lambda m: m["weights"][0].update(pattern="1:4"))


@lie("graph:model.onnx", "twice")
def a_weight_listed_twice(draft):
    draft.restate(lambda m: m["weights"].append(m["weights"][0]))


@lie("graph:model.onnx", "has 1 groups along axis 0 that are not 2:4")
def a_pattern_lost_in_the_export(draft):
    draft.set_constant("val_0", fill_group(weights(draft, "tuned")["fc.weight"]).T)


@lie("graph:model.fp16.onnx", "is not finite everywhere")
def an_overflow_in_half_precision(draft):
    array = weights(draft, "tuned")["head.weight"].astype(np.float16)
    array[0, 0] = np.inf
    draft.set_constant("head.weight", array, "model.fp16.onnx")


@lie("graph:model.onnx", "a sub-graph in the node branch", "unchecked")
def weights_in_a_sub_graph(draft):
    graph = draft.onnx["model.onnx"].graph
    body = helper.make_graph([], "body", [], [helper.make_tensor_value_info("x", TensorProto.FLOAT, [])])
    graph.node.append(helper.make_node("If", ["c"], ["x2"], name="branch", then_branch=body, else_branch=body))


@lie("graph:model.onnx", "model-local functions", "unchecked")
def weights_in_a_function(draft):
    draft.onnx["model.onnx"].functions.add(name="f", domain="d")


@lie("graph:model.onnx", "LayerNormalization nodes, not 2")
def a_layer_norm_that_fell_apart(draft):
    draft.json["export.json"]["files"]["model.onnx"]["layer_norm_ops"] = 2


@lie("graph:model.onnx", "has opset 20, export.json says 21")
def another_opset(draft):
    draft.json["export.json"]["files"]["model.onnx"]["opset"] = 21


@lie("graph:model.fp16.onnx", "multiplies by weights of")
def single_precision_sold_as_half(draft):
    draft.onnx["model.fp16.onnx"] = draft.onnx["model.onnx"]


@lie("graph:model.onnx", "has other operators than")
def a_twin_with_more_work_to_do(draft):
    draft.onnx["dense.onnx"].graph.node.append(helper.make_node("Relu", ["logits"], ["more"], name="more"))


@lie("graph:model.onnx", "weights of other shapes")
def a_twin_with_wider_layers(draft):
    tensor = next(t for t in draft.onnx["dense.onnx"].graph.initializer if t.name == "val_0")
    tensor.CopyFrom(numpy_helper.from_array(np.zeros((8, 64), np.float32), "val_0"))


@lie("graph:model.onnx", "there is no dense.onnx", "unchecked")
def a_twin_that_is_not_there(draft):
    del draft.onnx["dense.onnx"]


# ------------------------------------------------------------------------------------ exported and certified weights


@lie("export:model.onnx", r"val_0 is not the certified fc.weight")
def a_weight_edited_in_the_graph_only(draft):
    array = weights(draft, "tuned")["fc.weight"].copy()
    array[np.nonzero(array)[0][3], np.nonzero(array)[1][3]] *= 1.5
    draft.set_constant("val_0", array.T)


@lie("export:model.onnx", "differs from head.weight|is not the certified head.weight")
def a_dense_weight_edited_in_the_graph_only(draft):
    array = weights(draft, "tuned")["head.weight"].copy()
    array[0, 0] += 0.5
    draft.set_constant("head.weight", array)


@lie("export:model.fp16.onnx", "is not the certified fc.weight")
def a_half_precision_weight_edited(draft):
    array = weights(draft, "tuned")["fc.weight"].T.astype(np.float16)
    array[np.nonzero(array)[0][0], np.nonzero(array)[1][0]] *= np.float16(1.5)
    draft.set_constant("val_0", array, "model.fp16.onnx")


@lie("export:model.onnx", "no BatchNorm of weights/tuned explains")
def a_channel_scaled_as_if_a_norm_had_done_it(draft):
    array = numpy_helper.to_array(draft.constant("mix.weight")).copy()
    array[3] *= 1.1
    draft.set_constant("mix.weight", array)


@lie("export:model.onnx", "no BatchNorm of weights/tuned explains")
def zeros_moved_within_the_pattern(draft):
    array = numpy_helper.to_array(draft.constant("mix.weight")).copy()
    array[0, :4, 0, 0] = array[0, [1, 2, 3, 0], 0, 0]
    draft.set_constant("mix.weight", array)


@lie("export:model.onnx", "the constant fc.bias is not the one in weights/tuned")
def a_bias_edited_in_the_graph_only(draft):
    draft.set_constant("fc.bias", weights(draft, "tuned")["fc.bias"] + np.float32(1))


@lie("export:model.onnx", "the bias of mix is not the one that norm folded in gives")
def a_folded_bias_edited(draft):
    array = numpy_helper.to_array(draft.constant("mix.weight_bias")) + np.float32(0.5)
    draft.set_constant("mix.weight_bias", array)


@lie("export:model.onnx", "the bias of mix is not the one")
def a_folded_bias_left_out(draft):
    node = next(node for node in draft.onnx["model.onnx"].graph.node if node.name == "node_mix")
    node.input.pop()


@lie("export:model.onnx", "permuted", "unchecked")
def a_permutation_nobody_checks(draft):
    draft.restate(lambda m: m["weights"][1].update(permutation=[1, 0, 2, 3, 4, 5, 6, 7]))


@lie("export:model.onnx", r"has shape \(5, 16\), the certified fc.weight \(16, 8\)")
def a_weight_of_another_layer(draft):
    draft.restate(lambda m: m["dense"][1].update(layer="fc"))
    layer(draft, "fc").update(pattern="", reason="x", density=None)


@lie("export:model.onnx", "belongs to no tensor", "unchecked")
def a_weight_out_of_nowhere(draft):
    array = numpy_helper.to_array(draft.constant("head.weight"))
    draft.set_constant("head.weight", array + 1)
    draft.restate(lambda m: m["dense"][1].update(layer="elsewhere", reason="x"))


@lie("export:model.onnx", "computed from it, or edited", "unchecked")
def a_dense_weight_edited_under_a_new_name(draft):
    array = numpy_helper.to_array(draft.constant("head.weight")) + 1
    draft.constant("head.weight").CopyFrom(numpy_helper.from_array(array, "val_9"))
    node = next(node for node in draft.onnx["model.onnx"].graph.node if node.name == "node_head")
    node.input[1] = "val_9"
    draft.restate(lambda m: m["dense"][1].update(initializer="val_9"))
    draft.set_constant("val_9", array)


# ------------------------------------------------------------------------------------------------------- ids, ledger


@lie("ids", "1 images are calibration and validation samples, val/3 for one")
def a_calibration_image_from_validation(draft):
    draft.json["calibration.json"]["calibration_ids"][0] = "val/3"


@lie("ids", "images are certification and validation samples")
def a_certification_image_from_validation(draft):
    draft.json["calibration.json"]["certification_ids"][0] = "val/3"
    draft.rederive()


@lie("ids", "images are calibration and certification samples")
def a_certification_image_from_calibration(draft):
    draft.json["calibration.json"]["certification_ids"][0] = "train/3"
    draft.rederive()


@lie("ids", "twice among the validation ids")
def one_validation_image_many_times(draft):
    draft.json["calibration.json"]["validation_ids"][0] = "val/3"


@lie("ids", "no calibration image is named", "unchecked")
def no_calibration_ids(draft):
    draft.json["calibration.json"]["calibration_ids"] = []


@lie("ids", "not from train")
def calibration_on_the_validation_split(draft):
    draft.json["calibration.json"]["split"] = "val"


def ledger(draft: Draft) -> dict[str, Any]:
    return draft.tensors["ledger.safetensors"]


@lie("ledger", "is not what the logits give")
def an_edited_dense_logit(draft):
    ledger(draft)["dense"][0] += np.float32([3, 0, 0, 0, 0])


@lie("ledger", "is not what the logits give, first for the sample train/105")
def a_flip_sold_as_certified(draft):
    ledger(draft)["tuned"][5] = -ledger(draft)["dense"][5]


@lie("ledger", "verdict is not what the logits give")
def a_verdict_raised(draft):
    verdict = ledger(draft)["verdict"]
    verdict[np.flatnonzero(verdict != 2)[0]] = 2


@lie("ledger", "slack is not what the logits give")
def a_slack_raised(draft):
    ledger(draft)["slack"][7] += 0.5


@lie("ledger", "margin is not what the logits give")
def a_column_cut_short(draft):
    ledger(draft)["margin"] = ledger(draft)["margin"][:-1]


@lie("ledger", "slack is not what the logits give")
def nan_in_a_column(draft):
    ledger(draft)["slack"][0] = np.nan


@lie("ledger", "the logits pruned hold NaN")
def nan_in_a_logit(draft):
    ledger(draft)["pruned"][0, 0] = np.nan


@lie("ledger", "not the certification ids in their order")
def swapped_sample_ids(draft):
    ids = list(draft.json["certificate.json"]["ids"])
    draft.json["certificate.json"]["ids"] = [ids[1], ids[0], *ids[2:]]


@lie("ledger", "the count of flipped samples is stated as 0")
def counts_raised(draft):
    draft.json["certificate.json"]["counts"] = {"flipped": 0, "kept": 0, "certified": 40}


@lie("ledger", "reserve is not what the logits give")
def a_reserve_left_out(draft):
    draft.json["certificate.json"]["reserve"] = 0.0


@lie("ledger", "sets aside a reserve of -0.01")
def a_negative_reserve(draft):
    draft.json["certificate.json"]["reserve"] = -0.01


@lie("ledger", "the count of right tuned labels")
def a_better_top1_in_the_certificate(draft):
    draft.json["certificate.json"]["top1"]["tuned"] += 1


@lie("ledger", "binds other tuned weights")
def a_certificate_of_other_weights(draft):
    weights(draft, "tuned")["fc.bias"] = weights(draft, "tuned")["fc.bias"] + 1


@lie("ledger", "flips_but_for of the stage tuned")
def blame_shifted_between_stages(draft):
    draft.json["certificate.json"]["spent"][1]["flips_but_for"] += 1


@lie("ledger", "share_p99 of the stage pruned")
def a_smaller_share_spent(draft):
    draft.json["certificate.json"]["spent"][0]["share_p99"] *= 0.5


@lie("ledger", "eps_inf_max of the stage pruned is stated as None")
def a_number_withheld(draft):
    draft.json["certificate.json"]["spent"][0]["eps_inf_max"] = None


@lie("ledger", "flips_alone of the stage pruned is stated as True")
def a_truth_value_for_a_number(draft):
    draft.json["certificate.json"]["spent"][0]["flips_alone"] = True


@lie("ledger", "lists other stages")
def a_stage_left_out_of_the_ledger(draft):
    draft.json["certificate.json"]["spent"].pop(0)


@lie("ledger", "is about the stages")
def a_certificate_about_other_stages(draft):
    draft.json["certificate.json"]["stages"] = ["dense", "tuned"]


@lie("ledger", "another n or K")
def a_certificate_of_more_samples(draft):
    draft.json["certificate.json"]["samples"] = 400


@lie("ledger", "margin_median")
def a_wider_median_margin(draft):
    draft.json["certificate.json"]["margin_median"] += 1


@lie("ledger", "slack_median")
def a_wider_median_slack(draft):
    draft.json["certificate.json"]["slack_median"] += 1


@lie("ledger", "a label is no class")
def a_label_that_is_no_class(draft):
    ledger(draft)["labels"][0] = CLASSES


@lie("ledger", "tuned has shape")
def logits_of_other_samples(draft):
    ledger(draft)["tuned"] = ledger(draft)["tuned"][1:]


@lie("ledger", "holds logits of shape")
def one_class_only(draft):
    for name in ("dense", "pruned", "tuned"):
        ledger(draft)[name] = ledger(draft)[name][:, :1]
    draft.json["certificate.json"]["classes"] = 1


@lie("ledger", "the ledger is empty", "unchecked")
def an_empty_ledger(draft):
    for name, array in ledger(draft).items():
        ledger(draft)[name] = array[:0]
    samples(draft)[f"certification.{CPU}"] = samples(draft)[f"certification.{CPU}"][:0]
    draft.json["certificate.json"].update(samples=0, ids=[], counts={"flipped": 0, "kept": 0, "certified": 0})
    draft.engine()["certified"].update(n=0, violations=0, violating_ids=[], kept_broken=0)
    draft.json["calibration.json"]["certification_ids"] = []
    drop_gates(draft, "min_certified", "max_violations")


@lie("ledger", "there is no ledger.safetensors", "unchecked")
def a_ledger_that_is_not_there(draft):
    del draft.tensors["ledger.safetensors"]


# ------------------------------------------------------------------------------------------------ results of engines


def samples(draft: Draft) -> dict[str, Any]:
    return draft.tensors["samples.safetensors"]


@lie(f"engine:{CPU}", "top1: correct is stated as")
def an_edited_engine_logit(draft):
    samples(draft)[f"engine.{CPU}"][:10] *= -1


@lie(f"engine:{CPU}", "top1: correct is stated as")
def a_better_top1(draft):
    draft.engine()["top1"]["correct"] += 1


@lie(f"engine:{CPU}", "top1: low is stated as")
def a_narrower_interval(draft):
    draft.engine()["top1"]["low"] += 0.01


@lie(f"engine:{CPU}", "agreement: high is stated as")
def a_changed_interval(draft):
    draft.engine()["agreement"]["high"] -= 1e-4


@lie(f"engine:{CPU}", "agreement: value is stated as")
def a_better_agreement(draft):
    draft.engine()["agreement"]["value"] = 1.0


@lie(f"engine:{CPU}", "dense_right_engine_wrong")
def flips_left_out(draft):
    draft.engine()["flips"]["dense_right_engine_wrong"] = 0


@lie(f"engine:{CPU}", "mcnemar_p")
def a_significance_left_out(draft):
    draft.engine()["flips"]["mcnemar_p"] = 0.5


@lie(f"engine:{CPU}", "the count of violations")
def a_certified_label_that_the_engine_lost(draft):
    first = int(np.flatnonzero(ledger(draft)["verdict"] == 2)[0])
    samples(draft)[f"certification.{CPU}"][first] *= -1


@lie(f"engine:{CPU}", "violating_ids are stated as")
def another_violating_image(draft):
    first = int(np.flatnonzero(ledger(draft)["verdict"] == 2)[0])
    samples(draft)[f"certification.{CPU}"][first] *= -1
    draft.rederive()
    draft.engine()["certified"]["violating_ids"] = ["train/139"]


@lie(f"engine:{CPU}", "the count of certified samples")
def fewer_certified_samples(draft):
    draft.engine()["certified"]["n"] -= 1


@lie(f"engine:{CPU}", "kept_broken")
def kept_labels_that_broke(draft):
    draft.engine()["certified"]["kept_broken"] += 1


@lie(f"engine:{CPU}", "finite is stated as True")
def nan_from_the_engine(draft):
    samples(draft)[f"certification.{CPU}"][int(np.flatnonzero(ledger(draft)["verdict"] == 0)[0])] = np.nan
    assert draft.engine()["finite"]


@lie(f"engine:{CPU}", "spent is stated for logits that are not finite")
def a_ledger_of_nan(draft):
    spent = draft.engine()["spent"]
    samples(draft)[f"engine.{CPU}"][0] = np.nan
    draft.rederive()
    draft.engine()["spent"] = spent


@lie(f"engine:{CPU}", "eps_inf_median of the stage engine")
def an_engine_that_spent_less(draft):
    draft.engine()["spent"][2]["eps_inf_median"] /= 10


@lie(f"engine:{CPU}", "has logits")
def an_engine_run_on_fewer_images(draft):
    samples(draft)[f"engine.{CPU}"] = samples(draft)[f"engine.{CPU}"][1:]


@lie(f"engine:{CPU}", "has shape")
def an_engine_run_on_fewer_certification_images(draft):
    samples(draft)[f"certification.{CPU}"] = samples(draft)[f"certification.{CPU}"][1:]


@lie(f"engine:{CPU}", "field is missing")
def a_row_without_flips(draft):
    del draft.engine()["flips"]


@lie("results", "the recipe asks for")
def an_engine_that_is_kept_quiet(draft):
    draft.json["results.json"]["engines"].pop()
    del draft.json[f"engines/{GPU}/engine.json"], draft.json[f"engines/{GPU}.dense/engine.json"]
    del draft.raw[f"engines/{GPU}/model.engine"], draft.raw[f"engines/{GPU}.dense/model.engine"]


@lie("results", "has the status 'fine'")
def a_status_of_its_own(draft):
    draft.engine(GPU)["status"] = "fine"


@lie("results", "does not say why")
def an_engine_not_run_without_a_reason(draft):
    draft.engine(GPU)["why_not"] = ""


@lie("results", "top-1 of dense: low")
def a_lower_reference(draft):
    draft.json["results.json"]["dense_top1"]["low"] -= 0.01


@lie("results", "top-1 of tuned: n")
def a_longer_validation(draft):
    draft.json["results.json"]["tuned_top1"]["n"] += 1


@lie("results", "another n or K")
def results_of_other_classes(draft):
    draft.json["results.json"]["validation"]["classes"] = 10


@lie("results", "at confidence 0.1 has no interval")
def a_confidence_nobody_would_ask_for(draft):
    draft.json["results.json"]["confidence"] = 0.1


@lie("results", "1 validation ids are named and 120 samples stored")
def validation_ids_left_out(draft):
    draft.json["calibration.json"]["validation_ids"] = ["val/0"]


@lie("results", "engine.hidden is missing or unexplained")
def samples_of_an_engine_nobody_speaks_of(draft):
    samples(draft)["engine.hidden"] = samples(draft)[f"engine.{CPU}"]


@lie("results", "no validation image was run", "unchecked")
def an_empty_validation(draft):
    samples(draft)["labels"] = samples(draft)["labels"][:0]


@lie("results", "none of the 2 engines was run", "unchecked")
def no_engine_measured(draft):
    draft.engine().update(status="not run", why_not="no time")
    for name in (f"engine.{CPU}", f"certification.{CPU}", f"latency.{CPU}", f"latency.{CPU}.dense"):
        del samples(draft)[name]
    judge_as_unchecked(draft)


@lie("results", "there is no results.json", "unchecked")
def no_results(draft):
    del draft.json["results.json"]


@lie("results", "field is missing or of the wrong kind")
def results_that_are_a_list(draft):
    draft.json["results.json"] = []


def judge_as_unchecked(draft: Draft) -> None:
    for row in draft.json["verdict.json"]["gates"]:
        row.update(measured=None, low=None, high=None, verdict="unchecked")
    draft.json["verdict.json"]["verdict"] = "unchecked"


# ------------------------------------------------------------------------------------------------------------ latency


def latency(draft: Draft) -> dict[str, Any]:
    return draft.engine()["latency"]


@lie(f"latency:{CPU}", "the ratio of the medians is stated as 2.5")
def an_inflated_speedup(draft):
    latency(draft)["ratio"]["value"] = 2.5


@lie(f"latency:{CPU}", "the ratio's low end")
def a_low_end_raised_to_the_value(draft):
    latency(draft)["ratio"]["low"] = latency(draft)["ratio"]["value"]


@lie(f"latency:{CPU}", "the ratio's high end")
def a_high_end_raised(draft):
    latency(draft)["ratio"]["high"] *= 1.1


@lie(f"latency:{CPU}", "median_ms")
def a_faster_median(draft):
    latency(draft)["median_ms"] /= 2


@lie(f"latency:{CPU}", "p99_ms")
def a_tail_cut_off(draft):
    latency(draft)["p99_ms"] = latency(draft)["p90_ms"]


@lie(f"latency:{CPU}", "twin_median_ms")
def a_slower_twin(draft):
    latency(draft)["twin_median_ms"] *= 2


@lie(f"latency:{CPU}", "calls is stated as 6000")
def more_calls_than_there_were(draft):
    latency(draft)["calls"] = 6000


@lie(f"latency:{CPU}", "is not same")
def another_word_for_the_speed(draft):
    latency(draft)["verdict"] = "same"


@lie(f"latency:{CPU}", "is not its dense twin")
def another_twin(draft):
    samples(draft)["latency.slow"] = samples(draft).pop(f"latency.{CPU}.dense") * 3
    latency(draft)["twin"] = "slow"


@lie(f"latency:{CPU}", "no positive number")
def a_call_that_took_no_time(draft):
    samples(draft)[f"latency.{CPU}"][0] = 0.0


@lie(f"latency:{CPU}", "of its twin are stored")
def a_twin_called_less_often(draft):
    samples(draft)[f"latency.{CPU}.dense"] = samples(draft)[f"latency.{CPU}.dense"][:-1]


@lie(f"latency:{CPU}", "was timed", "unchecked")
def no_call_at_all(draft):
    for name in (f"latency.{CPU}", f"latency.{CPU}.dense"):
        samples(draft)[name] = samples(draft)[name][:0]


@lie(f"latency:{CPU}", "too few for an interval")
def one_block_has_no_spread(draft):
    draft.json["recipe.lock.json"]["validate"]["blocks"] = 1


@lie(f"latency:{CPU}", "don't divide into 7 blocks")
def blocks_that_do_not_fit(draft):
    draft.json["recipe.lock.json"]["validate"]["blocks"] = 7


@lie(f"latency:{CPU}", "is outside of")
def a_batch_the_engine_was_not_built_for(draft):
    latency(draft)["batch"] = 128


@lie(f"latency:{CPU}", "threads are stated")
def more_threads_than_stated(draft):
    latency(draft)["threads"] = 4


# ------------------------------------------------------------------------------------------------------------ engines


def engine_json(draft: Draft, name: str = CPU) -> dict[str, Any]:
    return draft.json[f"engines/{name}/engine.json"]


@lie("engines", "gives another sha256")
def an_engine_file_swapped(draft):
    draft.raw[f"engines/{GPU}/model.engine"] = b"another engine"
    engine_json(draft, GPU)["size"] = 14


@lie("engines", "gives another size")
def an_engine_of_another_size(draft):
    engine_json(draft, GPU)["size"] = 1


@lie("engines", "names the file ../../model.onnx, which is not there")
def an_engine_outside_of_its_folder(draft):
    engine_json(draft)["file"] = "../../model.onnx"


@lie("engines", "was asked for int8 and is fp32")
def a_silent_fallback(draft):
    engine_json(draft)["asked"]["precision"] = "int8"


@lie("engines", "holds the engine")
def an_engine_under_another_name(draft):
    engine_json(draft)["id"] = "onnxruntime-cpu-int8"


@lie("engines", "holds the engine")
def a_precision_that_is_not_in_the_name(draft):
    engine_json(draft, GPU)["precision"] = "int8"


@lie("engines", "has the weights dense")
def a_dense_engine_sold_as_sparse(draft):
    engine_json(draft)["weights"] = "dense"


@lie("engines", "differ in batch")
def a_twin_built_for_another_batch(draft):
    engine_json(draft, f"{CPU}.dense")["batch"] = [1, 1, 1]


@lie("engines", "differ in threads")
def a_twin_with_fewer_threads(draft):
    engine_json(draft)["threads"] = 4
    latency(draft)["threads"] = 4


@lie("engines", "its dense twin are not both there")
def an_engine_without_a_twin(draft):
    del draft.json[f"engines/{GPU}.dense/engine.json"], draft.raw[f"engines/{GPU}.dense/model.engine"]


@lie("engines", "is only in one of engines/ and results.json")
def an_engine_nobody_asked_for(draft):
    draft.json["engines/extra-cpu-fp32/engine.json"] = engine_json(draft)


@lie("engines", "stores its matrices as float16")
def another_precision_than_asked(draft):
    draft.onnx[f"engines/{CPU}/model.onnx"] = draft.onnx["model.fp16.onnx"]
    draft.rebind()


@lie("engines", "does not know")
def a_precision_nobody_knows(draft):
    for name in (CPU, f"{CPU}.dense"):
        old, new = f"engines/{name}", f"engines/{name.replace('fp32', 'fp8')}"
        manifest = draft.json.pop(f"{old}/engine.json")
        manifest |= {"id": manifest["id"].replace("fp32", "fp8"), "precision": "fp8", "asked": {"precision": "fp8"}}
        draft.json[f"{new}/engine.json"] = manifest
        draft.onnx[f"{new}/model.onnx"] = draft.onnx.pop(f"{old}/model.onnx")
    draft.engine()["id"] = CPU.replace("fp32", "fp8")


@lie("engines", "stores its matrices as float32")
def integers_that_are_floats(draft):
    for name in (CPU, f"{CPU}.dense"):
        old, new = f"engines/{name}", f"engines/{name.replace('fp32', 'int8')}"
        manifest = draft.json.pop(f"{old}/engine.json")
        manifest |= {"id": manifest["id"].replace("fp32", "int8"), "precision": "int8", "asked": {"precision": "int8"}}
        draft.json[f"{new}/engine.json"] = manifest
        draft.onnx[f"{new}/model.onnx"] = draft.onnx.pop(f"{old}/model.onnx")
    draft.engine()["id"] = CPU.replace("fp32", "int8")


@lie("engines", "there is no engine", "unchecked")
def no_engine_at_all(draft):
    for files in (draft.json, draft.onnx, draft.raw):
        for name in [name for name in files if name.startswith("engines/")]:
            del files[name]


# -------------------------------------------------------------------------------------------------------------- gates


def drop_gates(draft: Draft, *names: str) -> None:
    """Take gates out of recipe and verdict alike."""
    draft.raw["recipe.toml"] = b"\n".join(
        line for line in draft.raw["recipe.toml"].split(b"\n") if line.split(b" ")[0].decode() not in names
    )
    gates = draft.json["recipe.lock.json"]["gates"]
    draft.json["recipe.lock.json"]["gates"] = {name: limit for name, limit in gates.items() if name not in names}
    rows = draft.json["verdict.json"]["gates"]
    draft.json["verdict.json"]["gates"] = [row for row in rows if row["name"] not in names]


def fail_a_gate(draft: Draft) -> None:
    """Ask for more than the engine gives, honestly."""
    draft.json["recipe.lock.json"]["gates"]["min_agreement"] = 0.99
    draft.raw["recipe.toml"] = draft.raw["recipe.toml"].replace(b"min_agreement = 0.5", b"min_agreement = 0.99")
    draft.rederive()


@lie("verdict", "the gate min_speedup is missing in verdict.json")
def a_dropped_gate(draft):
    rows = draft.json["verdict.json"]["gates"]
    draft.json["verdict.json"]["gates"] = [row for row in rows if row["name"] != "min_speedup"]


@lie("verdict", "the gate min_agreement: limit")
def a_gate_relaxed_in_the_verdict(draft):
    draft.gate("min_agreement")["limit"] = 0.1


@lie("policy", "the gate min_agreement is 0.5 in recipe.toml, 0.1 in recipe.lock.json")
def a_gate_relaxed_in_the_lock(draft):
    draft.json["recipe.lock.json"]["gates"]["min_agreement"] = 0.1
    draft.rederive()


@lie("policy", "the gate min_agreement is 0.5 in recipe.toml, None in recipe.lock.json")
def a_gate_lost_on_the_way(draft):
    draft.json["recipe.lock.json"]["gates"]["min_agreement"] = None
    draft.rederive()


@lie("policy", "the gate max_violations is None in recipe.toml, 0 in recipe.lock.json")
def a_gate_the_user_never_asked_for(draft):
    draft.raw["recipe.toml"] = draft.raw["recipe.toml"].replace(b"max_violations = 0", b"")


@lie("policy", "there is no recipe.toml", "unchecked")
def no_recipe(draft):
    del draft.raw["recipe.toml"]


@lie("policy", "wrong kind")
def a_recipe_that_is_no_toml(draft):
    draft.raw["recipe.toml"] = b"[gates"


@lie("verdict", "the gate extra is not in the recipe")
def a_gate_invented(draft):
    draft.json["verdict.json"]["gates"].append({**draft.gate("min_agreement"), "name": "extra"})


@lie("verdict", "lists a gate twice")
def a_gate_twice(draft):
    draft.json["verdict.json"]["gates"].append(draft.gate("min_agreement"))


@lie("verdict", "the gate max_accuracy_drop: measured")
def a_smaller_drop(draft):
    draft.gate("max_accuracy_drop")["measured"] = 0.0


@lie("verdict", "the gate min_certified: low")
def a_gate_with_another_interval(draft):
    draft.gate("min_certified")["low"] += 0.05


@lie("verdict", "is stated as holds, it is refuted")
def a_failed_gate_that_is_said_to_hold(draft):
    fail_a_gate(draft)
    draft.gate("min_agreement")["verdict"] = "holds"


@lie("verdict", "says holds, its gates give refuted")
def a_good_end_to_a_failed_gate(draft):
    fail_a_gate(draft)
    draft.json["verdict.json"]["verdict"] = "holds"


@lie("gate:min_agreement", "the limit is 0.99")
def an_honest_failure_is_a_failure(draft):
    fail_a_gate(draft)


@lie("gate:min_speedup", "the limit is 1.5")
def an_honest_slow_engine(draft):
    draft.json["recipe.lock.json"]["gates"]["min_speedup"] = 1.5
    draft.raw["recipe.toml"] = draft.raw["recipe.toml"].replace(b"min_speedup = 1.05", b"min_speedup = 1.5")
    draft.rederive()


@lie("gate:min_speedup", "the limit is 1.2", "unchecked")
def an_honest_doubt(draft):
    draft.json["recipe.lock.json"]["gates"]["min_speedup"] = 1.2
    draft.raw["recipe.toml"] = draft.raw["recipe.toml"].replace(b"min_speedup = 1.05", b"min_speedup = 1.2")
    draft.rederive()


@lie("gate:min_speedup", "nothing was measured", "unchecked")
def a_speedup_nobody_measured(draft):
    draft.engine()["latency"] = None
    del samples(draft)[f"latency.{CPU}"], samples(draft)[f"latency.{CPU}.dense"]
    draft.gate("min_speedup").update(measured=None, low=None, high=None, verdict="unchecked")
    draft.json["verdict.json"]["verdict"] = "unchecked"


@lie("gate:max_violations", "nothing was measured", "unchecked")
def nothing_certified_so_nothing_violated(draft):
    for name in ("pruned", "tuned"):
        ledger(draft)[name] = -ledger(draft)["dense"]
    gates = draft.json["recipe.lock.json"]["gates"] | {"min_certified": 0.0}
    draft.json["recipe.lock.json"]["gates"] = gates
    draft.raw["recipe.toml"] = draft.raw["recipe.toml"].replace(b"min_certified = 0.1", b"min_certified = 0.0")
    draft.rederive()


@lie("gate:batch_consistent", "is not batch_consistent")
def an_inconsistent_engine_that_holds(draft):
    draft.engine()["batch_consistent"] = False


@lie("verdict", "the gate finite is missing")
def a_broken_engine_that_holds(draft):
    samples(draft)[f"engine.{CPU}"][0] = np.nan
    draft.rederive()
    draft.json["verdict.json"]["gates"] = [
        row for row in draft.json["verdict.json"]["gates"] if row["name"] != "finite"
    ]


@lie("verdict", "releases tensorrt_rtx-sm80-fp16, the recipe judges")
def another_engine_released(draft):
    draft.json["verdict.json"]["deploy"] = GPU


@lie("verdict", "which results.json does not know")
def an_unknown_engine_released(draft):
    draft.json["recipe.lock.json"]["validate"]["deploy"] = "ghost"


@lie("gate:min_agreement", "was not run: There is no GPU here", "unchecked")
def an_engine_released_unseen(draft):
    draft.json["recipe.lock.json"]["validate"]["deploy"] = GPU
    draft.rederive()


@lie("gate:min_beauty", "does not know the gate", "unchecked")
def an_unknown_gate(draft):
    draft.json["recipe.lock.json"]["gates"]["min_beauty"] = 1.0
    draft.raw["recipe.toml"] += b"min_beauty = 1.0\n"
    draft.json["verdict.json"]["gates"].append({**draft.gate("min_agreement"), "name": "min_beauty", "limit": 1.0})


@lie("verdict", "the recipe asks for no gate", "unchecked")
def no_gate_at_all(draft):
    drop_gates(draft, *draft.json["recipe.lock.json"]["gates"])


@lie("verdict", "there is no verdict.json", "unchecked")
def no_verdict(draft):
    del draft.json["verdict.json"]


# --------------------------------------------------------------------------------------------------- the whole chain


def rehashed_chain(draft: Draft, root: Path) -> str:
    """Change the tuned weights and every file that follows from them, hash all of it again; nothing disagrees.

    Only somebody who knows the digest from elsewhere can tell.
    """
    state = weights(draft, "tuned")
    state["fc.bias"] = state["fc.bias"] + np.float32(1)
    for file, kind in (("model.onnx", np.float32), ("model.fp16.onnx", np.float16)):
        draft.onnx[file] = make_onnx(state, kind)
        annotate(draft.onnx[file])
    draft.onnx[f"engines/{CPU}/model.onnx"] = draft.onnx["model.onnx"]
    draft.json["sparsity.json"] = embedded(draft.onnx["model.onnx"])
    embed(draft.onnx["model.onnx"], draft.json["sparsity.json"])
    draft.rederive()
    draft.write(root)
    return reseal(root)
