"""The report: says what the bundle says, refuses what contradicts itself, and is a page that people can read."""

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup
from PIL import Image
from safetensors.numpy import load_file, save_file
from synthetic_bundle import DEPLOY, STAGES, seal, slack, write_bundle

from mpdeploy import formats, plots
from mpdeploy.errors import CorruptArtifact
from mpdeploy.pruning.spectrum import fit
from mpdeploy.report import render

SECTIONS = ("gates", "margins", "engines", "layers", "spectra", "tuning", "provenance")
VOID = {"meta", "br", "path", "use", "rect"}


class Page(HTMLParser):
    """What a reader of the page gets: elements, text without markup, and whether tags are balanced."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.unbalanced: list[str] = []
        self.words: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data: str) -> None:
        if not {"style"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).replace("\u00a0", " ").split())

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("report") / "bundle")


@pytest.fixture(scope="module")
def page(whole: Path) -> str:
    return render(whole)


FIGURES = (
    "waterfall", "slack_boxes", "margin_histogram", "kept_by_margin", "latency_histogram", "spectrum",
    "spectra_summary", "loss_curve",
)  # fmt: skip


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the drawing out where a test is about the words: it is most of the time a page takes."""
    for name in FIGURES:
        monkeypatch.setattr(plots, name, lambda *_: Markup("<svg></svg>"))


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def change(bundle: Path, name: str, edit: Callable[[Any], None]) -> None:
    """Edit a JSON file of a bundle and list its new hash, as an honest writer of other numbers would."""
    value = json.loads((bundle / name).read_text())
    edit(value)
    (bundle / name).write_text(json.dumps(value))
    seal(bundle)


# What the page says


def test_first_screen_says_verdict_engine_and_the_numbers_of_the_files(page: str, whole: Path) -> None:
    text = Page(page).text
    results = json.loads((whole / "results.json").read_text())
    counts = json.loads((whole / "certificate.json").read_text())["counts"]
    row = results["engines"][0]
    first = text[: text.index("Gates and grounds")]
    assert "May be released" in first
    assert DEPLOY in first
    dense, top1 = results["dense_top1"]["value"], row["top1"]["value"]
    assert f"{100 * dense:.1f} % → {100 * top1:.1f} %" in first
    assert f"{100 * row['agreement']['value']:.1f} %" in first
    assert f"{counts['certified']} of {sum(counts.values())} certification images" in first
    assert f"{row['latency']['ratio']['value']:.2f}×" in first


def test_share_of_zero_weights_is_counted_from_the_weights(page: str, whole: Path) -> None:
    state = load_file(whole / "weights" / "tuned.safetensors")
    share = sum(int((w == 0).sum()) for w in state.values()) / sum(w.size for w in state.values())
    assert f"{100 * share:.1f} %" in Page(page).text


def test_every_gate_is_listed_with_its_verdict(page: str, whole: Path) -> None:
    gates = json.loads((whole / "verdict.json").read_text())["gates"]
    text = Page(page).text
    for gate in gates:
        assert gate["name"] in text
        assert gate["reason"] in text
    assert text.count("✓ holds") == len(gates)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(("verdict", "words"), [("refuted", "Must not be released"), ("unchecked", "Not established")])
def test_a_verdict_that_does_not_hold_is_said_in_plain_words(copy: Path, verdict: str, words: str) -> None:
    def edit(value: Any) -> None:
        value["verdict"] = value["gates"][0]["verdict"] = verdict

    change(copy, "verdict.json", edit)
    text = Page(render(copy)).text
    assert words in text
    assert "May be released" not in text


def test_each_kind_of_ground_is_marked(page: str) -> None:
    text = Page(page).text
    assert "✓ proved All 16,384 groups of the pruned layers in weights/tuned.safetensors hold the N:M pattern" in text
    assert "● measured" in text
    assert "○ not checked Labels and speed of tensorrt_rtx-sm80-fp16" in text


