"""The commands `sloguard status` and `sloguard history`: what the journal says."""

import json
import time
from pathlib import Path
from typing import Any

import typer
from pydantic import ValidationError

from sidecar.cli.places import ConfigOption, StateFolder, config_of, folder_of
from sidecar.cli.rendering import AsJson, print_json
from sidecar.format import assignments, setting, when
from sidecar.observe.watch_report import ADVICE_TEXTS, WATCH_REPORT, WATCH_REPORT_FILE, WatchReport
from sidecar.record import lock
from sidecar.record.action_queue import ActionQueue, OperatorAction
from sidecar.record.decisions import Decision, decision_as_json, evidence_as_json
from sidecar.record.events import Event, EventKind, Operations
from sidecar.record.journal import Journal, Promoted, Run, StateRecord
from sidecar.record.states import COMING_UP, State
from sidecar.record.trial_states import TRIAL_STATES
from sidecar.record.wording import OUTCOMES, misses_slo
from sidecar.report.wording import measured_text
from vllm_sloguard.agent.engine_http import address
from vllm_sloguard.agent.process_group import ProcessGroup
from vllm_sloguard.guard.start_history import RULE, LearnedLimit

# A sidecar that watches reports every five seconds.
_WATCHED_WITHIN_S = 60.0


def register(app: typer.Typer) -> None:
    """Adds the commands to ``app``."""
    for command in (history, status):
        app.command()(command)


def history(state: StateFolder = None, config_file: ConfigOption = None, as_json_: AsJson = False) -> None:
    """List promotions with their evidence, rollbacks with their reasons, and windows.

    Example: sloguard history -c sloguard.yaml
    """
    config = config_of(state, config_file)
    journal = Journal(config.state, read_only=True)
    operations = Operations(journal, config.base_digest())
    current = operations.current()
    decisions = journal.decisions()
    promotions = [_promotion(p, current, decisions) for p in operations.promotions()]
    windows = [_window(e) for e in operations.events([EventKind.WINDOW_ENDED])]
    actions = [_action(action) for action in ActionQueue(journal).recent()]
    if as_json_:
        print_json({"promotions": promotions, "windows": windows, "actions": actions})
        return
    for p in promotions:
        evidence = f": {p['evidence']['reason']}" if p["evidence"] else ""
        print(f"promotion {p['promotion']} of {when(p['at'])}{' (current)' if p['current'] else ''}{evidence}")
        print(f"  {assignments(p['args'])}")
        if p["rolled_back_at"]:
            print(f"  rolled back {when(p['rolled_back_at'])}, quarantined: {p['rollback_reason']}")
    for w in windows:
        print(f"window of {when(w['at'])}: {w['shown']}: {w['reason']}")
    for o in actions:
        who = f" by {o['who']}" if o["who"] else ""
        result = f": {o['result']}" if o["result"] else ""
        print(f"action of {when(o['at'])}: {o['kind']}{who} ({o['door']}): {o['outcome'].replace('_', ' ')}{result}")
    if not promotions and not windows and not actions:
        print("no promotions, no windows and no operator actions yet")


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


def _window(event: Event) -> dict[str, Any]:
    content = event.content
    return {
        "at": event.at,
        "outcome": content["outcome"],
        "decision": event.decision,
        "shown": event.outcome,
        "reason": event.reason,
    }


