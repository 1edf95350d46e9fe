"""Block-wise reconstruction without labels: a pruned block learns the dense block's output from the pruned inputs.

Source: Y. Li et al., "BRECQ", 2021. Masks stay as they are; kept weights, biases and affine parameters move.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from mpdeploy.errors import StageFailed
from mpdeploy.pruning.capture import Stream, capture, layer_nodes, state_of

HELD_OUT_EVERY = 4
MINIBATCH = 32
CHECKS = 4  # evaluations on held-out images along the way
ADD = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)


@dataclass(frozen=True)
class BlockResult:
    """What reconstruction did to one block; errors are held-out squared errors over the dense output's energy.

    Args:
        name: first..last pruned layer.
        layers: its pruned layers.
        error_before: with the weights as pruned; None where the dense output is zero.
        error_after: with the weights left in the module; never above `error_before`.
        steps: step whose weights were kept, 0 for those before.
        note: why nothing was kept, and whether the network has no cuts; or "".
    """

    name: str
    layers: tuple[str, ...]
    error_before: float | None
    error_after: float | None
    steps: int
    note: str


def cut_points(graph: fx.Graph) -> list[fx.Node]:
    """Operations after which their output is the only image-dependent tensor alive; residual adds if there are any."""
    nodes = [node for node in graph.nodes if node.op != "output"]
    place = {node: index for index, node in enumerate(graph.nodes)}
    carries: set[fx.Node] = set()
    for node in nodes:
        if node.op == "placeholder" or any(used in carries for used in node.all_input_nodes):
            carries.add(node)
    tensors = [node for node in nodes if node in carries and not isinstance(node.meta.get("val"), int | torch.SymInt)]
    last = {node: max((place[user] for user in node.users), default=place[node]) for node in tensors}
    found = []
    alive: list[fx.Node] = []
    for node in tensors:
        alive = [other for other in alive if last[other] > place[node]] + [node]
        if alive == [node] and node.op == "call_function":
            found.append(node)
    joins = [n for n in found if n.target in ADD and sum(used in carries for used in n.all_input_nodes) > 1]
    return joins or found


def blocks(graph: fx.Graph, layers: Sequence[str]) -> list[tuple[fx.Node, tuple[str, ...]]]:
    """Last operation and pruned layers of each block, in order; what follows the last pruned layer is in none."""
    place = {node: index for index, node in enumerate(graph.nodes)}
    waiting = list(layer_nodes(graph, layers).items())
    found = []
    for end in [*cut_points(graph), next(node for node in graph.nodes if node.op == "output").all_input_nodes[0]]:
        inside = tuple(name for name, node in waiting if place[node] <= place[end])
        if inside:
            found.append((end, inside))
            waiting = waiting[len(inside) :]
    return found


def reconstruct(
    module: nn.Module,
    dense_state: Mapping[str, Tensor],
    batches: Sequence[Tensor],
    masks: Mapping[str, Tensor],
    *,
    input_size: tuple[int, int, int],
    steps: int,
    lr: float,
    seed: int,
    progress: Callable[[int, int], None],
) -> list[BlockResult]:
    """Fit each block of a pruned network to the dense one, in place; each fourth image only judges.

    Args:
        module: the pruned network in eval mode.
        dense_state: the dense network's tensors by name, any permutation folded in.
        batches: images, each [b, C, H, W].
        masks: of each pruned layer's weight, boolean, true where it stays.
        input_size: channels, height, width.
        steps: Adam steps per block, with cosine decay.
        lr: first step size, as a share of each parameter's root mean square.
        seed: decides the minibatches.
        progress: called with blocks done and their number.

    Raises:
        StageFailed: fewer than four images, or a block's inputs or dense outputs hold NaN or infinity.
    """
    images = torch.cat(list(batches))
    if len(images) < HELD_OUT_EVERY:
        raise StageFailed(f"Reconstruction needs at least {HELD_OUT_EVERY} images; {len(images)} were given.")
    held = torch.arange(len(images)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    parts = [part for chosen in (~held, held) for part in images[chosen].split(MINIBATCH)]
    fitting = math.ceil(int((~held).sum()) / MINIBATCH)
    graph = capture(module, input_size)
    state = state_of(module, graph)
    pruned = Stream(graph, state, parts)
    dense = Stream(graph, {name: dense_state.get(name, tensor).to(tensor) for name, tensor in state.items()}, parts)
    plan = blocks(graph, list(masks))
    trained = {name for name, _ in module.named_parameters()}
    kept = {f"{name}.weight": mask for name, mask in masks.items()}
    results = []
    for index, (end, layers) in enumerate(plan):
        dense.advance(end, through=True)
        goals = dense.output(end)
        nodes = pruned.nodes[pruned.done : pruned.place[end] + 1]
        names = {str(used.target) for node in nodes for used in node.all_input_nodes if used.op == "get_attr"}
        moving = [n for n in sorted(names & trained) if n in kept or state[n].ndim == 1]
        block = _Block(pruned, nodes, goals, moving, kept, fitting)
        note = "The network has no inner cuts: it is one block. " if len(plan) == 1 else ""
        results.append(block.fit(layers, steps, lr, seed + index, note))
        pruned.advance(end, through=True)
        progress(index + 1, len(plan))
    return results


class _Block:
    """One block with its inputs and targets; parts before `fitting` are fitted, the others held out."""

    def __init__(
        self,
        stream: Stream,
        nodes: list[fx.Node],
        goals: list[Tensor],
        moving: list[str],
        masks: Mapping[str, Tensor],
        fitting: int,
    ) -> None:
        self.stream, self.nodes, self.goals, self.fitting = stream, nodes, goals, fitting
        self.state = dict(stream.state)
        self.moving = {name: self.state[name].clone().requires_grad_() for name in moving}
        self.masks = {name: masks[name].to(self.state[name].device) for name in moving if name in masks}
        self.state.update(self.moving)

    def output(self, part: int) -> Tensor:
        """The block's output on one part."""
        # Copies, since operations in place (relu_) would change the stream's own tensors.
        values: dict[fx.Node, Any] = {
            node: value.clone() if isinstance(value, Tensor) else value
            for node, value in self.stream.values[part].items()
        }
        for node in self.nodes:
            if node.op == "call_function":
                args, kwargs = fx.node.map_arg(
                    (node.args, node.kwargs),
                    lambda used: self.state[str(used.target)] if used.op == "get_attr" else values[used],
                )
                values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        found = values[self.nodes[-1]]
        assert isinstance(found, Tensor)
        return found

    def error(self) -> float:
        """Held-out squared error."""
        with torch.no_grad():
            return sum(
                float((self.output(part) - self.goals[part]).double().square().sum())
                for part in range(self.fitting, len(self.goals))
            )

    def fit(self, layers: tuple[str, ...], steps: int, lr: float, seed: int, note: str) -> BlockResult:
        """Train, and write the best parameters into the network."""
        name = layers[0] if len(layers) == 1 else f"{layers[0]}..{layers[-1]}"
        energy = sum(float(goal.double().square().sum()) for goal in self.goals[self.fitting :])
        before = self.error()
        if not math.isfinite(before + energy):
            raise StageFailed(f"Block {name!r} meets NaN or infinity.", hint="check the images and weights.")
        if energy == 0:
            return BlockResult(name, layers, None, None, 0, f"{note}The dense output is zero on held-out images.")
        best, best_step = before, 0
        groups = [
            {"params": [p], "lr": lr * (float(p.detach().square().mean().sqrt()) or 1e-2)} for p in self.moving.values()
        ]
        optimiser = torch.optim.Adam(groups)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, steps))
        order = torch.Generator().manual_seed(seed)
        every = max(1, steps // CHECKS)
        for step in range(1, steps + 1):
            part = int(torch.randint(self.fitting, (1,), generator=order))
            loss = (self.output(part) - self.goals[part]).square().mean() / self.goals[part].square().mean()
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
            with torch.no_grad():
                for masked, mask in self.masks.items():
                    self.moving[masked].mul_(mask)
            if step % every == 0 or step == steps:
                error = self.error()
                if not math.isfinite(error):
                    note += f"Training met NaN or infinity by step {step} and was stopped. "
                    break
                if error < best:
                    best, best_step = error, step
                    for moved, value in self.moving.items():
                        self.stream.state[moved].copy_(value.detach())
        if not best_step:
            note += "The held-out error did not fall, so the block stays as it was."
        return BlockResult(name, layers, before / energy, best / energy, best_step, note.strip())
