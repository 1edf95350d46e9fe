"""Shared set-up: one thread per process, because two cores run several tests and timers at once."""

import importlib.util
import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "recipes" / "quickstart.toml"

# The quickstart cut down to seconds: no tuning, one engine, few images.
SMALL = (
    'name="small"',
    "data.calibration=64",
    "data.certification=64",
    "tune.epochs=0",
    'export.precision=["fp32"]',
    'build.engines=[{runtime="onnxruntime"}]',
    "validate.samples=100",
    "validate.blocks=4",
    "validate.calls=2",
    "gates.min_certified=0.0",
    "gates.min_agreement=0.0",
    "gates.max_accuracy_drop=100.0",
)


def loaded(path):
    """A script of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def command(capsys, monkeypatch, tmp_path):
    """Run the command line in this process, in an empty folder; returns (exit code, stdout, stderr)."""
    from mpdeploy import cli

    monkeypatch.chdir(tmp_path)

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["mpdeploy", *map(str, args)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out = capsys.readouterr()
        return stopped.value.code or 0, out.out, out.err

    return run


@pytest.fixture
def quickstart() -> Path:
    return QUICKSTART


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """One run of the cut-down quickstart, shared by every test that only reads its bundle."""
    import mpdeploy

    home = tmp_path_factory.mktemp("small")
    return mpdeploy.run(QUICKSTART, sets=SMALL, store=home / "store", out=home / "bundle")
