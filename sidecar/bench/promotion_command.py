"""`sloguard bench promotion`."""

import json
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Annotated

import typer

from sidecar.bench.windows import Case, Recording, Tally, as_row, power_table, recorded, table, tally

_RECORDED = Path(__file__).parents[2] / "benchmarks/results/starts-cpu-0.32.jsonl"
# The standard deviation of the logarithm of avg_latency_ms, pooled over the 16 configurations that the published
# concurrent runs of the SLO-Guard study (A100) measured more than once: 18 degrees of freedom.
_PUBLISHED_NOISE = 0.0151
# A search trial and its validation on a shared H200 (benchmarks/README.md): |ln(1005 / 1121)| / sqrt(2), one pair.
_H200_NOISE = 0.077
# What may happen at most, or must at least, under measured noise.
_BOUNDS = {"equal": (0.0, 0.02), "10% worse": (0.0, 0.01), "10% better": (0.9, 1.0)}
_FACTORS = {"equal": 1.0, "10% worse": 1.1, "10% better": 0.9}
_LOOKS = ((3,), (3, 5), (3, 5, 8), (3, 5, 8, 12))


def promotion(
    *,
    windows: Annotated[int, typer.Option(min=1, help="Simulated windows of each case.")] = 200,
    starts: Annotated[Path, typer.Option(metavar="FILE", help="Recorded by benchmarks/starts.py.")] = _RECORDED,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """How often the promotion rule errs: simulated windows in which the truth is known, under measured noise.

    In each, the candidate is the best of 15 equal noisy trials; then the rule with its defaults asks for pairs of
    starts, and decides. Exit code 1 when a bound does not hold: promoted is what is equal in at most 2% of the windows,
    what is worse by 10% in at most 1%, what is better by 10% in at least 90%.

    Example: sloguard bench promotion --windows 200
    """
    recording = recorded(starts)
    measured = _measured(recording, windows, seed)
    stated = {"H200, from one pair": _H200_NOISE}
    others = [*_cases(stated, recording, windows, seed), _at_the_limit(recording, windows, seed)]
    power = [
        tally(Case("power", factor, noise, pairs), recording, windows, seed)
        for noise, pairs, factor in product((0.02, 0.05, 0.1), _LOOKS, (1.0, 0.9))
    ]
    broken = [result for result in measured if not _holds(result)]
    if as_json:
        print(
            json.dumps([{**as_row(r), "holds": _holds(r)} for r in measured] + [as_row(r) for r in (*others, *power)])
        )
    else:
        _show(recording, measured, others, power)
    if broken:
        sys.exit(1)


def _measured(recording: Recording, windows: int, seed: int) -> list[Tally]:
    sources = {"the study's A100": _PUBLISHED_NOISE, "recorded starts": recording.noise}
    return _cases(sources, recording, windows, seed)


def _cases(sources: dict[str, float], recording: Recording, windows: int, seed: int) -> list[Tally]:
    return [
        tally(Case(f"{name}: {truth}", factor, noise), recording, windows, seed)
        for (name, noise), (truth, factor) in product(sources.items(), _FACTORS.items())
    ]


def _at_the_limit(recording: Recording, windows: int, seed: int) -> Tally:
    case = Case("recorded starts: equal, p99 at the limit", 1.0, recording.noise, limit=1.0)
    return tally(case, recording, windows, seed)


def _holds(result: Tally) -> bool:
    low, high = _BOUNDS[result.case.name.rpartition(": ")[2]]
    return low <= result.promoted / result.windows <= high


def _show(recording: Recording, measured: Sequence[Tally], others: Sequence[Tally], power: Sequence[Tally]) -> None:
    count, requests = recording.shapes.shape
    print(f"{measured[0].windows} windows a case; loads of {requests} requests, resampled from {count} starts.\n")
    print(table([*measured, *others]))
    print("\nPromoted, by noise between starts and pairs of starts: what is equal / what is better by 10%\n")
    print(power_table(power))
    print()
    for result in measured:
        low, high = _BOUNDS[result.case.name.rpartition(": ")[2]]
        bound = f"at least {low:.0%}" if low else f"at most {high:.0%}"
        verdict = "holds" if _holds(result) else "DOES NOT HOLD"
        print(f"{result.case.name}: {result.promoted / result.windows:.1%} promoted, {bound}: {verdict}")
