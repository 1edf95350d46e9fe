"""A few thousand damaged bundles, and random ones by hypothesis; tools/fuzz_verifier.py runs a hundred thousand."""

import importlib
import importlib.util
import itertools
import json
import random
from pathlib import Path

import pytest
from conftest import loaded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

TOOL = Path(__file__).parents[1] / "tools" / "fuzz_verifier.py"
CASES = {"bytes": 800, "manifest": 400, "rehashed": 250, "value": 350, "tensor": 200}
MANY = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


tool = loaded(TOOL)
checker = importlib.import_module("mpdeploy.verify")  # the package gives the function of that name


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checker, "ratio_interval", checker.ratio_interval)  # put back at the end
        tool.resampled_once(checker)
        yield tool.Fuzzer(tmp_path_factory.mktemp("fuzz"), 0, checker)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kind", sorted(CASES))
def test_no_crash_no_hang_no_false_holds(kind, fuzzer):
    answers = []
    for number in range(CASES[kind]):
        with tool.alarm(tool.LIMIT_S):
            answers.append(fuzzer.case(kind, random.Random(f"{kind}/{number}")))
    assert not [answer for answer in answers if answer not in ("", "held")]
    assert (fuzzer.root / "manifest.json").read_bytes() == fuzzer.manifest, "every case puts back what it changed"


def test_the_honest_bundle_that_is_damaged_holds(fuzzer):
    assert fuzzer._verify(fuzzer.digest)


def test_a_false_holds_would_be_noticed(fuzzer):
    """A checker that says `holds` to everything fails in every kind."""

    class Credulous:
        Unreadable, Verdict = checker.Unreadable, checker.Verdict

        def verify(self, *_):
            return []

        def overall(self, _):
            return checker.Verdict.HOLDS

    blind = tool.Fuzzer(fuzzer.root.parent / "blind", 0, Credulous())
    for kind in CASES:
        answers = {blind.case(kind, random.Random(number)) for number in range(40)}
        assert any(": holds " in answer for answer in answers), kind


def test_a_crash_would_be_noticed(fuzzer, monkeypatch):
    def crash(*_):
        raise KeyError("x")

    monkeypatch.setattr(checker, "verify", crash)
    with pytest.raises(KeyError):
        fuzzer.case("bytes", random.Random(1))
    fuzzer.draft.write(fuzzer.root)


def test_a_hang_would_be_noticed():
    def spin():
        with tool.alarm(0.05):
            for _ in itertools.count():
                pass

    with pytest.raises(tool.TooSlow):
        spin()


@given(st.data())
@MANY
def test_several_values_at_once_give_findings(fuzzer, data):
    """Hypothesis shrinks what fails to the one value that matters."""
    names = data.draw(st.lists(st.sampled_from(fuzzer.jsons), min_size=1, max_size=3, unique=True))
    junk = st.sampled_from([None, -1, 0, 1, 0.5, 1e300, 10**400, "", "x", [], {}, True, [None], {"a": 1}])
    files = dict(fuzzer.files)
    for name in names:
        value = json.loads(files[name])
        *way, last = data.draw(st.sampled_from([path for path in tool.paths(value) if path]))
        inner = value
        for key in way:
            inner = inner[key]
        inner[last] = data.draw(junk)
        files[name] = json.dumps(value).encode()
        (fuzzer.root / name).write_bytes(files[name])
    fuzzer.bundles.seal(fuzzer.root, fuzzer.bundles.listed(files))
    try:
        findings = checker.verify(fuzzer.root)
        assert findings and all(finding.reason for finding in findings)
    finally:
        for name in names:
            (fuzzer.root / name).write_bytes(fuzzer.files[name])
        (fuzzer.root / "manifest.json").write_bytes(fuzzer.manifest)
