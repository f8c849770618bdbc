"""Simulates tuning windows with known truth under the production rule: how often does it promote wrongly?

A simulated load is assembled from pieces of recorded ones: neighbouring requests at their own position in the load,
relative to the mean of their start. sidecar.measure measures a pool of these once. A trial draws a load from the pool
and multiplies its latencies by the factor of the configuration and by a lognormal factor per restart with the measured
run-to-run spread. sidecar.measure judges the result, sidecar.promote decides. The search only contributes luck: the
candidate is the best of many equal trials.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sidecar.config.schema import Config, ConfigError, SearchConfig, Workload
from sidecar.config.slo import LATENCY_STATISTICS, Slo
from sidecar.config.window import Promotion
from sidecar.measure.measurement import Measurement, measure
from sidecar.measure.requests import LoadResult, RequestResult
from sidecar.measure.verdict import value, violation
from sidecar.promote import decision as promotion
from sidecar.record.decisions import DECIDED, Decision, Outcome
from sidecar.record.trial import VALIDATING, Plan, Result, Role, Trial

_SEARCHED = 15
_RATE = 12.0
_PIECES = 10
# Distinct loads that a trial draws from; the incumbent's true percentiles are averaged over them.
_POOL = 500
# Autocorrelation of the drift from one start to the next.
_PERSISTENCE = 0.8


@dataclass(frozen=True, eq=False)  # hashable by identity: the key of a cache
class Recording:
    """Repeated starts of one configuration. ``shapes``: a row per start, a column per request, each row with mean 1.

    ``noise`` is the standard deviation of the log means; ``mean_s`` is the overall mean in seconds.
    """

    shapes: NDArray[np.float64]
    mean_s: float
    noise: float


def recorded(path: Path) -> Recording:
    """Reads the output of benchmarks/starts.py. Raises ConfigError."""
    try:
        rows = [json.loads(line)["scores"] for line in path.read_text(encoding="utf-8").splitlines()]
        latencies_s = np.array(rows, dtype=float)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--starts: {path}: not a recording of starts: {error}") from None
    good = np.isfinite(latencies_s) & (latencies_s > 0)
    if latencies_s.ndim != 2 or min(latencies_s.shape) < 3 or not good.all():
        raise ConfigError(f"--starts: {path}: at least 3 starts are needed, of as many requests each, none failed")
    means = latencies_s.mean(axis=1)
    noise = float(np.std(np.log(means), ddof=1))
    return Recording(latencies_s / means[:, None], float(means.mean()), noise)


@dataclass(frozen=True)
class PromotionScenario:
    """``factor`` multiplies every latency of the candidate, ``tail`` its distance from the mean.

    Each limit is ``limit`` times the incumbent's own percentile. ``drift`` is the standard deviation of a machine drift
    over starts (AR(1)), relative to ``noise``. The window has room for ``room`` pairs, None for all.
    """

    name: str
    factor: float
    noise: float
    pairs: tuple[int, ...] = Promotion().pairs
    limit: float = 1.5
    tail: float = 1.0
    drift: float = 0.0
    room: int | None = None


@dataclass(frozen=True)
class Tally:
    """Results of ``windows`` windows of one case; ``pairs`` is the mean over those that reached validation."""

    case: PromotionScenario
    windows: int
    validated: int
    promoted: int
    kept: int
    worse: int
    inconclusive: int
    pairs: float


def tally(case: PromotionScenario, recording: Recording, windows: int, seed: int) -> Tally:
    """Simulates the windows."""
    config, loads = _config(case, recording), (_pool(recording, 1.0), _pool(recording, case.tail))
    outcomes: Counter[Outcome] = Counter()
    pairs: list[int] = []
    for number in range(windows):
        machine = _Machine(case, loads, config, np.random.default_rng([seed, number]))
        decision = machine.window()
        outcomes[decision.outcome] += 1
        if decision.candidates:
            pairs.append(len(decision.candidates))
    counts = {str(outcome): outcomes[outcome] for outcome in DECIDED}
    return Tally(case, windows, len(pairs), **counts, pairs=float(np.mean(pairs)) if pairs else 0.0)


@dataclass(frozen=True)
class _MeasuredLoad:
    """A load at factor 1, measured once; only its latencies are used."""

    measurement: Measurement
    latencies_s: NDArray[np.float64]

    def times(self, factor: float, config: Config) -> Result:
        """The load with all latencies multiplied by ``factor``, judged as sidecar.run does by latency."""
        names = (s.name for s in LATENCY_STATISTICS)
        known = {name: ms * factor for name in names if (ms := getattr(self.measurement, name)) is not None}
        measurement = replace(self.measurement, **known)
        return Result(
            violation=violation(measurement, config.slo),
            value=value(measurement, config.objective),
            measurement=measurement,
            scores=tuple((self.latencies_s * factor).tolist()),
        )


@dataclass
class _Machine:
    """One window on one machine, which drifts from start to start."""

    case: PromotionScenario
    loads: tuple[Sequence[_MeasuredLoad], Sequence[_MeasuredLoad]]  # the incumbent's, the candidate's
    config: Config
    rng: np.random.Generator
    drifted: float = 0.0
    trials: list[Trial] = field(default_factory=list[Trial])

    def window(self) -> Decision:
        """Runs the window from the baseline to the decision."""
        for role in (Role.BASELINE, *[Role.SEARCH] * _SEARCHED):
            self._run(role)
        while (role := promotion.next_role(self.trials, self.config)) is not None and self._fits():
            self._run(role)
        return promotion.decide(self.trials, self.config)

    def _fits(self) -> bool:
        if self.case.room is None:
            return True
        measured = sum(t.plan.role in VALIDATING for t in self.trials)
        return measured + promotion.missing(self.trials, self.config) <= 2 * self.case.room

    def _run(self, role: Role) -> None:
        case = self.case
        innovation = case.drift * case.noise * math.sqrt(1 - _PERSISTENCE**2)
        self.drifted = _PERSISTENCE * self.drifted + self.rng.normal(0.0, 1.0) * innovation
        slow = math.exp(self.drifted + self.rng.normal(0.0, case.noise))
        ours = role in (Role.BASELINE, Role.REFERENCE)
        load = self.loads[not ours][int(self.rng.integers(_POOL))]
        number = len(self.trials) + 1
        result = load.times(slow * (1.0 if ours else case.factor), self.config)
        self.trials.append(Trial(1, number, Plan(role, {}, {}, "", ""), number, number + 1.0, result))


def _latencies_s(recording: Recording, rng: np.random.Generator, tail: float) -> NDArray[np.float64]:
    """One load with the mean of the recording."""
    count, requests = recording.shapes.shape
    chosen = np.repeat(rng.integers(count, size=_PIECES), math.ceil(requests / _PIECES))[:requests]
    shape: NDArray[np.float64] = recording.shapes[chosen, np.arange(requests)]
    return np.maximum(1 + (shape / shape.mean() - 1) * tail, 1e-3) * recording.mean_s


@lru_cache(maxsize=8)
def _pool(recording: Recording, tail: float) -> Sequence[_MeasuredLoad]:
    rng, any_slo = np.random.default_rng(0), Slo(e2e_p99_ms=1.0)
    latencies_s = (_latencies_s(recording, rng, tail) for _ in range(_POOL))
    return tuple(_MeasuredLoad(measure(_load(row), any_slo), row) for row in latencies_s)


def _load(latencies_s: NDArray[np.float64]) -> LoadResult:
    requests = tuple(RequestResult(float(s), float(s), (), start_s=n / _RATE) for n, s in enumerate(latencies_s))
    return LoadResult(requests, len(requests) / _RATE)


def _config(case: PromotionScenario, recording: Recording) -> Config:
    """An SLO with limits on three percentiles, relative to the incumbent's own on average."""
    loads = [load.measurement for load in _pool(recording, 1.0)]
    # The mean of the lognormal factor per start.
    mean_factor = math.exp(case.noise**2 * (1 + case.drift**2) / 2)

    def limit_ms(name: str) -> float:
        return case.limit * mean_factor * float(np.mean([getattr(load, name) for load in loads]))

    return Config(
        model="simulated",
        slo=Slo(
            e2e_p90_ms=limit_ms("e2e_p90_ms"), e2e_p95_ms=limit_ms("e2e_p95_ms"), e2e_p99_ms=limit_ms("e2e_p99_ms")
        ),
        workload=Workload(rate=_RATE, requests=recording.shapes.shape[1]),
        search=SearchConfig(knobs={"max_num_seqs": None}, budget=_SEARCHED),
        promotion=Promotion(pairs=case.pairs),
    )


