"""Two networks of any origin on the same images: what of A's margins is left in B, and what may be claimed of it.

    with opened("model.onnx", {}) as a, opened("model.int8.onnx", {}) as b:
        pair = compare(a, b, inputs, keep=16, confidence=0.95, candidates=1, progress=print)

The same ledger as a recipe's, with two stages: A is the reference, B is what became of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mpdeploy.artifact import write_json
from mpdeploy.certify.ledger import Ledger, columns, finite, joined, reference_gap, rows_of, winner
from mpdeploy.certify.statistics import disagreement, proportion, samples_needed
from mpdeploy.errors import StageFailed
from mpdeploy.runnable import Inputs, Runnable, check_same_input
from mpdeploy.stages.environment import versions
from mpdeploy.stages.images import strict_float32
from mpdeploy.stages.noise import noise_of

if TYPE_CHECKING:
    from mpdeploy.certify.noise_floor import Precision

Progress = Callable[[int, int], None]
REFERENCE = 8
"""Samples on which A is run in float64 too, to tell what float32 costs the reference."""
NOISE = 64
"""Samples on which a noise floor is computed."""
TARGET = 0.01
"""Of the disagreement on unseen inputs; how many samples it would take is told."""


@dataclass(frozen=True)
class Proofs:
    """Which proofs to try.

    Attributes:
        samples: on how many of the images.
        lambda2: weight of the squared Frobenius norm in the objective.
        lambda1: of the sum of absolute values.
        ball: radius of the balls on which ReLU networks are compared, in units of the input; None for none.
    """

    samples: int
    lambda2: float = 1e-4
    lambda1: float = 0.0
    ball: float | None = None


@dataclass(frozen=True)
class Pair:
    """What was measured.

    Attributes:
        ledger: of A and B.
        facts: what `mpdeploy certify --json` prints.
        exact: float64 logits of A of the first samples at the kept classes, [g, T + 1].
    """

    ledger: Ledger
    facts: dict[str, Any]
    exact: NDArray[np.float64]

    @property
    def agreement(self) -> float:
        """Share of the samples whose label B keeps."""
        return float((self.ledger.slack > 0).mean())


def compare(
    a: Runnable,
    b: Runnable,
    inputs: Inputs,
    *,
    keep: int,
    confidence: float,
    candidates: int,
    noise: "Precision | None" = None,
    proofs: Proofs | None = None,
    progress: Progress,
) -> Pair:
    """Run both networks on every image and account for each margin.

    Args:
        a: the reference, whose labels are to be kept.
        b: what became of it.
        inputs: the images.
        keep: classes kept of each sample.
        confidence: of every interval and bound.
        candidates: how many networks B was chosen from on these same samples (Bonferroni).
        noise: hold B's error against what this precision explains; None for not.
        proofs: which proofs to try, None for none.
        progress: told (done, total).

    Raises:
        StageFailed: the two don't take the same input or give the same classes, or A's logits are not finite.
    """
    parts, done, total = [], 0, len(inputs.ids)
    exact: NDArray[np.float64] | None = None
    plain: NDArray[np.float32] | None = None
    why_not = "" if a.exact is not None else f"{a.name} is a built engine, which runs in its own precision only."
    with strict_float32():
        for batch in inputs.batches(min(a.batch, b.batch) if not (a.exactly or b.exactly) else max(a.batch, b.batch)):
            progress(done, total)
            if done == 0:
                check_same_input((a, b), batch)
            logits = {"a": a.run(batch), "b": b.run(batch)}
            _check_same_classes(a, b, logits)
            labels = winner(logits["a"]) if inputs.labels is None else inputs.labels[done : done + len(batch)]
            parts.append(rows_of(labels, logits, keep))
            if done == 0 and a.exact is not None:
                try:
                    plain, exact = logits["a"][:REFERENCE], a.exact(batch[:REFERENCE])
                except StageFailed as error:  # a foreign operator: the margins are measured all the same
                    why_not = error.what
            done += len(batch)
    progress(total, total)
    ledger = Ledger(("a", "b"), joined(parts), 0.0)
    kept = ledger.rows.kept_classes
    gap = None if exact is None or plain is None else reference_gap(exact, plain)
    facts = _facts(a, b, inputs, ledger, gap, int(logits["a"].shape[1]), confidence, candidates)
    facts["reference_why_not"] = why_not
    if noise is not None:
        facts["noise_floor"] = _noise_floor(a, b, inputs, noise)
    if proofs is not None:
        facts["proofs"] = _proved(a, b, inputs, ledger, proofs)
    none = np.empty((0, kept.shape[1] + 1))
    return Pair(ledger, facts, none if exact is None else columns(exact, kept[: len(exact)], np.float64))


def _noise_floor(a: Runnable, b: Runnable, inputs: Inputs, precision: "Precision") -> dict[str, Any]:
    """Hold B's difference to A in float64 against the noise floor of B's graph, of A's where B is a built engine."""
    graph = b.program or a.program
    if graph is None or a.exact is None:
        return {"why_not": f"{a.name} and {b.name} are built engines: there is no graph to compute a noise floor of."}
    few = inputs.load(np.arange(min(NOISE, len(inputs.ids)), dtype=np.int64))
    return noise_of(graph(), precision, few, b.run(few), a.exact(few)).facts


