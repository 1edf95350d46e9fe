"""The spectra of a network -> one self-contained HTML page: no network, no scripts, the same look as the report."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from mpdeploy import plots
from mpdeploy.formats import count, number, percent, times
from mpdeploy.page import environment
from mpdeploy.pruning.spectrum import DOUBTS, TRACE_BETA
from mpdeploy.spectra import DOUBT, RULES, SIGNAL, LayerSpectrum, Spectra


def render(spectra: Spectra, progress: Callable[[int, int], None]) -> str:
    """Render the page: what it comes to, the table, then one plot per fitted layer.

    Args:
        spectra: of a network.
        progress: told how many of how many plots are drawn.

    Returns:
        One HTML page, the same text for the same spectra.
    """
    fitted = [layer for layer in spectra.layers if layer.fit]
    drawn = []
    for done, layer in enumerate(fitted):
        progress(done, len(fitted))
        drawn.append({"layer": layer, "svg": plots.spectrum(done, layer.name, _fit(layer))})
    progress(len(fitted), len(fitted))
    view = {
        "spectra": spectra,
        "figures": _key_figures(spectra.layers),
        "headline": _headline(fitted),
        "drawn": drawn,
        "summary": _summary(fitted),
        "rules": RULES,
        "doubts": DOUBTS,
        "doubt": DOUBT,
        "signal": SIGNAL,
        "trace_beta": TRACE_BETA,
        "window": 1 - 2 * spectra.alpha,
    }
    return environment().get_template("spectra.html.jinja").render(view)


def _fit(layer: LayerSpectrum) -> Any:
    return layer.fit


def _headline(fitted: list[LayerSpectrum]) -> str:
    """Say how many layers look like what, the most frequent first, and how many are in doubt."""
    looks = Counter(layer.character for layer in fitted)
    doubted = sum(bool(layer.opinions and layer.opinions.doubts) for layer in fitted)
    words = ", ".join(f"{n} {word}" for word, n in looks.most_common()) or "no layer could be fitted"
    return f"{words}; {doubted} in doubt" if doubted else words


def _key_figures(layers: tuple[LayerSpectrum, ...]) -> list[dict[str, str]]:
    """Return the numbers of the first screen: label, value, detail."""
    fits = [(layer.name, layer.fit) for layer in layers if layer.fit]
    if not fits:
        return []
    largest = max((f.largest_singular / f.edge_singular, name) for name, f in fits)
    worst, spikes = max((f.ks, name) for name, f in fits), sum(f.spikes for _, f in fits)
    total = sum(len(f.eigenvalues) for _, f in fits)
    return [
        {
            "label": "Layers fitted",
            "value": count(len(fits)),
            "detail": f"of {count(len(layers))}; the others say why not" if len(fits) < len(layers) else "all of them",
        },
        {
            "label": "Singular values in the bulk",
            "value": percent(1 - spikes / total),
            "detail": f"of {count(total)}; {count(spikes)} above their layer's edge",
        },
        {
            "label": "Largest singular value over the edge",
            "value": times(largest[0]),
            "detail": largest[1],
        },
        {"label": "Worst fit of the bulk (KS)", "value": number(worst[0]), "detail": worst[1]},
    ]


def _summary(fitted: list[LayerSpectrum]) -> Any:
    """Draw sigma, largest eigenvalue over the edge and spikes along the network; nothing where one layer is all."""
    fits = [layer.fit for layer in fitted if layer.fit]
    if len(fits) < 2:
        return None
    largest = [float(f.eigenvalues[-1]) / f.edge for f in fits]
    columns = ([f.sigma for f in fits], largest, [f.spikes for f in fits])
    sigma, over, spikes = (np.array(column, np.float64) for column in columns)
    return plots.spectra_summary(sigma, over, spikes, kind="fitted layer")
