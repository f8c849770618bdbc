"""Tuning windows whose truth is known, decided by the real rule: how often it promotes what it should not.

A simulated load is put together of pieces of recorded ones, neighbouring requests at their own place in the load, as
they were relative to the mean of their start; times what the configuration is worth; times a factor of the start,
lognormal with the measured deviation between starts. The search is there for its luck alone: the candidate is the best
of many equal trials.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sidecar.config.schema import Config, ConfigError, SearchConfig, Workload
from sidecar.config.slo import Slo
from sidecar.config.window import Promotion
from sidecar.measure.measurement import Measurement
from sidecar.measure.verdict import violation
from sidecar.promote import decision as promotion
from sidecar.record.decisions import DECIDED, Decision, Outcome
from sidecar.record.trial import Plan, Result, Role, Trial

_SEARCHED = 15
_RATE = 12.0
_PIECES = 10


@dataclass(frozen=True)
class Recording:
    """Repeated starts of one configuration. ``shapes``: a row a start, a column a request, each row of mean 1.

    ``noise`` is the standard deviation of the logarithm of their means, which are ``mean_s`` seconds together.
    """

    shapes: NDArray[np.float64]
    mean_s: float
    noise: float

    @property
    def p99_s(self) -> float:
        """As a load of that length shows it, the mean over the starts."""
        return float(np.percentile(self.shapes, 99, axis=1).mean()) * self.mean_s


def recorded(path: Path) -> Recording:
    """Reads what benchmarks/starts.py wrote. Raises ConfigError."""
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
    """``factor`` is what the candidate makes of every latency; the limit is ``limit`` times the incumbent's p99."""

    name: str
    factor: float
    noise: float
    pairs: tuple[int, ...] = Promotion().pairs
    limit: float = 1.5


@dataclass(frozen=True)
class Tally:
    """How ``windows`` windows of one case ended; ``pairs`` is the mean over those that came to a validation."""

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
    config = _config(case, recording)
    outcomes: Counter[Outcome] = Counter()
    pairs: list[int] = []
    for number in range(windows):
        decision = window(case, recording, config, np.random.default_rng([seed, number]))
        outcomes[decision.outcome] += 1
        if decision.candidates:
            pairs.append(len(decision.candidates))
    counts = {str(outcome): outcomes[outcome] for outcome in DECIDED}
    return Tally(case, windows, len(pairs), **counts, pairs=float(np.mean(pairs)) if pairs else 0.0)


def window(case: PromotionScenario, recording: Recording, config: Config, rng: np.random.Generator) -> Decision:
    """One window, from the baseline to the decision."""
    load = partial(_load, recording, case.noise, config.slo, rng)
    measured: dict[Role, Callable[[], Result]] = {
        Role.BASELINE: partial(load, 1.0),
        Role.REFERENCE: partial(load, 1.0),
        Role.SEARCH: partial(load, case.factor),
        Role.VALIDATION: partial(load, case.factor),
    }
    trials: list[Trial] = []

    def attempt(role: Role) -> None:
        number = len(trials) + 1
        trials.append(Trial(1, number, Plan(role, {}, {}, "", ""), number, number + 1.0, measured[role]()))

    for role in (Role.BASELINE, *[Role.SEARCH] * _SEARCHED):
        attempt(role)
    while (turn := promotion.next_role(trials, config)) is not None:
        attempt(turn)
    return promotion.decide(trials, config)


def _load(recording: Recording, noise: float, slo: Slo, rng: np.random.Generator, factor: float) -> Result:
    count, requests = recording.shapes.shape
    chosen = np.repeat(rng.integers(count, size=_PIECES), math.ceil(requests / _PIECES))[:requests]
    shape: NDArray[np.float64] = recording.shapes[chosen, np.arange(requests)]
    latencies_s: NDArray[np.float64] = (
        shape / shape.mean() * recording.mean_s * factor * math.exp(rng.normal(0.0, noise))
    )
    p99_ms, mean_ms = float(np.percentile(latencies_s, 99)) * 1000, float(latencies_s.mean()) * 1000
    measurement = Measurement(
        requests=len(latencies_s),
        failed=0,
        duration_s=len(latencies_s) / _RATE,
        ttft_p99_ms=None,
        itl_p99_ms=None,
        e2e_p99_ms=p99_ms,
        ttft_mean_ms=None,
        e2e_mean_ms=mean_ms,
        goodput_rps=_RATE,
    )
    scores = tuple(map(float, latencies_s))
    return Result(violation=violation(measurement, slo), value=-mean_ms, measurement=measurement, scores=scores)


def _config(case: PromotionScenario, recording: Recording) -> Config:
    return Config(
        model="simulated",
        slo=Slo(e2e_p99_ms=case.limit * recording.p99_s * 1000),
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
        "windows": result.windows,
        "validated": result.validated,
        "promoted": result.promoted,
        "kept": result.kept,
        "worse": result.worse,
        "inconclusive": result.inconclusive,
        "pairs_mean": round(result.pairs, 2),
    }


def power_table(results: Sequence[Tally]) -> str:
    """How much is promoted, by noise and number of pairs: of what is equal, and of what is better by 10%."""
    looks = list(dict.fromkeys(result.case.pairs for result in results))
    lines = [
        ["between starts", *(f"pairs {', '.join(map(str, pairs))}" for pairs in looks)],
        ["---"] * (len(looks) + 1),
    ]
    for noise in dict.fromkeys(result.case.noise for result in results):
        cells = [
            " / ".join(
                f"{r.promoted / r.windows:.1%}" for r in results if (r.case.noise, r.case.pairs) == (noise, pairs)
            )
            for pairs in looks
        ]
        lines.append([f"{noise:.1%}", *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def promotion_table(results: Sequence[Tally]) -> str:
    """One line a case."""
    heads = ["case", "between starts", "validated", "promoted", "no clear winner", "worse", "inconclusive", "pairs"]
    lines = [heads, ["---"] * len(heads)]
    for r in results:
        counts = (r.validated, r.promoted, r.kept, r.worse, r.inconclusive)
        shares = [f"{count / r.windows:.1%}" for count in counts]
        lines.append([r.case.name, f"{r.case.noise:.1%}", *shares, f"{r.pairs:.1f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
