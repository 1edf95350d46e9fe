"""prune: zeros on the axis that the engines read, and an exact refit of what is left."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpdeploy.artifact import Artifact, write_json
from mpdeploy.errors import RecipeError, StageFailed, Unavailable
from mpdeploy.recipe import Data, Prune, Table
from mpdeploy.stage import Facts, Given, Stage
from mpdeploy.stages.environment import needs, versions
from mpdeploy.stages.images import open_images

if TYPE_CHECKING:
    import torch
    from torch import nn

    from mpdeploy.pruning.layers import Layer
    from mpdeploy.pruning.solve import Settings


class Params(Table):
    """How to prune, and where the calibration images are."""

    prune: Prune
    data: Data


def asks(params: Params) -> Mapping[str, Any]:
    """The images are pinned by the source artefact; their path is not part of what is asked."""
    return params.prune.model_dump(mode="json")


def run(params: Params, given: Given, out: Path) -> Facts:
    """Prune the dense network with its calibration images."""
    needs("prune", "torch", "timm", "safetensors")
    import torch
    from safetensors.numpy import save_file as save_arrays
    from safetensors.torch import load_file, save_file

    from mpdeploy.models import rebuild
    from mpdeploy.pruning.capture import capture, state_of
    from mpdeploy.pruning.layers import weight_of
    from mpdeploy.pruning.macs import count
    from mpdeploy.pruning.reconstruct import reconstruct
    from mpdeploy.pruning.reorder import Reordered, reorder
    from mpdeploy.pruning.solve import Settings, prune_network
    from mpdeploy.pruning.zero_budget import reduce_network

    table, source = params.prune, given["source"]
    device = usable_device(table.device)
    architecture = source.json("model.json")
    module = rebuild(architecture, load_file(source.path("dense.safetensors"))).to(device)
    size = tuple(architecture["input_size"])
    layers, fitting = candidates(module, table, size)
    if not fitting:
        why = layers[0].reason if layers else "It has no Linear or Conv2d layer."
        wanted = " or ".join(table.allocate.patterns) if table.allocate else table.pattern
        raise RecipeError(
            f"No layer of the network can be pruned to {wanted}: {why}",
            hint="`mpdeploy plan` lists each layer with the rule that keeps it dense.",
        )
    spectra = {name: _spectrum(module.get_submodule(name).weight) for name in fitting}
    settings = Settings(mask_method(table), table.refit, table.damping, table.precision)
    images = open_images(params.data, source)
    batches = [torch.from_numpy(x).to(device) for x in images.drawn("calibration", table.batch)]
    given.progress("capturing the network", 0, 1)
    graph = capture(module, size)
    allocation: dict[str, Any] = {"asked": False}
    if table.allocate:
        layers, allocation = _allocated(module, graph, batches, layers, fitting, spectra, settings, params, given)
    masks: dict[str, torch.Tensor] = {}
    orders = Reordered((), (), {}, 0.0)
    if table.sparsity:
        # No order is searched: such masks have no groups that an order could help.
        layers, masks = _unstructured(module, table, layers, spectra)
    else:
        orders = reorder(
            module,
            graph,
            batches,
            layers,
            iterations=table.permute,
            seed=table.seed,
            progress=partial(given.progress, "ordering channels"),
        )
    chosen = {layer.name: layer for layer in layers if layer.pattern}
    removed = {}
    if table.zero_budget and not table.sparsity:
        removed = reduce_network(
            module,
            graph,
            batches,
            layers,
            progress=partial(given.progress, "looking for inputs that cost nothing"),
        )
    dense = {name: tensor.clone() for name, tensor in state_of(module, graph).items()} if table.reconstruct else {}
    results = prune_network(
        module,
        graph,
        batches,
        layers,
        settings=settings,
        masks=masks,
        progress=partial(given.progress, "pruning layers"),
    )
    blocks = []
    if table.reconstruct:
        kept = {name: weight_of(module.get_submodule(name)) != 0 for name in chosen}
        blocks = reconstruct(
            module,
            graph,
            dense,
            batches,
            kept,
            steps=table.reconstruct,
            seed=table.seed,
            progress=partial(given.progress, "reconstructing blocks"),
        )
    by_name = {result.name: asdict(result) for result in results}
    for name, proof in removed.items():
        by_name[name]["zero_budget"] = asdict(proof)
    for name, mask in masks.items():
        by_name[name]["zeros"] = int((~mask).sum())
    save_file({k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}, out / "pruned.safetensors")
    spectra = {name: spectra[name] for name in chosen}
    save_arrays({name: s.eigenvalues.astype(np.float32) for name, s in spectra.items()}, out / "spectra.safetensors")
    write_json(out / "orders.json", _orders(orders))
    write_json(out / "allocation.json", allocation)
    write_json(out / "reconstruction.json", [asdict(block) for block in blocks])
    write_json(
        out / "layers.json",
        [{**asdict(layer), **by_name.get(layer.name, {}), **_described(spectra.get(layer.name))} for layer in layers],
    )
    macs = count(module, size)
    write_json(out / "macs.json", {"total": macs.total, "other": macs.other, "layers": macs.layers})
    return {
        "layers": len(layers),
        "pruned": len(chosen),
        "pattern": table.pattern,
        "macs": macs.total,
        "reordered": len(orders.couplings),
        "logit_change_of_reordering": orders.logit_change,
        **({"note": "unstructured masks have no groups: channels keep their order"} if table.sparsity else {}),
    }


def candidates(
    module: "nn.Module", table: Prune, size: tuple[int, int, int]
) -> "tuple[list[Layer], dict[str, tuple[str, ...]]]":
    """List the layers, and the patterns that each of those to be pruned may get.

    Args:
        module: the network; the meta device is enough.
        table: the recipe's.
        size: channels, height, width.

    Returns:
        The layers with the recipe's pattern, or for "mixed" as yet without one; and the patterns by layer.

    Raises:
        RecipeError: a mixed recipe's budget is below the sparsest choice.
    """
    from mpdeploy.pruning.layers import choose
    from mpdeploy.pruning.measure import check_budget, choose_among

    stem, head = table.keep_stem_dense, table.keep_head_dense
    if table.allocate:
        patterns = table.allocate.patterns
        layers, fitting = choose_among(module, patterns, table.skip, size, keep_stem_dense=stem, keep_head_dense=head)
        check_budget(layers, fitting, table.allocate.unit, table.allocate.budget)
    else:
        layers = choose(module, table.pattern, table.skip, size, keep_stem_dense=stem, keep_head_dense=head)
        fitting = {layer.name: (layer.pattern,) for layer in layers if layer.pattern}
    return layers, fitting


def mask_method(table: Prune) -> str:
    """Return how a layer's mask is chosen where it is chosen layer by layer."""
    return "magnitude" if table.pattern == "unstructured" else table.method


