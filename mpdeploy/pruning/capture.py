"""The network as a graph of operations, and streams of calibration images that walk through it once.

Pruning layer by layer needs, at each layer, the inputs from the network as pruned so far. Running the network again
from its start for each of 48 layers would dominate everything else. A stream instead keeps, for every batch, the few
tensors that are alive between two layers and goes on from there: each operation runs once.
"""

import copy
import operator
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from mpdeploy.errors import StageFailed

TRACE_BATCH = 2  # torch.export treats 0 and 1 as constants
LINEAR = torch.ops.aten.linear.default
CONV2D = (torch.ops.aten.conv2d.default, torch.ops.aten.conv2d.padding)
BATCH_NORM = torch.ops.aten.batch_norm.default


def capture(module: nn.Module, input_size: tuple[int, int, int]) -> fx.Graph:
    """Capture a network's operations by torch.export, with any number of images per batch.

    The graph is in ATen operations before decomposition (linear, conv2d, layer_norm, scaled_dot_product_attention stay
    one node each); parameters and buffers are `get_attr` nodes whose targets are their names in `state_dict()`.

    Args:
        module: the network in eval mode; the meta device is enough.
        input_size: channels, height, width.

    Raises:
        StageFailed: the network can't be captured for any batch size.
    """
    first = next(module.parameters(), None)
    if first is None:
        raise StageFailed("The network has no parameters: there is nothing to prune.")
    images = torch.zeros(TRACE_BATCH, *input_size, device=first.device, dtype=first.dtype)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            batch = ({0: torch.export.Dim.AUTO},)
            exported = torch.export.export(module.eval(), (images,), dynamic_shapes=batch, strict=False)
            graph = exported.module(check_guards=False).graph
    except Exception as error:  # torch.export raises many types, its own and the module's
        raise StageFailed(
            f"The network could not be captured with images of {'x'.join(map(str, input_size))}: "
            f"{str(error).splitlines()[0]}",
            hint="torch.export must be able to trace it; data-dependent Python control flow is the usual reason.",
        ) from error
    placeholder = next(node for node in graph.nodes if node.op == "placeholder")
    size = placeholder.meta["val"].shape[0]
    if isinstance(size, int) or size.node.maybe_as_int() is not None:
        raise StageFailed(
            "The network fixes the number of images per batch, so calibration batches can't be run.",
            hint="reshape with -1 for the batch axis.",
        )
    return graph


def weight_name(node: fx.Node) -> str | None:
    """Name of the parameter that a linear or conv2d operation multiplies its input with, or None for others."""
    if node.op != "call_function" or node.target not in (LINEAR, *CONV2D):
        return None
    weight = node.args[1]
    return str(weight.target) if isinstance(weight, fx.Node) and weight.op == "get_attr" else None


def layer_nodes(graph: fx.Graph, names: Sequence[str]) -> dict[str, fx.Node]:
    """The operation of each named layer, in execution order.

    Raises:
        StageFailed: a layer's stored weight is not an operand of exactly one linear or conv2d operation.
    """
    wanted = {f"{name}.weight": name for name in names}
    found: dict[str, list[fx.Node]] = {name: [] for name in names}
    for node in graph.nodes:
        name = weight_name(node)
        if name in wanted:
            found[wanted[name]].append(node)
    for name, nodes in found.items():
        if len(nodes) != 1:
            raise StageFailed(f"The captured network uses the stored weight of layer {name!r} {len(nodes)} times.")
    order = {node: place for place, node in enumerate(graph.nodes)}
    return dict(sorted(((name, nodes[0]) for name, nodes in found.items()), key=lambda item: order[item[1]]))


def state_of(module: nn.Module, graph: fx.Graph) -> dict[str, Tensor]:
    """Every tensor that the captured network reads by name: the module's own, so changes to it take effect.

    Args:
        module: the network that was captured.
        graph: what `capture` returned; constants that it holds beside parameters and buffers are included.
    """
    found = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for node in graph.nodes:
        if node.op == "get_attr" and str(node.target) not in found:
            found[str(node.target)] = operator.attrgetter(str(node.target))(graph.owning_module)
    return {name: tensor.detach() for name, tensor in found.items()}


