"""The graph run by torch: against ONNX Runtime, against the network it came from, and node by node against ONNX."""

import copy
import functools

import numpy as np
import onnx
import pytest
import timm
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from mpdeploy.certify.program import evaluate_unrounded, run
from mpdeploy.errors import CorruptArtifact, StageFailed
from mpdeploy.graph.export import export_onnx
from mpdeploy.graph.program import read_program, read_rewritten
from mpdeploy.graph.quantize import to_int8

SIZE = (3, 32, 32)
TRANSFORMER = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}
FAMILIES = {
    "vit": ("vit_tiny_patch16_224", TRANSFORMER, SIZE),
    "deit": ("deit_tiny_distilled_patch16_224", TRANSFORMER, SIZE),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 56, "window_size": 7, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 10},
        (3, 56, 56),
    ),
    "convnextv2": ("convnextv2_atto", {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 40), "num_classes": 10}, (3, 64, 64)),
    "resnet": ("resnet14t", {"num_classes": 10}, SIZE),
    "efficientnet": ("tf_efficientnet_lite0", {"num_classes": 10}, SIZE),
    "mobilenet": ("mobilenetv3_small_050", {"num_classes": 10}, SIZE),
}  # fmt: skip


@functools.cache
def network(family):
    torch.manual_seed(0)
    if family == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(3072, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
    name, args, _ = FAMILIES[family]
    module = timm.create_model(name, pretrained=False, **args).eval()
    with torch.no_grad():
        for parameter in module.parameters():  # no bias or scale of exactly 0 or 1 hides a wrong operator
            parameter.add_(0.02 * torch.randn_like(parameter))
    return module


def images(family, count=4):
    size = FAMILIES[family][2] if family in FAMILIES else SIZE
    return np.random.default_rng(3).standard_normal((count, *size)).astype(np.float32)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    home = tmp_path_factory.mktemp("exported")

    @functools.cache
    def path(family, precision="fp32"):
        target = home / f"{family}.{precision}.onnx"
        if precision == "int8":
            to_int8(path(family), target, images(family, 8))
        else:
            export_onnx(network(family), images(family).shape[1:], target, precision=precision)
        return target

    return path


def onnxruntime(path, x):
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def distance(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.abs(a - b).max() / np.abs(b).max()


@pytest.mark.parametrize(
    "family",
    [*(pytest.param(f, marks=[pytest.mark.slow] if f == "efficientnet" else []) for f in FAMILIES), "mlp"],
)
def test_a_run_gives_what_onnx_runtime_and_the_network_give(exported, family):
    path, x = exported(family), images(family)
    program = read_program(path)
    with torch.no_grad():
        single = run(program, torch.from_numpy(x))[program.output]
        double = run(program, torch.from_numpy(x), dtype=torch.float64)[program.output]
        exact = copy.deepcopy(network(family)).double()(torch.from_numpy(x).double())
    assert single.dtype == torch.float32 and double.dtype == torch.float64
    assert distance(single, onnxruntime(path, x)) < 1e-4
    # Where the exporter folds a BatchNorm, the folded weights are rounded to float32 once.
    folded = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network(family).modules())
    assert distance(double, exact) < (1e-5 if folded else 1e-10)


@pytest.mark.parametrize("family", ["vit", "resnet", "convnextv2"])
def test_half_precision_graphs_run_with_their_rounded_constants(exported, family):
    path, x = exported(family, "fp16"), images(family)
    program = read_program(path)
    assert {a.dtype for a in program.constants.values() if a.dtype.kind == "f"} == {np.dtype(np.float16)}
    with torch.no_grad():
        got = run(program, torch.from_numpy(x), dtype=torch.float64)[program.output]
    rounded = run(read_program(exported(family)), torch.from_numpy(x), dtype=torch.float64)["logits"]
    assert 0 < distance(got.numpy(), rounded.numpy()) < 0.02
    assert distance(got, onnxruntime(path, x)) < 0.02


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_quantised_graphs_run_as_onnx_runtime_runs_them(exported, family):
    path, x = exported(family, "int8"), images(family)
    program = read_program(path)
    with torch.no_grad():
        got = run(program, torch.from_numpy(x))[program.output]
        real = run(program, torch.from_numpy(x), each=evaluate_unrounded)[program.output]
    engine = onnxruntime(path, x)
    assert distance(got, engine) < 0.2 * distance(real, engine), "only a decision on the edge of a step may differ"


@pytest.mark.parametrize("family", ["vit", "swin", "convnextv2", "resnet", "mobilenet"])
def test_the_gradient_is_the_networks(exported, family):
    program, module = read_program(exported(family)), copy.deepcopy(network(family)).double()
    x = torch.from_numpy(images(family, 2)).double().requires_grad_()
    (mine,) = torch.autograd.grad(run(program, x, dtype=torch.float64)[program.output][:, 3].sum(), x)
    (yours,) = torch.autograd.grad(module(x)[:, 3].sum(), x)
    assert distance(mine, yours) < (1e-4 if family in ("resnet", "mobilenet") else 1e-9)


def test_only_what_is_asked_for_is_kept(exported):
    program = read_program(exported("vit"))
    x = torch.from_numpy(images("vit", 2))
    alive = []
    with torch.no_grad():
        few = run(program, x, keep=[program.ops[4].outputs[0]])
        every = run(program, x, keep=None)
    assert set(few) == {program.output, program.ops[4].outputs[0]}
    assert set(every) == {name for op in program.ops for name in op.outputs}
    assert torch.equal(few[program.output], every[program.output])

    def watched(op, inputs):
        import weakref

        from mpdeploy.certify.program import evaluate

        results = tuple(r.clone() for r in evaluate(op, inputs))
        alive.extend(weakref.ref(r) for r in results)
        most.append(sum(r() is not None for r in alive))
        return results

    most = []
    with torch.no_grad():
        run(program, x, each=watched)
    assert max(most) < len(program.ops) / 4


def graph(nodes, constants, shape=("n", 3, 8, 8), opset=20, functions=()):
    return helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(np.asarray(a), n) for n, a in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=9,
        functions=list(functions),
    )


