import copy

import pytest
import torch
from pruning_networks import NETWORKS, correlated_images, small_resnet, small_vit
from torch import nn
from torch.nn import functional as F

from mpdeploy.errors import StageFailed
from mpdeploy.pruning.capture import Stream, alive_bytes, capture, layer_nodes, state_of, weight_name

SIZE = (3, 32, 32)


def last(graph):
    """The operation that computes the logits."""
    output = next(node for node in graph.nodes if node.op == "output")
    return output.all_input_nodes[0]


def walked(model, batches):
    """Logits per batch by a stream."""
    graph = capture(model, SIZE)
    stream = Stream(graph, state_of(model, graph), batches)
    stream.advance(last(graph), through=True)
    return stream.output(last(graph))


def bytes_per_image(stream, place):
    values = [value for value in stream.values[place].values() if isinstance(value, torch.Tensor)]
    return sum(value.numel() * value.element_size() for value in values)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_stream_gives_the_modules_own_logits_on_batches_of_any_size(name):
    model = NETWORKS[name]()
    batches = correlated_images(9).split([1, 5, 3])
    before = [batch.clone() for batch in batches]
    with torch.no_grad():
        wanted = [model(batch) for batch in batches]
    for theirs, ours in zip(wanted, walked(model, batches), strict=True):
        assert torch.allclose(theirs, ours, atol=1e-6)
    assert all(map(torch.equal, before, batches))


@pytest.mark.parametrize("name", NETWORKS)
def test_only_values_that_a_later_operation_needs_stay_and_their_bytes_keep_the_bound(name):
    model, images = NETWORKS[name](), correlated_images(4)
    graph = capture(model, SIZE)
    bound, stream = alive_bytes(graph), Stream(graph, state_of(model, graph), [images[:1], images[1:]])
    most = 0.0
    for place, node in enumerate(stream.nodes[:-1]):
        stream.advance(node, through=True)
        alive = {
            other
            for index, other in enumerate(stream.nodes)
            if (index <= place or other.op == "placeholder") and other.op != "get_attr"
            if any(stream.place[user] > place for user in other.users)
        }
        assert [set(values) for values in stream.values] == [alive, alive]
        most = max(most, bytes_per_image(stream, 0), bytes_per_image(stream, 1) / 3)
    assert 0.5 * bound <= most <= bound


class Windows(nn.Module):
    """Most of what it computes hangs on an axis of images times windows, as in a Swin network."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 24)
        self.head = nn.Linear(24, 2)

    def forward(self, images):
        windows = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 4, 5, 1).reshape(-1, 16, 3)
        return self.head(self.fc(windows).mean(dim=1).reshape(-1, 64, 24).mean(dim=1))


def test_windows_count_in_the_bound_of_bytes():
    model, images = Windows().eval(), correlated_images(2)
    graph = capture(model, SIZE)
    stream = Stream(graph, state_of(model, graph), [images])
    (node,) = layer_nodes(graph, ["fc"]).values()
    stream.advance(node, through=True)
    assert bytes_per_image(stream, 0) / 2 <= alive_bytes(graph)


class Unread(nn.Module):
    """Nothing reads what its operation in place returns."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 2)

    def forward(self, images):
        hidden = self.conv(images)
        F.relu(hidden, inplace=True)
        return self.head(hidden.mean(dim=(2, 3)))


def test_a_value_that_nothing_reads_is_freed_too():
    model, images = Unread().eval(), correlated_images(3)
    graph = capture(model, SIZE)
    stream = Stream(graph, state_of(model, graph), [images])
    stream.advance(last(graph), through=True)
    assert torch.allclose(stream.output(last(graph))[0], model(images), atol=1e-6)
    assert list(stream.values[0]) == [last(graph)]


