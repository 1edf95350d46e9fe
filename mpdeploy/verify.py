"""The independent checker of a bundle: it trusts nobody, and re-derives every claim from the bytes.

    python verify.py BUNDLE [--expect DIGEST] [--json]

One file, standard library and numpy only: copy it beside a bundle and it runs alone. It imports nothing of mpdeploy
and has its own readers (strict JSON, safetensors, ONNX's protobuf) and its own formulas, so that a mistake of the
producer is not repeated here. Files first, claims second:

    files, formats     the manifest lists exactly the files there are, and each is what it says; all of it parses
    digest             only with --expect: the manifest itself is the one that was announced
    policy             the locked recipe is the user's recipe.toml with the overrides that are on record
    orders             every order of channels that was folded into the weights is a permutation of those channels
    layers             what the recipe asks to prune is pruned, what stays dense may, and nothing else was changed
    weights            the N:M pattern of every layer, along input channels, in weights/pruned and weights/tuned; of an
                       unstructured layer the number of its zeros
    allocation         only of a mixed recipe: the patterns are its ranking's choice, their costs and sums are right
    sidecar, graph:*   the sparsity manifest against the ONNX bytes: consumer, axis, pattern, hash; nothing left out
    export:*           the ONNX weights are the certified ones; a folded BatchNorm may scale an output channel
    ids                calibration, certification and validation images are disjoint
    binds              weights, preprocessing, images, ONNX files and engines are those that were certified and measured
    ledger             every number of the certificate from the stored logits, in float64
    objective          only where it is claimed: norms of what pruning took away; a spectral bound is proved by Cholesky
    proofs             only where they are claimed: they are not proved again, and so unchecked
    zero_budget        only where it is claimed: inputs removed at no cost are as many as can be, within rounding
    results, engine:*, latency:*, noise:*   every count, interval and quantile from the stored logits and seconds
    disagreement       the bound for images that were not run, and the margin below which an engine abstains
    engines            each engine file is the one its manifest describes, in the asked precision, with its dense twin
    verdict, gate:*    the recipe's own gates, judged again

Of many classes a ledger keeps a few per sample and the largest logit of the others, which is all that a decision needs.
eps, share, displacement and range go over all classes: they are re-derived where all are kept, and else held to be no
smaller than what the kept ones give.

What can't be re-derived without a GPU, PyTorch or the images is taken as measured: that the stored logits and seconds
came from these weights and engines, and the errors and statistics of layers on calibration images.

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
from fnmatch import fnmatchcase
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


REQUIRED = {"files", "formats", "policy", "orders", "layers", "weights", "sidecar", "ids", "binds", "ledger"}
REQUIRED |= {"results", "disagreement", "engines", "verdict"}
REQUIRED_KINDS = {"graph", "export", "engine", "gate"}


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
    if length > len(data) - 8:
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

MAX_FIELDS = 1_000_000
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
    derived: dict[str, Any] = field(default_factory=dict)
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
    kind = "conv2d" if len(layer["shape"]) == 4 else "linear"
    must(layer["kind"] == kind, f"{name} is stated as {layer['kind']}, its weight is that of a {kind}")
    must_equal(layer["macs"], math.prod(layer["shape"]) * layer["positions"], f"{name}: macs")
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
    groups: int


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
                groups = node.numbers.get("group", [1])[0] if node.op == "Conv" else 1
                uses.append(Use(name, node.name or node.outputs[0], node.op, axis, groups))
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
    groups = layer["groups"] if entry["layer"] in layers else own[0].groups
    must(groups == own[0].groups, f"{where} is multiplied in {own[0].groups} groups, layers.json has {groups}")
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
    _check_export_facts(bundle, twin, other)
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
    own, stored = graph.constants[name], state.get(f"{layer}.weight")
    own = own.T if own.ndim == 2 and entry["axis"] == 0 else own
    if stored is None:
        if _occurs(own, state):
            return False
        raise Unchecked(f"{file}: {name} belongs to no tensor of weights/tuned that this checker finds")
    must(
        own.shape == stored.shape, f"{file}: {name} has shape {own.shape}, the certified {layer}.weight {stored.shape}"
    )
    if (order := entry.get("permutation")) is not None:
        must(sorted(order) == list(range(own.shape[1])), f"{file}: {name} has a permutation that is none")
        stored = np.take(stored, order, axis=1)
    if np.array_equal(own, stored.astype(own.dtype)):
        return False
    norms = dict(_folded_norms(own, stored, state))
    if not norms and not entry.get("pattern") and name not in state:
        raise Unchecked(f"{file}: {name} differs from {layer}.weight: computed from it, or edited; this can't be told")
    must(
        norms,
        f"{file}: {name} is not the certified {layer}.weight, and no BatchNorm of weights/tuned explains the ratio",
    )
    named = [node for node in graph.nodes if node.outputs and (node.name or node.outputs[0]) == entry["node"]]
    must(named, f"{file}: there is no node {entry['node']}, of which the sparsity manifest says that it uses {name}")
    node = named[0]
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


# --------------------------------------------------------------------------- what was asked to be pruned, and the rest


def check_orders(bundle: Bundle) -> str:
    """Orders: each folded order of channels is a permutation of them, within its blocks, of tensors that are there."""
    folded, tried = bundle.json("orders.json")["folded"], bundle.json("orders.json")["tried"]
    moved = reordered(bundle)
    stated = sum(row["order"] is True for row in tried)
    must(stated == len(folded), f"orders.json says that {stated} orders were folded and lists {len(folded)}")
    channels = sum(len(row["order"]) for row in folded)
    return f"{len(folded)} orders of {channels} channels are permutations, and fit the {len(moved)} dense tensors"


def reordered(bundle: Bundle) -> dict[str, Array]:
    """Return the dense weights in the order of channels that was folded into the pruned ones."""
    if "reordered" not in bundle.derived:
        state = dict(bundle.tensors("weights/dense.safetensors"))
        for row in bundle.json("orders.json")["folded"]:
            _fold(state, row["coupling"], np.array(row["order"]))
        bundle.derived["reordered"] = state
    result: dict[str, Array] = bundle.derived["reordered"]
    return result


def _fold(state: dict[str, Array], coupling: Mapping[str, Any], order: Array) -> None:
    """Apply one order: channel i becomes what channel order[i] was, at every place where the channels are stored."""
    name, size, blocks = coupling["name"], coupling["size"], coupling["blocks"]
    must(
        order.dtype.kind == "i" and order.shape == (size,) and (np.sort(order) == np.arange(size)).all(),
        f"the order for {name} is no permutation of its {size} channels",
    )
    must(0 < blocks <= size and size % blocks == 0, f"the {size} channels for {name} don't divide into {blocks} blocks")
    width = size // blocks
    must((order // width == np.arange(size) // width).all(), f"the order for {name} moves a channel out of its block")
    members = [(m["tensor"], m["axis"], m["start"]) for m in [*coupling["producers"], *coupling["consumers"]]]
    must(len(set(members)) == len(members), f"{name} moves the same channels of a tensor twice")
    for tensor, axis, start in members:
        must(tensor in state, f"{name} moves the tensor {tensor}, which weights/dense does not hold")
        array = state[tensor]
        must(
            0 <= axis < array.ndim and 0 <= start <= array.shape[axis] - size,
            f"{name} moves channels {start} to {start + size} on axis {axis} of {tensor}, of shape {array.shape}",
        )
        index = np.arange(array.shape[axis])
        index[start : start + size] = start + order
        state[tensor] = np.take(array, index, axis=axis)


def check_layers(bundle: Bundle) -> str:
    """Layers: what the recipe asks to prune is pruned, a layer stays dense for a reason, nothing else was changed.

    Which layers have to be pruned follows from the recipe and the shapes of the dense weights, never from what the
    layer table or the certificate says of itself.
    """
    asked, rows = _recipe(bundle)["prune"], {row["name"]: row for row in bundle.json("layers.json")}
    dense, pruned = reordered(bundle), bundle.tensors("weights/pruned.safetensors")
    must(dense.keys() == pruned.keys(), f"weights/pruned has or lacks {_first(dense.keys() ^ pruned.keys())}")
    chosen = {name: row for name, row in rows.items() if row["pattern"]}
    left = [name for name, row in rows.items() if not row["pattern"] and not _excused(bundle, row)]
    if asked["pattern"] == "mixed":
        choices = bundle.json("allocation.json")["layers"]
        left = [name for name in left if name not in choices]
    else:
        other = _first(name for name, row in chosen.items() if row["pattern"] != asked["pattern"])
        must(not other, f"{other} has another pattern than the recipe's {asked['pattern']}")
    if asked["pattern"] == UNSTRUCTURED:
        _check_sparsity([f"{name}.weight" for name in [*chosen, *left]], pruned, asked["sparsity"])
    else:
        must(not left, f"{_first(left)} stays dense, though the recipe asks to prune it and a pattern fits")
    _check_unchanged(dense, pruned, rows, asked["reconstruct"])
    if not _recipe(bundle)["tune"]["epochs"]:
        tuned = bundle.tensors("weights/tuned.safetensors")
        key = _first(key for key in pruned if not np.array_equal(pruned[key], tuned[key]))
        must(not key, f"nothing was tuned, and {key} is not the pruned one in weights/tuned")
    for key, array in dense.items():
        unlisted = _is_weight(key, array) and key.removesuffix(".weight") not in rows
        if unlisted and _divides(asked, array.shape[1]) and _uses_of(bundle, key):
            raise Unchecked(f"the graph multiplies by {key}, which layers.json leaves out: only its code can tell why")
    return f"{len(chosen)} of {len(rows)} layers are pruned as the recipe asks, the others need not be; no more changed"


def _check_unchanged(
    dense: Mapping[str, Array], pruned: Mapping[str, Array], rows: Mapping[str, Mapping[str, Any]], reconstruct: int
) -> None:
    """Refute a tensor that pruning changed though it belongs to no pruned layer.

    The statistics of a BatchNorm behind a pruned layer are settled anew; which one that is follows from no bytes, so
    any of the right size may. Reconstruction trains whatever lies in a block with a pruned layer: then only weights
    that nobody lists have to stay.
    """
    chosen = [name for name, row in rows.items() if row["pattern"]]
    may = {f"{name}.{part}" for name in (rows if reconstruct else chosen) for part in ("weight", "bias")}
    outputs = {pruned[f"{name}.weight"].shape[:1] for name in chosen}
    for key, array in dense.items():
        settled = key.endswith((".running_mean", ".running_var")) and array.shape in outputs
        if key not in may and not settled and (not reconstruct or _is_weight(key, array)):
            must(
                np.array_equal(array, pruned[key]),
                f"weights/pruned: {key} is not the dense one, and belongs to no layer that is pruned",
            )


def _check_sparsity(keys: Sequence[str], pruned: Mapping[str, Array], sparsity: float) -> None:
    """Refute fewer zeros in the whole network than the recipe asks for."""
    zeros = sum(pruned[key].size - np.count_nonzero(pruned[key]) for key in keys)
    asked = round(sparsity * sum(pruned[key].size for key in keys))
    must(zeros >= asked, f"the layers have {zeros} zeros, the recipe's sparsity {sparsity} asks for {asked}")


def _is_weight(key: str, array: Array) -> bool:
    """Tell whether a tensor could be the weight of a linear layer or a convolution."""
    return key.endswith(".weight") and array.ndim in (2, 4) and array.dtype.kind == "f"


def _patterns(asked: Mapping[str, Any]) -> list[str]:
    """Return the patterns that a layer may get."""
    return list(asked["allocate"]["patterns"]) if asked["pattern"] == "mixed" else [asked["pattern"]]


def _divides(asked: Mapping[str, Any], inputs: int) -> bool:
    """Tell whether any pattern of the recipe fits a number of inputs."""
    return any(p == UNSTRUCTURED or inputs % int(p.partition(":")[2]) == 0 for p in _patterns(asked))


def _excused(bundle: Bundle, row: Mapping[str, Any]) -> bool:
    """Tell whether a dense layer need not be pruned, by the recipe, its shape or its place in the exported graph."""
    asked, name, key = _recipe(bundle)["prune"], row["name"], f"{row['name']}.weight"
    state = bundle.tensors("weights/dense.safetensors")
    if key not in state or any(fnmatchcase(name, glob) for glob in asked["skip"]):
        return True
    shape = state[key].shape
    must(list(shape) == list(row["shape"]), f"{name} has shape {shape} in weights/dense, stated is {row['shape']}")
    if not _divides(asked, shape[1]):
        return True
    every, own = weight_uses(_exported(bundle)), _uses_of(bundle, key)
    if not own and row["positions"]:
        raise Unchecked(
            f"{name} is dense and the graph multiplies by something else: only the network's code tells why"
        )
    head = every[-1] in own or shape[0] == bundle.json("certificate.json")["classes"]
    if (asked["keep_stem_dense"] and every[0] in own) or (asked["keep_head_dense"] and head):
        return True
    # Never called, called again with other inputs, in groups, or sharing its weight: there no pattern can be held.
    shared = any(other != key and np.array_equal(array, state[key]) for other, array in state.items())
    return shared or len(own) != 1 or own[0].groups != 1


def _exported(bundle: Bundle) -> Graph:
    """Return the exported graph of the pruned network, in single precision if there is one."""
    return bundle.graph(next((name for name in GRAPHS if name in bundle.files), GRAPHS[0]))


def _uses_of(bundle: Bundle, key: str) -> list[Use]:
    """Return where the exported graph multiplies by a certified tensor, whatever name it has there."""
    graph, state = _exported(bundle), bundle.tensors("weights/tuned.safetensors")
    found = []
    for use in weight_uses(graph):
        own = graph.constants[use.constant]
        own = own.T if own.ndim == 2 and use.axis == 0 else own
        if own.shape == state[key].shape and (
            np.array_equal(own, state[key].astype(own.dtype)) or any(_folded_norms(own, state[key], state))
        ):
            found.append(use)
    return found


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


@dataclass(frozen=True)
class Columns:
    """What is stored of n samples of K classes through S stages; of each sample T classes are kept.

    Attributes:
        stages: names, the dense network first.
        classes: K.
        labels: int [n], the true classes.
        kept: int [n, T]; first the dense label y, then by falling dense logit.
        logits: float64 [n, S, T + 1], at the kept classes; last the largest of the others, -inf where T = K.
        eps: float64 [n, S - 1], over all classes the largest |z_s - z_{s-1}|.
        share: float64 [n, S - 1], over all classes j the largest -d_sj / m_j, where m_j = z_0[y] - z_0[j] is the dense
            margin and d_sj what the stage adds to it.
    """

    stages: tuple[str, ...]
    classes: int
    labels: Array
    kept: Array
    logits: Floats
    eps: Floats
    share: Floats

    def slack(self, stage: int) -> Floats:
        """Return the dense label's margin to the best other class after a stage, NaN where a logit is not finite."""
        return slack_of(self.logits[:, stage])

    def right(self, stage: int) -> Bools:
        """Tell which samples a stage gives their true label."""
        return np.asarray(decide(self.logits[:, stage], self.kept) == self.labels)

    def with_stage(self, name: str, logits: Array, eps: Array, share: Array) -> "Columns":
        """Return the same samples with one stage more."""
        longer = np.concatenate([self.logits, logits.astype(np.float64)[:, None]], axis=1)
        columns = [np.concatenate([old, new[:, None]], axis=1) for old, new in ((self.eps, eps), (self.share, share))]
        return Columns((*self.stages, name), self.classes, self.labels, self.kept, longer, *columns)


