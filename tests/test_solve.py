import copy

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from mpdeploy.errors import RecipeError, StageFailed
from mpdeploy.pruning.layers import choose
from mpdeploy.pruning.moments import Moments, convolution_rows
from mpdeploy.pruning.patterns import Pattern, bad_groups, project
from mpdeploy.pruning.refit import refit_rows
from mpdeploy.pruning.solve import batch_norms, prune_network, recalibrate_batch_norm, split_images

KEEP = Pattern(2, 4)


def quiet(done, total):
    pass


def correlated_images(count, size=32, seed=0):
    """Smooth random images: neighbouring pixels, hence features, are correlated as in photographs."""
    noise = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))
    return noise.cumsum(-1).cumsum(-2) / size


def small_vit():
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=64, num_heads=2, num_classes=10
    ).eval()


def small_resnet():
    torch.manual_seed(0)
    return timm.create_model("resnet10t", channels=(8, 16, 16, 16), stem_width=8, num_classes=5).eval()


def prune(model, batches, *, method="activation", refit=True, damping=0.01, passes=4, progress=quiet, skip=()):
    layers = choose(model, "2:4", list(skip), (3, 32, 32))
    return prune_network(
        model, batches, layers, method=method, refit=refit, damping=damping, passes=passes, progress=progress
    )


# --- least squares ---------------------------------------------------------------------------------------------------


def problem(rows, inputs, samples=2000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    mix *= torch.arange(1, inputs + 1, dtype=torch.float64)[:, None] ** -0.7
    x = torch.randn(samples, inputs, generator=generator, dtype=torch.float64) @ mix
    weight = torch.randn(rows, inputs, generator=generator)
    mask = project(weight.abs() * x.square().mean(dim=0).sqrt(), KEEP)
    return x, weight, mask


@pytest.mark.parametrize("direct", [True, False])
def test_the_refit_is_the_least_squares_solution(direct):
    x, weight, mask = problem(7, 32)
    ridge = 0.01 * float(x.square().sum(dim=0).mean())
    fitted = refit_rows(weight, mask, x.T @ x + ridge * torch.eye(32, dtype=torch.float64), direct=direct)
    for row in range(7):
        kept = mask[row].nonzero()[:, 0]
        dense = weight[row].double()
        left = torch.cat([x[:, kept], ridge**0.5 * torch.eye(32, dtype=torch.float64)[:, kept]])
        right = torch.cat([x @ dense, ridge**0.5 * dense])
        best = torch.linalg.lstsq(left, right[:, None]).solution[:, 0]
        assert torch.allclose(
            fitted.weight[row, kept], best, rtol=1e-8 if direct else 1e-2, atol=1e-9 if direct else 2e-3
        )
    assert not fitted.weight[~mask].any()


def test_the_refit_meets_its_optimality_condition_and_reports_the_residual_truthfully():
    x, weight, mask = problem(40, 96)
    gram = x.T @ x + torch.eye(96, dtype=torch.float64)
    for direct, tolerance in ((True, 1e-10), (False, 1e-4)):
        fitted = refit_rows(weight, mask, gram, direct=direct)
        gradient = ((fitted.weight - weight.double()) @ gram) * mask
        relative = (gradient.norm(dim=1) / ((weight.double() @ gram) * mask).norm(dim=1)).max()
        assert fitted.residual == pytest.approx(float(relative), rel=1e-9)
        assert fitted.residual <= tolerance
        assert (fitted.iterations == 0) == direct


def test_conjugate_gradient_and_cholesky_leave_the_same_output_error():
    x, weight, mask = problem(64, 320)
    gram = x.T @ x
    gram += 0.01 * gram.diagonal().mean() * torch.eye(320, dtype=torch.float64)

    def error(fitted):
        change = fitted.weight - weight.double()
        return float(((change @ gram) * change).sum())

    exact, iterative = (refit_rows(weight, mask, gram, direct=direct) for direct in (True, False))
    assert 0 <= error(iterative) / error(exact) - 1 < 5e-3
    assert error(exact) < 0.8 * float((((weight * ~mask).double() @ gram) * (weight * ~mask)).sum())


def test_a_singular_second_moment_is_refused():
    weight, mask = torch.ones(2, 4), torch.tensor([[True, True, False, False]] * 2)
    with pytest.raises(StageFailed, match="singular"):
        refit_rows(weight, mask, torch.ones(4, 4, dtype=torch.float64))


# --- moments ---------------------------------------------------------------------------------------------------------


def test_streamed_moments_equal_those_of_all_rows_at_once_even_under_a_large_mean():
    rows = torch.randn(900, 20, generator=torch.Generator().manual_seed(0)) * 0.1 + torch.linspace(-50, 50, 20)
    moments = Moments(scatter=True)
    for part in rows.split(200):
        moments.add(part)
    exact = rows.double()
    centred = exact - exact.mean(dim=0)
    assert torch.allclose(moments.mean, exact.mean(dim=0), rtol=1e-7)
    assert torch.allclose(moments.centred(), centred.T @ centred, rtol=1e-4, atol=1e-4)
    assert torch.allclose(moments.power(), exact.square().sum(dim=0), rtol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 2),
    padding=st.sampled_from([0, 1, (2, 1), "same", "valid"]),
    dilation=st.integers(1, 2),
)
def test_patches_times_the_flat_weight_are_the_convolution(kernel, stride, padding, dilation):
    stride = 1 if padding == "same" else stride
    images, weight = torch.randn(3, 4, 9, 8), torch.randn(6, 4, *kernel)
    rows = torch.cat(
        list(
            convolution_rows(
                {"input": images, "weight": weight, "stride": stride, "padding": padding, "dilation": dilation}
            )
        )
    )
    expected = F.conv2d(images, weight, None, stride, padding, dilation)
    assert torch.allclose(rows @ weight.flatten(1).T, expected.permute(0, 2, 3, 1).reshape(-1, 6), atol=1e-4)


