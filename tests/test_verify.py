"""verify.py against honest bundles, against lies, and against random bytes.

Every branch of it is taken:

    python -m coverage run --branch --include="*/mpdeploy/verify.py" -m pytest -n 0 tests/test_verify.py
    python -m coverage report -m
"""

import ast
import contextlib
import copy
import importlib
import json
import math
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from forgeries.bundle import CLASSES, CPU, GATES, Draft, annotate, embedded, in_order, make_draft, make_onnx, reseal
from forgeries.lies import LIES
from forgeries.networks import anywhere, mixed
from forgeries.registry import certificate, drop_gates, fail_a_gate, findings_of, latency, samples, weights
from forgeries.release import a_chain_hashed_anew
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save
from scipy.stats import beta, binomtest

from mpdeploy.verify import Finding, Unreadable, Verdict, overall, verify

module = importlib.import_module("mpdeploy.verify")  # the package gives the function of that name
HOLDS, REFUTED, UNCHECKED = Verdict.HOLDS, Verdict.REFUTED, Verdict.UNCHECKED
QUICK = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="session")
def base() -> Draft:
    return make_draft()


@pytest.fixture
def draft() -> Draft:
    return make_draft()


@pytest.fixture(autouse=True, scope="session")
def resample_once():
    """Resample equal times once per session: most lies are about something else."""
    known = {}
    whole = module.ratio_interval

    def once(own, twin, blocks, confidence):
        key = (own.tobytes(), twin.tobytes(), repr(blocks), confidence)
        if key not in known:
            known[key] = whole(own, twin, blocks, confidence)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ratio_interval", once)
        yield


def said(findings, claim):
    return [finding for finding in findings if finding.claim == claim]


def show(findings):
    return "\n".join(f"{f.verdict} {f.claim}: {f.reason}" for f in findings if f.verdict is not HOLDS)


# ------------------------------------------------------------------------------------------------------------- honest


@pytest.mark.parametrize("keep", [2, 4, 11, 12, 16])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_an_honest_bundle_holds(seed, keep, tmp_path):
    findings = verify_draft(make_draft(seed, keep), tmp_path)
    assert overall(findings) is HOLDS, show(findings)
    claims = {f.claim for f in findings}
    assert {"files", "ledger", f"engine:{CPU}", f"latency:{CPU}", "gate:min_speedup"} <= claims
    assert {"objective", "zero_budget", "disagreement", f"noise:{CPU}"} <= claims


def test_what_is_not_claimed_is_not_missed(draft, tmp_path):
    del certificate(draft)["objective"], certificate(draft)["zero_budget"]
    draft.ask("validate", noise=0)
    draft.engine()["noise_floor"] = draft.json["results.json"]["export_noise"] = None
    for column in ("sigma", "error"):
        del samples(draft)[f"engine.{CPU}.{column}"], samples(draft)[f"onnx.{column}"]
    drop_gates(draft, "max_noise")
    draft.rebind()
    findings = verify_draft(draft, tmp_path)
    assert overall(findings) is HOLDS, show(findings)
    assert not {"objective", "zero_budget", "noise:onnx", f"noise:{CPU}"} & {f.claim for f in findings}


def test_a_ledger_without_a_reference_or_a_rule_holds(draft, tmp_path):
    draft.ask("certify", reference=0)
    draft.rederive()
    draft.json["disagreement.json"]["rule"] = None
    findings = verify_draft(draft, tmp_path)
    assert overall(findings) is HOLDS, show(findings)
    assert "no rule" in said(findings, "disagreement")[0].reason


def test_images_in_clusters_are_counted_by_cluster(draft, tmp_path):
    draft.json["calibration.json"]["validation_ids"] = [f"val/{i // 2}/{i % 2}" for i in range(120)]
    draft.ask("validate", cluster="val/([0-9]+)/")
    draft.rederive()
    findings = verify_draft(draft, tmp_path)
    assert overall(findings) is HOLDS, show(findings)
    assert draft.json["disagreement.json"]["engines"][CPU]["n"] == 60


