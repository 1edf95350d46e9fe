"""The Marchenko-Pastur law fitted to a weight matrix: a diagnostic of how much of a layer looks like noise.

Scale: for a matrix W with p = min(rows, cols) and n = max(rows, cols), eigenvalues are those of W^T W / n (squared
singular values over n). If the entries were independent with standard deviation sigma they would follow the law with
aspect gamma = p/n on sigma^2 * [(1 - sqrt gamma)^2, (1 + sqrt gamma)^2]. It decides nothing about a uniform N:M mask.

Three estimates of sigma, from the same eigenvalues. BEMA (`fit`) looks at the central eigenvalues only and is what the
stages use; its sigma drifts upwards as spikes take up a share of the spectrum. The iterated trace and EVBMF
(`opinions`) count the spikes' share, and where they part, the matrix is not noise of one scale plus a few spikes.
On trained weights all of it is a signal: the levels of the edges are probabilities for noise, not for such weights.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import scipy.linalg
import scipy.optimize
import scipy.stats
from numpy.typing import NDArray

from mpdeploy.errors import RecipeError, StageFailed

Floats = NDArray[np.float64]
GRID = 20_001
# Level of the iterated trace's own edge, and from where on a spectrum is doubted. On noise, KS is up to 3 over the
# number of eigenvalues; of fewer than these, it says nothing.
TRACE_BETA, SIGMAS_APART, KS_OFF, KS_FEWEST = 0.01, 0.02, 0.1, 32
STEPS = 64


@dataclass(frozen=True)
class Spectrum:
    """A fitted spectrum.

    Args:
        rows: rows of the matrix.
        cols: columns of the matrix.
        sigma: fitted standard deviation of the noise entries.
        edge: eigenvalue above which nothing is noise, at significance `beta`; scale of `eigenvalues`.
        eigenvalues: float64 [p], ascending, squared singular values over n.
        ks: largest distance between the empirical and the fitted distribution function over the fitting window.
        spikes: eigenvalues above `edge`.
        bulk_fraction: share of the eigenvalues at or below `edge`.
        signals: float64 [spikes], ascending: singular values that the signal had before noise was added to it.
    """

    rows: int
    cols: int
    sigma: float
    edge: float
    eigenvalues: Floats
    ks: float
    spikes: int
    bulk_fraction: float
    signals: Floats

    @property
    def aspect(self) -> float:
        """Gamma = p/n, in (0, 1]."""
        return min(self.rows, self.cols) / max(self.rows, self.cols)

    @property
    def edge_singular(self) -> float:
        """The edge as a singular value of the matrix: sqrt(n * edge)."""
        return float(np.sqrt(max(self.rows, self.cols) * self.edge))

    @property
    def largest_singular(self) -> float:
        """The largest singular value of the matrix."""
        return float(np.sqrt(max(self.rows, self.cols) * self.eigenvalues[-1]))


@dataclass(frozen=True)
class Estimate:
    """What one estimator says of a spectrum.

    Attributes:
        sigma: standard deviation of the noise entries.
        edge: eigenvalue above which it takes one for signal; scale of `Spectrum.eigenvalues`.
        edge_singular: the edge as a singular value of the matrix.
        rank: eigenvalues above `edge`.
    """

    sigma: float
    edge: float
    edge_singular: float
    rank: int


@dataclass(frozen=True)
class Opinions:
    """What two estimators that allow for many spikes say beside BEMA.

    Attributes:
        trace: iterated trace with the Tracy-Widom 99 % edge; None where half of the eigenvalues are zero.
        evbmf: empirical variational Bayes; None where the smaller eigenvalues are zero.
        doubts: words of `DOUBTS`, empty where nothing speaks against noise plus a few spikes.
    """

    trace: Estimate | None
    evbmf: Estimate | None
    doubts: tuple[str, ...]


# What the words mean, as it is printed beside every table.
DOUBTS = (
    ("sigmas", f"the sigmas of trace and EVBMF differ by more than {100 * SIGMAS_APART:g} %"),
    ("KS", f"KS is above {KS_OFF:g}, and it is of at least {KS_FEWEST} eigenvalues"),
    ("zeros", "too many eigenvalues are zero for a second opinion"),
)


def support(gamma: float) -> tuple[float, float]:
    """Both ends of the Marchenko-Pastur law's support for unit variance and aspect `gamma` in (0, 1]."""
    root = np.sqrt(gamma)
    return float((1 - root) ** 2), float((1 + root) ** 2)


