"""Checks the guard against real vLLM: predicted and reported KV tokens, and whether what it passes starts.

Run with a Python that has vLLM and this project:

    python benchmarks/guard.py cpu|cuda|report [--results FILE] [--seconds N]

Each case is repaired as the plugin would: what the guard passes must start, and what it refuses must fail when forced.
For a repaired case, both the given and the repaired arguments are tried. Each engine core runs in a process forked from
this one, which has imported vLLM and never touches a GPU. Results are appended to FILE as JSON lines; a later run
resumes. ``report`` starts nothing: it predicts the recorded starts with the current guard. Exits with 1 if a verdict of
the guard was wrong.
"""

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from guard_cases import MODELS, Case, cpu_cases, cuda_cases

from vllm_sloguard.crash import classify
from vllm_sloguard.guard import machine, memory, model_shape
from vllm_sloguard.guard.memory import GIB
from vllm_sloguard.guard.repair import RepairStatus, repair
from vllm_sloguard.guard.start_history import Learned, ReportedStart, version
from vllm_sloguard.knobs import KnobValues

_START_TIMEOUT_S = 240.0


@dataclass(frozen=True)
class Started:
    """vLLM's actual result; ``kv_bytes`` is the KV memory after its profiling pass."""

    kv_tokens: int | None = None
    kv_bytes: int | None = None
    error: str = ""
    seconds: float = 0.0


def start(model: Path, args: KnobValues) -> Started:
    """Starts an engine core in a forked process, and stops it."""
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as log, tempfile.NamedTemporaryFile("r") as answer:
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            os.setsid()
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            _engine_core(model, dict(args), Path(answer.name))
        code = _wait(pid)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        seconds = time.monotonic() - began
        found = json.loads(answer.read() or "{}")
        log.seek(0)
        text = log.read()
        if "kv_tokens" in found:
            said = re.search(r"KV cache size: ([0-9,]+) tokens", text)
            tokens = int(said[1].replace(",", "")) if said else found["kv_tokens"]
            return Started(tokens, found["kv_bytes"], "", seconds)
        crash = classify(found.get("error", "") + "\n" + text, phase="starting", exit_code=code)
        return Started(None, found.get("kv_bytes"), f"{crash.category}: {crash.evidence[:300]}", seconds)


def _wait(pid: int) -> int:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -signal.SIGKILL


def _engine_core(model: Path, args: dict[str, Any], answer: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.executor import Executor

    found: dict[str, Any] = {}
    try:
        given = EngineArgs(model=str(model), load_format="dummy", skip_tokenizer_init=True, **args)
        config = given.create_engine_config(UsageContext.OPENAI_API_SERVER)
        executor: Any = Executor.get_class(config)
        profile = executor.determine_available_memory

        def determine_available_memory(self: Any) -> list[int]:
            left: list[int] = profile(self)
            found["kv_bytes"] = min(left)
            return left

        executor.determine_available_memory = determine_available_memory
        EngineCore(config, executor, log_stats=False)
        cache: Any = config.cache_config
        found["kv_tokens"] = getattr(cache, "kv_cache_size_tokens", None) or cache.num_gpu_blocks * cache.block_size
    except BaseException as error:  # noqa: BLE001 - the boundary of the forked process
        found["error"] = f"{type(error).__name__}: {error}"
    answer.write_text(json.dumps(found))
    os._exit(0)


@contextlib.contextmanager
def tenant(gib: float) -> Generator[None]:
    """Another process that holds ``gib`` of the first GPU."""
    if not gib:
        yield
        return
    hold = f"x = torch.empty(int({gib} * 2**30), dtype=torch.uint8, device='cuda')"
    code = f"import torch, sys; {hold}; print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        try:
            yield
        finally:
            holder.kill()


def tried(case: Case, folder: Path, known: Learned) -> dict[str, Any]:
    """The guard's verdict on a case, and vLLM's result."""
    model = folder / case.model
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps(MODELS[case.model]))
    shape, seen = model_shape.read_shape(model), machine.observe()
    cold = Learned().of_version(_vllm_version())
    verdict = repair(case.args, shape, seen, estimate=cold.estimate, vllm_version=version(_vllm_version()))
    row: dict[str, Any] = {
        "key": case.key,
        "model": case.model,
        "args": dict(case.args),
        "tenant_gib": case.tenant_gib,
        "free_gib": round(seen.free_bytes / GIB, 2),
        "total_bytes": seen.total_bytes,
        "kind": seen.kind,
        "verdict": str(verdict.status),
        "changes": [f"{c.name} {c.before} → {c.after}" for c in verdict.changes],
        "refusal": verdict.refusal,
        "ran": dict(verdict.args),
        "predicted_tokens": verdict.budget.kv_tokens if verdict.budget else None,
        "calibrated_tokens": known.estimate(shape, verdict.args, seen).kv_tokens if known.starts else None,
    }
    ran = start(model, verdict.args)
    row |= {"tokens": ran.kv_tokens, "kv_bytes": ran.kv_bytes, "error": ran.error, "seconds": round(ran.seconds, 1)}
    row["right"] = (verdict.status is RepairStatus.REFUSED) == bool(ran.error)
    if verdict.status is RepairStatus.REPAIRED:
        row["forced_error"] = start(model, case.args).error
    return row


