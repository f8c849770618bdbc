"""What the search believes: separate models of the objective, of each constraint's margin, and of crashes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sidecar.search.contract import Observation, ObservedStatus
from sidecar.search.crash_risk import CrashRisk
from sidecar.search.encoding import Array, Encoding
from sidecar.search.gaussian_process import GaussianProcess, Prediction, fit
from sidecar.search.latency_priors import EAGER, doubts, expected, slopes, stretch

LATENCY = "latency"
_MOST_POINTS = 24  # that a model is fitted to: those nearest to where the search stands
_FARTHEST = 3.0  # of log(measured / limit): twenty times the limit is as bad as any
_WORST_LOSS = 0.4  # of the logarithm of the objective against the best: beyond, only that it is bad counts
_LOSS_SCALE, _MARGIN_SCALE = 0.15, 0.4
_TRUSTED = 1.0  # logarithm of the odds that what is expected is right, before any trial
# Of log(measured / limit) between two loads of one configuration: at least this, and the fitted noise times that.
_LEAST_REPEATS_SD, _CAUTION = 0.12, 2.0
# A lower bound on a missed margin is read as an estimate this far above it.
_ABOVE_BOUND, _BOUND_SD = 0.35, 0.4
_SURELY_MET = -0.1  # log(measured / limit), where only "feasible" was recorded


@dataclass(frozen=True)
class Target:
    """One modelled quantity: a Gaussian process around the prior mean. ``eager`` is physics.eager_effect's.

    ``trust`` is 1 for the knobs of which the expected effect counts, and 0 for the others. Shape (knobs,).
    """

    name: str
    process: GaussianProcess
    trust: Array
    eager: float

    def predict(self, places: Array) -> Prediction:
        """Shape of each: (places,)."""
        around = self.process.predict(places)
        return Prediction(around.mean + self.prior(places), around.sd)

    def prior(self, places: Array) -> Array:
        """The prior mean, up to a constant. Shape (places,)."""
        return self.trust @ expected(self.process.encoding, self.name, places, self.eager)


@dataclass(frozen=True)
class Surrogate:
    """What was learned.

    ``loss`` is lower for a better objective, None where nothing was measured; ``best_loss`` is the lowest that it
    predicts where a configuration was feasible, None where none was. ``margins`` are logarithms of what is measured
    over its limit: below 0 is met. ``risk`` is None where crashes are not modelled. ``served`` are the places of the
    trials that gave an objective, and ``near`` is the one around which all was learned.
    """

    loss: Target | None
    margins: tuple[Target, ...]
    risk: CrashRisk | None
    best_loss: float | None
    served: Array
    near: Array

    def log_meets(self, places: Array) -> Array:
        """Logarithm of the probability that every constraint is met. Shape (places,)."""
        total = np.zeros(len(places))
        for target in self.margins:
            at = target.predict(places)
            total += _log_normal_cdf(-at.mean / np.hypot(at.sd, 0.5 * target.process.noise_sd))
        return total

    def log_meets_again(self, places: Array) -> Array:
        """Logarithm of the probability that one more load meets every constraint. Shape (places,).

        Cautious: few repeats say little of the spread between them, and a slower start is amplified by the queue.
        """
        total = np.zeros(len(places))
        for target in self.margins:
            at = target.predict(places)
            repeats = max(_CAUTION * target.process.noise_sd, _LEAST_REPEATS_SD)
            total += _log_normal_cdf(-at.mean / np.hypot(at.sd, repeats))
        return total

    def log_serves(self, places: Array) -> Array:
        """Logarithm of the probability that it does not crash. Shape (places,)."""
        if self.risk is None:
            return np.zeros(len(places))
        return np.log1p(-np.minimum(self.risk.probability(places), 0.999))

    def log_improvement(self, places: Array) -> Array:
        """Logarithm of the expected improvement on the best feasible objective; 0 where there is none yet."""
        if self.loss is None or self.best_loss is None:
            return np.zeros(len(places))
        at = self._with_doubts(self.loss, places)
        z = (self.best_loss - at.mean) / at.sd
        density = np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
        return np.log(np.maximum(density + z * np.exp(_log_normal_cdf(z)), 1e-12)) + np.log(at.sd)

    def _with_doubts(self, loss: Target, places: Array) -> Prediction:
        """The loss, where a choice that nothing served with is taken as the one of ``near``, but for what is expected
        of it, give or take a doubt. The process alone would take it for as bad as the average of what was tried.

        What crashed is left to the crash model, and each crash lowers the doubts: what was never tried may crash too.
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
    """The models after the trials that ran, at their encoded ``places``, as they are around the place ``near``."""

    def target(name: str, rows: list[int], values: Array, scale: float, sds: Array) -> Target:
        kept = encoding.closest(places[rows], near, _MOST_POINTS)
        there, values, variances = places[rows][kept], values[kept], np.square(sds[kept])
        prior = expected(encoding, name, there, eager)
        lengths = stretch(encoding) if priors else np.ones(there.shape[1])
        # Of the objective alone: with those of the constraints, too, the landscapes came out worse.
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
        if max(m for m, _ in seen.values()) > -_FARTHEST  # what is met by far, everywhere, takes no model
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
    return Surrogate(loss, margins, risk, float(loss.predict(places[rows][feasible]).mean.min()), places[rows], near)


def _trusts(places: Array, prior: Array) -> list[Array]:
    """What may be believed of ``prior``, in the order of belief: all of it, or only what no trial has tested.

    Of a knob that stood still at all ``places`` the trials say nothing. Shape of each: (knobs,).
    """
    tested = np.ptp(places, axis=0) > 0
    everything = np.ones(places.shape[1])
    return [everything, everything - tested] if prior[tested].any() else [everything]


def _absent(encoding: Encoding, places: Array, seen: Array) -> NDArray[np.bool_]:
    """Which choices of ``places`` none of ``seen`` has; False for numbers. Shape (places, knobs)."""
    absent = np.zeros(places.shape, dtype=bool)
    for column in np.flatnonzero(encoding.categorical):
        absent[:, column] = ~np.isin(places[:, column], seen[:, column])
    return absent


def losses_of(values: Sequence[float]) -> Array:
    """What is lower for better values: on a logarithmic scale where all have one sign, so that a ratio counts."""
    array = np.array(values, dtype=float)
    if (array < 0).all():
        return np.log(-array)
    if (array > 0).all():
        return -np.log(array)
    spread = float(np.ptp(array))
    return -(array / spread) if math.isfinite(spread) and spread > 0 else np.zeros(len(array))


def _margins(tried: Sequence[Observation]) -> dict[str, dict[int, tuple[float, float]]]:
    """log(measured / limit) by constraint and row, with the standard deviation of an estimate; of the violation as a
    whole if no margin was recorded."""
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
    """One margin as the model takes it: its logarithm, and the standard deviation if it is an estimate or a bound."""
    log, sd = math.log(max(1 + margin, 1e-9)), (seen.margin_sds or {}).get(name, 0.0)
    if name in seen.bounds:
        log, sd = log + _ABOVE_BOUND, _BOUND_SD
    return min(max(log, -_FARTHEST), _FARTHEST), sd


def _log_normal_cdf(z: Array) -> Array:
    """Logarithm of the standard normal distribution function."""
    clipped = np.clip(z, -35.0, 35.0)
    return np.array([math.log(0.5 * math.erfc(-x / math.sqrt(2))) for x in clipped])
