"""Sets of channels whose order is free, found in the network itself, and folding a new order into its weights.

Permuting the outputs of one layer and the inputs of the next leaves the network's function as it is, but changes which
weights share a group of N:M. `find` proves such freedom operation by operation (`equivariance`) and gives up, layer by
layer and with the reason, wherever it can't.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, fx

from mpdeploy.errors import StageFailed
from mpdeploy.pruning.equivariance import Walk, layer_name
from mpdeploy.pruning.families import Ints


@dataclass(frozen=True)
class Member:
    """One axis of one stored tensor that moves with the channels.

    Args:
        tensor: name in the state dict.
        axis: the axis.
        start: offset of the first channel along that axis.
    """

    tensor: str
    axis: int
    start: int


@dataclass(frozen=True)
class Coupling:
    """Channels that may be reordered, and every place where they are stored.

    Groups of N:M must not straddle blocks, and start at a multiple of M in a consumer: the caller checks that
    size / blocks and each consumer's start are multiples of M.

    Args:
        name: readable, "blocks.0.mlp.fc1 -> blocks.0.mlp.fc2".
        kind: "residual", "attention value", "concatenated", or else "hidden" (into a linear layer) and "bottleneck"
            (into a convolution).
        size: number of channels.
        blocks: channels may move only inside each of this many equal consecutive blocks (attention heads); the order
            may differ from block to block.
        producers: rows of weights, biases, norms, positions: all that is not a consumer's input axis.
        consumers: input axes (axis 1) of linear and convolution weights.
    """

    name: str
    kind: str
    size: int
    blocks: int
    producers: tuple[Member, ...]
    consumers: tuple[Member, ...]


@dataclass(frozen=True)
class Found:
    """What `find` returns.

    Args:
        couplings: in the order in which the network meets their first consumer.
        refused: by layer, one sentence why the order of its inputs can't be changed; a layer with inputs in a coupling
            is not listed.
    """

    couplings: tuple[Coupling, ...]
    refused: Mapping[str, str]


def find(graph: fx.Graph, state: Mapping[str, Tensor]) -> Found:
    """Find every set of channels whose order is free.

    Args:
        graph: what `capture` returned.
        state: the module's state dict; only names, shapes and shared storage are looked at.

    Returns:
        Couplings with at least one consumer; no two move the same channel of a tensor.
    """
    walk = Walk(graph, state)
    locate = _Places(walk)
    parts: list[Coupling] = []
    for table in list(walk.families.tables.values()):
        part = _coupling(walk, locate, table)
        if part is None:
            continue
        scattered = locate.scattered(table)
        if scattered:
            walk.families.freeze(table.ravel(), f"they don't lie side by side in {scattered}")
        else:
            parts.append(part)
    rank = {consumer.weight: place for place, consumer in enumerate(walk.consumers)}
    parts.sort(key=lambda part: [(rank[m.tensor], m.start) for m in part.consumers[:1]])
    couplings = tuple(_named_apart(_joined(parts)))
    used = {member.tensor for coupling in couplings for member in coupling.consumers}
    refused = {c.layer: c.refused or _reason(walk, c.weight) for c in walk.consumers if c.weight not in used}
    return Found(couplings, refused)


class _Places:
    """Where each element is stored."""

    def __init__(self, walk: Walk) -> None:
        self.walk = walk
        count = walk.families.count
        self.owner, self.position = np.full(count, -1), np.full(count, -1)
        self.axes: list[tuple[str, int]] = []
        for stored in walk.stored.values():
            for axis, elements in stored.elements.items():
                self.owner[elements] = len(self.axes)
                self.position[elements] = np.arange(len(elements))
                self.axes.append((stored.name, axis))
        self.weights = {consumer.weight: consumer for consumer in walk.consumers}

    def axis_of(self, row: Ints) -> tuple[str, int]:
        """Tensor and axis that a table's row lies on."""
        return self.axes[int(self.owner[row[0]])]

    def member(self, row: Ints) -> Member:
        """The member of a table's row, whose channels are in order."""
        tensor, axis = self.axis_of(row)
        return Member(tensor, axis, int(self.position[row].min()))

    def is_consumer(self, row: Ints) -> bool:
        """Whether a table's row lies on the input axis of a layer."""
        tensor, axis = self.axis_of(row)
        return axis == 1 and tensor in self.weights

    def ordered(self, table: Ints) -> Ints | None:
        """The table with channels in the order of its first consumer, None if it has none."""
        first = next((row for row in table if self.is_consumer(row)), None)
        return None if first is None else table[:, np.argsort(self.position[first])]

    def scattered(self, table: Ints) -> str:
        """Name of a tensor in which the channels are not consecutive and in the common order, "" if there is none."""
        ordered = self.ordered(table)
        for row in table if ordered is None else ordered:
            if not bool((np.diff(self.position[row]) == 1).all()):
                return self.axis_of(row)[0]
        return ""


