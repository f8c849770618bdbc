"""The command `sloguard`."""

import json
import os
import signal
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, NoReturn

import grpc
import typer
from rich.console import Console

from sidecar import guard_commands, lock, promoted, remote, study_commands
from sidecar.bench import commands as bench
from sidecar.config import Config, ConfigError, load, seconds
from sidecar.engine.engine import Cancelled, EngineCrashed
from sidecar.engine.fork_server import ForkServerError
from sidecar.engine.process_group import NotGoneError, ProcessGroup
from sidecar.guard import Guard
from sidecar.journal import Journal, JournalError
from sidecar.learning import Learning
from sidecar.live import LiveHub, next_epoch
from sidecar.load import LoadError
from sidecar.metrics import Metrics
from sidecar.promotion import Outcome
from sidecar.runner import Runner
from sidecar.seconds import spent
from sidecar.service import Control, Parts, Requests, Say, Service
from sidecar.telemetry import TelemetryHub
from sidecar.telemetry import serve as serve_grpc
from sidecar.terminal import View, line, show, spending
from sidecar.trial import Status, as_json
from sidecar.tuner import Tuner, incumbent_args, open_run
from vllm_sloguard import machine
from vllm_sloguard.learned import RULE, Rule
from vllm_sloguard.wire import control_pb2
from vllm_sloguard.wire.control_pb2_grpc import ControlServiceStub, add_ControlServiceServicer_to_server
from vllm_sloguard.wire.live_pb2_grpc import add_LiveServiceServicer_to_server
from vllm_sloguard.wire.telemetry_pb2_grpc import add_TelemetryServiceServicer_to_server

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130

app = typer.Typer(
    help="Tunes vLLM under latency objectives: see https://arxiv.org/abs/2604.17627.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

guard_commands.register(app)
app.add_typer(bench.app, name="bench")
app.add_typer(study_commands.app, name="study")

ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="The YAML file.", metavar="FILE")]
StateFolder = Annotated[Path, typer.Argument(help="The state folder, or the YAML file that names it.", metavar="STATE")]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]


def main() -> None:
    """Runs the command; a user's mistake is one line and a non-zero exit code."""
    try:
        app()
    except (ConfigError, lock.LockedError) as error:
        _fail(str(error), BAD_INPUT)
    except (JournalError, LoadError, EngineCrashed, ForkServerError, NotGoneError, OSError) as error:
        _fail(str(error), FAILED)
    except Cancelled:
        _fail("interrupted; the same command goes on where this one ended", INTERRUPTED)


def _fail(text: str, code: int) -> NoReturn:
    Console(stderr=True).print(f"sloguard: {' '.join(text.split())}", markup=False, highlight=False, soft_wrap=True)
    sys.exit(code)


@app.command()
def tune(config_file: ConfigFile) -> None:
    """One tuning run now, on engines of its own. A run that was interrupted goes on.

    Example: sloguard tune -c sloguard.yaml
    """
    config, console = load(config_file), Console()

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    with _sidecar(config, say) as parts:
        journal, metrics = parts.journal, parts.metrics
        _refuse_while_serving(journal)
        parts.runner.end_orphans()
        run = open_run(config, journal)
        with View(console, list(config.search.knobs), config.search.budget) as view:
            for trial in journal.trials(run.id):
                view.notify(trial)

            def notify(trial: Any) -> None:
                metrics.trial(trial, journal.trials(run.id))
                view.notify(trial)

            decision = Tuner(
                config,
                run,
                journal,
                parts.runner,
                parts.guard,
                notify=notify,
                fits=lambda _search, _validations: True,
                cancelled=parts.requests.stop_sidecar.is_set,
            ).tune()
        metrics.decided(decision)
        trials = journal.trials(run.id)
        path = promoted.write(config, incumbent_args(config, journal), decision, trials)
        if console.is_terminal:
            show(console, trials, list(config.search.knobs))
        say(spending(spent(trials, time.time())))
        say(f"{decision.outcome}: {decision.reason}")
        if decision.outcome is Outcome.PROMOTED:
            chosen = next(t for t in trials if t.number == decision.trial)
            say(line(chosen, list(config.search.knobs)))
        say(f"serve it: vllm serve --config {path}")


