"""A configuration file, trials made in one line, and a wait, for the tests of the sidecar."""

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from sidecar.config.schema import Config, load_config
from sidecar.measure.measurement import Measurement
from sidecar.record.trial import Plan, RepairChange, Result, Role, Trial
from vllm_sloguard.crash import Category, Crash

GOOD: dict[str, Any] = {
    "model": "some/model",
    "slo": {"ttft_p99_ms": 500},
    "workload": {"rate": 4},
    "search": {"knobs": {"max_num_seqs": {"low": 4, "high": 64}}},
}


def changed(place: str, value: Any) -> dict[str, Any]:
    """``GOOD`` with ``value`` at the dotted ``place``."""
    content = copy.deepcopy(GOOD)
    *path, last = place.split(".")
    section = content
    for name in path:
        section = section.setdefault(name, {})
    section[last] = value
    return content


def write(folder: Path, content: object) -> Path:
    path = folder / "sloguard.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return path


def configured(folder: Path, place: str = "model", value: Any = "some/model") -> Config:
    return load_config(write(folder, changed(place, value)))


def measured(ttft_p99_ms: float | None = 10.0, failed: int = 0, e2e_mean_ms: float | None = 80.0) -> Measurement:
    return Measurement(
        requests=200,
        failed=failed,
        duration_s=50.0,
        ttft_p99_ms=ttft_p99_ms,
        itl_p99_ms=5.0,
        e2e_p99_ms=120.0,
        ttft_mean_ms=8.0,
        e2e_mean_ms=e2e_mean_ms,
        goodput_rps=4.0,
    )


def planned(role: Role = Role.SEARCH, refusal: str = "", changes: tuple[RepairChange, ...] = (), **args: Any) -> Plan:
    knobs = args or {"max_num_seqs": 8}
    return Plan(role, knobs, knobs, "anneal", "because", changes, refusal)


def oom(evidence: str = "torch.OutOfMemoryError: CUDA out of memory.") -> Crash:
    return Crash(Category.OUT_OF_MEMORY, evidence, "EngineCore", "starting", 1)


def trial(number: int, plan: Plan, result: Result | None, ended_at: float | None = 130.0) -> Trial:
    return Trial(1, number, plan, 100.0, ended_at, result)


def served(value: float, scores: tuple[float, ...] = (), violation: float = 0.0) -> Result:
    return Result(violation=violation, value=value, measurement=measured(), scores=scores, start_s=1.0)


def until(holds: Callable[[], object], within_s: float = 60.0) -> None:
    """Waits until ``holds``; fails when it does not within ``within_s``."""
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline, f"not within {within_s} s"
        time.sleep(0.02)
