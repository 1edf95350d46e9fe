"""L1: agreement of two networks as real functions, and its three states."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import torch
from bound_networks import CLASSES, copied, dense_layers, exported, images, program, pruned, quickstart

from mpdeploy.certify.box_rules import Prepared
from mpdeploy.certify.boxes import propagate
from mpdeploy.certify.program import Program, run
from mpdeploy.certify.proof import State
from mpdeploy.certify.real_arithmetic import real_arithmetic


def logits(prog, x):
    return run(prog, x, dtype=torch.float64)[prog.output]


def agreeing(one, two, x):
    return (logits(one, x).argmax(1) == logits(two, x).argmax(1)).numpy()


def test_every_preserved_label_of_shallow_networks_is_certified():
    """As measured before: float64's allowance is far below every margin of an MLP and of a residual network."""
    flips = 0
    for kind in ("mlp", "conv", "residual", "mixed"):
        x = images(kind, 24, seed=5)
        for share in (0.1, 0.5):
            other = pruned(program(kind), share)
            proof = real_arithmetic(program(kind), other, x)
            same = agreeing(program(kind), other, x)
            assert ((proof.state == State.CERTIFIED) == same).all()
            assert (proof.state != State.VACUOUS).all()
            assert 1e-16 < proof.bound.max() < 1e-9
            flips += int((~same).sum())
    assert flips > 0


def test_a_shallow_vit_is_certified_and_a_deep_one_is_vacuous():
    x = images("vit", 6, seed=2)
    one, other = program("vit"), pruned(program("vit"), 0.1)
    proof = real_arithmetic(one, other, x)
    assert ((proof.state == State.CERTIFIED) == agreeing(one, other, x)).all()
    assert proof.bound.max() < 1e-6
    deep = program("vit", 8)
    proof = real_arithmetic(deep, pruned(deep, 0.01), x[:2])
    assert (proof.state == State.VACUOUS).all()
    assert (proof.bound >= proof.range).all()
    assert proof.counts() == {"vacuous": 2, "not_certified": 0, "certified": 0}


def test_the_quickstart_network_of_four_blocks_is_certified():
    """A trained ViT: the covariance form of attention keeps float64's allowance below the margins."""
    prog, x = quickstart(3)
    mlp = [op.name for op in prog.ops if op.kind == "MatMul" and op.inputs[1] in prog.constants]
    other = pruned(prog, 0.1, ops=mlp)
    proof = real_arithmetic(prog, other, x)
    assert (agreeing(prog, other, x)).all()
    assert (proof.state == State.CERTIFIED).all() and 1e-9 < proof.bound.max() < 0.5


def rational(prog, image):
    """Logits of `dense_layers` in exact arithmetic."""
    values = [Fraction(v) for v in image.flatten().tolist()]
    layers = [name for name in prog.constants if name.startswith("w")]
    for i, name in enumerate(layers):
        rows = prog.constants[name].tolist()
        values = [sum((Fraction(a) * v for a, v in zip(row, values, strict=True)), Fraction(0)) for row in rows]
        if i < len(layers) - 1:
            values = [max(v, Fraction(0)) for v in values]
    return values


def test_a_tie_that_only_rounding_breaks_is_never_certified():
    """Two logits that are equal as real numbers, or in the other order than float64 says."""
    rng = np.random.default_rng(1)
    wrong = 0
    for _ in range(40):
        row = rng.standard_normal(50) * 1e3
        second = row[rng.permutation(50)]
        prog = dense_layers(np.eye(50), np.stack([row, second]))
        x = torch.full((1, 1, 5, 10), 1 / 3).double()  # both logits are sum(row)/3, exactly
        exact = rational(prog, x)
        assert exact[0] == exact[1]
        z = logits(prog, x)[0]
        wrong += bool(z[0] != z[1])
        proof = real_arithmetic(prog, prog, x)
        assert proof.state[0] == State.NOT_CERTIFIED or proof.state[0] == State.VACUOUS
    assert wrong > 5  # float64 does break such ties: looking at its logits would have been wrong