@lru_cache(maxsize=256)
def _angle_table(gamma: float) -> tuple[Floats, Floats]:
    """Angles phi and the distribution function there, with x = low + (high - low) sin^2 phi.

    The substitution turns the square-root edges, and at gamma = 1 the pole at 0, into a smooth integrand:
    density dx = width^2 sin^2 cos^2 / (pi gamma x) dphi.
    """
    low, high = support(gamma)
    width = high - low
    phi = np.linspace(0.0, np.pi / 2, GRID)
    sin2, cos2 = np.sin(phi) ** 2, np.cos(phi) ** 2
    x = low + width * sin2
    # sin^2/x tends to 1/width where x and sin^2 vanish together (gamma = 1).
    ratio = np.divide(sin2, x, out=np.full(GRID, 1.0 / width), where=x > 0)
    integrand = width**2 * cos2 * ratio / (np.pi * gamma)
    steps = (integrand[1:] + integrand[:-1]) / 2 * np.diff(phi)
    total = np.concatenate([[0.0], np.cumsum(steps)])
    return phi, total / total[-1]


def mp_cdf(x: Floats, gamma: float) -> Floats:
    """Distribution function of the unit-variance law at `x` (any shape): 0 below the support, 1 above it."""
    low, high = support(gamma)
    phi, total = _angle_table(gamma)
    share = np.clip((np.asarray(x, dtype=np.float64) - low) / (high - low), 0.0, 1.0)
    return np.interp(np.arcsin(np.sqrt(share)), phi, total)


def mp_quantile(q: Floats, gamma: float) -> Floats:
    """Quantiles of the unit-variance law at probabilities `q` (any shape)."""
    low, high = support(gamma)
    phi, total = _angle_table(gamma)
    return low + (high - low) * np.sin(np.interp(q, total, phi)) ** 2


def density(x: Floats, spectrum: Spectrum) -> Floats:
    """The fitted density at eigenvalues `x`: sqrt((high-x)(x-low)) / (2 pi gamma sigma^2 x), 0 outside the bulk."""
    variance = spectrum.sigma**2
    low, high = (variance * end for end in support(spectrum.aspect))
    values = np.asarray(x, dtype=np.float64)
    root = np.sqrt(np.clip((high - values) * (values - low), 0.0, None))
    below = 2 * np.pi * spectrum.aspect * variance * values
    return np.divide(root, below, out=np.zeros_like(values), where=(values > low) & (values < high))


@lru_cache(maxsize=64)
def tracy_widom_quantile(probability: float) -> float:
    """Quantile of the Tracy-Widom law for real matrices (beta = 1) by Chiani's shifted gamma (error below 1e-3).

    Source: M. Chiani, "Distribution of the largest eigenvalue for real Wishart and Gaussian random matrices", 2014.
    """
    return float(scipy.stats.gamma.ppf(probability, 46.446, scale=0.186054) - 9.84801)


def upper_edge(rows: int, cols: int, beta: float) -> float:
    """Largest eigenvalue that pure noise of unit variance exceeds with probability `beta`.

    (1 + sqrt gamma)^2 + t n^(-2/3) gamma^(-1/6) (1 + sqrt gamma)^(4/3) with t the (1 - beta) quantile of Tracy-Widom.
    Source: Ke, Ma and Lin, "Estimation of the number of spiked eigenvalues by bulk eigenvalue matching", 2021.
    """
    p, n = sorted((rows, cols))
    gamma = p / n
    scale = n ** (-2 / 3) * gamma ** (-1 / 6) * (1 + np.sqrt(gamma)) ** (4 / 3)
    return float((1 + np.sqrt(gamma)) ** 2 + tracy_widom_quantile(1 - beta) * scale)


