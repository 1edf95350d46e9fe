"""validate: every engine that runs here, on the validation split, against the dense network and its dense twin."""

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpdeploy.artifact import Artifact, sha256_of, write_json
from mpdeploy.certify.ledger import (
    Kept,
    Ledger,
    Rows,
    columns,
    decided,
    joined,
    rows_of,
    slack_of,
    spent_by,
)
from mpdeploy.compare import decide, decisions, interleave, speed, top1
from mpdeploy.data import draw
from mpdeploy.errors import StageFailed, Unavailable
from mpdeploy.recipe import Data, Table, Validate
from mpdeploy.runtimes import Session, cpu_name
from mpdeploy.stage import Facts, Given, Stage
from mpdeploy.stages.build import QUANTISED
from mpdeploy.stages.certify import load_networks
from mpdeploy.stages.environment import needs, versions
from mpdeploy.stages.export import file_name
from mpdeploy.stages.images import open_images, strict_float32
from mpdeploy.stages.noise import Noise, foretold, noise_of

Logits = NDArray[np.float32]
Sessions = Mapping[str, Session]

COMMON = ("dense", "pruned", "tuned", "onnx")
"""The stages that all engines share; each engine is one more behind the last of them."""
FORWARD = 64
"""Images per forward pass, or fewer where an engine takes fewer."""


class Params(Table):
    """What to measure, and where the validation images are."""

    validate_: Validate
    data: Data
    keep: int


def asks(params: Params) -> Mapping[str, Any]:
    """The images are pinned by the source artefact. What is released and what is claimed of it is judged later."""
    own = params.validate_.model_dump(mode="json", exclude={"deploy", "alpha", "cluster"})
    return {**own, "seed": params.data.seed, "keep": params.keep}


@dataclass(frozen=True)
class Branch:
    """One engine's share of the ledger of the validation samples.

    Attributes:
        logits: float32 [n, T + 1], at the ledger's kept classes.
        eps: float64 [n], against the exported graph.
        share: float64 [n], of the dense margin.
    """

    logits: Logits
    eps: NDArray[np.float64]
    share: NDArray[np.float64]


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
    certificate = load_file(given["certify"].path("ledger.safetensors"))
    with contextlib.ExitStack() as stack:
        engines, missing = _open_engines(given, stack)
        size = min([FORWARD, *(int(_manifest(given, name)["batch"][2]) for name in engines)])
        chain = {**_torch_sessions(given, stack), "onnx": _exported_session(given, stack)}
        rows, branches = _ledger(
            chain, engines, images.batches(val, chosen, size), labels, params.keep, given, len(chosen)
        )
        certified = _certification(engines, images.drawn("certification", size), certificate["kept_classes"], given)
        few = images.batch(val, chosen[: table.noise]) if table.noise else None
        noise = {} if few is None else _noise(given, chain, engines, few, size)
        foretold = {name: None if few is None else _foretold(given, name, few) for name in missing}
        sample = images.batch(val, chosen[: min(size, 8, len(chosen))])
        consistent = {name: _batch_consistent(session, sample) for name, session in engines.items()}
    arrays: dict[str, NDArray[Any]] = {
        "labels": rows.labels,
        "kept_classes": rows.kept_classes,
        "logits": rows.logits,
        "eps": rows.eps,
        "share": rows.share,
    }
    for name, own in noise.items():
        prefix = name if name == "onnx" else f"engine.{name}"
        arrays |= {f"{prefix}.sigma": own.sigma, f"{prefix}.error": own.error}
    found = []
    for name in given["build"].facts["engines"]:
        if name in missing:
            why_not, row = missing[name], foretold[name]
            found.append({"id": name, "status": "not run", "why_not": why_not, "noise_forecast": row})
            continue
        arrays |= {f"engine.{name}": branches[name].logits, f"certification.{name}": certified[name]}
        arrays |= {f"engine.{name}.eps": branches[name].eps, f"engine.{name}.share": branches[name].share}
        latency = _latency(name, given, images.batch(val, chosen[: table.batch]), table, arrays)
        found.append(
            {
                "id": name,
                "status": "measured",
                "why_not": "",
                **_judged(rows, branches[name], certified[name], certificate, given, table.confidence),
                "batch_consistent": consistent[name],
                "noise_floor": noise[name].facts if name in noise else None,
                "latency": latency,
            }
        )
    save_file({key: np.ascontiguousarray(value) for key, value in arrays.items()}, out / "samples.safetensors")
    write_json(out / "validation.json", {"ids": [val.ids[i] for i in chosen], "indices": chosen.tolist()})
    decided_by = {name: decided(rows.logits[:, i], rows.kept_classes) for i, name in enumerate(COMMON)}
    dense = top1(decided_by["dense"], labels, table.confidence)
    write_json(
        out / "results.json",
        {
            "schema": 2,
            "confidence": table.confidence,
            "machine": cpu_name(),
            "validation": {"samples": len(labels), "classes": _classes(given)},
            "dense_top1": dense,
            "tuned_top1": top1(decided_by["tuned"], labels, table.confidence),
            "binds": _binds(given),
            "export_noise": noise["onnx"].facts if "onnx" in noise else None,
            "engines": found,
        },
    )
    return {"samples": len(labels), "dense_top1": dense["value"]}


