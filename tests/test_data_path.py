"""L2: the paper's inequalities on random networks without a violation, against the definitions; and the ranking."""

import json
import math

import numpy as np
import pytest
import torch
from bound_networks import CLASSES, copied, dense_layers, images, program, pruned, quickstart
from scipy.stats import spearmanr

from mpdeploy.certify import objective
from mpdeploy.certify.box_rules import Prepared
from mpdeploy.certify.boxes import propagate
from mpdeploy.certify.data_path import (
    DataPath,
    changed_ops,
    data_path,
    displacement,
    prune_restore_claims,
    rank_layers,
)
from mpdeploy.certify.objective import NO_CHANGE, Penalty, change_between
from mpdeploy.certify.program import Program, evaluate, run
from mpdeploy.errors import StageFailed

NETS = 200


def logits(prog, x):
    return run(prog, x, dtype=torch.float64)[prog.output]


def mean_ce(prog, x, labels):
    return float(torch.nn.functional.cross_entropy(logits(prog, x), labels))


def two_layers(seed):
    """psi -> A psi -> relu -> V, a sample set, labels and lambdas, all random."""
    rng = np.random.default_rng(seed)
    m, n, k = rng.integers(3, 10), rng.integers(3, 12), rng.integers(2, 6)
    prog = dense_layers(rng.standard_normal((n, m)), rng.standard_normal((k, n)) * rng.uniform(0.1, 2))
    x = torch.from_numpy(rng.standard_normal((int(rng.integers(2, 6)), 1, 1, m)))
    labels = torch.from_numpy(rng.integers(0, k, len(x)))
    penalty = Penalty(float(10 ** rng.uniform(-3, 2)), float(10 ** rng.uniform(-3, 1)))
    return rng, prog, x, labels, penalty


def j_of(prog, x, labels, penalty, names=("w0",)):
    weights = [prog.constants[name] for name in names]
    return mean_ce(prog, x, labels) + sum(
        penalty.lambda2 * (w**2).sum() + penalty.lambda1 * np.abs(w).sum() for w in weights
    )


def by_name(path, penalty, delta=0.05):
    return {claim.name: claim for claim in path.claims(penalty, delta)}


# The theorems.


