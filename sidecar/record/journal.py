"""The journal's tables. Actions are recorded before they are taken, so the sidecar can be killed at any moment.

There is one writer, the sidecar that holds the state folder's lock, and any number of readers.
"""

import json
import sqlite3
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from sidecar.record import migrations
from sidecar.record.decisions import (
    Decision,
    Evidence,
    decision_as_json,
    evidence_as_json,
    read_decision,
    read_evidence,
)
from sidecar.record.journal_file import JOURNAL_FILE, JournalFile, Superseded
from sidecar.record.row_validation import JournalError, object_of, problem
from sidecar.record.states import State
from sidecar.record.trial import PLAN, RESULT, Plan, Result, Trial, TrialStatus
from vllm_sloguard.agent.process_identity import Identity
from vllm_sloguard.guard.start_history import RULE, START, LearnedLimit, ReportedStart

__all__ = ["JOURNAL_FILE", "EngineRecord", "Journal", "JournalError", "Promoted", "Run", "StateRecord", "Superseded"]

_T = TypeVar("_T")

_MAX_STARTS = 50
# The newest runs keep their requests' scores, for reports and exports.
_SCORED_RUNS = 200
_DROPPED_AT_ONCE = 5_000


@dataclass(frozen=True)
class Run:
    """One tuning run. Times are seconds since the epoch."""

    id: int
    digest: str
    incumbent: dict[str, Any]
    started_at: float
    ended_at: float | None
    decision: Decision | None


@dataclass(frozen=True)
class EngineRecord:
    """An engine that was started and is not known to be gone."""

    identity: Identity
    role: str
    launch: dict[str, Any]


@dataclass(frozen=True)
class Promoted:
    """``args`` became the current configuration: by a ``run``'s decision, with evidence, or to undo one, with neither.

    Times are seconds since the epoch.
    """

    id: int
    run: int | None
    base_digest: str
    args: dict[str, Any]
    at: float
    evidence: Evidence | None
    rolled_back_at: float | None = None
    rollback_reason: str | None = None


@dataclass(frozen=True)
class StateRecord:
    """A state of the sidecar: since when, why, and until when if known."""

    at: float
    state: str
    reason: str
    until: float | None
    cause: str = ""  # a sidecar.record.states.Cause; empty in rows of older versions