def as_row(result: Tally) -> dict[str, Any]:
    """For JSON."""
    case = result.case
    return {
        "case": case.name,
        "factor": case.factor,
        "noise": case.noise,
        "pairs": list(case.pairs),
        "limit": case.limit,
        "tail": case.tail,
        "drift": case.drift,
        "room": case.room,
        "windows": result.windows,
        "validated": result.validated,
        "promoted": result.promoted,
        "kept": result.kept,
        "worse": result.worse,
        "inconclusive": result.inconclusive,
        "pairs_mean": round(result.pairs, 2),
    }


def power_table(results: Sequence[Tally]) -> str:
    """Share promoted by spread and planned analyses, with the mean number of pairs: equal and 10% better candidates."""
    plans = list(dict.fromkeys(result.case.pairs for result in results))
    lines = [
        ["run-to-run spread", *(f"pairs {', '.join(map(str, pairs))}" for pairs in plans)],
        ["---"] * (len(plans) + 1),
    ]
    for noise in dict.fromkeys(result.case.noise for result in results):
        cells = [
            " / ".join(
                f"{r.promoted / r.windows:.1%} ({r.pairs:.1f})"
                for r in results
                if (r.case.noise, r.case.pairs) == (noise, pairs)
            )
            for pairs in plans
        ]
        lines.append([f"{noise:.1%}", *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def promotion_table(results: Sequence[Tally]) -> str:
    """One line per case."""
    heads = ["case", "run-to-run spread", "validated", "promoted", "no clear winner", "worse", "inconclusive", "pairs"]
    lines = [heads, ["---"] * len(heads)]
    for r in results:
        counts = (r.validated, r.promoted, r.kept, r.worse, r.inconclusive)
        shares = [f"{count / r.windows:.1%}" for count in counts]
        lines.append([r.case.name, f"{r.case.noise:.1%}", *shares, f"{r.pairs:.1f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
