"""certify: what pruning and tuning did to the dense margin of each certification sample."""

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpdeploy.artifact import Artifact, sha256_of, write_json
from mpdeploy.certify.ledger import Kept, Ledger, columns, decided, finite, joined, reference_gap, rows_of
from mpdeploy.errors import StageFailed
from mpdeploy.recipe import Certify, Data, Table
from mpdeploy.runtimes import Session, cpu_name
from mpdeploy.stage import Facts, Given, Stage
from mpdeploy.stages.environment import needs, versions
from mpdeploy.stages.images import Images, exact_logits, open_images, strict_float32

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
    """Run the three networks side by side on the same images and write the ledger."""
    needs("certify", "torch", "timm", "safetensors")
    from safetensors.numpy import save_file

    table, source = params.certify, given["source"]
    images = open_images(params.data, source)
    record = source.json("calibration.json")
    labels = np.asarray(images.dataset.train.labels)[images.draws["certification"]]
    networks = load_networks(given)
    with strict_float32(), contextlib.ExitStack() as stack:
        sessions = {name: stack.enter_context(_session(network)) for name, network in networks.items()}
        ledger, plain = measure(
            sessions,
            images.drawn("certification", table.batch),
            labels,
            table,
            lambda done: given.progress("running the networks", done, len(labels)),
        )
        few = images.batch(images.dataset.train, images.draws["certification"][: table.reference])
        exact = exact_logits(networks["dense"], few)
    rows = ledger.rows
    save_file(
        {**ledger.arrays(), "reference": columns(exact, rows.kept_classes[: len(exact)], np.float64)},
        out / "ledger.safetensors",
    )
    counts = ledger.counts()
    write_json(
        out / "certificate.json",
        {
            "schema": 2,
            "samples": len(labels),
            "classes": int(exact.shape[1]),
            "kept": int(rows.kept_classes.shape[1]),
            "ids": record["certification_ids"],
            "reserve": table.reserve,
            "stages": list(ledger.stages),
            "counts": counts,
            "tests": ledger.tests(),
            "top1": ledger.top1(),
            "margin_median": finite(np.median(ledger.margin)),
            "slack_median": finite(np.median(ledger.slack)),
            "reference": reference_gap(exact, plain),
            "spent": ledger.spent(),
            "objective": {"stage": "pruned", "changed": _changed(given, networks["pruned"].state_dict())},
            "proofs": _proofs(given, networks, images, table) if table.proofs else None,
            "binds": binds(given, record["certification_ids"], table.batch),
            "zero_budget": {
                row["name"]: row["zero_budget"] for row in given["prune"].json("layers.json") if row.get("zero_budget")
            },
        },
    )
    return counts


def _dense_in_order(given: Given) -> "dict[str, Any]":
    """Return the dense network's tensors in the channel order of the pruned one: the same function, comparable."""
    from safetensors.torch import load_file

    from mpdeploy.stages.prune import fold_orders

    state = load_file(given["source"].path("dense.safetensors"))
    fold_orders(state, given["prune"].json("orders.json"))
    return state


def _changed(given: Given, pruned: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the norms of what pruning removed from each matrix: R = dense - pruned, [O, I] or [O, I*kh*kw]."""
    from mpdeploy.certify.objective import norms_of

    rows = []
    for name, tensor in _dense_in_order(given).items():
        residual = tensor.double() - pruned[name].double() if tensor.is_floating_point() and tensor.ndim > 1 else None
        if residual is not None and bool(residual.any()):
            rows.append({"tensor": name, **norms_of(residual.flatten(1))})
    return rows


def _proofs(given: Given, networks: Mapping[str, Any], images: Images, table: Certify) -> dict[str, Any]:
    """Try the provable levels on a few samples, on the graphs that the three networks are exported as."""
    from mpdeploy.certify.levels import prove_data_path, prove_labels
    from mpdeploy.certify.objective import Penalty
    from mpdeploy.graph.export import exported_program
    from mpdeploy.models import rebuild

    chosen = images.draws["certification"][: table.proofs]
    few, labels = images.batch(images.dataset.train, chosen), np.asarray(images.dataset.train.labels)[chosen]
    given.progress("proving", 0, 3)
    modules = {**networks, "dense": rebuild(given["source"].json("model.json"), _dense_in_order(given))}
    size = tuple(given["source"].json("model.json")["input_size"])
    graphs = {name: exported_program(module, size) for name, module in modules.items()}
    given.progress("proving", 1, 3)
    labelled = prove_labels(graphs["dense"], graphs["tuned"], few)
    given.progress("proving", 2, 3)
    path = prove_data_path(graphs["dense"], graphs["pruned"], few, labels, Penalty(table.lambda2, table.lambda1))
    given.progress("proving", 3, 3)
    return {**labelled, "data_path": path}


def load_networks(given: Given) -> "dict[str, Any]":
    """Return the dense, pruned and tuned networks."""
    from safetensors.torch import load_file

    from mpdeploy.models import rebuild

    architecture = given["source"].json("model.json")
    return {name: rebuild(architecture, load_file(given[stage].path(file))) for name, (stage, file) in WEIGHTS.items()}


def _session(network: Any) -> Session:
    from mpdeploy.runtimes.torch_eager import TorchSession

    return TorchSession(network)


def measure(
    sessions: Mapping[str, Session],
    batches: Iterable[NDArray[np.float32]],
    labels: NDArray[np.int64],
    table: Certify,
    progress: Callable[[int], None],
) -> tuple[Ledger, NDArray[np.float32]]:
    """Run every network on each batch and keep of it what the ledger needs: memory grows with n, not with n times K.

    Returns:
        The ledger, and the first network's logits of the first samples in full, [min(n, table.reference), K].
    """
    parts, plain, done = [], [], 0
    for batch in batches:
        progress(done)
        logits = {name: session.run(batch) for name, session in sessions.items()}
        parts.append(rows_of(labels[done : done + len(batch)], logits, table.keep))
        plain.append(next(iter(logits.values()))[: max(0, table.reference - done)])
        done += len(batch)
    progress(done)
    return Ledger(tuple(sessions), joined(parts), table.reserve), np.concatenate(plain)


def binds(given: Given, ids: list[str], batch: int) -> dict[str, Any]:
    """Return what the certificate is about: with another of these it says nothing."""
    return {
        "weights": {name: sha256_of(given[stage].path(file)) for name, (stage, file) in WEIGHTS.items()},
        "preprocessing": sha256_of(given["source"].path("preprocessing.json")),
        "ids": hashlib.sha256("\n".join(ids).encode()).hexdigest(),
        "versions": versions("torch", "timm", "numpy"),
        "device": cpu_name(),
        "precision": "float32",
        "batch": batch,
    }


def ensures(made: Artifact) -> None:
    """No certified sample changes its label, in the numbers on disk."""
    from safetensors.numpy import load_file

    ledger = load_file(made.path("ledger.safetensors"))
    certified = ledger["verdict"] == Kept.CERTIFIED
    label = decided(ledger["logits"][:, -1], ledger["kept_classes"])
    if lost := int((certified & (label != ledger["kept_classes"][:, 0])).sum()):
        raise StageFailed(f"{lost} certified samples changed their label: a bug in the ledger.")


STAGE = Stage(
    name="certify",
    summary="measure what pruning and tuning spent of each sample's dense margin",
    takes=("source", "prune", "tune"),
    params=lambda recipe: Params(certify=recipe.certify, data=recipe.data),
    asks=asks,
    environment=lambda _: {**versions("torch", "numpy"), "cpu": cpu_name()},
    run=run,
    ensures=ensures,
)