class Stream:
    """Batches of images on their way through a captured network.

    Args:
        graph: what `capture` returned.
        state: parameters and buffers by name; read when an operation runs, so changes take effect downstream.
        batches: images, each [b, C, H, W]; copied as they enter, because a network may write into its input.
    """

    def __init__(self, graph: fx.Graph, state: Mapping[str, Tensor], batches: Sequence[Tensor]) -> None:
        self.nodes = list(graph.nodes)
        self.place = {node: place for place, node in enumerate(self.nodes)}
        self.state = state
        self.done = 0
        self.last_use = {
            node: max((self.place[user] for user in node.users), default=place) for node, place in self.place.items()
        }
        device = next(iter(state.values())).device
        entry = next(node for node in self.nodes if node.op == "placeholder")
        self.values: list[dict[fx.Node, Any]] = [{entry: batch.to(device, copy=True)} for batch in batches]

    def advance(self, to: fx.Node, *, through: bool = False) -> None:
        """Run all operations before `to` (and `to` itself if `through`) on every batch, and free what is done with."""
        end = self.place[to] + through
        with torch.no_grad():
            for values in self.values:
                for place in range(self.done, end):
                    self._run(self.nodes[place], values)
                    for used in self.nodes[place].all_input_nodes:
                        if self.last_use[used] == place:
                            values.pop(used, None)
        self.done = max(self.done, end)

    def branch(self) -> "Stream":
        """A second stream at the same place; both go on from here on their own."""
        other = copy.copy(self)
        # Copied, as operations may write in place; with one memo, so that views stay views of the same storage.
        other.values = []
        for values in self.values:
            memo: dict[int, Any] = {}
            other.values.append({node: copy.deepcopy(value, memo) for node, value in values.items()})
        return other

    def _run(self, node: fx.Node, values: dict[fx.Node, Any]) -> None:
        if node.op == "call_function":
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda used: self._value(used, values))
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        elif node.op not in ("placeholder", "get_attr", "output"):
            raise StageFailed(f"The captured network calls {node.target}, which can't be walked through.")

    def _value(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        return self.state[str(node.target)] if node.op == "get_attr" else values[node]

    def argument(self, node: fx.Node, index: int) -> list[Tensor]:
        """Value of an operation's argument on each batch; the stream stands right before or after the operation."""
        wanted = node.args[index]
        if not isinstance(wanted, fx.Node):
            raise StageFailed(f"Argument {index} of {node.name} is no value that the network computes.")
        return [self._value(wanted, values) for values in self.values]

    def output(self, node: fx.Node) -> list[Tensor]:
        """Value of an operation on each batch, where a later operation still needs it."""
        return [values[node] for values in self.values]


def alive_bytes(graph: fx.Graph) -> int:
    """Most bytes per image that a stream keeps between two operations: the memory bound of a walk.

    Views count in full, so this is an upper bound.
    """
    nodes = list(graph.nodes)
    place = {node: index for index, node in enumerate(nodes)}
    change = [0] * (len(nodes) + 1)
    for node in nodes:
        size = 0 if node.op == "get_attr" else _bytes_per_image(node.meta.get("val"))
        change[place[node]] += size
        change[max((place[user] for user in node.users), default=place[node])] -= size
    most = alive = 0
    for step in change:
        alive += step
        most = max(most, alive)
    return most


def _bytes_per_image(value: Any) -> int:
    if isinstance(value, list | tuple):
        return sum(map(_bytes_per_image, value))
    if not isinstance(value, Tensor):
        return 0
    sizes = [size if isinstance(size, int) else int(size.node.hint) for size in value.shape]
    entries = 1
    for size in sizes:
        entries *= size
    return -(-entries // TRACE_BATCH) * value.element_size()
