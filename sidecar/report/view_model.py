"""Everything that the report shows of one run. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from sidecar.config.schema import Objective
from sidecar.format import when
from sidecar.measure.capacity_search import RateResult
from sidecar.measure.verdict import in_its_unit, slo_limits
from sidecar.record.run_snapshot import RunSnapshot, knobs_that_ran
from sidecar.record.time_breakdown import TimeBreakdown, spent
from sidecar.record.trial import VALIDATING, Role, Trial, TrialStatus
from sidecar.record.wording import why
from sidecar.report import crashes, decision_summary, importance, repairs, wording
from sidecar.report.advice import run_advice, slo_warning
from sidecar.report.crashes import CrashGroup
from sidecar.report.decision_summary import DecisionSummary, measurement_of, objective_value
from sidecar.report.importance import Importance
from sidecar.report.next_steps import Command, Fact, commands, serving, versions
from sidecar.report.outcome_table import OutcomeTable, outcome_table
from sidecar.report.repairs import Intervention
from vllm_sloguard.knobs import Knob, Value

# Characters of a crash's evidence in the table of trials; the table of crashes has all of it.
_EVIDENCE = 200


@dataclass(frozen=True)
class TrialEntry:
    """One trial. ``value`` is the objective in its unit, positive; ``measured`` by limit, in the limit's unit.

    ``bound``: the load was stopped early, so what was measured are lower bounds. ``rates`` are the loads of a
    capacity search. ``configuration`` are the differences from the incumbent.
    """

    number: int
    role: Role
    status: TrialStatus
    value: float | None
    value_is_lower_bound: bool
    measured: dict[str, float | None]
    bound: bool
    rates: tuple[RateResult, ...]
    knobs: dict[str, Value]
    configuration: str
    category: str
    seconds: TimeBreakdown
    took: str
    note: str


@dataclass(frozen=True)
class ReplicateLatencies:
    """One side of the comparison, by trial: the E2E latencies of its requests, ms, ascending, if they were kept.

    Those of failed requests are infinite.
    """

    name: str
    incumbent: bool
    entries: tuple[TrialEntry, ...]
    answers_ms: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class ReportView:
    """``limits`` are by name, in their units; ``best`` is the candidate's trial in the search."""

    title: str
    model: str
    run: int
    other_runs: tuple[int, ...]
    written: str
    began: str
    objective: Objective
    verdict: DecisionSummary
    outcome: OutcomeTable
    slo_warning: str
    advice: tuple[str, ...]
    serving: tuple[str, ...]
    entries: tuple[TrialEntry, ...]
    best: int | None
    knobs: tuple[Knob, ...]
    limits: dict[str, float]
    starts: tuple[ReplicateLatencies, ...]
    importance: Importance
    crashes: tuple[CrashGroup, ...]
    spending: str
    interventions: tuple[Intervention, ...]
    versions: tuple[Fact, ...]
    commands: tuple[Command, ...]
    configuration: str


def report_view(snapshot: RunSnapshot) -> ReportView:
    """The report of ``snapshot``."""
    setup, summary = snapshot.setup, decision_summary.decision_summary(snapshot)
    entries = tuple(_entry(snapshot, trial) for trial in snapshot.trials)
    by_number = {entry.number: entry for entry in entries}
    chosen = decision_summary.candidate_of(snapshot)
    asked, yaml = commands(snapshot)
    return ReportView(
        title=f"Tuning report: {setup.model.rstrip('/').rpartition('/')[2]}, run {snapshot.run.id}",
        model=setup.model,
        run=snapshot.run.id,
        other_runs=tuple(n for n in snapshot.runs if n != snapshot.run.id),
        written=when(snapshot.now),
        began=when(snapshot.run.started_at),
        objective=setup.objective,
        verdict=summary,
        outcome=outcome_table(snapshot, summary),
        slo_warning=slo_warning(snapshot),
        advice=run_advice(snapshot),
        serving=serving(snapshot),
        entries=entries,
        best=chosen.number if chosen else None,
        knobs=setup.knobs,
        limits=setup.slo.upper_limits,
        starts=tuple(
            _starts(trials, by_number, setup.objective, incumbent=incumbent)
            for incumbent, trials in ((True, summary.incumbents), (False, summary.candidates))
            if trials
        ),
        importance=importance.knob_importance(snapshot),
        crashes=crashes.groups(snapshot),
        spending=_spending(spent(snapshot.trials, snapshot.until)),
        interventions=repairs.interventions(snapshot.trials),
        versions=versions(snapshot),
        commands=asked,
        configuration=yaml,
    )


def _spending(seconds: TimeBreakdown) -> str:
    parts = (
        f"{what} {wording.duration(part)} ({part / (seconds.total or 1):.0%})"
        for what, part in (
            ("starting engines", seconds.starting),
            ("warming up", seconds.warming_up),
            ("measuring", seconds.measuring),
            ("stopping", seconds.stopping),
            ("deciding and other", seconds.deciding),
        )
    )
    return f"{wording.duration(seconds.total)} in total: {', '.join(parts)}."


def _entry(snapshot: RunSnapshot, trial: Trial) -> TrialEntry:
    measurement = measurement_of(trial)
    found = slo_limits(measurement, snapshot.setup.slo) if measurement else ()
    end = snapshot.end_of(trial)
    crash = trial.result.crash if trial.result else None
    return TrialEntry(
        number=trial.number,
        role=trial.plan.role,
        status=trial.status,
        value=in_its_unit(objective_value(trial), snapshot.setup.objective),
        value_is_lower_bound=bool(trial.result and trial.result.value_is_lower_bound),
        measured={limit.name: limit.measured for limit in found},
        bound=bool(trial.result and trial.result.stopped),
        rates=trial.result.tried if trial.result else (),
        knobs=knobs_that_ran(trial, [knob.name for knob in snapshot.setup.knobs]),
        configuration=_configuration(snapshot, trial),
        category=wording.category(crash) if crash else "",
        seconds=spent((trial,), end),
        took=wording.duration(end - trial.started_at) if trial.ended_at or snapshot.alive else "-",
        note=_note(trial),
    )


def _note(trial: Trial) -> str:
    crash = trial.result.crash if trial.result else None
    if crash is None:
        return why(trial)
    evidence = crash.evidence if len(crash.evidence) <= _EVIDENCE else f"{crash.evidence[: _EVIDENCE - 1]}…"
    return f"{wording.category(crash)} while {crash.phase}: {evidence}"


def _configuration(snapshot: RunSnapshot, trial: Trial) -> str:
    if trial.plan.role in (Role.BASELINE, Role.REFERENCE):
        return "as the incumbent"
    ran = trial.args_that_ran
    incumbent = snapshot.run.incumbent
    names = dict.fromkeys((*(knob.name for knob in snapshot.setup.knobs), *ran))
    different = {name: ran[name] for name in names if name in ran and incumbent.get(name) != ran[name]}
    return wording.arguments_text(different) or "as the incumbent"


def _starts(
    trials: Sequence[Trial], entries: dict[int, TrialEntry], objective: Objective, *, incumbent: bool
) -> ReplicateLatencies:
    answers = [
        tuple(sorted(s * 1000 for s in t.result.scores))
        if t.result is not None and objective is Objective.LATENCY
        else ()
        for t in trials
    ]
    validated = all(t.plan.role in VALIDATING for t in trials)
    name = "incumbent" if incumbent else "candidate"
    title = name if validated else f"{name} (first trial only)"
    return ReplicateLatencies(title, incumbent, tuple(entries[t.number] for t in trials), tuple(answers))
