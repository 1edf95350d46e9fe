"""Removing dead, constant and dependent inputs leaves a layer's outputs equal."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpdeploy.errors import StageFailed
from mpdeploy.pruning.zero_budget import allowance, apply, find, residual


def moments(rows):
    wide = rows.double()
    centred = wide - wide.mean(dim=0)
    return wide.mean(dim=0), centred.T @ centred, len(rows)


def planted(seed):
    rows = torch.randn(400, 12, generator=torch.Generator().manual_seed(seed))
    rows[:, 2], rows[:, 5], rows[:, 7] = 0, 3.5, rows[:, 1]
    rows[:, 9] = 0.5 * rows[:, 0] - rows[:, 3] + 2
    return rows


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_planted_inputs_are_found_and_removed_exactly(seed):
    rows = planted(seed)
    budget = find(*moments(rows))
    assert budget.dead.tolist() == [2]
    assert budget.constant.tolist() == [5]
    assert len(budget.dependent) == 2
    assert budget.rank == 8
    weight, bias = torch.randn(6, 12), torch.randn(6)
    after = apply(weight, bias, budget)
    assert not after[0][:, [2, 5, *budget.dependent.tolist()]].any()
    assert residual(rows, weight, bias, *after) <= allowance(12)


def test_centred_rows_have_one_dependent_input():
    rows = torch.nn.functional.layer_norm(torch.randn(400, 16), (16,))
    budget = find(*moments(rows))
    assert budget.rank == 15
    assert len(budget.dependent) == 1


@pytest.mark.parametrize("near", [False, True])
def test_full_rank_and_nearly_dependent_inputs_are_left_alone(near):
    rows = torch.randn(2000, 10, generator=torch.Generator().manual_seed(1))
    if near:
        rows[:, 4] = rows[:, 6] + 1e-3 * rows[:, 4]
    budget = find(*moments(rows))
    assert budget.kept.tolist() == list(range(10))


def test_too_few_rows_say_so_and_nan_is_refused():
    rows = torch.randn(8, 10)
    assert "too few" in find(*moments(rows)).note
    rows[0, 0] = float("nan")
    with pytest.raises(StageFailed, match="NaN"):
        find(*moments(rows))
