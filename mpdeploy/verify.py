"""The independent checker of a bundle: it trusts nobody, and re-derives every claim from the bytes.

    python verify.py BUNDLE [--expect DIGEST] [--json]

One file, standard library and numpy only: copy it beside a bundle and it runs alone. It imports nothing of mpdeploy
and has its own readers (strict JSON, safetensors, ONNX's protobuf) and its own formulas, so that a mistake of the
producer is not repeated here. Files first, claims second:

    files, formats     the manifest lists exactly the files there are, and each is what it says; all of it parses
    digest             only with --expect: the manifest itself is the one that was announced
    weights            the N:M pattern of every layer, along input channels, in weights/pruned and weights/tuned; of an
                       unstructured layer the number of its zeros
    allocation         only of a mixed recipe: the patterns are its ranking's choice, their costs and sums are right
    sidecar, graph:*   the sparsity manifest against the ONNX bytes: consumer, axis, pattern, hash; nothing left out
    export:*           the ONNX weights are the certified ones; a folded BatchNorm may scale an output channel
    ids                calibration, certification and validation images are disjoint
    ledger             every number of the certificate from the stored logits, in float64
    results, engine:*, latency:*   every count, interval and quantile from the stored logits and seconds
    engines            each engine file is the one its manifest describes, in the asked precision, with its dense twin
    policy, verdict, gate:*   the recipe's own gates, judged again

What can't be re-derived without a GPU, PyTorch or the images is taken as measured: that the stored logits and seconds
came from these weights and engines.

Exit status: 0 holds, 1 refuted, 2 usage, 4 unchecked, 5 not a bundle.
"""

import argparse
import hashlib
import json
import math
import mmap
import re
import stat
import struct
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

# ------------------------------------------------------------------------------------------------------- verdicts


class Verdict(StrEnum):
    """What was found. Nothing compared is `unchecked`, never `holds`."""

    HOLDS = "holds"
    REFUTED = "refuted"
    UNCHECKED = "unchecked"


EXIT = {Verdict.HOLDS: 0, Verdict.REFUTED: 1, Verdict.UNCHECKED: 4}
NOT_A_BUNDLE = 5


@dataclass(frozen=True)
class Finding:
    """The answer to one claim.

    Attributes:
        claim: name of the claim; what follows a colon is the file, engine or gate it is about.
        verdict: the answer.
        reason: what was compared and how much of it, or what differs and where.
    """

    claim: str
    verdict: Verdict
    reason: str


class Unreadable(Exception):
    """Bytes that are not what their format allows; the only error the readers raise."""


class Refuted(Exception):
    """A claim that is not true."""


class Unchecked(Exception):
    """A claim that can't be decided from the bundle."""


REQUIRED = ("files", "formats", "weights", "sidecar", "ids", "ledger", "results", "engines", "policy", "verdict")
REQUIRED_KINDS = ("graph", "export", "engine", "gate")


def overall(findings: Sequence[Finding]) -> Verdict:
    """Return refuted if any finding is, holds if every required claim was made and all hold, else unchecked."""
    if any(finding.verdict is Verdict.REFUTED for finding in findings):
        return Verdict.REFUTED
    claims = {finding.claim for finding in findings}
    kinds = {claim.partition(":")[0] for claim in claims}
    complete = claims.issuperset(REQUIRED) and kinds.issuperset(REQUIRED_KINDS)
    if complete and all(finding.verdict is Verdict.HOLDS for finding in findings):
        return Verdict.HOLDS
    return Verdict.UNCHECKED


def must(condition: object, otherwise: str) -> None:
    """Refute unless `condition` is true; written so that a comparison with NaN, being false, refutes."""
    if not condition:
        raise Refuted(otherwise)


def same(stated: object, own: float | None) -> bool:
    """Tell whether a stated number is the re-derived one, within rounding; None stands for "not finite"."""
    if own is None or not math.isfinite(own):
        return stated is None
    if isinstance(stated, bool) or not isinstance(stated, int | float):
        return False
    return abs(stated - own) <= 1e-6 * abs(own) + 1e-9


def must_equal(stated: object, own: float | None, what: str) -> None:
    """Refute unless a stated number is the re-derived one."""
    must(same(stated, own), f"{what} is stated as {stated}, the stored numbers give {own}")


# ---------------------------------------------------------------------------------------------------- strict JSON

JSON_CAP = 1 << 26
"""Bytes. Ids of a million images fit; a file beyond it is an attack on memory."""


def parse_json(data: bytes, where: str) -> Any:
    """Parse JSON without duplicate keys, NaN or infinity.

    Raises:
        Unreadable: it is anything else.
    """
    if len(data) > JSON_CAP:
        raise Unreadable(f"{where} has {len(data)} bytes of JSON, more than the {JSON_CAP} allowed")
    try:
        return json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite
        )
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"{where} is not strict JSON: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"duplicate key {next(name for name in names if names.count(name) > 1)!r}")
    return result


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not finite")
    return value


# ---------------------------------------------------------------------------------------------------- safetensors

HEADER_CAP = 100_000_000
MAX_RANK = 8
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1"}
DTYPES |= {"U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "u1"}


def parse_safetensors(data: memoryview, where: str) -> dict[str, Array]:
    """Return views of the tensors of a safetensors file.

    Raises:
        Unreadable: a header that is too long or not JSON, an unknown type, a shape that doesn't fit its bytes, tensors
            that overlap, or bytes that belong to none.
    """
    if len(data) < 8:
        raise Unreadable(f"{where} is cut off: {len(data)} bytes have no room for a header")
    (length,) = struct.unpack("<Q", data[:8])
    if length > HEADER_CAP or length > len(data) - 8:
        raise Unreadable(f"{where} announces a header of {length} bytes in a file of {len(data)}")
    header = parse_json(bytes(data[8 : 8 + length]), f"the header of {where}")
    if not isinstance(header, dict):
        raise Unreadable(f"the header of {where} is no JSON object")
    header.pop("__metadata__", None)
    body = data[8 + length :]
    entries = sorted((_entry(name, item, where), name) for name, item in header.items())
    end = 0
    for (begin, stop, _, _), name in entries:
        if begin != end:
            kind = "overlaps the tensor before it" if begin < end else "leaves a hole before it"
            raise Unreadable(f"{where}: {name} begins at byte {begin} and {kind}, which ends at {end}")
        end = stop
    if end != len(body):
        raise Unreadable(f"{where} has {len(body)} bytes of data and its tensors end at byte {end}")
    return {name: _view(body, begin, dtype, shape, where) for (begin, _, dtype, shape), name in entries}


def _entry(name: str, item: Any, where: str) -> tuple[int, int, str, tuple[int, ...]]:
    """Return (first byte, byte after the last, type, shape) of one header entry."""
    if not isinstance(item, dict) or item.keys() != {"dtype", "shape", "data_offsets"}:
        raise Unreadable(f"{where}: the entry {name} has not exactly dtype, shape and data_offsets")
    dtype, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise Unreadable(f"{where}: {name} has the unknown type {dtype}")
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2 or len(shape) > MAX_RANK:
        raise Unreadable(f"{where}: {name} has a shape or offsets that are not sizes")
    if offsets[1] - offsets[0] != math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize:
        raise Unreadable(f"{where}: {name} has shape {shape} of {dtype}, which does not fit bytes {offsets}")
    return offsets[0], offsets[1], DTYPES[dtype], tuple(shape)


def _sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 48 for item in value)


def _view(data: memoryview, begin: int, dtype: str, shape: tuple[int, ...], where: str) -> Array:
    """Return an array over bytes whose number has been checked."""
    try:
        array: Array = np.frombuffer(data, np.dtype(dtype), math.prod(shape), begin) if 0 not in shape else np.empty(0)
        return array.astype(dtype, copy=False).reshape(shape)
    except ValueError as error:
        raise Unreadable(f"{where} holds a tensor of shape {shape}: {error}") from error


# ------------------------------------------------------------------------------------------------- ONNX's protobuf

MAX_FIELDS = 4_000_000
"""Per message: no graph has more nodes, and a tensor with more values stores them as raw bytes."""
FLOAT, FLOAT16 = 1, 10
TENSOR_TYPES = {FLOAT: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 9: "bool"}
TENSOR_TYPES |= {FLOAT16: "float16", 11: "float64", 12: "uint32", 13: "uint64"}
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5

Value = int | memoryview
Message = dict[int, list[Value]]