def _coupling(walk: Walk, locate: _Places, table: Ints) -> Coupling | None:
    """The coupling of one family; None if no layer takes its channels in."""
    ordered = locate.ordered(table)
    if ordered is None or table.shape[1] < 2:
        return None
    rank = {consumer.weight: place for place, consumer in enumerate(walk.consumers)}
    last = len(rank)
    members = [(locate.is_consumer(row), locate.member(row)) for row in ordered]
    members.sort(key=lambda item: (rank.get(item[1].tensor, last), item[1].tensor, item[1].axis, item[1].start))
    consumers = tuple(member for is_consumer, member in members if is_consumer)
    producers = tuple(member for is_consumer, member in members if not is_consumer)
    into_linear = locate.weights[consumers[0].tensor].kind == "linear"
    kind = _kind(walk, int(walk.families.family[table.flat[0]])) or ("hidden" if into_linear else "bottleneck")
    name = _name(producers, consumers, locate)
    return Coupling(name, kind, table.shape[1], 1, producers, consumers)


def _kind(walk: Walk, family: int) -> str:
    for kind, seen in (
        ("attention value", walk.attended), ("residual", walk.added), ("concatenated", walk.concatenated)
    ):  # fmt: skip
        if any(bool((walk.families.family[elements] == family).any()) for elements in seen):
            return kind
    return ""


def _name(producers: Sequence[Member], consumers: Sequence[Member], locate: _Places) -> str:
    source = next((layer_name(m.tensor) for m in producers if m.tensor in locate.weights), producers[0].tensor)
    targets = list(dict.fromkeys(layer_name(member.tensor) for member in consumers))
    more = f" and {len(targets) - 1} more" if len(targets) > 1 else ""
    return f"{source} -> {targets[0]}{more}"


def _joined(parts: Sequence[Coupling]) -> Iterator[Coupling]:
    """Join neighbours that lie one block further in every member, as attention heads do."""
    waiting: list[Coupling] = []
    for part in parts:
        for place, before in enumerate(waiting):
            if _follows(before, part):
                waiting[place] = replace(before, size=before.size + part.size, blocks=before.blocks + 1)
                break
        else:
            waiting.append(part)
    yield from waiting


def _follows(before: Coupling, part: Coupling) -> bool:
    def shifted(members: tuple[Member, ...]) -> tuple[Member, ...]:
        return tuple(replace(member, start=member.start + before.size) for member in members)

    same_size = before.size == before.blocks * part.size
    return same_size and (shifted(before.producers), shifted(before.consumers)) == (part.producers, part.consumers)


def _named_apart(couplings: Iterator[Coupling]) -> Iterator[Coupling]:
    """Number the names that occur again."""
    seen: dict[str, int] = {}
    for coupling in couplings:
        seen[coupling.name] = seen.get(coupling.name, 0) + 1
        again = f" ({seen[coupling.name]})" if seen[coupling.name] > 1 else ""
        yield replace(coupling, name=coupling.name + again)


def _reason(walk: Walk, weight: str) -> str:
    columns = walk.stored[weight].elements.get(1)
    why = "" if columns is None else next((why for why in map(walk.families.why, columns.tolist()) if why), "")
    return f"The order of its inputs is fixed: {why}." if why else "It has a single input."


def fold(state: Mapping[str, Tensor], coupling: Coupling, order: Tensor) -> None:
    """Permute the channels of a coupling at every place where they are stored, in place.

    Args:
        state: the module's own tensors by name, as `state_dict()` returns them.
        coupling: what `find` found in this module.
        order: int64 [size]; channel i becomes what channel order[i] was.

    Raises:
        StageFailed: the order is no permutation, moves a channel out of its block, or a tensor is missing.
    """
    width = coupling.size // coupling.blocks
    block = torch.arange(coupling.size) // width
    if order.shape != block.shape or not torch.equal(order.sort().values.cpu(), torch.arange(coupling.size)):
        raise StageFailed(f"The order for {coupling.name} is no permutation of its {coupling.size} channels.")
    if not torch.equal(order.cpu() // width, block):
        raise StageFailed(f"The order for {coupling.name} moves a channel out of its block of {width}.")
    members = (*coupling.producers, *coupling.consumers)
    missing = next((member.tensor for member in members if member.tensor not in state), None)
    if missing is not None:
        raise StageFailed(f"The state dict lacks {missing}, which moves with {coupling.name}.")
    with torch.no_grad():
        for member in members:
            part = state[member.tensor].narrow(member.axis, member.start, coupling.size)
            part.copy_(part.index_select(member.axis, order.to(part.device)))
