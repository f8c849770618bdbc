"""The view model of the report, from known journals."""

import dataclasses
import sqlite3
from pathlib import Path

import pytest
from report_cases import INCUMBENT, OOM, Made, only_crashes, whole

from sidecar.config.schema import load_config
from sidecar.record import run_snapshot
from sidecar.record.row_validation import JournalError
from sidecar.record.states import Cause, State
from sidecar.record.trial import Result, Role, TrialStatus
from sidecar.report.decision_summary import Gain, Tone
from sidecar.report.importance import FEWEST
from sidecar.report.plots import plots
from sidecar.report.view_model import ReportView, report_view
from vllm_sloguard import __version__
from vllm_sloguard.crash import Category


def view_of(state: Path, run: int | None = None) -> ReportView:
    return report_view(run_snapshot.read_run(state, run))


@pytest.fixture(scope="module")
def forty(tmp_path_factory: pytest.TempPathFactory) -> ReportView:
    return view_of(whole(tmp_path_factory.mktemp("forty")))


def test_a_promotion_comes_with_its_evidence(forty: ReportView) -> None:
    verdict = forty.verdict

    assert verdict.tone is Tone.GOOD
    assert verdict.headline.startswith("A better configuration was found and promoted")
    assert verdict.gain is not None
    assert 0 < verdict.gain.low < verdict.gain.estimate < verdict.gain.high
    unmet = [(check.condition, check.measured) for check in verdict.checks if not check.met]
    starts = len(verdict.incumbents)
    assert unmet == [("The incumbent fails (then no gain is needed)", f"0 of {starts} starts missed a limit")]
    assert len(verdict.pairs) in (3, 5, 8, 12, 16)
    assert verdict.sentences[0].startswith(
        f"Better in {starts} of {starts} A/B restarts (gain {verdict.gain.estimate:+.1%}"
    )
    assert forty.serving[0].startswith("No `sloguard serve` has run")
    assert "this run's winner (promotion 1), since " in forty.serving[1]
    assert any("rollback --promotion 1" in command.line for command in forty.commands)


def test_every_trial_and_every_limit_is_there(forty: ReportView) -> None:
    assert [entry.number for entry in forty.entries] == list(range(1, len(forty.entries) + 1))
    assert set(forty.limits) == {"ttft_p99_ms", "itl_p99_ms", "e2e_p99_ms", "error_rate"}
    shown = plots(forty)
    assert set(shown) == {
        "gain", "objective", "answers", "percentiles", "limits", "knobs", "importance", "crashes", "time"
    }  # fmt: skip
    drawn = [n for trace in shown["limits"].figure.data if trace.yaxis in (None, "y") for n in trace.x]
    measured = [e.number for e in forty.entries if e.measured]
    assert sorted(drawn) == measured


def test_the_knob_with_the_largest_effect_is_the_most_important(forty: ReportView) -> None:
    assert next(iter(forty.importance.shares)) == "max_num_seqs"
    assert sum(forty.importance.shares.values()) == pytest.approx(1)


def test_few_trials_show_no_importance(tmp_path: Path) -> None:
    made = Made(tmp_path)
    made.search(FEWEST - 1, crashes=False)

    found = view_of(made.close()).importance

    assert not found.shares
    assert f"{FEWEST - 1} trials are too few for this" in found.note


def test_crashes_are_grouped_by_cause(tmp_path: Path) -> None:
    made = Made(tmp_path)
    made.search(1)
    for seqs in (300, 400, 500):
        made.crash({**INCUMBENT, "max_num_seqs": seqs}, Category.OUT_OF_MEMORY, OOM.format(seqs))
    made.crash({**INCUMBENT, "max_num_seqs": 8}, Category.STARTUP_FAILURE, "ValueError: no")

    first, second = view_of(made.close()).crashes

    assert (first.category, first.numbers, first.evidence) == ("out of memory", (2, 3, 4), OOM.format(300))
    assert first.alone == "max_num_seqs 300 or more; measured trials had 32 at most"
    assert (second.numbers, second.alone) == ((5,), "max_num_seqs 8 or less; measured trials had 32 at least")


