"""The command `sloguard`."""

import os
import sys
import time
from typing import Annotated, Any, NoReturn

import typer

from sidecar.cli import backup, dev, diagnose, doctor, guard, history, init, operator, plan, report, schema, status
from sidecar.cli.grouped_help import GroupedCommands
from sidecar.cli.operator import CommandRefused
from sidecar.cli.places import ConfigOption, FileArgument, loaded_of
from sidecar.cli.terminal import RunDisplay, line, spending, unfailing_console
from sidecar.cli.window_stage import ServiceStage, stage_of_tune
from sidecar.config.schema import ConfigError
from sidecar.engine.engine import Cancelled, EngineCrashed
from sidecar.export.optuna_study import ExportError
from sidecar.format import when
from sidecar.measure.load_client import LoadError
from sidecar.metrics.exporter import Metrics
from sidecar.page import server as page
from sidecar.promote import promoted_file
from sidecar.record import lock
from sidecar.record.decisions import Outcome
from sidecar.record.journal import JournalError, Superseded
from sidecar.record.run_snapshot import setup_of_config
from sidecar.record.time_breakdown import spent
from sidecar.record.wording import OUTCOMES
from sidecar.run.engine_manager import EngineManager
from sidecar.run.tuning_run import Tuner, incumbent_args, open_run
from sidecar.service import signals
from sidecar.service.loop import Service
from sidecar.service.watch import WatchService
from sidecar.service.wiring import assembled
from vllm_sloguard import __version__
from vllm_sloguard.agent.engine_http import address
from vllm_sloguard.agent.fork_client import ForkServerError
from vllm_sloguard.agent.process_group import NotGoneError

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130

app = typer.Typer(
    cls=GroupedCommands,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

init.register(app)
guard.register(app)
operator.register(app)
backup.register(app)
status.register(app)
history.register(app)
plan.register(app)
diagnose.register(app)
doctor.register(app)
report.register(app)
schema.register(app)
dev.register(app)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"sloguard {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Tune vLLM under latency SLOs: see https://arxiv.org/abs/2604.17627."""


def main() -> None:
    """Runs the command; user errors end it with one line and a non-zero exit code."""
    try:
        app()
    except ConfigError as error:
        _fail(str(error), EXIT_BAD_INPUT)
    except lock.LockedError as error:
        _fail(_line(error), EXIT_BAD_INPUT)
    except (
        JournalError,
        LoadError,
        EngineCrashed,
        ExportError,
        ForkServerError,
        NotGoneError,
        CommandRefused,
        Superseded,
    ) as error:
        _fail(_line(error), EXIT_FAILED)
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename is not None else _line(error), EXIT_FAILED)
    except Cancelled:
        _fail("interrupted; run the same command again to continue", EXIT_INTERRUPTED)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _fail(text: str, code: int) -> NoReturn:
    unfailing_console(stderr=True).print(f"sloguard: {text}", markup=False, highlight=False, soft_wrap=True)
    sys.exit(code)


@app.command()
def tune(file: FileArgument = None, config_file: ConfigOption = None) -> None:
    """Tune once, now, on separate engines; resumes an interrupted run.

    Example: sloguard tune -c sloguard.yaml
    """
    loaded, console = loaded_of(file, config_file), unfailing_console()
    config = loaded.config
    if config.engine.watch_only:
        raise ConfigError("engine.watch_only: a vLLM that is only watched can't be tuned; see docs/agent.md")

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    for warning in loaded.warnings:
        say(f"warning: {warning}")

    metrics = Metrics(config)
    with assembled(config, say, metrics) as parts:
        signals.stop_on(parts.requests)
        journal = parts.journal
        _refuse_while_serving(parts.engines)
        parts.runner.act_for(journal.take_over(os.getpid()))
        parts.engines.orphans.end()
        run = open_run(config, journal)
        setup = setup_of_config(config)
        with RunDisplay(console, setup, stage_of_tune()) as display:
            for trial in journal.trials(run.id):
                display.notify(trial)

            def notify(trial: Any) -> None:
                metrics.trial(trial, journal.trials(run.id))
                display.notify(trial)

            decision = Tuner(
                config,
                run,
                journal,
                parts.runner,
                parts.guard,
                learn=parts.engines.learn,
                notify=notify,
                fits=lambda _search, _validations: True,
                cancelled=parts.requests.stop_sidecar.is_set,
            ).tune()
        metrics.decided(decision)
        trials = journal.trials(run.id)
        path = promoted_file.write(config, incumbent_args(config, journal), decision, trials)
        say(spending(spent(trials, time.time())))
        say(f"{OUTCOMES[decision.outcome]}: {decision.reason}")
        if decision.outcome is Outcome.PROMOTED:
            chosen = next(t for t in trials if t.number == decision.trial)
            say(line(chosen, setup))
        say(f"to serve it: vllm serve --config {path}")


def _refuse_while_serving(engines: EngineManager) -> None:
    if (pid := engines.serving_process()) is not None:
        _fail(
            f"vLLM of this state folder is serving (process {pid}): run `sloguard serve`, which takes it over, then"
            " `sloguard retune --now`; Ctrl-C in `sloguard serve` stops both",
            EXIT_FAILED,
        )


@app.command()
def serve(file: FileArgument = None, config_file: ConfigOption = None) -> None:
    """Run vLLM, and retune it in tuning windows.

    Ctrl-C stops the sidecar and vLLM once requests in flight have finished. SIGTERM stops only the sidecar: vLLM
    keeps serving, and the next `sloguard serve` takes it over.

    Example: sloguard serve -c sloguard.yaml
    """
    loaded, console = loaded_of(file, config_file), unfailing_console()
    config = loaded.config

    def say(text: str) -> None:
        console.print(f"{when(time.time())} {text}", markup=False, highlight=False, soft_wrap=True)

    for warning in loaded.warnings:
        say(f"warning: {warning}")

    metrics = Metrics(config)
    stage = ServiceStage()
    with (
        assembled(config, say, metrics) as parts,
        RunDisplay(console, setup_of_config(config), stage, say) as display,
    ):
        signals.stop_on(parts.requests)
        server = metrics.serve(say)
        try:
            say(f"metrics: {server.url}/metrics")
            up = "watched" if config.engine.watch_only else "once it is up"
            say(f"vLLM: {address(config.engine.host, config.engine.port)} ({up})")
            if config.engine.watch_only:
                service = WatchService(config, parts, say=say)
            else:
                service = Service(config, parts, say=say, notify=display.notify)
            stage.progress = service.progress
            with page.served(page.Sources(config, parts.hub, parts.requests, service.progress), say):
                service.run()
        finally:
            server.stop()


if __name__ == "__main__":
    main()
