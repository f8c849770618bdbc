"""How much better one configuration is than another, from repeated starts of both. Pure.

The unit of replication is the start: the requests of a load share its queue, and whatever differs between two starts of
an engine (memory layout, clocks, neighbours on the host) affects all of them at once. A test on requests would count
one accident a hundred times.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# scipy is imported where it is needed: it takes longer than most of what a command imports.

# From this many pairs on the log ratio of each pair is tested, which cancels drift slower than a pair. With fewer, the
# degrees of freedom that pairing costs are worth more.
PAIRED_FROM = 8
# Batch means: long enough to hold the correlation of neighbouring requests, and enough of them for a variance.
_BATCHES = 10


def error_level(allowed: float, analyses: Sequence[int], pairs: int, *, last: bool) -> float:
    """The share of the ``allowed`` error that the interim analysis after ``pairs`` pairs may spend.

    By then (pairs / the most pairs)² of it may have been spent in total; the analysis gets what those before it have
    not. The ``last`` one gets all that is left, also where the window ends early. The shares add up to ``allowed``, so
    by Boole's inequality all analyses together err at most that often, whichever test each of them uses.
    """
    before = max((planned for planned in analyses if planned < pairs), default=0)
    spent = 1.0 if last else (pairs / analyses[-1]) ** 2
    return allowed * (spent - (before / analyses[-1]) ** 2)


@dataclass(frozen=True)
class Comparison:
    """The logarithm of candidate over incumbent, with one-sided bounds; above 0 the candidate is better.

    ``p_value`` tests "the candidate is not better"; ``noise`` is the run-to-run spread, relative.
    """

    log_ratio: float
    low: float
    high: float
    p_value: float
    noise: float
    standard_error: float
    freedom: float
    won: int  # pairs in which the candidate was better


def compare(
    incumbent: Sequence[float], candidate: Sequence[float], alpha: float, *, floor: float, request_error: float = 0.0
) -> Comparison:
    """Student's t on logarithms of the objective, a value for each start, higher is better; bounds hold at 1 - alpha.

    Welch's two-sample test with fewer than PAIRED_FROM pairs, the paired test from there on. Needs two pairs. A
    run-to-run spread below ``floor`` is luck, and counts as ``floor``. ``request_error`` is the standard error that the
    choice of requests adds, which all starts share (see request_error).
    """
    from scipy.special import stdtr  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]

    incumbents, candidates, n = np.asarray(incumbent), np.asarray(candidate), len(incumbent)
    if n < PAIRED_FROM:
        variances = [max(float(np.var(logs, ddof=1)), floor**2) for logs in (incumbents, candidates)]
    else:
        variances = [max(float(np.var(candidates - incumbents, ddof=1)), 2 * floor**2)]
    parts = [*((variance / n, n - 1) for variance in variances), (request_error**2, _BATCHES - 1)]
    total = sum(variance for variance, _ in parts)
    # Satterthwaite's degrees of freedom.
    freedom = total**2 / sum(variance**2 / degrees for variance, degrees in parts)
    error = math.sqrt(total)
    estimate = float(np.mean(candidates) - np.mean(incumbents))
    reach = _t(freedom, alpha) * error
    p_value = float(stdtr(freedom, -estimate / error))
    noise = math.sqrt(sum(variances) / 2)
    won = int((candidates > incumbents).sum())
    return Comparison(estimate, estimate - reach, estimate + reach, p_value, noise, error, freedom, won)


def chance_of_success(now: Comparison, share: float, alpha: float, least: float) -> float:
    """The predictive probability that the last analysis finds a log ratio surely above 0 and of at least ``least``.

    ``share`` of the most pairs have been measured, and ``alpha`` is the last analysis's error. The prior is flat: given
    the estimate now, the final one has the variance standard_error² · (1 - share).
    """
    from scipy.special import ndtri, stdtr  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]

    final_error = now.standard_error * math.sqrt(share)
    needed = max(least, -float(ndtri(alpha)) * final_error)
    return float(stdtr(now.freedom, (now.log_ratio - needed) / (now.standard_error * math.sqrt(1 - share))))


def confidence_bounds(values: Sequence[float], alpha: float) -> tuple[float, float]:
    """A lower and an upper bound on the mean of ``values``, each at 1 - ``alpha``; infinite for fewer than two."""
    if len(values) < 2:
        return -math.inf, math.inf
    reach = _t(len(values) - 1, alpha) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    mean = float(np.mean(values))
    return mean - reach, mean + reach


def request_error(incumbent: Sequence[Sequence[float]], candidate: Sequence[Sequence[float]]) -> float:
    """The standard error of the log ratio of the means that comes from the choice of requests.

    ``incumbent`` and ``candidate`` have a row for each start and a column for each request, the same in all; a request
    that is not finite somewhere is left out. Each start is cut into batches of neighbours, as shares of its own mean.
    Variation over batches that all starts share is due to the requests; the rest is noise, which the starts' means
    already contain. Analysis of variance separates the two, and an F test at 95% has to confirm the former. A candidate
    that is better by the same factor for every request adds nothing. 0 where rows differ in length or are too short.
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