def _allocated(
    module: "nn.Module",
    graph: Any,
    batches: "list[torch.Tensor]",
    layers: "list[Layer]",
    fitting: "Mapping[str, tuple[str, ...]]",
    spectra: Mapping[str, Any],
    settings: "Settings",
    params: Params,
    given: Given,
) -> "tuple[list[Layer], dict[str, Any]]":
    """Measure every choice, rank four times, and give the layers the patterns of the ranking that the recipe names."""
    from mpdeploy.pruning.layers import weight_of
    from mpdeploy.pruning.measure import budget_of, described, measure, rank, with_patterns
    from mpdeploy.pruning.unstructured import seb_weights

    table = params.prune.allocate
    assert table is not None  # for the type checker: the caller asked
    found = measure(
        module,
        graph,
        batches,
        layers,
        fitting,
        settings,
        unit=table.unit,
        images=table.images,
        progress=partial(given.progress, "measuring patterns"),
    )
    # The edge itself, whatever signal the source's table prefers at this sparsity.
    layer_weights = seb_weights(spectra, 1 - table.budget, signal="edge")
    weights = {name: weight_of(module.get_submodule(name)) for name in fitting}
    ranked = rank(found, budget_of(layers, fitting, table.unit, table.budget), weights, layer_weights)
    own = next(one for one in ranked if one.ranking == table.ranking)
    return with_patterns(layers, own.chosen), described(found, ranked, table.ranking, table.unit)


def _unstructured(
    module: "nn.Module", table: Prune, layers: "list[Layer]", spectra: Mapping[str, Any]
) -> "tuple[list[Layer], dict[str, torch.Tensor]]":
    """Choose one mask over all layers: the smallest weights of the network go, with SEB those smallest for their layer.

    Returns:
        The layers, dense where no weight goes; and the masks of the others.
    """
    from mpdeploy.pruning.layers import weight_of
    from mpdeploy.pruning.unstructured import prune, seb_weights

    assert table.sparsity is not None  # for the type checker: the caller asked
    weights = {name: weight_of(module.get_submodule(name)) for name in spectra}
    layer_weights = seb_weights(spectra, table.sparsity) if table.method == "seb" else None
    masks = {name: m for name, m in prune(weights, table.sparsity, layer_weights).items() if not bool(m.all())}
    reason = "None of its weights is among the smallest of the network."
    return [
        replace(layer, pattern="", reason=reason) if layer.pattern and layer.name not in masks else layer
        for layer in layers
    ], masks


