"""ONNX Runtime and eager torch engines: what is built is what was asked, and the bytes that were built are what runs."""

import json
import platform
import shutil
import subprocess
import sys
import time
import types
from dataclasses import replace

import numpy as np
import onnx
import pytest
import runtime_networks as networks
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from mpdeploy import runtimes
from mpdeploy.errors import CorruptArtifact, RecipeError, StageFailed, Unavailable
from mpdeploy.runtimes import EngineRequest, build, open_engine
from mpdeploy.runtimes import onnxruntime as ort_runtime
from mpdeploy.runtimes.onnx_weights import compute_weights
from mpdeploy.runtimes.torch_eager import TorchSession

ort = pytest.importorskip("onnxruntime")


@pytest.fixture
def make(tmp_path):
    """Builds an ONNX Runtime engine of some ONNX bytes; returns its folder and manifest."""

    def make_engine(graph: bytes, precision="fp32", target="cpu", weights="sparse", batch=(1, 4, 8), name="engine"):
        path = tmp_path / "graph.onnx"
        path.write_bytes(graph)
        folder = tmp_path / name
        folder.mkdir()
        return folder, build(EngineRequest(path, "onnxruntime", target, precision, weights, batch, 1), folder)

    return make_engine


def test_importing_the_package_imports_no_runtime_library():
    heavy = ["torch", "onnx", "onnxruntime", "tensorrt_rtx", "tensorrt", "timm"]
    code = f"import sys, mpdeploy.runtimes, mpdeploy.targets, mpdeploy.doctor; print([m for m in {heavy} if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_an_fp32_engine_gives_pytorchs_logits(make):
    folder, manifest = make(networks.vit_onnx("fp32"))
    with open_engine(folder) as session:
        logits = session.run(networks.images(6))
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, networks.expected(6), atol=1e-4)
    assert np.ptp(networks.expected(6)) > 1.0  # the comparison is about logits that differ
    assert manifest == json.loads((folder / "engine.json").read_text())
    assert manifest["id"] == "onnxruntime-cpu-fp32"
    assert manifest["runnable_here"] is True
    assert manifest["read_back"]["providers"] == ["CPUExecutionProvider"]
    assert manifest["read_back"]["threads"] == 1
    assert manifest["read_back"]["inputs"] == [{"name": "images", "dtype": "float32", "shape": ["batch", 3, 32, 32]}]
    assert manifest["read_back"]["weights_stored"] == {"FLOAT": 6}  # stem, 4 in the block, head
    assert manifest["read_back"]["bytes"] == manifest["size"] == (folder / "model.onnx").stat().st_size


def test_an_int8_engine_stores_int8_weights_and_stays_near_fp32(make):
    folder, manifest = make(networks.vit_onnx("int8"), "int8")
    with open_engine(folder) as session:
        logits = session.run(networks.images(8))
    reference = networks.expected(8)
    # Six quantised layers in a row; the error has to be small beside the logits' own spread, and not zero.
    error = np.abs(logits - reference).max() / np.ptp(reference)
    assert 0 < error < 0.15
    assert manifest["read_back"]["weights_stored"] == {"INT8": 6}
    assert manifest["read_back"]["weights_computed"]["INT8"] >= 5
    assert any("of 6 weighted operators compute in int8" in note for note in manifest["notes"])
    assert manifest["size"] < 0.5 * len(networks.vit_onnx("fp32"))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_saving_at_extended_and_opening_at_all_is_bit_for_bit_a_direct_session(make, tmp_path, precision):
    folder, _ = make(networks.vit_onnx(precision), precision)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    direct = ort.InferenceSession(str(tmp_path / "graph.onnx"), options, providers=["CPUExecutionProvider"])
    with open_engine(folder) as session:
        got = session.run(networks.images(5))
    np.testing.assert_array_equal(got, direct.run(None, {"images": networks.images(5)})[0])


def test_the_saved_file_holds_no_layout_of_this_cpu_and_keeps_every_zero(make):
    folder, manifest = make(networks.vit_onnx("fp32"))
    assert not [name for name in manifest["read_back"]["operators"] if "nchwc" in name]
    zeros = sum(w.zeros for w in compute_weights(folder / "model.onnx"))
    assert zeros >= (64 * 192 + 64 * 64 + 64 * 256 + 256 * 64) // 2  # half of the block's weights
    elements = sum(w.elements for w in compute_weights(folder / "model.onnx"))
    assert manifest["read_back"]["zero_share"] == zeros / elements


