"""What the page shows and only changes with events: state, trials, decision, promotion. Pure.

The wording is that of `sloguard status`; numbers are text with units.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sidecar.config.schema import Config
from sidecar.config.slo import LATENCY_STATISTICS, LatencyStatistic
from sidecar.format import change, setting
from sidecar.measure.verdict import in_its_unit
from sidecar.page.slo_meters import OBJECTIVE_UNITS, ObjectiveUnit, SloMeter, format_objective, slo_meters
from sidecar.page.window_steps import WindowStep, next_analysis, window_steps
from sidecar.record.decisions import Decision, NearestMiss, Outcome
from sidecar.record.events import Event, WindowOutcome
from sidecar.record.journal import Promoted, Run
from sidecar.record.run_snapshot import Setup
from sidecar.record.states import IN_A_WINDOW, State
from sidecar.record.trial import VALIDATING, Role, Trial, TrialStatus
from sidecar.record.trial_states import RAN_STATUSES, TRIAL_STATES, TrialStateDisplay
from sidecar.record.wording import OUTCOMES, configuration, misses_slo, why
from sidecar.service.state_machine import Standing
from vllm_sloguard.agent.serve_command import Args

# A page with more of them is slow on a phone.
_MAX_TRIALS = 200

_ROLES = {
    Role.BASELINE: "incumbent",
    Role.REFERENCE: "incumbent, re-measured",
    Role.UNGUARDED: "unguarded",
    Role.LOWER_RATE: "nearest miss, at lower rates",
}
# The phases of the built-in optimizers, as people would say them.
_PHASES = {
    "incumbent": "the incumbent again",
    "feasible-first": "towards meeting the SLO",
    "model-exploit": "near the best found",
    "model-explore": "long-range exploration",
    "repeat": "the best again",
    "random": "random",
    "tpe-exploit": "near the best found",
    "tba-explore": "exploration",
    "gp-exploit": "near the best found",
}
_ABOUT = {
    State.STARTING: "vLLM is being started or taken over.",
    State.SERVING: "vLLM is serving the current configuration.",
    State.DRAINING: "A window has opened: no new requests are accepted, those in flight finish.",
    State.TUNING: "vLLM is not serving: other configurations are being measured.",
    State.VALIDATING: "vLLM is not serving: candidate and incumbent are re-measured, alternating.",
    State.PROMOTING: "vLLM is being started with the better configuration.",
    State.RESTORING: "vLLM is being started with the current configuration.",
    State.HALTED: "The sidecar has ended; its engine may still be serving.",
}
_WINDOW_ENDINGS = {
    WindowOutcome.PROMOTED: "a better configuration was promoted",
    WindowOutcome.KEPT: "no change",
    WindowOutcome.REFUSED: "not opened",
    WindowOutcome.MISSED: "not opened in time",
    WindowOutcome.ABORTED: "aborted, no change",
    WindowOutcome.STOPPED: "ended with the sidecar, no change",
    WindowOutcome.OUT_OF_TIME: "ran out of time, no change",
    WindowOutcome.INTERRUPTED: "interrupted, no change",
    WindowOutcome.FAILED: "failed",
}
_HEADLINES = {
    Outcome.PROMOTED: "A better configuration was found and promoted.",
    Outcome.KEPT: "The incumbent was kept: no candidate was clearly better.",
    Outcome.WORSE: "The incumbent was kept: the best candidate was worse.",
    Outcome.INCONCLUSIVE: "The incumbent was kept: the evidence was inconclusive.",
    Outcome.INTERRUPTED: "The run ended before its decision.",
    Outcome.ABANDONED: "The run ended before its decision.",
}
_UNDONE = "A better configuration was found and promoted, and rolled back since."


@dataclass(frozen=True)
class PageFacts:
    """The inputs of a view. ``probation_until`` is in seconds since the epoch, None without probation.

    ``setup`` is what ``run`` was started with, which may differ from the file; without it the run is left out, and
    ``problem`` says why.
    """

    standing: Standing
    epoch: int
    run: Run | None = None
    setup: Setup | None = None
    trials: tuple[Trial, ...] = ()
    paused: Event | None = None
    window: Event | None = None
    last_window: Event | None = None
    promotion: Promoted | None = None
    rolled_back: Promoted | None = None
    probation_until: float | None = None
    problem: str = ""


@dataclass(frozen=True)
class Note:
    """A text with its time, seconds since the epoch."""

    at: float
    text: str


@dataclass(frozen=True)
class WindowShown:
    """How a window ended, and when, seconds since the epoch; ``meaning`` is what it changed."""

    at: float
    outcome: str
    meaning: str
    reason: str


@dataclass(frozen=True)
class StateShown:
    """``abortable``: a window is open and can be aborted."""

    word: str
    about: str
    why: str
    since: float
    abortable: bool


@dataclass(frozen=True)
class CurrentConfiguration:
    """What is served outside of windows. ``changes`` are relative to the file's arguments, or list those."""

    promotion: int | None
    name: str
    since: float | None
    changes: tuple[str, ...]
    probation_until: float | None
    rolled_back: str


