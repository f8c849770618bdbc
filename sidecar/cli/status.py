"""The command `sloguard status`."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sidecar.cli.history import window_as_json
from sidecar.cli.places import ConfigOption, StateFolder, config_of, folder_of
from sidecar.cli.rendering import AsJson, print_json
from sidecar.cli.service_facts import ServiceFacts, read_service_facts
from sidecar.cli.status_lines import StatusLine, next_action, slo_standing, status_lines
from sidecar.config.schema import Config, ConfigError
from sidecar.observe.watch_report import WATCH_REPORT
from sidecar.record.decisions import decision_as_json
from sidecar.record.journal import JournalError
from sidecar.record.wording import misses_slo
from vllm_sloguard.guard.start_history import RULE


def register(app: typer.Typer) -> None:
    """Adds the command to ``app``."""
    app.command()(status)


def status(state: StateFolder = None, config_file: ConfigOption = None, as_json_: AsJson = False) -> None:
    """Show what is running, whether it meets the SLO, and what to do now.

    Example: sloguard status sloguard-state
    """
    folder = folder_of(state, config_file)
    facts = read_service_facts(folder, _known_config(state, config_file))
    if as_json_:
        print_json(_as_json(facts))
    else:
        _print(status_lines(facts))


def _known_config(state: Path | None, config_file: Path | None) -> Config | None:
    """The configuration; None if a state folder without a run was given."""
    with suppress(ConfigError, JournalError):
        return config_of(state, config_file)
    return None


def _print(lines: list[StatusLine]) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        for line in lines:
            console.print(f"{line.label}: {line.text}", markup=False, soft_wrap=True)
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(ratio=1)
    for line in lines:
        # Text, not str: rich interprets brackets in str as markup.
        table.add_row(line.label, Text(line.text, str(line.tone)))
    console.print(table)


def _as_json(facts: ServiceFacts) -> dict[str, Any]:
    run, record, slo = facts.run, facts.state, slo_standing(facts)
    missing = misses_slo(facts.trials, run.decision.outcome if run and run.decision else None)
    return {
        "running": facts.pid is not None,
        "pid": facts.pid,
        "standing": [f"{line.label}: {line.text}" for line in status_lines(facts)],
        "epoch": facts.epoch,
        "state": record.state if record else None,
        "reason": record.reason if record else None,
        "since": record.at if record else None,
        "until": record.until if record else None,
        "paused": {"since": facts.paused.at, "reason": facts.paused.reason} if facts.paused else None,
        "last_window": window_as_json(facts.last_window) if facts.last_window else None,
        "next_window_at": facts.next_window_at,
        "serves": facts.serving.name if facts.serving else None,
        "serves_since": facts.serving.since if facts.serving else None,
        "engine_address": facts.serving.address if facts.serving else None,
        "slo": {"compliance": slo.compliance, "reason": slo.text},
        "probation_until": facts.probation_until,
        "rolled_back": facts.last_rollback.id if facts.last_rollback else None,
        "run": run.id if run else None,
        "decision": decision_as_json(run.decision) if run and run.decision else None,
        "trials": len(facts.trials),
        "misses_slo": missing.number if missing else None,
        "rules": [json.loads(RULE.dump_json(rule)) for rule in facts.rules],
        "watched": json.loads(WATCH_REPORT.dump_json(facts.watched)) if facts.watched is not None else None,
        "do_now": next_action(facts, slo.compliance),
    }
