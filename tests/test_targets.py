"""Public figures, the 2:4 rules, and a gain that never promises more than was measured somewhere."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpdeploy.errors import RecipeError
from mpdeploy.targets import TARGETS, eligibility, find, gain

VIT_FC1 = ("linear", (3072, 768))
FIGURES = [  # key, compute capability, GB, GB/s, precision, dense, sparse: from the vendor's data sheets
    ("a100", "8.0", 80, 2039, "fp16", 312, 624),
    ("a100", "8.0", 80, 2039, "int8", 624, 1248),
    ("a100-40gb-pcie", "8.0", 40, 1555, "bf16", 312, 624),
    ("a100-80gb-pcie", "8.0", 80, 1935, "tf32", 156, 312),
    ("a40", "8.6", 48, 696, "fp16", 149.7, 299.4),
    ("a30", "8.0", 24, 933, "int8", 330, 661),
    ("a10", "8.6", 24, 600, "fp16", 125, 250),
    ("l4", "8.9", 24, 300, "int8", 242.5, 485),
    ("l40s", "8.9", 48, 864, "fp16", 362.05, 733),
    ("h100", "9.0", 80, 3350, "fp16", 989.5, 1979),
    ("h200", "9.0", 141, 4800, "int8", 1979, 3958),
    ("rtx4090", "8.9", 24, 1008, "int8", 660.6, 1321.2),
]


@pytest.mark.parametrize(("key", "capability", "memory", "bandwidth", "precision", "dense", "sparse"), FIGURES)
def test_public_figures(key, capability, memory, bandwidth, precision, dense, sparse):
    target = find(key)
    assert (target.compute_capability, target.memory_gb, target.bandwidth_gbs) == (capability, memory, bandwidth)
    assert (target.dense_tflops[precision], target.sparse_tflops[precision]) == (dense, sparse)
    assert target.sm == "sm" + capability.replace(".", "")


def test_every_target_has_a_source_and_consistent_figures():
    assert len({target.key for target in TARGETS}) == len(TARGETS)
    for target in TARGETS:
        assert target.source
        for precision, sparse in target.sparse_tflops.items():
            assert sparse == pytest.approx(2 * target.dense_tflops[precision], rel=0.02)
        assert bool(target.sparse_tflops) == target.has_sparse_kernels


def test_a_misspelt_target_gets_the_nearest_name():
    with pytest.raises(RecipeError, match=r'no target "H20O".*Did you mean "h200"') as caught:
        find("H20O")
    assert "a100" in caught.value.hint


def test_an_ordinary_layer_is_eligible():
    for key in ("a100", "a40", "h100", "l4"):
        for precision in ("fp16", "bf16", "int8"):
            assert eligibility(*VIT_FC1, 1, "2:4", precision, find(key)).eligible
    assert eligibility("conv2d", (256, 64, 3, 3), 1, "2:4", "fp16", find("a40")).eligible


@pytest.mark.parametrize(
    ("change", "rule", "mend"),
    [
        (
            {"pattern": "8:16"},
            "Only 2:4 runs on sparse tensor cores; 8:16 is an accuracy pattern there.",
            "Prune to 2:4.",
        ),
        ({"pattern": "12:16"}, "Only 2:4 runs on sparse tensor cores; 12:16", "Prune to 2:4."),
        ({"pattern": ""}, "The layer stays dense.", ""),
        ({"precision": "fp32"}, "There are no sparse fp32 kernels.", "fp16"),
        ({"groups": 4}, "no group convolutions for sparsity (this one has 4 groups)", "Leave it dense"),
        ({"shape": (1001, 512, 3, 3)}, "1001 outputs are not a multiple of 8.", "Pad to 1008 outputs."),
        ({"shape": (512, 3, 3, 3)}, "3 inputs are not a multiple of 16.", "Pad to 16 inputs."),
        ({"shape": (512, 40, 3, 3)}, "40 inputs are not a multiple of 16.", "Pad to 48 inputs."),
        ({"target": find("cpu")}, "CPUs have no sparse kernels", "int8"),
        ({"target": find("t4")}, "T4 (sm75) has no sparse tensor cores; they begin with sm80.", "sm80"),
    ],
)
def test_each_rule_is_named_with_what_would_mend_it(change, rule, mend):
    layer = {"kind": "conv2d", "shape": (512, 512, 3, 3), "groups": 1, "pattern": "2:4", "precision": "fp16"}
    layer |= {"target": find("a100")}
    assert eligibility(**layer).eligible
    found = eligibility(**(layer | change))
    assert not found.eligible
    assert rule in found.rule
    assert mend in found.mend


@pytest.mark.parametrize("group", range(2, 9))
def test_a_pattern_is_eligible_exactly_if_all_its_masks_are_2_4(group):
    """Every pair of masks of every pattern up to 8 is looked at, side by side until groups and fours align."""
    for keep in range(1, group):
        kept = [set(chosen) for chosen in itertools.combinations(range(group), keep)]
        masks = [[int(index in chosen) for index in range(group)] for chosen in kept]
        # Four neighbours may lie across a border, and the two groups there may carry different masks.
        rows = [(first + second) * 4 for first in masks for second in masks]
        all_2_4 = all(sum(row[i : i + 4]) <= 2 for row in rows for i in range(0, len(row), 4))
        assert eligibility(*VIT_FC1, 1, f"{keep}:{group}", "fp16", find("a100")).eligible == all_2_4, (keep, group)


@pytest.mark.parametrize("pattern", ["2", "4:2", "0:4", "a:b", "2:4:8", "4:4", "-2:4"])
def test_a_pattern_that_is_none_is_refused(pattern):
    with pytest.raises(RecipeError, match="is not a sparsity pattern; expected N:M"):
        eligibility(*VIT_FC1, 1, pattern, "fp16", find("a100"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("conv3d", (8, 16), 1, 1, "fp16"), 'no layer kind "conv3d"'),
        (("linear", (8, 16, 3, 3), 1, 1, "fp16"), "A linear weight has 2 positive sizes"),
        (("linear", (8, 0), 1, 1, "fp16"), "A linear weight has 2 positive sizes"),
        (("linear", (8, 16), 1, 1, "fp8"), 'no precision "fp8"'),
        (("linear", (8, 16), 0, 1, "fp16"), "at least one position and one image"),
    ],
)
def test_a_layer_that_is_none_is_refused(arguments, sentence):
    with pytest.raises(RecipeError, match=sentence):
        gain(*arguments, find("a100"))


@pytest.mark.parametrize(
    ("kind", "shape"), [("conv2d", (64, 64, 3, 3)), ("conv2d", (512, 128, 3, 3)), ("linear", (128, 512))]
)
def test_below_256_channels_there_is_about_nothing(kind, shape):
    found = gain(kind, shape, 3136, 128, "fp16", find("a40"))
    assert (found.low, found.high) == (1.0, 1.0)
    assert "About nothing" in found.reason
    assert found.sparse_us_low == found.sparse_us_high == found.dense_us


def test_a_vit_layer_by_hand():
    """ViT-B's first MLP layer, 32 images on an A100: 2 * 768 * 3072 * 197 * 32 operations at 312 TFLOPS."""
    found = gain(*VIT_FC1, 197, 32, "fp16", find("a100"))
    assert found.dense_us == pytest.approx(2 * 768 * 3072 * 197 * 32 / 312e12 * 1e6)
    assert (found.low, found.high) == (1.0, pytest.approx(1.5))
    assert "arithmetic" in found.reason
    # One position of one image is bound by the weights' traffic, of which 9/16 stay: 172 MB -> 97 MB for all of ViT-B.
    weights = gain(*VIT_FC1, 1, 1, "fp16", find("a100"))
    assert weights.high == pytest.approx(16 / 9, rel=0.01)
    assert "0.562 of the bytes" in weights.reason
    assert gain(*VIT_FC1, 1, 1, "int8", find("a100")).high == pytest.approx(8 / 5, rel=0.01)