def test_no_theorem_is_violated_on_random_networks():
    """Masks, updates, paths, slopes: what each claim says is compared with the definitions, on 200 networks."""
    held = {"mask": 0, "epsilon": 0, "additive": 0, "update": 0}
    for seed in range(NETS):
        rng, prog, x, labels, penalty = two_layers(seed)
        a = prog.constants["w0"]
        scale = rng.uniform(0, 1) ** 3
        mask = rng.random(a.shape) < rng.uniform(0.1, 0.6)
        form = seed % 3
        if form == 0:  # a mask
            after = np.where(mask, 0, a)
            if scale < 0.5:  # the same with a small R: A is small where it will be removed
                prog = copied(prog, w0=np.where(mask, a * scale, a))
                a = prog.constants["w0"]
        elif form == 1:  # any additive change
            after = a - scale * rng.standard_normal(a.shape)
        else:  # removal and update of what is kept
            after = np.where(mask, 0, a + scale * 0.1 * rng.standard_normal(a.shape))
        other = copied(prog, w0=after)
        path = data_path(prog, other, x, labels)
        if not path.steps:
            continue
        claims = by_name(path, penalty)
        before, now = (logits(p, x) for p in (prog, other))

        fall = j_of(other, x, labels, penalty) - j_of(prog, x, labels, penalty)
        plain = Penalty(penalty.lambda2)
        fall2 = j_of(other, x, labels, plain) - j_of(prog, x, labels, plain)
        assert claims["update"].measured == pytest.approx(fall, abs=1e-8 * (1 + abs(fall)))
        assert abs(mean_ce(other, x, labels) - mean_ce(prog, x, labels)) <= path.budget  # Lemma 1
        assert fall <= claims["update"].left + 1e-9
        for name, change in (("mask", fall), ("epsilon", fall), ("update", fall), ("additive", fall2)):
            if claims[name].holds:
                held[name] += 1
                assert change < 0, (seed, name)
            assert claims[name].status in ("proved", "vacuous")
        assert form == 0 or not (claims["mask"].holds or claims["epsilon"].holds)

        top = before.topk(2, dim=1).values
        certified = (2 * path.eta < top[:, 0] - top[:, 1]).numpy()
        same = (before.argmax(1) == now.argmax(1)).numpy()
        assert same[certified].all()
        assert ((now - before).abs().amax(1) <= path.eta + 1e-12).all()
        # Corollary 2: the accuracy moves by no more than the share of true margins within 2 eta.
        true = [
            z.gather(1, labels[:, None])[:, 0] - z.scatter(1, labels[:, None], -math.inf).amax(1) for z in (before, now)
        ]
        moved = abs(float((true[1] > 0).double().mean() - (true[0] > 0).double().mean()))
        assert moved <= float((true[0].abs() <= 2 * path.eta).double().mean())

        # Along the path A_theta = S + theta R the budget with a Lipschitz constant shrinks linearly.
        spent = objective.budget(path.steps[0].lipschitz * path.steps[0].displaced)
        for theta in rng.random(3):
            between = copied(prog, w0=after + theta * (a - after))
            ce = mean_ce(between, x, labels) - mean_ce(prog, x, labels)
            assert abs(ce) <= (1 - theta) * spent + 1e-10
            if form == 0:  # Theorem 4 at every theta
                r = a - after
                bound = (
                    (1 - theta) * spent
                    - penalty.lambda2 * (1 - theta**2) * (r**2).sum()
                    - penalty.lambda1 * (1 - theta) * np.abs(r).sum()
                )
                assert j_of(between, x, labels, penalty) - j_of(prog, x, labels, penalty) <= bound + 1e-9 * (
                    1 + abs(bound)
                )
        # Theorem 6 and the collapse hold with the slope that is there, whatever it is.
        for name in ("stationarity", "l2_collapse"):
            assert claims[name].status == "vacuous" or claims[name].left <= claims[name].right or form != 0, (
                seed,
                name,
            )
        assert claims["l2_collapse"].left <= claims["l2_collapse"].right
    assert min(held.values()) > 5, held  # each certificate is given, and not by accident


def test_the_slope_is_the_one_sided_derivative():
    for seed in range(20):
        rng, prog, x, labels, penalty = two_layers(seed)
        a = prog.constants["w0"] * (rng.random(prog.constants["w0"].shape) < 0.8)
        prog, after = copied(prog, w0=a), np.where(rng.random(a.shape) < 0.4, 0.3, a)  # also where A is 0
        path = data_path(prog, copied(prog, w0=after), x, labels)
        h = 1e-7
        near = copied(prog, w0=a - h * (a - after))
        numeric = (j_of(near, x, labels, penalty) - j_of(prog, x, labels, penalty)) / h
        assert by_name(path, penalty)["stationarity"].measured == pytest.approx(numeric, rel=1e-4, abs=1e-4)


