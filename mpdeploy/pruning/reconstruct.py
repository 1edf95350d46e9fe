"""Block-wise reconstruction without labels: a pruned block learns the dense block's output from the pruned inputs.

Source: Y. Li et al., "BRECQ: pushing the limit of post-training quantization by block reconstruction", 2021. Masks stay
as they are; kept weights, biases and per-channel factors move, running statistics of a BatchNorm do not.

Measured after the refit of `solve` (2:4, error of the blocks on held-out images; rms logit change over rms logit and
share of equal labels on validation images; one seed):

* Fashion-MNIST ViT, 256 images, 200 steps: errors fall by 12 to 28 %; .0215 -> .0188, 99.6 -> 99.7 % of 1000.
* ViT-S on solar cells, 512 images (pruned with 128), 100 steps: errors fall by 0 to 9 %, the logits come no closer:
  .209 -> .219, 96.5 -> 97.5 % of 200 (two images). With the 128 images alone and a third of the step size errors fall
  by 0 to 3 %: the refit has fitted those already (error of block 4: .0063 on fitted, .0155 on held-out images).

So a large network needs more images than the refit saw, and lower block errors need not mean closer logits.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from mpdeploy.errors import StageFailed
from mpdeploy.pruning.capture import Stream, layer_nodes, state_of
from mpdeploy.pruning.solve import split_images

MINIBATCH = 16  # 200 steps of 16 images left less error than 100 of 32, in the same time
CHECKS = 5  # looks at the held-out images along the way
LR = 1e-2  # first Adam step, as a share of each parameter's root mean square; 0.03 was too large for a block of a ViT-S
ADD = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)


@dataclass(frozen=True)
class BlockResult:
    """What reconstruction did to one block.

    Errors are squared errors of the block's output on held-out images, over the energy of the dense output. The same
    images choose the step that is kept, so `error_after` is slightly optimistic.

    Args:
        name: first..last pruned layer.
        layers: its pruned layers.
        error_before: with the weights as they came; None where the dense output is zero.
        error_after: with the weights left in the module; never above `error_before`.
        steps: the step whose weights were kept, 0 where none was better.
        note: full sentences on anything unusual, or "".
    """

    name: str
    layers: tuple[str, ...]
    error_before: float | None
    error_after: float | None
    steps: int
    note: str


@dataclass(frozen=True)
class Block:
    """A stretch of the captured network, from behind the block before it.

    Args:
        end: the operation that gives its output.
        layers: the pruned layers inside, in execution order.
        parameters: names of the tensors that it reads and no other part of the network does, nor under another name.
    """

    end: fx.Node
    layers: tuple[str, ...]
    parameters: frozenset[str]


def reconstruct(
    module: nn.Module,
    graph: fx.Graph,
    dense_state: Mapping[str, Tensor],
    batches: Sequence[Tensor],
    masks: Mapping[str, Tensor],
    *,
    steps: int,
    seed: int,
    progress: Callable[[int, int], None],
) -> list[BlockResult]:
    """Fit each block of a pruned network to the dense one, in place and in execution order.

    Blocks learn one after the other from what the blocks before them, already fitted, give them. Of the images every
    fourth is held out: it fits nothing and chooses the step that is kept, so no block's held-out error rises.

    Memory, beside two copies of the network: two tensors per image, the block's input in the pruned network and its
    output in the dense one; `capture.alive_bytes` per image while a walk goes on inside a block; what autograd keeps of
    one block for 16 images; four copies of one block's parameters.

    Args:
        module: the pruned network; it is put into eval mode; the work is done on its device.
        graph: what `capture.capture` returned for it.
        dense_state: the dense network's tensors by name, in the pruned network's order of channels: what
            `capture.state_of` gave before pruning, cloned. It is only read.
        batches: preprocessed calibration images, float32 [b, C, H, W]; at least 4 images in all.
        masks: of each pruned layer's weight by layer name, boolean, true where a weight stays.
        steps: Adam steps per block, with cosine decay.
        seed: decides the minibatches.
        progress: told (blocks done, blocks in all).

    Returns:
        One result per block that holds a pruned layer, in execution order.

    Raises:
        StageFailed: images are too few, a weight outside its mask is not zero, the dense
            state lacks a tensor or is not a copy, or a block's output is NaN or infinite.
    """
    fitting, held = (torch.split(torch.cat(parts), MINIBATCH) for parts in split_images(batches))
    module.eval()
    state = state_of(module, graph)
    _check(state, dense_state, masks)
    pruned, dense = (Stream(graph, some, [*fitting, *held]) for some in (state, dense_state))
    plan = blocks(graph, list(masks), state)
    learnable = {name for name, parameter in module.named_parameters() if parameter.is_floating_point()}
    results = []
    for place, block in enumerate(plan):
        dense.advance(block.end, through=True)
        fit = _Fit(pruned, block, dense.output(block.end), len(fitting), masks, learnable)
        results.append(fit.run(steps, seed + place))
        pruned.advance(block.end, through=True)
        progress(place + 1, len(plan))
    return results


def _check(state: Mapping[str, Tensor], dense_state: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Refuse dense tensors that training would change, and weights that the masks do not describe."""
    for name, tensor in state.items():
        if name not in dense_state or (tensor.numel() and dense_state[name].data_ptr() == tensor.data_ptr()):
            raise StageFailed(
                f"The dense state holds no copy of {name!r}.", hint="clone what capture.state_of gives before pruning."
            )
    for name, mask in masks.items():
        weight = state[f"{name}.weight"]
        if mask.shape != weight.shape or bool(weight[~mask.to(weight.device)].any()):
            raise StageFailed(f"The weight of layer {name!r} is not zero outside its mask.", hint="prune it first.")