class Journal(JournalFile):
    """Reads and writes one state folder's journal."""

    # Runs

    def begin_run(self, digest: str, config: str, incumbent: dict[str, Any]) -> Run:
        """Starts a run; ``config`` is JSON."""
        self.write(
            "INSERT INTO runs (digest, config, incumbent, started_at) VALUES (?, ?, ?, ?)",
            (digest, config, json.dumps(incumbent), time.time()),
        )
        run = self.last_run()
        assert run is not None
        self._drop_scores(run.id - _SCORED_RUNS)
        return run

    def _drop_scores(self, last: int) -> None:
        """Drops the requests' scores, most of a trial's size, from trials of the runs up to ``last``."""
        rows = self.read(
            "SELECT * FROM trials WHERE run <= ? AND result LIKE '%\"scores\":[%' AND result NOT LIKE '%\"scores\":[]%'"
            " LIMIT ?",
            (last, _DROPPED_AT_ONCE),
        )
        with self.transaction() as db:
            for trial in map(_trial, rows):
                assert trial.result is not None
                result = RESULT.dump_json(replace(trial.result, scores=())).decode()
                db.execute(
                    "UPDATE trials SET result = ? WHERE run = ? AND number = ?", (result, trial.run, trial.number)
                )

    def end_run(self, run: int, decision: Decision) -> None:
        """Ends a run with its decision."""
        content = json.dumps(decision_as_json(decision))
        self.write("UPDATE runs SET ended_at = ?, decision = ? WHERE id = ?", (time.time(), content, run))

    def last_run(self) -> Run | None:
        """The newest run."""
        rows = self.read("SELECT * FROM runs ORDER BY id DESC LIMIT 1", ())
        return _run(rows[0]) if rows else None

    def run(self, number: int) -> Run | None:
        """The run of that number."""
        rows = self.read("SELECT * FROM runs WHERE id = ?", (number,))
        return _run(rows[0]) if rows else None

    def decisions(self) -> dict[int, Decision]:
        """The decision of each run that has one."""
        rows = self.read("SELECT id, decision FROM runs WHERE decision IS NOT NULL", ())
        return {row["id"]: read_decision(row["decision"]) for row in rows}

    def run_configs(self) -> dict[int, dict[str, Any]]:
        """The recorded configuration of each run."""
        return {row["id"]: object_of(row["config"], "config") for row in self.read("SELECT id, config FROM runs", ())}

    # Trials

    def begin_trial(self, run: int, plan: Plan) -> Trial:
        """Records a trial before it starts."""
        with self.transaction() as db:
            number = db.execute("SELECT coalesce(max(number), 0) + 1 FROM trials WHERE run = ?", (run,)).fetchone()[0]
            trial = Trial(run, number, plan, time.time())
            db.execute(
                "INSERT INTO trials (run, number, plan, started_at) VALUES (?, ?, ?, ?)",
                (run, number, PLAN.dump_json(plan).decode(), trial.started_at),
            )
        return trial

    def end_trial(self, trial: Trial, result: Result | None) -> Trial:
        """Records a trial's result; None if it was aborted."""
        ended = Trial(trial.run, trial.number, trial.plan, trial.started_at, time.time(), result)
        self.write(
            "UPDATE trials SET ended_at = ?, result = ? WHERE run = ? AND number = ? AND ended_at IS NULL",
            (ended.ended_at, RESULT.dump_json(result).decode() if result else None, trial.run, trial.number),
        )
        return ended

    def abort_running(self) -> None:
        """Marks every unfinished trial as aborted: its runner is gone."""
        for trial in self.trials():
            if trial.status is TrialStatus.RUNNING:
                self.end_trial(trial, None)

    def trials(self, run: int | None = None) -> list[Trial]:
        """The trials of ``run``, or of every run, oldest first. Raises JournalError for a damaged row."""
        query = "SELECT * FROM trials WHERE ?1 IS NULL OR run = ?1 ORDER BY run, number"
        return [_trial(row) for row in self.read(query, (run,))]

    # Engines

    def engine_starting(self, engine_id: str, role: str, launch: dict[str, Any]) -> None:
        """Records an engine before it is started."""
        self.write(
            "INSERT INTO engines (engine_id, role, pid, started_at, launch) VALUES (?, ?, 0, ?, ?)",
            (engine_id, role, time.time(), json.dumps(launch)),
        )

    def engine_started(self, identity: Identity) -> None:
        """Records an engine's first process."""
        self.write(
            "UPDATE engines SET pid = ?, started_at = ?, boot_id = ? WHERE engine_id = ?",
            (identity.pid, identity.started_at, identity.boot_id, identity.engine_id),
        )

    def engine_gone(self, engine_id: str) -> None:
        """Removes an engine whose processes are gone."""
        self.write("DELETE FROM engines WHERE engine_id = ?", (engine_id,))

    def engines(self) -> list[EngineRecord]:
        """The engines not known to be gone."""
        return [
            EngineRecord(_identity(row), row["role"], object_of(row["launch"], "launch"))
            for row in self.read("SELECT * FROM engines", ())
        ]

    # Promotions

    def promote(
        self, run: int | None, base_digest: str, args: dict[str, Any], evidence: Evidence | None = None
    ) -> None:
        """Makes ``args`` the current configuration, for as long as the file's own arguments do not change."""
        content = json.dumps(evidence_as_json(evidence)) if evidence else None
        self.write(
            "INSERT INTO promotions (run, base_digest, args, at, evidence) VALUES (?, ?, ?, ?, ?)",
            (run, base_digest, json.dumps(args), time.time(), content),
        )

    def promoted(self, base_digest: str) -> dict[str, Any] | None:
        """The arguments of the last promotion over ``base_digest`` that was not rolled back."""
        query = (
            "SELECT args FROM promotions WHERE base_digest = ? AND id NOT IN (SELECT promotion FROM rollbacks)"
            " ORDER BY id DESC LIMIT 1"
        )
        rows = self.read(query, (base_digest,))
        return object_of(rows[0]["args"], "args") if rows else None

    def promotions(self) -> list[Promoted]:
        """Every promotion, oldest first."""
        # A journal of an older version, opened read-only, lacks the column and the table.
        joined = (
            "SELECT p.*, r.at AS rolled_back_at, r.reason AS rollback_reason"
            " FROM promotions p LEFT JOIN rollbacks r ON r.promotion = p.id ORDER BY p.id"
        )
        plain = "SELECT * FROM promotions ORDER BY id"
        query = joined if self.version() >= migrations.OPERATIONS else plain
        rows = [dict(row) for row in self.read(query, ())]
        for row in rows:
            row["args"] = object_of(row["args"], "args")
            row["evidence"] = read_evidence(row["evidence"]) if row.get("evidence") else None
        return [Promoted(**row) for row in rows]

    # What the guard has learned about a model on a host

    def record_start(self, host: str, model: str, start: ReportedStart) -> None:
        """Records the memory that vLLM reported for a start."""
        self.write(
            "INSERT INTO starts (at, host, model, start) VALUES (?, ?, ?, ?)",
            (time.time(), host, model, START.dump_json(start).decode()),
        )

    def record_rule(self, host: str, model: str, rule: LearnedLimit) -> None:
        """Records a limit learned from a crash."""
        self.write(
            "INSERT INTO rules (host, model, expires_at, rule) VALUES (?, ?, ?, ?)",
            (host, model, rule.expires_at, RULE.dump_json(rule).decode()),
        )

    def starts(self, host: str, model: str) -> tuple[ReportedStart, ...]:
        """The newest starts of ``model`` on ``host``, oldest first. They are only hints: damaged ones are skipped."""
        query = "SELECT start FROM starts WHERE host = ? AND model = ? ORDER BY id DESC LIMIT ?"
        rows = self._learned(query, (host, model, _MAX_STARTS))
        return _readable(START, [row["start"] for row in reversed(rows)])

    def rules(self, now: float, host: str | None = None, model: str | None = None) -> tuple[LearnedLimit, ...]:
        """The rules in force at ``now``, optionally of one host and model; damaged ones are skipped."""
        query = (
            "SELECT rule FROM rules WHERE expires_at > ?1 AND (?2 IS NULL OR host = ?2)"
            " AND (?3 IS NULL OR model = ?3) ORDER BY id"
        )
        return _readable(RULE, [row["rule"] for row in self._learned(query, (now, host, model))])

    def _learned(self, query: str, values: tuple[Any, ...]) -> list[sqlite3.Row]:
        return self.read(query, values) if self.version() >= migrations.LEARNED else []

    # States

    def enter(self, state: str, reason: str, until: float | None = None, cause: str = "") -> JournalError | None:
        """Records a state before it is entered; a failed write is deferred and its error returned."""
        return self.write_or_defer(
            "INSERT INTO states (at, state, reason, until, cause) VALUES (?, ?, ?, ?, ?)",
            (time.time(), state, reason, until, cause),
        )

    def state(self) -> StateRecord | None:
        """The last state."""
        rows = self.read("SELECT * FROM states ORDER BY id DESC LIMIT 1", ())
        return _state(rows[0]) if rows else None

    def state_at(self, at: float) -> StateRecord | None:
        """The state at ``at``, seconds since the epoch."""
        rows = self.read("SELECT * FROM states WHERE at <= ? ORDER BY id DESC LIMIT 1", (at,))
        return _state(rows[0]) if rows else None

    def last_busy_at(self) -> float | None:
        """When the last sidecar last left the state of serving, seconds since the epoch; None if none ever ran."""
        rows = self.read(
            "SELECT at FROM states WHERE id > coalesce((SELECT max(id) FROM states WHERE state = ?1 AND id <"
            " (SELECT max(id) FROM states WHERE state != ?1)), 0) ORDER BY id LIMIT 1",
            (State.SERVING,),
        )
        return float(rows[0]["at"]) if rows else None

    def states(self, since: float = 0.0) -> list[StateRecord]:
        """The states entered at ``since`` or later, oldest first."""
        rows = self.read("SELECT * FROM states WHERE at >= ?", (since,))
        return [_state(row) for row in rows]

    # One controller

    def take_over(self, pid: int) -> int:
        """Makes the caller the controller, superseding any earlier one, and returns its epoch."""
        self.write("INSERT INTO epochs (at, pid) VALUES (?, ?)", (time.time(), pid))
        self.act_for(self.epoch())
        return self.epoch()


