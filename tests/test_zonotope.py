"""L4: nothing in the ball exceeds the differential zonotope, and it is tighter than two zonotopes."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from bound_networks import copied, dense_layers, exported, images, program, pruned
from torch import nn

from mpdeploy.certify.program import Op, Program, run
from mpdeploy.certify.zonotope import SUPPORTED, ball_equivalence
from mpdeploy.errors import StageFailed


def logits(prog, x):
    return run(prog, x, dtype=torch.float64)[prog.output]


class Short(nn.Module):
    """Residual, batch norm after a convolution that stays apart from it, average pooling."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(2)
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.pool = nn.AvgPool2d(2)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = torch.relu(self.first(self.norm(x)))
        x = torch.relu(x + self.second(x))
        return self.head(self.pool(x).mean((2, 3)))


@pytest.fixture(scope="module")
def short():
    torch.manual_seed(1)
    network = Short().eval()
    with torch.no_grad():
        (
            network.norm.running_mean.normal_(),
            network.norm.running_var.uniform_(0.5, 2),
            network.norm.weight.uniform_(0.5, 2),
        )
        network.head.weight.mul_(3)
    return exported(network, (2, 4, 4))


def points(x, eps, count, seed=0):
    """Random points of the ball, half of them corners."""
    move = torch.rand(count, *x.shape[1:], generator=torch.Generator().manual_seed(seed)).double() * 2 - 1
    move[::2] = move[::2].sign()
    return x + eps * move


def pair_losses(one, two, x, label):
    d = logits(two, x) - logits(one, x)
    return d - d[:, label : label + 1]


def climb(one, two, x, eps, label, j):
    """The largest pair loss that signed gradient steps find: a lower bound of tau_j."""
    best = x.clone()
    for step in (1.0, 0.5, 0.25, 0.1):
        best.requires_grad_()
        loss = pair_losses(one, two, best, label)[0, j]
        (slope,) = torch.autograd.grad(loss, best)
        best = (best.detach() + step * eps * slope.sign()).clamp(min=x - eps, max=x + eps)
    return float(pair_losses(one, two, best, label)[0, j])


def cases(short):
    yield "mlp", program("mlp"), images("mlp", 3, seed=1)
    yield "conv", program("conv"), images("conv", 2, seed=1)
    yield "short", short, torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(2)).double()


def test_no_point_of_the_ball_exceeds_tau(short):
    """Corners, random points and gradient steps; networks nearly equal and far apart; balls tiny and large."""
    tight = []
    for name, prog, x in cases(short):
        for share, eps in itertools.product((0.02, 0.3), (1 / 256, 1 / 16, 0.5)):
            other = pruned(prog, share)
            proof = ball_equivalence(prog, other, x, eps)
            for s in range(len(x)):
                label = int(proof.label[s])
                inside = points(x[s : s + 1], eps, 200, seed=s)
                loss = pair_losses(prog, other, inside, label).amax(0).numpy()
                reached = [climb(prog, other, x[s : s + 1], eps, label, j) for j in range(len(loss))]
                worst = np.maximum(loss, reached)
                assert (worst <= proof.tau[s] + 1e-12).all(), (name, share, eps)
                others = np.arange(len(worst)) != label
                if eps == 1 / 256 and worst[others].max() > 1e-6:
                    tight.append(proof.tau[s][others].max() / worst[others].max())
                one, two = (logits(p, inside) for p in (prog, other))
                if proof.robust[s]:
                    assert (one.argmax(1) == label).all()
                if proof.same[s]:
                    assert proof.robust[s] and (two.argmax(1) == label).all()
                # The statement itself: with the dense label y and a margin above tau, the other label is y.
                margin = one[:, label : label + 1] - one
                margin[:, label] = np.inf
                confident = (margin > torch.from_numpy(proof.tau[s])).all(1)
                assert (two.argmax(1)[confident] == label).all()
    assert len(tight) > 5 and np.isfinite(tight).all() and np.median(tight) < 3


