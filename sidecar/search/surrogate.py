"""The surrogate: separate models of the objective, of each constraint's margin, and of crashes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sidecar.search.contract import Observation, ObservedStatus
from sidecar.search.crash_risk import CrashRisk
from sidecar.search.encoding import Array, Encoding
from sidecar.search.gaussian_process import GaussianProcess, Prediction, fit
from sidecar.search.latency_priors import EAGER, doubts, expected, slopes, stretch

LATENCY = "latency"
_MAX_POINTS = 24  # that a model is fitted to: those nearest to the search centre
_FARTHEST = 3.0  # cap on log(measured / limit): beyond twenty times the limit all is equally bad
_WORST_LOSS = 0.4  # cap on log(objective / best)
_LOSS_SCALE, _MARGIN_SCALE = 0.15, 0.4
_TRUSTED = 1.0  # prior log odds that the expected effects are right
# Run-to-run standard deviation of log(measured / limit): at least this, and this multiple of the fitted noise.
_MIN_REPEATS_SD, _CAUTION = 0.15, 2.0
# What the search gives up in the objective for a better chance of meeting the SLO again: 0.5% for 1% of it.
_DOUBT_COST = 0.5
# A lower bound on a missed margin is treated as an estimate this far above it.
_ABOVE_BOUND, _BOUND_SD = 0.35, 0.4
_SURELY_MET = -0.1  # log(measured / limit), if only "feasible" was recorded


@dataclass(frozen=True)
class Target:
    """One modelled quantity: a Gaussian process around the prior mean. ``eager`` is latency_priors.eager_effect's.

    ``trust`` is 1 for the knobs whose prior effect is used, and 0 for the others. Shape (knobs,).
    """

    name: str
    process: GaussianProcess
    trust: Array
    eager: float

    def predict(self, places: Array) -> Prediction:
        """Mean and standard deviation. Shape of each: (places,)."""
        around = self.process.predict(places)
        return Prediction(around.mean + self.prior(places), around.sd)

    def prior(self, places: Array) -> Array:
        """The prior mean, up to a constant. Shape (places,)."""
        return self.trust @ expected(self.process.encoding, self.name, places, self.eager)


@dataclass(frozen=True)
class Surrogate:
    """The fitted models.

    ``loss`` is lower for a better objective, None if nothing was measured; ``best_loss`` is the lowest prediction at a
    feasible configuration, None if there was none. ``margins`` are log(measured / limit): below 0 meets the limit.
    ``risk`` is None if crashes are not modelled. ``served`` are the points of the trials with an objective, and
    ``near`` is the point around which the models were fitted.
    """

    loss: Target | None
    margins: tuple[Target, ...]
    risk: CrashRisk | None
    best_loss: float | None
    served: Array
    near: Array

    def log_merit(self, places: Array) -> Array:
        """Log expected improvement, weighted by the probability that every constraint is met. Shape (places,)."""
        margins = self._margins_at(places)
        return self.log_improvement(places, margins) + self.log_meets(places, margins)

    def _margins_at(self, places: Array) -> list[Prediction]:
        return [target.predict(places) for target in self.margins]

    def log_meets(self, places: Array, margins: Sequence[Prediction] | None = None) -> Array:
        """Log probability that every constraint is met. Shape (places,)."""
        total = np.zeros(len(places))
        for target, at in zip(self.margins, margins or self._margins_at(places), strict=True):
            total += _log_normal_cdf(-at.mean / np.hypot(at.sd, 0.5 * target.process.noise_sd))
        return total

    def log_meets_again(self, places: Array) -> Array:
        """Log probability that one more load meets every constraint. Shape (places,).

        A few repeats say little about run-to-run spread, and a slow restart near saturation queues: latencies far above
        the usual are more frequent than a normal distribution says. Hence Student's t with few degrees of freedom.
        """
        total = np.zeros(len(places))
        for target in self.margins:
            at = target.predict(places)
            repeats = max(_CAUTION * target.process.noise_sd, _MIN_REPEATS_SD)
            total += _log_student_cdf(-at.mean / np.hypot(at.sd, repeats))
        return total

    def doubt(self, places: Array, margins: Sequence[Prediction] | None = None) -> Array:
        """What the doubt whether one more load meets the SLO costs, in the unit of the loss. Shape (places,).

        Only run-to-run spread counts here: the uncertainty of the models is for the search to resolve.
        """
        total = np.zeros(len(places))
        for target, at in zip(self.margins, margins or self._margins_at(places), strict=True):
            total -= _log_student_cdf(-at.mean / max(_CAUTION * target.process.noise_sd, _MIN_REPEATS_SD))
        return _DOUBT_COST * total

    def log_serves(self, places: Array) -> Array:
        """Log probability of not crashing. Shape (places,)."""
        if self.risk is None:
            return np.zeros(len(places))
        return np.log1p(-np.minimum(self.risk.probability(places), 0.999))

    def log_improvement(self, places: Array, margins: Sequence[Prediction] | None = None) -> Array:
        """Log expected improvement over the best feasible objective; 0 if there is none yet."""
        if self.loss is None or self.best_loss is None:
            return np.zeros(len(places))
        at = self._with_doubts(self.loss, places)
        z = (self.best_loss - at.mean - self.doubt(places, margins)) / at.sd
        density = np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
        return np.log(np.maximum(density + z * np.exp(_log_normal_cdf(z)), 1e-12)) + np.log(at.sd)

    def _with_doubts(self, loss: Target, places: Array) -> Prediction:
        """The predicted loss. An untried choice is predicted like the choice of ``near``, plus its prior effect and
        extra uncertainty; the process alone would predict the mean of all trials.

        Crashed trials are left to the crash model, and each crash reduces the extra uncertainty, since an untried
        choice may crash too.
        """
        encoding = loss.process.encoding
        new = _absent(encoding, places, self.served)
        around = loss.process.predict(np.where(new, self.near, places))
        crashed = self.risk.crashed if self.risk is not None else places[:0]
        untried = new & _absent(encoding, places, crashed)
        doubt = np.sqrt(untried @ np.square(doubts(encoding))) / (1 + len(crashed))
        return Prediction(around.mean + loss.prior(places), np.hypot(around.sd, doubt))


def learn(
    encoding: Encoding,
    tried: Sequence[Observation],
    places: Array,
    near: Array,
    *,
    risk: CrashRisk | None,
    priors: bool,
    eager: float = EAGER,
) -> Surrogate:
    """Fits the models to the trials that ran, at their encoded ``places``, centred on the point ``near``."""

    def target(name: str, rows: list[int], values: Array, scale: float, sds: Array) -> Target:
        kept = encoding.closest(places[rows], near, _MAX_POINTS)
        there, values, variances = places[rows][kept], values[kept], np.square(sds[kept])
        prior = expected(encoding, name, there, eager)
        lengths = stretch(encoding) if priors else np.ones(there.shape[1])
        # For the objective only: including the constraints made the landscapes worse.
        uncertain = slopes(encoding, name) if priors and name == LATENCY else np.zeros(there.shape[1])

        def fitted(trust: Array, like: GaussianProcess | None = None) -> GaussianProcess:
            around = values - trust @ prior
            return fit(
                encoding, there, around, scale, stretch=lengths, slopes=uncertain, variances=variances, like=like
            )

        trust, *others = _trusts(there, prior) if priors else [np.zeros(there.shape[1])]
        process = fitted(trust)
        for doubted in others:
            other = fitted(doubted, process)
            if other.log_posterior - _TRUSTED > process.log_posterior:
                process, trust = other, doubted
        return Target(name, process, trust, eager)

    margins = tuple(
        target(
            name, list(seen), np.array(list(seen.values()))[:, 0], _MARGIN_SCALE, np.array(list(seen.values()))[:, 1]
        )
        for name, seen in _margins(tried).items()
        if max(m for m, _ in seen.values()) > -_FARTHEST  # a limit met by far everywhere needs no model
    )
    values = {
        row: o.value for row, o in enumerate(tried) if o.value is not None and o.outcome is not ObservedStatus.CRASHED
    }
    if not values:
        return Surrogate(None, margins, risk, None, places, near)
    rows = list(values)
    feasible = np.array([tried[row].outcome is ObservedStatus.FEASIBLE for row in rows])
    losses = losses_of(list(values.values()))
    losses = np.minimum(losses, losses[feasible if feasible.any() else slice(None)].min() + _WORST_LOSS)
    loss = target(LATENCY, rows, losses, _LOSS_SCALE, np.array([tried[row].value_sd for row in rows]))
    if not feasible.any():
        return Surrogate(loss, margins, risk, None, places, near)
    found = Surrogate(loss, margins, risk, None, places[rows], near)
    here = places[rows][feasible]
    return replace(found, best_loss=float((loss.predict(here).mean + found.doubt(here)).min()))


def _trusts(places: Array, prior: Array) -> list[Array]:
    """Which prior effects to use, in order of trust: all of ``prior``, or only those that no trial has tested.

    Trials say nothing about a knob that was constant over all ``places``. Shape of each: (knobs,).
    """
    tested = np.ptp(places, axis=0) > 0
    everything = np.ones(places.shape[1])
    return [everything, everything - tested] if prior[tested].any() else [everything]


def _absent(encoding: Encoding, places: Array, seen: Array) -> NDArray[np.bool_]:
    """Marks choices in ``places`` that occur in none of ``seen``; False for numbers. Shape (places, knobs)."""
    absent = np.zeros(places.shape, dtype=bool)
    for column in np.flatnonzero(encoding.categorical):
        absent[:, column] = ~np.isin(places[:, column], seen[:, column])
    return absent


def losses_of(values: Sequence[float]) -> Array:
    """The values as a loss, lower is better; on a logarithmic scale if all have one sign, so that ratios count."""
    array = np.array(values, dtype=float)
    if (array < 0).all():
        return np.log(-array)
    if (array > 0).all():
        return -np.log(array)
    spread = float(np.ptp(array))
    return -(array / spread) if math.isfinite(spread) and spread > 0 else np.zeros(len(array))


def _margins(tried: Sequence[Observation]) -> dict[str, dict[int, tuple[float, float]]]:
    """log(measured / limit) by constraint and row, with the standard deviation of an estimate; of the total violation
    if no margin was recorded."""
    served = {row: o for row, o in enumerate(tried) if o.outcome is not ObservedStatus.CRASHED}
    names = sorted({name for o in served.values() for name in o.margins or ()})
    if not names and any(o.violation for o in served.values()):
        whole = {row: math.log1p(o.violation) if o.violation else _SURELY_MET for row, o in served.items()}
        return {"violation": {row: (min(margin, _FARTHEST), 0.0) for row, margin in whole.items()}}
    return {
        name: {
            row: _log_margin(o, name, o.margins[name])
            for row, o in served.items()
            if o.margins is not None and name in o.margins
        }
        for name in names
    }


def _log_margin(seen: Observation, name: str, margin: float) -> tuple[float, float]:
    """One margin as model input: its logarithm, and the standard deviation if it is an estimate or a bound."""
    log, sd = math.log(max(1 + margin, 1e-9)), (seen.margin_sds or {}).get(name, 0.0)
    if name in seen.bounds:
        log, sd = log + _ABOVE_BOUND, _BOUND_SD
    return min(max(log, -_FARTHEST), _FARTHEST), sd


def _log_normal_cdf(z: Array) -> Array:
    """Log of the standard normal distribution function."""
    clipped = np.clip(z, -35.0, 35.0)
    return np.array([math.log(0.5 * math.erfc(-x / math.sqrt(2))) for x in clipped])


def _log_student_cdf(t: Array) -> Array:
    """Log of the distribution function of Student's t with three degrees of freedom."""
    x = t / math.sqrt(3)
    return np.log(np.maximum(0.5 + (x / (1 + np.square(x)) + np.arctan(x)) / math.pi, 1e-12))
