"""Reads vLLM's command line as vLLM's own parser does (FlexibleArgumentParser of 0.32). Pure."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

from sidecar.config.vllm_arguments import (
    OTHER_NAMES,
    SHORT_NAMES,
    VLLM_ARGUMENTS,
    VLLM_VERSION,
    ValueKind,
    completions,
    dashed,
)
from vllm_sloguard.guard.rules.human_sizes import as_number

_NUMBER = re.compile(r"-?\d+(\.\d+)?([eE][+-]?\d+)?")
_ON_OFF = frozenset({ValueKind.SWITCH, ValueKind.FLAG})


@dataclass
class ParsedArguments:
    """The arguments by vLLM's names, positional words, and what is to be said."""

    args: dict[str, Any] = field(default_factory=dict[str, Any])
    positional: list[str] = field(default_factory=list[str])
    notes: list[str] = field(default_factory=list[str])


def parsed_arguments(words: tuple[str, ...]) -> ParsedArguments:
    """The arguments in ``words``, which follow `vllm serve`."""
    found = ParsedArguments()
    nested: dict[str, Any] = {}
    queue = list(words)
    while queue:
        word = queue.pop(0)
        if not _is_option(word):
            found.positional.append(word)
            continue
        option, equals, attached = word.partition("=")
        name, path = _named(option, found.notes)
        if name == "optimization_level" and option.startswith("-O"):
            _optimization(option, attached if equals else None, queue, found, nested)
        elif path:
            value = attached if equals else _next(queue)
            _merge(nested.setdefault(name, {}), path, value)
        else:
            _plain(name, attached if equals else None, queue, found)
    for name, content in nested.items():
        if name in found.args:
            found.notes.append(f"--{dashed(name)}: vLLM takes the dotted parts alone, and ignores the JSON before them")
        found.args[name] = content
    return found


def _is_option(word: str) -> bool:
    return word.startswith("-") and len(word) > 1 and _NUMBER.fullmatch(word) is None


def _next(queue: list[str]) -> str:
    return queue.pop(0) if queue else ""


def _named(option: str, notes: list[str]) -> tuple[str, list[str]]:
    """The argument's name, and the path below it of a dotted option."""
    base, *path = option.split(".")
    name = base.lstrip("-").replace("-", "_")
    if not option.startswith("--"):
        if base.startswith("-O"):
            return "optimization_level", []
        return SHORT_NAMES.get(name, name), path
    name = OTHER_NAMES.get(name, name)
    negated = name.removeprefix("no_")
    if name in VLLM_ARGUMENTS or negated in VLLM_ARGUMENTS:
        return name, path
    match completions(name):
        case (only,):
            notes.append(f"{base} is a short form of --{dashed(only)}; the file has the full name")
            return only, path
        case _:
            return name, path


def _optimization(
    option: str, attached: str | None, queue: list[str], found: ParsedArguments, nested: dict[str, Any]
) -> None:
    """-O3, -O=3 and -O 3; formerly also -O.key=value and -O JSON, for the compilation."""
    if option.startswith("-O."):
        _merge(nested.setdefault("compilation_config", {}), option.split(".")[1:], attached or _next(queue))
        found.notes.append(f"{option} is written as compilation-config: vLLM {VLLM_VERSION} takes only -O LEVEL")
        return
    level = attached if attached is not None else option[2:] or _next(queue)
    if level.startswith("{"):
        found.args["compilation_config"] = _json(level)
        found.notes.append(f"-O with JSON is written as compilation-config, as vLLM {VLLM_VERSION} needs it")
        return
    found.args["optimization_level"] = _scalar(level)


def _plain(name: str, attached: str | None, queue: list[str], found: ParsedArguments) -> None:
    kind = VLLM_ARGUMENTS.get(name)
    negated = name.removeprefix("no_")
    if kind is None and VLLM_ARGUMENTS.get(negated) is ValueKind.SWITCH and negated != name:
        _set(found, negated, value=False)
        return
    if kind is None:
        _unknown(name, attached, queue, found)
        return
    if kind in _ON_OFF:
        if attached is not None:
            found.notes.append(f"--{dashed(name)} takes no value; {attached!r} is left out")
        _set(found, name, value=True)
    elif kind is ValueKind.LIST:
        values = [attached] if attached is not None else []
        while attached is None and queue and not _is_option(queue[0]):
            values.append(queue.pop(0))
        _set(found, name, value=[_item(value) for value in values])
    else:
        value = attached if attached is not None else _next(queue)
        _set(found, name, value=_json(value) if kind is ValueKind.JSON else _typed(name, kind, value))


def _unknown(name: str, attached: str | None, queue: list[str], found: ParsedArguments) -> None:
    found.notes.append(f"--{dashed(name)} is not an argument of vLLM {VLLM_VERSION}; kept, for another version")
    if attached is None and (not queue or _is_option(queue[0])):
        negated = name.removeprefix("no_")
        _set(found, negated, value=negated == name)
        return
    _set(found, name, value=_scalar(attached if attached is not None else queue.pop(0)))


def _set(found: ParsedArguments, name: str, *, value: Any) -> None:
    if name in found.args and found.args[name] != value:
        found.notes.append(f"--{dashed(name)} is given several times; vLLM takes the last")
    found.args[name] = value


def _typed(name: str, kind: ValueKind, text: str) -> Any:
    if kind is ValueKind.SIZE:
        number = as_number(name, text)
        return text if isinstance(number, int) and not text.lstrip("-").isdigit() else _scalar(text)
    return _scalar(text)


def _scalar(text: str) -> int | float | str:
    """A number if writing it again gives the same text."""
    if _NUMBER.fullmatch(text):
        number = float(text) if any(character in text for character in ".eE") else int(text)
        if str(number) == text or (isinstance(number, float) and text.rstrip("0") == str(number).rstrip("0")):
            return number
    return text


def _item(text: str) -> Any:
    return _json(text) if text.startswith("{") else _scalar(text)


def _json(text: str) -> Any:
    """A mapping or a list of JSON; otherwise the text."""
    try:
        value = cast("object", json.loads(text))
    except (ValueError, RecursionError):
        return text
    return cast("object", value) if isinstance(value, dict | list) else text


def _merge(content: dict[str, Any], path: list[str], text: str) -> None:
    """Sets the value at ``path``; a name that ends with + appends to a list."""
    *sections, last = path
    for section in sections:
        content = content.setdefault(section, {})
    if last.endswith("+"):
        content.setdefault(last[:-1], []).extend(_parts(text))
    else:
        content[last] = _json_value(text)


def _parts(text: str) -> Iterator[Any]:
    return (part for part in text.split(","))


def _json_value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return as_number("kv_cache_memory_bytes", text)
