"""Shows a run in a terminal: a line per finished trial above a footer; plain lines without a terminal."""

import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from functools import partial
from types import TracebackType
from typing import IO, Any, Self, cast

from rich.console import Console, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from sidecar.cli.run_footer import WindowStage, footer
from sidecar.cli.trial_rows import header_row, legend, objective_text, trial_columns, trial_row, varying_knobs
from sidecar.record.run_snapshot import Setup
from sidecar.record.time_breakdown import TimeBreakdown
from sidecar.record.trial import Role, Trial, TrialStatus
from sidecar.record.trial_states import TRIAL_STATES
from sidecar.record.wording import configuration, milliseconds, why

# A redraw takes CPU time from the measurements on this machine.
_REDRAWS_PER_S = 1


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


class RunDisplay:
    """Shows the trials of a run: each finished one once, and a footer while ``stage`` is in a window.

    Without a terminal each event is one plain line, through ``say`` if given.
    """

    def __init__(
        self,
        console: Console,
        setup: Setup,
        stage: Callable[[], WindowStage | None],
        say: Callable[[str], None] | None = None,
    ) -> None:
        self._console = console
        self._say = say or partial(console.print, highlight=False, soft_wrap=True, markup=False)
        self._setup = setup
        self._stage = stage
        self._trials: dict[int, Trial] = {}
        self._run = 0
        self._header_width = 0
        self._live = Live(
            console=console, refresh_per_second=_REDRAWS_PER_S, get_renderable=self._footer, transient=True
        )

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
        """Updates the display with a trial that has started or ended."""
        if trial.run != self._run:
            self._trials, self._run, self._header_width = {}, trial.run, 0
        self._trials = {**self._trials, trial.number: trial}
        if not self._console.is_terminal:
            self._say(line(trial, self._setup))
        elif trial.status is TrialStatus.RUNNING:
            self._live.refresh()
        else:
            self._print_row(trial)

    def _print_row(self, trial: Trial) -> None:
        width = self._console.width
        columns = trial_columns(self._setup, self._incumbent(), self._setup.knobs, width)
        if width != self._header_width:
            self._header_width = width
            self._console.print(Text(legend(self._setup.knobs), "dim"))
            self._console.print(header_row(columns), no_wrap=True, crop=True)
        self._console.print(trial_row(trial, columns), no_wrap=True, crop=True)

    def _incumbent(self) -> dict[str, Any]:
        baseline = next((t for t in self._trials.values() if t.plan.role is Role.BASELINE), None)
        return dict(baseline.args_that_ran) if baseline is not None else {}

    def _footer(self) -> RenderableType:
        stage = self._stage()
        if stage is None:
            return Text("")
        began = [t for t in self._trials.values() if t.started_at >= stage.since or stage.ends_at is None]
        # The last column stays empty: a terminal may wrap a line that fills it.
        return footer(began, self._setup, stage, time.time(), self._console.width - 1)


def show_trials(console: Console, setup: Setup, trials: list[Trial], *, title: str = "") -> None:
    """Prints the trials of one run as a table with the knobs that vary, or as plain lines without a terminal."""
    if not console.is_terminal:
        for trial in trials:
            console.print(line(trial, setup), markup=False, highlight=False, soft_wrap=True)
        return
    if title:
        console.print(Text(title, "bold"))
    baseline = next((t for t in trials if t.plan.role is Role.BASELINE), None)
    knobs = varying_knobs(trials, setup.knobs)
    columns = trial_columns(setup, baseline.args_that_ran if baseline else {}, knobs, console.width)
    if knobs:
        console.print(Text(legend(knobs), "dim"))
    console.print(header_row(columns), no_wrap=True, crop=True)
    for trial in trials:
        console.print(trial_row(trial, columns), no_wrap=True, crop=True)


def line(trial: Trial, setup: Setup) -> str:
    """A trial in one line."""
    head = f"trial {trial.number} {trial.plan.phase}: {configuration(trial, [knob.name for knob in setup.knobs])}"
    if trial.status is TrialStatus.RUNNING:
        return f"{head}: starting ({trial.plan.reason})"
    measured = trial.result is not None and trial.result.measurement is not None
    figures = "".join(f", {text}" for text in (objective_text(trial, setup), *_p99s(trial))) if measured else ""
    notes = f"; {reason}" if (reason := why(trial)) else ""
    return f"{head}: {TRIAL_STATES[trial.status].label}{figures}; {_took(trial)}{notes}"


def _p99s(trial: Trial) -> list[str]:
    """The p99s that were measured; those of a load that was stopped are lower bounds."""
    result = trial.result
    measured = result.measurement if result else None
    if result is None or measured is None:
        return []
    values = {
        "TTFT p99": measured.ttft_p99_ms,
        "ITL p99": measured.itl_p99_ms,
        "TPOT p99": measured.tpot_p99_ms,
        "E2E p99": measured.e2e_p99_ms,
    }
    sign = "≥ " if result.stopped else ""
    return [f"{name} {sign}{milliseconds(value)}" for name, value in values.items() if value is not None]


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
