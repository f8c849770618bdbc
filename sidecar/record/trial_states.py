"""How trial statuses are displayed, the same in the terminal, on the page and in the report. Pure.

The statuses are sidecar.record.trial.TrialStatus, whose values appear in the journal, JSON and metrics.
"""

from dataclasses import dataclass
from enum import StrEnum

from sidecar.record.trial import TrialStatus


class StateTone(StrEnum):
    """The severity of a status, which determines its colours."""

    GOOD = "good"
    BAD = "bad"
    WARN = "warn"
    QUIET = "quiet"
    BUSY = "busy"


@dataclass(frozen=True)
class TrialStateDisplay:
    """How one status is displayed. ``colour`` is for plots, in hex; ``symbol`` is for use without colour."""

    label: str
    meaning: str
    tone: StateTone
    symbol: str
    colour: str
    terminal_style: str


_GREY = "#8a8f98"
TRIAL_STATES: dict[TrialStatus, TrialStateDisplay] = {
    TrialStatus.RUNNING: TrialStateDisplay("running", "has not ended yet", StateTone.BUSY, "▸", _GREY, "bold cyan"),
    TrialStatus.FEASIBLE: TrialStateDisplay(
        "feasible", "met every limit of the SLO", StateTone.GOOD, "✓", "#3b82c4", "green"
    ),
    TrialStatus.INFEASIBLE: TrialStateDisplay(
        "infeasible", "missed a limit of the SLO", StateTone.BAD, "✗", "#e6a100", "yellow"
    ),
    TrialStatus.CRASHED: TrialStateDisplay(
        "crashed", "ended because its engine crashed or did not start", StateTone.BAD, "✕", "#dd4132", "red"
    ),
    TrialStatus.REFUSED: TrialStateDisplay(
        "refused", "was refused by the guard and not started", StateTone.WARN, "⊘", _GREY, "magenta"
    ),
    TrialStatus.ABORTED: TrialStateDisplay(
        "aborted", "was ended before its measurement was complete", StateTone.QUIET, "-", _GREY, "dim"
    ),
}
# Statuses of trials that were carried out, and so say something about their configuration.
RAN_STATUSES = (TrialStatus.FEASIBLE, TrialStatus.INFEASIBLE, TrialStatus.CRASHED)
