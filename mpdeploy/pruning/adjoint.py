"""What a change of one layer would cost the margins, to first order: one backward pass for all layers and patterns.

The adjoint of a layer is the gradient of the margin to the runner-up with respect to the layer's output, in the
unchanged network. Against it every proposed change of that layer can be scored without running the changed network:
the change is applied to the layer's own input and goes no further. The data path certificate multiplies the same two
things and adds what is left out here, the remainder; so this is an estimate to choose by, and bounds nothing.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from mpdeploy.errors import StageFailed

Key = tuple[str, str]  # layer and pattern

IMAGES = 4  # images whose activations are kept for one backward pass


@dataclass(frozen=True)
class Proposal:
    """What one layer would become.

    Args:
        nodes: the layer's operation, and the BatchNorm that alone reads it if there is one.
        tensors: what these operations would read instead, by name; on any device.
    """

    nodes: tuple[fx.Node, ...]
    tensors: Mapping[str, Tensor]


def unit_of(node: fx.Node, norm: str) -> tuple[fx.Node, ...]:
    """The operations that pruning a layer changes: its own, and that of the BatchNorm called `norm`, if not ""."""
    return (node, next(iter(node.users))) if norm else (node,)


def proposal(nodes: tuple[fx.Node, ...], state: Mapping[str, Tensor]) -> Proposal:
    """Copy to the CPU what some operations read by name at the moment."""
    names = [str(used.target) for node in nodes for used in node.all_input_nodes if used.op == "get_attr"]
    return Proposal(nodes, {name: state[name].to("cpu", copy=True) for name in names})


def adjoint_scores(
    graph: fx.Graph, state: Mapping[str, Tensor], images: Tensor, proposals: Mapping[Key, Proposal]
) -> dict[Key, float]:
    """Estimate what each proposed change alone costs the margin to the runner-up.

    The score is the mean over images of sum_i |a_i| |(R psi)_i|: a is the adjoint, the gradient of z_j - z_y with
    respect to the layer's output (behind its BatchNorm), y the label and j the runner-up; R psi is the change of that
    output on the unchanged network's input psi. As signs are dropped, it is an upper bound of the first-order change.
    Source: the first-order term of the data path certificate, applied as `certify.data_path.rank_layers` does.

    Time: for each IMAGES images one forward and one backward pass, and every changed layer once. Memory, beside the
    proposals: what a backward pass keeps of IMAGES images, and a layer's output per proposal.

    Args:
        graph: what `capture.capture` returned.
        state: tensors by name, of the unchanged network.
        images: float32 [n, C, H, W].
        proposals: what to score, by layer and pattern.

    Returns:
        The score of each proposal, in logits.

    Raises:
        StageFailed: no gradient reaches a layer, or a score is NaN or infinite.
    """
    sums = dict.fromkeys(proposals, 0.0)
    for batch in torch.split(images, IMAGES):
        walk = _Walk(graph, state, proposals)
        for key, share in walk.shares(batch):
            sums[key] += share
    found = {key: total / len(images) for key, total in sums.items()}
    if wrong := [key for key, score in found.items() if not 0 <= score < float("inf")]:
        raise StageFailed(f"The adjoint score of {wrong[0]} is {found[wrong[0]]}; a finite number is expected.")
    return found


class _Walk(fx.Interpreter):
    """One pass of a few images through a captured network, which keeps what the scores need."""

    def __init__(self, graph: fx.Graph, state: Mapping[str, Tensor], proposals: Mapping[Key, Proposal]) -> None:
        super().__init__(nn.Module(), graph=graph)
        self.state = state
        self.proposals: dict[fx.Node, dict[Key, Proposal]] = {}
        for key, one in proposals.items():
            self.proposals.setdefault(one.nodes[0], {})[key] = one
        self.ends = {one.nodes[-1]: one.nodes[0] for one in proposals.values()}
        self.moved: dict[Key, Tensor] = {}
        self.outputs: dict[fx.Node, Tensor] = {}

    def shares(self, images: Tensor) -> Iterator[tuple[Key, float]]:
        """Give each proposal's score, summed over the images."""
        device = next(iter(self.state.values())).device
        with torch.enable_grad():
            logits = self.run(images.to(device, copy=True), enable_io_processing=False)
            top = logits.topk(2, dim=1).values
            wanted = list(self.outputs.values())
            adjoints = torch.autograd.grad((top[:, 1] - top[:, 0]).sum(), wanted, allow_unused=True)
        for first, adjoint in zip(self.outputs, adjoints, strict=True):
            if adjoint is None:
                raise StageFailed(
                    f"No gradient of the logits reaches the layer at {first.name}, so its patterns can't be compared.",
                    hint="the usual reason is a detach or a step function behind it; prune.skip leaves it out.",
                )
            for key in self.proposals[first]:
                yield key, float((adjoint.abs() * self.moved.pop(key)).sum(dtype=torch.float64))

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Tensor:
        """Read a tensor from the state instead of the module that was captured."""
        return self.state[str(target)]

    def run_node(self, n: fx.Node) -> Any:
        """Run one operation; at a layer also what its proposals make of its input."""
        if n.op == "output":
            return self.env[n.all_input_nodes[0]]
        if n in self.proposals:
            with torch.no_grad():
                self._try(n)
        value = super().run_node(n)
        if n not in self.ends:
            return value
        # The graph of gradients begins at the first layer with a proposal: nothing before it needs one.
        output = value if value.requires_grad else value.detach().requires_grad_()
        self.outputs[self.ends[n]] = output
        # The copy goes on, as an operation that writes in place would put its own gradient in the output's stead.
        return output.clone()

    def _try(self, first: fx.Node) -> None:
        proposals = self.proposals[first]
        dense = self._outcome(next(iter(proposals.values())).nodes, {})
        for key, one in proposals.items():
            self.moved[key] = (self._outcome(one.nodes, one.tensors) - dense).abs()

    def _outcome(self, nodes: Sequence[fx.Node], tensors: Mapping[str, Tensor]) -> Tensor:
        """Output of the last of some operations in a row if they read other tensors."""
        made: dict[fx.Node, Tensor] = {}

        def read(used: fx.Node) -> Any:
            if used in made:
                return made[used]
            name = str(used.target)
            return tensors[name].to(self.state[name]) if used.op == "get_attr" and name in tensors else self.env[used]

        for node in nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), read)
            made[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return made[nodes[-1]]
