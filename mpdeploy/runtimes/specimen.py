"""The smallest network worth building: what `doctor` sends through each runtime, with logits known by hand."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def write_small_network(path: Path, precision: str) -> NDArray[np.float64]:
    """Writes an ONNX file, images float32 [batch, 4, 2, 2] -> logits float32 [batch, 8].

    Args:
        path: The file to write.
        precision: "fp32" or "fp16": element type of the weight and of the product.

    Returns:
        The weight [16, 8], 2:4 along its first axis: logits = images.reshape(batch, 16) @ weight.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weight = np.random.default_rng(0).standard_normal((16, 8)) * np.tile([1.0, 0.0, 0.0, 1.0], 4)[:, None]
    half = precision == "fp16"
    stored = weight.astype(np.float16 if half else np.float32)
    nodes = [
        helper.make_node("Cast", ["images"], ["cast"], to=TensorProto.FLOAT16 if half else TensorProto.FLOAT),
        helper.make_node("Flatten", ["cast"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["product"]),
        helper.make_node("Cast", ["product"], ["logits"], to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 4, 2, 2])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 8])],
        [numpy_helper.from_array(stored, "weight")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    exact: NDArray[np.float64] = stored.astype(np.float64)
    return exact