@pytest.mark.usefixtures("undrawn")
def test_a_broken_group_in_the_weights_is_not_called_proved(copy: Path) -> None:
    path = copy / "weights" / "tuned.safetensors"
    state = load_file(path)
    state["blocks.0.attn.qkv.weight"][0, :4] = [1, 2, 3, 0]
    save_file(state, path)
    seal(copy)
    text = Page(render(copy)).text
    assert "✗ refuted 1 of 16,384 groups in weights/tuned.safetensors break the pattern" in text
    assert "hold the N:M pattern" not in text


@pytest.mark.usefixtures("undrawn")
def test_nan_weight_counts_as_not_zero(copy: Path) -> None:
    path = copy / "weights" / "tuned.safetensors"
    state = load_file(path)
    group = state["blocks.0.attn.qkv.weight"][0, :4]
    group[np.flatnonzero(group == 0)[0]] = np.nan
    save_file(state, path)
    seal(copy)
    assert "✗ refuted 1 of 16,384 groups" in Page(render(copy)).text


@pytest.mark.usefixtures("undrawn")
def test_a_certification_image_that_was_a_calibration_image_is_refuted(copy: Path, page: str) -> None:
    assert "✓ proved 0 of 400 certification images are calibration images" in Page(page).text

    def edit(draws: Any) -> None:
        draws["certification_ids"][5] = draws["calibration_ids"][3]

    change(copy, "calibration.json", edit)
    assert "✗ refuted 1 of 400 certification images are calibration images" in Page(render(copy)).text


def test_waterfall_adds_up_to_what_the_ledger_holds(page: str, whole: Path) -> None:
    ledger, samples = load_file(whole / "ledger.safetensors"), load_file(whole / "samples.safetensors")
    rungs = [*ledger["logits"].transpose(1, 0, 2), samples[f"certification.{DEPLOY}"]]
    means = [slack(z).mean() for z in rungs]
    described = re.search(r'id="waterfall-desc">([^<]*)<', page)
    assert described
    assert f"dense margin {means[0]:.2f}" in described[1]
    assert f"prune {means[1] - means[0]:+.2f}".replace("-", "−") in described[1]
    assert f"tune {means[2] - means[1]:+.2f}".replace("-", "−") in described[1]
    assert f"slack left {means[3]:.2f}" in described[1]


def test_tables_list_every_layer_engine_and_file(page: str, whole: Path) -> None:
    text = Page(page).text
    for layer in json.loads((whole / "layers.json").read_text()):
        assert layer["name"] in text
    for engine in (whole / "engines").iterdir():
        assert engine.name.removesuffix(".dense") in text
    for name, entry in json.loads((whole / "manifest.json").read_text())["files"].items():
        assert name in text
        assert entry["sha256"] in text


@pytest.mark.usefixtures("undrawn")
def test_layer_that_a_target_refuses_names_the_rule(copy: Path) -> None:
    def edit(layers: Any) -> None:
        layers[2]["targets"]["a100"] |= {"eligible": False, "rule": "K = 20 is not a multiple of 32"}

    change(copy, "layers.json", edit)
    assert "no: K = 20 is not a multiple of 32" in Page(render(copy)).text


@pytest.mark.usefixtures("undrawn")
def test_reproducing_command_repeats_the_overrides(copy: Path) -> None:
    change(copy, "recipe.lock.json", lambda lock: lock.update(sets=["tune.epochs=0", "name=a b"]))
    assert "mpdeploy run recipe.toml --set tune.epochs=0 --set 'name=a b'" in Page(render(copy)).text


# What is missing


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("to", STAGES[:-1])
def test_a_run_that_stopped_early_says_what_was_not_checked_and_why(tmp_path: Path, to: str) -> None:
    text = Page(render(write_bundle(tmp_path / "bundle", to=to))).text
    assert "Not established" in text
    assert "because the stage validate did not run" in text
    assert f"(the last stage that ran is {to})" in text
    assert ("because the stage certify did not run" in text) == (STAGES.index(to) < STAGES.index("certify"))
    assert not re.search(r"\bnan\b|\binf\b|None", text)