def cut_points(graph: fx.Graph) -> list[fx.Node]:
    """Operations after which their output is the only tensor alive that depends on the image.

    Only residual sums, if there are any; of several inside one module (attention and MLP of a transformer block) the
    last.
    """
    nodes = [node for node in graph.nodes if node.op != "output"]
    place = {node: index for index, node in enumerate(graph.nodes)}
    carries = _depend_on_the_image(nodes)
    values = [n for n in nodes if n in carries and not isinstance(n.meta.get("val"), int | torch.SymInt)]
    images = str(values[0].meta["val"].shape[:1])
    last = {node: max((place[user] for user in node.users), default=place[node]) for node in values}
    found = []
    alive: list[fx.Node] = []
    for node in values:
        alive = [other for other in alive if last[other] > place[node]] + [node]
        value = node.meta.get("val")
        # Minibatches are drawn by image, but windows of several images may share the first axis.
        by_image = isinstance(value, Tensor) and str(value.shape[:1]) == images
        if alive == [node] and by_image and node.op == "call_function":
            found.append(node)
    joins = [node for node in found if node.target in ADD and sum(used in carries for used in node.all_input_nodes) > 1]
    owners = [*map(_owner, joins), ""]
    return [node for at, node in enumerate(joins) if not owners[at] or owners[at] != owners[at + 1]] or found


