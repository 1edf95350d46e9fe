"""Tuning by several processes under torchrun: the same weights as one process, whatever is killed in between."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import QUICKSTART, ROOT, SMALL
from safetensors.torch import load_file
from tuning_networks import chain, tune

import mpdeploy
from mpdeploy import launch
from mpdeploy.errors import StageFailed
from mpdeploy.tuning.team import Team

# Sums over processes are the sums of one process in another order: one rounding (6e-8) per addition, grown by AdamW's
# division by small second moments. Measured on these networks: 5e-6 of the way that a tensor has moved.
TOLERANCE = 5e-5

CASES = {
    # The last batch of an epoch holds one sample: one process of two has none.
    "uneven": {"batch": 13},
    "kept": {"batch": 12, "epochs": 3, "flip": True, "ema": 0.9, "refresh": 1, "weight_decay": 0.01},
    "features": {"batch": 13, "feature_weight": 0.5, "ema": 0.5},
    "killed": {"batch": 12, "epochs": 3, "flip": True, "ema": 0.9, "refresh": 2, "checkpoint_every": 2},
}


def torchrun(*args, **extra):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *map(str, args)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **extra}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def alone():
    """Each case done by one process: the weights before and after."""
    found = {}
    for name, case in CASES.items():
        student, teacher, masks = chain()
        tune(student, teacher, masks, **case)
        found[name] = student.state_dict()
    return chain()[0].state_dict(), found


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """Each case done by two processes, of which one kills itself in the middle of the last case."""
    out = tmp_path_factory.mktemp("together")
    cases = {**CASES, "killed": {**CASES["killed"], "kill": 9}}
    return out, torchrun(ROOT / "tests" / "tuning_networks.py", out, json.dumps(cases))


def assert_close(weights, expected, start):
    for name, value in expected.items():
        moved = (value - start[name]).norm()
        assert (weights[name] - value).norm() <= TOLERANCE * moved + 1e-7, name


@pytest.mark.parametrize("case", ["uneven", "kept", "features"])
def test_two_processes_come_to_the_weights_of_one(alone, together, case):
    start, expected = alone
    out, done = together
    first, second = (out / f"{case}.{rank}.safetensors" for rank in (0, 1))
    assert first.is_file(), done.stderr
    assert first.read_bytes() == second.read_bytes()
    assert_close(load_file(first), expected[case], start)


def test_a_killed_pair_goes_on_from_its_checkpoint_and_so_does_a_single_process(alone, together, tmp_path):
    start, expected = alone
    out, done = together
    assert done.returncode != 0 and not (out / "killed.0.safetensors").exists()
    kept = out / "killed.checkpoint"
    steps = len(json.loads((kept / "state.json").read_text())["history"]["losses"])
    assert steps == 8
    student, teacher, masks = chain()
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in kept.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert tune(student, teacher, masks, **CASES["killed"], checkpoint=copy).resumed_at == 8
    assert_close(student.state_dict(), expected["killed"], start)
    again = torchrun(ROOT / "tests" / "tuning_networks.py", out, json.dumps({"killed": CASES["killed"]}))
    assert again.returncode == 0, again.stderr
    assert_close(load_file(out / "killed.1.safetensors"), expected["killed"], start)


def test_shares_of_a_batch_cover_it_once_and_weigh_as_their_samples():
    for size in (1, 2, 3, 8):
        for count in (1, 2, 7, 8, 64):
            shares = [Team(rank, size).rows(count) for rank in range(size)]
            rows = [row for own, weight in shares if weight for row in own]
            assert rows == list(range(count))
            assert sum(weight for _, weight in shares) == pytest.approx(size)
            assert all(len(own) for own, _ in shares)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """The cut-down quickstart on a handful of images, under torchrun."""
    home = tmp_path_factory.mktemp("pipeline")
    with np.load(QUICKSTART.parent / "quickstart" / "fashion_mnist_slice.npz") as data:
        few = {name: values[:360] if len(values) > 360 else values for name, values in data.items()}
    np.savez(home / "few.npz", **few)
    sets = (*SMALL, f'data.path="{home / "few.npz"}"', "tune.epochs=1", "tune.batch=50", "tune.feature_weight=0.1")
    args = [QUICKSTART, *(arg for item in sets for arg in ("--set", item)), "--out", home / "bundle"]
    return home, sets, args, torchrun("-m", "mpdeploy", "run", *args, "--json", MPDEPLOY_STORE=str(home / "store"))


def test_the_pipeline_under_torchrun_makes_one_bundle(pipeline):
    home, sets, _, done = pipeline
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["verdict"] == "holds"
    assert done.stderr.count("tune      done") == 1
    assert {path.name for path in home.iterdir() if path.is_dir()} == {"bundle", "store"}
    record = json.loads((home / "bundle" / "tune.json").read_text())
    assert record["processes"] == 2
    # Features in another order of channels than the teacher's would add 0.1 x 4 blocks x about 2.
    assert record["blocks"] == [f"blocks.{i}" for i in range(4)] and record["loss"][0]["loss"] < 0.4
    assert len(list((home / "store" / "objects").iterdir())) == 7
    # How many processes shared the work is no part of what was asked.
    assert {step.state for step in mpdeploy.plan(QUICKSTART, sets=sets, store=home / "store")} == {"reuse"}
    # Forgotten by the store, it is made again by a single process.
    for path in (home / "store" / "keys").iterdir():
        if json.loads(path.read_text())["asked"]["stage"] == "tune":
            path.unlink()
    single = mpdeploy.run(QUICKSTART, sets=sets, store=home / "store", to="tune").artifacts["tune"]
    own = single.json("tune.json")
    assert own["processes"] == 1
    assert [row["loss"] for row in record["loss"]] == pytest.approx([row["loss"] for row in own["loss"]], rel=1e-4)


def test_a_prune_restore_cycle_is_the_same_on_two_processes(pipeline):
    home, sets, args, _ = pipeline
    more = ("tune.restore=0.05", "tune.restore_steps=3")
    restored = [arg for item in more for arg in ("--set", item)]
    done = torchrun(
        "-m", "mpdeploy", "run", *args, *restored, "--to", "tune", MPDEPLOY_STORE=str(home / "store")
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    step = mpdeploy.run(QUICKSTART, sets=(*sets, *more), store=home / "store", to="tune").artifacts["tune"]
    both = step.json("tune.json")
    assert both["processes"] == 2 and 0 < both["restored"]["swapped"] < both["restored"]["dropped"]
    for path in (home / "store" / "keys").iterdir():
        if json.loads(path.read_text())["asked"].get("params", {}).get("restore"):
            path.unlink()
    alone = mpdeploy.run(QUICKSTART, sets=(*sets, *more), store=home / "store", to="tune").artifacts["tune"]
    one = alone.json("tune.json")
    assert one["processes"] == 1
    assert one["restored"]["dropped"] == both["restored"]["dropped"]
    assert one["restored"]["growing_loss"] == pytest.approx(both["restored"]["growing_loss"], rel=1e-4)
    # Rounding decides between entries that moved equally far, so a few masks may differ, and the losses a little.
    assert one["restored"]["swapped"] == pytest.approx(both["restored"]["swapped"], rel=0.01)
    assert [row["loss"] for row in one["loss"]] == pytest.approx([row["loss"] for row in both["loss"]], rel=1e-2)


def test_what_goes_wrong_on_another_process_is_told_by_the_first(pipeline, tmp_path):
    home, _, args, _ = pipeline
    script = tmp_path / "broken.py"
    script.write_text(
        "import os\n"
        "from mpdeploy import cli\n"
        "from mpdeploy.errors import Unavailable\n"
        "from mpdeploy.tuning import teacher\n"
        "def fail(*_):\n"
        "    raise Unavailable('The disk of this machine is asleep.', hint='wake it.')\n"
        "if os.environ['RANK'] == '1':\n"
        "    teacher.Teacher.outputs = fail\n"
        "cli.main()\n"
    )
    done = torchrun(script, "run", *args, "--set", "tune.seed=1", "--to", "tune", MPDEPLOY_STORE=str(home / "store"))
    assert done.returncode == 1  # the launcher's own; ours is in what it reports
    assert "error: Process 1 of 2: The disk of this machine is asleep.\n  hint: wake it." in done.stderr
    assert done.stderr.count("asleep") == 1
    assert "exitcode: 3" in done.stderr.replace(" ", "").replace("exitcode:", "exitcode: ")


def test_a_process_that_should_serve_does_not_tune_by_itself(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with (
        pytest.raises(StageFailed, match=r"Process 1 of 2 reached tuning by itself(?s:.*)-m mpdeploy run"),
        launch.crew({}),
    ):
        pass


def test_alone_there_is_no_group_and_nobody_to_dismiss(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with launch.crew({}):
        assert not torch.distributed.is_initialized()
    assert (launch.rank(), launch.local_rank(), launch.world()) == (0, 0, 1)
    launch.dismiss()
