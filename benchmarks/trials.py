"""Fifteen trials both ways: each on an ordinary start of its own, and as the sidecar runs them.

    python benchmarks/trials.py run -c CONFIG --results FILE [--repeats 2] [--ways restart,fast] [--seconds N]
    python benchmarks/trials.py report FILE

Run by a Python that has vLLM and this project. CONFIG's knobs must have max_num_seqs, max_num_batched_tokens,
enable_prefix_caching (live) and block_size (cold): the fifteen are three block sizes with five live settings each. The
same load is sent every time, to its end, by the client that stays alive, so that only starts and stops differ. A JSON
object a trial is appended to FILE; a later call goes on where the last one ended. The report gives the wall clock of
each way, whether verdicts agree, and for each configuration the objective both ways: the ratio of live or forked to
restarted, against the ratio of repeats of one way.
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

from sidecar.assembly import assembled
from sidecar.config import Config, load
from sidecar.search.contract import Proposal
from sidecar.trial import RESULT, Role, Start

RESTART, FAST = "restart", "fast"


def configurations(config: Config) -> list[dict[str, Any]]:
    """Three groups that differ in a cold knob, of five that differ in live ones."""
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


def run(path: Path, results: Path, repeats: int, ways: Sequence[str], seconds: float) -> None:
    """Runs what FILE lacks, for at most so many seconds."""
    deadline = time.monotonic() + seconds
    results.parent.mkdir(parents=True, exist_ok=True)
    results.touch()
    done = {(r["way"], r["repeat"], r["number"]) for r in read(results)}
    for repeat in range(repeats):
        for way in ways:
            with tempfile.TemporaryDirectory(prefix="sloguard-trials-") as folder:
                _run_way(load(path), way, repeat, Path(folder), done, results, deadline)


def _run_way(  # noqa: PLR0917 - one call
    given: Config,
    way: str,
    repeat: int,
    folder: Path,
    done: set[tuple[str, int, int]],
    results: Path,
    deadline: float,
) -> None:
    switches = {"forked_trials": way == FAST, "live_trials": way == FAST}
    engine = given.engine.model_copy(update=switches)
    config = given.model_copy(update={"state": folder / "state", "engine": engine})
    todo = [(n, c) for n, c in enumerate(configurations(config)) if (way, repeat, n) not in done]
    if not todo or time.monotonic() > deadline:
        return
    with assembled(config, _say) as parts, results.open("a") as file:
        parts.runner.act_for(parts.journal.take_over(1))
        for number, knobs in todo:
            if time.monotonic() > deadline:
                return
            began = time.monotonic()
            proposal = Proposal(knobs, "benchmark", way)
            plan = parts.guard.plan(config.engine.args, proposal, Role.SEARCH)
            result = parts.runner.run(plan, lambda: False)
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
                "result": told,
            }
            file.write(json.dumps(row) + "\n")
            file.flush()
            _say(f"{way} {repeat} {number}: {result.start} start {result.start_s} value {result.value}")
        # What the last engine's end takes belongs to the way.
        began = time.monotonic()
        parts.runner.release()
        _say(f"{way} {repeat}: released in {time.monotonic() - began:.2f} s")


def read(results: Path) -> list[dict[str, Any]]:
    """The trials of FILE."""
    return [json.loads(line) for line in results.read_text().splitlines()]


def report(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown."""
    return "\n\n".join((_clock(rows), _agreement(rows)))