def _refuse_while_serving(journal: Journal) -> None:
    for record in journal.engines():
        if record.role == "serving" and ProcessGroup(record.identity).leader_alive():
            _fail(
                f"vLLM still serves from this state folder, as process id {record.identity.pid}: run `sloguard serve`,"
                " which takes it over, and ask that for a window; Ctrl-C there ends both",
                FAILED,
            )


@app.command()
def serve(config_file: ConfigFile) -> None:
    """Keeps vLLM serving, and retunes it in the windows of the configuration.

    Ctrl-C ends it and its engine, after requests in flight. SIGTERM ends the sidecar alone: the engine serves on, and
    the next `sloguard serve` takes it over.

    Example: sloguard serve -c sloguard.yaml
    """
    config = load(config_file)
    console = Console()

    def say(text: str) -> None:
        when = datetime.now().astimezone()
        console.print(f"{when:%Y-%m-%d %H:%M:%S} {text}", markup=False, highlight=False, soft_wrap=True)

    with (
        _sidecar(config, say) as parts,
        View(console, list(config.search.knobs), config.search.budget) as view,
    ):
        server = parts.metrics.serve()
        try:
            where = server.server_address
            say(f"metrics: http://{where[0]}:{where[1]}/metrics")
            Service(config, parts, say=say, notify=view.notify).run()
        finally:
            server.shutdown()


@app.command()
def retune(
    config_file: ConfigFile,
    now: Annotated[bool, typer.Option("--now", help="Needed: a window takes the service down.")] = False,
    duration: Annotated[str, typer.Option("--for", help='Length of the window, "45m" say.')] = "",
    wait: Annotated[bool, typer.Option("--wait", help="Shows the window and waits until it serves again.")] = False,
) -> None:
    """Asks a running `sloguard serve` for a tuning window.

    Example: sloguard retune --now --wait -c sloguard.yaml
    """
    config = load(config_file)
    if not now:
        raise ConfigError("retune: --now is needed: the window opens at once, and the service goes down for it")
    request = control_pb2.RetuneRequest(duration_seconds=_duration(duration))
    asked_at = time.time()
    with remote.channel(config) as (channel, metadata):
        try:
            ControlServiceStub(channel).Retune(request, timeout=10, metadata=metadata)
        except grpc.RpcError as error:
            code = error.code() if isinstance(error, grpc.Call) else None
            if code is grpc.StatusCode.UNAVAILABLE:
                where = f" or on {config.remote.address}" if config.remote else ""
                _fail(f"no `sloguard serve` answers on {config.socket}{where}", FAILED)
            _fail(error.details() or str(code) if isinstance(error, grpc.Call) else str(error), FAILED)
    if wait:
        _follow(config, asked_at)


def _duration(text: str) -> float:
    if not text:
        return 0.0
    try:
        return seconds(text)
    except ValueError as error:
        raise ConfigError(f"--for: {text!r}: {error}") from None


def _follow(config: Config, since: float) -> None:
    """Shows what the running sidecar writes to its journal until it serves again."""
    journal = Journal(config.state, read_only=True)
    shown: dict[tuple[int, int], Status] = {}
    seen = 0
    with View(Console(), list(config.search.knobs), config.search.budget) as view:
        while lock.holder(config.state) is not None:
            states = journal.states(since)
            for state in states[seen:]:
                print(f"{state.state}: {state.reason}", flush=True)
            seen = len(states)
            run = journal.last_run()
            for trial in journal.trials(run.id) if run is not None and run.started_at >= since else []:
                key = trial.run, trial.number
                if trial.started_at >= since and shown.get(key) is not trial.status:
                    shown[key] = trial.status
                    view.notify(trial)
            if states and states[-1].state == "serving":
                return
            # What is measured meanwhile runs on this machine too.
            time.sleep(2)
    _fail("the sidecar has ended", FAILED)


