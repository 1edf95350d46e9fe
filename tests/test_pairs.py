"""`mpdeploy certify A B`: any two networks with the same outputs, also ones that mpdeploy never made."""

import json
from functools import partial

import numpy as np
import onnx
import pytest
from conftest import QUICKSTART
from defects import layer_norm_epsilon
from onnx import TensorProto, helper, numpy_helper
from runtime_networks import SIZE, images, vit_onnx
from safetensors.numpy import load_file

import mpdeploy
from mpdeploy.certify.data_path import changed_ops
from mpdeploy.errors import RecipeError, StageFailed
from mpdeploy.runnable import open_inputs, opened


@pytest.fixture
def call(command):
    return partial(command, "certify")


@pytest.fixture
def folder(tmp_path):
    """A foreign network in fp32 and int8, and inputs."""
    for precision in ("fp32", "int8"):
        (tmp_path / f"{precision}.onnx").write_bytes(vit_onnx(precision))
    np.save(tmp_path / "inputs.npy", images(24))
    return tmp_path


def linear(path, weight, batch="batch", size=SIZE):
    """images -> Flatten -> MatMul: a file as another tool would write it."""
    nodes = [
        helper.make_node("Flatten", ["in"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["out"]),
    ]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("in", TensorProto.FLOAT, [batch, *size])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [batch, weight.shape[1]])],
        [numpy_helper.from_array(weight.astype(np.float32), "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def test_a_network_against_itself_keeps_everything(folder):
    a = str(folder / "fp32.onnx")
    pair = mpdeploy.certify_pair(a, a, data=str(folder / "inputs.npy"))
    facts = pair.facts
    assert facts["tests"] == {"pairwise": 24, "span": 24, "two_inf": 24} and facts["flipped"] == []
    assert facts["spent"]["eps_inf_max"] == 0.0
    assert 0 < facts["reference"]["eps_inf_max"] < 1e-4 and facts["reference"]["samples"] == 8
    assert facts["disagreement"]["upper"] == pytest.approx(1 - 0.05 ** (1 / 24))
    assert "top1" not in facts


def test_quantisation_spends_more_than_nothing(folder):
    names = [str(folder / f"{p}.onnx") for p in ("fp32", "int8")]
    pair = mpdeploy.certify_pair(*names, data=str(folder / "inputs.npy"), out=folder / "out", keep=4)
    assert 1e-3 < pair.facts["spent"]["eps_inf_max"] < 1.0
    saved = load_file(folder / "out" / "ledger.safetensors")
    assert saved["logits"].shape == (24, 2, 5) and saved["reference"].shape == (8, 5)
    assert json.loads((folder / "out" / "certificate.json").read_text()) == pair.facts


def test_flips_are_named_and_the_gate_counts_them(call, tmp_path):
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(int(np.prod(SIZE)), 5))
    swapped = weight[:, [1, 0, 2, 3, 4]]
    inputs = rng.normal(size=(40, *SIZE)).astype(np.float32)
    label = (inputs.reshape(40, -1) @ weight).argmax(axis=1)
    np.savez(tmp_path / "inputs.npz", inputs=inputs, labels=label)
    a, b = linear(tmp_path / "a.onnx", weight), linear(tmp_path / "b.onnx", swapped)
    code, out, err = call(a, b, "--data", tmp_path / "inputs.npz", "--json", "--min-agreement", "0.99")
    facts = json.loads(out)
    assert code == 1, err
    lost = [f"inputs.npz[{i}]" for i in np.flatnonzero(label < 2)]
    assert [row["id"] for row in facts["flipped"]] == lost and 0 < len(lost) < 40
    assert facts["top1"]["a"]["correct"] == 40 and facts["top1"]["b"]["correct"] == 40 - len(lost)
    code, out, _ = call(a, b, "--data", tmp_path / "inputs.npz")
    assert code == 0 and "pairwise: exactly those kept" in out and "top-1 of B" in out


def test_a_file_with_a_fixed_batch_is_fed_that_batch(tmp_path):
    weight = np.random.default_rng(0).normal(size=(int(np.prod(SIZE)), 5))
    a, b = linear(tmp_path / "a.onnx", weight, batch=7), linear(tmp_path / "b.onnx", weight)
    np.save(tmp_path / "inputs.npy", images(24))
    pair = mpdeploy.certify_pair(str(a), str(b), data=str(tmp_path / "inputs.npy"))
    assert pair.facts["samples"] == 24 and pair.facts["spent"]["eps_inf_max"] < 1e-3


def test_a_bundle_s_networks_and_engines(small_run):
    bundle = str(small_run.bundle)
    pair = mpdeploy.certify_pair(bundle, f"{bundle}=tuned", data=str(QUICKSTART), samples=40)
    assert pair.facts["samples"] == 40 and pair.facts["a"]["what"].endswith("dense weights")
    # The dense network's graph comes in the pruned one's channel order, or no layer would differ by what was removed.
    with opened(bundle, {}) as dense, opened(f"{bundle}=pruned", {}) as pruned:
        one, other = dense.program(), pruned.program()
    stated = json.loads((small_run.bundle / "certificate.json").read_text())["objective"]["changed"]
    removed = sum(
        float(np.square(one.constants[name].astype(float) - other.constants[name]).sum())
        for op in changed_ops(one, other)
        for name in op.inputs
        if name in other.constants and other.constants[name].ndim > 1
    )
    assert removed == pytest.approx(sum(row["frobenius"] ** 2 for row in stated), rel=1e-5)
    engine = mpdeploy.certify_pair(
        f"{bundle}/model.onnx", f"{bundle}=onnxruntime-cpu-fp32", data=str(QUICKSTART), samples=40
    )
    assert engine.facts["tests"]["pairwise"] == 40 and engine.facts["spent"]["eps_inf_max"] < 1e-4
    with pytest.raises(RecipeError, match="holds no 'nothing'"):
        mpdeploy.certify_pair(bundle, f"{bundle}=nothing", data=str(QUICKSTART))


def test_networks_by_name_and_by_recipe(call, tmp_path):
    args = [item for pair in ("img_size=28", "patch_size=4", "in_chans=1", "embed_dim=128", "depth=4", "num_heads=2",
                              "num_classes=10", "class_token=false", "global_pool=avg") for item in ("--arg", pair)]  # fmt: skip
    weights = QUICKSTART.parent / "quickstart" / "vit.safetensors"
    named = f"vit_tiny_patch16_224={weights}"
    code, _, err = call(QUICKSTART, named, "--data", QUICKSTART, "--samples", "20", "--json", *args)
    assert code == 2 and "preprocess images differently" in err  # a recipe's own overrides are not timm's defaults
    bundle = tmp_path / "preprocessing.json"
    from mpdeploy.models import load
    from mpdeploy.recipe import load_recipe

    bundle.write_text(json.dumps(load(load_recipe(QUICKSTART).recipe.source).preprocessing.to_json()))
    code, out, err = call(
        QUICKSTART, named, "--data", QUICKSTART, "--samples", "20", "--json", "--preprocessing", bundle, *args
    )
    assert code == 0, err
    facts = json.loads(out)
    assert facts["spent"]["eps_inf_max"] == 0.0 and facts["a"]["sha256"] == facts["b"]["sha256"]
    assert facts["top1"]["a"] == facts["top1"]["b"]


@pytest.mark.parametrize(
    ("a", "b", "data", "code", "says"),
    [
        ("none.onnx", "fp32.onnx", "inputs.npy", 2, "not an ONNX file that is there"),
        ("fp32.onnx", "fp32.onnx=dense", "inputs.npy", 2, "has its own weights"),
        ("fp32.onnx", "w.safetensors", "inputs.npy", 2, "holds weights and no network"),
        ("fp32.onnx", "resnet18=no.safetensors", "inputs.npy", 2, "no.safetensors"),
        ("fp32.onnx", "resnet81", "inputs.npy", 2, "resnet81"),
        ("fp32.onnx", "fp32.onnx", "no.npy", 2, "There is no file"),
        ("fp32.onnx", "fp32.onnx", "double.npy", 2, "finite float32"),
        ("fp32.onnx", "fp32.onnx", "nan.npy", 2, "finite float32"),
        ("fp32.onnx", "fp32.onnx", "bad.npz", 2, "expected integers"),
        ("fp32.onnx", "fp32.onnx", "small.npy", 5, "have to take the same input"),
        ("fp32.onnx", "five.onnx", "inputs.npy", 5, "10 classes and"),
        ("fp32.onnx", "fp32.onnx", str(QUICKSTART), 2, "doesn't say how images become its input"),
        ("fp32.onnx", "empty", "inputs.npy", 2, "is not a bundle"),
    ],
)
def test_what_does_not_fit_is_a_sentence(folder, call, a, b, data, code, says):
    linear(folder / "five.onnx", np.ones((int(np.prod(SIZE)), 5)))
    np.save(folder / "double.npy", images(2).astype(np.float64))
    np.save(folder / "nan.npy", np.full((2, *SIZE), np.nan, np.float32))
    np.save(folder / "small.npy", np.zeros((2, 3, 8, 8), np.float32))
    np.savez(folder / "bad.npz", inputs=images(3), labels=np.zeros(2, np.int64))
    (folder / "empty").mkdir()
    got, out, err = call(a, b, "--data", data)
    assert (got, out) == (code, "") and says in err, err
    assert "Traceback" not in err and "source." not in err


def test_too_few_samples_are_refused(folder):
    with pytest.raises(RecipeError, match="100 samples are asked"):
        open_inputs(str(folder / "inputs.npy"), "val", 100, 0, lambda: pytest.fail("not needed"))


def test_a_reference_with_nan_is_refused(tmp_path):
    weight = np.full((int(np.prod(SIZE)), 5), np.nan)
    a = str(linear(tmp_path / "a.onnx", weight))
    np.save(tmp_path / "inputs.npy", images(2))
    with pytest.raises(StageFailed, match="NaN or infinity"):
        mpdeploy.certify_pair(a, a, data=str(tmp_path / "inputs.npy"))


def test_an_opened_network_takes_any_number_of_images(folder):
    with opened(str(folder / "fp32.onnx"), {}) as network:
        many = network.run(np.concatenate([images(24)] * 4))
        assert many.shape == (96, 10)
        np.testing.assert_allclose(many[:24], network.run(images(24)), atol=1e-5)


def test_an_error_is_held_against_the_noise_floor(call, folder, tmp_path):
    """The same file is within; one whose LayerNorm has another epsilon keeps its labels and is beyond."""
    onnx.save(layer_norm_epsilon(onnx.load(folder / "fp32.onnx")), folder / "planted.onnx")
    code, out, err = call("fp32.onnx", "fp32.onnx", "--data", "inputs.npy", "--noise", "fp32", "--json")
    clean = json.loads(out)["noise_floor"]
    assert code == 0 and clean["verdict"] == "within" and 0.1 < clean["ratio_rms"] < 1.5, err
    code, out, err = call("fp32.onnx", "planted.onnx", "--data", "inputs.npy", "--noise", "fp32", "--json")
    facts = json.loads(out)
    assert facts["noise_floor"]["verdict"] == "beyond" and facts["tests"]["pairwise"] > 20, err


def test_proofs_of_two_foreign_files(call, tmp_path):
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(int(np.prod(SIZE)), 5))
    np.save(tmp_path / "inputs.npy", rng.normal(size=(4, *SIZE)).astype(np.float32))
    a, b = (
        linear(tmp_path / "a.onnx", weight),
        linear(tmp_path / "b.onnx", weight + 1e-4 * rng.normal(size=weight.shape)),
    )
    code, out, err = call(a, b, "--data", tmp_path / "inputs.npy", "--proofs", "3", "--ball", "1e-4", "--json")
    assert code == 0, err
    proofs = json.loads(out)["proofs"]
    assert proofs["real_arithmetic"]["certified"] == 3
    assert proofs["envelope"]["fp32"]["certified"] == 3 and proofs["ball"]["same"] == 3
    claims = {claim["name"]: claim for claim in proofs["data_path"]["claims"]}
    assert claims["ce_path"]["holds"] and claims["ce_path"]["status"] == "proved"
    assert not claims["zero_budget"]["holds"]
    code, out, _ = call(a, b, "--data", tmp_path / "inputs.npy", "--proofs", "3", "--ball", "1e-4")
    assert code == 0 and "both networks agree in real arithmetic" in out and "same label on the whole ball" in out


