"""One line per trial in columns that fit the terminal: the knobs that vary, the objective and the verdict. Pure."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from sidecar.config.slo import LatencyStatistic
from sidecar.format import setting
from sidecar.measure.verdict import in_its_unit, slo_limits
from sidecar.page.slo_meters import OBJECTIVE_UNITS, format_objective
from sidecar.record.run_snapshot import Setup
from sidecar.record.trial import Role, Trial, TrialStatus
from sidecar.record.trial_states import TRIAL_STATES
from sidecar.record.wording import capacity_text, milliseconds, why
from sidecar.report.wording import LIMITS, SHARES, category, measured_text, with_unit
from vllm_sloguard.knobs import Knob, KnobKind

# Column titles; docs/knobs.md has the full names.
KNOB_TITLES = {
    "max_num_seqs": "seqs",
    "max_num_batched_tokens": "batch",
    "gpu_memory_utilization": "mem",
    "max_model_len": "length",
    "enforce_eager": "eager",
    "enable_chunked_prefill": "chunk",
    "enable_prefix_caching": "prefix",
    "block_size": "block",
    "kv_cache_memory_bytes": "kv size",
    "kv_cache_dtype": "kv type",
    "long_prefill_token_threshold": "long pf",
    "scheduler_reserve_full_isl": "reserve",
    "stream_interval": "stream",
}
SHORT_ROLES = {
    Role.BASELINE: "incumbent",
    Role.SEARCH: "search",
    Role.UNGUARDED: "unguarded",
    Role.REFERENCE: "incumbent",
    Role.VALIDATION: "candidate",
    Role.LOWER_RATE: "low rate",
}
_NUMBER, _ROLE, _OBJECTIVE, _LATENCY, _TOOK = 3, 9, 8, 9, 5
_FLOAT = 5
_MIN_RESULT = 15
_NOTE = 30


@dataclass(frozen=True)
class TrialColumn:
    """One column: its title, its width in cells, and the cell of a trial."""

    title: str
    width: int
    cell: Callable[[Trial], Text]
    right: bool = True


def trial_columns(
    setup: Setup, incumbent: Mapping[str, object], knobs: Sequence[Knob], width: int
) -> list[TrialColumn]:
    """The columns for a terminal of ``width``; knobs that do not fit share one column of changes."""
    unit = OBJECTIVE_UNITS[setup.objective]
    columns = [
        TrialColumn("#", _NUMBER, lambda t: Text(str(t.number))),
        TrialColumn("what", _ROLE, lambda t: Text(SHORT_ROLES[t.plan.role]), right=False),
    ]
    tail = [
        TrialColumn(unit.name, _OBJECTIVE, lambda t: objective_cell(t, setup)),
        TrialColumn("took", _TOOK, lambda t: Text(_took(t))),
    ]
    room = width - _width(columns) - _width(tail) - _MIN_RESULT
    own = [_knob_column(knob, incumbent) for knob in knobs]
    if _width(own) > room:
        own = [TrialColumn("changes", max(room - 1, _ROLE), lambda t: _changes(t, knobs, incumbent), right=False)]
    columns += own
    room -= _width(own)
    for limit in setup.slo.latency_limits:
        if room >= _LATENCY + 1 + _NOTE - _MIN_RESULT:
            tail.insert(-1, TrialColumn(limit.label, _LATENCY, _latency_cell(limit)))
            room -= _LATENCY + 1
    columns += tail
    rest = max(width - _width(columns), _MIN_RESULT)
    return [*columns, TrialColumn("result", rest, lambda t: result_cell(t, setup, note=rest >= _NOTE), right=False)]


def _width(columns: Sequence[TrialColumn]) -> int:
    """With a space after each."""
    return sum(column.width + 1 for column in columns)


def header_row(columns: Sequence[TrialColumn]) -> Text:
    """The titles."""
    return Text(" ").join(_fitted(Text(c.title, "bold"), c) for c in columns)


def trial_row(trial: Trial, columns: Sequence[TrialColumn]) -> Text:
    """One line for ``trial``."""
    return Text(" ").join(_fitted(column.cell(trial), column) for column in columns)


def legend(knobs: Sequence[Knob]) -> str:
    """What the columns mean: "seqs=max_num_seqs; 1.4x: 1.4 times the limit"."""
    names = [f"{KNOB_TITLES.get(knob.name, knob.name)}={knob.name}" for knob in knobs]
    return f"{' '.join(names)}; 1.4x: 1.4 times the limit".removeprefix("; ")


def _fitted(cell: Text, column: TrialColumn) -> Text:
    fitted = cell.copy()
    fitted.truncate(column.width, overflow="ellipsis")
    fitted.align("right" if column.right else "left", column.width)
    return fitted


def varying_knobs(trials: Sequence[Trial], knobs: Sequence[Knob]) -> tuple[Knob, ...]:
    """The knobs that have more than one value over ``trials``."""
    return tuple(knob for knob in knobs if len({str(t.args_that_ran.get(knob.name)) for t in trials}) > 1)


def _knob_column(knob: Knob, incumbent: Mapping[str, object]) -> TrialColumn:
    title = KNOB_TITLES.get(knob.name, knob.name)
    possible = (*knob.choices, knob.low, knob.high, incumbent.get(knob.name))
    least = _FLOAT if knob.kind is KnobKind.FLOAT else 1
    width = max(cell_len(title), least, *(cell_len(_value(knob.name, one)) for one in possible))

    def cell(trial: Trial) -> Text:
        value = trial.args_that_ran.get(knob.name)
        same = value == incumbent.get(knob.name)
        return Text(_value(knob.name, value), "dim" if same else "")

    return TrialColumn(title, width, cell)


def _value(name: str, value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return "-" if value is None else setting(value, name)


def _changes(trial: Trial, knobs: Sequence[Knob], incumbent: Mapping[str, object]) -> Text:
    return Text(short_changes(trial, knobs, incumbent) or "none")


def short_changes(trial: Trial, knobs: Sequence[Knob], incumbent: Mapping[str, object]) -> str:
    """The knobs that differ from the incumbent's: "seqs=64 block=32"; empty if none does."""
    ran = trial.args_that_ran
    return " ".join(
        f"{KNOB_TITLES.get(knob.name, knob.name)}={_value(knob.name, ran.get(knob.name))}"
        for knob in knobs
        if ran.get(knob.name) != incumbent.get(knob.name)
    )


