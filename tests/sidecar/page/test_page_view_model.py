"""The view model of the page, without a server."""

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine_bench import write_config
from page_bench import OOM, measured, result
from pydantic import TypeAdapter

from sidecar.config.schema import Config, load_config
from sidecar.config.slo import Slo
from sidecar.measure.capacity_search import RateResult
from sidecar.observe.traffic import SampledRequest, Traffic
from sidecar.page.heartbeat import live
from sidecar.page.slo_meters import slo_meters
from sidecar.page.view_model import PageFacts, PageView, TrialShown, page_view
from sidecar.record.decisions import Decision, NearestMiss, Outcome
from sidecar.record.events import Event, EventKind
from sidecar.record.journal import Promoted, Run
from sidecar.record.run_snapshot import setup_of
from sidecar.record.states import State
from sidecar.record.trial import Plan, Result, Role, Trial
from sidecar.service.state_machine import Standing
from vllm_sloguard.wire import telemetry_pb2 as pb

SLO = Slo(ttft_p99_ms=500, itl_p99_ms=50)
RUN = Run(3, "digest", {}, 90.0, None, None)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(write_config(tmp_path, engine={"args": {"max-num-seqs": 2}}, slo={"ttft_p99_ms": 500}))


def view_of(config: Config, state: State = State.TUNING, **facts: Any) -> PageView:
    given: dict[str, Any] = {"setup": setup_of(config.model_dump(mode="json"), RUN.id), **facts}
    return page_view(config, PageFacts(Standing(state, "because", 100.0), 7, **given), version="v", token_file="")


def trial(role: Role, ended: Result | None, *, number: int = 1, refusal: str = "") -> Trial:
    knobs: dict[str, Any] = {"max_num_seqs": 8}
    return Trial(3, number, Plan(role, knobs, knobs, "anneal", "why", (), refusal), 100.0, 130.0, ended)


def shown(config: Config, ended: Trial) -> TrialShown:
    run = view_of(config, run=RUN, trials=(ended,)).run
    assert run is not None
    return run.trials[0]


def test_a_trial_that_meets_the_slo(config: Config) -> None:
    row = shown(config, trial(Role.SEARCH, result(measured(ttft_ms=300))))

    assert (row.state.label, row.configuration, row.role) == ("feasible", "max_num_seqs=8", "search: anneal")
    assert (row.value, row.objective, row.took_s) == (300, "300 ms", 30)
    ttft = row.meters[0]
    assert (ttft.measured, ttft.limit, ttft.share, ttft.met) == ("300 ms", "500 ms", 0.6, True)


def test_a_run_is_judged_by_its_own_configuration(config: Config) -> None:
    recorded = config.model_dump(mode="json")
    recorded |= {"slo": {"ttft_p99_ms": 200}, "objective": "goodput"}
    recorded["search"]["budget"] = 3
    ended = trial(Role.SEARCH, Result(violation=0.5, value=10.0, measurement=measured(ttft_ms=300)))
    run = view_of(config, run=RUN, trials=(ended,), setup=setup_of(recorded, RUN.id)).run

    assert run is not None
    assert (run.goal.name, run.budget) == ("goodput", 3)
    ttft = run.trials[0].meters[0]
    assert (ttft.limit, ttft.met, run.trials[0].state.label) == ("200 ms", False, "infeasible")


def test_a_long_crash_is_cut_visibly(config: Config) -> None:
    crash = replace(OOM, evidence="word " * 100)
    assert shown(config, trial(Role.SEARCH, Result(crash=crash))).note.endswith("word…")


@pytest.mark.parametrize(("validated", "analysis"), [(0, 6), (1, 6), (5, 6), (6, 10), (15, 16), (16, None)])
def test_validation_counts_to_the_next_analysis(config: Config, validated: int, analysis: int | None) -> None:
    recorded = config.model_dump(mode="json")
    recorded["promotion"]["pairs"] = [3, 5, 8]
    setup = setup_of(recorded, RUN.id)
    trials = [trial(Role.VALIDATION, result(measured()), number=n) for n in range(validated)]
    run = view_of(config, run=RUN, trials=tuple(trials), setup=setup).run
    assert run is not None
    assert (run.validated, run.next_analysis) == (validated, analysis)

    crashed = trial(Role.REFERENCE, Result(crash=OOM), number=99)
    run = view_of(config, run=RUN, trials=(*trials, crashed), setup=setup).run
    assert run is not None
    assert run.next_analysis is None


