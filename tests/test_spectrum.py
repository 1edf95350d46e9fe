import numpy as np
import pytest
import scipy.integrate

from mpdeploy.errors import RecipeError, StageFailed
from mpdeploy.pruning import spectrum as mp

SHAPES = [(384, 384), (256, 1024), (1152, 384), (64, 576)]


def density_by_definition(x, gamma):
    low, high = mp.support(gamma)
    return np.sqrt(max(high - x, 0) * max(x - low, 0)) / (2 * np.pi * gamma * x)


@pytest.mark.parametrize("gamma", [0.05, 0.3, 0.9, 1.0])
def test_the_distribution_function_equals_the_integral_of_the_density(gamma):
    low, high = mp.support(gamma)
    for share in (0.03, 0.2, 0.5, 0.8, 0.99):
        x = low + share * (high - low)
        integral, _ = scipy.integrate.quad(density_by_definition, low, x, args=(gamma,), limit=400)
        assert mp.mp_cdf(np.array([x]), gamma)[0] == pytest.approx(integral, abs=2e-5)
        assert mp.mp_quantile(np.array([integral]), gamma)[0] == pytest.approx(x, rel=2e-4)
    outside = mp.mp_cdf(np.array([low - 1e-9, high, high + 5.0]), gamma)
    assert outside == pytest.approx([0.0, 1.0, 1.0], abs=1e-12)


def test_the_edge_has_the_papers_exponents_and_not_their_misread_precedence():
    n, t = 500, mp.tracy_widom_quantile(0.9)
    assert mp.upper_edge(n, n, beta=0.1) == pytest.approx(4 + 2 ** (4 / 3) * t * n ** (-2 / 3), rel=1e-12)
    assert (mp.upper_edge(n, n, 0.1) - 4) / (t * n ** (-2 / 3)) == pytest.approx(2.5198, abs=1e-4)
    gamma = 0.25
    scale = (mp.upper_edge(100, 400, 0.1) - (1 + np.sqrt(gamma)) ** 2) / (t * 400 ** (-2 / 3))
    assert scale == pytest.approx(gamma ** (-1 / 6) * 1.5 ** (4 / 3), rel=1e-12)
    assert mp.upper_edge(400, 100, 0.1) == mp.upper_edge(100, 400, 0.1)


@pytest.mark.parametrize(
    ("probability", "value"), [(0.05, -3.18), (0.1, -2.787), (0.5, -1.268), (0.9, 0.453), (0.95, 0.979)]
)
def test_tracy_widom_quantiles_match_the_tables(probability, value):
    assert mp.tracy_widom_quantile(probability) == pytest.approx(value, abs=0.01)


@pytest.mark.parametrize("shape", SHAPES)
def test_pure_noise_gives_its_own_sigma_and_nothing_above_the_edge(shape):
    sigmas = []
    for seed in range(20 if min(shape) < 100 else 3):
        weight = np.random.default_rng(seed).normal(0, 0.02, shape)
        fitted = mp.fit(weight)
        sigmas.append(fitted.sigma)
        assert fitted.spikes <= 2
        assert fitted.ks < 3 / min(shape)  # eigenvalues repel: their counts stray by O(1)
        assert fitted.bulk_fraction == 1 - fitted.spikes / min(shape)
        turned = mp.fit(weight.T)
        assert turned.edge == pytest.approx(fitted.edge, rel=1e-10)
        assert turned.eigenvalues == pytest.approx(fitted.eigenvalues, rel=1e-8, abs=1e-15)
    assert np.mean(sigmas) == pytest.approx(0.02, rel=0.005)


@pytest.mark.parametrize("shape", [(768, 768), (768, 3072), (2304, 768)])
def test_a_single_draw_of_true_size_gives_sigma_within_half_a_percent(shape):
    fitted = mp.fit(np.random.default_rng(11).normal(0, 0.03, shape))
    assert fitted.sigma == pytest.approx(0.03, rel=0.005)
    assert fitted.spikes <= 2
    assert fitted.edge_singular == pytest.approx(0.03 * (np.sqrt(shape[0]) + np.sqrt(shape[1])), rel=0.01)