def test_lost_zeros_are_refused(make, tmp_path):
    folder, _ = make(networks.vit_onnx("fp32"))
    before = compute_weights(tmp_path / "graph.onnx")
    after = compute_weights(folder / "model.onnx")
    ort_runtime.check_zeros(before, after)
    one_less = [replace(after[1], zeros=after[1].zeros - 1) if w is after[1] else w for w in after]
    with pytest.raises(StageFailed, match=r"left \d+ of \d+ zero weights; expected all of them"):
        ort_runtime.check_zeros(before, one_less)


def test_an_engine_can_be_copied_and_two_builds_write_the_same_bytes(make, tmp_path):
    first, one = make(networks.vit_onnx("fp32"), name="one")
    _, two = make(networks.vit_onnx("fp32"), name="two")
    assert one == two
    shutil.copytree(first, tmp_path / "elsewhere" / "deep")
    shutil.rmtree(first)
    with open_engine(tmp_path / "elsewhere" / "deep") as session:
        np.testing.assert_allclose(session.run(networks.images(2)), networks.expected(2), atol=1e-4)


def test_the_dense_twin_has_its_own_id_and_no_remark_on_zeros(make):
    _, sparse = make(networks.vit_onnx("fp32"), name="sparse")
    _, dense = make(networks.vit_onnx("fp32"), weights="dense", name="dense")
    assert dense["id"] == "onnxruntime-cpu-fp32.dense"
    remark = "ONNX Runtime's CPU provider has no sparse kernels: the zeros save no time here."
    assert remark in sparse["notes"]
    assert remark not in dense["notes"]


@pytest.mark.parametrize(
    ("graph", "precision", "sentence"),
    [
        ("fp32", "fp16", r"A fp16 engine was asked for, but graph.onnx has weights in FLOAT \(6\)"),
        ("fp32", "int8", r"An int8 engine was asked for, but graph.onnx has weights in FLOAT \(6\)"),
        ("int8", "fp32", r"A fp32 engine was asked for, but graph.onnx has weights in INT8 \(6\)"),
        ("fp16", "fp32", r"A fp32 engine was asked for, but graph.onnx has weights in FLOAT16 \(6\)"),
    ],
)
def test_another_precision_than_asked_is_refused(make, graph, precision, sentence):
    with pytest.raises(StageFailed, match=sentence):
        make(networks.vit_onnx(graph), precision)


def test_one_wrong_weight_among_right_ones_is_enough(make):
    mixed = networks.two_products(TensorProto.FLOAT, TensorProto.FLOAT16)
    with pytest.raises(StageFailed, match=r"FLOAT \(1\), FLOAT16 \(1\)"):
        make(mixed, "fp32")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="only there it is certain that there are no fp16 kernels")
def test_fp16_that_would_silently_compute_in_fp32_is_refused(make):
    with pytest.raises(Unavailable, match=r"no fp16 kernel for .*MatMul.* would cast the FLOAT16 weights") as caught:
        make(networks.vit_onnx("fp16"), "fp16")
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("given_providers", "asked"),
    [
        (["CPUExecutionProvider"], "CUDAExecutionProvider"),
        ([], "CPUExecutionProvider"),
        (["CUDAExecutionProvider", "TensorrtExecutionProvider"], "CUDAExecutionProvider"),
        (["AzureExecutionProvider", "CPUExecutionProvider"], "CPUExecutionProvider"),
    ],
)
def test_a_session_that_fell_back_is_refused(given_providers, asked):
    with pytest.raises(Unavailable, match=f"was asked for {asked} and gave a session on"):
        ort_runtime.check_providers(given_providers, asked)


def test_a_build_whose_session_fell_back_is_refused(make, monkeypatch):
    monkeypatch.setattr(ort.InferenceSession, "get_providers", lambda _: ["AzureExecutionProvider"])
    with pytest.raises(Unavailable, match="was asked for CPUExecutionProvider and gave a session on AzureExecution"):
        make(networks.two_products(TensorProto.FLOAT, TensorProto.FLOAT))


def test_a_session_on_the_asked_provider_passes():
    ort_runtime.check_providers(["CPUExecutionProvider"], "CPUExecutionProvider")
    ort_runtime.check_providers(["CUDAExecutionProvider", "CPUExecutionProvider"], "CUDAExecutionProvider")


