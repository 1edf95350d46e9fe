"""The loop over stages, on two tiny stages whose work is arithmetic: keys, reasons, crashes, broken promises."""

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from conftest import QUICKSTART

from mpdeploy import pipeline
from mpdeploy.artifact import write_json
from mpdeploy.errors import RecipeError, StageFailed, Unavailable
from mpdeploy.recipe import load_recipe
from mpdeploy.stage import Stage
from mpdeploy.store import Store


class Recorder:
    def __init__(self):
        self.states = []

    def stage(self, name, state, note):
        self.states.append((name, state, note))

    def progress(self, label, done, total):
        pass

    def ran(self):
        return [name for name, state, _ in self.states if state == "running"]


def first(params, given, out):
    write_json(out / "n.json", {"reserve": params.reserve})
    return {"reserve": params.reserve}


def second(params, given, out):
    given.progress("adding", 1, 1)
    write_json(out / "n.json", {"sum": given["first"].json("n.json")["reserve"] + params.epochs})
    return {}


def promise(made):
    made.json("n.json")


def stages(**changes):
    a = Stage("first", "a number", (), lambda r: r.certify, first, promise)
    b = Stage("second", "a sum", ("first",), lambda r: r.tune, second, promise)
    return (Stage(**{**vars(a), **changes.get("first", {})}), Stage(**{**vars(b), **changes.get("second", {})}))


@pytest.fixture
def two(monkeypatch):
    monkeypatch.setattr(pipeline, "STAGES", stages())


def compile_(tmp_path, *sets):
    recorder = Recorder()
    made = pipeline.compile_recipe(load_recipe(QUICKSTART, sets).recipe, Store(tmp_path), "second", recorder)
    return made, recorder


def test_the_second_run_reuses_everything(tmp_path, two):
    made, recorder = compile_(tmp_path)
    assert recorder.ran() == ["first", "second"]
    again, recorder = compile_(tmp_path)
    assert recorder.ran() == []
    assert [a.digest for a in again.values()] == [a.digest for a in made.values()]


def test_one_changed_value_reruns_only_what_depends_on_it(tmp_path, two):
    compile_(tmp_path)
    _, recorder = compile_(tmp_path, "tune.epochs=2")
    assert recorder.ran() == ["second"]
    _, recorder = compile_(tmp_path, "certify.reserve=0.5")
    assert recorder.ran() == ["first", "second"]
    _, recorder = compile_(tmp_path)
    assert recorder.ran() == []


def test_plan_says_why(tmp_path, two):
    def plan(*sets):
        steps = pipeline.plan(load_recipe(QUICKSTART, sets).recipe, Store(tmp_path), "second")
        return [(s.state, s.reason) for s in steps]

    assert plan() == [("run", "never made"), ("run", "first will run")]
    assert list(tmp_path.iterdir()) == []
    compile_(tmp_path)
    assert [state for state, _ in plan()] == ["reuse", "reuse"]
    assert plan("tune.epochs=3")[1] == ("run", "epochs 1 -> 3")
    assert plan("certify.reserve=0.5") == [("run", "reserve 0.01 -> 0.5"), ("run", "first will run")]


def test_a_changed_environment_and_changed_code_rerun(tmp_path, two, monkeypatch):
    compile_(tmp_path)
    monkeypatch.setattr(pipeline, "STAGES", stages(second={"environment": lambda _: {"torch": "9"}}))
    _, recorder = compile_(tmp_path)
    assert recorder.ran() == ["second"]
    assert "environment.torch nothing -> 9" in recorder.states[-2][2]
    monkeypatch.setattr(pipeline, "code_digest", lambda: "other")
    _, recorder = compile_(tmp_path)
    assert recorder.ran() == ["first", "second"]
    assert "mpdeploy itself changed" in recorder.states[0][2]


