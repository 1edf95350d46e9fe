"""Checkpoints in one folder: tensors under a name of their own, then state.json, which makes them count."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mpdeploy.artifact import dumps, read_json, sha256_of, sync
from mpdeploy.errors import CorruptArtifact, StageFailed

SCHEMA = 2
STATE = "state.json"


@dataclass(frozen=True)
class Folder:
    """Where the checkpoints of one run are.

    Attributes:
        path: the folder, made when first written to.
        identity: what a checkpoint must agree with.
    """

    path: Path
    identity: str

    def save(self, step: int, tensors: Mapping[str, Tensor], history: Mapping[str, Any]) -> None:
        """Write a checkpoint; a crash at any moment leaves the old one or the new one.

        Args:
            step: steps done, which names the file.
            tensors: on the CPU, contiguous, no two sharing storage.
            history: JSON values kept beside them.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.path / f"step-{step:08d}.safetensors"
        draft = file.with_suffix(".draft")
        save_file(dict(tensors), draft)
        sync(draft)
        draft.replace(file)
        state = {
            "schema": SCHEMA,
            "identity": self.identity,
            "history": history,
            "tensors": file.name,
            "sha256": sha256_of(file),
        }
        draft = self.path / f"{STATE}.draft"
        draft.write_text(dumps(state), encoding="utf-8")
        sync(draft)
        draft.replace(self.path / STATE)
        sync(self.path)
        for old in self.path.glob("step-*"):
            if old != file:
                old.unlink()

    def load(self) -> tuple[dict[str, Tensor], Any] | None:
        """Return tensors and history of the checkpoint, None where there is none.

        Raises:
            CorruptArtifact: the files are not what was written.
            StageFailed: they belong to another run.
        """
        if not (self.path / STATE).exists():
            return None
        hint = f"delete the folder {self.path} to tune from the start."
        try:
            state = read_json(self.path / STATE)
            identity, history, file = state["identity"], state["history"], self.path / state["tensors"]
            intact = sha256_of(file) == state["sha256"]
            tensors = load_file(file) if intact else {}
        except (OSError, KeyError, TypeError, SafetensorError) as error:
            raise CorruptArtifact(f"The checkpoint in {self.path} can't be read: {error!r}.", hint) from error
        if not intact:
            raise CorruptArtifact(f"The checkpoint file {file} is not what was written (its SHA-256 differs).", hint)
        if identity != self.identity:
            raise StageFailed(f"The checkpoint in {self.path} belongs to a run with other settings or weights.", hint)
        return tensors, history