def test_a_thin_convolution_gives_sigma_within_half_a_percent_on_average():
    # One draw of 64 x 576 strays by 0.4 % (measured over 400 draws), so the mean of 40 by 0.07 %.
    sigmas = [mp.fit(np.random.default_rng(seed).normal(0, 0.1, (64, 576))).sigma for seed in range(40)]
    assert np.mean(sigmas) == pytest.approx(0.1, rel=0.002)
    assert np.max(np.abs(np.array(sigmas) / 0.1 - 1)) < 0.02


@pytest.mark.parametrize("shape", [(50, 80), (80, 50), (40, 40)])
def test_eigenvalues_are_the_squared_singular_values_over_the_longer_side(shape):
    weight = np.random.default_rng(2).standard_t(2, shape)
    fitted, exact = mp.fit(weight), np.linalg.svd(weight, compute_uv=False)
    assert fitted.eigenvalues[::-1] == pytest.approx(exact**2 / max(shape), rel=1e-9)
    assert fitted.largest_singular == pytest.approx(exact[0], rel=1e-12)
    assert fitted.spikes == (exact > fitted.edge_singular).sum()
    assert (fitted.rows, fitted.cols) == shape and fitted.aspect == min(shape) / max(shape)


def test_scaling_the_weights_scales_the_fit_and_nothing_else():
    weight = np.random.default_rng(4).normal(size=(70, 90))
    one, small = mp.fit(weight), mp.fit(1e-6 * weight)
    assert small.sigma == pytest.approx(1e-6 * one.sigma, rel=1e-9)
    assert small.edge_singular == pytest.approx(1e-6 * one.edge_singular, rel=1e-9)
    assert small.ks == pytest.approx(one.ks, rel=1e-6)
    assert small.spikes == one.spikes


def test_float32_and_float16_weights_are_fitted_in_float64():
    weight = np.random.default_rng(5).normal(0, 0.02, (64, 96)).astype(np.float16)
    assert mp.fit(weight).sigma == mp.fit(weight.astype(np.float32)).sigma == mp.fit(weight.astype(np.float64)).sigma


@pytest.mark.parametrize("gamma", [0.1, 0.5, 1.0])
def test_inverse_bbp_undoes_bbp_above_the_detection_limit(gamma):
    variance = 0.3
    strength = variance * np.sqrt(gamma) * np.array([1.0, 1.5, 10.0, 1e4])  # theta^2; the first is the limit
    seen = (strength + variance) * (strength + gamma * variance) / strength
    assert seen[0] == pytest.approx(variance * (1 + np.sqrt(gamma)) ** 2)  # there, the spike leaves the bulk
    assert mp.inverse_bbp(seen, variance, gamma) == pytest.approx(strength, rel=1e-6)


def test_beta_is_a_significance_level_so_a_larger_one_lowers_the_edge():
    edges = [mp.upper_edge(768, 768, beta) for beta in (0.01, 0.1, 0.5, 0.8)]
    assert edges == sorted(edges, reverse=True)
    assert edges[1] > 4 > edges[3]  # the paper's 0.8 lies below the law's own edge


def test_the_edge_is_exceeded_about_as_rarely_as_its_level_says():
    exceeded = [mp.fit(np.random.default_rng(seed).normal(size=(60, 120))).spikes > 0 for seed in range(200)]
    # 10 % asked; binomial 99.9 % range of 200 draws around it, and the small-size bias of the fit
    assert 0.03 < np.mean(exceeded) < 0.19


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_planted_spikes_are_counted_and_their_strength_recovered(shape):
    rows, cols = shape
    generator = np.random.default_rng(7)
    left, _ = np.linalg.qr(generator.normal(size=(rows, 3)))
    right, _ = np.linalg.qr(generator.normal(size=(cols, 3)))
    noise = 0.05 * (np.sqrt(rows) + np.sqrt(cols))
    strengths = noise * np.array([1.0, 1.6, 4.0])
    weight = generator.normal(0, 0.05, shape) + (left * strengths) @ right.T
    fitted = mp.fit(weight)
    assert fitted.spikes == 3
    assert fitted.signals == pytest.approx(strengths, rel=0.03)
    seen = np.sqrt(max(shape) * fitted.eigenvalues[-3:])
    assert (seen > fitted.signals).all()  # noise inflates what is measured
    assert fitted.edge_singular == pytest.approx(noise, rel=0.02)


