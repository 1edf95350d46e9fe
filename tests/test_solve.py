import copy

import pytest
import torch
from pruning_networks import NETWORKS, captured, correlated_images, quiet, small_resnet, small_vit
from torch import nn
from torch.nn import functional as F

from mpdeploy.errors import RecipeError, StageFailed
from mpdeploy.pruning import solve as module
from mpdeploy.pruning.layers import choose
from mpdeploy.pruning.masks import METHODS
from mpdeploy.pruning.moments import Moments
from mpdeploy.pruning.patterns import Pattern, bad_groups, project
from mpdeploy.pruning.refit import refit_rows
from mpdeploy.pruning.solve import Problem, Settings, prune_network, solve_layer, split_images

KEEP = Pattern(2, 4)


def prune(model, batches, *, pattern="2:4", only=None, skip=(), size=32, progress=quiet, **settings):
    layers = choose(model, pattern, list(skip), (3, size, size))
    if only:
        layers = [layer for layer in layers if layer.name in only]
    graph = captured(model, size)
    return prune_network(model, graph, batches, layers, settings=Settings(**settings), progress=progress)


def seen_by(network, name, images):
    """Inputs and outputs of a layer, float64."""
    seen = []
    handle = network.get_submodule(name).register_forward_hook(
        lambda _module, given, output: seen.append((given[0].double(), output.double()))
    )
    with torch.no_grad():
        network(images)
    handle.remove()
    return seen[0]


