"""The noise floor: against Monte Carlo, against real engines of three families and precisions, and with defects."""

import functools
import itertools
import json
from types import SimpleNamespace

import defects
import numpy as np
import onnx
import pytest
import timm
import torch
from conftest import QUICKSTART
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from mpdeploy.certify import noise_floor as nf
from mpdeploy.certify.noise_floor import (
    exact_logits,
    flip_bounds,
    float_types,
    forecast,
    judge,
    noise_floor,
    pair_errors,
    rms_limit,
    threshold,
)
from mpdeploy.certify.program import Program, evaluate_unrounded, run
from mpdeploy.errors import StageFailed
from mpdeploy.graph.export import export_onnx
from mpdeploy.graph.program import read_program, read_rewritten
from mpdeploy.graph.quantize import to_int8
from mpdeploy.models import load
from mpdeploy.recipe import load_recipe

SAMPLES = 24
HEADS = 2
CLEAN = (0.3, 1.5)
"""Between these the root mean square of error / sigma of an engine without a defect has to lie."""


@functools.cache
def quickstart():
    """The shipped ViT, trained on Fashion-MNIST, with validation and training images as it takes them."""
    record = json.loads((QUICKSTART.parent / "quickstart" / "vit.json").read_text())
    with np.load(QUICKSTART.parent / "quickstart" / "fashion_mnist_slice.npz") as data:
        val, train = (
            ((data[key][:count, None] / 255 - record["mean"]) / record["std"]).astype(np.float32)
            for key, count in (("val_images", SAMPLES), ("train_images", 64))
        )
    return load(load_recipe(QUICKSTART).recipe.source).module.eval(), val, train


@functools.cache
def untrained(family):
    """A small network of random weights and its images."""
    torch.manual_seed(1)
    if family == "convolutions":
        layers = nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.GELU(), nn.Flatten()
        module = nn.Sequential(*layers, nn.Linear(128, 10)).eval()
        return module, np.random.default_rng(3).standard_normal((1, 3, 8, 8)).astype(np.float32), None
    name, args, size = {
        "resnet": ("resnet10t", {}, (3, 32, 32)),
        "convnextv2": ("convnextv2_atto", {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 40)}, (3, 64, 64)),
        "swin": (
            "swin_tiny_patch4_window7_224",
            {"img_size": 56, "window_size": 7, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)},
            (3, 56, 56),
        ),
        "deit": (
            "deit_tiny_distilled_patch16_224",
            {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3},
            (3, 32, 32),
        ),
    }[family]
    module = timm.create_model(name, pretrained=False, num_classes=10, **args).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    images = np.random.default_rng(3).standard_normal((16, *size)).astype(np.float32)
    return module, images, images


