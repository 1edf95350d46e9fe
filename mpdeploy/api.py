"""The same steps as the command line's, from Python.

import mpdeploy
result = mpdeploy.run("recipes/quickstart.toml")
print(result.verdict, result.bundle / "report.html")
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpdeploy import bundle as bundles
from mpdeploy.artifact import Artifact, check_files, read_json
from mpdeploy.errors import CorruptArtifact, RecipeError
from mpdeploy.pipeline import Silent, Step, Watcher, compile_recipe
from mpdeploy.pipeline import plan as plan_steps
from mpdeploy.planning import Preview, preview
from mpdeploy.recipe import RecipeFile, load_recipe
from mpdeploy.stages import STAGES
from mpdeploy.store import Store, space_errors_named, write_whole
from mpdeploy.unseen import candidates
from mpdeploy.verify import Finding, Unreadable, verify

if TYPE_CHECKING:
    from torch import nn

    from mpdeploy.certify.noise_floor import Precision
    from mpdeploy.pairs import Pair, Proofs
    from mpdeploy.spectra import Spectra

LAST = STAGES[-1].name


@dataclass(frozen=True)
class Run:
    """What a run came to.

    Attributes:
        artifacts: one per stage that was asked for.
        bundle: the bundle's folder, None where the run stopped before the last stage.
        verdict: "holds", "refuted", "unchecked"; None where the run stopped before the last stage.
        summary: contents of verdict.json, empty where there is none.
    """

    artifacts: Mapping[str, Artifact]
    bundle: Path | None
    verdict: str | None
    summary: Mapping[str, Any]


def default_store() -> Path:
    """Return $MPDEPLOY_STORE, or .mpdeploy in the current folder."""
    return Path(os.environ.get("MPDEPLOY_STORE", ".mpdeploy"))


def run(
    recipe: str | Path | RecipeFile,
    *,
    to: str = LAST,
    sets: Sequence[str] = (),
    store: str | Path | None = None,
    out: str | Path | None = None,
    watcher: Watcher | None = None,
) -> Run:
    """Compile a recipe and write its bundle.

    Args:
        recipe: a TOML file, or one already loaded.
        to: the last stage to run; a bundle is written only after the very last.
        sets: overrides "table.key=value".
        store: where artefacts are kept; default `default_store()`.
        out: the bundle's folder; default bundles/<recipe name>.
        watcher: who wants to know how it goes.

    Raises:
        MpdeployError: anything that kept the work from being done. A failed gate is not an error but a verdict.
    """
    file = recipe if isinstance(recipe, RecipeFile) else load_recipe(Path(recipe), sets)
    watcher = watcher or Silent()
    home = Store(Path(store) if store else default_store())
    artifacts = compile_recipe(file.recipe, home, to, watcher)
    if to != LAST:
        return Run(artifacts, None, None, {})
    folder = Path(out) if out else Path("bundles") / file.recipe.name
    with space_errors_named(folder):
        count = candidates(artifacts[LAST], home.remembered(LAST))
        _write_bundle(folder, file, artifacts, count, watcher)
    verdict = read_json(folder / "verdict.json")
    return Run(artifacts, folder, verdict["verdict"], verdict)


def _write_bundle(
    folder: Path, file: RecipeFile, artifacts: Mapping[str, Artifact], count: int, watcher: Watcher
) -> None:
    """Write the bundle, or check the one that is there."""
    if bundles.is_current(folder, file, artifacts, count):
        check_files(folder, read_json(folder / "manifest.json")["files"], "The bundle")
        watcher.stage("report", "reused", str(folder))
        return
    # matplotlib takes longer to load than a run that reuses everything.
    from mpdeploy.report import render

    watcher.stage("report", "running", str(folder))
    bundles.assemble(folder, file, artifacts, count, render, lambda d, t: watcher.progress("writing the bundle", d, t))
    watcher.stage("report", "done", str(folder))


def plan(
    recipe: str | Path | RecipeFile, *, to: str = LAST, sets: Sequence[str] = (), store: str | Path | None = None
) -> list[Step]:
    """Say which stage would run or be reused, and why; does no work."""
    file = recipe if isinstance(recipe, RecipeFile) else load_recipe(Path(recipe), sets)
    return plan_steps(file.recipe, Store(Path(store) if store else default_store()), to)


def layers(recipe: str | Path | RecipeFile, *, sets: Sequence[str] = ()) -> Preview:
    """Return what the recipe would do to each layer; reads no weights and no images."""
    file = recipe if isinstance(recipe, RecipeFile) else load_recipe(Path(recipe), sets)
    return preview(file.recipe)


def spectrum(
    model: "str | Path | nn.Module",
    *,
    weights: str | None = None,
    args: Mapping[str, Any] | None = None,
    layers: str = "*",
    alpha: float = 0.25,
    beta: float = 0.1,
    out: str | Path | None = None,
    watcher: Watcher | None = None,
) -> "Spectra":
    """Fit the Marchenko-Pastur law to each weight matrix of a network.

    Args:
        model: a timm name, "torchvision:NAME", "package.module:function", a recipe, a bundle, a state dict's file, or
            a torch.nn.Module.
        weights: "pretrained", "random" or a file; of a bundle "dense", "pruned" or "tuned". None is the recipe's own,
            a bundle's dense ones, or "pretrained".
        args: passed to the network's constructor.
        layers: which layers, as a name pattern with * and ?.
        alpha: share of the eigenvalues that the fit leaves out at each end.
        beta: significance level of the edge: pure noise exceeds it with this probability.
        out: a page ending in .html, or a folder to write one to; None writes none.
        watcher: who wants to know how it goes.

    Raises:
        MpdeployError: the model or its weights can't be had, or hold NaN.
    """
    # scipy and torch take longer to load than most commands take to run.
    from mpdeploy import spectra

    watcher = watcher or Silent()
    watcher.stage("spectrum", "running", str(model) if isinstance(model, str | Path) else type(model).__name__)
    label, origin, found = spectra.read(model, weights, args)
    chosen = spectra.select(found, layers)
    page = spectra.page_path(out, label) if out is not None else None
    fitted = spectra.examine(
        chosen, alpha=alpha, beta=beta, progress=lambda d, t: watcher.progress("fitting spectra", d, t)
    )
    result = spectra.Spectra(label, origin, alpha, beta, fitted, page)
    if page:
        from mpdeploy.spectra_page import render

        _write_page(page, render(result, lambda d, t: watcher.progress("drawing spectra", d, t)))
    watcher.stage("spectrum", "done", f"{len(fitted)} layers")
    return result


def _write_page(page: Path, text: str) -> None:
    try:
        with space_errors_named(page.parent):
            write_whole(page, text)
    except OSError as error:
        raise RecipeError(
            f"{page} can't be written: {error.strerror or error}.", hint="pass --out with a file or folder that can be."
        ) from error


def certify_pair(
    a: str,
    b: str,
    *,
    data: str,
    split: str = "val",
    samples: int = 0,
    seed: int = 0,
    preprocessing: str | None = None,
    args: Mapping[str, Any] | None = None,
    keep: int = 16,
    confidence: float = 0.95,
    candidates: int = 1,
    noise: "Precision | None" = None,
    proofs: "Proofs | None" = None,
    out: str | Path | None = None,
    watcher: Watcher | None = None,
) -> "Pair":
    """Account for what is left of network A's margins in network B, on the same images.

    Args:
        a: the reference: an .onnx file, a network's name, a recipe or a bundle; "=WEIGHTS" behind it picks weights.
        b: what became of it, named in the same way.
        data: a folder with train/ and val/, an .npz, a recipe, a packaged set, or inputs as .npy float32 [n, C, H, W].
        split: "val" or "train".
        samples: how many images, drawn class-balanced; 0 is all.
        seed: of that draw.
        preprocessing: a bundle or a preprocessing.json, where neither network says what it wants.
        args: passed to the constructors of networks given by name.
        keep: classes kept of each sample.
        confidence: of every interval and bound.
        candidates: how many networks B was chosen from on these same samples.
        noise: "fp32", "tf32", "fp16", "bf16" or "int8": hold B's error against what that precision explains.
        proofs: which proofs to try on a few of them, see `mpdeploy.pairs.Proofs`.
        out: a folder for certificate.json and ledger.safetensors; None writes none.
        watcher: who wants to know how it goes.

    Raises:
        MpdeployError: a network or the images can't be had, or the two don't fit each other.
    """
    from mpdeploy import pairs
    from mpdeploy.runnable import open_inputs, opened, preprocessing_of

    watcher = watcher or Silent()
    watcher.stage("certify", "running", f"{a} -> {b}")
    with opened(a, args or {}) as first, opened(b, args or {}) as second:
        inputs = open_inputs(data, split, samples, seed, lambda: preprocessing_of((first, second), preprocessing))
        pair = pairs.compare(
            first,
            second,
            inputs,
            keep=keep,
            confidence=confidence,
            candidates=candidates,
            noise=noise,
            proofs=proofs,
            progress=lambda d, t: watcher.progress("running both networks", d, t),
        )
    if out is not None:
        with space_errors_named(Path(out)):
            pairs.write(pair, Path(out))
    watcher.stage("certify", "done", f"{pair.facts['samples']} samples")
    return pair


def verify_bundle(bundle: str | Path, expect: str | None = None) -> list[Finding]:
    """Check a bundle by another route than the one that made it; `mpdeploy.verify.overall` sums the findings up.

    Args:
        bundle: the folder.
        expect: the digest of its manifest.json, had by another way than the bundle.

    Raises:
        RecipeError: the folder is not a bundle.
        CorruptArtifact: its manifest can't be read.
    """
    folder = Path(bundle)
    bundles.check_is_bundle(folder)
    try:
        return verify(folder, expect)
    except Unreadable as error:
        raise CorruptArtifact(f"{error}") from error