def whole(logits: Array) -> Bools:
    """Tell which rows [n, T + 1] are finite; the last column is -inf where no class is left for it."""
    return np.asarray(np.isfinite(logits[:, :-1]).all(axis=1) & (logits[:, -1] < np.inf))


def slack_of(logits: Array) -> Floats:
    """Return the first column's margin to the best other one, NaN where a logit is not finite."""
    z = logits.astype(np.float64)
    result: Floats = np.where(whole(z), (z[:, :1] - z[:, 1:]).min(axis=1), np.nan)
    return result


def decide(logits: Array, kept: Array) -> Array:
    """Return the class that each row [n, T + 1] gives, the lower one on a tie; -1 if it is not kept or not finite."""
    best = logits[:, :-1].max(axis=1)
    first = np.where(logits[:, :-1] == best[:, None], kept.astype(np.int64), 1 << 62).min(axis=1)
    label: Array = np.where(whole(logits) & (best >= logits[:, -1]), first, -1)
    return label


def fits(stated: Array, own: Array, exact: bool) -> bool:
    """Tell whether numbers that go over all classes fit what the kept ones give: no smaller, and equal if `exact`."""
    room = 1e-6 * np.abs(own) + 1e-9
    return bool((stated >= own - room).all() and (not exact or (stated <= own + room).all()))