def test_several_layers_telescope_through_the_intermediate_networks():
    """Theorem 7 and Corollary 8; psi_j and the tails are those of the intermediate networks, not of the dense one."""
    for seed in range(30):
        rng = np.random.default_rng(seed)
        shapes = [(9, 6), (8, 9), (4, 8)]
        biases = [rng.standard_normal(s[0]) * 0.2 for s in shapes]
        prog = dense_layers(*[rng.standard_normal(s) / 2 for s in shapes], biases=biases)
        keep = [rng.random(s) > 0.3 for s in shapes]
        other = copied(prog, **{f"w{i}": prog.constants[f"w{i}"] * k for i, k in enumerate(keep)})
        if seed % 2:
            other = copied(other, b1=biases[1] + 0.05 * rng.standard_normal(8))
        x, labels = torch.from_numpy(rng.standard_normal((4, 1, 2, 3))), torch.tensor([0, 1, 2, 3])
        path = data_path(prog, other, x, labels)
        assert [s.op for s in path.steps] == ["gemm0", "gemm1", "gemm2"]
        chain = [prog]
        for j in range(3):
            names = (f"w{j}", f"b{j}")
            chain.append(copied(chain[-1], **{name: other.constants[name] for name in names}))
        for j, step in enumerate(path.steps):
            moved = (logits(chain[j + 1], x) - logits(chain[j], x)).abs().amax(1)
            assert torch.allclose(step.measured, moved, atol=1e-12)
            assert (moved <= step.eta).all() and (moved <= step.lipschitz * step.displaced + 1e-12).all()
            psi = x.flatten(1) if j == 0 else run(other, x, dtype=torch.float64, keep=[f"x{j}"])[f"x{j}"]
            r = torch.from_numpy(prog.constants[f"w{j}"] - other.constants[f"w{j}"])
            exact = (psi @ r.T + torch.from_numpy(biases[j] - other.constants[f"b{j}"])).abs().amax(1)
            assert (exact <= step.displaced + 1e-12).all() and (step.displaced <= exact * (1 + 1e-9) + 1e-12).all()
        penalty = Penalty(0.05, 0.01)
        names = [f"{kind}{i}" for kind in "wb" for i in range(3)]
        fall = j_of(other, x, labels, penalty, names) - j_of(prog, x, labels, penalty, names)
        total = path.change
        change = penalty.of(total.after2 - total.before2, total.after1 - total.before1)
        assert fall <= path.budget + change + 1e-9
        claims = by_name(path, penalty)
        assert claims["telescoped"].holds or claims["telescoped"].status == "vacuous"
        assert claims["mask"].meaning.count("does not apply") == seed % 2


def test_prune_and_restore():
    """Theorem 5 on 60 triples S, Q, P: the claim about J is never wrong, and the bound improves exactly as it says."""
    certified = improves = 0
    for seed in range(60):
        rng, prog, x, labels, penalty = two_layers(seed)
        a = prog.constants["w0"]
        part = rng.integers(0, 3, a.shape)  # 0 kept, 1 restored, 2 removed
        a = np.where(part == 2, a * rng.uniform(0, 0.3), a)
        prog = copied(prog, w0=a)
        kept, bare = copied(prog, w0=np.where(part == 2, 0, a)), copied(prog, w0=np.where(part > 0, 0, a))
        restored, masked = data_path(prog, kept, x, labels), data_path(prog, bare, x, labels)
        if not (restored.steps and masked.steps):
            continue
        q = change_between(*(torch.from_numpy(p.constants["w0"]) for p in (kept, bare)))
        first, second = prune_restore_claims(restored, masked, q, penalty)
        if first.holds:
            certified += 1
            assert j_of(kept, x, labels, penalty) < j_of(prog, x, labels, penalty)
        bounds = [
            p.budget - penalty.of(p.change.removed2, p.change.removed1) for p in (restored, masked)
        ]  # upper bounds of what J changes by
        assert abs(bounds[0] - bounds[1]) < 1e-6 * sum(map(abs, bounds)) or (bounds[0] < bounds[1]) == (
            second.left < second.right
        )
        improves += second.holds
        assert second.measured == pytest.approx(
            j_of(kept, x, labels, penalty) - j_of(bare, x, labels, penalty), rel=1e-6, abs=1e-6
        )
    assert certified > 5 and improves > 5


def test_the_jacobian_at_the_dense_point_is_no_lipschitz_constant():
    """The planted wrong L_s: it is violated, sometimes; the one from the enclosure never is."""
    wrong = 0
    for seed in range(NETS):
        rng, prog, x, labels, _ = two_layers(seed)
        a = prog.constants["w0"]
        other = copied(prog, w0=a - 0.8 * rng.standard_normal(a.shape))
        path = data_path(prog, other, x[:2], labels[:2])
        v = torch.from_numpy(prog.constants["w1"])
        for s in range(2):
            hidden = torch.from_numpy(a) @ x[s].flatten()
            at_point = float((v * (hidden > 0)).abs().sum(1).max())
            moved, pushed = float(path.steps[0].measured[s]), float(path.steps[0].displaced[s])
            wrong += moved > at_point * pushed * (1 + 1e-9)
            assert moved <= float(path.steps[0].lipschitz[s]) * pushed * (1 + 1e-9)
    assert wrong > 3


# Budgets.