@pytest.mark.usefixtures("undrawn")
def test_missing_numbers_are_not_measured_never_zero(copy: Path) -> None:
    def edit(value: Any) -> None:
        value["engines"][0] |= {"latency": None, "top1": None}
        value["engines"][0]["certified"] = {"n": 0, "violations": 0, "violating_ids": [], "kept_broken": 0}

    change(copy, "results.json", edit)
    text = Page(render(copy)).text
    assert "Top-1, dense → engine not measured" in text
    assert "Speed-up against its dense twin not measured" in text
    assert "Certified labels lost by the engine not measured" in text
    assert "latency not measured" in text


def test_logits_that_are_not_finite_are_named_and_left_out_of_the_figures(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in FIGURES[1:]:
        monkeypatch.setattr(plots, name, lambda *_: Markup("<svg></svg>"))
    ledger = load_file(copy / "ledger.safetensors")
    ledger["logits"][3, 1, 1], ledger["logits"][7, 2, 0] = np.nan, np.inf
    save_file(ledger, copy / "ledger.safetensors")
    seal(copy)
    page = render(copy)
    assert "2 samples have logits that are not finite." in Page(page).text
    assert "Means over 398 samples" in page


# What is refused


def test_a_file_that_differs_from_the_manifest_is_refused_by_name(copy: Path) -> None:
    text = (copy / "results.json").read_text()
    (copy / "results.json").write_text(text.replace('"violations": 0', '"violations": 1'))
    with pytest.raises(CorruptArtifact, match=r"not what its manifest\.json lists: results\.json"):
        render(copy)


def test_a_folder_without_a_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorruptArtifact, match="holds no bundle"):
        render(tmp_path)


@pytest.mark.parametrize("verdict", ["refuted", "unchecked", "probably"])
def test_a_headline_that_its_own_gates_contradict_is_refused(copy: Path, verdict: str) -> None:
    change(copy, "verdict.json", lambda value: value["gates"][2].update(verdict=verdict))
    with pytest.raises(CorruptArtifact, match=r'says "holds", but these gates do not hold: max_violations'):
        render(copy)


def test_holds_without_any_gate_is_refused(copy: Path) -> None:
    change(copy, "verdict.json", lambda value: value.update(gates=[]))
    with pytest.raises(CorruptArtifact, match=r'says "holds", but no gate backs it'):
        render(copy)


def test_weights_that_lack_a_layer_are_refused(copy: Path) -> None:
    change(copy, "layers.json", lambda layers: layers[1].update(name="blocks.9.attn.qkv"))
    with pytest.raises(CorruptArtifact, match=r"blocks\.9\.attn\.qkv, but weights/tuned\.safetensors"):
        render(copy)


def test_a_ledger_that_is_not_safetensors_is_refused(copy: Path) -> None:
    (copy / "ledger.safetensors").write_bytes(b"not tensors")
    seal(copy)
    with pytest.raises(CorruptArtifact, match=r"ledger\.safetensors can't be read as safetensors"):
        render(copy)


# What kind of page it is


def test_page_is_self_contained_and_well_formed(page: str) -> None:
    read = Page(page)
    assert not read.unbalanced
    assert not read.open
    assert len(read.named("h1")) == 1
    assert len(read.named("title")) >= 1
    assert read.named("html") == [{"lang": "en"}]
    assert not read.named("script")
    assert not read.named("link")
    assert not read.named("img")
    for _, attributes in read.elements:
        for key, value in attributes.items():
            assert not key.startswith("on"), f"{key} is an event handler"
            assert key not in ("src", "srcset", "action", "data"), f"{key} loads something"
            assert key != "href" or str(value).startswith("#"), f"{value} leaves the page"
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", page)