def test_a_matrix_that_is_not_noise_is_far_from_the_law():
    decay = np.diag(np.arange(1, 201) ** -1.0)
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(200, 200)) @ decay @ generator.normal(size=(200, 200))
    assert mp.fit(weight).ks > 0.1


def test_the_density_for_plots_integrates_to_one_and_matches_the_eigenvalues():
    fitted = mp.fit(np.random.default_rng(1).normal(0, 0.3, (200, 500)))
    low, high = (fitted.sigma**2 * end for end in mp.support(fitted.aspect))
    x = np.linspace(low, high, 20_001)
    y = mp.density(x, fitted)
    assert np.trapezoid(y, x) == pytest.approx(1.0, abs=1e-3)
    middle = x[x < np.median(fitted.eigenvalues)]
    assert np.trapezoid(y[: len(middle)], middle) == pytest.approx(0.5, abs=0.01)
    assert mp.density(np.array([0.0, -1.0, high * 1.01]), fitted).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (np.full((4, 4), np.nan), "finite weights"),
        (np.zeros((6, 9)), "all zero"),
        (np.ones((1, 9)), "at least 2 x 2"),
        (np.ones((4, 4, 3)), "at least 2 x 2"),
        (np.outer(np.arange(1, 61), np.arange(1, 41)), "all zero"),  # rank one: the rest is rounding
    ],
)
def test_what_has_no_spectrum_is_refused(weight, message):
    with pytest.raises(StageFailed, match=message):
        mp.fit(weight)


@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 0.1), (-0.1, 0.1), (np.nan, 0.1), (0.25, 0.0), (0.25, 1.0)])
def test_levels_out_of_range_are_refused(alpha, beta):
    with pytest.raises(RecipeError, match=r"alpha is|beta is"):
        mp.fit(np.eye(8), alpha=alpha, beta=beta)


@pytest.mark.parametrize("beta", [0.8, 0.999, 1 - 1e-12])
def test_a_careless_level_never_gives_nan(beta):
    for size in (30, 60):
        fitted = mp.fit(np.random.default_rng(size).normal(size=(size, size)), beta=beta)
        assert np.isfinite(fitted.signals).all() and fitted.edge_singular > 0
    with pytest.raises(StageFailed, match="too small to have an edge"):
        mp.fit(np.random.default_rng(0).normal(size=(2, 2)), beta=0.999)


def test_a_window_without_an_eigenvalue_is_refused():
    with pytest.raises(StageFailed, match="none of the 3 eigenvalues is left"):
        mp.fit(np.eye(3), alpha=0.49)


# Two further estimators

KINDS = ("normal", "half zero", "t5")
BOTH = [(256, 1024), (512, 512)]


def unit_noise(kind, generator, shape):
    if kind == "normal":
        return generator.normal(size=shape)
    if kind == "half zero":
        return generator.normal(size=shape) * (generator.random(shape) < 0.5) * np.sqrt(2)
    return generator.standard_t(5, shape) / np.sqrt(5 / 3)


def spiked(kind, seed, shape, rank):
    """Noise of sigma 1 plus `rank` spikes, evenly from 1.3 times the limit of detection to 6 times it."""
    generator = np.random.default_rng(seed)
    p, n = sorted(shape)
    noise = unit_noise(kind, generator, shape)
    left, _ = np.linalg.qr(generator.normal(size=(shape[0], rank)))
    right, _ = np.linalg.qr(generator.normal(size=(shape[1], rank)))
    return noise + (left * (np.sqrt(n) * (p / n) ** 0.25 * np.linspace(1.3, 6, rank))) @ right.T