def test_nothing_is_displaced_where_r_meets_only_zeros():
    """The zero budget: dead inputs may lose their weights, and nothing changes; one live one is enough to lose it."""
    rng = np.random.default_rng(0)
    first = rng.standard_normal((6, 4))
    first[3:] = -np.abs(first[3:])
    prog = dense_layers(first, rng.standard_normal((3, 6)), biases=[np.array([0, 0, 0, -1.0, -1, -1]), np.zeros(3)])
    x = torch.from_numpy(np.abs(rng.standard_normal((5, 1, 2, 2))))
    w = prog.constants["w1"].copy()
    w[:, 3:] = 0
    path = data_path(prog, copied(prog, w1=w), x, torch.zeros(5))
    claim = by_name(path, Penalty(1.0, 1.0))["zero_budget"]
    assert claim.holds and claim.status == "proved" and claim.measured == 0.0 and path.budget < 1e-200
    assert by_name(path, Penalty(1e-9))["mask"].holds  # any lambda at all will do
    w[0, 0] = 0
    path = data_path(prog, copied(prog, w1=w), x, torch.zeros(5))
    assert not by_name(path, Penalty(1.0))["zero_budget"].holds


def test_the_critical_lambda_is_where_the_certificate_turns():
    prog, x = program("mlp"), images("mlp", 5)
    path = data_path(prog, pruned(prog, 0.05), x, logits(prog, x).argmax(1))
    two, one = objective.critical_lambdas(path.budget, path.change)
    assert two == pytest.approx(path.budget / path.change.removed2)
    for factor, holds in ((1.001, True), (0.999, False)):
        assert by_name(path, Penalty(two * factor))["mask"].holds is holds
        assert by_name(path, Penalty(0.0, one * factor))["mask"].holds is holds
    assert objective.critical_lambdas(1.0, NO_CHANGE) == (math.inf, math.inf)


def test_a_bound_that_reaches_the_trivial_range_is_vacuous():
    prog, x = program("vit"), images("vit", 3)
    path = data_path(prog, pruned(prog, 0.3), x, logits(prog, x).argmax(1))
    assert path.vacuous and path.budget >= math.log(CLASSES) + float(path.ranges.mean())
    claims = by_name(path, Penalty(1e9))
    for name in ("ce_path", "mask", "epsilon", "additive", "update", "telescoped", "margin"):
        assert claims[name].status == "vacuous" and not claims[name].holds
    assert claims["a_posteriori"].status == "observed"
    assert all((s.measured <= s.eta).all() for s in path.steps)
    last = path.steps[-1]  # the head alone is not: nothing comes after it
    assert (last.eta < 2 * last.measured + 1e-9).all()


@pytest.mark.parametrize("kind", ["mlp", "conv", "residual", "mixed"])
def test_exported_networks_are_bounded_step_by_step(kind):
    """Convolutions with folded norms, residual sums, gates: sound, finite, within the looseness known of boxes."""
    prog, x = program(kind), images(kind, 4, seed=6)
    first = next(op.name for op in prog.ops if op.kind in ("Conv", "Gemm"))
    other = pruned(prog, 0.05, also=(first,))
    path = data_path(prog, other, x, logits(prog, x).argmax(1))
    assert [s.op for s in path.steps] == [op.name for op in changed_ops(prog, other)]
    chain = prog
    for step in path.steps:
        op = next(op for op in prog.ops if op.name == step.op)
        ahead = copied(chain, **{n: other.constants[n] for n in op.inputs if n in other.constants})
        moved = (logits(ahead, x) - logits(chain, x)).abs().amax(1)
        assert torch.allclose(moved, step.measured, atol=1e-12) and (moved <= step.eta).all()
        assert (step.eta < 3000 * moved.clamp_min(1e-6)).all()
        chain = ahead
    assert not path.vacuous
    assert json.dumps(path.facts(Penalty(1e-4, 1e-5)), allow_nan=False)