def test_ids_are_unique_and_every_reference_has_its_target(page: str) -> None:
    elements = Page(page).elements
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    wanted = set(re.findall(r'(?:url\(|href=")#([^")]+)', page))
    for _, attributes in elements:
        wanted |= set(str(attributes.get("aria-labelledby") or "").split())
    assert wanted <= set(ids)
    assert set(SECTIONS) <= set(ids)


def test_headings_do_not_skip_a_level(page: str) -> None:
    levels = [int(tag[1]) for tag, _ in Page(page).elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_every_figure_has_a_name_a_description_and_the_pages_colours(page: str) -> None:
    figures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(figures) == 4 + 2 + 8 + 1
    for figure in figures:
        assert 'role="img"' in figure
        assert re.search(r"<title [^>]*>[^<]{8,}</title>", figure)
        assert re.search(r"<desc [^>]*>[^<]{20,}</desc>", figure)
        assert not re.search(r"#0\d0\d0\d", figure), "a placeholder colour was left in"
        assert "font-family" not in figure


def test_same_bundle_gives_the_same_page_wherever_it_lies_and_with_or_without_its_manifest(
    copy: Path, page: str
) -> None:
    (copy / "manifest.json").unlink()
    (copy / "report.html").write_text(page)
    assert render(copy) == page


HOSTILE = """<script>alert(1)</script>"'><img src=x onerror=alert(1)> & </style></pre>"""


@pytest.mark.usefixtures("undrawn")
def test_text_from_the_bundle_is_escaped_everywhere(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", name=HOSTILE)
    change(bundle, "layers.json", lambda layers: layers[0].update(reason=HOSTILE, note=HOSTILE))
    change(bundle, "verdict.json", lambda value: value.update(reason=HOSTILE))
    change(bundle, "classes.json", lambda classes: classes.append(HOSTILE))
    page = render(bundle)
    read = Page(page)
    assert not read.named("script")
    assert not read.named("img")
    assert HOSTILE not in page
    assert not read.unbalanced
    assert read.text.count(HOSTILE) >= 7
    assert "<script>alert" not in page  # the recipe's comment


def test_text_in_a_figure_is_escaped() -> None:
    read = Page(plots.spectrum(0, HOSTILE, fit(np.random.default_rng(0).normal(size=(40, 20)))))
    assert not read.named("script")
    assert not read.named("img")
    assert f"Eigenvalues of {HOSTILE}" in read.text


def test_many_layers_are_summed_up_and_the_page_stays_small(tmp_path: Path) -> None:
    page = render(write_bundle(tmp_path / "bundle", blocks=7, width=32))
    text = Page(page).text
    assert "28 layers are pruned: the summary shows all of them, the small figures the 12" in text
    assert len(re.findall(r'id="spectrum-\d+-title"', page)) == 12
    assert page.count('id="spectra-title"') == 1
    assert len(page.encode()) < 3_000_000


# Numbers


@given(st.floats(0, 1))
def test_percent_is_all_or_nothing_only_where_the_share_is(value: float) -> None:
    text = formats.percent(value)
    if 1e-10 < value < 1 - 1e-10:
        assert float(text.removesuffix("\u00a0%")) not in (0.0, 100.0)


@given(st.floats(-1e300, 1e300))
def test_number_reads_back_to_three_digits(value: float) -> None:
    text = formats.number(value).replace("−", "-").replace(",", "")
    plain = text.translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")).replace("×10", "e")
    assert float(plain) == pytest.approx(value, rel=0.0051)


@pytest.mark.parametrize("form", list(formats.FORMATS.values()))
@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), "text"])
def test_what_is_no_number_is_not_measured(form: Callable[[Any], str], value: object) -> None:
    assert form(value) == "not measured"


def test_intervals_may_be_open() -> None:
    assert formats.interval(0.9, None, "percent") == "at least 90.0\u00a0%"
    assert formats.interval(None, 0.9, "percent") == "at most 90.0\u00a0%"
    assert formats.interval(float("nan"), None, "percent") == "–"