def objective_cell(trial: Trial, setup: Setup) -> Text:
    """The objective's figure, short: "≥160/s", "81.2 ms"."""
    result = trial.result
    value = in_its_unit(result.value if result else None, setup.objective)
    if result is not None and result.tried and not value:
        return Text(f"<{min(load.rate for load in result.tried):.3g}/s")
    text = format_objective(value, setup.objective, at_least=bool(result and result.value_is_lower_bound))
    return Text(text.replace("≥ ", "≥"))


def objective_text(trial: Trial, setup: Setup) -> str:
    """The objective's figure with its name and unit: "capacity ≥ 160 requests/s"; "no mean E2E" without one."""
    name = OBJECTIVE_UNITS[setup.objective].name
    result = trial.result
    if result is not None and result.tried:
        return f"{name} {capacity_text(result.tried)}"
    value = in_its_unit(result.value if result else None, setup.objective)
    return f"no {name}" if value is None else f"{name} {with_unit(value, setup.objective)}"


def _latency_cell(limit: LatencyStatistic) -> Callable[[Trial], Text]:
    def cell(trial: Trial) -> Text:
        measurement = trial.result.measurement if trial.result else None
        value = measurement.latency_ms(limit) if measurement else None
        bound = "≥" if value is not None and trial.result is not None and trial.result.stopped else ""
        return Text(f"{bound}{milliseconds(value)}")

    return cell


def result_cell(trial: Trial, setup: Setup, *, note: bool = False) -> Text:
    """The verdict with its symbol; with ``note``, why, after it."""
    state = TRIAL_STATES[trial.status]
    text = Text(f"{state.symbol} {verdict_text(trial, setup)}", state.terminal_style)
    if note and (reason := why(trial)):
        text.append(f"  {reason}", "dim")
    return text


def verdict_text(trial: Trial, setup: Setup) -> str:
    """ "meets SLO", the limit that is missed by most ("ITL p99 1.4x"), or how the trial ended."""
    result = trial.result
    if trial.status is TrialStatus.CRASHED and result is not None and result.crash is not None:
        return category(result.crash)
    if trial.status is TrialStatus.FEASIBLE:
        return "meets SLO"
    if trial.status is not TrialStatus.INFEASIBLE or result is None or result.measurement is None:
        return TRIAL_STATES[trial.status].label
    worst = max(slo_limits(result.measurement, setup.slo), key=lambda limit: limit.excess, default=None)
    if worst is None or not worst.excess:
        return "misses SLO"
    if worst.measured is None or not worst.limit or worst.name in SHARES:
        label = {"error_rate": "errors", "miss_rate": "misses"}.get(worst.name, LIMITS.get(worst.name, worst.name))
        return f"{label} {measured_text(worst.name, worst.measured)}"
    return f"{LIMITS.get(worst.name, worst.name)} {_times(worst.measured / worst.limit)}"


def _times(ratio: float) -> str:
    if ratio == float("inf"):
        return "failed"
    return f"{ratio:.0f}x" if ratio >= 9.95 else f"{ratio:.1f}x" if ratio >= 1.05 else f"{ratio:.2f}x"


def _took(trial: Trial) -> str:
    if trial.ended_at is None:
        return "-"
    seconds = trial.ended_at - trial.started_at
    return f"{seconds:.0f} s" if seconds < 999.5 else f"{seconds / 60:.0f} m"


def fitted_line(text: str, width: int) -> str:
    """``text`` cut to ``width`` cells, with "…" if something was cut."""
    return text if cell_len(text) <= width else f"{set_cell_size(text, max(width - 1, 0)).rstrip()}…"
