"""The quickstart as a user runs it: once for the whole session, then reused, changed, damaged and looked at."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import QUICKSTART, ROOT, SMALL
from safetensors.numpy import load_file

import mpdeploy
from mpdeploy.verify import overall

CLI = [sys.executable, "-m", "mpdeploy"]


def cli(*args, store, cwd=ROOT, **extra):
    env = {**os.environ, "MPDEPLOY_STORE": str(store), **extra}
    return subprocess.run([*CLI, *map(str, args)], cwd=cwd, env=env, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="session")
def full(tmp_path_factory):
    """The README's first command, on an empty store."""
    home = tmp_path_factory.mktemp("quickstart")
    done = cli("run", QUICKSTART, "--out", home / "bundle", store=home / "store")
    return home, done


def test_it_ends_with_a_passing_verdict_and_a_page(full):
    home, done = full
    assert done.returncode == 0, done.stderr
    assert "holds: onnxruntime-cpu-fp32 may be released" in done.stdout
    for stage in ("source", "prune", "tune", "certify", "export", "build", "validate", "report"):
        assert f"{stage:<9} done" in done.stderr
    page = (home / "bundle" / "report.html").read_text()
    assert "<script" not in page and "http://" not in page and "https://" not in page


def test_the_bundle_holds_everything_and_the_checker_agrees(full):
    home, _ = full
    bundle = home / "bundle"
    for name in ("model.onnx", "dense.onnx", "model.fp16.onnx", "sparsity.json", "certificate.json", "results.json",
                 "report.html", "recipe.toml", "recipe.lock.json", "provenance.json", "preprocessing.json"):  # fmt: skip
        assert (bundle / name).is_file(), name
    for engine in ("onnxruntime-cpu-fp32", "onnxruntime-cpu-int8", "tensorrt_rtx-sm80-fp16", "tensorrt_rtx-sm86-fp16"):
        for folder in (engine, f"{engine}.dense"):
            assert json.loads((bundle / "engines" / folder / "engine.json").read_text())["id"] == folder
    findings = mpdeploy.verify_bundle(bundle)
    assert str(overall(findings)) == "holds", [f for f in findings if str(f.verdict) != "holds"]


def test_a_copied_bundle_is_checked_by_the_checker_alone(full, tmp_path):
    home, _ = full
    shutil.copytree(home / "bundle", tmp_path / "copy")
    shutil.copy(ROOT / "mpdeploy" / "verify.py", tmp_path)
    done = subprocess.run([sys.executable, "-I", "verify.py", "copy"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_network_on_disk_is_two_to_four_sparse_along_inputs(full):
    home, _ = full
    layers = json.loads((home / "bundle" / "layers.json").read_text())
    weights = load_file(home / "bundle" / "weights" / "tuned.safetensors")
    pruned = [layer for layer in layers if layer["pattern"]]
    assert len(pruned) == 16
    for layer in pruned:
        groups = weights[f"{layer['name']}.weight"].reshape(-1, 4)
        assert ((groups != 0).sum(axis=1) <= 2).all()
        assert (groups != 0).any()


def test_the_second_run_reuses_all_and_is_quick(full):
    home, first = full
    start = time.perf_counter()
    done = cli("run", QUICKSTART, "--out", home / "bundle", store=home / "store")
    took = time.perf_counter() - start
    assert done.returncode == 0
    assert "running" not in done.stderr
    assert done.stdout == first.stdout
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch, timm"], check=True)
    assert took < max(2.0, time.perf_counter() - start), "a run with nothing to do should not even import torch"


def test_changing_one_value_reruns_only_what_depends_on_it(full):
    home, _ = full
    plan = json.loads(cli("plan", QUICKSTART, "--set", "certify.reserve=0.02", "--json", store=home / "store").stdout)
    assert {s["name"]: s["state"] for s in plan["steps"]} == {
        "source": "reuse", "prune": "reuse", "tune": "reuse", "certify": "run",
        "export": "run", "build": "run", "validate": "run",
    }  # fmt: skip
    gates = cli("run", QUICKSTART, "--set", "gates.min_certified=1.0", "--out", home / "strict", store=home / "store")
    assert gates.returncode == 1
    assert "running" not in gates.stderr.replace("report    running", "")
    assert "must not be released" in gates.stdout


def test_the_recorded_accuracy_is_the_measured_one(full):
    """The shipped network on the shipped validation slice, against what its training recorded on all 10,000."""
    import torch

    from mpdeploy.models import load
    from mpdeploy.recipe import load_recipe

    home, _ = full
    record = json.loads((QUICKSTART.parent / "quickstart" / "vit.json").read_text())
    results = json.loads((home / "bundle" / "results.json").read_text())["dense_top1"]
    assert results["low"] <= record["top1_on_10000"] <= results["high"]
    file = load_recipe(QUICKSTART)
    loaded = load(file.recipe.source)
    with np.load(QUICKSTART.parent / "quickstart" / "fashion_mnist_slice.npz") as data:
        images = torch.from_numpy(data["val_images"]).float().div(255).sub(record["mean"]).div(record["std"])
        with torch.inference_mode():
            right = (loaded.module(images[:, None]).argmax(1).numpy() == data["val_labels"]).mean()
    assert right == pytest.approx(record["top1_on_slice"], abs=1e-9)


def test_killed_in_the_middle_of_the_real_thing_then_the_same_weights(tmp_path):
    sets = [arg for item in (*SMALL, "tune.epochs=1", "tune.batch=256") for arg in ("--set", item)]
    args = ["run", str(QUICKSTART), *sets, "--to", "tune"]
    whole = cli(*args, "--json", store=tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    env = {**os.environ, "MPDEPLOY_STORE": str(tmp_path / "killed")}
    process = subprocess.Popen(
        [*CLI, *args], cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    for line in process.stderr:
        if line.startswith("tune      running"):
            break
    time.sleep(1.5)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    again = cli(*args, "--json", store=tmp_path / "killed")
    assert "source    reused" in again.stderr and "prune     reused" in again.stderr
    assert json.loads(again.stdout)["chain"] == json.loads(whole.stdout)["chain"]


def test_a_damaged_artefact_stops_the_run_by_name(small_run, tmp_path):
    store = tmp_path / "store"
    root = next(iter(small_run.artifacts.values())).root.parents[1]
    shutil.copytree(root, store)
    victim = store / "objects" / small_run.artifacts["prune"].digest / "pruned.safetensors"
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    sets = [arg for item in SMALL for arg in ("--set", item)]
    done = cli("run", QUICKSTART, *sets, "--out", tmp_path / "b", store=store)
    assert done.returncode == 5
    assert "pruned.safetensors is not what was written" in done.stderr and "hint: delete the folder" in done.stderr


def test_a_full_disk_is_exit_5_and_loses_nothing(small_run, tmp_path):
    """A file size limit of 1 MB stands in for a disk that fills up in the middle of a stage."""
    sets = [arg for item in SMALL for arg in ("--set", item)]
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000));"
        f"sys.argv = ['mpdeploy', 'run', {str(QUICKSTART)!r}, '--to', 'source', *{sets!r}];"
        "from mpdeploy.cli import main; main()"
    )
    env = {**os.environ, "MPDEPLOY_STORE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 5, done.stderr
    assert "disk is full" in done.stderr
    assert list((tmp_path / "objects").iterdir()) == []
    assert cli("run", QUICKSTART, *sets, "--to", "source", store=tmp_path).returncode == 0
