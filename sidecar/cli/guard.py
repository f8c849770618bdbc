"""The commands `sloguard budget` and `sloguard repair`: the guard's arithmetic and rules, without an engine."""

import difflib
import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from sidecar.cli.rendering import AsJson, console_for_tables, machine_line, print_json, show_budget
from sidecar.config.schema import ConfigError
from sidecar.format import setting
from sidecar.guard.memory_learning import LEARNED_FILE as LEARNED
from sidecar.guard.model_builds import installed_vllm, model_of
from vllm_sloguard.guard import machine
from vllm_sloguard.guard.known_model import KnownModel, known_model, local_folder
from vllm_sloguard.guard.machine import Machine
from vllm_sloguard.guard.memory import GIB
from vllm_sloguard.guard.repair import TUNED, Repair, RepairStatus
from vllm_sloguard.guard.rules.arguments import ARGUMENTS, display, typed_arguments
from vllm_sloguard.guard.rules.human_sizes import as_number
from vllm_sloguard.guard.rules.single_argument import unreadable_argument
from vllm_sloguard.guard.start_history import Learned, ranks_of, read_history

REFUSED = 1
_NEWEST_VLLM = "0.32"
_MIN_GIB, _MAX_GIB = 0.001, 1_000_000.0

ModelOption = Annotated[
    str, typer.Option("--model", help="The model's folder, or its name on the hub if it is in the local cache.")
]
ArgOption = Annotated[
    list[str] | None, typer.Option("--arg", help="An argument of vLLM; may be repeated.", metavar="NAME=VALUE")
]
Total = Annotated[
    float | None, typer.Option("--gpu-total-gib", help="Memory of one GPU, GiB; default: this machine's.", metavar="X")
]
Free = Annotated[
    float | None,
    typer.Option("--gpu-free-gib", help="Free memory of that GPU, GiB; needs --gpu-total-gib.", metavar="Y"),
]
VllmVersionOption = Annotated[
    str,
    typer.Option(
        "--vllm-version",
        help="The version to estimate for; default: the installed one, else the newest supported.",
        metavar="N.N",
    ),
]
StateOption = Annotated[
    Path | None,
    typer.Option(
        "--state",
        help="A state folder; earlier starts of this model recorded there correct the estimate.",
        metavar="DIR",
    ),
]
PythonOption = Annotated[
    str,
    typer.Option(
        "--python",
        help="The Python with vLLM, which builds the model to get its sizes; default: this one.",
        metavar="PATH",
    ),
]
FormulaOption = Annotated[
    bool, typer.Option("--formula", help="Do not use vLLM, only formulas and the checkpoint's headers.")
]


def register(app: typer.Typer) -> None:
    """Adds the commands to ``app``."""
    app.command("budget")(budget)
    app.command("repair")(repair_command)


def budget(
    *,
    model: ModelOption,
    arg: ArgOption = None,
    gpu_total_gib: Total = None,
    gpu_free_gib: Free = None,
    vllm_version: VllmVersionOption = "",
    state: StateOption = None,
    python: PythonOption = sys.executable,
    formula: FormulaOption = False,
    as_json: AsJson = False,
) -> None:
    """Show how a configuration would use memory, and whether vLLM can start with it.

    The source of the estimate and its uncertainty are shown, too. The exit code is 0 if there is an answer, and 2 for
    invalid arguments.

    Example: sloguard budget --model models/qwen --arg max_model_len=8192 --gpu-total-gib 24 --gpu-free-gib 22.5
    """
    question = _question(model, arg, gpu_total_gib, gpu_free_gib, vllm_version, state, python, formula=formula)
    if wrong := unreadable_argument(question.args):
        raise ConfigError(f"--arg: {wrong}")
    args = typed_arguments(question.args)
    shape = question.known.shape_with(args)
    estimate = question.learned.estimator(question.known)
    result = estimate(shape, args, question.machine) if shape is not None else None
    if result is None:
        raise ConfigError(f"--model: {question.known.why_unknown}")
    if as_json:
        print_json({**asdict(result), "machine": asdict(question.machine)})
        return
    show_budget(result, question.machine)


def repair_command(
    *,
    model: ModelOption,
    arg: ArgOption = None,
    workload_max_len: Annotated[
        int | None,
        typer.Option(
            "--workload-max-len",
            help="Length of the longest request, prompt and output, in tokens.",
            min=1,
            metavar="N",
        ),
    ] = None,
    pin: Annotated[
        list[str] | None,
        typer.Option("--pin", help="An argument that must not be changed; may be repeated.", metavar="NAME"),
    ] = None,
    gpu_total_gib: Total = None,
    gpu_free_gib: Free = None,
    vllm_version: VllmVersionOption = "",
    state: StateOption = None,
    python: PythonOption = sys.executable,
    formula: FormulaOption = False,
    as_json: AsJson = False,
) -> None:
    """Find the nearest configuration that vLLM can start with, or explain why there is none.

    A configuration is refused for memory only if it certainly cannot start. The exit code is 0 for unchanged and
    repaired, 1 for refused, and 2 for invalid arguments.

    Example: sloguard repair --model models/qwen --arg max_num_seqs=256 --arg max_num_batched_tokens=128
    """
    question = _question(model, arg, gpu_total_gib, gpu_free_gib, vllm_version, state, python, formula=formula)
    pinned = frozenset(_name("--pin", name) for name in pin or [])
    repaired = question.learned.repairer(
        question.known, question.machine, time.time(), pinned=pinned, workload_max_len=workload_max_len
    )
    result = repaired(question.args)
    if as_json:
        print_json(_as_dict(result, question.machine))
    else:
        _show_repair(result, question.machine)
    if result.status is RepairStatus.REFUSED:
        raise typer.Exit(REFUSED)


