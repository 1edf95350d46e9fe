import collections
import copy
import functools
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from onnx import numpy_helper
from torch import nn

from mpdeploy.errors import CorruptArtifact, StageFailed
from mpdeploy.graph import export
from mpdeploy.graph.export import export_onnx
from mpdeploy.graph.inspect import first_difference, same_graph, summary

VIT = ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "depth": 1}, 32)
RESNET = ("resnet18", {"layers": (1, 1, 1, 1)}, 64)
CONVNEXT = ("convnextv2_atto", {"depths": (1, 0, 0, 0)}, 64)
SMALL = {"vit": VIT, "resnet": RESNET, "convnext": CONVNEXT}
FULL = {
    "vit_tiny": ("vit_tiny_patch16_224", {}, 224),
    "resnet18": ("resnet18", {}, 64),
    "convnextv2_atto": ("convnextv2_atto", {}, 64),
}


def network(kind: str) -> tuple[nn.Module, int]:
    """As timm initialises it: biases of zero, BatchNorm of identity, which value-driven optimisers remove."""
    name, args, size = {**SMALL, **FULL}[kind]
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10, **args).eval(), size


def trained_sparse(module: nn.Module) -> nn.Module:
    """A copy as pruning and tuning leave it: 2:4 weights, and no bias, scale or statistic at its initial value."""
    module = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and tensor.ndim <= 1:
            noise = torch.rand(tensor.shape, generator=generator) * 0.2
            tensor.copy_(noise + (0.9 if name.endswith(("weight", "var")) else 0.0))
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and layer.weight.shape[1] % 4 == 0:
            prune_2_of_4(layer.weight)
    return module


@torch.no_grad()
def prune_2_of_4(weight: torch.Tensor) -> None:
    rows = weight.movedim(1, -1)
    groups = rows.reshape(*rows.shape[:-1], -1, 4)
    kept = torch.zeros_like(groups).scatter(-1, groups.abs().topk(2).indices, 1.0)
    weight.copy_((groups * kept).reshape(rows.shape).movedim(-1, 1))


@functools.cache
def exported(kind: str, variant: str, folder: Path) -> tuple[nn.Module, Path, export.ExportFacts]:
    module, size = network(kind)
    if variant != "dense":
        module = trained_sparse(module)
    path = folder / f"{kind}.{variant}.onnx"
    precision = "fp16" if variant == "fp16" else "fp32"
    return module, path, export_onnx(module, (3, size, size), path, precision=precision)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("exports")


def logits(path: Path, images: np.ndarray) -> np.ndarray:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"images": images})[0]


def random_images(size: int, count: int) -> np.ndarray:
    return np.random.default_rng(count).standard_normal((count, 3, size, size)).astype(np.float32)