def test_every_margin_is_tested_where_all_are_rejected(draft, tmp_path):
    draft.full["samples"][f"engine.{CPU}"] = draft.full["samples"]["dense"].copy()
    draft.rederive()
    rule = draft.json["disagreement.json"]["rule"]
    assert rule["tau"] == 0.0 and len(rule["tested"]) == 22
    findings = verify_draft(draft, tmp_path)
    assert overall(findings) is HOLDS, show(findings)


def test_an_engine_of_endless_noise_is_told_from_a_lie(draft, tmp_path):
    samples(draft)[f"engine.{CPU}.error"][0] = np.inf
    draft.rederive()
    findings = verify_draft(draft, tmp_path)
    assert said(findings, f"noise:{CPU}")[0].verdict is HOLDS
    assert said(findings, "verdict")[0].verdict is HOLDS
    assert overall(findings) is REFUTED


def test_a_rule_that_never_lets_an_engine_decide_holds(draft, tmp_path):
    draft.full["samples"][f"engine.{CPU}"][:30] *= -40
    draft.rederive()
    assert draft.json["disagreement.json"]["rule"]["tau"] is None
    assert said(verify_draft(draft, tmp_path), "disagreement")[0].verdict is HOLDS


@pytest.mark.parametrize("keep", [4, 16])
def test_nan_in_a_stage_is_told_from_a_lie(keep, tmp_path):
    draft = make_draft(keep=keep)
    draft.full["ledger"]["pruned"][0] = np.nan
    draft.full["ledger"]["tuned"][1, 3] = np.inf
    draft.full["ledger"]["tuned"][2, 5] = -np.inf
    draft.full["samples"]["onnx"][3] = np.nan
    draft.rederive()
    findings = verify_draft(draft, tmp_path)
    assert overall(findings) is HOLDS, show(findings)
    assert certificate(draft)["spent"][0]["eps_inf_max"] is None
    assert certificate(draft)["counts"]["flipped"] >= 2


def test_a_reference_that_ties_has_no_share(draft, tmp_path):
    draft.full["ledger"]["exact"][0] = [5.0, 5.0, *[0.0] * (CLASSES - 2)]
    draft.full["ledger"]["dense"][0] = [5.0, 4.5, *[0.0] * (CLASSES - 2)]
    draft.rederive()
    assert certificate(draft)["reference"]["share_max"] is None
    assert said(verify_draft(draft, tmp_path), "ledger")[0].verdict is HOLDS


def test_a_permutation_in_the_manifest_is_undone(draft, tmp_path):
    """Within groups of four, so that the pattern stays."""
    order = [1, 0, 3, 2, 4, 5, 7, 6]
    for file, kind in (("model.onnx", np.float32), ("model.fp16.onnx", np.float16)):
        draft.set_constant("val_0", weights(draft, "tuned")["fc.weight"][:, order].T.astype(kind), file)
        draft.restate(lambda m: m["weights"][1].update(permutation=order), file)
    draft.onnx[f"engines/{CPU}/model.onnx"] = draft.onnx["model.onnx"]
    draft.rebind()
    findings = verify_draft(draft, tmp_path)
    assert overall(findings) is HOLDS, show(findings)


def test_mixed_and_unstructured_recipes_hold(draft, tmp_path):
    mixed(draft)
    findings = verify_draft(draft, tmp_path)
    assert overall(findings) is HOLDS, show(findings)
    assert said(findings, "allocation")[0].verdict is HOLDS
    draft = make_draft()
    anywhere(draft, 0.5)
    draft.rebind()
    findings = verify_draft(draft, tmp_path / "anywhere")
    assert overall(findings) is HOLDS, show(findings)
    assert "stated zeros, which lie anywhere" in said(findings, "weights")[0].reason


