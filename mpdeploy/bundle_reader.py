"""Reads the files of a bundle for the report, and recounts from their bytes what can be recounted."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from mpdeploy.artifact import MANIFEST, describe_files, read_json
from mpdeploy.certify.ledger import slack_of
from mpdeploy.errors import CorruptArtifact

REPORT = "report.html"
STAGES = ("source", "prune", "tune", "certify", "export", "build", "validate")


@dataclass(frozen=True)
class Zeros:
    """What the weights on disk say about the pattern.

    Attributes:
        file: which weights were read, relative to the bundle; empty where there are none.
        groups: groups of the pattern in pruned layers.
        bad: those with more non-zeros than the pattern allows.
        zeros: zero weights in all Conv and Linear layers.
        weights: all weights of these layers.
    """

    file: str
    groups: int = 0
    bad: int = 0
    zeros: int = 0
    weights: int = 0


class BundleReader:
    """Reads the files of a bundle; what a stage that did not run would have written is empty."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files = {name: entry for name, entry in describe_files(root).items() if name != REPORT}
        if not self.files:
            raise CorruptArtifact(f"{root} holds no bundle.", hint="name the folder that `mpdeploy run` wrote.")
        self._compare_with_manifest()

    def _compare_with_manifest(self) -> None:
        """Refuse a bundle whose files are not those of its manifest (there is none before the run has ended)."""
        if not (self.root / MANIFEST).is_file():
            return
        listed = {name: entry for name, entry in read_json(self.root / MANIFEST)["files"].items() if name != REPORT}
        wrong = sorted(name for name in listed | self.files if listed.get(name) != self.files.get(name))
        if wrong:
            raise CorruptArtifact(
                f"The bundle {self.root} is not what its manifest.json lists: {', '.join(wrong[:5])} differ.",
                hint="`mpdeploy verify` names every difference; `mpdeploy run` writes the bundle anew.",
            )

    def json(self, name: str) -> Any:
        """Read a JSON file, or return an empty dict where the bundle has none."""
        return read_json(self.root / name) if name in self.files else {}

    def tensors(self, name: str, prefix: str = "") -> dict[str, NDArray[Any]]:
        """Read the tensors whose names begin with `prefix`; none where the bundle has no such file."""
        if name not in self.files:
            return {}
        try:
            with safe_open(self.root / name, framework="numpy") as file:
                return {key: file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CorruptArtifact(f"{self.root / name} can't be read as safetensors: {error}.") from error

    def absent(self, what: str, stage: str) -> str:
        """Say why something is not in the bundle."""
        ran = [name for name in STAGES if name in self.chain]
        if stage in ran:
            return f"{what}: not in this bundle, although the stage {stage} ran."
        last = f"the last stage that ran is {ran[-1]}" if ran else "no stage is recorded"
        return f"{what}: not checked, because the stage {stage} did not run ({last})."

    @cached_property
    def chain(self) -> dict[str, Any]:
        """Stage -> {digest, key}, in the order of the pipeline."""
        chain: dict[str, Any] = self.json("provenance.json").get("chain", {})
        return chain

    @cached_property
    def name(self) -> str:
        """Name of the recipe."""
        return str(self.json("recipe.lock.json").get("name", "unnamed bundle"))

    @cached_property
    def layers(self) -> list[dict[str, Any]]:
        """Rows of layers.json."""
        return list(self.json("layers.json"))

    @cached_property
    def results(self) -> dict[str, Any]:
        """results.json."""
        return dict(self.json("results.json"))

    @cached_property
    def certificate(self) -> dict[str, Any]:
        """certificate.json."""
        return dict(self.json("certificate.json"))

    @cached_property
    def deploy(self) -> str:
        """Id of the engine that the verdict is about."""
        asked = self.json("recipe.lock.json").get("validate", {}).get("deploy", "")
        return str(self.json("verdict.json").get("deploy", asked))

    @cached_property
    def deployed(self) -> dict[str, Any]:
        """The row of results.json of the engine that the verdict is about."""
        return next((row for row in self.results.get("engines", []) if row["id"] == self.deploy), {})

    @cached_property
    def zeros(self) -> Zeros:
        """Recount the zeros from the weights' bytes: groups run along axis 1, the input channels."""
        names = [f"weights/{stage}.safetensors" for stage in ("tuned", "pruned")]
        file = next((name for name in names if name in self.files), "")
        if not file or not self.layers:
            return Zeros("")
        state = self.tensors(file)
        groups = bad = zeros = weights = 0
        for layer in self.layers:
            weight = state.get(f"{layer['name']}.weight")
            if weight is None:
                raise CorruptArtifact(f"layers.json names {layer['name']}, but {file} holds no such weight.")
            zeros, weights = zeros + int((weight == 0).sum()), weights + weight.size
            if ":" in layer["pattern"]:
                counts = _nonzeros(weight, int(layer["pattern"].split(":")[1]))
                groups, bad = groups + counts.size, bad + int((counts > int(layer["pattern"].split(":")[0])).sum())
        return Zeros(file, groups, bad, zeros, weights)

    @cached_property
    def rungs(self) -> dict[str, NDArray[np.float64]]:
        """Slack of the dense label after each rung, float64 [n]; the engine's where it ran on these samples."""
        ledger = self.tensors("ledger.safetensors")
        if not ledger:
            return {}
        logits = {stage: ledger["logits"][:, i] for i, stage in enumerate(self.certificate["stages"])}
        engine = self.tensors("samples.safetensors", f"certification.{self.deploy}").get(f"certification.{self.deploy}")
        if engine is not None:
            logits["engine"] = engine
        if len({z.shape for z in logits.values()}) != 1:
            raise CorruptArtifact("ledger.safetensors and samples.safetensors hold logits of different shapes.")
        return {rung: slack_of(z) for rung, z in logits.items()}


def _nonzeros(weight: NDArray[Any], group: int) -> NDArray[np.int64]:
    """Return the non-zeros of each group along axis 1; NaN is one, and a short last group counts as it is."""
    rows = np.moveaxis(weight != 0, 1, -1).reshape(-1, weight.shape[1])
    rows = np.pad(rows, ((0, 0), (0, -weight.shape[1] % group)))
    return np.asarray(rows.reshape(-1, group).sum(axis=1), np.int64)
