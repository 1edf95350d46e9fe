"""Multiply-accumulates of one forward pass, counted from the traced shapes and not from a table."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mpdeploy.errors import StageFailed
from mpdeploy.pruning.layers import UNSTRUCTURED, Layer, trace
from mpdeploy.pruning.patterns import Pattern


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates per image.

    Args:
        total: `other` plus all of `layers`.
        layers: by layer name, every called Linear and Conv2d.
        other: products outside those modules: attention scores and values, functional linears.
    """

    total: int
    layers: dict[str, int]
    other: int

    def after(self, layers: Sequence[Layer]) -> int:
        """Multiply-accumulates left when each pruned layer works only on the weights that its pattern keeps.

        Zeros that lie anywhere save nothing: no engine leaves them out.

        Args:
            layers: what `choose` returned for the same network.
        """
        saved = 0
        for layer in layers:
            if layer.pattern not in ("", UNSTRUCTURED):
                pattern = Pattern.parse(layer.pattern)
                saved += self.layers[layer.name] * (pattern.group - pattern.keep) // pattern.group
        return self.total - saved


def count(module: nn.Module, input_size: tuple[int, int, int]) -> Macs:
    """Count the multiply-accumulates of one image.

    Convolutions and matrix products count (half of torch's floating-point operations); biases, normalisations,
    activations and the softmax don't, as is usual.

    Args:
        module: the network in eval mode; the meta device is enough.
        input_size: channels, height, width.

    Raises:
        StageFailed: the network can't be traced, or the two counts contradict each other.
    """
    # The counter doesn't know the fused attention of every device; the plain one is matrix products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        traced = trace(module, input_size)
    layers = {name: traced.macs(name) for name, use in traced.uses.items() if use.calls}
    total = counter.get_total_flops() // 2
    other = total - sum(layers.values())
    if other < 0:
        raise StageFailed(
            f"The layers alone need {sum(layers.values())} multiply-accumulates, but all operations of the traced "
            f"network only {total}: a layer runs through an operation that the counter doesn't know."
        )
    return Macs(total=total, layers=layers, other=other)
