"""Throw damaged bundles at verify.py: no crash, no hang, no false "holds".

    python tools/fuzz_verifier.py --cases 100000 [--processes 2] [--seed 0] [--json FILE]

The bundle of tests/forgeries/bundle.py, which makes every claim there is, is damaged in one of these ways:

    bytes      bytes of a listed file are changed, inserted, cut out or cut off, and nothing else is touched
    manifest   the same with manifest.json, held against the digest that was announced
    rehashed   as `bytes`, then every digest is written anew: in manifest.json, certificate, results and engine.json
    value      one value of a JSON file becomes another one, then every digest is written anew
    tensor     one number of a stored tensor becomes another one, then every digest is written anew

A case passes if `verify` returns findings, or raises Unreadable (as it does about a folder that is no bundle), within
the time limit, and if it is not a false "holds". "holds" is false

    - in `bytes` and in `manifest`, wherever the bytes changed at all;
    - in `rehashed` and `value`, where the JSON file now says something else of what verify.py reads: any key but those
      of FREE, by more than the rounding that stated numbers have (1e-6 of them); a bound (AT_LEAST) may be larger;
    - in `rehashed` and `tensor`, where a weight or constant of FIXED is another one than before.

Logits, seconds and predicted errors are measurements: with other ones, and every number that follows from them the
same, a bundle holds. Bytes of a file that nobody reads, and of a JSON text that says the same, may be anything.
"""

import argparse
import contextlib
import copy
import importlib
import json
import multiprocessing
import platform
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
KINDS = {"bytes": 0.3, "manifest": 0.1, "rehashed": 0.2, "value": 0.25, "tensor": 0.15}
LIMIT_S = 20.0

FREE = re.compile(
    "|".join(
        (
            # what was measured elsewhere, or is words
            r"(schema|note|notes|reason|statement|why_not|kind|logit_change|seed|machine)",
            r"certificate\.json:binds\.(device|versions).*",
            r"certificate\.json:zero_budget\.fc\.(dead|constant|dependent|rank|rows|residual)",
            r"layers\.json:\d+\.(note|positions|macs|reason|error\w*)",
            r"orders\.json:folded\.\d+\.coupling\.(name|blocks|kind)",
            r"orders\.json:(refused|logit_change).*",
            r"preprocessing\.json:.*",  # by its digest only, which was written anew
            r"provenance\.json:.*",
            r"calibration\.json:(calibration_ids|validation_ids|seed).*",
            r"results\.json:engines\.\d+\.(why_not|id|noise_floor\.reason)",
            r"results\.json:export_noise\.reason",
            r"verdict\.json:(gates\.\d+\.)?reason",
            r"disagreement\.json:.*statement",
            r"engines/[^:]*engine\.json:(read_back|schema).*",
            r"export\.json:files\.[^:]*(bytes|eps\w*|label_agreement|weights)",
            # digests, which a liar writes anew
            r"certificate\.json:binds\.(ids|weights|preprocessing).*",
            r"results\.json:binds.*",
            r"engines/[^:]*engine\.json:(sha256|size|source\.(onnx|quantised))",
        )
    )
)
"""Places in JSON files, as "file:path", that may say anything."""

WITHDRAWN = re.compile(r"certificate\.json:(objective|zero_budget(\.fc)?)")
"""Claims that not every bundle makes: without one the rest may hold."""

AT_LEAST = re.compile(r"certificate\.json:(objective\.changed\.\d+\.spectral_upper|reference\.\w+)")
"""Numbers that stand for a bound from above: a larger one is no lie. Of the reference not all classes are stored."""

FIXED = {
    "weights/dense.safetensors": ("stem.weight", "stem.bias", "head.weight", "head.bias", "ln.weight", "norm.weight"),
    "weights/tuned.safetensors": ("stem.weight", "stem.bias", "fc.weight", "fc.bias", "head.weight", "ln.weight"),
}
"""Tensors of which every bit follows from another file."""


