"""The command `sloguard doctor`."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from sidecar.cli.places import FileArgument, loaded_of
from sidecar.cli.plan import planned
from sidecar.cli.rendering import AsJson, print_json
from sidecar.cli.terminal import busy_indicator
from sidecar.config.schema import Config, ConfigError
from sidecar.preflight import probes
from sidecar.preflight.doctor import Finding, Level, findings
from sidecar.preflight.facts import HostFacts
from sidecar.record.journal import JournalError

_FOUND_PROBLEMS = 1
_STYLES = {Level.OK: "green", Level.WARNING: "yellow", Level.PROBLEM: "bold red"}

MaybeConfig = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="The configuration file; default: check the machine only.", metavar="FILE"),
]


def register(app: typer.Typer) -> None:
    """Adds the command to ``app``."""
    app.command()(doctor)


def doctor(
    file: FileArgument = None,
    config_file: MaybeConfig = None,
    prometheus: Annotated[
        str, typer.Option(help="Check that this Prometheus scrapes the sidecar.", metavar="URL")
    ] = "",
    quick: Annotated[bool, typer.Option("--quick", help="Do not import vLLM (saves half a minute).")] = False,
    as_json: AsJson = False,
) -> None:
    """Check what the sidecar needs (vLLM, plugin, memory, ports, state folder) and suggest a fix for each problem.

    The exit code is 1 if there is a problem.

    Example: sloguard doctor -c sloguard.yaml --prometheus http://localhost:9090
    """
    with busy_indicator("checking") as say:
        found = findings(_facts(file, config_file, prometheus, say, quick=quick))
    if as_json:
        print_json({"findings": [dataclasses.asdict(finding) for finding in found]})
    else:
        _show(found)
    if any(finding.level is Level.PROBLEM for finding in found):
        raise typer.Exit(_FOUND_PROBLEMS)


def _facts(file: Path | None, config_file: Path | None, prometheus: str, say: probes.Say, *, quick: bool) -> HostFacts:
    config: Config | None = None
    error: str | None = None
    warnings: tuple[str, ...] = ()
    if file is not None or config_file is not None:
        try:
            loaded = loaded_of(file, config_file)
            config, warnings = loaded.config, loaded.warnings
        except ConfigError as wrong:
            error = str(wrong)
    facts = probes.gather(config, prometheus, say, quick=quick)
    if config is None:
        return dataclasses.replace(facts, config_error=error)
    facts = dataclasses.replace(facts, config_warnings=warnings)
    unreachable = facts.agent is not None and facts.agent.error
    if config.engine.watch_only or unreachable:
        return facts
    try:
        problem = planned(config)[0].problem
    except (ConfigError, JournalError, OSError) as wrong:
        problem = str(wrong)
    return dataclasses.replace(facts, plan_problem=problem)


def _show(found: list[Finding]) -> None:
    console = Console(soft_wrap=True, highlight=False)
    for finding in found:
        console.print(
            Text(f"{finding.level:8}", style=_STYLES[finding.level]), Text(f"{finding.check}: {finding.text}")
        )
        if finding.fix:
            console.print(Text(f"         fix: {finding.fix}"))