def dense_for(draft, name, **row):
    """Leave a pruned layer dense, in layers, weights and graphs, as an honest producer would."""
    dense = in_order(weights(draft, "dense"))
    for stage in ("pruned", "tuned"):
        behind = ["norm.running_mean", "norm.running_var"] if name == "mix" else []
        for key in (f"{name}.weight", f"{name}.bias", *behind):
            if key in dense:
                weights(draft, stage)[key] = dense[key].copy()
    draft.json["layers.json"] = [
        {**layer, "pattern": "", "reason": "for a reason", "density": None, **row} if layer["name"] == name else layer
        for layer in draft.json["layers.json"]
    ]
    for file, kind in (("model.onnx", np.float32), ("model.fp16.onnx", np.float16)):
        draft.onnx[file] = make_onnx(weights(draft, "tuned"), kind)
        annotate(draft.onnx[file])
        at = next(i for i, entry in enumerate(embedded(draft.onnx[file])["weights"]) if entry["layer"] == name)
        draft.restate(lambda m, at=at: m["dense"].append({**m["weights"].pop(at), "reason": "for a reason"}), file)
    draft.rederive()


def skipped(draft):
    draft.ask("prune", skip=["f*"])


def test_a_layer_that_the_recipe_skips_stays_dense(draft, tmp_path):
    dense_for(draft, "fc")
    skipped(draft)
    draft.rederive()
    findings = verify_draft(draft, tmp_path)
    assert overall(findings) is HOLDS, show(findings)
    assert "1 of 4 layers" in said(findings, "layers")[0].reason


def test_a_convolution_in_groups_stays_dense(draft, tmp_path):
    dense_for(draft, "mix", groups=2)
    for file in draft.onnx:
        node = next(node for node in draft.onnx[file].graph.node if node.name == "node_mix")
        node.attribute.append(helper.make_attribute("group", 2))
    draft.rederive()
    findings = verify_draft(draft, tmp_path)
    assert overall(findings) is HOLDS, show(findings)


def test_a_weight_that_two_layers_share_may_stay_dense(draft, tmp_path):
    dense_for(draft, "fc")
    for stage in ("dense", "pruned", "tuned"):
        weights(draft, stage)["other.weight"] = weights(draft, stage)["fc.weight"].copy()
    finding = said(verify_draft(draft, tmp_path), "layers")[0]
    assert finding.verdict is REFUTED, "the copy is not in the order of channels that fc has"
    order = next(row for row in draft.json["orders.json"]["folded"] if row["coupling"]["name"] == "mix -> fc")
    order["coupling"]["consumers"].append({"tensor": "other.weight", "axis": 1, "start": 0})
    draft.rebind()
    finding = said(verify_draft(draft, tmp_path / "again"), "layers")[0]
    assert finding.verdict is UNCHECKED and "multiplies by other.weight" in finding.reason, finding


def test_a_layer_without_a_stored_weight_may_stay_dense(draft, tmp_path):
    row = {**draft.json["layers.json"][3], "name": "computed", "positions": 1}
    draft.json["layers.json"].insert(3, row)
    finding = said(verify_draft(draft, tmp_path), "layers")[0]
    assert finding.verdict is HOLDS, finding


def test_a_layer_that_no_pattern_fits_may_stay_dense(draft, tmp_path):
    for stage in ("dense", "pruned", "tuned"):
        weights(draft, stage)["odd.weight"] = np.ones((4, 6), np.float32)
    draft.json["layers.json"].append({**draft.json["layers.json"][3], "name": "odd", "shape": [4, 6]})
    draft.rebind()
    finding = said(verify_draft(draft, tmp_path), "layers")[0]
    assert finding.verdict is HOLDS, finding


def test_reconstruction_may_change_what_lies_in_a_block(draft, tmp_path):
    weights(draft, "pruned")["norm.bias"][0] += 1
    weights(draft, "pruned")["head.weight"][0] += 1
    draft.ask("prune", reconstruct=10)
    draft.rebind()
    assert said(verify_draft(draft, tmp_path), "layers")[0].verdict is HOLDS


