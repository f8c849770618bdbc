"""The block of figures at the top of the report, and the advice after a run without a promotion."""

import dataclasses
import math
from pathlib import Path

import pytest
from report_cases import INCUMBENT, Made, only_crashes, whole

from sidecar.measure.measurement import Measurement
from sidecar.record import run_snapshot
from sidecar.record.decisions import NearestMiss, Outcome
from sidecar.record.run_snapshot import RunSnapshot
from sidecar.record.trial import Result, Role
from sidecar.report.advice import detectable, pairs_for, run_advice
from sidecar.report.outcome_table import OutcomeRow, OutcomeTable
from sidecar.report.view_model import report_view


def snapshot_of(state: Path) -> RunSnapshot:
    return run_snapshot.read_run(state)


def table(state: Path) -> OutcomeTable:
    return report_view(snapshot_of(state)).outcome


def row(found: OutcomeTable, metric: str) -> OutcomeRow:
    return next(r for r in found.rows if r.metric == metric)


@pytest.fixture(scope="module")
def promoted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whole(tmp_path_factory.mktemp("promoted"))


def test_each_limit_has_its_figures_before_and_after(promoted: Path) -> None:
    found = table(promoted)

    assert (found.before, found.after) == ("before", "after")
    limits = {r.metric: (r.limit, r.before_met, r.met) for r in found.rows if r.limit}
    assert limits == {
        "TTFT p99": ("500 ms", True, True),
        "ITL p99": ("60 ms", True, True),
        "E2E p99": ("6,000 ms", True, True),
        "error rate": ("1%", True, True),
    }
    assert [r.metric for r in found.rows if not r.limit] == [
        "mean E2E", "TTFT p50", "ITL p50", "E2E p50", "output tokens/s", "goodput",
    ]  # fmt: skip


def test_the_change_of_the_objective_is_that_of_the_decision(promoted: Path) -> None:
    decision = snapshot_of(promoted).decision
    assert decision is not None
    assert decision.low is not None
    assert decision.high is not None
    objective = row(table(promoted), "mean E2E")

    assert objective.is_objective
    assert objective.change == f"{-(decision.gain or 0):+.1%}"
    assert objective.interval == f"{-decision.high:+.1%} to {-decision.low:+.1%}"
    assert objective.better is True


def test_a_change_is_only_better_or_worse_if_its_interval_excludes_no_change(promoted: Path) -> None:
    found = table(promoted)

    assert row(found, "TTFT p99").better is True
    assert row(found, "ITL p99").better is False  # it rises, though it still meets its limit
    assert row(found, "goodput").better is None


def test_the_changed_arguments_and_the_command_line_are_those_of_the_promotion(promoted: Path) -> None:
    snapshot, found = snapshot_of(promoted), table(promoted)
    args = snapshot.promotions[0].args

    assert {c.name for c in found.changes} == {
        name for name, v in args.items() if snapshot.run.incumbent.get(name) != v
    }
    assert found.serve is not None
    assert found.serve.purpose == "Serve the promoted configuration"
    assert f"--max-num-seqs {args['max_num_seqs']}" in found.serve.line
    assert " GPU minutes, in 48 trials over " in found.spent


def over(made: Made, ttft_p99_ms: float) -> Result:
    good = made.measured(INCUMBENT)
    assert good.measurement is not None
    measurement: Measurement = dataclasses.replace(good.measurement, ttft_p99_ms=ttft_p99_ms)
    return dataclasses.replace(good, violation=ttft_p99_ms / 500 - 1, measurement=measurement, stopped="")


def nothing_feasible(folder: Path) -> Path:
    made = Made(folder)
    made.add(made.plan(Role.BASELINE), over(made, 1000.0))
    made.add(made.plan(knobs={**INCUMBENT, "max_num_seqs": 64}), over(made, 612.0))
    made.decide()
    return made.close()


def test_without_a_candidate_the_nearest_miss_is_compared(tmp_path: Path) -> None:
    state = nothing_feasible(tmp_path)
    view = report_view(snapshot_of(state))

    assert view.slo_warning == "The current configuration misses your SLO (trial 1)"
    assert (view.outcome.before, view.outcome.after) == ("incumbent", "nearest miss (trial 2)")
    ttft = row(view.outcome, "TTFT p99")
    assert (ttft.before, ttft.after, ttft.before_met, ttft.met) == ("1,000 ms", "612 ms", False, False)
    assert view.outcome.serve is not None
    assert "incumbent" in view.outcome.serve.purpose
    assert view.advice[0].startswith(
        "Nothing met the SLO. The nearest, trial 2, reached TTFT p99 612 ms against a limit"
    )


