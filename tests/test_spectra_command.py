"""`mpdeploy spectrum`: any network in, a table, JSON and a page out; what can't be fitted says why."""

import dataclasses
import html
import json
import re
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from conftest import QUICKSTART, ROOT
from safetensors.numpy import load_file, save_file
from test_report import MEASURE, Page, browse, in_browser
from torch import nn

import mpdeploy
from mpdeploy import spectra
from mpdeploy.errors import CorruptArtifact, RecipeError, Unavailable
from mpdeploy.pruning.spectrum import DOUBTS, Spectrum, fit, opinions

VIT = ROOT / "recipes" / "quickstart" / "vit.safetensors"
TINY = ["--weights", "random"]
for item in ("img_size=28", "patch_size=4", "embed_dim=64", "depth=2", "num_heads=2", "num_classes=40"):
    TINY += ["--arg", item]
BLOCKS = [f"blocks.{i}.{part}" for i in (0, 1) for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]


@pytest.fixture
def call(command):
    return partial(command, "spectrum")


@pytest.fixture(scope="module")
def quickstart_page(tmp_path_factory):
    """The page of real, trained weights, drawn once."""
    result = mpdeploy.spectrum(QUICKSTART, out=tmp_path_factory.mktemp("page"))
    return result, result.page.read_text(encoding="utf-8")


# What it takes


def test_a_model_by_name_with_random_weights_is_bulk_like(call, tmp_path):
    code, out, err = call("vit_tiny_patch16_224", *TINY)
    assert code == 0, err
    for name in [*BLOCKS, "head"]:
        assert name in out
    assert out.splitlines()[-1] == "page  vit_tiny_patch16_224.spectrum.html"
    assert (tmp_path / "vit_tiny_patch16_224.spectrum.html").is_file()
    result = json.loads(call("vit_tiny_patch16_224", *TINY, "--json")[1])
    assert {row["character"] for row in result["layers"]} == {"bulk-like"}
    assert result["weights"] == "random"


def test_random_weights_show_the_sigma_they_were_drawn_with():
    module = nn.Sequential(nn.Linear(300, 200), nn.Conv2d(20, 64, 3))
    with torch.no_grad():
        module[0].weight.normal_(0, 0.05)
        module[1].weight.normal_(0, 0.2)
    first, second = mpdeploy.spectrum(module).layers
    assert first.fit.sigma == pytest.approx(0.05, rel=0.01)
    assert second.fit.sigma == pytest.approx(0.2, rel=0.02)
    assert (second.fit.rows, second.fit.cols) == (64, 180)
    assert first.name == "0" and second.shape == (64, 20, 3, 3)


def test_a_convolution_is_its_im2col_matrix():
    layer = nn.Conv2d(6, 40, 3)
    (own,) = mpdeploy.spectrum(nn.Sequential(layer)).layers
    expected = fit(layer.weight.detach().double().numpy().reshape(40, 54))
    assert own.fit.sigma == expected.sigma
    assert own.fit.eigenvalues == pytest.approx(expected.eigenvalues)


