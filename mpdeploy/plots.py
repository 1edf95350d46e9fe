"""Figures of the report: matplotlib draws, and what comes out is inline SVG in the page's own colours and font.

Every colour below is a placeholder that `_inline` replaces by a CSS variable, so that one drawing serves light, dark
and print. Text stays text: it is readable by a screen reader, and the files stay small.
"""

import re
from collections.abc import Sequence
from io import StringIO
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from mpdeploy.pruning.spectrum import Spectrum, density

Floats = NDArray[np.float64]

INK, MUTED, LINE = "#010101", "#020202", "#030303"
DENSE, PRUNED, TUNED, ENGINE, LOST = "#040404", "#050505", "#060606", "#070707", "#080808"
_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
    DENSE: "var(--c-dense)",
    PRUNED: "var(--c-pruned)",
    TUNED: "var(--c-tuned)",
    ENGINE: "var(--c-engine)",
    LOST: "var(--c-lost)",
}
RUNG_COLORS = {"dense": DENSE, "pruned": PRUNED, "tuned": TUNED, "engine": ENGINE}

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mpdeploy",
    "text.parse_math": False,
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "figure.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    "path.simplify": True,
}
_WIDE, _SMALL = (4.3, 2.7), (2.4, 1.7)  # inches; a phone shows them at about their own size