def test_certified_samples_agree_in_rational_arithmetic():
    rng = np.random.default_rng(2)
    seen = set()
    for seed in range(30):
        weights = [rng.standard_normal((8, 12)), rng.standard_normal((3, 8))]
        gap = 10.0 ** -rng.integers(0, 17)
        weights[1][1] = weights[1][0] * (1 + gap)  # two logits that are gap apart
        one = dense_layers(*weights)
        two = copied(one, w0=weights[0] * (1 + gap * rng.standard_normal(weights[0].shape)))
        x = torch.rand(1, 1, 3, 4, generator=torch.Generator().manual_seed(seed)).double()
        state = State(int(real_arithmetic(one, two, x).state[0]))
        seen.add(state)
        if state == State.CERTIFIED:
            a, b = rational(one, x), rational(two, x)
            assert a.index(max(a)) == b.index(max(b)) and a.count(max(a)) == b.count(max(b)) == 1
    assert seen >= {State.CERTIFIED, State.NOT_CERTIFIED}


def test_a_changed_label_is_not_certified():
    x = images("mlp", 12)
    prog = program("mlp")
    head = next(op for op in reversed(prog.ops) if op.kind == "Gemm")
    flipped = copied(
        prog, **{head.inputs[1]: -prog.constants[head.inputs[1]], head.inputs[2]: -prog.constants[head.inputs[2]]}
    )
    assert (real_arithmetic(prog, flipped, x).state == State.NOT_CERTIFIED).all()


def test_what_has_no_rule_is_vacuous_and_named():
    prog = program("mlp")
    ops = tuple(replace(op, kind="Softplus") if op.kind == "Relu" else op for op in prog.ops)
    proof = real_arithmetic(Program(ops, prog.constants, prog.input, prog.output), prog, images("mlp", 2))
    assert (proof.state == State.VACUOUS).all() and np.isinf(proof.bound).all()
    assert "Softplus" in proof.why[0]
    facts = proof.facts()
    assert facts["vacuous"] == 2 and facts["bound_max"] is None and "Softplus" in facts["no_rule_for"][0]


def test_logits_that_are_not_finite_fail_closed():
    prog = program("mlp")
    head = next(op for op in reversed(prog.ops) if op.kind == "Gemm")
    broken = copied(prog, **{head.inputs[2]: np.full(CLASSES, np.nan, np.float32)})
    x = images("mlp", 2)
    assert (real_arithmetic(prog, broken, x).state != State.CERTIFIED).all()
    assert (real_arithmetic(broken, prog, x).state != State.CERTIFIED).all()


def test_the_two_networks_may_have_different_operators():
    """A network against its folded form: equal as functions, different graphs."""
    torch.manual_seed(0)
    layer, norm = torch.nn.Linear(16, 8), torch.nn.LayerNorm(8)
    one = torch.nn.Sequential(torch.nn.Flatten(), layer, norm, torch.nn.ReLU(), torch.nn.Linear(8, 4)).eval()
    scaled = torch.nn.Linear(16, 8)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        scaled.weight.copy_(layer.weight), scaled.bias.copy_(layer.bias)
    two = torch.nn.Sequential(torch.nn.Flatten(), scaled, norm, torch.nn.Hardtanh(0, 50), one[4]).eval()
    a, b = (exported(network, (1, 4, 4)) for network in (one, two))
    x = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    assert [op.kind for op in a.ops] != [op.kind for op in b.ops]
    assert (real_arithmetic(a, b, x).state == State.CERTIFIED).all()


def test_the_other_network_is_bounded_about_the_dense_label():
    """The allowance of the pair (y, j) of the second network uses y of the first, also where it has another label."""
    prog = program("mlp")
    values = propagate(Prepared(prog), images("mlp", 1))
    assert values[prog.output].centre.shape == (1, CLASSES)
    other = pruned(prog, 0.9)
    x = images("mlp", 30, seed=9)
    proof = real_arithmetic(prog, other, x)
    same = agreeing(prog, other, x)
    assert not same.all() and same.any()
    assert ((proof.state == State.CERTIFIED) == same).all()
    assert (proof.slack[same] > 0).all() and (proof.slack[~same] < 0).all()
