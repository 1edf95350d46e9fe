"""Mixed and unstructured recipes from end to end: run, plan, report, check, and lies about them."""

import json
import shutil

import pytest
from conftest import QUICKSTART, SMALL
from forgeries.bundle import reseal
from safetensors.numpy import load_file, save_file

import mpdeploy
from mpdeploy.recipe import load_recipe
from mpdeploy.report import render
from mpdeploy.verify import Verdict, overall, verify

MIXED = ('prune.pattern="mixed"', 'prune.allocate={patterns=["12:16","2:4"],budget=0.6,images=8}')
ANYWHERE = ('prune.pattern="unstructured"', "prune.sparsity=0.5", 'prune.method="seb"')


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    home = tmp_path_factory.mktemp("mixed")
    return mpdeploy.run(QUICKSTART, sets=[*SMALL, *MIXED], store=home / "store", out=home / "bundle")


@pytest.fixture(scope="module")
def anywhere(tmp_path_factory):
    """Tuned for an epoch, so that its zeros have something to survive."""
    home = tmp_path_factory.mktemp("anywhere")
    sets = [*SMALL, *ANYWHERE, "tune.epochs=1"]
    return mpdeploy.run(QUICKSTART, sets=sets, store=home / "store", out=home / "bundle")


def read(bundle, name):
    return json.loads((bundle / name).read_text())


def refuted(bundle, tmp_path, change):
    """Claims that are refuted once `change` has edited JSON files by name, all hashed again."""
    forged = tmp_path / "forged"
    shutil.copytree(bundle, forged)
    for name, edit in change.items():
        value = read(forged, name)
        edit(value)
        (forged / name).write_text(json.dumps(value))
    reseal(forged)
    return {f.claim: f.reason for f in verify(forged) if f.verdict is Verdict.REFUTED}


def test_a_mixed_bundle_holds_and_says_how_it_was_chosen(mixed):
    findings = verify(mixed.bundle)
    assert overall(findings) is Verdict.HOLDS
    [reason] = [f.reason for f in findings if f.claim == "allocation"]
    assert reason.startswith("16 layers have what the ranking error chose")


def test_each_layer_has_the_pattern_chosen_for_it_and_the_macs_keep_the_budget(mixed):
    made, layers = read(mixed.bundle, "allocation.json"), read(mixed.bundle, "layers.json")
    by_name = {row["ranking"]: row for row in made["rankings"]}
    patterns = {layer["name"]: layer["pattern"] for layer in layers}
    assert by_name["error"]["chosen"] == {name: patterns[name] for name in made["layers"]}
    assert {"12:16", "2:4"} <= set(patterns.values())
    kept = sum(layer["macs"] * layer["density"] for layer in layers if layer["name"] in made["layers"])
    assert kept <= made["budget"] == round(0.6 * made["dense"])
    assert list(by_name) == ["error", "edge", "slack", "adjoint"]
    assert by_name["error"]["measured"] == min(row["measured"] for row in made["rankings"])
    assert all(row["cost"] <= made["budget"] and row["predicted"] > 0 for row in made["rankings"])


def test_the_layers_have_what_the_adjoint_chose_where_the_recipe_asks_for_that(mixed, tmp_path):
    sets = [*SMALL, *MIXED, "prune.allocate.ranking=adjoint"]
    made = mpdeploy.run(QUICKSTART, sets=sets, to="prune", store=tmp_path / "store").artifacts["prune"]
    allocation = made.json("allocation.json")
    assert allocation == {**read(mixed.bundle, "allocation.json"), "ranking": "adjoint"}
    [own] = [row for row in allocation["rankings"] if row["ranking"] == "adjoint"]
    patterns = {layer["name"]: layer["pattern"] for layer in made.json("layers.json")}
    assert own["chosen"] == {name: patterns[name] for name in allocation["layers"]}
    assert own["chosen"] != allocation["rankings"][0]["chosen"]


def lie_about_patterns(layers):
    name = next(layer for layer in layers if layer["pattern"] == "12:16")
    name["pattern"] = "2:4"


def loosen(layers):
    name = next(layer for layer in layers if layer["pattern"] == "2:4")
    name["pattern"] = "12:16"


def flatter(made):
    next(row for row in made["rankings"] if row["ranking"] == "edge")["measured"] *= 0.5


def raise_budget(made):
    made["budget"] += 1000


def cheapen(made):
    next(iter(made["layers"].values()))[1]["cost"] -= 1


def other_choice(made):
    row = next(row for row in made["rankings"] if row["ranking"] == "error")
    name = next(name for name, pattern in row["chosen"].items() if pattern == "2:4")
    row["chosen"][name] = "12:16"


@pytest.mark.parametrize(
    ("file", "lie", "claims"),
    [
        ("layers.json", lie_about_patterns, {"weights", "allocation", "graph:model.onnx"}),
        ("layers.json", loosen, {"allocation", "graph:model.onnx"}),
        ("allocation.json", flatter, {"allocation"}),
        ("allocation.json", raise_budget, {"allocation"}),
        ("allocation.json", cheapen, {"allocation"}),
        ("allocation.json", other_choice, {"allocation"}),
    ],
)
def test_lies_about_a_mixed_layer_are_refuted(mixed, tmp_path, file, lie, claims):
    assert refuted(mixed.bundle, tmp_path, {file: lie}).keys() >= claims