@pytest.mark.skipif("CUDAExecutionProvider" in ort.get_available_providers(), reason="the provider is here")
def test_an_absent_provider_is_refused_by_name(make):
    with pytest.raises(Unavailable, match=r"has no CUDAExecutionProvider here; it has .*CPUExecutionProvider"):
        make(networks.vit_onnx("fp32"), target="cuda")


def test_an_unknown_target_is_a_mistake_in_the_recipe(make):
    with pytest.raises(RecipeError, match='no target "sm80"; its targets are cpu and cuda'):
        make(networks.vit_onnx("fp32"), target="sm80")


def test_a_file_that_is_no_graph_fails_with_its_name(make):
    with pytest.raises(StageFailed, match=r"can't load graph.onnx on CPUExecutionProvider: .*INVALID_PROTOBUF"):
        make(b"no graph at all")


def test_a_fixed_batch_must_be_the_asked_one(make):
    fixed = networks.two_products(TensorProto.FLOAT, TensorProto.FLOAT, batch=2)
    with pytest.raises(StageFailed, match=r"fixed batch of 2; the engine was asked for \(1, 4, 8\)"):
        make(fixed, name="other")
    folder, _ = make(fixed, batch=(2, 2, 2))
    with open_engine(folder) as session:
        assert session.run(np.ones((2, 4, 2, 2), np.float32)).shape == (2, 8)


def test_a_graph_without_weights_is_refused(make):
    graph = helper.make_graph(
        [helper.make_node("Relu", ["images"], ["logits"])],
        "none",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 1, 1, 1])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 1, 1, 1])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    with pytest.raises(StageFailed, match="no Conv, MatMul or Gemm with constant weights"):
        make(model.SerializeToString())


def test_the_sparsity_manifest_survives_and_its_loss_is_noted(make, tmp_path):
    folder, manifest = make(networks.vit_onnx("fp32"))
    model = onnx.load(folder / "model.onnx")
    assert {p.key: p.value for p in model.metadata_props}["mpdeploy.sparsity"] == networks.MANIFEST
    lost = "did not survive ONNX Runtime's optimiser"
    assert not any(lost in note for note in manifest["notes"])
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "stripped.onnx")
    request = EngineRequest(tmp_path / "graph.onnx", "onnxruntime", "cpu", "fp32", "sparse", (1, 4, 8), 1)
    weights = compute_weights(folder / "model.onnx")
    assert any(lost in note for note in ort_runtime._notes(request, tmp_path / "stripped.onnx", weights))


def test_one_flipped_byte_is_refused_before_anything_is_loaded(make, monkeypatch):
    folder, _ = make(networks.vit_onnx("fp32"))
    data = bytearray((folder / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "model.onnx").write_bytes(data)
    monkeypatch.setattr(ort_runtime, "_session", lambda *_, **__: pytest.fail("the damaged file was loaded"))
    with pytest.raises(CorruptArtifact, match="is not the one that was built: its SHA-256"):
        open_engine(folder)


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda m: m | {"sha256": "0" * 64}, "is not the one that was built"),
        (lambda m: m | {"schema": 2}, "not an engine manifest of schema 1"),
        (lambda m: {k: v for k, v in m.items() if k != "sha256"}, "not an engine manifest of schema 1"),
        (lambda m: [m], "not an engine manifest of schema 1"),
        (lambda m: m | {"file": "../engine/model.onnx"}, "names a runtime or a file that no engine manifest can name"),
        (lambda m: m | {"file": "gone.onnx"}, "gone.onnx is missing"),
        (lambda m: m | {"runtime": "openvino"}, "names a runtime or a file"),
    ],
)
def test_an_edited_manifest_is_refused(make, edit, sentence):
    folder, manifest = make(networks.two_products(TensorProto.FLOAT, TensorProto.FLOAT))
    (folder / "engine.json").write_text(json.dumps(edit(manifest)))
    with pytest.raises(CorruptArtifact, match=sentence):
        open_engine(folder)


def test_a_cut_manifest_and_a_missing_one_are_refused(make, tmp_path):
    folder, _ = make(networks.two_products(TensorProto.FLOAT, TensorProto.FLOAT))
    (folder / "engine.json").write_text((folder / "engine.json").read_text()[:50])
    with pytest.raises(CorruptArtifact, match="can't be read"):
        open_engine(folder)
    with pytest.raises(CorruptArtifact, match="can't be read"):
        open_engine(tmp_path)


