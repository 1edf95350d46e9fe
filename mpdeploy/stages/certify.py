"""certify: what pruning and tuning did to the dense margin of each certification sample."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpdeploy.artifact import Artifact, sha256_of, write_json
from mpdeploy.certify.ledger import finite, measure
from mpdeploy.compare import decide
from mpdeploy.errors import StageFailed
from mpdeploy.recipe import Certify, Data, Table
from mpdeploy.stage import Facts, Given, Stage
from mpdeploy.stages.environment import needs, versions
from mpdeploy.stages.images import logits_of, open_images

WEIGHTS = {"dense": ("source", "dense.safetensors"), "pruned": ("prune", "pruned.safetensors")}
WEIGHTS["tuned"] = ("tune", "tuned.safetensors")


class Params(Table):
    """How much to set aside, and where the certification images are."""

    certify: Certify
    data: Data


def asks(params: Params) -> Mapping[str, Any]:
    """The images are pinned by the source artefact."""
    return params.certify.model_dump(mode="json")


def run(params: Params, given: Given, out: Path) -> Facts:
    """Run the three networks on the same images and write the ledger."""
    needs("certify", "torch", "timm", "safetensors")
    from safetensors.numpy import save_file
    from safetensors.torch import load_file

    from mpdeploy.models import rebuild

    table, source = params.certify, given["source"]
    images = open_images(params.data, source)
    architecture, record = source.json("model.json"), source.json("calibration.json")
    logits, digests = {}, {}
    for done, (name, (stage, file)) in enumerate(WEIGHTS.items()):
        given.progress("running the networks", done, len(WEIGHTS))
        path = given[stage].path(file)
        digests[name] = sha256_of(path)
        network = rebuild(architecture, load_file(path))
        logits[name] = logits_of(network, images.drawn("certification", table.batch))
    given.progress("running the networks", len(WEIGHTS), len(WEIGHTS))
    labels = np.asarray(images.dataset.train.labels)[images.draws["certification"]]
    ledger = measure(logits, table.reserve)
    arrays: dict[str, NDArray[Any]] = {
        **logits,
        "labels": labels,
        "dense_label": ledger.dense_label,
        "margin": ledger.margin,
        "slack": ledger.slack,
        "reserve": ledger.reserve,
        "verdict": ledger.verdict,
    }
    save_file(arrays, out / "ledger.safetensors")
    counts = ledger.counts()
    write_json(
        out / "certificate.json",
        {
            "schema": 1,
            "samples": len(labels),
            "classes": int(logits["dense"].shape[1]),
            "ids": record["certification_ids"],
            "reserve": table.reserve,
            "stages": list(ledger.stages),
            "counts": counts,
            "top1": {name: int((decide(z) == labels).sum()) for name, z in logits.items()},
            "spent": [dict(row) for row in ledger.spent],
            "margin_median": finite(np.median(ledger.margin)),
            "slack_median": finite(np.median(ledger.slack)),
            "digests": digests,
            "zero_budget": {
                row["name"]: row["zero_budget"] for row in given["prune"].json("layers.json") if row.get("zero_budget")
            },
        },
    )
    return counts


def ensures(made: Artifact) -> None:
    """No certified sample changes its label, in the numbers on disk."""
    from safetensors.numpy import load_file

    ledger = load_file(made.path("ledger.safetensors"))
    lost = (ledger["verdict"] == 2) & (decide(ledger["tuned"]) != ledger["dense_label"])
    if lost.any():
        raise StageFailed(f"{int(lost.sum())} certified samples changed their label: a bug in the ledger.")


STAGE = Stage(
    name="certify",
    summary="measure what pruning and tuning spent of each sample's dense margin",
    takes=("source", "prune", "tune"),
    params=lambda recipe: Params(certify=recipe.certify, data=recipe.data),
    asks=asks,
    environment=lambda _: versions("torch", "numpy"),
    run=run,
    ensures=ensures,
)
