"""The Marchenko-Pastur law fitted to a weight matrix: a diagnostic of how much of a layer looks like noise.

Scale: for a matrix W with p = min(rows, cols) and n = max(rows, cols), eigenvalues are those of W^T W / n (squared
singular values over n). If the entries were independent with standard deviation sigma they would follow the law with
aspect gamma = p/n on sigma^2 * [(1 - sqrt gamma)^2, (1 + sqrt gamma)^2]. It decides nothing about a uniform N:M mask.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import scipy.linalg
import scipy.stats
from numpy.typing import NDArray

from mpdeploy.errors import RecipeError, StageFailed

Floats = NDArray[np.float64]
GRID = 20_001


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
