"""The arguments that an operator may give vLLM."""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from difflib import get_close_matches
from typing import Annotated, Any, TypeAlias, cast

from pydantic import BeforeValidator

from sidecar.config.vllm_arguments import VLLM_ARGUMENTS, ValueKind


def underscored(key: object) -> str:
    """An argument's name as in vLLM's code: ``max-num-seqs`` and ``--max_num_seqs`` are the same."""
    base, dot, rest = str(key).removeprefix("--").partition(".")
    return base.replace("-", "_") + dot + rest


def json_text(value: object) -> str:
    """A mapping or a list as vLLM's command line takes it. Raises TypeError, ValueError."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def spelled_like_vllm(args: Any) -> Any:
    """Names and values as in vLLM's code: a switch without a value is on, and a mapping is JSON."""
    if not isinstance(args, dict):
        return args
    named = ((underscored(key), value) for key, value in cast("dict[object, object]", args).items())
    return {name: _plain(name, value) for name, value in named}


def _plain(name: str, value: object) -> object:
    kind = VLLM_ARGUMENTS.get(name)
    if value is None and kind in {ValueKind.SWITCH, ValueKind.FLAG}:
        return True
    with suppress(TypeError, ValueError):  # left as it is, and refused
        if isinstance(value, dict) or (isinstance(value, list) and kind is ValueKind.JSON):
            return json_text(cast("object", value))
        if isinstance(value, list):
            items = cast("list[object]", value)
            return [json_text(cast("object", item)) if isinstance(item, dict) else _item(item) for item in items]
    return cast("object", value)


def _item(item: object) -> object:
    return str(item) if isinstance(item, int | float) and not isinstance(item, bool) else item


# Arguments that the sidecar sets itself, or that would expose a secret in the process list.
OWN_ARGS: Mapping[str, str] = {
    "model": "use the field model",
    "host": "use engine.host",
    "port": "use engine.port",
    "hf_token": "use the environment variable HF_TOKEN: arguments show in the process list",
    "uds": "the sidecar talks to vLLM over TCP",
    "ssl_keyfile": "the sidecar talks to vLLM without TLS; put a proxy in front",
    "api_key": "use the environment variable VLLM_API_KEY: arguments show in the process list",
    "shutdown_timeout": "use engine.drain_timeout_s",
    "config": "write the arguments themselves",
}

ARGUMENT_NAME = re.compile(r"[A-Za-z0-9_.]+")
NAMELESS = "a name of letters, digits, _ and . is needed for each argument, such as `max-num-seqs: 64`"
_SECRET_ARGS = ("api_key", "hf_token")


def own_argument(name: str) -> str | None:
    """The one of ``OWN_ARGS`` that vLLM would read ``name`` as; for a secret, also the one that was probably meant.

    vLLM's parser accepts every unambiguous prefix of an argument's name.
    """
    written = name.lower().partition(".")[0]
    prefixed = next((own for own in OWN_ARGS if own.startswith(written)), None)
    return prefixed or next(iter(get_close_matches(written, _SECRET_ARGS, 1)), None)


ArgumentValue: TypeAlias = bool | int | float | str | list[str]
ArgsField = Annotated[dict[str, ArgumentValue], BeforeValidator(spelled_like_vllm)]


def check_arguments(args: Mapping[str, object]) -> None:
    """Refuses arguments that are the sidecar's, and secrets. Raises ValueError."""
    for name in args:
        if ARGUMENT_NAME.fullmatch(name) is None:
            # A value may be part of it, so the name is not repeated.
            raise ValueError(f"args: {NAMELESS}")
        if (own := own_argument(name)) is not None:
            raise ValueError(f"args.{name} can't be set: {OWN_ARGS[own]}")
