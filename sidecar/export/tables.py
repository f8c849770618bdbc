"""Trials as rows: CSV for spreadsheets, JSON lines as in `sloguard trials --json`. Pure."""

import csv
import io
import json
import math
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from sidecar.record.run_snapshot import RunSnapshot, knobs_that_ran
from sidecar.record.trial import Trial, margins, trial_as_json

# Spreadsheets would interpret these as formulas, and crash texts come from outside.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def csv_text(runs: Iterable[RunSnapshot]) -> str:
    """One row per trial, with a header. Empty: not measured; ``inf``: includes failed requests. Times are UTC."""
    rows = [_row(snapshot, trial) for snapshot in runs for trial in snapshot.trials]
    names = list(dict.fromkeys(name for row in rows for name in row))
    knobs = [name for name in names if name.startswith("knob.")]
    columns = [name for name in names if not name.startswith("knob.")] + knobs
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    return text.getvalue()


def jsonl_text(runs: Iterable[RunSnapshot]) -> str:
    """One object per line."""
    return "".join(json.dumps(trial_as_json(trial)) + "\n" for snapshot in runs for trial in snapshot.trials)


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def _row(snapshot: RunSnapshot, trial: Trial) -> dict[str, Any]:
    result = trial.result
    measured, crash = (result.measurement, result.crash) if result else (None, None)
    knobs = dict.fromkeys([*(k.name for k in snapshot.setup.knobs), *trial.plan.proposed])
    row: dict[str, Any] = {
        "run": trial.run,
        "trial": trial.number,
        "role": str(trial.plan.role),
        "phase": trial.plan.phase,
        "status": str(trial.status),
        "started_at": _utc(trial.started_at),
        "ended_at": _utc(trial.ended_at),
        "objective": str(snapshot.setup.objective),
        "value": result.value if result else None,
        "violation": result.violation if result and not crash else None,
        "lower_bounds": bool(result and result.stopped),
    }
    for name in ("requests", "failed", "duration_s", "goodput_rps", "ttft_p99_ms", "itl_p99_ms", "e2e_p99_ms",
                 "ttft_mean_ms", "e2e_mean_ms"):  # fmt: skip
        row[name] = getattr(measured, name) if measured else None
    margin = margins(measured, snapshot.setup.slo) if measured else {}
    row |= {f"margin.{name}": margin.get(name) for name in snapshot.setup.slo.upper_limits}
    for name in ("start", "start_s", "warmup_s", "load_s", "stop_s", "kv_cache_tokens", "vllm_version"):
        found = getattr(result, name) if result else None
        row[name] = str(found) if name == "start" and found else found
    row |= {
        "stopped": result.stopped if result else "",
        "crash_category": str(crash.category) if crash else "",
        "crash_phase": crash.phase if crash else "",
        "crash_evidence": crash.evidence if crash else "",
        "refusal": trial.plan.refusal,
        "changes": "; ".join(f"{c.name} {c.before} -> {c.after}: {c.reason}" for c in trial.plan.changes),
    }
    return row | {f"knob.{name}": value for name, value in knobs_that_ran(trial, list(knobs)).items()}


def _utc(at: float | None) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds") if at is not None else ""


def finite(value: float | None) -> float | None:
    """None for numbers that JSON does not have."""
    return value if value is not None and math.isfinite(value) else None
