import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pruning_networks import correlated_images, small_vit
from torch.nn import functional as F

from mpdeploy.errors import StageFailed
from mpdeploy.pruning.capture import Stream, capture, layer_nodes, state_of
from mpdeploy.pruning.moments import Moments, layer_rows
from mpdeploy.pruning.patterns import Pattern, project
from mpdeploy.pruning.zero_budget import allowance, apply, find, reduce_layer, residual

HALF = Pattern(2, 4)


def moments_of(rows, parts=4):
    moments = Moments()
    for part in rows.split(-(-len(rows) // parts)):
        moments.add(part, part[:, :1])
    return moments


def random_rows(count, inputs, seed=0):
    return torch.randn(count, inputs, generator=torch.Generator().manual_seed(seed))


def layer(inputs, outputs=6, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(outputs, inputs, generator=draw), torch.randn(outputs, generator=draw)


def planted(seed):
    rows = random_rows(400, 12, seed) * 3 + 1
    rows[:, 2], rows[:, 5], rows[:, 7] = 0, 3.7, rows[:, 1]
    rows[:, 9] = 0.5 * rows[:, 0] - rows[:, 3] + 2
    return rows


def lost(weight, moments):
    score = weight.double().square() * moments.centred().diagonal().clamp_min(0)
    return float((score * ~project(score, HALF)).sum())


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), parts=st.integers(1, 5))
def test_planted_inputs_are_found_and_removed_exactly(seed, parts):
    rows = planted(seed)
    budget = find(moments_of(rows, parts), rows)
    assert budget.dead.tolist() == [2]
    assert budget.constant.tolist() == [5]
    assert len(budget.dependent) == 2
    assert set(budget.dependent.tolist()) < {0, 1, 3, 7, 9}
    assert budget.rank == 8
    assert budget.removed == 4
    assert budget.note == ""
    everything = torch.cat([budget.dead, budget.constant, budget.dependent, budget.kept])
    assert everything.sort().values.tolist() == list(range(12))
    weight, bias = layer(12, seed=seed)
    after = apply(weight, bias, budget)
    assert not after[0][:, [2, 5, *budget.dependent.tolist()]].any()
    assert residual(rows, weight, bias, *after) <= allowance(12)
    wanted, got = F.linear(rows, weight, bias), F.linear(rows, *after)
    assert torch.allclose(wanted, got, atol=1e-4, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    near=st.sampled_from([1e-4, 1e-3, 1e-2, 1.0]),
    offset=st.sampled_from([0.0, 1.0, 30.0]),
)
def test_full_rank_and_nearly_dependent_inputs_are_left_alone(seed, near, offset):
    rows = random_rows(500, 10, seed)
    rows[:, 4] = rows[:, 6] + near * rows[:, 4]
    rows = rows + offset
    weight, bias = layer(10)
    budget = find(moments_of(rows), rows)
    assert budget.removed == 0
    assert budget.rank == 10
    new_weight, new_bias, _, change = reduce_layer(weight, bias, moments_of(rows), rows, HALF)
    assert new_weight is weight and new_bias is bias and change == 0.0


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), inputs=st.integers(8, 48))
def test_rows_behind_a_layer_norm_have_one_dependent_input(seed, inputs):
    draw = torch.Generator().manual_seed(seed)
    gain, shift = torch.rand(inputs, generator=draw) + 0.5, torch.randn(inputs, generator=draw)
    rows = F.layer_norm(random_rows(10 * inputs, inputs, seed) * 2 + 5, (inputs,), gain, shift)
    budget = find(moments_of(rows), rows)
    assert budget.rank == inputs - 1
    assert len(budget.dependent) == 1


def inputs_of(model, images, names):
    graph = capture(model, tuple(images.shape[1:]))
    stream = Stream(graph, state_of(model, graph), images.split(16))
    for name, node in layer_nodes(graph, names).items():
        stream.advance(node)
        inputs = stream.argument(node, 0)
        stream.advance(node, through=True)
        moments, rows = Moments(), []
        for x, y in zip(inputs, stream.output(node), strict=True):
            for part in layer_rows(node, x, y, 10**6, 0):
                moments.add(*part)
                rows.append(part[0])
        yield name, moments, torch.cat(rows)


def test_layer_norm_inputs_of_a_timm_block_have_rank_m_minus_1_and_others_full_rank():
    model = small_vit()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    names = ["blocks.0.mlp.fc1", "blocks.1.attn.qkv", "blocks.1.mlp.fc1", "blocks.1.mlp.fc2"]
    noise = random_rows(64, 3 * 32 * 32).reshape(64, 3, 32, 32)
    ranks = {}
    for name, moments, rows in inputs_of(model, noise, names):
        budget = find(moments, rows)
        ranks[name] = budget.rank
        assert len(budget.dependent) == rows.shape[1] - budget.rank, budget.note
        module = model.get_submodule(name)
        weight, bias = module.weight.detach(), module.bias.detach()
        assert residual(rows, weight, bias, *apply(weight, bias, budget)) <= allowance(rows.shape[1])
    assert ranks == {**dict.fromkeys(names[:3], 63), "blocks.1.mlp.fc2": 256}


def test_grey_images_leave_the_first_block_a_lower_rank():
    model = small_vit(embed_dim=128)
    grey = correlated_images(64)[:, :1].expand(-1, 3, -1, -1).contiguous()
    grey += 0.1 * random_rows(64, 32 * 32).reshape(64, 1, 32, 32)
    (_, moments, rows), *_ = inputs_of(model, grey, ["blocks.0.attn.qkv"])
    # 64 pixels of a patch, 16 positions and their mean; the class token is one more.
    assert 64 < find(moments, rows).rank <= 64 + 16 + 1