def torch_logits(module: nn.Module, images: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return module(torch.from_numpy(images)).numpy()


@pytest.mark.parametrize("kind", [*SMALL, *(pytest.param(kind, marks=pytest.mark.slow) for kind in FULL)])
class TestTimm:
    @pytest.mark.parametrize("variant", ["dense", "sparse"])
    @pytest.mark.parametrize("count", [1, 5])
    def test_logits_equal_torch(self, kind, variant, count, folder):
        module, path, _ = exported(kind, variant, folder)
        images = random_images({**SMALL, **FULL}[kind][2], count)
        expected = torch_logits(module, images)
        assert np.abs(expected).max() > 1e-3
        assert np.abs(logits(path, images) - expected).max() <= 1e-4 * np.abs(expected).max()

    def test_dense_twin_has_the_same_graph(self, kind, folder):
        dense, sparse = (onnx.load(exported(kind, variant, folder)[1]) for variant in ("dense", "sparse"))
        assert first_difference(dense, sparse) == ""
        assert dense.SerializeToString() != sparse.SerializeToString()

    def test_every_layer_norm_is_one_op_and_batch_norm_is_folded(self, kind, folder):
        module, path, facts = exported(kind, "sparse", folder)
        ops = summary(path)["ops"]
        assert facts.layer_norm_ops == ops.get("LayerNormalization", 0)
        assert facts.layer_norm_ops == sum(isinstance(layer, nn.LayerNorm) for layer in module.modules())
        assert "BatchNormalization" not in ops

    def test_every_weight_names_its_torch_layer(self, kind, folder):
        module, path, facts = exported(kind, "sparse", folder)
        layers = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
        assert sorted(facts.layers.values()) == sorted(layers)
        tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
        for initializer, layer in facts.layers.items():
            assert tensors[initializer].size == module.get_submodule(layer).weight.numel(), layer

    def test_leaves_no_path_or_stack_trace(self, kind, folder):
        payload = exported(kind, "sparse", folder)[1].read_bytes()
        for trace in (b"site-packages", b"stack_trace", b".py", b"/home", str(folder).encode()):
            assert trace not in payload, trace


def test_facts_are_those_of_the_file(folder):
    module, path, facts = exported("vit", "sparse", folder)
    facts_of_file = summary(path)
    assert (facts.opset, facts.bytes, facts.precision) == (20, path.stat().st_size, "fp32")
    assert facts_of_file["opset"] == 20
    assert facts_of_file["inputs"] == [{"name": "images", "dtype": "float32", "shape": ["batch", 3, 32, 32]}]
    assert facts_of_file["outputs"] == [{"name": "logits", "dtype": "float32", "shape": ["batch", 10]}]
    count = sum(parameter.numel() for parameter in module.parameters())
    assert count <= facts_of_file["parameters"] <= count + 10  # besides: the attention scales


def test_same_module_gives_same_bytes_and_stays_untouched(folder, tmp_path, capfd):
    module, path, facts = exported("vit", "sparse", folder)
    module.blocks[0].train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    modes = [layer.training for layer in module.modules()]
    capfd.readouterr()
    again = export_onnx(module, (3, 32, 32), tmp_path / "again.onnx")
    assert capfd.readouterr() == ("", "")
    assert (tmp_path / "again.onnx").read_bytes() == path.read_bytes()
    assert again == facts
    assert [layer.training for layer in module.modules()] == modes
    module.blocks[0].eval()
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


class TestHalf:
    def test_weights_and_compute_are_half_with_float32_ends(self, folder):
        module, path, _ = exported("vit", "fp16", folder)
        facts = summary(path)
        assert set(facts["initializers"]) == {"float16", "int64"}
        assert facts["inputs"][0]["dtype"] == facts["outputs"][0]["dtype"] == "float32"
        assert facts["ops"]["Cast"] == 2
        for count in (1, 5):
            images = random_images(32, count)
            expected = torch_logits(module, images)
            assert np.abs(logits(path, images) - expected).max() <= 2e-2 * np.abs(expected).max()

    def test_differs_from_fp32_in_two_casts_alone(self, folder):
        ops = [collections.Counter(summary(exported("vit", v, folder)[1])["ops"]) for v in ("fp16", "sparse")]
        assert ops[0] - ops[1] == {"Cast": 2}
        assert not ops[1] - ops[0]

    def test_batch_norm_is_folded_before_rounding(self, tmp_path):
        torch.manual_seed(0)
        module = nn.Sequential(
            nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        ).eval()
        module[1].running_var.copy_(torch.logspace(-9, 6, 8))  # float16 holds neither end
        module[1].running_mean.normal_()
        export_onnx(module, (4, 2, 2), tmp_path / "m.onnx", precision="fp16")
        tensors = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "m.onnx").graph.initializer}
        scale = 1 / np.sqrt(module[1].running_var.double().numpy() + module[1].eps)
        weight = module[0].weight.detach().double().numpy() * scale[:, None, None, None]
        assert np.array_equal(tensors["0.weight"], weight.astype(np.float16))
        bias = -module[1].running_mean.double().numpy() * scale
        assert np.array_equal(tensors["0.weight_bias"], bias.astype(np.float16))

    def test_weight_beyond_half_is_refused(self, tmp_path):
        module = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
        module[1].weight.data[0, 0] = 1e5
        with pytest.raises(StageFailed, match=r"1 is not finite in fp16.*\n.*65504"):
            export_onnx(module, (3, 2, 2), tmp_path / "m.onnx", precision="fp16")
        assert list(tmp_path.iterdir()) == []


