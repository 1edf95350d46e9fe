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