def test_the_files_arguments_are_listed(config: Config) -> None:
    assert view_of(config).configuration.changes == ("max_num_seqs 2",)


def test_a_crash_has_its_category_and_its_text(config: Config) -> None:
    row = shown(config, trial(Role.UNGUARDED, Result(crash=OOM)))

    assert (row.state.label, row.crash, row.value) == ("crashed", "out of memory", None)
    assert "CUDA out of memory. Tried to allocate 2.00 GiB." in row.note
    assert {f.measured for f in row.meters} == {"-"}


def test_lower_bounds_can_only_show_a_miss(config: Config) -> None:
    row = shown(config, trial(Role.SEARCH, result(measured(600, 20, 700, None), violation=1, stopped="too slow")))

    assert [f.measured for f in row.meters] == ["≥ 600 ms", "≥ 20.0 ms", "-", "≥ 700 ms"]
    assert [f.met for f in row.meters] == [False, None, None, None]
    assert "stopped: too slow" in row.note


def test_an_unmeasured_limit_is_not_met() -> None:
    nothing, failed, *_ = slo_meters(lambda s: math.inf if s.name == "itl_p99_ms" else None, SLO)

    assert (nothing.measured, nothing.share, nothing.met) == ("-", None, None)
    assert (failed.measured, failed.share, failed.met) == ("failed", 2.0, False)


def test_trials_that_did_not_run_are_not_counted(config: Config) -> None:
    trials = (
        trial(Role.BASELINE, result(measured())),
        trial(Role.SEARCH, None, number=2),
        trial(Role.SEARCH, None, number=3, refusal="no room"),
        trial(Role.VALIDATION, result(measured()), number=4),
    )
    run = view_of(config, run=RUN, trials=trials).run

    assert run is not None
    assert (run.searched, run.validated, run.budget) == (1, 1, config.search.budget)
    assert [t.state.label for t in run.trials] == ["feasible", "aborted", "refused", "feasible"]
    assert run.trials[2].note == "no room"


def test_a_current_configuration_that_misses_the_slo_is_named(config: Config) -> None:
    trials = (trial(Role.BASELINE, Result(violation=0.4, measurement=measured(900))),)
    shown = view_of(config, run=RUN, trials=trials).run
    assert shown is not None
    assert shown.misses_slo == "The current configuration misses the SLO: it was infeasible in trial 1 of run 3."
    promoted = view_of(config, run=replace(RUN, decision=Decision(Outcome.PROMOTED, "")), trials=trials).run
    assert promoted is not None
    assert promoted.misses_slo == ""


def test_tpot_and_itl_are_apart_and_every_limited_statistic_is_shown(config: Config) -> None:
    recorded = config.model_dump(mode="json") | {"slo": {"tpot_mean_ms": 30, "ttft_p99_ms": 500}}
    stalls = replace(measured(), itl_p99_ms=2000.0, tpot_p99_ms=40.0, tpot_mean_ms=35.0)
    ended = trial(Role.SEARCH, result(stalls, violation=0.1))
    run = view_of(config, run=RUN, trials=(ended,), setup=setup_of(recorded, RUN.id)).run
    assert run is not None
    meters = {meter.name: (meter.measured, meter.limit, meter.met) for meter in run.trials[0].meters}
    assert meters["ITL p99"] == ("2000 ms", "", None)
    assert meters["TPOT p99"] == ("40.0 ms", "", None)
    assert meters["mean TPOT"] == ("35.0 ms", "30.0 ms", False)


def test_a_capacity_at_the_highest_rate_is_a_lower_bound(config: Config) -> None:
    recorded = config.model_dump(mode="json") | {"objective": "capacity"}
    ended = trial(
        Role.SEARCH, Result(value=16.0, measurement=measured(), tried=(RateResult(8, True), RateResult(16, True)))
    )
    run = view_of(config, run=RUN, trials=(ended,), setup=setup_of(recorded, RUN.id)).run
    assert run is not None
    assert run.trials[0].objective == "≥ 16/s"


