import pytest
import torch
from pruning_networks import NETWORKS, correlated_images, quiet, small_convnext, small_resnet, small_vit
from torch import nn

from mpdeploy.errors import StageFailed
from mpdeploy.pruning import reconstruct as reconstruct_module
from mpdeploy.pruning.capture import Stream, capture, state_of
from mpdeploy.pruning.layers import choose
from mpdeploy.pruning.patterns import Pattern, as_rows, bad_groups, from_rows, project
from mpdeploy.pruning.reconstruct import blocks, cut_points, reconstruct

SIZE = (3, 32, 32)
HALF = Pattern(2, 4)


def names_of(model):
    return [layer.name for layer in choose(model, "2:4", (), SIZE) if layer.pattern]


def pruned(model):
    """Magnitude-pruned in place: graph, dense state, masks."""
    graph = capture(model, SIZE)
    dense = {name: tensor.clone() for name, tensor in state_of(model, graph).items()}
    masks = {}
    for name in names_of(model):
        weight = model.get_submodule(name).weight.data
        masks[name] = from_rows(project(as_rows(weight.abs()), HALF), weight.shape)
        weight.mul_(masks[name])
    return graph, dense, masks


def run(model, images, steps=15, seed=0, batch=8):
    graph, dense, masks = pruned(model)
    results = reconstruct(model, graph, dense, images.split(batch), masks, steps=steps, seed=seed, progress=quiet)
    return results, dense, masks


def block_errors(model, graph, dense_state, images, plan):
    """Relative squared errors of each block's output, each network on its own inputs."""
    ours, theirs = (Stream(graph, state, [images]) for state in (state_of(model, graph), dense_state))
    for block in plan:
        for stream in (ours, theirs):
            stream.advance(block.end, through=True)
        goal = theirs.output(block.end)[0]
        yield float((ours.output(block.end)[0] - goal).square().sum() / goal.square().sum())


