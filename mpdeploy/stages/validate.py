"""validate: every engine that runs here, on the validation split, against the dense network and its dense twin."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpdeploy.artifact import Artifact, write_json
from mpdeploy.certify.ledger import Kept, keeps, measure, pair_margins
from mpdeploy.compare import decide, decisions, interleave, speed, top1
from mpdeploy.data import draw
from mpdeploy.errors import StageFailed, Unavailable
from mpdeploy.recipe import Data, Table, Validate
from mpdeploy.runtimes import cpu_name
from mpdeploy.stage import Facts, Given, Stage
from mpdeploy.stages.environment import needs, versions
from mpdeploy.stages.images import Images, logits_of, open_images

Logits = NDArray[np.float32]


class Params(Table):
    """What to measure, and where the validation images are."""

    validate_: Validate
    data: Data


def asks(params: Params) -> Mapping[str, Any]:
    """The images are pinned by the source artefact. Which engine is released is the gates' business, not ours."""
    return {**params.validate_.model_dump(mode="json", exclude={"deploy"}), "seed": params.data.seed}


def run(params: Params, given: Given, out: Path) -> Facts:
    """Measure everything; judge nothing: the gates do that from the files written here."""
    needs("validate", "torch", "timm", "safetensors")
    from safetensors.numpy import load_file, save_file

    table = params.validate_
    images = open_images(params.data, given["source"])
    val = images.dataset.val
    chosen = (
        np.arange(len(val.ids), dtype=np.int64)
        if table.samples in (0, len(val.ids))
        else draw(val, table.samples, params.data.seed)
    )
    labels = np.asarray(val.labels)[chosen]
    arrays: dict[str, NDArray[Any]] = {"labels": labels, **_torch_logits(given, images, chosen)}
    certificate = load_file(given["certify"].path("ledger.safetensors"))
    engines = []
    names = given["build"].facts["engines"]
    for done, name in enumerate(names):
        given.progress(f"measuring {name}", done, len(names))
        engines.append(_measure(name, given, images, chosen, arrays, certificate, table))
    given.progress("measuring", len(names), len(names))
    save_file({key: np.ascontiguousarray(value) for key, value in arrays.items()}, out / "samples.safetensors")
    write_json(out / "validation.json", {"ids": [val.ids[i] for i in chosen], "indices": chosen.tolist()})
    dense = top1(arrays["dense"], labels, table.confidence)
    write_json(
        out / "results.json",
        {
            "schema": 1,
            "confidence": table.confidence,
            "machine": cpu_name(),
            "validation": {"samples": len(labels), "classes": int(arrays["dense"].shape[1])},
            "dense_top1": dense,
            "tuned_top1": top1(arrays["tuned"], labels, table.confidence),
            "engines": engines,
        },
    )
    return {"samples": len(labels), "dense_top1": dense["value"]}


