"""What a lie is, the list of all of them, and the places in a bundle that several of them change."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from forgeries.bundle import CPU, Draft, make_draft


@dataclass(frozen=True)
class Lie:
    """A lie and how it has to be found out.

    Attributes:
        name: of its function.
        claim: the claim that has to be refused; "manifest" where the folder is no bundle at all.
        word: a regular expression that the reason has to match.
        verdict: "refuted" or "unchecked".
        change: makes the lie of an honest draft, or of the written files.
        on_disk: whether it changes the written files.
        rebind: whether the liar hashes again whatever names the hash of another file.
        keep: classes that the honest draft keeps of each sample.
        expected: whether the honest bundle's digest is known from elsewhere.
    """

    name: str
    claim: str
    word: str
    verdict: str
    change: Callable[[Any], Any]
    on_disk: bool
    rebind: bool = True
    keep: int = 4
    expected: bool = False

    def tell(self, root: Path) -> None:
        """Write the forged bundle."""
        draft = make_draft(keep=self.keep)
        if self.on_disk:
            draft.write(root)
            self.change(root)
            return
        self.change(draft)
        if self.rebind:
            draft.rebind()
        draft.write(root)


LIES: list[Lie] = []


def lie(
    claim: str, word: str, verdict: str = "refuted", rebind: bool = True, keep: int = 4, expected: bool = False
) -> Callable[[Callable[[Draft], None]], Callable[[Draft], None]]:
    """Register a change of the draft; it is written and hashed afterwards."""

    def register(change: Callable[[Draft], None]) -> Callable[[Draft], None]:
        LIES.append(Lie(change.__name__, claim, word, verdict, change, False, rebind, keep, expected))
        return change

    return register


def lie_on_disk(claim: str, word: str) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    """Register a change of the written files."""

    def register(change: Callable[[Path], None]) -> Callable[[Path], None]:
        LIES.append(Lie(change.__name__, claim, word, "refuted", change, on_disk=True))
        return change

    return register


def findings_of(checker: ModuleType, root: Path, lie: Lie) -> list[Any]:
    """What a checker, verify.py or a mutant of it, finds in a told lie; "manifest" where it is no bundle."""
    try:
        return list(checker.verify(root, make_draft(keep=lie.keep).digest() if lie.expected else None))
    except checker.Unreadable as unreadable:
        return [checker.Finding("manifest", checker.Verdict.REFUTED, str(unreadable))]


def weights(draft: Draft, stage: str) -> dict[str, Any]:
    return draft.tensors[f"weights/{stage}.safetensors"]


def layer(draft: Draft, name: str) -> dict[str, Any]:
    return next(row for row in draft.json["layers.json"] if row["name"] == name)


def fill_group(array: np.ndarray) -> np.ndarray:
    """Put a third nonzero into one group of four input channels."""
    array = array.copy()
    group = array[0, :4] if array.ndim == 2 else array[0, :4, 0, 0]
    group[np.flatnonzero(group == 0)[0]] = 1.0
    return array


def ledger(draft: Draft) -> dict[str, Any]:
    return draft.tensors["ledger.safetensors"]


def samples(draft: Draft) -> dict[str, Any]:
    return draft.tensors["samples.safetensors"]


def latency(draft: Draft) -> dict[str, Any]:
    return draft.engine()["latency"]


def engine_json(draft: Draft, name: str = CPU) -> dict[str, Any]:
    return draft.json[f"engines/{name}/engine.json"]


def certificate(draft: Draft) -> dict[str, Any]:
    return draft.json["certificate.json"]


def lock(draft: Draft) -> dict[str, Any]:
    return draft.json["recipe.lock.json"]


def drop_gates(draft: Draft, *names: str) -> None:
    """Take gates out of recipe and verdict alike."""
    draft.raw["recipe.toml"] = b"\n".join(
        line for line in draft.raw["recipe.toml"].split(b"\n") if line.split(b" ")[0].decode() not in names
    )
    gates = lock(draft)["gates"]
    lock(draft)["gates"] = {name: limit for name, limit in gates.items() if name not in names}
    rows = draft.json["verdict.json"]["gates"]
    draft.json["verdict.json"]["gates"] = [row for row in rows if row["name"] not in names]


def fail_a_gate(draft: Draft) -> None:
    """Ask for more than the engine gives, honestly."""
    draft.ask("gates", min_agreement=0.999)
    draft.rederive()
