"""Real small networks as ONNX bytes, exported once per test process: a timm ViT with 2:4 weights, and its int8 form."""

import functools
import tempfile
from pathlib import Path

import numpy as np
import onnx

SIZE = (3, 32, 32)
MANIFEST = '{"schema": 1}'


@functools.cache
def vit():
    """A timm ViT of one block whose linear layers in the block are 2:4 along their inputs."""
    import timm
    import torch

    torch.manual_seed(0)
    args = {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 64, "num_heads": 2, "num_classes": 10}
    module = timm.create_model("vit_tiny_patch16_224", pretrained=False, **args).eval()
    with torch.no_grad():
        for layer in module.blocks.modules():
            if isinstance(layer, torch.nn.Linear):
                groups = layer.weight.view(layer.out_features, -1, 4)
                groups.scatter_(2, groups.abs().argsort(2)[:, :, :2], 0.0)
            if isinstance(layer, torch.nn.Linear | torch.nn.LayerNorm):
                layer.bias.normal_(0.0, 0.1)
        module.head.weight.normal_(0.0, 0.2)
    return module


def images(count: int) -> np.ndarray:
    return np.random.default_rng(7).standard_normal((count, *SIZE)).astype(np.float32)


@functools.cache
def expected(count: int) -> np.ndarray:
    """PyTorch's logits of `images(count)`."""
    import torch

    with torch.inference_mode():
        return vit()(torch.from_numpy(images(count))).numpy()


@functools.cache
def vit_onnx(precision: str) -> bytes:
    """fp32, fp16 (casts at both ends) or int8 (QDQ) with a dynamic batch."""
    if precision == "int8":
        return _quantised(vit_onnx("fp32"))
    if precision == "fp16":
        from onnxruntime.transformers.float16 import convert_float_to_float16

        model = convert_float_to_float16(onnx.load_from_string(vit_onnx("fp32")), keep_io_types=True)
        return model.SerializeToString()
    return export(vit(), SIZE)


def export(module, size) -> bytes:
    """fp32 ONNX of a module, images [batch, *size] -> logits."""
    import torch

    program = torch.onnx.export(
        module,
        (torch.zeros(2, *size),),
        dynamo=True,
        opset_version=20,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=1024)},),
        verbose=False,
    )
    model = program.model_proto
    onnx.helper.set_model_props(model, {"mpdeploy.sparsity": MANIFEST})
    return model.SerializeToString()


def _quantised(fp32: bytes) -> bytes:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.left = iter([{"images": images(8)}])

        def get_next(self):
            return next(self.left, None)

    model = onnx.load_from_string(fp32)
    del model.graph.value_info[:]
    with tempfile.TemporaryDirectory() as scratch:
        source, result = Path(scratch) / "fp32.onnx", Path(scratch) / "int8.onnx"
        onnx.save(model, source)
        quantize_static(
            source,
            result,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            extra_options={"QuantizeBias": False, "WeightSymmetric": True, "ActivationSymmetric": True},
        )
        return result.read_bytes()


def two_products(first, second, batch="batch") -> bytes:
    """images -> MatMul in element type `first` -> MatMul in `second` -> logits; TensorProto element types."""
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(3)
    kinds = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16}
    weights = [
        numpy_helper.from_array(rng.standard_normal((16, 8)).astype(kinds[first]), "w1"),
        numpy_helper.from_array(rng.standard_normal((8, 8)).astype(kinds[second]), "w2"),
    ]
    nodes = [
        helper.make_node("Cast", ["images"], ["a"], name="cast1", to=first),
        helper.make_node("Flatten", ["a"], ["b"], name="flatten"),
        helper.make_node("MatMul", ["b", "w1"], ["c"], name="product1"),
        helper.make_node("Cast", ["c"], ["d"], name="cast2", to=second),
        helper.make_node("MatMul", ["d", "w2"], ["e"], name="product2"),
        helper.make_node("Cast", ["e"], ["logits"], name="cast3", to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(
        nodes,
        "two",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, 4, 2, 2])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 8])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return model.SerializeToString()