def test_a_recipe_gives_its_own_source(call):
    code, out, err = call(QUICKSTART, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["model"] == "quickstart" and result["weights"] == "vit.safetensors"
    state = load_file(VIT)
    for row in result["layers"]:
        weight = state[f"{row['layer']}.weight"]
        assert row["shape"] == list(weight.shape)
        top = np.linalg.svd(weight.reshape(len(weight), -1).astype(np.float64), compute_uv=False)[0]
        assert row["largest_singular"] == pytest.approx(top, rel=1e-9)
        assert row["spikes"] == len(row["signals"])
        assert (row["largest_singular"] > row["edge_singular"]) == (row["spikes"] > 0)


def test_the_weights_of_a_recipe_can_be_replaced(call):
    (row,) = json.loads(call(QUICKSTART, "--weights", "random", "--layers", "blocks.1.mlp.fc1", "--json")[1])["layers"]
    assert row["character"] == "bulk-like"
    (row,) = json.loads(call(QUICKSTART, "--layers", "blocks.1.mlp.fc1", "--json")[1])["layers"]
    assert row["character"] == "heavy tail"


def test_a_state_dict_file_gives_every_matrix_in_it(call, tmp_path):
    one = json.loads(call(VIT, "--json")[1])
    two = json.loads(call(QUICKSTART, "--json")[1])
    by_name = {row["layer"]: row for row in two["layers"]}
    assert {row["layer"] for row in one["layers"]} >= set(by_name) - {"patch_embed.proj"}
    for row in one["layers"]:
        if "sigma" in row:
            assert row == by_name[row["layer"]]
    torch.save({"state_dict": {"module.a.weight": torch.randn(40, 50), "module.a.bias": torch.randn(40)}}, "n.pth")
    (row,) = json.loads(call("n.pth", "--json")[1])["layers"]
    assert row["layer"] == "a" and row["rows"] == 40
    half = {"b.weight": torch.randn(64, 64).numpy().astype(np.float16), "table": np.ones((3, 4), np.int64)}
    save_file(half, tmp_path / "half.safetensors")
    (row,) = json.loads(call("half.safetensors", "--json")[1])["layers"]
    assert row["layer"] == "b"


def test_a_bundle_gives_its_dense_pruned_or_tuned_weights(call, small_run):
    dense = json.loads(call(small_run.bundle, "--json")[1])
    pruned = json.loads(call(small_run.bundle, "--weights", "pruned", "--json")[1])
    fits = {row["name"]: row["spectrum"] for row in json.loads((small_run.bundle / "layers.json").read_text())}
    for row in dense["layers"]:
        if fits[row["layer"]]:
            assert row["sigma"] == pytest.approx(fits[row["layer"]]["sigma"], rel=1e-9)
            assert row["spikes"] == fits[row["layer"]]["spikes"]
    assert dense["layers"] != pruned["layers"]
    code, _, err = call(small_run.bundle, "--weights", "pretrained")
    assert code == 2 and "dense, pruned, tuned" in err


def test_a_bundle_that_was_changed_is_refused(small_run, tmp_path):
    import shutil

    shutil.copytree(small_run.bundle, tmp_path / "b")
    with (tmp_path / "b" / "weights" / "dense.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\x00\x00\x80\x3f")
    with pytest.raises(CorruptArtifact, match=r"dense\.safetensors"):
        mpdeploy.spectrum(tmp_path / "b")


def test_torchvision_and_a_python_entry_point(call, tmp_path, monkeypatch):
    code, out, err = call("torchvision:squeezenet1_1", *TINY[:2], "--layers", "*squeeze", "--json")
    assert code == 0, err
    assert len(json.loads(out)["layers"]) == 8
    (tmp_path / "my_networks.py").write_text(
        "import torch\ndef small(width):\n    return torch.nn.Sequential(torch.nn.Linear(width, 48))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (row,) = json.loads(call("my_networks:small", "--arg", "width=64", "--json")[1])["layers"]
    assert row["shape"] == [48, 64]


# What it does with what can't be fitted


def test_layers_without_a_fit_say_why_and_do_not_stop_the_others(call, tmp_path):
    network = nn.Sequential(
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 16, 3, groups=2),
        nn.Linear(16, 1),
        nn.Linear(64, 64),
        nn.Linear(40, 50),
    )
    nn.init.zeros_(network[3].weight)
    result = mpdeploy.spectrum(network, out=tmp_path / "page.html")
    depthwise, grouped, thin, zero, fine = result.layers
    assert "8 groups" in depthwise.reason and "2 groups" in grouped.reason
    assert "at least 2 x 2" in thin.reason and "all zero" in zero.reason
    assert fine.fit and not fine.reason
    text = Page((tmp_path / "page.html").read_text()).text
    for layer in result.layers[:4]:
        assert layer.character == "not fitted" and layer.reason in text
    assert "of 5; the others say why not" in text
    torch.save(network.state_dict(), "n.pth")
    code, out, _ = call("n.pth")
    assert code == 0 and out.count("not fitted") == 3 and "a file can't tell" in out


def test_a_network_with_nothing_to_fit_still_gives_a_page(tmp_path):
    result = mpdeploy.spectrum(nn.Sequential(nn.Linear(16, 1)), out=tmp_path)
    assert "no layer could be fitted" in Page(result.page.read_text()).text
    with pytest.raises(RecipeError, match="no 2-D or 4-D weight"):
        mpdeploy.spectrum(nn.Sequential(nn.BatchNorm2d(4)))


def test_rank_one_has_no_bulk_though_rounding_leaves_something():
    network = nn.Sequential(nn.Linear(40, 50, bias=False))
    network[0].weight.data = torch.outer(torch.ones(50), torch.arange(1.0, 41))  # exact in float32
    (layer,) = mpdeploy.spectrum(network).layers
    assert "all zero" in layer.reason


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(call, tmp_path, value):
    state = load_file(VIT)
    state["blocks.2.mlp.fc1.weight"][3, 5] = value
    save_file(state, tmp_path / "bad.safetensors")
    code, out, err = call("bad.safetensors")
    assert code == 2 and not out
    assert "blocks.2.mlp.fc1.weight holds 1 values that are NaN or infinite" in err
    assert call("bad.safetensors", "--layers", "blocks.0*")[0] == 0


def test_bad_input_is_a_sentence_with_the_right_code(call, tmp_path):
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "some").mkdir()
    cases = [
        (["resnet19"], 2, "resnet18"),
        (["torchvision:resnet19"], 2, "resnet18"),
        (["no.such.module:network"], 2, "no Python module"),
        (["none.safetensors"], 2, "none.safetensors is not a file"),
        (["none.toml"], 2, "can't be read"),
        (["text.safetensors"], 2, "text.safetensors"),
        ([tmp_path / "some"], 2, "is not a bundle"),
        ([VIT, "--weights", "random"], 2, "brings its own weights"),
        ([VIT, "--arg", "depth=2"], 2, "brings its own weights"),
        ([VIT, "--layers", "nothing*"], 2, "blocks.0.attn.proj"),
        ([VIT, "--alpha", "0.5"], 2, "alpha is 0.5"),
        ([VIT, "--alpha", "nan"], 2, "alpha is nan"),
        ([VIT, "--beta", "0"], 2, "beta is 0"),
        ([VIT, "--out", VIT], 2, "left as it is"),
        ([VIT, "--out", "text.safetensors/page.html"], 2, "can't be written"),
        (["resnet18", "--weights", "random", "--arg", "num_classes"], 2, "key=value"),
        (["resnet18", "--weights", "random", "--arg", "nonsense=1"], 2, "nonsense"),
        (["resnet18", "--weights", VIT], 2, "does not fit"),
        (["resnet18", "--weights", "none.pth"], 2, "none.pth is not a file"),
        ([], 2, "MODEL"),
    ]
    for args, expected, words in cases:
        code, out, err = call(*args)
        assert code == expected, (args, code, err)
        assert words in err and "Traceback" not in err and not out, (args, err)
        assert "source." not in err, (args, err)
    assert VIT.stat().st_size > 1e6