def test_the_rate_that_meets_the_slo_is_advised(tmp_path: Path) -> None:
    snapshot = snapshot_of(nothing_feasible(tmp_path))
    assert snapshot.decision is not None
    miss = NearestMiss(2, "ttft_p99_ms", 0.224, highest_rate=3.5)
    decision = dataclasses.replace(snapshot.decision, nearest_miss=miss)

    assert (
        "It meets the SLO at 3.5 requests/s instead of 8"
        in run_advice(dataclasses.replace(snapshot, decision=decision))[1]
    )


def test_a_crashed_incumbent_is_no_good_figure(tmp_path: Path) -> None:
    view = report_view(snapshot_of(only_crashes(tmp_path)))

    assert view.slo_warning == "The current configuration crashed when it was measured (trial 1)"
    assert {(r.before, r.before_met) for r in view.outcome.rows} == {("crashed", False)}
    assert view.advice == (
        "No trial was measured. Start with the first row under Crashes: fix what stops the incumbent.",
    )


def decided(promoted: Path, **fields: object) -> RunSnapshot:
    snapshot = snapshot_of(promoted)
    assert snapshot.decision is not None
    return dataclasses.replace(snapshot, decision=dataclasses.replace(snapshot.decision, **fields))  # pyright: ignore[reportArgumentType]


def test_the_advice_after_a_noisy_comparison_names_pairs_and_minutes(promoted: Path) -> None:
    snapshot = decided(promoted, outcome=Outcome.INCONCLUSIVE, gain=0.2, low=-0.1, high=0.4, noise=0.13, pairs=5)
    needed = pairs_for(0.2, 0.13, snapshot)
    assert needed == 8
    [said] = run_advice(snapshot)

    # Validation trials took 80 s in this journal: three more pairs are six of them.
    expected = f"8 pairs would show {detectable(8, 0.13, snapshot):+.0%}; about 8.0 min more."
    assert said == f"The run-to-run spread was 13%: {expected}"


def test_a_gain_that_is_surely_too_small_is_not_worth_more_pairs(promoted: Path) -> None:
    [said] = run_advice(decided(promoted, outcome=Outcome.KEPT, gain=0.01, low=-0.01, high=0.03, noise=0.01, pairs=5))

    assert said.startswith(
        "The candidate's gain is at most +3.0%; +5% is required, and more pairs would not change that."
    )


def test_a_small_gain_asks_for_a_wider_search_and_names_a_large_spread(promoted: Path) -> None:
    fields = {"outcome": Outcome.KEPT, "gain": 0.01, "low": -0.1, "high": 0.2, "pairs": 3}
    [quiet] = run_advice(decided(promoted, **fields, noise=0.02))
    noisy = run_advice(decided(promoted, **fields, noise=0.2))

    assert quiet.startswith(
        "The estimated gain is +1.0%; +5% is required. Only 39 configurations of 6 knobs were tried: "
    )
    assert noisy[0] == quiet
    assert noisy[1].startswith("The run-to-run spread was 20%: 16 pairs can detect gains of ")


def test_more_noise_needs_more_pairs(promoted: Path) -> None:
    snapshot = snapshot_of(promoted)
    effects = [detectable(pairs, 0.1, snapshot) for pairs in (3, 8, 16)]

    assert effects == sorted(effects, reverse=True)
    assert detectable(8, 0.2, snapshot) > detectable(8, 0.1, snapshot)
    assert pairs_for(0.01, 0.5, snapshot) is None
    # 2% one-sided error and 80% power: (2.05 + 0.84) standard errors of a difference of two means.
    assert math.log1p(-effects[1]) == pytest.approx(-(2.054 + 0.842) * 0.1 * math.sqrt(2 / 8), rel=1e-3)


def test_one_start_of_each_claims_nothing(tmp_path: Path) -> None:
    made = Made(tmp_path)
    made.search(6, crashes=False)
    found = table(made.close())

    assert {r.interval for r in found.rows} == {""}
    assert {r.better for r in found.rows} == {None}
    assert any("a change may be chance" in note for note in found.notes)