def shaken(model, images):
    """Its BatchNorms hold the statistics of the images, as after training, and affine parts that differ."""
    generator = torch.Generator().manual_seed(3)
    norms = [part for part in model.modules() if isinstance(part, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.weight.copy_(torch.rand(norm.weight.shape, generator=generator) + 0.5)
            norm.bias.copy_(torch.randn(norm.bias.shape, generator=generator) * 0.3)
            norm.momentum = None
            norm.train()
        model(images)
        for norm in norms:
            norm.momentum = 0.1
    return model.eval()


# --- networks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "method"), [*((name, "admm") for name in NETWORKS), ("vit", "magnitude"), ("resnet", "activation")]
)
def test_every_chosen_layer_follows_the_pattern_and_the_refit_lowers_its_held_out_error(name, method):
    model = NETWORKS[name]()
    dense = copy.deepcopy(model.state_dict())
    layers = choose(model, "2:4", [], (3, 32, 32))
    results = prune(model, correlated_images(64).split(16), method=method)
    assert [result.name for result in results] == [layer.name for layer in layers if layer.pattern]
    for result in results:
        weight = model.get_submodule(result.name).weight
        assert bad_groups(weight, KEEP) == result.bad_groups == 0
        assert result.density == float((weight != 0).double().mean()) == 0.5
        assert 0 < result.error_after_refit <= result.error_before_refit < 1.5
        assert (result.damping in Settings().damping) == ("not kept" not in result.note)
    kept = [result.error_after_refit / result.error_before_refit for result in results]
    assert sum(kept) / len(kept) < 0.75
    for layer in layers:
        if not layer.pattern:
            for part in ("weight", "bias"):
                key = f"{layer.name}.{part}"
                assert key not in dense or torch.equal(model.state_dict()[key], dense[key])


@pytest.mark.parametrize("text", ["4:8", "12:16", "1:4"])
def test_other_patterns_hold_too(text):
    model, pattern = small_vit(depth=1), Pattern.parse(text)
    results = prune(model, [correlated_images(16)], pattern=text)
    assert len(results) == 4
    for result in results:
        assert bad_groups(model.get_submodule(result.name).weight, pattern) == 0
        assert result.density == pattern.density


@pytest.mark.parametrize("method", METHODS)
def test_every_method_prunes_and_without_a_refit_weights_are_only_masked(method):
    model = small_vit(depth=1)
    dense = copy.deepcopy(model)
    results = prune(model, [correlated_images(16)], method=method, refit=False)
    for result in results:
        ours, theirs = (network.get_submodule(result.name).weight for network in (model, dense))
        assert torch.equal(ours, theirs * (ours != 0))
        assert result.error_after_refit == result.error_before_refit
        assert result.damping is None
        assert result.bias_corrected


class Mixed(nn.Module):
    """Plain, grouped and depthwise convolutions in a row."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.plain = nn.Conv2d(16, 16, 3)
        self.grouped = nn.Conv2d(16, 16, 3, groups=4)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)
        self.last = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 4)

    def forward(self, images):
        for layer in (self.stem, self.plain, self.grouped, self.depthwise, self.last):
            images = F.gelu(layer(images))
        return self.head(images.mean(dim=(2, 3)))


def test_grouped_and_depthwise_convolutions_are_left_alone():
    torch.manual_seed(0)
    model = Mixed().eval()
    dense = copy.deepcopy(model.state_dict())
    results = prune(model, [correlated_images(16, 16)], size=16)
    assert [result.name for result in results] == ["plain", "last"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, dense[name]) == (name.partition(".")[0] not in ("plain", "last"))


# --- errors that are reported ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "refit"), [("admm", True), ("admm", False), ("activation", True)])
@pytest.mark.parametrize(
    ("build", "name"),
    [(small_vit, "blocks.0.mlp.fc1"), (small_vit, "blocks.1.mlp.fc2"), (small_resnet, "layer2.0.conv1")],
)
def test_the_reported_error_is_the_one_measured_on_the_held_out_images(build, name, method, refit):
    model, images = build(), correlated_images(24)
    dense = copy.deepcopy(model)
    (result,) = prune(model, images.split(6), only=[name], method=method, refit=refit)
    fit, held = (torch.cat(part) for part in split_images(images.split(6)))
    layer, sparse = dense.get_submodule(name), model.get_submodule(name)

    def without_bias(weights, x):
        given = weights.weight.detach().double()
        return (
            x @ given.T if given.ndim == 2 else F.conv2d(x, given, None, sparse.stride, sparse.padding).movedim(1, -1)
        )

    change, energies = [], []
    for some in (fit, held):
        x, _ = seen_by(dense, name, some)
        change.append((without_bias(sparse, x) - without_bias(layer, x)).flatten(0, -2))
        energies.append(without_bias(layer, x).square().sum())
    # The reported error judges a mean that was corrected on the fitting images alone.
    left = (change[1] - change[0].mean(dim=0)).square().sum()
    assert result.error_after_refit == pytest.approx(float(left / energies[1]), rel=1e-3)
    assert (result.error_after_refit < result.error_before_refit) == refit
    assert result.bias_corrected
    assert "no bias" not in result.note


class Upstream(nn.Module):
    """Two layers that are pruned, the second without a bias if asked for."""

    def __init__(self, bias=True):
        super().__init__()
        self.stem, self.first = nn.Linear(12, 32), nn.Linear(32, 32)
        self.second = nn.Linear(32, 24, bias=bias)
        self.head = nn.Linear(24, 3)

    def forward(self, images):
        hidden = F.gelu(self.first(F.gelu(self.stem(images.flatten(1)))))
        return self.head(F.gelu(self.second(hidden)))


def test_without_a_bias_the_error_is_that_of_the_outputs_themselves_and_the_note_says_so():
    torch.manual_seed(0)
    model, images = Upstream(bias=False).eval(), torch.randn(400, 3, 2, 2)
    dense = copy.deepcopy(model)
    (result,) = prune(model, images.split(100), only=["second"], size=2)
    _, (held,) = (torch.cat(part)[None] for part in split_images(images.split(100)))
    x, y = seen_by(dense, "second", held)
    left = (x @ model.second.weight.double().T - y).square().sum() / y.square().sum()
    assert result.error_after_refit == pytest.approx(float(left), rel=1e-3)
    assert not result.bias_corrected
    assert result.note == "It has no bias, so its mean output is not corrected."


def harmed(model):
    """Prune the first layer badly, in place: by magnitude to a quarter, and nothing makes up for it."""
    with torch.no_grad():
        model.first.weight.mul_(project(model.first.weight.abs(), Pattern(1, 4)))
    return model


def test_dense_targets_repair_what_went_wrong_upstream():
    torch.manual_seed(0)
    dense, images = Upstream().eval(), torch.randn(1200, 3, 2, 2)
    worse = harmed(copy.deepcopy(dense))
    (held,) = split_images([images])[1]

    # Both walks stand behind the first layer when its progress is told, so the harm is done there.
    walked = copy.deepcopy(dense)

    def harm(done, total):
        if done == 1:
            walked.first.load_state_dict(worse.first.state_dict())

    (_, result) = prune(walked, images.split(300), only=["first", "second"], size=2, progress=harm)
    # By hand, with its own outputs on the harmed inputs as targets: the harmed network is pruned as if it were dense.
    own = copy.deepcopy(worse)
    prune(own, images.split(300), only=["second"], size=2)

    def error(network):
        assert torch.equal(network.first.weight, worse.first.weight)
        (_, wanted), (_, given) = (seen_by(some, "second", held) for some in (dense, network))
        missed = given - wanted
        energy = (wanted - wanted.mean(dim=0)).square().sum()
        return float(missed.square().sum() / energy), float((missed - missed.mean(dim=0)).square().sum() / energy)

    assert error(walked)[0] < 0.8 * error(own)[0]
    assert error(walked)[1] < 0.9 * error(own)[1]  # and not only by its bias
    x, wanted = seen_by(walked, "second", held)[0], seen_by(dense, "second", held)[1]
    energy = (wanted - wanted.mean(dim=0) + dense.second.weight.double() @ x.mean(dim=0)).square().sum()
    reported = error(walked)[0] * float((wanted - wanted.mean(dim=0)).square().sum() / energy)
    # The bias left in the module is that of all images, the one that was judged that of the fitting images.
    assert result.error_after_refit == pytest.approx(reported, rel=0.1)


# --- means -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init_values", [None, 0.1])
def test_mean_outputs_on_the_pruned_networks_inputs_are_the_wanted_ones(init_values):
    model, images = small_vit(init_values=init_values), correlated_images(32)
    dense = copy.deepcopy(model)
    results = prune(model, images.split(8))
    # The last layer of each branch is wanted to repair the mean of the sum, so that is what is looked at behind it.
    behind = {"attn.proj": "norm2", "mlp.fc2": ""}
    for result in results:
        assert result.bias_corrected
        block, _, kind = result.name.rpartition(".")[0].rpartition(".")
        name = behind.get(f"{kind}.{result.name.rpartition('.')[2]}")
        theirs, ours = (
            seen_by(network, result.name, images)[1]
            if name is None
            else seen_by(network, f"{block}.{name}".removesuffix("."), images)[0 if name else 1]
            for network in (dense, model)
        )
        assert float((theirs - ours).abs().max()) > 1e-4
        assert torch.allclose(theirs.flatten(0, -2).mean(dim=0), ours.flatten(0, -2).mean(dim=0), atol=1e-5)


@pytest.mark.parametrize("init_values", [None, 0.1])
def test_the_next_branch_repairs_a_harmed_residual_stream(init_values):
    model, images = small_vit(depth=1, init_values=init_values), correlated_images(32)
    dense, shift = copy.deepcopy(model), torch.linspace(-1, 1, 64)

    def harm(done, total):
        if done == 2:  # the attention's projection has been pruned, the MLP comes next
            with torch.no_grad():
                model.blocks[0].attn.proj.bias += shift

    prune(model, images.split(8), progress=harm)
    means = [
        [seen_by(network, name, images)[place].flatten(0, 1).mean(dim=0) for network in (dense, model)]
        for name, place in (("blocks.0.norm2", 0), ("blocks.0", 1))
    ]
    assert torch.allclose(means[0][1] - means[0][0], (init_values or 1.0) * shift.double(), atol=1e-4)
    assert torch.allclose(means[1][0], means[1][1], atol=1e-5)


@pytest.mark.parametrize("trained", [True, False])
def test_a_batch_norm_right_behind_a_pruned_convolution_keeps_the_dense_mean_and_spread(trained):
    model, images = small_resnet(), correlated_images(48)
    if trained:
        shaken(model, correlated_images(64, seed=1))
    dense = copy.deepcopy(model)
    results = prune(model, images.split(12))
    pruned = {result.name for result in results}
    for name in (f"layer{stage}.0.bn{place}" for stage in (1, 2, 3, 4) for place in (1, 2)):
        assert name.replace("bn", "conv") in pruned
        theirs, ours = (seen_by(network, name, images)[1].transpose(0, 1).flatten(1) for network in (dense, model))
        spread = theirs.std(dim=1)
        assert bool(((theirs.mean(dim=1) - ours.mean(dim=1)).abs() <= 1e-3 * spread).all()), name
        assert torch.allclose(ours.std(dim=1), spread, rtol=0.05), name


# --- one layer -------------------------------------------------------------------------------------------------------


def rows(count, inputs=32, outputs=12, seed=0):
    """Correlated inputs with a mean, and wanted outputs that the dense weights don't quite give."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(inputs, inputs, generator=generator) * torch.arange(1, inputs + 1)[:, None] ** -0.7
    weight = torch.randn(outputs, inputs, generator=generator)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, inputs, generator=generator) @ mix + torch.linspace(-1, 1, inputs)
    return weight, x, x @ weight.T + torch.randn(count, outputs, generator=generator)


