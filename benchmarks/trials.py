"""Compares fifteen trials on ordinary starts, on forked starts, and as the sidecar runs them.

    python benchmarks/trials.py run -c CONFIG --results FILE [--repeats 2] [--ways restart,forked,fast] [--seconds N]
        [--numbers 0 1 2]
    python benchmarks/trials.py report FILE

Run with a Python that has vLLM and this project. CONFIG's knobs must include max_num_seqs, max_num_batched_tokens,
enable_prefix_caching (live) and block_size (cold): the fifteen are three block sizes with five live settings each. The
same load is sent every time. ``restart`` is what a tool does that runs ``vllm serve`` and ``vllm bench serve`` for each
trial: an ordinary engine and a new benchmark client, one after the other. ``forked`` also starts an engine per trial,
but forks it, and keeps the client. ``fast`` is the sidecar: forked if a cold knob changes, else live. One JSON object
per trial is appended to FILE; a later call resumes. The report gives the wall-clock time of each way, whether verdicts
agree, and whether configurations measure the same, relative to the repeats of one way.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from sidecar.config.schema import Config, load_config
from sidecar.measure.load_client import LoadClient
from sidecar.metrics.exporter import Metrics
from sidecar.record.trial import RESULT, Role, StartKind
from sidecar.run.judging import judged_result, load_schedule
from sidecar.search.contract import Proposal
from sidecar.service.wiring import assembled

RESTART, FORKED, FAST = WAYS = "restart", "forked", "fast"
_TRIALS = 15
_RESAMPLES = 10_000


def configurations(config: Config) -> list[dict[str, Any]]:
    """Three groups that differ in a cold knob, each with five that differ in live ones."""
    ranges = {knob.name: knob for knob in config.search.space_knobs()}
    seqs, tokens = (int(ranges[name].high) for name in ("max_num_seqs", "max_num_batched_tokens"))
    live = (
        (seqs, tokens, True),
        (seqs // 2, tokens, True),
        (seqs, tokens // 2, False),
        (seqs // 4, tokens // 2, True),
        (seqs // 8, tokens // 4, False),
    )
    names = ("max_num_seqs", "max_num_batched_tokens", "enable_prefix_caching")
    return [
        {**dict(zip(names, values, strict=True)), "block_size": block}
        for block in ranges["block_size"].choices[:3]
        for values in live
    ]


def run(  # noqa: PLR0917 - one call
    path: Path, results: Path, repeats: int, ways: Sequence[str], numbers: Sequence[int], seconds: float
) -> None:
    """Runs what FILE lacks, for at most this many seconds."""
    deadline = time.monotonic() + seconds
    results.parent.mkdir(parents=True, exist_ok=True)
    results.touch()
    done = {(r["way"], r["repeat"], r["number"]) for r in read(results)}
    for repeat in range(repeats):
        # Back and forth, so that drift of the host is not mistaken for a difference between ways.
        for way in ways if repeat % 2 == 0 else reversed(ways):
            with tempfile.TemporaryDirectory(prefix="sloguard-trials-") as folder:
                _run_way(load_config(path), way, repeat, numbers, Path(folder), done, results, deadline)


def _run_way(  # noqa: PLR0917 - one call
    given: Config,
    way: str,
    repeat: int,
    numbers: Sequence[int],
    folder: Path,
    done: set[tuple[str, int, int]],
    results: Path,
    deadline: float,
) -> None:
    switches = {"forked_trials": way != RESTART, "live_trials": way == FAST, "keep_kernels": way != RESTART}
    engine = given.engine.model_copy(update=switches)
    config = given.model_copy(update={"state": folder / "state", "engine": engine})
    asked = [(n, c) for n, c in enumerate(configurations(config)) if n in numbers]
    todo = [(n, c) for n, c in asked if (way, repeat, n) not in done]
    if not todo or time.monotonic() > deadline:
        return
    with assembled(config, _say, Metrics(config)) as parts, results.open("a") as file:
        parts.runner.act_for(parts.journal.take_over(1))
        for number, knobs in todo:
            if time.monotonic() > deadline:
                return
            began = time.monotonic()
            client_s = _new_client(parts.runner.client) if way == RESTART else 0.0
            proposal = Proposal(knobs, "benchmark", way)
            plan = parts.guard.plan(config.engine.args, proposal, Role.SEARCH)
            raw = parts.runner.run(plan, load_schedule(config, plan.role), lambda: False)
            result = judged_result(raw, plan.role, config)
            told: dict[str, Any] = json.loads(RESULT.dump_json(result))
            del told["scores"]
            row = {
                "way": way,
                "repeat": repeat,
                "number": number,
                "knobs": knobs,
                "args": dict(plan.args),
                "refusal": plan.refusal,
                "seconds": time.monotonic() - began,
                "client_s": client_s,
                "result": told,
            }
            file.write(json.dumps(row) + "\n")
            file.flush()
            _say(f"{way} {repeat} {number}: {result.start} start {result.start_s} value {result.value}")
        # Stopping the last engine is part of the way's time.
        began = time.monotonic()
        parts.runner.release()
        _say(f"{way} {repeat}: released in {time.monotonic() - began:.2f} s")


def _new_client(client: LoadClient) -> float:
    began = time.monotonic()
    client.close()
    client.start()
    client.await_ready(lambda: False)
    return time.monotonic() - began


def read(results: Path) -> list[dict[str, Any]]:
    """The trials of FILE."""
    return [json.loads(line) for line in results.read_text().splitlines()]


def report(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown."""
    ways = [way for way in WAYS if any(r["way"] == way for r in rows)]
    return "\n\n".join((_clock(rows, ways), *(_agreement(rows, *pair) for pair in combinations(ways, 2))))