def test_1x1_convolutions_and_hopper_promise_less():
    pointwise = gain("conv2d", (512, 512, 1, 1), 784, 64, "fp16", find("a100"))
    spatial = gain("conv2d", (512, 512, 3, 3), 784, 64, "fp16", find("a100"))
    hopper = gain("conv2d", (512, 512, 3, 3), 784, 64, "fp16", find("h100"))
    assert 1.0 < pointwise.high <= 1.15 < hopper.high <= 1.22 < spatial.high


@pytest.mark.parametrize(("key", "precision"), [("cpu", "int8"), ("t4", "fp16"), ("a100", "fp32")])
def test_where_there_are_no_sparse_kernels_there_is_no_gain(key, precision):
    found = gain(*VIT_FC1, 197, 8, precision, find(key))
    assert (found.low, found.high) == (1.0, 1.0)
    assert "no sparse" in found.reason


SIZES = st.integers(1, 512).map(lambda n: 8 * n)


@settings(max_examples=200, deadline=None)
@given(
    SIZES,
    SIZES,
    st.sampled_from([0, 1, 3, 7]),
    st.integers(1, 5000),
    st.integers(1, 256),
    st.sampled_from(["fp16", "bf16", "int8"]),
    st.sampled_from([target for target in TARGETS if target.bandwidth_gbs]),
)
def test_a_gain_is_a_sane_range(outputs, inputs, kernel, positions, batch, precision, target):
    shape = (outputs, inputs, kernel, kernel) if kernel else (outputs, inputs)
    found = gain("conv2d" if kernel else "linear", shape, positions, batch, precision, target)
    assert 1.0 <= found.low <= found.high <= 2.0
    assert 0 < found.sparse_us_low <= found.sparse_us_high <= found.dense_us
    assert found.dense_us / found.sparse_us_low == pytest.approx(found.high)
    assert found.dense_us / found.sparse_us_high == pytest.approx(found.low)
    compute = 2 * math.prod(shape) * positions * batch / (target.dense_tflops[precision] * 1e12)
    size = {"fp16": 2, "bf16": 2, "int8": 1}[precision]
    moved = (math.prod(shape) + positions * batch * (outputs + inputs)) * size / (target.bandwidth_gbs * 1e9)
    assert found.dense_us == pytest.approx(1e6 * max(compute, moved))
    # No arithmetic and no memory system can beat both of these: half the work, and 9/16 or 5/8 of the weights.
    sparse_moved = moved - math.prod(shape) * size * (3 / 8 if size == 1 else 7 / 16) / (target.bandwidth_gbs * 1e9)
    assert found.sparse_us_low >= 1e6 * max(compute / 2, sparse_moved) * (1 - 1e-9)