def fit(weight: NDArray[np.floating], *, alpha: float = 0.25, beta: float = 0.1) -> Spectrum:
    """Fit the law by bulk eigenvalue matching (BEMA).

    sigma^2 is the least-squares slope through the origin of the eigenvalues against the law's quantiles at
    (k - 1/2)/p, over the central eigenvalues alpha p <= k <= (1 - alpha) p, which spikes don't reach.
    Source: Ke, Ma and Lin, "Estimation of the number of spiked eigenvalues by bulk eigenvalue matching", 2021.

    Args:
        weight: 2-D, either orientation; a convolution comes as [O, I*kh*kw].
        alpha: share of the eigenvalues left out at each end, in [0, 0.5).
        beta: significance level of the edge, in (0, 1).

    Raises:
        RecipeError: alpha or beta is out of range.
        StageFailed: the matrix is no matrix, holds NaN or infinity, is thinner than 2, has no eigenvalue in the
            window that `alpha` leaves, has no bulk (the central eigenvalues are all zero), or no edge above zero.
    """
    check_levels(alpha, beta)
    matrix = np.asarray(weight, dtype=np.float64)
    if matrix.ndim != 2 or min(matrix.shape) < 2:
        raise StageFailed(f"A spectrum needs a matrix of at least 2 x 2; this weight has shape {list(matrix.shape)}.")
    if not np.isfinite(matrix).all():
        raise StageFailed("A spectrum needs finite weights; this matrix holds NaN or infinity.")
    rows, cols = matrix.shape
    p, n = sorted((rows, cols))
    gamma = p / n
    gram = matrix @ matrix.T if rows <= cols else matrix.T @ matrix
    eigenvalues = scipy.linalg.eigvalsh(gram, overwrite_a=True, check_finite=False) / n
    # Rounding in the product moves each eigenvalue by up to this much: below it, they are zero.
    eigenvalues[eigenvalues < p * np.finfo(np.float64).eps * eigenvalues[-1]] = 0.0
    k = np.arange(1, p + 1)
    window = (k >= alpha * p) & (k <= (1 - alpha) * p)
    if not window.any():
        raise StageFailed(
            f"With alpha = {alpha:g}, none of the {p} eigenvalues is left to fit; a smaller one leaves some."
        )
    quantiles, inside = mp_quantile((k[window] - 0.5) / p, gamma), eigenvalues[window]
    variance = float(quantiles @ inside / (quantiles @ quantiles))
    if not variance > 0:
        raise StageFailed("A spectrum needs a bulk; the central eigenvalues of this matrix are all zero.")
    edge = variance * upper_edge(rows, cols, beta)
    if not edge > 0:
        raise StageFailed(f"With beta = {beta:g}, a matrix of {rows} x {cols} is too small to have an edge above zero.")
    fitted = mp_cdf(inside / variance, gamma)
    ks = float(np.maximum(np.abs(fitted - k[window] / p), np.abs(fitted - (k[window] - 1) / p)).max())
    above = eigenvalues[eigenvalues > edge]
    return Spectrum(
        rows=rows,
        cols=cols,
        sigma=float(np.sqrt(variance)),
        edge=edge,
        eigenvalues=eigenvalues,
        ks=ks,
        spikes=len(above),
        bulk_fraction=1 - len(above) / p,
        signals=np.sqrt(n * inverse_bbp(above, variance, gamma)),
    )


