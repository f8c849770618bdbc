"""Checks the guard against real vLLM: predicted and reported KV tokens, and whether what it passes starts.

Run with a Python that has vLLM and this project:

    python benchmarks/guard.py cpu|cuda|unseen|compiled|report|bands [--results FILE] [--seconds N]

``unseen`` and ``compiled`` start models on which no constant was fitted. Each case is repaired as the plugin would,
with vLLM's own classes where they can be built: what the guard passes must start, and what it refuses must fail when
forced. For a repaired case, both the given and the repaired arguments are tried. Each engine core runs in a process
forked from this one, which has imported vLLM and never touches a GPU. Results are appended to FILE as JSON lines; a
later run resumes. ``report`` starts nothing: it predicts the recorded starts with the current guard. ``bands`` writes
the worst errors over all recorded starts, by rung, to vllm_sloguard/guard/error_bands.json: the guard's margins. Exits
with 1 if a verdict of the guard was wrong.
"""

import argparse
import contextlib
import importlib
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from guard_cases import MODELS, Case, cpu_cases, cuda_cases
from guard_cases_compiled import COMPILED_MODELS, compiled_cuda_cases
from guard_cases_unseen import UNSEEN_MODELS, unseen_cuda_cases

from sidecar.guard.model_builds import model_of
from vllm_sloguard.crash import classify
from vllm_sloguard.guard import machine
from vllm_sloguard.guard.built_model import BuiltModel, built_model_fields, read_built_model
from vllm_sloguard.guard.evidence import ModelEvidence, Rung
from vllm_sloguard.guard.known_model import KnownModel, known_model
from vllm_sloguard.guard.memory import GIB, Budget, estimate, weights_bytes
from vllm_sloguard.guard.meta_build import load_model_classes
from vllm_sloguard.guard.model_shape import ModelShape
from vllm_sloguard.guard.repair import Repair, RepairStatus
from vllm_sloguard.guard.start_history import Learned, ReportedStart
from vllm_sloguard.knobs import KnobValues

_START_TIMEOUT_S = float(os.environ.get("START_TIMEOUT_S", "240"))
_EXIT_S = 3.0
_FREED_WITHIN_S = 10.0
_LOG_CHARS = 6000
_FOLDER = Path(__file__).parent
RECORDED = tuple(_FOLDER / "results" / f"guard-{name}h200-0.26.jsonl" for name in ("", "unseen-", "compiled-"))
BANDS = _FOLDER.parent / "vllm_sloguard" / "guard" / "error_bands.json"
_CASES = {"cpu": cpu_cases, "cuda": cuda_cases, "unseen": unseen_cuda_cases, "compiled": compiled_cuda_cases}
ALL_MODELS: dict[str, dict[str, Any]] = {**MODELS, **UNSEEN_MODELS, **COMPILED_MODELS}


# What an engine imports later, so that each does not.
_CUDA_IMPORTS = (
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "vllm.v1.worker.gpu.model_runner",
    "vllm.v1.worker.gpu_model_runner",
    "vllm.v1.attention.backends.flash_attn",
    "vllm.v1.attention.backends.mla.flashattn_mla",
    "vllm.v1.attention.backends.mamba2_attn",
    "vllm.model_executor.model_loader.dummy_loader",
    "vllm.model_executor.layers.fused_moe",
    "vllm.model_executor.layers.quantization.fp8",
)


@dataclass(frozen=True)
class Started:
    """vLLM's actual result: ``kv_bytes`` is the KV memory after its profile run, ``parts`` what that measured.

    ``warmed_up`` is false if the start was ended after it had allocated the cache.
    """

    kv_tokens: int | None = None
    kv_bytes: int | None = None
    parts: dict[str, int] = field(default_factory=dict[str, int])
    error: str = ""
    seconds: float = 0.0
    log: str = ""
    warmed_up: bool = True


