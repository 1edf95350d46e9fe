"""The ledger and its statistics against definitions written out by hand."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mpdeploy.certify.ledger import (
    Kept,
    Ledger,
    columns,
    decided,
    eps_between,
    joined,
    keeps,
    kept_classes,
    pair_margins,
    reference_gap,
    rows_of,
    slack_of,
    winner,
)
from mpdeploy.certify.statistics import mcnemar, proportion
from mpdeploy.errors import StageFailed

logits = arrays(np.float32, (6, 5), elements=st.floats(-8, 8, width=16))


def ledger_of(stages, aside=0.0, keep=16, labels=None):
    n = len(next(iter(stages.values())))
    labels = np.zeros(n, np.int64) if labels is None else labels
    return Ledger(tuple(stages), rows_of(labels, stages, keep), aside)


@settings(max_examples=200, deadline=None)
@given(
    dense=logits, pruned=logits, tuned=logits, aside=st.sampled_from([0.0, 0.01, 0.3]), keep=st.sampled_from([2, 16])
)
def test_no_certified_or_kept_sample_changes_its_label(dense, pruned, tuned, aside, keep):
    ledger = ledger_of({"dense": dense, "pruned": pruned, "tuned": tuned}, aside, keep)
    for i, kind in enumerate(ledger.verdict):
        y = dense[i].argmax()
        others = np.delete(tuned[i].astype(float), y)
        wins = (tuned[i, y] > others).all()
        assert (kind >= Kept.KEPT) == wins
        reserve = aside * (dense[i].astype(float).max() - dense[i].astype(float).min())
        assert (kind == Kept.CERTIFIED) == (wins and tuned[i, y] - others.max() > reserve)


@settings(max_examples=200, deadline=None)
@given(dense=logits, pruned=logits, tuned=logits, label=st.integers(0, 4))
def test_few_columns_say_what_all_of_them_say(dense, pruned, tuned, label):
    """Verdicts, decisions and every summary that is over all classes are the same however few are kept."""
    stages, labels = {"dense": dense, "pruned": pruned, "tuned": tuned}, np.full(6, label)
    few, all_ = ledger_of(stages, 0.01, 2, labels), ledger_of(stages, 0.01, 16, labels)
    assert few.rows.kept_classes.shape == (6, 4) and all_.rows.kept_classes.shape == (6, 5)
    np.testing.assert_array_equal(few.verdict, all_.verdict)
    np.testing.assert_array_equal(few.slack, all_.slack)
    assert few.tests() == all_.tests() and few.top1() == all_.top1()
    own = ("flips_but_for", "flips_primary")  # of the kept classes: two that tie may not both be there
    for one, other in zip(few.spent(), all_.spent(), strict=True):
        assert {k: v for k, v in one.items() if k not in own} == {k: v for k, v in other.items() if k not in own}
    lost = int((few.slack <= 0).sum())
    assert sum(row["flips_primary"] for row in few.spent()) == lost == sum(r["flips_primary"] for r in all_.spent())
    for name, z in stages.items():
        at = list(stages).index(name)
        np.testing.assert_array_equal(decided(few.rows.logits[:, at], few.rows.kept_classes), z.argmax(axis=1))


@settings(max_examples=200, deadline=None)
@given(dense=logits, pruned=logits, tuned=logits)
def test_the_weaker_tests_never_certify_what_the_pairwise_one_does_not(dense, pruned, tuned):
    counts = ledger_of({"dense": dense, "pruned": pruned, "tuned": tuned}).tests()
    assert counts["two_inf"] <= counts["span"] <= counts["pairwise"]
    assert counts["pairwise"] == sum(
        (tuned[i, dense[i].argmax()] > np.delete(tuned[i], dense[i].argmax())).all() for i in range(6)
    )


@settings(max_examples=100, deadline=None)
@given(dense=logits, pruned=logits, tuned=logits)
def test_the_ledger_telescopes_exactly(dense, pruned, tuned):
    y = dense.argmax(axis=1)
    stages = [z.astype(np.float64) for z in (dense, pruned, tuned)]
    pairs = [np.where(np.isinf(p), 0.0, p) for p in (pair_margins(z, y) for z in stages)]
    added = [after - before for before, after in itertools.pairwise(pairs)]
    np.testing.assert_allclose(pairs[0] + added[0] + added[1], pairs[2], atol=1e-12)
    kept = ledger_of({"dense": dense, "pruned": pruned, "tuned": tuned})
    own = kept.rows.logits[:, :, :-1].astype(np.float64)
    margin = own[:, :, :1] - own
    np.testing.assert_allclose(margin[:, 0] + kept._added().sum(axis=1), margin[:, -1], atol=1e-12)


def test_batches_joined_are_one_ledger():
    rng = np.random.default_rng(0)
    stages = {name: rng.normal(size=(40, 30)).astype(np.float32) for name in ("dense", "pruned", "tuned")}
    labels = rng.integers(0, 30, 40)
    whole = rows_of(labels, stages, 8)
    parts = [rows_of(labels[i : i + 7], {k: v[i : i + 7] for k, v in stages.items()}, 8) for i in range(0, 40, 7)]
    for name, value in vars(joined(parts)).items():
        np.testing.assert_array_equal(value, getattr(whole, name))
    with pytest.raises(StageFailed, match="at least one sample"):
        joined([])


def test_memory_does_not_grow_with_the_classes():
    rng = np.random.default_rng(0)
    stages = {name: rng.normal(size=(64, 1000)).astype(np.float32) for name in ("dense", "pruned", "tuned")}
    rows = rows_of(rng.integers(0, 1000, 64), stages, 16)
    per_sample = sum(value.nbytes for value in vars(rows).values()) / 64
    assert per_sample * 50_000 < 20e6
    assert rows.logits.shape == (64, 3, 17)


def test_the_label_and_every_winner_are_kept():
    rng = np.random.default_rng(1)
    stages = [rng.normal(size=(50, 200)).astype(np.float32) for _ in range(5)]
    labels = rng.integers(0, 200, 50)
    kept = kept_classes(labels, stages, 2)
    assert kept.shape == (50, 6)
    for i in range(50):
        assert {labels[i], *(z[i].argmax() for z in stages)} <= set(kept[i])
        assert len(set(kept[i])) == 6
        assert kept[i, 0] == stages[0][i].argmax()
        dense = stages[0][i][kept[i]]
        assert (np.diff(dense) <= 0).all()
        best = columns(stages[3], kept)[i, -1]
        assert best == np.delete(stages[3][i], kept[i]).max()


def test_spent_rows_by_hand():
    dense = np.array([[3.0, 1.0, 0.0], [2.0, 1.0, 0.0]])
    pruned = np.array([[2.0, 1.5, 0.0], [0.0, 1.0, 0.0]])  # the second sample loses its label here
    tuned = np.array([[2.5, 1.0, 0.0], [2.0, 1.0, 0.0]])  # and gets it back here
    ledger = ledger_of({"dense": dense, "pruned": pruned, "tuned": tuned})
    prune, tune = ledger.spent()
    assert prune["eps_inf_median"] == 1.5 and prune["eps_inf_max"] == 2.0
    assert prune["flips_alone"] == 1 and prune["flips_but_for"] == 0 and prune["flips_primary"] == 0
    assert prune["share_median"] == pytest.approx((0.75 + 2.0) / 2)
    assert tune["flips_alone"] == 0
    assert ledger.counts() == {"flipped": 0, "kept": 0, "certified": 2}
    lost = ledger_of({"dense": dense, "pruned": pruned})
    assert lost.spent()[0]["flips_but_for"] == 1
    assert lost.counts()["flipped"] == 1


def test_a_flip_that_two_stages_share_has_one_primary_stage():
    dense = np.array([[4.0, 0.0, 1.0]])
    pruned = np.array([[2.0, 1.0, 1.0]])  # takes 3 of the margin of 4 to class 1
    tuned = np.array([[1.5, 2.0, 1.0]])  # takes 1.5 more: either alone would not have lost the label
    prune, tune = ledger_of({"dense": dense, "pruned": pruned, "tuned": tuned}).spent()
    assert (prune["flips_alone"], tune["flips_alone"]) == (0, 0)
    assert (prune["flips_but_for"], tune["flips_but_for"]) == (1, 1)
    assert (prune["flips_primary"], tune["flips_primary"]) == (1, 0)


def test_ties_and_what_is_not_finite_fail_closed():
    pairs = pair_margins(np.array([[1.0, 1.0], [np.nan, 0.0], [np.inf, 0.0], [2.0, 1.0]]), np.zeros(4, np.int64))
    assert keeps(pairs).tolist() == [False, False, False, True]
    dense = np.array([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0], [2.0, 1.0, 0.0]])
    bad = np.array([[np.nan, 1.0, 0.0], [3.0, 1.0, 0.0], [2.0, 1.0, np.inf]])
    for keep in (2, 16):
        ledger = ledger_of({"dense": dense, "pruned": bad}, keep=keep)
        assert ledger.verdict.tolist() == [Kept.FLIPPED, Kept.CERTIFIED, Kept.FLIPPED]
        row = ledger.spent()[0]
        assert row["eps_inf_max"] is None and row["flips_alone"] == 2 and row["flips_primary"] == 2
        assert decided(ledger.rows.logits[:, 1], ledger.rows.kept_classes).tolist() == [-1, 0, -1]
    tied = ledger_of({"dense": np.array([[1.0, 1.0, 0.0]]), "pruned": np.array([[2.0, 1.0, 0.0]])})
    assert np.isinf(tied.rows.share).all() and tied.spent()[0]["share_median"] is None
    assert slack_of(np.array([[2.0, 1.0, np.nan]])).tolist() != [1.0]


def test_the_reference_gap_by_hand():
    exact = np.array([[2.0, 0.0], [1.0, 3.0]])
    gap = reference_gap(exact, np.array([[1.9, 0.0], [1.0, 3.0]], np.float32))
    assert gap["samples"] == 2 and gap["eps_inf_max"] == pytest.approx(0.1, rel=1e-6)
    assert gap["share_max"] == pytest.approx(0.05, rel=1e-6)


def test_differences_of_kept_columns():
    one, other = np.array([[1.0, 0.0, -np.inf], [1.0, 0.0, 0.5]]), np.array([[1.5, 0.0, -np.inf], [1.0, 0.0, 0.25]])
    assert eps_between(one, other).tolist() == [0.5, 0.25]
    assert np.isnan(eps_between(one, np.full((2, 3), np.nan))).all()
    assert winner(np.array([[np.nan, 2.0, np.inf], [3.0, 3.0, 1.0]])).tolist() == [1, 0]


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
        ledger_of(stages)


def test_a_label_that_is_no_class_is_refused():
    with pytest.raises(StageFailed, match="class index from 0 to 2"):
        ledger_of({"dense": np.eye(3), "pruned": np.eye(3)}, labels=np.array([0, 1, 3]))


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