F32 = functools.partial(np.asarray, dtype=np.float32)
I64 = functools.partial(np.asarray, dtype=np.int64)
WEIGHT = np.random.default_rng(0).standard_normal((6, 1, 3, 2)).astype(np.float32)
NODES = {
    "conv_same_upper": ("Conv", {"auto_pad": "SAME_UPPER", "strides": [2, 2], "group": 3}, [WEIGHT]),
    "conv_same_lower": ("Conv", {"auto_pad": "SAME_LOWER", "strides": [1, 2], "group": 3}, [WEIGHT]),
    "conv_uneven": ("Conv", {"pads": [2, 0, 1, 3], "dilations": [2, 1], "group": 3}, [WEIGHT, F32(range(6))]),
    "max_ceil": ("MaxPool", {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1, "pads": [1, 0, 1, 1]}, []),
    "mean_ceil": ("AveragePool", {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}, []),
    "mean_padded": ("AveragePool", {"kernel_shape": [3, 2], "pads": [1, 1, 0, 1], "count_include_pad": 1}, []),
    "mean_unpadded": ("AveragePool", {"kernel_shape": [3, 2], "pads": [1, 1, 0, 1]}, []),
    "slice_back": ("Slice", {}, [I64([7, 6]), I64([-100, 1]), I64([2, 3]), I64([-2, -1])]),
    "slice_clamped": ("Slice", {}, [I64([-3]), I64([2**62]), I64([3])]),
    "split": ("Split", {"axis": 2}, [I64([3, 5])]),
    "gather": ("Gather", {"axis": 2}, [I64([[0, -1], [3, 2]])]),
    "pad_reflect": ("Pad", {"mode": "reflect"}, [I64([0, 0, 2, 3, 0, 0, 1, 4])]),
    "pad_edge": ("Pad", {"mode": "edge"}, [I64([0, 0, 2, 3, 0, 0, 1, 4])]),
    "pad_axes": ("Pad", {}, [I64([2, 1]), F32(1.5), I64([-1])]),
    "pad_crop": ("Pad", {}, [I64([0, 0, -1, 0, 0, 0, -2, 0])]),
    "reduce_max": ("ReduceMax", {"keepdims": 0}, [I64([1, -1])]),
    "reduce_l2": ("ReduceL2", {}, [I64([2])]),
    "reduce_all": ("ReduceSum", {}, []),
    "reduce_none": ("ReduceSum", {"noop_with_empty_axes": 1}, []),
    "norm_two_axes": ("LayerNormalization", {"axis": 2, "epsilon": 0.1}, [WEIGHT[:, 0, :, :1].repeat(8, 2)[0, :1].repeat(8, 0), F32(np.eye(8))]),
    "group_norm": ("GroupNormalization", {"num_groups": 3}, [F32([1, 2, 3]), F32([0, 1, 2])]),
    "instance_norm": ("InstanceNormalization", {}, [F32([1, 2, 3]), F32([0, 1, 2])]),
    "gelu_tanh": ("Gelu", {"approximate": "tanh"}, []),
    "gelu": ("Gelu", {}, []),
    "hard_sigmoid": ("HardSigmoid", {"alpha": 0.3, "beta": 0.4}, []),
    "clip_low": ("Clip", {}, [F32(-0.5)]),
    "clip": ("Clip", {}, [F32(0), F32(0.7)]),
    "pow_cube": ("Pow", {}, [F32(3)]),
    "softmax": ("Softmax", {"axis": 1}, []),
    "flatten": ("Flatten", {"axis": -2}, []),
    "quantize": ("QuantizeLinear", {"axis": 1}, [F32([0.1, 0.01, 0.2]), np.asarray([3, 4, 5], np.uint8)]),
    "space_to_depth": ("SpaceToDepth", {"blocksize": 2}, []),
    "equal": ("Greater", {}, [F32(0)]),
    "tile": ("Tile", {}, [I64([1, 2, 1, 3])]),
    "prelu": ("PRelu", {}, [F32([[[0.1]], [[0.2]], [[0.3]]])]),
    "reshape_zero": ("Reshape", {}, [I64([0, -1, 8])]),
    "einsum": ("Einsum", {"equation": "nchw,cd->ndhw"}, [F32(np.arange(6).reshape(3, 2))]),
}  # fmt: skip


