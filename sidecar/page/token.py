"""The token of the page: made once, and kept, so that a browser that has it goes on after a restart."""

import secrets
from pathlib import Path

from sidecar.config.schema import Config, ConfigError
from sidecar.config.secret_files import token
from sidecar.format import Say
from sidecar.record.atomic_write import write_whole

TOKEN_FILE = "page.token"  # noqa: S105 - a file's name


def path_of(config: Config) -> Path:
    """Where the token lies."""
    return config.page.token or config.state / TOKEN_FILE


def token_of(config: Config, say: Say) -> str:
    """The token of the file that the configuration names, or of the state folder's, which is made where it is missing.

    Raises ConfigError for a file of the operator's that can't be used. Where it is the sidecar's own, nobody knows the
    token then, and no order is taken: to serve comes first.
    """
    if config.page.token is not None:
        return token("page.token", config.page.token)
    path = path_of(config)
    try:
        if not path.exists():
            write_whole(path, f"{secrets.token_hex(16)}\n", 0o600)
        return token("page.token", path)
    except (OSError, ConfigError) as error:
        say(f"{error}: the page takes no orders")
        return secrets.token_hex(16)
