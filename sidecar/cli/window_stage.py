"""Which stage of a window is in progress, for the terminal: from the service's own state, or from the journal."""

import time
from collections.abc import Callable

from sidecar.cli.run_footer import WindowStage
from sidecar.record.journal import StateRecord
from sidecar.record.states import IN_A_WINDOW, State
from sidecar.service.state_machine import StateMachine

_WITH_FOOTER = (*IN_A_WINDOW, State.PROMOTING, State.RESTORING)


def stage_of_tune() -> Callable[[], WindowStage]:
    """The stage of `sloguard tune`, which has no window."""
    since = time.time()
    return lambda: WindowStage(State.TUNING, since)


class ServiceStage:
    """The stage of a window of `sloguard serve`; None between windows, and before the service has started."""

    def __init__(self) -> None:
        self.progress: StateMachine | None = None
        self._opened_at: float | None = None

    def __call__(self) -> WindowStage | None:
        """The present stage."""
        progress = self.progress
        standing = progress.standing if progress is not None else None
        if progress is None or standing is None or progress.window_end is None or standing.state not in _WITH_FOOTER:
            self._opened_at = None
            return None
        if self._opened_at is None:
            self._opened_at = standing.since
        return WindowStage(standing.state, self._opened_at, time.time() + progress.time_left() - progress.overrun_s())


class FollowedStage:
    """The stage of a window in another process that was requested at ``since``, from the states in its journal."""

    def __init__(self, since: float) -> None:
        self._since = since
        self._stage: WindowStage | None = None

    def update(self, last: StateRecord | None) -> None:
        """Takes the last state over."""
        within = last is not None and last.state in _WITH_FOOTER
        self._stage = WindowStage(State(last.state), self._since, last.until) if last is not None and within else None

    def __call__(self) -> WindowStage | None:
        """The present stage."""
        return self._stage
