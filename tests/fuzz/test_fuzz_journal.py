"""A damaged journal: readers report it in one line and leave it unchanged."""

import contextlib
import io
import json
import sqlite3
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from malformed import JUNK, broken_bytes, broken_values, fuzzed, took

from sidecar.cli import history, status
from sidecar.record.decisions import Decision, Outcome
from sidecar.record.events import EventKind, Operations
from sidecar.record.journal import JOURNAL_FILE, Journal, JournalError
from sidecar.record.trial import Plan, Result, Role
from vllm_sloguard.agent.process_identity import Identity
from vllm_sloguard.crash import Category, Crash
from vllm_sloguard.guard.start_history import LearnedLimit, LimitKind, ReportedStart


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A journal with rows in every table."""
    folder = tmp_path_factory.mktemp("journal")
    journal = Journal(folder)
    journal.enter("serving", "the engine is up")
    run = journal.begin_run("digest", json.dumps({"model": "m", "slo": {"ttft_p99_ms": 5}}), {"max_num_seqs": 2})
    crash = Crash(Category.OUT_OF_MEMORY, "CUDA out of memory", "EngineCore", "starting", 1)
    for role, result in ((Role.BASELINE, Result(value=-5.0)), (Role.SEARCH, Result(crash=crash)), (Role.SEARCH, None)):
        plan = Plan(role, {"max_num_seqs": 8}, {"max_num_seqs": 8}, "anneal", "because")
        journal.end_trial(journal.begin_trial(run.id, plan), result)
    journal.begin_trial(run.id, Plan(Role.SEARCH, {}, {}, "tpe", "because"))
    journal.promote(run.id, "base", {"max_num_seqs": 8})
    journal.engine_starting("one", "serving", {"args": {}, "log": "x"})
    journal.engine_started(Identity(1, 2.0, "one"))
    journal.record_start("host", "model", ReportedStart({}, "cuda", 2**30, 2**29))
    journal.record_rule("host", "model", LearnedLimit(LimitKind.HEADROOM_BYTES, 5, {}, "seen", 0.0, 4e9))
    journal.end_run(run.id, Decision(Outcome.KEPT, "no better one"))
    operations = Operations(journal, "base")
    operations.record(EventKind.START, base="base", promotion=1, seconds=40.0)
    operations.record(EventKind.WINDOW_ENDED, outcome="kept", reason="no better one")
    operations.roll_back(1, "it was slower")
    journal.close()
    return folder / JOURNAL_FILE


def read_all(folder: Path) -> None:
    """Everything that `status`, `trials` and the sidecar read at startup."""
    before = (folder / JOURNAL_FILE).read_bytes()
    failed: JournalError | None = None
    for command in (status.status, history.trials):
        for as_json in (True, False):
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    command(folder, None, as_json)
            except JournalError as error:
                failed = error
    assert (folder / JOURNAL_FILE).read_bytes() == before
    try:
        journal = Journal(folder, read_only=True)
        read: list[Callable[[], object]] = [journal.run_configs, journal.engines, journal.states]
        read += [lambda: journal.promoted("base"), lambda: journal.starts("host", "model")]
        operations = Operations(journal, "base")
        read += [operations.last_window, operations.longest_start_s, operations.current]
        read += [lambda: operations.served_since(1), lambda: operations.probation_over(1)]
        try:
            for reading in read:
                reading()
        finally:
            journal.close()
    except JournalError as error:
        failed = error
    if failed is not None:
        raise failed


@fuzzed
@given(data=st.data())
def test_bytes(whole: Path, data: st.DataObject) -> None:
    content = data.draw(broken_bytes(whole.read_bytes()))
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / JOURNAL_FILE).write_bytes(content)
        took("journal bytes", lambda: read_all(Path(name)), JournalError)


COLUMNS = {
    "runs": ["config", "incumbent", "decision", "started_at", "ended_at", "digest"],
    "trials": ["plan", "result", "started_at", "ended_at"],
    "engines": ["launch", "pid", "started_at", "role"],
    "promotions": ["args", "at"],
    "states": ["at", "state", "reason", "until"],
    "events": ["at", "kind", "content"],
    "rollbacks": ["at", "reason"],
    "starts": ["start"],
    "rules": ["rule", "expires_at"],
}


@fuzzed
@given(data=st.data())
def test_rows(whole: Path, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / JOURNAL_FILE
        path.write_bytes(whole.read_bytes())
        with contextlib.closing(sqlite3.connect(path)) as db:
            table = data.draw(st.sampled_from(sorted(COLUMNS)))
            column = data.draw(st.sampled_from(COLUMNS[table]))
            [found] = db.execute(f"SELECT {column} FROM {table} LIMIT 1").fetchone()  # noqa: S608
            with contextlib.suppress(sqlite3.Error, OverflowError, UnicodeEncodeError):
                db.execute(f"UPDATE {table} SET {column} = ?", (_broken(data, found),))  # noqa: S608
                db.commit()
        took("journal rows", lambda: read_all(Path(name)), JournalError)


def _broken(data: st.DataObject, value: Any) -> Any:
    """Another value for a column: changed JSON, changed bytes, or another type."""
    try:
        content = json.loads(value)
    except (TypeError, ValueError):
        content = None
    texts = broken_values(content).map(json.dumps) if isinstance(content, dict) else JUNK.map(json.dumps)
    other = st.one_of(
        st.none(), st.integers(-(2**63), 2**63 - 1), st.floats(), st.text(max_size=20), st.binary(max_size=9)
    )
    return data.draw(st.one_of(texts, texts, broken_bytes(str(value).encode()), other))