@dataclass(frozen=True)
class TrialShown:
    """One trial. ``incumbent``: it measured the incumbent; ``took_s`` is None while it runs."""

    number: int
    role: str
    incumbent: bool
    configuration: str
    status: TrialStatus
    state: TrialStateDisplay
    crash: str
    meters: tuple[SloMeter, ...]
    value: float | None
    objective: str
    started_at: float
    took_s: float | None
    note: str


@dataclass(frozen=True)
class DecisionShown:
    """The outcome, its meaning, its reason; the gain is relative, its interval ``low`` to ``high``.

    ``nearest_miss`` says what stands in the way if no configuration met the SLO; else it is empty.
    """

    outcome: Outcome
    label: str
    headline: str
    reason: str
    nearest_miss: str
    at: float | None
    gain: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class RunShown:
    """The last run: ``searched`` of ``budget`` trials of the search and ``validated`` replicates have ended.

    ``next_analysis`` is the number of replicates at the next interim analysis, None if unknown.
    """

    id: int
    started_at: float
    goal: ObjectiveUnit
    searched: int
    budget: int
    validated: int
    next_analysis: int | None
    trials: tuple[TrialShown, ...]
    left_out: int
    decision: DecisionShown | None
    misses_slo: str


@dataclass(frozen=True)
class PageView:
    """``problem`` is why it may be out of date; ``token_file`` is empty if actions are disabled.

    ``window_s`` is how long a window may take. ``steps`` are those of the open window, else empty.
    """

    version: str
    token_file: str
    epoch: int
    model: str
    state: StateShown
    configuration: CurrentConfiguration
    paused: Note | None
    window: Note | None
    last_window: WindowShown | None
    window_s: float
    steps: tuple[WindowStep, ...]
    run: RunShown | None
    problem: str = ""


def page_view(config: Config, facts: PageFacts, *, version: str, token_file: str) -> PageView:
    """The view of ``facts``; ``version`` is that of the page's files."""
    standing = facts.standing
    return PageView(
        version=version,
        token_file=token_file,
        epoch=facts.epoch,
        model=config.model,
        state=StateShown(
            str(standing.state),
            _ABOUT[standing.state],
            standing.why,
            standing.since,
            standing.state in IN_A_WINDOW,
        ),
        configuration=_configuration(config, facts),
        paused=facts.paused and Note(facts.paused.at, facts.paused.reason),
        window=facts.window and Note(facts.window.at, facts.window.reason),
        last_window=facts.last_window and _ended(facts.last_window),
        window_s=config.window.duration,
        steps=_steps(facts) if facts.window else (),
        run=_run(facts.setup, facts.run, facts.trials, facts.rolled_back) if facts.run and facts.setup else None,
        problem=facts.problem,
    )


def _steps(facts: PageFacts) -> tuple[WindowStep, ...]:
    standing, run = facts.standing, facts.run
    # Until its run has begun, the last run is of an earlier window.
    of_window = run is not None and facts.window is not None and run.started_at >= facts.window.at
    setup, trials = (facts.setup, facts.trials) if of_window else (None, ())
    return window_steps(standing.state, standing.since, setup, trials)


def _ended(event: Event) -> WindowShown:
    return WindowShown(event.at, event.outcome, _WINDOW_ENDINGS[WindowOutcome(event.content["outcome"])], event.reason)