def test_pretrained_without_a_hub_is_3_with_a_hint_for_this_command(call, tmp_path):
    code, _, err = call("resnet18")
    assert code == 3 and "hint" in err and "--weights FILE" in err and "source." not in err
    assert not list(tmp_path.glob("*.html"))
    with pytest.raises(Unavailable):
        mpdeploy.spectrum("resnet18")


# What it prints


def made(p, spikes=0, ks=0.01, largest=0.9):
    eigenvalues = np.linspace(0.1, largest, p)
    return Spectrum(p, p, 0.5, 1.0, eigenvalues, ks, spikes, 1 - spikes / p, np.ones(spikes))


@pytest.mark.parametrize(
    ("spectrum", "word"),
    [
        (made(31, spikes=20, ks=0.5), "too few to judge"),
        (made(100, spikes=6), "heavy tail"),
        (made(100, spikes=5, ks=0.11), "off the law"),
        (made(100, spikes=1, largest=1.06), "bulk + spikes"),
        (made(100, spikes=1, largest=1.04), "bulk-like"),
        (made(100), "bulk-like"),
    ],
)
def test_the_plain_word_follows_the_stated_rules(spectrum, word):
    assert spectra.character(spectrum) == word
    assert word in dict(spectra.RULES)


def test_the_word_is_right_about_planted_matrices():
    generator = np.random.default_rng(3)
    noise = generator.normal(0, 0.02, (256, 512))
    assert spectra.character(fit(noise)) == "bulk-like"
    spike = 0.02 * 60 * np.outer(np.ones(256), np.ones(512)) / np.sqrt(256 * 512)
    assert spectra.character(fit(noise + spike)) == "bulk + spikes"
    assert spectra.character(fit(generator.standard_t(1.5, (256, 512)))) == "heavy tail"
    gaps = np.repeat([1.0, 3.0], 128)[:, None]
    assert spectra.character(fit(generator.normal(size=(256, 256)) * gaps)) in ("heavy tail", "off the law")