def moments_of(x, y):
    moments = Moments()
    moments.add(x, y)
    return moments


@pytest.mark.parametrize("free_mean", [True, False])
def test_the_quadratic_problem_gives_the_error_of_any_weights_on_the_rows_themselves(free_mean):
    weight, x, y = rows(500)
    problem = Problem(moments_of(x, y), weight, free_mean=free_mean, kind=torch.float64)
    for seed in range(3):
        candidate = weight + 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
        missed = y.double() - x.double() @ candidate.double().T
        if free_mean:
            missed -= missed.mean(dim=0)
        offset = torch.full((12,), 0.2, dtype=torch.float64)
        plain = float(missed.square().sum())
        assert problem.wrong(candidate.double(), 0 * offset) == pytest.approx(plain, rel=1e-5)
        more = 500 * 12 * 0.04 if free_mean else 0.0
        assert problem.wrong(candidate.double(), offset) == pytest.approx(plain + more, rel=1e-5)


@pytest.mark.parametrize("free_mean", [True, False])
@pytest.mark.parametrize("few", [24, 400])
def test_of_the_dampings_offered_the_one_with_the_least_held_out_error_is_taken(few, free_mean):
    weight, x, y = rows(few)
    _, x_held, y_held = rows(400, seed=1)
    fitting, held = moments_of(x, y), moments_of(x_held, y_held)
    offered = (0.001, 1.0, 0.03, 0.3, 0.01, 10.0)
    wide = Settings(method="activation", damping=offered, precision="float64")
    solved = solve_layer(weight, fitting, held, KEEP, wide, free_mean=free_mean)

    dense, a, b = weight.double(), x.double(), y.double()
    if free_mean:
        a, b = a - a.mean(dim=0), b - b.mean(dim=0)
    mask = project(weight.abs() * x.square().sum(dim=0).sqrt(), KEEP)
    energy = (y_held.double() - y_held.double().mean(dim=0) + dense @ x_held.double().mean(dim=0)).square().sum()

    def held_error(candidate):
        missed = y_held.double() - x_held.double() @ candidate.T
        if free_mean:  # the bias of the fitting rows
            missed -= y.double().mean(dim=0) - candidate @ x.double().mean(dim=0)
        return float(missed.square().sum() / energy)

    errors = {}
    for share in offered:
        ridge = share * float(a.square().sum(dim=0).mean()) * torch.eye(32, dtype=torch.float64)
        errors[share] = held_error(refit_rows(b.T @ a + dense @ ridge, mask, a.T @ a + ridge, direct=True).weight)
    best = min(errors, key=errors.get)
    assert len({round(value, 9) for value in errors.values()}) == len(offered)
    assert solved.damping == best
    assert solved.after == pytest.approx(errors[best], rel=1e-4)
    assert solved.before == pytest.approx(held_error(dense * mask), rel=1e-4)


