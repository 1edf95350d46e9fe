"""TensorRT-RTX engines really built on the CPU through the code that drives TensorRT, and what must be refused."""

import json
import sys
import types

import numpy as np
import onnx
import pytest
import runtime_networks as networks
from onnx import TensorProto, helper

from mpdeploy import runtimes
from mpdeploy.errors import CorruptArtifact, RecipeError, StageFailed, Unavailable
from mpdeploy.runtimes import EngineRequest, Gpu, build, open_engine
from mpdeploy.runtimes import tensorrt as module
from mpdeploy.runtimes.tensorrt_log import log_facts

rtx = pytest.importorskip("tensorrt_rtx")

A100 = Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 80 * 10**9, "580.10")
A40 = Gpu("NVIDIA A40", (8, 6), 48 * 10**9, "580.10")
HALF, FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(module, "find_gpu", lambda: None)


@pytest.fixture
def make(tmp_path):
    def make_engine(
        graph, precision="fp16", target="sm80", weights="sparse", batch=(1, 4, 8), name="engine", runtime="tensorrt_rtx"
    ):
        path = tmp_path / "graph.onnx"
        path.write_bytes(graph)
        folder = tmp_path / name
        folder.mkdir()
        return folder, build(EngineRequest(path, runtime, target, precision, weights, batch, 1), folder)

    return make_engine


def weighted_nodes(graph: bytes) -> int:
    """Convolutions and products with a constant operand, counted in the ONNX file without mpdeploy."""
    model = onnx.load_from_string(graph).graph
    constants = {tensor.name for tensor in model.initializer}
    return sum(node.op_type in {"Conv", "MatMul", "Gemm"} and bool({*node.input} & constants) for node in model.node)


@pytest.mark.parametrize("target", ["sm80", "sm86"])
def test_a_vit_is_built_ahead_of_time_and_read_back(make, no_gpu, target):
    folder, manifest = make(networks.vit_onnx("fp16"), target=target, batch=(1, 3, 5))
    back = manifest["read_back"]
    assert manifest["id"] == f"tensorrt_rtx-{target}-fp16"
    assert manifest["versions"] == {"tensorrt_rtx": rtx.__version__}
    assert back["compute_capability"] == target
    assert back["profile"] == [1, 3, 5]
    assert back["flags"] == {"SPARSE_WEIGHTS": True, "TF32": False}
    assert back["profiling_verbosity"] == "DETAILED"
    assert back["strongly_typed"] is True
    assert back["inputs"] == [{"name": "images", "dtype": "FLOAT", "shape": [-1, 3, 32, 32]}]
    assert back["outputs"] == [{"name": "logits", "dtype": "FLOAT", "shape": [-1, 10]}]
    assert back["weighted_layers"] == weighted_nodes(networks.vit_onnx("fp16")) == 6
    assert back["weights_computed"] == back["weights_stored"] == {"HALF": 6}
    assert back["layers"] == sum(back["layer_types"].values())
    assert back["layer_types"]["NORMALIZATION"] == 3
    assert sum(back["engine_layers"].values()) > 0
    assert back["bytes"] == (folder / "model.engine").stat().st_size > 10_000
    assert manifest["runnable_here"] is False
    assert target in manifest["why_not"]
    assert any("SM90" in note for note in manifest["notes"])
    assert manifest == json.loads((folder / "engine.json").read_text())


def test_the_sparse_flag_changes_nothing_in_the_engine_and_the_manifest_says_so(make, no_gpu):
    one, sparse = make(networks.vit_onnx("fp16"), name="sparse")
    two, dense = make(networks.vit_onnx("fp16"), weights="dense", name="dense")
    assert (one / "model.engine").read_bytes() == (two / "model.engine").read_bytes()
    assert sparse["read_back"]["flags"]["SPARSE_WEIGHTS"] is True
    assert dense["read_back"]["flags"]["SPARSE_WEIGHTS"] is False
    assert dense["id"] == "tensorrt_rtx-sm80-fp16.dense"
    assert any("the flag has no effect on the ahead-of-time engine" in note for note in sparse["notes"])
    assert sparse["read_back"]["sparsity_log"] == []


def test_the_target_changes_the_engine(make, no_gpu):
    graph = networks.two_products(HALF, HALF)
    one, _ = make(graph, target="sm80", name="one")
    two, _ = make(graph, target="sm86", name="two")
    assert (one / "model.engine").read_bytes() != (two / "model.engine").read_bytes()


def test_the_same_build_writes_the_same_bytes_and_no_path(make, no_gpu, tmp_path):
    graph = networks.two_products(HALF, HALF)
    one, first = make(graph, name="one")
    two, second = make(graph, name="two")
    assert first == second
    log = (one / "build.log").read_text()
    assert log == (two / "build.log").read_text()  # and so the second log holds no line of the first build
    assert str(tmp_path) not in log
    assert "graph.onnx" in log
    assert "LayerType: " in log