class Normalises(nn.Module):
    """Changes the image it is given."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, images):
        images.sub_(0.5).div_(0.25)
        return self.head(images.mean(dim=(2, 3)))


def test_a_network_that_writes_into_its_image_does_not_write_into_the_callers():
    model, images = Normalises().eval(), correlated_images(3)
    wanted, before = model(images.clone()), images.clone()
    first, second = walked(model, [images])[0], walked(model, [images])[0]
    assert torch.allclose(first, wanted, atol=1e-6)
    assert torch.equal(first, second)
    assert torch.equal(images, before)


def test_a_changed_weight_takes_effect_downstream_and_not_upstream():
    model, images = small_vit(), correlated_images(4)
    graph = capture(model, SIZE)
    nodes = layer_nodes(graph, ["blocks.0.mlp.fc1", "blocks.1.mlp.fc1"])
    stream = Stream(graph, state_of(model, graph), [images])
    first, second = nodes.values()
    stream.advance(first)
    before = stream.argument(first, 0)[0].clone()
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.mul_(2)
        model.blocks[0].attn.qkv.weight.zero_()  # already behind
    assert torch.equal(stream.argument(first, 0)[0], before)
    seen = {}
    model.blocks[1].mlp.fc1.register_forward_pre_hook(lambda _module, given: seen.update(x=given[0]))
    changed = copy.deepcopy(model)
    with torch.no_grad():
        small = small_vit()
        model.blocks[0].attn.qkv.weight.copy_(small.blocks[0].attn.qkv.weight)  # as it was when the stream passed
        model(images)
    stream.advance(second)
    assert torch.allclose(stream.argument(second, 0)[0], seen["x"], atol=1e-6)
    with torch.no_grad():
        changed(images)
    assert not torch.allclose(stream.argument(second, 0)[0], seen["x"], atol=1e-3)


def test_a_copied_state_keeps_the_dense_network_while_the_module_changes():
    model, images = small_resnet(), correlated_images(4)
    graph = capture(model, SIZE)
    with torch.no_grad():
        wanted = model(images)
    before = {name: tensor.clone() for name, tensor in state_of(model, graph).items()}
    stream = Stream(graph, before, [images])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    stream.advance(last(graph), through=True)
    assert torch.allclose(stream.output(last(graph))[0], wanted, atol=1e-6)


class WithConstant(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(12, 4)
        self.loose = torch.arange(12.0)  # neither parameter nor buffer
        self.register_buffer("kept", torch.full((4,), 0.5), persistent=False)

    def forward(self, images):
        return self.fc(images.flatten(1) + self.loose) * self.kept + torch.tensor([1.0, 2.0, 3.0, 4.0])


def test_constants_that_are_no_parameters_come_along():
    model, images = WithConstant().eval(), torch.randn(5, 3, 2, 2)
    graph = capture(model, (3, 2, 2))
    stream = Stream(graph, state_of(model, graph), [images])
    stream.advance(last(graph), through=True)
    assert torch.allclose(stream.output(last(graph))[0], model(images), atol=1e-6)


def test_layers_are_found_once_each_in_the_order_in_which_they_run():
    model = small_vit()
    graph = capture(model, SIZE)
    names = ["blocks.1.mlp.fc2", "blocks.0.attn.proj", "blocks.0.attn.qkv"]
    nodes = layer_nodes(graph, names)
    assert list(nodes) == names[::-1]
    assert [weight_name(node) for node in nodes.values()] == [f"{name}.weight" for name in names[::-1]]
    with pytest.raises(StageFailed, match=r"stored weight of layer 'blocks.0.norm1' 0 times"):
        layer_nodes(graph, ["blocks.0.norm1"])


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(12, 12)

    def forward(self, images):
        return self.fc(self.fc(images.flatten(1)))


class FixedBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(12, 2)

    def forward(self, images):
        return self.fc(images.reshape(2, 12))


class Choosy(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(12, 2)

    def forward(self, images):
        return self.fc(images.flatten(1)) if float(images.sum()) > 0 else images


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (nn.Flatten(), "no parameters: there is nothing to prune"),
        (FixedBatch(), "fixes the number of images per batch"),
        (Choosy(), "could not be captured with images of 3x2x2"),
    ],
)
def test_what_cannot_be_walked_through_is_refused_with_the_reason(module, says):
    with pytest.raises(StageFailed, match=says):
        capture(module.eval(), (3, 2, 2))


def test_a_weight_that_is_used_twice_is_refused():
    graph = capture(Twice().eval(), (3, 2, 2))
    with pytest.raises(StageFailed, match=r"stored weight of layer 'fc' 2 times"):
        layer_nodes(graph, ["fc"])