def _clock(rows: Sequence[Mapping[str, Any]], ways: Sequence[str]) -> str:
    lines = [
        "| way | trials | starts | wall clock a trial, s | client | starting | warm-up | measuring | median start, s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for way in ways:
        mine = [r for r in rows if r["way"] == way]
        client_s = sum(r.get("client_s", 0.0) for r in mine) / len(mine)
        names = ("start_s", "warmup_s", "load_s")
        each = " | ".join(f"{sum(r['result'][name] or 0.0 for r in mine) / len(mine):.1f}" for name in names)
        began = [r["result"] for r in mine if r["result"]["start_s"] is not None]
        starts = {kind: [result["start_s"] for result in began if result["start"] == kind] for kind in StartKind}
        medians = "; ".join(f"{kind} {statistics.median(found):.3g}" for kind, found in starts.items() if found)
        counts = ", ".join(f"{len(found)} {kind}" for kind, found in starts.items() if found)
        wall_s = sum(r["seconds"] for r in mine) / len(mine)
        lines.append(f"| {way} | {len(mine)} | {counts} | {wall_s:.1f} | {client_s:.1f} | {each} | {medians} |")
    lines.append("")
    for way in ways:
        if way != RESTART and RESTART in ways:
            lines.append(_ratio(rows, way))
    return "\n".join(lines)


def _ratio(rows: Sequence[Mapping[str, Any]], way: str) -> str:
    """Means over repeats, so that more repeats of one way carry no extra weight."""
    seconds = {
        of: {number: statistics.mean(r["seconds"] for r in found) for number, found in _by_number(rows, of).items()}
        for of in (RESTART, way)
    }
    both = seconds[RESTART].keys() & seconds[way].keys()
    restart_s, way_s = (sum(seconds[of][number] for number in both) for of in (RESTART, way))
    return (
        f"{len(both)} trials: {restart_s:.0f} s {RESTART}, {way_s:.0f} s {way}, the start of the fork server included:"
        f" {restart_s / way_s:.1f} times less wall clock."
    )


def _by_number(rows: Sequence[Mapping[str, Any]], way: str) -> dict[int, list[Mapping[str, Any]]]:
    mine = [r for r in rows if r["way"] == way]
    return {number: [r for r in mine if r["number"] == number] for number in sorted({r["number"] for r in mine})}


def _agreement(rows: Sequence[Mapping[str, Any]], first: str, second: str) -> str:
    """Mean E2E latencies: medians of repeats, their ratio, its interval over configurations, and the test."""
    import numpy as np
    from scipy.stats import wilcoxon  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]

    ways = {way: _by_number(rows, way) for way in (first, second)}
    lines = [
        f"| configuration | {first}, ms | {second}, ms | ratio | verdicts |",
        "| --- | --- | --- | --- | --- |",
    ]
    logs: dict[int, tuple[float, int, int]] = {}
    same = compared = 0
    for number in sorted(ways[first].keys() & ways[second].keys()):
        of = {way: found[number] for way, found in ways.items()}
        verdicts = {way: "/".join(sorted({_verdict(r) for r in found})) for way, found in of.items()}
        compared += 1
        same += verdicts[first] == verdicts[second]
        values = {way: [ms for r in found if (ms := _mean_ms(r)) is not None] for way, found in of.items()}
        knobs = ", ".join(f"{name} {value}" for name, value in of[first][0]["knobs"].items())
        shown = {way: ", ".join(f"{value:.1f}" for value in found) or "-" for way, found in values.items()}
        ratio = "-"
        if all(values.values()):
            medians = {way: statistics.median(found) for way, found in values.items()}
            log = math.log(medians[second] / medians[first])
            logs[number] = (log, len(values[first]), len(values[second]))
            ratio = f"{math.exp(log):.3f}"
        said = verdicts[first] if verdicts[first] == verdicts[second] else f"{verdicts[first]}, {verdicts[second]}"
        lines.append(f"| {knobs} | {shown[first]} | {shown[second]} | {ratio} | {said} |")
    lines += ["", f"The same verdicts: {same} of {compared}."]
    if not logs:
        return "\n".join(lines)
    of_all = np.array([log for log, _, _ in logs.values()])
    draws = np.random.default_rng(0).choice(of_all, (_RESAMPLES, len(of_all)))
    low, high = np.exp(np.quantile(np.median(draws, axis=1), (0.025, 0.975)))  # pyright: ignore
    middle = math.exp(statistics.median(log for log, _, _ in logs.values()))
    p_value = float(wilcoxon(of_all).pvalue) if len(of_all) > 5 else math.nan  # pyright: ignore
    lines.append(
        f"{second} against {first}: median ratio {middle:.3f} over {len(of_all)}"
        f" configurations, 95% interval {low:.3f} to {high:.3f} (bootstrap), Wilcoxon signed-rank p = {p_value:.2g}."
    )
    noise, freedom = _noise(rows)
    if freedom:
        outside = sum(abs(log) > 1.96 * noise * math.sqrt(1 / n + 1 / m) for log, n, m in logs.values())
        lines.append(
            f"Repeats differ by {math.expm1(noise):.1%} (standard deviation, {freedom} degrees of freedom);"
            f" {outside} of {len(logs)} configurations differ between the ways by more than that explains (95%)."
        )
    return "\n".join(lines)


