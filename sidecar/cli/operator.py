"""What an operator asks of a running sidecar, and of its journal."""

import json
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer
from rich.console import Console

from sidecar.cli.rendering import AsJson
from sidecar.cli.terminal import View, busy_indicator
from sidecar.config.schema import Config, ConfigError, load_config
from sidecar.config.window import parse_duration
from sidecar.engine.process_group import ProcessGroup
from sidecar.format import address, assignments, setting, when
from sidecar.record import lock
from sidecar.record.decisions import Decision, decision_as_json, evidence_as_json
from sidecar.record.events import Event, EventKind, Operations
from sidecar.record.journal import JOURNAL_FILE, Journal, JournalError, Promoted, Run, StateRecord
from sidecar.record.states import COMING_UP, State
from sidecar.record.trial import TrialStatus
from sidecar.record.wording import OUTCOMES
from sidecar.service import remote_rpc
from vllm_sloguard.guard.start_history import RULE, LearnedLimit
from vllm_sloguard.wire import control_pb2 as pb
from vllm_sloguard.wire.control_pb2_grpc import ControlServiceStub

_DEADLINE_S = 10.0
_WAIT_EVERY_S = 0.5
_FOLLOW_EVERY_S = 2.0  # what is measured meanwhile runs on this machine too

ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="The YAML file.", metavar="FILE")]


def state_folders(incomplete: str) -> list[str]:
    """What a shell may complete to a STATE: state folders, configurations, and folders that may hold some."""
    typed = Path(incomplete)
    folder = typed if incomplete.endswith("/") else typed.parent
    start = "" if incomplete.endswith("/") else typed.name
    with suppress(OSError):
        found = sorted(path for path in folder.iterdir() if path.name.startswith(start) and path.name[0] != ".")
        states = [str(path) for path in found if (path / JOURNAL_FILE).is_file()]
        files = [str(path) for path in found if path.suffix in (".yaml", ".yml") and path.is_file()]
        return [*states, *files, *(f"{path}/" for path in found if path.is_dir() and str(path) not in states)]
    return []


StateFolder = Annotated[
    Path,
    typer.Argument(
        help="The state folder, or the YAML file that names it.", metavar="STATE", autocompletion=state_folders
    ),
]


class CommandRefused(RuntimeError):  # noqa: N818 - it names what happened
    """What was asked for can't be done; the text says why, in one line."""


def register(app: typer.Typer) -> None:
    """Adds the commands to ``app``."""
    for command in (retune, pause, resume, abort, rollback, history, status):
        app.command()(command)


def retune(
    config_file: ConfigFile,
    now: Annotated[bool, typer.Option("--now", help="Needed: a window takes the service down.")] = False,
    duration: Annotated[str, typer.Option("--for", help='Length of the window, "45m" say.')] = "",
    wait: Annotated[bool, typer.Option("--wait", help="Shows the window and waits until it serves again.")] = False,
    force: Annotated[bool, typer.Option("--force", help="In spite of the traffic, and of a failed window.")] = False,
) -> None:
    """Asks a running `sloguard serve` for a tuning window.

    Example: sloguard retune --now --wait -c sloguard.yaml
    """
    config = load_config(config_file)
    if not now:
        raise ConfigError("retune: --now is needed: the window opens at once, and the service goes down for it")
    duration_s = _duration(duration)
    asked_at = time.time()
    _ask(
        config,
        lambda stub, epoch, how: stub.Retune(
            pb.RetuneRequest(duration_seconds=duration_s, epoch=epoch, force=force), **how
        ),
    )
    if wait:
        _follow(config, asked_at)


def pause(
    config_file: ConfigFile, reason: Annotated[str, typer.Option(help="Shown by `sloguard status`.")] = ""
) -> None:
    """Lets no more windows open, until `sloguard resume`; a window that is open goes on.

    Example: sloguard pause --reason "release week" -c sloguard.yaml
    """
    _ask(
        load_config(config_file),
        lambda stub, epoch, how: stub.Pause(pb.PauseRequest(epoch=epoch, reason=reason), **how),
    )


def resume(config_file: ConfigFile) -> None:
    """Lets windows open again.

    Example: sloguard resume -c sloguard.yaml
    """
    _ask(load_config(config_file), lambda stub, epoch, how: stub.Resume(pb.ResumeRequest(epoch=epoch), **how))


def abort(
    config_file: ConfigFile,
    wait: Annotated[bool, typer.Option("--wait", help="Waits until it serves again.")] = False,
) -> None:
    """Ends the open window now, and restores what served before it.

    Example: sloguard abort --wait -c sloguard.yaml
    """
    config, asked_at = load_config(config_file), time.time()
    _ask(config, lambda stub, epoch, how: stub.Abort(pb.AbortRequest(epoch=epoch), **how))
    if wait:
        _wait_serving(config, asked_at, lambda: True)


