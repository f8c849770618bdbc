"""`sloguard status`: what is running, whether the SLO is met, and what to do now."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
from report_cases import only_crashes, whole
from sidecar_cases import configured, measured, oom, planned, served, trial

from sidecar.cli.service_facts import ProbationStage, ServiceFacts, ServingNow, read_service_facts
from sidecar.cli.status_lines import next_action, slo_standing, status_lines
from sidecar.config.schema import load_config
from sidecar.observe.served_slo import SERVED_SLO, SERVED_SLO_FILE, ServedSlo
from sidecar.observe.slo_compliance import ComplianceReport, LimitCompliance, SloCompliance
from sidecar.record import lock
from sidecar.record.decisions import Decision, Outcome
from sidecar.record.events import Event, EventKind
from sidecar.record.journal import Journal, Promoted, Run, StateRecord
from sidecar.record.run_snapshot import setup_of_config
from sidecar.record.states import State
from sidecar.record.trial import Result, Role

NOW = 1_800_000_000.0
LABELS = ["serving", "sidecar", "SLO", "last decision", "probation", "rollback", "next window", "do now"]
KEPT = Decision(Outcome.KEPT, "none was better")
MISSED = trial(1, planned(Role.BASELINE), Result(violation=0.5))
CRASHED = trial(1, planned(Role.BASELINE), Result(crash=oom()))
MET = trial(1, planned(Role.BASELINE), served(-80.0))


def facts(**changes: object) -> ServiceFacts:
    """A sidecar that serves the file's arguments, without any run."""
    base = ServiceFacts(
        now=NOW,
        pid=12,
        epoch=3,
        state=StateRecord(NOW - 600, State.SERVING, "vLLM is up", None),
        serving=ServingNow(None, NOW - 600, "http://127.0.0.1:8000"),
        run=None,
        setup=None,
        trials=(),
        advice=(),
        paused=None,
        last_window=None,
        promotion=None,
        last_rollback=None,
        probation=ProbationStage.NONE,
        probation_until=None,
        config_known=True,
        next_window_at=None,
        cron=None,
        rules=(),
        served_slo=None,
        watched=None,
    )
    return replace(base, **changes)  # pyright: ignore[reportArgumentType]


def run(decision: Decision | None) -> Run:
    return Run(1, "", {}, NOW - 900, NOW - 300 if decision else None, decision)


def text_of(found: ServiceFacts, label: str) -> str:
    return next(line.text for line in status_lines(found) if line.label == label)


def users(missed: bool, requests: int = 500) -> ServedSlo:
    limit = LimitCompliance("itl_p99_ms", 60.0, 84.0 if missed else 41.0)
    compliance = SloCompliance.MISSED if missed else SloCompliance.MET
    return ServedSlo(NOW, ComplianceReport(compliance, 900.0, requests, 8.0, (limit,)))


def test_every_line_is_always_there() -> None:
    assert [line.label for line in status_lines(facts())] == LABELS


def test_what_serves_comes_first_with_its_address_and_since_when() -> None:
    first = status_lines(facts())[0]
    assert first.text.startswith("the file's arguments at http://127.0.0.1:8000, since 20")
    assert first.text.endswith("(10.0 min)")


@pytest.mark.parametrize("missed", [False, True])
def test_the_slo_is_judged_by_users_requests_where_there_are_enough(missed: bool) -> None:
    slo = slo_standing(facts(served_slo=users(missed), run=run(KEPT), trials=(MET if missed else MISSED,)))
    figure = "84 ms" if missed else "41 ms"
    assert slo.compliance is (SloCompliance.MISSED if missed else SloCompliance.MET)
    assert slo.text == f"500 requests of users (8/s) in the last 15.0 min; ITL p99 {figure} (limit 60 ms)"


def test_without_users_the_last_measurement_counts() -> None:
    assert slo_standing(facts()).compliance is SloCompliance.UNKNOWN
    assert slo_standing(facts(run=run(KEPT), trials=(MET,))).compliance is SloCompliance.MET
    missed = slo_standing(facts(run=run(KEPT), trials=(MISSED,)))
    assert missed.compliance is SloCompliance.MISSED
    assert missed.text.startswith("a limit was missed; trial 1 of run 1, ")


def test_the_limits_that_the_last_measurement_missed_are_named(tmp_path: Path) -> None:
    setup = setup_of_config(configured(tmp_path))
    slow = trial(1, planned(Role.BASELINE), Result(violation=0.5, measurement=measured(840.0)))
    slo = slo_standing(facts(run=run(KEPT), setup=setup, trials=(slow,)))
    assert slo.text.startswith("TTFT p99 840 ms (limit 500 ms); trial 1 of run 1, ")


