"""A small exact Gaussian process with one lengthscale per knob (Rasmussen & Williams 2006, chapters 2 and 5).

Matérn 5/2 on encoded configurations. Lengthscales and the noise ratio are fitted by greedy coordinate search on grids,
maximising the posterior density with the amplitude integrated out under an inverse-gamma prior. The prior median of the
lengthscales grows with the square root of the number of knobs, which favours simple functions in high dimensions
(Hvarfner et al. 2024, "Vanilla Bayesian optimization performs great in high dimensions").
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from sidecar.search.encoding import Array, Encoding, Indices

_LENGTHS = np.array([0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8])
_NOISES = np.array([0.0005, 0.003, 0.02, 0.1, 0.4])  # noise variance over function variance
_LENGTH_MEDIAN, _LENGTH_SPREAD = 0.4, 1.2  # for one knob; grows with the square root of their number
_NOISE_MEDIAN, _NOISE_SPREAD = 0.01, 2.0
_AMPLITUDE = 1.5  # shape of the inverse-gamma prior
_JITTER = 1e-8
_BORDER = 1e18  # larger than any squared value over the smallest noise
_STEPS, _MORE_STEPS = 12, 5  # maximum fit steps: from the prior, and warm-started from another process


@dataclass(frozen=True)
class Prediction:
    """Mean, and standard deviation of the function itself (without noise), at each point."""

    mean: Array
    sd: Array


@dataclass(frozen=True)
class GaussianProcess:
    """Fitted to values at encoded points. ``noise_sd`` is that of one observation; ``slopes`` are the standard
    deviations of the linear part, per knob, relative to the function's amplitude; ``whitening`` is the inverse of the
    kernel's Cholesky factor; ``log_posterior`` is comparable only between processes fitted to equally many values at
    the same points."""

    encoding: Encoding
    places: Array
    inverse_lengths: Array
    slopes: Array
    offset: float
    amplitude: float
    noise: float
    whitening: Array
    weights: Array
    log_posterior: float

    @property
    def noise_sd(self) -> float:
        """Standard deviation of one observation around the function."""
        return math.sqrt(self.amplitude * self.noise)

    def predict(self, places: Array) -> Prediction:
        """Shape of each: (places,)."""
        kernel = _matern(self.encoding.square_distances(places, self.places, self.inverse_lengths))
        here, there = (places - 0.5) * self.slopes, (self.places - 0.5) * self.slopes
        kernel += here @ there.T
        mean = self.offset + kernel @ self.weights
        half = kernel @ self.whitening.T
        variance = np.maximum(1.0 + np.square(here).sum(axis=1) - np.square(half).sum(axis=1), 1e-6)
        return Prediction(mean, np.sqrt(self.amplitude * variance))


def fit(
    encoding: Encoding,
    places: Array,
    values: Array,
    scale: float,
    *,
    stretch: Array,
    slopes: Array,
    variances: Array | None = None,
    like: GaussianProcess | None = None,
) -> GaussianProcess:
    """Fits a process to ``values`` (shape (n,), at least one) at ``places`` (shape (n, knobs)).

    ``scale`` is the function's expected standard deviation, in the unit of the values; ``stretch`` (shape (knobs,))
    multiplies the expected lengthscales; ``slopes`` (shape (knobs,)) are standard deviations of a linear trend over
    each knob's range, in the unit of the values, 0 for choices. ``variances`` (shape (n,)) add to the noise for values
    that are estimates. ``like`` is a process to warm-start from.
    """
    # The amplitude is integrated out, so the extra variance is relative to the expected one.
    extra = np.zeros(len(values)) if variances is None else variances / scale**2
    expected = np.log(_LENGTH_MEDIAN * math.sqrt(places.shape[1]) * stretch)
    lower = _lower_triangle(len(values))
    squares = np.square(encoding.differences(places, places)).reshape(places.shape[1], -1)[:, lower]
    line = (places - 0.5) * slopes / scale
    lines: Array = (line @ line.T).ravel()[lower]
    first = expected if like is None else -np.log(like.inverse_lengths)
    lengths = np.argmin(np.abs(np.log(_LENGTHS)[:, None] - first), axis=0)
    noise = int(np.argmin(np.abs(np.log(_NOISES / (_NOISE_MEDIAN if like is None else like.noise)))))
    best = -math.inf
    for _ in range(_STEPS if like is None else _MORE_STEPS):
        tried = _variations(lengths, noise)
        scores = _log_posterior(squares, lines, values, extra, scale, expected=expected, tried=tried)
        index = int(np.argmax(scores))
        if scores[index] <= best + 1e-3:
            break
        best = float(scores[index])
        lengths, noise = tried[index, :-1], int(tried[index, -1])
    inverse = 1.0 / _LENGTHS[lengths]
    kernel = _matern((inverse**2) @ squares) + lines
    factor, white = _whitened(kernel[None], values, extra, _NOISES[noise : noise + 1])
    y, ones = white[0]
    offset = float(y @ ones / (ones @ ones))
    residual: Array = y - offset * ones
    n = len(values)
    amplitude = float((residual @ residual / 2 + _AMPLITUDE * scale**2) / (n / 2 + _AMPLITUDE))
    # A solve for many points would start BLAS threads, which contend on a busy machine.
    triangle: Array = factor[0]
    whitening: Array = np.linalg.inv(triangle)
    weights: Array = residual @ whitening
    return GaussianProcess(
        encoding, places, inverse, slopes / scale, offset, amplitude, float(_NOISES[noise]), whitening, weights, best
    )


def _variations(lengths: Indices, noise: int) -> Indices:
    """The current grid indices and every neighbour one step away. Shape (choices, knobs + 1), the noise last."""
    here = np.append(lengths, noise)
    steps = np.concatenate(
        [np.zeros_like(here)[None], np.eye(len(here), dtype=here.dtype), -np.eye(len(here), dtype=here.dtype)]
    )
    most = np.append(np.full(len(lengths), len(_LENGTHS) - 1), len(_NOISES) - 1)
    tried = here + steps
    return tried[((tried >= 0) & (tried <= most)).all(axis=1)]


def _log_posterior(
    squares: Array, lines: Array, values: Array, extra: Array, scale: float, *, expected: Array, tried: Indices
) -> Array:
    """Log posterior of each row of ``tried``, up to a constant. Shape (rows,).

    ``squares`` (shape (knobs, pairs)) and ``lines`` (shape (pairs,)) are of the lower triangle.
    """
    n = len(values)
    lengths, noise = _LENGTHS[tried[:, :-1]], _NOISES[tried[:, -1]]
    kernel = _matern((lengths**-2) @ squares) + lines
    factor, white = _whitened(kernel, values, extra, noise)
    y, ones = white[:, 0], white[:, 1]
    offset = (y * ones).sum(axis=1) / np.square(ones).sum(axis=1)
    misfit = np.square(y - offset[:, None] * ones).sum(axis=1)
    half_log_det = np.log(np.diagonal(factor, axis1=1, axis2=2)).sum(axis=1)
    evidence = -half_log_det - (n / 2 + _AMPLITUDE) * np.log(misfit / 2 + _AMPLITUDE * scale**2)
    surprise = np.square((np.log(lengths) - expected) / _LENGTH_SPREAD).sum(axis=1)
    surprise += np.square(np.log(noise / _NOISE_MEDIAN) / _NOISE_SPREAD)
    return evidence - 0.5 * surprise


def _whitened(kernel: Array, values: Array, extra: Array, noise: Array) -> tuple[Array, Array]:
    """For each kernel plus noise: the Cholesky factor, and its inverse applied to the values and to ones.

    These are the last rows of the factor of the matrix that has both below the kernel, so that no system is solved.
    The kernels' shape is (rows, pairs), of the lower triangle, which is all that the factorisation reads. Shapes
    (rows, n, n) and (rows, 2, n).
    """
    rows, n = len(noise), len(values)
    bordered = np.zeros((rows, n + 2, n + 2))
    flat = bordered.reshape(rows, -1)
    flat[:, _lower_triangle(n, n + 2)] = kernel
    diagonal = flat[:, :: n + 3]
    diagonal[:, :n] += noise[:, None] + (extra + _JITTER)
    diagonal[:, n:] = _BORDER
    bordered[:, n, :n], bordered[:, n + 1, :n] = values, 1.0
    factor: Array = np.linalg.cholesky(bordered)
    return factor[:, :n, :n], factor[:, n:, :n]


@lru_cache(maxsize=64)
def _lower_triangle(n: int, width: int = 0) -> Indices:
    """Flat indices of the lower triangle of an n by n block, in a matrix of that ``width`` (0: n)."""
    row, column = np.tril_indices(n)
    return row * (width or n) + column


def _matern(squared_distance: Array) -> Array:
    """Matérn 5/2 of the squared, scaled distance."""
    root = np.sqrt(5.0 * squared_distance)
    decay = np.exp(-root)
    root += 1.0
    root += (5.0 / 3.0) * squared_distance
    root *= decay
    return root