def test_the_displacement_holds_for_every_kind_of_changed_operator():
    """Layer norms, biases and products: op(psi; dense) - op(psi; other) is below its bound, and close to it."""
    prog, x = program("vit"), images("vit", 1)
    rng = np.random.default_rng(0)
    float_names = {
        n
        for op in prog.ops
        if op.kind in ("LayerNormalization", "Add", "MatMul", "Gemm", "Conv")
        for n in op.inputs
        if n in prog.constants
    }
    other = copied(
        prog,
        **{
            n: (prog.constants[n] + 0.01 * rng.standard_normal(prog.constants[n].shape)).astype(np.float32)
            for n in float_names
        },
    )
    one, two = Prepared(prog), Prepared(other)
    values = propagate(two, x)
    kinds = set()
    for op in changed_ops(prog, other):
        centres = [getattr(values[n], "centre", values[n]) if n else None for n in op.inputs]
        ours = [one.constants.get(n, v) for n, v in zip(op.inputs, centres, strict=True)]
        exact = float((evaluate(op, ours)[0] - evaluate(op, centres)[0]).abs().max())
        assert exact <= float(displacement(one, two, op, values).max()) <= exact * 1.001 + 1e-9
        kinds.add(op.kind)
    assert kinds >= {"LayerNormalization", "Add", "MatMul", "Gemm", "Conv"}
    path = data_path(prog, other, x, torch.zeros(1))
    assert (torch.stack([s.measured for s in path.steps]) <= torch.stack([s.eta for s in path.steps])).all()


def test_gaussian_budgets_hold_as_often_as_they_promise():
    """With R as the model wants it: independent of psi and of L_s. At delta = 5 % of 300, and both forms are one."""
    rng = np.random.default_rng(0)
    n, m, samples, sd, delta = 32, 48, 12, 0.1, 0.05
    exceeded, ratio = 0, []
    for _ in range(300):
        r, psi = rng.standard_normal((n, m)) * sd, rng.standard_normal((m, samples))
        lipschitz = torch.from_numpy(rng.uniform(0.1, 3, samples))
        spent = objective.budget(lipschitz * torch.from_numpy(np.abs(r @ psi).max(0)))
        norms = torch.from_numpy(np.linalg.norm(psi, axis=0))
        promised = objective.gaussian_budget(lipschitz, norms, sd, n, 1, delta)
        edge = sd * (math.sqrt(n) + math.sqrt(m))
        assert objective.mp_budget(lipschitz, norms, edge, n, m, 1, delta) == pytest.approx(promised)
        exceeded += spent > promised
        ratio.append(spent / promised)
    assert exceeded <= 300 * delta and 0.3 < np.mean(ratio) < 1
    # The paper's form: (2/|T|) sum L ||v|| sqrt(2 g/n log(2 n |T| / delta)), g = n sd^2.
    g = n * sd**2
    assert promised == pytest.approx(
        2 * float((lipschitz * norms).mean()) * math.sqrt(2 * g / n * math.log(2 * n * samples / delta))
    )


def test_budgets_of_a_model_are_never_called_proved():
    prog, x = program("mlp"), images("mlp", 3)
    claims = by_name(data_path(prog, pruned(prog, 0.1), x, torch.zeros(3)), Penalty(1e-4))
    assert claims["gaussian"].status == claims["mp"].status == "model"
    assert {c.status for n, c in claims.items() if n not in ("gaussian", "mp", "a_posteriori")} <= {"proved", "vacuous"}


def test_patches_are_what_a_convolution_meets():
    """||psi||_2 of a convolution is that of the largest patch, and its places are its output's positions."""
    prog, x = program("conv"), images("conv", 2)
    step = data_path(prog, pruned(prog, 0.1), x, torch.zeros(2)).steps[0]
    patches = torch.nn.functional.unfold(x, 3, padding=1)
    assert torch.allclose(step.norms, patches.square().sum(1).sqrt().amax(1))
    assert (step.places, step.rows, step.columns) == (100, 6, 9)


# Twins.


def test_networks_that_are_no_twins_are_refused():
    prog, x = program("mlp"), images("mlp", 1)
    with pytest.raises(StageFailed, match="do not have the same operators"):
        data_path(prog, program("conv"), x, torch.zeros(1))
    ops = tuple(
        type(op)(op.name, op.kind, op.inputs, op.outputs, {**op.attributes, "alpha": 2.0}) if op.kind == "Gemm" else op
        for op in prog.ops
    )
    with pytest.raises(StageFailed, match="has other attributes"):
        data_path(prog, Program(ops, prog.constants, prog.input, prog.output), x, torch.zeros(1))
    name = next(op.inputs[1] for op in prog.ops if op.kind == "Gemm")
    with pytest.raises(StageFailed, match="has another shape"):
        data_path(prog, copied(prog, **{name: prog.constants[name][:, :-1]}), x, torch.zeros(1))