def test_after_a_promotion_the_candidates_measurement_counts_unless_it_was_rolled_back() -> None:
    winner = trial(9, planned(Role.VALIDATION), served(-40.0))
    promoted = Promoted(2, 1, "", {}, NOW - 300, None)
    found = facts(run=run(Decision(Outcome.PROMOTED, "better")), trials=(MISSED, winner), promotion=promoted)
    assert slo_standing(found).text.startswith("as measured in trial 9 of run 1, ")
    assert slo_standing(replace(found, promotion=None)).compliance is SloCompliance.UNKNOWN


def test_probation_and_rollback_are_lines_of_their_own() -> None:
    promoted = Promoted(2, 1, "", {}, NOW - 300, None)
    during = facts(promotion=promoted, probation=ProbationStage.IN_PROGRESS, probation_until=NOW + 600)
    assert text_of(during, "probation").endswith("(10.0 min left)")
    assert text_of(facts(promotion=promoted, probation=ProbationStage.PASSED), "probation") == "of promotion 2: passed"
    undone = replace(promoted, rolled_back_at=NOW - 60, rollback_reason="it crashed 3 times within 10 minutes")
    assert text_of(facts(last_rollback=undone), "rollback").endswith("(60 s ago): it crashed 3 times within 10 minutes")


def test_the_next_window_is_a_time_or_why_there_is_none() -> None:
    assert text_of(facts(), "next window") == "none is scheduled (window.cron is not set)"
    assert text_of(facts(config_known=False), "next window") == "unknown without the file: -c sloguard.yaml"
    at = facts(next_window_at=NOW + 7200, cron="0 3 * * *")
    assert text_of(at, "next window").endswith('in 2.0 h (window.cron "0 3 * * *")')
    paused = facts(paused=Event(NOW, EventKind.PAUSED, {"reason": "release week"}), next_window_at=NOW + 7200)
    assert text_of(paused, "next window").endswith(": release week")


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (facts(pid=None, serving=None), "run `sloguard serve -c sloguard.yaml`: it starts vLLM"),
        (facts(pid=None), "run `sloguard serve -c sloguard.yaml`: it takes the running vLLM over"),
        (facts(), "run `sloguard retune --now` when"),
        (facts(run=run(KEPT), trials=(MET,)), "nothing"),
        (facts(run=run(KEPT), trials=(MISSED,)), "run `sloguard retune --now` when"),
        (facts(run=run(Decision(Outcome.INTERRUPTED, "cut")), trials=(MET,)), "run `sloguard retune --now` to repeat"),
        (facts(run=run(Decision(Outcome.INCONCLUSIVE, "spread")), trials=(MET,)), "no action needed."),
        (facts(run=run(KEPT), trials=(MISSED,), advice=("Raise that limit.", "Add engines.")), "Raise that limit. Add"),
        (facts(run=run(KEPT), trials=(CRASHED,)), "find out why the current configuration crashed: `sloguard report"),
        (facts(probation_until=NOW + 60), "nothing: the promotion is rolled back automatically"),
        (facts(paused=Event(NOW, EventKind.PAUSED, {})), "run `sloguard resume`"),
        (facts(state=StateRecord(NOW, State.TUNING, "", NOW + 60)), "nothing: service is restored"),
        (facts(state=StateRecord(NOW, State.RESTORING, "", None)), "wait until vLLM is up"),
    ],
)
def test_the_last_line_says_what_to_do(found: ServiceFacts, expected: str) -> None:
    assert text_of(found, "do now").startswith(expected)


def test_a_window_names_the_state_instead_of_a_configuration() -> None:
    tuning = facts(state=StateRecord(NOW, State.TUNING, "the service is drained", NOW + 60), serving=None)
    assert text_of(tuning, "serving").startswith("nothing: tuning; the window ends at 20")


def test_the_facts_of_a_state_folder(tmp_path: Path) -> None:
    state = whole(tmp_path / "promoted", 14)
    config = load_config(state.parent / "sloguard.yaml")
    found = read_service_facts(state, config)
    assert found.promotion is not None
    assert (found.pid, found.serving, found.probation) == (None, None, ProbationStage.NOT_BEGUN)
    assert next_action(found, SloCompliance.MET).endswith("it starts vLLM")
    crashed = read_service_facts(only_crashes(tmp_path / "crashes", 4), None)
    assert slo_standing(crashed).text.startswith("the current configuration crashed in trial 1 of run 1, ")


def test_an_old_report_of_users_requests_does_not_count(tmp_path: Path) -> None:
    config = configured(tmp_path)
    Journal(config.state).close()
    with lock.held(config.state):
        for age_s, known in ((10.0, True), (600.0, False)):
            report = replace(users(missed=False), at=time.time() - age_s)
            (config.state / SERVED_SLO_FILE).write_bytes(SERVED_SLO.dump_json(report))
            assert (read_service_facts(config.state, config).served_slo is not None) is known