def test_nothing_tuned_is_the_pruned_network(draft, tmp_path):
    draft.ask("tune", epochs=0)
    draft.tensors["weights/tuned.safetensors"] = copy.deepcopy(weights(draft, "pruned"))
    for file, kind in (("model.onnx", np.float32), ("model.fp16.onnx", np.float16)):
        draft.onnx[file] = make_onnx(weights(draft, "tuned"), kind)
        annotate(draft.onnx[file])
    draft.json["sparsity.json"] = annotate(draft.onnx["model.onnx"])
    draft.rederive()
    findings = verify_draft(draft, tmp_path)
    assert overall(findings) is HOLDS, show(findings)


def verify_draft(draft, root, expect=None):
    root.mkdir(exist_ok=True)
    draft.write(root / "bundle")
    return verify(root / "bundle", expect)


def test_the_reasons_say_what_was_compared(draft, tmp_path):
    findings = {finding.claim: finding.reason for finding in verify_draft(draft, tmp_path)}
    assert findings["weights"].startswith("2 layers hold their pattern")
    assert "4 weights, 1 of them with a BatchNorm folded in" in findings["export:model.onnx"]
    assert "40 samples: 36 certified" in findings["ledger"]
    assert all(reason.endswith(".") and len(reason) > 20 for reason in findings.values())


def test_a_half_precision_export_alone_is_enough_for_the_graphs(draft, tmp_path):
    for name in ("model.onnx", "dense.onnx"):
        del draft.onnx[name]
    draft.json["sparsity.json"] = embedded(draft.onnx["model.fp16.onnx"])
    draft.rebind()
    findings = verify_draft(draft, tmp_path)
    assert {f.claim for f in findings if f.verdict is not HOLDS} == {"engines"}, show(findings)
    assert "built from another model.onnx" in said(findings, "engines")[0].reason


def test_an_override_on_record_is_named(draft, tmp_path):
    draft.ask("gates", min_agreement=0.25)
    draft.rederive()
    findings = verify_draft(draft, tmp_path)
    assert overall(findings) is HOLDS, show(findings)
    assert "overridden when it was run: gates.min_agreement=0.25" in said(findings, "policy")[0].reason


def test_an_engine_with_nan_is_told_from_a_lie(draft, tmp_path):
    draft.full["samples"][f"engine.{CPU}"][0] = np.nan
    draft.rederive()
    findings = verify_draft(draft, tmp_path)
    assert said(findings, f"engine:{CPU}")[0].verdict is HOLDS
    assert said(findings, "verdict")[0].verdict is HOLDS
    assert said(findings, "gate:finite")[0].verdict is REFUTED
    assert overall(findings) is REFUTED


def test_a_tie_in_the_dense_logits_has_no_share(draft, tmp_path):
    for arrays in draft.full.values():
        arrays["dense"][0] = [1, 1, *[0] * (CLASSES - 2)]
    draft.rederive()
    findings = verify_draft(draft, tmp_path)
    assert [f.verdict for f in findings if f.claim in ("ledger", f"engine:{CPU}")] == [HOLDS, HOLDS], show(findings)


def test_nothing_but_ties_has_no_share_at_all(draft, tmp_path):
    draft.full["ledger"]["dense"][:] = 1.0
    draft.rederive()
    assert draft.json["certificate.json"]["spent"][0]["share_median"] is None
    assert said(verify_draft(draft, tmp_path), "ledger")[0].verdict is HOLDS


@pytest.mark.parametrize(
    ("speed", "noise", "word"), [(0.5, 0.01, "slower"), (1.0, 1e-4, "same"), (1.0, 0.5, "inconclusive")]
)
def test_every_verdict_on_speed_is_reached(speed, noise, word, draft, tmp_path):
    twin = samples(draft)[f"latency.{CPU}.dense"]
    samples(draft)[f"latency.{CPU}"] = twin / speed * np.random.default_rng(1).lognormal(sigma=noise, size=twin.size)
    draft.rederive()
    assert latency(draft)["verdict"] == word
    assert said(verify_draft(draft, tmp_path), f"latency:{CPU}")[0].verdict is HOLDS