def _clock(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| way | trials | starts | wall clock a trial, s | starting | warm-up | measuring | a start, median s |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for way in (RESTART, FAST):
        mine = [r for r in rows if r["way"] == way]
        if not mine:
            continue
        names = ("start_s", "warmup_s", "load_s")
        each = {name: sum(r["result"][name] or 0.0 for r in mine) / len(mine) for name in names}
        starts = {kind: [r["result"]["start_s"] for r in mine if r["result"]["start"] == kind] for kind in Start}
        medians = "; ".join(f"{kind} {statistics.median(found):.3g}" for kind, found in starts.items() if found)
        counts = ", ".join(f"{len(found)} {kind}" for kind, found in starts.items() if found)
        wall_s = sum(r["seconds"] for r in mine) / len(mine)
        lines.append(
            f"| {way} | {len(mine)} | {counts} | {wall_s:.1f} | {each['start_s']:.1f} | {each['warmup_s']:.1f} |"
            f" {each['load_s']:.1f} | {medians} |"
        )
    seconds = {(r["way"], r["repeat"], r["number"]): r["seconds"] for r in rows}
    both = {key[1:] for key in seconds if all((way, *key[1:]) in seconds for way in (RESTART, FAST))}
    if both:
        restart_s, fast_s = (sum(seconds[way, *key] for key in both) for way in (RESTART, FAST))
        lines.append("")
        lines.append(
            f"Over the {len(both)} trials that ran both ways: {restart_s:.0f} s against {fast_s:.0f} s, with the start"
            f" of the fork server: {restart_s / fast_s:.1f} times less wall clock."
        )
    return "\n".join(lines)


def _agreement(rows: Sequence[Mapping[str, Any]]) -> str:
    from scipy.stats import wilcoxon  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]

    lines = [
        "| configuration | restarted, ms | live or forked, ms | ratio | verdicts |",
        "| --- | --- | --- | --- | --- |",
    ]
    logs: list[float] = []
    within: list[float] = []
    same = 0
    numbers = sorted({r["number"] for r in rows})
    compared = 0
    for number in numbers:
        by_way = {way: [r for r in rows if r["way"] == way and r["number"] == number] for way in (RESTART, FAST)}
        values = {way: [ms for r in of if (ms := _mean_ms(r)) is not None] for way, of in by_way.items()}
        for repeated in values.values():
            within += [abs(math.log(a / b)) for a, b in combinations(repeated, 2)]
        if not all(values.values()):
            continue
        compared += 1
        medians = {way: statistics.median(found) for way, found in values.items()}
        logs.append(math.log(medians[FAST] / medians[RESTART]))
        verdicts = {way: sorted({_verdict(r) for r in of}) for way, of in by_way.items()}
        same += verdicts[FAST] == verdicts[RESTART]
        knobs = ", ".join(f"{name} {value}" for name, value in by_way[FAST][0]["knobs"].items())
        shown = {way: ", ".join(f"{value:.1f}" for value in found) for way, found in values.items()}
        said = "; ".join(f"{way} {'/'.join(found)}" for way, found in verdicts.items())
        lines.append(f"| {knobs} | {shown[RESTART]} | {shown[FAST]} | {math.exp(logs[-1]):.3f} | {said} |")
    lines.append("")
    if logs:
        p_value = float(wilcoxon(logs).pvalue) if len(logs) > 5 else math.nan  # pyright: ignore
        middle, low, high = (math.exp(of) for of in (statistics.median(logs), min(logs), max(logs)))
        said = "an unknown amount: there were none"
        if within:
            said = f"{math.expm1(statistics.median(within)):.1%} (median), {math.expm1(max(within)):.1%} at most"
        lines.append(
            f"Mean end-to-end latency, live or forked against restarted: median ratio {middle:.3f}, from {low:.3f} to"
            f" {high:.3f} over {len(logs)} configurations (Wilcoxon signed-rank, two-sided, p = {p_value:.2g}). Repeats"
            f" of one way differ by {said}. The same verdicts: {same} of {compared}."
        )
    return "\n".join(lines)


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
    runs.add_argument("--ways", default=f"{RESTART},{FAST}")
    runs.add_argument("--seconds", type=float, default=math.inf, help="no trial is begun after so many")
    reports = commands.add_parser("report")
    reports.add_argument("results", type=Path)
    given = parser.parse_args()
    if given.command == "run":
        run(given.config, given.results, given.repeats, given.ways.split(","), given.seconds)
        print(report(read(given.results)))
    else:
        print(report(read(given.results)))


if __name__ == "__main__":
    main()
