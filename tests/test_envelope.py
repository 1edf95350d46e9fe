"""L3: no execution that obeys a rounding model leaves its envelope; the three states; int8."""

import numpy as np
import pytest
import torch
from bound_networks import SIZES, copied, dense_layers, images, program, pruned

from mpdeploy.certify.box_rules import FLOAT64, Box, Prepared
from mpdeploy.certify.boxes import pair_bounds, propagate
from mpdeploy.certify.envelope import ARITHMETICS, engine_envelope, stored
from mpdeploy.certify.program import Op, Program, evaluate, quantization_grid, run
from mpdeploy.certify.proof import State
from mpdeploy.errors import RecipeError

FLOATS = ["fp32", "tf32", "fp16", "bf16"]
MOVES = {
    "Flatten",
    "Reshape",
    "Transpose",
    "Slice",
    "Squeeze",
    "Concat",
    "Shape",
    "Split",
    "Gather",
    "Cast",
    "Unsqueeze",
}


def rounded(x, precision):
    kind = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    return x.to(kind).double() if x.is_floating_point() else x


def truncated(x):
    """tf32 as the hardware may read it: the last 13 bits of the float32 are dropped."""
    return (x.float().view(torch.int32) & ~0x1FFF).view(torch.float32).double()


def engine(prog, x, precision, seed):
    """One execution of the model: float32 inside, an order of every sum of its own, results stored rounded."""
    generator = torch.Generator().manual_seed(seed)

    def product(op, inputs):
        if precision == "tf32":
            inputs = [truncated(v) if i < 2 else v for i, v in enumerate(inputs)]
        if op.kind == "MatMul":
            a, b = (v.float() for v in inputs)
            order = torch.randperm(a.shape[-1], generator=generator)
            total = torch.zeros((*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1]))
            for k in order:
                total = total + a[..., :, k : k + 1] * b[..., k : k + 1, :]
            return (total.double(),)
        if op.kind == "Gemm" and op.attributes.get("transB", 0):
            a, w, *c = (v.float() for v in inputs if v is not None)
            total = torch.zeros(len(a), len(w))
            for k in torch.randperm(a.shape[1], generator=generator):
                total = total + a[:, k : k + 1] * w[:, k][None]
            return ((total + (c[0] if c else 0)).double(),)
        return tuple(v.double() for v in evaluate(op, [None if v is None else v.float() for v in inputs]))

    def each(op, inputs):
        floats = [v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in inputs]
        results = product(op, inputs) if op.kind in ("Conv", "Gemm", "MatMul") else evaluate(op, floats)
        if op.kind in MOVES:
            return results
        return tuple(rounded(v.double(), precision) if v.is_floating_point() else v for v in results)

    return run(prog, rounded(x, precision), dtype=torch.float64, each=each, keep=None)


@pytest.mark.parametrize("precision", FLOATS)
@pytest.mark.parametrize("kind", list(SIZES))
def test_every_intermediate_value_of_an_execution_is_enclosed(kind, precision):
    prog = stored(program(kind), precision)
    prepared, arithmetic = Prepared(prog), FLOAT64 + ARITHMETICS[precision]
    for seed in range(2):
        x = images(kind, 1, seed=seed).float().double()
        values = propagate(prepared, x, arithmetic)
        got = engine(prog, x, precision, seed)
        for name, value in got.items():
            box = values[name]
            if isinstance(box, Box):
                away = (value - box.centre).abs()
                assert (away <= box.radius).all(), name
                assert away.square().sum().sqrt() <= box.norm, name
        box = values[prog.output]
        z, label = got[prog.output][0], int(box.centre.argmax())
        moved = ((z - z[label]) - (box.centre[0] - box.centre[0, label])).abs()
        bounds = pair_bounds(prepared, values, label)
        assert (moved <= bounds).all()
        if kind != "vit":
            assert float(bounds.max()) < 5000 * float(moved.max())  # neither infinite nor silly


@pytest.mark.parametrize("precision", FLOATS)
def test_a_certified_label_survives_every_execution(precision):
    counts = np.zeros(3, int)
    for kind in ("mlp", "conv", "residual"):
        prog, x = program(kind), images(kind, 10, seed=3).float().double()
        proof = engine_envelope(prog, x, precision)
        kept = stored(prog, precision)
        for seed in range(2):
            z = engine(kept, x, precision, seed)[prog.output]
            label = z.argmax(1).numpy()
            assert (label == proof.label)[proof.state == State.CERTIFIED].all()
        counts += np.bincount(proof.state, minlength=3)
    assert counts[State.CERTIFIED] > 0
    assert precision != "fp32" or counts[State.CERTIFIED] == 30


