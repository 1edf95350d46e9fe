"""Every command with good and with bad input: what it prints, where, and the exit code."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import QUICKSTART, ROOT, SMALL
from safetensors.numpy import load_file, save_file

from mpdeploy import cli as module

SETS = [arg for item in SMALL for arg in ("--set", item)]


@pytest.fixture
def call(capsys, monkeypatch, tmp_path):
    """Run the command line in this process; returns (exit code, stdout, stderr)."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["mpdeploy", *map(str, args)])
        monkeypatch.setenv("MPDEPLOY_STORE", str(tmp_path / "store"))
        with pytest.raises(SystemExit) as stopped:
            module.main()
        out = capsys.readouterr()
        return stopped.value.code or 0, out.out, out.err

    return run


def test_help_version_and_module(call):
    assert call("--version")[1].startswith("mpdeploy ")
    code, out, _ = call("--help")
    assert code == 0
    for name in ("plan", "run", "verify", "report", "doctor", "targets", "init", "schema"):
        assert name in out
    done = subprocess.run([sys.executable, "-m", "mpdeploy", "--version"], capture_output=True, text=True)
    assert done.stdout.startswith("mpdeploy ")


def test_usage_errors_are_2(call):
    assert call("nonsense")[0] == 2
    assert call("run")[0] == 2
    code, _, err = call("plan", "no-such-file.toml")
    assert code == 2 and "can't be read" in err and "mpdeploy init" in err
    code, _, err = call("run", QUICKSTART, "--to", "bild")
    assert code == 2 and "no stage bild" in err


def test_plan_lists_layers_with_axis_rule_and_macs(call, tmp_path):
    code, out, _ = call("plan", QUICKSTART)
    assert code == 0
    assert "never made" in out and "blocks.0.attn.qkv" in out and "2:4" in out
    assert not (tmp_path / "store").exists()
    rows = {row["name"]: row for row in json.loads(call("plan", QUICKSTART, "--json")[1])["rows"]}
    qkv = rows["blocks.0.attn.qkv"]
    assert qkv["shape"] == [384, 128] and qkv["axis"] == 1 and qkv["macs"] == 49 * 384 * 128 == 2 * qkv["macs_after"]
    assert rows["head"]["pattern"] == "" and "dense" in rows["head"]["reason"]
    assert set(qkv["targets"]) == {"a100", "a40"}


def test_plan_says_that_wider_patterns_run_on_no_sparse_core(call):
    out = json.loads(call("plan", QUICKSTART, "--set", "prune.pattern=8:16", "--json")[1])
    rules = {row["targets"]["a100"]["rule"] for row in out["rows"] if row["pattern"]}
    assert all("2:4" in rule for rule in rules) and rules


def test_schema_is_json_schema(call):
    schema = json.loads(call("schema")[1])
    assert schema["type"] == "object" and "prune" in schema["properties"]


def test_targets(call):
    code, out, _ = call("targets")
    assert code == 0 and "a100" in out and "312 / 624" in out
    assert {t["key"] for t in json.loads(call("targets", "--json")[1])} >= {"a100", "a40", "h200"}