def _proved(a: Runnable, b: Runnable, inputs: Inputs, ledger: Ledger, asked: Proofs) -> dict[str, Any]:
    """Try the provable levels on the graphs of both networks."""
    from mpdeploy.certify.levels import prove_ball, prove_data_path, prove_labels
    from mpdeploy.certify.objective import Penalty

    if missing := [one.name for one in (a, b) if one.program is None]:
        return {"why_not": f"{missing[0]} is a built engine, which has no graph to prove anything of."}
    assert a.program is not None  # for the type checker
    assert b.program is not None
    few = inputs.load(np.arange(min(asked.samples, len(inputs.ids)), dtype=np.int64))
    labels = ledger.rows.labels[: len(few)]
    dense, other = a.program(), b.program()
    penalty = Penalty(asked.lambda2, asked.lambda1)
    found = {**prove_labels(dense, other, few), "data_path": prove_data_path(dense, other, few, labels, penalty)}
    return found if asked.ball is None else {**found, "ball": prove_ball(dense, other, few, asked.ball)}


def _check_same_classes(a: Runnable, b: Runnable, logits: dict[str, NDArray[np.float32]]) -> None:
    for one, own in ((a, logits["a"]), (b, logits["b"])):
        if own.ndim != 2:
            raise StageFailed(f"{one.name} gives an output of shape {list(own.shape)}; expected logits [n, K].")
    if logits["a"].shape != logits["b"].shape:
        raise StageFailed(
            f"{a.name} gives {logits['a'].shape[1]} classes and {b.name} {logits['b'].shape[1]}: "
            "there is nothing to compare."
        )


def _facts(
    a: Runnable,
    b: Runnable,
    inputs: Inputs,
    ledger: Ledger,
    gap: dict[str, Any] | None,
    classes: int,
    confidence: float,
    candidates: int,
) -> dict[str, Any]:
    n = len(inputs.ids)
    lost = np.flatnonzero(~(ledger.slack > 0)).tolist()
    margin = ledger.margin
    facts: dict[str, Any] = {
        "schema": 1,
        "a": {"name": a.name, "what": a.what, "sha256": a.digest},
        "b": {"name": b.name, "what": b.what, "sha256": b.digest},
        "data": inputs.name,
        "samples": n,
        "classes": classes,
        "kept": int(ledger.rows.kept_classes.shape[1]),
        "agreement": proportion(n - len(lost), n, confidence).json(),
        "tests": ledger.tests(),
        "margin_median": finite(np.median(ledger.margin)),
        "slack_median": finite(np.median(ledger.slack)),
        "reference": gap,
        "spent": ledger.spent()[0],
        "flipped": [{"id": inputs.ids[i], "margin": finite(margin[i])} for i in lost],
        "disagreement": disagreement(len(lost), n, confidence, candidates).json(),
        "samples_for_target": {"target": TARGET, "none_disagreeing": samples_needed(TARGET, confidence)},
        "versions": versions("torch", "timm", "numpy", "onnxruntime"),
    }
    if inputs.labels is not None:
        facts["top1"] = {name: proportion(k, n, confidence).json() for name, k in ledger.top1().items()}
    return facts


def write(pair: Pair, folder: Path) -> None:
    """Write certificate.json and ledger.safetensors into a folder, which is made.

    The arrays are those of a bundle's ledger.safetensors; README says what each of them is.
    """
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({**pair.ledger.arrays(), "reference": pair.exact}, folder / "ledger.safetensors")
    write_json(folder / "certificate.json", pair.facts)