def read_columns(tensors: Mapping[str, Array], stages: Sequence[str], classes: int, where: str) -> Columns:
    """Return the columns of a ledger, of which shapes, classes and the dense logits are in order."""
    labels, kept, logits = (tensors[name] for name in ("labels", "kept_classes", "logits"))
    n, count = len(labels), len(stages)
    shapes = [labels.shape, kept.shape, logits.shape, tensors["eps"].shape, tensors["share"].shape]
    most = kept.shape[-1]
    must(
        shapes == [(n,), (n, most), (n, count, most + 1), (n, count - 1), (n, count - 1)] and 2 <= most <= classes,
        f"{where} has columns of the shapes {shapes} for {count} stages and {classes} classes",
    )
    kinds = [tensors[name].dtype.kind for name in ("labels", "kept_classes", "logits", "eps", "share")]
    must(kinds == ["i", "i", "f", "f", "f"], f"{where} has columns of the kinds {kinds}")
    ordered = np.sort(kept, axis=1)
    must(
        (ordered[:, 0] >= 0).all() and (ordered[:, -1] < classes).all() and (np.diff(ordered, axis=1) > 0).all(),
        f"{where}: kept_classes are not different classes of {classes}",
    )
    must((kept == labels[:, None]).any(axis=1).all(), f"{where}: a sample's own label is not among its kept classes")
    z = logits.astype(np.float64)
    dense, rest = z[:, 0, :-1], z[:, 0, -1]
    must(whole(z[:, 0]).all(), f"{where}: dense logits are not finite everywhere")
    others = np.isneginf(z[:, :, -1]).all() if most == classes else np.isfinite(rest).all()
    must(others, f"{where}: the last column is not the largest logit of the classes that are not kept")
    step = np.diff(dense, axis=1)
    falls = (step < 0) | ((step == 0) & (np.diff(kept, axis=1) > 0))
    must(
        falls.all() and (dense[:, 0] >= rest).all(), f"{where}: kept_classes do not begin with the dense label, or rise"
    )
    return Columns(tuple(stages), classes, labels, kept, z, tensors["eps"], tensors["share"])


def check_kept(columns: Columns, beside: Sequence[Array], keep: int, where: str) -> None:
    """Check which classes are kept: both labels, in every stage the best other one, and the best of the dense network.

    Args:
        columns: of the ledger.
        beside: further [n, T + 1] logits, whose winners are kept too.
        keep: how many the recipe asks for.
        where: the file.
    """
    arrays = [*np.moveaxis(columns.logits, 1, 0), *beside]
    most = min(columns.classes, max(keep, len(arrays) + 1))
    must(columns.kept.shape[1] == most, f"{where} keeps {columns.kept.shape[1]} classes, the recipe asks for {most}")
    clear = np.logical_and.reduce([whole(z) for z in arrays])
    special = columns.kept == columns.labels[:, None]
    for z in arrays:
        own = z[:, :-1].astype(np.float64)
        must((own.max(axis=1) >= z[:, -1])[clear].all(), f"{where}: a winner is not among the kept classes")
        special[:, 1:] |= own[:, 1:] == own[:, 1:].max(axis=1, keepdims=True)
    low = ~special & (columns.logits[:, 0, :-1] < columns.logits[:, 0, -1:])
    must(not low[clear].any(), f"{where}: a class is kept that is neither special nor among the dense network's best")


def check_changes(columns: Columns, where: str) -> None:
    """Check eps and share of every stage."""
    exact = columns.kept.shape[1] == columns.classes
    margins = columns.logits[:, 0, :1] - columns.logits[:, 0, 1:-1]
    tied = ~(columns.slack(0) > 0)
    for at, stage in enumerate(columns.stages[1:]):
        before, after = columns.logits[:, at], columns.logits[:, at + 1]
        seen = whole(before) & whole(after)
        change = (after - before)[:, :-1]
        eps, share = columns.eps[:, at], columns.share[:, at]
        own = np.abs(change).max(axis=1)
        must(
            fits(eps[seen], own[seen], exact) and not np.isfinite(eps[~seen]).any(),
            f"{where}: eps of the stage {stage} is not what the logits give",
        )
        known = np.isfinite(eps) & ~tied
        own = ((change[:, 1:] - change[:, :1]) / margins).max(axis=1)
        must(
            fits(share[known], own[known], exact) and np.isfinite(share[known]).all(),
            f"{where}: share of the stage {stage} is not what the logits give",
        )
        must(
            np.isposinf(share[tied]).all() and np.isnan(share[~known & ~tied]).all(),
            f"{where}: share of the stage {stage} is a number where the dense label is tied or a logit is not finite",
        )


def check_spent(rows: Sequence[Mapping[str, Any]], columns: Columns, what: str) -> None:
    """Check the summary of what each stage spent of the dense margins.

    Args:
        rows: as stated, one per stage after the dense one.
        columns: of the ledger.
        what: begins the sentence where something differs.
    """
    names = columns.stages[1:]
    must([row["stage"] for row in rows] == list(names), f"{what} lists other stages than {', '.join(names)}")
    changes = np.diff(columns.logits[:, :, :-1], axis=1)
    added = changes[:, :, :1] - changes  # what each stage adds to the margin of each kept class
    last = columns.logits[:, -1]
    lost, pairs = ~(slack_of(last) > 0), last[:, :1] - last[:, 1:-1]
    winner = 1 + np.where(np.isfinite(last[:, 1:-1]), last[:, 1:-1], -np.inf).argmax(axis=1)
    loss = -added[np.arange(len(last)), :, winner]
    primary = np.where(np.isfinite(loss), loss, np.inf).argmax(axis=1)
    for at, row in enumerate(rows):
        eps, share = columns.eps[:, at], columns.share[:, at]
        known = share[np.isfinite(share)]
        restored = (pairs - added[:, at, 1:] > 0).all(axis=1) & (last[:, 0] > last[:, -1])
        own = {
            "eps_inf_median": float(np.median(eps)),
            "eps_inf_max": float(eps.max()),
            "share_median": float(np.median(known)) if known.size else None,
            "share_p99": float(np.quantile(known, 0.99)) if known.size else None,
            "flips_alone": int((~(share < 1)).sum()),
            "flips_but_for": int((lost & restored).sum()),
            "flips_primary": int((lost & (primary == at)).sum()),
        }
        for key, value in own.items():
            must_equal(row[key], value, f"{what}: {key} of the stage {names[at]}")


