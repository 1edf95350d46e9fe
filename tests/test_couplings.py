"""Every coupling found in a network is folded with a random order, in float64: the logits must not move."""

import functools
from dataclasses import replace

import pytest
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from mpdeploy.errors import StageFailed
from mpdeploy.pruning.capture import capture
from mpdeploy.pruning.couplings import Coupling, Member, find, fold
from mpdeploy.pruning.layers import linears_and_convs

SAME = 1e-10  # relative change of logits in float64 that counts as none
CHANGED = 1e-4


def small(name, **options):
    return functools.partial(timm.create_model, name, num_classes=10, **options)


def torchvision_vit():
    return torchvision.models.VisionTransformer(32, 8, 2, 2, 64, 128, num_classes=10)


def torchvision_shufflenet():
    return torchvision.models.shufflenet_v2_x0_5(num_classes=10)


def mixer():
    return timm.models.mlp_mixer.MlpMixer(num_classes=10, img_size=32, patch_size=8, num_blocks=2, embed_dim=32)


VIT = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 64}
NETWORKS = {
    "vit": (small("vit_tiny_patch16_224", num_heads=2, **VIT), 32),
    "vit with mean pooling": (small("vit_tiny_patch16_224", num_heads=2, global_pool="avg", **VIT), 32),
    "vit with LayerScale and registers": (small("vit_small_patch14_reg4_dinov2", num_heads=2, **{**VIT, "patch_size": 16}), 32),
    "vit with q and k norms": (small("vit_tiny_patch16_224", num_heads=2, qk_norm=True, **VIT), 32),
    "vit with SwiGLU": (small("vit_giant_patch14_dinov2", num_heads=2, mlp_ratio=4, **{**VIT, "patch_size": 16}), 32),
    "deit distilled": (small("deit_tiny_distilled_patch16_224", num_heads=2, **VIT), 32),
    "eva02": (small("eva02_tiny_patch14_224", img_size=28, depth=2), 28),
    "dinov3": (small("vit_small_patch16_dinov3", img_size=32, depth=2), 32),
    "beit": (small("beit_base_patch16_224", num_heads=2, **VIT), 32),
    "swin": (small("swin_tiny_patch4_window7_224", img_size=32, window_size=4, depths=(2, 2), num_heads=(3, 6), embed_dim=48), 32),
    "swin v2": (small("swinv2_tiny_window8_256", img_size=32, window_size=4, depths=(2, 2), num_heads=(3, 6), embed_dim=48), 32),
    "torchvision vit": (torchvision_vit, 32),
    "mixer": (mixer, 32),
    "xcit": (small("xcit_nano_12_p16_224", img_size=32, depth=2), 32),
    "resnet18": (small("resnet18", channels=(8, 16, 16, 16)), 32),
    "resnet50d": (small("resnet50d", channels=(8, 16, 16, 16), stem_width=8), 32),
    "resnext": (small("resnext50_32x4d", layers=(1, 1, 1, 1)), 32),
    "resnet with group norm": (small("resnet50_gn", layers=(1, 1, 1, 1)), 32),
    "convnext": (small("convnext_atto", depths=(1, 1, 2, 1)), 32),
    "convnext with linears": (small("convnext_tiny", depths=(1, 1, 2, 1), dims=(16, 32, 48, 64)), 32),
    "convnextv2": (small("convnextv2_atto", depths=(1, 1, 2, 1)), 32),
    "convnextv2 with linears": (small("convnextv2_tiny", depths=(1, 1, 2, 1), dims=(16, 32, 48, 64)), 32),
    "efficientnet_lite0": (small("efficientnet_lite0"), 32),
    "efficientnet_b0": (small("efficientnet_b0"), 32),
    "mobilenetv2": (small("mobilenetv2_050"), 32),
    "mobilenetv3": (small("mobilenetv3_small_050"), 32),
    "regnet": (small("regnety_002"), 32),
    "densenet": (small("densenet121", block_config=(2, 3, 2)), 32),
    "inception": (small("inception_v3", aux_logits=False), 96),
    "ghostnet": (small("ghostnet_050"), 32),
    "shufflenet": (torchvision_shufflenet, 32),
    "maxvit": (small("maxvit_rmlp_pico_rw_256", img_size=64), 64),
    "nf_resnet": (small("nf_resnet26"), 32),
    "vgg": (small("vgg11_bn"), 32),
}  # fmt: skip
SLOW = {"vgg", "maxvit", "inception", "mobilenetv2", "mobilenetv3", "regnet", "beit", "xcit", "swin v2", "nf_resnet",
        "vit with mean pooling", "convnext", "convnextv2 with linears", "vit with q and k norms"}  # fmt: skip