def test_a_small_change_does_not_read_as_nothing() -> None:
    svg = plots.waterfall(5.0, [("engine", "engine", 0.0004)], 4.9996, 10)
    assert "engine −0.0004" in svg
    assert "tune 0;" in plots.waterfall(5.0, [("tuned", "tune", 0.0)], 5.0, 10)


# In a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
in_browser = pytest.mark.skipif(not CHROMIUM, reason="no chromium, chromium-browser or google-chrome on this machine")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip
MEASURE = """
<pre id="out"></pre>{frames}<script>
onload = () => {{
  const rows = [...document.querySelectorAll("iframe")].map(frame => {{
    const page = frame.contentDocument, root = page.documentElement, box = page.querySelector(".layers").parentElement;
    const seen = page.querySelector(".verdict").getBoundingClientRect();
    const sizes = [...page.querySelectorAll("main p, main td")].map(e => parseFloat(getComputedStyle(e).fontSize));
    return {{width: frame.clientWidth, scroll: root.scrollWidth, height: root.scrollHeight, table: box.scrollWidth,
             box: box.clientWidth, bottom: seen.bottom, smallest: Math.min(...sizes)}};
  }});
  document.getElementById("out").textContent = JSON.stringify(rows);
}};
</script>"""


def browse(folder: Path, *arguments: str) -> str:
    """Run the browser once with a profile of its own."""
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


@in_browser
def test_no_horizontal_scroll_at_desktop_and_phone_width(page: str, tmp_path: Path) -> None:
    widths = {1280: 900, 390: 844, 320: 640}
    frames = "".join(
        f'<iframe width="{w}" height="{h}" style="border:0" srcdoc="{html.escape(page)}"></iframe>'
        for w, h in widths.items()
    )
    (tmp_path / "frames.html").write_text("<!DOCTYPE html>" + MEASURE.format(frames=frames), encoding="utf-8")
    dom = browse(tmp_path, "--dump-dom", (tmp_path / "frames.html").as_uri())
    found = re.search(r'<pre id="out">(.*?)</pre>', dom)
    assert found
    rows = json.loads(found[1])
    assert [row["width"] for row in rows] == list(widths)
    for row in rows:
        assert row["scroll"] <= row["width"]
        assert row["height"] > 2000, "the page was not laid out"
        assert row["bottom"] < widths[row["width"]], "the verdict is not on the first screen"
        assert row["smallest"] >= 12
    assert rows[1]["table"] > rows[1]["box"], "on a phone the layer table scrolls inside its own box"


@in_browser
def test_the_page_is_drawn_in_dark_colours_where_the_reader_prefers_them(page: str, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    scheme = ["--blink-settings=preferredColorScheme=0"]
    shot = tmp_path / "shot.png"
    browse(tmp_path, *scheme, "--window-size=1280,900", f"--screenshot={shot}", (tmp_path / "page.html").as_uri())
    with Image.open(shot) as image:
        assert image.size == (1280, 900)
        pixels = np.asarray(image.convert("L"), np.float64)
    assert np.median(pixels) < 60
    assert pixels.std() > 8, "nothing was drawn"


def _luminance(color: str) -> float:
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_aa_and_figures_three_to_one(page: str, scheme: str) -> None:
    blocks = re.findall(r":root \{([^}]*)\}", page)
    colors = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", blocks[("light", "dark").index(scheme)]))

    def contrast(one: str, two: str) -> float:
        bright, dim = sorted((_luminance(colors[one]), _luminance(colors[two])), reverse=True)
        return (bright + 0.05) / (dim + 0.05)

    for text in ("ink", "muted", "good", "bad", "open", "info"):
        for ground in ("card", "page", "zebra"):
            assert contrast(text, ground) >= 4.5, f"{text} on {ground}"
    for tone in ("good", "bad", "open", "info"):
        assert contrast(tone, f"{tone}-tint") >= 4.5, f"{tone} on its tint"
    for mark in ("c-dense", "c-pruned", "c-tuned", "c-engine", "c-lost"):
        assert contrast(mark, "card") >= 3, f"{mark} on a card"