def predicted_again(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A recorded case with the current guard's verdict; right if it agrees with vLLM's recorded result."""
    shape = model_shape.from_config(MODELS[row["model"]])
    seen = machine.Machine(row["kind"], row["total_bytes"], int(row["free_gib"] * GIB), 1, "NVML: NVIDIA H200")
    verdict = repair(row["args"], shape, seen)
    first = first_start(rows, row["model"])
    known = learned(first, "0.26.0")
    failed = row["forced_error"] if row["verdict"] == "repaired" else row["error"]
    started_as_repaired = row["verdict"] == "repaired" and not row["error"]
    right = verdict.status is not RepairStatus.UNCHANGED if failed else verdict.status is not RepairStatus.REFUSED
    if verdict.status is RepairStatus.REFUSED and started_as_repaired:
        right = False
    return {
        **row,
        "verdict": str(verdict.status),
        "changes": [f"{c.name} {c.before} → {c.after}" for c in verdict.changes],
        "predicted_tokens": memory.estimate(shape, row["ran"], seen).kv_tokens,
        "calibrated_tokens": None if row is first else known.estimate(shape, row["ran"], seen).kv_tokens,
        "right": right,
        "tried": dict(verdict.args) == row["ran"],
        "forced_error": failed,
    }


def first_start(rows: list[dict[str, Any]], model: str) -> dict[str, Any] | None:
    """The first row of ``model`` that started, None if none did."""
    return next((row for row in rows if row["model"] == model and row["tokens"] and row["kv_bytes"]), None)


def learned(first: dict[str, Any] | None, vllm_version: str) -> Learned:
    """The first start of a model, which calibrates the rest."""
    if first is None:
        return Learned()
    start = ReportedStart(first["ran"], first["kind"], first["total_bytes"], first["kv_bytes"], first["tokens"])
    return Learned((start,)).of_version(vllm_version)


def _vllm_version() -> str:
    import vllm

    return vllm.__version__


def table(rows: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = [
        "| model | arguments (eager unless said) | tenant, GiB | guard | predicted KV tokens | calibrated | reported"
        " | error | vLLM |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        args = " ".join(f"{name}={value}" for name, value in r["args"].items() if name != "enforce_eager")
        args += "" if r["args"].get("enforce_eager") else " (compiled)"
        guard = r["verdict"] + (f": {'; '.join(r['changes'])}" if r["changes"] else "")
        guard += "" if r["right"] else " **wrong**"
        numbers = [f"{n:,}" if n else "" for n in (r["predicted_tokens"], r["calibrated_tokens"], r["tokens"])]
        off = f"{_off(r, 'predicted_tokens'):+.2%}" if r["tokens"] and r["predicted_tokens"] else ""
        cells = (r["model"], args, f"{r['tenant_gib']:g}", guard, *numbers, off, _outcome(r))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _outcome(row: dict[str, Any]) -> str:
    outcome = row["error"][:75] if row["error"] else f"started in {row['seconds']} s"
    if row["verdict"] == "repaired" and "forced_error" in row:
        outcome += f"; as given: {row['forced_error'][:75] or 'starts too'}"
    return outcome.replace("|", "/")


def _off(row: dict[str, Any], name: str) -> float:
    return row[name] / row["tokens"] - 1


def summary(rows: list[dict[str, Any]]) -> str:
    """The summary lines."""
    passed = [r for r in rows if r["verdict"] != "refused"]
    refused = [r for r in rows if r["verdict"] == "refused"]
    lines = [
        f"{len(rows)} configurations: {len(passed)} passed, of which {sum(not r['right'] for r in passed)} failed;"
        f" {len(refused)} refused, of which {sum(not r['right'] for r in refused)} started when forced;"
        f" {sum(r['verdict'] == 'repaired' and not r.get('forced_error') for r in rows)} repaired that start as given;"
        f" {sum(not r.get('tried', True) for r in rows)} as repaired now were never started."
    ]
    for name in ("predicted_tokens", "calibrated_tokens"):
        errors = sorted(abs(_off(r, name)) for r in rows if r["tokens"] and r[name])
        if errors:
            middle = errors[len(errors) // 2]
            lines.append(f"{name}: largest error {errors[-1]:.2%}, median {middle:.2%}, of {len(errors)} starts.")
    return "\n".join(lines)


def main() -> int:
    """Runs the cases that are not in the results yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device", choices=("cpu", "cuda", "report"))
    parser.add_argument("--results", type=Path, default=Path("build/guard.jsonl"))
    parser.add_argument("--seconds", type=float, default=3600.0, help="start no case after this many")
    options = parser.parse_args()
    if options.device == "report":
        recorded = [json.loads(line) for line in options.results.read_text().splitlines()]
        rows = [predicted_again(row, recorded) for row in recorded]
        print(table(rows), summary(rows), sep="\n\n")
        return 0 if all(row["right"] for row in rows) else 1
    deadline = time.monotonic() + options.seconds
    _import_vllm(options.device)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.touch()
    rows = [json.loads(line) for line in options.results.read_text().splitlines()]
    with tempfile.TemporaryDirectory() as folder:
        cases = cpu_cases() if options.device == "cpu" else cuda_cases()
        left = [case for case in cases if all(row["key"] != case.key for row in rows)]
        for tenant_gib, group in groupby(left, key=lambda case: case.tenant_gib):
            with tenant(tenant_gib):
                for case in group:
                    if time.monotonic() > deadline:
                        break
                    rows.append(tried(case, Path(folder), learned(first_start(rows, case.model), _vllm_version())))
                    with options.results.open("a") as file:
                        file.write(json.dumps(rows[-1]) + "\n")
                    print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    print(table(rows), summary(rows), sep="\n\n")
    return 0 if all(row["right"] for row in rows) else 1


def _import_vllm(device: str) -> None:
    """Done once, before the first fork; engines are forked too, as spawned processes would repeat the imports."""
    os.environ["SLOGUARD_REPAIR"] = "off"  # otherwise the plugin would repair forced cases
    for name in ("engine.arg_utils", "v1.engine.core", f"v1.worker.{'cpu' if device == 'cpu' else 'gpu'}_worker"):
        importlib.import_module(f"vllm.{name}")
    for name in ("utils.system_utils", "v1.executor.multiproc_executor"):
        module: Any = importlib.import_module(f"vllm.{name}")
        module.get_mp_context = lambda: multiprocessing.get_context("fork")


if __name__ == "__main__":
    sys.exit(main())