def test_a_foreign_operator_keeps_only_the_float64_run_away(call, tmp_path):
    """The margins are measured in ONNX Runtime; what needs our own evaluation of the graph says why it isn't there."""
    weight = np.random.default_rng(0).normal(size=(int(np.prod(SIZE)), 5)) / 100
    model = onnx.load(linear(tmp_path / "a.onnx", weight))
    (last,) = (node for node in model.graph.node if node.op_type == "MatMul")
    last.output[0] = "before"
    model.graph.node.append(helper.make_node("Sinh", ["before"], ["out"]))
    onnx.save(model, tmp_path / "foreign.onnx")
    np.save(tmp_path / "inputs.npy", images(8))
    code, out, err = call("foreign.onnx", "a.onnx", "--data", "inputs.npy", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["samples"] == 8 and facts["reference"] is None, err
    assert "Sinh" in facts["reference_why_not"]
    code, out, _ = call("foreign.onnx", "a.onnx", "--data", "inputs.npy")
    assert code == 0 and "was not run in float64" in out


@pytest.mark.parametrize("options", [("--split", "test"), ("--confidence", "2"), ("--ball", "-1"), ("--keep", "1")])
def test_senseless_options_are_usage_errors(folder, call, options):
    code, _, err = call("fp32.onnx", "fp32.onnx", "--data", "inputs.npy", *options)
    assert code == 2 and "Traceback" not in err