def _torch_logits(given: Given, images: Images, chosen: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """Return the dense, pruned and tuned networks' logits of the validation images."""
    from safetensors.torch import load_file

    from mpdeploy.models import rebuild
    from mpdeploy.stages.certify import WEIGHTS

    architecture = given["source"].json("model.json")
    logits = {}
    for done, (name, (stage, file)) in enumerate(WEIGHTS.items()):
        given.progress(f"running the {name} network", done, len(WEIGHTS))
        network = rebuild(architecture, load_file(given[stage].path(file)))
        logits[name] = logits_of(network, images.batches(images.dataset.val, chosen, 64))
    return logits


def _measure(
    name: str,
    given: Given,
    images: Images,
    chosen: NDArray[np.int64],
    arrays: dict[str, NDArray[Any]],
    certificate: Mapping[str, NDArray[Any]],
    table: Validate,
) -> dict[str, Any]:
    """Measure one engine; adds its raw samples to `arrays`."""
    from mpdeploy.runtimes import open_engine

    build = given["build"]
    folder = build.path(f"engines/{name}/engine.json").parent
    manifest = build.json(f"engines/{name}/engine.json")
    try:
        session = open_engine(folder)
    except Unavailable as missing:
        return {"id": name, "status": "not run", "why_not": manifest["why_not"] or missing.what}
    size = int(manifest["batch"][2])
    with session:
        logits = _run(session, images.batches(images.dataset.val, chosen, size))
        certification = _run(session, images.drawn("certification", size))
        sample = images.batch(images.dataset.val, chosen[: min(size, 8, len(chosen))])
        consistent = _batch_consistent(session, sample)
        latency = _latency(session, name, given, images.batch(images.dataset.val, chosen[: table.batch]), table, arrays)
    arrays[f"engine.{name}"], arrays[f"certification.{name}"] = logits, certification
    ok = bool(np.isfinite(logits).all() and np.isfinite(certification).all())
    stages = {"dense": arrays["dense"], "pruned": arrays["pruned"], "tuned": arrays["tuned"], "engine": logits}
    return {
        "id": name,
        "status": "measured",
        "why_not": "",
        **decisions(arrays["dense"], logits, arrays["labels"], table.confidence),
        "certified": _violations(certificate, certification, given["certify"].json("certificate.json")["ids"]),
        "spent": [dict(row) for row in measure(stages, 0.0).spent] if ok else [],
        "finite": ok,
        "batch_consistent": consistent,
        "latency": latency,
    }


def _run(session: Any, batches: Any) -> Logits:
    return np.concatenate([session.run(batch) for batch in batches])


def _batch_consistent(session: Any, sample: Logits) -> bool:
    """Tell whether each image gets the same label alone, beside others, and beside copies of itself."""
    together = decide(session.run(sample))
    alone = np.concatenate([decide(session.run(sample[i : i + 1])) for i in range(len(sample))])
    copies = decide(session.run(np.repeat(sample[:1], len(sample), axis=0)))
    return bool((together == alone).all() and (copies == alone[0]).all())


def _violations(certificate: Mapping[str, NDArray[Any]], engine: Logits, ids: list[str]) -> dict[str, Any]:
    """Count labels that the ledger certified (or kept) and the engine lost."""
    lost = ~keeps(pair_margins(engine, certificate["dense_label"]))
    broken = lost & (certificate["verdict"] == Kept.CERTIFIED)
    return {
        "n": int((certificate["verdict"] == Kept.CERTIFIED).sum()),
        "violations": int(broken.sum()),
        "violating_ids": [ids[i] for i in np.flatnonzero(broken)],
        "kept_broken": int((lost & (certificate["verdict"] == Kept.KEPT)).sum()),
    }


def _latency(
    session: Any, name: str, given: Given, batch: Logits, table: Validate, arrays: dict[str, NDArray[Any]]
) -> dict[str, Any]:
    """Time the engine against its dense twin: same graph, precision, runtime, batch and sitting."""
    from mpdeploy.runtimes import open_engine

    twin_manifest = given["build"].path(f"engines/{name}.dense/engine.json")
    with open_engine(twin_manifest.parent) as twin:
        latencies = interleave(
            lambda calls: session.time(batch, calls),
            lambda calls: twin.time(batch, calls),
            table.blocks,
            table.calls,
            lambda done, total: given.progress(f"timing {name}", done, total),
        )
    arrays[f"latency.{name}"], arrays[f"latency.{name}.dense"] = latencies.engine, latencies.twin
    threads = given["build"].json(f"engines/{name}/engine.json")["threads"]
    summary = speed(latencies, table.blocks, table.confidence)
    return {"batch": len(batch), "threads": threads, "twin": f"{name}.dense", **summary}


def ensures(made: Artifact) -> None:
    """Something was measured, and every number on disk has its raw samples beside it."""
    from safetensors.numpy import load_file

    arrays = load_file(made.path("samples.safetensors"))
    for engine in made.json("results.json")["engines"]:
        if engine["status"] == "measured" and len(arrays[f"engine.{engine['id']}"]) != len(arrays["labels"]):
            raise StageFailed(f"{engine['id']} gave another number of logits than there are validation images.")


STAGE = Stage(
    name="validate",
    summary="run the engines on the validation images: labels, margins, latency against the dense twin",
    takes=("source", "prune", "tune", "certify", "build"),
    params=lambda recipe: Params(validate_=recipe.validate_, data=recipe.data),
    asks=asks,
    environment=lambda _: {**versions("onnxruntime", "torch", "numpy"), "cpu": cpu_name()},
    run=run,
    ensures=ensures,
)