def status(state: StateFolder = None, config_file: ConfigOption = None, as_json_: AsJson = False) -> None:
    """Show what the sidecar is doing, and why.

    Example: sloguard status sloguard-state
    """
    folder = folder_of(state, config_file)
    journal = Journal(folder, read_only=True)
    operations = Operations(journal, "")
    record, run, pid = journal.state(), journal.last_run(), lock.holder(folder)
    standing = _standing(record, run, pid)
    paused, windows = operations.paused(), operations.events([EventKind.WINDOW_ENDED], 1)
    trials = journal.trials(run.id) if run else []
    watched = _watched(folder) if pid is not None else None
    missing = misses_slo(trials, run.decision.outcome if run and run.decision else None)
    facts: dict[str, Any] = {
        "running": pid is not None,
        "pid": pid,
        "standing": standing,
        "epoch": journal.epoch(),
        "state": record.state if record else None,
        "reason": record.reason if record else None,
        "since": record.at if record else None,
        "until": record.until if record else None,
        "paused": {"since": paused.at, "reason": paused.reason} if paused else None,
        "last_window": _window(windows[-1]) if windows else None,
        **_serves(journal, operations, record),
        "run": run.id if run else None,
        "decision": decision_as_json(run.decision) if run and run.decision else None,
        "trials": len(trials),
        "misses_slo": missing.number if missing else None,
        "rules": [_rule(rule) for rule in journal.rules(time.time())],
        "watched": json.loads(WATCH_REPORT.dump_json(watched)) if watched is not None else None,
    }
    if as_json_:
        print_json(facts)
        return
    for text in standing:
        print(text)
    if watched is not None:
        _show_watched(watched)
    if facts["serves"]:
        print(f"current configuration: {facts['serves']}, serving at {facts['engine_address']}")
    if run and missing:
        label = TRIAL_STATES[missing.status].label
        print(f"the current configuration misses the SLO: it was {label} in trial {missing.number} of run {run.id}")
    if paused:
        print(f"paused: since {when(paused.at)}{f': {paused.reason}' if paused.reason else ''}")
    if windows:
        print(f"last window: {when(windows[-1].at)}: {windows[-1].outcome}: {windows[-1].reason}")
    if run:
        decision = f"{OUTCOMES[run.decision.outcome]}: {run.decision.reason}" if run.decision else "no decision yet"
        count = facts["trials"]
        print(f"last run: {run.id}, {count} trial{'' if count == 1 else 's'}, {decision}")
    for rule in facts["rules"]:
        limit = setting(rule["value"], rule["kind"])
        print(f"learned: {rule['kind']} {limit} until {when(rule['expires_at'])}: {rule['reason']}")


def _standing(record: StateRecord | None, run: Run | None, pid: int | None) -> list[str]:
    """Whether a sidecar is running and what it does; if none is, how the last one ended."""
    last = f"{record.state} since {when(record.at)}: {record.reason}" if record else ""
    halted = record is None or record.state == State.HALTED
    if pid is not None and halted:
        tunes = run is not None and run.ended_at is None
        return [f"sidecar: process {pid}, {'`sloguard tune`, not serving' if tunes else 'starting or stopping'}"]
    if pid is not None:
        # SERVING can be reached before the window's time is over, but the window has ended by then.
        until = record.until if record is not None and record.state != State.SERVING else None
        ends = f"; the window ends at {when(until)}" if until else ""
        return [f"sidecar: process {pid}", f"state: {last}{ends}"]
    if record is None:
        return ["sidecar: not running; `sloguard serve` has never run on this state folder"]
    if halted:
        return [f"sidecar: not running; it ended {when(record.at)}: {record.reason}"]
    return ["sidecar: not running; it was killed, or the machine went down", f"last state: {last}"]


def _serves(journal: Journal, operations: Operations, record: StateRecord | None) -> dict[str, str | None]:
    """The configuration of the serving engine, and its address; None if none is serving."""
    serving = [engine for engine in journal.engines() if engine.role == "serving"]
    engines = [e for e in serving if e.identity.remote or ProcessGroup(e.identity).leader_alive()]
    starts = operations.events([EventKind.START], 1)
    # The start of an engine is only recorded once it is up.
    if not engines or not starts or record is None or record.state in COMING_UP:
        return {"serves": None, "engine_address": None}
    number = starts[-1].content["promotion"]
    launch = engines[-1].launch
    return {
        "serves": "the file's arguments" if number is None else f"promotion {number}",
        "engine_address": address(launch["host"], launch["port"]),
    }


def _watched(folder: Path) -> WatchReport | None:
    """The report of a sidecar that only watches; None without one, or if it is an earlier sidecar's."""
    try:
        report = WATCH_REPORT.validate_json((folder / WATCH_REPORT_FILE).read_bytes())
    except (OSError, ValidationError):
        return None
    return report if time.time() - report.at < _WATCHED_WITHIN_S else None


def _show_watched(report: WatchReport) -> None:
    found = report.compliance
    traffic = "" if found.rate is None else f", {found.rate:.3g} requests/s"
    answers = "answers" if report.answers else "does not answer"
    print(f"vLLM at {report.address}: {answers}")
    print(f"SLO: {found.compliance} ({found.requests} requests in {found.over_s / 60:.0f} minutes{traffic})")
    for limit in found.limits:
        if limit.measured is not None:
            measured, most = (measured_text(limit.name, value) for value in (limit.measured, limit.limit))
            print(f"  {limit.name.removesuffix('_ms')}: {measured}, limit {most}{' (missed)' if limit.missed else ''}")
    for one in report.advice:
        print(f"advice: {ADVICE_TEXTS[one]}")


def _rule(rule: LearnedLimit) -> dict[str, Any]:
    return json.loads(RULE.dump_json(rule))
