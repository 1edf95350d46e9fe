"""Remove each guard of verify.py in turn and see whether some forgery is then no longer refused for its reason.

    python tools/mutate_verifier.py [--sample N] [--json FILE]

A guard is a call of `must` or `must_equal`, a `raise`, a call of another check, and each part of a condition joined
by `and` (in `must`) or `or` (before a `raise`). Every forgery of tests/forgeries is told once to the checker as it is,
to learn which guards refuse it. Then the checker is compiled without one guard after the other, and the forgeries that
this guard refused are told again: one of them has to pass, or to be refused with another reason. A guard that no
forgery needs is listed, and the exit status is 1 unless it is in UNNEEDED with the reason why it is there all the same.
"""

import argparse
import ast
import copy
import importlib
import json
import random
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
VERIFIER = ROOT / "mpdeploy" / "verify.py"
CHECKS = re.compile(r"_?check_\w+|must|must_equal")
MOST_TRIES = 40

UNNEEDED = {
    """map_file: Unreadable(f"{path.name} can't be read: {error}")""": "a file that vanishes after it was hashed",
}
"""Guards that no forgery can show, as "function: guard" -> what they are there for."""


@dataclass(frozen=True)
class Guard:
    """One thing to remove.

    Attributes:
        function: where it is.
        text: its source, shortened.
        first: its first line.
        last: its last line.
        path: which statement of the tree, by position in `ast.walk`.
        part: which operand of its condition to leave out, None for the whole guard.
    """

    function: str
    text: str
    first: int
    last: int
    path: int
    part: int | None

    @property
    def key(self) -> str:
        """Name in UNNEEDED."""
        return f"{self.function}: {self.text}"


@dataclass
class Base:
    """What the forgeries show of the checker as it is.

    Attributes:
        lies: the forgeries.
        folders: where each one lies on disk.
        lines: of each, the lines of verify.py that refused it.
        intervals: resampled intervals of equal times, which are drawn once.
    """

    lies: list[Any]
    folders: list[Path]
    lines: list[set[int]] = field(default_factory=list)
    intervals: dict[Any, Any] = field(default_factory=dict)

    def touching(self, guard: Guard) -> list[int]:
        """Return the forgeries that a guard refuses."""
        inside = range(guard.first, guard.last + 1)
        return [at for at, lines in enumerate(self.lines) if any(line in inside for line in lines)]


def guards_of(tree: ast.Module) -> list[Guard]:
    """List the guards of a module in the order of their lines."""
    names = {
        id(inner): outer.name
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef)
        for inner in ast.walk(outer)
    }
    found: list[Guard] = []
    for path, node in enumerate(ast.walk(tree)):
        condition: ast.expr | None = None
        joined: type[ast.boolop] = ast.And
        if _is_check(node):
            assert isinstance(node, ast.Expr)
            assert isinstance(node.value, ast.Call)
            condition = node.value.args[0] if node.value.args else None
            shown: ast.AST = condition if _called(node.value) == "must" and condition is not None else node
        elif isinstance(node, ast.Raise):
            shown = node.exc or node
        elif isinstance(node, ast.If) and len(node.body) == 1 and isinstance(node.body[0], ast.Raise):
            condition, joined, shown = node.test, ast.Or, node.test
        else:
            continue
        where = names.get(id(node), "")
        if not isinstance(node, ast.If):
            found.append(Guard(where, _short(shown), node.lineno, node.end_lineno or node.lineno, path, None))
        if isinstance(condition, ast.BoolOp) and isinstance(condition.op, joined):
            last = node.end_lineno or node.lineno
            found += [Guard(where, _short(o), node.lineno, last, path, i) for i, o in enumerate(condition.values)]
    return sorted(found, key=lambda guard: (guard.first, guard.part is not None, guard.part or 0))