def test_the_formats_are_ordered_by_their_bounds():
    x = images("mlp", 4)
    bound = {p: np.median(engine_envelope(program("mlp"), x, p).bound) for p in FLOATS}
    assert bound["fp32"] < bound["fp16"] < bound["tf32"] < bound["bf16"]


def test_fp16_accumulation_has_no_bound():
    proof = engine_envelope(program("mlp"), images("mlp", 3), "fp16_accumulate")
    assert (
        (proof.state == State.VACUOUS).all() and np.isinf(proof.bound).all() and proof.facts()["bound_median"] is None
    )


def test_a_deep_network_is_vacuous_in_half_precision():
    proof = engine_envelope(program("vit", 8), images("vit", 1), "fp16")
    assert proof.state[0] == State.VACUOUS and proof.bound[0] >= proof.range[0]


def test_a_value_that_may_overflow_has_no_bound():
    prog = dense_layers(np.eye(4) * 300.0, np.eye(4) * 300.0)
    small, large = torch.full((1, 1, 2, 2), 0.1).double(), torch.tensor([[[[1.0, 0.5], [0.2, 0.1]]]]).double()
    assert np.isfinite(engine_envelope(prog, small, "fp16").bound).all()
    assert np.isinf(engine_envelope(prog, large, "fp16").bound).all()  # 300 * 300 > 65504
    assert np.isfinite(engine_envelope(prog, large, "bf16").bound).all()


def test_weights_are_rounded_first_and_are_no_uncertainty():
    """The margins are those of the stored weights: 1 + 2^-12 is 1 in fp16, so the two logits tie."""
    prog = dense_layers(np.array([[1 + 2.0**-12, 0.0], [1.0, 0.0]]))
    x = torch.tensor([[[[1.0, 0.0]]]]).double()
    assert engine_envelope(prog, x, "fp32").state[0] == State.CERTIFIED
    half = engine_envelope(prog, x, "fp16")
    assert half.state[0] != State.CERTIFIED and half.range[0] == 0.0
    exact = dense_layers(np.array([[0.5, 0.25], [0.25, 0.5]]))
    assert stored(exact, "fp16").constants["w0"].tolist() == exact.constants["w0"].tolist()
    assert stored(program("mlp"), "tf32") is program("mlp")


def test_the_label_spoken_about_can_be_another_networks():
    """For the dense label: a sample that pruning already lost can't be certified for it."""
    prog, x = program("mlp"), images("mlp", 30, seed=9)
    other = pruned(prog, 0.9)
    dense = run(prog, x, dtype=torch.float64)[prog.output].argmax(1)
    proof = engine_envelope(other, x, "fp32", labels=dense.tolist())
    same = (run(other, x, dtype=torch.float64)[other.output].argmax(1) == dense).numpy()
    assert not same.all() and (proof.label == dense.numpy()).all()
    assert (same[proof.state == State.CERTIFIED]).all() and (proof.state == State.CERTIFIED).sum() > 5


def test_unknown_precision_and_int8_without_quantisation_are_refused():
    with pytest.raises(RecipeError, match="no rounding model of the precision 'fp8', expected one of fp32, tf32"):
        engine_envelope(program("mlp"), images("mlp", 1), "fp8")
    with pytest.raises(RecipeError, match="needs a graph with QuantizeLinear"):
        engine_envelope(program("mlp"), images("mlp", 1), "int8")


# int8.


def quantised(source, x, steps=127):
    """A QDQ graph of `dense_layers`: every product reads quantised values and int8 weights."""
    values = run(source, x, dtype=torch.float64, keep=None)
    values[source.input] = x
    ops, constants = [], dict(source.constants)
    for op in source.ops:
        if op.kind != "Gemm":
            ops.append(op)
            continue
        data, name = op.inputs[0], op.name
        weight = constants.pop(op.inputs[1])
        scale = np.float32(np.abs(weight).max() / 127)
        constants |= {
            f"{name}_w": np.clip(np.round(weight / scale), -127, 127).astype(np.int8),
            f"{name}_ws": scale,
            f"{name}_wz": np.zeros((), np.int8),
            f"{name}_xs": np.float32(float(values[data].abs().max()) / steps),
            f"{name}_xz": np.zeros((), np.int8),
        }
        at = (f"{name}_xs", f"{name}_xz")
        ops += [
            Op(f"{name}_q", "QuantizeLinear", (data, *at), (f"{name}_xq",), {}),
            Op(f"{name}_dq", "DequantizeLinear", (f"{name}_xq", *at), (f"{name}_x",), {}),
            Op(f"{name}_dw", "DequantizeLinear", (f"{name}_w", f"{name}_ws", f"{name}_wz"), (f"{name}_wd",), {}),
            Op(name, "Gemm", (f"{name}_x", f"{name}_wd", *op.inputs[2:]), op.outputs, op.attributes),
        ]
    return Program(tuple(ops), constants, source.input, source.output)


