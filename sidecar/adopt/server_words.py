"""Finds vLLM's server and its arguments in the words of a command: wrappers, Python, containers. Pure."""

import re
from dataclasses import dataclass, field

from sidecar.adopt.launch import NotReadable, Started, container_note
from sidecar.adopt.shell_words import inner_script, started_in, without_redirections

_CONTAINER_TOOLS = frozenset({"docker", "podman", "nerdctl"})
_MODULES = ("vllm.entrypoints.openai.api_server", "vllm.entrypoints.api_server", "vllm.entrypoints.cli.main")
_PYTHON = re.compile(r"python(\d+(\.\d+)?)?")
# Options of `docker run` that stand alone; all others take a value.
_ALONE = frozenset(
    {
        *("-d", "--detach", "--rm", "-i", "-t", "-it", "-ti", "--interactive", "--tty", "--init", "--privileged"),
        *("--read-only", "-P", "--publish-all", "--no-healthcheck", "--sig-proxy", "--oom-kill-disable"),
    }
)


@dataclass(frozen=True)
class ServerWords:
    """vLLM's arguments, and how the server is reached in the command. ``python`` is empty if it is not named."""

    arguments: tuple[str, ...]
    python: str = ""
    environment: dict[str, str | None] = field(default_factory=dict[str, str | None])
    port: int | None = None
    notes: tuple[str, ...] = ()


def server_words(started: Started) -> ServerWords:
    """vLLM's arguments in the command. Raises NotReadable."""
    words = without_redirections(started.words)
    if (script := inner_script(list(words))) is not None:
        started = started_in(script, started.environment)
        words = without_redirections(started.words)
    tool = next((n for n, word in enumerate(words[:3]) if word.rpartition("/")[2] in _CONTAINER_TOOLS), None)
    if tool is not None and "run" in words[tool + 1 : tool + 3]:
        return _in_container(words[words.index("run") + 1 :], started)
    found = _server(words)
    if found is None and (started.implied or (words and words[0].startswith("-"))):
        found = ServerWords(words[1:] if words[:1] == ("serve",) else words)
    if found is None:
        raise NotReadable(f"no vLLM server in the command that begins with {' '.join(words[:3])!r}")
    return ServerWords(found.arguments, found.python, dict(started.environment), found.port, started.notes)


def _server(words: tuple[str, ...]) -> ServerWords | None:
    for at, word in enumerate(words):
        name = word.rpartition("/")[2]
        if name == "vllm" and words[at + 1 : at + 2] == ("serve",):
            python = word.removesuffix("vllm") + "python" if "/" in word else ""
            return ServerWords(words[at + 2 :], python)
        if any(word == module or word.endswith(f"{module.replace('.', '/')}.py") for module in _MODULES):
            python = next((w for w in reversed(words[:at]) if _PYTHON.fullmatch(w.rpartition("/")[2])), "")
            rest = words[at + 1 :]
            return ServerWords(rest[1:] if rest[:1] == ("serve",) else rest, python if "/" in python else "")
    return None


def _in_container(words: tuple[str, ...], started: Started) -> ServerWords:
    """The arguments after the image of `docker run`, and the options before it that matter."""
    environment: dict[str, str | None] = dict(started.environment)
    port, entrypoint = None, ""
    at = 0
    while at < len(words) and words[at].startswith("-"):
        option, equals, value = words[at].partition("=")
        if option in _ALONE and not equals:
            at += 1
            continue
        if not equals:
            value = words[at + 1] if at + 1 < len(words) else ""
            at += 1
        at += 1
        if option in {"-e", "--env"}:
            name, given, text = value.partition("=")
            environment[name] = text if given else None
        elif option in {"-p", "--publish"}:
            port = _published(value) or port
        elif option == "--entrypoint":
            entrypoint = value
    image, rest = words[at] if at < len(words) else "", words[at + 1 :]
    full = (entrypoint, *rest) if entrypoint else rest
    found = _server(full) if entrypoint or (rest and not rest[0].startswith("-")) else None
    if found is None:
        found = ServerWords(rest[1:] if rest[:1] == ("serve",) else rest)
    return ServerWords(found.arguments, "", environment, port, (*started.notes, container_note(image)))


def _published(value: str) -> int | None:
    """The port on the host of "8001:8000" or "127.0.0.1:8001:8000"."""
    parts = value.split("/", maxsplit=1)[0].split(":")
    return int(parts[-2]) if len(parts) > 1 and parts[-2].isdigit() else None