def start(model: Path, args: KnobValues, timeout_s: float = _START_TIMEOUT_S) -> Started:
    """Starts an engine core in a forked process, and stops it.

    A start that is still warming up after ``timeout_s`` counts with the cache that it has allocated.
    """
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as log, tempfile.NamedTemporaryFile("r") as answer:
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            os.setsid()
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            _engine_core(model, dict(args), Path(answer.name))
        code = _wait(pid, Path(answer.name), timeout_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        seconds = time.monotonic() - began
        found = json.loads(answer.read() or "{}")
        log.seek(0)
        text = log.read()
        said = re.search(r"KV cache size: ([0-9,]+) tokens", text)
        warm = "kv_tokens" in found
        if warm or (said and code == -signal.SIGKILL and "error" not in found):
            tokens = int(said[1].replace(",", "")) if said else found["kv_tokens"]
            return Started(
                tokens, found.get("kv_bytes"), found.get("parts", {}), "", seconds, "" if warm else text, warm
            )
        crash = classify(found.get("error", "") + "\n" + text, phase="starting", exit_code=code)
        error = f"{crash.category}: {crash.evidence[:300]}"
        return Started(None, found.get("kv_bytes"), found.get("parts", {}), error, seconds, text[-_LOG_CHARS:])


def _wait(pid: int, answer: Path, timeout_s: float) -> int:
    """The exit code. A process that has answered is killed if it does not exit, as engines with GPU work may not."""
    deadline = time.monotonic() + timeout_s
    answered = False
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if not answered and '"kv_tokens"' in answer.read_text():
            answered, deadline = True, time.monotonic() + _EXIT_S
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
        load_model_classes(str(model))
        given = EngineArgs(model=str(model), load_format="dummy", skip_tokenizer_init=True, **args)
        config = given.create_engine_config(UsageContext.OPENAI_API_SERVER)
        executor: Any = Executor.get_class(config)
        profile = executor.determine_available_memory

        def determine_available_memory(self: Any) -> list[int]:
            left: list[int] = profile(self)
            found["kv_bytes"] = min(left)
            found["parts"] = _profiled(self)
            answer.write_text(json.dumps(found))
            return left

        executor.determine_available_memory = determine_available_memory
        EngineCore(config, executor, log_stats=False)
        cache: Any = config.cache_config
        found["kv_tokens"] = getattr(cache, "kv_cache_size_tokens", None) or cache.num_gpu_blocks * cache.block_size
    except BaseException as error:  # noqa: BLE001 - the boundary of the forked process
        found["error"] = f"{type(error).__name__}: {error}"
    answer.write_text(json.dumps(found))
    os._exit(0)


def _profiled(executor: Any) -> dict[str, int]:
    """What the profile run of an executor in this process measured, bytes."""
    worker = getattr(getattr(executor, "driver_worker", None), "worker", None)
    runner = getattr(worker, "model_runner", None)
    found = {
        "weights": getattr(runner, "model_memory_usage", None),
        "activations": getattr(worker, "peak_activation_memory", None),
        "non_torch": getattr(worker, "non_torch_memory", None),
        "graphs": getattr(worker, "cudagraph_memory_estimate", None),
        "requested": getattr(worker, "requested_memory", None),
    }
    return {name: int(size) for name, size in found.items() if isinstance(size, int | float)}


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


def tried(case: Case, folder: Path, known: Learned, failures: Path) -> dict[str, Any]:
    """The guard's verdict on a case, and vLLM's result; the ends of failed starts' logs go into ``failures``."""
    model_folder = write_model(case.model, folder)
    seen, model = machine.observe(), model_of(str(model_folder), sys.executable)
    verdict = _verdict(Learned().of_version(_vllm_version()), model, case.args, seen)
    built = model.evidence(verdict.args, seen).built
    row: dict[str, Any] = {
        "key": case.key,
        "model": case.model,
        "args": dict(case.args),
        "tenant_gib": case.tenant_gib,
        "free_gib": round(seen.free_bytes / GIB, 2),
        "total_bytes": seen.total_bytes,
        "kind": seen.kind,
        "source": seen.source,
        **_predictions(verdict, model, seen, known),
        "ran": dict(verdict.args),
        "built": None if built is None else built_model_fields(built),
    }
    ran = start(model_folder, verdict.args)
    row |= {"tokens": ran.kv_tokens, "kv_bytes": ran.kv_bytes, "parts": ran.parts}
    row |= {"error": ran.error, "seconds": round(ran.seconds, 1), "warmed_up": ran.warmed_up}
    row["right"] = (verdict.status is RepairStatus.REFUSED) == bool(ran.error)
    if verdict.status is RepairStatus.REPAIRED:
        _wait_for_memory(seen.free_bytes)
        forced = start(model_folder, case.args)
        row["forced_error"] = forced.error
        ran = replace(ran, log=ran.log + forced.log)
    if ran.log:
        with failures.open("a") as file:
            file.write(f"\n=== {case.key}\n{ran.log}")
    _wait_for_memory(seen.free_bytes)
    return row


def _wait_for_memory(free_bytes: int) -> None:
    """Waits until the device has its memory back, for a while."""
    deadline = time.monotonic() + _FREED_WITHIN_S
    while machine.observe().free_bytes < free_bytes - GIB // 8 and time.monotonic() < deadline:
        time.sleep(0.1)


def write_model(name: str, folder: Path) -> Path:
    """The folder of a model with its config.json."""
    model = folder / name
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps(ALL_MODELS[name]))
    return model


