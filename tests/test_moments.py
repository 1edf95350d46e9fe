import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from mpdeploy.pruning import moments as module
from mpdeploy.pruning.capture import capture, layer_nodes
from mpdeploy.pruning.moments import Moments, layer_rows, patches
from mpdeploy.pruning.patterns import as_rows


def pairs(count=900, inputs=20, outputs=6, mean=50.0, seed=0):
    """Rows whose means are hundreds of times their spread, and outputs that depend on them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, inputs, generator=generator) * 0.1 + torch.linspace(-mean, mean, inputs)
    y = x @ torch.randn(inputs, outputs, generator=generator) + torch.randn(count, outputs, generator=generator)
    return x, y


def streamed(x, y, size=200):
    moments = Moments()
    for part in zip(x.split(size), y.split(size), strict=True):
        moments.add(*part)
    return moments


def close(ours, exact, left, right):
    """Whether entries agree to 1e-5 of the Cauchy-Schwarz bound of each."""
    return bool(((ours - exact).abs() <= 1e-5 * torch.outer(left.sqrt(), right.sqrt())).all())


@pytest.mark.parametrize("mean", [0.0, 50.0])
def test_streamed_moments_equal_those_of_all_rows_at_once_even_under_a_large_mean(mean):
    x, y = pairs(mean=mean)
    moments = streamed(x, y)
    xs, ys = x.double(), y.double()
    xc, yc = xs - xs.mean(dim=0), ys - ys.mean(dim=0)
    spread, goal = xc.square().sum(dim=0), yc.square().sum(dim=0)
    assert moments.count == 900
    assert torch.allclose(moments.mean, xs.mean(dim=0), rtol=1e-7, atol=1e-8)
    assert torch.allclose(moments.goal_mean, ys.mean(dim=0), rtol=1e-7, atol=1e-6)
    assert close(moments.centred(), xc.T @ xc, spread, spread)
    assert close(moments.cross(), yc.T @ xc, goal, spread)
    assert torch.allclose(moments.goal_spread(), goal, rtol=1e-5)
    assert torch.allclose(moments.power(), xs.square().sum(dim=0), rtol=1e-6)
    assert torch.allclose(moments.centred(), moments.centred().T, rtol=1e-12, atol=1e-12)


def test_the_size_of_the_slices_does_not_matter():
    x, y = pairs()
    reference = streamed(x, y, 900)
    spread, goal = reference.centred().diagonal(), reference.goal_spread()
    for size in (1, 7, 450):
        moments = streamed(x, y, size)
        assert close(moments.centred(), reference.centred(), spread, spread)
        assert close(moments.cross(), reference.cross(), goal, spread)


@pytest.mark.parametrize("inputs", [1, 2, 3, 5, 7, 13, 20])
def test_stripes_cover_any_width(inputs):
    x, y = pairs(count=50, inputs=inputs, mean=0.0)
    centred = x.double() - x.double().mean(dim=0)
    assert torch.allclose(streamed(x, y).centred(), centred.T @ centred, atol=1e-5)


def test_moments_taken_through_the_causes_are_those_of_the_outputs():
    x, _ = pairs(inputs=13, mean=5.0)
    generator = torch.Generator().manual_seed(4)
    causes, weight = x + 0.1 * torch.randn(x.shape, generator=generator), torch.randn(30, 13, generator=generator)
    y = causes @ weight.T + torch.linspace(-3, 3, 30)
    plain, through = streamed(x, y), Moments(weight)
    for part in zip(x.split(200), y.split(200), causes.split(200), strict=True):
        through.add(*part)
    spread, goal = plain.centred().diagonal(), plain.goal_spread()
    assert close(through.cross(), plain.cross(), goal, spread)
    assert torch.equal(through.goal_mean, plain.goal_mean)
    assert torch.equal(through.goal_spread(), plain.goal_spread())
    assert torch.equal(through.centred(), plain.centred())
    assert through.finite()
    causes[899, 3] = float("nan")
    through.add(x, y, causes)
    assert not through.finite()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", ["inputs", "outputs"])
@pytest.mark.parametrize("row", [0, 899])
def test_a_single_nan_or_infinity_among_inputs_or_outputs_is_seen(bad, side, row):
    x, y = pairs()
    assert streamed(x, y).finite()
    (x if side == "inputs" else y)[row, 2] = bad
    assert not streamed(x, y).finite()


def test_an_input_that_is_always_zero_has_no_power_and_one_that_never_varies_no_spread():
    x, y = pairs(inputs=8)
    x[:, 3], x[:, 5] = 0.0, 2.5
    moments = streamed(x, y)
    assert float(moments.power()[3]) == 0.0
    assert float(moments.power()[5]) == pytest.approx(900 * 2.5**2)
    assert not moments.centred()[[3, 5]].any()
    assert (moments.power()[[0, 1, 2, 4, 6, 7]] > 0).all()


# --- rows of an operation --------------------------------------------------------------------------------------------


class Network(nn.Module):
    def __init__(self, layer, head):
        super().__init__()
        self.layer, self.head = layer, head

    def forward(self, images):
        return self.head(self.layer(images).flatten(1).mean(dim=1, keepdim=True))


def node_of(layer, size):
    graph = capture(Network(layer, nn.Linear(1, 2)).eval(), size)
    return layer_nodes(graph, ["layer"])["layer"]


@settings(max_examples=25, deadline=None)
@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    stride=st.one_of(st.integers(1, 2), st.tuples(st.integers(1, 2), st.integers(1, 3))),
    padding=st.sampled_from([0, 1, (2, 1), "same", "valid"]),
    dilation=st.one_of(st.integers(1, 2), st.tuples(st.integers(1, 2), st.integers(1, 2))),
)
def test_patches_times_the_grouped_weight_are_the_convolution(kernel, stride, padding, dilation):
    stride = 1 if padding == "same" else stride
    layer = nn.Conv2d(4, 6, kernel, stride, padding, dilation, bias=False)
    images = torch.randn(3, 4, 9, 8)
    found = patches(node_of(layer, (4, 9, 8)), images)
    flat = as_rows(layer.weight.detach()).reshape(6, -1)
    assert torch.allclose(found @ flat.T, layer(images).flatten(2).transpose(1, 2), atol=1e-4)
    # Groups of input channels at one kernel position lie side by side.
    assert torch.equal(flat[:, :4], layer.weight.detach()[:, :, 0, 0])


def rows_of(node, x, y, keep, seed=0):
    parts = list(layer_rows(node, x, y, keep, seed))
    return torch.cat([rows for rows, _ in parts]), torch.cat([goals for _, goals in parts])


LAYERS = {
    "tokens": (nn.Linear(6, 4), (3, 10, 6)),
    "map": (nn.Linear(6, 4), (3, 5, 6)),
    "convolution": (nn.Conv2d(3, 4, 3, stride=2, padding=1), (3, 12, 10)),
}


@pytest.mark.parametrize("keep", [1, 7, 10_000])
@pytest.mark.parametrize("name", LAYERS)
def test_inputs_and_outputs_are_drawn_at_the_same_positions_and_no_more_than_asked(name, keep):
    layer, size = LAYERS[name]
    node, images = node_of(layer, size), torch.randn(5, *size)
    with torch.no_grad():
        outputs = layer(images)
        x, y = rows_of(node, images, outputs, keep)
        weight = layer.weight if name != "convolution" else as_rows(layer.weight).reshape(4, -1)
        assert torch.allclose(x @ weight.T + layer.bias, y, atol=1e-5)
    positions = outputs[0].numel() // 4
    assert len(x) == 5 * min(keep, positions)
    # No position is drawn twice.
    assert len(torch.unique(y, dim=0)) == len(y)


def test_the_draw_depends_on_the_seed_alone_and_is_shared_by_the_images():
    layer, size = LAYERS["tokens"]
    node = node_of(layer, size)
    images = torch.arange(30.0).reshape(30, 1).expand(5, 30, 6).reshape(5, 3, 10, 6)
    goals = torch.zeros(5, 3, 10, 4)
    first, again, other = (rows_of(node, images, goals, 7, seed)[0] for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    per_image = first[:, 0].reshape(5, 7)
    assert bool((per_image == per_image[0]).all())


@pytest.mark.parametrize("name", LAYERS)
def test_small_slices_hold_the_same_rows(name, monkeypatch):
    layer, size = LAYERS[name]
    node, images = node_of(layer, size), torch.randn(5, *size)
    outputs = layer(images).detach()
    whole = rows_of(node, images, outputs, 7)
    monkeypatch.setattr(module, "SLICE", 1)
    parts = list(layer_rows(node, images, outputs, 7, 0))
    assert len(parts) == 5
    assert all(map(torch.equal, whole, rows_of(node, images, outputs, 7)))


def test_a_plain_batch_of_vectors_is_one_position_per_image():
    layer = nn.Linear(6, 4)
    node = node_of(nn.Sequential(nn.Flatten(), copy.deepcopy(layer))[1], (2, 1, 6))
    x, y = rows_of(node, torch.randn(5, 6), torch.randn(5, 4), 1)
    assert x.shape == (5, 6)
    assert y.shape == (5, 4)


def test_patches_of_an_uneven_same_padding_are_those_of_torch():
    layer = nn.Conv2d(2, 3, (2, 4), padding="same", dilation=(3, 1), bias=False)
    images = torch.randn(2, 2, 7, 9)
    flat = as_rows(layer.weight.detach()).reshape(3, -1)
    wanted = F.conv2d(images, layer.weight, padding="same", dilation=(3, 1)).flatten(2).transpose(1, 2)
    assert torch.allclose(patches(node_of(layer, (2, 7, 9)), images) @ flat.T, wanted, atol=1e-5)