def test_few_rows_ask_for_more_damping_than_many():
    taken = []
    for count in (12, 4000):
        weight, x, y = rows(count)
        _, x_held, y_held = rows(400, seed=1)
        many = Settings(damping=(0.001, 0.01, 0.1, 1.0), method="magnitude")
        solved = solve_layer(weight, moments_of(x, y), moments_of(x_held, y_held), KEEP, many, free_mean=True)
        taken.append(solved.damping)
    assert taken[0] > taken[1]


@pytest.mark.parametrize("method", METHODS)
def test_float32_and_float64_agree_to_the_stated_error(method):
    weight, x, y = rows(600, inputs=64)
    _, x_held, y_held = rows(400, inputs=64, seed=1)
    fitting, held = moments_of(x, y), moments_of(x_held, y_held)
    narrow, wide = (
        solve_layer(weight, fitting, held, KEEP, Settings(method=method, precision=kind), free_mean=True)
        for kind in ("float32", "float64")
    )
    assert narrow.damping == wide.damping
    assert abs(narrow.before - wide.before) < 1e-5
    assert abs(narrow.after - wide.after) < 1e-5


def test_where_nothing_can_judge_the_bare_mask_stays():
    weight, x, _ = rows(100)
    weight.zero_()
    moments = moments_of(x, torch.zeros(100, 12))
    solved = solve_layer(weight, moments, moments, KEEP, Settings(), free_mean=True)
    assert (solved.before, solved.after, solved.damping) == (None, None, None)
    assert "nothing can judge it" in solved.note
    assert not solved.weight.any()


# --- reruns, refusals and notes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [small_vit, small_resnet])
def test_a_rerun_gives_the_same_bits_and_progress_counts_to_its_end(build):
    states, ticks = [], []
    for _ in range(2):
        model = build()
        ticks.clear()
        results = prune(model, correlated_images(16).split(4), progress=lambda done, total: ticks.append((done, total)))
        states.append(model.state_dict())
        assert ticks == [(place + 1, len(results)) for place in range(len(results))]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_positions_are_drawn_where_they_are_too_many_and_the_result_stays_close(monkeypatch):
    errors = []
    for most in (1 << 15, 64):
        monkeypatch.setattr(module, "ROWS", most)
        model = small_resnet()
        only = ["layer1.0.conv1", "layer1.0.conv2"]
        results = prune(model, correlated_images(32).split(8), only=only)
        errors.append([result.error_after_refit for result in results])
    assert errors[0] != errors[1]
    assert errors[1] == pytest.approx(errors[0], rel=0.5)