def test_a_file_of_another_version_that_does_not_load_names_both_versions(make):
    folder, manifest = make(networks.two_products(TensorProto.FLOAT, TensorProto.FLOAT))
    (folder / "model.onnx").write_bytes(b"from the future")
    manifest["sha256"] = runtimes.sha256_of(folder / "model.onnx")
    manifest["versions"]["onnxruntime"] = "99.0.0"
    (folder / "engine.json").write_text(json.dumps(manifest))
    with pytest.raises(Unavailable, match=rf"built with ONNX Runtime 99.0.0; version {ort.__version__} here can't"):
        open_engine(folder)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 4, 2, 2), np.float64),
        np.zeros((2, 4, 2, 3), np.float32),
        np.zeros((4, 2, 2), np.float32),
        np.zeros((0, 4, 2, 2), np.float32),
    ],
)
def test_images_that_do_not_fit_are_refused(make, images):
    folder, _ = make(networks.two_products(TensorProto.FLOAT, TensorProto.FLOAT))
    with open_engine(folder) as session, pytest.raises(StageFailed, match=r"takes float32 images \[n > 0, 4, 2, 2\]"):
        session.run(images)


def test_a_closed_session_refuses(make):
    folder, _ = make(networks.two_products(TensorProto.FLOAT, TensorProto.FLOAT))
    with open_engine(folder) as session:
        pass
    with pytest.raises(StageFailed, match="is closed"):
        session.run(np.zeros((1, 4, 2, 2), np.float32))


def test_images_in_another_memory_order_give_the_same_logits(make):
    folder, _ = make(networks.vit_onnx("fp32"))
    images = networks.images(3)
    with open_engine(folder) as session:
        np.testing.assert_array_equal(session.run(np.asfortranarray(images)), session.run(images))


def test_building_over_another_engine_or_nowhere_is_refused(make, tmp_path):
    folder, _ = make(networks.two_products(TensorProto.FLOAT, TensorProto.FLOAT))
    request = EngineRequest(tmp_path / "graph.onnx", "onnxruntime", "cpu", "fp32", "sparse", (1, 4, 8), 1)
    for out in (folder, tmp_path / "nowhere"):
        with pytest.raises(StageFailed, match="an existing folder without another engine"):
            build(request, out)
    missing = EngineRequest(tmp_path / "gone.onnx", "onnxruntime", "cpu", "fp32", "sparse", (1, 4, 8), 1)
    with pytest.raises(StageFailed, match=r"no ONNX file gone.onnx"):
        build(missing, tmp_path)


def test_timing_measures_finished_calls_and_leaves_the_warm_up_out():
    made = []

    def call():
        made.append(None)
        time.sleep(0.05 if len(made) <= runtimes.WARM_UP_CALLS else 0.002)

    seconds = runtimes.seconds_per_call(call, 5)
    assert len(made) == runtimes.WARM_UP_CALLS + 5
    assert seconds.shape == (5,)
    assert seconds.dtype == np.float64
    assert (seconds >= 0.002).all()
    assert np.median(seconds) < 0.05
    with pytest.raises(StageFailed, match="at least one call, not 0"):
        runtimes.seconds_per_call(call, 0)