def test_three_estimates_and_the_doubt_are_shown_for_each_layer(call, tmp_path):
    generator = np.random.default_rng(0)
    half = generator.normal(size=(100, 40)) @ generator.normal(size=(40, 100))
    scales = np.repeat([1.0, 2.0, 4.0, 8.0], 25)[:, None]
    matrices = {
        "noise": generator.normal(size=(100, 100)).astype(np.float32),
        "steps": (generator.normal(size=(100, 100)) * scales).astype(np.float32),
    }
    save_file({**matrices, "half": half}, tmp_path / "n.safetensors")
    read = json.loads(call("n.safetensors", "--json")[1])
    assert read["doubts"] == dict(DOUBTS) and "never a probability" in read["signal"]
    rows = {row["layer"]: row for row in read["layers"]}
    assert rows["noise"]["doubts"] == [] and rows["noise"]["trace"]["rank"] == rows["noise"]["evbmf"]["rank"] == 0
    for name, matrix in matrices.items():
        expected = opinions(fit(matrix))
        assert rows[name]["trace"] == dataclasses.asdict(expected.trace)
        assert rows[name]["evbmf"] == dataclasses.asdict(expected.evbmf)
        assert rows[name]["doubts"] == list(expected.doubts)
    assert rows["steps"]["doubts"] == ["sigmas", "KS"]
    assert rows["half"]["trace"] is None and rows["half"]["evbmf"] is None and "zeros" in rows["half"]["doubts"]
    out = call("n.safetensors")[1]
    page = Page((tmp_path / "n.safetensors.spectrum.html").read_text()).text
    by_name = {line.split()[0]: line for line in out.splitlines() if line.split()[:1]}
    for own in ("trace", "evbmf"):
        assert f"{rows['steps'][own]['sigma']:#.4g}" in by_name["steps"]
        assert f"{rows['steps'][own]['edge_singular']:#.4g}" in by_name["steps"]
        assert str(rows["steps"][own]["rank"]) in by_name["steps"].split()
    assert "sigmas, KS" in by_name["steps"] and by_name["half"].count("none") == 6
    for words in (spectra.DOUBT, spectra.SIGNAL):
        assert words in " ".join(out.replace("\n", " ").split()) and words in page
    assert "sigmas, KS" in page and "in doubt" in page
    for word, rule in DOUBTS:
        assert word in out and rule in out and rule in page


def test_levels_reach_the_fit(call):
    loose = json.loads(call(VIT, "--layers", "blocks.0.mlp.fc1", "--beta", "0.5", "--alpha", "0.1", "--json")[1])
    weight = load_file(VIT)["blocks.0.mlp.fc1.weight"]
    expected = fit(weight, alpha=0.1, beta=0.5)
    (row,) = loose["layers"]
    assert (row["sigma"], row["edge"], row["ks"]) == (expected.sigma, expected.edge, expected.ks)
    assert row["trace"]["sigma"] == pytest.approx(opinions(expected).trace.sigma)  # which has no level to choose
    assert (loose["alpha"], loose["beta"]) == (0.1, 0.5)