def _verdict(known: Learned, model: KnownModel, args: KnobValues, seen: machine.Machine) -> Repair:
    return known.repairer(model, seen, time.time(), pinned=frozenset(), workload_max_len=None)(args)


def _predictions(verdict: Repair, model: KnownModel, seen: machine.Machine, known: Learned) -> dict[str, Any]:
    """The verdict and the predicted KV tokens: of the guard as it is, by formulas alone, and with earlier starts."""
    args, budget = verdict.args, verdict.budget
    formula = Learned(vllm_version=known.vllm_version).estimator(KnownModel(model.shape)) if model.shape else None
    by_formula = formula(model.shape, args, seen) if formula and model.shape else None
    shape = model.shape_with(args)
    calibrated = known.estimator(model)(shape, args, seen) if known.starts and shape else None
    return {
        "verdict": str(verdict.status),
        "changes": [f"{c.name} {c.before} → {c.after}" for c in verdict.changes],
        "refusal": verdict.refusal,
        "warning": verdict.warning,
        "rung": int(budget.rung) if budget else None,
        "margin_bytes": budget.margin_bytes if budget else None,
        "predicted_tokens": budget.kv_tokens if budget else None,
        "predicted_kv_bytes": budget.kv_bytes if budget else None,
        "formula_tokens": by_formula.kv_tokens if by_formula else None,
        "calibrated_tokens": calibrated.kv_tokens if calibrated else None,
    }


@dataclass(frozen=True)
class RecordedBuild:
    """What vLLM's classes were when a row was recorded."""

    model: BuiltModel

    def built(self, folder: Path, args: Any) -> BuiltModel | None:
        """The recorded model, whatever the arguments: they are the row's."""
        return self.model


def known_of_row(row: dict[str, Any], folder: Path) -> KnownModel:
    """The model of a recorded row, with vLLM's classes as recorded."""
    built = RecordedBuild(read_built_model(row["built"])) if row.get("built") else None
    return known_model(str(write_model(row["model"], folder)), built)


