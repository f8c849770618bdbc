"""Secrets in files: private keys, and the tokens that authorize actions."""

from pathlib import Path

from sidecar.config.schema import ConfigError
from vllm_sloguard.agent.private_files import accessible_to_others

# The length of `openssl rand -hex 16`.
_SHORTEST_TOKEN = 32


def read_secret(field: str, path: Path) -> bytes:
    """The content of the file that ``field`` of the configuration names. Raises ConfigError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{field}: {path}: {error.strerror}") from None


def secret(field: str, path: Path) -> bytes:
    """The same for a file that must not be accessible to others. Raises ConfigError."""
    content = read_secret(field, path)
    if accessible_to_others(path):
        raise ConfigError(f"{field}: {path} is open to others; chmod 600 it")
    return content


def token(field: str, path: Path) -> str:
    """The token in it. Raises ConfigError."""
    text = secret(field, path).decode("ascii", errors="replace").strip()
    if len(text) < _SHORTEST_TOKEN or not text.isprintable() or not text.isascii():
        raise ConfigError(f"{field}: {path}: {_SHORTEST_TOKEN} printable characters or more are needed")
    return text
