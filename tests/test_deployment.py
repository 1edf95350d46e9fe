"""The margin-gated rule: its tests by hand, its promise by simulation, and the two files that run beside an engine."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats

from mpdeploy.certify.deployment import deployment_rule, engine_margins, margin_grid
from mpdeploy.errors import StageFailed
from mpdeploy.rule_files import rule_files

GRID = margin_grid(1.0)


def drawn(generator, n, scale=0.3):
    """Margins, and disagreements that get rarer as the margin grows: P(disagree | margin) = exp(-margin/scale) / 2."""
    margins = generator.exponential(2.0, n)
    return margins, generator.random(n) < np.exp(-margins / scale) / 2


def risk(tau, scale=0.3):
    """P(disagree and margin > tau) of `drawn`: the integral of its density."""
    speed = 1 / 2.0 + 1 / scale
    return 0.5 / 2.0 / speed * math.exp(-speed * tau)


def test_the_rule_by_hand():
    margins = np.array([0.5] * 10 + [1.5] * 50 + [3.0] * 140)
    wrong = np.zeros(200, bool)
    wrong[[0, 1, 2, 3, 4, 5, 10]] = True  # six of the small margins, one of the middle ones
    rule = deployment_rule(margins, wrong, 0.04, 0.95, (0.0, 2.0, 1.0, 4.0))
    assert [(row.tau, row.errors, row.n, row.rejected) for row in rule.tested] == [
        (4.0, 0, 200, True),
        (2.0, 0, 200, True),
        (1.0, 1, 200, True),
        (0.0, 7, 200, False),
    ]
    for row in rule.tested:
        assert row.p == pytest.approx(scipy.stats.binom.cdf(row.errors, 200, 0.04), rel=1e-9)
    assert rule.tau == 1.0 and rule.abstains == pytest.approx(10 / 200)
    assert "<= 0.04" in rule.statement and "not the share among those that are kept" in rule.statement


def test_testing_ends_at_the_first_that_is_not_rejected():
    # At 1.0 there are too many errors. Nothing below may be looked at, whatever it would give.
    margins, wrong = np.array([1.5] * 20 + [3.0] * 180), np.zeros(200, bool)
    wrong[:20] = True
    rule = deployment_rule(margins, wrong, 0.04, 0.95, (4.0, 2.0, 1.0, 0.5, 0.0))
    assert [row.tau for row in rule.tested] == [4.0, 2.0, 1.0]
    assert rule.tau == 2.0


def test_the_margin_has_to_be_exceeded():
    margins, wrong = np.array([1.0] * 5 + [2.0] * 195), np.array([True] * 5 + [False] * 195)
    rule = deployment_rule(margins, wrong, 0.02, 0.95, (1.0,))
    assert rule.tested[0].errors == 0 and rule.tau == 1.0 and rule.abstains == pytest.approx(5 / 200)


def test_margins_that_are_not_finite_abstain():
    margins = np.array([np.nan, np.inf, -np.inf] + [2.0] * 197)
    wrong = np.array([True] * 3 + [False] * 197)
    rule = deployment_rule(margins, wrong, 0.02, 0.95, (1.0,))
    assert rule.tested[0].errors == 0 and rule.abstains == pytest.approx(3 / 200)


def test_too_few_samples_give_no_rule():
    for n in (0, 20):
        rule = deployment_rule(np.ones(n), np.zeros(n, bool), 0.01, 0.95, GRID)
        assert rule.tau is None and len(rule.tested) == 1
        assert "always abstains" in rule.statement
        assert rule.abstains == (1.0 if n else None)
    json.dumps(rule.json(), allow_nan=False)


def test_candidates_raise_the_hurdle():
    margins, wrong = drawn(np.random.default_rng(0), 3000)
    alone = deployment_rule(margins, wrong, 0.01, 0.95, GRID)
    of_many = deployment_rule(margins, wrong, 0.01, 0.95, GRID, candidates=1000)
    assert of_many.tau > alone.tau
    assert "Bonferroni for 1000" in of_many.statement
    proved = [row for row in of_many.tested if row.rejected]
    assert max(row.p for row in proved) <= 0.05 / 1000


def test_the_limit_is_broken_at_most_as_rarely_as_promised_and_naive_choice_breaks_it():
    # The grid is fine where the risk crosses alpha, so that a rule which is wrong shows.
    generator, alpha, repeats, n = np.random.default_rng(5), 0.02, 1500, 800
    grid = np.linspace(0.0, 1.5, 76)
    broken = naive = none = 0
    for _ in range(repeats):
        margins, wrong = drawn(generator, n)
        rule = deployment_rule(margins, wrong, alpha, 0.9, grid)
        none += rule.tau is None
        broken += rule.tau is not None and risk(rule.tau) > alpha
        observed = [float((wrong & (margins > tau)).mean()) for tau in grid]
        naive += risk(grid[next(i for i, share in enumerate(observed) if share <= alpha)]) > alpha
    assert none == 0
    assert broken / repeats <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / repeats)
    assert broken / repeats > 0.03, "a rule that never errs would be needlessly strict"
    assert naive / repeats > 0.25


def test_the_best_of_twenty_engines_needs_the_correction():
    generator, alpha, repeats, n, m = np.random.default_rng(6), 0.02, 150, 800, 20
    grid = np.linspace(0.0, 1.5, 31)
    broken = {1: 0, m: 0}
    for _ in range(repeats):
        engines = [drawn(generator, n) for _ in range(m)]
        for candidates in broken:
            rules = [deployment_rule(*engine, alpha, 0.9, grid, candidates) for engine in engines]
            broken[candidates] += risk(min(r.tau for r in rules if r.tau is not None)) > alpha
    assert broken[1] / repeats > 0.4
    assert broken[m] / repeats <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / repeats)


def test_a_cluster_fails_where_any_member_disagrees_above_tau():
    # Forty clusters of five. One holds two errors, at 0.5 and 1.5; another one at 3 whose margin is no number.
    margins, wrong = np.full(200, 5.0), np.zeros(200, bool)
    margins[[0, 1, 5]], wrong[[0, 1, 5]] = (0.5, 1.5, np.nan), True
    ids = np.repeat([f"c{i}" for i in range(40)], 5).tolist()
    rule = deployment_rule(margins, wrong, 0.2, 0.9, (2.0, 1.0, 0.0), clusters=ids)
    assert [(row.tau, row.errors, row.n) for row in rule.tested] == [(2.0, 0, 40), (1.0, 1, 40), (0.0, 1, 40)]
    assert rule.tau == 0.0 and rule.abstains == pytest.approx(1 / 200)
    assert "P(a new cluster holds a sample" in rule.statement and "40 clusters" in rule.statement
    order = np.random.default_rng(0).permutation(200)
    again = deployment_rule(margins[order], wrong[order], 0.2, 0.9, (2.0, 1.0, 0.0), clusters=[ids[i] for i in order])
    assert again == rule
    with pytest.raises(StageFailed, match="199 ids"):
        deployment_rule(margins, wrong, 0.2, 0.9, (1.0,), clusters=ids[1:])


def test_frames_of_a_video_break_the_rule_for_independent_samples_and_not_the_clustered_one():
    generator, repeats, alpha, broken = np.random.default_rng(7), 300, 0.1, {"naive": 0, "clustered": 0}
    ids, grid = np.repeat(np.arange(150), 10).tolist(), np.linspace(0.0, 3.0, 31)
    for _ in range(repeats):
        # All frames of a video have its margin and its answer: what happens to one happens to all.
        margins, wrong = (np.repeat(values, 10) for values in drawn(generator, 150, scale=3.0))
        for name, clusters in (("naive", None), ("clustered", ids)):
            rule = deployment_rule(margins, wrong, alpha, 0.9, grid.tolist(), clusters=clusters)
            broken[name] += rule.tau is not None and risk(rule.tau, scale=3.0) > alpha
    assert broken["naive"] / repeats > 0.25
    assert broken["clustered"] / repeats <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / repeats)


def test_the_grid_falls_to_zero_and_scales():
    assert list(GRID) == sorted(GRID, reverse=True) and GRID[-1] == 0.0 and len(set(GRID)) == len(GRID)
    assert np.allclose(margin_grid(3.0), 3 * np.array(GRID))
    assert GRID[0] == 8.0 and GRID[-2] == pytest.approx(2**-7)
    for scale in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(StageFailed, match="scale"):
            margin_grid(scale)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"disagree": np.zeros(3, bool)}, "one margin and one boolean"),
        ({"disagree": np.zeros(4)}, "one margin and one boolean"),
        ({"margins": np.zeros((4, 1))}, "one margin and one boolean"),
        ({"alpha": 0.0}, "alpha is 0"),
        ({"alpha": math.nan}, "alpha is nan"),
        ({"grid": ()}, "at least one"),
        ({"grid": (1.0, math.nan)}, "finite"),
        ({"grid": (-1.0,)}, "at least 0"),
        ({"confidence": 1.5}, "confidence is 1.5"),
        ({"candidates": 0}, "0 candidates"),
    ],
)
def test_what_means_nothing_is_refused(change, match):
    plain = {"margins": np.ones(4), "disagree": np.zeros(4, bool), "alpha": 0.1, "confidence": 0.9, "grid": (1.0,)}
    with pytest.raises(StageFailed, match=match):
        deployment_rule(**{**plain, **change})


def test_engine_margins_are_float64_differences_of_the_two_largest():
    z = np.array([[1.0, 3.0, 2.0], [5.0, 5.0, 1.0], [np.nan, 1.0, 2.0], [np.inf, 1.0, 2.0], [-np.inf, 1.0, 2.0]])
    got = engine_margins(z)
    assert got[:2].tolist() == [1.0, 0.0] and np.isnan(got[2:]).all()
    half = np.array([[2048.0, 0.25]], np.float16)
    assert engine_margins(half)[0] == 2047.75  # float16 itself would say 2048
    assert engine_margins(np.array([[6e4, -6e4]], np.float16))[0] == pytest.approx(1.2e5, rel=1e-3)


# The two files


@pytest.fixture
def beside(tmp_path):
    """Write the files of a rule to a folder; returns a function that decides rows there, without mpdeploy."""
    margins, wrong = drawn(np.random.default_rng(1), 3000)
    rule = deployment_rule(margins, wrong, 0.01, 0.95, GRID)
    for name, text in rule_files(rule, 3, "onnxruntime-cpu-fp16").items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "elsewhere").mkdir()
    script = (
        "import sys\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "import abstain, json, numpy as np\n"
        "assert not [m for m in sys.modules if m.split('.')[0] in ('mpdeploy', 'scipy', 'torch')]\n"
        "rows, dtype = json.loads(sys.stdin.read())\n"
        "out = []\n"
        "for row in rows:\n"
        "    try: out.append(abstain.decide(np.array(row, dtype)))\n"
        "    except Exception as error: out.append(f'{type(error).__name__}: {error}')\n"
        "print(json.dumps(out))\n"
    )

    def decide(rows, dtype="float32"):
        done = subprocess.run(
            [sys.executable, "-I", "-c", script],
            input=json.dumps([rows, dtype]),
            cwd=tmp_path / "elsewhere",
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return rule, tmp_path, decide


def test_the_check_runs_alone_and_decides_as_the_rule_was_proved(beside):
    rule, _, decide = beside
    generator = np.random.default_rng(2)
    for dtype in ("float16", "float32", "float64"):
        rows = generator.normal(0, 2 * rule.tau, (300, 3)).astype(dtype)
        kept = engine_margins(rows) > rule.tau
        assert 0 < kept.sum() < 300
        assert decide(rows.tolist(), dtype) == [[int(z.argmax()), bool(k)] for z, k in zip(rows, kept, strict=True)]


def test_at_tau_itself_and_on_a_tie_it_abstains(beside):
    rule, _, decide = beside
    rows = [[rule.tau, 0.0, -9.0], [np.nextafter(rule.tau, 9), 0.0, -9.0], [4.0, 4.0, 0.0]]
    assert decide(rows, "float64") == [[0, False], [0, True], [0, False]]


def test_float16_is_subtracted_in_float64(beside):
    _, folder, decide = beside
    path = folder / "abstain.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tau": 2047.7}))
    assert decide([[2048.0, 0.25, 0.0]], "float16") == [[0, True]]  # in float16, tau and the margin are both 2048


def test_it_fails_closed(beside):
    _, _, decide = beside
    odd = decide([[9.0, math.nan, 0.0], [math.inf, 0.0, 0.0], [9.0, 0.0, -math.inf]])
    assert odd == [[None, False]] * 3
    for row in ([9.0, 0.0], [9.0, 0.0, 0.0, 0.0], [[9.0, 0.0, 0.0]], 9.0):
        (said,) = decide([row])
        assert said.startswith("ValueError: Logits have shape") and "(3,)" in said
    for dtype in ("int64", "int8", "bool"):
        (said,) = decide([[9, 0, 0]], dtype)
        assert said.startswith("TypeError") and dtype in said


@pytest.mark.parametrize(
    "change",
    [{"tau": math.nan}, {"tau": math.inf}, {"tau": -1.0}, {"tau": "1"}, {"tau": True}, {"classes": 1}, {"schema": 2}],
)
def test_a_rule_that_was_tampered_with_is_refused(beside, change):
    _, folder, decide = beside
    path = folder / "abstain.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    (said,) = decide([[9.0, 0.0, 0.0]])
    assert said.startswith("ValueError") and "abstain.json" in said


def test_without_a_tau_it_never_keeps(tmp_path, beside):
    _, folder, decide = beside
    none = deployment_rule(np.ones(3), np.zeros(3, bool), 0.01, 0.95, GRID)
    (folder / "abstain.json").write_text(rule_files(none, 3, "e")["abstain.json"])
    assert decide([[1e30, 0.0, 0.0]]) == [[0, False]]


def test_the_rule_file_is_strict_json_that_says_what_it_is_worth():
    margins, wrong = drawn(np.random.default_rng(1), 3000)
    rule = deployment_rule(margins, wrong, 0.01, 0.95, GRID)
    made = rule_files(rule, 10, "trt-sm80-fp16")
    assert set(made) == {"abstain.py", "abstain.json"}

    def refuse(constant):
        raise AssertionError(constant)

    read = json.loads(made["abstain.json"], parse_constant=refuse)
    assert read["tau"] == rule.tau and read["classes"] == 10 and read["engine"] == "trt-sm80-fp16"
    assert read["statement"] == rule.statement and repr(rule.tau) in rule.statement
    assert len(made["abstain.py"].splitlines()) < 60 and "import mpdeploy" not in made["abstain.py"]
    with pytest.raises(StageFailed, match="two classes"):
        rule_files(rule, 1, "e")