def test_a_cut_up_projection_is_found_in_the_stored_one(draft, tmp_path):
    """A fused query-key-value weight is exported in parts, under no torch name."""
    for stage in ("dense", "pruned", "tuned"):
        state = weights(draft, stage)
        state["qkv.in_proj_weight"] = np.concatenate([state["head.weight"] + 1, state.pop("head.weight")])
        state["flat"] = np.zeros(16, np.float32)
    draft.json["layers.json"].pop()
    for file in ("model.onnx", "model.fp16.onnx"):
        draft.restate(lambda m: m["dense"][1].update(layer="", reason="not in the table of layers"), file)
    draft.onnx[f"engines/{CPU}/model.onnx"] = draft.onnx["model.onnx"]
    draft.rederive()
    findings = verify_draft(draft, tmp_path)
    assert overall(findings) is HOLDS, show(findings)


# --------------------------------------------------------------------------------------------------------------- lies


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.name)
def test_every_lie_is_refused_for_the_right_reason(lie, tmp_path):
    lie.tell(tmp_path / "bundle")
    findings = findings_of(module, tmp_path / "bundle", lie)
    found = said(findings, lie.claim)
    assert found, f"no finding about {lie.claim}:\n{show(findings)}"
    assert found[0].verdict == lie.verdict, found
    assert re.search(lie.word, found[0].reason), found
    assert overall(findings) is not HOLDS
    if not lie.on_disk:
        assert said(findings, "files")[0].verdict is HOLDS, "this lie is to be caught by its content, not by a digest"


def test_there_are_many_lies_and_no_two_are_one():
    assert len(LIES) >= 350
    assert len({lie.name for lie in LIES}) == len(LIES)


def test_a_chain_hashed_anew_is_caught_by_the_expected_digest_alone(draft, tmp_path):
    honest = draft.write(tmp_path / "honest")
    assert honest == draft.digest()
    a_chain_hashed_anew(draft)
    assert draft.write(tmp_path / "forged") != honest
    assert overall(verify(tmp_path / "forged")) is HOLDS, "nothing in it disagrees: that is the point of --expect"
    findings = verify(tmp_path / "forged", honest)
    assert [f.claim for f in findings if f.verdict is not HOLDS] == ["digest"]
    assert overall(verify(tmp_path / "honest", f"SHA256:{honest.upper()}".lower())) is HOLDS


# ------------------------------------------------------------------------------------------------------------ overall


def test_nothing_found_is_unchecked():
    assert overall([]) is UNCHECKED
    assert overall([Finding("files", HOLDS, "x")]) is UNCHECKED


@pytest.mark.parametrize("left_out", sorted(module.REQUIRED | module.REQUIRED_KINDS))
def test_every_required_claim_is_required(left_out, base, tmp_path):
    findings = verify_draft(base, tmp_path)
    assert overall([f for f in findings if f.claim.partition(":")[0] != left_out]) is UNCHECKED
    worse = [f if f.claim.partition(":")[0] != left_out else Finding(f.claim, REFUTED, "x") for f in findings]
    assert overall(worse) is REFUTED


# -------------------------------------------------------------------------------------------------------- statistics


@given(st.integers(1, 400), st.data(), st.sampled_from([0.8, 0.95, 0.999]))
@QUICK
def test_clopper_pearson_is_scipys_by_another_route(n, data, confidence):
    k = data.draw(st.integers(0, n))
    low, high = module.clopper_pearson(k, n, confidence)
    tail = (1 - confidence) / 2
    assert low == pytest.approx(beta.ppf(tail, k, n - k + 1) if k else 0.0, rel=1e-9, abs=1e-12)
    assert high == pytest.approx(beta.ppf(1 - tail, k + 1, n - k) if k < n else 1.0, rel=1e-9, abs=1e-12)


