"""The command line: the only module that prints or exits.

stdout carries the result (a table, or JSON with --json), stderr the progress. Exit codes: 0 every gate passed, 1 a gate
failed, 2 recipe or usage, 3 not available here, 4 inconclusive or unchecked, 5 a stage failed or a file is not what was
written, 70 a bug, 130 interrupted.
"""

import dataclasses
import json
import os
import sys
import traceback
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from mpdeploy import __version__, launch
from mpdeploy.errors import MpdeployError

EXIT_OF_VERDICT = {"holds": 0, "refuted": 1, "unchecked": 4}
BUG, INTERRUPTED = 70, 130

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Prune, certify, export, build and audit vision networks.",
    epilog="Exit codes: 0 gates passed, 1 a gate failed, 2 recipe or usage, 3 not available here, "
    "4 inconclusive, 5 a stage failed, 70 a bug, 130 interrupted.",
)

RecipeArg = Annotated[Path, typer.Argument(metavar="RECIPE", help="A TOML recipe; `mpdeploy init` writes one.")]
BundleArg = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A folder that `mpdeploy run` wrote.")]
SetOpt = Annotated[list[str] | None, typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Override a recipe value.")]
StoreOpt = Annotated[Path | None, typer.Option("--store", help="Artefact store [$MPDEPLOY_STORE, .mpdeploy].")]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
ToOpt = Annotated[str | None, typer.Option("--to", metavar="STAGE", help="Stop after this stage.")]


class Precision(StrEnum):
    """Precisions with a noise floor."""

    fp32 = "fp32"
    tf32 = "tf32"
    fp16 = "fp16"
    bf16 = "bf16"
    int8 = "int8"


def _version(value: bool) -> None:
    if value:
        typer.echo(f"mpdeploy {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    if debug:
        os.environ["MPDEPLOY_DEBUG"] = "1"


@app.command()
def plan(recipe: RecipeArg, sets: SetOpt = None, store: StoreOpt = None, as_json: JsonOpt = False) -> None:
    """Say what would run and why, and what becomes of each layer; does no work."""
    from mpdeploy import api
    from mpdeploy.recipe import load_recipe
    from mpdeploy.show import plan_tables

    file = load_recipe(recipe, sets or [])
    steps, preview = api.plan(file, store=store), api.layers(file)
    if as_json:
        _print_json({"steps": [dataclasses.asdict(s) for s in steps], **dataclasses.asdict(preview)})
    else:
        plan_tables(steps, preview)


@app.command()
def run(
    recipe: RecipeArg,
    to: ToOpt = None,
    sets: SetOpt = None,
    store: StoreOpt = None,
    out: Annotated[Path | None, typer.Option("--out", help="The bundle's folder [bundles/NAME].")] = None,
    as_json: JsonOpt = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Compile a recipe: run what has to run, reuse the rest, write the bundle, judge the gates."""
    from mpdeploy import api
    from mpdeploy.pipeline import Silent
    from mpdeploy.recipe import load_recipe
    from mpdeploy.show import Terminal, run_tables

    file = load_recipe(recipe, sets or [])
    with Terminal() if not quiet else _nothing() as watcher:
        result = api.run(file, to=to or api.LAST, store=store, out=out, watcher=watcher or Silent())
    if as_json:
        chain = {name: artifact.digest for name, artifact in result.artifacts.items()}
        _print_json({"bundle": str(result.bundle) if result.bundle else None, "chain": chain, **result.summary})
    else:
        run_tables(result)
    raise typer.Exit(EXIT_OF_VERDICT[result.verdict] if result.verdict else 0)


@app.command()
def verify(
    bundle: BundleArg,
    expect: Annotated[str | None, typer.Option("--expect", help="The bundle's digest, had by another way.")] = None,
    as_json: JsonOpt = False,
) -> None:
    """Check a bundle by another route than the one that made it; trusts nothing that is written in it."""
    from mpdeploy.api import verify_bundle
    from mpdeploy.show import findings_table
    from mpdeploy.verify import overall

    findings = verify_bundle(bundle, expect)
    verdict = overall(findings)
    if as_json:
        rows = [{"claim": f.claim, "verdict": str(f.verdict), "reason": f.reason} for f in findings]
        _print_json({"verdict": str(verdict), "findings": rows})
    else:
        findings_table(findings, verdict)
    raise typer.Exit(EXIT_OF_VERDICT[str(verdict)])


@app.command()
def certify(
    a: Annotated[
        str,
        typer.Argument(
            metavar="A",
            help="The reference: FILE.onnx, a network's name, a recipe or a bundle, then =WEIGHTS if needed.",
        ),
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="What became of it, named in the same way.")],
    data: Annotated[
        str, typer.Option("--data", metavar="D", help="Image folder, .npz, recipe, packaged set, or inputs as .npy.")
    ],
    split: Annotated[str, typer.Option("--split", help="val or train.")] = "val",
    samples: Annotated[int, typer.Option("--samples", min=0, help="How many, class-balanced; 0 is all.")] = 0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the draw.")] = 0,
    preprocessing: Annotated[
        str | None, typer.Option("--preprocessing", metavar="P", help="A bundle or a preprocessing.json.")
    ] = None,
    args: Annotated[
        list[str] | None, typer.Option("--arg", metavar="KEY=VALUE", help="Pass it to the networks' constructors.")
    ] = None,
    keep: Annotated[int, typer.Option("--keep", min=2, help="Classes kept of each sample.")] = 16,
    confidence: Annotated[
        float, typer.Option("--confidence", min=0.5, max=0.999999, help="Of every interval and bound.")
    ] = 0.95,
    candidates: Annotated[
        int, typer.Option("--candidates", min=1, help="Networks that B was chosen from on these same samples.")
    ] = 1,
    noise: Annotated[
        Precision | None, typer.Option("--noise", help="Hold B's error against what this precision explains.")
    ] = None,
    proofs: Annotated[int, typer.Option("--proofs", min=0, help="Samples on which to try proofs; seconds each.")] = 0,
    ball: Annotated[
        float | None,
        typer.Option("--ball", metavar="EPS", min=0.0, help="With --proofs: compare ReLU networks on balls too."),
    ] = None,
    min_agreement: Annotated[
        float | None, typer.Option("--min-agreement", metavar="SHARE", help="Exit 1 if fewer labels are kept.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="A folder for certificate.json and the ledger.")] = None,
    as_json: JsonOpt = False,
) -> None:
    """Account for what is left of network A's margins in network B, on the same images."""
    from mpdeploy import api
    from mpdeploy.pairs import Proofs
    from mpdeploy.show import Terminal, pair_tables
    from mpdeploy.spectra import parse_args

    with Terminal() as watcher:
        pair = api.certify_pair(
            a, b, data=data, split=split, samples=samples, seed=seed, preprocessing=preprocessing,
            args=parse_args(args or []), keep=keep, confidence=confidence, candidates=candidates, out=out,
            noise=cast(Any, noise and noise.value), proofs=Proofs(proofs, ball=ball) if proofs else None,
            watcher=watcher,
        )  # fmt: skip
    if as_json:
        _print_json(pair.facts)
    else:
        pair_tables(pair)
    raise typer.Exit(0 if min_agreement is None or pair.agreement >= min_agreement else 1)


@app.command()
def report(
    bundle: BundleArg,
    out: Annotated[Path | None, typer.Option("--out", help="Where to write the page [BUNDLE.html].")] = None,
) -> None:
    """Draw a bundle's HTML page anew, beside the bundle, after re-hashing what it is drawn from."""
    from mpdeploy.artifact import check_files, read_json
    from mpdeploy.bundle import check_is_bundle
    from mpdeploy.report import render
    from mpdeploy.store import write_whole

    check_is_bundle(bundle)
    check_files(bundle, read_json(bundle / "manifest.json")["files"], "The bundle")
    target = out or bundle.with_name(f"{bundle.resolve().name}.html")
    write_whole(target, render(bundle))
    typer.echo(target)


@app.command()
def spectrum(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A timm model, torchvision:NAME, package.module:function, a recipe, a bundle, or a state dict's file.",
        ),
    ],
    weights: Annotated[
        str | None,
        typer.Option("--weights", metavar="W", help="pretrained, random or FILE; of a bundle dense, pruned or tuned."),
    ] = None,
    args: Annotated[
        list[str] | None, typer.Option("--arg", metavar="KEY=VALUE", help="Pass it to the network's constructor.")
    ] = None,
    layers: Annotated[str, typer.Option("--layers", metavar="GLOB", help="Only layers of these names.")] = "*",
    alpha: Annotated[float, typer.Option("--alpha", help="Share of eigenvalues left out at each end.")] = 0.25,
    beta: Annotated[float, typer.Option("--beta", help="Probability that pure noise exceeds the edge.")] = 0.1,
    out: Annotated[Path, typer.Option("--out", help="The page, or a folder for MODEL.spectrum.html.")] = Path(),
    as_json: JsonOpt = False,
) -> None:
    """Fit the Marchenko-Pastur law to every weight matrix of a network, print it and draw it."""
    from mpdeploy import api
    from mpdeploy.show import Terminal, spectra_table
    from mpdeploy.spectra import parse_args

    with Terminal() as watcher:
        result = api.spectrum(
            model, weights=weights, args=parse_args(args or []), layers=layers, alpha=alpha, beta=beta, out=out,
            watcher=watcher,
        )  # fmt: skip
    if as_json:
        _print_json(result.to_json())
    else:
        spectra_table(result)


@app.command()
def doctor(as_json: JsonOpt = False) -> None:
    """Say what this machine can do: packages, GPU, and one tiny real operation per runtime."""
    from mpdeploy.doctor import examine
    from mpdeploy.show import doctor_table

    checks = examine()
    if as_json:
        _print_json([dataclasses.asdict(check) for check in checks])
    else:
        doctor_table(checks)
    raise typer.Exit(3 if any(check.status == "broken" for check in checks) else 0)


@app.command()
def targets(as_json: JsonOpt = False) -> None:
    """List the GPUs that mpdeploy knows: compute capability, peaks, and where each figure comes from."""
    from mpdeploy.show import targets_table
    from mpdeploy.targets import TARGETS

    if as_json:
        _print_json([dataclasses.asdict(target) for target in TARGETS])
    else:
        targets_table(TARGETS)


@app.command()
def init(
    model: Annotated[str, typer.Argument(help="A timm model, torchvision:NAME, or package.module:function.")],
    out: Annotated[Path | None, typer.Option("--out", help="The recipe's file [MODEL.toml].")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that is there.")] = False,
) -> None:
    """Write a commented recipe for a model."""
    from mpdeploy.init import write_recipe

    typer.echo(write_recipe(model, out, force))


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors and validators."""
    from mpdeploy.recipe import Recipe

    _print_json(Recipe.model_json_schema(by_alias=True))


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, allow_nan=False, default=str))


class _nothing:  # noqa: N801 - reads as the word it stands for
    """A watcher's place where nobody watches."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


def main() -> None:
    """Run the command line; of several processes under torchrun the first one does, the others serve it."""
    if launch.rank():
        launch.serve()
        return
    try:
        _run_app()
    finally:
        launch.dismiss()


def _run_app() -> None:
    """Turn every exception into an exit code."""
    try:
        app()
    except MpdeployError as error:
        if os.environ.get("MPDEPLOY_DEBUG"):
            traceback.print_exc()
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        typer.echo("interrupted: finished stages are kept; run the same command again to go on", err=True)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        # Whoever read our output has gone; the interpreter must not complain about it while closing stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception:  # noqa: BLE001 - the one place where a bug becomes an exit code
        traceback.print_exc()
        typer.echo(f"This is a bug in mpdeploy {__version__}; the traceback above says where.", err=True)
        sys.exit(BUG)