def test_a_refit_that_hurts_on_held_out_images_is_dropped_and_said():
    model, images = small_vit(), correlated_images(16)
    # The fitting images all but repeat one picture, the held-out ones are of another kind.
    generator = torch.Generator().manual_seed(0)
    images[torch.arange(16) % 4 != 3] = images[0] + 1e-3 * torch.randn(12, 3, 32, 32, generator=generator)
    images[3::4] = torch.randn(4, 3, 32, 32, generator=generator) * 20
    results = prune(model, [images], damping=(1e-4,), method="magnitude")
    dropped = [result for result in results if "refit was not kept" in result.note]
    assert dropped
    assert all(result.error_after_refit == result.error_before_refit for result in dropped)
    assert all(result.error_after_refit <= result.error_before_refit for result in results)
    for result in dropped:
        assert "above the bare mask's" in result.note
        assert result.damping is None
        assert bad_groups(model.get_submodule(result.name).weight, KEEP) == 0


def test_a_refit_that_has_not_converged_is_not_kept(monkeypatch):
    lazy = module.refit_rows
    monkeypatch.setattr(
        module, "refit_rows", lambda *given, **options: lazy(*given, **{**options, "tolerance": 0.5, "direct": False})
    )
    (result,) = prune(small_vit(), [correlated_images(16)], only=["blocks.0.mlp.fc1"], method="magnitude")
    assert "optimality residual" in result.note
    assert result.error_after_refit == result.error_before_refit


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


@pytest.mark.parametrize("damping", [(0.01, 0.1), (0.0,)])
def test_dead_inputs_are_noted_and_do_no_harm(damping):
    torch.manual_seed(1)
    model = Blind().eval()
    with torch.no_grad():
        model.second.weight[:, 5] = 0  # of the two equal inputs one is dropped, so H is regular on what stays
    (result,) = prune(model, [torch.randn(64, 3, 2, 2)], only=["second"], size=2, method="activation", damping=damping)
    assert result.note == "4 of its 16 inputs are always zero on the calibration images."
    assert result.error_after_refit < result.error_before_refit
    assert torch.isfinite(model.second.weight).all()


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_equal_inputs_without_damping_fail_by_name_with_the_remedy(method, precision):
    torch.manual_seed(1)
    model = Blind().eval()
    model.second, model.head = nn.Linear(12, 8), nn.Linear(8, 3)
    # The inputs of the second layer are columns of a Hadamard matrix on the 16 fitting images of 21, so that every sum
    # and product is exact.
    signs = torch.ones(1, 1)
    for _ in range(4):
        signs = torch.cat([torch.cat([signs, signs], dim=1), torch.cat([signs, -signs], dim=1)])
    images = torch.randn(21, 12)
    images[torch.arange(21) % 4 != 3] = signs[:, 1:13]
    images[:, 5] = images[:, 4]
    with torch.no_grad():
        model.first = nn.Linear(12, 12)
        model.first.weight.copy_(torch.eye(12))
        model.first.bias.fill_(8.0)
        model.second.weight[:, 4:6] += 9  # both of the equal inputs are kept
    with pytest.raises(StageFailed, match=r"(?s)'second' could not be pruned.*singular") as caught:
        prune(
            model, [images.reshape(21, 3, 2, 2)], only=["second"], size=2, method=method, damping=(0.0,),
            precision=precision,
        )  # fmt: skip
    assert "raise the damping" in caught.value.hint


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
    model = small_vit(depth=1)
    with pytest.raises(StageFailed, match="nothing to prune"):
        prune(model, [correlated_images(8)], skip=["*"])
    with pytest.raises(StageFailed, match="at least 4 calibration images; 3 were given"):
        prune(model, [correlated_images(3)])
    with pytest.raises(RecipeError, match=r"(?s)'wanda' is unknown") as caught:
        Settings(method="wanda")
    assert ", ".join(METHODS) in caught.value.hint
    for damping in ((float("nan"),), (), (0.1, -1.0), (float("inf"),)):
        with pytest.raises(RecipeError, match="damping must be a finite number of at least 0"):
            Settings(damping=damping)
    with pytest.raises(RecipeError, match="must be float32 or float64, not 'float16'"):
        Settings(precision="float16")


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