@app.command()
def status(state: StateFolder, as_json_: AsJson = False) -> None:
    """What the sidecar is doing, and why.

    Example: sloguard status sloguard-state
    """
    folder = _state_folder(state)
    journal = Journal(folder, read_only=True)
    record, run, pid = journal.state(), journal.last_run(), lock.holder(folder)
    facts: dict[str, Any] = {
        "running": pid is not None,
        "pid": pid,
        "state": record.state if record else None,
        "reason": record.reason if record else None,
        "since": record.at if record else None,
        "until": record.until if record else None,
        "run": run.id if run else None,
        "decision": run.decision if run else None,
        "trials": len(journal.trials(run.id)) if run else 0,
        "rules": [_rule(rule) for rule in journal.rules(time.time())],
    }
    if as_json_:
        print(json.dumps(facts))
        return
    print(f"sidecar: {f'process {pid}' if pid else 'not running'}")
    if record:
        print(f"state: {record.state} since {datetime.fromtimestamp(record.at):%Y-%m-%d %H:%M:%S}: {record.reason}")
    if run:
        decision = f"{run.decision['outcome']}: {run.decision['reason']}" if run.decision else "not decided"
        print(f"last run: {run.id}, {facts['trials']} trials, {decision}")
    for rule in facts["rules"]:
        until = datetime.fromtimestamp(rule["expires_at"])
        print(f"learned: {rule['kind']} {rule['value']} until {until:%Y-%m-%d %H:%M}: {rule['reason']}")


def _rule(rule: Rule) -> dict[str, Any]:
    return json.loads(RULE.dump_json(rule))


@app.command()
def trials(state: StateFolder, as_json_: AsJson = False) -> None:
    """Every trial of every run.

    Example: sloguard trials sloguard-state --json
    """
    rows = Journal(_state_folder(state), read_only=True).trials()
    if as_json_:
        print(json.dumps([as_json(trial) for trial in rows]))
        return
    knobs = list(dict.fromkeys(name for t in rows for name in t.plan.proposed))
    show(Console(), rows, knobs)


def _state_folder(path: Path) -> Path:
    return path if path.is_dir() or not path.is_file() else load(path).state


@contextmanager
def _sidecar(config: Config, say: Say) -> Generator[Parts]:
    """What `tune` and `serve` both need, for as long as the state folder's lock is held."""
    with lock.held(config.state):
        requests, metrics = Requests(), Metrics(config)
        live = LiveHub(next_epoch(config.state))
        hub, control = TelemetryHub(metrics.heard), Control(requests)

        def register(server: grpc.Server) -> None:
            add_TelemetryServiceServicer_to_server(hub, server)
            add_LiveServiceServicer_to_server(live, server)
            add_ControlServiceServicer_to_server(control, server)

        seen: dict[int, machine.Machine] = {}

        def observe(ranks: int) -> machine.Machine:
            # What a trial's engine takes is free for the next one.
            if ranks not in seen or not runner.occupied:
                seen[ranks] = machine.observe({**os.environ, **config.engine.env}, ranks=ranks)
            return seen[ranks]

        journal = Journal(config.state)
        servers = [serve_grpc(config.socket, register)]
        if config.remote is not None:
            servers.append(remote.serve(config.remote, lambda s: add_ControlServiceServicer_to_server(control, s)))
        learning = Learning(journal, config.state, config.model, observe)
        runner = Runner(config, learning, hub, live, metrics, say)
        _on_signals(requests)
        try:
            guard = Guard(config, observe, learning.current)
            yield Parts(journal, runner, guard, hub, metrics, requests)
        finally:
            runner.close()
            live.close()
            for stopped in [server.stop(grace=0.5) for server in servers]:
                stopped.wait(2)
            journal.close()


def _on_signals(requests: Requests) -> None:
    """The first signal asks the loop to end, once it is safe; another one changes nothing."""

    def asked(number: int, _frame: Any) -> None:
        if number == signal.SIGINT:
            requests.stop_engine.set()
        requests.stop_sidecar.set()

    signal.signal(signal.SIGINT, asked)
    signal.signal(signal.SIGTERM, asked)


if __name__ == "__main__":
    main()
