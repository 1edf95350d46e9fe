"""The stage certify in a whole run: few classes kept, proofs tried, clusters named, and what the checker says of it."""

import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import QUICKSTART, SMALL
from safetensors.numpy import load_file

import mpdeploy
from mpdeploy import verify
from mpdeploy.certify.ledger import columns, rows_of
from mpdeploy.certify.proof import State
from mpdeploy.errors import RecipeError
from mpdeploy.recipe import load_recipe

SETS = (*SMALL, "certify.keep=2", "certify.proofs=1", 'validate.cluster="(.)$"', "gates.max_noise=1.5")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    home = tmp_path_factory.mktemp("few")
    run = mpdeploy.run(QUICKSTART, sets=SETS, store=home / "store", out=home / "bundle")
    assert run.verdict == "holds"
    return run.bundle


def read(bundle, name):
    return json.loads((bundle / name).read_text())


def test_the_checker_agrees_with_all_but_the_proofs(bundle):
    findings = {finding.claim: str(finding.verdict) for finding in mpdeploy.verify_bundle(bundle)}
    assert {claim for claim, verdict in findings.items() if verdict != "holds"} == {"proofs"}
    assert findings["proofs"] == "unchecked"
    assert findings["ledger"] == findings["disagreement"] == findings["gate:max_noise"] == "holds"


def test_few_classes_are_kept_and_the_reference_is_measured(bundle):
    certificate, ledger = read(bundle, "certificate.json"), load_file(bundle / "ledger.safetensors")
    assert certificate["kept"] == 4 and ledger["logits"].shape == (64, 3, 5)
    assert ledger["reference"].dtype == np.float64 and len(ledger["reference"]) == 8
    assert 0 < certificate["reference"]["eps_inf_max"] < 1e-4
    assert certificate["tests"]["pairwise"] >= certificate["tests"]["span"] >= certificate["tests"]["two_inf"]
    primary = sum(row["flips_primary"] for row in certificate["spent"])
    assert primary == certificate["counts"]["flipped"]


def test_proofs_have_three_states_and_stand_beside_what_was_measured(bundle):
    proofs = read(bundle, "certificate.json")["proofs"]
    for row in (proofs["real_arithmetic"], *proofs["envelope"].values()):
        assert sum(row[state.name.lower()] for state in State) == row["samples"] == 1
    claims = proofs["data_path"]["claims"]
    names = {claim["name"] for claim in claims}
    assert names >= {"epsilon", "ce_path", "mask", "additive", "update", "telescoped", "margin", "zero_budget"}
    assert names >= {"stationarity", "l2_collapse", "gaussian", "mp", "a_posteriori"}
    for claim in claims:
        assert claim["status"] in ("proved", "model", "observed", "vacuous") and claim["measured"] is not None
        assert not (claim["status"] == "vacuous" and claim["holds"])
    # A transformer of four blocks: what these bounds say of it is nothing, and that is what is written.
    assert {claim["name"]: claim["status"] for claim in claims}["ce_path"] == "vacuous"
    assert len(proofs["data_path"]["steps"]) >= 16
    page = (bundle / "report.html").read_text()
    assert "Proofs, on 1 sample" in page and "vacuous" in page


def test_the_norms_are_those_of_what_pruning_removed(bundle):
    rows = read(bundle, "certificate.json")["objective"]["changed"]
    assert len(rows) == 16
    for row in rows:
        assert row["spectral_upper"] <= row["frobenius"] * (1 + 1e-7)
        assert row["frobenius"] <= row["l1"]


def test_clusters_are_the_trials(bundle):
    stated = read(bundle, "disagreement.json")["engines"]["onnxruntime-cpu-fp32"]
    assert stated["n"] == 10 and stated["clusters"] == "(.)$" and "clusters" in stated["statement"]


def test_each_stage_stays_within_its_noise_floor(bundle):
    results = read(bundle, "results.json")
    for noise in (results["export_noise"], *(row["noise_floor"] for row in results["engines"])):
        assert noise["verdict"] == "within" and 0.1 < noise["ratio_rms"] < 1.5
        assert sum(noise["spent_on"].values()) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize(
    "changes",
    [
        "certify.keep=1",
        "certify.reference=0",
        "certify.proofs=-1",
        "certify.lambda2=-1.0",
        "validate.alpha=1.0",
        "validate.noise=-1",
        'validate.cluster="("',
    ],
)
def test_senseless_values_are_refused(changes):
    with pytest.raises(RecipeError, match=changes.split("=")[0]):
        load_recipe(QUICKSTART, (changes,))


@pytest.mark.parametrize("keep", [2, 8, 16])
def test_the_checker_accepts_what_the_ledger_keeps_of_many_classes(keep):
    """Stages and engines that drift far apart bring classes in that the dense network ranks low."""
    rng = np.random.default_rng(keep)
    n, classes = 300, 200
    dense = rng.normal(size=(n, classes)).astype(np.float32)
    names = ("dense", "pruned", "tuned", "onnx")
    stages = {name: dense + i * rng.normal(size=dense.shape).astype(np.float32) for i, name in enumerate(names)}
    engines = [stages["onnx"] + rng.normal(size=dense.shape).astype(np.float32) for _ in range(2)]
    rows = rows_of(rng.integers(0, classes, n), stages, keep, engines)
    read = verify.read_columns(vars(rows), names, classes, "here")
    verify.check_kept(read, [columns(z, rows.kept_classes) for z in engines], keep, "here")
    swapped = rows.kept_classes.copy()
    lowest = dense.argmin(axis=1)
    swapped[np.arange(n), -1] = np.where((swapped == lowest[:, None]).any(axis=1), swapped[:, -1], lowest)
    other = replace(rows, kept_classes=swapped, logits=np.stack([columns(z, swapped) for z in stages.values()], 1))
    lied = [columns(z, swapped) for z in engines]
    with pytest.raises(verify.Refuted, match=r"neither special nor|a winner is not|own label is not"):
        verify.check_kept(verify.read_columns(vars(other), names, classes, "here"), lied, keep, "here")