ALL = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in NETWORKS]


def shaken(network, seed=0):
    """The network in float64 with random values everywhere, so that no bias, scale or head hides an error."""
    network = network.eval().double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if not tensor.is_floating_point():
                continue
            random = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            if name.endswith("running_var"):
                tensor.copy_(1 + 0.5 * random.tanh())
            elif tensor.ndim < 2 or name.endswith(("gamma", "scale")):
                tensor.copy_(tensor + 0.3 * random)
            elif not tensor.abs().sum():
                tensor.copy_(random * tensor.shape[-1] ** -0.5)
            elif not name.endswith("weight"):
                tensor.copy_(tensor + 0.3 * random)
    return network


def found_in(network, size):
    return find(capture(network, (3, size, size)), network.state_dict())


@functools.cache
def example(name):
    """The network, what is found in it, images and their logits; folding leaves it as good as new."""
    make, size = NETWORKS[name]
    torch.manual_seed(0)
    network = shaken(make())
    images = torch.randn(3, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return network, found_in(network, size), images, network(images)


def random_order(coupling, generator):
    width = coupling.size // coupling.blocks
    return torch.cat([torch.randperm(width, generator=generator) + b * width for b in range(coupling.blocks)])


def change(network, images, logits):
    with torch.no_grad():
        return float((network(images) - logits).abs().max() / logits.abs().max())


def by_name(found):
    return {coupling.name: coupling for coupling in found.couplings}


# --- the function is preserved ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_folding_every_coupling_found_leaves_the_logits_where_they_were(name):
    network, found, images, logits = example(name)
    generator = torch.Generator().manual_seed(2)
    state = network.state_dict()
    assert float(logits.std()) > 1e-3
    before = {key: tensor.clone() for key, tensor in state.items()}
    for coupling in found.couplings:
        fold(state, coupling, random_order(coupling, generator))
    assert change(network, images, logits) < SAME
    for coupling in found.couplings:
        moved = {member.tensor for member in (*coupling.producers, *coupling.consumers)}
        assert any(not torch.equal(state[tensor], before[tensor]) for tensor in moved), coupling


@pytest.mark.parametrize("name", ALL)
def test_every_layer_with_inputs_is_in_a_coupling_or_refused_with_a_sentence_and_no_place_is_named_twice(name):
    network, found, _, _ = example(name)
    consumed = {member.tensor for coupling in found.couplings for member in coupling.consumers}
    state = network.state_dict()
    layers = {layer for layer in linears_and_convs(network) if not layer.endswith("out_proj") or layer in found.refused}
    for layer in layers:
        assert (f"{layer}.weight" in consumed) != (layer in found.refused), layer
    assert all(reason[0].isupper() and reason.endswith(".") and ".." not in reason for reason in found.refused.values())
    taken = set()
    for coupling in found.couplings:
        assert coupling.size % coupling.blocks == 0 and coupling.consumers and coupling.producers
        for member in (*coupling.producers, *coupling.consumers):
            assert member.start + coupling.size <= state[member.tensor].shape[member.axis]
            places = {(member.tensor, member.axis, member.start + i) for i in range(coupling.size)}
            assert not places & taken
            taken |= places
    assert len(by_name(found)) == len(found.couplings)


@pytest.mark.parametrize("name", ["vit", "eva02", "swin", "resnet50d", "efficientnet_b0", "convnextv2", "densenet"])
def test_a_coupling_that_lacks_any_one_of_its_members_changes_the_logits(name):
    """The test above can fail: a member left out is noticed, whichever it is."""
    network, found, images, logits = example(name)
    generator = torch.Generator().manual_seed(3)
    state = network.state_dict()
    kinds = {coupling.kind: coupling for coupling in reversed(found.couplings)}
    for coupling in kinds.values():
        order = random_order(coupling, generator)
        for dropped in (*coupling.producers, *coupling.consumers):
            wrong = replace(
                coupling,
                producers=tuple(m for m in coupling.producers if m != dropped),
                consumers=tuple(m for m in coupling.consumers if m != dropped),
            )
            fold(state, wrong, order)
            assert change(network, images, logits) > 10 * SAME, (coupling.name, dropped)
            fold(state, wrong, order.argsort())
        assert change(network, images, logits) < SAME


# --- what must be found ----------------------------------------------------------------------------------------------


def starts(members, tensor):
    return [(member.axis, member.start) for member in members if member.tensor == tensor]


@pytest.mark.parametrize("name", ["vit", "vit with LayerScale and registers", "dinov3", "torchvision vit"])
def test_in_a_vit_all_inputs_but_the_image_are_free(name):
    _, found, _, _ = example(name)
    kinds = [coupling.kind for coupling in found.couplings]
    assert sorted(kinds) == ["attention value", "attention value", "hidden", "hidden", "residual"]
    assert len(found.refused) == 1
    assert next(iter(found.refused.values())).endswith("the channels of the image itself.")


def test_the_members_of_a_vits_couplings_are_the_ones_that_a_person_would_list():
    found = by_name(example("vit")[1])
    assert found["blocks.0.mlp.fc1 -> blocks.0.mlp.fc2"] == Coupling(
        "blocks.0.mlp.fc1 -> blocks.0.mlp.fc2", "hidden", 256, 1,
        (Member("blocks.0.mlp.fc1.weight", 0, 0), Member("blocks.0.mlp.fc1.bias", 0, 0)),
        (Member("blocks.0.mlp.fc2.weight", 1, 0),),
    )  # fmt: skip
    assert found["blocks.1.attn.qkv -> blocks.1.attn.proj"] == Coupling(
        "blocks.1.attn.qkv -> blocks.1.attn.proj", "attention value", 64, 2,
        (Member("blocks.1.attn.qkv.weight", 0, 128), Member("blocks.1.attn.qkv.bias", 0, 128)),
        (Member("blocks.1.attn.proj.weight", 1, 0),),
    )  # fmt: skip
    stream = found["patch_embed.proj -> blocks.0.attn.qkv and 4 more"]
    assert [member.tensor for member in stream.consumers] == [
        "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight", "blocks.1.attn.qkv.weight", "blocks.1.mlp.fc1.weight",
        "head.weight",
    ]  # fmt: skip
    rows = {"patch_embed.proj.weight": 0, "patch_embed.proj.bias": 0, "cls_token": 2, "pos_embed": 2}
    rows |= {f"blocks.{b}.{layer}.{kind}": 0 for b in (0, 1) for layer in ("attn.proj", "mlp.fc2", "norm1", "norm2")
             for kind in ("weight", "bias")}  # fmt: skip
    rows |= {"norm.weight": 0, "norm.bias": 0}
    assert {member.tensor: member.axis for member in stream.producers} == rows
    assert len(stream.producers) == len(rows)


def test_a_gated_mlp_moves_both_halves_of_its_first_layer_and_a_fused_bias_part_by_part():
    _, found, _, _ = example("eva02")
    gated = by_name(found)["blocks.0.mlp.fc1 -> blocks.0.mlp.fc2"]
    assert starts(gated.producers, "blocks.0.mlp.fc1.weight") == [(0, 0), (0, gated.size)]
    value = by_name(found)["blocks.0.attn.qkv -> blocks.0.attn.proj"]
    assert value.blocks == 3 and starts(value.producers, "blocks.0.attn.qkv.weight") == [(0, 384)]
    assert starts(value.producers, "blocks.0.attn.v_bias") == [(0, 0)]
    assert not any("q_bias" in member.tensor for coupling in found.couplings for member in coupling.producers)


def test_both_heads_of_a_distilled_deit_move_with_the_stream():
    (stream,) = [coupling for coupling in example("deit distilled")[1].couplings if coupling.kind == "residual"]
    assert {"head.weight", "head_dist.weight"} <= {member.tensor for member in stream.consumers}
    assert starts(stream.producers, "dist_token") == [(2, 0)]


def test_swins_patch_merging_takes_the_stream_in_at_four_places():
    _, found, _, _ = example("swin")
    streams = [coupling for coupling in found.couplings if coupling.kind == "residual"]
    assert [coupling.size for coupling in streams] == [48, 96]
    assert sorted(starts(streams[0].consumers, "layers.1.downsample.reduction.weight")) == [
        (1, 0),
        (1, 48),
        (1, 96),
        (1, 144),
    ]
    assert sorted(starts(streams[0].producers, "layers.1.downsample.norm.weight")) == [
        (0, 0),
        (0, 48),
        (0, 96),
        (0, 144),
    ]
    values = [coupling for coupling in found.couplings if coupling.kind == "attention value"]
    assert [coupling.blocks for coupling in values] == [3, 3, 6, 6]


def test_in_a_resnet_every_bottleneck_and_every_stage_is_free():
    _, found, _, _ = example("resnet50d")
    named = by_name(found)
    for stage, depth in enumerate((3, 4, 6, 3), start=1):
        for block in range(depth):
            layer = f"layer{stage}.{block}"
            assert named[f"{layer}.conv1 -> {layer}.conv2"].kind == "bottleneck"
            inner = named[f"{layer}.conv2 -> {layer}.conv3"]
            assert {member.tensor for member in inner.producers} == {
                f"{layer}.conv2.weight", *(f"{layer}.bn2.{part}" for part in ("weight", "bias", "running_mean", "running_var"))
            }  # fmt: skip
    streams = [coupling for coupling in found.couplings if coupling.kind == "residual"]
    assert [coupling.size for coupling in streams] == [32, 64, 64, 64]
    assert starts(streams[-1].consumers, "fc.weight") == [(1, 0)]
    assert list(found.refused) == ["conv1.0"]


def test_depthwise_kernels_and_squeeze_and_excitation_move_with_the_expanded_channels():
    _, found, _, _ = example("efficientnet_b0")
    wide = by_name(found)["blocks.1.0.conv_pw -> blocks.1.0.se.conv_reduce and 1 more"]
    assert [member.tensor for member in wide.consumers] == [
        "blocks.1.0.se.conv_reduce.weight", "blocks.1.0.conv_pwl.weight"
    ]  # fmt: skip
    tensors = {member.tensor for member in wide.producers}
    assert {
        "blocks.1.0.conv_dw.weight",
        "blocks.1.0.se.conv_expand.weight",
        "blocks.1.0.se.conv_expand.bias",
    } <= tensors
    assert found.refused["blocks.1.0.conv_dw"].startswith("It is a depthwise convolution")
    assert "the image itself" in found.refused["conv_stem"]


@pytest.mark.parametrize("name", ["convnext with linears", "convnextv2"])
def test_convnexts_hidden_channels_move_through_global_response_normalisation(name):
    _, found, _, _ = example(name)
    for stage, depth in enumerate((1, 1, 2, 1)):
        for block in range(depth):
            mlp = f"stages.{stage}.blocks.{block}.mlp"
            coupling = by_name(found)[f"{mlp}.fc1 -> {mlp}.fc2"]
            assert (f"{mlp}.grn.weight" in {member.tensor for member in coupling.producers}) == (name == "convnextv2")
    assert sum(coupling.kind == "residual" for coupling in found.couplings) == 4


def test_a_dense_blocks_parts_move_at_their_own_place_in_every_later_layer():
    _, found, _, _ = example("densenet")
    first = by_name(found)[
        "features.denseblock1.denselayer1.conv2 -> features.denseblock1.denselayer2.conv1 and 1 more"
    ]
    assert first.kind == "concatenated" and first.size == 32
    assert {member.start for member in first.consumers} == {64}
    assert starts(first.producers, "features.transition1.norm.running_var") == [(0, 64)]


def test_grouped_convolutions_keep_their_outputs_in_their_groups_and_their_inputs_as_they_are():
    _, found, _, _ = example("resnext")
    inner = by_name(found)["layer1.0.conv2 -> layer1.0.conv3"]
    assert inner.blocks == 32 and inner.size == 128
    assert "grouped convolution (32 groups)" in found.refused["layer1.0.conv2"]


# --- what must be refused --------------------------------------------------------------------------------------------


class Small(nn.Module):
    """A stem, something in the middle that a test brings along, and a head."""

    def __init__(self, middle, width=16, out=16):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.next, self.head = nn.Conv2d(out, 8, 3), nn.Linear(8, 5)
        self.middle = middle

    def forward(self, x):
        x = self.middle(F.relu(self.norm(self.stem(x))))
        return self.head(self.next(x).mean((2, 3)))


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def outcome(network, size=8):
    """What is found in a network, after all of it was folded and the logits compared."""
    torch.manual_seed(0)
    network = shaken(network)
    images = torch.randn(3, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        logits = network(images)
    found = found_in(network, size)
    for coupling in found.couplings:
        fold(network.state_dict(), coupling, random_order(coupling, torch.Generator().manual_seed(1)))
    assert change(network, images, logits) < SAME
    return found


FREE = {
    "nothing": (lambda x: x, 16),
    "glu": (lambda x: F.glu(x, dim=1), 8),
    "halves multiplied": (lambda x: x[:, :8] * x[:, 8:].sigmoid(), 8),
    "CReLU": (lambda x: torch.cat([x.relu(), (-x).relu()], dim=1), 32),
    "softmax over the channels": (lambda x: x.softmax(dim=1), 16),
    "a norm over the channels": (lambda x: x / x.norm(dim=1, keepdim=True), 16),
    "a gate from the mean channel": (lambda x: x * x.mean(dim=1, keepdim=True).sigmoid(), 16),
    "space rolled and flipped": (lambda x: x.roll((1, 2), (2, 3)).flip(3), 16),
    "space to tokens and back": (lambda x: x.flatten(2).transpose(1, 2).transpose(1, 2).unflatten(2, (8, 8)), 16),
    "space to windows": (lambda x: x.view(-1, 16, 2, 4, 2, 4).permute(0, 2, 4, 1, 3, 5).reshape(-1, 16, 4, 4), 16),
    "Gram attention": (lambda x: ((x.flatten(2) @ x.flatten(2).mT / 64).softmax(-1) @ x.flatten(2)).unflatten(2, (8, 8)), 16),
}  # fmt: skip
FROZEN = {
    "pixel shuffle": (lambda x: F.pixel_shuffle(x, 2), 4, "pixel_shuffle"),
    "cumulative sum over the channels": (lambda x: x.cumsum(1), 16, "cumsum"),
    "sorted channels": (lambda x: x.sort(dim=1).values, 16, "sort"),
    "einsum": (lambda x: torch.einsum("bchw,bdhw->bchw", x, x), 16, "einsum"),
    "channels rolled": (lambda x: x + x.roll(1, 1), 16, "another order"),
    "channels reversed": (lambda x: x + x.flip(1), 16, "another order"),
    "a ramp over the channels": (lambda x: x * torch.arange(16.0, dtype=x.dtype)[:, None, None], 16, "mul"),
    "a causal mask over the channels": (lambda x: (torch.ones(16, 16, dtype=x.dtype).tril() @ x.flatten(2)).unflatten(2, (8, 8)), 16, ""),
    "every other channel": (lambda x: x[:, ::2], 8, "side by side"),
    "shuffled channels": (lambda x: x.unflatten(1, (2, 8)).transpose(1, 2).flatten(1, 2), 16, "side by side"),
    "wrongly reshaped": (lambda x: x.flatten(1).unflatten(1, (8, 16, 8)).transpose(1, 2) * torch.arange(16, dtype=x.dtype)[:, None, None], 16, ""),
    "padded channels": (lambda x: F.pad(x, (0, 0, 0, 0, 4, 4)), 24, "padded"),
}  # fmt: skip


@pytest.mark.parametrize("name", FREE)
def test_operations_that_treat_channels_alike_leave_their_order_free(name):
    function, out = FREE[name]
    found = outcome(Small(Function(function), out=out))
    assert "next" not in found.refused
    assert any(member.tensor == "stem.weight" for coupling in found.couplings for member in coupling.producers)
    assert found.couplings[-1].consumers[0].tensor == "head.weight"


@pytest.mark.parametrize("name", FROZEN)
def test_operations_that_tell_channels_apart_fix_their_order_and_the_reason_says_so(name):
    function, out, says = FROZEN[name]
    found = outcome(Small(Function(function), out=out))
    assert not any("stem" in member.tensor for coupling in found.couplings for member in coupling.producers)
    assert found.refused["next"].startswith("The order of its inputs is fixed: ") and says in found.refused["next"]
    assert [coupling.name for coupling in found.couplings] == ["next -> head"]


def test_a_channel_that_plays_a_part_of_its_own_stays_and_the_others_are_free():
    found = outcome(Small(Function(lambda x: x * x[:, :1])))
    (coupling,) = [c for c in found.couplings if c.consumers[0].tensor == "next.weight"]
    assert coupling.size == 15 and coupling.consumers == (Member("next.weight", 1, 1),)


def test_group_norm_keeps_channels_in_their_group():
    found = outcome(Small(nn.GroupNorm(4, 16)))
    (coupling,) = [c for c in found.couplings if c.consumers[0].tensor == "next.weight"]
    assert (coupling.blocks, coupling.size) == (4, 16)
    assert "middle.bias" in {member.tensor for member in coupling.producers}


def test_channels_flattened_with_their_pixels_are_refused():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 12), nn.ReLU(), nn.Linear(12, 5)
    )
    found = outcome(network)
    assert "side by side" in found.refused["3"]
    assert [coupling.name for coupling in found.couplings] == ["3 -> 5"]