def varint(data: memoryview, at: int) -> tuple[int, int]:
    """Return a base-128 number and the position after it."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise Unreadable("the protobuf ends within a number")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & (1 << 64) - 1, at
    raise Unreadable("the protobuf holds a number of more than ten bytes")


def parse_message(data: memoryview) -> Message:
    """Return the fields of one message by number: integers, or the bytes of what has a length or a fixed width.

    Raises:
        Unreadable: it is cut off, a field is longer than the message, or a wire type is not one ONNX uses.
    """
    message: Message = {}
    at = count = 0
    while at < len(data):
        key, at = varint(data, at)
        number, wire = key >> 3, key & 7
        value: Value
        if wire == VARINT:
            value, at = varint(data, at)
        else:
            if wire == BYTES:
                size, at = varint(data, at)
            elif wire in (FIXED32, FIXED64):
                size = 4 if wire == FIXED32 else 8
            else:
                raise Unreadable(f"the protobuf holds the wire type {wire}")
            if size > len(data) - at:
                raise Unreadable(f"the protobuf is cut off: a field of {size} bytes has {len(data) - at} left")
            value, at = data[at : at + size], at + size
        count += 1
        if not number or count > MAX_FIELDS:
            raise Unreadable("the protobuf holds a field number 0, or too many fields")
        message.setdefault(number, []).append(value)
    return message


def one(message: Message, number: int) -> Value | None:
    """Return the only value of a field, or None; protobuf would let a later one win, which hides the first."""
    values = message.get(number, [])
    if len(values) > 1:
        raise Unreadable(f"the protobuf gives field {number} {len(values)} times where it belongs once")
    return values[0] if values else None


def integer(message: Message, number: int) -> int:
    """Return a signed integer field, 0 if absent."""
    value = one(message, number)
    if isinstance(value, memoryview):
        raise Unreadable(f"the protobuf holds bytes in field {number}, where an integer belongs")
    return _signed(value or 0)


def block(value: Value | None) -> memoryview:
    """Return the bytes of a field, none if absent."""
    if isinstance(value, int):
        raise Unreadable("the protobuf holds an integer where bytes belong")
    return memoryview(b"") if value is None else value


def text(value: Value | None) -> str:
    """Return a string field, empty if absent."""
    try:
        return bytes(block(value)).decode("utf-8")
    except UnicodeDecodeError as error:
        raise Unreadable(f"the protobuf holds a string that is not UTF-8: {error}") from error


def integers(message: Message, number: int) -> list[int]:
    """Return a repeated integer field, packed or not."""
    result = []
    for value in message.get(number, []):
        if isinstance(value, int):
            result.append(_signed(value))
            continue
        at = 0
        while at < len(value):
            item, at = varint(value, at)
            result.append(_signed(item))
    return result


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def parse_tensor(data: memoryview) -> tuple[str, Array]:
    """Return name and values of a TensorProto.

    Raises:
        Unreadable: values outside the file, in two places, in none, of an unknown type, or not as many as the shape.
    """
    message = parse_message(data)
    name, shape, kind = text(one(message, 8)), tuple(integers(message, 1)), integer(message, 2)
    where = f"the tensor {name}"
    if integer(message, 14) or message.get(13):
        raise Unreadable(f"{where} is stored outside of the file")
    if kind not in TENSOR_TYPES or len(shape) > MAX_RANK or any(not 0 <= size < 1 << 48 for size in shape):
        raise Unreadable(f"{where} has the type {kind} and the shape {shape}, which this reader does not know")
    dtype = np.dtype(TENSOR_TYPES[kind]).newbyteorder("<")
    raw, typed = block(one(message, 9)), _typed_values(message, dtype)
    if len(raw) and typed is not None:
        raise Unreadable(f"{where} gives its values twice, raw and typed")
    if typed is not None:
        raw = memoryview(typed.tobytes())
    if len(raw) != math.prod(shape) * dtype.itemsize:
        raise Unreadable(f"{where} has shape {shape} of {dtype.name} and {len(raw)} bytes")
    return name, _view(raw, 0, dtype.str, shape, where)


def _typed_values(message: Message, dtype: np.dtype[Any]) -> Array | None:
    """Return the values of float_data, double_data, int32_data, int64_data or uint64_data, None if there are none."""
    for number, own in ((4, "<f4"), (10, "<f8")):
        if number in message:
            return np.frombuffer(b"".join(bytes(block(value)) for value in message[number]), own).astype(dtype)
    for number in (5, 7, 11):
        if number in message:
            bits = np.array([value & (1 << 64) - 1 for value in integers(message, number)], np.uint64)
            return bits.astype(np.uint16).view(np.float16) if dtype == np.float16 else bits.astype(dtype)
    return None


@dataclass(frozen=True)
class Node:
    """One operator: what it computes from which values."""

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    numbers: Mapping[str, list[int]]


@dataclass(frozen=True)
class Graph:
    """An ONNX file as far as this checker reads it."""

    nodes: tuple[Node, ...]
    constants: Mapping[str, Array]
    metadata: Mapping[str, str]
    opset: int
    unread: str = ""
    producers: Mapping[str, Node] = field(default_factory=dict)


def parse_onnx(data: memoryview) -> Graph:
    """Read nodes, constants and metadata of a ModelProto.

    Raises:
        Unreadable: it is malformed, names a value twice, or keeps tensors outside of the file.
    """
    model = parse_message(data)
    graph = parse_message(block(one(model, 7)))
    unread = "model-local functions" if model.get(25) else ""
    constants: dict[str, Array] = {}
    for name, array in (parse_tensor(block(value)) for value in graph.get(5, [])):
        _name_once(constants, name, array)
    if graph.get(15):
        raise Unreadable("the graph stores constants as sparse tensors, which no runtime here reads")
    nodes, producers = [], dict[str, Node]()
    for value in graph.get(1, []):
        node, constant, nested = _parse_node(parse_message(block(value)))
        nodes.append(node)
        unread = unread or (f"a sub-graph in the node {node.name}" if nested else "")
        for name in filter(None, node.outputs):
            if name in constants:
                raise Unreadable(f"the graph computes {name}, which is a constant")
            _name_once(producers, name, node)
        if constant is not None:
            _name_once(constants, node.outputs[0] if node.outputs else "", constant)
    metadata: dict[str, str] = {}
    for entry in (parse_message(block(value)) for value in model.get(14, [])):
        _name_once(metadata, text(one(entry, 1)), text(one(entry, 2)))
    return Graph(tuple(nodes), constants, metadata, _opset(model), unread, producers)


def _name_once(table: dict[str, Any], name: str, value: Any) -> None:
    if not name or name in table:
        raise Unreadable(f"the ONNX file has an empty or a duplicate name {name!r}")
    table[name] = value


def _opset(model: Message) -> int:
    """Return the version of ONNX's own operator set, 0 if it names none."""
    sets = [parse_message(block(value)) for value in model.get(8, [])]
    return next((integer(entry, 2) for entry in sets if text(one(entry, 1)) in ("", "ai.onnx")), 0)


def _parse_node(message: Message) -> tuple[Node, Array | None, bool]:
    """Return a node, the value of a Constant, and whether an attribute holds a sub-graph."""
    numbers: dict[str, list[int]] = {}
    constant, nested = None, False
    for attribute in (parse_message(block(value)) for value in message.get(5, [])):
        name = text(one(attribute, 1))
        nested = nested or 6 in attribute or 11 in attribute
        if 5 in attribute and name == "value":
            constant = parse_tensor(block(one(attribute, 5)))[1]
        numbers[name] = integers(attribute, 3) + integers(attribute, 8)
    inputs, outputs = (tuple(text(value) for value in message.get(number, [])) for number in (1, 2))
    node = Node(text(one(message, 4)), text(one(message, 3)), inputs, outputs, numbers)
    return node, constant if node.op == "Constant" else None, nested


# ------------------------------------------------------------------------------------------------- the bundle's files

MANIFEST = "manifest.json"
MAX_FILES = 100_000
HEX = re.compile(r"[0-9a-f]{64}")


@dataclass
class Bundle:
    """Files that were listed, found and hashed."""

    root: Path
    files: Mapping[str, Mapping[str, Any]]
    _parsed: dict[str, Any] = field(default_factory=dict)

    def _once(self, name: str, parse: Callable[[memoryview, str], Any]) -> Any:
        if name not in self.files:
            raise Unchecked(f"there is no {name}, so nothing is claimed")
        if name not in self._parsed:
            self._parsed[name] = parse(map_file(self.root / name), name)
        return self._parsed[name]

    def json(self, name: str) -> Any:
        """Return a listed JSON file."""
        return self._once(name, lambda data, where: parse_json(bytes(data), where))

    def tensors(self, name: str) -> dict[str, Array]:
        """Return a listed safetensors file."""
        result: dict[str, Array] = self._once(name, parse_safetensors)
        return result

    def graph(self, name: str) -> Graph:
        """Return a listed ONNX file."""
        result: Graph = self._once(name, lambda data, _: parse_onnx(data))
        return result


def map_file(path: Path) -> memoryview:
    """Return a file's bytes without reading them all at once."""
    try:
        if path.stat().st_size == 0:
            return memoryview(b"")
        with path.open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise Unreadable(f"{path.name} can't be read: {error}") from error


def walk(root: Path) -> Iterator[tuple[str, bool]]:
    """Yield the relative name of everything below `root` that is no folder, and whether it is a plain file."""
    for path in sorted(root.rglob("*")):
        mode = path.lstat().st_mode
        if not stat.S_ISDIR(mode):
            yield path.relative_to(root).as_posix(), stat.S_ISREG(mode)


def plain_name(name: str) -> bool:
    """Tell whether a name stays within the bundle on every system: relative, no "..", no backslash, no drive."""
    path = PurePosixPath(name)
    return (
        bool(path.parts)
        and path.as_posix() == name
        and not path.is_absolute()
        and not set(name) & set("\\:\0")
        and (".." not in path.parts)
    )