@pytest.mark.parametrize("case", NODES)
def test_single_nodes_mean_what_onnx_says(case, tmp_path):
    """The reference here is ONNX Runtime: corners of attributes that no exported network above reaches."""
    kind, attributes, extra = NODES[case]
    names = [f"c{i}" for i in range(len(extra))]
    outputs = ["part", "rest"] if kind == "Split" else ["part"]
    opset = 18 if kind == "GroupNormalization" else 20
    model = graph(
        [helper.make_node(kind, ["images", *names], outputs, "node", **attributes),
         helper.make_node("Cast", ["rest" if kind == "Split" else "part"], ["logits"], "cast", to=TensorProto.FLOAT)],
        dict(zip(names, extra, strict=True)),
        opset=opset,
    )  # fmt: skip
    onnx.save(model, tmp_path / "m.onnx")
    x = np.random.default_rng(1).standard_normal((2, 3, 8, 8)).astype(np.float32)
    want = onnxruntime(tmp_path / "m.onnx", x)
    got = run(read_program(tmp_path / "m.onnx"), torch.from_numpy(x))["logits"].numpy()
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


def test_softmax_before_opset_13_takes_all_later_axes_as_one(tmp_path):
    model = graph([helper.make_node("Softmax", ["images"], ["logits"], "s", axis=1)], {}, opset=11)
    onnx.save(model, tmp_path / "m.onnx")
    x = np.random.default_rng(1).standard_normal((2, 3, 8, 8)).astype(np.float32)
    got = run(read_program(model), torch.from_numpy(x))["logits"].numpy()
    np.testing.assert_allclose(got, onnxruntime(tmp_path / "m.onnx", x), rtol=1e-5)
    np.testing.assert_allclose(got.sum((1, 2, 3)), 1, rtol=1e-5)