def test_progress_goes_to_stderr_and_the_watcher():
    seen = []

    class Watcher:
        def stage(self, name, state, note):
            seen.append((name, state))

        def progress(self, label, done, total):
            seen.append((label, done, total))

    mpdeploy.spectrum(VIT, layers="blocks.0.*", watcher=Watcher())
    assert seen[0] == ("spectrum", "running") and seen[-1] == ("spectrum", "done")
    assert ("fitting spectra", 4, 4) in seen


def test_the_result_is_frozen_and_json_has_no_machine_path(quickstart_page):
    result, page = quickstart_page
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.alpha = 1
    text = json.dumps(dataclasses.replace(result, page=None).to_json(), allow_nan=False)
    assert str(ROOT) not in text and str(ROOT) not in page


# The page


def test_the_page_has_a_plot_per_fitted_layer_after_the_summary(quickstart_page):
    result, page = quickstart_page
    figures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(figures) == 1 + len(result.layers)
    for layer, figure in zip(result.layers, figures[1:], strict=True):
        assert f"Eigenvalues of {layer.name}" in figure
        assert f"{layer.fit.spikes} above the edge" in figure
        assert not re.search(r"#0\d0\d0\d", figure), "a placeholder colour was left in"
    assert page.index('id="summary"') < page.index('id="layers"') < page.index('id="spectra"')
    text = Page(page).text
    for word, rule in spectra.RULES:
        assert word in text and rule in text
    for layer in result.layers:
        assert text.count(layer.name) >= 3


def test_the_page_is_self_contained_and_well_formed(quickstart_page):
    _, page = quickstart_page
    read = Page(page)
    assert not read.unbalanced and not read.open
    assert len(read.named("h1")) == 1 and read.named("html") == [{"lang": "en"}]
    for tag in ("script", "link", "img", "iframe", "object"):
        assert not read.named(tag)
    for _, attributes in read.elements:
        for key, value in attributes.items():
            assert not key.startswith("on") and key not in ("src", "srcset", "action", "data")
            assert key != "href" or str(value).startswith("#")
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", page)
    ids = [attributes["id"] for _, attributes in read.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


@in_browser
def test_no_horizontal_scroll_at_desktop_and_phone_width(quickstart_page, tmp_path):
    widths = (1280, 390, 320)
    page = html.escape(quickstart_page[1])
    frames = "".join(f'<iframe width="{w}" height="700" style="border:0" srcdoc="{page}"></iframe>' for w in widths)
    (tmp_path / "frames.html").write_text("<!DOCTYPE html>" + MEASURE.format(frames=frames), encoding="utf-8")
    dom = browse(tmp_path, "--dump-dom", (tmp_path / "frames.html").as_uri())
    rows = json.loads(re.search(r'<pre id="out">(.*?)</pre>', dom)[1])
    assert [row["width"] for row in rows] == list(widths)
    for row in rows:
        assert row["scroll"] <= row["width"]
        assert row["height"] > 2000, "the page was not laid out"
        assert row["smallest"] >= 12


def test_the_same_weights_give_the_same_page(quickstart_page, tmp_path):
    _, page = quickstart_page
    assert mpdeploy.spectrum(QUICKSTART, out=tmp_path / "x.html").page.read_text(encoding="utf-8") == page


def test_names_are_escaped(tmp_path):
    hostile = "<script>alert(1)</script>"
    save_file({hostile: np.random.default_rng(0).normal(size=(40, 40))}, tmp_path / "h.safetensors")
    read = Page(mpdeploy.spectrum(tmp_path / "h.safetensors", out=tmp_path).page.read_text())
    assert not read.named("script") and hostile in read.text


def test_importing_the_package_stays_light():
    code = "import mpdeploy, sys; mpdeploy.run; assert not {'torch', 'scipy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