def test_a_run_of_crashes_has_a_report(tmp_path: Path) -> None:
    found = view_of(only_crashes(tmp_path))

    assert found.verdict.headline == "The incumbent was kept: no configuration met the SLO, nor did the incumbent"
    assert {entry.status for entry in found.entries} == {TrialStatus.CRASHED}
    assert sum(len(group.numbers) for group in found.crashes) == 8
    assert {"crashes", "time"} <= set(plots(found))
    assert not {"objective", "answers", "limits"} & set(plots(found))


def test_a_report_names_the_version_that_made_the_run_and_the_one_that_wrote_the_report(forty: ReportView) -> None:
    [version] = [fact.value for fact in forty.versions if fact.name == "sloguard"]
    assert version == f"{__version__} (run), {__version__} (report)"
    assert not [line for line in forty.configuration.splitlines() if line.startswith("sloguard:")]


def test_a_run_of_an_earlier_version_has_none_recorded(tmp_path: Path) -> None:
    folder = only_crashes(tmp_path)
    with sqlite3.connect(folder / "journal.sqlite") as db:
        db.execute("UPDATE runs SET config = json_remove(config, '$.sloguard')")
    [version] = [fact.value for fact in view_of(folder).versions if fact.name == "sloguard"]
    assert version == f"not recorded (run), {__version__} (report)"


def test_one_trial_is_enough(tmp_path: Path) -> None:
    made = Made(tmp_path)
    made.search(1)

    found = view_of(made.close())

    assert found.verdict.headline == "This run was interrupted before its decision"
    assert "1 feasible (met the SLO)" in found.verdict.sentences[-1]
    assert "objective" in plots(found)


def test_a_run_in_progress_is_marked(tmp_path: Path) -> None:
    made = Made(tmp_path)
    made.search(5)
    made.add(made.plan(), None, running=True)

    found = report_view(dataclasses.replace(run_snapshot.read_run(made.close()), alive=True, now=made.now + 100))

    assert found.verdict.tone is Tone.OPEN
    assert found.verdict.headline.startswith("This run is in progress")
    assert "1 running" in found.verdict.sentences[-1]
    assert found.entries[-1].took != "-"


def test_a_run_without_trials_has_a_report(tmp_path: Path) -> None:
    found = view_of(Made(tmp_path).close())

    assert found.verdict.sentences[-1] == "No trial has been started."
    assert plots(found) == {}


def test_a_rollback_has_its_reason(tmp_path: Path) -> None:
    made = Made(tmp_path)
    made.search(40)
    made.validate()
    made.decide()
    made.journal.write("INSERT INTO rollbacks VALUES (1, ?, 'it burned the error budget')", (made.now,))

    found = view_of(made.close())

    assert "was rolled back" in found.serving[1]
    assert "it burned the error budget" in found.serving[1].lower()
    assert "that the next start serves: the arguments of the configuration file" in found.serving[2]
    assert not any("rollback --promotion" in command.line for command in found.commands)


@pytest.mark.parametrize(
    ("state", "cause", "first"),
    [
        (State.HALTED, Cause.ENGINE_STOPPED, "Nothing serves: the sidecar and its engine were stopped at "),
        (State.HALTED, Cause.ENGINE_LEFT, "The sidecar was stopped at "),
        (State.HALTED, Cause.FAILED, "The sidecar is not running; it ended at "),
        (State.SERVING, Cause.STARTED, "The sidecar is not running and recorded no end"),
    ],
)
def test_the_state_of_the_service_comes_first(tmp_path: Path, state: State, cause: Cause, first: str) -> None:
    made = Made(tmp_path)
    made.search(1)
    made.journal.enter(state, "whatever it says", cause=cause)

    found = view_of(made.close()).serving

    assert found[0].startswith(first)
    assert ("left its engine serving" in found[0]) is (cause is Cause.ENGINE_LEFT)
    assert found[1].startswith("Configuration that the next start serves: the arguments of the configuration")


