"""Tables and progress for the terminal; only `cli` uses it."""

import sys
import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from mpdeploy.api import Run
from mpdeploy.artifact import read_json
from mpdeploy.pipeline import Step
from mpdeploy.planning import LayerRow, Preview

if TYPE_CHECKING:
    from mpdeploy.pairs import Pair
    from mpdeploy.spectra import LayerSpectrum, Spectra

COLOURS = {"holds": "green", "ok": "green", "refuted": "red", "broken": "red"}
RELEASE = {
    "holds": "may be released",
    "refuted": "must not be released",
    "unchecked": "not established",
}
PIPED_WIDTH = 200


def console() -> Console:
    """Return where results go; wide when piped, so that no value is cut."""
    return Console(width=None if sys.stdout.isatty() else PIPED_WIDTH, highlight=False, markup=False)


def coloured(word: str) -> Text:
    """Return a verdict in its colour."""
    return Text(word, style=COLOURS.get(word, "yellow"))


def table(title: str, columns: Sequence[str], right: Iterable[str] = ()) -> Table:
    """Return an empty table; columns named in `right` hold numbers."""
    made = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    numbers = set(right)
    for column in columns:
        made.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    return made


class Terminal:
    """A run's progress on stderr: one line per stage, and a bar for what takes longer than a blink."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, markup=False)
        self.bar = Progress(
            TextColumn("  {task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self.task: TaskID | None = None
        self.label = ""
        self.started = time.perf_counter()

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def stage(self, name: str, state: str, note: str) -> None:
        """Print a line when a stage begins, waits, ends or is reused."""
        if self.task is not None:
            self.bar.remove_task(self.task)
            self.task = None
        now = time.perf_counter()
        took = f"  {now - self.started:.1f} s" if state == "done" else ""
        self.started = now
        self.console.print(f"{name:<9} {state:<8} {note}{took}", soft_wrap=True)

    def progress(self, label: str, done: int, total: int) -> None:
        """Move the bar; what follows a comma in the label may change from call to call."""
        kind = label.partition(",")[0]
        if self.task is None or kind != self.label:
            if self.task is not None:
                self.bar.remove_task(self.task)
            self.task, self.label = self.bar.add_task(label, total=total), kind
        self.bar.update(self.task, description=label, completed=done, total=total)


def plan_tables(steps: Sequence[Step], preview: Preview) -> None:
    """Print which stages would run and what becomes of each layer."""
    out = console()
    stages = table("Stages", ("stage", "will", "why", "what it does"))
    for step in steps:
        stages.add_row(step.name, step.state, step.reason, step.summary)
    out.print(stages, "")
    layers = table("Layers", ("layer", "kind", "shape", "pattern", "axis", "MACs", "after", *preview.targets, "note"),
                   right=("axis", "MACs", "after"))  # fmt: skip
    for row in preview.rows:
        layers.add_row(*_layer_cells(row, preview.targets, preview.note))
    out.print(layers, "")
    if preview.note:
        out.print(preview.note)
    after = ""
    if preview.macs_after is not None:
        most = "at most " if any(row.candidates for row in preview.rows) else ""
        share = 100 * (1 - preview.macs_after / preview.macs)
        after = f", on kept weights {most}{preview.macs_after / 1e9:.3f} G (-{share:.2f} %)"
    out.print(
        f"MACs per image: dense {preview.macs / 1e9:.3f} G{after}. "
        "Only 2:4 runs on sparse tensor cores; a gain is an estimate, not a measurement."
    )


def _layer_cells(row: LayerRow, names: Sequence[str], said: str) -> list[str]:
    """Return the cells of one layer; the rule that is said below the table isn't repeated."""
    pattern = " or ".join((*row.candidates, "dense")) if row.candidates else row.pattern or "dense"
    after = "to choose" if row.macs_after is None else f"{row.macs_after / 1e6:.2f} M"
    cells = [row.name, row.kind, "x".join(map(str, row.shape)), pattern]
    cells += ["" if row.axis is None else str(row.axis), f"{row.macs / 1e6:.2f} M", after]
    notes = [row.reason] if row.reason else []
    for name in names:
        own = row.targets[name]
        if not row.pattern and not row.candidates:
            cells.append("-")
        elif not own["eligible"]:
            cells.append("no")
            notes += [] if own["rule"] == said else [f"{name}: {own['rule']}"]
        elif own["gain_high"] <= 1.0:
            cells.append("about nothing")
        else:
            cells.append(f"{own['gain_low']:.2f}-{own['gain_high']:.2f}x")
    return [*cells, " ".join(dict.fromkeys(notes))]