def test_clopper_pearson_at_the_size_of_imagenet():
    for k in (250, 42_000):
        low, high = module.clopper_pearson(k, 50_000, 0.95)
        expected = binomtest(k, 50_000).proportion_ci(0.95, "exact")
        assert (low, high) == pytest.approx((expected.low, expected.high), rel=1e-7, abs=1e-12)


@given(st.integers(0, 300), st.integers(0, 300))
@QUICK
def test_mcnemar_is_a_two_sided_sign_test(b, c):
    expected = binomtest(b, b + c).pvalue if b + c else 1.0
    assert module.mcnemar(b, c) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("stated", "own"), [(float("nan"), 1.0), (None, 1.0), (1.0, float("nan")), ("1", 1.0), (True, 1)]
)
def test_what_is_no_number_never_equals_one(stated, own):
    assert not module.same(stated, own)


def test_none_stands_for_what_is_not_finite():
    assert module.same(None, math.inf)
    assert module.same(None, None)


# ------------------------------------------------------------------------------------------------------------ readers

NESTED = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


def only_unreadable(read, data):
    """Run a reader; any other error than its own fails the test."""
    with contextlib.suppress(Unreadable):
        return read(data)
    return None


@given(st.binary(max_size=300) | st.text(alphabet='{}[]",:0123456789.eE-+aNInfity \\u', max_size=200).map(str.encode))
@QUICK
def test_the_json_reader_survives_anything(data):
    only_unreadable(lambda d: module.parse_json(d, "x"), data)


@given(NESTED)
@QUICK
def test_the_json_reader_reads_what_strict_json_writes(value):
    try:
        text = json.dumps(value, allow_nan=False)
    except ValueError:
        text = json.dumps(value)
        with pytest.raises(Unreadable, match="not strict JSON"):
            module.parse_json(text.encode(), "x")
        return
    assert module.parse_json(text.encode(), "x") == value


HEADERS = st.dictionaries(
    st.text(max_size=3),
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "U8", "I64", "F16", "BOOL", "??"]) | NESTED,
            "shape": st.lists(st.integers(-1, 5) | st.integers(), max_size=9) | NESTED,
            "data_offsets": st.tuples(st.integers(0, 40), st.integers(0, 40)).map(list) | NESTED,
        }
    )
    | NESTED,
    max_size=3,
)


@given(st.binary(max_size=100) | st.tuples(HEADERS, st.binary(max_size=40)))
@QUICK
def test_the_tensor_reader_survives_anything(case):
    if isinstance(case, tuple):
        header = json.dumps(case[0]).encode()
        case = len(header).to_bytes(8, "little") + header + case[1]
    only_unreadable(lambda d: module.parse_safetensors(memoryview(d), "x"), case)


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=4).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from([np.float32, np.float64, np.float16, np.int64, np.uint8, np.int8, np.bool_]),
                  st.lists(st.integers(0, 3), max_size=3)),
        max_size=4,
    )
)  # fmt: skip
@QUICK
def test_the_tensor_reader_reads_what_safetensors_writes(kinds):
    rng = np.random.default_rng(0)
    tensors = {name: rng.integers(0, 2, shape).astype(kind) for name, (kind, shape) in kinds.items()}
    read = module.parse_safetensors(memoryview(save(tensors, {"made": "up"})), "x")
    assert read.keys() == tensors.keys()
    for name, array in tensors.items():
        assert np.array_equal(read[name], array)
        assert read[name].shape == array.shape


@given(st.binary(max_size=200))
@QUICK
def test_the_graph_reader_survives_random_bytes(data):
    only_unreadable(lambda d: module.parse_onnx(memoryview(d)), data)