class Twice(nn.Module):
    """Two layers of one weight, or of a weight that is computed first."""

    def __init__(self, how):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.head, self.how = nn.Linear(16, 5), how
        if how == "tied":
            self.c.weight = self.b.weight

    def forward(self, x):
        x = self.a(x.mean((2, 3))).relu()
        if self.how == "called twice":
            return self.head(self.b(self.b(x).relu()))
        if self.how == "computed":
            return self.head(F.linear(x, self.b.weight / self.b.weight.norm(), self.b.bias))
        if self.how == "scaled by its neighbour":
            return self.head(self.b(x) * self.c.bias + self.c.weight.mean())
        return self.head(self.c(self.b(x).relu()))


@pytest.mark.parametrize("how", ["tied", "called twice", "computed"])
def test_weights_with_two_uses_or_with_a_computed_value_are_left_alone(how):
    found = outcome(Twice(how))
    assert "b" in found.refused
    touched = {member.tensor for coupling in found.couplings for member in (*coupling.producers, *coupling.consumers)}
    assert not touched & {"b.weight", "c.weight"}


def test_a_vector_from_elsewhere_moves_along():
    found = outcome(Twice("scaled by its neighbour"))
    (coupling,) = [c for c in found.couplings if c.consumers[0].tensor == "head.weight"]
    assert {member.tensor for member in coupling.producers} == {"b.weight", "b.bias", "c.bias"}