def test_a_broken_promise_is_never_reused(tmp_path, monkeypatch):
    def broken(made):
        raise StageFailed("the pattern does not hold")

    monkeypatch.setattr(pipeline, "STAGES", stages(second={"ensures": broken}))
    for _ in range(2):
        with pytest.raises(StageFailed, match="the pattern does not hold"):
            compile_(tmp_path)
    assert len(list((tmp_path / "objects").iterdir())) == 1
    monkeypatch.setattr(pipeline, "STAGES", stages())
    _, recorder = compile_(tmp_path)
    assert recorder.ran() == ["second"]


def test_a_failing_stage_is_named_and_keeps_what_was_done(tmp_path, monkeypatch):
    def fails(params, given, out):
        (out / "half").write_text("x")
        raise KeyError("blocks.0")

    monkeypatch.setattr(pipeline, "STAGES", stages(second={"run": fails}))
    with pytest.raises(StageFailed, match=r"stage second failed: KeyError: 'blocks\.0'"):
        compile_(tmp_path)
    assert list((tmp_path / "tmp").iterdir()) == []
    assert len(list((tmp_path / "keys").iterdir())) == 1


@pytest.mark.parametrize(("error", "kind"), [(Unavailable("no GPU"), Unavailable), (MemoryError(), StageFailed)])
def test_our_own_errors_pass_and_memory_is_named(tmp_path, monkeypatch, error, kind):
    def fails(params, given, out):
        raise error

    monkeypatch.setattr(pipeline, "STAGES", stages(first={"run": fails}))
    with pytest.raises(kind, match=r"no GPU|out of memory"):
        compile_(tmp_path)


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    def fills(params, given, out):
        raise OSError(28, os.strerror(28), str(out / "big"))

    monkeypatch.setattr(pipeline, "STAGES", stages(second={"run": fills}))
    with pytest.raises(StageFailed, match="disk is full"):
        compile_(tmp_path)
    monkeypatch.setattr(pipeline, "STAGES", stages())
    _, recorder = compile_(tmp_path)
    assert recorder.ran() == ["second"]


def test_an_unknown_stage_is_named(tmp_path, two):
    with pytest.raises(RecipeError, match="no stage bild; the stages are first, second"):
        pipeline.plan(load_recipe(QUICKSTART).recipe, Store(tmp_path), "bild")


SLOW_STAGES = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    import test_pipeline as t
    from mpdeploy import pipeline

    def slow(params, given, out):
        for i in range(20):
            (out / f"{{i}}.bin").write_bytes(bytes([i]) * 50_000)
            time.sleep(0.005)
        return t.first(params, given, out)

    pipeline.code_digest = lambda: 'pinned'
    pipeline.STAGES = t.stages(first={{"run": slow}})
    made, _ = t.compile_(Path({store!r}))
    print(made["second"].digest)
    """
)


def slow_run(store):
    script = SLOW_STAGES.format(tests=str(Path(__file__).parent), store=str(store))
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)


def finished(process):
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return out.strip()


def test_kill_minus_nine_at_random_moments_then_the_same_result(tmp_path):
    expected = finished(slow_run(tmp_path / "whole"))
    chance = random.Random(0)
    start = time.perf_counter()
    finished(slow_run(tmp_path / "timed"))
    usual = time.perf_counter() - start
    for _ in range(4):
        process = slow_run(tmp_path / "killed")
        time.sleep(chance.uniform(0.3, 1.05) * usual)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        for folder in (tmp_path / "killed" / "objects").glob("*"):
            from mpdeploy.artifact import open_artifact

            open_artifact(folder).check()
    assert finished(slow_run(tmp_path / "killed")) == expected


def test_two_runs_on_one_store_at_once_agree(tmp_path):
    runs = [slow_run(tmp_path / "store") for _ in range(2)]
    results = {finished(run) for run in runs}
    assert len(results) == 1
    assert len(list((tmp_path / "store" / "objects").iterdir())) == 2
