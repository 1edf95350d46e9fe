"""What each operation of a captured network does to the order of channels.

A walk over the graph gives every tensor its tracks (see `families`): how its entries move when channels are permuted.
Everything rests on three facts. An elementwise operation keeps the order if its operands move alike. A sum (mean, norm,
softmax, maximum) over an axis doesn't see the order along it. A view moves entries and nothing else. Linear layers,
convolutions, normalisations and attention are put together from these three. An operation that is not listed freezes
every channel that reaches it.
"""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from mpdeploy.pruning.families import FROZEN, Families, Ints, Track

CONSTANT = -1  # number of an entry that no tensor of the state dict holds
ADDITION = "the operation add"
BATCH = 7  # images in the walk's tensors: a prime, so that no reshape takes them for something else

SPATIAL = frozenset(
    ("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "upsample_nearest2d",
     "upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa")
)  # fmt: skip
POINTWISE = frozenset(
    ("add", "sub", "rsub", "mul", "div", "neg", "abs", "square", "sqrt", "rsqrt", "reciprocal", "pow", "exp", "log",
     "sin", "cos", "tanh", "sigmoid", "erf", "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu",
     "mish", "softplus", "log_sigmoid", "hardtanh", "hardswish", "hardsigmoid", "clamp", "clamp_min", "clamp_max",
     "maximum", "minimum", "where", "addcmul", "addcdiv", "lerp", "contiguous", "clone", "detach", "alias", "to",
     "_to_copy", "lift_fresh_copy", "type_as")
)  # fmt: skip
ONE_OPERAND = frozenset(("type_as", "to", "contiguous", "clone"))  # what else they are given is not read entry by entry
REDUCTIONS = frozenset(("sum", "mean", "amax", "amin", "var", "std", "logsumexp", "linalg_vector_norm"))
RESHAPES = frozenset(
    ("reshape", "view", "_unsafe_view", "reshape_as", "view_as", "flatten", "unflatten", "unsqueeze", "squeeze")
)
MADE = frozenset(("new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like"))  # from shapes alone


@dataclass(frozen=True, eq=False)
class Value:
    """What is known of one tensor.

    Args:
        shape: its sizes, with BATCH images.
        tracks: how its entries move; no two move along one axis. Without tracks it doesn't change at all.
        stored: name of the stored tensor that it is, "" if it is none.
        entries: entry of a stored tensor (numbered through all of them) at each place, for views of stored tensors.
        why: why it has no free channels, where that is known.
    """

    shape: tuple[int, ...]
    tracks: tuple[Track, ...] = ()
    stored: str = ""
    entries: Ints | None = None
    why: str = ""


