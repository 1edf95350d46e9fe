"""Where inside a network its outputs are compared with the dense network's: the blocks of its longest chain."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mpdeploy.errors import RecipeError


class Tapped(nn.Module):
    """A network that also returns what some of its modules put out.

    Args:
        network: takes images [b, C, H, W], returns logits [b, K].
        blocks: names of modules inside it, each called once per forward pass and returning one tensor.
    """

    def __init__(self, network: nn.Module, blocks: Sequence[str] = ()) -> None:
        super().__init__()
        self.network = network
        self._seen: list[Tensor] = []
        self._hooks = [network.get_submodule(name).register_forward_hook(self._note) for name in blocks]

    def _note(self, _module: nn.Module, _inputs: object, output: Tensor) -> None:
        self._seen.append(output)

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return logits [b, K] and the blocks' outputs in the order in which they run."""
        self._seen = []
        logits = self.network(images)
        seen, self._seen = tuple(self._seen), []
        return logits, seen

    def release(self) -> None:
        """Take the hooks off the network."""
        for hook in self._hooks:
            hook.remove()


def find_blocks(network: nn.Module, image: Tensor) -> tuple[str, ...]:
    """Name the blocks of the longest ModuleList or Sequential whose children put out tensors of one shape.

    These are a ViT's blocks (tokens) and a ResNet's longest stage (feature maps). A child that is a single layer is no
    block. Of chains that are equally long all are taken, as the four stages of a ResNet-18.

    Args:
        network: in eval mode.
        image: one image [1, C, H, W] on the network's device.

    Raises:
        RecipeError: there is no such chain of two blocks or more.
    """
    chains = {
        name: {f"{name}.{key}" if name else key: child for key, child in module.named_children()}
        for name, module in network.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
    }
    chains = {
        name: blocks
        for name, blocks in chains.items()
        if len(blocks) > 1 and all(any(True for _ in block.children()) for block in blocks.values())
    }
    shapes = _output_shapes(network, {k: m for blocks in chains.values() for k, m in blocks.items()}, image)
    alike = [blocks for blocks in chains.values() if _one_shape([shapes[name] for name in blocks])]
    longest = max(map(len, alike), default=0)
    if not longest:
        raise RecipeError(
            "Features can't be matched: the network has no chain of blocks whose outputs have one shape.",
            hint="set tune.feature_weight = 0.",
        )
    return tuple(name for blocks in alike if len(blocks) == longest for name in blocks)


def _one_shape(calls: Sequence[Sequence[object]]) -> bool:
    """Tell whether each of some modules was called once, and all returned one tensor of the same shape."""
    return all(len(call) == 1 and call[0] is not None and call == calls[0] for call in calls)


def _output_shapes(network: nn.Module, modules: Mapping[str, nn.Module], image: Tensor) -> dict[str, list[object]]:
    """Run one image; return for each module the output's shape of each call, None where it is no tensor."""
    shapes: dict[str, list[object]] = {name: [] for name in modules}
    hooks = [
        module.register_forward_hook(
            lambda _module, _inputs, output, name=name: shapes[name].append(
                tuple(output.shape) if isinstance(output, Tensor) else None
            )
        )
        for name, module in modules.items()
    ]
    try:
        with torch.no_grad():
            network(image)
    finally:
        for hook in hooks:
            hook.remove()
    return shapes