NETWORKS = {"quickstart": quickstart, **{f: functools.partial(untrained, f) for f in ("resnet", "convnextv2", "swin")}}
SLOW = {(f, p) for f, p in itertools.product(["convnextv2", "swin"], ["fp32", "fp16", "int8"])} - {
    ("convnextv2", "fp32")
}
ENGINES = [
    pytest.param(*engine, marks=[pytest.mark.slow] if engine in SLOW else [])
    for engine in itertools.product(NETWORKS, ["fp32", "fp16", "int8"])
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return exporter(tmp_path_factory.mktemp("exported"), NETWORKS)


def exporter(home, networks):
    @functools.cache
    def path(name, precision="fp32"):
        module, images, calibration = networks[name]()
        target = home / f"{name}.{precision}.onnx"
        if precision == "int8":
            to_int8(path(name), target, calibration)
        else:
            export_onnx(module, images.shape[1:], target, precision=precision)
        return target

    return path


def onnxruntime(model, images):
    """ONNX Runtime on the CPU, with all its optimisations."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
    session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: images[i : i + 8]})[0] for i in range(0, len(images), 8)])


def graph_of(path, precision):
    """The graph whose roundings ONNX Runtime's CPU provider makes."""
    return read_rewritten(path) if precision == "fp16" else read_program(path)


# Real engines without a defect.


@pytest.mark.parametrize(("name", "precision"), ENGINES)
def test_the_noise_of_real_engines_is_what_the_floor_says(exported, name, precision):
    check_clean(exported(name, precision), NETWORKS[name]()[1], precision, pairs=2)


def check_clean(path, images, precision, pairs):
    program = graph_of(path, precision)
    floor = noise_floor(program, images, precision=precision, pairs=pairs)
    judged = judge(pair_errors(onnxruntime(path, images), exact_logits(program, images), floor), floor)
    assert judged.verdict == "within", judged.reason
    assert CLEAN[0] < judged.rms < CLEAN[1], judged.reason
    return judged


@pytest.mark.parametrize("name", ["quickstart", "resnet"])
@pytest.mark.parametrize(("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_the_noise_of_kernels_that_store_half_precision(exported, name, precision, dtype):
    """torch's CPU kernels store every result in the half type; the constants are rounded before."""
    single, images = read_program(exported(name)), NETWORKS[name]()[1]
    program = rounded_constants(single, dtype) if precision == "bf16" else read_program(exported(name, "fp16"))
    with torch.no_grad():
        engine = run(program, torch.from_numpy(images), dtype=dtype)[program.output].float().numpy()
    floor = noise_floor(program, images, precision=precision)
    judged = judge(pair_errors(engine, exact_logits(program, images), floor), floor)
    assert judged.verdict == "within" and CLEAN[0] < judged.rms < CLEAN[1], judged.reason
    finer = noise_floor(single, images, precision="fp32")
    assert judge(pair_errors(engine, exact_logits(program, images), finer), finer).verdict == "beyond"


def rounded_constants(program, dtype):
    constants = {
        name: torch.from_numpy(np.array(a)).to(dtype).float().numpy() if a.dtype == np.float32 else a
        for name, a in program.constants.items()
    }
    return Program(program.ops, constants, program.input, program.output)


def test_a_float16_graph_that_the_cpu_computes_in_float32_shows_as_finer_than_declared(exported):
    """ONNX Runtime's CPU provider rounds almost nothing of this network to float16: the rewritten graph says so."""
    path, images = exported("resnet", "fp16"), untrained("resnet")[1]
    program, rewritten = read_program(path), read_rewritten(path)
    engine, exact = onnxruntime(path, images), exact_logits(program, images)
    np.testing.assert_allclose(exact_logits(rewritten, images), exact, rtol=1e-9, atol=1e-12)
    declared, real = (noise_floor(p, images, precision="fp16") for p in (program, rewritten))
    assert judge(pair_errors(engine, exact, declared), declared).rms < 0.01
    assert judge(pair_errors(engine, exact, real), real).rms > CLEAN[0]
    assert "float16" not in {float_types(rewritten)[op.outputs[0]] for op in rewritten.ops if op.kind == "Conv"}
    assert {float_types(program)[op.outputs[0]] for op in program.ops if op.kind == "Conv"} == {"float16"}


# Defects.


@functools.cache
def reference():
    module, images, _ = quickstart()
    with torch.inference_mode():
        return module(torch.from_numpy(images)).numpy()


PLANTED = {
    "tanh_gelu": defects.tanh_gelu,
    "layer_norm_epsilon": defects.layer_norm_epsilon,
    "attention_scale": defects.attention_scale,
    "input_scale": defects.input_scale,
    "transposed_head": functools.partial(defects.transposed_head, heads=HEADS),
    "stale_weights": defects.stale_weights,
}


def export_stage(model):
    """How the step from torch to ONNX, both in float32, and that from ONNX to the engine are judged."""
    images = quickstart()[1]
    program = read_program(model)
    floor = noise_floor(program, images, precision="fp32")
    engine = onnxruntime(model, images)
    return (
        judge(pair_errors(engine, reference(), floor), floor, executions=2),
        judge(pair_errors(engine, exact_logits(program, images), floor), floor),
        engine,
    )


def test_a_sound_export_is_within_the_noise_of_two_float32_runs(exported):
    export, engine, logits = export_stage(onnx.load(exported("quickstart")))
    assert (export.verdict, engine.verdict) == ("within", "within"), (export.reason, engine.reason)
    assert CLEAN[0] < export.rms < CLEAN[1]
    assert (logits.argmax(1) == reference().argmax(1)).all()


@pytest.mark.parametrize("defect", PLANTED)
def test_a_defect_of_the_export_is_caught_at_the_export_and_nowhere_else(exported, defect):
    export, engine, _ = export_stage(PLANTED[defect](onnx.load(exported("quickstart"))))
    assert export.verdict == "beyond", export.reason
    assert export.rms > 20 and export.largest > 3 * export.threshold, "caught by a wide margin, not by luck"
    assert engine.verdict == "within", engine.reason


def test_agreement_of_labels_would_have_missed_most_of_them(exported):
    model, images = onnx.load(exported("quickstart")), quickstart()[1]
    label = reference().argmax(1)
    missed = {name for name, plant in PLANTED.items() if (onnxruntime(plant(model), images).argmax(1) == label).all()}
    assert len(missed) >= 3, missed


def test_an_engine_that_is_declared_float32_and_computes_in_tf32_is_caught(exported):
    path, images, _ = exported("quickstart"), *quickstart()[1:]
    program = read_program(path)
    exact = exact_logits(program, images)
    single, short = (noise_floor(program, images, precision=p) for p in ("fp32", "tf32"))
    truncated, rounded = (defects.tf32(program, images, truncate=t) for t in (True, False))
    assert (truncated.argmax(1) == exact.argmax(1)).all(), "the labels show nothing"
    assert judge(pair_errors(truncated, exact, single), single).verdict == "beyond"
    assert judge(pair_errors(rounded, exact, single), single).verdict == "beyond"
    honest = judge(pair_errors(rounded, exact, short), short)
    assert honest.verdict == "within" and CLEAN[0] < honest.rms < CLEAN[1], honest.reason


# The model itself.


def noisy(types, units, generator):
    """Every operator that computes adds an independent uniform error of its stored half width."""
    moving = {
        "Reshape",
        "Transpose",
        "Slice",
        "Squeeze",
        "Relu",
        "MaxPool",
        "Concat",
        "Expand",
        "Gather",
        "Shape",
        "Pad",
    }

    def each(op, inputs):
        results = evaluate_unrounded(op, inputs)
        if op.kind in moving or not results[0].is_floating_point():
            return results
        if op.kind == "Cast" and types[op.outputs[0]] == "float32":
            return results
        v = results[0]
        width = units * v.abs() + (2.0**-25 if units == 2.0**-11 else 0) * (v != 0)
        return (v + width * (2 * torch.rand(v.shape, generator=generator, dtype=v.dtype) - 1),)

    return each


@pytest.mark.parametrize("family", ["deit", "convolutions"])
def test_sigma_is_the_standard_deviation_of_simulated_roundings(tmp_path, family):
    """One image many times over in float64, with fresh errors: no adjoint and no formula of the module is used."""
    module, images, _ = untrained(family)
    export_onnx(module, images.shape[1:], tmp_path / "m.onnx", precision="fp16")
    program = read_program(tmp_path / "m.onnx")
    floor = noise_floor(program, images[:1], precision="fp16", pairs=3)
    each = noisy(float_types(program), 2.0**-11, torch.Generator().manual_seed(5))
    runs = 600
    many = torch.from_numpy(images[:1]).expand(runs, -1, -1, -1)
    with torch.no_grad():
        logits = run(program, many, dtype=torch.float64, each=each)[program.output].numpy()
    wide = noise_floor_like(floor, runs)
    error = pair_errors(logits, exact_logits(program, images[:1]), wide)
    np.testing.assert_allclose(error.std(axis=0), floor.sigma[0], rtol=4 / np.sqrt(2 * runs))
    assert np.abs(error.mean(axis=0)).max() < 5 * floor.sigma.max() / np.sqrt(runs)


def noise_floor_like(floor, count):
    """The floor of one sample, repeated."""
    fields = {f: np.repeat(getattr(floor, f), count, axis=0) for f in ("label", "competitors", "margin", "sigma")}
    return nf.NoiseFloor(floor.precision, **fields, shares={}, kinds={}, saturated={})


@pytest.mark.parametrize(("n", "chain"), [(1, 128), (2, 128), (100, 128), (128, 128), (300, 128), (300, 16)])
@pytest.mark.parametrize("mean", [0.0, 2.0])
def test_the_partial_sums_are_those_of_a_random_order(n, chain, mean):
    terms = np.random.default_rng(n).standard_normal(n) + mean
    rng = np.random.default_rng(0)
    found = []
    for _ in range(2000):
        shuffled = rng.permutation(terms)
        chains = [shuffled[start : start + chain] for start in range(0, n, chain)]
        partial = [np.cumsum(c) for c in chains]
        ends = np.cumsum([c.sum() for c in chains])[1:]
        found.append(sum((p**2).sum() for p in partial) + (ends**2).sum())
    c1, c2 = nf._partial_sums(n, chain)
    total = terms.sum()
    assert np.mean(found) == pytest.approx(c1 * total**2 + c2 * ((terms**2).sum() - total**2 / n), rel=0.05)


@pytest.mark.parametrize("n", [64, 768])
def test_the_width_of_a_float32_sum_fits_a_real_one(n):
    """Sequential chains of 128 in float32, as a blocked product runs them, against the sum in float64."""
    rng = np.random.default_rng(n)
    terms = (rng.standard_normal((4000, n)) * rng.standard_normal(n)).astype(np.float32)
    total = np.zeros(4000, np.float32)
    for start in range(0, n, 128):
        total = total + np.cumsum(terms[:, start : start + 128], axis=1, dtype=np.float32)[:, -1]
    exact = terms.astype(np.float64)
    squares = torch.from_numpy((exact**2).sum(1))
    width = nf._accumulated(torch.from_numpy(exact.sum(1)), squares, n).numpy() * 2.0**-24
    ratio = np.sqrt(np.mean(((total - exact.sum(1)) / (width / np.sqrt(3))) ** 2))
    assert 0.6 < ratio < 1.0, "1 would need every mantissa at the foot of its binade"


class Crossed(nn.Module):
    """Tokens first and samples second, as torch's multi-head attention has them; then heads x samples, samples inner."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(12, 12), nn.Linear(12, 5)

    def forward(self, x):
        y = torch.tanh(self.first(x.reshape(x.shape[0], 16, 12).transpose(0, 1)))
        heads = y.reshape(16, -1, 3, 4).permute(2, 1, 0, 3)
        heads = torch.tanh(heads.flatten(0, 1) * 0.7)
        return self.last(heads.reshape(3, -1, 16, 4).permute(1, 2, 0, 3).flatten(2).mean(1))


def test_samples_are_told_apart_wherever_their_axis_is(exported, tmp_path):
    torch.manual_seed(0)
    crossed = np.random.default_rng(0).standard_normal((9, 3, 8, 8)).astype(np.float32)
    export_onnx(Crossed().eval(), (3, 8, 8), tmp_path / "c.onnx")
    for path, images in ((tmp_path / "c.onnx", crossed), (exported("convnextv2"), untrained("convnextv2")[1][:9])):
        program = read_program(path)
        alone = [noise_floor(program, images[i : i + 1], precision="fp16", pairs=2) for i in range(9)]
        together = noise_floor(program, images, precision="fp16", pairs=2)
        scarce = noise_floor(program, images, precision="fp16", pairs=2, memory=1)
        sigma = np.concatenate([floor.sigma for floor in alone])
        np.testing.assert_allclose(together.sigma, sigma, rtol=1e-3)
        np.testing.assert_allclose(scarce.sigma, sigma, rtol=1e-3)
        assert sigma.std() > 0.01 * sigma.mean(), "samples that are all alike would prove nothing"


def test_the_shares_say_where_the_precision_goes(exported):
    images = quickstart()[1][:4]
    single = noise_floor(read_program(exported("quickstart")), images, precision="fp32", pairs=3)
    whole = noise_floor(read_program(exported("quickstart", "int8")), images, precision="int8", pairs=3)
    for floor in (single, whole):
        assert sum(floor.shares.values()) == pytest.approx(1)
        assert sum(floor.kinds.values()) == pytest.approx(1)
        assert floor.sigma.shape == floor.margin.shape == floor.competitors.shape == (4, 3)
        assert (np.diff(floor.margin, axis=1) >= 0).all() and (floor.margin > 0).all()
    assert not single.saturated and {"Relu", "Reshape", "Transpose"}.isdisjoint(single.kinds)
    assert whole.kinds["QuantizeLinear"] > 0.999
    assert (whole.sigma > 1e3 * single.sigma).all()


def test_clipping_is_part_of_the_reference_and_counted():
    nodes = [
        helper.make_node("Flatten", ["images"], ["x"], "flatten"),
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], "q"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], "d"),
        helper.make_node("MatMul", ["d", "w"], ["logits"], "product"),
    ]
    weight = np.random.default_rng(0).standard_normal((16, 3)).astype(np.float32)
    constants = {"s": np.float32(0.01), "z": np.int8(0), "w": weight}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 1, 4, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in constants.items()],
    )
    program = read_program(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]))
    images = np.zeros((1, 1, 4, 4), np.float32)
    images[0, 0, 0] = [5.0, -7.0, 0.5035, 0.0]  # two that clip, one that rounds, one that is exactly zero
    floor = noise_floor(program, images, precision="int8")
    assert floor.saturated == {"q": 2 / 16}
    y, j = floor.label[0], floor.competitors[0, 0]
    np.testing.assert_allclose(floor.sigma[0, 0], 0.005 * abs(weight[2, y] - weight[2, j]) / np.sqrt(3), rtol=1e-4)
    want = np.array([1.27, -1.28, 0.5035]) @ weight[:3]
    np.testing.assert_allclose(exact_logits(program, images)[0], want, rtol=1e-6)


def test_pairs_can_be_named(exported):
    program, images = read_program(exported("resnet")), untrained("resnet")[1][:3]
    every = noise_floor(program, images, precision="fp32", pairs=9)
    classes = np.stack([every.label, every.competitors[:, 4], every.competitors[:, 0]], axis=1)
    named = noise_floor(program, images, precision="fp32", classes=classes)
    np.testing.assert_array_equal(named.competitors, classes[:, 1:])
    np.testing.assert_allclose(named.sigma, every.sigma[:, [4, 0]], rtol=1e-4)
    np.testing.assert_allclose(named.margin, every.margin[:, [4, 0]], rtol=1e-5, atol=1e-6)


def test_what_cannot_be_computed_is_refused(exported):
    program, images = read_program(exported("resnet")), untrained("resnet")[1]
    with pytest.raises(StageFailed, match="10 competitors were asked for; 10 classes"):
        noise_floor(program, images[:2], precision="fp32", pairs=10)
    with pytest.raises(StageFailed, match="no precision fp8"):
        noise_floor(program, images[:2], precision="fp8")
    with pytest.raises(StageFailed, match="at least one sample"):
        noise_floor(program, images[:0], precision="fp32")


# The judgement.


def floor_of(sigma, margin=None):
    sigma = np.asarray(sigma, np.float64)
    n, p = sigma.shape
    margin = np.ones_like(sigma) if margin is None else np.asarray(margin, np.float64)
    return nf.NoiseFloor("fp32", np.zeros(n, np.int64), np.ones((n, p), np.int64), margin, sigma, {}, {}, {})


def test_errors_of_the_model_stay_below_the_threshold_as_often_as_promised():
    """Sums of uniform errors, few and unequal, as far from Gaussian as the model allows."""
    rng = np.random.default_rng(0)
    weights = np.array([1.0, 0.7, 0.1])
    sigma = np.sqrt((weights**2).sum() / 3)
    delta, samples = 0.2, 50
    verdicts = []
    for _ in range(400):
        error = (rng.uniform(-1, 1, (samples, 3)) @ weights)[:, None]
        verdicts.append(judge(error, floor_of(np.full((samples, 1), sigma)), delta=delta).verdict)
    assert verdicts.count("beyond") <= delta * 400
    assert threshold(4, 100, 0.01) == pytest.approx(np.sqrt(6 * np.log(80_000)))


def test_the_limit_of_the_mean_square_holds_for_gaussian_errors():
    rng = np.random.default_rng(0)
    for samples in (1, 10, 100):
        independent = max(1, samples // 10)
        draws = np.sqrt((rng.standard_normal((20_000, independent)) ** 2).mean(axis=1))
        assert (draws > rms_limit(samples, 0.05)).mean() <= 0.05
    limits = [rms_limit(n, 0.01) for n in (1, 10, 100, 1000, 10_000)]
    assert limits == sorted(limits, reverse=True) and limits[0] > 3 and limits[-1] == 1.5


def test_a_small_defect_everywhere_is_beyond_though_no_error_is_large():
    floor = floor_of(np.ones((1000, 1)))
    judged = judge(np.full((1000, 1), 2.0), floor)
    assert judged.largest < judged.threshold and judged.verdict == "beyond"
    assert judge(np.full((1000, 1), 1.2), floor).verdict == "within"
    assert judge(np.full((1000, 1), 2.0), floor, executions=2).verdict == "within"


def test_one_sample_far_out_is_beyond_and_named():
    error = np.full((1000, 2), 0.5)
    error[617, 1] = 20
    judged = judge(error, floor_of(np.ones((1000, 2))))
    assert (judged.verdict, judged.worst, judged.comparisons) == ("beyond", 617, 2000)
    assert judged.rms < judged.rms_limit and "20.00 sigma" in judged.reason


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_fails_closed(bad):
    error, sigma = np.zeros((5, 2)), np.ones((5, 2))
    error[3, 1] = bad
    judged = judge(error, floor_of(sigma))
    assert (judged.verdict, judged.worst, judged.rms) == ("beyond", 3, None)
    sigma[1, 0] = bad
    assert judge(np.zeros((5, 2)), floor_of(sigma)).verdict == "beyond"


def test_no_noise_allows_no_error_and_no_sample_is_no_verdict():
    none = floor_of(np.zeros((2, 1)))
    assert judge(np.zeros((2, 1)), none).verdict == "within"
    assert judge(np.array([[0.0], [1e-30]]), none).verdict == "beyond"
    assert judge(np.zeros((0, 1)), floor_of(np.zeros((0, 1)))).verdict == "unchecked"
    with pytest.raises(StageFailed, match="don't belong"):
        judge(np.zeros((3, 1)), none)


def test_flips_are_bounded():
    margin = np.array([[0.5], [1.0], [3.0], [6.0], [0.0], [-1.0]])
    bound = flip_bounds(floor_of(np.ones_like(margin), margin))
    rng = np.random.default_rng(0)
    noise = rng.uniform(-1, 1, (200_000, 3)).sum(axis=1)  # sigma 1
    for m, b in zip(margin[:, 0], bound, strict=True):
        assert (noise >= m).mean() <= b <= 1
    assert bound[3] == pytest.approx(2 * np.exp(-6)) and bound[4] == bound[5] == 1
    two = flip_bounds(floor_of([[1.0, 1.0]], [[6.0, 6.0]]))
    assert two[0] == pytest.approx(4 * np.exp(-6))
    assert flip_bounds(floor_of([[np.nan], [0.0]], [[1.0], [1.0]])).tolist() == [1.0, 0.0]


def test_the_forecast_is_a_row_of_json(exported):
    images = quickstart()[1]
    floors = {
        p: noise_floor(read_program(exported("quickstart", p)), images, precision=p) for p in ("fp32", "fp16", "int8")
    }
    rows = {p: json.loads(json.dumps(forecast(floor), allow_nan=False)) for p, floor in floors.items()}
    assert rows["fp32"]["samples"] == SAMPLES and rows["fp32"]["competitors"] == 1
    assert rows["fp32"]["flips_at_most"] == 0 and rows["fp32"]["at_risk"] == 0
    assert rows["fp32"]["headroom_min"] > 100 * rows["fp16"]["headroom_min"] > 100 * rows["int8"]["headroom_min"] > 0
    broken = forecast(floor_of([[np.nan], [1.0]], [[1.0], [5.0]]))
    assert broken["sigma_max"] is None and broken["at_risk"] == 1
    assert broken["flips_at_most"] == pytest.approx(1 + 2 * np.exp(-25 / 6))


# Weights and images of others.


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    return exporter(tmp_path_factory.mktemp("real"), REAL)


def packaged(data, model, train, val, **args):
    from mpdeploy.data import open_dataset

    fields = {"kind": "python", "model": model, "weights": "pretrained", "strict": True, "seed": 0}
    loaded = load(SimpleNamespace(**fields, args=args, preprocessing=None))
    images = open_dataset(SimpleNamespace(kind="packaged", path="", name=data))
    apply = loaded.preprocessing.apply
    return loaded.module.eval(), apply(images.val.load(range(val))), apply(images.train.load(range(train)))


REAL = {
    "lite0": functools.cache(lambda: packaged("imagenet-samples", "mpdeploy.models.efficientnet_lite:lite0", 10, 10)),
    "vit_small": functools.cache(
        lambda: packaged(
            "elpv", "mpdeploy.models.imgfocus:vit_small_dinov2", 32, 16,
            img_size=98, head=str(QUICKSTART.parent / "elpv_head.safetensors"),
        )
    ),
}  # fmt: skip


@pytest.mark.real
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("name", REAL)
def test_the_noise_of_engines_of_published_networks(real, name, precision):
    check_clean(real(name, precision), REAL[name]()[1], precision, pairs=1)