def opinions(spectrum: Spectrum) -> Opinions:
    """Estimate sigma and rank in two further ways, from the eigenvalues that `fit` left; a millisecond.

    On matrices of 256 x 1024 and 512 x 512 that are noise of one scale plus r spikes from 1.3 times the detection limit
    up, sigma is wrong by (tests/test_spectrum.py): r = 10: trace 0.3 %, EVBMF 0.3 %, BEMA 1 %; r = 60: trace 0.4 %,
    EVBMF 3 %, BEMA 9 %. There the last two keep some spikes for noise, and the doubt "sigmas" is raised though the
    noise is of one scale: from about 40 spikes on, which is 8 and 16 % of these spectra.
    """
    trace, evbmf = _iterated_trace(spectrum), _evbmf(spectrum)
    raised = []
    if trace is None or evbmf is None:
        raised.append("zeros")
    elif abs(trace.sigma / evbmf.sigma - 1) > SIGMAS_APART:
        raised.append("sigmas")
    if spectrum.ks > KS_OFF and len(spectrum.eigenvalues) >= KS_FEWEST:
        raised.append("KS")
    return Opinions(trace, evbmf, tuple(raised))


def _estimate(spectrum: Spectrum, variance: float, edge: float) -> Estimate:
    longer = max(spectrum.rows, spectrum.cols)
    above = int((spectrum.eigenvalues > edge).sum())
    return Estimate(float(np.sqrt(variance)), edge, float(np.sqrt(longer * edge)), above)


def _iterated_trace(spectrum: Spectrum) -> Estimate | None:
    """Estimate sigma^2 as the mean of the eigenvalues below the edge that it implies: a fixed point.

    Start: median eigenvalue over the law's median. Step: r = how many exceed sigma^2 times the edge of unit noise at
    1 %, then sigma^2 = mean of the other p - r eigenvalues * n / (n - r). What is left once r directions are removed on
    both sides is noise of (p - r) x (n - r), whose mean eigenvalue on the scale of n is sigma^2 (n - r) / n. Cutting
    off an eigenvalue above the edge lowers the estimate, so the rank moves one way until it stays; were it to return
    to an earlier one after all, the iteration would end there.
    """
    values, gamma = spectrum.eigenvalues, spectrum.aspect
    p, n = sorted((spectrum.rows, spectrum.cols))
    unit = upper_edge(p, n, TRACE_BETA)
    variance = float(np.median(values) / mp_quantile(np.array([0.5]), gamma)[0])
    sums = np.cumsum(values)
    seen: set[int] = set()
    while variance > 0 and (rank := int((values > variance * unit).sum())) not in seen:
        seen.add(rank)
        variance = float(sums[p - rank - 1] / (p - rank) * n / (n - rank))
    return _estimate(spectrum, variance, variance * unit) if variance > 0 else None


def _evbmf(spectrum: Spectrum) -> Estimate | None:
    """Estimate sigma and rank by the analytic global solution of empirical variational Bayes matrix factorisation.

    With L = p, M = n, alpha = L/M, and x_h = eigenvalue_h / sigma^2, component h is kept where x_h > x_, with
    x_ = (1 + t)(1 + alpha/t) and t the zero of Phi(t) + Phi(t/alpha), Phi(z) = log(z + 1)/z - 1/2. sigma^2 minimises
    the free energy, up to what doesn't depend on it,

        sum_h (x_h + log sigma^2) + sum_{kept h} [log(tau_h + 1) + alpha log(tau_h/alpha + 1) - tau_h],

    tau_h = (x_h - 1 - alpha + sqrt((x_h - 1 - alpha)^2 - 4 alpha)) / 2, on the interval from
    max(eigenvalue_{H+1} / x_, mean of the eigenvalues after the H-th), eigenvalues falling, with
    H = ceil(L/(1 + alpha)) - 1, to the mean of all. The energy is continuous with kinks, so a grid comes before the
    descent.
    Source: Nakajima, Sugiyama, Babacan and Tomioka, "Global analytic solution of fully-observed variational Bayesian
    matrix factorization", JMLR 2013; interval and x_: Nakajima, Tomioka, Sugiyama and Babacan, "Condition for perfect
    dimensionality recovery by variational Bayesian PCA", JMLR 2015.
    """
    values, alpha = spectrum.eigenvalues, spectrum.aspect
    p, limit = len(values), evbmf_threshold(alpha)
    rest = values[: p - (int(np.ceil(p / (1 + alpha))) - 1)]
    high = float(values.mean())
    low = min(max(float(rest[-1]) / limit, float(rest.mean())), high)
    if not low > 0:
        return None

    def energy(log_variance: float) -> float:
        return free_energy(float(np.exp(log_variance)), values, alpha)

    grid = np.linspace(np.log(low), np.log(high), STEPS)
    best = int(np.argmin([energy(at) for at in grid]))
    ends = grid[max(best - 1, 0)], grid[min(best + 1, STEPS - 1)]
    found = scipy.optimize.minimize_scalar(energy, bounds=ends, method="bounded", options={"xatol": 1e-9})
    # At an end of the interval the bounded descent stops a little inside.
    variance = float(np.exp(found.x if found.fun < energy(grid[best]) else grid[best]))
    return _estimate(spectrum, variance, variance * limit)