def _called(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else ""


def _is_check(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and bool(CHECKS.fullmatch(_called(node.value)))
    )


def _short(node: ast.AST) -> str:
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= 100 else f"{text[:97]}..."


def without(tree: ast.Module, guard: Guard) -> ast.Module:
    """Return the module with one guard taken out."""
    mutant = copy.deepcopy(tree)
    node = next(node for path, node in enumerate(ast.walk(mutant)) if path == guard.path)
    if guard.part is not None:
        condition: Any = node.test if isinstance(node, ast.If) else node.value.args[0]  # type: ignore[attr-defined]
        condition.values[guard.part] = ast.copy_location(ast.Constant(isinstance(node, ast.Expr)), condition)
        return mutant
    gone = ast.copy_location(ast.Pass(), node)
    for outer in ast.walk(mutant):
        for name in ("body", "orelse", "finalbody"):
            block = getattr(outer, name, None)
            if isinstance(block, list) and node in block:
                block[block.index(node)] = gone
    return mutant


def load(tree: ast.Module, intervals: dict[Any, Any] | None) -> ModuleType:
    """Run a module's tree; where `intervals` is given, equal times are resampled once for all modules."""
    module = ModuleType("verify_mutant")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    exec(compile(tree, str(VERIFIER), "exec"), module.__dict__)
    if intervals is not None:
        whole = module.ratio_interval

        def once(own: Any, twin: Any, blocks: Any, confidence: Any) -> Any:
            key = (own.tobytes(), twin.tobytes(), repr(blocks), confidence)
            if key not in intervals:
                intervals[key] = whole(own, twin, blocks, confidence)
            return intervals[key]

        module.__dict__["ratio_interval"] = once
    return module


def forgeries() -> ModuleType:
    """Import tests/forgeries."""
    sys.path.insert(0, str(ROOT / "tests"))
    importlib.import_module("forgeries.lies")
    return importlib.import_module("forgeries.registry")


def base_of(tree: ast.Module, folder: Path, told: Callable[[int, int], None]) -> Base:
    """Tell every forgery to the checker as it is, and note which lines refuse it.

    Raises:
        SystemExit: a forgery is not refused as it should be, so that nothing can be learned from it.
    """
    registry = forgeries()
    base = Base(list(registry.LIES), [])
    module, refused = load(tree, base.intervals), {}
    plain, whole = module.answer, module.verify

    def answer(claim: str, check: Callable[..., str], *arguments: Any) -> Any:
        def spied(*inner: Any) -> str:
            try:
                return check(*inner)
            except Exception as error:
                refused[claim] = _lines(error)
                raise

        return plain(claim, spied, *arguments)

    def verify(*arguments: Any) -> Any:
        try:
            return whole(*arguments)
        except module.Unreadable as error:
            refused["manifest"] = _lines(error)
            raise

    module.__dict__.update(answer=answer, verify=verify)
    for at, lie in enumerate(base.lies):
        base.folders.append(folder / str(at) / "bundle")
        base.folders[-1].parent.mkdir(parents=True)
        lie.tell(base.folders[-1])
        refused.clear()
        findings = registry.findings_of(module, base.folders[-1], lie)
        if not refuses(findings, lie):
            sys.exit(f"{lie.name} is not refused as it should be: mend that first.")
        base.lines.append(refused.get(lie.claim, set()))
        told(at + 1, len(base.lies))
    return base


def _lines(error: BaseException) -> set[int]:
    """Return the lines of verify.py on the way to an error, and to what it was made of."""
    lines: set[int] = set()
    while error is not None:
        frames = traceback.extract_tb(error.__traceback__)
        lines |= {frame.lineno or 0 for frame in frames if frame.filename == str(VERIFIER)}
        if error.__cause__ is None:
            break
        error = error.__cause__
    return lines


def refuses(findings: Sequence[Any], lie: Any) -> bool:
    """Tell whether a forgery is refused for its reason."""
    own = [finding for finding in findings if finding.claim == lie.claim]
    return bool(own) and own[0].verdict == lie.verdict and bool(re.search(lie.word, own[0].reason))


def needs(tree: ast.Module, guard: Guard, base: Base) -> str:
    """Return the name of a forgery that is no longer refused for its reason without the guard, or ""."""
    alone = guard.function == "ratio_interval"
    module = load(without(tree, guard), None if alone else base.intervals)
    registry = forgeries()
    for at in base.touching(guard)[:MOST_TRIES]:
        try:
            findings = registry.findings_of(module, base.folders[at], base.lies[at])
        except Exception:  # noqa: BLE001 a mutant may fail in any way, which is another reason too
            return str(base.lies[at].name)
        if not refuses(findings, base.lies[at]):
            return str(base.lies[at].name)
    return ""


def survey(tree: ast.Module, guards: Sequence[Guard], base: Base) -> Iterator[tuple[Guard, str]]:
    """Yield each guard with the forgery that needs it, or ""."""
    for guard in guards:
        yield guard, needs(tree, guard, base)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it and print the guards that nothing needs."""
    parser = argparse.ArgumentParser(description="Take each guard out of verify.py and see which forgery needs it.")
    parser.add_argument("--sample", type=int, help="only so many guards, drawn with seed 0")
    parser.add_argument("--json", type=Path, help="write every guard and what needs it")
    options = parser.parse_args(arguments)
    tree = ast.parse(VERIFIER.read_text(encoding="utf-8"))
    guards = guards_of(tree)
    if options.sample:
        guards = random.Random(0).sample(guards, options.sample)
    with tempfile.TemporaryDirectory() as folder:
        base = base_of(tree, Path(folder), _told)
        found = dict(survey(tree, guards, base))
    left = [guard for guard, forgery in found.items() if not forgery and guard.key not in UNNEEDED]
    if options.json:
        rows = [{**asdict(guard), "needed_by": forgery} for guard, forgery in found.items()]
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    needed = sum(bool(forgery) for forgery in found.values())
    explained = len(found) - needed - len(left)
    print(f"{len(found)} guards, {len(base.lies)} forgeries: {needed} are needed, {explained} explained")
    for guard in left:
        print(f"line {guard.first}: no forgery needs {guard.key}")
    return 1 if left else 0


def _told(done: int, total: int) -> None:
    if done % 100 == 0 or done == total:
        print(f"{done} of {total} forgeries told", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