def _manifest(given: Given, name: str) -> dict[str, Any]:
    manifest: dict[str, Any] = given["build"].json(f"engines/{name}/engine.json")
    return manifest


def _classes(given: Given) -> int:
    return int(given["certify"].json("certificate.json")["classes"])


def _open_engines(given: Given, stack: contextlib.ExitStack) -> tuple[dict[str, Session], dict[str, str]]:
    """Open every engine that runs here; of the others return why not."""
    from mpdeploy.runtimes import open_engine

    engines, missing = {}, {}
    for name in given["build"].facts["engines"]:
        try:
            folder = given["build"].path(f"engines/{name}/engine.json").parent
            engines[name] = stack.enter_context(open_engine(folder))
        except Unavailable as error:
            missing[name] = _manifest(given, name)["why_not"] or error.what
    return engines, missing


def _torch_sessions(given: Given, stack: contextlib.ExitStack) -> dict[str, Session]:
    from mpdeploy.runtimes.torch_eager import TorchSession

    stack.enter_context(strict_float32())
    return {name: stack.enter_context(TorchSession(network)) for name, network in load_networks(given).items()}


def exported_file(given: Given) -> Path:
    """Return the exported graph that the engines are held against: the fp32 one, else the first there is."""
    names = given["export"].json("export.json")["files"]
    name = file_name("sparse", "fp32")
    return given["export"].path(name if name in names else next(n for n in names if names[n]["weights"] == "sparse"))


def _exported_session(given: Given, stack: contextlib.ExitStack) -> Session:
    from mpdeploy.runtimes.onnxruntime import OnnxSession

    return stack.enter_context(OnnxSession(exported_file(given)))


def _ledger(
    chain: Sessions,
    engines: Sessions,
    batches: Iterable[Logits],
    labels: NDArray[np.int64],
    keep: int,
    given: Given,
    total: int,
) -> tuple[Rows, dict[str, Branch]]:
    """Run everything on each batch and keep what the ledger needs of it."""
    parts: list[Rows] = []
    branches: dict[str, list[Branch]] = {name: [] for name in engines}
    done = 0
    for batch in batches:
        given.progress("running networks and engines", done, total)
        stages = {name: session.run(batch) for name, session in chain.items()}
        own = {name: session.run(batch) for name, session in engines.items()}
        rows = rows_of(labels[done : done + len(batch)], stages, keep, list(own.values()))
        for name, logits in own.items():
            label = rows.kept_classes[:, 0].astype(np.int64)
            eps, share = spent_by(stages["onnx"], logits, stages["dense"], label)
            branches[name].append(Branch(columns(logits, rows.kept_classes), eps, share))
        parts.append(rows)
        done += len(batch)
    given.progress("running networks and engines", done, total)
    return joined(parts), {name: _joined_branch(pieces) for name, pieces in branches.items()}


def _joined_branch(pieces: list[Branch]) -> Branch:
    return Branch(*(np.concatenate([getattr(p, key) for p in pieces]) for key in ("logits", "eps", "share")))


def _certification(
    engines: Sessions, batches: Iterable[Logits], kept: NDArray[np.int32], given: Given
) -> dict[str, Logits]:
    """Run the engines on the certification images; keep the classes that the certificate keeps."""
    parts: dict[str, list[Logits]] = {name: [] for name in engines}
    done = 0
    for batch in batches:
        given.progress("running engines on certified images", done, len(kept))
        for name, session in engines.items():
            parts[name].append(columns(session.run(batch), kept[done : done + len(batch)]))
        done += len(batch)
    given.progress("running engines on certified images", done, len(kept))
    return {name: np.concatenate(pieces) for name, pieces in parts.items()}


def _judged(
    rows: Rows,
    branch: Branch,
    certified: Logits,
    certificate: Mapping[str, Any],
    given: Given,
    confidence: float,
) -> dict[str, Any]:
    """Return what an engine's logits say about its labels, the certificate's, and what it spent of the margins."""
    slack = slack_of(branch.logits)
    ok = bool(np.isfinite(slack).all() and np.isfinite(slack_of(certified)).all())
    return {
        **decisions(
            decided(rows.logits[:, 0], rows.kept_classes),
            decided(branch.logits, rows.kept_classes),
            slack > 0,
            rows.labels,
            confidence,
        ),
        "certified": _violations(certificate, certified, given["certify"].json("certificate.json")["ids"]),
        "spent": Ledger((*COMMON, "engine"), _with(rows, branch), 0.0).spent() if ok else [],
        "finite": ok,
    }


