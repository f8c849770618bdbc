"""The tuner's validation: A/B restarts until the rule has enough evidence, across interruptions."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import cast

import pytest
from sidecar_cases import configured

from sidecar.config.schema import Config, SearchConfig
from sidecar.config.window import Promotion
from sidecar.engine.engine import Cancelled, Launch
from sidecar.guard.guard import Guard
from sidecar.measure.load_client import LoadError
from sidecar.measure.load_schedule import LoadSchedule, RateLoad
from sidecar.measure.requests import LoadResult, RequestResult
from sidecar.promote.provenance import device_of
from sidecar.record.decisions import Decision, Outcome
from sidecar.record.durations import seconds_of
from sidecar.record.journal import Journal
from sidecar.record.run_snapshot import read_run
from sidecar.record.time_breakdown import spent
from sidecar.record.trial import VALIDATING, Plan, Result, Role, StartKind, Trial, TrialStatus
from sidecar.record.wording import why
from sidecar.run.raw_trial import EngineRun, PluginReport, RawTrial
from sidecar.run.trial_runner import TrialRunner
from sidecar.run.tuning_run import Tuner, open_run
from vllm_sloguard.crash import Crash
from vllm_sloguard.guard.machine import Machine

HOST = Machine("cpu", 2**34, 2**33, 0, "stated")
A_LITTLE = (0.008, -0.006, 0.002, -0.009, 0.005)


class Starts:
    """Replaces TrialRunner: more sequences are faster. ``ends`` is how many loads it survives."""

    def __init__(self, ends: int = 1000, lag_s: float = 0.0) -> None:
        self.left = ends
        self.lag_s = lag_s
        self.warm_starts: list[tuple[Role, int]] = []
        self.count = 0

    def release(self) -> None:
        """Keeps nothing."""

    def is_cold(self, args: object) -> bool:
        """Every trial gets a new engine."""
        return True

    def run(
        self, plan: Plan, schedule: LoadSchedule, cancelled: Callable[[], bool], *, warm_start: bool = False
    ) -> RawTrial:
        """One load."""
        if warm_start:
            self.warm_starts.append((plan.role, self.count))
        assert not cancelled()
        if self.left == 0:
            raise Cancelled
        self.left -= 1
        self.count += 1
        mean_ms = 4000 / int(cast(int, plan.args["max_num_seqs"])) * (1 + A_LITTLE[self.count % 5])
        workload = schedule.next_load([], warm=False)
        assert workload is not None
        e2e_s, rate = mean_ms / 1000, workload.rate
        times = [number / rate for number in range(200)]
        requests = tuple(RequestResult(0.01, e2e_s, (0.01,), "", at, at - self.lag_s) for at in times)
        load = RateLoad(rate, LoadResult(requests, 200 / rate))
        report = PluginReport(vllm_version="0.32.0")
        run = EngineRun(None, StartKind.ORDINARY, True, 30.0, (load,), 10.0, 1.0, report=report)
        return RawTrial((run,))


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = configured(tmp_path, "engine.args", {"max_num_seqs": 2})
    search = SearchConfig.model_validate(
        {"optimizer": "random", "budget": 3, "knobs": {"max_num_seqs": {"low": 4, "high": 64}}}
    )
    return config.model_copy(update={"search": search, "promotion": Promotion(pairs=(3, 5))})


def test_a_run_records_its_machine_from_the_start(tmp_path: Path) -> None:
    config = configured(tmp_path)
    with closing(Journal(config.state)) as journal:
        open_run(config, journal)
    found = read_run(config.state).setup

    assert (found.device, found.driver or None) == device_of(config)
    assert found.device


def tune(config: Config, starts: Starts, fits: Callable[[int, int], bool] = lambda _s, _v: True) -> Decision:
    """One process lifetime: opens the journal, resumes its run, and tunes until it ends or is killed."""
    journal = Journal(config.state)
    run = open_run(config, journal)
    tuner = Tuner(
        config,
        run,
        journal,
        cast(TrialRunner, starts),
        Guard(config, lambda _: HOST),
        learn=learn_nothing,
        notify=lambda _: None,
        fits=fits,
        cancelled=lambda: False,
    )
    try:
        return tuner.tune()
    finally:
        journal.close()


def learn_nothing(launch: Launch, crash: Crash | None = None, *, started: bool = True) -> None:
    """No engine was started here."""


def recorded(config: Config) -> list[Trial]:
    return Journal(config.state, read_only=True).trials()


def roles(config: Config) -> list[Role]:
    return [t.plan.role for t in recorded(config) if t.status is not TrialStatus.ABORTED]


def test_candidate_and_incumbent_alternate_and_the_evidence_is_kept(config: Config) -> None:
    decision = tune(config, Starts())

    assert decision.outcome is Outcome.PROMOTED
    a, b = Role.REFERENCE, Role.VALIDATION
    assert roles(config) == [Role.BASELINE, Role.SEARCH, Role.SEARCH, a, b, b, a, a, b]
    trials = recorded(config)
    assert all(t.plan.args == {"max_num_seqs": 2} for t in trials if t.plan.role is a)
    [promoted] = Journal(config.state, read_only=True).promotions()
    assert promoted.args == trials[decision.trial - 1].plan.args
    assert promoted.evidence is not None
    assert promoted.evidence.decision == decision
    assert (decision.incumbents, decision.candidates) == ((4, 7, 8), (5, 6, 9))
    assert promoted.evidence.provenance.vllm == "0.32.0"


@pytest.mark.parametrize("lives", [[1, 1000], [4, 1000], [5, 1000], [6, 1000], [3, 1, 1, 1, 1, 1, 1000], [8, 1000]])
def test_a_killed_validation_resumes(config: Config, lives: list[int]) -> None:
    """Each lifetime measures this many loads and dies in the next: finished ones count, the unfinished is repeated."""
    whole = config.model_copy(update={"state": config.state.parent / "whole"})
    uninterrupted = tune(whole, Starts())
    outcome: Decision | None = None
    for loads in lives:
        try:
            outcome = tune(config, Starts(loads))
        except Cancelled:
            continue

    assert outcome is not None
    assert (outcome.outcome, outcome.pairs) == (uninterrupted.outcome, uninterrupted.pairs)
    assert roles(config) == roles(whole)
    assert len(Journal(config.state, read_only=True).promotions()) == 1


@pytest.mark.parametrize(
    ("measurements", "outcome", "used"),
    [
        (0, Outcome.INCONCLUSIVE, 0),
        (5, Outcome.INCONCLUSIVE, 0),  # three pairs do not fit, so none is started
        (6, Outcome.PROMOTED, 6),
        (7, Outcome.PROMOTED, 6),
    ],
)
def test_a_window_limits_the_number_of_pairs(config: Config, measurements: int, outcome: Outcome, used: int) -> None:
    starts = Starts()

    def fits(search: int, validations: int) -> bool:
        if search:
            return True
        done = sum(t.plan.role in VALIDATING for t in recorded(config))
        return done + validations <= measurements

    assert tune(config, starts, fits).outcome is outcome
    assert sum(role in VALIDATING for role in roles(config)) == used


def test_a_window_that_is_shortened_decides_on_complete_pairs(config: Config) -> None:
    """Only four measurements fit although six were expected: two pairs are too few."""

    def fits(search: int, _validations: int) -> bool:
        return bool(search) or sum(t.plan.role in VALIDATING for t in recorded(config)) < 4

    decision = tune(config, Starts(), fits)

    assert (decision.outcome, decision.pairs) == (Outcome.INCONCLUSIVE, 2)


def test_the_search_leaves_room_for_the_validation(config: Config) -> None:
    asked: list[tuple[int, int]] = []

    def fits(search: int, validations: int) -> bool:
        asked.append((search, validations))
        return len(asked) < 3

    decision = tune(config, Starts(), fits)

    # With a budget of three, the first two trials reserve the fewest pairs possible, the last all of them.
    assert asked == [(1, 6), (1, 6), (1, 10), (0, 6)]
    assert roles(config) == [Role.BASELINE, Role.SEARCH]
    assert decision.outcome is Outcome.INCONCLUSIVE


def test_validations_are_expected_to_take_an_ordinary_start_each() -> None:
    def done(role: Role, took_s: float, load_s: float) -> Trial:
        plan = Plan(role, {}, {}, "", "")
        return Trial(1, 1, plan, 100.0, 100.0 + took_s, Result(load_s=load_s, stop_s=1.0))

    forked = [done(Role.BASELINE, 14, 10), done(Role.SEARCH, 12, 9)]

    # One unmeasured start on each side comes first, with a load of five seconds.
    assert seconds_of([], 1, 6, start_s=30) == 2 * (30 + 5) + 6 * 30
    assert seconds_of(forked, 1, 6, start_s=30) == 14 + 2 * (30 + 5 + 1) + 6 * (30 + 11)
    assert seconds_of([*forked, done(Role.REFERENCE, 50, 10)], 0, 2, start_s=30) == 2 * 50 + 30 + 5 + 1


def test_trials_whose_requests_were_sent_late_do_not_count_and_end_the_run(config: Config) -> None:
    with pytest.raises(LoadError, match=r"3 trials could not be measured: .* 200 of 200 requests were sent"):
        tune(config, Starts(lag_s=0.2))

    trials = recorded(config)
    assert [t.status for t in trials] == [TrialStatus.ABORTED] * 3
    assert all(t.result is not None and t.result.measurement is None for t in trials)
    assert all("fell behind" in why(t) for t in trials)


def test_the_first_start_of_each_side_is_not_measured(config: Config) -> None:
    """It reads a cold page cache and compiles; both sides pay that cost before anything is compared."""
    starts = Starts()

    tune(config, starts)

    # After a baseline and two trials of the search; the candidate's is the next one.
    assert starts.warm_starts == [(Role.REFERENCE, 3), (Role.VALIDATION, 4)]


def test_an_unmeasured_start_is_not_expected_to_happen_again() -> None:
    def done(role: Role, took_s: float, warm_start_s: float) -> Trial:
        result = Result(start_s=34.0, load_s=10.0, stop_s=1.0, warm_start_s=warm_start_s)
        return Trial(1, 1, Plan(role, {}, {}, "", ""), 100.0, 100.0 + took_s, result)

    pair = [done(Role.REFERENCE, 90, 45), done(Role.VALIDATION, 88, 43)]

    assert seconds_of(pair, 0, 4, start_s=30) == 4 * 45
    assert seconds_of(pair[:1], 0, 3, start_s=30) == 3 * 45 + 45  # the other side's takes as long
    assert spent(pair[:1], now=190.0).warming_up == 45