def test_only_the_newest_of_many_trials_are_shown(config: Config) -> None:
    run = view_of(config, run=RUN, trials=tuple(trial(Role.SEARCH, None, number=n) for n in range(1, 501))).run

    assert run is not None
    assert (len(run.trials), run.trials[-1].number, run.left_out) == (200, 500, 300)


@pytest.mark.parametrize(
    ("outcome", "headline"),
    [
        (Outcome.PROMOTED, "A better configuration was found and promoted."),
        (Outcome.INCONCLUSIVE, "The incumbent was kept: the evidence was inconclusive."),
        (Outcome.INTERRUPTED, "The run ended before its decision."),
    ],
)
def test_a_decision_has_a_headline_and_its_reason(config: Config, outcome: Outcome, headline: str) -> None:
    decision = Decision(outcome, "so it is", gain=0.1, low=-math.inf)
    run = view_of(config, run=Run(3, "digest", {}, 90.0, 200.0, decision)).run

    assert run is not None
    assert run.decision is not None
    assert (run.decision.headline, run.decision.reason) == (headline, "so it is")
    assert (run.decision.gain, run.decision.low, run.decision.high) == (0.1, None, None)


def test_the_nearest_miss_is_shown(config: Config) -> None:
    miss = NearestMiss(4, "ttft_p99_ms", 0.25, estimated=True, highest_rate=3.5)
    run = view_of(config, run=Run(3, "digest", {}, 90.0, 200.0, Decision(Outcome.KEPT, "", nearest_miss=miss))).run

    assert run is not None
    assert run.decision is not None
    expected = "trial 4, TTFT p99 about 25% over its limit; it meets the SLO at 3.5 requests/s."
    assert run.decision.nearest_miss == f"Nearest to the SLO: {expected}"


def test_a_rolled_back_promotion_is_marked(config: Config) -> None:
    run = Run(3, "digest", {}, 90.0, 200.0, Decision(Outcome.PROMOTED, "so it is"))
    headlines: list[str] = []
    for of_run in (3, 2):
        undone = Promoted(5, of_run, "base", {}, 60.0, None, 70.0, "it crashed 3 times")
        shown = view_of(config, run=run, rolled_back=undone).run
        assert shown is not None
        assert shown.decision is not None
        headlines.append(shown.decision.headline)

    assert headlines == [
        "A better configuration was found and promoted, and rolled back since.",
        "A better configuration was found and promoted.",
    ]


def test_a_promotion_lists_its_changes(config: Config) -> None:
    args: dict[str, Any] = {"max_num_seqs": 23, "block_size": 32}
    undone = Promoted(5, 3, "base", args, 60.0, None, 70.0, "it crashed 3 times")
    serves = view_of(
        config, promotion=Promoted(4, 3, "base", args, 50.0, None), rolled_back=undone, probation_until=900.0
    ).configuration

    assert (serves.promotion, serves.name, serves.since, serves.probation_until) == (4, "promotion 4", 50.0, 900.0)
    assert serves.changes == ("max_num_seqs 2 → 23", "block_size not set → 32")
    assert serves.rolled_back == "promotion 5 was rolled back: it crashed 3 times"


@pytest.mark.parametrize(("state", "abortable"), [(s, s in ("draining", "tuning", "validating")) for s in State])
def test_every_state_has_a_description(config: Config, state: State, abortable: bool) -> None:
    found = view_of(config, state).state

    assert (found.word, found.why, found.abortable) == (str(state), "because", abortable)
    assert found.about


def test_pause_and_windows(config: Config) -> None:
    found = view_of(
        config,
        paused=Event(1.0, EventKind.PAUSED, {"reason": "release week"}),
        window=Event(2.0, EventKind.WINDOW_OPENED, {"reason": "asked for"}),
        last_window=Event(3.0, EventKind.WINDOW_ENDED, {"outcome": "out_of_time", "reason": "late"}),
    )

    assert found.paused is not None
    assert found.window is not None
    assert found.last_window is not None
    assert (found.paused.text, found.window.text) == ("release week", "asked for")
    assert (found.last_window.outcome, found.last_window.reason) == ("out of time", "late")


