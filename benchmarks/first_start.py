"""Compares the first start after a change of the configuration with later ones, as a validation measures them.

    python benchmarks/first_start.py -c benchmarks/trials_cpu.yaml [--rounds 4] [--arg name=value ...] >> FILE.jsonl
    python benchmarks/first_start.py --summary FILE.jsonl

Run with a Python that has vLLM and this project. A round has four ordinary starts. Before the first and the second, the
compile caches are emptied and the files of the model, vLLM and torch are dropped from the page cache (except for pages
that other processes map):

- ``first``: measured at once;
- ``after a warm start``: the sidecar's own unmeasured start comes before it, on the same empty caches;
- ``later``: one more, for comparison.

One JSON line per measured start.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from sidecar.config.schema import load_config
from sidecar.metrics.exporter import Metrics
from sidecar.record.trial import Plan, Role
from sidecar.run.judging import judged_result, load_schedule
from sidecar.service.wiring import assembled

KINDS = FIRST, WARMED, LATER = "first", "after a warm start", "later"
FIGURES = ("start_s", "warmup_s", "e2e_mean_ms", "ttft_p99_ms", "itl_p99_ms")


def main() -> None:
    """Measures and prints, or prints the summary of a file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-c", "--config", type=Path)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--arg", action="append", default=[], metavar="NAME=VALUE", help="over the configuration's")
    parser.add_argument("--summary", type=Path, metavar="FILE")
    given = parser.parse_args()
    if given.summary:
        print(summary([json.loads(line) for line in given.summary.read_text().splitlines()]))
        return
    changed = {name: yaml.safe_load(value) for name, _, value in (text.partition("=") for text in given.arg)}
    for number in range(1, given.rounds + 1):
        for kinds in ((FIRST,), (WARMED, LATER)):
            with tempfile.TemporaryDirectory(prefix="sloguard-caches-") as caches:
                forget(given.config)
                for kind in kinds:
                    row = measured(given.config, changed, Path(caches), kind)
                    print(json.dumps({"round": number, **row}), flush=True)


def measured(path: Path, changed: dict[str, Any], caches: Path, kind: str) -> dict[str, Any]:
    """One measured start, with its own journal and the compile caches in ``caches``."""
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(path)
        variables = ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR")
        env = {**config.engine.env, **{name: str(caches / name) for name in variables}}
        engine = config.engine.model_copy(update={"env": env})
        config = config.model_copy(update={"state": Path(folder) / "state", "engine": engine})
        plan = Plan(Role.REFERENCE, {}, {**engine.args, **changed}, "start", "first and later starts")
        with assembled(config, lambda text: print(text, file=sys.stderr), Metrics(config)) as parts:
            schedule = load_schedule(config, plan.role)
            raw = parts.runner.run(plan, schedule, lambda: False, warm_start=kind is WARMED)
            result = judged_result(raw, plan.role, config)
    figures = {name: getattr(result.measurement or result, name, getattr(result, name, None)) for name in FIGURES}
    return {"kind": kind, "changed": changed, **figures, "warm_start_s": result.warm_start_s}


def forget(path: Path) -> None:
    """Drops files that a start reads from the page cache."""
    import torch
    import vllm

    folders = [Path(str(load_config(path).model)), *(Path(str(m.__file__)).parent for m in (torch, vllm))]
    for file in _files(folders):
        with suppress(OSError):
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def _files(folders: Iterable[Path]) -> Iterable[Path]:
    return (file for folder in folders for file in folder.rglob("*") if file.is_file())


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """Medians by kind, and the first and the warmed start against the later one of the same round."""
    lines = [f"| start | {' | '.join(FIGURES)} |", f"| --- {'| --- ' * len(FIGURES)}|"]
    for kind in KINDS:
        found = [[row[name] for row in rows if row["kind"] == kind] for name in FIGURES]
        lines.append(f"| {kind} | {' | '.join(f'{statistics.median(values):.4g}' for values in found)} |")
    for kind in (FIRST, WARMED):
        cells = [_against(rows, kind, name) for name in FIGURES]
        lines.append(f"| {kind} / later | {' | '.join(cells)} |")
    return "\n".join(lines)


def _against(rows: Sequence[dict[str, Any]], kind: str, name: str) -> str:
    """The geometric mean of the ratios, with the least and the largest."""
    by_round = {(row["round"], row["kind"]): row[name] for row in rows}
    ratios = [by_round[number, kind] / by_round[number, LATER] for number, found in by_round if found == LATER]
    mean = math.exp(statistics.fmean(map(math.log, ratios)))
    return f"{mean:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


if __name__ == "__main__":
    main()