def test_the_report_compares_the_rankings_where_they_were_asked_for_only(mixed, small_run, anywhere):
    page = (mixed.bundle / "report.html").read_text()
    assert page == render(mixed.bundle)
    assert 'id="allocation"' in page and 'href="#allocation"' in page
    for label in ("measured error", "MP edge (SEB)", "share of margins", "adjoint (first order)", "2:4 everywhere"):
        assert label in page
    assert "damping 0." in page and "Order of channels" in page
    for other in (small_run, anywhere):
        plain = (other.bundle / "report.html").read_text()
        assert 'id="allocation"' not in plain and "#allocation" not in plain
        assert read(other.bundle, "allocation.json") == {"asked": False}
    assert "Order of channels" in (small_run.bundle / "report.html").read_text()
    assert "Order of channels" not in (anywhere.bundle / "report.html").read_text()


def test_a_plan_of_a_mixed_recipe_names_the_choices(capsys):
    file = load_recipe(QUICKSTART, MIXED)
    preview = mpdeploy.api.layers(file)
    rows = {row.name: row for row in preview.rows}
    assert rows["blocks.0.attn.qkv"].candidates == ("12:16", "2:4")
    assert rows["blocks.0.attn.qkv"].macs_after is None and rows["blocks.0.attn.qkv"].pattern == ""
    assert rows["head"].candidates == () and "head" in rows["head"].reason
    prunable = sum(row.macs for row in preview.rows if row.candidates)
    assert preview.macs_after == preview.macs - prunable + round(0.6 * prunable)
    assert "by measured error: at most 60 % of the MACs of the 16 layers" in preview.note
    by_weights = load_recipe(QUICKSTART, [*MIXED, "prune.allocate.unit=weights", "prune.allocate.ranking=edge"])
    preview = mpdeploy.api.layers(by_weights)
    assert preview.macs_after is None and "by Marchenko-Pastur edge" in preview.note
    preview = mpdeploy.api.layers(load_recipe(QUICKSTART, [*MIXED, "prune.allocate.ranking=adjoint"]))
    assert "by what the margins lose to first order, by its adjoint: at most 60 %" in preview.note


def test_a_budget_that_can_t_be_met_is_refused_by_the_plan():
    with pytest.raises(mpdeploy.errors.RecipeError, match=r"budget = 0.45 can't be met"):
        mpdeploy.api.layers(load_recipe(QUICKSTART, [*MIXED, "prune.allocate.budget=0.45"]))


# -------------------------------------------------------------------------------------------------------- unstructured


def test_unstructured_zeros_survive_tuning_and_export(anywhere):
    findings = verify(anywhere.bundle)
    assert overall(findings) is Verdict.HOLDS
    reasons = {f.claim: f.reason for f in findings}
    assert reasons["weights"].startswith("16 layers hold their stated zeros")
    layers = [layer for layer in read(anywhere.bundle, "layers.json") if layer["pattern"]]
    weights = sum(layer["shape"][0] * layer["shape"][1] for layer in layers)
    assert sum(layer["zeros"] for layer in layers) == weights // 2
    assert len({round(layer["density"], 3) for layer in layers}) > 8
    for file in ("pruned", "tuned"):
        state = load_file(anywhere.bundle / f"weights/{file}.safetensors")
        for layer in layers:
            assert (state[f"{layer['name']}.weight"] == 0).sum() >= layer["zeros"]


def test_nobody_promises_a_gain_from_unstructured_zeros(anywhere):
    manifest = read(anywhere.bundle, "sparsity.json")
    assert manifest["weights"] == []
    reasons = {entry["layer"]: entry["reason"] for entry in manifest["dense"]}
    assert "no engine gains" in reasons["blocks.0.attn.qkv"]
    page = (anywhere.bundle / "report.html").read_text()
    assert "have the zeros that layers.json states" in page and "no engine gains from them" in page
    preview = mpdeploy.api.layers(load_recipe(QUICKSTART, ANYWHERE))
    assert preview.macs_after == preview.macs and "no engine gains" in preview.note
    row = next(row for row in preview.rows if row.pattern)
    assert row.axis is None and not any(own["eligible"] for own in row.targets.values())
    assert anywhere.artifacts["prune"].manifest["facts"]["note"].startswith("unstructured masks have no groups")


def test_a_zero_too_few_is_refuted(anywhere, tmp_path):
    def more(layers):
        layer = next(layer for layer in layers if layer["pattern"])
        layer["zeros"] = round((1 - layer["density"]) * layer["shape"][0] * layer["shape"][1]) + 1

    claims = refuted(anywhere.bundle, tmp_path, {"layers.json": more})
    assert {"weights", "graph:model.onnx"} <= claims.keys() and "zeros, stated are" in claims["weights"]


def test_a_report_of_too_few_zeros_says_refuted(anywhere, tmp_path):
    forged = tmp_path / "forged"
    shutil.copytree(anywhere.bundle, forged)
    name = next(layer["name"] for layer in read(forged, "layers.json") if layer["pattern"])
    state = load_file(forged / "weights/tuned.safetensors")
    state[f"{name}.weight"][:] = 1.0
    save_file(state, forged / "weights/tuned.safetensors")
    reseal(forged)
    assert "1 layers in weights/tuned.safetensors have fewer zeros" in render(forged)


def test_magnitude_prunes_over_the_whole_network_too(tmp_path):
    sets = [*SMALL, *ANYWHERE, "prune.method=magnitude", "prune.sparsity=0.3", "prune.refit=false"]
    made = mpdeploy.run(QUICKSTART, sets=sets, to="prune", store=tmp_path / "store").artifacts["prune"]
    layers = [layer for layer in made.json("layers.json") if layer["pattern"]]
    weights = sum(layer["shape"][0] * layer["shape"][1] for layer in layers)
    assert sum(layer["zeros"] for layer in layers) == round(0.3 * weights)