def run_tables(result: Run) -> None:
    """Print the engines, the gates and where everything is."""
    out = console()
    if result.bundle is None:
        stages = table("Made", ("stage", "artefact"))
        for name, artifact in result.artifacts.items():
            stages.add_row(name, str(artifact.root))
        out.print(stages)
        return
    results = result.artifacts["validate"].json("results.json")
    out.print(_engine_table(results), "")
    gates = table("Gates", ("gate", "limit", "measured", "interval", "verdict", "why"), right=("limit", "measured"))
    for gate in result.summary["gates"]:
        interval = "" if gate["low"] is None else f"{gate['low']:.4g} .. {gate['high']:.4g}"
        measured = "not measured" if gate["measured"] is None else f"{gate['measured']:.4g}"
        gates.add_row(
            gate["name"], f"{gate['limit']:.4g}", measured, interval, coloured(gate["verdict"]), gate["reason"]
        )
    out.print(gates, "")
    verdict = str(result.verdict)
    line = Text(f"{verdict}: ", style=COLOURS.get(verdict, "yellow"))
    out.print(
        line.append(f"{result.summary['deploy']} {RELEASE[verdict]}. {result.summary['reason']}", style="default")
    )
    unseen = read_json(result.bundle / "disagreement.json")["engines"].get(result.summary["deploy"])
    if unseen:
        per = f"{unseen['n']} clusters" if unseen["clusters"] else f"{unseen['n']} images"
        out.print(f"unseen  at most {100 * unseen['upper']:.2f} % of labels differ from the dense network's ({per})")
    out.print(f"bundle  {result.bundle}\nreport  {result.bundle / 'report.html'}", soft_wrap=True)


def _engine_table(results: dict[str, Any]) -> Table:
    """Return a row per engine, the dense network first."""
    made = table(
        f"Engines on {results['validation']['samples']} validation images",
        ("engine", "top-1", "labels kept", "certified lost", "median ms", "dense twin ms", "twin/engine"),
        right=("top-1", "labels kept", "certified lost", "median ms", "dense twin ms"),
    )
    made.add_row("dense network (PyTorch)", f"{100 * results['dense_top1']['value']:.2f} %", "", "", "", "", "")
    made.add_row("tuned network (PyTorch)", f"{100 * results['tuned_top1']['value']:.2f} %", "", "", "", "", "")
    for engine in results["engines"]:
        if engine["status"] != "measured":
            made.add_row(engine["id"], "built, not run here", "", "", "", "", "")
            continue
        speed = engine["latency"]
        ratio = speed["ratio"]
        made.add_row(
            engine["id"],
            f"{100 * engine['top1']['value']:.2f} %",
            f"{100 * engine['agreement']['value']:.2f} %",
            f"{engine['certified']['violations']} of {engine['certified']['n']}",
            f"{speed['median_ms']:.3f}",
            f"{speed['twin_median_ms']:.3f}",
            f"{ratio['value']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f}) {speed['verdict']}",
        )
    return made