LEDGER = ["dense", "pruned", "tuned"]


def certified_columns(bundle: Bundle) -> Columns:
    """Return the columns of ledger.safetensors."""
    classes = bundle.json("certificate.json")["classes"]
    return read_columns(bundle.tensors("ledger.safetensors"), LEDGER, classes, "ledger.safetensors")


def check_ledger(bundle: Bundle) -> str:
    """Ledger: margins, slacks, verdicts and every number of the certificate, from the stored logits in float64."""
    stated, ledger, asked = bundle.json("certificate.json"), bundle.tensors("ledger.safetensors"), _recipe(bundle)
    must(stated["schema"] == 2, f"certificate.json is of schema {stated['schema']}, this checker reads 2")
    must(stated["stages"] == LEDGER, f"the certificate is about the stages {stated['stages']}")
    n = len(ledger["labels"])
    if n == 0:
        raise Unchecked("the ledger is empty: no certification sample")
    columns = certified_columns(bundle)
    must((stated["samples"], stated["kept"]) == columns.kept.shape, "the certificate states another n or T")
    classes = bundle.json("results.json")["validation"]["classes"]
    must(stated["classes"] == classes, f"the certificate is about {stated['classes']} classes, results.json {classes}")
    must(
        stated["ids"] == bundle.json("calibration.json")["certification_ids"] and len(stated["ids"]) == n,
        "the ids of the certificate are not the certification ids in their order, one per row of the ledger",
    )
    check_kept(columns, [], asked["certify"]["keep"], "ledger.safetensors")
    check_changes(columns, "ledger.safetensors")
    _check_verdicts(stated, ledger, columns, asked["certify"]["reserve"])
    for at, stage in enumerate(LEDGER):
        must_equal(stated["top1"][stage], int(columns.right(at).sum()), f"the count of right {stage} labels")
    check_spent(stated["spent"], columns, "the certificate")
    _check_reference(stated["reference"], ledger["reference"], columns, asked["certify"]["reference"])
    counts, g = stated["counts"], stated["reference"]["samples"]
    return (
        f"{n} samples: {counts['certified']} certified, {counts['kept']} kept, {counts['flipped']} flipped; "
        f"{stated['kept']} of {stated['classes']} classes are stored of each, and {g} samples in float64"
    )


def _check_verdicts(stated: Mapping[str, Any], ledger: Mapping[str, Array], columns: Columns, reserve: float) -> None:
    """Check range, displacement and verdict of every sample, and what the certificate counts of them."""
    n, exact = len(columns.labels), columns.kept.shape[1] == columns.classes
    spread, moved, verdict = ledger["range"], ledger["displacement"], ledger["verdict"]
    must(
        (spread.shape, moved.shape, verdict.shape) == ((n,), (n, 2), (n,)),
        "ledger.safetensors: range, displacement or verdict are not one row per sample",
    )
    dense, last = columns.logits[:, 0, :-1], columns.logits[:, -1]
    must(
        fits(spread, dense.max(axis=1) - dense.min(axis=1), exact) and np.isfinite(spread).all(),
        "ledger.safetensors: range is not what the logits give",
    )
    clear = whole(last)
    change = last[clear, :-1] - dense[clear]
    own = np.stack([np.abs(change).max(axis=1), change.max(axis=1) - change.min(axis=1)], axis=1)
    must(
        fits(moved[clear], own, exact) and not np.isfinite(moved[~clear]).any(),
        "ledger.safetensors: displacement is not what the logits give",
    )
    # True of any D: its span is at most twice its largest entry, which is at most the sum of the stages' own.
    through = clear & np.isfinite(columns.eps).all(axis=1)
    largest, total = moved[through, 0], columns.eps[through].sum(axis=1)
    must(
        fits(2 * largest, moved[through, 1], exact=False) and fits(total, largest, exact=False),
        "ledger.safetensors: displacement is larger than what the stages' eps allow",
    )
    must(stated["reserve"] == reserve >= 0, f"the certificate sets aside {stated['reserve']}, the recipe {reserve}")
    margin, slack = columns.slack(0), columns.slack(-1)
    own_verdict = np.where(slack > 0, np.where(slack > reserve * spread, 2, 1), 0)
    wrong = np.flatnonzero(verdict != own_verdict)
    must(
        not wrong.size,
        f"ledger.safetensors: {wrong.size} verdicts are not what the logits give, first for the sample "
        f"{stated['ids'][wrong[0]] if wrong.size else ''}",
    )
    for value, kind in enumerate(("flipped", "kept", "certified")):
        must_equal(stated["counts"][kind], int((own_verdict == value).sum()), f"the count of {kind} samples")
    tests = {"pairwise": slack > 0, "span": margin > moved[:, 1], "two_inf": margin > 2 * moved[:, 0]}
    for name, passed in tests.items():
        must_equal(stated["tests"][name], int(passed.sum()), f"the count of samples that the test {name} certifies")
    must_equal(stated["margin_median"], float(np.median(margin)), "margin_median")
    must_equal(stated["slack_median"], float(np.median(slack)), "slack_median")


def _check_reference(stated: Mapping[str, Any], exact: Array, columns: Columns, asked: int) -> None:
    """Check the ledger's first row: what float32 costs the dense network itself, against float64."""
    g, most = len(exact), columns.kept.shape[1]
    must(
        stated["precision"] == "float64" and exact.dtype == np.float64 and exact.shape == (g, most + 1),
        f"the reference is stated as {stated['precision']} and stored as {exact.dtype.name} of shape {exact.shape}",
    )
    must(
        stated["samples"] == g == min(len(columns.labels), asked),
        f"the reference is stated of {stated['samples']} samples, stored of {g}; the recipe asks for {asked}",
    )
    must(whole(exact).all(), "a float64 logit of the dense network is not finite")
    dense, exact, rest = columns.logits[:g, 0, :-1], exact[:, :-1], exact[:, -1]
    change = np.abs(dense - exact).max(axis=1)
    # y is the float64 network's own label here, which a near tie may turn; where it is not kept nothing follows.
    winner = exact.argmax(axis=1)[:, None]
    best, other = np.take_along_axis(exact, winner, axis=1), np.arange(most) != winner
    gained = dense - exact
    lost = gained - np.take_along_axis(gained, winner, axis=1)
    known = best[:, 0] >= rest
    tied = (np.where(other, exact, rest[:, None]).max(axis=1) == best[:, 0]) | (rest == best[:, 0])
    shares = np.where(other, lost / (best - exact), -np.inf).max(axis=1)[known]
    own = {
        "eps_inf_median": float(np.median(change)) if g else None,
        "eps_inf_max": float(change.max()) if g else None,
        "share_max": float(shares.max()) if shares.size and not tied.any() else None,
    }
    for key, value in own.items():
        there = stated[key]
        good = (
            same(there, value)
            if most == columns.classes or value is None
            else (same(there, there) and there is not None and fits(np.array(there), np.array(value), exact=False))
        )
        must(good, f"the reference states {key} as {there}, the stored logits give {value}")


# -------------------------------------------------------------------------------------------------------------- binds