@dataclass(frozen=True)
class _Question:
    """The options common to both commands."""

    known: KnownModel
    args: dict[str, Any]
    machine: Machine
    learned: Learned


def _question(  # noqa: PLR0917 - the options of both commands
    model: str,
    arg: Sequence[str] | None,
    total_gib: float | None,
    free_gib: float | None,
    vllm_version: str,
    state: Path | None,
    python: str,
    *,
    formula: bool,
) -> _Question:
    if local_folder(model) is None:
        raise ConfigError(f"--model: {known_model(model).problem}")
    known = known_model(model) if formula else model_of(model, python)
    args = _args(arg)
    return _Question(known, args, _machine(total_gib, free_gib, args), _learned(state, model, vllm_version, python))


def _learned(state: Path | None, model: str, vllm_version: str, python: str) -> Learned:
    """What was learned in the state folder for the requested version, by default the installed one."""
    if state is not None and not state.is_dir():
        raise ConfigError(f"--state: {state} is not a folder")
    try:
        known = read_history(state / LEARNED, model) if state is not None else Learned()
    except ValueError as error:
        raise ConfigError(f"--state: {error}") from None
    if vllm_version and not re.match(r"\d{1,9}\.\d{1,9}", vllm_version):
        raise ConfigError(f"--vllm-version: {display(vllm_version)} is not a version such as 0.32")
    if vllm_version:
        return Learned(known.starts, known.rules, vllm_version)
    if known.starts:
        return known.of_last_version()
    return Learned((), known.rules, installed_vllm(python) or _NEWEST_VLLM)


def _machine(total_gib: float | None, free_gib: float | None, args: Mapping[str, object]) -> Machine:
    if total_gib is None and free_gib is None:
        return machine.observe(ranks=ranks_of(args))
    if total_gib is None or free_gib is None:
        raise ConfigError("--gpu-total-gib and --gpu-free-gib must be given together")
    if not _MIN_GIB <= total_gib <= _MAX_GIB or not 0 <= free_gib <= total_gib:
        raise ConfigError(
            f"--gpu-total-gib and --gpu-free-gib: 0 <= free <= total is required, got {free_gib} of {total_gib};"
            f" the total may be {_MIN_GIB} to {_MAX_GIB:g}"
        )
    # The number of GPUs is unknown: 0 disables the rules that depend on it.
    return Machine(
        kind="cuda", total_bytes=int(total_gib * GIB), free_bytes=int(free_gib * GIB), gpus=0, source="as stated"
    )


def _args(given: Sequence[str] | None) -> dict[str, Any]:
    args: dict[str, Any] = {}
    for text in given or []:
        written, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--arg {text!r}: NAME=VALUE is required")
        name = _name("--arg", written)
        if name in args:
            raise ConfigError(f"--arg: {name} is given twice")
        args[name] = _value(name, value)
    return {name: value for name, value in args.items() if value is not None}


def _name(option: str, written: str) -> str:
    """The argument's name as spelled in EngineArgs."""
    name = written.strip().removeprefix("--").replace("-", "_")
    if name in ARGUMENTS:
        return name
    near = difflib.get_close_matches(name[:80], TUNED, n=3)
    known = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(TUNED)}"
    raise ConfigError(f"{option}: {display(written)} is not an argument that the guard knows; {known}")


def _value(name: str, text: str) -> Any:
    """A JSON scalar, a human-readable size if the argument accepts one, else a string."""
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
        "warning": result.warning,
        "machine": asdict(here),
    }


def _show_repair(result: Repair, here: Machine) -> None:
    console = console_for_tables()
    console.print(machine_line(here))
    console.print(f"{result.status}: {result.refusal}" if result.refusal else str(result.status))
    if result.warning:
        console.print(f"warning: {result.warning}")
    for change in result.changes:
        before, after = (_or_default(value, change.name) for value in (change.before, change.after))
        console.print(f"{change.name}: {before} → {after}: {change.reason}")


def _or_default(value: object, name: str) -> str:
    if name.endswith("_bytes") and isinstance(value, int) and value < 2**63:
        return setting(value, name)
    return "default" if value is None else display(value)