def pair_tables(pair: "Pair") -> None:
    """Print what is left of one network's margins in another."""
    out, facts = console(), pair.facts
    a, b, n, spent = facts["a"], facts["b"], facts["samples"], facts["spent"]
    out.print(f"A  {a['name']}: {a['what']}\nB  {b['name']}: {b['what']}\non {n} images of {facts['data']}", "")
    tests = table(
        "Labels of A that B keeps, by each test (observed)", ("test", "certifies", "of", "share"), ("certifies",)
    )
    what = {"pairwise": "pairwise: exactly those kept", "span": "span of the change < margin"}
    what["two_inf"] = "2 x largest change < margin"
    for name, k in facts["tests"].items():
        tests.add_row(what[name], str(k), str(n), f"{100 * k / n:.2f} %")
    out.print(tests, "")
    made = table(
        "What was spent of A's margins", ("step", "largest change", "median", "share of margin, median", "99 %")
    )
    if gap := facts["reference"]:
        step = f"A in float64 -> float32 ({gap['samples']} images)"
        made.add_row(step, _short(gap["eps_inf_max"]), _short(gap["eps_inf_median"]), "", "")
    else:
        made.add_row("A in float64: not run", "", "", "", "")
    shares = (_share(spent["share_median"]), _share(spent["share_p99"]))
    made.add_row("A -> B", _short(spent["eps_inf_max"]), _short(spent["eps_inf_median"]), *shares)
    out.print(made, "")
    if facts["reference_why_not"]:
        out.print(f"A was not run in float64: {facts['reference_why_not']}", "", soft_wrap=True)
    if noise := facts.get("noise_floor"):
        out.print(noise.get("reason") or noise["why_not"], "")
    if "proofs" in facts:
        out.print(_proof_table(facts["proofs"]), "")
    for name, own in facts.get("top1", {}).items():
        out.print(f"top-1 of {name.upper()}: {100 * own['value']:.2f} %")
    out.print(facts["disagreement"]["statement"], soft_wrap=True)
    need = facts["samples_for_target"]
    out.print(f"{need['none_disagreeing']} samples without a disagreement bound it by {100 * need['target']:g} %.")


def _proof_table(proofs: dict[str, Any]) -> Table:
    """Return a row per provable statement: for how many samples it holds, and for how many it says nothing."""
    made = table(
        "Proofs tried (vacuous: the bound says nothing)", ("statement", "proved", "not proved", "vacuous", "of")
    )
    if "why_not" in proofs:
        made.add_row(proofs["why_not"], "", "", "", "")
        return made
    rows = {"both networks agree in real arithmetic": proofs["real_arithmetic"]}
    rows |= {f"any {name} engine of B keeps the label": own for name, own in proofs["envelope"].items()}
    for what, own in rows.items():
        counts = (str(own[key]) for key in ("certified", "not_certified", "vacuous", "samples"))
        made.add_row(what, *counts)
    path = proofs["data_path"]
    if "why_not" in path:
        made.add_row(f"data path: {path['why_not']}", "", "", "", "")
    for claim in path.get("claims", []):
        states = ("yes" if claim["holds"] else "", "" if claim["holds"] or claim["status"] == "vacuous" else "no")
        made.add_row(
            f"data path, {claim['name']}: {claim['meaning']}", *states, "yes" * (claim["status"] == "vacuous"), ""
        )
    if ball := proofs.get("ball"):
        if "why_not" in ball:
            made.add_row(f"ball: {ball['why_not']}", "", "", "", "")
        else:
            n, same = ball["samples"], ball["same"]
            cost = f"{ball['multiply_adds']:.3g} multiply-adds"
            made.add_row(
                f"same label on the whole ball of {ball['eps']:g} ({cost})", str(same), str(n - same), "", str(n)
            )
    return made


def _short(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3g}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.3g} %"


def findings_table(findings: Sequence[Any], verdict: Any) -> None:
    """Print what the independent checker found."""
    out = console()
    made = table("Findings", ("claim", "verdict", "reason"))
    for finding in findings:
        made.add_row(finding.claim, coloured(str(finding.verdict)), finding.reason)
    out.print(made, "", coloured(str(verdict)))


