"""Writes docs/commands.md from the commands' own help; ``--check`` exits with 1 where it is stale."""

import argparse
import sys
from pathlib import Path
from typing import Any

from typer.main import get_command

from sidecar.cli.main import app

PAGE = Path(__file__).resolve().parent / "commands.md"
INTRODUCTION = """\
# Commands

<!-- Written by docs/generate_commands.py; change the commands' help instead. -->

Durations need a unit: `90s`, `45m`, `2h`. `sloguard --install-completion` completes commands, state folders and
optimizers.

Exit codes: 0 done; 1 failed; 2 a mistake in the file or on the command line (the message names it, and nothing was
started); 130 interrupted.
"""


def page() -> str:
    """The page: a section for each command that `sloguard --help` lists."""
    group: Any = get_command(app)  # typer's own copy of click has no types
    parts = [INTRODUCTION]
    for name, command in sorted(group.commands.items()):
        if not command.hidden:
            parts.append(_section(f"sloguard {name}", command))
    return "\n".join(parts)


def _section(name: str, command: Any) -> str:
    subcommands = getattr(command, "commands", None)
    lines = [f"## {name}", "", *_paragraphs(command.help or "")]
    if subcommands is not None:
        lines += [f"- `{name} {one}`: {sub.get_short_help_str(200)}" for one, sub in sorted(subcommands.items())]
        return "\n".join([*lines, ""])
    rows = [row for parameter in command.params if (row := _row(parameter)) is not None]
    if rows:
        lines += ["| argument or option | meaning |", "| --- | --- |", *rows, ""]
    return "\n".join(lines)


def _paragraphs(text: str) -> list[str]:
    lines: list[str] = []
    for paragraph in text.replace("\b", "").strip().split("\n\n"):
        flat = " ".join(paragraph.split())
        lines += [f"Example: `{flat.removeprefix('Example: ')}`" if flat.startswith("Example: ") else flat, ""]
    return lines


def _row(parameter: Any) -> str | None:
    if parameter.name == "help" or getattr(parameter, "hidden", False):
        return None
    kind = "" if getattr(parameter, "is_flag", False) else (parameter.metavar or parameter.display_name_raw).upper()
    name = kind if parameter.param_type_name == "argument" else f"{', '.join(parameter.opts)} {kind}".strip()
    return f"| `{name}` | {' '.join((parameter.help or '').split()).replace('|', chr(92) + '|')} |"


def main() -> None:
    """Writes the page, or checks it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        PAGE.write_text(page(), encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page():
        sys.exit(f"{PAGE.name} is stale: python docs/generate_commands.py")


if __name__ == "__main__":
    main()