# --- networks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [small_vit, small_resnet])
@pytest.mark.parametrize("method", ["magnitude", "activation"])
def test_every_chosen_layer_follows_the_pattern_and_the_refit_lowers_its_held_out_error(build, method):
    model = build()
    dense = copy.deepcopy(model.state_dict())
    layers = choose(model, "2:4", [], (3, 32, 32))
    results = prune(model, correlated_images(48).split(12), method=method)
    assert [result.name for result in results] == [layer.name for layer in layers if layer.pattern]
    for result in results:
        weight = model.get_submodule(result.name).weight
        assert bad_groups(weight, KEEP) == result.bad_groups == 0
        assert result.density == float((weight != 0).double().mean()) == 0.5
        assert 0 < result.error_after_refit < 0.8 * result.error_before_refit < 0.8
    for layer in layers:
        if not layer.pattern:
            assert torch.equal(model.get_submodule(layer.name).weight, dense[f"{layer.name}.weight"])


@pytest.mark.parametrize("refit", [True, False])
@pytest.mark.parametrize(("build", "name"), [(small_vit, "blocks.0.mlp.fc1"), (small_resnet, "layer2.0.conv1")])
def test_the_reported_error_is_the_one_measured_on_the_held_out_images(build, name, refit):
    model, images = build(), correlated_images(24)
    before = copy.deepcopy(model)
    only = [layer for layer in choose(model, "2:4", [], (3, 32, 32)) if layer.name == name]
    (result,) = prune_network(
        model, images.split(6), only, method="activation", refit=refit, damping=0.01, passes=1, progress=quiet
    )
    inputs = []
    layer = before.get_submodule(name)
    layer.register_forward_hook(lambda _module, given, _output: inputs.append(given[0]))
    with torch.no_grad():
        fit, held = (torch.cat(part) for part in split_images(images.split(6)))
        before(fit), before(held)
        if layer.bias is None:
            change = model.get_submodule(name)(inputs[1]) - layer(inputs[1])
            energy = layer(inputs[1]).square().sum()
        else:
            linear = inputs[1] @ layer.weight.T
            change = inputs[1] @ model.get_submodule(name).weight.T - linear
            mean = inputs[0].flatten(0, 1).mean(dim=0)  # the bias shift comes from the fitting images alone
            change = change - (model.get_submodule(name).weight - layer.weight) @ mean
            energy = linear.square().sum()
    assert result.error_after_refit == pytest.approx(float(change.square().sum() / energy), rel=1e-3)
    assert (result.error_after_refit < result.error_before_refit) == refit
    assert ("no bias" in result.note) == (layer.bias is None) == (not result.bias_corrected)