def test_an_engine_is_timed(make):
    folder, _ = make(networks.vit_onnx("fp32"))
    with open_engine(folder) as session:
        one, many = session.time(networks.images(1), 7), session.time(networks.images(64), 7)
    assert one.shape == many.shape == (7,)
    assert 0 < one.min() < many.min()  # 64 images take longer than one


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("runtime", "onnxrt", 'no runtime "onnxrt".*Did you mean "onnxruntime"'),
        ("runtime", "torch", "builds no engine"),
        ("precision", "fp61", 'no precision "fp61".*Did you mean "fp16"'),
        ("weights", "spares", 'no weights "spares".*Did you mean "sparse"'),
        ("batch", (4, 2, 8), "1 <= min <= opt <= max"),
        ("batch", (0, 1, 1), "1 <= min <= opt <= max"),
        ("threads", 0, "at least one thread"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(tmp_path, field, value, sentence):
    good = {"runtime": "onnxruntime", "target": "cpu", "precision": "fp32", "weights": "sparse"}
    good |= {"onnx": tmp_path, "batch": (1, 2, 4), "threads": 1}
    assert EngineRequest(**good).id == "onnxruntime-cpu-fp32"
    with pytest.raises(RecipeError, match=sentence):
        EngineRequest(**(good | {field: value}))


KINDS = {np.float32: "FLOAT", np.float16: "FLOAT16"}


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(list(KINDS)), st.lists(st.sampled_from(["Identity", "Transpose", "Cast"]), max_size=5), st.data()
)
def test_weights_are_traced_through_any_chain(tmp_path_factory, kind, chain, data):
    """What a chain stores is its first tensor, what the product computes in is the last cast on the way."""
    nodes, name, computed = [], "w", KINDS[kind]
    for index, op in enumerate(chain):
        attributes = {}
        if op == "Cast":
            computed = data.draw(st.sampled_from(["FLOAT", "FLOAT16"]))
            attributes = {"to": TensorProto.DataType.Value(computed)}
        nodes.append(helper.make_node(op, [name], [f"w{index}"], **attributes))
        name = f"w{index}"
    nodes.append(helper.make_node("MatMul", ["images", name], ["logits"]))
    weight = np.arange(9, dtype=kind).reshape(3, 3)
    graph = helper.make_graph(nodes, "chain", [], [], [numpy_helper.from_array(weight, "w")])
    path = tmp_path_factory.mktemp("chain") / "chain.onnx"
    onnx.save(helper.make_model(graph), path)
    (found,) = compute_weights(path)
    assert (found.stored, found.computed, found.elements, found.zeros) == (KINDS[kind], computed, 9, 1)


def test_eager_torch_is_the_module_itself():
    import torch

    with TorchSession(networks.vit()) as session:
        np.testing.assert_array_equal(session.run(networks.images(4)), networks.expected(4))
        assert session.time(networks.images(1), 3).shape == (3,)
        assert (session.time(networks.images(1), 3) > 0).all()
        assert torch.is_grad_enabled()
    with pytest.raises(StageFailed, match="is closed"):
        session.run(networks.images(1))


def test_probes_name_versions_and_device():
    found = runtimes.probe("onnxruntime")
    assert found.available
    assert found.identity["onnxruntime"] == ort.__version__
    assert "CPUExecutionProvider" in found.identity["providers"]
    assert runtimes.probe("torch").identity["torch"]
    with pytest.raises(RecipeError, match=r'no runtime "tensort".*Did you mean "tensorrt"'):
        runtimes.probe("tensort")


def test_a_probe_survives_missing_ruined_and_exploding_libraries(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    gone = runtimes.probe("onnxruntime")
    assert (gone.available, gone.hint) == (False, "pip install 'mpdeploy[cpu]'")
    assert "can't be imported" in gone.why_not
    monkeypatch.setitem(sys.modules, "onnxruntime", types.ModuleType("onnxruntime"))
    ruin = runtimes.probe("onnxruntime")
    assert not ruin.available
    assert "a ruin" in ruin.why_not
    monkeypatch.setattr(ort_runtime, "probe", lambda _: 1 / 0)
    exploded = runtimes.probe("onnxruntime")
    assert not exploded.available
    assert "ZeroDivisionError" in exploded.why_not


def test_the_gpu_is_read_from_the_driver_and_the_library_is_shut_down(monkeypatch):
    class NVMLError(Exception):
        pass

    calls = []
    nvml = types.SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: calls.append("init"),
        nvmlShutdown=lambda: calls.append("shutdown"),
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetCudaComputeCapability=lambda handle: (8, 6),
        nvmlDeviceGetMemoryInfo=lambda handle: types.SimpleNamespace(total=48 * 10**9),
        nvmlDeviceGetName=lambda handle: b"NVIDIA A40",
        nvmlSystemGetDriverVersion=lambda: "580.10",
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert runtimes.find_gpu() == runtimes.Gpu("NVIDIA A40", (8, 6), 48 * 10**9, "580.10")
    assert runtimes.find_gpu().sm == "sm86"
    assert calls == ["init", "shutdown"] * 2

    def no_driver():
        raise NVMLError

    nvml.nvmlInit = no_driver
    assert runtimes.find_gpu() is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert runtimes.find_gpu() is None
