"""The four lines below the trials of a run that is in progress: phase, running trial, best trial, time left. Pure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from statistics import fmean

from rich.cells import cell_len
from rich.text import Text

from sidecar.cli.trial_rows import SHORT_ROLES, fitted_line, objective_text, short_changes, verdict_text
from sidecar.measure.verdict import in_its_unit
from sidecar.page.slo_meters import OBJECTIVE_UNITS
from sidecar.record.durations import mean_seconds
from sidecar.record.run_snapshot import Setup
from sidecar.record.states import State
from sidecar.record.trial import AFTER_THE_SEARCH, VALIDATING, Role, Trial, TrialStatus
from sidecar.record.trial_states import RAN_STATUSES
from sidecar.report.wording import duration, plural, with_unit

LINES = 4
_LABEL = 8
_BAR, _LEAST_BAR = 20, 8


@dataclass(frozen=True)
class WindowStage:
    """What the sidecar is doing in a window, since and until when (seconds since the epoch).

    ``ends_at`` is None without a time limit, as in `sloguard tune`.
    """

    state: State
    since: float
    ends_at: float | None = None


@dataclass(frozen=True)
class PhaseProgress:
    """How much of a phase is done: ``done`` of ``total`` steps of the kind ``what``, about ``left_s`` seconds more."""

    name: str
    done: int
    total: int
    what: str
    left_s: float | None
    note: str = ""


def footer(trials: Sequence[Trial], setup: Setup, stage: WindowStage, now: float, width: int) -> Text:
    """The lines, each cut to ``width``; ``trials`` are those of this run, oldest first."""
    progress = phase_progress(trials, setup, stage, now)
    lines = (
        ("phase", _phase_line(progress, width)),
        ("now", _now_line(trials, setup, stage, now)),
        ("best", best_line(trials, setup)),
        ("left", _left_line(stage, now, progress.left_s)),
    )
    text = Text("\n").join(Text(fitted_line(f"{label:<{_LABEL}}{line}", width)) for label, line in lines)
    text.highlight_regex(r"(?m)^(phase|now|best|left) ", "bold")
    text.highlight_regex("━+", "cyan")
    return text


def phase_progress(trials: Sequence[Trial], setup: Setup, stage: WindowStage, now: float) -> PhaseProgress:
    """The phase that is in progress."""
    if stage.state is State.DRAINING:
        return PhaseProgress("drain", 0, 0, "", None, "then search, validation and restore")
    if stage.state in (State.PROMOTING, State.RESTORING):
        return PhaseProgress("restore", 0, 0, "", None, "then vLLM serves again")
    if any(t.plan.role is Role.LOWER_RATE for t in trials):
        return PhaseProgress("lower rates", 0, 0, "", None, "the nearest miss is measured at lower request rates")
    measured = [t for t in trials if t.plan.role in VALIDATING]
    if measured or stage.state is State.VALIDATING:
        return _validation(measured, trials, setup, now)
    searched = [t for t in trials if t.plan.role not in AFTER_THE_SEARCH]
    done = sum(t.status in RAN_STATUSES for t in searched)
    each = mean_seconds(searched)
    left = max(setup.budget - done, 0)
    return PhaseProgress(
        "search", min(done, setup.budget), setup.budget, "trial", _left_s(left, each, searched, now), "then validation"
    )


def _validation(measured: Sequence[Trial], trials: Sequence[Trial], setup: Setup, now: float) -> PhaseProgress:
    """A pair has a start of each side; the analyses after the first are needed only if it is inconclusive."""
    ran = [t for t in measured if t.status in RAN_STATUSES]
    counts = setup.promotion.pairs
    target = next((pairs for pairs in counts if 2 * pairs > len(ran)), counts[-1])
    left = max(2 * target - len(ran), 0)
    note = f"at most {2 * counts[-1]}" if target < counts[-1] else ""
    done = min(len(ran), 2 * target)
    left_s = _left_s(left, mean_seconds(ran) or mean_seconds(trials), measured, now)
    return PhaseProgress("validation", done, 2 * target, "start", left_s, note)


def _left_s(left: int, each_s: float | None, trials: Sequence[Trial], now: float) -> float | None:
    """The time of ``left`` trials, of which one may be running."""
    if each_s is None or not left:
        return None
    running = next((t for t in trials if t.status is TrialStatus.RUNNING), None)
    spent = min(max(now - running.started_at, 0.0), each_s) if running else 0.0
    return left * each_s - spent


def _phase_line(progress: PhaseProgress, width: int) -> str:
    if not progress.total:
        return f"{progress.name}: {progress.note}"
    left = f", about {duration(progress.left_s)} left" if progress.left_s is not None else ""
    of = f"{progress.name} {progress.done} of {plural(progress.total, progress.what)}{left}"
    room = width - _LABEL - cell_len(of) - 1
    note = f" ({progress.note})"
    if not progress.note or room - cell_len(note) < _LEAST_BAR:
        note = ""
    bar = _bar(progress.done / progress.total, min(_BAR, max(room - cell_len(note), _LEAST_BAR)))
    return f"{bar} {of}{note}"


def _bar(share: float, width: int) -> str:
    filled = round(share * width)
    return "━" * filled + "─" * (width - filled)


def _now_line(trials: Sequence[Trial], setup: Setup, stage: WindowStage, now: float) -> str:
    if stage.state is State.DRAINING:
        return "requests in flight finish, then vLLM stops"
    if stage.state is State.PROMOTING:
        return "vLLM starts with the promoted configuration"
    if stage.state is State.RESTORING:
        return "vLLM starts with the current configuration"
    running = next((t for t in trials if t.status is TrialStatus.RUNNING), None)
    if running is None:
        return "the next configuration is chosen"
    changes = short_changes(running, setup.knobs, _incumbent(trials))
    what = f": {changes}" if changes and running.plan.role not in (Role.BASELINE, Role.REFERENCE) else ""
    spent = duration(max(now - running.started_at, 0.0))
    return f"trial {running.number}, {SHORT_ROLES[running.plan.role]}, for {spent}{what}"


def _incumbent(trials: Sequence[Trial]) -> Mapping[str, object]:
    first = next((t for t in trials if t.plan.role in (Role.BASELINE, Role.REFERENCE)), None)
    return first.args_that_ran if first is not None else {}


def best_trial(trials: Sequence[Trial]) -> Trial | None:
    """The feasible trial of the search with the best objective, without the incumbent."""
    found = [t for t in trials if t.plan.role is Role.SEARCH and t.status is TrialStatus.FEASIBLE and _value(t)]
    return max(found, key=lambda t: _value(t) or -math.inf, default=None)


def _value(trial: Trial) -> float | None:
    """The objective, higher is better; None without a finite one."""
    value = trial.result.value if trial.result is not None else None
    return value if value is not None and math.isfinite(value) else None


def best_line(trials: Sequence[Trial], setup: Setup) -> str:
    """The best of the search against the incumbent; the re-measured values once there are any of both."""
    candidates, incumbents = (_values(trials, role) for role in (Role.VALIDATION, Role.REFERENCE))
    if candidates and incumbents:
        new, old = fmean(candidates), fmean(incumbents)
        figures = " against ".join(with_unit(in_its_unit(v, setup.objective), setup.objective) for v in (new, old))
        return f"candidate {OBJECTIVE_UNITS[setup.objective].name} {figures}{_gain(new, old)}, re-measured"
    current = next((t for t in trials if t.plan.role is Role.BASELINE and t.status in RAN_STATUSES), None)
    best = best_trial(trials)
    against = "incumbent not measured yet" if current is None else f"current {_figure(current, setup)}"
    if best is None:
        return f"no trial meets the SLO yet; {against}"
    gain = _gain(_value(best), _value(current) if current is not None else None)
    return f"trial {best.number}: {objective_text(best, setup)}; {against}{gain}"


def _figure(trial: Trial, setup: Setup) -> str:
    capacity = trial.result is not None and trial.result.tried
    text = objective_text(trial, setup) if capacity else with_unit(_value(trial), setup.objective)
    return text if trial.status is TrialStatus.FEASIBLE else f"{text}, {verdict_text(trial, setup)}"


def _values(trials: Sequence[Trial], role: Role) -> list[float]:
    ran = [t for t in trials if t.plan.role is role and t.status in RAN_STATUSES]
    return [value for t in ran if (value := _value(t)) is not None]


def _gain(new: float | None, old: float | None) -> str:
    """ " (-84%)", the change of the figure as displayed."""
    if new is None or old is None or not old or not math.isfinite(new / old):
        return ""
    return f" ({new / old - 1:+.0%})"


def _left_line(stage: WindowStage, now: float, left_s: float | None) -> str:
    spent = f"{duration(max(now - stage.since, 0.0))} so far"
    if stage.ends_at is None:
        return f"{f'about {duration(left_s)}, ' if left_s is not None else ''}no time limit; {spent}"
    if now > stage.ends_at:
        return f"the window has overrun by {duration(now - stage.ends_at)}; {spent}"
    at = f"{datetime.fromtimestamp(stage.ends_at).astimezone():%H:%M:%S}"
    return f"{duration(stage.ends_at - now)} until the window ends at {at}; {spent}"
