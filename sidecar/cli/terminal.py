"""Shows a run in a terminal as a live table, or elsewhere as plain lines."""

import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from types import TracebackType
from typing import IO, Any, Self, cast

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from sidecar.record.durations import seconds_a_trial
from sidecar.record.time_breakdown import TimeBreakdown
from sidecar.record.trial import Trial, TrialStatus
from sidecar.record.trial_states import RAN_STATUSES, TRIAL_STATES
from sidecar.record.wording import configuration, milliseconds, why

# In narrower terminals, words in the table's cells would be broken.
_TABLE_COLUMNS = 150


class _UnfailingStream:
    """Ignores write errors: a full disk or a closed pipe must not end the service."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def unfailing_console(*, stderr: bool = False) -> Console:
    """A console that never raises when it writes."""
    return Console(file=cast(IO[str], _UnfailingStream(sys.stderr if stderr else sys.stdout)))


@contextmanager
def busy_indicator(what: str) -> Generator[Callable[[str], None]]:
    """Shows a spinner with ``what`` if stderr is a terminal; the yielded function changes the text."""
    console = unfailing_console(stderr=True)
    if not console.is_terminal:
        yield lambda _: None
        return
    spinner = Spinner("dots", what)
    # If stdout is the same terminal, its lines are printed above the spinner.
    with Live(spinner, console=console, transient=True, redirect_stdout=sys.stdout.isatty()):
        yield lambda text: spinner.update(text=text)


class View:
    """Shows the trials of a run as they start and end; without a terminal one line each, through ``say`` if given."""

    def __init__(
        self, console: Console, knobs: Sequence[str], budget: int, say: Callable[[str], None] | None = None
    ) -> None:
        self._console = console
        self._say = say or partial(console.print, highlight=False, soft_wrap=True, markup=False)
        self._knobs = tuple(knobs)
        self._budget = budget
        self._trials: dict[tuple[int, int], Trial] = {}
        self._live = Live(console=console, refresh_per_second=2, get_renderable=self._picture, transient=True)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def notify(self, trial: Trial) -> None:
        """Updates the view with a trial that has started or ended."""
        self._trials[trial.run, trial.number] = trial
        if not self._console.is_terminal:
            self._say(line(trial, self._knobs))

    def _picture(self) -> RenderableType:
        if not self._trials:
            return Text("")
        last_run = max(run for run, _ in self._trials)
        trials = [t for (run, _), t in sorted(self._trials.items()) if run == last_run]
        outlook = Text(_outlook(trials, self._budget))
        if self._console.width < _TABLE_COLUMNS:
            return Group(*(Text(line(t, self._knobs)) for t in trials), outlook)
        return Group(trials_table(trials, self._knobs), outlook)


def show(console: Console, trials: Sequence[Trial], knobs: Sequence[str]) -> None:
    """Prints the trials as a table, or as lines if the table would not fit."""
    if console.width >= _TABLE_COLUMNS:
        console.print(trials_table(trials, knobs))
        return
    for trial in trials:
        console.print(line(trial, knobs), markup=False, highlight=False, soft_wrap=True)


def trials_table(trials: Sequence[Trial], knobs: Sequence[str]) -> Table:
    """One row per trial."""
    grid = Table(box=None, pad_edge=False, header_style="bold")
    for name in (
        "#",
        "phase",
        "configuration",
        "state",
        "TTFT p99",
        "ITL p99",
        "TPOT p99",
        "E2E p99",
        "mean E2E",
        "took",
        "",
    ):
        grid.add_column(name, justify="right" if name in ("#", "took") or "E2E" in name or "p99" in name else "left")
    for trial in trials:
        measured = trial.result.measurement if trial.result else None
        grid.add_row(
            str(trial.number),
            # Text, not str: rich interprets brackets in str as markup.
            Text(trial.plan.phase),
            Text(configuration(trial, knobs)),
            Text(TRIAL_STATES[trial.status].label, style=TRIAL_STATES[trial.status].terminal_style),
            *_p99s(trial).values(),
            milliseconds(measured.e2e_mean_ms if measured else None),
            _took(trial),
            Text(why(trial)),
        )
    return grid


def line(trial: Trial, knobs: Sequence[str]) -> str:
    """A trial in one line."""
    head = f"trial {trial.number} {trial.plan.phase}: {configuration(trial, knobs)}"
    if trial.status is TrialStatus.RUNNING:
        return f"{head}: starting ({trial.plan.reason})"
    measured = trial.result.measurement if trial.result else None
    numbers = ""
    if measured is not None:
        numbers = (
            "".join(f" {name}={text}" for name, text in _p99s(trial).items())
            + f" e2e_mean={milliseconds(measured.e2e_mean_ms)}"
        )
    return f"{head}: {TRIAL_STATES[trial.status].label}{numbers} in {_took(trial)} {why(trial)}".rstrip()


def _p99s(trial: Trial) -> dict[str, str]:
    """The p99s as text; those of a load that was stopped are lower bounds."""
    result = trial.result
    measured = result.measurement if result else None
    values = (
        (measured.ttft_p99_ms, measured.itl_p99_ms, measured.tpot_p99_ms, measured.e2e_p99_ms)
        if measured
        else (None,) * 4
    )
    sign = "≥ " if result is not None and result.stopped else ""
    texts = (milliseconds(value) if value is None else f"{sign}{milliseconds(value)}" for value in values)
    return dict(zip(("ttft_p99", "itl_p99", "tpot_p99", "e2e_p99"), texts, strict=True))


def spending(seconds: TimeBreakdown) -> str:
    """How the time of a run was spent, in one line."""
    parts = {
        "starting": seconds.starting,
        "warm-up": seconds.warming_up,
        "measuring": seconds.measuring,
        "stopping": seconds.stopping,
        "deciding": seconds.deciding,
    }
    total = seconds.total or 1.0
    shares = ", ".join(f"{name} {spent:.0f} s ({spent / total:.0%})" for name, spent in parts.items())
    return f"{seconds.trials} trials in {seconds.total:.0f} s: {shares}"


def _took(trial: Trial) -> str:
    return f"{(trial.ended_at or time.time()) - trial.started_at:.0f} s"


def _outlook(trials: Sequence[Trial], budget: int) -> str:
    ran = sum(t.status in RAN_STATUSES for t in trials)
    left = max(budget - ran, 0)
    seconds = left * seconds_a_trial(trials)
    about = f", about {seconds / 60:.0f} min" if seconds else ""
    return f"{ran} of {budget} trials, {left} left{about}"
