"""The figures of a run at a glance: each metric before and after, its change, and whether it meets the SLO. Pure."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sidecar.config.schema import Objective
from sidecar.config.slo import LATENCY_STATISTICS, Slo, Statistic
from sidecar.format import setting
from sidecar.measure.measurement import Measurement
from sidecar.measure.verdict import in_its_unit, slo_limits
from sidecar.promote.nearest_miss import nearest_miss
from sidecar.promote.statistics import compare
from sidecar.record.decisions import Outcome
from sidecar.record.run_snapshot import RunSnapshot
from sidecar.record.trial import Trial, TrialStatus
from sidecar.report import wording
from sidecar.report.decision_summary import DecisionSummary, Gain, measurement_of, objective_value
from sidecar.report.next_steps import Command, serve_line
from vllm_sloguard.guard.start_history import ranks_of

_OBJECTIVE_METRICS = {Objective.LATENCY: "e2e_mean_ms", Objective.GOODPUT: "goodput_rps", Objective.CAPACITY: ""}


@dataclass(frozen=True)
class OutcomeRow:
    """One metric, as text: means over the compared starts. ``met`` is None without a limit or a measurement.

    ``change`` is that of the metric, ``interval`` its confidence interval; ``better`` is None if there is no change.
    """

    metric: str
    limit: str
    before: str
    after: str
    change: str
    interval: str
    before_met: bool | None
    met: bool | None
    better: bool | None
    is_objective: bool = False


@dataclass(frozen=True)
class ChangedArgument:
    """An engine argument that differs between the two configurations."""

    name: str
    before: str
    after: str


@dataclass(frozen=True)
class OutcomeTable:
    """``before`` and ``after`` name the two configurations; ``after`` is empty if only one was measured."""

    before: str
    after: str
    rows: tuple[OutcomeRow, ...]
    notes: tuple[str, ...]
    changes: tuple[ChangedArgument, ...]
    serve: Command | None
    spent: str


@dataclass(frozen=True)
class _Metric:
    """How one metric is read from a trial, shown, and judged."""

    title: str
    read: Callable[[Trial], float | None]
    text: Callable[[float], str]
    lower_is_better: bool
    limit: float | None = None
    limit_text: str = ""
    is_objective: bool = False


def outcome_table(snapshot: RunSnapshot, summary: DecisionSummary) -> OutcomeTable:
    """The figures of the incumbent and of the candidate; without one, of the trial that came nearest to the SLO."""
    before, after = summary.incumbents, summary.candidates
    title = "candidate" if after else ""
    if not after and (nearest := _nearest(snapshot)) is not None and nearest not in before:
        after, title = (nearest,), f"nearest miss (trial {nearest.number})"
    promoted = snapshot.decision is not None and snapshot.decision.outcome is Outcome.PROMOTED
    names = ("before", "after") if promoted else ("incumbent", title)
    changed = after[0] if after else None
    return OutcomeTable(
        before=names[0],
        after=names[1],
        rows=tuple(_row(snapshot, summary.gain, m, before, after) for m in _metrics(snapshot, (*before, *after))),
        notes=_notes(snapshot, before, after),
        changes=_changes(snapshot, changed) if changed else (),
        serve=_serve(snapshot, changed, promoted=promoted),
        spent=_spent(snapshot),
    )


def _nearest(snapshot: RunSnapshot) -> Trial | None:
    miss = nearest_miss(snapshot.trials, snapshot.setup.slo)
    return next((t for t in snapshot.trials if miss is not None and t.number == miss.trial), None)


def _metrics(snapshot: RunSnapshot, trials: Sequence[Trial]) -> list[_Metric]:
    """The limits of the SLO, then the objective, the medians and the throughput, each once."""
    slo, objective = snapshot.setup.slo, snapshot.setup.objective
    named = {_OBJECTIVE_METRICS[objective]}
    limits = [_limit(name, limit, name in named) for name, limit in slo.upper_limits.items()]
    medians = [s.name for s in LATENCY_STATISTICS if s.statistic is Statistic.P50]
    rest = [_latency(name, name in named) for name in ("e2e_mean_ms", *medians) if name not in slo.upper_limits]
    rest += [
        _Metric("output tokens/s", _field("output_tokens_per_s"), wording.figure, lower_is_better=False),
        _Metric("goodput", _field("goodput_rps"), lambda v: f"{wording.figure(v)} requests/s", lower_is_better=False,
                is_objective="goodput_rps" in named),
    ]  # fmt: skip
    if objective is Objective.CAPACITY:
        rest.append(
            _Metric("capacity", lambda t: in_its_unit(objective_value(t), objective),
                    lambda v: f"{wording.figure(v)} requests/s", lower_is_better=False, is_objective=True)
        )  # fmt: skip
    rest.sort(key=lambda metric: not metric.is_objective)
    return limits + [metric for metric in rest if any(metric.read(t) is not None for t in trials)]


def _limit(name: str, limit: float, is_objective: bool) -> _Metric:
    text = wording.measured_text(name, limit)
    return _Metric(
        wording.LIMITS[name], _field(name), lambda v: wording.measured_text(name, v), lower_is_better=True,
        limit=limit, limit_text=text, is_objective=is_objective,
    )  # fmt: skip


def _latency(name: str, is_objective: bool) -> _Metric:
    return _Metric(
        wording.LIMITS[name], _field(name), lambda v: wording.measured_text(name, v), lower_is_better=True,
        is_objective=is_objective,
    )  # fmt: skip


def _field(name: str) -> Callable[[Trial], float | None]:
    def read(trial: Trial) -> float | None:
        measurement: Measurement | None = measurement_of(trial)
        return None if measurement is None else getattr(measurement, name)

    return read


def _row(
    snapshot: RunSnapshot, gain: Gain | None, metric: _Metric, before: Sequence[Trial], after: Sequence[Trial]
) -> OutcomeRow:
    ours, theirs = ([metric.read(t) for t in side] for side in (before, after))
    change, interval, better = "", "", None
    if metric.is_objective and gain is not None:
        change, interval, better = _gain_as_change(gain, lower_is_better=metric.lower_is_better)
    elif (found := _compared(snapshot, ours, theirs)) is not None:
        estimate, low, high = found
        change, interval = f"{estimate:+.1%}", f"{low:+.1%} to {high:+.1%}" if math.isfinite(low) else ""
        # Without an interval, a change may be chance.
        better = None if not interval or low <= 0 <= high else (estimate < 0) is metric.lower_is_better
    return OutcomeRow(
        metric=metric.title,
        limit=metric.limit_text,
        before=_side_text(metric, before, ours),
        after=_side_text(metric, after, theirs),
        change=change,
        interval=interval,
        before_met=_meets_limit(metric, before, ours),
        met=_meets_limit(metric, after, theirs),
        better=better,
        is_objective=metric.is_objective,
    )


def _gain_as_change(gain: Gain, *, lower_is_better: bool) -> tuple[str, str, bool | None]:
    """A gain of 30% in a latency is a change of -30%."""
    sign = -1 if lower_is_better else 1
    low, high = sorted((sign * gain.low, sign * gain.high))
    better = None if gain.low <= 0 <= gain.high else gain.low > 0
    return f"{sign * gain.estimate:+.1%}", f"{low:+.1%} to {high:+.1%}", better


def _compared(
    snapshot: RunSnapshot, ours: Sequence[float | None], theirs: Sequence[float | None]
) -> tuple[float, float, float] | None:
    """The relative change with its bounds; NaN bounds for a single start of each."""
    sides = [[v for v in side if v is not None and 0 < v < math.inf] for side in (ours, theirs)]
    if not sides[0] or not sides[1] or len(sides[0]) != len(ours) or len(sides[1]) != len(theirs):
        return None
    if len(sides[0]) != len(sides[1]) or len(sides[0]) < 2:
        return sides[1][0] / sides[0][0] - 1, math.nan, math.nan
    rule = snapshot.setup.promotion
    before, after = ([math.log(v) for v in side] for side in sides)
    found = compare(before, after, 1 - rule.confidence, floor=rule.noise)
    return math.expm1(found.log_ratio), math.expm1(found.low), math.expm1(found.high)


def _side_text(metric: _Metric, trials: Sequence[Trial], values: Sequence[float | None]) -> str:
    known = [v for v in values if v is not None]
    if not known:
        return "crashed" if trials and all(t.status is TrialStatus.CRASHED for t in trials) else "-"
    text = metric.text(sum(known) / len(known))
    return f"≥ {text}" if _bounds_only(metric, trials) else text


def _bounds_only(metric: _Metric, trials: Sequence[Trial]) -> bool:
    """Whether the values are lower bounds: percentiles of a stopped load, or a capacity that no rate exceeded."""
    if metric.limit is not None:
        return any(t.result is not None and bool(t.result.stopped) for t in trials)
    return metric.title == "capacity" and any(t.result is not None and t.result.value_is_lower_bound for t in trials)


def _meets_limit(metric: _Metric, trials: Sequence[Trial], values: Sequence[float | None]) -> bool | None:
    if metric.limit is None or not trials:
        return None
    known = [v for v in values if v is not None]
    if len(known) < len(values):
        return False if all(t.status is TrialStatus.CRASHED for t in trials) else None
    met = sum(known) / len(known) <= metric.limit
    return None if met and _bounds_only(metric, trials) else met


def _notes(snapshot: RunSnapshot, before: Sequence[Trial], after: Sequence[Trial]) -> tuple[str, ...]:
    notes: list[str] = []
    decision, confidence = snapshot.decision, snapshot.setup.promotion.confidence
    pairs = min(len(before), len(after))
    if pairs >= 2:
        notes.append(f"Means over {pairs} starts of each; intervals at {confidence:.0%} confidence.")
    elif after:
        notes.append("One start of each: without A/B restarts, a change may be chance.")
    if decision is not None and decision.noise is not None:
        notes.append(f"Run-to-run spread: {decision.noise:.1%}.")
    missing = _misses(after, snapshot.setup.slo)
    if missing and len(after) > 1:
        notes.append(f"{missing} of {len(after)} starts of the candidate missed a limit.")
    return tuple(notes)


def _misses(trials: Sequence[Trial], slo: Slo) -> int:
    found = [measurement_of(t) for t in trials]
    return sum(any(limit.excess > 0 for limit in slo_limits(m, slo)) for m in found if m is not None)


def _changes(snapshot: RunSnapshot, chosen: Trial) -> tuple[ChangedArgument, ...]:
    before, after = snapshot.run.incumbent, chosen.args_that_ran
    names = dict.fromkeys((*after, *before))
    return tuple(
        ChangedArgument(name, setting(before.get(name), name), setting(after.get(name), name))
        for name in names
        if before.get(name) != after.get(name)
    )


def _serve(snapshot: RunSnapshot, chosen: Trial | None, *, promoted: bool) -> Command | None:
    """The command line to copy: of the promotion, else of a candidate that met the SLO."""
    model = snapshot.setup.model
    if promoted:
        promotion = next((p for p in snapshot.promotions if p.run == snapshot.run.id), None)
        if promotion is not None:
            return Command("Serve the promoted configuration", serve_line(model, promotion.args))
    if chosen is None or chosen.status is not TrialStatus.FEASIBLE:
        return Command("Serve the incumbent, which stays the current configuration",
                       serve_line(model, snapshot.run.incumbent))  # fmt: skip
    return Command("Try the candidate by hand (it was not promoted)", serve_line(model, chosen.args_that_ran))


def _spent(snapshot: RunSnapshot) -> str:
    """The time that the trials used, in GPU minutes."""
    ran = [t for t in snapshot.trials if not t.plan.refusal]
    seconds = sum(max(snapshot.end_of(t) - t.started_at, 0.0) * ranks_of(t.args_that_ran) for t in ran)
    unit = "GPU minutes" if not snapshot.setup.device.startswith("CPU") else "machine minutes, without a GPU"
    whole = wording.duration(snapshot.until - snapshot.run.started_at)
    return f"{seconds / 60:,.0f} {unit}, in {wording.plural(len(ran), 'trial')} over {whole}."