@dataclass
class Findings:
    """What came of some cases.

    Attributes:
        cases: how many of each kind.
        held: how many of each kind hold.
        bad: one sentence for each case that did not pass.
        slowest: seconds of the slowest case.
    """

    cases: Counter[str] = field(default_factory=Counter)
    held: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)
    slowest: float = 0.0

    def add(self, other: "Findings") -> None:
        """Take in those of another process."""
        self.cases.update(other.cases)
        self.held.update(other.held)
        self.bad += other.bad
        self.slowest = max(self.slowest, other.slowest)


class Fuzzer:
    """Damages one honest bundle again and again.

    Args:
        folder: an empty one, at best in memory.
        seed: of the bundle's own numbers.
        checker: what is fuzzed.
    """

    def __init__(self, folder: Path, seed: int, checker: ModuleType) -> None:
        sys.path.insert(0, str(ROOT / "tests"))
        self.bundles = importlib.import_module("forgeries.bundle")
        self.checker = checker
        self.draft = self.bundles.make_draft(seed % 3)
        self.files: dict[str, bytes] = self.draft.parts()
        self.root = folder / "bundle"
        self.digest = self.draft.write(self.root)
        self.manifest = (self.root / "manifest.json").read_bytes()
        # These name digests of other files; they stay values so that digests can be written anew.
        self.binding = [
            n for n in self.draft.json if n in ("certificate.json", "results.json") or n.endswith("engine.json")
        ]
        self.jsons = [name for name in self.files if name.endswith(".json")]
        self.tensor_files = list(self.draft.tensors)

    def case(self, kind: str, rng: random.Random) -> str:
        """Run one case; return what is wrong with it, or "held" or ""."""
        name, changed = self._damage(kind, rng)
        if changed == (self.manifest if kind == "manifest" else self.files[name]):
            return ""
        if kind in ("bytes", "manifest"):
            return self._as_it_is(kind, name, changed)
        files = self._rebound(name, changed)
        written = [other for other, data in files.items() if data != self.files[other]]
        for other in written:
            (self.root / other).write_bytes(files[other])
        self.bundles.seal(self.root, self.bundles.listed(files))
        held = self._verify(None)
        for other in written:
            (self.root / other).write_bytes(self.files[other])
        (self.root / "manifest.json").write_bytes(self.manifest)
        lie = self._is_lie(name, changed) if held else ""
        return f"{kind}: holds although {lie}" if lie else "held" if held else ""

    def _as_it_is(self, kind: str, name: str, changed: bytes) -> str:
        """Judge a file that was changed with no digest written anew."""
        (self.root / name).write_bytes(changed)
        held = self._verify(self.digest if kind == "manifest" else None)
        (self.root / name).write_bytes(self.manifest if kind == "manifest" else self.files[name])
        return f"{kind}: holds with {name} changed" if held else ""

    def _verify(self, expect: str | None) -> bool:
        try:
            findings = self.checker.verify(self.root, expect)
        except self.checker.Unreadable:
            return False
        assert all(isinstance(finding.reason, str) and finding.reason for finding in findings)
        return bool(self.checker.overall(findings) is self.checker.Verdict.HOLDS)

    def _damage(self, kind: str, rng: random.Random) -> tuple[str, bytes]:
        """Return a file's name and what becomes of it."""
        if kind == "manifest":
            return "manifest.json", edited(self.manifest, rng)
        if kind == "value":
            name = rng.choice(self.jsons)
            value = json.loads(self.files[name])
            return name, json.dumps(revalued(value, rng)).encode()
        if kind == "tensor":
            name = rng.choice(self.tensor_files)
            return name, self._renumbered(name, rng)
        name = rng.choice(list(self.files))
        return name, edited(self.files[name], rng)

    def _renumbered(self, name: str, rng: random.Random) -> bytes:
        """Change one number of one tensor."""
        from safetensors.numpy import load, save

        tensors = load(self.files[name])
        array = tensors[rng.choice(sorted(tensors))]
        if array.size:
            at = rng.randrange(array.size)
            old = array.flat[at]
            if array.dtype.kind == "f":
                array.flat[at] = rng.choice(
                    [np.nan, np.inf, -np.inf, 0.0, -old, old * 1.5, old + 1, np.nextafter(old, 9)]
                )
            else:
                array.flat[at] = rng.choice([0, 1, int(old) ^ 1, 7])
        return bytes(save(tensors))

    def _rebound(self, name: str, changed: bytes) -> dict[str, bytes]:
        """Write every digest anew, as far as the changed files can still be read."""
        values = {other: copy.deepcopy(self.draft.json[other]) for other in self.binding if other != name}
        raw = {other: data for other, data in self.files.items() if other not in values and other != name}
        if name in self.binding:
            try:
                values[name] = json.loads(changed)
            except ValueError:
                raw[name] = changed
        else:
            raw[name] = changed
        draft = self.bundles.Draft(values, {}, {}, raw)
        # Digests can't be written where the fields for them are gone.
        with contextlib.suppress(LookupError, TypeError, AttributeError, ValueError):
            draft.rebind()
        try:
            files: dict[str, bytes] = draft.parts()
        except ValueError:  # a number beyond what JSON can write
            return {**self.files, name: changed}
        return files

    def _is_lie(self, name: str, changed: bytes) -> str:
        """Say what a changed file says that is another thing than before, "" if nothing."""
        if name.endswith(".json"):
            try:
                value = json.loads(changed)
            except ValueError as error:
                return f"{name} can't be read: {error}"
            before = json.loads(self.files[name])
            if name == "orders.json":  # orders of different channels may be folded in either order
                for tree in (before, value):
                    tree["folded"].sort(key=lambda row: row["coupling"]["size"] * 100 + row["coupling"]["blocks"])
            for where, old, new in differences(before, value, ""):
                place = f"{name}:{where}"
                if not (FREE.fullmatch(place) or FREE.fullmatch(where.rpartition(".")[2]) or same(old, new)):
                    if AT_LEAST.fullmatch(place) and isinstance(new, float | int) and new >= 0.9 * old:
                        continue
                    if WITHDRAWN.fullmatch(place) and new in (None, {}, [], "", 0, False):
                        continue
                    return f"{place} is {new!r} and was {old!r}"
        if name in FIXED:
            from safetensors import SafetensorError
            from safetensors.numpy import load

            try:
                before, after = load(self.files[name]), load(changed)
            except SafetensorError as error:
                return f"{name} can't be read: {error}"
            for tensor in FIXED[name]:
                if not np.array_equal(before[tensor], after[tensor]):
                    return f"{tensor} in {name} is another one"
        return ""