def independent_tau(prog, other, x, eps, label):
    """Sup of the pair losses when each network has relaxations of its own: only the input's symbols are shared.

    Both run side by side in one program whose outputs are 0 and (z'_j - z'_y) - (z_j - z_y); as the twin of one with
    all weights 0, its difference is that program itself.
    """

    def renamed(p, tag):
        table = {name: tag + name for name in (*p.constants, *(output for op in p.ops for output in op.outputs))}
        ops = [
            replace(
                op,
                name=tag + op.name,
                inputs=tuple(table.get(n, n) for n in op.inputs),
                outputs=tuple(table[n] for n in op.outputs),
            )
            for op in p.ops
        ]
        return ops, {table[name]: value for name, value in p.constants.items()}

    (a, left), (b, right) = renamed(prog, "a_"), renamed(other, "b_")
    classes = logits(prog, x).shape[1]
    pairs = np.eye(classes) - np.eye(classes)[:, [label]]
    pairs = np.concatenate([np.zeros((classes, 1)), pairs], axis=1)
    ops = (
        *a,
        *b,
        Op("minus", "MatMul", (f"a_{prog.output}", "minus"), ("m",), {}),
        Op("plus", "MatMul", (f"b_{other.output}", "plus"), ("p",), {}),
        Op("apart", "Add", ("m", "p"), ("out",), {}),
    )
    both = Program(ops, {**left, **right, "minus": -pairs, "plus": pairs}, prog.input, "out")
    nothing = replace(both, constants={name: np.zeros_like(value) for name, value in both.constants.items()})
    proof = ball_equivalence(nothing, both, x, eps)
    assert proof.label[0] == 0
    return proof.tau[0][1:]


def random_mlp(seed):
    rng = np.random.default_rng(seed)
    shapes = [(16, 9), (16, 16), (4, 16)]
    return dense_layers(
        *[rng.standard_normal(s) / np.sqrt(s[1]) for s in shapes],
        biases=[rng.standard_normal(s[0]) * 0.3 for s in shapes],
    )


def test_the_differential_zonotope_beats_two_independent_ones_for_close_networks():
    """The same relaxation applied to each network apart: tau is many times larger, while both are sound."""
    ratios = []
    for seed in range(6):
        prog = random_mlp(seed)
        rng = np.random.default_rng(seed + 100)
        close = copied(
            prog,
            **{
                f"w{i}": prog.constants[f"w{i}"] * (1 + 0.01 * rng.standard_normal(prog.constants[f"w{i}"].shape))
                for i in range(3)
            },
        )
        x = torch.from_numpy(rng.standard_normal((1, 1, 3, 3)))
        proof = ball_equivalence(prog, close, x, 0.1)
        y = int(proof.label[0])
        both = independent_tau(prog, close, x, 0.1, y)
        worst = pair_losses(prog, close, points(x, 0.1, 400), y).amax(0).numpy()
        assert (worst <= both + 1e-12).all() and (worst <= proof.tau[0] + 1e-12).all()
        ratios.append(both.max() / proof.tau[0].max())
    assert min(ratios) > 1 and np.median(ratios) > 3


def test_a_stable_linear_piece_is_exact():
    """Where no ReLU switches, tau is the true supremum: |w_j - w_y| summed, to rounding."""
    rng = np.random.default_rng(3)
    a, v = rng.standard_normal((6, 4)), rng.standard_normal((3, 6))
    prog = dense_layers(a, v, biases=[np.full(6, 50.0), np.zeros(3)])
    other = copied(prog, w0=a + 0.1 * rng.standard_normal(a.shape), w1=v + 0.1 * rng.standard_normal(v.shape))
    x, eps = torch.from_numpy(rng.standard_normal((1, 1, 2, 2))), 0.2
    proof = ball_equivalence(prog, other, x, eps)
    y = int(proof.label[0])
    gap = other.constants["w1"] @ other.constants["w0"] - v @ a
    rows = gap - gap[y]
    centre = pair_losses(prog, other, x, y)[0].numpy()
    assert proof.tau[0] == pytest.approx(centre + eps * np.abs(rows).sum(1), rel=1e-9, abs=1e-12)
    assert proof.generators[0] == 4  # no new symbol


def test_a_dead_layer_is_exact_too_and_equal_networks_do_not_differ():
    rng = np.random.default_rng(4)
    prog = dense_layers(
        rng.standard_normal((6, 4)), rng.standard_normal((3, 6)), biases=[np.full(6, -50.0), np.arange(3.0)]
    )
    other = copied(prog, w0=rng.standard_normal((6, 4)))
    x = torch.from_numpy(rng.standard_normal((1, 1, 2, 2)))
    proof = ball_equivalence(prog, other, x, 0.2)
    assert proof.tau.max() < 1e-9 and proof.same.all()
    for name in ("mlp", "conv"):
        proof = ball_equivalence(program(name), program(name), images(name, 2), 0.3)
        assert proof.tau.max() < 1e-9  # the difference is 0 whatever happens to the value


def test_a_larger_ball_is_never_better_and_costs_more_symbols():
    prog, x = program("mlp"), images("mlp", 3)
    other = pruned(prog, 0.2)
    results = [ball_equivalence(prog, other, x, eps) for eps in (1e-6, 1e-3, 1e-1, 1.0)]
    for small, large in itertools.pairwise(results):
        assert (small.tau.max(1) <= large.tau.max(1)).all() and (small.generators <= large.generators).all()
        assert (large.robust <= small.robust).all() and (small.multiply_adds <= large.multiply_adds).all()
    centre = np.stack([pair_losses(prog, other, x[s : s + 1], int(results[0].label[s]))[0].numpy() for s in range(3)])
    assert results[0].tau == pytest.approx(centre, abs=1e-4)  # a ball of nothing: the paired forward
    assert results[-1].generators.max() > 36 and results[0].generators.min() >= 36