def test_equal_networks_have_no_step_and_no_budget():
    prog, x = program("mlp"), images("mlp", 2)
    path = data_path(prog, prog, x, torch.zeros(2))
    assert path.steps == () and path.budget < 1e-200 and path.cross_entropy_change() == 0
    claims = by_name(path, Penalty(1.0, 1.0))
    assert claims["zero_budget"].holds and claims["margin"].holds and not claims["mask"].holds
    assert "stationarity" not in claims
    assert json.dumps(path.facts(Penalty(1.0)), allow_nan=False)


# Ranking.


def two_of_four(weight):
    """The two smallest of four consecutive inputs are 0; weights of a MatMul are [inputs, outputs]."""
    groups = weight.T.reshape(weight.shape[1], -1, 4).copy()
    np.put_along_axis(groups, np.abs(groups).argsort(2)[:, :, :2], 0, axis=2)
    return groups.reshape(weight.T.shape).T


def test_the_ranking_of_layers_follows_what_was_measured_on_the_quickstart_network():
    prog, x = quickstart(48)
    x = x.float()
    layers = [op for op in prog.ops if op.kind == "MatMul" and op.inputs[1] in prog.constants]
    proposals = {op.name: {op.inputs[1]: two_of_four(prog.constants[op.inputs[1]])} for op in layers}
    scores = rank_layers(prog, x, proposals)
    assert set(scores) == set(proposals) and len(layers) == 16
    before = run(prog, x)[prog.output]
    pair = before.topk(2, dim=1).indices
    measured = []
    for op in layers:
        after = run(copied(prog, **proposals[op.name]), x)[prog.output]
        lost = (after - before).gather(1, pair)
        measured.append(float((lost[:, 1] - lost[:, 0]).abs().mean()))
    estimated = [scores[op.name] for op in layers]
    assert spearmanr(estimated, measured).statistic > 0.6
    assert min(e / m for e, m in zip(estimated, measured, strict=True)) > 1  # signs dropped: above what happened here


def test_the_score_is_the_sum_over_the_adjoints():
    """On two layers by hand: sum_i |a_i| |(R psi)_i| with a the gradient of z_runner-up - z_label."""
    _, prog, x, _, _ = two_layers(3)
    r = 0.1 * np.ones_like(prog.constants["w0"])
    score = rank_layers(prog, x, {"gemm0": {"w0": prog.constants["w0"] - r}})["gemm0"]
    total = 0.0
    for image in x:
        psi = image.flatten()
        hidden = torch.from_numpy(prog.constants["w0"]) @ psi
        v = torch.from_numpy(prog.constants["w1"])
        z = v @ hidden.relu()
        y, j = z.topk(2).indices
        total += float((((v[j] - v[y]) * (hidden > 0)).abs() * (torch.from_numpy(r) @ psi).abs()).sum())
    assert score == pytest.approx(total / len(x))
    with pytest.raises(StageFailed, match="no operator gemm9"):
        rank_layers(prog, x, {"gemm9": {}})


def test_changes_are_compared_by_definition():
    a, s = torch.tensor([[1.0, -2.0, 3.0]]), torch.tensor([[1.0, 0.0, 2.5]])
    change = change_between(a, s)
    assert (change.removed2, change.removed1, change.cross, change.masked) == (4.25, 2.5, 1.25, False)
    assert (change.before2, change.after2, change.before1, change.after1) == (14.0, 7.25, 6.0, 3.5)
    assert change_between(a, a * torch.tensor([1.0, 0.0, 1.0])).masked
    both = change + change
    assert both.removed2 == 8.5 and isinstance(both, type(change)) and not (change + NO_CHANGE).masked
    assert DataPath((), torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1).long(), (0, 0, 0), ()).change == NO_CHANGE