def test_rounding_lets_the_gradient_through():
    nodes = [
        helper.make_node("QuantizeLinear", ["images", "s", "z"], ["q"], "q"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["logits"], "d"),
    ]
    program = read_program(graph(nodes, {"s": F32(0.25), "z": np.asarray(3, np.int8)}))
    x = torch.linspace(-2, 2, 192, dtype=torch.float64).reshape(1, 3, 8, 8).requires_grad_()
    y = run(program, x, dtype=torch.float64)["logits"]
    assert torch.equal(y, (x / 0.25).round() * 0.25)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, torch.ones_like(x))
    far = run(program, x * 100, dtype=torch.float64)["logits"]
    assert (far.min(), far.max()) == (0.25 * (-128 - 3), 0.25 * (127 - 3))
    torch.testing.assert_close(run(program, x, dtype=torch.float64, each=evaluate_unrounded)["logits"], x)


@pytest.mark.parametrize(
    ("nodes", "sentence"),
    [
        ([helper.make_node("Hardmax", ["images"], ["logits"], "odd")], "node odd is a Hardmax"),
        ([helper.make_node("Gelu", ["images"], ["logits"], "odd", domain="com.microsoft")], "odd is a com.microsoft.Gelu"),
        ([helper.make_node("Reshape", ["images", "c"], ["logits"], "odd")], r"odd \(Reshape\) fails on inputs of shape \[2, 3, 8, 8\]"),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_named(nodes, sentence):
    program = read_program(graph(nodes, {"c": I64([7, 11])}))
    with pytest.raises(StageFailed, match=sentence):
        run(program, torch.zeros(2, 3, 8, 8))


def test_what_cannot_be_read_is_refused():
    relu = helper.make_node("Relu", ["images"], ["logits"], "relu")
    two = graph([relu], {})
    two.graph.output.append(helper.make_tensor_value_info("images", TensorProto.FLOAT, None))
    with pytest.raises(StageFailed, match="one of each"):
        read_program(two)
    body = graph([relu], {}).graph
    branch = helper.make_node("If", ["images"], ["logits"], "branch", then_branch=body, else_branch=body)
    with pytest.raises(StageFailed, match=r"branch \(If\) holds a sub-graph"):
        read_program(graph([branch], {}))
    function = helper.make_function("here", "mine", ["x"], ["y"], [], [helper.make_opsetid("", 20)])
    with pytest.raises(StageFailed, match="local function mine"):
        read_program(graph([relu], {}, functions=[function]))
    with pytest.raises(StageFailed, match="reads missing before any node makes it"):
        read_program(graph([helper.make_node("Relu", ["missing"], ["logits"], "relu")], {}))


def test_a_float16_graph_as_the_cpu_provider_rewrites_it(exported, tmp_path):
    path, x = exported("resnet", "fp16"), torch.from_numpy(images("resnet"))
    program, rewritten = read_program(path), read_rewritten(path)
    both = [run(p, x, dtype=torch.float64)[p.output] for p in (program, rewritten)]
    torch.testing.assert_close(*both, rtol=1e-12, atol=1e-12)
    assert len(rewritten.ops) > len(program.ops)
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    with pytest.raises(StageFailed, match=r"can't load broken\.onnx on its CPU provider"):
        read_rewritten(tmp_path / "broken.onnx")
    with pytest.raises(CorruptArtifact, match="cannot be read as an ONNX model"):
        read_program(tmp_path / "broken.onnx")