def test_the_view_is_valid_json_without_infinities(config: Config) -> None:
    trials = (trial(Role.SEARCH, Result(violation=1, value=-math.inf, measurement=measured(math.inf))),)
    text = TypeAdapter(PageView).dump_json(view_of(config, run=RUN, trials=trials))

    def refuse(number: str) -> None:
        raise AssertionError(number)

    [row] = json.loads(text, parse_constant=refuse)["run"]["trials"]
    assert (row["value"], row["meters"][0]["measured"]) == (None, "failed")
    assert b"\n" not in text  # it goes into one line of an event


# The steps of a window

OPENED = Event(80.0, EventKind.WINDOW_OPENED, {"reason": "asked for"})


def test_the_search_ends_after_its_remaining_trials(config: Config) -> None:
    trials = tuple(trial(Role.SEARCH, result(measured()), number=n) for n in range(1, 4))  # of 30 s, until 130
    drain, search, validate, _ = view_of(config, run=RUN, trials=trials, window=OPENED).steps

    assert (drain.status, search.status, validate.status) == ("done", "current", "ahead")
    budget = config.search.budget
    assert (search.progress, search.ends_at) == (f"3 of {budget} trials", 130 + (budget - 3) * 30)
    # Until a start of the validation was measured, it is taken for as long as a trial of the search.
    assert search.ends_at is not None
    assert validate.ends_at == search.ends_at + 2 * config.promotion.pairs[0] * 30


def test_without_a_measured_trial_no_end_is_claimed(config: Config) -> None:
    steps = view_of(config, run=RUN, trials=(), window=OPENED).steps
    assert [step.ends_at for step in steps] == [None] * 4


def test_a_run_of_an_earlier_window_says_nothing_about_this_one(config: Config) -> None:
    trials = (trial(Role.SEARCH, result(measured())),)
    later = Event(300.0, EventKind.WINDOW_OPENED, {"reason": "asked for"})
    steps = view_of(config, State.DRAINING, run=RUN, trials=trials, window=later).steps
    assert [(step.status, step.progress, step.ends_at) for step in steps] == [
        ("current", "", None), ("ahead", "", None), ("ahead", "", None), ("ahead", "", None),
    ]  # fmt: skip


def test_outside_a_window_there_are_no_steps(config: Config) -> None:
    assert view_of(config, State.SERVING, run=RUN).steps == ()
    assert view_of(config, State.RESTORING, run=RUN).steps == ()


# Live figures


def finished(ttft_s: float, tokens: int = 64) -> pb.RequestFinished:
    return pb.RequestFinished(
        ttft_seconds=ttft_s, e2e_seconds=2 * ttft_s, prompt_tokens=tokens, output_tokens=tokens, finish_reason="stop"
    )


def test_live_latencies_are_those_of_recent_user_requests() -> None:
    now = time.monotonic()
    old = SampledRequest.of(now - 400, finished(9.0))
    probe = SampledRequest.of(now - 1, finished(9.0, tokens=1))
    recent = tuple(SampledRequest.of(now - n, finished(0.1 if n else 0.6)) for n in range(100))
    found = live(Traffic(now - 500, (old, *recent, probe)), now, SLO)

    assert found is not None
    assert (found.requests, found.missed, found.few, found.over_s) == (100, 1, False, 300)
    assert found.rate == pytest.approx(100 / 300)
    ttft, itl, _, e2e = found.meters
    assert (ttft.measured, ttft.met) == ("100 ms", True)
    assert (itl.measured, itl.met) == ("-", None)
    assert (e2e.measured, e2e.limit, e2e.met) == ("200 ms", "", None)


def test_few_and_no_requests_are_marked() -> None:
    now = time.monotonic()
    few = live(Traffic(now - 20, (SampledRequest.of(now, finished(0.6)),)), now, SLO)
    none = live(Traffic(now - 20, ()), now, SLO)

    assert few is not None
    assert none is not None
    assert (few.few, few.rate, few.meters[0].met) == (True, None, False)
    assert (none.few, none.requests) == (False, 0)
    assert live(None, now, SLO) is None