def check_binds(bundle: Bundle) -> str:
    """Binds: what was certified and measured is what lies here. Of a rebuilt engine or graph nothing is known."""
    certificate, results, asked = bundle.json("certificate.json"), bundle.json("results.json"), _recipe(bundle)
    stated, ids = certificate["binds"], certificate["ids"]
    for stage in LEDGER:
        own = _digest(bundle, f"weights/{stage}.safetensors")
        must(stated["weights"][stage] == own, f"the certificate is of other {stage} weights than weights/{stage}")
    own = _digest(bundle, "preprocessing.json")
    must(stated["preprocessing"] == own, "the certificate is of another preprocessing than preprocessing.json")
    own = hashlib.sha256("\n".join(ids).encode()).hexdigest()
    must(stated["ids"] == own, "the certificate's digest of its ids is not that of its ids")
    packages = bundle.json("provenance.json")["packages"]
    must(stated["versions"] and stated["device"], "the certificate names no version, or no device")
    other = _first(name for name, version in stated["versions"].items() if packages.get(name, version) != version)
    must(not other, f"the certificate was made with another version of {other} than provenance.json names")
    must(
        (stated["precision"], stated["batch"]) == ("float32", asked["certify"]["batch"]),
        f"the certificate is of {stated['precision']} at batch {stated['batch']}, not what the recipe asks for",
    )
    measured = results["binds"]
    own = _digest(bundle, "certificate.json")
    must(measured["certificate"] == own, "results.json was measured against another certificate than certificate.json")
    files = {name for name in bundle.files if name.endswith(".onnx") and "/" not in name}
    must(
        measured["onnx"].keys() == files,
        f"results.json was measured with other exports: {measured['onnx'].keys() ^ files}",
    )
    for name in sorted(files):
        must(measured["onnx"][name] == _digest(bundle, name), f"{name} {REBUILT}")
    folders = engine_folders(bundle)
    must(measured["engines"].keys() == set(folders), f"results.json binds other engines than {', '.join(folders)}")
    for folder in folders:
        file = f"engines/{folder}/{bundle.json(f'engines/{folder}/engine.json')['file']}"
        must(measured["engines"][folder] == _digest(bundle, file), f"{file} {REBUILT}")
    what = f"weights, preprocessing, {len(ids)} ids, {len(files)} ONNX files and {len(folders)} engines"
    return f"{what} are those that were certified and measured"


REBUILT = (
    "was rebuilt since it was measured: what was observed (L0) and what follows for other images (L5) don't transfer"
)


def _digest(bundle: Bundle, name: str) -> Any:
    """Return a file's SHA-256, None where it is not there."""
    return bundle.files.get(name, {}).get("sha256")


# ------------------------------------------------------------------------------------------------- norms of what went


def check_objective(bundle: Bundle) -> str:
    """Objective: norms of what pruning took from each weight, from the weights; the spectral one is proved."""
    stated = bundle.json("certificate.json")["objective"]
    stage, rows = stated["stage"], {row["tensor"]: row for row in stated["changed"]}
    must(stage in ("pruned", "tuned"), f"the objective is about the stage {stage}")
    dense, own = reordered(bundle), bundle.tensors(f"weights/{stage}.safetensors")
    changed = {
        name
        for name, array in dense.items()
        if array.ndim > 1 and array.dtype.kind == "f" and not np.array_equal(array, own[name])
    }
    must(
        rows.keys() == changed and len(rows) == len(stated["changed"]),
        f"the objective is about other tensors than those that changed, {_first(rows.keys() ^ changed)} for one",
    )
    for name, row in rows.items():
        rest = dense[name].astype(np.float64) - own[name]
        rest = rest.reshape(len(rest), -1)
        must_equal(row["frobenius"], math.sqrt(float(np.square(rest).sum())), f"{name}: frobenius")
        must_equal(row["l1"], float(np.abs(rest).sum()), f"{name}: l1")
        must(
            spectral_at_most(rest, row["spectral_upper"]),
            f"{name}: spectral_upper is stated as {row['spectral_upper']}, which is no upper bound",
        )
    return f"{len(rows)} changed tensors have the stated norms; each spectral bound is proved by a Cholesky factor"


def spectral_at_most(matrix: Floats, bound: float) -> bool:
    """Prove |R|_2 <= bound (1 + 1e-6), the room that every stated number has.

    With s = bound (1 + 1e-6) it is enough that A = s^2 I - G with G = R R^T of the shorter side, p x p, is positive
    semidefinite. Let u = 2^-53, g_k = k u / (1 - k u), and n the longer side. In floating point
    - |fl(G) - G| <= g_n |R||R|^T in every entry, in whatever order terms are added, so its 2-norm is at most
      g_n |R|_F^2 (Higham, "Accuracy and stability of numerical algorithms", 2002, sections 3.1 and 3.5);
    - s^2 and the subtraction from the diagonal are off by at most 3 u (s^2 + |R|_F^2);
    - where Cholesky's method runs to its end on a matrix B, B + E is positive semidefinite for an E with
      |E|_2 <= g_{p+1} / (1 - g_{p+1}) tr(B) (Higham, theorem 10.3; Rump, "Verification of positive definiteness",
      BIT 46, 2006), and tr(B) <= p s^2.
    So the factor is asked of A minus twice the sum of the three; twice covers the rounding of the sum itself.
    If it fails |R|_2 exceeds s by less than that sum allows, which is far below 1e-6 s: then `bound` is no bound.
    """
    if not (isinstance(bound, int | float) and math.isfinite(bound) and bound >= 0):
        return False
    p, n = sorted(matrix.shape)
    square, total, u = (bound * (1 + 1e-6)) ** 2, float(np.square(matrix).sum()), 2.0**-53
    slack = 2 * ((n + 2) * u * total + 3 * u * (square + total) + (p + 2) * u * p * square)
    gram = matrix @ matrix.T if matrix.shape[0] == p else matrix.T @ matrix
    try:
        np.linalg.cholesky((square - slack) * np.eye(p) - gram)
    except np.linalg.LinAlgError:
        return False
    return True


def check_proofs(bundle: Bundle) -> str:
    """Proofs: bounds that hold for more than what was run; to prove them again takes the network and minutes each."""
    raise Unchecked(
        f"the certificate holds proofs ({', '.join(bundle.json('certificate.json')['proofs'])}), not redone"
    )


def check_zero_budget(bundle: Bundle) -> str:
    """Zero budget: no more inputs were removed than there are, and outputs moved by no more than rounding explains."""
    stated = bundle.json("certificate.json")["zero_budget"]
    dense = bundle.tensors("weights/dense.safetensors")
    for name, row in stated.items():
        inputs = math.prod(dense[f"{name}.weight"].shape[1:])
        must(row["inputs"] == inputs, f"{name} has {inputs} inputs, zero_budget states {row['inputs']}")
        removed = [row[kind] for kind in ("dead", "constant", "dependent")]
        must(
            min(removed) >= 0 and row["dependent"] <= inputs - row["rank"] and sum(removed) <= inputs,
            f"{name}: {removed} inputs of {inputs} can't be removed at rank {row['rank']}",
        )
        must_equal(row["allowance"], 4 * 2.0**-23 * math.sqrt(inputs), f"{name}: allowance")
        must(row["residual"] <= row["allowance"], f"{name}: removing inputs moved an output by more than rounding does")
    every = sum(row["dead"] + row["constant"] + row["dependent"] for row in stated.values())
    return f"{every} inputs of {len(stated)} layers were removed within rounding, as measured"


# --------------------------------------------------------------------------------------------------------- statistics


def clopper_pearson(k: int, n: int, confidence: float) -> tuple[float, float]:
    """Return the two-sided Clopper-Pearson interval by bisection on the binomial tail (the producer inverts a beta)."""
    must(0 <= k <= n and 0.5 < confidence < 1, f"{k} of {n} at confidence {confidence} has no interval")
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


VALIDATION = ["dense", "pruned", "tuned", "onnx"]


def validation_columns(bundle: Bundle) -> Columns:
    """Return the columns of samples.safetensors."""
    classes = bundle.json("results.json")["validation"]["classes"]
    return read_columns(bundle.tensors("samples.safetensors"), VALIDATION, classes, "samples.safetensors")


def measured_rows(bundle: Bundle) -> list[Mapping[str, Any]]:
    """Return the rows of results.json about engines that were run."""
    return [row for row in bundle.json("results.json")["engines"] if row["status"] == "measured"]


