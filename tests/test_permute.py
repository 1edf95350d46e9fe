import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpdeploy.errors import StageFailed
from mpdeploy.pruning.patterns import Pattern, project
from mpdeploy.pruning.permute import _largest, _worth, search


def kept(score, order, pattern):
    """What the pattern keeps of the reordered scores, by the projection that pruning itself uses."""
    reordered = score[:, order].double()
    return float((reordered * project(score[:, order], pattern)).sum())


def heavy_tailed(rows, channels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, channels, generator=generator).abs() ** 4


def best_of_all(score, pattern):
    """The optimum over all partitions into groups, one by one: only for a handful of channels."""
    channels = range(score.shape[1])

    def partitions(left):
        if not left:
            yield ()
            return
        for others in itertools.combinations(left[1:], pattern.group - 1):
            group = (left[0], *others)
            for rest in partitions([c for c in left if c not in group]):
                yield group + rest

    return max(kept(score, torch.tensor(order), pattern) for order in partitions(list(channels)))


PATTERNS = st.sampled_from(["1:2", "1:3", "2:3", "1:4", "2:4", "3:4", "4:8", "7:8", "12:16"])


@settings(max_examples=60, deadline=None)
@given(
    pattern=PATTERNS,
    rows=st.integers(1, 40),
    groups=st.integers(1, 7),
    blocks=st.integers(1, 3),
    iterations=st.integers(0, 20),
    seed=st.integers(0, 2**31),
    zeros=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_any_search_returns_a_permutation_inside_blocks_that_is_never_worse_and_is_told_truly(
    pattern, rows, groups, blocks, iterations, seed, zeros
):
    pattern = Pattern.parse(pattern)
    channels = pattern.group * groups * blocks
    score = heavy_tailed(rows, channels, seed)
    score[torch.rand(score.shape, generator=torch.Generator().manual_seed(seed)) < zeros] = 0
    found = search(score, pattern, blocks=blocks, iterations=iterations, seed=seed)
    assert found.order.dtype == torch.int64
    assert torch.equal(found.order.sort().values, torch.arange(channels))
    assert torch.equal(found.order // (channels // blocks), torch.arange(channels) // (channels // blocks))
    assert found.kept_before == pytest.approx(kept(score, torch.arange(channels), pattern), rel=1e-6)
    assert found.kept_after == pytest.approx(kept(score, found.order, pattern), rel=1e-6)
    assert found.kept_after >= found.kept_before
    assert found.iterations <= iterations
    again = search(score, pattern, blocks=blocks, iterations=iterations, seed=seed)
    assert torch.equal(again.order, found.order) and again.kept_after == found.kept_after


@settings(max_examples=15, deadline=None)
@given(pattern=st.sampled_from(["1:2", "1:4", "2:4", "3:4"]), rows=st.integers(2, 12), seed=st.integers(0, 2**31))
def test_on_tiny_layers_the_search_comes_close_to_the_optimum_over_all_partitions(pattern, rows, seed):
    pattern = Pattern.parse(pattern)
    score = heavy_tailed(rows, 8, seed)
    found = search(score, pattern, iterations=40, seed=seed)
    assert found.kept_after >= 0.93 * best_of_all(score, pattern)


def test_each_iteration_keeps_at_least_as_much_as_the_one_before():
    score = heavy_tailed(50, 96)
    curve = [search(score, Pattern(2, 4), iterations=n).kept_after for n in range(13)]
    assert curve == sorted(curve)
    assert curve[-1] > 1.01 * curve[0]


def test_channels_that_are_large_in_the_same_rows_are_brought_apart():
    # Rows 0 and 1 each need four channels, which lie in one group: half of them would go.
    score = torch.zeros(4, 16)
    for row in range(4):
        score[row, 4 * row : 4 * row + 4] = 1
    found = search(score, Pattern(2, 4), iterations=50)
    assert found.kept_before == 8
    assert found.kept_after == 16


def test_a_block_is_searched_as_if_it_were_alone():
    score = heavy_tailed(30, 64)
    both = search(score, Pattern(2, 4), blocks=2, iterations=4, seed=3)
    assert both.kept_after > both.kept_before
    # Nothing of the second block changes what is found in the first, apart from the draw of slots.
    other = torch.cat([score[:, :32], score[:, 32:] * 7], dim=1)
    assert torch.equal(search(other, Pattern(2, 4), blocks=2, iterations=4, seed=3).order, both.order)


def test_the_search_beats_the_best_of_many_random_orders():
    score = heavy_tailed(64, 64)
    generator = torch.Generator().manual_seed(0)
    lucky = max(kept(score, torch.randperm(64, generator=generator), Pattern(2, 4)) for _ in range(300))
    assert search(score, Pattern(2, 4), iterations=20).kept_after > lucky


def test_nothing_to_gain_ends_the_search_after_one_round_and_one_group_ends_it_at_once():
    zero = search(torch.zeros(5, 32), Pattern(2, 4), iterations=100)
    assert (zero.kept_before, zero.kept_after, zero.iterations) == (0, 0, 4)
    alone = search(heavy_tailed(5, 4), Pattern(2, 4), iterations=100)
    assert alone.order.tolist() == [0, 1, 2, 3] and alone.iterations == 0
    assert search(heavy_tailed(5, 12), Pattern(2, 4), blocks=3, iterations=100).iterations == 0


def test_many_rows_are_summed_in_pieces_that_change_nothing(monkeypatch):
    score = heavy_tailed(1000, 48)
    whole = search(score, Pattern(2, 4), iterations=8)
    monkeypatch.setattr("mpdeploy.pruning.permute.CACHED", 100)
    assert torch.equal(search(score, Pattern(2, 4), iterations=8).order, whole.order)


def test_more_groups_than_one_assignment_takes_are_parted_and_all_of_them_still_take_part(monkeypatch):
    score = heavy_tailed(40, 4 * 24)
    monkeypatch.setattr("mpdeploy.pruning.permute.TOGETHER", 5)
    parted = search(score, Pattern(2, 4), blocks=2, iterations=12)
    assert torch.equal(parted.order.sort().values, torch.arange(96))
    assert torch.equal(parted.order // 48, torch.arange(96) // 48)
    groups = torch.arange(96) // 4
    assert set(groups[parted.order != torch.arange(96)].tolist()) == set(range(24))
    monkeypatch.setattr("mpdeploy.pruning.permute.TOGETHER", 192)
    whole = search(score, Pattern(2, 4), blocks=2, iterations=12)
    assert parted.kept_after - parted.kept_before > 0.8 * (whole.kept_after - whole.kept_before)


def test_worth_is_the_sum_over_rows_of_the_larger_score():
    bars, candidates = heavy_tailed(6, 33), heavy_tailed(6, 33, seed=1)
    expected = torch.maximum(bars[:, None], candidates[None]).double().sum(dim=-1)
    assert torch.allclose(_worth(bars, candidates), expected, rtol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_largest_of_several_tensors_fall_in_order(count):
    members = list(heavy_tailed(5, 40))
    expected = torch.stack(members).topk(count, dim=0).values
    assert torch.equal(torch.stack(_largest(members, count)), expected)


def test_what_is_put_back_is_the_best_of_all_rearrangements():
    # One iteration on four groups must find the best of the 24 ways to put four channels back.
    score = heavy_tailed(9, 16)
    pattern = Pattern(2, 4)
    found = search(score, pattern, iterations=1, seed=5)
    slots = torch.rand((4, 4), generator=torch.Generator().manual_seed(5)).argsort(dim=1)[:, 0]
    groups = torch.arange(16).reshape(4, 4)
    taken = [int(groups[g, slots[g]]) for g in range(4)]

    def put_back(way):
        changed = groups.clone()
        for g, channel in enumerate(way):
            changed[g, slots[g]] = channel
        return kept(score, changed.reshape(-1), pattern)

    assert found.kept_after == pytest.approx(max(map(put_back, itertools.permutations(taken))), rel=1e-6)


@pytest.mark.parametrize(
    ("score", "blocks", "says"),
    [
        (torch.ones(3, 10), 1, r"Groups of 4 \(2:4\) in 1 blocks don't fit scores of shape \[3, 10\]"),
        (torch.ones(3, 16), 3, "multiple of 3 x 4"),
        (torch.ones(3, 0), 1, "don't fit"),
        (torch.ones(12), 1, "don't fit"),
        (torch.tensor([[1.0, 2.0, float("nan"), 3.0]]), 1, "NaN or infinite"),
        (torch.tensor([[1.0, 2.0, float("inf"), 3.0]]), 1, "NaN or infinite"),
    ],
)
def test_scores_that_make_no_sense_are_refused(score, blocks, says):
    with pytest.raises(StageFailed, match=says):
        search(score, Pattern(2, 4), blocks=blocks, iterations=1)
