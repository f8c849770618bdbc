"""How a run looks in a terminal: a table that grows while it runs, or plain lines where there is no terminal."""

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
from sidecar.record.wording import configuration, milliseconds, why

_STYLES = {
    TrialStatus.FEASIBLE: "green",
    TrialStatus.INFEASIBLE: "yellow",
    TrialStatus.CRASHED: "red",
    TrialStatus.REFUSED: "magenta",
    TrialStatus.ABORTED: "dim",
    TrialStatus.RUNNING: "bold cyan",
}

# Below this width a table's cells break into pieces of words.
_TABLE_COLUMNS = 150


class _Undisturbed:
    """A stream that can't fail whoever writes to it: a full disk or a closed pipe must not end the service."""

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
    """A console on which nothing that is said raises."""
    return Console(file=cast(IO[str], _Undisturbed(sys.stderr if stderr else sys.stdout)))


@contextmanager
def busy_indicator(what: str) -> Generator[Callable[[str], None]]:
    """Shows that something goes on, where errors go to a terminal; what is yielded says what else does."""
    console = unfailing_console(stderr=True)
    if not console.is_terminal:
        yield lambda _: None
        return
    spinner = Spinner("dots", what)
    # What is printed meanwhile goes where it is to go, a pipe perhaps; on the same terminal, above the spinner.
    with Live(spinner, console=console, transient=True, redirect_stdout=sys.stdout.isatty()):
        yield lambda text: spinner.update(text=text)


class View:
    """Shows the trials of one run as they start and end; without a terminal a line each, by ``say`` if given."""

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
        """Takes a trial that has started or ended."""
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
    """The trials as a table, or line by line where a table would not fit."""
    if console.width >= _TABLE_COLUMNS:
        console.print(trials_table(trials, knobs))
        return
    for trial in trials:
        console.print(line(trial, knobs), markup=False, highlight=False, soft_wrap=True)


def trials_table(trials: Sequence[Trial], knobs: Sequence[str]) -> Table:
    """One row a trial."""
    grid = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("#", "phase", "configuration", "verdict", "TTFT p99", "ITL p99", "E2E p99", "mean E2E", "took", ""):
        grid.add_column(name, justify="right" if name in ("#", "took") or "E2E" in name or "p99" in name else "left")
    for trial in trials:
        measured = trial.result.measurement if trial.result else None
        grid.add_row(
            str(trial.number),
            # Text, not strings: rich takes what stands in brackets for its own markup.
            Text(trial.plan.phase),
            Text(configuration(trial, knobs)),
            Text(str(trial.status), style=_STYLES[trial.status]),
            *_p99s(trial).values(),
            milliseconds(measured.e2e_mean_ms if measured else None),
            _took(trial),
            Text(why(trial)),
        )
    return grid


def line(trial: Trial, knobs: Sequence[str]) -> str:
    """The same in one line."""
    head = f"trial {trial.number} {trial.plan.phase}: {configuration(trial, knobs)}"
    if trial.status is TrialStatus.RUNNING:
        return f"{head}: starting ({trial.plan.reason})"
    measured = trial.result.measurement if trial.result else None
    numbers = ""
    if measured is not None:
        numbers = (
            "".join(f" {name}={shown}" for name, shown in _p99s(trial).items())
            + f" e2e_mean={milliseconds(measured.e2e_mean_ms)}"
        )
    return f"{head}: {trial.status}{numbers} in {_took(trial)} {why(trial)}".rstrip()


def _p99s(trial: Trial) -> dict[str, str]:
    """The p99s for people; those of a load that was stopped are lower bounds."""
    result = trial.result
    measured = result.measurement if result else None
    values = (measured.ttft_p99_ms, measured.itl_p99_ms, measured.e2e_p99_ms) if measured else (None,) * 3
    sign = "≥ " if result is not None and result.stopped else ""
    shown = (milliseconds(value) if value is None else f"{sign}{milliseconds(value)}" for value in values)
    return dict(zip(("ttft_p99", "itl_p99", "e2e_p99"), shown, strict=True))


def spending(seconds: TimeBreakdown) -> str:
    """Where a run's time went, in one line."""
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
    ran = sum(t.status not in (TrialStatus.REFUSED, TrialStatus.ABORTED, TrialStatus.RUNNING) for t in trials)
    left = max(budget - ran, 0)
    seconds = left * seconds_a_trial(trials)
    about = f", about {seconds / 60:.0f} min" if seconds else ""
    return f"{ran} of {budget} trials, {left} left{about}"