def engine_logits(bundle: Bundle, name: str, columns: Columns) -> Array:
    """Return an engine's logits of the validation images, [n, T + 1]."""
    own = bundle.tensors("samples.safetensors")[f"engine.{name}"]
    n, most = columns.kept.shape
    must(own.shape == (n, most + 1) and own.dtype.kind == "f", f"{name} has logits {own.shape} for {n} images")
    return own


def check_results(bundle: Bundle) -> str:
    """Results: which engines, how many samples, the networks' own top-1, and what pruning, tuning and export spent."""
    results, samples = bundle.json("results.json"), bundle.tensors("samples.safetensors")
    n = len(samples["labels"])
    if n == 0:
        raise Unchecked("no validation image was run")
    must(results["schema"] == 2, f"results.json is of schema {results['schema']}, this checker reads 2")
    stated, asked, confidence = results["validation"], _recipe(bundle), results["confidence"]
    wanted = asked["validate"]["confidence"]
    must(confidence == wanted, f"results.json has the confidence {confidence}, the recipe asks for {wanted}")
    columns, ids = validation_columns(bundle), bundle.json("calibration.json")["validation_ids"]
    must(len(ids) == n, f"{len(ids)} validation ids are named and {n} samples stored")
    must(stated["samples"] == n, f"results.json is about {stated['samples']} samples, stored are {n}")
    _check_engine_names(bundle, results, samples)
    measured = [row["id"] for row in measured_rows(bundle)]
    noisy = [row["noise_floor"] for row in measured_rows(bundle)] + [results["export_noise"]]
    must(
        not asked["validate"]["noise"] or None not in noisy,
        "the recipe asks for a noise floor, and one of the graphs that were run has none",
    )
    beside = [engine_logits(bundle, name, columns) for name in measured]
    check_kept(columns, beside, asked["certify"]["keep"], "samples.safetensors")
    check_changes(columns, "samples.safetensors")
    for stage in ("dense", "tuned"):
        right = int(columns.right(VALIDATION.index(stage)).sum())
        check_proportion(results[f"{stage}_top1"], right, n, confidence, f"top-1 of {stage}")
    if not measured:
        raise Unchecked(f"none of the {len(results['engines'])} engines was run")
    return f"{n} validation samples, {len(measured)} of {len(results['engines'])} engines measured"


def _check_engine_names(bundle: Bundle, results: Mapping[str, Any], samples: Mapping[str, Array]) -> None:
    """Check that no engine is left out, and that samples are there for the measured ones and for no other."""
    rows = results["engines"]
    ids = [row["id"] for row in rows]
    asked = [f"{e['runtime']}-{e['target']}-{e['precision']}" for e in _recipe(bundle)["build"]["engines"]]
    must(sorted(ids) == sorted(asked), f"results.json is about {sorted(ids)}, the recipe asks for {sorted(asked)}")
    expected = {"labels", "kept_classes", "logits", "eps", "share"}
    for row in rows:
        name = row["id"]
        must(row["status"] in ("measured", "not run"), f"{name} has the status {row['status']!r}")
        must(row["status"] == "measured" or row["why_not"], f"{name} was not run and results.json does not say why")
        if row["status"] == "measured":
            expected |= {f"engine.{name}", f"engine.{name}.eps", f"engine.{name}.share", f"certification.{name}"}
            if row["latency"] is not None:
                expected |= {f"latency.{name}", f"latency.{row['latency']['twin']}"}
            if row["noise_floor"] is not None:
                expected |= {f"engine.{name}.sigma", f"engine.{name}.error"}
    if results["export_noise"] is not None:
        expected |= {"onnx.sigma", "onnx.error"}
    must(
        samples.keys() == expected,
        f"samples.safetensors: {_first(samples.keys() ^ expected)} is missing or unexplained",
    )


def _recipe(bundle: Bundle) -> Mapping[str, Any]:
    recipe: Mapping[str, Any] = bundle.json("recipe.lock.json")
    return recipe


def check_engine(bundle: Bundle, row: Mapping[str, Any]) -> str:
    """Engine: its labels against the true ones, the dense network's and the certificate's; what it spent of margins."""
    samples, confidence = bundle.tensors("samples.safetensors"), bundle.json("results.json")["confidence"]
    columns, name = validation_columns(bundle), row["id"]
    own = engine_logits(bundle, name, columns)
    eps, share = (samples[f"engine.{name}.{column}"] for column in ("eps", "share"))
    n = len(columns.labels)
    must(eps.shape == share.shape == (n,), f"{name} has eps of shape {eps.shape} and share of shape {share.shape}")
    columns = columns.with_stage("engine", own, eps, share)
    check_changes(columns, f"samples.safetensors, {name}")
    right, own_right, slack = columns.right(0), columns.right(-1), columns.slack(-1)
    check_proportion(row["top1"], int(own_right.sum()), n, confidence, "top1")
    agree = int((slack > 0).sum())
    check_proportion(row["agreement"], agree, n, confidence, "agreement")
    b, c = int((right & ~own_right).sum()), int((~right & own_right).sum())
    flips = {"dense_right_engine_wrong": b, "dense_wrong_engine_right": c, "mcnemar_p": mcnemar(b, c)}
    for key, value in flips.items():
        must_equal(row["flips"][key], value, f"flips: {key}")
    finite = _check_certified(bundle, row) and bool(np.isfinite(slack).all())
    must(row["finite"] is finite, f"finite is stated as {row['finite']}, the stored logits say {finite}")
    must(finite or not row["spent"], "spent is stated for logits that are not finite")
    if finite:
        check_spent(row["spent"], columns, "spent")
    return f"{n} labels: {int(own_right.sum())} right, {agree} as the dense network's; the rest re-derived too"


def _check_certified(bundle: Bundle, row: Mapping[str, Any]) -> bool:
    """Check the labels that the ledger certified or kept and the engine lost; return whether all is finite."""
    ledger, ids = bundle.tensors("ledger.safetensors"), bundle.json("certificate.json")["ids"]
    own = bundle.tensors("samples.safetensors")[f"certification.{row['id']}"]
    n, most = ledger["kept_classes"].shape
    must(own.shape == (n, most + 1), f"certification.{row['id']} has shape {own.shape} for {n} certification images")
    slack = slack_of(own)
    lost, certified, kept = ~(slack > 0), ledger["verdict"] == 2, ledger["verdict"] == 1
    broken = [ids[i] for i in np.flatnonzero(lost & certified)]
    stated = row["certified"]
    must_equal(stated["n"], int(certified.sum()), "the count of certified samples")
    must_equal(stated["violations"], len(broken), "the count of violations, certified labels that the engine lost,")
    must(stated["violating_ids"] == broken, f"violating_ids are stated as {stated['violating_ids']}, they are {broken}")
    must_equal(stated["kept_broken"], int((lost & kept).sum()), "kept_broken")
    return bool(np.isfinite(slack).all())


# ------------------------------------------------------------------------------------- images that were not run (L5)

GRID = range(6, -15, -1)


