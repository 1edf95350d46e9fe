"""All that changes from step to step, and what of it a checkpoint keeps."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mpdeploy.tuning.masks import Masks
from mpdeploy.tuning.settings import Settings
from mpdeploy.tuning.team import Team


class Run:
    """All that changes from step to step: the student, its masks, its optimiser, the moving average, the history."""

    def __init__(self, student: nn.Module, masks: Masks, settings: Settings, team: Team) -> None:
        parameters = list(student.parameters())
        groups = [
            {"params": [value for value in parameters if value.ndim >= 2], "weight_decay": settings.weight_decay},
            {"params": [value for value in parameters if value.ndim < 2], "weight_decay": 0.0},
        ]
        self.student = student
        self.masks = masks
        self.ema = settings.ema
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr)
        # The average follows from the weights, which all processes share: one keeps it.
        named = student.named_parameters() if settings.ema and team.rank == 0 else ()
        self.average = {name: value.detach().clone() for name, value in named}
        self.losses: list[float] = []
        self.refreshes: list[tuple[int, int]] = []
        self.blocks: tuple[str, ...] = ()

    def update(self, loss: float, rate: float) -> None:
        """Take the optimiser step of the gradients that are there, at the learning rate `rate`."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.losses.append(loss)
        self.masks.open()
        self.optimizer.step()
        changed = self.masks.close(len(self.losses), rate, self.optimizer)
        if changed:
            # As many leave as enter where a group was full.
            self.refreshes.append(
                (len(self.losses), sum(int((c & self.masks.masks[n]).sum()) for n, c in changed.items()))
            )
        self._follow(changed)

    @torch.no_grad()
    def _follow(self, changed: Mapping[str, Tensor]) -> None:
        """Move the average towards the weights; where a mask changed it starts anew, so that it obeys the mask too."""
        parameters = dict(self.student.named_parameters())
        for name, value in self.average.items():
            value.lerp_(parameters[name], 1 - self.ema)
            moved = changed.get(name.removesuffix(".weight"))
            if moved is not None and name.endswith(".weight"):
                value.copy_(torch.where(moved, parameters[name], value))

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that a resumed run needs, by name, on the CPU."""
        found = {f"student/{name}": value for name, value in self.student.state_dict().items()}
        found |= {f"average/{name}": value for name, value in self.average.items()}
        found |= self.masks.tensors()
        for name, parameter in self.student.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                found[f"adamw/{key}/{name}"] = value
        # Cloned, because tied parameters share storage, which safetensors refuses.
        return {name: value.detach().cpu().contiguous().clone() for name, value in found.items()}

    def history(self) -> dict[str, Any]:
        """What a resumed run needs beside tensors, as JSON values."""
        return {"losses": self.losses, "refreshes": self.refreshes, "blocks": self.blocks}

    def adopt(self, tensors: Mapping[str, Tensor], history: Any) -> None:
        """Go on from what `tensors` and `history` returned."""
        state = {name.removeprefix("student/"): value for name, value in tensors.items() if name.startswith("student/")}
        self.student.load_state_dict(state)
        for name in self.average:
            self.average[name].copy_(tensors[f"average/{name}"])
        self.masks.adopt(tensors)
        for name, parameter in self.student.named_parameters():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                value = tensors.get(f"adamw/{key}/{name}")
                if value is not None:
                    # AdamW keeps its step counter on the CPU whatever the parameter's device.
                    self.optimizer.state[parameter][key] = value.to("cpu" if key == "step" else parameter.device)
        self.losses = list(history["losses"])
        self.refreshes = [(step, count) for step, count in history["refreshes"]]
        self.blocks = tuple(history["blocks"])