def _depend_on_the_image(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    carries: set[fx.Node] = set()
    for node in nodes:
        if node.op == "placeholder" or any(used in carries for used in node.all_input_nodes):
            carries.add(node)
    return carries


def _owner(node: fx.Node) -> str:
    """Path of the module whose `forward` runs an operation; "" for the network itself."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]) if stack else ""


def blocks(graph: fx.Graph, layers: Sequence[str], state: Mapping[str, Tensor]) -> list[Block]:
    """Divide the network at its cut points into blocks, each with at least one pruned layer.

    What follows the last pruned layer's block is in none. A network without cuts is one block.

    Args:
        graph: what `capture.capture` returned.
        layers: names of the pruned layers.
        state: tensors by name, to see which share memory.
    """
    place = {node: index for index, node in enumerate(graph.nodes)}
    waiting = list(layer_nodes(graph, layers).items())
    output = next(node for node in graph.nodes if node.op == "output").all_input_nodes[0]
    ends = []
    for end in [*cut_points(graph), output]:
        inside = tuple(name for name, node in waiting if place[node] <= place[end])
        if inside:
            ends.append((end, inside))
            waiting = waiting[len(inside) :]
    own = _parameters(graph, [end for end, _ in ends], state)
    return [Block(end, inside, parameters) for (end, inside), parameters in zip(ends, own, strict=True)]


def _parameters(graph: fx.Graph, ends: Sequence[fx.Node], state: Mapping[str, Tensor]) -> list[frozenset[str]]:
    """Names of the tensors that only the stretch up to each end reads; none of memory that has two names."""
    place = {node: index for index, node in enumerate(graph.nodes)}
    readers: dict[int, set[tuple[str, int]]] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            name = str(node.target)
            at = {(name, sum(place[end] < place[user] for end in ends)) for user in node.users}
            readers.setdefault(state[name].untyped_storage().data_ptr(), set()).update(at)
    alone = [next(iter(found)) for found in readers.values() if len(found) == 1]
    return [frozenset(name for name, at in alone if at == index) for index in range(len(ends))]


class _Fit:
    """One block with its inputs and targets; parts before `fitting` are fitted, the others held out."""

    def __init__(
        self,
        stream: Stream,
        block: Block,
        goals: list[Tensor],
        fitting: int,
        masks: Mapping[str, Tensor],
        learnable: set[str],
    ) -> None:
        self.stream, self.block, self.goals, self.fitting = stream, block, goals, fitting
        self.nodes = stream.nodes[stream.done : stream.place[block.end] + 1]
        self.name = block.layers[0] if len(block.layers) == 1 else f"{block.layers[0]}..{block.layers[-1]}"
        self.masks = {f"{name}.weight": masks[name].to(goals[0].device) for name in block.layers}
        moving = [
            name for name in sorted(block.parameters & learnable) if name in self.masks or stream.state[name].ndim == 1
        ]
        self.moving = {name: stream.state[name].clone().requires_grad_() for name in moving}
        self.state = {**stream.state, **self.moving}
        self.carried = _depend_on_the_image(stream.nodes)

    def run(self, steps: int, seed: int) -> BlockResult:
        """Train, and leave the best parameters in the network."""
        energy = sum(float(goal.double().square().sum()) for goal in self.goals[self.fitting :])
        if not math.isfinite(energy):
            raise StageFailed(f"The dense network's output of block {self.name!r} is NaN or infinite.")
        before = self.error()
        if not math.isfinite(before):
            raise StageFailed(f"The pruned network's output of block {self.name!r} is NaN or infinite.")
        if energy == 0:
            note = "The dense output is zero on the held-out images, so nothing can judge a fit."
            return BlockResult(self.name, self.block.layers, None, None, 0, note)
        best, kept, note = self.train(steps, seed, before)
        if steps and not kept and not note:
            note = "The held-out error did not fall, so the block stays as it was."
        return BlockResult(self.name, self.block.layers, before / energy, best / energy, kept, note)

    def train(self, steps: int, seed: int, before: float) -> tuple[float, int, str]:
        """Least held-out error, the step that gave it, and a note if training had to stop."""
        optimiser = torch.optim.Adam([{"params": [value], "lr": LR * _size(value)} for value in self.moving.values()])
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, steps))
        order = torch.Generator().manual_seed(seed)
        images = sum(map(len, self.goals[: self.fitting]))
        best, kept = before, 0
        for step in range(1, steps + 1):
            chosen = torch.randperm(images, generator=order)[:MINIBATCH].tolist()
            self.step(chosen, optimiser)
            schedule.step()
            if step % max(1, steps // CHECKS) and step != steps:
                continue
            error = self.error()
            if not math.isfinite(error):
                return best, kept, f"Training met NaN or infinity by step {step} and stopped."
            if error < best:
                best, kept = error, step
                for name, value in self.moving.items():
                    self.stream.state[name].copy_(value.detach())
        return best, kept, ""

    def step(self, chosen: list[int], optimiser: torch.optim.Optimizer) -> None:
        """One Adam step on the images with these numbers."""
        goal = _gather(self.goals, chosen)
        loss = (self.output(self.drawn(chosen)) - goal).square().mean() / goal.square().mean().clamp_min(1e-30)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        with torch.no_grad():
            for name, mask in self.masks.items():
                if name in self.moving:
                    self.moving[name].mul_(mask)

    def error(self) -> float:
        """Squared error on the held-out images."""
        with torch.no_grad():
            return sum(
                float((self.output(dict(values)) - goal).double().square().sum())
                for values, goal in zip(self.stream.values[self.fitting :], self.goals[self.fitting :], strict=True)
            )

    def drawn(self, chosen: list[int]) -> dict[fx.Node, Any]:
        """What is alive in front of the block, for these images instead of the first part's.

        There are as many of them as in the first part, so numbers that follow from the batch's size are the same.
        """
        values = dict(self.stream.values[0])
        for node, value in values.items():
            if node in self.carried and isinstance(value, Tensor):
                values[node] = _gather([part[node] for part in self.stream.values], chosen)
        return values

    def output(self, values: dict[fx.Node, Any]) -> Tensor:
        """The block's output from the values in front of it."""
        # Copies, since operations in place (relu_) would change the stream's own tensors.
        values = {node: value.clone() if isinstance(value, Tensor) else value for node, value in values.items()}
        for node in self.nodes:
            if node.op == "call_function":
                args, kwargs = fx.node.map_arg(
                    (node.args, node.kwargs),
                    lambda used: self.state[str(used.target)] if used.op == "get_attr" else values[used],
                )
                values[node] = node.target(*args, **kwargs)
        found = values[self.block.end]
        assert isinstance(found, Tensor)
        return found


def _size(value: Tensor) -> float:
    """Root mean square of a parameter; for one that is zero, 0.01, a usual size of biases."""
    return float(value.detach().square().mean().sqrt()) or 1e-2


def _gather(parts: Sequence[Tensor], chosen: list[int]) -> Tensor:
    """Images by number from parts that are as long as the first, except perhaps the last."""
    length = len(parts[0])
    return torch.stack([parts[number // length][number % length] for number in chosen])
