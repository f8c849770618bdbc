"""A trial in the format of `vllm bench serve --save-result`, as far as the journal has it. Pure.

The journal has percentiles and means, not requests. Fields that it cannot fill are omitted: tokens, TPOT, and other
percentiles of TTFT and ITL. It has the E2E latency of every request if mean latency is the objective. Its p99s count
failed requests as infinitely slow, which vLLM excludes, so a p99 that includes such requests is omitted too.
"""

import math
from datetime import datetime
from typing import Any

import numpy as np

from sidecar.config.schema import Objective
from sidecar.export.tables import finite
from sidecar.record.run_snapshot import RunSnapshot
from sidecar.record.trial import Trial

LEFT_OUT = (
    "total_input_tokens, total_output_tokens, output_throughput, total_token_throughput, tpot, medians and standard"
    " deviations of ttft and itl, and everything of --save-detailed"
)


def result_json(snapshot: RunSnapshot, trial: Trial) -> dict[str, Any] | None:
    """None for a trial without a complete load: one that crashed, never ran, or was stopped early."""
    result = trial.result
    if result is None or result.measurement is None or result.stopped:
        return None
    setup, measured = snapshot.setup, result.measurement
    done = measured.requests - measured.failed
    content: dict[str, Any] = {
        "date": datetime.fromtimestamp(trial.started_at).strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": "openai",
        "backend": "openai",
        "label": f"sloguard run {trial.run} trial {trial.number}",
        "model_id": setup.model,
        "tokenizer_id": setup.args.get("tokenizer", setup.model),
        "num_prompts": measured.requests,
        "request_rate": setup.workload.rate,
        "burstiness": 1.0,
        "max_concurrency": None,
        "duration": measured.duration_s,
        "completed": done,
        "failed": measured.failed,
        "request_throughput": done / measured.duration_s if measured.duration_s else 0.0,
        "request_goodput": measured.goodput_rps,
    }
    figures = {
        "mean_ttft_ms": measured.ttft_mean_ms,
        "p99_ttft_ms": measured.ttft_p99_ms,
        "p99_itl_ms": measured.itl_p99_ms,
        "mean_e2el_ms": measured.e2e_mean_ms,
        "p99_e2el_ms": measured.e2e_p99_ms,
        **(_latencies(result.scores) if setup.objective is Objective.LATENCY else {}),
    }
    content |= {name: value for name, value in figures.items() if finite(value) is not None}
    return content | {
        "sloguard_status": str(trial.status),
        "sloguard_role": str(trial.plan.role),
        "sloguard_args": trial.plan.args,
        "sloguard_left_out": LEFT_OUT,
    }


def _latencies(scores: tuple[float, ...]) -> dict[str, float]:
    answered = [s * 1000 for s in scores if math.isfinite(s)]
    if not answered:
        return {}
    return {"median_e2el_ms": float(np.median(answered)), "std_e2el_ms": float(np.std(answered))}