class Head(nn.Module):
    """Logits of the mean colour, with `inner` in between."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.fc = nn.Linear(3, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.inner(images.mean((2, 3))))


class Untranslatable(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(x)


class Branches(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum() > 0 else x


class FixedBatch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if len(x) == 2 else x


class Crashes(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ torch.zeros(7, 3)


@pytest.mark.parametrize(
    ("inner", "words"),
    [
        (Untranslatable(), "bessel_j0"),
        (Branches(), r"data-dependent.* in inner \(Branches\)"),
        (FixedBatch(), r"[Cc]onstraints violated.*batch"),
        (Crashes(), r"does not run.*in inner \(Crashes\)"),
    ],
    ids=lambda item: type(item).__name__ if isinstance(item, nn.Module) else "",
)
def test_what_cannot_be_exported_is_named(inner, words, tmp_path, capfd):
    with pytest.raises(StageFailed, match=words) as caught:
        export_onnx(Head(inner).eval(), (3, 8, 8), tmp_path / "m.onnx")
    assert caught.value.hint
    assert "\n" not in caught.value.what
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


class TwoOutputs(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, x


def test_network_without_logits_is_refused(tmp_path):
    with pytest.raises(StageFailed, match="returns tuple"):
        export_onnx(TwoOutputs(), (3, 8, 8), tmp_path / "m.onnx")
    with pytest.raises(StageFailed, match=r"returns \(1, 3, 8, 8\)"):
        export_onnx(nn.Identity(), (3, 8, 8), tmp_path / "m.onnx")


def test_nan_parameter_is_refused(tmp_path):
    module = Head(nn.Identity())
    module.fc.bias.data[1] = float("nan")
    with pytest.raises(StageFailed, match=r"fc\.bias holds NaN"):
        export_onnx(module, (3, 8, 8), tmp_path / "m.onnx")


def test_network_beyond_the_size_of_one_file_is_refused(tmp_path, monkeypatch):
    weights = 4 * sum(tensor.numel() for tensor in Head(nn.Identity()).state_dict().values())
    monkeypatch.setattr(export, "_PROTOBUF_LIMIT", export._GRAPH_ALLOWANCE + weights - 1)
    with pytest.raises(
        StageFailed, match=r"weights take .* GiB as fp32, and one ONNX file holds at most 2 GiB"
    ) as caught:
        export_onnx(Head(nn.Identity()), (3, 8, 8), tmp_path / "m.onnx")
    assert "fp16" in caught.value.hint
    export._refuse_unfit(Head(nn.Identity()), "fp16")


class TestCheckOfWhatIsWritten:
    def model(self, folder) -> onnx.ModelProto:
        return onnx.load(exported("vit", "sparse", folder)[1])

    def test_as_exported(self, folder):
        export._check(self.model(folder), 20, 3, "fp32")

    def test_other_opset(self, folder):
        with pytest.raises(StageFailed, match="opset 17 was asked for and the exporter wrote opset 20"):
            export._check(self.model(folder), 17, 3, "fp32")

    def test_split_layer_norm(self, folder):
        model = self.model(folder)
        norm = next(node for node in model.graph.node if node.op_type == "LayerNormalization")
        norm.op_type = "InstanceNormalization"
        with pytest.raises(StageFailed, match="runs 3 layer norms, and its ONNX graph has 2"):
            export._check(model, 20, 3, "fp32")

    @pytest.mark.parametrize("end", ["input", "output"])
    def test_fixed_batch(self, folder, end):
        model = self.model(folder)
        getattr(model.graph, end)[0].type.tensor_type.shape.dim[0].dim_value = 2
        with pytest.raises(StageFailed, match=f"graph's {end} is .* with a free batch"):
            export._check(model, 20, 3, "fp32")

    def test_invalid_graph(self, folder):
        model = self.model(folder)
        model.graph.node[3].input[0] = "nowhere"
        with pytest.raises(StageFailed, match="not valid ONNX"):
            export._check(model, 20, 3, "fp32")


class TestSameGraph:
    def model(self, folder) -> onnx.ModelProto:
        return onnx.load(exported("resnet", "sparse", folder)[1])

    def test_values_and_names_do_not_matter(self, folder):
        model = self.model(folder)
        other = self.model(folder)
        for tensor in other.graph.initializer:
            if tensor.data_type == onnx.TensorProto.FLOAT:
                tensor.raw_data = b"\x01" * len(tensor.raw_data)
        for index, node in enumerate(other.graph.node):
            node.name = f"n{index}"
        assert same_graph(model, other)

    @pytest.mark.parametrize("fault", ["operator", "attribute", "wiring", "shape", "type", "axes", "output", "opset"])
    def test_planted_difference_is_seen(self, folder, fault):
        model, other = self.model(folder), self.model(folder)
        nodes = other.graph.node
        if fault == "operator":
            next(node for node in nodes if node.op_type == "Relu").op_type = "Sigmoid"
        elif fault == "attribute":
            next(a for node in nodes for a in node.attribute if a.name == "strides").ints[0] += 1
        elif fault == "wiring":
            add = next(node for node in nodes if node.op_type == "Add")
            add.input[0] = add.input[1]
        elif fault == "shape":
            other.graph.initializer[0].dims[0] += 1
        elif fault == "type":
            other.graph.initializer[0].data_type = onnx.TensorProto.FLOAT16
        elif fault == "axes":
            axes = next(t for t in other.graph.initializer if t.data_type == onnx.TensorProto.INT64)
            axes.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(axes) + 1, axes.name))
        elif fault == "output":
            nodes[-1].output[0], nodes[0].output[0] = nodes[0].output[0], nodes[-1].output[0]
        else:
            other.opset_import[0].version += 1
        assert "differ" in first_difference(model, other)
        assert not same_graph(model, other)


def test_summary_refuses_what_is_no_model(tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    for name in ("bad.onnx", "missing.onnx"):
        with pytest.raises(CorruptArtifact, match=f"{name} cannot be read as an ONNX model"):
            summary(tmp_path / name)