def check_files(root: Path, manifest: Mapping[str, Any]) -> str:
    """Files: exactly those that are listed, plain, and each with the size and SHA-256 that are listed."""
    listed = manifest["files"]
    must(listed, "manifest.json lists no file at all")
    must(len(listed) <= MAX_FILES, f"manifest.json lists {len(listed)} files, more than the {MAX_FILES} allowed")
    for name, entry in listed.items():
        must(plain_name(name) and name != MANIFEST, f"manifest.json lists {name!r}, which is no name within the bundle")
        must(HEX.fullmatch(entry["sha256"]) and type(entry["size"]) is int, f"{name} is listed without hash and size")
    found = set()
    for name, plain in walk(root):
        must(plain, f"{name} is a link or a device, not a plain file")
        found.add(name)
    must(found - {MANIFEST} <= listed.keys(), f"{_first(found - {MANIFEST} - listed.keys())} is there and not listed")
    must(listed.keys() <= found, f"{_first(listed.keys() - found)} is listed and not there")
    for name, entry in listed.items():
        size, digest = (root / name).stat().st_size, sha256_of(root / name)
        must(size == entry["size"], f"{name} has {size} bytes, listed are {entry['size']}")
        must(digest == entry["sha256"], f"{name} has the SHA-256 {digest[:12]}..., listed is {entry['sha256'][:12]}...")
    return f"{len(listed)} files are there, all of them listed, each with its size and SHA-256"


def check_formats(bundle: Bundle) -> str:
    """Formats: every JSON, safetensors and exported ONNX file passes the strict readers."""
    readers = {".json": bundle.json, ".safetensors": bundle.tensors, ".onnx": bundle.graph}
    counts = dict.fromkeys(readers, 0)
    for name in bundle.files:
        suffix = PurePosixPath(name).suffix
        if suffix in readers:
            readers[suffix](name)
            counts[suffix] += 1
    return ", ".join(f"{count} {suffix[1:]}" for suffix, count in counts.items()) + " files are well formed"


def sha256_of(path: Path) -> str:
    """Return the hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _first(names: Iterable[str]) -> str:
    return min(names, default="")


# ------------------------------------------------------------------------------------------- N:M sparsity of weights


def count_bad_groups(weight: Array, pattern: str, axis: int, where: str) -> int:
    """Count groups along `axis` with more nonzeros than the pattern keeps; NaN counts as nonzero."""
    match = re.fullmatch(r"([1-9]\d{0,3}):([1-9]\d{0,3})", pattern)
    must(match, f"{where} claims {pattern!r}, which is no N:M pattern")
    assert match is not None  # for the type checker: the line above has refuted
    keep, group = int(match[1]), int(match[2])
    must(keep < group, f"{where} claims {pattern}, which keeps everything")
    must(
        weight.ndim > axis and weight.size and weight.shape[axis] % group == 0,
        f"{where} has shape {weight.shape}: groups of {group} don't fit along axis {axis}",
    )
    groups = np.moveaxis(weight != 0, axis, -1).reshape(-1, group)
    return int((groups.sum(axis=1) > keep).sum())


UNSTRUCTURED = "unstructured"  # the pattern of a layer whose zeros lie anywhere


def check_zeros(weight: Array, layer: Mapping[str, Any], where: str) -> None:
    """Refute unless a weight holds the zeros that an unstructured layer states; more of them are no lie."""
    own = weight.size - np.count_nonzero(weight)
    must(own >= layer["zeros"] > 0, f"{where} has {own} zeros, stated are {layer['zeros']}")


def check_weights(bundle: Bundle) -> str:
    """Weights: pattern, shape, finiteness and density of every layer in the weights on disk."""
    layers = bundle.json("layers.json")
    states = {stage: bundle.tensors(f"weights/{stage}.safetensors") for stage in ("dense", "pruned", "tuned")}
    shapes = {stage: {name: array.shape for name, array in state.items()} for stage, state in states.items()}
    for stage, state in states.items():
        must(shapes[stage] == shapes["dense"], f"weights/{stage} has other tensors or shapes than weights/dense")
        for name, array in state.items():
            must(
                array.dtype.kind != "f" or np.isfinite(array).all(), f"weights/{stage}: {name} is not finite everywhere"
            )
    names = [layer["name"] for layer in layers]
    must(len(set(names)) == len(names), "layers.json lists a layer twice")
    for layer in layers:
        _check_layer(layer, states)
    pruned = sum(bool(layer["pattern"]) for layer in layers)
    if not pruned:
        raise Unchecked(f"none of the {len(layers)} layers claims a pattern")
    anywhere = any(layer["pattern"] == UNSTRUCTURED for layer in layers)
    what = "stated zeros, which lie anywhere" if anywhere else "pattern along input channels"
    return f"{pruned} layers hold their {what}, {len(layers) - pruned} are dense and say why"


def _check_layer(layer: Mapping[str, Any], states: Mapping[str, Mapping[str, Array]]) -> None:
    """Check one row of layers.json against the weights before and after tuning."""
    name, pattern, key = layer["name"], layer["pattern"], f"{layer['name']}.weight"
    if not pattern:
        must(layer["reason"], f"{name} is dense and does not say why")
        must(not layer.get("bad_groups"), f"{name} is dense and states groups that break a pattern")
        must(layer.get("density") in (None, 1), f"{name} has no pattern and claims the density {layer.get('density')}")
        return
    for stage in ("pruned", "tuned"):
        must(key in states[stage], f"weights/{stage} holds no {key}, which claims {pattern}")
        weight = states[stage][key]
        must(list(weight.shape) == list(layer["shape"]), f"{name} has shape {weight.shape}, stated is {layer['shape']}")
        if pattern == UNSTRUCTURED:
            check_zeros(weight, layer, f"{name} in weights/{stage}")
            continue
        bad = count_bad_groups(weight, pattern, 1, f"{name} in weights/{stage}")
        must(bad == 0, f"{name} in weights/{stage} has {bad} groups along input channels that are not {pattern}")
    must(not layer["reason"], f"{name} is pruned and gives a reason why it is not")
    must(layer["bad_groups"] == 0, f"{name} states {layer['bad_groups']} bad groups, its weights have none")
    pruned = states["pruned"][key]
    own = np.count_nonzero(pruned) / pruned.size
    must(
        abs(layer["density"] - own) <= 1e-4, f"{name} states the density {layer['density']}, its weights have {own:.6f}"
    )


# --------------------------------------------------------------------------------------------- the choice of patterns


def check_allocation(bundle: Bundle) -> str:
    """Allocation: the patterns are those that the recipe's ranking chose; costs, sums and budget are recomputed."""
    made, asked = bundle.json("allocation.json"), _recipe(bundle)["prune"]["allocate"]
    layers = {layer["name"]: layer for layer in bundle.json("layers.json")}
    must(made["ranking"] == asked["ranking"] and made["unit"] == asked["unit"], "allocation.json is of another recipe")
    costs, errors = {}, {}
    for name, rows in made["layers"].items():
        must("" in [row["pattern"] for row in rows], f"the choices of {name} leave out dense")
        for row in rows:
            must(row["pattern"] in ("", *asked["patterns"]), f"{name} may be {row['pattern']}, which nobody asked for")
            costs[name, row["pattern"]] = own = _cost(layers[name], row["pattern"], made["unit"])
            must_equal(row["cost"], own, f"the cost of {name} as {row['pattern'] or 'dense'}")
            errors[name, row["pattern"]] = row["error"]
    must_equal(made["dense"], sum(costs[name, ""] for name in made["layers"]), "the cost of the dense layers")
    must_equal(made["budget"], round(asked["budget"] * made["dense"]), "the budget")
    chosen = {name: layers[name]["pattern"] for name in made["layers"]}
    rankings = {row["ranking"]: row for row in made["rankings"]}
    must(rankings[made["ranking"]]["chosen"] == chosen, "the layers do not have the patterns that the ranking chose")
    others = layers.keys() - chosen.keys()
    must(all(not layers[name]["pattern"] for name in others), "a layer that had no choice is pruned")
    for row in rankings.values():
        picks = [(name, row["chosen"][name]) for name in made["layers"]]
        must_equal(row["cost"], sum(costs[pick] for pick in picks), f"the cost of the ranking {row['ranking']}")
        must_equal(row["measured"], sum(errors[pick] for pick in picks), f"the error of the ranking {row['ranking']}")
        must(row["cost"] <= made["budget"], f"the ranking {row['ranking']} leaves {row['cost']}, over the budget")
    return f"{len(chosen)} layers have what the ranking {made['ranking']} chose within the budget of {made['budget']}"


def _cost(layer: Mapping[str, Any], pattern: str, unit: str) -> int:
    """What a pattern leaves of a layer."""
    dense = int(layer["macs"]) if unit == "macs" else math.prod(layer["shape"])
    keep, group = map(int, pattern.split(":")) if pattern else (1, 1)
    return dense - dense * (group - keep) // group


# ------------------------------------------------------------------------------------- the sparsity manifest and graph

METADATA_KEY = "mpdeploy.sparsity"
GRAPHS = ("model.onnx", "model.fp16.onnx")


@dataclass(frozen=True)
class Use:
    """A constant that an operator multiplies by: `axis` is the constant's own axis along which inputs run."""

    constant: str
    node: str
    op: str
    axis: int


def weight_uses(graph: Graph) -> list[Use]:
    """Find every constant that a Conv, MatMul or Gemm multiplies by, through casts and transposes."""
    uses = []
    for node in graph.nodes:
        if node.op in ("Conv", "MatMul", "Gemm") and len(node.inputs) > 1:
            name, turns = _trace_back(graph, node.inputs[1])
            if name in graph.constants:
                axis = _summed_axis(node, graph.constants[name].ndim)
                for turn in turns:
                    axis = turn[axis]
                uses.append(Use(name, node.name or node.outputs[0], node.op, axis))
    return uses


