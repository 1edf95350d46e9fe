"""What a bundle claims of images that nobody ran."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from conftest import QUICKSTART, SMALL
from safetensors.numpy import load_file, save_file

import mpdeploy
from mpdeploy.certify.ledger import slack_of
from mpdeploy.certify.statistics import clustered, disagreement
from mpdeploy.errors import RecipeError, StageFailed
from mpdeploy.recipe import Validate
from mpdeploy.unseen import candidates, claims, clusters_of

DEPLOY = "onnxruntime-cpu-fp32"


@dataclass
class Fake:
    """An artefact as far as `unseen` reads it."""

    root: Path
    files: dict
    digest: str = "0" * 64

    def json(self, name):
        return self.files[name]

    def path(self, name):
        return self.root / name


def validated(root, ids, engines, digest="0" * 64, binds=True):
    """A validate artefact with engines {name: (logits [n, T + 1], file digest)}."""
    save_file({f"engine.{name}": logits for name, (logits, _) in engines.items()}, root / "samples.safetensors")
    results = {"engines": [{"id": name, "status": "measured"} for name in engines]}
    if binds:
        results["binds"] = {"engines": {name: own for name, (_, own) in engines.items()}}
    return Fake(root, {"validation.json": {"ids": ids}, "results.json": results}, digest)


def artifacts(root, ids, logits, calibration=("c",), certification=("d",)):
    validate = validated(root, ids, {DEPLOY: (logits, "a")})
    source = Fake(root, {"calibration.json": {"calibration_ids": calibration, "certification_ids": certification}})
    return {
        "source": source,
        "validate": validate,
        "certify": Fake(root, {"certificate.json": {"margin_median": 2.0}}),
    }


def some_logits(n=200, wrong=6, seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, 5)).astype(np.float32)
    logits[:, 0] = logits[:, 1:].max(axis=1) + rng.uniform(0.5, 3, n)
    logits[:wrong, 0] = logits[:wrong, 1:].max(axis=1) - 0.05
    return np.concatenate([logits, np.full((n, 1), -np.inf, np.float32)], axis=1)


def table(**changes):
    return Validate.model_validate({"deploy": DEPLOY, "alpha": 0.05, **changes})


def test_the_bound_counts_lost_labels_and_divides_by_the_candidates(tmp_path):
    ids = [f"v{i}" for i in range(200)]
    stated, rule = claims(artifacts(tmp_path, ids, some_logits()), table(), 4)
    own = stated["engines"][DEPLOY]
    assert (own["k"], own["n"], stated["candidates"]) == (6, 200, 4)
    assert own["upper"] == disagreement(6, 200, 0.95, 4).upper > disagreement(6, 200, 0.95).upper
    # Every lost label has a margin of 0.05, so a tau just above it loses none.
    assert rule.tau is not None and stated["rule"]["tested"][-1]["errors"] in (0, 6)
    assert stated["rule"]["engine"] == DEPLOY


def test_clusters_are_the_trials(tmp_path):
    ids = [f"film{i // 10}_frame{i % 10}" for i in range(200)]
    logits = some_logits()
    plain, _ = claims(artifacts(tmp_path, ids, logits), table(), 1)
    stated, rule = claims(artifacts(tmp_path, ids, logits), table(cluster=r"(film\d+)_"), 1)
    own = stated["engines"][DEPLOY]
    assert (own["k"], own["n"]) == (1, 20)
    assert own["upper"] == clustered(~(slack_of(logits) > 0), [name.split("_")[0] for name in ids], 0.95).upper
    assert own["upper"] > plain["engines"][DEPLOY]["upper"]
    assert all(row.n == 20 for row in rule.tested)
    assert rule.tau is None and rule.abstains == 1.0  # 20 clusters can't prove 5 %


@pytest.mark.parametrize(("pattern", "says"), [("nothing", "round brackets"), ("(", "no regular expression")])
def test_a_pattern_that_names_no_cluster_is_refused(pattern, says):
    with pytest.raises(ValueError, match=says):
        table(cluster=pattern)
    with pytest.raises(RecipeError, match="finds no group in 1 of 2 ids, b for one"):
        clusters_of(["a1", "b"], r"a(\d)")


@pytest.mark.parametrize("shared", ["calibration", "certification"])
def test_an_image_that_was_used_before_bounds_nothing(tmp_path, shared):
    with pytest.raises(StageFailed, match=f"{shared} and validation share 1 id"):
        claims(artifacts(tmp_path, ["v0", "v1"], some_logits(2, 0), **{shared: ("v1",)}), table(), 1)


def test_candidates_are_all_engines_ever_measured_on_these_images(tmp_path):
    logits, made = some_logits(4, 0), []
    for i, (ids, engines, binds) in enumerate(
        [
            (["x", "y"], {"a": (logits, "1"), "b": (logits, "2")}, True),
            (["x", "y"], {"a": (logits, "1"), "b": (logits, "3")}, True),  # one engine is the same file
            (["x", "z"], {"a": (logits, "9")}, True),  # other images
            (["x", "y"], {"a": (logits, "")}, False),  # an older version that names no files
        ]
    ):
        (folder := tmp_path / str(i)).mkdir()
        made.append(validated(folder, ids, engines, str(i) * 64, binds))
    assert candidates(made[0], []) == 2
    assert candidates(made[0], made) == 4
    assert candidates(made[2], made) == 1


def test_a_second_candidate_weakens_the_first_one_s_bundle(tmp_path, small_run):
    """The store remembers what was tried: the bound of a bundle that is written again says so."""
    store, out = tmp_path / "store", tmp_path / "bundle"
    first = mpdeploy.run(QUICKSTART, sets=SMALL, store=store, out=out)
    before = json.loads((first.bundle / "disagreement.json").read_text())
    mpdeploy.run(QUICKSTART, sets=(*SMALL, "prune.damping=[0.5]"), store=store, out=tmp_path / "other")
    again = json.loads(
        (mpdeploy.run(QUICKSTART, sets=SMALL, store=store, out=out).bundle / "disagreement.json").read_text()
    )
    assert again["candidates"] > before["candidates"]
    for name, own in again["engines"].items():
        assert own["upper"] > before["engines"][name]["upper"]


def test_the_exported_rule_runs_alone(small_run, tmp_path):
    bundle = small_run.bundle
    stated = json.loads((bundle / "disagreement.json").read_text())["rule"]
    rule = json.loads((bundle / "abstain.json").read_text())
    assert rule["tau"] == stated["tau"] and rule["engine"] == stated["engine"]
    samples = load_file(bundle / "samples.safetensors")
    program = f"import sys; sys.path.insert(0, {str(bundle)!r})\n" + (
        "import numpy as np\nfrom abstain import decide\n"
        "z = np.load(sys.argv[1])\nprint([decide(row)[1] for row in z].count(False) / len(z))"
    )
    logits = samples[f"engine.{stated['engine']}"][:, :-1]
    np.save(tmp_path / "z.npy", np.ascontiguousarray(logits))
    done = subprocess.run(
        [sys.executable, "-I", "-c", program, tmp_path / "z.npy"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(stated["abstains"] / len(logits)) == pytest.approx(rule["abstains"])
