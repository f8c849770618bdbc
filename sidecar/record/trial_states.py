"""How the states of a trial are shown, the same in the terminal, on the page and in the report. Pure.

The states themselves are sidecar.record.trial.TrialStatus: its values stand in the journal, in JSON and in metrics.
"""

from dataclasses import dataclass
from enum import StrEnum

from sidecar.record.trial import TrialStatus


class StateTone(StrEnum):
    """How good news a state is; the page's and the terminal's colours follow from it."""

    GOOD = "good"
    BAD = "bad"
    WARN = "warn"
    QUIET = "quiet"
    BUSY = "busy"


@dataclass(frozen=True)
class TrialStateDisplay:
    """One state. ``colour`` is the plots', in hex; ``symbol`` stands beside the label where colour is not enough."""

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
# States of trials that say something about their configuration by having run.
RAN_STATUSES = (TrialStatus.FEASIBLE, TrialStatus.INFEASIBLE, TrialStatus.CRASHED)