def _summed_axis(node: Node, rank: int) -> int:
    """Return the axis of the weight, as the node sees it, that is summed over."""
    if node.op == "MatMul":
        return max(rank - 2, 0)
    return 1 if node.op == "Conv" or node.numbers.get("transB", [0]) == [1] else 0


def _trace_back(graph: Graph, name: str) -> tuple[str, list[list[int]]]:
    """Follow a value back to what it is a copy or cast of, with the transposes on the way, the last one first."""
    turns: list[list[int]] = []
    for _ in graph.nodes:  # no longer than the graph, so that a cycle ends
        node = graph.producers.get(name)
        if name in graph.constants or node is None or node.op not in ("Identity", "Cast", "CastLike", "Transpose"):
            break
        name = node.inputs[0]
        if node.op == "Transpose":
            turns.append(node.numbers.get("perm") or [1, 0])
    return name, turns


def check_sidecar(bundle: Bundle) -> str:
    """Sidecar: sparsity.json says what an ONNX file carries in its metadata."""
    sidecar = bundle.json("sparsity.json")
    carried = [name for name in GRAPHS if name in bundle.files and _embedded(bundle, name) == sidecar]
    must(carried, f"sparsity.json is not the metadata {METADATA_KEY} of any of {', '.join(GRAPHS)}")
    return f"sparsity.json equals the metadata {METADATA_KEY} of {carried[0]}"


def _embedded(bundle: Bundle, name: str) -> Any:
    """Return the sparsity manifest inside an ONNX file."""
    metadata = bundle.graph(name).metadata
    must(METADATA_KEY in metadata, f"{name} carries no metadata {METADATA_KEY}")
    return parse_json(metadata[METADATA_KEY].encode(), f"the metadata {METADATA_KEY} of {name}")


def check_graph(bundle: Bundle, name: str) -> str:
    """Graph: the sparsity manifest against the ONNX bytes, both ways."""
    graph, manifest = bundle.graph(name), _embedded(bundle, name)
    if graph.unread:
        raise Unchecked(f"{name} holds {graph.unread}, where weights could hide from this checker")
    layers = {layer["name"]: layer for layer in bundle.json("layers.json")}
    uses = weight_uses(graph)
    listed = set()
    for kind in ("weights", "dense"):
        for entry in manifest[kind]:
            _check_entry(entry, kind == "weights", graph, uses, layers, name)
            key = (entry["initializer"], entry["node"])
            must(key not in listed, f"{name} lists the weight {key[0]} of {key[1]} twice")
            listed.add(key)
    for use in uses:
        must(
            (use.constant, use.node) in listed,
            f"{name}: {use.node} multiplies by {use.constant}, which the sparsity manifest does not list",
        )
    there = {entry["layer"] for entry in manifest["weights"]}
    for layer in layers.values():
        grouped = layer["pattern"] not in ("", UNSTRUCTURED)
        must(not grouped or layer["name"] in there, f"{name}: {layer['name']} is missing from the manifest")
    _check_export_facts(bundle, name, graph)
    twin = _check_twin(bundle, name, uses)
    sparse, dense = len(manifest["weights"]), len(manifest["dense"])
    return f"{sparse} sparse and {dense} dense weights, all {len(uses)} of the graph; {twin}"


def _check_entry(
    entry: Mapping[str, Any],
    sparse: bool,
    graph: Graph,
    uses: Sequence[Use],
    layers: Mapping[str, Mapping[str, Any]],
    file: str,
) -> None:
    """Check one row of the sparsity manifest against the constant it names."""
    name, layer = entry["initializer"], layers.get(entry["layer"], {"pattern": ""})
    where = f"{file}: {name} ({entry['layer']})"
    must(name in graph.constants, f"{file} has no constant {name}, which the sparsity manifest lists")
    array = graph.constants[name]
    must(list(array.shape) == entry["shape"], f"{where} has shape {array.shape}, listed is {entry['shape']}")
    must(array.dtype.name == entry["dtype"], f"{where} is {array.dtype.name}, listed is {entry['dtype']}")
    digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
    must(digest == entry["sha256"], f"{where} has the SHA-256 {digest[:12]}..., listed is {entry['sha256'][:12]}...")
    own = [use for use in uses if (use.constant, use.node, use.op) == (name, entry["node"], entry["op"])]
    must(own, f"{where} is not what the {entry['op']} node {entry['node']} multiplies by")
    must(
        own[0].axis == entry["axis"], f"{where} has its inputs along axis {own[0].axis}, listed is axis {entry['axis']}"
    )
    must(np.isfinite(array).all(), f"{where} is not finite everywhere")
    if not sparse:
        if layer["pattern"] == UNSTRUCTURED:
            check_zeros(array, layer, where)
        grouped = layer["pattern"] not in ("", UNSTRUCTURED)
        must(entry["reason"] and not grouped, f"{where} is listed as dense, but layers.json claims a pattern")
        return
    must(entry["pattern"] == layer["pattern"], f"{where} claims {entry['pattern']}, layers.json {layer['pattern']!r}")
    bad = count_bad_groups(array, entry["pattern"], own[0].axis, where)
    must(bad == 0, f"{where} has {bad} groups along axis {own[0].axis} that are not {entry['pattern']}")
    density = np.count_nonzero(array) / array.size
    must(abs(entry["density"] - density) <= 1e-4, f"{where} states the density {entry['density']}, it is {density:.6f}")


def _check_export_facts(bundle: Bundle, name: str, graph: Graph) -> None:
    """Check what export.json says about the file itself."""
    facts = bundle.json("export.json")["files"][name]
    norms = sum(node.op == "LayerNormalization" for node in graph.nodes)
    must(
        facts["layer_norm_ops"] == norms, f"{name} has {norms} LayerNormalization nodes, not {facts['layer_norm_ops']}"
    )
    must(facts["opset"] == graph.opset, f"{name} has opset {graph.opset}, export.json says {facts['opset']}")
    floats = {graph.constants[use.constant].dtype.name for use in weight_uses(graph)}
    own = "fp16" if name.endswith(".fp16.onnx") else "fp32"
    must(
        floats <= {"float16" if own == "fp16" else "float32"} and facts["precision"] == own,
        f"{name} multiplies by weights of {floats}, its name and export.json say {own} and {facts['precision']}",
    )


def _check_twin(bundle: Bundle, name: str, uses: Sequence[Use]) -> str:
    """Check that the dense twin is the same graph: same operators in the same order, same weight shapes."""
    twin = name.replace("model", "dense", 1)
    own, other = bundle.graph(name), bundle.graph(twin)
    must(
        [node.op for node in own.nodes] == [node.op for node in other.nodes], f"{twin} has other operators than {name}"
    )
    shapes = [
        [graph.constants[use.constant].shape for use in list_]
        for graph, list_ in ((own, uses), (other, weight_uses(other)))
    ]
    must(shapes[0] == shapes[1], f"{twin} has weights of other shapes than {name}")
    return f"{twin} has the same {len(own.nodes)} operators"


# ----------------------------------------------------------------------------------- exported against certified weights

EPSILONS = (1e-5, 1e-3, 1e-6, 1e-4, 1e-2, 1e-8, 1e-12)
"""BatchNorm's epsilon is not in a state dict; these are the ones networks use."""


def check_export(bundle: Bundle, name: str) -> str:
    """Export: every weight, and every constant under a certified tensor's name, is the certified one."""
    graph, manifest, state = bundle.graph(name), _embedded(bundle, name), bundle.tensors("weights/tuned.safetensors")
    if not manifest["weights"] and all(layer["pattern"] != UNSTRUCTURED for layer in bundle.json("layers.json")):
        raise Unchecked(f"{name} lists no sparse weight")
    entries = [*manifest["weights"], *manifest["dense"]]
    folded = sum(_check_same_weight(entry, graph, state, name) for entry in entries)
    weights = {entry["initializer"] for entry in entries}
    others = graph.constants.keys() & state.keys() - weights
    for key in sorted(others):
        own, stored = graph.constants[key], state[key]
        equal = own.shape == stored.shape and np.array_equal(own, stored.astype(own.dtype))
        must(equal, f"{name}: the constant {key} is not the one in weights/tuned")
    note = f", {folded} of them with a BatchNorm folded in: same zeros, one ratio per output channel" if folded else ""
    rest = len(graph.constants) - len(weights) - len(others) - folded
    rest -= sum(array.dtype.kind != "f" or array.size < 2 for array in graph.constants.values())
    return (
        f"{len(weights)} weights{note}, and {len(others)} other tensors are those of weights/tuned, rounded; "
        f"{rest} constants of more than one number belong to no tensor there"
    )


def _check_same_weight(entry: Mapping[str, Any], graph: Graph, state: Mapping[str, Array], file: str) -> bool:
    """Compare one exported weight with the certified one; return whether a BatchNorm was folded into it."""
    name, layer = entry["initializer"], entry["layer"]
    if entry.get("permutation") is not None:
        raise Unchecked(f"{file}: {name} is permuted, which this checker does not undo")
    own, stored = graph.constants[name], state.get(f"{layer}.weight")
    own = own.T if own.ndim == 2 and entry["axis"] == 0 else own
    if stored is None:
        if _occurs(own, state):
            return False
        raise Unchecked(f"{file}: {name} belongs to no tensor of weights/tuned that this checker finds")
    must(
        own.shape == stored.shape, f"{file}: {name} has shape {own.shape}, the certified {layer}.weight {stored.shape}"
    )
    if np.array_equal(own, stored.astype(own.dtype)):
        return False
    norms = dict(_folded_norms(own, stored, state))
    if not norms and not entry.get("pattern") and name not in state:
        raise Unchecked(f"{file}: {name} differs from {layer}.weight: computed from it, or edited; this can't be told")
    must(
        norms,
        f"{file}: {name} is not the certified {layer}.weight, and no BatchNorm of weights/tuned explains the ratio",
    )
    node = next(node for node in graph.nodes if (node.name or node.outputs[0]) == entry["node"])
    bias = graph.constants[node.inputs[2]] if len(node.inputs) > 2 else np.zeros(len(own), own.dtype)
    before = state.get(f"{layer}.bias", np.zeros(len(own)))
    shifted = any(_shifts(norm, scale, before, bias, state) for norm, scale in norms.items())
    must(shifted, f"{file}: the bias of {layer} is not the one that {_first(norms)} folded in gives")
    return True


