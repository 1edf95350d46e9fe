"""What the layers of a network really get as inputs: means and second moments, streamed over calibration images."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpdeploy.errors import StageFailed
from mpdeploy.pruning.layers import WatchedOperations, plain_attention, weight_of

SLICE = 1 << 23  # input entries copied at a time: 32 MiB of float32


class Moments:
    """Streaming mean and scatter of a layer's inputs.

    Each slice's products are taken in float32 about the first slice's mean and summed in float64, so an entry of the
    scatter is good to about 1e-6 of sqrt(C_ii C_jj) even where the mean dwarfs the spread.

    Args:
        scatter: whether products are needed, or only the mean.
    """

    def __init__(self, *, scatter: bool) -> None:
        self.with_scatter = scatter
        self.count = 0
        self._shift = self._sum = self._products = torch.empty(0)

    def add(self, rows: Tensor) -> None:
        """Take in inputs, [any number, inputs]."""
        inputs = rows.shape[1]
        if not self.count:
            self._shift = rows.mean(dim=0)
            self._sum = rows.new_zeros(inputs, dtype=torch.float64)
            if self.with_scatter:
                self._products = rows.new_zeros(inputs, inputs, dtype=torch.float64)
        shifted = rows - self._shift
        self.count += len(rows)
        self._sum += shifted.sum(dim=0, dtype=torch.float64)
        if self.with_scatter:
            self._products += shifted.T @ shifted

    @property
    def mean(self) -> Tensor:
        """Mean input, float64 [inputs]."""
        return self._shift.double() + self._sum / self.count

    def centred(self) -> Tensor:
        """Scatter about the mean, sum of (x - mean)(x - mean)^T, float64 [inputs, inputs]."""
        return self._products - torch.outer(self._sum, self._sum) / self.count

    def power(self) -> Tensor:
        """Sum of squares of each input, float64 [inputs]: the diagonal of H = X X^T."""
        return self._products.diagonal() - self._sum**2 / self.count + self.count * self.mean**2


class _Enough(Exception):
    """All inputs asked for have been seen."""


class _Collector(WatchedOperations):
    """Feeds the inputs of the named weights to their moments and ends the forward pass after the last of them."""

    def __init__(self, weights: dict[str, Tensor], moments: dict[str, Moments]) -> None:
        super().__init__()
        self.names = {id(weight): name for name, weight in weights.items()}
        self.moments = moments
        self.waiting = set(weights)

    def seen(self, operation: str, arguments: dict[str, Any]) -> None:
        name = self.names.get(id(arguments["weight"]))
        if name is None:
            return
        for rows in linear_rows(arguments) if operation == "linear" else convolution_rows(arguments):
            self.moments[name].add(rows)
        self.waiting.discard(name)
        if not self.waiting:
            raise _Enough


def linear_rows(arguments: dict[str, Any]) -> Iterator[Tensor]:
    """Inputs of a linear operation as [tokens, inputs], in slices."""
    rows = arguments["input"].reshape(-1, arguments["input"].shape[-1])
    yield from rows.split(max(1, SLICE // rows.shape[1]))


def convolution_rows(arguments: dict[str, Any]) -> Iterator[Tensor]:
    """Patches that an ungrouped convolution meets with its [O, I*kh*kw] weight, [positions, I*kh*kw], in slices."""
    images, kernel = arguments["input"], arguments["weight"].shape[2:]
    padding, dilation = arguments.get("padding", 0), arguments.get("dilation", 1)
    dilations = (dilation, dilation) if isinstance(dilation, int) else tuple(dilation)
    if isinstance(padding, str):
        if padding == "same":
            extents = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
            images = F.pad(images, [side for e in reversed(extents) for side in (e // 2, e - e // 2)])
        padding = 0
    per_image = images[0].numel() * kernel.numel()
    for some in images.split(max(1, SLICE // per_image)):
        patches = F.unfold(some, tuple(kernel), dilations, padding, arguments.get("stride", 1))
        yield patches.transpose(1, 2).reshape(-1, patches.shape[1])


def collect(
    module: nn.Module, batches: Sequence[Tensor], names: Sequence[str], *, scatter: bool, tick: Callable[[], None]
) -> dict[str, Moments]:
    """Run the batches through the network and return the moments of the named layers' inputs.

    Raises:
        StageFailed: a layer is never reached, or its inputs are NaN or infinite.
    """
    weights = {name: weight_of(module.get_submodule(name)) for name in names}
    moments = {name: Moments(scatter=scatter) for name in names}
    device = next(iter(weights.values())).device
    for batch in batches:
        collector = _Collector(weights, moments)
        try:
            with torch.no_grad(), plain_attention(), collector:
                module(batch.to(device))
        except _Enough:
            pass
        else:
            raise StageFailed(f"The calibration pass never reached the layer {sorted(collector.waiting)[0]!r}.")
        tick()
    for name, moment in moments.items():
        # A NaN or infinity anywhere in the inputs ends up in the sum.
        if not bool(torch.isfinite(moment.mean).all() and torch.isfinite(moment._products).all()):
            raise StageFailed(f"The inputs of layer {name!r} hold NaN or infinity on the calibration images.")
    return moments


def output_error(weight: Tensor, dense: Tensor, held: Moments, shift: Tensor | None) -> float | None:
    """Relative squared output error sum |W_hat x + c - W x|^2 / sum |W x|^2 over held-out inputs, from their moments.

    Args:
        weight: pruned weights, [O, inputs].
        dense: dense weights, [O, inputs].
        held: moments of the held-out inputs.
        shift: c, [O], that the bias correction adds, or None.

    Returns:
        The error, or None where the dense output is zero and there is no error to speak of.
    """
    scatter, mean = held.centred(), held.mean
    change, reference = weight.double() - dense.double(), dense.double()
    offset = change @ mean + (0 if shift is None else shift)
    energy = ((reference @ scatter) * reference).sum() + held.count * (reference @ mean).square().sum()
    wrong = ((change @ scatter) * change).sum() + held.count * offset.square().sum()
    return float(wrong / energy) if bool(energy > 0) else None