def _orders(orders: Any) -> dict[str, Any]:
    """Return what became of each set of channels, as JSON, with every tensor that a folded order moved."""
    folded = [
        {"coupling": asdict(coupling), "order": order.tolist()}
        for coupling, order in orders.couplings
    ]  # fmt: skip
    tried = [{**asdict(row), "order": None} for row in orders.reorderings]
    for row, found in zip(tried, orders.reorderings, strict=True):
        row["order"] = found.order is not None
    return {
        "logit_change": orders.logit_change, "tried": tried, "refused": dict(orders.refused), "folded": folded
    }  # fmt: skip


def fold_orders(state: Mapping[str, Any], orders: Mapping[str, Any]) -> None:
    """Bring a dense network's tensors into the channel order of the pruned one, in place.

    Args:
        state: tensors by name, as `state_dict()` returns them.
        orders: orders.json, as this stage writes it.
    """
    import torch

    from mpdeploy.pruning.couplings import Coupling, Member, fold

    for row in orders["folded"]:
        fields = dict(row["coupling"])
        for side in ("producers", "consumers"):
            fields[side] = tuple(Member(**member) for member in fields[side])
        fold(state, Coupling(**fields), torch.tensor(row["order"]))


def usable_device(name: str) -> str:
    """Return the device's name.

    Raises:
        Unavailable: a GPU is asked for and there is none.
    """
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise Unavailable('The recipe asks for device = "cuda", but PyTorch finds no GPU here.', hint='use "cpu".')
    return name


def _spectrum(weight: Any) -> Any:
    """Fit the Marchenko-Pastur law to a layer's matrix (a convolution's im2col matrix)."""
    from mpdeploy.pruning.spectrum import fit

    return fit(weight.detach().double().flatten(1).cpu().numpy())


def _described(spectrum: Any) -> dict[str, Any]:
    if spectrum is None:
        return {"spectrum": None}
    names = ("sigma", "edge", "ks", "spikes", "bulk_fraction", "rows", "cols")
    return {"spectrum": {name: getattr(spectrum, name) for name in names}}


def ensures(made: Artifact) -> None:
    """Every pruned layer holds its pattern in the bytes on disk, along input channels, and every weight is finite."""
    check_pattern(made, "pruned.safetensors", made.json("layers.json"))


def check_pattern(made: Artifact, file: str, layers: list[Mapping[str, Any]]) -> None:
    """Re-read weights from disk and count groups that break the pattern, or the zeros of an unstructured layer.

    Raises:
        StageFailed: naming the first layer that breaks it, or a tensor that is not finite.
    """
    import torch
    from safetensors.torch import load_file

    from mpdeploy.pruning.layers import UNSTRUCTURED
    from mpdeploy.pruning.patterns import Pattern, bad_groups

    state = load_file(made.path(file))
    for name, tensor in state.items():
        if not bool(torch.isfinite(tensor.float()).all()):
            raise StageFailed(f"{file}: the tensor {name} holds NaN or infinity.")
    for layer in layers:
        if layer["pattern"] == UNSTRUCTURED:
            zeros = int((state[f"{layer['name']}.weight"] == 0).sum())
            if zeros < layer["zeros"]:
                raise StageFailed(f"{file}: {layer['name']} has {zeros} zeros, not the {layer['zeros']} it was given.")
        elif layer["pattern"]:
            bad = bad_groups(state[f"{layer['name']}.weight"], Pattern.parse(layer["pattern"]))
            if bad:
                raise StageFailed(f"{file}: {layer['name']} has {bad} groups that are not {layer['pattern']}.")


STAGE = Stage(
    name="prune",
    summary="zero weights to the N:M pattern along input channels, refit the rest",
    takes=("source",),
    params=lambda recipe: Params(prune=recipe.prune, data=recipe.data),
    asks=asks,
    environment=lambda _: versions("torch", "numpy"),
    run=run,
    ensures=ensures,
)
