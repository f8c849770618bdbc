"""The list of commands in groups, in the order in which an operator needs them."""

from collections.abc import Mapping
from typing import Any

from typer.core import TyperGroup

GROUPS: Mapping[str, tuple[str, ...]] = {
    "Set up": ("init", "doctor", "plan", "schema", "budget", "repair"),
    "Serve and tune": ("serve", "tune", "retune", "abort", "pause", "resume", "rollback"),
    "See what happened": ("status", "trials", "history", "report", "export", "diagnose"),
    "Maintain and develop": ("backup", "dev"),
}


class GroupedCommands(TyperGroup):
    """Lists the commands under a title for each group."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Writes the groups to ``formatter``."""
        commands = self.commands
        for title, names in GROUPS.items():
            rows = [(name, commands[name].get_short_help_str(200)) for name in names if name in commands]
            with formatter.section(title):
                formatter.write_dl(rows)
