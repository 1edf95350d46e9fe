"""doctor reports and never raises; "ok" means that a number was computed and compared."""

import json
import sys
import types
from dataclasses import asdict

import numpy as np
import pytest

from mpdeploy import doctor, runtimes
from mpdeploy.errors import CorruptArtifact, Unavailable
from mpdeploy.runtimes import Gpu


def test_examine_finds_what_is_here(tmp_path):
    checks = doctor.examine(tmp_path)
    found = {check.name: check for check in checks}
    assert len(found) == len(checks)
    assert {check.status for check in checks} <= {"ok", "missing", "broken"}
    assert all(check.seconds > 0 for check in checks)
    assert found["python"].version == ".".join(map(str, sys.version_info[:3]))
    assert found["numpy"].version == np.__version__
    assert found["torch: a 2:4 matrix product"].status == "ok"
    assert found["onnxruntime: a small network"].status == "ok"
    assert str(tmp_path) in found["disk"].detail
    for check in checks:
        assert check.status == "ok" or (check.detail and check.hint), check
    json.dumps([asdict(check) for check in checks], allow_nan=False)


def test_a_real_engine_is_compiled():
    pytest.importorskip("tensorrt_rtx")
    found = doctor._guarded("rtx", doctor._rtx_engine)
    assert found.status == "ok"
    assert "layers parsed; not run" in found.detail


class WrongSession:
    def __init__(self, logits):
        self.logits = logits

    def run(self, images):
        return np.full((len(images), 8), self.logits, np.float32)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.mark.parametrize("logits", [0.0, float("nan")])
def test_a_runtime_that_computes_nonsense_is_broken(monkeypatch, logits):
    monkeypatch.setattr(runtimes, "open_engine", lambda _: WrongSession(logits))
    found = doctor._guarded("onnxruntime: a small network", doctor._onnxruntime_network)
    assert found.status == "broken"
    assert "The result is off by" in found.detail


def test_torch_that_computes_nonsense_is_broken(monkeypatch):
    import torch

    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: torch.zeros(64, 64))
    assert doctor._guarded("torch", doctor._torch_product).status == "broken"


@pytest.mark.parametrize(("library", "check"), [("torch", "_torch_product"), ("onnxruntime", "_onnxruntime_network")])
def test_a_missing_library_is_missing_with_the_extra_to_install(monkeypatch, library, check):
    monkeypatch.setitem(sys.modules, library, None)
    found = doctor._guarded(library, getattr(doctor, check))
    assert found.status == "missing"
    assert found.hint.startswith("pip install 'mpdeploy[")


def test_a_package_that_is_not_installed_is_missing():
    found = doctor._package("mpdeploy-no-such-package", "pip install it")
    assert (found.status, found.version, found.hint) == ("missing", "", "pip install it")


def test_both_onnxruntimes_together_are_broken(monkeypatch):
    monkeypatch.setattr(doctor, "_version", {"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1"}.get)
    found = doctor._onnxruntime()
    assert found.status == "broken"
    assert "overwrite each other" in found.detail
    assert "pip uninstall" in found.hint


def test_a_gpu_is_described_and_its_absence_is_missing(monkeypatch):
    monkeypatch.setattr(runtimes, "find_gpu", lambda: Gpu("NVIDIA A40", (8, 6), 48 * 10**9, "580.10"))
    found = doctor._gpu()
    assert (found.status, found.version, found.detail) == ("ok", "580.10", "NVIDIA A40, sm86, 48 GB")
    monkeypatch.setattr(runtimes, "find_gpu", lambda: None)
    assert doctor._gpu().status == "missing"
    monkeypatch.setattr(doctor, "_version", lambda _: "")
    assert "no nvidia-ml-py to ask with" in doctor._gpu().detail


def test_a_full_disk_is_broken_and_a_folder_to_come_is_judged_by_its_parent(monkeypatch, tmp_path):
    assert doctor._disk(tmp_path / "runs" / "new").status == "ok"
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=10**9))
    found = doctor._disk(tmp_path)
    assert found.status == "broken"
    assert "1.0 GB free" in found.detail


@pytest.mark.parametrize(
    ("error", "status", "detail"),
    [
        (Unavailable("No driver.", hint="Get one."), "missing", "No driver."),
        (CorruptArtifact("It is not whole."), "broken", "It is not whole."),
        (ModuleNotFoundError("No module named 'timm'", name="timm"), "missing", "No module named 'timm'."),
        (OSError("libcudart.so.13: cannot open"), "broken", "OSError: libcudart.so.13: cannot open"),
        (SystemError("initialisation failed\nbadly"), "broken", "SystemError: initialisation failed badly"),
    ],
)
def test_nothing_raises(error, status, detail):
    def check():
        raise error

    found = doctor._guarded("a check", check)
    assert (found.name, found.status, found.detail) == ("a check", status, detail)
