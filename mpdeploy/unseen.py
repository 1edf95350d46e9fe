"""What may be claimed of images that nobody ran: a bound on disagreement, and a margin below which to abstain (L5).

Both rest on the validation images, which calibrated and tuned nothing. Whoever compares several engines on them and
releases the best has chosen by them; the bound is divided by the number of engines that the store remembers having
been measured on these very images.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpdeploy.artifact import Artifact
from mpdeploy.certify.deployment import Rule, deployment_rule, engine_margins, margin_grid
from mpdeploy.certify.ledger import slack_of
from mpdeploy.certify.statistics import check_splits, clustered, disagreement
from mpdeploy.errors import RecipeError
from mpdeploy.recipe import Validate


def candidates(validate: Artifact, remembered: Iterable[Artifact]) -> int:
    """Count the engines that were ever measured on the same validation images, equal files once."""
    ids = validate.json("validation.json")["ids"]
    engines: set[str] = set()
    for artifact in (validate, *remembered):
        if artifact.json("validation.json")["ids"] != ids:
            continue
        results = artifact.json("results.json")
        digests = results.get("binds", {}).get("engines", {})
        measured = [row["id"] for row in results["engines"] if row["status"] == "measured"]
        # Results of an older version name no files: each of their engines counts as one of its own.
        engines |= {digests.get(name, f"{artifact.digest}/{name}") for name in measured}
    return len(engines)


def claims(artifacts: Mapping[str, Artifact], table: Validate, count: int) -> tuple[dict[str, Any], Rule | None]:
    """Return what disagreement.json holds, and the rule for the engine that is to be released.

    Args:
        artifacts: one per stage.
        table: the recipe's table.
        count: engines measured on these images, see `candidates`.

    Raises:
        StageFailed: an image is in two of calibration, certification and validation.
        RecipeError: table.cluster finds nothing in an id.
    """
    from safetensors.numpy import load_file

    draws, validate = artifacts["source"].json("calibration.json"), artifacts["validate"]
    ids = validate.json("validation.json")["ids"]
    check_splits(
        {"calibration": draws["calibration_ids"], "certification": draws["certification_ids"], "validation": ids}
    )
    samples = load_file(validate.path("samples.safetensors"))
    clusters = clusters_of(ids, table.cluster)
    stated: dict[str, Any] = {"schema": 1, "confidence": table.confidence, "candidates": count, "engines": {}}
    rule = None
    stated["rule"] = None
    for row in validate.json("results.json")["engines"]:
        if row["status"] != "measured":
            continue
        name, logits = row["id"], samples[f"engine.{row['id']}"]
        differs = ~(slack_of(logits) > 0)
        bound = (
            disagreement(int(differs.sum()), len(ids), table.confidence, count)
            if clusters is None
            else clustered(differs, clusters, table.confidence, count)
        )
        stated["engines"][name] = {
            "k": bound.disagreements,
            "n": bound.n,
            "upper": bound.upper,
            "clusters": table.cluster or None,
            "statement": bound.statement,
        }
        scale = artifacts["certify"].json("certificate.json")["margin_median"]
        # Where the dense margins are nothing, there is no scale to test on.
        if name == table.deploy and scale is not None and scale > 0:
            margins = _margins(logits)
            grid = margin_grid(scale)
            rule = deployment_rule(margins, differs, table.alpha, table.confidence, grid, count, clusters)
            abstains = len(ids) if rule.tau is None else len(ids) - int((margins > rule.tau).sum())
            stated["rule"] = {**rule.json(), "engine": name, "abstains": abstains}
    return stated, rule


def clusters_of(ids: Sequence[str], pattern: str) -> list[str] | None:
    """Return the cluster of each image, None where every image is one of its own.

    Raises:
        RecipeError: the pattern finds nothing in an id.
    """
    if not pattern:
        return None
    found = [(name, re.search(pattern, name)) for name in ids]
    if missed := [name for name, match in found if match is None or match[1] is None]:
        raise RecipeError(
            f"validate.cluster: {pattern!r} finds no group in {len(missed)} of {len(ids)} ids, {missed[0]} for one."
        )
    return [match[1] for _, match in found if match is not None]


def _margins(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Return the engine's own margins from kept columns; where every class is kept, the last one stands for none."""
    return engine_margins(logits[:, :-1] if np.isneginf(logits[:, -1]).all() else logits)