def check_disagreement(bundle: Bundle) -> str:
    """Disagreement: how often an engine may give another label than the dense network, on images that were not run.

    With k of n validation images disagreeing, the one-sided Clopper-Pearson bound at (1 - confidence) / candidates
    covers the chance of it for images drawn alike, for all candidates that were looked at on these images at once.
    Where images come in clusters a cluster disagrees if any of its images does, and clusters are what is counted.
    """
    check_ids(bundle)
    stated, results, asked = bundle.json("disagreement.json"), bundle.json("results.json"), _recipe(bundle)["validate"]
    confidence, candidates = stated["confidence"], stated["candidates"]
    names = [row["id"] for row in measured_rows(bundle)]
    if not names:
        raise Unchecked("no engine was run, so nothing follows for other images")
    must(stated["schema"] == 1, f"disagreement.json is of schema {stated['schema']}, this checker reads 1")
    must(
        confidence == results["confidence"] and 0.5 < confidence < 1,
        f"disagreement.json has the confidence {confidence}, results.json {results['confidence']}",
    )
    files = {results["binds"]["engines"][name] for name in names}
    must(
        type(candidates) is int and candidates >= len(files),
        f"{candidates} candidates are stated, {len(files)} engines were run on these images",
    )
    must(stated["engines"].keys() == set(names), f"disagreement.json is not about {', '.join(names)}")
    columns, tail = validation_columns(bundle), (1 - confidence) / candidates
    clusters = _clusters(bundle, asked["cluster"])
    for name, own in stated["engines"].items():
        other = ~(slack_of(engine_logits(bundle, name, columns)) > 0)
        k, n = len(set(clusters[other])), len(set(clusters))
        for key, value in (("k", k), ("n", n), ("upper", _upper(k, n, tail))):
            must_equal(own[key], value, f"disagreement of {name}: {key}")
        must(own["clusters"] == (asked["cluster"] or None), f"{name} is counted by other clusters than the recipe's")
    rule = stated["rule"]
    note = "no rule" if rule is None else _check_rule(bundle, stated, clusters, columns, tail)
    return f"{len(names)} engines' bounds at confidence {confidence} for {candidates} candidates; {note}"


def _clusters(bundle: Bundle, pattern: str) -> Array:
    """Return a number per validation image, the same for the images of one cluster."""
    ids = bundle.json("calibration.json")["validation_ids"]
    found = [re.search(pattern, name) for name in ids] if pattern else []
    must(None not in found, f"the recipe's {pattern!r} finds no cluster in an id")
    keys = [match[1] for match in found if match is not None] or ids
    return np.unique(np.array(keys), return_inverse=True)[1]


def _check_rule(bundle: Bundle, stated: Mapping[str, Any], clusters: Array, columns: Columns, tail: float) -> str:
    """Check the margin below which the released engine abstains, found by fixed-sequence testing.

    H_tau: P(another label and margin > tau) > alpha. From the largest tau downwards each is rejected as long as
    P(Binomial(n, alpha) <= errors) <= tail; the smallest tau of that run holds with the same confidence. The taus are
    multiples of the median dense margin of the certification images, so that these images did not choose them.
    Source: Angelopoulos, Bates, Candes, Jordan, Lei, "Learn then test", 2021.
    """
    rule, asked = stated["rule"], _recipe(bundle)["validate"]
    name, alpha, tested, n = rule["engine"], rule["alpha"], rule["tested"], len(set(clusters))
    for key, value in (("confidence", stated["confidence"]), ("candidates", stated["candidates"])):
        must(rule[key] == value, f"the rule has another {key} than disagreement.json")
    must(alpha == asked["alpha"], f"the rule allows the share {alpha}, the recipe {asked['alpha']}")
    must(name == asked["deploy"], f"the rule is about {name}, the recipe releases {asked['deploy']}")
    own = engine_logits(bundle, name, columns).astype(np.float64)
    ranked = np.sort(own, axis=1)
    margin = np.where(whole(own), ranked[:, -1] - ranked[:, -2], np.nan)
    other = ~(slack_of(own) > 0)
    scale = bundle.json("certificate.json")["margin_median"]
    grid = [*(scale * 2 ** (j / 2) for j in GRID), 0.0]
    must(0 < len(tested) <= len(grid), f"{len(tested)} margins were tested")
    found, running = None, True
    for row, tau in zip(tested, grid, strict=False):
        must(running, f"the margin {row['tau']} was tested after one that was not rejected")
        must_equal(row["tau"], tau, "a margin to test")
        errors = len(set(clusters[other & (margin > row["tau"])]))
        p = _cdf(_log_choose(errors, n), n, alpha)
        running = p <= tail
        for key, value in (("errors", errors), ("n", n), ("p", p)):
            must_equal(row[key], value, f"the margin {row['tau']}: {key}")
        must(row["rejected"] is running, f"the margin {row['tau']}: rejected is stated as {row['rejected']}")
        found = row["tau"] if running else found
    must(not running or len(tested) == len(grid), "the tests stopped before one that is not rejected")
    must(rule["tau"] == found, f"the rule's margin is stated as {rule['tau']}, the tests give {found}")
    images = len(columns.labels)
    must_equal(rule["abstains"], images if found is None else int((~(margin > found)).sum()), "abstains")
    _check_rule_file(bundle, rule, columns.classes)
    return f"of {name}, {rule['abstains']} of {images} images are left undecided, at the margin {found}"


def _check_rule_file(bundle: Bundle, rule: Mapping[str, Any], classes: int) -> None:
    """Check what is given to whoever runs the engine."""
    own = bundle.json("abstain.json")
    must(own["schema"] == 1, f"abstain.json is of schema {own['schema']}, this checker reads 1")
    must(own["classes"] == classes, f"abstain.json is about {own['classes']} classes, there are {classes}")
    for key in ("engine", "tau", "alpha", "confidence", "candidates"):
        must(own[key] == rule[key], f"abstain.json has {own[key]} as {key}, the rule {rule[key]}")


# ------------------------------------------------------------------------------------------------------- noise floor


def check_noise(bundle: Bundle, name: str) -> str:
    """Noise: the measured error of a pair of logits over what its arithmetic predicts, from the stored pairs.

    In the model of independent rounding no ratio of n is above sqrt(6 ln(2 n / delta)) but with probability delta, nor
    is their mean square r but with (sqrt(r) exp((1 - r) / 2))^(n / 10); 1.5 is the least that is asked of its root.
    """
    results, samples = bundle.json("results.json"), bundle.tensors("samples.safetensors")
    if name == "onnx":
        stated, prefix = results["export_noise"], "onnx"
    else:
        stated, prefix = next(row for row in results["engines"] if row["id"] == name)["noise_floor"], f"engine.{name}"
    sigma, error = (samples[f"{prefix}.{column}"].astype(np.float64) for column in ("sigma", "error"))
    must(
        sigma.ndim == 1 and sigma.shape == error.shape and 0 < len(sigma) <= len(samples["labels"]),
        f"{name} has sigma of shape {sigma.shape} and error of shape {error.shape}",
    )
    must((sigma >= 0).all(), f"{name} has a predicted error below zero, or none")
    n, delta = len(sigma), stated["delta"]
    must(0 < delta < 1, f"the noise floor allows the chance {delta}")
    ratio = np.where((error == 0) & (sigma == 0), 0.0, np.abs(error) / sigma)
    finite = np.isfinite(ratio).all() and np.isfinite(sigma).all()
    rms, largest = float(np.sqrt(np.mean(ratio**2))), float(ratio.max())
    most, limit = math.sqrt(6 * math.log(2 * n / delta)), _rms_limit(n, delta)
    own: dict[str, float | None] = {"sigma_median": float(np.median(sigma)), "pairs": n, "threshold": most}
    own |= {"rms_limit": limit, "ratio_rms": rms if finite else None, "ratio_max": largest if finite else None}
    for key, value in own.items():
        must_equal(stated[key], value, f"noise floor: {key}")
    verdict = "within" if finite and largest <= most and rms <= limit else "beyond"
    must(
        stated["verdict"] == verdict,
        f"the noise floor is stated as {stated['verdict']}, largest ratio {largest:.3g}, rms {rms:.3g}",
    )
    limits = f"{verdict} the limits {limit:.3g} and {most:.3g}"
    return f"{n} pairs: measured over predicted error {rms:.3g} rms, at most {largest:.3g}, {limits}"


