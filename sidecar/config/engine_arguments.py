"""The arguments that an operator may give vLLM."""

import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Any

from pydantic import BeforeValidator


def _spelled_like_vllm(args: Any) -> Any:
    """Argument names as in vLLM's code: ``max-num-seqs`` and ``max_num_seqs`` are the same."""
    if not isinstance(args, dict):
        return args
    return {str(k).removeprefix("--").replace("-", "_"): v for k, v in args.items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]


# Arguments that the sidecar sets itself, or that would expose a secret in the process list.
_OWN_ARGS = {
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

_ARG_NAME = re.compile(r"[A-Za-z0-9_.]+")
_SECRET_ARGS = ("api_key", "hf_token")


def _own_arg(name: str) -> str | None:
    """The one of ``_OWN_ARGS`` that vLLM would read ``name`` as; for a secret, also the one that was probably meant.

    vLLM's parser accepts every unambiguous prefix of an argument's name.
    """
    written = name.lower().partition(".")[0]
    prefixed = next((own for own in _OWN_ARGS if own.startswith(written)), None)
    return prefixed or next(iter(get_close_matches(written, _SECRET_ARGS, 1)), None)


ArgsField = Annotated[dict[str, bool | int | float | str | list[str]], BeforeValidator(_spelled_like_vllm)]


def check_arguments(args: Mapping[str, object]) -> None:
    """Refuses arguments that are the sidecar's, and secrets. Raises ValueError."""
    for name in args:
        if _ARG_NAME.fullmatch(name) is None:
            # A value may be part of it, so the name is not repeated.
            raise ValueError("args: a name of letters, digits, _ and . is needed for each argument")
        if (own := _own_arg(name)) is not None:
            raise ValueError(f"args.{name} can't be set: {_OWN_ARGS[own]}")
