"""Defects of the kind that real exports and engines have had, each planted into a sound model.

Those of the export take an ONNX model of a timm vision transformer and return a changed copy; the one of the engine
runs a program as a declared float32 engine would that lets its matrix products run in TF32.
"""

import copy

import numpy as np
import torch
from onnx import ModelProto, helper, numpy_helper

from mpdeploy.certify.program import evaluate, run, tensors


def tanh_gelu(model: ModelProto) -> ModelProto:
    """GELU by its tanh formula where the network has the exact one."""
    model = copy.deepcopy(model)
    for node in _nodes(model, "Gelu"):
        del node.attribute[:]
        node.attribute.append(helper.make_attribute("approximate", "tanh"))
    return model


def layer_norm_epsilon(model: ModelProto, epsilon: float = 1e-3) -> ModelProto:
    """A constant of another framework under the square root of every layer norm."""
    model = copy.deepcopy(model)
    for node in _nodes(model, "LayerNormalization"):
        for attribute in node.attribute:
            if attribute.name == "epsilon":
                attribute.f = epsilon
    return model


def attention_scale(model: ModelProto, factor: float = 1.02) -> ModelProto:
    """Attention scores that are all two per cent too large."""
    model = copy.deepcopy(model)
    makers = {name: node for node in model.graph.node for name in node.output}
    for node in _nodes(model, "Softmax"):
        scaling = makers[makers[node.input[0]].input[0]]
        assert scaling.op_type == "Mul"
        _change(model, scaling.input[1], lambda scale: scale * factor)
    return model


def input_scale(model: ModelProto, factor: float = 0.98) -> ModelProto:
    """Preprocessing inside of the graph that divides by a slightly wrong number."""
    model = copy.deepcopy(model)
    name = model.graph.input[0].name
    for node in model.graph.node:
        for position, read in enumerate(node.input):
            if read == name:
                node.input[position] = "scaled_images"
    model.graph.initializer.append(numpy_helper.from_array(np.float32(factor), "input_factor"))
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.append(helper.make_node("Mul", [name, "input_factor"], ["scaled_images"], "scale_images"))
    model.graph.node.extend(nodes)
    return model


def transposed_head(model: ModelProto, heads: int) -> ModelProto:
    """The value weights of the last block's first head, read with rows for columns."""
    model = copy.deepcopy(model)
    sizes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    joint = [
        n.input[1] for n in _nodes(model, "MatMul") if len(s := sizes.get(n.input[1], ())) == 2 and s[1] == 3 * s[0]
    ]

    def transpose(weight):
        width = weight.shape[0]
        own = slice(2 * width, 2 * width + width // heads)
        weight[:, own] = weight[:, own].T.reshape(weight[:, own].shape).copy()
        return weight

    _change(model, joint[-1], transpose)
    return model


def stale_weights(model: ModelProto, distance: float = 1e-3) -> ModelProto:
    """One layer from a checkpoint a few steps before the last: off by a thousandth of its norm."""
    model = copy.deepcopy(model)
    sizes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    layers = [n.input[1] for n in _nodes(model, "MatMul") if len(sizes.get(n.input[1], ())) == 2]

    def older(weight):
        step = np.random.default_rng(0).standard_normal(weight.shape)
        return weight + distance * np.linalg.norm(weight) / np.linalg.norm(step) * step

    _change(model, layers[len(layers) // 2], older)
    return model


def tf32(program, images, *, truncate=True):
    """Logits of an engine whose matrix products keep 10 mantissa bits of their operands: float32 [n, K].

    `truncate` drops the other 13 bits; if not, they are rounded, half away from zero.
    """

    def short(value):
        if value is None or value.dtype != torch.float32:
            return value
        bits = value.contiguous().view(torch.int32)
        return ((bits if truncate else bits + 0x1000) & ~0x1FFF).view(torch.float32)

    def each(op, inputs):
        if op.kind in ("MatMul", "Gemm", "Conv"):
            inputs = [short(value) for value in inputs[:2]] + list(inputs[2:])
        return evaluate(op, inputs)

    constants = tensors(program, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        return run(program, torch.from_numpy(images), each=each, constants=constants)[program.output].numpy()


def _nodes(model, kind):
    found = [node for node in model.graph.node if node.op_type == kind]
    assert found, f"the model has no {kind} to plant a defect in"
    return found


def _change(model, name, change):
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
    old = numpy_helper.to_array(tensor)
    new = np.asarray(change(old.copy()), old.dtype)
    assert new.shape == old.shape and not np.array_equal(new, old), "the defect changes nothing"
    tensor.CopyFrom(numpy_helper.from_array(new, name))
