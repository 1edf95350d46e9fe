import tempfile

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from onnx import numpy_helper
from torch import nn

from mpdeploy.errors import CorruptArtifact, RecipeError, StageFailed
from mpdeploy.graph import quantize, sparsity
from mpdeploy.graph.export import export_onnx
from mpdeploy.graph.inspect import summary
from mpdeploy.graph.quantize import to_int8

LAYERS = [f"blocks.0.{part}" for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 3, 32, 32)).astype(np.float32)


def logits(path, batch: np.ndarray) -> np.ndarray:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"images": batch})[0]


@pytest.fixture(scope="module")
def fp32(tmp_path_factory):
    """A ViT whose blocks are 2:4, exported and annotated."""
    torch.manual_seed(0)
    module = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, num_classes=10).eval()
    for name in LAYERS:
        weight = module.get_submodule(name).weight.data.view(-1, 4)
        weight[torch.arange(len(weight))[:, None], weight.abs().argsort(1)[:, :2]] = 0
    layers = [
        {"name": name, "pattern": "2:4" if name in LAYERS else "", "reason": "" if name in LAYERS else "kept"}
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    ]
    path = tmp_path_factory.mktemp("fp32") / "model.onnx"
    export_onnx(module, (3, 32, 32), path)
    model = onnx.load(path)
    sparsity.annotate(model, layers)
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def int8(fp32, tmp_path_factory):
    path = tmp_path_factory.mktemp("int8") / "model.int8.onnx"
    return path, to_int8(fp32, path, images(32))


def test_every_pruned_weight_is_int8_and_still_sparse(int8):
    path, facts = int8
    model = onnx.load(path)
    sparsity.check(model)
    uses = {use.layer: use for use in sparsity.weight_uses(model)}
    for layer in LAYERS:
        assert (uses[layer].dtype, uses[layer].zero_is_zero, uses[layer].bad_groups("2:4")) == ("int8", True, 0)
        assert 0.4 < uses[layer].density <= 0.5
        assert uses[layer].initializer.endswith("_quantized")
    manifest = sparsity.read(model)
    assert [entry["layer"] for entry in manifest["weights"]] == LAYERS
    assert {entry["dtype"] for entry in manifest["weights"]} == {"int8"}
    assert {entry["layer"]: entry["reason"] for entry in manifest["dense"]} == {
        "patch_embed.proj": "kept",
        "head": "kept",
    }
    assert facts["sparse_weights"] == len(LAYERS)


def test_scales_are_per_channel_and_symmetric_and_biases_stay_float(int8):
    model = onnx.load(int8[0])
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in {"QuantizeLinear", "DequantizeLinear"}:
            assert tensors[node.input[2]].dtype == np.int8
            assert not tensors[node.input[2]].any()
    use = next(use for use in sparsity.weight_uses(model) if use.layer == "blocks.0.mlp.fc1")
    scale = next(node.input[1] for node in model.graph.node if use.initializer in node.input)
    assert tensors[scale].shape == (768,)
    assert "int32" not in summary(int8[0])["initializers"]


def test_attention_products_stay_float32(int8):
    model = onnx.load(int8[0])
    producers = {name: node for node in model.graph.node for name in node.output}
    kept = [node for node in model.graph.node if node.name in int8[1]["kept_float32"]]
    assert len(kept) == 2  # scores and mixing
    for node in kept:
        assert node.op_type == "MatMul"
        assert all(producers[name].op_type != "DequantizeLinear" for name in node.input)


def test_logits_follow_fp32(fp32, int8):
    for count in (1, 5, 64):
        batch = images(count, seed=7)
        expected, got = logits(fp32, batch), logits(int8[0], batch)
        assert not np.array_equal(expected, got)
        assert np.corrcoef(expected.ravel(), got.ravel())[0, 1] > 0.98
    for column in range(10):  # not only the classes' means, which even constant logits would follow
        assert np.corrcoef(expected[:, column], got[:, column])[0, 1] > 0.95


def test_same_input_gives_same_bytes_and_leaves_nothing_behind(fp32, int8, tmp_path, monkeypatch, capfd):
    scratch, out = tmp_path / "scratch", tmp_path / "out"
    scratch.mkdir()
    out.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.chdir(out)
    before = fp32.read_bytes()
    capfd.readouterr()
    facts = to_int8(fp32, out / "again.onnx", images(32))
    assert capfd.readouterr() == ("", "")
    assert facts == int8[1]
    assert (out / "again.onnx").read_bytes() == int8[0].read_bytes()
    assert list(scratch.iterdir()) == []
    assert [path.name for path in out.iterdir()] == ["again.onnx"]
    assert fp32.read_bytes() == before
    assert [path.name for path in fp32.parent.iterdir()] == [fp32.name]