@given(st.data())
@settings(QUICK, max_examples=300)
def test_the_graph_reader_survives_a_few_changed_bytes(base, data):
    """Nearly valid files reach much further into the reader than noise does."""
    image = bytearray(base.onnx["model.onnx"].SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        image[data.draw(st.integers(0, len(image) - 1))] = data.draw(st.integers(0, 255))
    graph = only_unreadable(
        lambda d: module.parse_onnx(memoryview(d)), bytes(image[: data.draw(st.integers(0, len(image)))])
    )
    if graph is not None:
        assert all(name for name in graph.constants)


def test_the_graph_reader_reads_what_onnx_writes():
    rng = np.random.default_rng(0)
    arrays = {
        "raw": rng.normal(size=(2, 3)).astype(np.float32),
        "none": np.zeros((0, 3), np.float32),
        "scalar": np.array(3.5, np.float64),
        "truth": np.array([True, False]),
        "signed": np.array([-3, 5], np.int64),
    }
    tensors = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    typed = {
        "float": (TensorProto.FLOAT, [1.5, -2.0], np.float32),
        "double": (TensorProto.DOUBLE, [1.5, -2.0], np.float64),
        "half": (TensorProto.FLOAT16, [1.5, -2.0], np.float16),
        "int8": (TensorProto.INT8, [-3, 4], np.int8),
        "int32": (TensorProto.INT32, [-3, 4], np.int32),
        "int64": (TensorProto.INT64, [-3, 4], np.int64),
        "uint64": (TensorProto.UINT64, [3, 4], np.uint64),
    }
    for name, (kind, values, dtype) in typed.items():
        tensors.append(helper.make_tensor(name, kind, [2], np.array(values, dtype)))
        arrays[name] = np.array(values, dtype)
    nodes = [
        helper.make_node("Constant", [], ["constant"], value=numpy_helper.from_array(np.eye(2, dtype=np.float32), "")),
        helper.make_node("Constant", [], ["small"], value_float=2.0),
        helper.make_node("Gemm", ["x", "raw", ""], ["y"], name="g", transB=1, alpha=0.5),
        helper.make_node("Transpose", ["y"], ["z"], name="t", perm=[1, 0]),
    ]
    graph = helper.make_graph(nodes, "g", [], [], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("other", 3), helper.make_opsetid("", 21)])
    helper.set_model_props(model, {"a": "b"})
    read = module.parse_onnx(memoryview(model.SerializeToString()))
    assert (read.opset, read.metadata, read.unread) == (21, {"a": "b"}, "")
    assert np.array_equal(read.constants["constant"], np.eye(2))
    for name, array in arrays.items():
        assert read.constants[name].dtype == array.dtype, name
        assert np.array_equal(read.constants[name], array), name
    assert [node.op for node in read.nodes] == ["Constant", "Constant", "Gemm", "Transpose"]
    assert read.nodes[2].numbers["transB"] == [1]
    assert read.nodes[3].numbers["perm"] == [1, 0]


def test_weights_are_found_through_casts_and_transposes():
    weight = numpy_helper.from_array(np.ones((4, 8), np.float32), "w")
    turned = [
        helper.make_node("Transpose", ["w"], ["a"]),
        helper.make_node("Cast", ["a"], ["b"], to=1),
        helper.make_node("MatMul", ["x", "b"], ["y"], name="m"),
        helper.make_node("MatMul", ["x", "x"], ["not a weight"]),
        helper.make_node("MatMul", ["x", "circle"], ["z"]),
        helper.make_node("Identity", ["circle2"], ["circle"]),
        helper.make_node("Identity", ["circle"], ["circle2"]),
        helper.make_node("Gemm", ["x", "w"], ["unnamed"]),
    ]
    model = helper.make_model(helper.make_graph(turned, "g", [], [], [weight]))
    uses = module.weight_uses(module.parse_onnx(memoryview(model.SerializeToString())))
    assert [(use.constant, use.node, use.axis) for use in uses] == [("w", "m", 1), ("w", "unnamed", 0)]


def test_an_unreadable_file_is_unreadable(tmp_path):
    with pytest.raises(Unreadable, match="can't be read"):
        module.map_file(tmp_path / "gone")