@pytest.mark.parametrize("rank", [10, 60])
def test_sigma_and_rank_of_spiked_matrices_against_the_published_figures(rank):
    errors, ranks, doubts = [], [], []
    for kind in KINDS:
        for shape in BOTH:
            for seed in range(3):
                fitted = mp.fit(spiked(kind, seed, shape, rank))
                others = mp.opinions(fitted)
                errors.append([abs(s - 1) for s in (fitted.sigma, others.trace.sigma, others.evbmf.sigma)])
                ranks.append([fitted.spikes, others.trace.rank, others.evbmf.rank])
                doubts.append(others.doubts)
    bema, trace, evbmf = np.mean(errors, axis=0)
    by_bema, by_trace, by_evbmf = np.abs(np.array(ranks) - rank).mean(axis=0)
    assert trace < 0.005 and by_trace <= 0.05 * rank
    if rank == 10:
        assert 0.005 < bema < 0.015 and evbmf < 0.005
        assert set(doubts) == {()}
    else:
        # BEMA takes spikes for noise; EVBMF too, though fewer; the doubt says so.
        assert 0.06 < bema < 0.13 and 0.02 < evbmf < 0.035
        assert trace < evbmf / 4 < bema / 8
        assert by_trace < by_bema and by_trace < by_evbmf
        assert all("sigmas" in raised for raised in doubts)


@pytest.mark.parametrize("shape", [(384, 384), (256, 1024), (200, 64), (10, 128)])
def test_on_pure_noise_both_give_the_root_mean_square(shape):
    weight = np.random.default_rng(9).normal(0, 0.02, shape)
    others = mp.opinions(mp.fit(weight))
    rms = np.sqrt((weight**2).mean())
    assert others.trace.rank == others.evbmf.rank == 0 and others.doubts == ()
    assert others.trace.sigma == pytest.approx(rms, rel=1e-9)
    assert others.evbmf.sigma == pytest.approx(rms, rel=1e-6)
    for one in (others.trace, others.evbmf):
        assert one.edge_singular == pytest.approx(np.sqrt(max(shape) * one.edge), rel=1e-12)
    p, n = sorted(shape)
    assert others.trace.edge_singular / rms == pytest.approx(np.sqrt(p) + np.sqrt(n), rel=0.06)


def test_noise_of_many_scales_raises_the_doubt():
    raised = []
    for seed in range(4):
        generator = np.random.default_rng(seed)
        scales = np.exp(0.3 * generator.normal(size=(256, 1)))
        raised.append(mp.opinions(mp.fit(generator.normal(size=(256, 1024)) * scales)).doubts)
    assert all("sigmas" in doubts for doubts in raised)
    steps = np.repeat([1.0, 2.0, 4.0, 8.0], 64)[:, None]
    assert "KS" in mp.opinions(mp.fit(np.random.default_rng(0).normal(size=(256, 256)) * steps)).doubts


@pytest.mark.parametrize("shape", [(60, 150), (150, 60), (90, 90)])
@pytest.mark.parametrize("seed", range(3))
def test_the_iterated_trace_is_a_fixed_point_of_its_definition(shape, seed):
    weight = spiked("normal", seed, shape, 5) * 0.1
    own = mp.opinions(mp.fit(weight)).trace
    p, n = sorted(shape)
    squares = np.linalg.svd(weight, compute_uv=False) ** 2
    rest = squares[squares <= own.edge_singular**2]
    assert own.rank == p - len(rest)
    assert own.sigma**2 == pytest.approx(rest.mean() / n * n / (n - own.rank), rel=1e-9)
    assert own.edge == pytest.approx(own.sigma**2 * mp.upper_edge(*shape, 0.01), rel=1e-12)


def test_the_iterated_trace_starts_from_the_median_so_that_spikes_cannot_hide_each_other():
    # 45 equal spikes, and the law itself for what noise is left beside them: 55 x 355, on the scale of 400.
    noise = mp.mp_quantile((np.arange(55) + 0.5) / 55, 55 / 355) * 355 / 400
    weight = np.zeros((100, 400))
    np.fill_diagonal(weight, np.sqrt(400 * np.concatenate([noise, np.full(45, 6.0)])))
    fitted = mp.fit(weight)
    assert fitted.eigenvalues[-1] < fitted.eigenvalues.mean() * mp.upper_edge(100, 400, 0.01)
    own = mp.opinions(fitted).trace
    assert own.rank == 45 and own.sigma == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("alpha", [0.01, 0.25, 0.7, 1.0])