class Quiet(nn.Module):
    """A part that torch.export keeps as one operation of its own."""

    def forward(self, x):
        with torch.no_grad():
            gate = x.mean(1, keepdim=True).sigmoid()
        return x * gate


def test_a_part_without_gradients_is_no_stumbling_block():
    assert "next -> head" in by_name(outcome(Small(Quiet())))


class InPlace(nn.Module):
    """Writes into a part of a tensor that is read again as a whole."""

    def __init__(self, alike):
        super().__init__()
        self.alike = alike

    def forward(self, x):
        x = x.clone()
        if self.alike:
            x[:, :8].mul_(2).add_(x[:, 8:])
        else:
            x[:, :8] = x[:, 4:12].flip(1)
        return x


@pytest.mark.parametrize("alike", [True, False])
def test_writing_into_a_part_of_a_tensor_is_seen(alike):
    found = outcome(Small(InPlace(alike)))
    assert ("next" in found.refused) != alike or len(found.couplings) > 1


def test_a_shuffle_network_is_folded_where_its_halves_allow_and_refused_elsewhere():
    _, found, _, _ = example("shufflenet")
    assert found.couplings
    assert any("side by side" in reason for reason in found.refused.values())


# --- fold ------------------------------------------------------------------------------------------------------------


def test_fold_moves_exactly_the_named_places_and_a_wrong_order_is_refused():
    state = {"a": torch.arange(24.0).reshape(8, 3), "b": torch.arange(16.0).reshape(2, 8)}
    coupling = Coupling("a -> b", "hidden", 4, 2, (Member("a", 0, 2),), (Member("b", 1, 4),))
    fold(state, coupling, torch.tensor([1, 0, 2, 3]))
    assert state["a"][:, 0].tolist() == [0, 3, 9, 6, 12, 15, 18, 21]
    assert state["b"][0].tolist() == [0, 1, 2, 3, 5, 4, 6, 7]
    for order, says in (
        ([0, 1, 2], "no permutation"),
        ([0, 0, 2, 3], "no permutation"),
        ([2, 1, 0, 3], "out of its block"),
    ):
        with pytest.raises(StageFailed, match=says):
            fold(state, coupling, torch.tensor(order))
    with pytest.raises(StageFailed, match="lacks b"):
        fold({"a": state["a"]}, coupling, torch.arange(4))


@settings(max_examples=20, deadline=None)
@given(
    widths=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    skips=st.lists(st.sampled_from(["none", "add", "cat", "gate"]), min_size=4, max_size=4),
    seed=st.integers(0, 10**6),
)
def test_random_networks_of_additions_gates_and_concatenations_keep_their_function(widths, skips, seed):
    class Random(nn.Module):
        def __init__(self):
            super().__init__()
            width, self.layers = 3, nn.ModuleList()
            for wide, skip in zip(widths, skips, strict=False):
                wide = width if skip in ("add", "gate") else wide
                self.layers.append(nn.Linear(width, wide))
                width = width + wide if skip == "cat" else wide
            self.head = nn.Linear(width, 4)

        def forward(self, x):
            x = x.mean((2, 3))
            for layer, skip in zip(self.layers, skips, strict=False):
                y = layer(x).relu()
                x = (
                    torch.cat([y, x], 1)
                    if skip == "cat"
                    else x + y
                    if skip == "add"
                    else x * y
                    if skip == "gate"
                    else y
                )
            return self.head(x)

    torch.manual_seed(seed)
    outcome(Random())