def test_dead_and_constant_inputs_go_without_a_change_and_rank_is_what_is_left():
    rows = random_rows(300, 16)
    rows[:, 3], rows[:, 8] = 0, -2.3
    weight, bias = layer(16)
    new, shifted, budget, change = reduce_layer(weight, bias, moments_of(rows), rows, HALF)
    assert (budget.dead.tolist(), budget.constant.tolist(), budget.rank) == ([3], [8], 14)
    assert not new[:, [3, 8]].any()
    others = [i for i in range(16) if i not in (3, 8)]
    assert torch.equal(new[:, others], weight[:, others])
    assert torch.allclose(shifted, bias - 2.3 * weight[:, 8], atol=1e-6)
    assert change <= allowance(16)


def test_a_layer_without_dead_inputs_only_changes_nothing_at_all_where_they_are_zero():
    rows = random_rows(300, 8)
    rows[:, 1] = 0
    weight, bias = layer(8)
    new, same, budget, change = reduce_layer(weight, bias, moments_of(rows), rows, HALF)
    assert change == 0.0 and torch.equal(same, bias) and budget.removed == 1
    assert torch.equal(F.linear(rows, new), F.linear(rows, weight))


def test_a_duplicated_channel_goes_where_that_spares_the_mask():
    rows = random_rows(400, 8)
    rows[:, 1] = rows[:, 5]
    weight, bias = layer(8)
    weight[:, 5] = -0.9 * weight[:, 1]  # most of what one adds the other takes away
    moments = moments_of(rows)
    new, shifted, budget, change = reduce_layer(weight, bias, moments, rows, HALF)
    assert len(budget.dependent) == 1 and budget.rank == 7
    assert change <= allowance(8)
    assert lost(new, moments) < lost(weight, moments)
    assert torch.allclose(F.linear(rows, new, shifted), F.linear(rows, weight, bias), atol=1e-4)


def test_dependent_inputs_stay_where_the_mask_would_lose_more():
    rows = F.layer_norm(random_rows(400, 16), (16,))
    weight, bias = layer(16)
    new, same, budget, _ = reduce_layer(weight, bias, moments_of(rows), rows, HALF)
    assert new is weight and same is bias
    assert len(budget.dependent) == 0 and budget.rank == 15
    assert budget.note == "1 dependent inputs stay: without them 2:4 loses no less."


def test_without_a_bias_only_dead_inputs_go():
    rows = planted(0)
    weight, _ = layer(12)
    new, none, budget, change = reduce_layer(weight, None, moments_of(rows), rows, HALF)
    assert none is None and change == 0.0
    assert (budget.dead.tolist(), len(budget.constant), len(budget.dependent)) == ([2], 0, 0)
    assert budget.note == "The layer has no bias, so only dead inputs can be removed."
    assert torch.equal(new[:, 3:], weight[:, 3:]) and not new[:, 2].any()
    with pytest.raises(StageFailed, match="without a bias"):
        apply(weight, None, find(moments_of(rows), rows))


def test_rows_refute_what_moments_of_other_rows_claim():
    seen, rows = planted(0), planted(1)
    rows[7, 2], rows[9, 5], rows[11, 7], rows[13, 9] = 0.5, 1.0, 4.0, 0.0
    weight, bias = layer(12)
    new, same, budget, change = reduce_layer(weight, bias, moments_of(seen), rows, HALF)
    assert new is weight and same is bias and change == 0.0 and budget.removed == 0
    assert "2 inputs are nearly dependent" in budget.note
    assert "Constant inputs stay" in budget.note and "Dead inputs stay" in budget.note


def test_one_row_against_constant_inputs_leaves_dead_ones_removable():
    seen, rows = planted(0), planted(1)
    rows[9, 5] = 1.0
    weight, bias = layer(12)
    new, same, budget, change = reduce_layer(weight, bias, moments_of(seen), rows, HALF)
    assert budget.dead.tolist() == [2] and not len(budget.constant)
    assert change == 0.0 and torch.equal(same, bias) and not new[:, 2].any()


def test_too_few_rows_say_so():
    rows = random_rows(8, 10)
    assert find(moments_of(rows), rows).note == "8 rows are too few to call 3 of 10 inputs dependent."


def test_large_coefficients_are_refused():
    rows = random_rows(500, 6)
    rows[:, 5] = rows[:, 0] + 0.01 * rows[:, 5]
    rows[:, 4] = (rows[:, 5] - rows[:, 0]) * 100
    budget = find(moments_of(rows), rows)
    assert budget.removed == 0 or float(budget.coefficients.abs().max()) < 100


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused(bad):
    rows = random_rows(40, 10)
    broken = rows.clone()
    broken[0, 0] = bad
    for seen, judged in ((broken, broken), (rows, broken)):
        with pytest.raises(StageFailed, match="NaN or infinity"):
            find(moments_of(seen), judged)


def test_residual_sees_every_change_and_keeps_nan():
    rows = random_rows(50, 4)
    weight, bias = layer(4, outputs=2)
    assert residual(rows, weight, bias, weight, bias) == 0.0
    assert residual(rows, weight, None, weight * (1 + 1e-3), None) > allowance(4)
    nothing = torch.zeros_like(weight)
    assert residual(rows, nothing, None, nothing, None) == 0.0
    assert residual(rows, nothing, None, weight, None) == float("inf")
    nan = weight.clone()
    nan[1, 2] = float("nan")
    value = residual(rows, weight, bias, nan, bias)
    assert value != value
