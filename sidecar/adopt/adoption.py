"""Turns a start of vLLM into what the configuration file needs. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sidecar.adopt.command_line import ParsedArguments, parsed_arguments
from sidecar.adopt.launch import AdoptedLaunch, NotReadable, Started, is_secret
from sidecar.adopt.server_words import server_words
from sidecar.adopt.variables import substituted
from sidecar.config.vllm_arguments import VLLM_ARGUMENTS, ValueKind, dashed

# Reads the file that `vllm serve --config FILE` names: its arguments, or None if it can't be read.
ReadConfig = Any
_SECRET_ARGUMENTS: Mapping[str, str] = {"api_key": "VLLM_API_KEY", "hf_token": "HF_TOKEN"}
_WITHOUT_A_PLACE: Mapping[str, str] = {
    "uds": "sloguard talks to vLLM over TCP, so vLLM must listen on a port",
    "ssl_keyfile": "sloguard talks to vLLM without TLS; put a proxy in front",
    "ssl_certfile": "sloguard talks to vLLM without TLS; put a proxy in front",
    "ssl_ca_certs": "sloguard talks to vLLM without TLS; put a proxy in front",
    "headless": "one engine on one machine is tuned",
}
# Set by images and supervisors for themselves.
_NOT_OF_VLLM = frozenset({"PATH", "HOME", "PWD", "SHLVL", "_", "TERM", "LANG", "HOSTNAME", "USER", "LOGNAME", "SHELL"})


@dataclass
class _Parts:
    host: str | None = None
    port: int | None = None
    drain_timeout_s: int | None = None
    env: dict[str, str] = field(default_factory=dict[str, str])
    secrets: dict[str, str] = field(default_factory=dict[str, str])
    notes: list[str] = field(default_factory=list[str])


def adopted(started: Started) -> AdoptedLaunch:
    """The launch of ``started``. Raises NotReadable."""
    server = server_words(started)
    parts = _Parts(notes=list(server.notes))
    environment = _environment(server.environment, parts)
    words = tuple(word for text in server.arguments if (word := _expanded(text, environment)) is not None)
    found = parsed_arguments(_without_missing(words, parts))
    parts.notes += found.notes
    model = _model(found)
    args = {name: value for name, value in found.args.items() if not _taken(name, value, parts)}
    if server.port is not None and server.port != parts.port:
        inside = parts.port or 8000
        parts.notes.append(f"clients used port {server.port} of the host, which led to {inside}; vLLM gets that one")
        parts.port = server.port
    return AdoptedLaunch(
        model=model,
        args=args,
        host=parts.host,
        port=parts.port,
        drain_timeout_s=parts.drain_timeout_s,
        python=server.python or None,
        env=parts.env,
        secrets=parts.secrets,
        notes=tuple(dict.fromkeys(parts.notes)),
    )


def _environment(given: Mapping[str, str | None], parts: _Parts) -> dict[str, str]:
    """The known values, for substitution; what vLLM needs of them goes into ``parts``."""
    known: dict[str, str] = {}
    for name, text in given.items():
        value, missing = substituted(text, known) if text is not None else (None, ())
        if is_secret(name):
            parts.secrets[name] = "its value is kept elsewhere" if value is None else "a secret"
        elif value is None or missing:
            parts.notes.append(f"the variable {name} is not kept: its value is not in what was read")
        elif name not in _NOT_OF_VLLM:
            parts.env[name] = value
        if value is not None and not missing:
            known[name] = value
    return known


_MISSING = "\0missing\0"


def _expanded(text: str, environment: Mapping[str, str]) -> str | None:
    value, missing = substituted(text, environment)
    if not missing:
        # A variable of its own that is empty is no word in a shell.
        return value if value or not text.startswith("$") else None
    return _MISSING + text


def _without_missing(words: tuple[str, ...], parts: _Parts) -> tuple[str, ...]:
    """``words`` without the options whose value is unknown, each of which is noted."""
    kept: list[str] = []
    for word in words:
        if not word.startswith(_MISSING):
            kept.append(word)
            continue
        text = word.removeprefix(_MISSING)
        option = kept[-1] if kept and _takes_value(kept[-1]) else ""
        if option and not text.startswith("-"):
            kept.pop()
        written = f"{option} {text}".strip()
        parts.notes.append(f"{written} is not kept: the value of {_reference(text)} is not known here")
    return tuple(kept)


def _takes_value(option: str) -> bool:
    if not option.startswith("-") or "=" in option:
        return False
    name = option.lstrip("-").replace("-", "_")
    return VLLM_ARGUMENTS.get(name) not in {ValueKind.SWITCH, ValueKind.FLAG} and not name.startswith("no_")


def _reference(text: str) -> str:
    return text[text.find("$") :] if "$" in text else text


def _model(found: ParsedArguments) -> str:
    given = found.args.pop("model", None)
    if found.positional:
        if given is not None or len(found.positional) > 1:
            extra = [*([str(given)] if given is not None else []), *found.positional[1:]]
            found.notes.append(f"not kept, because the model is {found.positional[0]}: {' '.join(extra)}")
        return found.positional[0]
    if given is None:
        raise NotReadable("the command names no model; give it as in `vllm serve Qwen/Qwen3-0.6B`")
    return str(given)


def _taken(name: str, value: Any, parts: _Parts) -> bool:
    """Whether the argument has a place of its own in the file, or none."""
    match name:
        case "host":
            parts.host = str(value)
        case "port":
            parts.port = value if isinstance(value, int) else None
        case "shutdown_timeout":
            parts.drain_timeout_s = value if isinstance(value, int) else None
        case "config":
            parts.notes.append(f"--config {value} is not kept: add its arguments to engine.args")
        case _ if name in _SECRET_ARGUMENTS:
            parts.secrets[_SECRET_ARGUMENTS[name]] = f"it was --{dashed(name)} on the command line"
        case _ if name in _WITHOUT_A_PLACE:
            parts.notes.append(f"--{dashed(name)} is not kept: {_WITHOUT_A_PLACE[name]}")
        case _:
            return False
    return True
