"""The command `sloguard schema`."""

import json

import typer


def register(app: typer.Typer) -> None:
    """Adds the command to ``app``."""
    app.command()(schema)


def schema() -> None:
    """Print the JSON schema of the configuration file, with which editors complete and check it.

    With the YAML language server, the file's first line is `# yaml-language-server: $schema=sloguard.schema.json`.

    Example: sloguard schema > sloguard.schema.json
    """
    from sidecar.config.json_schema import config_schema

    print(json.dumps(config_schema(), indent=2))