EXPECTED = {
    "vit": [f"blocks.{i}.attn.qkv blocks.{i}.attn.proj blocks.{i}.mlp.fc1 blocks.{i}.mlp.fc2" for i in range(2)],
    "resnet": [
        "conv1.6 layer1.0.conv1 layer1.0.conv2 layer1.0.downsample.1",
        *(f"layer{i}.0.conv1 layer{i}.0.conv2 layer{i}.0.downsample.1" for i in (2, 3, 4)),
    ],
    "convnext": [
        "stages.0.blocks.0.mlp.fc1 stages.0.blocks.0.mlp.fc2",
        *(f"stages.{i}.downsample.1 stages.{i}.blocks.0.mlp.fc1 stages.{i}.blocks.0.mlp.fc2" for i in (1, 2, 3)),
    ],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_blocks_span_whole_transformer_and_residual_blocks(name):
    model = NETWORKS[name]()
    graph = capture(model, SIZE)
    layers = names_of(model)
    found = blocks(graph, layers, state_of(model, graph))
    assert [block.layers for block in found] == [tuple(row.split()) for row in EXPECTED[name]]
    assert [block.end for block in found] == cut_points(graph)
    for block in found:
        assert {f"{layer}.weight" for layer in block.layers} <= block.parameters
    owned = [parameter for block in found for parameter in block.parameters]
    assert len(owned) == len(set(owned))


def test_blocks_of_a_swin_network_end_where_the_first_axis_counts_images():
    model = NETWORKS["swin"]()
    graph = capture(model, SIZE)
    found = blocks(graph, names_of(model), state_of(model, graph))
    assert [block.layers[-1] for block in found] == [
        f"layers.{i}.mlp.fc2" for i in ("0.blocks.0", "1.blocks.0", "1.blocks.1")
    ]


class Plain(nn.Module):
    """No residual sum: every operation is a cut."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3), nn.ReLU(inplace=True))
        self.head = nn.Linear(8, 4)

    def forward(self, images):
        return self.head(self.body(images).mean(dim=(2, 3)))


class Uncut(nn.Module):
    """The image itself is needed until the end."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(11, 4)

    def forward(self, images):
        hidden = self.two(self.one(images).relu()).relu()
        return self.head(torch.cat([hidden, images], dim=1).mean(dim=(2, 3)))


class Shared(nn.Module):
    """Two residual blocks with one LayerNorm between them."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.stem, self.head = nn.Conv2d(3, 16, 8, stride=8), nn.Linear(16, 4)
        self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, images):
        hidden = self.stem(images).flatten(2).transpose(1, 2)
        hidden = hidden + self.one(self.norm(hidden))
        hidden = hidden + self.two(self.norm(hidden))
        return self.head(hidden.mean(dim=1))


def seeded(kind):
    torch.manual_seed(0)
    return kind().eval()


def test_without_residual_sums_each_layer_is_a_block_and_without_cuts_all_are_one():
    plain, uncut = seeded(Plain), seeded(Uncut)
    for model, wanted in ((plain, [("body.2",)]), (uncut, [("one", "two")])):
        graph = capture(model, SIZE)
        layers = ["one", "two"] if model is uncut else names_of(model)
        assert [block.layers for block in blocks(graph, layers, state_of(model, graph))] == wanted
    results, *_ = run(uncut, correlated_images(16))
    assert len(results) == 1 and results[0].error_after < results[0].error_before


def test_a_parameter_that_two_blocks_read_stays():
    model = seeded(Shared)
    results, dense, _ = run(model, correlated_images(16))
    assert [result.layers for result in results] == [("one",), ("two",)]
    assert all(result.steps for result in results)
    assert torch.equal(model.norm.weight, dense["norm.weight"])
    assert torch.equal(model.norm.bias, dense["norm.bias"])
    assert not torch.equal(model.one.bias, dense["one.bias"])


@pytest.mark.parametrize("name", NETWORKS)
def test_errors_fall_masks_hold_and_the_dense_tensors_stay(name):
    model, images = NETWORKS[name](), correlated_images(24)
    graph, dense, masks = pruned(model)
    before = {key: tensor.clone() for key, tensor in dense.items()}
    buffers = {key: tensor.clone() for key, tensor in model.named_buffers()}
    told = []
    results = reconstruct(
        model, graph, dense, images.split(7), masks, steps=15, seed=0, progress=lambda *at: told.append(at)
    )
    assert all(result.error_after <= result.error_before for result in results)
    assert sum(result.error_after < 0.95 * result.error_before for result in results) >= len(results) / 2
    assert told == [(i + 1, len(results)) for i in range(len(results))]
    assert {layer for result in results for layer in result.layers} == set(masks)
    for layer, mask in masks.items():
        weight = model.get_submodule(layer).weight
        assert bad_groups(weight, HALF) == 0 and not weight[~mask].any()
    assert all(torch.equal(before[key], dense[key]) for key in before)
    assert all(torch.equal(buffers[key], tensor) for key, tensor in model.named_buffers())
    assert not any(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("make", [small_vit, small_resnet, small_convnext])
def test_reported_errors_are_those_of_the_weights_left_in_the_module(make):
    model, images = make(), correlated_images(16)
    graph, dense, masks = pruned(model)
    plan = blocks(graph, list(masks), state_of(model, graph))
    results = reconstruct(model, graph, dense, [images], masks, steps=10, seed=0, progress=quiet)
    held = images[3::4]
    measured = list(block_errors(model, graph, dense, held, plan))
    assert measured == pytest.approx([result.error_after for result in results], rel=1e-3)


def test_targets_come_from_the_dense_network():
    """With targets from the pruned network nothing would be wrong, and nothing would be learned."""
    model, images = small_vit(), correlated_images(24)
    graph, dense, masks = pruned(model)
    twin = {name: tensor.clone() for name, tensor in state_of(model, graph).items()}
    results = reconstruct(model, graph, twin, [images], masks, steps=5, seed=0, progress=quiet)
    assert all(result.error_before == 0 and result.error_after == 0 and result.steps == 0 for result in results)
    assert all(torch.equal(tensor, twin[name]) for name, tensor in state_of(model, graph).items())
    results = reconstruct(model, graph, dense, [images], masks, steps=15, seed=0, progress=quiet)
    assert all(0 < result.error_after < result.error_before for result in results)


def test_every_kind_of_parameter_of_a_block_gets_a_gradient():
    model = small_vit()
    _, dense, masks = run(model, correlated_images(24))
    for name, parameter in model.blocks.named_parameters():
        before = dense[f"blocks.{name}"]
        mask = masks.get(f"blocks.{name}".removesuffix(".weight"), torch.ones_like(before, dtype=torch.bool))
        moved = parameter.detach() != before
        # A key's bias adds the same to every score of a query, so softmax never sees it.
        if not name.endswith("qkv.bias"):
            assert moved[mask].double().mean() > 0.9, name
    for name in ("patch_embed.proj.weight", "pos_embed", "cls_token", "head.weight", "norm.weight"):
        assert torch.equal(model.get_parameter(name), dense[name])


@pytest.mark.parametrize("make", [small_vit, small_resnet])
def test_reruns_give_the_same_bits_and_another_seed_others(make):
    images = correlated_images(64)
    first, second, other = make(), make(), make()
    for model, seed in ((first, 3), (second, 3), (other, 4)):
        run(model, images, steps=6, seed=seed)
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))
    assert not all(map(torch.equal, first.state_dict().values(), other.state_dict().values()))


def test_minibatches_come_from_all_fitting_images():
    images = correlated_images(64)
    model = small_vit()
    graph, dense, masks = pruned(model)
    seen = []
    original = reconstruct_module._gather
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            reconstruct_module, "_gather", lambda parts, chosen: seen.append(chosen) or original(parts, chosen)
        )
        reconstruct(model, graph, dense, images.split(10), masks, steps=12, seed=0, progress=quiet)
    assert {number for chosen in seen for number in chosen} == set(range(48))
    assert all(len(set(chosen)) == reconstruct_module.MINIBATCH for chosen in seen)


def test_a_step_that_does_not_help_is_not_kept():
    images, model = correlated_images(16), small_vit()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reconstruct_module, "LR", 50.0)
        graph, dense, masks = pruned(model)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        results = reconstruct(model, graph, dense, [images], masks, steps=5, seed=0, progress=quiet)
    assert all(result.steps == 0 and result.error_after == result.error_before for result in results)
    assert all("did not fall" in result.note or "met NaN" in result.note for result in results)
    assert all(map(torch.equal, before.values(), model.state_dict().values()))


def test_no_steps_change_nothing():
    model = small_vit()
    graph, dense, masks = pruned(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    results = reconstruct(model, graph, dense, [correlated_images(8)], masks, steps=0, seed=0, progress=quiet)
    assert all(result.error_after == result.error_before and result.note == "" for result in results)
    assert all(map(torch.equal, before.values(), model.state_dict().values()))


class Silent(nn.Module):
    """The first block gives zero where the image is zero."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 8, stride=8, bias=False), nn.Linear(8, 4)
        self.one, self.two = nn.Conv2d(8, 8, 1, bias=False), nn.Conv2d(8, 8, 1)

    def forward(self, images):
        hidden = self.stem(images)
        hidden = hidden + self.one(hidden)
        hidden = hidden + self.two(hidden)
        return self.head(hidden.mean(dim=(2, 3)))


def test_a_block_whose_dense_output_is_zero_is_left_alone():
    (silent, loud), *_ = run(seeded(Silent), torch.zeros(8, *SIZE))
    assert (silent.error_before, silent.error_after, silent.steps) == (None, None, 0)
    assert silent.note == "The dense output is zero on the held-out images, so nothing can judge a fit."
    assert loud.error_before == loud.error_after == 0


class Halves(nn.Module):
    """A residual sum whose neighbour, one of two halves of a tensor, is still needed."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 8, stride=8), nn.Linear(16, 4)
        self.one, self.two = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, images):
        halves = self.stem(images).chunk(2, dim=1)
        left = halves[0] + self.one(halves[0])
        right = halves[1] + self.two(halves[1])
        return self.head(torch.cat([left, right], dim=1).mean(dim=(2, 3)))


def test_no_cut_where_half_of_a_tensor_is_still_alive():
    model = seeded(Halves)
    graph = capture(model, SIZE)
    assert [block.layers for block in blocks(graph, ["one", "two"], state_of(model, graph))] == [("one", "two")]
    results, *_ = run(model, correlated_images(48), steps=40)
    assert all(result.error_after < result.error_before for result in results)


def broken(images, what):
    model = small_vit()
    graph, dense, masks = pruned(model)
    if what == "dense":
        dense["blocks.1.mlp.fc1.weight"][0, 0] = float("nan")
    elif what == "pruned":
        model.blocks[1].mlp.fc1.bias.data[0] = float("inf")
    elif what == "lacks":
        del dense["blocks.1.mlp.fc1.weight"]
    elif what == "same":
        dense = state_of(model, graph)
    elif what == "mask":
        model.blocks[1].mlp.fc1.weight.data += 1.0
    reconstruct(model, graph, dense, [images], masks, steps=2, seed=0, progress=quiet)


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("images", r"The dense network's output of block 'blocks.0.attn.qkv..blocks.0.mlp.fc2' is NaN or infinite\."),
        ("dense", r"The dense network's output of block 'blocks.1.attn.qkv..blocks.1.mlp.fc2' is NaN or infinite\."),
        ("pruned", r"The pruned network's output of block 'blocks.1.attn.qkv..blocks.1.mlp.fc2' is NaN or infinite\."),
        ("lacks", r"The dense state holds no copy of 'blocks.1.mlp.fc1.weight'\."),
        ("same", r"The dense state holds no copy of '.*'\."),
        ("mask", r"The weight of layer 'blocks.1.mlp.fc1' is not zero outside its mask\."),
        ("few", r"at least 4 calibration images; 3 were given"),
    ],
)
def test_what_cannot_be_done_is_refused_in_a_sentence(what, says):
    images = correlated_images(3 if what == "few" else 8)
    if what == "images":
        images[7] = float("nan")  # held out
    with pytest.raises(StageFailed, match=says):
        broken(images, what)


def test_the_network_as_a_whole_comes_closer_to_the_dense_one():
    model, images = small_vit(depth=3), correlated_images(64)
    fresh = correlated_images(64, seed=9)
    with torch.no_grad():
        wanted = model(fresh)
        graph, dense, masks = pruned(model)
        before = float((model(fresh) - wanted).square().mean())
    reconstruct(model, graph, dense, [images], masks, steps=60, seed=0, progress=quiet)
    with torch.no_grad():
        assert float((model(fresh) - wanted).square().mean()) < 0.7 * before