def _with(rows: Rows, branch: Branch) -> Rows:
    """Return the chain with one engine behind it."""
    return replace(
        rows,
        logits=np.concatenate([rows.logits, branch.logits[:, None]], axis=1),
        eps=np.concatenate([rows.eps, branch.eps[:, None]], axis=1),
        share=np.concatenate([rows.share, branch.share[:, None]], axis=1),
    )


def _noise(given: Given, chain: Sessions, engines: Sessions, images: Logits, size: int) -> dict[str, Noise]:
    """Hold the exported graph against PyTorch, and each engine against the graph that it was built from."""
    from mpdeploy.graph.program import read_program

    found: dict[str, Noise] = {}
    given.progress("computing noise floors", 0, 1 + len(engines))
    exported = exported_file(given)
    if exported.name == file_name("sparse", "fp32"):  # an fp16 file differs by its rounded weights as well
        tuned, onnx = (_in_batches(chain[stage], images, size) for stage in ("tuned", "onnx"))
        found["onnx"] = noise_of(read_program(exported), "fp32", images, onnx, tuned, executions=2)
    for name, session in engines.items():
        given.progress("computing noise floors", len(found), 1 + len(engines))
        program, declared = read_program(_built_from(given, name)), _manifest(given, name)["precision"]
        found[name] = noise_of(program, declared, images, _in_batches(session, images, size))
    given.progress("computing noise floors", len(found), len(found))
    return found


def _foretold(given: Given, name: str, images: Logits) -> dict[str, Any]:
    """Return what the noise floor's model foretells of an engine that is not run here."""
    from mpdeploy.graph.program import read_program

    return foretold(read_program(_built_from(given, name)), _manifest(given, name)["precision"], images)


def _built_from(given: Given, name: str) -> Path:
    """Return the graph that an engine was built from: the quantised one beside it, or the exported file."""
    build, manifest = given["build"], _manifest(given, name)
    quantised = f"engines/{name}/{QUANTISED}"
    return build.path(quantised) if build.has(quantised) else given["export"].path(manifest["source"]["file"])


def _in_batches(session: Session, images: Logits, size: int) -> Logits:
    return np.concatenate([session.run(images[i : i + size]) for i in range(0, len(images), size)])


def _batch_consistent(session: Session, sample: Logits) -> bool:
    """Tell whether each image gets the same label alone, beside others, and beside copies of itself."""
    together = decide(session.run(sample))
    alone = np.concatenate([decide(session.run(sample[i : i + 1])) for i in range(len(sample))])
    copies = decide(session.run(np.repeat(sample[:1], len(sample), axis=0)))
    return bool((together == alone).all() and (copies == alone[0]).all())


def _violations(certificate: Mapping[str, Any], engine: Logits, ids: list[str]) -> dict[str, Any]:
    """Count labels that the ledger certified (or kept) and the engine lost."""
    lost = ~(slack_of(engine) > 0)
    broken = lost & (certificate["verdict"] == Kept.CERTIFIED)
    return {
        "n": int((certificate["verdict"] == Kept.CERTIFIED).sum()),
        "violations": int(broken.sum()),
        "violating_ids": [ids[i] for i in np.flatnonzero(broken)],
        "kept_broken": int((lost & (certificate["verdict"] == Kept.KEPT)).sum()),
    }


def _binds(given: Given) -> dict[str, Any]:
    """Return which files were measured: with another one of them these results say nothing."""
    export, build = given["export"], given["build"]
    folders = [f"{name}{end}" for name in build.facts["engines"] for end in ("", ".dense")]
    return {
        "certificate": sha256_of(given["certify"].path("certificate.json")),
        "onnx": {name: sha256_of(export.path(name)) for name in export.json("export.json")["files"]},
        "engines": {folder: _manifest(given, folder)["sha256"] for folder in folders},
    }


def _latency(
    name: str, given: Given, batch: Logits, table: Validate, arrays: dict[str, NDArray[Any]]
) -> dict[str, Any]:
    """Time the engine against its dense twin: same graph, precision, runtime, batch and sitting."""
    from mpdeploy.runtimes import open_engine

    own, other = (given["build"].path(f"engines/{name}{end}/engine.json").parent for end in ("", ".dense"))
    with open_engine(own) as session, open_engine(other) as twin:
        latencies = interleave(
            lambda calls: session.time(batch, calls),
            lambda calls: twin.time(batch, calls),
            table.blocks,
            table.calls,
            lambda done, total: given.progress(f"timing {name}", done, total),
        )
    arrays[f"latency.{name}"], arrays[f"latency.{name}.dense"] = latencies.engine, latencies.twin
    summary = speed(latencies, table.blocks, table.confidence)
    return {"batch": len(batch), "threads": _manifest(given, name)["threads"], "twin": f"{name}.dense", **summary}


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
    takes=("source", "prune", "tune", "certify", "export", "build"),
    params=lambda recipe: Params(validate_=recipe.validate_, data=recipe.data, keep=recipe.certify.keep),
    asks=asks,
    environment=lambda _: {**versions("onnxruntime", "torch", "numpy"), "cpu": cpu_name()},
    run=run,
    ensures=ensures,
)
