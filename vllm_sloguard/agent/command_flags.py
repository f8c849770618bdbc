"""Reads the command line of an existing vLLM service: its model and arguments, without importing vLLM. Pure."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

from vllm_sloguard.agent.serve_command import Args

_MODULES = {"vllm.entrypoints.openai.api_server": False, "vllm.entrypoints.cli.main": True}
_SHORT = {
    "-tp": "tensor_parallel_size",
    "-pp": "pipeline_parallel_size",
    "-dp": "data_parallel_size",
    "-q": "quantization",
}
_INTEGER, _NUMBER = re.compile(r"-?[0-9]+"), re.compile(r"-?[0-9]+\.[0-9]*(?:e-?[0-9]+)?|-?[0-9]+e-?[0-9]+")
_DEFAULT_PORT = 8000


class UnreadableCommandError(ValueError):
    """The command line can't be read; the text says why, as a clause."""


@dataclass(frozen=True)
class CommandLine:
    """What a command line starts. ``host`` and ``port`` as vLLM's defaults where it names none."""

    model: str
    args: Args
    host: str = ""
    port: int = _DEFAULT_PORT
    drain_timeout_s: int = 0


def read_command(words: Sequence[str]) -> CommandLine:
    """Reads ``vllm serve MODEL --flags``, or Python with vLLM's server module. Raises UnreadableCommandError."""
    flags = _server_flags(list(words))
    args = _arguments(flags)
    model = args.pop("model", "")
    if not isinstance(model, str) or not model:
        raise UnreadableCommandError("it names no model")
    if "config" in args:
        raise UnreadableCommandError("its arguments are in a --config file")
    if "uds" in args:
        raise UnreadableCommandError("it listens on a Unix socket")
    host, port, drain = args.pop("host", ""), args.pop("port", _DEFAULT_PORT), args.pop("shutdown_timeout", 0)
    if not isinstance(port, int) or not isinstance(drain, int):
        raise UnreadableCommandError("--port and --shutdown-timeout must be whole numbers")
    return CommandLine(model, args, str(host), port, drain)


def _server_flags(words: list[str]) -> list[str]:
    """The words after the program, with the model as a flag."""
    cli = PurePath(words[0]).name == "vllm" if words else False
    rest = words[1:]
    if not cli:
        module = next((i for i, word in enumerate(words[:-1]) if word == "-m"), None)
        if module is None or words[module + 1] not in _MODULES:
            raise UnreadableCommandError("it is neither `vllm serve` nor Python with vLLM's server module")
        cli, rest = _MODULES[words[module + 1]], words[module + 2 :]
    if not cli:
        return rest
    if not rest or rest[0] != "serve":
        raise UnreadableCommandError("it is not `vllm serve`")
    rest = rest[1:]
    return ["--model", *rest] if rest and not rest[0].startswith("-") else rest


def _arguments(words: list[str]) -> dict[str, bool | int | float | str | list[str]]:
    found: dict[str, bool | int | float | str | list[str]] = {}
    at = 0
    while at < len(words):
        flag, equals, joined = words[at].partition("=")
        name = _SHORT.get(flag, flag.removeprefix("--").replace("-", "_"))
        if not (flag.startswith("--") or flag in _SHORT) or "." in flag:
            raise UnreadableCommandError(f"{words[at]!r} is not a flag that the agent can read")
        at += 1
        values = [joined] if equals else []
        while not equals and at < len(words) and not _is_flag(words[at]):
            values.append(words[at])
            at += 1
        if not values:
            found[name.removeprefix("no_")] = not name.startswith("no_")
        else:
            found[name] = _value(values[0]) if len(values) == 1 else values
    return found


def _is_flag(word: str) -> bool:
    return word.startswith("-") and not _INTEGER.fullmatch(word) and not _NUMBER.fullmatch(word)


def _value(text: str) -> bool | int | float | str:
    if _INTEGER.fullmatch(text):
        return int(text)
    if _NUMBER.fullmatch(text):
        return float(text)
    return text
