import pytest
import timm
import torch
from torch import nn

from mpdeploy.errors import RecipeError, StageFailed
from mpdeploy.pruning.layers import choose


def on_meta(name, **args):
    with torch.device("meta"):
        return timm.create_model(name, **args).eval()


def by_name(layers):
    return {layer.name: layer for layer in layers}


def test_a_vision_transformer_prunes_its_block_linears_in_execution_order():
    layers = choose(on_meta("vit_tiny_patch16_224", depth=3), "2:4", [], (3, 224, 224))
    inside = [f"blocks.{b}.{n}" for b in range(3) for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    assert [layer.name for layer in layers] == ["patch_embed.proj", *inside, "head"]
    assert [layer.name for layer in layers if layer.pattern == "2:4"] == inside
    fc1 = by_name(layers)["blocks.1.mlp.fc1"]
    assert (fc1.kind, fc1.shape, fc1.positions, fc1.macs) == ("linear", (768, 192), 197, 197 * 768 * 192)
    assert "stem" in by_name(layers)["patch_embed.proj"].reason
    assert "classifier head" in by_name(layers)["head"].reason


def test_stem_and_head_are_pruned_on_request_where_the_pattern_fits():
    model = on_meta("vit_tiny_patch16_224", depth=1)
    layers = by_name(choose(model, "2:4", [], (3, 224, 224), keep_stem_dense=False, keep_head_dense=False))
    assert layers["head"].pattern == "2:4"
    assert layers["patch_embed.proj"].pattern == ""
    assert "3 inputs are not a multiple of 4" in layers["patch_embed.proj"].reason


def test_a_residual_network_keeps_its_stem_head_and_skipped_layers_dense():
    layers = by_name(choose(on_meta("resnet18"), "2:4", ["layer4.*"], (3, 96, 96)))
    assert layers["conv1"].positions == 48 * 48
    assert layers["layer1.0.conv1"].pattern == "2:4"
    assert "skip list" in layers["layer4.1.conv2"].reason
    assert all(layer.reason.endswith(".") != bool(layer.pattern) for layer in layers.values())


def test_depthwise_convolutions_and_odd_widths_say_why_they_stay_dense():
    layers = by_name(choose(on_meta("convnextv2_atto"), "12:16", [], (3, 64, 64)))
    assert "depthwise convolution (40 groups)" in layers["stages.0.blocks.0.conv_dw"].reason
    assert "40 inputs are not a multiple of 16" in layers["stages.0.blocks.0.mlp.fc1"].reason
    assert layers["stages.1.blocks.0.mlp.fc1"].pattern == "12:16"
    assert layers["stages.1.blocks.0.mlp.fc1"].positions == 8 * 8


def test_weight_standardised_convolutions_are_not_pruned_because_zeros_would_not_survive():
    layers = by_name(choose(on_meta("resnetv2_50x1_bit"), "2:4", [], (3, 64, 64)))
    layer = layers["stages.1.blocks.0.conv1"]
    assert layer.pattern == ""
    assert "does not use its stored weight" in layer.reason


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.twice = nn.Linear(8, 8)
        self.never = nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8)
        self.twin = nn.Linear(8, 8)
        self.twin.weight = self.tied.weight
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.plain = nn.Linear(8, 8)
        self.last = nn.Linear(8, 4)

    def forward(self, images):
        x = self.twice(self.twice(self.stem(images.flatten(1))))
        return self.last(self.plain(self.normed(self.twin(self.tied(x)))))


def test_shared_uncalled_and_parametrised_weights_stay_dense_and_say_so():
    layers = choose(Odd().eval(), "2:4", [], (2, 2, 2))
    reasons = {layer.name: layer.reason for layer in layers}
    assert layers[-1].name == "never"
    assert "never called" in reasons["never"]
    assert "called 2 times" in reasons["twice"]
    assert "shared with twin" in reasons["tied"]
    assert "shared with tied" in reasons["twin"]
    assert "parametrisation" in reasons["normed"]
    assert reasons["plain"] == ""
    assert "classifier head" in reasons["last"]  # no get_classifier(): the last layer to run


def test_tracing_leaves_weights_and_hooks_as_they_were():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    meta = choose(on_meta("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1), "2:4", [], (3, 32, 32))
    assert choose(model, "2:4", [], (3, 32, 32)) == meta
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_glob_that_matches_nothing_and_a_wrong_image_size_are_refused():
    model = on_meta("vit_tiny_patch16_224", depth=1)
    with pytest.raises(RecipeError, match=r"'block\.\*' matches none of the network's 6"):
        choose(model, "2:4", ["block.*"], (3, 224, 224))
    with pytest.raises(StageFailed, match="could not be traced with one image of 3x100x100"):
        choose(model, "2:4", [], (3, 100, 100))
    with pytest.raises(RecipeError, match="no sparsity pattern"):
        choose(model, "half", [], (3, 224, 224))
