"""What a layer gets and what it should give: second moments, streamed over calibration images in bounded memory."""

from collections.abc import Iterator

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from mpdeploy.pruning.capture import LINEAR

SLICE = 1 << 24  # input entries copied at a time: 64 MiB of float32
STRIPES = 4  # a symmetric product is taken in this many stripes, each from its diagonal on: 5/8 of the work


class Moments:
    """Streaming joint moments of a layer's inputs x and its wanted outputs y.

    Products of a slice are taken in float32 about the first slice's means and summed in float64, so an entry of the
    scatter is good to about 1e-6 of sqrt(C_ii C_jj) even where a mean dwarfs the spread. Memory: 8 m^2 + 8 n m bytes
    for m inputs and n outputs, whatever the number of images.

    Args:
        through: weights [n, m] where the wanted outputs are these times other inputs, the causes, plus a constant. The
            products are then taken with the causes, which is cheaper where n > m.
    """

    def __init__(self, through: Tensor | None = None) -> None:
        self.count = 0
        self.through = through
        self._x0 = self._y0 = self._c0 = self._x = self._y = self._c = torch.empty(0)
        self._xx = self._cx = self._yy = torch.empty(0)

    def add(self, inputs: Tensor, outputs: Tensor, causes: Tensor | None = None) -> None:
        """Take in rows: inputs [r, m], the outputs [r, n] that are wanted for them, and the causes [r, m] if any."""
        causes = outputs if self.through is None or causes is None else causes
        if not self.count:
            self._x0, self._y0, self._c0 = (rows.mean(dim=0) for rows in (inputs, outputs, causes))
            m, n, k = inputs.shape[1], outputs.shape[1], causes.shape[1]
            self._x, self._c = (inputs.new_zeros(size, dtype=torch.float64) for size in (m, k))
            self._y, self._yy = (inputs.new_zeros(n, dtype=torch.float64) for _ in range(2))
            self._xx, self._cx = (inputs.new_zeros(size, m, dtype=torch.float64) for size in (m, k))
        x, y, c = inputs - self._x0, outputs - self._y0, causes - self._c0
        self.count += len(x)
        self._x += x.sum(dim=0, dtype=torch.float64)
        self._y += y.sum(dim=0, dtype=torch.float64)
        self._yy += y.square().sum(dim=0, dtype=torch.float64)
        self._c += c.sum(dim=0, dtype=torch.float64)
        self._cx += c.T @ x
        stripe = -(-x.shape[1] // STRIPES)
        for first in range(0, x.shape[1], stripe):
            last = first + stripe
            self._xx[first:last, first:] += x[:, first:last].T @ x[:, first:]

    @property
    def mean(self) -> Tensor:
        """Mean input, float64 [m]."""
        return self._x0.double() + self._x / self.count

    @property
    def goal_mean(self) -> Tensor:
        """Mean wanted output, float64 [n]."""
        return self._y0.double() + self._y / self.count

    def centred(self) -> Tensor:
        """Scatter of the inputs about their mean, float64 [m, m], symmetric."""
        upper = self._xx.triu()
        scatter = upper + upper.triu(1).T
        return scatter.sub_(torch.outer(self._x, self._x / self.count))

    def cross(self) -> Tensor:
        """Joint scatter of wanted outputs and inputs about their means, float64 [n, m]."""
        product = self._cx - torch.outer(self._c, self._x / self.count)
        return product if self.through is None else self.through.double() @ product

    def goal_spread(self) -> Tensor:
        """Scatter of each wanted output about its mean, float64 [n]."""
        return self._yy - self._y.square() / self.count

    def power(self) -> Tensor:
        """Sum of squares of each input, float64 [m]: the diagonal of H = X X^T."""
        return (self._xx.diagonal() - self._x.square() / self.count).clamp_min(0) + self.count * self.mean.square()

    def finite(self) -> bool:
        """Whether no NaN or infinity was among the rows: one of them anywhere ends up in the sums."""
        return all(bool(torch.isfinite(values).all()) for values in (self.mean, self._cx, self._yy))


def layer_rows(node: fx.Node, inputs: Tensor, outputs: Tensor, keep: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and outputs of a linear or ungrouped conv2d operation, position by position, in slices of bounded size.

    Args:
        node: the captured operation.
        inputs: what it got: [b, ..., m] or images [b, I, H, W].
        outputs: what it is to give: [b, ..., n] or [b, O, H', W'].
        keep: positions (tokens, pixels) used per image; drawn by `seed` where there are more.
        seed: decides the draw, which every image of the batch shares.

    Yields:
        (inputs [r, m], outputs [r, n]). For a convolution m is kh*kw*I, kernel positions slowest: the order in which
        groups of input channels are contiguous, and that of `as_rows(weight).reshape(O, m)`.
    """
    is_linear = node.target is LINEAR
    wanted = outputs.reshape(len(outputs), -1, outputs.shape[-1]) if is_linear else outputs.flatten(2).transpose(1, 2)
    positions = wanted.shape[1]
    chosen = None
    if positions > keep:
        order = torch.randperm(positions, generator=torch.Generator().manual_seed(seed))
        chosen = order[:keep].sort().values.to(inputs.device)
    per_image = positions * (inputs.shape[-1] if is_linear else inputs.shape[1] * _area(node))
    step = max(1, SLICE // per_image)
    for images, goals in zip(torch.split(inputs, step), torch.split(wanted, step), strict=True):
        rows = images.reshape(len(images), -1, images.shape[-1]) if is_linear else patches(node, images)
        if chosen is not None:
            rows, goals = rows[:, chosen], goals[:, chosen]
        yield rows.flatten(0, 1), goals.flatten(0, 1)


def _area(node: fx.Node) -> int:
    return int(node.args[1].meta["val"].shape[2:].numel())  # type: ignore[union-attr]


def patches(node: fx.Node, images: Tensor) -> Tensor:
    """Patches that an ungrouped convolution meets with its weight: [b, positions, kh*kw*I]."""
    kernel = tuple(node.args[1].meta["val"].shape[2:])  # type: ignore[union-attr]
    stride, padding, dilation = (
        node.args[place] if len(node.args) > place else default for place, default in ((3, 1), (4, 0), (5, 1))
    )
    if isinstance(padding, str):
        if padding == "same":
            dilations = (dilation, dilation) if isinstance(dilation, int) else dilation
            extents = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]  # type: ignore[arg-type]
            images = F.pad(images, [side for e in reversed(extents) for side in (e // 2, e - e // 2)])
        padding = 0
    found = F.unfold(images, kernel, dilation, padding, stride)  # type: ignore[arg-type]
    grouped = found.reshape(len(images), images.shape[1], -1, found.shape[-1])
    return grouped.permute(0, 3, 2, 1).flatten(2)