def waterfall(start: float, spent: Sequence[tuple[str, str, float]], left: float, samples: int) -> Markup:
    """Draw the mean dense margin, what each rung took of it, and the mean slack left (they add up exactly).

    Args:
        start: mean dense margin, logits.
        spent: per rung its key in RUNG_COLORS, its label, and what it spent on average, logits; negative is given back.
        left: mean slack after the last rung, logits.
        samples: how many samples the means are over.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(_WIDE)
        labels = ["dense\nmargin", *(label for _, label, _ in spent), "slack\nleft"]
        level = start
        axes.bar(0, start, 0.62, color=DENSE)
        tops = [start]
        for column, (rung, _, amount) in enumerate(spent, 1):
            axes.bar(column, -amount, 0.62, bottom=level, color=RUNG_COLORS[rung])
            axes.plot([column - 1, column], [level, level], color=MUTED, lw=0.7, ls=":")
            tops.append(max(level, level - amount))
            level -= amount
        axes.plot([len(spent), len(spent) + 1], [level, level], color=MUTED, lw=0.7, ls=":")
        axes.bar(len(spent) + 1, left, 0.62, color=INK)
        tops.append(max(left, 0.0))
        values = [f"{start:.2f}", *(_signed(-amount) for *_, amount in spent), f"{left:.2f}"]
        room = 0.03 * max(*tops, 1e-12)
        for column, (top, value) in enumerate(zip(tops, values, strict=True)):
            axes.text(column, top + room, value, ha="center", va="bottom")
        axes.set_xticks(range(len(labels)), labels)
        axes.tick_params(axis="x", length=0)
        axes.set_ylim(top=max(tops) * 1.14)
        axes.axhline(0, color=INK, lw=0.8)
        axes.set_ylabel("logits, mean over samples")
        steps = "; ".join(f"{label} {value}".replace("\n", " ") for label, value in zip(labels, values, strict=True))
        return _inline(
            figure,
            "waterfall",
            "What each stage spent of the margin",
            f"Means over {samples} samples, logits: {steps}.",
        )


def slack_boxes(rungs: Sequence[tuple[str, str, Floats]]) -> Markup:
    """Draw the spread of the slack after each rung: key, label, slack [n] in logits."""
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(_WIDE)
        for row, (rung, _, slack) in enumerate(rungs):
            p5, p25, p50, p75, p95 = np.percentile(slack, [5, 25, 50, 75, 95])
            axes.plot([p5, p95], [row, row], color=RUNG_COLORS[rung], lw=1.4)
            axes.barh(row, p75 - p25, 0.5, left=p25, color=RUNG_COLORS[rung])
            axes.plot([p50, p50], [row - 0.34, row + 0.34], color=INK, lw=1.8)
            low = float(slack.min())
            axes.plot([low], [row], ls="", marker="|", ms=7, mew=1.4, color=LOST if low <= 0 else RUNG_COLORS[rung])
        axes.axvline(0, color=LOST, lw=1.1, ls="--")
        axes.text(0, -0.62, "label lost ◂", color=LOST, ha="right", va="bottom", fontsize=9.0)
        axes.set_yticks(range(len(rungs)), [label for _, label, _ in rungs])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(rungs) - 0.45, -0.75)
        axes.set_xlabel("slack of the dense label, logits")
        medians = "; ".join(
            f"{label} median {np.median(slack):.2f}, lowest {slack.min():.2f}" for _, label, slack in rungs
        )
        return _inline(figure, "slack", "Slack of each sample after every stage", f"{medians}.")


def margin_histogram(margin: Floats, slack: Floats, after: str) -> Markup:
    """Draw the dense margins [n] against the slack [n] left after the last rung, logits, on the same bins."""
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(_WIDE)
        low, high = float(min(margin.min(), slack.min(), 0.0)), float(max(margin.max(), slack.max()))
        edges = np.linspace(low, high if high > low else low + 1.0, 37)
        axes.stairs(np.histogram(margin, edges)[0], edges, fill=True, color=DENSE, alpha=0.35, label="dense margin")
        axes.stairs(np.histogram(slack, edges)[0], edges, color=ENGINE, lw=1.6, label=f"slack after {after}")
        axes.axvline(0, color=LOST, lw=1.1, ls="--")
        axes.set_xlabel("logits")
        axes.set_ylabel("samples")
        axes.legend(loc="upper right")
        lost = int((slack <= 0).sum())
        text = (
            f"{margin.size} samples. Dense margin: median {np.median(margin):.2f} logits. Slack after {after}: median "
            f"{np.median(slack):.2f}; {lost} samples at or below zero, where the label is lost."
        )
        return _inline(figure, "margins", f"Dense margin and slack after {after}", text)


def kept_by_margin(margin: Floats, verdict: NDArray[np.uint8]) -> Markup:
    """Draw how many labels were certified (2), kept (1) and flipped (0) in ten groups of equal size by dense margin."""
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(_WIDE)
        groups = [group for group in np.array_split(np.argsort(margin, kind="stable"), 10) if group.size]
        base = np.zeros(len(groups))
        lost = [int((verdict[group] == 0).sum()) for group in groups]
        for value, color in ((2, ENGINE), (1, PRUNED), (0, LOST)):
            heights = np.array([float((verdict[group] == value).sum()) for group in groups])
            axes.bar(range(len(groups)), heights, 0.82, bottom=base, color=color)
            base += heights
        axes.set_xticks(range(len(groups)), [f"{np.median(margin[group]):.1f}" for group in groups])
        axes.tick_params(axis="x", length=0)
        axes.set_xlabel("median dense margin of the group, logits")
        axes.set_ylabel("samples")
        text = f"Flipped in each group, from the smallest dense margins to the largest: {', '.join(map(str, lost))}."
        return _inline(figure, "kept", "Labels certified, kept and flipped by dense margin", text)


def latency_histogram(name: str, engine: Floats, twin: Floats, batch: str) -> Markup:
    """Draw the times of single calls, seconds [calls], of an engine and of its dense twin."""
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(_WIDE)
        both = 1e3 * np.concatenate([engine, twin])
        end = max(float(np.percentile(1e3 * times, 99)) for times in (engine, twin)) * 1.05
        start = float(both.min())
        edges = np.linspace(start, end if end > start else start + 1e-3, 49)
        for times, color, label in ((twin, DENSE, "dense twin"), (engine, ENGINE, "engine")):
            counts = np.histogram(np.minimum(1e3 * times, edges[-1]), edges)[0]
            axes.stairs(counts, edges, fill=True, color=color, alpha=0.4, label=label)
        top = axes.get_ylim()[1]
        for times, color in ((twin, DENSE), (engine, ENGINE)):
            axes.plot([1e3 * float(np.median(times))] * 2, [0, top], color=color, lw=1.8)
        axes.set_ylim(0, top * 1.02)
        axes.set_xlabel(f"milliseconds per call, batch {batch}")
        axes.set_ylabel("calls")
        axes.legend(loc="upper right")
        slow = int((both >= edges[-1]).sum())
        text = (
            f"{engine.size} calls of the engine, median {1e3 * np.median(engine):.3g} ms; {twin.size} calls of its "
            f"dense twin, median {1e3 * np.median(twin):.3g} ms. The last bin holds {slow} calls at or beyond "
            f"{edges[-1]:.3g} ms. Vertical lines are medians."
        )
        return _inline(figure, f"latency-{name}", f"Latency of {name} and of its dense twin", text)


def spectrum(index: int, name: str, fit: Spectrum) -> Markup:
    """Draw one layer's eigenvalues with the fitted law; what lies beyond four edges is counted, not drawn."""
    values = fit.eigenvalues[fit.eigenvalues > 1e-9 * fit.edge] / fit.edge
    limit = min(float(values.max(initial=1.0)) * 1.05, 4.0)
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(_SMALL)
        bins = np.linspace(0, limit, 1 + min(40, max(10, values.size // 3)))
        heights = np.histogram(values, bins)[0] / (max(values.size, 1) * (bins[1] - bins[0]))
        axes.stairs(heights, bins, fill=True, color=DENSE, alpha=0.4)
        x = np.linspace(1e-6, min(1.0, limit), 160)
        law = fit.edge * density(x * fit.edge, fit)
        axes.plot(x, law, color=PRUNED, lw=1.5)
        axes.axvline(1, color=INK, lw=0.9, ls="--")
        # At aspect 1 the law has a pole at 0: the axis ends above what it is away from there.
        top = 1.25 * float(max(law[x > 0.02].max(initial=0.0), 1e-12))
        above = values[values > 1]
        axes.vlines(above[above <= limit], 0, 0.1 * top, color=LOST, lw=1.4)
        axes.set_ylim(0, top)
        axes.set_xlim(0, limit)
        axes.set_yticks([])
        axes.locator_params(axis="x", nbins=4)
        beyond = int((above > limit).sum())
        if beyond:
            axes.text(limit, 0.97 * top, f"{beyond} beyond ▸", color=LOST, ha="right", va="top", fontsize=9.0)
        text = (
            f"{values.size} non-zero eigenvalues, {above.size} above the edge at {fit.edge:.3g} (sigma "
            f"{fit.sigma:.3g}); the largest is {values.max(initial=0.0):.3g} times the edge."
            + (f" {beyond} lie beyond the plot." if beyond else "")
        )
        return _inline(figure, f"spectrum-{index}", f"Eigenvalues of {name}", text)


def spectra_summary(sigma: Floats, largest: Floats, spikes: Floats, *, kind: str = "pruned layer") -> Markup:
    """Draw, per layer of a kind in network order: sigma, largest eigenvalue over the edge, and number of spikes."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(4.3, 3.9))
        panels = figure.subplots(3, 1, sharex=True)
        order = np.arange(1, sigma.size + 1)
        rows = ((sigma, "sigma", DENSE), (largest, "max / edge", PRUNED), (spikes, "spikes", LOST))
        for axes, (values, label, color) in zip(panels, rows, strict=True):
            axes.vlines(order, 0, values, color=color, lw=1.6)
            axes.set_ylabel(label)
            axes.set_ylim(bottom=0)
            axes.locator_params(axis="y", nbins=4)
        panels[1].axhline(1, color=INK, lw=0.9, ls="--")
        panels[2].xaxis.get_major_locator().set_params(integer=True)
        panels[2].set_xlabel(f"{kind}, in network order")
        figure.subplots_adjust(0.15, 0.12, 0.98, 0.97, hspace=0.22)
        text = (
            f"{sigma.size} {kind}s. Sigma from {sigma.min():.3g} to {sigma.max():.3g}; largest eigenvalue over "
            f"the edge from {largest.min():.3g} to {largest.max():.3g}; {int(spikes.sum())} spikes in all."
        )
        return _inline(figure, "spectra", "Fitted noise level, largest eigenvalue and spikes of each layer", text)


def allocation(bars: Sequence[tuple[str, float, bool]]) -> Markup:
    """Draw the measured error of each choice of patterns: label, squared logit change per image, whether it decides."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(4.3, 0.7 + 0.34 * len(bars)))
        axes = figure.subplots()
        figure.subplots_adjust(0.34, 0.45 / figure.get_figheight(), 0.9, 0.98)
        most = max([error for _, error, _ in bars] + [1e-30])
        for row, (_, error, decides) in enumerate(bars):
            axes.barh(row, error, 0.62, color=ENGINE if decides else DENSE)
            axes.text(error + 0.01 * most, row, f"{error:.3g}", va="center")
        axes.set_yticks(range(len(bars)), [label for label, *_ in bars])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(bars) - 0.45, -0.55)
        axes.set_xlim(0, 1.18 * most)
        axes.locator_params(axis="x", nbins=4)
        axes.set_xlabel("squared logit change per image")
        text = "; ".join(f"{label} {error:.3g}{', which decides' if decides else ''}" for label, error, decides in bars)
        return _inline(figure, "allocation", "Measured error of each choice of patterns within the budget", f"{text}.")


def loss_curve(steps: Floats, losses: Floats) -> Markup:
    """Draw the training loss over the steps, and a running mean where there are enough of them."""
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(_WIDE)
        axes.plot(steps, losses, color=TUNED, lw=1.0, alpha=0.45, marker="." if steps.size < 40 else "")
        if steps.size >= 40:
            width = steps.size // 20
            mean = np.convolve(losses, np.full(width, 1 / width), mode="valid")
            axes.plot(steps[width - 1 :], mean, color=TUNED, lw=1.8)
        axes.set_ylim(bottom=min(0.0, float(losses.min())))
        axes.set_xlabel("step")
        axes.set_ylabel("distillation loss")
        ends = f"from {losses[0]:.3g} at step {steps[0]:g} to {losses[-1]:.3g} at step {steps[-1]:g}"
        text = f"{steps.size} recorded steps: {ends}."
        return _inline(figure, "loss", "Loss while tuning", text)


def _axes(size: tuple[float, float]) -> tuple[Figure, Axes]:
    """Return a figure with one pair of axes and fixed margins, so that figures side by side line up."""
    figure = Figure(figsize=size)
    axes = figure.subplots()
    if size == _WIDE:
        figure.subplots_adjust(0.15, 0.19, 0.96, 0.96)
        axes.grid(visible=True, axis="y", zorder=0)
    else:
        figure.subplots_adjust(0.04, 0.17, 0.96, 0.97)
    axes.set_axisbelow(True)
    return figure, axes


def _signed(value: float) -> str:
    """Print a change with its sign, and with enough digits that a small one does not read as nothing."""
    if value == 0:
        return "0"
    return (f"{value:+.2f}" if abs(value) >= 0.005 else f"{value:+.1g}").replace("-", "−")


def _inline(figure: Figure, name: str, title: str, description: str) -> Markup:
    """Turn a figure into an SVG element that may stand inside the page, named for screen readers."""
    buffer = StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    safe = re.sub(r"[^A-Za-z0-9_-]", "-", name)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    used = {match[1] for element in root.iter() for match in map(_reference, element.attrib.values()) if match}
    for element in root.iter():
        _clean(element, safe, used)
    view = root.attrib["viewBox"]
    root.attrib.clear()
    labels = {"role": "img", "aria-labelledby": f"{safe}-title {safe}-desc", "viewBox": view, "class": "plot"}
    root.attrib.update(labels)
    for position, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ElementTree.Element(tag, {"id": f"{safe}-{tag}"})
        element.text = text
        root.insert(position, element)
    return Markup(ElementTree.tostring(root, encoding="unicode"))  # ElementTree escapes every text


def _reference(value: str) -> re.Match[str] | None:
    return re.fullmatch(r"(?:url\()?#([^)]+)\)?", value) if "#" in value else None


def _clean(element: ElementTree.Element, name: str, used: set[str]) -> None:
    """Drop namespaces and unused ids, prefix the used ones, and take colours and font from the page."""
    element.tag = element.tag.rpartition("}")[2]
    if element.tail and not element.tail.strip():
        element.tail = "\n"
    for key in list(element.attrib):
        value = element.attrib.pop(key)
        key = key.rpartition("}")[2]
        if key == "id" and value not in used:
            continue
        if key == "id":
            value = f"{name}-{value}"
        elif (match := _reference(value)) and match[1] in used:
            value = value.replace(f"#{match[1]}", f"#{name}-{match[1]}")
        elif key == "style":
            value = re.sub(r"font: ([\d.]+px)[^;]*", r"font-size: \1", value)
            value = re.sub(r"font-family: [^;]*(; )?", "", value)
            value = re.sub(r"#0\d0\d0\d", lambda found: _VARIABLES.get(found[0], found[0]), value)
        elif key in ("d", "x", "y", "transform"):
            value = re.sub(r"-?\d+\.\d+", lambda found: f"{float(found[0]):.2f}", value).replace("\n", " ")
        element.attrib[key] = value