def test_int8_weights_are_found_behind_their_dequantisation(make, no_gpu):
    _, manifest = make(networks.vit_onnx("int8"), "int8")
    assert manifest["read_back"]["weights_stored"] == {"INT8": 6}
    assert "6 of 6 layers with weights have int8 weights behind a DequantizeLinear." in manifest["notes"]


@pytest.mark.parametrize(
    ("graph", "precision", "sentence"),
    [
        ("fp32", "fp16", r"A fp16 engine was asked for, but graph.onnx has .*\(FLOAT\).*expected HALF"),
        ("fp16", "fp32", r"A fp32 engine was asked for, but graph.onnx has .*\(HALF\).*expected FLOAT"),
        ("fp32", "int8", r"An int8 engine was asked for, but graph.onnx has weights in .*FLOAT"),
    ],
)
def test_another_precision_than_asked_is_refused(make, no_gpu, graph, precision, sentence):
    with pytest.raises(StageFailed, match=sentence):
        make(networks.vit_onnx(graph), precision)


def test_one_layer_in_another_precision_is_refused_by_name(make, no_gpu):
    with pytest.raises(StageFailed, match=r"has product2 \(FLOAT\), stored weights .*; expected HALF"):
        make(networks.two_products(HALF, FLOAT))


def test_an_operator_that_cannot_be_parsed_is_named_with_its_node(make, no_gpu):
    graph = helper.make_graph(
        [helper.make_node("NoSuchOp", ["images"], ["logits"], name="the_culprit", domain="nowhere")],
        "bad",
        [helper.make_tensor_value_info("images", FLOAT, ["batch", 3, 4, 4])],
        [helper.make_tensor_value_info("logits", FLOAT, ["batch", 3])],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("nowhere", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    with pytest.raises(StageFailed, match=r"can't parse graph.onnx: the_culprit \(NoSuchOp\): "):
        make(model.SerializeToString())


def test_a_file_that_is_no_graph_is_refused(make, no_gpu):
    with pytest.raises(StageFailed, match=r"can't parse graph.onnx: .*Failed to parse the ONNX model"):
        make(b"no graph at all")


def test_a_fixed_batch_must_be_the_asked_one(make, no_gpu):
    fixed = networks.two_products(HALF, HALF, batch=2)
    with pytest.raises(StageFailed, match=r"fixed batch of 2; the engine was asked for \(1, 4, 8\)"):
        make(fixed, name="other")
    _, manifest = make(fixed, batch=(2, 2, 2))
    assert manifest["read_back"]["profile"] == [2, 2, 2]


def test_targets_that_cannot_be_had_are_refused(make, no_gpu):
    graph = networks.two_products(HALF, HALF)
    with pytest.raises(Unavailable, match=r"has no target SM90; it compiles for .*SM80.*SM86") as caught:
        make(graph, target="sm90", name="a")
    assert caught.value.exit_code == 3
    with pytest.raises(Unavailable, match="asked to build for the current GPU, and this machine has none"):
        make(graph, target="current", name="b")
    with pytest.raises(RecipeError, match='TensorRT-RTX has no target "a100"; expected "current" or "smXX"'):
        make(graph, target="a100", name="c")


def test_full_tensorrt_that_is_not_installed_is_unavailable_with_a_way_to_get_it(make, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(Unavailable, match="TensorRT can't be imported") as caught:
        make(networks.two_products(HALF, HALF), runtime="tensorrt")
    assert "pip install 'mpdeploy[tensorrt]'" in caught.value.hint
    found = runtimes.probe("tensorrt")
    assert (found.available, found.hint) == (False, caught.value.hint)


def fake_tensorrt(monkeypatch, version="11.4.0.106"):
    """A `tensorrt` whose builder fails the way the real one does without a driver: TypeError, and a logged error."""

    class ILogger:
        pass

    def builder(logger):
        logger.log(types.SimpleNamespace(name="ERROR"), "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    fake = types.SimpleNamespace(__version__=version, ILogger=ILogger, Builder=builder)
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    monkeypatch.setattr("mpdeploy.runtimes.tensorrt_log._LOGGERS", {})


def test_a_builder_that_fails_without_a_driver_is_unavailable(make, monkeypatch):
    fake_tensorrt(monkeypatch)
    monkeypatch.setattr(module, "find_gpu", lambda: A100)
    with pytest.raises(Unavailable, match=r"TensorRT 11.4.0.106 gives no builder here.*CUDA initialization failure"):
        make(networks.two_products(HALF, HALF), runtime="tensorrt")


def test_full_tensorrt_builds_only_for_the_gpu_in_the_machine(make, monkeypatch, no_gpu):
    fake_tensorrt(monkeypatch)
    graph = networks.two_products(HALF, HALF)
    with pytest.raises(Unavailable, match=r"builds only for the GPU in the machine; sm80 was asked .* no NVIDIA GPU"):
        make(graph, runtime="tensorrt", name="a")
    monkeypatch.setattr(module, "find_gpu", lambda: A40)
    with pytest.raises(Unavailable, match=r"sm80 was asked and this machine is a NVIDIA A40 \(sm86\)"):
        make(graph, runtime="tensorrt", name="b")


def test_a_tensorrt_from_before_strongly_typed_networks_is_refused(make, monkeypatch):
    fake_tensorrt(monkeypatch, "10.9.0.34")
    with pytest.raises(Unavailable, match=r"TensorRT 10.9.0.34 is too old; expected 10.12 or newer"):
        make(networks.two_products(HALF, HALF), runtime="tensorrt")


@pytest.fixture
def unopened(monkeypatch):
    """Fails the test if an engine's bytes reach the library."""

    def refuse(*_):
        pytest.fail("the engine was deserialised before it was checked")

    monkeypatch.setattr(rtx, "Runtime", refuse)


def test_an_engine_is_refused_before_it_is_deserialised(make, monkeypatch, no_gpu, unopened):
    folder, manifest = make(networks.two_products(HALF, HALF))
    with pytest.raises(Unavailable, match="can't run here: It is built for sm80 and this machine has no NVIDIA GPU"):
        open_engine(folder)
    monkeypatch.setattr(module, "find_gpu", lambda: A40)
    with pytest.raises(Unavailable, match="It is built for sm80 and this machine's NVIDIA A40 is sm86"):
        open_engine(folder)
    monkeypatch.setattr(module, "find_gpu", lambda: A100)
    manifest["versions"]["tensorrt_rtx"] = "1.4.0.76"
    (folder / "engine.json").write_text(json.dumps(manifest))
    with pytest.raises(Unavailable, match=rf"built with TensorRT-RTX 1.4.0.76; here is {rtx.__version__}"):
        open_engine(folder)


def test_a_damaged_engine_is_refused_by_its_hash(make, monkeypatch, no_gpu, unopened):
    folder, _ = make(networks.two_products(HALF, HALF))
    data = bytearray((folder / "model.engine").read_bytes())
    data[1000] ^= 1
    (folder / "model.engine").write_bytes(data)
    monkeypatch.setattr(module, "find_gpu", lambda: A100)
    with pytest.raises(CorruptArtifact, match=r"model.engine is not the one that was built"):
        open_engine(folder)


def test_sparsity_lines_of_old_and_new_versions_are_kept():
    new = """VERBOSE Registering layer: conv1
INFO (Sparsity) Found 3 layer(s) eligible to use sparse tactics: conv1, conv2, fc
INFO (Sparsity) Chose 1 layer(s) using sparse tactics: conv2
WARNING Something may be slow.
INTERNAL_ERROR Something broke.
VERBOSE Layers:
Name: a, LayerType: gemm, TacticName: sm80_xmma_sparse_gemm
Name: b, LayerType: gemm, TacticName: x
Name: c, LayerType: kgen, TacticName: y
"""
    assert log_facts(new) == {
        "sparsity_log": [
            "INFO (Sparsity) Found 3 layer(s) eligible to use sparse tactics: conv1, conv2, fc",
            "INFO (Sparsity) Chose 1 layer(s) using sparse tactics: conv2",
        ],
        "warnings": ["WARNING Something may be slow.", "INTERNAL_ERROR Something broke."],
        "engine_layers": {"gemm": 2, "kgen": 1},
    }
    old = """INFO (Sparsity) Layers eligible for sparse math: conv1, conv2
INFO TRT inference plan picked sparse implementation for layers: conv2
INFO Layers eligible for sparse math: fc"""
    assert log_facts(old)["sparsity_log"] == old.splitlines()
    assert log_facts("VERBOSE nothing of interest") == {"sparsity_log": [], "warnings": [], "engine_layers": {}}


@pytest.mark.gpu
@pytest.mark.skipif(runtimes.find_gpu() is None, reason="needs an NVIDIA GPU and driver")
@pytest.mark.parametrize("runtime", ["tensorrt_rtx", "tensorrt"])
def test_an_engine_for_this_gpu_gives_pytorchs_logits(make, runtime):
    pytest.importorskip(runtime)
    folder, manifest = make(networks.vit_onnx("fp16"), target="current", runtime=runtime)
    assert manifest["runnable_here"] is True
    with open_engine(folder) as session:
        for count in (1, 3, 8):
            error = np.abs(session.run(networks.images(count)) - networks.expected(count)).max()
            assert error < 0.02 * np.ptp(networks.expected(count))
        assert (session.time(networks.images(4), 5) > 0).all()
        with pytest.raises(StageFailed, match="built for batches of 1 to 8, not 9"):
            session.run(networks.images(9))


@pytest.mark.slow
def test_a_resnet50_of_true_size_is_built_for_both_targets(make, no_gpu):
    import timm
    import torch

    class Half(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = timm.create_model("resnet50", pretrained=False).eval().half()

        def forward(self, images):
            return self.inner(images.half()).float()

    graph = networks.export(Half().eval(), (3, 224, 224))
    for target in ("sm80", "sm86"):
        _, manifest = make(graph, target=target, name=target)
        assert manifest["read_back"]["weights_computed"] == {"HALF": 54}
        assert manifest["size"] > 48 * 10**6  # 25.6 million weights in fp16