def _rms_limit(n: int, delta: float) -> float:
    """Return the root of the r above 1 with (ln r + 1 - r) / 2 = ln delta / max(1, n / 10), at least 1.5."""
    wanted, low, high = math.log(delta) / max(1.0, n / 10), 1.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if (math.log(middle) + 1 - middle) / 2 > wanted else (low, middle)
    return max(1.5, math.sqrt(high))


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
    asked = _recipe(bundle)["validate"]
    blocks, calls = asked["blocks"], 2 * asked["blocks"] * asked["calls"]
    must(own.size == calls, f"{own.size} calls of {name} are stored, the recipe asks for {calls}")
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
    asked = min(_recipe(bundle)["validate"]["batch"], len(bundle.tensors("samples.safetensors")["labels"]))
    must(stated["batch"] == asked, f"batch {stated['batch']} was timed, the recipe asks for {asked}")
    must(smallest_batch <= stated["batch"] <= largest, f"batch {stated['batch']} is outside of {engine['batch']}")
    must(
        stated["threads"] == engine["threads"], f"{stated['threads']} threads are stated, built for {engine['threads']}"
    )


# ----------------------------------------------------------------------------------------------------------- engines

STORED = {"fp32": {"float32"}, "fp16": {"float16"}, "int8": {"int8", "uint8"}}
SETTING = ("runtime", "target", "precision", "batch", "threads")


def engine_folders(bundle: Bundle) -> list[str]:
    """Return the names of the engines' folders, dense twins included."""
    return sorted({name.split("/")[1] for name in bundle.files if name.startswith("engines/")})


def check_engines(bundle: Bundle) -> str:
    """Engines: each file is the one its manifest describes, as asked, with a dense twin built the same way."""
    folders = engine_folders(bundle)
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
    must(own["schema"] == 1, f"engines/{folder}/engine.json is of schema {own['schema']}, this checker reads 1")
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
    exported = ("dense" if twin else "model") + (".fp16.onnx" if own["precision"] == "fp16" else ".onnx")
    source = own["source"]
    must(source["file"] == exported, f"{folder} was built from {source['file']}, not from {exported}")
    must(source["onnx"] == _digest(bundle, exported), f"{folder} was built from another {exported} than the bundle's")
    if own["precision"] == "int8":
        quantised = f"engines/{folder}/quantised.onnx"
        must(source["quantised"] == _digest(bundle, quantised) is not None, f"{folder} was not built from {quantised}")
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


def _noise(row: Mapping[str, Any], _: Bundle) -> Evidence:
    own = row["noise_floor"]
    if own is None:
        return NOTHING
    return (math.inf if own["ratio_rms"] is None else own["ratio_rms"]), None, None


GATES: dict[str, Callable[[Mapping[str, Any], Bundle], Evidence]] = {
    "max_accuracy_drop": _drop,
    "min_agreement": _agreement,
    "max_violations": _violations,
    "min_certified": _certified,
    "max_noise": _noise,
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
        if low is None or high is None:
            raise Refuted("the ratio of times is stated without an interval")
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


DEFAULTS: dict[tuple[str, str], Any] = {
    ("prune", "allocate"): None,
    ("prune", "sparsity"): None,
    ("prune", "skip"): [],
    ("prune", "keep_stem_dense"): True,
    ("prune", "keep_head_dense"): True,
    ("prune", "reconstruct"): 0,
    ("certify", "reserve"): 0.01,
    ("certify", "keep"): 16,
    ("certify", "reference"): 8,
    ("validate", "batch"): 1,
    ("validate", "blocks"): 20,
    ("validate", "calls"): 5,
    ("validate", "confidence"): 0.95,
    ("validate", "noise"): 64,
    ("validate", "alpha"): 0.01,
    ("validate", "cluster"): "",
}
"""What the recipe asks where its author wrote nothing, of the keys that this checker goes by."""


def check_policy(bundle: Bundle) -> str:
    """Policy: the locked recipe is the user's recipe.toml; an override has to be on record."""
    if "recipe.toml" not in bundle.files:
        raise Unchecked("there is no recipe.toml to hold the locked recipe against")
    written = tomllib.loads(bytes(map_file(bundle.root / "recipe.toml")).decode("utf-8"))
    locked = _recipe(bundle)
    for item in locked["sets"]:
        _override(written, item)
    gates = written.get("gates", {})
    for (table, key), default in DEFAULTS.items():
        written.setdefault(table, {}).setdefault(key, default)
    written["gates"] = {name: gates.get(name) for name in locked["gates"]} | gates
    for where, asked, own in _differences(written, locked, ""):
        must(False, f"{where} is {asked} in recipe.toml, {own} in recipe.lock.json")
    note = f"; overridden when it was run: {', '.join(locked['sets'])}" if locked["sets"] else ""
    return f"every key of recipe.toml is what the locked recipe has, {len(gates)} gates among them{note}"


def _override(tree: dict[str, Any], item: str) -> None:
    """Apply one recorded "table.key=value"; a value that is no TOML is a bare word."""
    dotted, _, text = item.partition("=")
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text
    *tables, key = dotted.split(".")
    for table in tables:
        tree = tree.setdefault(table, {})
    tree[key] = value


def _differences(asked: Any, locked: Any, where: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield where the locked recipe has something else than was asked; it may have more, by default."""
    if isinstance(asked, dict) and isinstance(locked, dict):
        for key, value in asked.items():
            yield from _differences(value, locked.get(key), f"{where}.{key}".lstrip("."))
    elif isinstance(asked, list) and isinstance(locked, list) and len(asked) == len(locked):
        for at, (value, own) in enumerate(zip(asked, locked, strict=True)):
            yield from _differences(value, own, f"{where}[{at}]")
    elif asked != locked or isinstance(asked, bool) != isinstance(locked, bool):
        yield where, asked, locked


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
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, OSError, RecursionError) as error:
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
        ("policy", check_policy),
        ("orders", check_orders),
        ("layers", check_layers),
        ("weights", check_weights),
        ("sidecar", check_sidecar),
        ("ids", check_ids),
        ("binds", check_binds),
        ("ledger", check_ledger),
        ("results", check_results),
        ("disagreement", check_disagreement),
        ("engines", check_engines),
        ("verdict", check_verdict),
    ):
        findings.append(answer(claim, check, opened))
    for claim, check in (
        ("allocation", check_allocation),
        ("objective", check_objective),
        ("zero_budget", check_zero_budget),
        ("proofs", check_proofs),
    ):
        if _is_claimed(opened, claim):
            findings.append(answer(claim, check, opened))
    for name in GRAPHS:
        if name in opened.files:
            findings.append(answer(f"graph:{name}", check_graph, opened, name))
            findings.append(answer(f"export:{name}", check_export, opened, name))
    return findings + _findings_per_engine(opened) + _findings_per_gate(opened)


def _is_claimed(bundle: Bundle, claim: str) -> bool:
    """Tell whether a bundle makes one of the claims that not every bundle makes; `formats` names what can't be read."""
    try:
        if claim == "allocation":
            return bool(_recipe(bundle)["prune"]["pattern"] == "mixed")
        return bool(bundle.json("certificate.json").get(claim))
    except (Unchecked, Unreadable, LookupError, TypeError, AttributeError):
        return False


def _findings_per_engine(bundle: Bundle) -> list[Finding]:
    """Return findings about each engine in results.json; what makes that file unreadable is said by `results`."""
    try:
        rows = [row for row in bundle.json("results.json")["engines"] if row["status"] == "measured"]
        findings = [answer(f"engine:{row['id']}", check_engine, bundle, row) for row in rows]
        timed = [row for row in rows if row["latency"] is not None]
        findings += [answer(f"latency:{row['id']}", check_latency, bundle, row) for row in timed]
        noisy = [row["id"] for row in rows if row["noise_floor"] is not None]
        noisy += ["onnx"] if bundle.json("results.json")["export_noise"] is not None else []
        findings += [answer(f"noise:{name}", check_noise, bundle, name) for name in noisy]
    except (Unchecked, Unreadable, LookupError, TypeError, AttributeError):
        return []
    return findings


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
