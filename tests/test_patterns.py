import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mpdeploy.errors import RecipeError, StageFailed
from mpdeploy.pruning.patterns import Pattern, _network, as_rows, bad_groups, from_rows, project

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


@pytest.mark.parametrize("size", range(2, 17))
def test_the_sorting_network_sorts_every_vector_of_zeros_and_ones(size):
    # Knuth's 0-1 principle: a network that sorts these sorts everything.
    vectors = (torch.arange(2**size)[:, None] >> torch.arange(size)) & 1
    planes = list(vectors.to(torch.uint8).T.contiguous())
    for low, high in _network(size):
        assert 0 <= low < high < size
        planes[low], planes[high] = torch.maximum(planes[low], planes[high]), torch.minimum(planes[low], planes[high])
    ones = vectors.sum(dim=1)
    assert all(torch.equal(plane.bool(), ones > place) for place, plane in enumerate(planes))


def by_stable_sort(score, pattern):
    groups = score.reshape(len(score), -1, pattern.group)
    order = np.argsort(-groups.numpy(), axis=-1, kind="stable")
    mask = torch.zeros(groups.shape, dtype=torch.bool)
    return mask.scatter_(-1, torch.from_numpy(order[..., : pattern.keep].copy()), True).reshape(score.shape)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(["1:2", "2:4", "1:4", "3:4", "4:8", "6:12", "8:16", "12:16", "7:13"]),
    st.integers(1, 40),
    st.integers(1, 5),
    st.sampled_from([1, 2, 3, 10, 10**6]),
    st.integers(0, 2**31),
)
def test_project_equals_a_stable_sort_however_many_scores_are_equal(text, rows, groups, values, seed):
    pattern = Pattern.parse(text)
    generator = torch.Generator().manual_seed(seed)
    score = torch.randint(values, (rows, groups * pattern.group), generator=generator).float()
    assert torch.equal(project(score, pattern), by_stable_sort(score, pattern))


@pytest.mark.parametrize("text", ["2:4", "4:8", "6:12", "8:16", "12:16"])
def test_of_equal_scores_the_lower_indices_stay_in_one_group_and_all_others_are_unharmed(text):
    pattern = Pattern.parse(text)
    score = torch.rand(6, 4 * pattern.group, generator=torch.Generator().manual_seed(0))
    plain = project(score, pattern)
    score[2, : pattern.group] = 0.5
    mask = project(score, pattern)
    assert mask[2, : pattern.group].tolist() == [place < pattern.keep for place in range(pattern.group)]
    plain[2, : pattern.group] = mask[2, : pattern.group]
    assert torch.equal(mask, plain)


def test_infinite_scores_stay():
    score = torch.tensor([[1.0, float("inf"), 3.0, float("inf")], [float("inf")] * 3 + [0.0]])
    assert project(score, Pattern(2, 4)).tolist() == [[False, True, False, True], [True, True, False, False]]


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
