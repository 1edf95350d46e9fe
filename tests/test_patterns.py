import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mpdeploy.errors import RecipeError, StageFailed
from mpdeploy.pruning.patterns import Pattern, as_rows, bad_groups, from_rows, project

PATTERNS = st.integers(2, 8).flatmap(lambda group: st.builds(Pattern, st.integers(1, group - 1), st.just(group)))


@pytest.mark.parametrize(("text", "density"), [("2:4", 0.5), ("12:16", 0.75), (" 1:4 ", 0.25)])
def test_a_pattern_reads_back_as_it_is_written(text, density):
    pattern = Pattern.parse(text)
    assert pattern.density == density
    assert Pattern.parse(str(pattern)) == pattern


@pytest.mark.parametrize("text", ["4:4", "0:4", "5:4", "2-4", "", "2:4:8", "-2:4"])
def test_what_is_no_pattern_is_refused(text):
    with pytest.raises(RecipeError, match="sparsity pattern"):
        Pattern.parse(text)


@settings(max_examples=80, deadline=None)
@given(PATTERNS, st.integers(1, 4), st.integers(1, 4), st.data())
def test_project_is_the_best_of_all_masks_and_breaks_ties_to_the_lower_index(pattern, rows, groups, data):
    # Few distinct values, so that ties are the rule.
    values = data.draw(
        st.lists(st.integers(0, 3), min_size=rows * groups * pattern.group, max_size=rows * groups * pattern.group)
    )
    score = torch.tensor(values, dtype=torch.float32).reshape(rows, -1)
    mask = project(score, pattern)
    for row, group in itertools.product(range(rows), range(groups)):
        part = slice(group * pattern.group, (group + 1) * pattern.group)
        kept = tuple(mask[row, part].nonzero()[:, 0].tolist())
        # combinations come in lexicographic order and max returns the first of the best
        best = max(
            itertools.combinations(range(pattern.group), pattern.keep),
            key=lambda chosen, row=row, part=part: float(score[row, part][list(chosen)].sum()),
        )
        assert kept == best


@settings(max_examples=80, deadline=None)
@given(PATTERNS, st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**31))
def test_bad_groups_of_a_convolution_equal_a_count_by_loops(pattern, outputs, groups, kernel, seed):
    generator = np.random.default_rng(seed)
    weight = generator.integers(0, 2, (outputs, groups * pattern.group, kernel, kernel)).astype(np.float32)
    bad = 0
    for o, i, j, g in itertools.product(range(outputs), range(kernel), range(kernel), range(groups)):
        bad += int(np.count_nonzero(weight[o, g * pattern.group : (g + 1) * pattern.group, i, j]) > pattern.keep)
    assert bad_groups(torch.from_numpy(weight), pattern) == bad


@pytest.mark.parametrize("shape", [(6, 8), (6, 8, 3, 2)])
def test_rows_go_back_to_the_weights_own_shape(shape):
    weight = torch.arange(float(np.prod(shape))).reshape(shape)
    assert torch.equal(from_rows(as_rows(weight), weight.shape), weight)


@pytest.mark.parametrize("module", [nn.Linear(32, 12), nn.Conv2d(16, 8, 3)])
@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8", "12:16"])
def test_a_projected_weight_follows_its_pattern_exactly(module, text):
    pattern = Pattern.parse(text)
    weight = module.weight.detach()
    mask = from_rows(project(as_rows(weight).abs(), pattern), weight.shape)
    assert bad_groups(weight * mask, pattern) == 0
    assert float(mask.double().mean()) == pattern.density
    assert bad_groups(weight, pattern) == weight.numel() // pattern.group


def test_a_mask_along_the_flat_axis_of_a_convolution_is_reported_as_bad():
    pattern = Pattern(2, 4)
    weight = torch.randn(64, 64, 3, 3, generator=torch.Generator().manual_seed(0))
    flat = weight.flatten(1)
    planted = (flat * project(flat.abs(), pattern)).reshape(weight.shape)
    assert bad_groups(planted.flatten(1), pattern) == 0
    # Independent halves: P(3 or 4 of 4 kept) = 5/16.
    assert bad_groups(planted, pattern) == pytest.approx(64 * 9 * 16 * 5 / 16, rel=0.1)


def test_one_nonzero_too_many_and_nan_are_both_seen():
    weight = torch.zeros(4, 8)
    weight[1, :2] = 1.0
    assert bad_groups(weight, Pattern(2, 4)) == 0
    weight[1, 3] = float("nan")
    assert bad_groups(weight, Pattern(2, 4)) == 1


def test_a_nan_score_and_inputs_that_do_not_fit_are_refused():
    with pytest.raises(StageFailed, match="score is NaN"):
        project(torch.tensor([[1.0, float("nan"), 0.0, 2.0]]), Pattern(2, 4))
    with pytest.raises(StageFailed, match="multiple of 4"):
        bad_groups(torch.zeros(2, 6), Pattern(2, 4))
    with pytest.raises(StageFailed, match="neither"):
        as_rows(torch.zeros(2, 4, 4))
