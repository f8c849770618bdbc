"""The token of the page: created once and kept, so that browsers keep working after a restart."""

import secrets
from pathlib import Path

from sidecar.config.schema import Config, ConfigError
from sidecar.config.secret_files import token
from sidecar.format import Say
from sidecar.record.atomic_write import write_whole

TOKEN_FILE = "page.token"  # noqa: S105 - a file's name


def path_of(config: Config) -> Path:
    """The token's file."""
    return config.page.token or config.state / TOKEN_FILE


def token_of(config: Config, say: Say) -> str:
    """The token of the file that the configuration names, or of the state folder's, which is created if it is missing.

    Raises ConfigError for an unusable file of the operator. If the sidecar's own file is unusable, actions are disabled
    instead: serving has priority.
    """
    if config.page.token is not None:
        return token("page.token", config.page.token)
    path = path_of(config)
    try:
        if not path.exists():
            write_whole(path, f"{secrets.token_hex(16)}\n", 0o600)
        return token("page.token", path)
    except (OSError, ConfigError) as error:
        say(f"{error}: actions on the page are disabled")
        return secrets.token_hex(16)
