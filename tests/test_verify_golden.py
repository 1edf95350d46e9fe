"""Bundles that were frozen by date keep their verdicts, whatever verify.py becomes."""

import importlib
import json
import tarfile
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"
module = importlib.import_module("mpdeploy.verify")  # the package gives the function of that name


@pytest.mark.parametrize("archive", sorted(GOLDEN.glob("*.tar.xz")), ids=lambda path: path.name)
def test_a_frozen_bundle_keeps_its_verdicts(archive, tmp_path):
    stated = json.loads(Path(str(archive).removesuffix(".tar.xz") + ".json").read_text())
    with tarfile.open(archive) as files:
        files.extractall(tmp_path, filter="data")
    findings = module.verify(tmp_path, stated["digest"])
    own = {finding.claim: finding.verdict for finding in findings}
    for row in stated["findings"]:
        assert own[row["claim"]] == row["verdict"], (row, own)
    assert module.overall(findings) == stated["verdict"]


def test_there_are_goldens_of_both_kinds_and_they_are_small():
    verdicts = {json.loads(path.read_text())["verdict"] for path in GOLDEN.glob("*.json")}
    assert verdicts == {"holds", "refuted"}
    assert sum(path.stat().st_size for path in GOLDEN.iterdir()) < 300_000