def test_the_configuration_in_the_report_is_that_of_the_run(tmp_path: Path) -> None:
    made = Made(tmp_path)
    made.search(1)
    made.close()
    again = tmp_path / "again.yaml"
    again.write_text(view_of(made.state).configuration)
    read = load_config(again)

    assert list(read.search.knobs) == list(made.config.search.knobs)
    # The environment is never recorded.
    assert read.model_copy(update={"engine": made.config.engine}).digest() == made.config.digest()


def over(made: Made, value: float | None = -900.0, ttft_p99_ms: float = 1000.0) -> Result:
    """A result above the TTFT limit of 500 ms."""
    good = made.measured(INCUMBENT)
    assert good.measurement is not None
    measurement = dataclasses.replace(good.measurement, ttft_p99_ms=ttft_p99_ms)
    return dataclasses.replace(good, violation=ttft_p99_ms / 500 - 1, value=value, measurement=measurement, stopped="")


def test_the_nearest_miss_is_named_if_nothing_met_the_slo(tmp_path: Path) -> None:
    made = Made(tmp_path)
    made.add(made.plan(Role.BASELINE), over(made, None))
    for ttft in (900.0, 612.0, 700.0):
        made.add(made.plan(), over(made, ttft_p99_ms=ttft))
    made.decide()

    verdict = view_of(made.close()).verdict

    assert verdict.headline == "The incumbent was kept: no configuration met the SLO, nor did the incumbent"
    assert "the incumbent was infeasible in its first trial." in verdict.sentences[1]
    assert "Trial 3 came nearest: it exceeds TTFT p99 by 22%." in verdict.sentences[1]


@pytest.mark.parametrize(("misses", "met"), [(1, False), (3, True)])
def test_the_checks_show_whether_the_incumbent_surely_misses(tmp_path: Path, misses: int, met: bool) -> None:
    made = Made(tmp_path)
    made.add(made.plan(Role.BASELINE), over(made, None))
    chosen = {**INCUMBENT, "max_num_seqs": 64}
    good = made.measured(chosen)
    made.add(made.plan(knobs=chosen), good)
    for pair in range(3):
        # With some run-to-run spread.
        missed = over(made, ttft_p99_ms=1000.0 + pair)
        made.add(made.plan(Role.REFERENCE), missed if pair < misses else made.measured(INCUMBENT))
        made.add(made.plan(Role.VALIDATION, chosen), made.measured(chosen))
    made.decide()

    verdict = view_of(made.close()).verdict

    row = next(check for check in verdict.checks if check.condition.startswith("The incumbent fails"))
    assert (row.measured, row.met) == (f"{misses} of 3 starts missed a limit", met)
    assert "; the incumbent was infeasible in its first trial. The best of many" in verdict.sentences[1]
    assert any(check.measured.startswith("mean over starts at most ") for check in verdict.checks)


def test_labels_of_the_gain_plot_do_not_overlap_lines(forty: ReportView) -> None:
    close = Gain(estimate=-0.1, low=-0.2, high=-0.05, least=0.02, confidence=0.95)
    drawn = plots(dataclasses.replace(forty, verdict=dataclasses.replace(forty.verdict, gain=close)))["gain"].figure
    texts = {note.text: note for note in drawn.layout.annotations}

    # Each label is on the side of its line away from the other line.
    assert (texts["no difference"].x, texts["no difference"].xanchor) == (0, "right")
    assert (texts["required"].x, texts["required"].xanchor) == (0.02, "left")
    assert drawn.layout.xaxis.range[1] > 0.05


def test_truncated_evidence_ends_in_an_ellipsis(tmp_path: Path) -> None:
    made = Made(tmp_path)
    made.crash(dict(INCUMBENT), Category.STARTUP_FAILURE, "ValueError: " + "x" * 400)

    found = view_of(made.close())

    assert found.entries[0].note.endswith("xxx…")
    assert found.crashes[0].evidence.endswith("xxx")