def int8_network(seed=0):
    rng = np.random.default_rng(seed)
    weights = [rng.standard_normal((16, 20)) / 4, rng.standard_normal((12, 16)) / 4, rng.standard_normal((4, 12)) / 3]
    weights[2][0] *= 3
    return dense_layers(*weights, biases=[rng.standard_normal(len(w)) * 0.1 for w in weights])


def any_grid_point(generator):
    """Executions that round to either neighbour where the value is close to the middle, as an engine may."""

    def each(op, inputs):
        if op.kind != "QuantizeLinear":
            return evaluate(op, inputs)
        exact, _, _, (low, high) = quantization_grid(op, inputs)
        jitter = 1e-7 * (torch.rand(exact.shape, generator=generator).double() * 2 - 1) * exact.abs()
        return ((exact + jitter).round().clamp(low, high),)

    return each


def test_int8_executions_are_enclosed_and_the_bound_is_not_silly():
    x = torch.randn(40, 1, 4, 5, generator=torch.Generator().manual_seed(1)).double()
    prog = quantised(int8_network(), x)
    prepared, arithmetic = Prepared(prog), FLOAT64 + ARITHMETICS["int8"]
    proof = engine_envelope(prog, x, "int8")
    for i in range(8):
        values = propagate(prepared, x[i : i + 1], arithmetic)
        for seed in range(4):
            each = any_grid_point(torch.Generator().manual_seed(seed))
            got = run(prog, x[i : i + 1], dtype=torch.float64, each=each, keep=None)
            for name, value in got.items():
                if isinstance(values[name], Box):
                    assert ((value - values[name].centre).abs() <= values[name].radius).all(), name
            if proof.state[i] == State.CERTIFIED:
                assert int(got[prog.output].argmax()) == proof.label[i]
    assert (proof.state == State.CERTIFIED).any() and np.isfinite(proof.bound).all()
    seen = (
        run(prog, x, dtype=torch.float64)[prog.output] - run(int8_network(), x, dtype=torch.float64)["logits"]
    ).abs()
    assert proof.bound.max() < 100 * float(seen.max())


def test_what_is_clipped_counts_in_full():
    """A scale that is ten times too small: the excess over the range enters the radius."""
    x = torch.randn(10, 1, 4, 5, generator=torch.Generator().manual_seed(1)).double()
    tight = quantised(int8_network(), x, steps=1270)
    prepared = Prepared(tight)
    values = propagate(prepared, x[:1], FLOAT64 + ARITHMETICS["int8"])
    got = run(tight, x[:1], dtype=torch.float64, keep=None)
    clipped = False
    for name, value in got.items():
        if isinstance(values[name], Box):
            assert ((value - values[name].centre).abs() <= values[name].radius).all(), name
            clipped |= bool(((value - values[name].centre).abs() > 0.5 * (1 + 1e-6)).any()) and name.endswith("_xq")
    assert clipped


def test_integer_sums_cost_nothing():
    """The same product: the accumulator's error is counted in float32, and not where both operands are integers."""
    x = torch.randn(1, 1, 4, 5, generator=torch.Generator().manual_seed(1)).double()
    prog = quantised(dense_layers(np.random.default_rng(0).standard_normal((3, 20))), x)
    exact = copied(prog, gemm0_xs=np.float32(2.0**-6), gemm0_ws=np.float32(2.0**-6))
    added = {}
    for name, arithmetic in (("int8", ARITHMETICS["int8"]), ("fp32", ARITHMETICS["fp32"])):
        box = propagate(Prepared(exact), x, FLOAT64 + arithmetic)["logits"]
        added[name] = float(box.added.max())
    assert added["int8"] < 0.6 * added["fp32"]