def _occurs(own: Array, state: Mapping[str, Array]) -> bool:
    """Tell whether a matrix is a block of rows of a stored one, as a fused projection is cut into its parts."""
    for stored in state.values():
        if stored.ndim == own.ndim == 2 and stored.shape[1] == own.shape[1]:
            rounded = stored.astype(own.dtype)
            starts = np.flatnonzero((rounded == own[0]).all(axis=1))
            if any(np.array_equal(rounded[start : start + len(own)], own) for start in starts):
                return True
    return False


def _close(own: Array, exact: Floats, size: Floats) -> bool:
    """Tell whether `own` is `exact` after rounding to its type, for terms of the magnitude `size`; zero stays zero."""
    relative, absolute = (1e-3, 2.0**-24) if own.dtype == np.float16 else (1e-5, 0.0)
    return bool((np.abs(own.astype(np.float64) - exact) <= relative * size + absolute).all())


def _folded_norms(own: Array, stored: Array, state: Mapping[str, Array]) -> Iterator[tuple[str, Floats]]:
    """Yield each BatchNorm whose scale gamma / sqrt(var + eps) per output channel turns one weight into the other."""
    x, y = stored.reshape(len(stored), -1).astype(np.float64), own.reshape(len(own), -1)
    rows, peak = np.arange(len(x)), np.abs(x).argmax(axis=1)
    for key, var in state.items():
        norm = key.removesuffix(".running_var")
        if norm == key or var.shape != (len(own),):
            continue
        gamma = state.get(f"{norm}.weight", np.ones(len(own))).astype(np.float64)
        for epsilon in EPSILONS:
            scale = gamma / np.sqrt(var.astype(np.float64) + epsilon)
            # The largest weight of each channel first: most norms are another layer's and differ there already.
            top = scale * x[rows, peak]
            if not _close(y[rows, peak], top, np.abs(top)):
                continue
            scaled = scale[:, None] * x
            if _close(y, scaled, np.abs(scaled)):
                yield norm, scale
                break


def _shifts(norm: str, scale: Floats, before: Array, bias: Array, state: Mapping[str, Array]) -> bool:
    """Tell whether `bias` is (before - mean) * scale + beta of a BatchNorm."""
    moved = (before.astype(np.float64) - state[f"{norm}.running_mean"]) * scale
    beta = state.get(f"{norm}.bias", np.zeros(len(scale))).astype(np.float64)
    size = np.abs(before * scale) + np.abs(state[f"{norm}.running_mean"] * scale) + np.abs(beta)
    return bias.shape == scale.shape and _close(bias, moved + beta, size)


# ---------------------------------------------------------------------------------------------------- ids and ledger


def check_ids(bundle: Bundle) -> str:
    """Ids: no image is in two of calibration, certification and validation, nor twice in one."""
    record = bundle.json("calibration.json")
    kinds = ("calibration", "certification", "validation")
    ids = {kind: record[f"{kind}_ids"] for kind in kinds}
    for kind in kinds:
        if not ids[kind]:
            raise Unchecked(f"no {kind} image is named")
        must(len(set(ids[kind])) == len(ids[kind]), f"an image is twice among the {kind} ids")
    for i, kind in enumerate(kinds):
        for other in kinds[:i]:
            shared = set(ids[kind]) & set(ids[other])
            must(not shared, f"{len(shared)} images are {other} and {kind} samples, {_first(shared)} for one")
    must(record["split"] == "train", f"calibration images come from the split {record['split']!r}, not from train")
    return ", ".join(f"{len(ids[kind])} {kind}" for kind in kinds) + " ids, all different"


def pair_margins(logits: Array, label: Array) -> tuple[Floats, Bools]:
    """Return z[label] - z[j] in float64, and a mask of the competitors j."""
    z = logits.astype(np.float64)
    own = np.arange(z.shape[1])[None, :] == label[:, None]
    return z[own][:, None] - z, ~own


def keeps(pairs: Floats, others: Bools) -> Bools:
    """Tell where the label beats every competitor strictly; NaN, infinity and ties lose."""
    return np.asarray(((pairs > 0) | ~others).all(axis=1) & np.isfinite(pairs).all(axis=1))


def smallest(pairs: Floats, others: Bools) -> Floats:
    """Return the margin to the best competitor."""
    result: Floats = np.where(others, pairs, np.inf).min(axis=1)
    return result


def check_spent(rows: Sequence[Mapping[str, Any]], logits: Mapping[str, Array], what: str) -> None:
    """Check the summary of what each stage spent of the dense margins.

    Args:
        rows: as stated, one per stage after the dense one.
        logits: stage -> [n, K] logits, dense first, in the order of `rows`.
        what: begins the sentence where something differs.
    """
    names = list(logits)
    must([row["stage"] for row in rows] == names[1:], f"{what} lists other stages than {', '.join(names[1:])}")
    z = {name: array.astype(np.float64) for name, array in logits.items()}
    label = z["dense"].argmax(axis=1)
    dense, others = pair_margins(z["dense"], label)
    last, _ = pair_margins(z[names[-1]], label)
    for row, before, after in zip(rows, names[:-1], names[1:], strict=True):
        change = z[after] - z[before]
        gained, _ = pair_margins(change, label)
        share = np.where(others & (dense > 0), -gained / dense, -np.inf).max(axis=1)[smallest(dense, others) > 0]
        eps = np.abs(change).max(axis=1)
        own = {
            "eps_inf_median": float(np.median(eps)),
            "eps_inf_max": float(eps.max()),
            "share_median": float(np.median(share)) if share.size else None,
            "share_p99": float(np.quantile(share, 0.99)) if share.size else None,
            "flips_alone": int((~keeps(dense + gained, others)).sum()),
            "flips_but_for": int((~keeps(last, others) & keeps(last - gained, others)).sum()),
        }
        for key, value in own.items():
            must_equal(row[key], value, f"{what}: {key} of the stage {after}")


def check_ledger(bundle: Bundle) -> str:
    """Ledger: margins, slacks, verdicts and every number of the certificate, from the stored logits in float64."""
    stated, ledger = bundle.json("certificate.json"), bundle.tensors("ledger.safetensors")
    stages = stated["stages"]
    must(stages == ["dense", "pruned", "tuned"], f"the certificate is about the stages {stages}")
    logits, n = {stage: ledger[stage] for stage in stages}, len(ledger["labels"])
    if n == 0:
        raise Unchecked("the ledger is empty: no certification sample")
    _check_logits(logits, ledger["labels"], "ledger.safetensors")
    must((stated["samples"], stated["classes"]) == logits["dense"].shape, "the certificate states another n or K")
    must(
        stated["ids"] == bundle.json("calibration.json")["certification_ids"] and len(stated["ids"]) == n,
        "the ids of the certificate are not the certification ids in their order, one per row of the ledger",
    )
    _check_rows(stated, ledger)
    for stage in stages:
        digest = bundle.files[f"weights/{stage}.safetensors"]["sha256"]
        must(stated["digests"][stage] == digest, f"the certificate binds other {stage} weights than weights/{stage}")
        correct = int((decide(logits[stage]) == ledger["labels"]).sum())
        must_equal(stated["top1"][stage], correct, f"the count of right {stage} labels")
    check_spent(stated["spent"], logits, "the certificate")
    counts = stated["counts"]
    return f"{n} samples: {counts['certified']} certified, {counts['kept']} kept, {counts['flipped']} flipped"


def _check_logits(logits: Mapping[str, Array], labels: Array, where: str) -> None:
    """Refute logits that are not finite, not of one shape, and labels that are no class."""
    shape = logits["dense"].shape
    must(labels.ndim == 1 and len(shape) == 2 and shape[1] > 1, f"{where} holds logits of shape {shape}")
    for name, array in logits.items():
        must(array.shape == (len(labels), shape[1]), f"{where}: {name} has shape {array.shape}, labels {labels.shape}")
        must(np.isfinite(array).all(), f"{where}: the logits {name} hold NaN or infinity")
    must(labels.dtype.kind in "iu" and ((labels >= 0) & (labels < shape[1])).all(), f"{where}: a label is no class")