def test_failed_requests_are_plotted_without_infinities(tmp_path: Path) -> None:
    made = Made(tmp_path)
    made.search(2, crashes=False)
    good = made.measured(INCUMBENT)
    assert good.measurement is not None
    failed = dataclasses.replace(good.measurement, failed=9, ttft_p99_ms=float("inf"), e2e_p99_ms=float("inf"))
    scores = (*good.scores[:-9], *[float("inf")] * 9)
    bad = dataclasses.replace(good, violation=5.0, measurement=failed, scores=scores)
    made.add(made.plan(Role.SEARCH, {**INCUMBENT, "max_num_seqs": 4}), bad)
    unmeasured = dataclasses.replace(good.measurement, ttft_p99_ms=None, itl_p99_ms=None, e2e_mean_ms=None)
    made.add(made.plan(), Result(violation=1.0, measurement=unmeasured))

    found = view_of(made.close())

    assert found.entries[2].measured["ttft_p99_ms"] == float("inf")
    assert found.entries[3].measured["ttft_p99_ms"] is None
    assert found.entries[3].value is None
    # Plots have no infinite values.
    for plot in plots(found).values():
        assert "Infinity" not in (plot.figure.to_json() or "")


@pytest.mark.parametrize("objective", ["goodput", "capacity"])
def test_other_objectives_have_their_units(tmp_path: Path, objective: str) -> None:
    found = view_of(whole(tmp_path, 12, objective=objective))

    assert "answers" not in plots(found)  # no latency of single requests is kept for them
    assert any("meet" in said and "SLO)" in said for said in found.verdict.sentences)


def test_runs_are_chosen_by_number(tmp_path: Path) -> None:
    state = whole(tmp_path, 4)

    assert view_of(state, 1).run == 1
    with pytest.raises(JournalError, match="there is no run 7; there are 1"):
        view_of(state, 7)


def test_journals_of_earlier_versions_are_read(tmp_path: Path) -> None:
    made = Made(tmp_path)
    made.search(6, crashes=False)
    decision = '{"outcome": "promoted", "reason": "it was better", "trial": 2}'
    made.journal.write("UPDATE runs SET decision = ?", (decision,))
    # Unknown fields of other versions are ignored.
    made.journal.write("UPDATE runs SET config = json_set(config, '$.promotion.repeats', 2)", ())

    found = view_of(made.close())

    assert found.verdict.gain is None
    assert found.verdict.headline == "A better configuration was found and promoted: trial 2"


@pytest.mark.parametrize("part", ['"pairs": "many"', '"candidates": 7', '"gain": {}'])
def test_a_damaged_decision_is_one_line(tmp_path: Path, part: str) -> None:
    made = Made(tmp_path)
    made.journal.write("UPDATE runs SET decision = ?", ('{"outcome": "promoted", "reason": "x", ' + part + "}",))

    with pytest.raises(JournalError, match="the journal is damaged: decision: "):
        view_of(made.close())


def test_a_damaged_configuration_is_one_line(tmp_path: Path) -> None:
    made = Made(tmp_path)
    made.journal.write("UPDATE runs SET config = json_set(config, '$.slo.ttft_p99_ms', 'soon')", ())

    with pytest.raises(JournalError, match=r"run 1: its configuration can't be read: ttft_p99_ms: .*valid number"):
        view_of(made.close())


def test_goodput_is_shown_as_the_share_that_misses(tmp_path: Path) -> None:
    found = view_of(whole(tmp_path, 4, slo={"ttft_p99_ms": 500, "goodput": 0.97}))

    assert found.limits == {"ttft_p99_ms": 500, "error_rate": 0.01, "miss_rate": 0.03}
    assert all("miss_rate" in entry.measured for entry in found.entries if entry.measured)
    assert any("requests that miss a limit at most 3%" in fact.value for fact in found.versions)