def _run(row: sqlite3.Row) -> Run:
    decision = read_decision(row["decision"]) if row["decision"] else None
    incumbent = object_of(row["incumbent"], "incumbent")
    return Run(row["id"], row["digest"], incumbent, row["started_at"], row["ended_at"], decision)


def _state(row: sqlite3.Row) -> StateRecord:
    cause = row["cause"] if "cause" in row.keys() else ""  # noqa: SIM118 - a row iterates over its values
    return StateRecord(row["at"], row["state"], row["reason"], row["until"], cause)


def _identity(row: sqlite3.Row) -> Identity:
    boot = row["boot_id"] if "boot_id" in row.keys() else ""  # noqa: SIM118 - a row iterates over its values
    return Identity(row["pid"], row["started_at"], row["engine_id"], boot)


def _trial(row: sqlite3.Row) -> Trial:
    try:
        plan = PLAN.validate_json(row["plan"])
        result = RESULT.validate_json(row["result"]) if row["result"] else None
    except ValidationError as error:
        raise JournalError(f"trial {row['run']}/{row['number']}: damaged at {problem(error)}") from None
    return Trial(row["run"], row["number"], plan, row["started_at"], row["ended_at"], result)


def _readable(adapter: TypeAdapter[_T], texts: Sequence[str]) -> tuple[_T, ...]:
    found: list[_T] = []
    for text in texts:
        with suppress(ValidationError):
            found.append(adapter.validate_json(text))
    return tuple(found)
