"""What a step of the compiler is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from mpdeploy.artifact import Artifact
from mpdeploy.recipe import Recipe, Table

P = TypeVar("P", bound=Table)
Facts = Mapping[str, Any]
Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and out of how much."""


@dataclass(frozen=True)
class Given:
    """What a stage may read besides its own parameters.

    Attributes:
        artifacts: the results of the stages named in `takes`.
        workspace: a folder that survives a crash, for checkpoints; emptied when the stage is done.
        progress: where to report progress.
    """

    artifacts: Mapping[str, Artifact]
    workspace: Path
    progress: Progress

    def __getitem__(self, stage: str) -> Artifact:
        return self.artifacts[stage]


def dump(params: Table) -> Mapping[str, Any]:
    """Return all of a table as what is asked."""
    return params.model_dump(mode="json", by_alias=True)


def nothing(_: Any) -> Mapping[str, str]:
    """No part of the environment shapes this stage's bytes."""
    return {}


@dataclass(frozen=True)
class Stage(Generic[P]):
    """One step.

    Attributes:
        name: its name in the recipe, the store and every message.
        summary: one line, shown by `plan`.
        takes: stages whose artefacts it reads.
        params: picks its part of the recipe.
        asks: what of that part shapes the result, as JSON; files by their content, not by their path.
        environment: what else shapes the result, by name: package versions, device.
        run: writes files into the empty folder and returns facts.
        ensures: re-reads what was written; raises StageFailed where the stage broke its promise.
    """

    name: str
    summary: str
    takes: tuple[str, ...]
    params: Callable[[Recipe], P]
    run: Callable[[P, Given, Path], Facts]
    ensures: Callable[[Artifact], None]
    asks: Callable[[P], Mapping[str, Any]] = dump
    environment: Callable[[P], Mapping[str, str]] = nothing
