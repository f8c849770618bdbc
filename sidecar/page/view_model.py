"""What the page tells that does not change by itself: state, trials, decision, promotion. Pure.

The words are those of `sloguard status` and of the terminal; figures come as texts with their units.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sidecar.config.schema import Config
from sidecar.engine.command import Args
from sidecar.format import change, setting
from sidecar.measure.verdict import in_its_unit
from sidecar.page.slo_meters import GOALS, Goal, SloMeter, figures, in_words
from sidecar.record.decisions import Decision, Outcome
from sidecar.record.events import Event
from sidecar.record.journal import Promoted, Run
from sidecar.record.run_snapshot import Setup
from sidecar.record.states import IN_A_WINDOW, TABLE
from sidecar.record.trial import VALIDATING, Role, Trial, TrialStatus
from sidecar.record.wording import OUTCOMES, configuration, why
from sidecar.service.state_machine import Standing

# A page with more of them is slow on a phone.
_MOST_TRIALS = 200

_VERDICTS = {
    TrialStatus.RUNNING: "running",
    TrialStatus.FEASIBLE: "meets the SLO",
    TrialStatus.INFEASIBLE: "misses the SLO",
    TrialStatus.CRASHED: "crashed",
    TrialStatus.REFUSED: "refused by the guard",
    TrialStatus.ABORTED: "given up",
}
_ROLES = {
    Role.BASELINE: "what served before",
    Role.REFERENCE: "what served before, again",
    Role.UNGUARDED: "past the guard, as asked",
}
_HEADLINES = {
    Outcome.PROMOTED: "A better configuration was found, and promoted.",
    Outcome.KEPT: "What served before stays: nothing was clearly better.",
    Outcome.WORSE: "What served before stays: the best candidate was worse.",
    Outcome.INCONCLUSIVE: "What served before stays: the evidence was not clear enough for a change.",
    Outcome.INTERRUPTED: "The run ended before its decision.",
    Outcome.ABANDONED: "The run ended before its decision.",
}
_UNDONE = "A better configuration was found and promoted, and has been rolled back since."


@dataclass(frozen=True)
class PageFacts:
    """What was read for one story. ``probation_until`` is in seconds since the epoch, None where there is none.

    ``setup`` is what ``run`` was started with, which the file may no longer say; without it the run is not shown,
    and ``problem`` is why.
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
    """Something that was said, and when, seconds since the epoch."""

    at: float
    text: str


@dataclass(frozen=True)
class WindowShown:
    """How a window ended, and when, seconds since the epoch."""

    at: float
    outcome: str
    reason: str


@dataclass(frozen=True)
class StateShown:
    """``abortable`` is whether a window is open that can be given up."""

    word: str
    about: str
    why: str
    since: float
    abortable: bool


@dataclass(frozen=True)
class Serves:
    """What serves outside of windows; ``changes`` are against the file's arguments, or are those where they serve."""

    promotion: int | None
    what: str
    since: float | None
    changes: tuple[str, ...]
    probation_until: float | None
    rolled_back: str


@dataclass(frozen=True)
class TrialShown:
    """One trial. ``incumbent`` is whether it measured what served before; ``took_s`` None while it runs."""

    number: int
    what: str
    incumbent: bool
    configuration: str
    status: TrialStatus
    verdict: str
    crash: str
    figures: tuple[SloMeter, ...]
    value: float | None
    objective: str
    started_at: float
    took_s: float | None
    note: str


@dataclass(frozen=True)
class DecisionShown:
    """The outcome, what it means, why; the gain is relative, between ``low`` and ``high``."""

    outcome: Outcome
    label: str
    headline: str
    reason: str
    at: float | None
    gain: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class RunShown:
    """The last run; ``searched`` of ``budget`` trials of the search have ended, and ``validated`` measurements.

    ``next_look`` is how many measurements it takes to the next look at them, None where nobody knows.
    """

    id: int
    started_at: float
    goal: Goal
    searched: int
    budget: int
    validated: int
    next_look: int | None
    trials: tuple[TrialShown, ...]
    left_out: int
    decision: DecisionShown | None


@dataclass(frozen=True)
class PageView:
    """All of it. ``problem`` is why it may be out of date, ``orders`` where the token lies, empty for none taken."""

    version: str
    orders: str
    epoch: int
    model: str
    state: StateShown
    serves: Serves
    paused: Note | None
    window: Note | None
    last_window: WindowShown | None
    run: RunShown | None
    problem: str = ""


