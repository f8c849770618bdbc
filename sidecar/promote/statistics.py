"""How much better one configuration is than another, from repeated starts of both. Pure.

The unit of replication is the start: the requests of one load share its queue, and everything that differs between one
start of an engine and the next (memory layout, clocks, neighbours on the host) touches all of them at once. A test on
requests would take a hundred echoes of one accident for a hundred observations.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# scipy is imported where it is needed: it takes longer than most of what a command imports.

# Batch means: long enough to hold the correlation of neighbouring requests, and enough of them for a variance.
_BATCHES = 10


@dataclass(frozen=True)
class Comparison:
    """The logarithm of candidate over incumbent, with one-sided bounds; above 0 the candidate is better.

    ``p_value`` is that of "the candidate is not better"; ``noise`` the standard deviation between starts, relative.
    """

    log_ratio: float
    low: float
    high: float
    p_value: float
    noise: float


def welch(
    incumbent: Sequence[float], candidate: Sequence[float], alpha: float, *, floor: float, request_error: float = 0.0
) -> Comparison:
    """Welch's t on logarithms of the objective, one value a start, higher is better; each bound holds at 1 - ``alpha``.

    A deviation between starts below ``floor`` is luck and counts as ``floor``. ``request_error`` is the standard error
    that the choice of requests adds, which all starts share (see request_error). Needs two starts of each.
    """
    from scipy.special import stdtr  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]

    incumbents, candidates = np.asarray(incumbent), np.asarray(candidate)
    variances = [max(float(np.var(logs, ddof=1)), floor**2) for logs in (incumbents, candidates)]
    parts = [
        (variances[0] / len(incumbents), len(incumbents) - 1),
        (variances[1] / len(candidates), len(candidates) - 1),
        (request_error**2, _BATCHES - 1),
    ]
    total = sum(variance for variance, _ in parts)
    # Satterthwaite's degrees of freedom.
    freedom = total**2 / sum(variance**2 / degrees for variance, degrees in parts)
    error = math.sqrt(total)
    estimate = float(np.mean(candidates) - np.mean(incumbents))
    reach = _t(freedom, alpha) * error
    p_value = float(stdtr(freedom, -estimate / error))
    return Comparison(estimate, estimate - reach, estimate + reach, p_value, math.sqrt(sum(variances) / 2))


def confidence_bounds(values: Sequence[float], alpha: float) -> tuple[float, float]:
    """Below and above which the mean of ``values`` lies, each at 1 - ``alpha``; infinite for less than two."""
    if len(values) < 2:
        return -math.inf, math.inf
    reach = _t(len(values) - 1, alpha) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    mean = float(np.mean(values))
    return mean - reach, mean + reach


def request_error(incumbent: Sequence[Sequence[float]], candidate: Sequence[Sequence[float]]) -> float:
    """The standard error of the log ratio of the means that comes from which requests the load has.

    ``incumbent`` and ``candidate`` have one row a start and one column a request, the same in all; a request that is
    not finite somewhere is left out. Each start is cut into batches of neighbours, as shares of its own mean. What
    varies over batches alike in all starts is due to the requests; what does not is noise, which the starts' means have
    already. Analysis of variance parts the two; what an F test at 95% does not tell from noise is none. A candidate
    that is better by the same factor for every request adds nothing. 0 where the rows do not match, or are too few.
    """
    from scipy.special import fdtri  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]

    if len({len(row) for row in (*incumbent, *candidate)}) != 1 or min(len(incumbent), len(candidate)) < 2:
        return 0.0
    rows = np.array([*incumbent, *candidate], dtype=float)
    rows = rows[:, np.isfinite(rows).all(axis=0)]
    if rows.shape[1] < 2 * _BATCHES or not rows.mean(axis=1).all():
        return 0.0
    shares = rows / rows.mean(axis=1, keepdims=True)
    batches = np.stack([batch.mean(axis=1) for batch in np.array_split(shares, _BATCHES, axis=1)], axis=1)
    ours, theirs = batches[: len(incumbent)], batches[len(incumbent) :]
    differences = theirs.mean(axis=0) - ours.mean(axis=0)
    noise = sum(float(np.var(side, axis=0, ddof=1).mean()) / len(side) for side in (ours, theirs))
    spread = float(np.var(differences, ddof=1))
    beyond = noise * float(fdtri(_BATCHES - 1, _BATCHES * (len(rows) - 2), 0.95))
    return math.sqrt((spread - noise) / _BATCHES) if spread > beyond else 0.0


def _t(freedom: float, alpha: float) -> float:
    from scipy.special import stdtrit  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]

    return float(stdtrit(freedom, 1 - alpha))