def _check_rows(stated: Mapping[str, Any], ledger: Mapping[str, Array]) -> None:
    """Check the per-sample columns of the ledger and what the certificate counts of them."""
    dense = ledger["dense"].astype(np.float64)
    label = dense.argmax(axis=1)
    pairs, others = pair_margins(dense, label)
    last, _ = pair_margins(ledger["tuned"], label)
    reserve = float(stated["reserve"]) * (dense.max(axis=1) - dense.min(axis=1))
    must(stated["reserve"] >= 0, f"the certificate sets aside a reserve of {stated['reserve']}")
    slack, kept = smallest(last, others), keeps(last, others)
    columns = {"dense_label": label, "margin": smallest(pairs, others), "slack": slack, "reserve": reserve}
    columns["verdict"] = np.where(kept, np.where(slack > reserve, 2, 1), 0)
    for name, own in columns.items():
        there = ledger[name]
        close = there.shape == own.shape and (np.abs(there.astype(np.float64) - own) <= 1e-9 + 1e-9 * np.abs(own)).all()
        wrong = int(np.argmin(np.isclose(there, own, 1e-9, 1e-9))) if there.shape == own.shape else 0
        must(
            close,
            f"ledger.safetensors: {name} is not what the logits give, first for the sample {stated['ids'][wrong]}",
        )
    for verdict, kind in enumerate(("flipped", "kept", "certified")):
        must_equal(stated["counts"][kind], int((columns["verdict"] == verdict).sum()), f"the count of {kind} samples")
    must_equal(stated["margin_median"], float(np.median(columns["margin"])), "margin_median")
    must_equal(stated["slack_median"], float(np.median(slack)), "slack_median")


# ---------------------------------------------------------------------------------------------- decisions, statistics


def decide(logits: Array) -> Array:
    """Return the label of each row, the lower index on a tie, -1 where a logit is not finite."""
    label: Array = np.where(np.isfinite(logits).all(axis=1), np.nan_to_num(logits).argmax(axis=1), -1)
    return label


def clopper_pearson(k: int, n: int, confidence: float) -> tuple[float, float]:
    """Return the two-sided Clopper-Pearson interval by bisection on the binomial tail (the producer inverts a beta)."""
    must(0 <= k <= n and n > 0 and 0.5 < confidence < 1, f"{k} of {n} at confidence {confidence} has no interval")
    tail = (1 - confidence) / 2
    return 1.0 - _upper(n - k, n, tail), _upper(k, n, tail)


@cache
def _upper(k: int, n: int, tail: float) -> float:
    """Return the p at which P(X <= k) falls to `tail`."""
    if k == n:
        return 1.0
    choose, low, high = _log_choose(k, n), k / n, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _cdf(choose, n, middle) > tail else (low, middle)
    return high


def _log_choose(k: int, n: int) -> Floats:
    """Return log(n choose i) for i = 0..k."""
    head = math.lgamma(n + 1)
    return np.array([head - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in range(k + 1)])


def _cdf(log_choose: Floats, n: int, p: float) -> float:
    """Return P(X <= k) for X ~ Binomial(n, p) and 0 < p < 1, summed term by term."""
    i = np.arange(len(log_choose))
    return math.fsum(np.exp(log_choose + i * math.log(p) + (n - i) * math.log1p(-p)))


def mcnemar(b: int, c: int) -> float:
    """Return the exact two-sided McNemar p-value of b and c discordant pairs."""
    return min(1.0, 2 * _cdf(_log_choose(min(b, c), b + c), b + c, 0.5)) if b + c else 1.0


def check_proportion(stated: Mapping[str, Any], k: int, n: int, confidence: float, what: str) -> None:
    """Check a count, its share and its Clopper-Pearson interval."""
    low, high = clopper_pearson(k, n, confidence)
    for key, own in (("correct", k), ("n", n), ("value", k / n), ("low", low), ("high", high)):
        must_equal(stated[key], own, f"{what}: {key}")


# ------------------------------------------------------------------------------------------------------- the results


def check_results(bundle: Bundle) -> str:
    """Results: which engines, how many samples, and the networks' own top-1."""
    results, samples = bundle.json("results.json"), bundle.tensors("samples.safetensors")
    labels = samples["labels"]
    if len(labels) == 0:
        raise Unchecked("no validation image was run")
    logits = {stage: samples[stage] for stage in ("dense", "pruned", "tuned")}
    _check_logits(logits, labels, "samples.safetensors")
    stated = results["validation"]
    must((stated["samples"], stated["classes"]) == logits["dense"].shape, "results.json states another n or K")
    ids = bundle.json("calibration.json")["validation_ids"]
    must(len(ids) == len(labels), f"{len(ids)} validation ids are named and {len(labels)} samples stored")
    for stage in ("dense", "tuned"):
        right = int((decide(logits[stage]) == labels).sum())
        check_proportion(results[f"{stage}_top1"], right, len(labels), results["confidence"], f"top-1 of {stage}")
    _check_engine_names(bundle, results, samples)
    measured = sum(row["status"] == "measured" for row in results["engines"])
    if not measured:
        raise Unchecked(f"none of the {len(results['engines'])} engines was run")
    return f"{len(labels)} validation samples, {measured} of {len(results['engines'])} engines measured"


def _check_engine_names(bundle: Bundle, results: Mapping[str, Any], samples: Mapping[str, Array]) -> None:
    """Check that no engine is left out, and that samples are there for the measured ones and for no other."""
    rows = results["engines"]
    ids = [row["id"] for row in rows]
    asked = [f"{e['runtime']}-{e['target']}-{e['precision']}" for e in _recipe(bundle)["build"]["engines"]]
    must(sorted(ids) == sorted(asked), f"results.json is about {sorted(ids)}, the recipe asks for {sorted(asked)}")
    expected = {"labels", "dense", "pruned", "tuned"}
    for row in rows:
        must(row["status"] in ("measured", "not run"), f"{row['id']} has the status {row['status']!r}")
        must(
            row["status"] == "measured" or row["why_not"], f"{row['id']} was not run and results.json does not say why"
        )
        if row["status"] == "measured":
            expected |= {f"engine.{row['id']}", f"certification.{row['id']}"}
            if row["latency"] is not None:
                expected |= {f"latency.{row['id']}", f"latency.{row['latency']['twin']}"}
    must(
        samples.keys() == expected,
        f"samples.safetensors: {_first(samples.keys() ^ expected)} is missing or unexplained",
    )


def _recipe(bundle: Bundle) -> Mapping[str, Any]:
    recipe: Mapping[str, Any] = bundle.json("recipe.lock.json")
    return recipe


def check_engine(bundle: Bundle, row: Mapping[str, Any]) -> str:
    """Engine: its labels against the true ones, the dense network's and the certificate's."""
    samples, confidence = bundle.tensors("samples.safetensors"), bundle.json("results.json")["confidence"]
    labels, dense, own = samples["labels"], samples["dense"], samples[f"engine.{row['id']}"]
    must(own.shape == dense.shape, f"{row['id']} has logits {own.shape}, the dense network {dense.shape}")
    n, reference = len(labels), dense.argmax(axis=1)
    right, own_right = reference == labels, decide(own) == labels
    check_proportion(row["top1"], int(own_right.sum()), n, confidence, "top1")
    agree = int(keeps(*pair_margins(own, reference)).sum())
    check_proportion(row["agreement"], agree, n, confidence, "agreement")
    b, c = int((right & ~own_right).sum()), int((~right & own_right).sum())
    flips = {"dense_right_engine_wrong": b, "dense_wrong_engine_right": c, "mcnemar_p": mcnemar(b, c)}
    for key, value in flips.items():
        must_equal(row["flips"][key], value, f"flips: {key}")
    finite = _check_certified(bundle, row) and bool(np.isfinite(own).all())
    must(row["finite"] is finite, f"finite is stated as {row['finite']}, the stored logits say {finite}")
    if finite:
        stages = {"dense": dense, "pruned": samples["pruned"], "tuned": samples["tuned"], "engine": own}
        check_spent(row["spent"], stages, "spent")
    else:
        must(not row["spent"], "spent is stated for logits that are not finite")
    return f"{n} labels: {int(own_right.sum())} right, {agree} as the dense network's; the rest re-derived too"


def _check_certified(bundle: Bundle, row: Mapping[str, Any]) -> bool:
    """Check the labels that the ledger certified or kept and the engine lost; return whether all is finite."""
    ledger, ids = bundle.tensors("ledger.safetensors"), bundle.json("certificate.json")["ids"]
    own = bundle.tensors("samples.safetensors")[f"certification.{row['id']}"]
    must(own.shape == ledger["dense"].shape, f"certification.{row['id']} has shape {own.shape}")
    lost = ~keeps(*pair_margins(own, ledger["dense"].argmax(axis=1)))
    certified, kept = ledger["verdict"] == 2, ledger["verdict"] == 1
    broken = [ids[i] for i in np.flatnonzero(lost & certified)]
    stated = row["certified"]
    must_equal(stated["n"], int(certified.sum()), "the count of certified samples")
    must_equal(stated["violations"], len(broken), "the count of violations, certified labels that the engine lost,")
    must(stated["violating_ids"] == broken, f"violating_ids are stated as {stated['violating_ids']}, they are {broken}")
    must_equal(stated["kept_broken"], int((lost & kept).sum()), "kept_broken")
    return bool(np.isfinite(own).all())


# ---------------------------------------------------------------------------------------------------------- latency

RESAMPLES = 2000
FEWEST_BLOCKS = 4
"""With three blocks the rarest resample has probability 1/27, more than the tail of a 95 % interval."""