def mean_input(network, name, images):
    """Mean over tokens and images of what a linear layer gets, float64 [inputs]."""
    seen = []
    handle = network.get_submodule(name).register_forward_pre_hook(lambda _module, given: seen.append(given[0]))
    with torch.no_grad():
        network(images)
    handle.remove()
    return seen[0].double().flatten(0, -2).mean(dim=0)


def test_a_corrected_bias_gives_back_the_dense_layers_mean_output_on_the_pruned_networks_inputs():
    model, images = small_vit(), correlated_images(32)
    dense = copy.deepcopy(model)
    results = prune(model, images.split(8), passes=8)
    for result in results:
        mean = mean_input(model, result.name, images)
        theirs, ours = (
            layer.weight.double() @ mean + layer.bias.double()
            for layer in (network.get_submodule(result.name) for network in (dense, model))
        )
        assert result.bias_corrected
        assert torch.allclose(theirs, ours, atol=2e-5)


def test_a_rerun_gives_the_same_bits_and_progress_counts_to_its_end():
    states, ticks = [], []
    for _ in range(2):
        model = small_vit()
        ticks.clear()
        prune(model, correlated_images(16).split(4), passes=3, progress=lambda done, total: ticks.append((done, total)))
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert [done for done, _ in ticks] == list(range(1, ticks[0][1] + 1))


def test_batch_norm_statistics_become_those_of_the_calibration_batches():
    model, batches = small_resnet(), correlated_images(36).split(12)
    shifted = [batch * 3 + 1 for batch in batches]
    prune(model, shifted)
    norms = batch_norms(model)
    assert norms
    inputs = []
    norms[0].register_forward_hook(lambda _module, given, _output: inputs.append(given[0].double()))
    with torch.no_grad():
        for batch in shifted:
            model(batch)
    means = torch.stack([part.mean(dim=(0, 2, 3)) for part in inputs]).mean(dim=0)
    variances = torch.stack([part.var(dim=(0, 2, 3)) for part in inputs]).mean(dim=0)
    assert torch.allclose(norms[0].running_mean.double(), means, atol=1e-5)
    assert torch.allclose(norms[0].running_var.double(), variances, rtol=1e-4)
    assert all(int(norm.num_batches_tracked) == 3 and norm.momentum == 0.1 and not norm.training for norm in norms)


def test_batch_norm_keeps_its_statistics_where_the_images_are_too_few():
    model, batches = small_resnet(), correlated_images(28).split(7)
    before = [norm.running_mean.clone() for norm in batch_norms(model)]
    prune(model, [batch * 3 + 1 for batch in batches])
    assert all(torch.equal(a, norm.running_mean) for a, norm in zip(before, batch_norms(model), strict=True))


def test_batch_norm_refuses_a_batch_too_small_for_statistics():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with pytest.raises(StageFailed, match="batch of 1 images"):
        recalibrate_batch_norm(model, [torch.ones(1, 4)], lambda: None)


def test_a_refit_that_hurts_on_held_out_images_is_dropped_and_said():
    model, images = small_vit(), correlated_images(16)
    # The fitting images all but repeat one picture, the held-out ones are of another kind.
    images[torch.arange(16) % 4 != 3] = images[0] + 1e-3 * torch.randn(12, 3, 32, 32)
    images[3::4] = torch.randn(4, 3, 32, 32) * 20
    results = prune(model, [images], damping=1e-4, method="magnitude")
    dropped = [result for result in results if "refit was not kept" in result.note]
    assert dropped
    assert all(result.error_after_refit == result.error_before_refit for result in dropped)
    assert all(result.error_after_refit <= result.error_before_refit for result in results)
    for result in dropped:
        assert "above the bare mask's" in result.note
        assert bad_groups(model.get_submodule(result.name).weight, KEEP) == 0


