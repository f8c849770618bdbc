"""Journals of simulated runs, with figures from a small model of an engine."""

import dataclasses
import json
import math
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from sidecar.config.schema import Config, Objective, load_config
from sidecar.measure.measurement import Measurement
from sidecar.measure.verdict import violation
from sidecar.promote import decision as promotion
from sidecar.promote import provenance
from sidecar.promote.candidate import SearchedSpace, candidate
from sidecar.record.decisions import Evidence, Outcome
from sidecar.record.journal import JOURNAL_FILE, Journal
from sidecar.record.trial import PLAN, RESULT, Plan, RepairChange, Result, Role, StartKind, Trial, TrialStatus
from sidecar.search.space import Space
from vllm_sloguard import __version__
from vllm_sloguard.crash import Category, Crash
from vllm_sloguard.knobs import Value

INCUMBENT: dict[str, Any] = {"max_num_seqs": 32, "max_num_batched_tokens": 2048, "gpu_memory_utilization": 0.9}
CONTENT: dict[str, Any] = {
    "model": "meta-llama/Llama-3.1-8B-Instruct",
    "engine": {"args": {**INCUMBENT, "max_model_len": 8192}, "env": {"HF_TOKEN": "hf_thisIsASecret"}},
    "slo": {"ttft_p99_ms": 500, "itl_p99_ms": 60, "e2e_p99_ms": 6000},
    "workload": {"rate": 8, "requests": 200},
    "search": {
        "budget": 40,
        "knobs": {
            "max_num_seqs": {"low": 4, "high": 512},
            "max_num_batched_tokens": None,
            "gpu_memory_utilization": None,
            "enable_prefix_caching": None,
            "enable_chunked_prefill": None,
            "block_size": {"choices": [16, 32, 64]},
        },
    },
    "window": {"hooks": {"before_drain": ["curl", "-H", "Authorization: Bearer topsecret"]}},
}
OOM = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate {} MiB. GPU 0 has a total capacity of 79.15 GiB of"
    " which 212.00 MiB is free."
)