def test_init_writes_a_recipe_that_plans_and_never_overwrites(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = call("init", "resnet18")
    assert code == 0 and (tmp_path / "resnet18.toml").is_file() and "resnet18.toml" in out
    code, _, err = call("init", "resnet18")
    assert code == 2 and "left as it is" in err
    assert call("init", "resnet18", "--force")[0] == 0
    code, _, err = call("init", "resnet19")
    assert code == 2 and "resnet18" in err
    assert call("init", "torchvision:resnet50", "--out", tmp_path / "tv.toml")[0] == 0
    assert call("init", "my.package:network", "--out", tmp_path / "py.toml")[0] == 0
    from mpdeploy.recipe import load_recipe

    for name in ("resnet18", "tv", "py"):
        load_recipe(tmp_path / f"{name}.toml")
    code, _, err = call("plan", tmp_path / "resnet18.toml")
    assert code == 2 and "imagenet" in err


def test_doctor_runs_one_real_operation_per_runtime(call):
    code, out, _ = call("doctor", "--json")
    checks = json.loads(out)
    assert code == (3 if any(c["status"] == "broken" for c in checks) else 0)
    assert any("onnxruntime" in c["name"] and c["status"] == "ok" for c in checks)


def test_verify_and_report_on_a_real_bundle(call, small_run, tmp_path):
    code, out, _ = call("verify", small_run.bundle)
    assert code == 0, out
    code, out, _ = call("verify", small_run.bundle, "--json")
    assert json.loads(out)["verdict"] == "holds"
    code, out, _ = call("verify", small_run.bundle, "--expect", "0" * 64)
    assert code == 1
    code, out, _ = call("report", small_run.bundle, "--out", tmp_path / "page.html")
    assert code == 0
    assert (tmp_path / "page.html").read_text() == (small_run.bundle / "report.html").read_text()


def test_verify_refuses_an_edited_bundle_and_a_folder_that_is_none(call, small_run, tmp_path):
    import shutil

    bundle = tmp_path / "b"
    shutil.copytree(small_run.bundle, bundle)
    (bundle / "certificate.json").write_text(
        (bundle / "certificate.json").read_text().replace('"flipped": ', '"flipped": 1')
    )
    assert call("verify", bundle)[0] == 1
    code, _, err = call("report", bundle)
    assert code == 5 and "certificate.json is not what was written" in err
    code, _, err = call("verify", tmp_path)
    assert code == 2 and "is not a bundle" in err


def test_a_folder_that_is_no_bundle_is_never_overwritten(call, small_run, tmp_path, monkeypatch):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("x")
    import mpdeploy
    from mpdeploy.errors import RecipeError

    store = small_run.artifacts["source"].root.parents[1]
    with pytest.raises(RecipeError, match="is not an mpdeploy bundle; it is left as it is"):
        mpdeploy.run(QUICKSTART, sets=SMALL, store=store, out=precious)
    assert (precious / "thesis.txt").read_text() == "x"


def npz(tmp_path, **changes):
    with np.load(QUICKSTART.parent / "quickstart" / "fashion_mnist_slice.npz") as data:
        arrays = {name: data[name][:300] if name != "class_names" else data[name] for name in data.files}
    path = tmp_path / "d.npz"
    np.savez(path, **{**arrays, **changes})
    return f'data.path="{path}"'


def test_bad_inputs_are_sentences_with_the_right_code(call, tmp_path):
    empty = np.zeros((0, 28, 28), np.uint8)
    weights = load_file(QUICKSTART.parent / "quickstart" / "vit.safetensors")
    broken = {**weights, "head.weight": np.full_like(weights["head.weight"], np.nan)}
    save_file(broken, tmp_path / "nan.safetensors")
    save_file({"foreign": np.zeros(3, np.float32)}, tmp_path / "foreign.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    cases = [
        (
            npz(tmp_path, train_images=empty, train_labels=np.zeros(0, np.int64), train_ids=np.array([], str)),
            2,
            "train",
        ),
        (f'source.weights="{tmp_path / "nan.safetensors"}"', 2, "head.weight"),
        (f'source.weights="{tmp_path / "foreign.safetensors"}"', 2, "foreign"),
        (f'source.weights="{tmp_path / "text.safetensors"}"', 2, "text.safetensors"),
        (f'source.weights="{tmp_path / "none.safetensors"}"', 2, "none.safetensors"),
        ('source.model="vit_tiny_patch16_225"', 2, "vit_tiny_patch16_224"),
        ("data.calibration=100000", 2, "100000"),
        ("source.args={num_classes=5, img_size=28, patch_size=4, in_chans=1}", 2, ""),
        ('prune.pattern="3:7"', 2, "3:7"),
        ('tune.device="cuda"', 3, "no GPU"),
    ]
    for item, expected, words in cases:
        sets = [*SETS, "--set", "tune.epochs=1", "--set", "data.calibration=32", "--set", "data.certification=32"]
        code, _, err = call("run", QUICKSTART, *sets, "--set", item, "--to", "tune")
        assert code == expected, (item, code, err)
        assert err.count("error: ") == 1 and words in err and "Traceback" not in err, (item, err)


def test_pretrained_without_a_hub_is_3(call):
    code, _, err = call(
        "run", QUICKSTART, *SETS, "--set", 'source.weights="pretrained"', "--set", 'source.model="resnet18"',
        "--set", "source.args={}", "--to", "source",
    )  # fmt: skip
    assert code == 3 and "hint" in err


def test_a_bug_is_70_and_an_interrupt_130(call, monkeypatch):
    def explode(*args, **kwargs):
        raise ZeroDivisionError("planted")

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("mpdeploy.recipe.load_recipe", explode)
    code, _, err = call("plan", QUICKSTART)
    assert code == 70 and "bug in mpdeploy" in err
    monkeypatch.setattr("mpdeploy.recipe.load_recipe", interrupt)
    assert call("plan", QUICKSTART)[0] == 130


def test_a_closed_pipe_is_quiet():
    done = subprocess.run(
        f"{sys.executable} -m mpdeploy schema | head -c 10", shell=True, capture_output=True, text=True, cwd=ROOT,
        env={**os.environ},
    )  # fmt: skip
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_what_a_killed_bundle_writer_left_is_swept(small_run, tmp_path):
    import mpdeploy

    (tmp_path / ".b.draft").mkdir()
    (tmp_path / ".b.draft" / "half").write_text("x")
    store = small_run.artifacts["source"].root.parents[1]
    made = mpdeploy.run(QUICKSTART, sets=SMALL, store=store, out=tmp_path / "b")
    assert {path.name for path in tmp_path.iterdir()} == {"b", ".b.lock"}
    assert (made.bundle / "manifest.json").read_bytes() == (small_run.bundle / "manifest.json").read_bytes()
