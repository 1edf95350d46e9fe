"""Lies about files: the list of them, and bytes that are not what their format allows."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from onnx import TensorProto, helper
from safetensors.numpy import save

from forgeries.bundle import Draft
from forgeries.registry import lie, lie_on_disk

# ---------------------------------------------------------------------------------------------------------------- files


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


@lie_on_disk("files", "without hash and size")
def a_size_that_is_none(root):
    edit_manifest(root, lambda files: files["results.json"].update({"size": "large"}))


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


# -------------------------------------------------------------------------------------------------------------- formats


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


@lie("formats", "not exactly dtype")
def tensors_whose_entry_is_a_list(draft):
    draft.raw["spectra.safetensors"] = tensor_file({"a": ["F32", [1], [0, 4]]}, bytes(4))


@lie("formats", "unknown type")
def tensors_of_a_list_of_types(draft):
    draft.raw["spectra.safetensors"] = tensor_file({"a": {**row("F32", [1], 0, 4), "dtype": ["F32"]}}, bytes(4))


@lie("formats", "not sizes")
def tensors_with_named_offsets(draft):
    item = {**row("F32", [1], 0, 4), "data_offsets": {"begin": 0, "end": 4}}
    draft.raw["spectra.safetensors"] = tensor_file({"a": item}, bytes(4))


@lie("formats", "not sizes")
def tensors_with_three_offsets(draft):
    item = {**row("F32", [1], 0, 4), "data_offsets": [0, 4, 8]}
    draft.raw["spectra.safetensors"] = tensor_file({"a": item}, bytes(4))


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
    draft.constant("val_0").data_location = TensorProto.EXTERNAL


@lie("formats", "outside of the file")
def a_constant_that_names_another_file(draft):
    draft.constant("val_0").external_data.add(key="location", value="/etc/hostname")


@lie("formats", "does not know")
def a_constant_of_negative_size(draft):
    tensor = draft.constant("val_0")
    tensor.ClearField("dims")
    tensor.dims.extend([-8, -16])


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


# ------------------------------------------------------------------------------------- bytes that are no protobuf

ODD = (
    ("an_integer_for_a_graph", b"\x38\x01", "integer where bytes belong"),
    ("a_graph_longer_than_its_file", b"\x3a\x05", "a field of 5 bytes has 0 left"),
    ("a_group_of_old_protobuf", b"\x3b", "wire type 3"),
    ("a_field_without_a_number", b"\x00\x01", "field number 0"),
    ("a_number_without_end", b"\xff" * 11, "more than ten bytes"),
    ("a_number_cut_off", b"\x80", "ends within a number"),
    ("a_fixed_number_cut_off", b"\x39\x01\x02", "a field of 8 bytes has 2 left"),
    ("a_name_that_is_no_text", b"\x3a\x05\x2a\x03\x42\x01\xff", "not UTF-8"),
    ("bytes_for_a_type", b"\x3a\x06\x2a\x04\x12\x02\x01\x01", "bytes in field 2"),
    ("metadata_without_a_key", b"\x72\x00", "empty or a duplicate name"),
    ("fields_without_end", b"\x08\x01" * 1_000_001, "too many fields"),
)


def odd(name: str, data: bytes, word: str) -> None:
    def change(draft: Draft) -> None:
        draft.raw["engines/odd.onnx"] = data

    change.__name__ = name
    lie("formats", word)(change)


for row_ in ODD:
    odd(*row_)


@lie("formats", "has the type 1 and the shape")
def a_constant_of_too_many_axes(draft):
    tensor = draft.constant("val_0")
    tensor.ClearField("dims")
    tensor.dims.extend([1] * 7 + [8, 16])


@lie("formats", r"spectra.safetensors: a has a shape or offsets that are not sizes")
def tensors_of_too_many_axes(draft):
    draft.raw["spectra.safetensors"] = tensor_file({"a": row("F32", [1] * 9, 0, 4)}, bytes(4))


# --------------------------------------------------------------------------------------------------- no bundle at all


@lie_on_disk("manifest", "is not a bundle")
def no_manifest(root):
    (root / "manifest.json").unlink()


@lie_on_disk("manifest", "no plain file of reasonable size")
def a_linked_manifest(root):
    (root / "manifest.json").rename(root.parent / "elsewhere.json")
    (root / "manifest.json").symlink_to(root.parent / "elsewhere.json")


@lie_on_disk("manifest", "no plain file of reasonable size")
def a_manifest_of_endless_size(root):
    with (root / "manifest.json").open("r+b") as file:
        file.truncate((1 << 26) + 1)


@lie_on_disk("manifest", "not strict JSON")
def a_manifest_cut_off(root):
    (root / "manifest.json").write_bytes(b"{")


@lie_on_disk("manifest", "not the manifest of a bundle")
def a_manifest_of_something_else(root):
    manifest = json.loads((root / "manifest.json").read_text())
    (root / "manifest.json").write_text(json.dumps({**manifest, "kind": "mpdeploy-artifact"}))


@lie_on_disk("manifest", "not the manifest of a bundle")
def a_manifest_of_another_schema(root):
    manifest = json.loads((root / "manifest.json").read_text())
    (root / "manifest.json").write_text(json.dumps({**manifest, "schema": 2}))


@lie_on_disk("manifest", "not the manifest of a bundle")
def a_manifest_that_is_a_list(root):
    (root / "manifest.json").write_bytes(b"[]")


@lie_on_disk("manifest", "has no table of files")
def a_manifest_without_files(root):
    manifest = json.loads((root / "manifest.json").read_text())
    (root / "manifest.json").write_text(json.dumps({**manifest, "files": None}))
