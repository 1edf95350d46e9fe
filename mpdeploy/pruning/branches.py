"""Where a layer's output lands: a BatchNorm that settles its mean, a residual stream whose sum can be repaired."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from mpdeploy.pruning.capture import BATCH_NORM, Stream

ADD = ("aten.add.Tensor", "aten.add_.Tensor")
MUL = ("aten.mul.Tensor", "aten.mul_.Tensor")
PASSES = ("aten.dropout.default", "aten.clone.default", "aten.contiguous.default")
SMALL = 1e-2  # channels whose scale is below this share of the largest don't try to repair the sum


@dataclass(frozen=True)
class Landing:
    """What happens to a layer's output.

    Args:
        norm: name of the BatchNorm that alone reads it ("layer1.0.bn1"), or "".
        other: the operation whose value it is added to, if that is known before the layer runs; else None.
        scale: name of the per-channel factor before the sum (LayerScale), or "".
    """

    norm: str = ""
    other: fx.Node | None = None
    scale: str = ""

    def wanted(self, dense: Stream, pruned: Stream, outputs: list[Tensor]) -> list[Tensor]:
        """What the layer should give on each batch: the dense outputs, and what the residual stream lacks before it."""
        if self.other is None:
            return outputs
        theirs, ours = dense.output(self.other), pruned.output(self.other)
        factor = dense.state[self.scale] if self.scale else None
        return [y + _per_scale(d - p, factor) for y, d, p in zip(outputs, theirs, ours, strict=True)]


def _per_scale(lack: Tensor, factor: Tensor | None) -> Tensor:
    if factor is None:
        return lack
    usable = factor.abs() > SMALL * factor.abs().max()
    return lack * (usable / torch.where(usable, factor, torch.ones_like(factor)))


def norm_name(node: fx.Node) -> str:
    """Name of the BatchNorm module behind an operation that normalises with running statistics, or ""."""
    if node.target is not BATCH_NORM or not isinstance(node.args[3], fx.Node):
        return ""
    return str(node.args[3].target).removesuffix(".running_mean")


def landing(graph: fx.Graph, node: fx.Node, state: Mapping[str, Tensor]) -> Landing:
    """Follow a linear or conv2d operation's output as far as it has one reader.

    Args:
        graph: the captured network.
        node: the operation.
        state: tensors by name.
    """
    place = {other: index for index, other in enumerate(graph.nodes)}
    current, found = node, Landing()
    while len(current.users) == 1:
        user = next(iter(current.users))
        kind = str(user.target)
        operands = [argument for argument in user.args[:2] if isinstance(argument, fx.Node)]
        if kind in ADD and len(operands) == 2 and not user.kwargs:
            other = operands[1] if operands[0] is current else operands[0]
            same = other.op == "call_function" and other.meta["val"].shape == node.meta["val"].shape
            return replace(found, other=other) if same and place[other] < place[node] else found
        if current is node and (norm := norm_name(user)):
            # Repairing the sum behind a BatchNorm cost EfficientNet-Lite0 two labels in five that it kept without.
            return Landing(norm=norm)
        if kind in MUL and not found.scale and len(operands) == 2:
            factor = operands[1] if operands[0] is current else operands[0]
            if factor.op != "get_attr" or state[str(factor.target)].shape != node.meta["val"].shape[-1:]:
                break
            found = Landing(scale=str(factor.target))
        elif kind not in PASSES:
            break
        current = user
    # A factor that leads to no sum means nothing.
    return replace(found, scale="")
