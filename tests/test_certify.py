"""The ledger and its statistics against definitions written out by hand."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mpdeploy.certify.ledger import Kept, keeps, measure, pair_margins
from mpdeploy.certify.statistics import mcnemar, proportion
from mpdeploy.errors import StageFailed

logits = arrays(np.float32, (6, 4), elements=st.floats(-8, 8, width=16))


@settings(max_examples=200, deadline=None)
@given(dense=logits, pruned=logits, tuned=logits, reserve=st.sampled_from([0.0, 0.01, 0.3]))
def test_no_certified_or_kept_sample_changes_its_label(dense, pruned, tuned, reserve):
    ledger = measure({"dense": dense, "pruned": pruned, "tuned": tuned}, reserve)
    for i, kind in enumerate(ledger.verdict):
        y = dense[i].argmax()
        others = np.delete(tuned[i].astype(float), y)
        wins = (tuned[i, y] > others).all()
        assert (kind >= Kept.KEPT) == wins
        aside = reserve * (dense[i].astype(float).max() - dense[i].astype(float).min())
        assert (kind == Kept.CERTIFIED) == (wins and tuned[i, y] - others.max() > aside)


@settings(max_examples=100, deadline=None)
@given(dense=logits, pruned=logits, tuned=logits)
def test_the_ledger_telescopes_exactly(dense, pruned, tuned):
    y = dense.argmax(axis=1)
    stages = [z.astype(np.float64) for z in (dense, pruned, tuned)]
    pairs = [np.where(np.isinf(p), 0.0, p) for p in (pair_margins(z, y) for z in stages)]
    added = [after - before for before, after in itertools.pairwise(pairs)]
    np.testing.assert_allclose(pairs[0] + added[0] + added[1], pairs[2], atol=1e-12)


def test_spent_rows_by_hand():
    dense = np.array([[3.0, 1.0, 0.0], [2.0, 1.0, 0.0]])
    pruned = np.array([[2.0, 1.5, 0.0], [0.0, 1.0, 0.0]])  # the second sample loses its label here
    tuned = np.array([[2.5, 1.0, 0.0], [2.0, 1.0, 0.0]])  # and gets it back here
    ledger = measure({"dense": dense, "pruned": pruned, "tuned": tuned}, 0.0)
    prune, tune = ledger.spent
    assert prune["eps_inf_median"] == 1.5 and prune["eps_inf_max"] == 2.0
    assert prune["flips_alone"] == 1 and prune["flips_but_for"] == 0
    assert prune["share_median"] == pytest.approx((0.75 + 2.0) / 2)
    assert tune["flips_alone"] == 0
    assert ledger.counts() == {"flipped": 0, "kept": 0, "certified": 2}
    lost = measure({"dense": dense, "pruned": pruned}, 0.0)
    assert lost.spent[0]["flips_but_for"] == 1
    assert lost.counts()["flipped"] == 1


def test_ties_and_what_is_not_finite_fail_closed():
    pairs = pair_margins(np.array([[1.0, 1.0], [np.nan, 0.0], [np.inf, 0.0], [2.0, 1.0]]), np.zeros(4, np.int64))
    assert keeps(pairs).tolist() == [False, False, False, True]
    dense = np.array([[2.0, 1.0], [2.0, 1.0]])
    ledger = measure({"dense": dense, "pruned": np.array([[np.nan, 1.0], [3.0, 1.0]])}, 0.0)
    assert ledger.verdict.tolist() == [Kept.FLIPPED, Kept.CERTIFIED]
    assert ledger.spent[0]["eps_inf_max"] is None


@pytest.mark.parametrize(
    ("stages", "match"),
    [
        ({"dense": np.zeros((0, 3)), "pruned": np.zeros((0, 3))}, "needs two stages, a sample"),
        ({"dense": np.zeros((2, 1)), "pruned": np.zeros((2, 1))}, "two classes"),
        ({"dense": np.zeros((2, 3))}, "two stages"),
        ({"dense": np.zeros((2, 3)), "pruned": np.zeros((2, 4))}, "different shapes"),
        ({"dense": np.full((2, 3), np.nan), "pruned": np.zeros((2, 3))}, "dense network's own logits"),
    ],
)
def test_an_empty_or_broken_ledger_is_refused(stages, match):
    with pytest.raises(StageFailed, match=match):
        measure(stages, 0.0)


def binomial_tail_at_least(k, n, p):
    from math import comb

    return sum(comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))


@pytest.mark.parametrize(("k", "n"), [(0, 10), (10, 10), (3, 17), (45, 50), (1, 1)])
def test_clopper_pearson_by_its_definition(k, n):
    got = proportion(k, n, 0.95)
    if k > 0:
        assert binomial_tail_at_least(k, n, got.low) == pytest.approx(0.025, abs=1e-9)
    if k < n:
        assert 1 - binomial_tail_at_least(k + 1, n, got.high) == pytest.approx(0.025, abs=1e-9)
    assert got.low <= got.value <= got.high


def test_published_bounds_and_the_empty_case():
    assert proportion(0, 1000, 0.90).high == pytest.approx(0.0030, abs=5e-5)  # certificates: CP .0030, one-sided 95 %
    empty = proportion(0, 0, 0.95)
    assert empty.value is None and (empty.low, empty.high) == (0.0, 1.0)


def test_mcnemar_by_its_definition():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 5) == 1.0
    assert mcnemar(0, 6) == pytest.approx(2 / 2**6)
    assert mcnemar(1, 9) == pytest.approx(2 * 11 / 2**10)