def rollback(
    config_file: ConfigFile,
    promotion: Annotated[int, typer.Option(help="The promotion to take back, as `history` numbers it.", min=0)] = 0,
    wait: Annotated[bool, typer.Option("--wait", help="Waits until what served before serves again.")] = False,
) -> None:
    """Takes the last promotion back: what was promoted before it, or the file's arguments, serve again.

    What was taken back is quarantined: the search does not propose it again. Asked once more, it changes nothing;
    --promotion goes further back.

    Example: sloguard rollback --wait -c sloguard.yaml
    """
    config, asked_at = load_config(config_file), time.time()
    number = promotion or _last_promotion(config).id
    _ask(
        config,
        lambda stub, epoch, how: stub.Rollback(pb.RollbackRequest(epoch=epoch, promotion=number), **how),
    )
    if wait:
        _wait_serving(config, asked_at, lambda: _restored(config, number))


def _last_promotion(config: Config) -> Promoted:
    """The newest one, whether it was taken back or not: so that to ask twice is to ask once."""
    promotions = _operations(config).promotions()
    if not promotions:
        raise CommandRefused(
            "there is nothing to roll back to: the file's own arguments serve, and nothing was promoted"
        )
    return promotions[-1]


def _restored(config: Config, number: int) -> bool:
    """Whether an engine has started since the promotion was taken back."""
    operations = _operations(config)
    at = next((p.rolled_back_at for p in operations.promotions() if p.id == number), None)
    return at is not None and bool(operations.events([EventKind.START], 1, since=at))


def history(config_file: ConfigFile, as_json_: AsJson = False) -> None:
    """Every promotion with what it rests on, every rollback with its reason, and the windows.

    Example: sloguard history -c sloguard.yaml
    """
    config = load_config(config_file)
    journal = Journal(config.state, read_only=True)
    operations = Operations(journal, config.base_digest())
    current = operations.current()
    decisions = journal.decisions()
    promotions = [_promotion(p, current, decisions) for p in operations.promotions()]
    windows = [_window(e) for e in operations.events([EventKind.WINDOW_ENDED])]
    if as_json_:
        print(json.dumps({"promotions": promotions, "windows": windows}))
        return
    for p in promotions:
        evidence = f": {p['evidence']['reason']}" if p["evidence"] else ""
        print(f"promotion {p['promotion']} of {when(p['at'])}{' (in force)' if p['current'] else ''}{evidence}")
        print(f"  {assignments(p['args'])}")
        if p["rolled_back_at"]:
            print(f"  rolled back {when(p['rolled_back_at'])}, quarantined: {p['rollback_reason']}")
    for w in windows:
        print(f"window of {when(w['at'])}: {w['shown']}: {w['reason']}")
    if not promotions and not windows:
        print("nothing was promoted, and no window has ended")


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


def status(state: StateFolder, as_json_: AsJson = False) -> None:
    """What the sidecar is doing, and why.

    Example: sloguard status sloguard-state
    """
    folder = state_folder(state)
    journal = Journal(folder, read_only=True)
    operations = Operations(journal, "")
    record, run, pid = journal.state(), journal.last_run(), lock.holder(folder)
    standing = _standing(record, run, pid)
    paused, windows = operations.paused(), operations.events([EventKind.WINDOW_ENDED], 1)
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
        "trials": len(journal.trials(run.id)) if run else 0,
        "rules": [_rule(rule) for rule in journal.rules(time.time())],
    }
    if as_json_:
        print(json.dumps(facts))
        return
    for text in standing:
        print(text)
    if facts["serves"]:
        print(f"serves: {facts['serves']} at {facts['engine_address']}")
    if paused:
        print(f"paused: since {when(paused.at)}{f': {paused.reason}' if paused.reason else ''}")
    if windows:
        print(f"last window: {when(windows[-1].at)}: {windows[-1].outcome}: {windows[-1].reason}")
    if run:
        decision = f"{OUTCOMES[run.decision.outcome]}: {run.decision.reason}" if run.decision else "not decided yet"
        count = facts["trials"]
        print(f"last run: {run.id}, {count} trial{'' if count == 1 else 's'}, {decision}")
    for rule in facts["rules"]:
        limit = setting(rule["value"], rule["kind"])
        print(f"learned: {rule['kind']} {limit} until {when(rule['expires_at'])}: {rule['reason']}")


def _standing(record: StateRecord | None, run: Run | None, pid: int | None) -> list[str]:
    """Whether a sidecar runs, and what it does; without one, how the last one ended."""
    last = f"{record.state} since {when(record.at)}: {record.reason}" if record else ""
    halted = record is None or record.state == State.HALTED
    if pid is not None and halted:
        tunes = run is not None and run.ended_at is None
        return [f"sidecar: process {pid}, {'`sloguard tune`' if tunes else 'which begins or ends'}: it does not serve"]
    if pid is not None:
        # The return to the service is still within the window's time, but the window is over.
        until = record.until if record is not None and record.state != State.SERVING else None
        ends = f"; the window ends at {when(until)}" if until else ""
        return [f"sidecar: process {pid}", f"state: {last}{ends}"]
    if record is None:
        return ["sidecar: not running; `sloguard serve` never ran on this state folder"]
    if halted:
        return [f"sidecar: not running; it ended {when(record.at)}: {record.reason}"]
    return ["sidecar: not running; it was killed, or its machine went down", f"last state: {last}"]