def predicted_again(row: dict[str, Any], rows: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """A recorded case with the current guard's verdict; right if it agrees with vLLM's recorded result."""
    model = known_of_row(row, folder)
    source = row.get("source", "NVML: NVIDIA H200")
    seen = machine.Machine(row["kind"], row["total_bytes"], int(row["free_gib"] * GIB), 1, source)
    verdict = _verdict(Learned(vllm_version="0.26.0"), model, row["args"], seen)
    first = first_start(rows, row["model"])
    known = Learned(vllm_version="0.26.0") if row is first else learned(first, "0.26.0")
    failed = row["forced_error"] if row["verdict"] == "repaired" else row["error"]
    started_as_repaired = row["verdict"] == "repaired" and not row["error"]
    right = verdict.status is not RepairStatus.UNCHANGED if failed else verdict.status is not RepairStatus.REFUSED
    if verdict.status is RepairStatus.REFUSED and started_as_repaired:
        right = False
    as_ran = _verdict(Learned(vllm_version="0.26.0"), model, row["ran"], seen)
    return {
        **row,
        **_predictions(as_ran, model, seen, known),
        "verdict": str(verdict.status),
        "changes": [f"{c.name} {c.before} → {c.after}" for c in verdict.changes],
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
    start = ReportedStart(
        first["ran"],
        first["kind"],
        first["total_bytes"],
        first["kv_bytes"],
        first["tokens"],
        first.get("parts", {}).get("weights"),
    )
    return Learned((start,)).of_version(vllm_version)


def recorded_errors(files: tuple[Path, ...]) -> dict[str, Any]:
    """The contents of error_bands.json: the guard as it is against the recorded starts.

    The checkpoint is taken to hold what vLLM's classes hold, or the formulas. Families that had never been started are
    judged by the predictions made before their start.
    """
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    started = [row for row in rows if row["kv_bytes"] and "kv_cache_memory_bytes" not in row["ran"]]
    shares: dict[Rung, list[float]] = {rung: [] for rung in Rung}
    unusual: list[float] = []
    unknown: dict[bool, list[float]] = {False: [0.0], True: [0.0]}
    with tempfile.TemporaryDirectory() as folder:
        for row in started:
            model = known_of_row(row, Path(folder))
            if model.shape is not None:
                for rung, budget in _budgets(row, model, model.shape, rows):
                    of_kind = unusual if rung is Rung.BUILT and model.shape.unusual else shares[rung]
                    of_kind.append(abs(budget.kv_bytes - row["kv_bytes"]) / budget.fixed_bytes)
                if row.get("parts") and not row["ran"].get("quantization"):
                    missed = row["predicted_kv_bytes"] - row["kv_bytes"]
                    unknown[model.shape.unusual].append(missed / (row["parts"]["activations"] - missed))
    return {
        "rungs": {rung.name.lower(): _worst(found) for rung, found in shares.items()},
        "unusual": _worst(unusual),
        "families": sorted({ALL_MODELS[row["model"]]["model_type"] for row in started}),
        "unknown_family": _rounded_up(max(unknown[False])),
        "unknown_architecture": _rounded_up(max(unknown[True])),
    }


def _budgets(
    row: dict[str, Any], model: KnownModel, shape: ModelShape, rows: list[dict[str, Any]]
) -> Generator[tuple[Rung, Budget]]:
    """The estimates for a row from each rung that has the facts."""
    args = row["ran"]
    seen = machine.Machine(row["kind"], row["total_bytes"], int(row["free_gib"] * GIB), 1, "NVML: NVIDIA H200")
    built = model.evidence(args, seen).built
    if built is not None:
        yield Rung.BUILT, estimate(shape, args, seen, evidence=ModelEvidence(built))
    if shape.ordinary:
        yield Rung.FORMULA, estimate(shape, args, seen)
        weights = built.weights_bytes if built is not None else weights_bytes(shape, args)
        yield Rung.CHECKPOINT, estimate(shape, args, seen, evidence=ModelEvidence(checkpoint_bytes=weights))
    first = first_start(rows, row["model"])
    if first is not None and first is not row:
        calibrated = learned(first, "0.26.0").estimator(model)(shape, args, seen)
        if calibrated is not None and calibrated.rung is Rung.REPORTED:
            yield Rung.REPORTED, calibrated


def _worst(shares: Sequence[float]) -> dict[str, Any]:
    return {"starts": len(shares), "share": _rounded_up(max(shares))}


def _rounded_up(share: float) -> float:
    return math.ceil(share * 1000) / 1000


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
    if not row.get("warmed_up", True):
        outcome = f"warming up when ended after {row['seconds']} s"
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
    for name in ("predicted_tokens", "formula_tokens", "calibrated_tokens"):
        errors = sorted(abs(_off(r, name)) for r in rows if r["tokens"] and r.get(name))
        if errors:
            middle = errors[len(errors) // 2]
            lines.append(f"{name}: largest error {errors[-1]:.2%}, median {middle:.2%}, of {len(errors)} starts.")
    return "\n".join(lines)


def main() -> int:
    """Runs the cases that are not in the results yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device", choices=("cpu", "cuda", "unseen", "compiled", "report", "bands"))
    parser.add_argument("--results", type=Path, default=Path("build/guard.jsonl"))
    parser.add_argument("--seconds", type=float, default=3600.0, help="start no case after this many")
    options = parser.parse_args()
    if options.device == "bands":
        BANDS.write_text(json.dumps(recorded_errors(RECORDED), indent=2) + "\n", encoding="utf-8")
        return 0
    if options.device == "report":
        recorded = [json.loads(line) for line in options.results.read_text().splitlines()]
        with tempfile.TemporaryDirectory() as folder:
            rows = [predicted_again(row, recorded, Path(folder)) for row in recorded]
        print(table(rows), summary(rows), sep="\n\n")
        return 0 if all(row["right"] for row in rows) else 1
    deadline = time.monotonic() + options.seconds
    cases = _CASES[options.device]()
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.touch()
    rows = [json.loads(line) for line in options.results.read_text().splitlines()]
    left = [case for case in cases if all(row["key"] != case.key for row in rows)]
    with tempfile.TemporaryDirectory() as folder:
        building = threading.Thread(target=_build_ahead, args=(left, Path(folder)))
        building.start()
        import_vllm(options.device)
        building.join()  # before the first fork
        for tenant_gib, group in groupby(left, key=lambda case: case.tenant_gib):
            with tenant(tenant_gib):
                for case in group:
                    if time.monotonic() > deadline:
                        break
                    known = learned(first_start(rows, case.model), _vllm_version())
                    rows.append(tried(case, Path(folder), known, options.results.with_suffix(".log")))
                    with options.results.open("a") as file:
                        file.write(json.dumps(rows[-1]) + "\n")
                    print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    print(table(rows), summary(rows), sep="\n\n")
    return 0 if all(row["right"] for row in rows) else 1


def _build_ahead(cases: list[Case], folder: Path) -> None:
    """Has vLLM's classes built for all cases, which keeps the answers on disk."""
    seen = machine.observe()
    for case in cases:
        model_of(str(write_model(case.model, folder)), sys.executable).evidence(case.args, seen)


def import_vllm(device: str) -> None:
    """Done once, before the first fork; engines are forked too, as spawned processes would repeat the imports."""
    # torch.compile would otherwise put the kernels of each start into a new folder.
    os.environ.setdefault("TRITON_CACHE_DIR", str(Path(tempfile.gettempdir()) / "guard-triton"))
    os.environ["SLOGUARD_REPAIR"] = "off"  # otherwise the plugin would repair forced cases
    for name in ("engine.arg_utils", "v1.engine.core", f"v1.worker.{'cpu' if device == 'cpu' else 'gpu'}_worker"):
        importlib.import_module(f"vllm.{name}")
    for name in _CUDA_IMPORTS if device != "cpu" else ():
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for name in ("utils.system_utils", "v1.executor.multiproc_executor"):
        module: Any = importlib.import_module(f"vllm.{name}")
        module.get_mp_context = lambda: multiprocessing.get_context("fork")


if __name__ == "__main__":
    sys.exit(main())
