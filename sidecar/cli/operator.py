"""The commands that control a running sidecar."""

import getpass
import os
import sys
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from functools import partial
from operator import itemgetter
from typing import Annotated, Any

import grpc
import typer
from rich.console import Console

from sidecar.cli.places import ConfigOption, StateFolder, config_of
from sidecar.cli.terminal import RunDisplay, busy_indicator
from sidecar.cli.window_stage import FollowedStage
from sidecar.config.schema import Config, ConfigError
from sidecar.config.window import parse_duration
from sidecar.format import when
from sidecar.preflight.downtime import abort_downtime, retune_downtime, rollback_downtime
from sidecar.preflight.recorded_durations import recorded_durations
from sidecar.preflight.window_forecast import Durations
from sidecar.record import lock
from sidecar.record.events import EventKind, Operations
from sidecar.record.journal import Journal, JournalError, Promoted, StateRecord
from sidecar.record.run_snapshot import setup_of_config
from sidecar.record.states import IN_A_WINDOW, State
from sidecar.record.trial import TrialStatus
from sidecar.service import remote_rpc
from sidecar.service.control_rpc import USER_KEY
from vllm_sloguard.wire import control_pb2 as pb
from vllm_sloguard.wire.control_pb2_grpc import ControlServiceStub

_TIMEOUT_S = 10.0
_WAIT_EVERY_S = 0.5
_FOLLOW_EVERY_S = 2.0  # polling must not disturb the measurements on this machine


Unasked = Annotated[
    bool, typer.Option("--yes", "-y", help="Do not ask for confirmation before taking the service down.")
]


class CommandRefused(RuntimeError):  # noqa: N818 - it names what happened
    """The request can't be met; the message says why, in one line."""


def register(app: typer.Typer) -> None:
    """Adds the commands to ``app``."""
    for command in (retune, pause, resume, abort, rollback):
        app.command()(command)


def retune(  # noqa: PLR0917 - the options of a command
    state: StateFolder = None,
    config_file: ConfigOption = None,
    now: Annotated[bool, typer.Option("--now", help="Required: a window takes the service down.")] = False,
    duration: Annotated[str, typer.Option("--for", help='The length of the window, such as "45m".')] = "",
    wait: Annotated[bool, typer.Option("--wait", help="Show the window and wait until vLLM serves again.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Ignore high traffic and a previous failed window.")] = False,
    yes: Unasked = False,
) -> None:
    """Open a tuning window in the running `sloguard serve` now.

    Example: sloguard retune --now --wait -c sloguard.yaml
    """
    config = config_of(state, config_file)
    if not now:
        raise ConfigError("retune: --now is required: the window opens at once and takes the service down")
    duration_s = _duration(duration)
    length_s = duration_s or config.window.duration
    _confirm(config, lambda takes: retune_downtime(takes, time.time(), length_s), yes=yes)
    asked_at = time.time()
    _call(
        config,
        lambda stub, epoch, how: stub.Retune(
            pb.RetuneRequest(duration_seconds=duration_s, epoch=epoch, force=force), **how
        ),
    )
    if wait:
        _follow(config, asked_at)
        return
    place = config_file or state
    print(f"a window of {length_s / 60:g} minutes opens now, and ends by {when(asked_at + length_s)}")
    print(f"follow it: sloguard status {place}    stop it: sloguard abort {place}")


def pause(
    state: StateFolder = None,
    config_file: ConfigOption = None,
    reason: Annotated[str, typer.Option(help="Shown by `sloguard status`.")] = "",
) -> None:
    """Open no more windows until `sloguard resume`; a window that is open continues.

    Example: sloguard pause --reason "release week" -c sloguard.yaml
    """
    _call(
        config_of(state, config_file),
        lambda stub, epoch, how: stub.Pause(pb.PauseRequest(epoch=epoch, reason=reason), **how),
    )


def resume(state: StateFolder = None, config_file: ConfigOption = None) -> None:
    """Allow windows again after `sloguard pause`.

    Example: sloguard resume -c sloguard.yaml
    """
    config = config_of(state, config_file)
    _call(config, lambda stub, epoch, how: stub.Resume(pb.ResumeRequest(epoch=epoch), **how))


def abort(
    state: StateFolder = None,
    config_file: ConfigOption = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until vLLM serves again.")] = False,
    yes: Unasked = False,
) -> None:
    """End the open window now and restore the incumbent.

    Example: sloguard abort --wait -c sloguard.yaml
    """
    config = config_of(state, config_file)
    if _window_is_open(config):
        _confirm(config, abort_downtime, yes=yes)
    asked_at = time.time()
    _call(config, lambda stub, epoch, how: stub.Abort(pb.AbortRequest(epoch=epoch), **how))
    if wait:
        _wait_serving(config, asked_at, lambda: True)


def rollback(
    state: StateFolder = None,
    config_file: ConfigOption = None,
    promotion: Annotated[int, typer.Option(help="Its number in `sloguard history`; default: the last.", min=0)] = 0,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until the previous configuration serves.")] = False,
    yes: Unasked = False,
) -> None:
    """Roll back the last promotion to the one before it, or to the file's arguments.

    A configuration that was rolled back is quarantined: the search does not propose it again. Repeating the command
    changes nothing; --promotion rolls back an earlier one.

    Example: sloguard rollback --wait -c sloguard.yaml
    """
    config = config_of(state, config_file)
    number = promotion or _last_promotion(config).id
    if _is_in_force(config, number):
        _confirm(config, rollback_downtime, yes=yes)
    asked_at = time.time()
    _call(
        config,
        lambda stub, epoch, how: stub.Rollback(pb.RollbackRequest(epoch=epoch, promotion=number), **how),
    )
    if wait:
        _wait_serving(config, asked_at, lambda: _restored(config, number))