def _configuration(config: Config, facts: PageFacts) -> CurrentConfiguration:
    promotion, undone = facts.promotion, facts.rolled_back
    return CurrentConfiguration(
        promotion=promotion.id if promotion else None,
        name=f"promotion {promotion.id}" if promotion else "the configuration file's arguments",
        since=promotion.at if promotion else None,
        changes=_changes(config.engine.args, promotion.args) if promotion else _listed(config.engine.args),
        probation_until=facts.probation_until,
        rolled_back=f"promotion {undone.id} was rolled back: {undone.rollback_reason or ''}" if undone else "",
    )


def _listed(args: Args) -> tuple[str, ...]:
    return tuple(f"{name} {setting(value, name)}" for name, value in args.items())


def _changes(before: Args, after: Args) -> tuple[str, ...]:
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return tuple(change(name, before.get(name), after.get(name)) for name in names)


def _run(setup: Setup, run: Run, trials: Sequence[Trial], rolled_back: Promoted | None) -> RunShown:
    undone = rolled_back is not None and rolled_back.run == run.id
    ran = [t for t in trials if t.status in RAN_STATUSES]
    validated = sum(t.plan.role in VALIDATING for t in ran)
    shown = trials[-_MAX_TRIALS:]
    return RunShown(
        id=run.id,
        started_at=run.started_at,
        goal=OBJECTIVE_UNITS[setup.objective],
        searched=len(ran) - validated,
        budget=setup.budget,
        validated=validated,
        next_analysis=next_analysis(setup, [t for t in ran if t.plan.role in VALIDATING]),
        trials=tuple(_trial(setup, trial) for trial in shown),
        left_out=len(trials) - len(shown),
        decision=_decision(run.decision, run.ended_at, undone=undone) if run.decision else None,
        misses_slo=_misses_slo(trials, run),
    )


def _misses_slo(trials: Sequence[Trial], run: Run) -> str:
    missing = misses_slo(trials, run.decision.outcome if run.decision else None)
    if missing is None:
        return ""
    label = TRIAL_STATES[missing.status].label
    return f"The current configuration misses the SLO: it was {label} in trial {missing.number} of run {run.id}."


def _trial(setup: Setup, trial: Trial) -> TrialShown:
    result = trial.result
    measured = result.measurement if result else None

    def measured_ms(statistic: LatencyStatistic) -> float | None:
        return measured.latency_ms(statistic) if measured else None

    value = in_its_unit(result.value if result else None, setup.objective)
    failed = f"{measured.failed} of {measured.requests} requests failed" if measured and measured.failed else ""
    return TrialShown(
        number=trial.number,
        role=_role(trial),
        incumbent=trial.plan.role in (Role.BASELINE, Role.REFERENCE),
        configuration=configuration(trial, [knob.name for knob in setup.knobs]),
        status=trial.status,
        state=TRIAL_STATES[trial.status],
        crash=str(result.crash.category).replace("_", " ") if result and result.crash else "",
        meters=slo_meters(measured_ms, setup.slo, lower_bounds=bool(result and result.stopped)),
        value=value,
        objective=format_objective(value, setup.objective, at_least=bool(result and result.value_is_lower_bound)),
        started_at=trial.started_at,
        took_s=None if trial.ended_at is None else max(trial.ended_at - trial.started_at, 0.0),
        note="; ".join(text for text in (failed, why(trial)) if text),
    )


def _role(trial: Trial) -> str:
    """The role of a trial, and of the search its phase."""
    if trial.plan.role is Role.VALIDATION:
        return f"validation: {trial.plan.reason}"
    return _ROLES.get(trial.plan.role) or f"search: {_PHASES.get(trial.plan.phase, trial.plan.phase)}"


def _decision(decision: Decision, at: float | None, *, undone: bool) -> DecisionShown:
    return DecisionShown(
        outcome=decision.outcome,
        label=OUTCOMES[decision.outcome],
        headline=_UNDONE if undone else _HEADLINES[decision.outcome],
        reason=decision.reason,
        nearest_miss=_nearest_miss(decision.nearest_miss) if decision.nearest_miss is not None else "",
        at=at,
        gain=_finite(decision.gain),
        low=_finite(decision.low),
        high=_finite(decision.high),
    )


def _nearest_miss(miss: NearestMiss) -> str:
    about = "about " if miss.estimated else ""
    label = next((s.label for s in LATENCY_STATISTICS if s.name == miss.limit), miss.limit.replace("_", " "))
    return f"Nearest to the SLO: trial {miss.trial}, {label} {about}{miss.excess:.0%} over its limit{miss.rates}."


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