class Made:
    """A state folder with one run in its journal; ``now`` advances with each trial."""

    def __init__(self, folder: Path, seed: int = 1, **sections: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "sloguard.yaml"
        self.file.write_text(yaml.safe_dump({**CONTENT, **sections, "state": "state"}, sort_keys=False))
        self.config: Config = load_config(self.file)
        self.state = self.config.state
        self.rng = np.random.default_rng(seed)
        self.journal = Journal(self.state)
        self.now = 1_790_000_000.0
        machine = {"device": "NVIDIA H200", "driver": "570.1"}
        content = json.dumps({**machine, **self.config.model_dump(mode="json", exclude={"engine": {"env"}})})
        self.run = self.journal.begin_run(self.config.digest(), content, dict(self.config.engine.args))
        self.rows: list[Trial] = []

    def add(self, plan: Plan, result: Result | None, seconds: float = 60.0, *, running: bool = False) -> Trial:
        """Adds a trial; kept in memory until ``close``."""
        number = len(self.rows) + 1
        ended = None if running else self.now + seconds
        trial = Trial(self.run.id, number, plan, self.now, ended, result)
        self.rows.append(trial)
        self.now += seconds + 2.0
        return trial

    def plan(self, role: Role = Role.SEARCH, knobs: dict[str, Value] | None = None, **more: Any) -> Plan:
        base = dict(self.config.engine.args)
        knobs = knobs or {**INCUMBENT}
        return Plan(role, knobs, {**base, **knobs}, str(role), "because", **more)

    def measured(self, knobs: dict[str, Value]) -> Result:
        """The measurement of the model engine: too few sequences queue, too many slow each other down."""
        seqs, tokens = float(knobs.get("max_num_seqs", 32)), float(knobs.get("max_num_batched_tokens", 2048))
        noise = math.exp(self.rng.normal(0, 0.02))
        mean = (900 + 26000 / seqs + 2.2 * seqs + 60 * abs(math.log2(tokens / 4096))) * noise
        mean *= 0.9 if knobs.get("enable_prefix_caching") else 1.0
        answers = self.rng.gamma(6, mean / 6000, 200)
        ttft, itl = 60 + 9000 / seqs + tokens / 60, 12 + tokens / 260 + seqs / 14
        measurement = Measurement(
            requests=200, failed=0, duration_s=25.0, ttft_p99_ms=ttft * noise, itl_p99_ms=itl * noise,
            e2e_p99_ms=float(np.percentile(answers, 99)) * 1000, ttft_mean_ms=ttft / 3,
            e2e_mean_ms=float(np.mean(answers)) * 1000, goodput_rps=7.8 * noise, output_tokens_per_s=1000.0 * noise,
            ttft_p50_ms=ttft * noise / 3, itl_p50_ms=itl * noise / 2, e2e_p50_ms=float(np.median(answers)) * 1000,
        )  # fmt: skip
        value = {Objective.LATENCY: -(measurement.e2e_mean_ms or 0.0), Objective.GOODPUT: measurement.goodput_rps}
        over = violation(measurement, self.config.slo)
        return Result(
            violation=over, value=value.get(self.config.objective, 8.0 * noise), measurement=measurement,
            scores=tuple(answers), vllm_version="0.26.0", start=StartKind.FORKED,
            start_s=9.0, warmup_s=4.0, load_s=28.0,
            stop_s=1.0, kv_cache_tokens=120_000, stopped="17 of 200 requests were over a limit" if over > 0.5 else "",
        )  # fmt: skip

    def search(self, trials: int, crashes: bool = True) -> None:
        """Runs this many trials, the current configuration first."""
        space = Space(self.config.search.space_knobs())
        self.add(self.plan(Role.BASELINE), self.measured(INCUMBENT))
        for number in range(2, trials + 1):
            knobs = space.sample(self.rng)
            if crashes and knobs["gpu_memory_utilization"] > 0.92:  # pyright: ignore[reportOperatorIssue]
                text = OOM.format(int(self.rng.integers(100, 900)))
                self.crash(knobs, Category.OUT_OF_MEMORY, text)
            elif crashes and number % 17 == 0:
                self.crash(knobs, Category.STARTUP_FAILURE, "ValueError: block_size <b>64</b> & more is not supported")
            elif crashes and number % 13 == 0:
                self.add(
                    self.plan(knobs=knobs, refusal="the model's weights take 15.0 of 14.1 GiB that are free"), None, 0.1
                )
            else:
                change = RepairChange(
                    "max_num_batched_tokens", 512, 2048, "at least 2048 are needed for max_model_len 2048"
                )
                changes = (change,) if number % 5 == 0 else ()
                self.add(self.plan(knobs=knobs, changes=changes), self.measured(knobs), 44.0)

    def crash(self, knobs: dict[str, Value], category: Category, text: str, phase: str = "starting") -> Trial:
        result = Result(crash=Crash(category, text, "EngineCore", phase, 1), vllm_version="0.26.0", stop_s=0.5)
        return self.add(self.plan(knobs=knobs), result, 15.0)

    def validate(self) -> None:
        """Runs as many pairs as the rule needs."""
        while (role := promotion.next_role(self.rows, self.config)) is not None:
            best = candidate(self.rows, SearchedSpace.of(self.config))
            assert best is not None
            plan = self.plan(role) if role is Role.REFERENCE else dataclasses.replace(best.plan, role=role)
            self.add(plan, dataclasses.replace(self.measured(plan.args), start=StartKind.ORDINARY, start_s=41.0), 80.0)  # pyright: ignore[reportArgumentType]

    def decide(self) -> None:
        """Ends the run as the tuner would."""
        decision = promotion.decide(self.rows, self.config)
        if decision.outcome is Outcome.PROMOTED:
            args = next(t.plan.args for t in self.rows if t.number == decision.trial)
            origin = dataclasses.replace(
                provenance.of(self.config, self.rows),
                sloguard=__version__,
                vllm="0.26.0",
                device="NVIDIA H200",
                driver="570.1",
            )
            self.journal.promote(self.run.id, self.config.base_digest(), dict(args), Evidence(decision, origin))
        self.journal.end_run(self.run.id, decision)

    def close(self) -> Path:
        """Writes the trials and returns the state folder."""
        self.journal.close()
        with sqlite3.connect(self.state / JOURNAL_FILE) as db:
            for t in self.rows:
                result = RESULT.dump_json(t.result).decode() if t.result is not None else None
                row = (t.run, t.number, PLAN.dump_json(t.plan).decode(), t.started_at, t.ended_at, result)
                db.execute(
                    "INSERT INTO trials (run, number, plan, started_at, ended_at, result) VALUES (?,?,?,?,?,?)", row
                )
            first = self.rows[0].started_at if self.rows else self.now
            db.execute(
                "UPDATE runs SET started_at = ?, ended_at = CASE WHEN decision IS NULL THEN NULL ELSE ? END",
                (first, self.now),
            )
            db.execute("UPDATE promotions SET at = ?", (self.now,))
        db.close()
        return self.state


def whole(folder: Path, trials: int = 40, **sections: Any) -> Path:
    """A run up to its decision; returns the state folder."""
    made = Made(folder, **sections)
    made.search(trials)
    made.validate()
    made.decide()
    return made.close()


def only_crashes(folder: Path, count: int = 8) -> Path:
    made = Made(folder)
    made.add(
        made.plan(Role.BASELINE), Result(crash=Crash(Category.ENGINE_DEATH, "killed", "EngineCore", "serving", -9))
    )
    space = Space(made.config.search.space_knobs())
    for _ in range(count - 1):
        made.crash(space.sample(made.rng), Category.OUT_OF_MEMORY, OOM.format(made.rng.integers(1, 900)))
    made.decide()
    return made.close()


def statuses(state: Path) -> list[TrialStatus]:
    return [t.status for t in Journal(state, read_only=True).trials()]