def spectra_table(spectra: "Spectra") -> None:
    """Print the fitted law of each layer, the rules behind the last columns, and where the page is."""
    from mpdeploy.pruning.spectrum import DOUBTS, TRACE_BETA
    from mpdeploy.spectra import DOUBT, RULES, SIGNAL

    sigma, edge, rank = ([f"{what}\n{by}" for by in ("BEMA", "trace", "EVBMF")] for what in ("sigma", "edge", "rank"))
    numbers = ("gamma", *sigma, *edge, "largest", *rank, "bulk", "KS")
    made = table(
        f"Spectra of {spectra.model}, weights: {spectra.weights}",
        ("layer", "shape", *numbers, "doubt", "looks"),
        right=numbers,
    )
    for layer in spectra.layers:
        made.add_row(layer.name, "x".join(map(str, layer.shape)), *_fit_cells(layer))
    out = console()
    out.print(made, "")
    out.print(
        f"Edges and largest are singular values. BEMA's edge is what noise alone exceeds with probability "
        f"{spectra.beta:g}, the trace's with {TRACE_BETA:g} (Tracy-Widom); rank is how many are above the edge. Bulk "
        f"and KS are BEMA's; KS is over the central {100 - 200 * spectra.alpha:g} % of the eigenvalues.\n{SIGNAL}"
    )
    for title, words in (("Looks, by BEMA, first match:", RULES), ("Doubt, each that holds:", DOUBTS)):
        rules = Table(box=None, show_header=False, pad_edge=False)
        for word, rule in words:
            rules.add_row(f"  {word}", rule)
        out.print(title, rules)
    out.print(DOUBT)
    if spectra.page:
        out.print(f"page  {spectra.page}", soft_wrap=True)


def _fit_cells(layer: "LayerSpectrum") -> list[str]:
    """Return the cells of one layer after its shape."""
    own, others = layer.fit, layer.opinions
    if own is None or others is None:
        return [*[""] * 14, f"{layer.character}: {layer.reason}"]
    two = (others.trace, others.evbmf)
    return [
        f"{own.aspect:.3f}",
        f"{own.sigma:#.4g}",
        *(f"{other.sigma:#.4g}" if other else "none" for other in two),
        f"{own.edge_singular:#.4g}",
        *(f"{other.edge_singular:#.4g}" if other else "none" for other in two),
        f"{own.largest_singular:#.4g}",
        str(own.spikes),
        *(str(other.rank) if other else "none" for other in two),
        f"{100 * own.bulk_fraction:.1f} %",
        f"{own.ks:.3f}",
        ", ".join(others.doubts),
        layer.character,
    ]


def doctor_table(checks: Sequence[Any]) -> None:
    """Print what this machine can do."""
    made = table("This machine", ("check", "status", "version", "detail", "hint"))
    for check in checks:
        made.add_row(check.name, coloured(check.status), check.version, check.detail, check.hint)
    console().print(made)


def targets_table(targets: Sequence[Any]) -> None:
    """Print the known GPUs."""
    peaks = ("fp16", "bf16", "int8")
    columns = ("target", "name", "sm", "GB", "GB/s", *(f"{p} dense/2:4" for p in peaks), "W", "source")
    made = table("Targets (tensor peaks in TFLOPS or TOPS)", columns, right=("sm", "GB", "GB/s", "W"))
    for target in targets:
        cells = [_pair(target.dense_tflops.get(p), target.sparse_tflops.get(p)) for p in peaks]
        made.add_row(
            target.key,
            target.name,
            _or_unknown(target.compute_capability),
            _or_unknown(target.memory_gb),
            _or_unknown(target.bandwidth_gbs),
            *cells,
            _or_unknown(target.power_w),
            target.source,
        )
    console().print(made)


def _pair(dense: float | None, sparse: float | None) -> str:
    return f"{_or_unknown(dense)} / {_or_unknown(sparse)}"


def _or_unknown(value: Any) -> str:
    return "unknown" if value is None else f"{value:g}" if isinstance(value, int | float) else str(value)