def page_view(config: Config, facts: PageFacts, *, version: str, orders: str) -> PageView:
    """The story of ``facts``; ``version`` is of the page's own files."""
    standing = facts.standing
    return PageView(
        version=version,
        orders=orders,
        epoch=facts.epoch,
        model=config.model,
        state=StateShown(
            str(standing.state),
            TABLE[standing.state].about,
            standing.why,
            standing.since,
            standing.state in IN_A_WINDOW,
        ),
        serves=_serves(config, facts),
        paused=facts.paused and Note(facts.paused.at, facts.paused.reason),
        window=facts.window and Note(facts.window.at, facts.window.reason),
        last_window=facts.last_window and _ended(facts.last_window),
        run=_run(facts.setup, facts.run, facts.trials, facts.rolled_back) if facts.run and facts.setup else None,
        problem=facts.problem,
    )


def _ended(event: Event) -> WindowShown:
    return WindowShown(event.at, event.outcome, event.reason)


def _serves(config: Config, facts: PageFacts) -> Serves:
    promotion, undone = facts.promotion, facts.rolled_back
    return Serves(
        promotion=promotion.id if promotion else None,
        what=f"promotion {promotion.id}" if promotion else "the configuration file's arguments",
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
    ran = [t for t in trials if t.status not in (TrialStatus.REFUSED, TrialStatus.ABORTED, TrialStatus.RUNNING)]
    validated = sum(t.plan.role in VALIDATING for t in ran)
    shown = trials[-_MOST_TRIALS:]
    return RunShown(
        id=run.id,
        started_at=run.started_at,
        goal=GOALS[setup.objective],
        searched=len(ran) - validated,
        budget=setup.budget,
        validated=validated,
        next_look=_next_look(setup, [t for t in ran if t.plan.role in VALIDATING]),
        trials=tuple(_trial(setup, trial) for trial in shown),
        left_out=len(trials) - len(shown),
        decision=_decision(run.decision, run.ended_at, undone=undone) if run.decision else None,
    )


def _next_look(setup: Setup, measured: Sequence[Trial]) -> int | None:
    """Pairs have two measurements, unless one of them crashed: then others count."""
    if any(t.status is TrialStatus.CRASHED for t in measured):
        return None
    return next((2 * pairs for pairs in setup.promotion.pairs if 2 * pairs > len(measured)), None)


def _trial(setup: Setup, trial: Trial) -> TrialShown:
    result = trial.result
    measured = result.measurement if result else None
    p99s = (
        {"ttft_p99_ms": measured.ttft_p99_ms, "itl_p99_ms": measured.itl_p99_ms, "e2e_p99_ms": measured.e2e_p99_ms}
        if measured
        else {}
    )
    value = in_its_unit(result.value if result else None, setup.objective)
    failed = f"{measured.failed} of {measured.requests} requests failed" if measured and measured.failed else ""
    return TrialShown(
        number=trial.number,
        what=_what(trial),
        incumbent=trial.plan.role in (Role.BASELINE, Role.REFERENCE),
        configuration=configuration(trial, [knob.name for knob in setup.knobs]),
        status=trial.status,
        verdict=_VERDICTS[trial.status],
        crash=str(result.crash.category).replace("_", " ") if result and result.crash else "",
        figures=figures(p99s, setup.slo, lower_bounds=bool(result and result.stopped)),
        value=value,
        objective=in_words(value, setup.objective),
        started_at=trial.started_at,
        took_s=None if trial.ended_at is None else max(trial.ended_at - trial.started_at, 0.0),
        note="; ".join(text for text in (failed, why(trial)) if text),
    )


def _what(trial: Trial) -> str:
    """Why it was tried: the search has a phase, the others a role."""
    if trial.plan.role is Role.VALIDATION:
        return f"validation: {trial.plan.reason}"
    return _ROLES.get(trial.plan.role) or f"search: {trial.plan.phase}"


def _decision(decision: Decision, at: float | None, *, undone: bool) -> DecisionShown:
    return DecisionShown(
        outcome=decision.outcome,
        label=OUTCOMES[decision.outcome],
        headline=_UNDONE if undone else _HEADLINES[decision.outcome],
        reason=decision.reason,
        at=at,
        gain=_finite(decision.gain),
        low=_finite(decision.low),
        high=_finite(decision.high),
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
