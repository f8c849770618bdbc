"""The current guard against 70 recorded starts of vLLM 0.26 on an H200 (benchmarks/guard.py)."""

import json
from pathlib import Path
from typing import Any

import pytest
from guard_cases import MODELS
from guard_models import with_checkpoint

from vllm_sloguard.guard.machine import Machine
from vllm_sloguard.guard.memory import GIB, estimate
from vllm_sloguard.guard.model_shape import from_config
from vllm_sloguard.guard.repair import RepairStatus, repair
from vllm_sloguard.guard.start_history import Learned, ReportedStart

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
ROWS: list[dict[str, Any]] = [
    json.loads(line) for line in (BENCHMARKS / "results/guard-h200-0.26.jsonl").read_text().splitlines()
]
STARTED = [row for row in ROWS if row["tokens"]]


def machine(row: dict[str, Any]) -> Machine:
    return Machine("cuda", row["total_bytes"], int(row["free_gib"] * GIB), 1, "NVML: NVIDIA H200")


def name(row: dict[str, Any]) -> str:
    return f"{row['model']}-{row['args']}-{row['tenant_gib']}"


@pytest.mark.parametrize("row", STARTED, ids=name)
def test_kv_tokens(row: dict[str, Any]) -> None:
    shape = from_config(MODELS[row["model"]])
    budget = estimate(shape, row["ran"], machine(row))
    assert budget.starts, budget.reason
    # Of a rank that holds 3 to 70 GiB, whatever is left for the KV cache.
    assert abs(budget.kv_bytes - row["kv_bytes"]) < 0.11 * GIB
    if row["kv_bytes"] > 2 * GIB:
        assert abs(budget.kv_tokens / row["tokens"] - 1) < 0.02


@pytest.mark.parametrize("row", STARTED, ids=name)
def test_kv_tokens_once_calibrated_by_the_first_start_of_the_model(row: dict[str, Any]) -> None:
    shape = from_config(MODELS[row["model"]])
    first = next(r for r in STARTED if r["model"] == row["model"] and "kv_cache_memory_bytes" not in r["ran"])
    learned = Learned((ReportedStart(first["ran"], "cuda", first["total_bytes"], first["kv_bytes"], first["tokens"]),))
    budget = learned.estimate(shape, row["ran"], machine(row))
    if row["kv_bytes"] > 2 * GIB:
        assert abs(budget.kv_tokens / row["tokens"] - 1) < 0.012


@pytest.mark.parametrize("row", ROWS, ids=name)
def test_verdict(row: dict[str, Any]) -> None:
    """Arguments that failed to start are not passed unchanged; arguments that started are not refused."""
    verdict = repair(row["args"], from_config(MODELS[row["model"]]), machine(row), estimate=with_checkpoint)
    given_failed = row["forced_error"] if row["verdict"] == "repaired" else row["error"]
    if given_failed:
        assert verdict.status is not RepairStatus.UNCHANGED
    else:
        assert verdict.status is not RepairStatus.REFUSED
