"""The journal: acknowledged writes survive any kill; an unreadable journal is reported in one line."""

import contextlib
import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sidecar_cases import measured, oom, planned, served

from sidecar.config.schema import Objective, Slo, Workload
from sidecar.config.window import Promotion
from sidecar.record import migrations
from sidecar.record.decisions import Decision, Evidence, Outcome, Provenance
from sidecar.record.events import Operations
from sidecar.record.journal import JOURNAL_FILE, Journal, JournalError
from sidecar.record.trial import Plan, RepairChange, Result, Role, TrialStatus, trial_as_json
from vllm_sloguard.agent.process_identity import Identity
from vllm_sloguard.guard.start_history import LearnedLimit, LimitKind, ReportedStart
from vllm_sloguard.knobs import Value

EVIDENCE = Evidence(
    Decision(Outcome.PROMOTED, "better", 4, gain=0.1, incumbents=(3,), candidates=(4,)),
    Provenance(
        "0.1.0", "0.26.0", "NVIDIA H200", None, "model", None, Objective.LATENCY,
        Slo(ttft_p99_ms=500), Workload(rate=4), Promotion(),
    ),
)  # fmt: skip
CHANGES = (
    RepairChange("max_num_batched_tokens", 4, 8, "at least max_num_seqs"),
    RepairChange("block_size", None, 16, "CPU"),
)


@pytest.mark.parametrize(
    ("result", "status"),
    [
        (served(-80.5, (0.1, math.inf, 0.3)), TrialStatus.FEASIBLE),
        (Result(violation=0.5, value=-80.5, measurement=measured(math.inf, failed=9)), TrialStatus.INFEASIBLE),
        (Result(violation=1.0, value=None, measurement=measured(None, 200, None)), TrialStatus.INFEASIBLE),
        (Result(crash=oom('„Speicher“ [rank0] 100 % — it\'s "full"'), kv_cache_tokens=4096), TrialStatus.CRASHED),
        (None, TrialStatus.ABORTED),
    ],
)
def test_what_is_written_is_read_by_the_next_sidecar(
    tmp_path: Path, result: Result | None, status: TrialStatus
) -> None:
    proposed: dict[str, Value] = {"max_num_seqs": 8, "gpu_memory_utilization": 0.9, "enforce_eager": True}
    plan = Plan(Role.SEARCH, proposed, {**proposed, "middleware": ["a", "b"]}, "anneal", "", CHANGES)
    journal = Journal(tmp_path)
    run = journal.begin_run("digest", "{}", {"max_num_seqs": 2})
    begun = journal.begin_trial(run.id, plan)
    assert journal.trials() == [begun]
    assert begun.status is TrialStatus.RUNNING
    ended = journal.end_trial(begun, result)
    journal.close()

    again = Journal(tmp_path, read_only=True)

    assert again.trials(run.id) == [ended]
    assert again.trials(run.id + 1) == []
    assert again.trials()[0].status is status
    assert [type(value) for value in again.trials()[0].plan.args.values()] == [int, float, bool, list]
    assert again.last_run() == run


def test_only_the_newest_runs_keep_the_scores_of_their_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sidecar.record.journal._SCORED_RUNS", 3)
    journal = Journal(tmp_path)
    plan = Plan(Role.SEARCH, {"max_num_seqs": 8}, {"max_num_seqs": 8}, "anneal", "")
    for _ in range(6):
        run = journal.begin_run("digest", "{}", {})
        for result in (served(-80.5, (0.1, 0.2)), Result(crash=oom("full")), None):
            journal.end_trial(journal.begin_trial(run.id, plan), result)
    journal.begin_run("digest", "{}", {})

    by_run = {run: [t.result for t in journal.trials(run)] for run in range(1, 7)}
    assert [len(results[0].scores) if results[0] else -1 for results in by_run.values()] == [0, 0, 0, 0, 2, 2]
    # All else is kept.
    assert {str(replace(results[0], scores=())) for results in by_run.values() if results[0]} == {
        str(replace(served(-80.5, (0.1, 0.2)), scores=()))
    }
    assert all(results[1] == Result(crash=oom("full")) and results[2] is None for results in by_run.values())