def test_evbmf_keeps_a_component_where_brute_force_over_the_posterior_gains_by_it(alpha):
    # With both prior variances free, the free energy of a component, over its value without it, is the smallest of
    # log(1 + 1/s) + alpha log(1 + 1/t) - x / ((1 + s)(1 + t)): s and t are posterior variances over squared means.
    s, t = (np.exp(axis) for axis in np.meshgrid(np.linspace(-9, 14, 1400), np.linspace(-9, 14, 1400)))
    gain = np.log1p(1 / s) + alpha * np.log1p(1 / t)
    threshold = mp.evbmf_threshold(alpha)
    assert threshold > (1 + np.sqrt(alpha)) ** 2  # more cautious than the law's own edge
    for x in threshold * np.array([0.97, 1.03, 1.5, 4.0]):
        smallest = (gain - x / ((1 + s) * (1 + t))).min()
        own = mp.free_energy(1.0, np.array([x]), alpha) - x
        assert own == pytest.approx(min(smallest, 0.0), abs=2e-3 * x)
        assert (own < 0) == (x > threshold)


@pytest.mark.parametrize("alpha", [0.05, 0.5, 1.0])
def test_the_free_energy_has_no_jump_at_the_threshold(alpha):
    edge = mp.evbmf_threshold(alpha)
    below, above = (mp.free_energy(1.0, np.array([edge * (1 + d)]), alpha) for d in (-1e-9, 1e-9))
    assert below == pytest.approx(above, abs=1e-6)
    assert edge == pytest.approx((1 + 2.5129 * np.sqrt(alpha)) * (1 + np.sqrt(alpha) / 2.5129), rel=0.02)


@pytest.mark.parametrize("seed", range(6))
def test_evbmf_finds_the_lowest_free_energy_of_all_variances(seed):
    generator = np.random.default_rng(seed)
    weights = (
        generator.standard_t(2.5, (60, 90)),
        generator.normal(size=(80, 80)) * np.exp(generator.normal(size=(80, 1))),
        spiked("normal", seed, (40, 200), 12),
    )
    for weight in weights:
        fitted = mp.fit(weight)
        own = mp.opinions(fitted).evbmf
        lowest = mp.free_energy(own.sigma**2, fitted.eigenvalues, fitted.aspect)
        everywhere = fitted.eigenvalues.mean() * np.geomspace(1e-3, 3, 4000)
        assert lowest <= min(mp.free_energy(v, fitted.eigenvalues, fitted.aspect) for v in everywhere) + 1e-6
        # Where the derivative vanishes, sigma^2 = (sum of eigenvalues - sigma^2 sum of kept tau) / p.
        x = fitted.eigenvalues[fitted.eigenvalues > own.edge] / own.sigma**2 - 1 - fitted.aspect
        tau = (x + np.sqrt(x**2 - 4 * fitted.aspect)) / 2
        expected = (fitted.eigenvalues.sum() - own.sigma**2 * tau.sum()) / len(fitted.eigenvalues)
        assert own.sigma**2 == pytest.approx(expected, rel=1e-4)


def test_scale_and_orientation_change_nothing_else():
    weight = spiked("normal", 1, (60, 150), 5)
    one = mp.opinions(mp.fit(weight))
    for other in (mp.opinions(mp.fit(1e-5 * weight)), mp.opinions(mp.fit(1e-5 * weight.T))):
        for a, b in ((one.trace, other.trace), (one.evbmf, other.evbmf)):
            assert b.sigma == pytest.approx(1e-5 * a.sigma, rel=1e-6) and b.rank == a.rank
        assert other.doubts == one.doubts


def test_equal_eigenvalues_and_zeros_have_an_answer():
    orthogonal, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(50, 50)))
    flat = mp.opinions(mp.fit(orthogonal))
    assert flat.trace.rank == flat.evbmf.rank == 0
    assert flat.evbmf.sigma == pytest.approx(np.sqrt(1 / 50), rel=1e-6)
    few = np.random.default_rng(0).normal(size=(100, 60)) @ np.random.default_rng(1).normal(size=(60, 100))
    assert mp.opinions(mp.fit(few)).trace.sigma > 0
    half = np.random.default_rng(0).normal(size=(100, 40)) @ np.random.default_rng(1).normal(size=(40, 100))
    none = mp.opinions(mp.fit(half))
    assert none.trace is None and none.evbmf is None and "zeros" in none.doubts