def check_latency(bundle: Bundle, row: Mapping[str, Any]) -> str:
    """Latency: medians, quantiles, the ratio and its block-bootstrap interval, from the raw seconds of each call."""
    stated, name = row["latency"], row["id"]
    samples, confidence = bundle.tensors("samples.safetensors"), bundle.json("results.json")["confidence"]
    must(stated["twin"] == f"{name}.dense", f"{name} is timed against {stated['twin']}, which is not its dense twin")
    own, twin = samples[f"latency.{name}"], samples[f"latency.{stated['twin']}"]
    if own.size == 0:
        raise Unchecked(f"no call of {name} was timed")
    must(
        own.ndim == 1 and own.shape == twin.shape,
        f"{own.shape} calls of {name} and {twin.shape} of its twin are stored",
    )
    seconds = np.concatenate([own, twin])
    must((np.isfinite(seconds) & (seconds > 0)).all(), f"a stored time of {name} or its twin is no positive number")
    must_equal(stated["calls"], own.size, "calls")
    for key, q in (("median_ms", 0.5), ("p90_ms", 0.9), ("p99_ms", 0.99)):
        must_equal(stated[key], 1e3 * float(np.quantile(own, q)), key)
    must_equal(stated["twin_median_ms"], 1e3 * float(np.median(twin)), "twin_median_ms")
    ratio = stated["ratio"]
    must_equal(ratio["value"], float(np.median(twin) / np.median(own)), "the ratio of the medians")
    blocks = _recipe(bundle)["validate"]["blocks"]
    low, high = ratio_interval(own, twin, blocks, confidence)
    must_equal(ratio["low"], low, "the ratio's low end")
    must_equal(ratio["high"], high, "the ratio's high end")
    must(
        stated["verdict"] == speed_verdict(low, high),
        f"the interval {low:.4f} to {high:.4f} is not {stated['verdict']}",
    )
    _check_setting(bundle, row)
    return f"{own.size} calls each in {blocks} blocks: ratio {ratio['value']:.4f}, {low:.4f} to {high:.4f}"


def ratio_interval(own: Floats, twin: Floats, blocks: int, confidence: float) -> tuple[float, float]:
    """Return the percentile interval of the ratio of medians over whole blocks, drawn with the published seed 0."""
    must(type(blocks) is int and blocks >= FEWEST_BLOCKS, f"{blocks} blocks are too few for an interval")
    must(own.size % blocks == 0, f"{own.size} calls don't divide into {blocks} blocks")
    rng = np.random.default_rng(0)
    calls = np.arange(own.size).reshape(blocks, -1)
    draws = rng.integers(0, blocks, (RESAMPLES, blocks))
    ratios = []
    for part in np.array_split(draws, 20):  # at once they would take 2000 times the memory of the calls
        picked = calls[part].reshape(len(part), -1)
        ratios.append(np.median(twin[picked], axis=1) / np.median(own[picked], axis=1))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(ratios), [tail, 1 - tail])
    return float(low), float(high)


def speed_verdict(low: float, high: float) -> str:
    """Name what the interval shows: `same` is wholly within 2 % of 1."""
    if low >= 0.98 and high <= 1.02:
        return "same"
    return "faster" if low > 1 else "slower" if high < 1 else "inconclusive"


def _check_setting(bundle: Bundle, row: Mapping[str, Any]) -> None:
    """Check that batch and threads are ones the engine was built for."""
    stated, engine = row["latency"], bundle.json(f"engines/{row['id']}/engine.json")
    smallest_batch, _, largest = engine["batch"]
    must(smallest_batch <= stated["batch"] <= largest, f"batch {stated['batch']} is outside of {engine['batch']}")
    must(
        stated["threads"] == engine["threads"], f"{stated['threads']} threads are stated, built for {engine['threads']}"
    )


# ----------------------------------------------------------------------------------------------------------- engines

STORED = {"fp32": {"float32"}, "fp16": {"float16"}, "int8": {"int8", "uint8"}}
SETTING = ("runtime", "target", "precision", "batch", "threads")


def check_engines(bundle: Bundle) -> str:
    """Engines: each file is the one its manifest describes, as asked, with a dense twin built the same way."""
    folders = sorted({name.split("/")[1] for name in bundle.files if name.startswith("engines/")})
    if not folders:
        raise Unchecked("there is no engine")
    rows = {row["id"] for row in bundle.json("results.json")["engines"]}
    names = {folder.removesuffix(".dense") for folder in folders}
    must(names == rows, f"{_first(names ^ rows)} is only in one of engines/ and results.json")
    for folder in folders:
        _check_manifest(bundle, folder)
    for name in sorted(names):
        must({name, f"{name}.dense"} <= set(folders), f"{name} and its dense twin are not both there")
        own, twin = (bundle.json(f"engines/{folder}/engine.json") for folder in (name, f"{name}.dense"))
        for key in SETTING:
            must(own[key] == twin[key], f"{name} and its dense twin differ in {key}: {own[key]} and {twin[key]}")
    return (
        f"{len(folders)} engine files are the ones their manifests describe, in the asked precision, with dense twins"
    )


def _check_manifest(bundle: Bundle, folder: str) -> None:
    """Check one engine.json against the file beside it."""
    own = bundle.json(f"engines/{folder}/engine.json")
    file = f"engines/{folder}/{own['file']}"
    must(file in bundle.files, f"engines/{folder}/engine.json names the file {own['file']}, which is not there")
    for key in ("sha256", "size"):
        must(own[key] == bundle.files[file][key], f"engines/{folder}/engine.json gives another {key} than {file} has")
    twin = folder.endswith(".dense")
    must(own["weights"] == ("dense" if twin else "sparse"), f"{folder} has the weights {own['weights']}")
    name = f"{own['runtime']}-{own['target']}-{own['precision']}" + (".dense" if twin else "")
    must(own["id"] == name == folder, f"engines/{folder} holds the engine {own['id']}, built as {name}")
    must(
        own["asked"]["precision"] == own["precision"],
        f"{folder} was asked for {own['asked']['precision']} and is {own['precision']}",
    )
    if file.endswith(".onnx"):
        _check_stored_precision(bundle.graph(file), own["precision"], file)


def _check_stored_precision(graph: Graph, precision: str, file: str) -> None:
    """Check the element types of the matrices that an ONNX engine stores."""
    must(precision in STORED, f"{file} has the precision {precision!r}, which this checker does not know")
    kinds = {array.dtype.name for array in graph.constants.values() if array.ndim > 1 and array.dtype != np.int64}
    fits = bool(kinds & STORED[precision]) if precision == "int8" else kinds == STORED[precision]
    must(fits, f"{file} was asked in {precision} and stores its matrices as {', '.join(sorted(kinds)) or 'nothing'}")


# ------------------------------------------------------------------------------------------------------------- gates


@dataclass(frozen=True)
class Judged:
    """One gate, judged again."""

    name: str
    limit: float
    measured: float | None
    low: float | None
    high: float | None
    verdict: Verdict
    reason: str


Evidence = tuple[float | None, float | None, float | None]
NOTHING: Evidence = (None, None, None)


def _drop(row: Mapping[str, Any], bundle: Bundle) -> Evidence:
    dense, own = bundle.json("results.json")["dense_top1"], row["top1"]
    return 100.0 * (dense["correct"] - own["correct"]) / own["n"], None, None


def _agreement(row: Mapping[str, Any], _: Bundle) -> Evidence:
    return row["agreement"]["value"], row["agreement"]["low"], row["agreement"]["high"]


def _violations(row: Mapping[str, Any], _: Bundle) -> Evidence:
    return (float(row["certified"]["violations"]), None, None) if row["certified"]["n"] else NOTHING


def _certified(_: Mapping[str, Any], bundle: Bundle) -> Evidence:
    certificate, confidence = bundle.json("certificate.json"), bundle.json("results.json")["confidence"]
    k, n = certificate["counts"]["certified"], certificate["samples"]
    return k / n, *clopper_pearson(k, n, confidence)


def _speedup(row: Mapping[str, Any], _: Bundle) -> Evidence:
    if row["latency"] is None:
        return NOTHING
    ratio = row["latency"]["ratio"]
    return ratio["value"], ratio["low"], ratio["high"]


GATES: dict[str, Callable[[Mapping[str, Any], Bundle], Evidence]] = {
    "max_accuracy_drop": _drop,
    "min_agreement": _agreement,
    "max_violations": _violations,
    "min_certified": _certified,
    "min_speedup": _speedup,
}


def judge(name: str, limit: float, row: Mapping[str, Any], bundle: Bundle) -> Judged:
    """Judge one gate again. Counts decide by their value; a ratio of times by its whole interval."""
    if name not in GATES:
        return Judged(name, limit, None, None, None, Verdict.UNCHECKED, "this checker does not know the gate")
    if row["status"] != "measured":
        return Judged(name, limit, None, None, None, Verdict.UNCHECKED, f"{row['id']} was not run: {row['why_not']}")
    value, low, high = GATES[name](row, bundle)
    if value is None:
        return Judged(name, limit, None, None, None, Verdict.UNCHECKED, "nothing was measured that it could judge")
    if name == "min_speedup":
        assert low is not None  # for the type checker: a ratio has both ends
        assert high is not None
        verdict = Verdict.HOLDS if low >= limit else Verdict.REFUTED if high < limit else Verdict.UNCHECKED
    else:
        fits = value <= limit if name.startswith("max_") else value >= limit
        verdict = Verdict.HOLDS if fits else Verdict.REFUTED
    interval = "" if low is None or high is None else f" (interval {low:.4f} to {high:.4f})"
    return Judged(name, limit, value, low, high, verdict, f"measured {value:.4f}{interval}, the limit is {limit}")