values = st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text()


@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(
    proposed=st.dictionaries(st.text(), values, max_size=4),
    reason=st.text(),
    scores=st.lists(st.floats(0, allow_nan=False), max_size=4),
)
def test_any_trial_comes_back_as_it_was(
    tmp_path: Path, proposed: dict[str, bool | int | float | str], reason: str, scores: list[float]
) -> None:
    journal = Journal(tmp_path)
    plan = Plan(Role.SEARCH, proposed, {**proposed, "list": ["a"]}, "anneal", reason)
    begun = journal.begin_trial(1, plan)
    ended = journal.end_trial(begun, Result(value=1.0, scores=tuple(scores)))

    assert journal.trials()[-1] == ended
    assert ended.plan == plan
    journal.close()


def test_a_trial_ends_once(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    begun = journal.begin_trial(1, planned())
    journal.end_trial(begun, served(-1))

    journal.end_trial(begun, None)

    assert journal.trials()[0].status is TrialStatus.FEASIBLE


def test_trials_are_counted_in_each_run(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    first, second = (journal.begin_run("d", "{}", {}).id for _ in range(2))

    assert [journal.begin_trial(run, planned()).number for run in (first, second, second)] == [1, 1, 2]


def test_runs_engines_promotions_and_states(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    assert (journal.last_run(), journal.state(), journal.promoted("base")) == (None, None, None)
    run = journal.begin_run("digest", "{}", {"a": 1})
    journal.end_run(run.id, Decision(Outcome.PROMOTED, "better"))
    journal.engine_starting("one", "trial", {"port": 1})
    journal.engine_starting("two", "serving", {"port": 2})
    journal.engine_started(Identity(123, 4.5, "two"))
    journal.engine_gone("one")
    journal.promote(run.id, "base", {"max_num_seqs": 8})
    journal.promote(None, "base", {"max_num_seqs": 9})
    journal.enter("tuning", "run 1", until=5.0)
    journal.enter("serving", "restored")
    journal.close()

    again = Journal(tmp_path)

    last = again.last_run()
    assert last is not None
    assert last.decision == Decision(Outcome.PROMOTED, "better")
    assert last.ended_at is not None
    assert [(e.identity, e.role, e.launch) for e in again.engines()] == [
        (Identity(123, 4.5, "two"), "serving", {"port": 2})
    ]
    assert again.promoted("base") == {"max_num_seqs": 9}
    assert again.promoted("other") is None
    assert [(s.state, s.until) for s in again.states()] == [("tuning", 5.0), ("serving", None)]
    assert again.state() == again.states()[-1]


def test_json_is_json_without_scores(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    result = Result(violation=1, value=-1, measurement=measured(math.inf), scores=(1.0,))
    row = trial_as_json(journal.end_trial(journal.begin_trial(1, planned()), result))

    assert row["status"] == "infeasible"
    assert "scores" not in row["result"]
    assert json.dumps(row, allow_nan=False)  # what Python writes for infinity, no other reader of JSON takes


WRITER = """
import sys
from pathlib import Path
from sidecar.record.journal import Journal
from sidecar.record.trial import Plan, Result, Role
from sidecar.record.decisions import Decision, Evidence, Outcome, Provenance
journal = Journal(Path(sys.argv[1]))
run = journal.begin_run("digest", "{}", {}).id
while True:
    trial = journal.begin_trial(run, Plan(Role.SEARCH, {"max_num_seqs": 8}, {"max_num_seqs": 8}, "p", "r"))
    print(f"{run} {trial.number} running", flush=True)
    journal.end_trial(trial, Result(value=float(trial.number)))
    print(f"{run} {trial.number} feasible", flush=True)
"""


def killed_writer(folder: Path, lines: int) -> list[str]:
    """The writes acknowledged by a writer that was killed after about this many acknowledgements."""
    writer = subprocess.Popen([sys.executable, "-c", WRITER, folder], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    said = [writer.stdout.readline() for _ in range(lines)]
    os.kill(writer.pid, signal.SIGKILL)
    said += writer.stdout.readlines()
    writer.stdout.close()
    assert writer.wait() == -signal.SIGKILL
    return [line for line in said if line.endswith("\n")]


def test_kill_at_any_moment_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    acknowledged: dict[tuple[int, int], str] = {}
    for lines in (21, 60, 1):
        for text in killed_writer(tmp_path, lines):
            run, number, status = text.split()
            acknowledged[int(run), int(number)] = status

        trials = {(t.run, t.number): t for t in Journal(tmp_path, read_only=True).trials()}

        # The kill may fall between a write and its acknowledgement: one write more, never one fewer.
        assert set(acknowledged) <= set(trials)
        for key, trial in trials.items():
            if acknowledged.get(key) == "feasible":
                assert trial.status is TrialStatus.FEASIBLE
                assert trial.result == Result(value=float(trial.number))
        runs = {run for run, _ in trials}
        assert all(sum(t.status is TrialStatus.RUNNING for t in trials.values() if t.run == run) <= 1 for run in runs)
        assert len(set(trials) - set(acknowledged)) <= len(runs)
    assert {run for run, _ in acknowledged} == {1, 2, 3}


def test_a_reader_sees_what_a_writer_has_written_and_writes_nothing(tmp_path: Path) -> None:
    writer = Journal(tmp_path)
    writer.begin_trial(1, planned())
    reader = Journal(tmp_path, read_only=True)
    writer.enter("tuning", "run 1")

    assert len(reader.trials()) == 1
    assert [s.state for s in reader.states()] == ["tuning"]
    with pytest.raises(JournalError, match="can't be written"):
        reader.engine_gone("one")


def test_a_missing_journal_is_not_made_by_a_reader(tmp_path: Path) -> None:
    assert "no journal.sqlite in it" in complaint(tmp_path, read_only=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("read_only", [True, False])
def test_a_newer_version_is_refused_and_left_as_it_is(tmp_path: Path, read_only: bool) -> None:
    Journal(tmp_path).close()
    alter(tmp_path, "PRAGMA user_version = 99")
    before = (tmp_path / JOURNAL_FILE).read_bytes()

    assert complaint(tmp_path, read_only) == f"journal of version 99; this sloguard knows version {migrations.VERSION}"
    assert (tmp_path / JOURNAL_FILE).read_bytes() == before


@pytest.mark.parametrize("version", range(1, migrations.VERSION))
def test_a_journal_of_an_older_version_is_read_as_it_is_and_taken_further_by_a_writer(
    tmp_path: Path, version: int
) -> None:
    made = sqlite3.connect(tmp_path / JOURNAL_FILE)
    made.executescript("".join(migrations.MIGRATIONS[:version]) + f"PRAGMA user_version = {version};")
    made.execute("INSERT INTO promotions (base_digest, args, at) VALUES ('base', '{\"a\": 1}', 5)")
    made.commit()
    made.close()

    older = Journal(tmp_path, read_only=True)
    operations = Operations(older, "base")
    assert (older.rules(0.0), older.epoch(), operations.paused()) == ((), 0, None)
    assert [(p.args, p.rolled_back_at) for p in operations.promotions()] == [({"a": 1}, None)]
    rule = LearnedLimit(LimitKind.HEADROOM_BYTES, 5, {"max_num_seqs": 8}, "seen", 1.0, 2.0)
    later = Journal(tmp_path)
    later.record_rule("host", "model", rule)

    later.promote(None, "base", {"a": 2}, EVIDENCE)
    assert later.promoted("base") == {"a": 2}
    assert later.take_over(1) == 1
    again = Journal(tmp_path, read_only=True)
    assert again.rules(1.0) == (rule,)
    assert [(p.args, p.evidence) for p in again.promotions()] == [({"a": 1}, None), ({"a": 2}, EVIDENCE)]


def test_what_was_learned_is_kept_by_host_and_model(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    starts = [ReportedStart({"max_num_seqs": n}, "cuda", 2**36, 2**33 + n, vllm_version="0.26.0") for n in range(60)]
    for start in starts:
        journal.record_start("host", "model", start)
    journal.record_rule("host", "model", LearnedLimit(LimitKind.FREE_BYTES, 7, {}, "seen", 1.0, 50.0))

    assert journal.starts("host", "model") == tuple(starts[-50:])
    assert journal.starts("host", "another") == journal.starts("elsewhere", "model") == ()
    assert [rule.value for rule in journal.rules(49.0, "host", "model")] == [7]
    assert journal.rules(50.0) == journal.rules(49.0, "elsewhere") == journal.rules(49.0, "host", "another") == ()


def test_a_damaged_lesson_is_left_out(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for size in (8, 9):
        journal.record_start("host", "model", ReportedStart({}, "cpu", size, 4))
    alter(tmp_path, "UPDATE starts SET start = '{}' WHERE id = 1")
    assert [start.total_bytes for start in journal.starts("host", "model")] == [9]


@pytest.mark.parametrize("read_only", [True, False])
def test_what_is_no_database_is_refused(tmp_path: Path, read_only: bool) -> None:
    (tmp_path / JOURNAL_FILE).write_text("not a database, and long enough to be looked at as one" * 9)

    assert str(tmp_path / JOURNAL_FILE) in complaint(tmp_path, read_only)


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE trials SET plan = '{'",
        "UPDATE trials SET plan = '[]'",
        """UPDATE trials SET plan = replace(plan, '"search"', '"guess"')""",
        """UPDATE trials SET result = '{"violation": "much"}'""",
        """UPDATE trials SET result = '{"verdict": 1}'""",
        "DROP TABLE trials",
    ],
)
def test_a_damaged_trial_is_one_line(tmp_path: Path, damage: str) -> None:
    journal = Journal(tmp_path)
    journal.end_trial(journal.begin_trial(7, planned()), served(-1))
    journal.close()
    alter(tmp_path, damage)

    with pytest.raises(JournalError) as raised:
        Journal(tmp_path, read_only=True).trials()

    assert len(str(raised.value).splitlines()) == 1
    assert "trials" in str(raised.value) if "DROP" in damage else str(raised.value).startswith("trial 7/1: damaged")


@pytest.mark.parametrize(
    "damage",
    [
        "DROP TABLE runs",
        "UPDATE runs SET decision = '{'",
        "UPDATE runs SET incumbent = '{'",
        "UPDATE engines SET launch = '{'",
        "UPDATE promotions SET args = '{'",
        "UPDATE promotions SET evidence = '{'",
    ],
)
def test_a_damaged_row_of_any_table_is_one_line(tmp_path: Path, damage: str) -> None:
    journal = Journal(tmp_path)
    journal.begin_run("digest", "{}", {})
    journal.engine_starting("one", "trial", {})
    journal.promote(1, "base", {})
    journal.close()
    alter(tmp_path, damage)
    damaged = Journal(tmp_path, read_only=True)

    with pytest.raises(JournalError) as raised:
        _ = damaged.last_run(), damaged.engines(), damaged.promoted("base"), damaged.promotions()

    assert len(str(raised.value).splitlines()) == 1


def test_a_begun_trial_that_can_not_be_written_leaves_the_journal_usable(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    with contextlib.suppress(Exception):  # which one does not matter: there is no UTF-8 of this text
        journal.begin_trial(1, planned(max_num_seqs="\ud800"))
    assert journal.trials() == []

    journal.begin_trial(1, planned())

    assert len(journal.trials()) == 1


def alter(folder: Path, *statements: str) -> None:
    database = sqlite3.connect(folder / JOURNAL_FILE)
    with database:
        for statement in statements:
            database.execute(statement)
    database.close()


def complaint(folder: Path, read_only: bool) -> str:
    with pytest.raises(JournalError) as raised:
        Journal(folder, read_only=read_only)
    assert len(str(raised.value).splitlines()) == 1
    return str(raised.value)


def test_a_reader_that_comes_before_the_tables_is_told_so(tmp_path: Path) -> None:
    (tmp_path / JOURNAL_FILE).touch()
    assert complaint(tmp_path, read_only=True) == "the journal is still being created"
