"""Mistakes in ``engine.args`` of a file, which vLLM would misread or refuse after half a minute of starting. Pure."""

import shlex
from collections.abc import Mapping
from typing import cast

from sidecar.config.engine_arguments import (
    ARGUMENT_NAME,
    NAMELESS,
    OWN_ARGS,
    json_text,
    own_argument,
    underscored,
)
from sidecar.config.mistakes import Mistake
from sidecar.config.vllm_arguments import (
    OTHER_NAMES,
    SHORT_NAMES,
    VLLM_ARGUMENTS,
    ValueKind,
    completions,
    dashed,
)
from sidecar.config.yaml_file import Place, YamlLines

PLACE: Place = ("engine", "args")
_EXAMPLE = "`args: {max-num-seqs: 64, enforce-eager: true}`"
_VALUES: Mapping[ValueKind, str] = {
    ValueKind.SWITCH: "true",
    ValueKind.FLAG: "true",
    ValueKind.INTEGER: "8",
    ValueKind.SIZE: "8192",
    ValueKind.NUMBER: "0.9",
    ValueKind.TEXT: "auto",
    ValueKind.LIST: "[name]",
    ValueKind.REPEATED: "name",
    ValueKind.JSON: "{key: value}",
}


def argument_mistakes(args: object, lines: YamlLines) -> list[Mistake]:
    """The mistakes in the value of ``engine.args``, as it is in the file."""
    if args is None:
        return []
    if isinstance(args, list | str):
        return [Mistake(PLACE, _not_a_mapping(cast("list[object] | str", args)))]
    if not isinstance(args, dict):
        return [Mistake(PLACE, f"{args!r}: a mapping is needed, such as {_EXAMPLE}")]
    found: list[Mistake] = []
    seen: dict[str, str] = {}
    for key, value in cast("dict[object, object]", args).items():
        written, name = str(key), underscored(key)
        wrong = _wrong_name(name, value)
        if not wrong and (other := seen.setdefault(name, written)) != written:
            line = lines.of((*PLACE, other))
            wrong = f"the same argument as {other}{f' in line {line}' if line else ''}; keep one"
        wrong = wrong or _wrong_value(name, value)
        if wrong:
            shown = PLACE if ARGUMENT_NAME.fullmatch(name) is None else (*PLACE, written)
            found.append(Mistake(shown, wrong))
    return found


def _not_a_mapping(args: list[object] | str) -> str:
    given = "a text" if isinstance(args, str) else "a list"
    try:
        words = shlex.split(args) if isinstance(args, str) else [str(word) for word in args]
    except ValueError:
        words = []
    names = [word for word in words if word.startswith("-")]
    hint = '; `sloguard init --from "vllm serve …"` converts a command line' if names else ""
    return f"a mapping is needed, not {given}, such as {_EXAMPLE}{hint}"


def _wrong_name(name: str, value: object) -> str:
    if ARGUMENT_NAME.fullmatch(name) is None:
        short = SHORT_NAMES.get(name.lstrip("_"))
        return NAMELESS if short is None else _instead(short, value)
    base = name.partition(".")[0]
    if base in SHORT_NAMES:
        return _instead(SHORT_NAMES[base], value)
    if (own := own_argument(name)) is not None:
        return f"can't be set: {OWN_ARGS[own]}"
    if base in OTHER_NAMES:
        return f"another name of {dashed(OTHER_NAMES[base])}; {_instead(OTHER_NAMES[base], value)}"
    negated = base.removeprefix("no_")
    if negated != base and (VLLM_ARGUMENTS.get(negated) is ValueKind.SWITCH):
        return f"write `{dashed(negated)}: {'true' if value is False else 'false'}`"
    return _prefix(base, value)


def _prefix(base: str, value: object) -> str:
    match completions(base):
        case ():
            return ""
        case (only,):
            return f"not an argument of vLLM, which would read it as {dashed(only)}; {_instead(only, value)}"
        case several:
            names = ", ".join(dashed(name) for name in several[:4])
            more = f" and {len(several) - 4} more" if len(several) > 4 else ""
            return f"not an argument of vLLM, which could read it as {names}{more}; write the full name"


def _instead(name: str, value: object) -> str:
    return f"write `{dashed(name)}: {_yaml(value, VLLM_ARGUMENTS[name])}`"


def _yaml(value: object, kind: ValueKind) -> str:
    match value:
        case bool():
            return str(value).lower()
        case int() | float():
            return str(value)
        case str() if value and len(value) <= 80:
            return value if value.replace("-", "").replace("_", "").replace(".", "").isalnum() else repr(value)
        case _:
            return _VALUES[kind]


def _wrong_value(name: str, value: object) -> str:
    base, dot, _ = name.partition(".")
    kind = VLLM_ARGUMENTS.get(base)
    if dot and kind is not None and kind is not ValueKind.JSON:
        return f"{dashed(base)} takes {kind}, and has no parts"
    if kind is None or dot:
        return "" if value is not None else "a value is needed"
    wanted = f"{kind} is needed, such as `{dashed(base)}: {_VALUES[kind]}`"
    if value is None:
        return "" if kind in {ValueKind.SWITCH, ValueKind.FLAG} else f"has no value: {wanted}"
    if isinstance(value, str) and value.startswith("-") and kind is not ValueKind.INTEGER:
        return f"a value that begins with a dash would be read as another argument: {wanted}"
    if kind is ValueKind.FLAG and value is False:
        return "can't be switched off; leave it out"
    return "" if _fits(kind, value) else f"{value!r}: {wanted}"


def _fits(kind: ValueKind, value: object) -> bool:
    match kind:
        case ValueKind.SWITCH | ValueKind.FLAG:
            return isinstance(value, bool)
        case ValueKind.JSON:
            return _is_json(value)
        case ValueKind.LIST:
            return not isinstance(value, bool | dict)
        case _ if isinstance(value, bool | dict | list):
            return False
        case ValueKind.INTEGER | ValueKind.SIZE | ValueKind.NUMBER:
            return not isinstance(value, str) or value[:1].isdigit() or value.lstrip("-").isdigit() or value == "auto"
        case _:
            return True


def _is_json(value: object) -> bool:
    if isinstance(value, bool):
        return False
    try:
        json_text(value)
    except (TypeError, ValueError):
        return False
    return True
