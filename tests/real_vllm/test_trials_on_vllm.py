"""Trials on real vLLM: on a forked engine, on the previous trial's engine by live changes, and on an ordinary start."""

from pathlib import Path
from typing import Any

import psutil
import pytest
from engine_bench import INCUMBENT, bench, write_config

from sidecar.record.trial import Plan, Result, Role, StartKind
from sidecar.run.judging import judged_result, load_schedule
from sidecar.search.contract import Proposal

pytestmark = pytest.mark.engine

ARGS: dict[str, Any] = {name.replace("-", "_"): value for name, value in INCUMBENT.items()}
KNOBS = {"max_num_seqs": {"low": 1, "high": 32}, "block_size": {"choices": [32, 64]}}


def search(**knobs: int) -> Plan:
    """A search trial whose engine may be started with room for more sequences."""
    return Plan(Role.SEARCH, dict(knobs), {**ARGS, **knobs}, "test", "asked for", ceilings={"max_num_seqs": 32})


def _lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_search_reuses_engines_and_a_validation_starts_its_own(tmp_path: Path) -> None:
    workload = {"requests": 20, "rate": 10, "output_tokens": 16}
    config_file = write_config(tmp_path, workload=workload, search={"knobs": KNOBS})
    with bench(config_file) as parts:
        runner = parts.runner

        def run(plan: Plan) -> tuple[Result, list[psutil.Process]]:
            warm = plan.role is Role.VALIDATION
            raw = runner.run(plan, load_schedule(parts.config, plan.role), lambda: False, warm_start=warm)
            result = judged_result(raw, plan.role, parts.config)
            return result, [p for p in psutil.Process().children(recursive=True) if _lives(p)]

        first, _ = run(search(max_num_seqs=4, block_size=32))
        second, living = run(search(max_num_seqs=8, block_size=32))
        assert not runner.is_cold({**ARGS, "max_num_seqs": 16, "block_size": 32})
        assert runner.is_cold({**ARGS, "max_num_seqs": 64, "block_size": 32})
        assert runner.is_cold({**ARGS, "max_num_seqs": 4, "block_size": 64})
        third, still = run(search(max_num_seqs=8, block_size=64))
        proposal = Proposal({}, "validation", "again")
        last, _ = run(Plan(Role.VALIDATION, {}, {**ARGS, "max_num_seqs": 8}, proposal.phase, proposal.reason))
        runner.release()

        assert [r.start for r in (first, second, third, last)] == [
            StartKind.FORKED,
            StartKind.LIVE,
            StartKind.FORKED,
            StartKind.ORDINARY,
        ]
        for result in (first, second, third, last):
            assert result.crash is None
            assert result.measurement is not None
            assert result.measurement.failed == 0
        # One engine at a time: the third's processes replaced the second's.
        assert len(still) == len(living)
        assert second.start_s is not None
        assert third.start_s is not None
        assert second.start_s < third.start_s
        # The unmeasured start was forked, and is over sooner with its load than the ordinary start without one.
        assert last.warm_start_s is not None
        assert last.start_s is not None
        assert last.warm_start_s < last.start_s
        assert not runner.occupied
