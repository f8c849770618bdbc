"""The commands `sloguard trials` and `sloguard history`: what was measured and decided, oldest first."""

from dataclasses import dataclass
from datetime import datetime
from operator import attrgetter
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sidecar.cli.places import ConfigOption, StateFolder, config_of, folder_of
from sidecar.cli.rendering import AsJson, print_json
from sidecar.cli.terminal import show_trials
from sidecar.format import assignments, when
from sidecar.record.action_queue import ActionQueue, OperatorAction
from sidecar.record.decisions import Decision, Outcome, decision_as_json, evidence_as_json
from sidecar.record.events import Event, EventKind, Operations, WindowOutcome
from sidecar.record.journal import Journal, Promoted, Run
from sidecar.record.run_snapshot import Setup, setup_of
from sidecar.record.trial import Trial, trial_as_json
from sidecar.record.wording import OUTCOMES
from sidecar.report.wording import OBJECTIVES

OUTCOME_STYLES = {
    Outcome.PROMOTED: "green",
    Outcome.KEPT: "cyan",
    Outcome.WORSE: "cyan",
    Outcome.INCONCLUSIVE: "yellow",
    Outcome.INTERRUPTED: "yellow",
    Outcome.ABANDONED: "yellow",
}
_WINDOW_STYLES = {
    WindowOutcome.PROMOTED: "green",
    WindowOutcome.KEPT: "cyan",
    WindowOutcome.FAILED: "red",
    WindowOutcome.INTERRUPTED: "red",
}


@dataclass(frozen=True)
class HistoryRow:
    """One thing that happened: what, how it ended, and the details."""

    at: float
    what: str
    outcome: str
    style: str
    detail: str


def register(app: typer.Typer) -> None:
    """Adds the commands to ``app``."""
    for command in (trials, history):
        app.command()(command)


def trials(state: StateFolder = None, config_file: ConfigOption = None, as_json_: AsJson = False) -> None:
    """List the trials of every run.

    Example: sloguard trials sloguard-state --json
    """
    journal = Journal(folder_of(state, config_file), read_only=True)
    rows = journal.trials()
    if as_json_:
        print_json([trial_as_json(trial) for trial in rows])
        return
    console, configs = Console(), journal.run_configs()
    by_run: dict[int, list[Trial]] = {}
    for row in rows:
        by_run.setdefault(row.run, []).append(row)
    for number, found in by_run.items():
        setup, run = setup_of(configs[number], number), journal.run(number)
        show_trials(console, setup, found, title=_run_title(run, setup) if run is not None else "")
    if not rows:
        console.print("no trials yet")


def _run_title(run: Run, setup: Setup) -> str:
    decision = OUTCOMES[run.decision.outcome] if run.decision else "no decision yet"
    return f"run {run.id}, {when(run.started_at)}: {decision}; objective: {OBJECTIVES[setup.objective]}"


def history(state: StateFolder = None, config_file: ConfigOption = None, as_json_: AsJson = False) -> None:
    """List promotions with their evidence, rollbacks with their reasons, windows, and operators' actions.

    Example: sloguard history -c sloguard.yaml
    """
    config = config_of(state, config_file)
    journal = Journal(config.state, read_only=True)
    operations = Operations(journal, config.base_digest())
    promotions, current, decisions = operations.promotions(), operations.current(), journal.decisions()
    windows = operations.events([EventKind.WINDOW_ENDED])
    actions = ActionQueue(journal).recent()
    if as_json_:
        print_json(
            {
                "promotions": [_promotion(p, current, decisions) for p in promotions],
                "windows": [window_as_json(e) for e in windows],
                "actions": [_action(action) for action in actions],
            }
        )
        return
    rows = [
        *(row for p in promotions for row in _promotion_rows(p, current, decisions)),
        *map(_window_row, windows),
        *map(_action_row, actions),
    ]
    _show(sorted(rows, key=attrgetter("at")))


def _show(rows: list[HistoryRow]) -> None:
    console = Console(highlight=False)
    if not rows:
        console.print("no promotions, no windows and no operator actions yet")
        return
    if not console.is_terminal:
        for row in rows:
            text = f"{when(row.at)}  {row.what}: {row.outcome}{f': {row.detail}' if row.detail else ''}"
            console.print(text, markup=False, soft_wrap=True)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("when", no_wrap=True)
    table.add_column("what", no_wrap=True, max_width=14)
    table.add_column("outcome", max_width=14)
    table.add_column("detail", ratio=1)
    for row in rows:
        at = f"{datetime.fromtimestamp(row.at).astimezone():%Y-%m-%d %H:%M}"
        # Text, not str: rich interprets brackets in str as markup.
        table.add_row(Text(at), Text(row.what), Text(row.outcome, row.style), Text(row.detail))
    console.print(table)


def _promotion_rows(p: Promoted, current: Promoted | None, decisions: dict[int, Decision]) -> list[HistoryRow]:
    decision = p.evidence.decision if p.evidence else decisions.get(p.run) if p.run is not None else None
    outcome = "current" if current is not None and current.id == p.id else "replaced"
    if p.rolled_back_at is not None:
        outcome = "rolled back"
    style = "green" if outcome == "current" else "dim"
    detail = f"{f'{decision.reason}: ' if decision else ''}{assignments(p.args)}"
    rows = [HistoryRow(p.at, f"promotion {p.id}", outcome, style, detail)]
    if p.rolled_back_at is not None:
        reason = f"{p.rollback_reason or 'no reason was recorded'}; its configuration is quarantined"
        rows.append(HistoryRow(p.rolled_back_at, "rollback", f"of promotion {p.id}", "red", reason))
    return rows


def _window_row(event: Event) -> HistoryRow:
    style = _WINDOW_STYLES.get(WindowOutcome(event.content["outcome"]), "yellow")
    if event.decision is not None:
        style = OUTCOME_STYLES[event.decision]
    return HistoryRow(event.at, "window", event.outcome, style, event.reason)


def _action_row(action: OperatorAction) -> HistoryRow:
    who = f" by {action.sender.who}" if action.sender.who else ""
    detail = f"{action.result or 'requested'}{who} ({action.sender.door})"
    return HistoryRow(action.at, str(action.kind), str(action.outcome).replace("_", " "), "", detail)


def _action(action: OperatorAction) -> dict[str, Any]:
    return {
        "action": action.id,
        "at": action.at,
        "kind": action.kind,
        "door": action.sender.door,
        "who": action.sender.who,
        "outcome": action.outcome,
        "result": action.result,
        "ended_at": action.ended_at,
    }


def _promotion(p: Promoted, current: Promoted | None, decisions: dict[int, Decision]) -> dict[str, Any]:
    of_run = decisions.get(p.run) if p.run is not None else None
    rests_on = decision_as_json(of_run) if of_run else None
    return {
        "promotion": p.id,
        "at": p.at,
        "run": p.run,
        "current": current is not None and current.id == p.id,
        "args": p.args,
        "evidence": evidence_as_json(p.evidence) if p.evidence else rests_on,
        "rolled_back_at": p.rolled_back_at,
        "rollback_reason": p.rollback_reason,
    }


def window_as_json(event: Event) -> dict[str, Any]:
    """A window that ended, for ``--json``."""
    return {
        "at": event.at,
        "outcome": event.content["outcome"],
        "decision": event.decision,
        "shown": event.outcome,
        "reason": event.reason,
    }