def judge_all(bundle: Bundle) -> list[Judged]:
    """Judge every gate that the locked recipe asks for, and what no recipe can switch off where it fails."""
    deploy = _recipe(bundle)["validate"]["deploy"]
    row = next((row for row in bundle.json("results.json")["engines"] if row["id"] == deploy), None)
    must(row is not None, f"the recipe releases {deploy}, which results.json does not know")
    assert row is not None  # for the type checker
    asked = {name: limit for name, limit in _recipe(bundle)["gates"].items() if limit is not None}
    judged = [judge(name, limit, row, bundle) for name, limit in asked.items()]
    for name in ("finite", "batch_consistent") if row["status"] == "measured" else ():
        if row[name] is not True:
            judged.append(Judged(name, 1.0, 0.0, None, None, Verdict.REFUTED, f"{deploy} is not {name}"))
    return judged


def check_verdict(bundle: Bundle) -> str:
    """Verdict: verdict.json lists exactly the gates of the recipe, with the recipe's limits and our own answers."""
    stated, judged = bundle.json("verdict.json"), {gate.name: gate for gate in judge_all(bundle)}
    rows = {row["name"]: row for row in stated["gates"]}
    must(len(rows) == len(stated["gates"]), "verdict.json lists a gate twice")
    must(judged.keys() <= rows.keys(), f"the gate {_first(judged.keys() - rows.keys())} is missing in verdict.json")
    must(rows.keys() <= judged.keys(), f"the gate {_first(rows.keys() - judged.keys())} is not in the recipe")
    deploy = _recipe(bundle)["validate"]["deploy"]
    must(stated["deploy"] == deploy, f"verdict.json releases {stated['deploy']}, the recipe judges {deploy}")
    known = [name for name in judged if name in GATES or name in ("finite", "batch_consistent")]
    for name in known:
        for key in ("limit", "measured", "low", "high"):
            must_equal(rows[name][key], getattr(judged[name], key), f"the gate {name}: {key}")
        own = judged[name].verdict
        must(rows[name]["verdict"] == own, f"the gate {name} is stated as {rows[name]['verdict']}, it is {own}")
    if not judged or len(known) < len(judged):
        raise Unchecked("the recipe asks for no gate" if not judged else "a gate is unknown to this checker")
    verdicts = {gate.verdict for gate in judged.values()}
    own = next(v for v in (Verdict.REFUTED, Verdict.UNCHECKED, Verdict.HOLDS) if v in verdicts)
    must(stated["verdict"] == own, f"verdict.json says {stated['verdict']}, its gates give {own}")
    return f"{len(judged)} gates have the recipe's limits; together they are {own}, as verdict.json says"


def check_policy(bundle: Bundle) -> str:
    """Policy: the gates are those of the user's recipe.toml; an override has to be on record."""
    if "recipe.toml" not in bundle.files:
        raise Unchecked("there is no recipe.toml to hold the gates against")
    written = tomllib.loads(bytes(map_file(bundle.root / "recipe.toml")).decode("utf-8")).get("gates", {})
    locked = _recipe(bundle)
    overrides = [item.removeprefix("gates.") for item in locked["sets"] if item.startswith("gates.")]
    asked = written | {
        name: tomllib.loads(f"v = {value}")["v"] for name, _, value in (o.partition("=") for o in overrides)
    }
    for name in sorted(asked.keys() | {name for name, limit in locked["gates"].items() if limit is not None}):
        own = locked["gates"].get(name)
        must(own == asked.get(name), f"the gate {name} is {asked.get(name)} in recipe.toml, {own} in recipe.lock.json")
    note = f"; overridden when it was run: {', '.join(overrides)}" if overrides else ""
    return f"the {len(asked)} gates are those of recipe.toml{note}"


# ------------------------------------------------------------------------------------------------------ all together


def answer(claim: str, check: Callable[..., str], *arguments: Any) -> Finding:
    """Run one check. A field that is missing or of the wrong kind refutes: it is not what was promised."""
    try:
        with np.errstate(all="ignore"):
            return Finding(claim, Verdict.HOLDS, f"{check(*arguments)}.")
    except Unchecked as unknown:
        return Finding(claim, Verdict.UNCHECKED, f"{unknown}.")
    except (Refuted, Unreadable) as lie:
        return Finding(claim, Verdict.REFUTED, f"{lie}.")
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, OSError) as error:
        kind = type(error).__name__
        return Finding(claim, Verdict.REFUTED, f"a field is missing or of the wrong kind ({kind}: {error}).")


def read_manifest(root: Path) -> tuple[Mapping[str, Any], str]:
    """Return manifest.json and its SHA-256, which is the bundle's digest.

    Raises:
        Unreadable: the folder holds no manifest of a bundle.
    """
    path = root / MANIFEST
    try:
        if not stat.S_ISREG(path.lstat().st_mode) or path.stat().st_size > JSON_CAP:
            raise Unreadable(f"{path} is no plain file of reasonable size")
        data = path.read_bytes()
    except OSError as error:
        raise Unreadable(f"{root} is not a bundle: {error}") from error
    manifest = parse_json(data, MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("kind") != "mpdeploy-bundle" or manifest.get("schema") != 1:
        raise Unreadable(f"{path} is not the manifest of a bundle of schema 1")
    if not isinstance(manifest.get("files"), dict):
        raise Unreadable(f"{path} has no table of files")
    return manifest, hashlib.sha256(data).hexdigest()


def check_digest(own: str, expect: str) -> str:
    """Digest: the bundle is the one that was announced elsewhere."""
    must(own == expect.lower().removeprefix("sha256:"), f"the bundle's digest is {own}, expected was {expect}")
    return f"the bundle's digest is the expected {own}"


def verify(bundle: Path, expect: str | None = None) -> list[Finding]:
    """Check a bundle: files first, then every claim, each from the bytes.

    Args:
        bundle: its folder.
        expect: the bundle's digest (hex SHA-256 of manifest.json), from a source other than the bundle. Without it a
            bundle that was forged and hashed again in all its parts can still be told only where its claims disagree.

    Returns:
        One finding per claim. Where the files are not what the manifest lists, no claim about them is looked at.

    Raises:
        Unreadable: the folder is not a bundle: it has no manifest.json, or that is none.
    """
    manifest, digest = read_manifest(bundle)
    findings = [answer("digest", check_digest, digest, expect)] if expect is not None else []
    findings.append(answer("files", check_files, bundle, manifest))
    if findings[-1].verdict is not Verdict.HOLDS:
        return findings
    opened = Bundle(bundle, manifest["files"])
    for claim, check in (
        ("formats", check_formats),
        ("weights", check_weights),
        ("sidecar", check_sidecar),
        ("ids", check_ids),
        ("ledger", check_ledger),
        ("results", check_results),
        ("engines", check_engines),
        ("policy", check_policy),
        ("verdict", check_verdict),
    ):
        findings.append(answer(claim, check, opened))
    if _is_mixed(opened):
        findings.append(answer("allocation", check_allocation, opened))
    for name in GRAPHS:
        if name in opened.files:
            findings.append(answer(f"graph:{name}", check_graph, opened, name))
            findings.append(answer(f"export:{name}", check_export, opened, name))
    return findings + _findings_per_engine(opened) + _findings_per_gate(opened)


def _is_mixed(bundle: Bundle) -> bool:
    """Tell whether the recipe asked for mixed patterns; what makes it unreadable is said by `policy`."""
    try:
        return bool(_recipe(bundle)["prune"]["pattern"] == "mixed")
    except (Unchecked, Unreadable, LookupError, TypeError):
        return False


def _findings_per_engine(bundle: Bundle) -> list[Finding]:
    """Return findings about each engine in results.json; what makes that file unreadable is said by `results`."""
    try:
        rows = [row for row in bundle.json("results.json")["engines"] if row["status"] == "measured"]
        findings = [answer(f"engine:{row['id']}", check_engine, bundle, row) for row in rows]
        timed = [row for row in rows if row.get("latency") is not None]
        return findings + [answer(f"latency:{row['id']}", check_latency, bundle, row) for row in timed]
    except (Unchecked, Unreadable, LookupError, TypeError, AttributeError):
        return []


def _findings_per_gate(bundle: Bundle) -> list[Finding]:
    """Return each gate's own answer; what keeps them from being judged is said by `verdict`."""
    try:
        return [Finding(f"gate:{gate.name}", gate.verdict, f"{gate.reason}.") for gate in judge_all(bundle)]
    except (Refuted, Unchecked, Unreadable, LookupError, TypeError, ValueError, ArithmeticError, AttributeError):
        return []


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the bundle named on the command line; the only part of this file that prints."""
    parser = argparse.ArgumentParser(prog="verify.py", description="Check every claim of an mpdeploy bundle.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--expect", metavar="DIGEST", help="SHA-256 of manifest.json, from another source")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args(arguments)
    try:
        findings = verify(options.bundle, options.expect)
        digest = read_manifest(options.bundle)[1]
    except Unreadable as error:
        print(error, file=sys.stderr)
        return NOT_A_BUNDLE
    verdict = overall(findings)
    if options.json:
        rows = [{"claim": f.claim, "verdict": f.verdict, "reason": f.reason} for f in findings]
        print(json.dumps({"verdict": verdict, "digest": digest, "findings": rows}, indent=1))
    else:
        for finding in findings:
            print(f"{finding.verdict:9}  {finding.claim}: {finding.reason}")
        print(f"{verdict}: bundle {digest}")
    return EXIT[verdict]


if __name__ == "__main__":
    sys.exit(main())