def test_the_cost_is_counted():
    """Two linear layers and no unstable neuron: passes over the symbols and the centres, times the weights."""
    prog = dense_layers(np.eye(4) * 2, np.ones((3, 4)), biases=[np.full(4, 50.0), np.zeros(3)])
    proof = ball_equivalence(prog, prog, torch.zeros(1, 1, 2, 2), 0.1)
    assert proof.multiply_adds[0] == (2 + 4 + 4) * (4 * 4 + 3 * 4)
    facts = proof.facts()
    assert facts["samples"] == 1 and facts["multiply_adds"] == proof.multiply_adds.sum() and facts["same"] in (0, 1)


def test_what_can_not_be_treated_is_refused_with_its_name():
    for kind, message in (("residual", "MaxPool"), ("vit", "LayerNormalization|Slice|MatMul"), ("mixed", "HardSwish")):
        with pytest.raises(StageFailed, match=f"is a ({message}), which the zonotope can't treat") as error:
            ball_equivalence(program(kind), program(kind), images(kind, 1), 0.1)
        assert "ReLU network" in error.value.hint
    prog = program("mlp")
    with pytest.raises(StageFailed, match="do not have the same operators"):
        ball_equivalence(prog, program("conv"), images("mlp", 1), 0.1)
    with pytest.raises(StageFailed, match="at least one image"):
        ball_equivalence(prog, prog, images("mlp", 0), 0.1)
    twice = Program(
        (Op("a", "Flatten", ("x",), ("f",), {"axis": 1}), Op("b", "MatMul", ("f", "f"), ("y",), {})), {}, "x", "y"
    )
    with pytest.raises(StageFailed, match="multiplies two values"):
        ball_equivalence(twice, twice, torch.zeros(1, 1, 1, 1), 0.1)
    mixed = Program((Op("a", "Transpose", ("x",), ("y",), {"perm": (1, 0, 2, 3)}),), {}, "x", "y")
    with pytest.raises(StageFailed, match="moves or merges the batch"):
        ball_equivalence(mixed, mixed, torch.zeros(1, 1, 2, 2), 0.1)
    assert "Relu" in SUPPORTED and "Softmax" not in SUPPORTED


def test_a_planted_relaxation_that_is_too_small_is_caught():
    """The check above has teeth: half the radius of tau around its centre is exceeded by points of the ball."""
    prog, x, eps = program("mlp"), images("mlp", 1, seed=1), 1 / 16
    other = pruned(prog, 0.02)
    proof = ball_equivalence(prog, other, x, eps)
    y = int(proof.label[0])
    centre = pair_losses(prog, other, x, y)[0].numpy()
    shrunk = centre + 0.25 * (proof.tau[0] - centre)
    reached = np.array([climb(prog, other, x, eps, y, j) for j in range(len(centre))])
    assert (reached > shrunk).any()


def test_a_bias_by_add_counts_in_both():
    """MatMul and Add of a constant, as transformers' linear layers are exported, with another bias in the twin."""
    rng = np.random.default_rng(5)
    ops = (
        Op("flat", "Flatten", ("x",), ("f",), {"axis": 1}),
        Op("mul", "MatMul", ("f", "w"), ("m",), {}),
        Op("add", "Add", ("m", "b"), ("a",), {}),
        Op("relu", "Relu", ("a",), ("r",), {}),
        Op("out", "MatMul", ("r", "v"), ("z",), {}),
    )
    prog = Program(
        ops, {"w": rng.standard_normal((4, 5)), "b": rng.standard_normal(5), "v": rng.standard_normal((5, 3))}, "x", "z"
    )
    other = copied(prog, b=prog.constants["b"] + 0.1)
    x = torch.from_numpy(rng.standard_normal((2, 1, 2, 2)))
    proof = ball_equivalence(prog, other, x, 0.1)
    for s in range(2):
        worst = pair_losses(prog, other, points(x[s : s + 1], 0.1, 500), int(proof.label[s])).amax(0).numpy()
        assert (worst <= proof.tau[s] + 1e-12).all() and proof.tau[s].max() < 5 * worst.max() + 1e-6
    swapped = replace(prog, ops=(*ops[:2], Op("add", "Add", ("b", "m"), ("a",), {}), *ops[3:]))
    same = ball_equivalence(swapped, replace(swapped, constants=other.constants), x, 0.1)
    assert same.tau == pytest.approx(proof.tau)