@lru_cache(maxsize=256)
def evbmf_threshold(alpha: float) -> float:
    """Return x_: how many times sigma^2 an eigenvalue has to exceed for EVBMF to keep it, at aspect alpha in (0, 1]."""

    def phi(z: float) -> float:
        return float(np.log1p(z) / z - 0.5)

    root = float(np.sqrt(alpha))
    zero = scipy.optimize.brentq(lambda t: phi(t) + phi(t / alpha), root, 10 * root, xtol=1e-14)
    return float((1 + zero) * (1 + alpha / zero))


def free_energy(variance: float, eigenvalues: Floats, alpha: float) -> float:
    """Return EVBMF's free energy at a noise variance, up to a constant; see `_evbmf`. Eigenvalues ascending."""
    kept = eigenvalues[np.searchsorted(eigenvalues, variance * evbmf_threshold(alpha), side="right") :]
    b = kept / variance - 1 - alpha
    tau = (b + np.sqrt(b**2 - 4 * alpha)) / 2
    gain = np.log1p(tau) + alpha * np.log1p(tau / alpha) - tau
    return float(eigenvalues.sum() / variance + len(eigenvalues) * np.log(variance) + gain.sum())


def check_levels(alpha: float, beta: float) -> None:
    """Refuse levels that mean nothing.

    Raises:
        RecipeError: alpha is not in [0, 0.5), or beta not in (0, 1).
    """
    if not 0 <= alpha < 0.5:
        raise RecipeError(
            f"alpha is {alpha:g}; expected a share of the eigenvalues to leave out at each end, 0 to 0.5."
        )
    if not 0 < beta < 1:
        raise RecipeError(f"beta is {beta:g}; expected a significance level between 0 and 1.")


def inverse_bbp(eigenvalues: Floats, variance: float, gamma: float) -> Floats:
    """Signal strength behind eigenvalues above the bulk.

    With s^2 the eigenvalue and g the noise variance: theta^2 = (b + sqrt(b^2 - 4 gamma g^2)) / 2 where
    b = s^2 - g (1 + gamma), the inverse of s^2 = (theta^2 + g)(theta^2 + gamma g) / theta^2.
    Source: Benaych-Georges and Nadakuditi, "The singular values and vectors of low rank perturbations", 2012.

    Returns:
        theta^2, on the scale of the eigenvalues; for one inside the bulk, which tells nothing, at most the limit of
        detection sqrt(gamma) g, and never below 0.
    """
    b = eigenvalues - variance * (1 + gamma)
    result: Floats = (b + np.sqrt(np.clip(b**2 - 4 * gamma * variance**2, 0.0, None))) / 2
    return np.clip(result, 0.0, None)
