import copy

import pytest
import torch
from pruning_networks import correlated_images, small_convnext, small_resnet, small_vit
from torch import nn

from mpdeploy.pruning.branches import Landing, landing
from mpdeploy.pruning.capture import Stream, capture, layer_nodes, state_of, weight_name

SIZE = (3, 32, 32)


def landings(model, size=SIZE):
    graph = capture(model.eval(), size)
    state = state_of(model, graph)
    nodes = {weight_name(node).removesuffix(".weight"): node for node in graph.nodes if weight_name(node)}
    return {name: landing(graph, node, state) for name, node in nodes.items()}


def adds_to(found):
    return {name for name, landed in found.items() if landed.other is not None}


@pytest.mark.parametrize("init_values", [None, 0.1])
def test_in_a_vit_the_last_layer_of_each_branch_adds_to_the_residual_stream(init_values):
    found = landings(small_vit(init_values=init_values))
    assert adds_to(found) == {f"blocks.{block}.{name}" for block in (0, 1) for name in ("attn.proj", "mlp.fc2")}
    for name, landed in found.items():
        assert landed.norm == ""
        scaled = init_values is not None and landed.other is not None
        block = name.rpartition(".")[0].rpartition(".")[0]
        assert landed.scale == (f"{block}.{'ls1' if 'attn' in name else 'ls2'}.gamma" if scaled else "")
    # The other summand of a block is the sum that the branch before it left.
    assert found["blocks.0.mlp.fc2"].other in found["blocks.1.attn.proj"].other.all_input_nodes


def test_in_a_resnet_each_convolution_lands_in_its_batch_norm_and_no_sum_is_repaired():
    found = landings(small_resnet())
    assert not adds_to(found)
    convolutions = {name: landed.norm for name, landed in found.items() if name != "fc"}
    for name, norm in convolutions.items():
        stem, _, last = name.rpartition(".")
        if last.startswith("conv") and stem:
            assert norm == f"{stem}.bn{last[4:]}"
    assert convolutions["layer1.0.downsample.1"] == "layer1.0.downsample.2"
    assert all(convolutions.values()) and len(set(convolutions.values())) == len(convolutions)
    assert found["fc"] == Landing()


@pytest.mark.parametrize("conv_mlp", [True, False])
def test_in_a_convnext_the_sum_lies_behind_a_transposed_scale_and_nothing_is_claimed(conv_mlp):
    assert set(landings(small_convnext(conv_mlp=conv_mlp)).values()) == {Landing()}


class Sums(nn.Module):
    """A layer whose output meets the stream in the way that `how` says."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.stem, self.branch, self.late = (nn.Linear(12, 12) for _ in range(3))
        self.norm = nn.BatchNorm1d(12)
        self.gain = nn.Parameter(torch.linspace(0.5, 2, 12))
        self.spots = nn.Parameter(torch.ones(1, 12))

    def forward(self, images):
        stream = self.stem(images.flatten(1))
        y = self.branch(stream)
        match self.how:
            case "after":
                return stream + y
            case "scaled":
                return self.gain * y + stream
            case "in place":
                return y.mul_(self.gain).add_(stream)
            case "later":  # the other summand is not known yet when the layer runs
                return y + self.late(stream)
            case "alpha":
                return torch.add(stream, y, alpha=2)
            case "broadcast":
                return y + stream.mean(dim=1, keepdim=True)
            case "parameter":
                return y + self.spots
            case "number":
                return y + 1.0
            case "twice":
                return y + stream + y.mean()
            case "nonlinear":
                return y.relu() + stream
            case "subtracted":
                return stream - y
            case "itself":
                return y + y
            case "two scales":
                return y * self.gain * self.gain + stream
            case "scale without sum":
                return y * self.gain
            case "norm":
                return self.norm(y) + stream
            case "norm of two":
                return self.norm(y) + y


@pytest.mark.parametrize(
    ("how", "repaired", "scale", "norm"),
    [
        ("after", True, "", ""),
        ("scaled", True, "gain", ""),
        ("in place", True, "gain", ""),
        ("norm", False, "", "norm"),
        *(
            (how, False, "", "")
            for how in ("later", "alpha", "broadcast", "parameter", "number", "twice", "nonlinear", "subtracted",
                        "itself", "two scales", "scale without sum", "norm of two")
        ),
    ],
)  # fmt: skip
def test_only_a_plain_sum_with_a_known_summand_is_repaired(how, repaired, scale, norm):
    model = Sums(how)
    found = landings(model, (3, 2, 2))["branch"]
    assert (found.other is not None, found.scale, found.norm) == (repaired, scale, norm)


def both(model, name, images, harm):
    """Streams of a network and of a harmed copy, both standing right behind a layer of the first."""
    graph = capture(model, SIZE)
    worse = copy.deepcopy(model)
    with torch.no_grad():
        harm(worse)
    (node,) = layer_nodes(graph, [name]).values()
    states = [state_of(network, graph) for network in (model, worse)]
    dense, pruned = (Stream(graph, state, list(images.split(3))) for state in states)
    dense.advance(node, through=True)
    pruned.advance(node)
    return landing(graph, node, states[0]), node, dense, pruned


@pytest.mark.parametrize("init_values", [None, 0.1])
@pytest.mark.parametrize("name", ["blocks.0.mlp.fc2", "blocks.1.attn.proj"])
def test_what_is_wanted_of_a_branch_makes_the_harmed_sum_the_dense_one(name, init_values):
    model = small_vit(init_values=init_values)
    if init_values:
        with torch.no_grad():
            for block in model.blocks:
                block.ls1.gamma.uniform_(0.05, 0.2), block.ls2.gamma.uniform_(-0.2, -0.05)
    found, node, dense, pruned = both(
        model, name, correlated_images(7), lambda worse: worse.blocks[0].attn.proj.weight.mul_(0.3)
    )
    outputs = dense.output(node)
    wanted = found.wanted(dense, pruned, outputs)
    scale = dense.state[found.scale] if found.scale else 1.0
    parts = zip(wanted, outputs, dense.output(found.other), pruned.output(found.other), strict=True)
    for target, own, theirs, ours in parts:
        assert not torch.allclose(theirs, ours, atol=1e-3)
        assert torch.allclose(ours + scale * target, theirs + scale * own, atol=1e-5)


def test_channels_with_a_tiny_scale_are_left_alone():
    model = small_vit(init_values=0.1)
    with torch.no_grad():
        model.blocks[0].ls2.gamma[:3] = torch.tensor([0.0, 1e-5, -1e-5])
    found, node, dense, pruned = both(
        model, "blocks.0.mlp.fc2", correlated_images(6), lambda worse: worse.blocks[0].attn.proj.weight.mul_(0.3)
    )
    outputs = dense.output(node)
    for target, own in zip(found.wanted(dense, pruned, outputs), outputs, strict=True):
        assert torch.isfinite(target).all()
        assert torch.equal(target[..., :3], own[..., :3])
        assert not torch.isclose(target[..., 3:], own[..., 3:]).all()


def test_without_a_sum_and_without_harm_the_dense_output_is_wanted():
    model = small_vit()
    for name, same in (("blocks.0.mlp.fc1", True), ("blocks.1.mlp.fc2", False)):
        found, node, dense, pruned = both(model, name, correlated_images(4), lambda worse: None)
        outputs = dense.output(node)
        wanted = found.wanted(dense, pruned, outputs)
        assert (wanted is outputs) == same
        assert all(map(torch.equal, wanted, outputs))