@pytest.mark.parametrize("exclude", ["head", "node_linear_*", "h?ad"])
def test_excluded_layer_stays_float32(fp32, exclude, tmp_path):
    model = onnx.load(fp32)
    chosen, kept = quantize._choose(model, [exclude])
    head = next(use.node for use in sparsity.weight_uses(model) if use.layer == "head")
    assert head in kept
    assert head not in chosen
    assert len(chosen) + len(kept) == sum(node.op_type in {"Conv", "MatMul", "Gemm"} for node in model.graph.node)


def test_percentile_unsigned_and_exclusion_together(fp32, int8, tmp_path):
    out = tmp_path / "m.onnx"
    facts = to_int8(fp32, out, images(16), method="percentile", percentile=99.99, activations="uint8", exclude=["head"])
    assert facts["quantized"] == int8[1]["quantized"] - 1
    assert (facts["method"], facts["percentile"], facts["activations"]) == ("percentile", 99.99, "uint8")
    model = onnx.load(out)
    sparsity.check(model)
    dtypes = {use.layer: use.dtype for use in sparsity.weight_uses(model)}
    assert dtypes["head"] == "float32"
    assert "uint8" in summary(out)["initializers"]
    batch = images(64, seed=7)
    assert np.corrcoef(logits(fp32, batch).ravel(), logits(out, batch).ravel())[0, 1] > 0.98


def test_range_comes_from_the_calibration_images(fp32, tmp_path):
    to_int8(fp32, tmp_path / "m.onnx", images(8) * np.float32(4), exclude=["blocks*"])
    tensors = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "m.onnx").graph.initializer}
    assert float(tensors["images_scale"]) == pytest.approx(4 * np.abs(images(8)).max() / 127, rel=0.01)


class TestRefusals:
    def refused(self, fp32, tmp_path, error, words, batch=None, **options):
        out = tmp_path / "m.onnx"
        with pytest.raises(error, match=words):
            to_int8(fp32, out, images(4) if batch is None else batch, **options)
        assert not out.exists()

    @pytest.mark.parametrize(
        ("batch", "words"),
        [
            (np.zeros((4, 3, 16, 16), np.float32), r"float32 \[4, 3, 16, 16\], expected float32 \[n, 3, 32, 32\]"),
            (np.zeros((3, 32, 32), np.float32), "expected float32"),
            (np.zeros((4, 3, 32, 32), np.float64), "are float64"),
            (np.zeros((0, 3, 32, 32), np.float32), "are empty or hold NaN"),
            (np.full((4, 3, 32, 32), np.nan, np.float32), "are empty or hold NaN"),
            (np.full((4, 3, 32, 32), np.inf, np.float32), "are empty or hold NaN"),
        ],
    )
    def test_calibration_images(self, fp32, tmp_path, batch, words):
        self.refused(fp32, tmp_path, StageFailed, words, batch)

    @pytest.mark.parametrize("percentile", [0.0, -1.0, 100.1, float("nan")])
    def test_percentile(self, fp32, tmp_path, percentile):
        self.refused(fp32, tmp_path, RecipeError, "calibration percentile is", percentile=percentile)

    def test_exclusion_of_nothing(self, fp32, tmp_path):
        self.refused(fp32, tmp_path, RecipeError, "'classifier' names no node and no layer", exclude=["classifier"])

    def test_exclusion_of_everything(self, fp32, tmp_path):
        self.refused(fp32, tmp_path, StageFailed, "no Conv, MatMul or Gemm left", exclude=["*"])

    def test_model_that_is_not_what_its_manifest_says(self, fp32, tmp_path):
        model = onnx.load(fp32)
        name = sparsity.read(model)["weights"][0]["initializer"]
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(2), name))
        onnx.save(model, tmp_path / "edited.onnx")
        self.refused(tmp_path / "edited.onnx", tmp_path, CorruptArtifact, "its sha256 is")

    def test_quantiser_that_loses_the_zeros(self, fp32, tmp_path, monkeypatch):
        load = onnx.load

        def with_a_fault(path, *args, **kwargs):
            model = load(path, *args, **kwargs)
            for tensor in model.graph.initializer:
                if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 2:
                    tensor.raw_data = b"\x01" * len(tensor.raw_data)
            return model

        monkeypatch.setattr(quantize.onnx, "load", with_a_fault)
        self.refused(fp32, tmp_path, StageFailed, r"blocks\.0\.attn\.qkv is not 2:4 on axis 0")


def test_model_without_manifest_is_quantised_without_one(fp32, tmp_path):
    model = onnx.load(fp32)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "plain.onnx")
    facts = to_int8(tmp_path / "plain.onnx", tmp_path / "m.onnx", images(4))
    assert facts["sparse_weights"] is None
    with pytest.raises(CorruptArtifact, match="no sparsity manifest"):
        sparsity.check(onnx.load(tmp_path / "m.onnx"))