@dataclass
class Stored:
    """A tensor of the state dict.

    Args:
        name: its name.
        shape: its sizes.
        offset: number of its first entry, counted through all stored tensors.
        fixed: why it may not be permuted, "" while it may.
        twins: other names of the same storage.
        elements: by axis, the elements along it.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    fixed: str = ""
    twins: Sequence[str] = ()
    elements: dict[int, Ints] = field(default_factory=dict)


@dataclass(frozen=True)
class Consumer:
    """A linear or convolution operation that takes channels in.

    Args:
        layer: the layer's name.
        weight: name of its stored weight.
        kind: "linear" or "conv2d".
        refused: why its inputs can't be permuted whatever they are, "" if they might.
    """

    layer: str
    weight: str
    kind: str
    refused: str = ""


def layer_name(tensor: str) -> str:
    """Name of the layer that a weight belongs to."""
    return tensor.removesuffix(".weight")


class Walk:
    """Walks through a captured network once.

    Args:
        graph: what `capture` returned.
        state: parameters and buffers by name.
    """

    def __init__(self, graph: fx.Graph, state: Mapping[str, Tensor]) -> None:
        self.families = Families()
        self.consumers: list[Consumer] = []
        self.attended: list[Ints] = []  # elements whose order attention keeps
        self.concatenated: list[Ints] = []
        self.added: list[Ints] = []  # elements of two layers' outputs that are added up
        self.stored: dict[str, Stored] = {}
        self.offsets: list[int] = []
        self.names: list[str] = []
        self._register(graph, state)
        self.values: dict[fx.Node, Any] = {}
        self.doing = ""  # the operation at hand, for reasons
        for node in graph.nodes:
            self.values[node] = self._visit(node)

    # --- stored tensors ----------------------------------------------------------------------------------------------

    def _register(self, graph: fx.Graph, state: Mapping[str, Tensor]) -> None:
        """Number the stored tensors' entries, and fix those that several operations or names share."""
        names_of: dict[int, list[str]] = {}
        for name, tensor in state.items():
            names_of.setdefault(tensor.untyped_storage()._cdata, []).append(name)
        uses: dict[str, int] = {}
        for node in graph.nodes:
            if node.op == "get_attr":
                uses[str(node.target)] = uses.get(str(node.target), 0) + len(node.users)
        offset = 0
        for name, tensor in state.items():
            twins = [other for other in names_of[tensor.untyped_storage()._cdata] if other != name]
            fixed = ""
            if twins:
                fixed = f"{name} is stored a second time, as {twins[0]}"
            elif uses.get(name, 0) > 1:
                fixed = f"{name} is used by {uses[name]} operations"
            self.stored[name] = Stored(name, tuple(tensor.shape), offset, fixed, twins)
            self.offsets.append(offset)
            self.names.append(name)
            offset += max(1, tensor.numel())

    def _entries(self, value: Value) -> Ints:
        """Numbers of the stored entries that a view of stored tensors holds."""
        if value.entries is not None:
            return value.entries
        stored = self.stored[value.stored]
        return stored.offset + np.arange(int(np.prod(stored.shape))).reshape(stored.shape)

    def _sources(self, value: Value) -> list[str]:
        """Names of the stored tensors whose entries a view holds."""
        if value.entries is None:
            return []
        owners = np.unique(np.searchsorted(self.offsets, value.entries.ravel(), side="right") - 1)
        return [self.names[owner] for owner in owners.tolist() if owner >= 0]

    def _elements(self, name: str, axis: int) -> Ints | None:
        """Elements along an axis of a stored tensor, or None if it is fixed."""
        stored = self.stored[name]
        if stored.fixed:
            return None
        if axis not in stored.elements:
            stored.elements[axis] = self.families.new(stored.shape[axis])
        return stored.elements[axis]

    def _fix(self, value: Value) -> Value:
        """Forbid permuting the stored tensors that a value is a view of; returns the value as one that stands still."""
        if value.stored:
            self._fix_stored(value.stored)
        elif value.entries is not None:
            for name in self._sources(value):
                self._fix_stored(name)
        else:
            return value
        return Value(value.shape, why=value.why)

    def _fix_stored(self, name: str) -> None:
        stored = self.stored[name]
        stored.fixed = stored.fixed or f"{name} is used by {self.doing}, which isn't known to treat its entries alike"
        for elements in stored.elements.values():
            self.families.freeze(elements, stored.fixed)

    # --- the walk ----------------------------------------------------------------------------------------------------

    def _visit(self, node: fx.Node) -> Any:
        if node.op in ("get_attr", "placeholder") and not isinstance(node.meta.get("val"), Tensor):
            return None  # a part of the network that runs as one operation, or a number
        if node.op == "get_attr":
            name = str(node.target)
            shape = self._shape(node.meta["val"])
            if name not in self.stored:
                return Value(shape, entries=np.broadcast_to(np.int64(CONSTANT), shape))
            return Value(shape, stored=name, why=self.stored[name].fixed)
        if node.op == "placeholder":
            return Value(self._shape(node.meta["val"]), why="they are the channels of the image itself")
        self.node = node
        arguments = fx.node.map_arg((node.args, node.kwargs), lambda used: self.values[used])
        if node.op == "output":
            self._stop(arguments, "they are the network's outputs")
            return None
        return self._operation(node, *arguments)

    def _operation(self, node: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        val = node.meta.get("val")
        if node.target is operator.getitem:
            return args[0][args[1]]
        name = _operation_name(node)
        self.doing = f"the operation {name}"
        if not isinstance(val, Tensor | list | tuple):
            if _writes(node):
                self._stop((args, tuple(kwargs.values())), f"they are written by {self.doing}")
            return _concrete(val)
        named = _by_name(node, args, kwargs)
        shape = self._shape(val) if isinstance(val, Tensor) else ()
        rule = getattr(self, f"_op_{name.lower()}", None)
        if name in MADE or not _in_tensors(args, kwargs):
            return Value(shape) if isinstance(val, Tensor) else self._unknown((), {}, val, "")
        result = None
        if rule is not None:
            result = rule(named, shape)
        elif name in POINTWISE:
            operands = [args[0]] if name in ONE_OPERAND else _in_tensors(args, kwargs)
            result = self.pointwise(operands, shape)
        elif name in REDUCTIONS:
            result = self._reduction(named)
        elif name in RESHAPES:
            result = self.reshape(args[0], shape)
        elif name in SPATIAL:
            result = replace(self._only_channels(args[0]), shape=shape)
        return self._unknown(args, kwargs, val, name) if result is None else result

    def _shape(self, val: Tensor) -> tuple[int, ...]:
        return tuple(_concrete(size) for size in val.shape)

    def _unknown(self, args: Any, kwargs: Any, val: Any, name: str) -> Any:
        """Freeze all that reaches an operation without a rule."""
        why = f"they pass through the operation {name}, which isn't known to treat channels alike" if name else ""
        self._stop((args, tuple(kwargs.values())), why)
        why = f"they come out of the operation {name}, which isn't known to treat channels alike" if name else ""
        if isinstance(val, list | tuple):
            return [Value(self._shape(v), why=why) if isinstance(v, Tensor) else _concrete(v) for v in val]
        return Value(self._shape(val), why=why)

    def _stop(self, arguments: Any, why: str) -> None:
        for value in _in_tensors(arguments, {}):
            self._freeze(value.tracks, why)
            self._fix(value)

    def _freeze(self, tracks: Sequence[Track], why: str) -> None:
        for track in tracks:
            self.families.freeze(track.element.ravel(), why)

    # --- elementwise operations --------------------------------------------------------------------------------------

    def pointwise(self, operands: Sequence[Value], shape: tuple[int, ...]) -> Value:
        """Combine tensors entry by entry, with broadcasting."""
        ndim = len(shape)
        stored = [value for value in operands if value.stored or value.entries is not None]
        if len(operands) == 1:
            value = operands[0]
            # A function of each stored entry alone moves with it.
            return replace(value, stored="", entries=self._entries(value), shape=shape) if stored else value
        moving = [_padded(value, ndim) for value in operands if not any(value is other for other in stored)]
        tracks: list[Track] = []
        for value in moving:
            for track in value.tracks:
                self._against_still_operands(track, moving, value)
                met = [other for other in tracks if set(other.axes) & set(track.axes)]
                for other in met:
                    if self.doing == ADDITION and self._apart(other, track):
                        self.added += [other.element.ravel()]
                    self.families.align(other, track, f"they meet others in another order in {self.doing}")
                if not met:
                    tracks.append(track)
        for value in stored:
            self._meet_stored(tracks, value, ndim)
        why = next((value.why for value in moving if value.why), "") if not tracks else ""
        return Value(shape, tuple(tracks), why=why)

    def _apart(self, one: Track, other: Track) -> bool:
        families = [set(self.families.family[track.element.ravel()].tolist()) for track in (one, other)]
        return not families[0] & families[1]

    def _against_still_operands(self, track: Track, operands: Sequence[Value], own: Value) -> None:
        """Channels don't move along an axis along which another operand has entries that stand still."""
        for other in operands:
            if other is own:
                continue
            moves = {axis for theirs in other.tracks for axis in theirs.axes}
            stands = [axis for axis in track.axes if other.shape[axis] > 1 and axis not in moves]
            if stands:
                why = other.why or f"they meet a tensor with a fixed order in {self.doing}"
                self.families.refine(track, track.coordinates(stands), why)

    def _meet_stored(self, tracks: Sequence[Track], value: Value, ndim: int) -> None:
        """Let a stored tensor (a bias, a position embedding) move with the channels it is combined with."""
        entries = self._entries(value)
        entries = entries.reshape((1,) * (ndim - entries.ndim) + entries.shape)
        if entries.size == 1:
            return
        moved = False
        for track in tracks:
            axes = [axis for axis in track.axes if entries.shape[axis] > 1]
            if not axes:
                continue
            own = self._track_of_entries(entries, axes) if track.axes[-1] in axes else None
            if own is None:
                why = f"they meet a stored tensor in {self.doing} that can't move with them"
                self.families.refine(track, track.coordinates(axes), value.why or why)
                self._fix(value)
            else:
                self.families.close(own, f"only a part of a stored tensor is used in {self.doing}")
                self.families.align(track, own, f"they meet a stored tensor in another order in {self.doing}")
                moved = True
        if not moved:
            self._fix(value)

    def _track_of_entries(self, entries: Ints, axes: Sequence[int]) -> Track | None:
        """How a view of stored tensors moves along `axes` when each tensor moves along one axis of its own."""
        rest = [axis for axis in range(entries.ndim) if axis not in axes]
        flat = entries.transpose(*rest, *axes).reshape(int(np.prod([entries.shape[a] for a in rest])), -1)
        owners = np.searchsorted(self.offsets, flat, side="right") - 1
        if not bool((owners == owners[0]).all()):
            return None
        element = np.zeros(flat.shape[1], dtype=np.int64)
        for owner in np.unique(owners[0]).tolist():
            columns = np.flatnonzero(owners[0] == owner)
            if owner < 0:
                continue  # constants keep the frozen element
            stored = self.stored[self.names[owner]]
            found = _moving_axis(flat[:, columns] - stored.offset, stored.shape)
            elements = None if found is None else self._elements(stored.name, found[0])
            if found is None or elements is None:
                return None
            element[columns] = elements[found[1]]
        if len(np.unique(element[element != FROZEN])) < np.count_nonzero(element != FROZEN):
            return None
        return Track.of(element.reshape([size if a in axes else 1 for a, size in enumerate(entries.shape)]))

    # --- sums --------------------------------------------------------------------------------------------------------

    def reduce(self, value: Value, axes: Sequence[int], keepdim: bool) -> Value:
        """A function of the entries along some axes that doesn't depend on their order."""
        value = self._fix(value)
        axes = [axis % len(value.shape) for axis in axes]
        kept = [track for track in self.normalise(value, axes).tracks if not set(track.axes) & set(axes)]
        if not keepdim:
            kept = [Track(*(np.squeeze(a, tuple(axes)) for a in (t.element, t.spot))) for t in kept]
        shape = tuple(1 if a in axes else size for a, size in enumerate(value.shape) if keepdim or a not in axes)
        return Value(shape, tuple(kept), why=value.why)

    def normalise(self, value: Value, axes: Sequence[int]) -> Value:
        """An elementwise operation with functions of the entries along some axes (softmax, normalisation)."""
        value = self._fix(value)
        axes = [axis % len(value.shape) for axis in axes]
        for track in value.tracks:
            across = [axis for axis in track.axes if axis not in axes]
            if len(across) < len(track.axes) and across:
                self.families.refine(track, track.coordinates(across), f"they are summed apart in {self.doing}")
        return value

    def _reduction(self, named: Mapping[str, Any]) -> Value:
        value = named["self"]
        axes = named.get("dim")
        axes = list(range(len(value.shape))) if axes in (None, []) else [axes] if isinstance(axes, int) else list(axes)
        return self.reduce(value, axes, bool(named.get("keepdim", False)))

    def _op_softmax(self, named: Mapping[str, Any], shape: tuple[int, ...]) -> Value:
        return self.normalise(named["self"], [named["dim"]])

    _op__softmax = _op_log_softmax = _op_softmax

    def _op_layer_norm(self, named: Mapping[str, Any], shape: tuple[int, ...]) -> Value:
        axes = list(range(-len(named["normalized_shape"]), 0))
        return self._scaled(self.normalise(named["input"], axes), named, 0)

    _op_rms_norm = _op_layer_norm

    def _op_group_norm(self, named: Mapping[str, Any], shape: tuple[int, ...]) -> Value:
        value, groups = self._fix(named["input"]), named["num_groups"]
        split = (shape[0], groups, shape[1] // groups, *shape[2:])
        grouped = self.normalise(self.reshape(value, split), list(range(2, len(split))))
        return self._scaled(self.reshape(grouped, shape), named, len(shape) - 2)

    def _op_batch_norm(self, named: Mapping[str, Any], shape: tuple[int, ...]) -> Value | None:
        if named["training"] or named.get("running_mean") is None:
            return None
        return self._scaled(named["input"], named, len(shape) - 2)

    def _scaled(self, value: Value, named: Mapping[str, Any], trailing: int) -> Value:
        """Statistics, scale and shift of a normalisation, stored with `trailing` axes fewer on the right."""
        for name in ("running_mean", "running_var", "weight", "bias"):
            tensor = named.get(name)
            if tensor is not None:
                value = self.pointwise([value, self.reshape(tensor, (*tensor.shape, *[1] * trailing))], value.shape)
        return value

    def _op_dropout(self, named: Mapping[str, Any], shape: tuple[int, ...]) -> Value | None:
        return None if named["train"] else self.pointwise([named["input"]], shape)

    def _op_glu(self, named: Mapping[str, Any], shape: tuple[int, ...]) -> Value:
        return self.pointwise(self._op_split({**named, "chunks": 2}, shape), shape)

    def _op_prelu(self, named: Mapping[str, Any], shape: tuple[int, ...]) -> Value:
        slope = self.reshape(named["weight"], (*named["weight"].shape, *[1] * (len(shape) - 2)))
        return self.pointwise([named["self"], slope], shape)

    # --- products ----------------------------------------------------------------------------------------------------

    def contract(self, left: Value, right: Value, axis: int, shape: tuple[int, ...]) -> Value:
        """Sum of products of two broadcast tensors along an axis: every linear map."""
        both = tuple(max(a, b) for a, b in zip(left.shape, right.shape, strict=True))
        return replace(self.reduce(self.pointwise([left, right], both), [axis], keepdim=False), shape=shape)

    def _weight(self, value: Value, columns: bool) -> Value:
        """A stored weight [O, I, ...] as [O, I], whose rows and columns are channels."""
        tracks = []
        for axis in (0, 1) if columns else (0,):
            elements = self._elements(value.stored, axis)
            if elements is not None and len(elements) > 1:
                tracks.append(Track.of(elements[:, None] if axis == 0 else elements[None]))
        return Value(value.shape[:2], tuple(tracks), why=value.why)

    def _op_linear(self, named: Mapping[str, Any], shape: tuple[int, ...]) -> Value:
        value, weight = self._fix(named["input"]), named["weight"]
        out = self._computed(value, weight, "linear", len(value.shape) - 1, shape)
        if out is None:
            self._consumer(weight, "linear")
            before = self.reshape(_explained(value), (*value.shape[:-1], 1, value.shape[-1]))
            held = _padded(self._weight(weight, columns=True), len(before.shape))
            out = self.contract(before, held, len(shape), shape)
        bias = named.get("bias")
        return out if bias is None else self.pointwise([out, bias], shape)

    def _op_conv2d(self, named: Mapping[str, Any], shape: tuple[int, ...]) -> Value:
        value, weight, groups = self._only_channels(named["input"]), named["weight"], named.get("groups", 1)
        out = self._computed(value, weight, "conv2d", 1, shape)
        if out is None:
            out = self._ungrouped(value, weight, shape) if groups == 1 else self._grouped(value, weight, groups, shape)
        bias = named.get("bias")
        return out if bias is None else self.pointwise([out, self.reshape(bias, (shape[1], 1, 1))], shape)

    def _ungrouped(self, value: Value, weight: Value, shape: tuple[int, ...]) -> Value:
        self._consumer(weight, "conv2d")
        images, inputs = value.shape[:2]
        # The sum over the kernel's positions neither moves channels nor mixes their order.
        before = self.reshape(_explained(value), (images, 1, *value.shape[1:]))
        before = replace(before, shape=(images, 1, inputs, 1, 1))
        held = self._weight(weight, columns=True)
        return self.contract(before, self.reshape(held, (1, *held.shape, 1, 1)), 2, shape)

    def _grouped(self, value: Value, weight: Value, groups: int, shape: tuple[int, ...]) -> Value:
        rows = self._weight(weight, columns=False)
        outputs = replace(self.reshape(replace(rows, shape=(shape[1], 1)), (1, shape[1], 1, 1)), shape=shape)
        if groups == value.shape[1] == shape[1]:
            self._consumer(weight, "conv2d", "It is a depthwise convolution: each output has one input.")
            return self.pointwise([replace(value, shape=shape), outputs], shape)
        self._consumer(weight, "conv2d", f"It is a grouped convolution ({groups} groups).")
        self._freeze(value.tracks, "they enter a grouped convolution")
        for track in outputs.tracks:
            # Outputs may change places within their group, whose inputs they share.
            group = np.arange(shape[1]).reshape(1, -1, 1, 1) // (shape[1] // groups)
            self.families.refine(track, group, "each is the only output of its group")
        return outputs

    def _consumer(self, weight: Value, kind: str, refused: str = "") -> None:
        if self.stored[weight.stored].fixed:
            refused = refused or f"The order of its inputs is fixed: {self.stored[weight.stored].fixed}."
        for name in (weight.stored, *self.stored[weight.stored].twins):
            self.consumers.append(Consumer(layer_name(name), name, kind, refused))

    def _computed(self, value: Value, weight: Value, kind: str, axis: int, shape: tuple[int, ...]) -> Value | None:
        """The output of a layer whose weight is not a stored one, which fixes its inputs; None if it is stored."""
        if weight.stored:
            return None
        behind = list(self._weights_behind(self.node.args[1]))
        for name in [name for name in behind if name.endswith(".weight")] or behind:
            refused = "Its weight is computed from the stored one."
            self.consumers.append(Consumer(layer_name(name), name, kind, refused))
        self._freeze(value.tracks, "they enter a layer whose weight is computed")
        self._fix(weight)
        return Value(shape, why="they come out of a layer whose weight is computed")

    def _weights_behind(self, weight: Any) -> Iterator[str]:
        """Names of the stored tensors of two axes or more that a weight is computed from."""
        waiting, seen = [weight], set()
        while waiting:
            node = waiting.pop()
            if node.op == "get_attr" and len(self.values[node].shape) > 1 and str(node.target) in self.stored:
                yield str(node.target)
            seen.add(node)
            waiting += [source for source in node.all_input_nodes if source not in seen]

    def _op_matmul(self, named: Mapping[str, Any], shape: tuple[int, ...]) -> Value | None:
        left, right = self._fix(named["self"]), self._fix(named["other"] if "other" in named else named["mat2"])
        if min(len(left.shape), len(right.shape)) < 2:
            return None
        rank = max(len(left.shape), len(right.shape))
        left, right = _padded(left, rank), _padded(right, rank)
        # [.., m, k, 1] * [.., 1, k, n], summed over k
        left = self.reshape(left, (*left.shape, 1))
        right = self.reshape(right, (*right.shape[:-2], 1, *right.shape[-2:]))
        out = self.contract(left, right, rank - 1, shape)
        # Scores have no channels left; what a product of two activations still carries are attention values.
        self.attended += [track.element.ravel() for track in out.tracks]
        return out

    _op_bmm = _op_mm = _op_matmul

    def _op_scaled_dot_product_attention(self, named: Mapping[str, Any], shape: tuple[int, ...]) -> Value | None:
        query, key, value = (self._fix(named[name]) for name in ("query", "key", "value"))
        same = query.shape[:-2] == key.shape[:-2] == value.shape[:-2]
        if not same or named.get("dropout_p"):
            return None
        scores = (*query.shape[:-1], key.shape[-2])
        turned = self._transposed(key, len(key.shape) - 2, len(key.shape) - 1)
        weights = self._op_matmul({"self": query, "other": turned}, scores)
        if named.get("attn_mask") is not None and weights is not None:
            weights = self.pointwise([weights, self._fix(named["attn_mask"])], scores)
        if weights is None:
            return None
        return self._op_matmul({"self": self.normalise(weights, [-1]), "other": value}, shape)

    # --- views -------------------------------------------------------------------------------------------------------

    def reshape(self, value: Value, shape: tuple[int, ...]) -> Value:
        """The same entries in the same order, in another shape."""
        if np.prod(value.shape) != np.prod(shape):
            self._stop(value, f"they are reshaped in {self.doing} in a way that depends on the number of images")
            return Value(shape)
        if value.stored or value.entries is not None:
            if value.stored and shape == value.shape:
                return value
            return Value(shape, entries=self._entries(value).reshape(shape), why=value.why)
        tracks = [track for track in (_reshaped(t, value.shape, shape) for t in value.tracks) if track.axes]
        moving = [axis for track in tracks for axis in track.axes]
        if len(moving) > len(set(moving)):
            self._freeze(tracks, f"they share an axis with other channels in {self.doing}")
            return Value(shape)
        return Value(shape, tuple(tracks), why=value.why)

    def _moved(self, value: Value, move: Callable[[Ints], Ints], shape: tuple[int, ...]) -> Value:
        """Apply a view to each of the value's arrays; entries that go are told apart from those that stay."""
        if value.stored or value.entries is not None:
            return Value(shape, entries=move(self._entries(value)), why=value.why)
        tracks = [Track(move(track.element), move(track.spot)) for track in value.tracks]
        for track in tracks:
            self.families.close(track, f"one is cut off alone in {self.doing}")
        return Value(shape, tuple(track for track in tracks if track.axes), why=value.why)

    def _transposed(self, value: Value, one: int, other: int) -> Value:
        order = list(range(len(value.shape)))
        order[one], order[other] = order[other], order[one]
        return self._moved(value, lambda array: array.transpose(order), tuple(value.shape[a] for a in order))

    def _op_permute(self, named: Mapping[str, Any], shape: tuple[int, ...]) -> Value:
        order = [axis % len(shape) for axis in named["dims"]]
        return self._moved(named["self"], lambda array: array.transpose(order), shape)

    def _op_transpose(self, named: Mapping[str, Any], shape: tuple[int, ...]) -> Value:
        return self._transposed(named["self"], named["dim0"] % len(shape), named["dim1"] % len(shape))

    def _op_mt(self, named: Mapping[str, Any], shape: tuple[int, ...]) -> Value:
        return self._transposed(named["self"], len(shape) - 2, len(shape) - 1)

    def _op_t(self, named: Mapping[str, Any], shape: tuple[int, ...]) -> Value:
        return self._transposed(named["self"], 0, len(shape) - 1)

    def _op_expand(self, named: Mapping[str, Any], shape: tuple[int, ...]) -> Value:
        value = named["self"]
        if value.stored or value.entries is not None:
            return Value(shape, entries=np.broadcast_to(self._entries(value), shape), why=value.why)
        return replace(_padded(value, len(shape)), shape=shape)

    _op_expand_as = _op_expand

    def _op_repeat(self, named: Mapping[str, Any], shape: tuple[int, ...]) -> Value:
        value, repeats = _padded(self._fix(named["self"]), len(shape)), named["repeats"]
        repeated = {axis for axis, times in enumerate(repeats) if times != 1}
        return replace(self._stopped_along(value, repeated, "they are repeated"), shape=shape)

    def _op_slice(self, named: Mapping[str, Any], shape: tuple[int, ...]) -> Value:
        axis = named.get("dim", 0) % len(shape)
        part = slice(named.get("start"), named.get("end"), named.get("step") or 1)
        return self._moved(named["self"], lambda array: _along(array, axis, part), shape)

    def _op_narrow(self, named: Mapping[str, Any], shape: tuple[int, ...]) -> Value:
        return self._op_slice({**named, "end": named["start"] + named["length"]}, shape)

    def _op_select(self, named: Mapping[str, Any], shape: tuple[int, ...]) -> Value:
        axis = named["dim"] % (len(shape) + 1)
        return self._selected(named["self"], axis, named["index"])

    def _selected(self, value: Value, axis: int, index: int) -> Value:
        shape = value.shape[:axis] + value.shape[axis + 1 :]

        def take(array: Ints) -> Ints:
            return array[(slice(None),) * axis + (0 if array.shape[axis] == 1 else index,)]

        return self._moved(value, take, shape)

    def _op_unbind(self, named: Mapping[str, Any], shape: tuple[int, ...]) -> list[Value]:
        value = named["self"]
        axis = named.get("dim", 0) % len(value.shape)
        return [self._selected(value, axis, index) for index in range(value.shape[axis])]

    def _op_split(self, named: Mapping[str, Any], shape: tuple[int, ...]) -> list[Value]:
        value = named["self"]
        axis = named.get("dim", 0) % len(value.shape)
        size = value.shape[axis]
        if "chunks" in named:
            step = -(-size // named["chunks"])
            cuts = list(range(0, size, step))
        elif isinstance(named.get("split_size", named.get("split_sizes")), int):
            cuts = list(range(0, size, named["split_size"]))
        else:
            cuts = [0, *np.cumsum(named.get("split_sizes", named.get("split_size")))[:-1].tolist()]
        ends = [*cuts[1:], size]
        return [self._op_slice(
            {"self": value, "dim": axis, "start": start, "end": end},
            tuple(end - start if a == axis else s for a, s in enumerate(value.shape)),
        ) for start, end in zip(cuts, ends, strict=True)]  # fmt: skip

    _op_chunk = _op_split_with_sizes = _op_split

    def _op_roll(self, named: Mapping[str, Any], shape: tuple[int, ...]) -> Value | None:
        axes = [axis % len(shape) for axis in named.get("dims", [])]
        if not axes:
            return None
        # Rolling an axis of size 1, along which nothing moves, changes nothing.
        return self._moved(named["self"], lambda array: np.roll(array, named["shifts"], axes), shape)

    def _op_flip(self, named: Mapping[str, Any], shape: tuple[int, ...]) -> Value:
        axes = tuple(axis % len(shape) for axis in named["dims"])
        return self._moved(named["self"], lambda array: np.flip(array, axes), shape)

    def _op_pad(self, named: Mapping[str, Any], shape: tuple[int, ...]) -> Value:
        value, padding = self._fix(named["self"]), named["pad"]
        padded = {len(shape) - 1 - i for i in range(len(padding) // 2) if any(padding[2 * i : 2 * i + 2])}
        return replace(self._stopped_along(value, padded, "they are padded with others"), shape=shape)

    _op_constant_pad_nd = _op_pad

    def _only_channels(self, value: Value) -> Value:
        """Freeze what moves along the last two axes, as a window slides over them."""
        last = {len(value.shape) - 2, len(value.shape) - 1}
        return self._stopped_along(self._fix(value), last, f"they lie along image rows or columns in {self.doing}")

    def _stopped_along(self, value: Value, axes: set[int], why: str) -> Value:
        """Freeze what moves along some axes."""
        stopped = [track for track in value.tracks if set(track.axes) & axes]
        self._freeze(stopped, why)
        kept = tuple(track for track in value.tracks if not set(track.axes) & axes)
        return replace(value, tracks=kept, why=why if stopped else value.why)

    def _op_stack(self, named: Mapping[str, Any], shape: tuple[int, ...]) -> Value:
        axis = named.get("dim", 0) % len(shape)
        parts = [self.reshape(v, (*v.shape[:axis], 1, *v.shape[axis:])) for v in named["tensors"]]
        return self._op_cat({"tensors": parts, "dim": axis}, shape)

    def _op_cat(self, named: Mapping[str, Any], shape: tuple[int, ...]) -> Value:
        parts, axis = named["tensors"], named.get("dim", 0) % len(shape)
        if all(value.stored or value.entries is not None for value in parts):
            return Value(shape, entries=np.concatenate([self._entries(value) for value in parts], axis=axis))
        across = [replace(v, tracks=tuple(t for t in v.tracks if axis not in t.axes)) for v in parts]
        out = self.pointwise(across, shape) if len(parts) > 1 else replace(across[0], shape=shape)
        joined = self._joined([self._fix(value) for value in parts], axis) if _moves(parts, axis) else None
        if joined is None:
            return out
        clash = [track for track in out.tracks if set(track.axes) & set(joined.axes)]
        if clash:
            self._freeze([*clash, joined], f"they lie along two axes in {self.doing}")
            return Value(shape, tuple(t for t in out.tracks if not set(t.axes) & set(joined.axes)), why=out.why)
        self.concatenated.append(joined.element.ravel())
        return replace(out, tracks=(*out.tracks, joined))

    def _joined(self, parts: Sequence[Value], axis: int) -> Track | None:
        """The track along the axis of concatenation; parts that stand still get the frozen element."""
        tracks = [next((t for t in value.tracks if axis in t.axes), None) for value in parts]
        moving = [track for track in tracks if track is not None]
        if any(track.axes != moving[0].axes for track in moving):
            self._freeze(moving, f"they lie along several axes in {self.doing}")
            return None
        elements, spots, most = [], [], 0
        for value, track in zip(parts, tracks, strict=True):
            if track is None:
                size = [value.shape[a] if a in moving[0].axes else 1 for a in range(len(value.shape))]
                elements.append(np.full(size, FROZEN))
                spots.append(np.zeros(size, dtype=np.int64))
            else:
                elements.append(track.element)
                spots.append(track.spot + most)
                most += int(track.spot.max()) + 1
        return Track(np.concatenate(elements, axis=axis), np.concatenate(spots, axis=axis))


def _explained(value: Value) -> Value:
    """A layer's input with a reason should its channels turn out to have a fixed order."""
    return replace(value, why=value.why or "they aren't channels of another layer, but positions or computed numbers")


def _moves(parts: Sequence[Value], axis: int) -> bool:
    return any(axis in track.axes for value in parts for track in value.tracks)


def _concrete(size: Any) -> Any:
    """A size as an integer, with BATCH images; other things as they are."""
    if isinstance(size, torch.SymInt):
        expression = size.node.expr
        return int(expression.subs(dict.fromkeys(expression.free_symbols, BATCH)))
    return size


def _operation_name(node: fx.Node) -> str:
    """An ATen operation's name without the underscore of its in-place twin."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten":
        return str(node.target)
    name = node.target._schema.name.removeprefix("aten::")
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def _writes(node: fx.Node) -> bool:
    """Whether an operation changes one of its arguments."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _by_name(node: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """An ATen operation's arguments by the names of its schema, with defaults."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return dict(kwargs)
    named = {a.name: a.default_value for a in node.target._schema.arguments if a.has_default_value()}
    named |= dict(zip((a.name for a in node.target._schema.arguments), args, strict=False))
    return named | dict(kwargs)


def _in_tensors(args: Any, kwargs: Mapping[str, Any]) -> list[Value]:
    """All tensors among an operation's arguments."""
    found: list[Value] = []
    fx.node.map_aggregate((args, tuple(kwargs.values())), lambda a: found.append(a) if isinstance(a, Value) else None)
    return found


def _padded(value: Value, ndim: int) -> Value:
    """The value with leading axes of size 1, as broadcasting adds them."""
    shape = (1,) * (ndim - len(value.shape)) + value.shape
    return replace(value, shape=shape, tracks=tuple(track.padded(ndim) for track in value.tracks))


def _along(array: Ints, axis: int, part: slice) -> Ints:
    """A part of an array along an axis, unless nothing moves along it."""
    if array.shape[axis] == 1:
        return array
    return array[(slice(None),) * axis + (part,)]


def _moving_axis(local: Ints, shape: tuple[int, ...]) -> tuple[int, Ints] | None:
    """The one axis of a stored tensor along which its entries [still, moving] change with the column, and the indices.

    Returns:
        The axis and the index along it for each column, or None where more than one axis changes, or the row matters.
    """
    indices = np.unravel_index(local, shape)
    changing = [axis for axis, index in enumerate(indices) if bool((index != index[:, :1]).any())]
    if len(changing) > 1:
        return None
    axis = changing[0] if changing else len(shape) - 1
    index = np.asarray(indices[axis])
    return (axis, index[0]) if bool((index == index[0]).all()) else None


def _reshaped(track: Track, before: tuple[int, ...], after: tuple[int, ...]) -> Track:
    """A track after a reshape: axes are regrouped run by run, and only runs in which channels move are written out."""
    element, spot = track.element, track.spot
    result: list[int] = []
    # Entries along untracked axes of a run get spots of their own, so such axes are written out first.
    full = list(track.element.shape)
    runs = list(_runs(before, after))
    moving = [any(track.element.shape[a] > 1 for a in range(*source)) for source, _ in runs]
    extra = np.zeros((1,) * len(before), dtype=np.int64)
    count = 1
    for (source, target), moves in zip(runs, moving, strict=True):
        for axis in range(*source) if moves else ():
            if full[axis] == 1 and before[axis] > 1:
                along = np.arange(before[axis]).reshape([-1 if a == axis else 1 for a in range(len(before))])
                extra, count, full[axis] = extra * before[axis] + along, count * before[axis], before[axis]
        result += [after[a] if moves else 1 for a in range(*target)]
    element = np.broadcast_to(element, full).reshape(result)
    spot = (np.broadcast_to(spot, full) * count + np.broadcast_to(extra, full)).reshape(result)
    for axis in range(len(result)):
        element, spot = _without(element, spot, axis)
    return Track(element, np.unique(spot, return_inverse=True)[1].reshape(spot.shape))


def _without(element: Ints, spot: Ints, axis: int) -> tuple[Ints, Ints]:
    """Drop an axis to size 1 if channels move alike at each of its indices and never from one to another."""
    size = element.shape[axis]
    first = element.take([0], axis)
    if size == 1 or not bool((element == first).all()):
        return element, spot
    rows = np.moveaxis(spot, axis, 0).reshape(size, -1)
    labels = [np.unique(row, return_index=True, return_inverse=True) for row in rows]
    order = [np.argsort(np.argsort(index))[inverse.ravel()] for _, index, inverse in labels]
    alike = all(bool((row == order[0]).all()) for row in order)
    apart = len(np.unique(rows)) == sum(len(values) for values, _, _ in labels)
    return (first, spot.take([0], axis)) if alike and apart else (element, spot)


def _runs(before: tuple[int, ...], after: tuple[int, ...]) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Smallest runs of axes of equal product, as (start, stop) before and after."""
    i = j = 0
    while i < len(before) or j < len(after):
        first_i, first_j = i, j
        left, right = (before[i] if i < len(before) else 1), (after[j] if j < len(after) else 1)
        i, j = min(i + 1, len(before)), min(j + 1, len(after))
        while left != right:
            if left < right:
                left, i = left * before[i], i + 1
            else:
                right, j = right * after[j], j + 1
        yield (first_i, i), (first_j, j)
