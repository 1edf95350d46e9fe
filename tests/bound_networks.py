"""Small networks as exported graphs, for the tests of the proved bounds."""

import copy
import functools
import tempfile
from pathlib import Path

import numpy as np
import torch
from conftest import ROOT
from torch import nn

from mpdeploy.certify.program import Op, Program
from mpdeploy.graph.export import export_onnx
from mpdeploy.graph.program import read_program

SIZES = {"mlp": (1, 6, 6), "conv": (1, 10, 10), "residual": (3, 12, 12), "vit": (1, 12, 12), "mixed": (1, 8, 8)}
CLASSES = 6


class Residual(nn.Module):
    """A stem, two residual blocks with batch norm, a strided one, pooling, a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        self.one = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.AvgPool2d(2))
        self.short = nn.Sequential(nn.Conv2d(8, 8, 1, stride=2))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        x = self.stem(x)
        x = torch.relu(x + self.one(x))
        x = torch.relu(self.two(x) + self.short(x))
        return self.head(x.mean((2, 3)))


class Mixed(nn.Module):
    """The functions that mobile networks use: hard swish, gates, sigmoid, tanh, clipping, SiLU, depthwise."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, stride=2, padding=1)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.gate = nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1), nn.Hardsigmoid())
        self.last = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x):
        x = nn.functional.hardswish(self.stem(x))
        x = nn.functional.relu6(self.depth(x))
        x = x * self.gate(x.mean((2, 3), keepdim=True))
        y = torch.tanh(self.last(x))
        x = nn.functional.silu(x)
        x = torch.cat([x, torch.sigmoid(y) - y.abs()], 1)
        return self.head(nn.functional.gelu(x.amax((2, 3)) / 2))


def module(kind, depth=1):
    """A random network in eval mode whose weights are large enough to give clear margins."""
    torch.manual_seed(3)
    c, h, w = SIZES[kind]
    if kind == "mlp":
        layers = [nn.Flatten(), nn.Linear(h * w, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, CLASSES)]
        network = nn.Sequential(*layers)
    elif kind == "conv":
        network = nn.Sequential(
            nn.Conv2d(c, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2), nn.ReLU(), nn.Flatten(),
            nn.Linear(8 * 16, CLASSES),
        )  # fmt: skip
    elif kind == "residual":
        network = Residual()
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.normal_(0, 0.2), layer.running_var.uniform_(0.5, 2)
                nn.init.uniform_(layer.weight, 0.5, 1.5), nn.init.normal_(layer.bias, 0, 0.2)
    elif kind == "mixed":
        network = Mixed()
    else:
        import timm

        network = timm.create_model(
            "vit_tiny_patch16_224", img_size=h, patch_size=4, in_chans=c, embed_dim=24, depth=depth, num_heads=2,
            num_classes=CLASSES, class_token=False, global_pool="avg",
        )  # fmt: skip
        with torch.no_grad():
            for layer in network.modules():
                if isinstance(layer, nn.Linear):
                    layer.weight.normal_(0, 0.25), layer.bias.normal_(0, 0.1)
                if isinstance(layer, nn.LayerNorm):
                    layer.weight.uniform_(0.5, 1.5), layer.bias.normal_(0, 0.1)
            network.pos_embed.normal_(0, 0.5)
    return network.eval()


@functools.cache
def program(kind, depth=1) -> Program:
    """The graph that the export stage would write of `module(kind)`."""
    return exported(module(kind, depth), SIZES[kind])


def exported(network, size) -> Program:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(network, size, path)
        return read_program(path)


def images(kind, count, seed=0):
    return torch.randn(count, *SIZES[kind], generator=torch.Generator().manual_seed(seed)).double()


def pruned(source: Program, share, ops=None, also=()) -> Program:
    """A twin: the smallest `share` of the weights of each product are 0; operators in `also` get other biases."""
    constants = dict(source.constants)
    for op in source.ops:
        if op.kind not in ("Conv", "Gemm", "MatMul") or (ops is not None and op.name not in ops):
            continue
        if op.inputs[1] not in constants:
            continue
        weight = constants[op.inputs[1]].copy()
        weight[np.abs(weight) <= np.quantile(np.abs(weight), share)] = 0
        constants[op.inputs[1]] = weight
        if op.name in also:
            bias = constants[op.inputs[2]]
            constants[op.inputs[2]] = bias + 0.01 * np.sign(bias)
    return Program(source.ops, constants, source.input, source.output)


def dense_layers(*weights, biases=None) -> Program:
    """Gemm, Relu, Gemm, ... without an exporter: weights [out, in]."""
    ops, constants, name = [Op("flat", "Flatten", ("images",), ("x0",), {"axis": 1})], {}, "x0"
    for i, weight in enumerate(weights):
        constants[f"w{i}"] = np.asarray(weight, np.float64)
        inputs = (name, f"w{i}")
        if biases is not None:
            constants[f"b{i}"] = np.asarray(biases[i], np.float64)
            inputs = (*inputs, f"b{i}")
        last = i == len(weights) - 1
        name = "logits" if last else f"g{i}"
        ops.append(Op(f"gemm{i}", "Gemm", inputs, (name,), {"transB": 1}))
        if not last:
            ops.append(Op(f"relu{i}", "Relu", (name,), (f"x{i + 1}",), {}))
            name = f"x{i + 1}"
    return Program(tuple(ops), constants, "images", "logits")


def copied(source: Program, **arrays) -> Program:
    """A twin with some constants replaced."""
    return Program(source.ops, {**copy.copy(dict(source.constants)), **arrays}, source.input, source.output)


@functools.cache
def _quickstart():
    import timm
    from safetensors.torch import load_file

    args = {"img_size": 28, "patch_size": 4, "in_chans": 1, "embed_dim": 128, "depth": 4, "num_heads": 2}
    network = timm.create_model("vit_tiny_patch16_224", num_classes=10, class_token=False, global_pool="avg", **args)
    network.load_state_dict(load_file(ROOT / "recipes" / "quickstart" / "vit.safetensors"))
    return exported(network.eval(), (1, 28, 28))


def quickstart(count):
    """The trained ViT of the quickstart recipe, and some of its images, preprocessed."""
    data = np.load(ROOT / "recipes" / "quickstart" / "fashion_mnist_slice.npz")
    pixels = next(v for k, v in sorted(data.items()) if v.ndim >= 3)[:count].reshape(-1, 1, 28, 28)
    return _quickstart(), torch.from_numpy((pixels / 255 - 0.286) / 0.353).double()