def edited(data: bytes, rng: random.Random) -> bytes:
    """Change, insert, remove or repeat some bytes, or cut the end off."""
    image = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at, how = rng.randrange(len(image) + 1), rng.randrange(6)
        if how < 2 and at < len(image):
            image[at] = rng.randrange(256) if how else image[at] ^ (1 << rng.randrange(8))
        elif how == 2:
            image[at:at] = bytes(rng.randrange(256) for _ in range(rng.choice((1, 3, 40))))
        elif how == 3:
            del image[at : at + rng.choice((1, 2, 50))]
        elif how == 4:
            image[at:at] = image[at : at + rng.choice((1, 8, 200))]
        else:
            image[at:] = b"" if rng.random() < 0.3 else image[at:]
    return bytes(image)


def revalued(value: Any, rng: random.Random) -> Any:
    """Return a JSON value of which one inner value is another one, or gone, or there is one more."""
    places = list(paths(value))
    *way, last = rng.choice(places[1:]) if len(places) > 1 else ("",)
    inner = value
    for key in way:
        inner = inner[key]
    old, how = inner[last], rng.randrange(5)
    if how == 0 and isinstance(inner, dict):
        del inner[last]
    elif how == 1 and isinstance(old, int | float) and not isinstance(old, bool):
        inner[last] = rng.choice([old + 1, old - 1, old * 1.001 + 1e-6, -old, 0, old * 1e9])
    elif how == 2 and isinstance(old, list) and old:
        inner[last] = rng.choice([old[:-1], old + old[:1], old[::-1], []])
    elif how == 3 and isinstance(old, str):
        inner[last] = rng.choice([old + "x", "", old.upper(), "../" + old])
    else:
        inner[last] = rng.choice([None, True, -1, 0, 1e300, 10**30, "", "x", [], {}, [None], {"a": 1}])
    return value


def paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value inside a JSON value."""
    yield at
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths(inner, (*at, key))


def differences(old: Any, new: Any, where: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield where two JSON values differ; keys that are new are nobody's claim."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key, value in old.items():
            yield from differences(value, new.get(key), f"{where}.{key}".lstrip("."))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for at, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from differences(before, after, f"{where}.{at}".lstrip("."))
    elif old != new:
        yield where, old, new


def same(old: Any, new: Any) -> bool:
    """Tell whether two stated values are one within rounding."""
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (old, new))
    return bool(numbers and abs(old - new) <= 3e-6 * abs(old) + 3e-9) or (
        old in (None, "", [], {}) and new in (None, "", [], {})
    )


class TooSlow(Exception):
    """A case took longer than the limit."""


@contextlib.contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise TooSlow in the block after a while."""

    def ring(*_: Any) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def resampled_once(checker: ModuleType) -> None:
    """Resample equal times once: 2000 medians are most of a case, and have their own tests."""
    whole: Callable[..., Any] = checker.ratio_interval
    known: dict[Any, Any] = {}

    def once(own: Any, twin: Any, blocks: Any, confidence: Any) -> Any:
        key = (own.tobytes(), twin.tobytes(), repr(blocks), confidence)
        if key not in known:
            known[key] = whole(own, twin, blocks, confidence)
        return known[key]

    checker.__dict__["ratio_interval"] = once


def fuzz(cases: int, seed: int) -> Findings:
    """Run cases in this process."""
    checker = importlib.import_module("mpdeploy.verify")
    resampled_once(checker)
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))
    found, rng = Findings(), random.Random(seed)
    try:
        fuzzer = Fuzzer(folder, seed, checker)
        for number in range(cases):
            kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
            own, begun = random.Random(f"{seed}/{number}"), time.perf_counter()
            try:
                with alarm(LIMIT_S):
                    answer = fuzzer.case(kind, own)
            except Exception as error:  # noqa: BLE001 whatever comes out of the checker is what is looked for
                answer = f"{kind}: {type(error).__name__}: {error} at {traceback.extract_tb(error.__traceback__)[-1]}"
                fuzzer.draft.write(fuzzer.root)
            found.cases[kind] += 1
            found.slowest = max(found.slowest, time.perf_counter() - begun)
            if answer == "held":
                found.held[kind] += 1
            elif answer:
                found.bad.append(f"seed {seed} case {number}: {answer}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return found


def summary(found: Findings, seconds: float, seeds: Sequence[int]) -> Mapping[str, Any]:
    """Return what is written to a file."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "cases": sum(found.cases.values()),
        "kinds": dict(found.cases),
        "held_and_may": dict(found.held),
        "findings": found.bad,
        "seconds": round(seconds, 1),
        "slowest_case_s": round(found.slowest, 3),
        "limit_per_case_s": LIMIT_S,
        "seeds": list(seeds),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all cases in several processes."""
    parser = argparse.ArgumentParser(description="Throw damaged bundles at verify.py.")
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the summary there")
    options = parser.parse_args(arguments)
    begun, chunk = time.perf_counter(), 1000
    parts = [min(chunk, options.cases - at) for at in range(0, options.cases, chunk)]
    seeds = [options.seed + at for at in range(len(parts))]
    found = Findings()
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        for part in pool.starmap(fuzz, zip(parts, seeds, strict=True), chunksize=1):
            found.add(part)
    report = summary(found, time.perf_counter() - begun, [seeds[0], seeds[-1]])
    text = json.dumps(report, indent=1)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 1 if found.bad else 0


if __name__ == "__main__":
    sys.exit(main())