class Blind(nn.Module):
    """Its second layer gets inputs of which the first four are always zero and two others are equal."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(12, 16)
        self.second = nn.Linear(16, 8)
        self.head = nn.Linear(8, 3)
        with torch.no_grad():
            self.first.weight[:4], self.first.bias[:4] = 0, -1
            self.first.weight[5], self.first.bias[5] = self.first.weight[4], self.first.bias[4]

    def forward(self, images):
        return self.head(self.second(F.relu(self.first(images.flatten(1)))))


def blind_layers(model):
    return [layer for layer in choose(model, "2:4", [], (3, 2, 2)) if layer.name == "second"]


def test_dead_inputs_are_noted_and_do_no_harm():
    torch.manual_seed(1)
    model = Blind().eval()
    layers = blind_layers(model)
    (result,) = prune_network(
        model,
        [torch.randn(64, 3, 2, 2)],
        layers,
        method="activation",
        refit=True,
        damping=0.01,
        passes=1,
        progress=quiet,
    )
    assert result.note == "4 of its 16 inputs are always zero on the calibration images."
    assert result.error_after_refit < result.error_before_refit
    assert torch.isfinite(model.second.weight).all()


def test_equal_inputs_without_damping_fail_by_name_with_the_remedy():
    torch.manual_seed(1)
    model = Blind().eval()
    with torch.no_grad():
        model.second.weight[:, 4:6] += 9  # both of the equal inputs are kept
    with pytest.raises(StageFailed, match=r"(?s)'second' could not be refitted.*singular.*raise the damping"):
        prune_network(
            model, [torch.randn(64, 3, 2, 2)], blind_layers(model), method="magnitude", refit=True, damping=0.0,
            passes=1, progress=quiet,
        )  # fmt: skip


def test_nan_in_weights_or_activations_names_the_layer():
    model, images = small_vit(), correlated_images(8)
    images[5, 0, 0, 0] = float("nan")
    with pytest.raises(StageFailed, match=r"inputs of layer 'blocks.0.attn.qkv' hold NaN"):
        prune(model, [images])
    with torch.no_grad():
        model.blocks[1].mlp.fc2.weight[3, 3] = float("inf")
    with pytest.raises(StageFailed, match=r"weights of layer 'blocks.1.mlp.fc2' hold NaN or infinity"):
        prune(model, [correlated_images(8)])


def test_nothing_to_prune_too_few_images_and_wrong_settings_are_refused():
    model = small_vit()
    with pytest.raises(StageFailed, match="nothing to prune"):
        prune(model, [correlated_images(8)], skip=["*"])
    with pytest.raises(StageFailed, match="at least 4 calibration images; 3 were given"):
        prune(model, [correlated_images(3)])
    with pytest.raises(RecipeError, match=r"(?s)'wanda' is unknown.*magnitude, activation"):
        prune(model, [correlated_images(8)], method="wanda")
    with pytest.raises(RecipeError, match="damping must be a finite number"):
        prune(model, [correlated_images(8)], damping=float("nan"))
    with pytest.raises(RecipeError, match="At least one calibration pass"):
        prune(model, [correlated_images(8)], passes=0)


def test_images_are_split_by_their_number_whatever_the_batches():
    images = torch.arange(21.0)[:, None]
    for size in (1, 2, 5, 21):
        fit, held = (torch.cat(part)[:, 0].tolist() for part in split_images(images.split(size)))
        assert held == [3.0, 7.0, 11.0, 15.0, 19.0]
        assert sorted(fit + held) == list(range(21))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_gives_the_errors_of_the_cpu():
    results = [prune(small_vit().to(device), [correlated_images(16)]) for device in ("cpu", "cuda")]
    for here, there in zip(*results, strict=True):
        assert there.error_after_refit == pytest.approx(here.error_after_refit, rel=0.02)
