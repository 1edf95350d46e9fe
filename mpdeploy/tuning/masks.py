"""Which weights may be nonzero: fixed from the start, or searched again while the first epoch runs.

`Reservoir` is for the phase of a prune-restore cycle (`mpdeploy.pruning.restore`) in which some entries alone move.

The search follows SR-STE (Zhou et al., "Learning N:M fine-grained structured sparse neural networks from scratch",
ICLR 2021): a dense-shaped shadow of each pruned weight is trained; the forward pass sees its N:M projection, the shadow
gets the gradient of that projection straight through, and its dropped entries decay. Three things differ, because here
a solver has already chosen a good mask: dropped entries start at zero, so that a weight has to earn its place; an
entry's score is |w| times the root of its mean squared gradient (AdamW's second moment), which inside a group ranks as
the solver's |w| times the input's root mean square does; and the decay is stated in the layer's own scale.
"""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from mpdeploy.errors import RecipeError, StageFailed
from mpdeploy.pruning.patterns import Pattern, as_rows, from_rows, project


class Masks:
    """The masks of a run and, while they may still change, the shadows of the weights they apply to.

    Args:
        student: the pruned network, on the training device; its weights obey `masks` before and after every step.
        masks: for each pruned layer, true where a weight may be nonzero.
        patterns: for each pruned layer its pattern; only looked at where `every` is not 0.
        every: steps between two searches; 0 keeps the masks as they are.
        until: steps after which masks are frozen for good.
    """

    def __init__(
        self,
        student: nn.Module,
        masks: Mapping[str, Tensor],
        patterns: Mapping[str, Pattern],
        every: int,
        until: int,
    ) -> None:
        self.every, self.until, self.patterns = every, until, patterns
        self.weights = {name: student.get_parameter(f"{name}.weight") for name in masks}
        self.masks = {name: mask.to(self.weights[name].device) for name, mask in masks.items()}
        searched = self.weights if every else {}
        self.shadows = {name: weight.detach().clone() for name, weight in searched.items()}
        # A dropped entry whose gradient always points one way ends at its layer's root mean square; noise stays lower.
        self.scales = {name: _rms_of_kept(weight.detach(), self.masks[name]) for name, weight in searched.items()}

    @torch.no_grad()
    def open(self) -> None:
        """Before an optimiser step: put the shadows where the optimiser finds them."""
        for name, shadow in self.shadows.items():
            self.weights[name].copy_(shadow)

    @torch.no_grad()
    def close(self, done: int, rate: float, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """After an optimiser step: take the shadows back, search where it is time, and project the weights.

        Args:
            done: steps done, this one included.
            rate: its learning rate.
            optimizer: AdamW, whose second moments tell how much each entry matters.

        Returns:
            For each layer in which masks were searched now, true where its mask changed.
        """
        changed = {}
        for name in self.shadows:
            self._decay(name, rate)
            self.shadows[name].copy_(self.weights[name])
            if done % self.every == 0:
                second = optimizer.state[self.weights[name]]["exp_avg_sq"]
                mask = _projection(self.shadows[name].abs() * second.sqrt(), self.patterns[name])
                changed[name] = mask != self.masks[name]
                self.masks[name] = mask
        for name, weight in self.weights.items():
            weight.masked_fill_(~self.masks[name], 0.0)
        if done >= self.until:
            self.shadows = {}
        return changed

    def _decay(self, name: str, rate: float) -> None:
        weight = self.weights[name]
        shrunk = weight * (1 - rate / self.scales[name].clamp_min(rate))
        weight.copy_(torch.where(self.masks[name], weight, shrunk))

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that a resumed run needs; none where masks are never searched."""
        if not self.every:
            return {}
        found = {f"mask/{name}": mask for name, mask in self.masks.items()}
        found |= {f"scale/{name}": scale for name, scale in self.scales.items()}
        return found | {f"shadow/{name}": shadow for name, shadow in self.shadows.items()}

    def adopt(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors` returned."""
        if self.every:
            for kind, own in (("mask", self.masks), ("scale", self.scales), ("shadow", self.shadows)):
                for name, weight in self.weights.items():
                    if f"{kind}/{name}" in tensors:
                        own[name] = tensors[f"{kind}/{name}"].to(weight.device)
            self.shadows = {name: shadow for name, shadow in self.shadows.items() if f"shadow/{name}" in tensors}


class Reservoir(Masks):
    """Lets some entries of some weights move; after every step the others are what they were, bit for bit.

    Args:
        student: the network, on the training device.
        moving: by layer, true where an entry of its weight may change.
    """

    def __init__(self, student: nn.Module, moving: Mapping[str, Tensor]) -> None:
        super().__init__(student, moving, {}, 0, 0)
        self.moving = self.masks
        self.start = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.masks = {name: self.moving[name] | (start != 0) for name, start in self.start.items()}

    @torch.no_grad()
    def close(self, done: int, rate: float, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """After an optimiser step: put back what had to stay; no mask changes."""
        for name, weight in self.weights.items():
            weight.copy_(torch.where(self.moving[name], weight, self.start[name]))
        return {}

    @contextlib.contextmanager
    def alone(self, student: nn.Module) -> Iterator[None]:
        """Inside: only these weights take gradients, so no other parameter moves."""
        before = [(value, value.requires_grad) for value in student.parameters()]
        try:
            student.requires_grad_(False)
            for weight in self.weights.values():
                weight.requires_grad_(True)
            yield
        finally:
            for value, required in before:
                value.requires_grad_(required)


def _rms_of_kept(weight: Tensor, mask: Tensor) -> Tensor:
    return (weight.square().sum() / mask.sum().clamp_min(1)).sqrt()


def _projection(score: Tensor, pattern: Pattern) -> Tensor:
    return from_rows(project(as_rows(score), pattern), score.shape)


def check_shapes(student: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Refuse masks that don't fit.

    Raises:
        StageFailed: a mask is not boolean, or has no weight of its shape.
    """
    parameters = dict(student.named_parameters())
    for name, mask in masks.items():
        weight = parameters.get(f"{name}.weight")
        if weight is None or weight.shape != mask.shape or mask.dtype != torch.bool:
            found = "no such weight" if weight is None else f"a weight of shape {list(weight.shape)}"
            raise StageFailed(
                f"The mask of layer {name!r} ({mask.dtype}, {list(mask.shape)}) does not fit: the network has {found}."
            )


def check_masks(student: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Compare masks with the weights they apply to.

    Raises:
        StageFailed: a mask doesn't fit, or a weight that it drops is not zero.
    """
    check_shapes(student, masks)
    for name, mask in masks.items():
        weight = student.get_parameter(f"{name}.weight")
        bad = int(((weight != 0) & ~mask.to(weight.device)).sum())
        if bad:
            raise StageFailed(f"{bad} weights of layer {name!r} are not zero although its mask drops them.")


def check_search(every: int, until: int, masks: Mapping[str, Tensor], patterns: Mapping[str, Pattern]) -> None:
    """Refuse a search that could never happen.

    Raises:
        RecipeError: it would begin too late, or a layer's pattern isn't given.
    """
    if every > until:
        raise RecipeError(
            f"Masks can't be refreshed every {every} steps: they may change in the first {until} steps only.",
            hint=f"set tune.refresh to at most {until}, or to 0 to keep the masks.",
        )
    if every and (missing := sorted(masks.keys() - patterns.keys())):
        raise RecipeError(f"Masks can't be refreshed: the pattern of layer {missing[0]!r} isn't given.")