def _is_in_force(config: Config, promotion: int) -> bool:
    if lock.holder(config.state) is None:
        return False
    return any(p.id == promotion and not p.rolled_back_at for p in _operations(config).promotions())


def _window_is_open(config: Config) -> bool:
    if lock.holder(config.state) is None:
        return False
    state = Journal(config.state, read_only=True).state()
    return state is not None and state.state in IN_A_WINDOW


def _confirm(config: Config, downtime: Callable[[Durations], str], *, yes: bool) -> None:
    """Prints how long the service will be down, and asks on a terminal. Raises CommandRefused."""
    if lock.holder(config.state) is None:  # no sidecar on this machine: the call says so, or asks the remote one
        return
    journal = Journal(config.state, read_only=True)
    print(downtime(recorded_durations(config, journal, Operations(journal, config.base_digest()))), flush=True)
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if on_terminal and not yes and not typer.confirm("Continue?"):
        raise CommandRefused("nothing was changed")


def _last_promotion(config: Config) -> Promoted:
    """The newest one, even if it was rolled back already: repeating the command must change nothing."""
    promotions = _operations(config).promotions()
    if not promotions:
        raise CommandRefused(
            "there is nothing to roll back: there was no promotion, and the file's own arguments are current"
        )
    return promotions[-1]


def _restored(config: Config, number: int) -> bool:
    """Whether an engine has started since the rollback."""
    operations = _operations(config)
    at = next((p.rolled_back_at for p in operations.promotions() if p.id == number), None)
    return at is not None and bool(operations.events([EventKind.START], 1, since=at))


def _operations(config: Config) -> Operations:
    return Operations(Journal(config.state, read_only=True), config.base_digest())


def _duration(text: str) -> float:
    if not text:
        return 0.0
    try:
        return parse_duration(text)
    except ValueError as error:
        raise ConfigError(f"--for: {text!r}: {error}") from None


def _call(config: Config, call: Callable[[ControlServiceStub, int, dict[str, Any]], Any]) -> None:
    """Calls the controller that the journal names, and prints its summary. Raises CommandRefused."""
    epoch = 0
    with suppress(JournalError):  # then no sidecar runs, and the call fails
        epoch = Journal(config.state, read_only=True).epoch()
    with remote_rpc.channel(config) as (channel, metadata):
        try:
            how = {"timeout": _TIMEOUT_S, "metadata": (*metadata, (USER_KEY, _user()))}
            answer = call(ControlServiceStub(channel), epoch, how)
        except grpc.RpcError as error:
            code = error.code() if isinstance(error, grpc.Call) else None
            if code is grpc.StatusCode.UNAVAILABLE:
                where = f" or on {config.remote.address}" if config.remote else ""
                raise CommandRefused(f"no `sloguard serve` answers on {config.socket}{where}") from None
            raise CommandRefused(error.details() or str(code) if isinstance(error, grpc.Call) else str(error)) from None
    if summary := getattr(answer, "summary", ""):
        print(summary)


def _user() -> str:
    """Who requests the action, for the journal; ASCII, as gRPC metadata requires."""
    with suppress(OSError, KeyError):
        return getpass.getuser().encode("ascii", "replace").decode()
    return str(os.getuid())


def _ticks(config: Config, every_s: float) -> Generator[float]:
    """The time, every ``every_s``, seconds since the epoch. Raises CommandRefused when the sidecar ends."""
    while lock.holder(config.state) is not None:
        yield time.time()
        time.sleep(every_s)
    raise CommandRefused("the sidecar has ended; see `sloguard status`")


def _print_state(state: StateRecord) -> None:
    print(f"{state.state}: {state.reason}", flush=True)


def _wait_serving(config: Config, since: float, holds: Callable[[], bool]) -> None:
    """Prints states entered after ``since`` until vLLM serves and ``holds`` is true."""
    journal = Journal(config.state, read_only=True)
    seen = 0
    with busy_indicator("waiting until vLLM serves"):
        for _ in _ticks(config, _WAIT_EVERY_S):
            states = journal.states(since)
            for state in states[seen:]:
                _print_state(state)
            seen = len(states)
            last = journal.state()
            if last is not None and last.state == State.SERVING and holds():
                return


def _follow(config: Config, since: float) -> None:
    """Shows new states and trials in the journal, in order, until vLLM serves again."""
    journal = Journal(config.state, read_only=True)
    reported: dict[tuple[int, int], TrialStatus] = {}
    seen = 0
    stage = FollowedStage(since)
    with RunDisplay(Console(), setup_of_config(config), stage) as display:
        for until in _ticks(config, _FOLLOW_EVERY_S):
            # Rows written between the reads of the two tables are left for the next tick.
            states = [state for state in journal.states(since) if state.at <= until]
            news: list[tuple[float, Callable[[], None]]] = [(s.at, partial(_print_state, s)) for s in states[seen:]]
            seen = len(states)
            stage.update(states[-1] if states else None)
            run = journal.last_run()
            for trial in journal.trials(run.id) if run is not None and run.started_at >= since else []:
                key, at = (trial.run, trial.number), trial.ended_at or trial.started_at
                if at <= until and reported.get(key) is not trial.status:
                    reported[key] = trial.status
                    news.append((at, partial(display.notify, trial)))
            for _, report in sorted(news, key=itemgetter(0)):
                report()
            if states and states[-1].state == State.SERVING:
                return
