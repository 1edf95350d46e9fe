"""What a recipe would do to each layer, found without weights, images or work."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mpdeploy import targets
from mpdeploy.recipe import Recipe

# What an engine's target in a recipe is called in the table of targets.
BY_ENGINE = {"sm80": "a100", "sm86": "a40", "sm89": "l4", "sm90": "h100", "cpu": "cpu"}
ALWAYS = ("a100", "a40")
ANYWHERE = "Unstructured zeros lie anywhere: no engine gains from them."


@dataclass(frozen=True)
class LayerRow:
    """One layer of a plan.

    Attributes:
        name: its name in the network.
        kind: "linear" or "conv2d".
        shape: of its weight.
        pattern: N:M or "unstructured", empty where it stays dense or is still to be chosen.
        candidates: the patterns of which one, or none, will be chosen by measurement; empty unless the recipe is mixed.
        axis: the weight axis along which groups run, None where there are none.
        reason: why it stays dense.
        positions: output positions per image (tokens, or height times width).
        macs: multiply-accumulates per image, dense.
        macs_after: those on weights that the pattern keeps; only 2:4 hardware really leaves the others out. None where
            the pattern is still to be chosen.
        targets: {target: {eligible, rule, gain_low, gain_high, note}}.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    pattern: str
    axis: int | None
    reason: str
    positions: int
    macs: int
    macs_after: int | None
    targets: Mapping[str, Mapping[str, Any]]
    candidates: tuple[str, ...] = ()


def target_names(recipe: Recipe) -> list[str]:
    """Return the targets that a plan speaks of: A100 and A40 always, and what the engines are for."""
    asked = [BY_ENGINE[engine.target] for engine in recipe.build.engines if engine.target in BY_ENGINE]
    return list(dict.fromkeys([*ALWAYS, *(name for name in asked if name != "cpu")]))


def on_targets(layer: Mapping[str, Any], names: Sequence[str], recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Return what each target makes of a layer, at the batch and precision of the recipe's engine for it."""
    return {name: _on_target(layer, name, recipe) for name in names}


def _on_target(layer: Mapping[str, Any], name: str, recipe: Recipe) -> dict[str, Any]:
    engines = [e for e in recipe.build.engines if BY_ENGINE.get(e.target) == name]
    precision, batch = (engines[0].precision, engines[0].batch[1]) if engines else ("fp16", 32)
    if not layer["pattern"]:
        return {"eligible": False, "rule": layer["reason"], "gain_low": 1.0, "gain_high": 1.0, "note": ""}
    if layer["pattern"] == "unstructured":
        return {"eligible": False, "rule": ANYWHERE, "gain_low": 1.0, "gain_high": 1.0, "note": "Prune to 2:4."}
    target = targets.find(name)
    allowed = targets.eligibility(
        layer["kind"], tuple(layer["shape"]), layer["groups"], layer["pattern"], precision, target
    )
    gain = targets.gain(layer["kind"], tuple(layer["shape"]), layer["positions"], batch, precision, target)
    low, high = (gain.low, gain.high) if allowed.eligible else (1.0, 1.0)
    return {
        "eligible": allowed.eligible,
        "rule": allowed.rule,
        "gain_low": low,
        "gain_high": high,
        "note": gain.reason if allowed.eligible else allowed.mend,
    }


@dataclass(frozen=True)
class Preview:
    """What a recipe would do to the network.

    Attributes:
        rows: one per Linear and Conv2d, in execution order.
        macs: multiply-accumulates per image through the dense network, attention products included.
        macs_after: the same less those on weights that the pattern removes; the most that a budget of
            multiply-accumulates allows where patterns are still to be chosen, None where it is one of weights.
        targets: the targets that the rows speak of.
        note: what is decided by measurement, or why nothing gets faster; or "".
    """

    rows: tuple[LayerRow, ...]
    macs: int
    macs_after: int | None
    targets: tuple[str, ...]
    note: str = ""


def preview(recipe: Recipe) -> Preview:
    """Look at the network on the meta device: no weights are read and nothing is computed.

    Raises:
        Unavailable: PyTorch or timm is missing here.
        RecipeError: the network can't be made.
    """
    from mpdeploy.stages.environment import needs

    needs("plan", "torch", "timm")
    from mpdeploy.models import describe
    from mpdeploy.pruning.macs import count
    from mpdeploy.pruning.measure import budget_of
    from mpdeploy.stages.prune import candidates

    loaded = describe(recipe.source)
    size = loaded.preprocessing.input_size
    table = recipe.prune.allocate
    layers, fitting = candidates(loaded.module, recipe.prune, size)
    names = target_names(recipe)
    rows = tuple(_row(layer, fitting.get(layer.name, ()), names, recipe) for layer in layers)
    total = count(loaded.module, size).total
    if table is None:
        saved = sum(row.macs - (row.macs if row.macs_after is None else row.macs_after) for row in rows)
        return Preview(rows, total, total - saved, tuple(names), ANYWHERE if recipe.prune.sparsity else "")
    prunable = sum(row.macs for row in rows if row.candidates)
    after = total - prunable + budget_of(layers, fitting, "macs", table.budget) if table.unit == "macs" else None
    by = {
        "error": "measured error",
        "edge": "Marchenko-Pastur edge",
        "slack": "its share of the margins",
        "adjoint": "what the margins lose to first order, by its adjoint",
    }
    what = "MACs" if table.unit == "macs" else "weights"
    note = (
        f"Each layer's pattern is chosen when pruning, by {by[table.ranking]}: at most {100 * table.budget:g} % of the "
        f"{what} of the {len(fitting)} layers with a choice stay. A gain above is that of the layer as 2:4 if that is "
        "one of its patterns."
    )
    return Preview(rows, total, after, tuple(names), note)


def _row(layer: Any, fitting: Sequence[str], names: Sequence[str], recipe: Recipe) -> LayerRow:
    """Turn one layer's decision, or its choices, into a row of the plan."""
    from mpdeploy.pruning.patterns import Pattern

    to_choose = tuple(fitting) if recipe.prune.allocate else ()
    grouped = layer.pattern not in ("", "unstructured")
    density = Pattern.parse(layer.pattern).density if grouped else 1.0
    # What an engine makes of it is said for the choice that some engine gains from, if there is one.
    shown = "2:4" if "2:4" in to_choose else next(iter(to_choose), layer.pattern)
    return LayerRow(
        name=layer.name,
        kind=layer.kind,
        shape=tuple(layer.shape),
        pattern=layer.pattern,
        axis=1 if grouped or to_choose else None,
        reason=layer.reason,
        positions=layer.positions,
        macs=layer.macs,
        macs_after=None if to_choose else round(layer.macs * density),
        targets=on_targets({**asdict(layer), "pattern": shown}, names, recipe),
        candidates=to_choose,
    )
