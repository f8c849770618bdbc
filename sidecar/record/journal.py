"""The truth, in SQLite: each thing is written before it is done, so that a kill at any moment leaves a whole story.

One writer, the sidecar that holds the state folder's lock; any number of readers.
"""

import json
import sqlite3
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from sidecar.engine.process_identity import Identity
from sidecar.record import migrations
from sidecar.record.decisions import (
    Decision,
    Evidence,
    decision_as_json,
    evidence_as_json,
    read_decision,
    read_evidence,
)
from sidecar.record.row_validation import JournalError, check_value, object_of, problem
from sidecar.record.trial import PLAN, RESULT, Plan, Result, Trial, TrialStatus
from vllm_sloguard.guard.start_history import RULE, START, LearnedLimit, ReportedStart

_T = TypeVar("_T")

JOURNAL_FILE = "journal.sqlite"

_MOST_STARTS = 50


class Superseded(RuntimeError):  # noqa: N818 - it names what happened
    """Another sidecar has taken the state folder over; this one must not act any more."""


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
    """An engine that was started and has not been seen gone."""

    identity: Identity
    role: str
    launch: dict[str, Any]


@dataclass(frozen=True)
class Promoted:
    """``args`` became what is served: by a ``run``'s decision, with its evidence, or to undo one, with neither.

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
    """What the sidecar was doing, since when, why, and until when where that is known."""

    at: float
    state: str
    reason: str
    until: float | None


class Journal:
    """Reads and writes one state folder's journal."""

    def __init__(self, folder: Path, *, read_only: bool = False) -> None:
        path = folder / JOURNAL_FILE
        self._epoch = 0
        self._missed = False
        if read_only and not path.is_file():
            raise JournalError(f"{folder}: no {JOURNAL_FILE} in it; `sloguard serve` and `sloguard tune` make one")
        try:
            if not read_only:
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            mode = "ro" if read_only else "rwc"
            self._db = sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", uri=True, isolation_level=None)
            self._db.row_factory = sqlite3.Row
            self._db.execute("PRAGMA busy_timeout = 5000")
            self._open(read_only)
        except (sqlite3.Error, OSError) as error:
            raise JournalError(f"{path}: {error}") from None

    def _open(self, read_only: bool) -> None:
        version = int(self._db.execute("PRAGMA user_version").fetchone()[0])
        if version > migrations.VERSION:
            raise JournalError(f"journal of version {version}; this sloguard knows version {migrations.VERSION}")
        if read_only and version == 0:
            raise JournalError("the journal is only just being made")
        if read_only:
            return
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        for number, script in enumerate(migrations.MIGRATIONS[version:], version + 1):
            self._db.executescript(f"BEGIN; {script} PRAGMA user_version = {number}; COMMIT;")

    def version(self) -> int:
        """Of the file; an older one that only a reader has opened lacks the newer tables."""
        return int(self.read("PRAGMA user_version", ())[0][0])

    def changes(self) -> int:
        """A number that differs from the last one when somebody else has written since."""
        return int(self.read("SELECT data_version AS number FROM pragma_data_version", ())[0][0])

    def close(self) -> None:
        """Closes the file."""
        self._db.close()

    # Runs

    def begin_run(self, digest: str, config: str, incumbent: dict[str, Any]) -> Run:
        """Starts a run; ``config`` is JSON."""
        self.write(
            "INSERT INTO runs (digest, config, incumbent, started_at) VALUES (?, ?, ?, ?)",
            (digest, config, json.dumps(incumbent), time.time()),
        )
        run = self.last_run()
        assert run is not None
        return run

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
        """The configuration of each run, as it was recorded."""
        return {row["id"]: object_of(row["config"], "config") for row in self.read("SELECT id, config FROM runs", ())}

    # Trials

    def begin_trial(self, run: int, plan: Plan) -> Trial:
        """Records that ``plan`` is going to be tried, before it is."""
        with self._transaction():
            number = self._db.execute(
                "SELECT coalesce(max(number), 0) + 1 FROM trials WHERE run = ?", (run,)
            ).fetchone()[0]
            trial = Trial(run, number, plan, time.time())
            self._db.execute(
                "INSERT INTO trials (run, number, plan, started_at) VALUES (?, ?, ?, ?)",
                (run, number, PLAN.dump_json(plan).decode(), trial.started_at),
            )
        return trial

    def end_trial(self, trial: Trial, result: Result | None) -> Trial:
        """Records how it ended; None for aborted."""
        ended = Trial(trial.run, trial.number, trial.plan, trial.started_at, time.time(), result)
        self.write(
            "UPDATE trials SET ended_at = ?, result = ? WHERE run = ? AND number = ? AND ended_at IS NULL",
            (ended.ended_at, RESULT.dump_json(result).decode() if result else None, trial.run, trial.number),
        )
        return ended

    def abort_running(self) -> None:
        """Ends every trial that has not ended: whoever ran it is gone."""
        for trial in self.trials():
            if trial.status is TrialStatus.RUNNING:
                self.end_trial(trial, None)

    def trials(self, run: int | None = None) -> list[Trial]:
        """The trials of ``run``, or of every run, oldest first. Raises JournalError for a damaged row."""
        query = "SELECT * FROM trials WHERE ?1 IS NULL OR run = ?1 ORDER BY run, number"
        return [_trial(row) for row in self.read(query, (run,))]

    # Engines

    def engine_starting(self, engine_id: str, role: str, launch: dict[str, Any]) -> None:
        """Records that an engine is about to be started."""
        self.write(
            "INSERT INTO engines (engine_id, role, pid, started_at, launch) VALUES (?, ?, 0, ?, ?)",
            (engine_id, role, time.time(), json.dumps(launch)),
        )

    def engine_started(self, identity: Identity) -> None:
        """Records its process."""
        self.write(
            "UPDATE engines SET pid = ?, started_at = ?, boot_id = ? WHERE engine_id = ?",
            (identity.pid, identity.started_at, identity.boot_id, identity.engine_id),
        )

    def engine_gone(self, engine_id: str) -> None:
        """Records that it was seen gone."""
        self.write("DELETE FROM engines WHERE engine_id = ?", (engine_id,))

    def engines(self) -> list[EngineRecord]:
        """The engines that were not seen gone."""
        return [
            EngineRecord(_identity(row), row["role"], object_of(row["launch"], "launch"))
            for row in self.read("SELECT * FROM engines", ())
        ]

    # Promotions

    def promote(
        self, run: int | None, base_digest: str, args: dict[str, Any], evidence: Evidence | None = None
    ) -> None:
        """Makes ``args`` what is served from now on, as long as the file's own arguments stay as they are."""
        content = json.dumps(evidence_as_json(evidence)) if evidence else None
        self.write(
            "INSERT INTO promotions (run, base_digest, args, at, evidence) VALUES (?, ?, ?, ?, ?)",
            (run, base_digest, json.dumps(args), time.time(), content),
        )

    def promoted(self, base_digest: str) -> dict[str, Any] | None:
        """The last promotion over the arguments that ``base_digest`` names that was not rolled back."""
        query = (
            "SELECT args FROM promotions WHERE base_digest = ? AND id NOT IN (SELECT promotion FROM rollbacks)"
            " ORDER BY id DESC LIMIT 1"
        )
        rows = self.read(query, (base_digest,))
        return object_of(rows[0]["args"], "args") if rows else None

    def promotions(self) -> list[Promoted]:
        """Every change of what is served, oldest first."""
        # An older file that only a reader has opened lacks the column and the table.
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

    # What was learned, of one model on one host

    def record_start(self, host: str, model: str, start: ReportedStart) -> None:
        """Records what vLLM reported of a start's memory."""
        self.write(
            "INSERT INTO starts (at, host, model, start) VALUES (?, ?, ?, ?)",
            (time.time(), host, model, START.dump_json(start).decode()),
        )

    def record_rule(self, host: str, model: str, rule: LearnedLimit) -> None:
        """Records a limit that a crash taught."""
        self.write(
            "INSERT INTO rules (host, model, expires_at, rule) VALUES (?, ?, ?, ?)",
            (host, model, rule.expires_at, RULE.dump_json(rule).decode()),
        )

    def starts(self, host: str, model: str) -> tuple[ReportedStart, ...]:
        """The newest starts of ``model`` on ``host``, oldest first. They are advice: damaged ones are left out."""
        query = "SELECT start FROM starts WHERE host = ? AND model = ? ORDER BY id DESC LIMIT ?"
        rows = self._learned(query, (host, model, _MOST_STARTS))
        return _readable(START, [row["start"] for row in reversed(rows)])

    def rules(self, now: float, host: str | None = None, model: str | None = None) -> tuple[LearnedLimit, ...]:
        """The rules that still hold at ``now``, of every host and model unless named; read like ``starts``."""
        query = (
            "SELECT rule FROM rules WHERE expires_at > ?1 AND (?2 IS NULL OR host = ?2)"
            " AND (?3 IS NULL OR model = ?3) ORDER BY id"
        )
        return _readable(RULE, [row["rule"] for row in self._learned(query, (now, host, model))])

    def _learned(self, query: str, values: tuple[Any, ...]) -> list[sqlite3.Row]:
        return self.read(query, values) if self.version() >= migrations.LEARNED else []

    # States

    def enter(self, state: str, reason: str, until: float | None = None) -> None:
        """Records a state before it is entered."""
        self.write(
            "INSERT INTO states (at, state, reason, until) VALUES (?, ?, ?, ?)", (time.time(), state, reason, until)
        )

    def state(self) -> StateRecord | None:
        """The last state."""
        rows = self.read("SELECT * FROM states ORDER BY id DESC LIMIT 1", ())
        return StateRecord(rows[0]["at"], rows[0]["state"], rows[0]["reason"], rows[0]["until"]) if rows else None

    def states(self, since: float = 0.0) -> list[StateRecord]:
        """Every state that was entered at ``since`` or later, oldest first."""
        rows = self.read("SELECT * FROM states WHERE at >= ?", (since,))
        return [StateRecord(row["at"], row["state"], row["reason"], row["until"]) for row in rows]

    # One controller

    def take_over(self, pid: int) -> int:
        """Makes this journal's user the one controller, and returns its epoch; whoever was it before is superseded."""
        self.write("INSERT INTO epochs (at, pid) VALUES (?, ?)", (time.time(), pid))
        self._epoch = self.epoch()
        return self._epoch

    def act_for(self, epoch: int) -> None:
        """Writes in the name of the controller of ``epoch`` from now on."""
        self._epoch = epoch

    def epoch(self) -> int:
        """Of the controller in charge; 0 before the first."""
        if self.version() < migrations.OPERATIONS:
            return 0
        return int(self.read("SELECT coalesce(max(epoch), 0) AS epoch FROM epochs", ())[0][0])

    def still_mine(self) -> None:
        """Raises Superseded when another sidecar has taken over since, JournalError when that can't be read."""
        if self._epoch and (newest := self.epoch()) != self._epoch:
            raise Superseded(f"another sidecar has taken over (epoch {newest}, this one has {self._epoch})")

    def read(self, query: str, values: tuple[Any, ...]) -> list[sqlite3.Row]:
        """The rows of a query. Raises JournalError."""
        try:
            rows = self._db.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise JournalError(f"the journal can't be read: {error}") from None
        for row in rows:
            check_value(row)
        return rows

    def write(self, statement: str, values: tuple[Any, ...]) -> None:
        """Writes, unless another sidecar has taken over. Raises JournalError, Superseded."""
        with self._transaction():
            self._db.execute(statement, values)

    @contextmanager
    def _transaction(self) -> Generator[None]:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            self.still_mine()
            yield
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            self._missed = True
            raise JournalError(f"the journal can't be written: {error}") from None
        finally:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")

    def caught_up(self) -> bool:
        """Whether every write has succeeded since this was last asked."""
        missed, self._missed = self._missed, False
        return not missed


def _run(row: sqlite3.Row) -> Run:
    decision = read_decision(row["decision"]) if row["decision"] else None
    incumbent = object_of(row["incumbent"], "incumbent")
    return Run(row["id"], row["digest"], incumbent, row["started_at"], row["ended_at"], decision)


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