def _serves(journal: Journal, operations: Operations, record: StateRecord | None) -> dict[str, str | None]:
    """What the engine on the operator's port was started with, and where it is; None where none serves."""
    engines = [e for e in journal.engines() if e.role == "serving" and ProcessGroup(e.identity).leader_alive()]
    starts = operations.events([EventKind.START], 1)
    # An engine that is still starting is not yet the last that has started.
    if not engines or not starts or record is None or record.state in COMING_UP:
        return {"serves": None, "engine_address": None}
    number = starts[-1].content["promotion"]
    launch = engines[-1].launch
    return {
        "serves": "the file's arguments" if number is None else f"promotion {number}",
        "engine_address": address(launch["host"], launch["port"]),
    }


def _rule(rule: LearnedLimit) -> dict[str, Any]:
    return json.loads(RULE.dump_json(rule))


def state_folder(path: Path) -> Path:
    """The folder that ``path`` is, or that the file there names."""
    return path if path.is_dir() or not path.is_file() else load_config(path).state


def _operations(config: Config) -> Operations:
    return Operations(Journal(config.state, read_only=True), config.base_digest())


def _duration(text: str) -> float:
    if not text:
        return 0.0
    try:
        return parse_duration(text)
    except ValueError as error:
        raise ConfigError(f"--for: {text!r}: {error}") from None


def _ask(config: Config, call: Callable[[ControlServiceStub, int, dict[str, Any]], Any]) -> None:
    """Asks the controller that the journal names, and prints what it says. Raises CommandRefused."""
    epoch = 0
    with suppress(JournalError):  # then nobody serves, which the call will say
        epoch = Journal(config.state, read_only=True).epoch()
    with remote_rpc.channel(config) as (channel, metadata):
        try:
            answer = call(ControlServiceStub(channel), epoch, {"timeout": _DEADLINE_S, "metadata": metadata})
        except grpc.RpcError as error:
            code = error.code() if isinstance(error, grpc.Call) else None
            if code is grpc.StatusCode.UNAVAILABLE:
                where = f" or on {config.remote.address}" if config.remote else ""
                raise CommandRefused(f"no `sloguard serve` answers on {config.socket}{where}") from None
            raise CommandRefused(error.details() or str(code) if isinstance(error, grpc.Call) else str(error)) from None
    if summary := getattr(answer, "summary", ""):
        print(summary)


def _looks(config: Config, every_s: float) -> Generator[float]:
    """The time, every ``every_s``, seconds since the epoch. Raises Refused when the sidecar ends."""
    while lock.holder(config.state) is not None:
        yield time.time()
        time.sleep(every_s)
    raise CommandRefused("the sidecar has ended: `sloguard status` says why, where that is known")


def _say(state: StateRecord) -> None:
    print(f"{state.state}: {state.reason}", flush=True)


def _wait_serving(config: Config, since: float, holds: Callable[[], bool]) -> None:
    """Prints the states that are entered after ``since`` until it serves and ``holds``."""
    journal = Journal(config.state, read_only=True)
    seen = 0
    with busy_indicator("waiting until it serves"):
        for _ in _looks(config, _WAIT_EVERY_S):
            states = journal.states(since)
            for state in states[seen:]:
                _say(state)
            seen = len(states)
            last = journal.state()
            if last is not None and last.state == State.SERVING and holds():
                return


def _follow(config: Config, since: float) -> None:
    """Shows what the running sidecar writes to its journal until it serves again, in the order in which it happened."""
    journal = Journal(config.state, read_only=True)
    shown: dict[tuple[int, int], TrialStatus] = {}
    seen = 0
    with View(Console(), list(config.search.knobs), config.search.budget) as view:
        for until in _looks(config, _FOLLOW_EVERY_S):
            # What is written between the reads of the two tables is for the next look.
            states = [state for state in journal.states(since) if state.at <= until]
            news: list[tuple[float, Callable[[], None]]] = [(s.at, partial(_say, s)) for s in states[seen:]]
            seen = len(states)
            run = journal.last_run()
            for trial in journal.trials(run.id) if run is not None and run.started_at >= since else []:
                key, at = (trial.run, trial.number), trial.ended_at or trial.started_at
                if at <= until and shown.get(key) is not trial.status:
                    shown[key] = trial.status
                    news.append((at, partial(view.notify, trial)))
            for _, tell in sorted(news, key=itemgetter(0)):
                tell()
            if states and states[-1].state == State.SERVING:
                return