def _noise(rows: Sequence[Mapping[str, Any]]) -> tuple[float, int]:
    """Standard deviation of the log over repeats of one configuration in one way, and its degrees of freedom."""
    deviations: list[float] = []
    freedom = 0
    for way in WAYS:
        for found in _by_number(rows, way).values():
            logs = [math.log(ms) for r in found if (ms := _mean_ms(r)) is not None]
            if len(logs) > 1:
                deviations += [log - statistics.mean(logs) for log in logs]
                freedom += len(logs) - 1
    return math.sqrt(sum(d * d for d in deviations) / max(freedom, 1)), freedom


def _mean_ms(row: Mapping[str, Any]) -> float | None:
    measurement = row["result"]["measurement"]
    return None if measurement is None else measurement["e2e_mean_ms"]


def _verdict(row: Mapping[str, Any]) -> str:
    if row["refusal"]:
        return "refused"
    if row["result"]["crash"] is not None:
        return "crashed"
    return "feasible" if row["result"]["violation"] == 0 else "infeasible"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run")
    runs.add_argument("-c", "--config", type=Path, required=True)
    runs.add_argument("--results", type=Path, required=True)
    runs.add_argument("--repeats", type=int, default=1)
    runs.add_argument("--ways", default=f"{RESTART},{FAST}", help=",".join(WAYS))
    numbers = range(_TRIALS)
    runs.add_argument("--numbers", nargs="+", type=int, choices=numbers, default=numbers, metavar="N", help="0 to 14")
    runs.add_argument("--seconds", type=float, default=math.inf, help="start no trial after this many")
    reports = commands.add_parser("report")
    reports.add_argument("results", type=Path)
    given = parser.parse_args()
    if given.command == "run":
        run(given.config, given.results, given.repeats, given.ways.split(","), given.numbers, given.seconds)
        print(report(read(given.results)))
    else:
        print(report(read(given.results)))


if __name__ == "__main__":
    main()
