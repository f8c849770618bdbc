"""Measures the time that early stopping saves, and checks that it stops no load that would have met its SLO.

    python benchmarks/early_stop.py [--loads FILE]

Replays recorded loads (benchmarks/recorded_loads.py) as the sidecar would have watched them, under its own rules: with
the recorded number of requests fixed, and with the number left to the sequential test. The verdict on the full load is
the truth. Each load that missed its SLO is judged a second time, with limits 25 % above its results, so that it only
just meets them, with the growth it had.

The constants of the rules were set before the loads were recorded: those of the arithmetic follow from the SLO, those
of the sequential test from the promised error rates, and those of the trend were chosen on a simulated queue (M/M/1,
100 loads at each of 80, 90, 95, 100, 130 and 200 % of its capacity). They were changed once after an earlier set of the
model's loads had been replayed, so the recorded loads are not fully held out.
"""

import argparse
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from recorded_loads import Recorded, read
from rich.console import Console
from rich.table import Table

from sidecar.config.slo import Slo
from sidecar.measure import verdict
from sidecar.measure.early_stop import Rules
from sidecar.measure.measurement import measure
from sidecar.measure.partial_load import EarlyStop
from sidecar.measure.requests import Ending, InFlight, LoadProgress, LoadResult, RequestResult

LOADS = Path(__file__).parent / "results" / "early-stop-loads.jsonl"
CONFIDENCE = 0.98
_TICK_S = 0.25  # the client's


@dataclass(frozen=True)
class Outcome:
    """One load: whether it met its SLO, its full duration, and when and how it would have been ended."""

    recorded: Recorded
    met: bool
    violation: float
    full_s: float
    ended_s: float
    ending: Ending | None

    @property
    def stopped(self) -> bool:
        """Whether it was stopped as one that misses its SLO."""
        return isinstance(self.ending, EarlyStop)

    @property
    def reason(self) -> str:
        """The ending in a word or two."""
        if self.ending is None:
            return "to the end"
        return str(self.ending.reason) if isinstance(self.ending, EarlyStop) else str(self.ending.how)


def replay(recorded: Recorded, *, fixed: bool) -> Outcome:
    """``recorded`` under the stop rules of a search trial."""
    slo, requests = recorded.slo, recorded.requests
    ends = [_end(r) for r in requests]
    full_s = max(ends)
    violation = verdict.violation(measure(LoadResult(requests, full_s), slo), slo)
    workload = recorded.workload.model_copy(update={"requests": len(requests) if fixed else None})
    rules = Rules(slo, workload, CONFIDENCE)
    ended_s, ending = full_s, None
    for tick in range(1, math.ceil(full_s / _TICK_S)):
        ending = rules(progress_at(requests, tick * _TICK_S))
        if ending is not None:
            ended_s = tick * _TICK_S
            if not isinstance(ending, EarlyStop):
                # Requests in flight are awaited.
                ended_s = max(end for r, end in zip(requests, ends, strict=True) if (r.start_s or 0.0) <= ended_s)
            break
    return Outcome(recorded, violation == 0, violation, full_s, ended_s, ending)


def eased(recorded: Recorded) -> Recorded:
    """``recorded`` with limits that it only just meets."""
    measured = measure(LoadResult(recorded.requests, 1.0), recorded.slo)
    names = ("ttft_p99_ms", "itl_p99_ms", "e2e_p99_ms")
    limits = {name: 1.25 * shown for name in names if (shown := getattr(measured, name)) is not None}
    kept = {name: limit for name, limit in limits.items() if getattr(recorded.slo, name) is not None}
    return replace(recorded, name=f"{recorded.name}, eased", slo=Slo(**kept))


def progress_at(requests: Sequence[RequestResult], now_s: float) -> LoadProgress:
    """The client's report of ``requests`` at ``now_s``."""
    finished = tuple(r for r in requests if _end(r) <= now_s)
    flying = [r for r in requests if (r.start_s or 0.0) <= now_s < _end(r)]
    return LoadProgress(now_s, len(requests), finished, tuple(_flying(r, now_s) for r in flying))


def _flying(request: RequestResult, now_s: float) -> InFlight:
    start_s = request.start_s or 0.0
    begun = request.ttft_s is not None and start_s + request.ttft_s <= now_s
    return InFlight(start_s, request.ttft_s if begun else None)


def _end(request: RequestResult) -> float:
    return (request.start_s or 0.0) + (request.e2e_s or 0.0)


def replays(loads: Sequence[Recorded], *, fixed: bool) -> list[Outcome]:
    """Each load with its own limits, then each that missed with limits that it only just meets."""
    strict = [replay(recorded, fixed=fixed) for recorded in loads]
    return strict + [replay(eased(o.recorded), fixed=fixed) for o in strict if not o.met]


def report(console: Console, outcomes: Sequence[Outcome], title: str) -> None:
    """One line per kind of load, and the counts of endings."""
    table = Table("loads", "number", "stopped", "full, s", "run, s", "saved", "of a load", title=title, box=None)
    kinds = [(met, source) for met in (False, True) for source in dict.fromkeys(o.recorded.source for o in outcomes)]
    for met, source in kinds:
        mine = [o for o in outcomes if o.met is met and o.recorded.source == source]
        full, ran = sum(o.full_s for o in mine), sum(o.ended_s for o in mine)
        saved = sorted(1 - o.ended_s / o.full_s for o in mine)
        table.add_row(
            f"{'met' if met else 'missed'}, {source}",
            str(len(mine)),
            str(sum(o.stopped for o in mine)),
            f"{full:.0f}",
            f"{ran:.0f}",
            f"{1 - ran / full:.0%}",
            f"{statistics.median(saved):.0%}, {saved[0]:.0%} to {saved[-1]:.0%}",
        )
    console.print(table)
    for met in (False, True):
        ends = Counter(o.reason for o in outcomes if o.met is met)
        console.print(f"{'met' if met else 'missed'}: " + ", ".join(f"{n} {why}" for why, n in ends.most_common()))


def main() -> int:
    """Prints both tables; exit code 1 if a load that met its SLO would have been stopped with a fixed size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loads", type=Path, default=LOADS)
    loads = read(parser.parse_args().loads)
    console = Console()
    wrong = 0
    for fixed, title in ((True, "as many requests as were recorded"), (False, "as many requests as are needed")):
        outcomes = replays(loads, fixed=fixed)
        report(console, outcomes, title)
        false = [o for o in outcomes if o.met and o.stopped]
        for o in false:
            console.print(f"stopped, and would have met its SLO: {o.recorded.name}: {o.ending}")
        wrong += len(false)
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
