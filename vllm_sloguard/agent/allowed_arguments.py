"""Which engine arguments the agent accepts from a controller. Pure."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from vllm_sloguard.agent.serve_command import Args
from vllm_sloguard.guard.repair import TUNED
from vllm_sloguard.knobs import KNOBS

# Set by the agent itself.
_OWN = ("model", "host", "port", "shutdown_timeout", "config", "api_key", "hf_token", "uds", "ssl_keyfile")
_LONGEST_TEXT = 4096


class NotAllowedError(ValueError):
    """The agent does not accept a request; one line with the field, the value and the allowed ones."""


@dataclass(frozen=True)
class AllowList:
    """What a controller may set.

    ``names`` are arguments besides the knobs, ``command_args`` those of the agent's own command line with their values.
    ``models`` and ``hosts`` are the models and addresses that an engine may serve; no models: any.
    """

    names: frozenset[str] = frozenset()
    command_args: Mapping[str, object] | None = None
    models: frozenset[str] = frozenset()
    hosts: frozenset[str] = frozenset({"127.0.0.1"})

    def check(self, model: str, host: str, args: Args) -> None:
        """Raises NotAllowedError."""
        self.check_model(model)
        if host not in self.hosts:
            raise NotAllowedError(f"host: {host!r} is not allowed{_or_else(self.hosts)}; sloguard-agent --host sets it")
        for name, value in args.items():
            self._check_argument(name, value)

    def check_model(self, model: str) -> None:
        """Raises NotAllowedError."""
        if not model or model.startswith("-") or (self.models and model not in self.models):
            raise NotAllowedError(f"model: {model!r} is not allowed{_or_else(self.models)}")

    def _check_argument(self, name: str, value: bool | float | str | list[str]) -> None:
        if name in _OWN:
            raise NotAllowedError(f"{name}: set by the agent, not by an argument")
        if self.command_args is not None and name in self.command_args and _same(self.command_args[name], value):
            return
        if name not in KNOBS and name not in TUNED and name not in self.names:
            more = f", {', '.join(sorted(self.names))}" if self.names else ""
            raise NotAllowedError(
                f"{name}: not an allowed argument; allowed: the knobs{more}; sloguard-agent --allow adds others"
            )
        texts = value if isinstance(value, list) else [value]
        for text in texts:
            if isinstance(text, str) and (text.startswith("-") or "\0" in text or len(text) > _LONGEST_TEXT):
                raise NotAllowedError(f"{name}: {text[:80]!r} is not a value")


def _same(expected: object, value: object) -> bool:
    """Whether they are equal, as values or as JSON."""
    if expected == value or not isinstance(expected, str) or not isinstance(value, str):
        return expected == value
    try:
        return bool(json.loads(expected) == json.loads(value))
    except (ValueError, RecursionError):
        return False


def _or_else(allowed: frozenset[str]) -> str:
    return f"; allowed: {', '.join(sorted(allowed))}" if allowed else ""


# What the sidecar's load client asks of `vllm bench serve`; the agent adds base-url, model and tokenizer.
BENCH_FLAGS = frozenset(
    {
        "--backend",
        "--endpoint",
        "--dataset-name",
        "--dataset-path",
        "--custom-output-len",
        "--random-input-len",
        "--random-output-len",
        "--random-range-ratio",
        "--num-prompts",
        "--request-rate",
        "--seed",
        "--ready-check-timeout-sec",
        "--skip-chat-template",
        "--ignore-eos",
        "--save-detailed",
        "--disable-tqdm",
    }
)


def check_bench_argv(argv: tuple[str, ...], *, files: bool) -> None:
    """Raises NotAllowedError for a flag that a load has no use for; ``files`` allows prompts from files."""
    for word in argv:
        if word.startswith("--") and (word.partition("=")[0] not in BENCH_FLAGS or "=" in word):
            raise NotAllowedError(f"load: {word[:80]!r} is not allowed; allowed: {', '.join(sorted(BENCH_FLAGS))}")
        if word == "--dataset-path" and not files:
            raise NotAllowedError("load: --dataset-path is allowed through the Unix socket only")
