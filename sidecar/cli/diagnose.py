"""The command `sloguard diagnose`."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from sidecar.cli.rendering import AsJson, console_for_tables, print_json
from sidecar.config.schema import ConfigError
from vllm_sloguard.crash import Crash, classify_file, classify_stream
from vllm_sloguard.crash.advice import CrashAdvice, advice_for

_NO_CAUSE = 1
_CHUNK_CHARS = 1 << 16


def register(app: typer.Typer) -> None:
    """Adds the command to ``app``."""
    app.command()(diagnose)


def diagnose(
    log: Annotated[str, typer.Argument(metavar="LOG", help="vLLM's log, from any deployment; - for standard input.")],
    as_json: AsJson = False,
) -> None:
    """Explain why vLLM exited, from its log: the category, the line that shows it, what it means and what to change.

    If the log has several runs, the last one counts. The exit code is 1 if the log does not show a cause.

    Example: sloguard diagnose - < vllm.log
    """
    crash = _read(log)
    advice = advice_for(crash)
    if as_json:
        facts = asdict(crash)
        del facts["exit_code"]
        print_json(facts | {"meaning": advice.meaning, "changes": advice.changes, "link": _link(advice)})
    else:
        _print(crash, advice)
    if crash.line_number is None:
        raise typer.Exit(_NO_CAUSE)


def _read(log: str) -> Crash:
    if log == "-":
        sys.stdin.reconfigure(encoding="utf-8", errors="replace", newline="")  # type: ignore[union-attr]
        return classify_stream(iter(lambda: sys.stdin.read(_CHUNK_CHARS), ""), exit_code=None)
    try:
        return classify_file(Path(log), exit_code=None)
    except OSError as error:
        raise ConfigError(f"LOG: {log}: {error.strerror}; give a file, or - for standard input") from error


def _link(advice: CrashAdvice) -> str:
    return f"docs/crashes.md#{advice.anchor}"


def _print(crash: Crash, advice: CrashAdvice) -> None:
    console = console_for_tables()
    if crash.line_number is None:
        console.print("this log has no error that explains why vLLM exited")
        console.print("if it was killed, check `dmesg` and the container's exit code (137: out of memory)")
        return
    console.print(f"{crash.category}, while {crash.phase}{f': {advice.title}' if ' ' in advice.title else ''}")
    console.print(f"line {crash.line_number}{f', {crash.process}' if crash.process else ''}: {crash.evidence}")
    console.print(f"\nWhat it means: {advice.meaning}")
    console.print("What to change:")
    for change in advice.changes:
        console.print(f"  - {change}")
    console.print(f"\nMore: {_link(advice)}")
