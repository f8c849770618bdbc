"""How vLLM is started today, as read from a command line, a file or a process. Values only."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_?KEY", re.IGNORECASE)


class NotReadable(ValueError):  # noqa: N818 - it names what is wrong
    """A source that no command line of vLLM can be read from; the text says why, in one line."""


@dataclass(frozen=True)
class Started:
    """A program as some supervisor starts it: its words, its environment, and what is to be said about it.

    ``environment`` has None for variables whose value is kept elsewhere, such as in a secret of the cluster.
    ``implied`` is whether the words may be arguments alone, because an image's entry point starts vLLM.
    """

    words: tuple[str, ...]
    environment: Mapping[str, str | None] = field(default_factory=dict[str, str | None])
    implied: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class AdoptedLaunch:
    """What the configuration file needs. ``args`` has vLLM's names, with mappings for JSON.

    ``secrets`` are environment variables that must be set where sloguard runs, each with where it was found;
    ``notes`` say what could not be kept, one line each.
    """

    model: str
    args: Mapping[str, Any]
    host: str | None = None
    port: int | None = None
    drain_timeout_s: int | None = None
    python: str | None = None
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    secrets: Mapping[str, str] = field(default_factory=dict[str, str])
    notes: tuple[str, ...] = ()


def container_note(image: object) -> str:
    """What to say about a server that runs in a container."""
    return f"vLLM runs in a container of {image}; sloguard must run in the same image, with the model at the same path"


def is_secret(name: str) -> bool:
    """Whether the environment variable ``name`` probably holds a secret."""
    return _SECRET.search(name) is not None