# ------------------------------------------------------------------------------------------------- never a traceback

WHERE = ["layers.json", "certificate.json", "results.json", "verdict.json", "recipe.lock.json", "calibration.json"]
WHERE += ["sparsity.json", "export.json", f"engines/{CPU}/engine.json", "orders.json", "disagreement.json"]


def paths(value, at=()):
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths(inner, (*at, key))


@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_value_anywhere_gives_a_finding_and_never_an_error(base, tmp_path_factory, data):
    name = data.draw(st.sampled_from(WHERE))
    value = copy.deepcopy(base.json[name])
    *path, last = data.draw(st.sampled_from([p for p in paths(value) if p]))
    inner = value
    for key in path:
        inner = inner[key]
    junk = st.sampled_from([None, -1, 0, 1e300, 10**400, "", "x", [], {}, True, [None], {"a": 1}])
    inner[last] = data.draw(junk)
    root = tmp_path_factory.mktemp("junk")
    Draft({**base.json, name: value}, base.tensors, base.onnx, base.raw).write(root)
    findings = verify(root)
    assert overall(findings) in list(Verdict)
    assert all(finding.reason for finding in findings)


# ------------------------------------------------------------------------------------------------------ runs by itself


def test_it_imports_only_the_standard_library_and_numpy():
    tree = ast.parse(Path(module.__file__).read_text())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names.add(str(node.module))
    assert {name.partition(".")[0] for name in names} <= set(sys.stdlib_module_names) | {"numpy"}


@pytest.fixture
def alone(tmp_path):
    """A copy of the one file, far from the package."""
    script = tmp_path / "verify.py"
    script.write_bytes(Path(module.__file__).read_bytes())

    def run(*arguments):
        command = [sys.executable, "-I", str(script), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False)

    return run


def test_it_runs_alone(alone, draft, tmp_path):
    digest = draft.write(tmp_path / "good")
    done = alone("good", "--expect", digest, "--json")
    answer = json.loads(done.stdout)
    assert (done.returncode, answer["verdict"], answer["digest"]) == (0, "holds", digest)
    assert {"claim", "verdict", "reason"} == answer["findings"][0].keys()


def test_its_exit_status_tells_the_four_outcomes_apart(draft, tmp_path, capsys):
    draft.write(tmp_path / "good")
    assert module.main([str(tmp_path / "good")]) == 0
    assert module.main([str(tmp_path / "good"), "--expect", "0" * 64]) == 1
    fail_a_gate(draft)
    draft.write(tmp_path / "failed")
    assert module.main([str(tmp_path / "failed")]) == 1
    assert "refuted    gate:min_agreement" in capsys.readouterr().out
    (tmp_path / "good" / "verdict.json").unlink()
    reseal(tmp_path / "good")
    assert module.main([str(tmp_path / "good"), "--json"]) == 4
    assert module.main([str(tmp_path / "nowhere")]) == 5
    assert "is not a bundle" in capsys.readouterr().err


def test_it_is_a_script(draft, tmp_path, monkeypatch, capsys):
    draft.write(tmp_path / "good")
    monkeypatch.setattr(sys, "argv", ["verify.py", str(tmp_path / "good")])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(module.__file__, run_name="__main__")
    assert end.value.code == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("holds: bundle ")


def test_the_gates_are_the_producers(base):
    from mpdeploy.recipe import Gates

    assert set(module.GATES) == set(Gates.model_fields), (
        "a gate that verify.py does not know is never more than unchecked"
    )
    assert set(GATES) == set(module.GATES)


def test_the_defaults_are_the_producers():
    from mpdeploy.recipe import Recipe

    for (table, key), default in module.DEFAULTS.items():
        fields = {field.alias or name: field for name, field in Recipe.model_fields.items()}
        own = fields[table].annotation.model_fields[key].default
        assert (list(own) if isinstance(own, tuple) else own) == default, (table, key)
