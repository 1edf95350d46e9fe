"""Shared set-up: one thread per process, because two cores run several tests and timers at once."""

import os

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


@pytest.fixture
def quickstart() -> Path:
    return QUICKSTART


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """One run of the cut-down quickstart, shared by every test that only reads its bundle."""
    import mpdeploy

    home = tmp_path_factory.mktemp("small")
    return mpdeploy.run(QUICKSTART, sets=SMALL, store=home / "store", out=home / "bundle")
