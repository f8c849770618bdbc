"""Output that several commands share: strict JSON, tables, the machine."""

import json
import math
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vllm_sloguard.guard.machine import Machine
from vllm_sloguard.guard.memory import Budget, gib

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def print_json(facts: object) -> None:
    """Prints JSON without Infinity and NaN, which become strings; indented on a terminal, else on one line."""
    print(json.dumps(_finite(facts), indent=2 if sys.stdout.isatty() else None, allow_nan=False))


def _finite(value: Any) -> Any:
    """``value`` with strings for numbers that JSON does not have."""
    match value:
        case float() if not math.isfinite(value):
            return str(value)
        case dict():
            return {key: _finite(item) for key, item in value.items()}  # pyright: ignore[reportUnknownVariableType]
        case list() | tuple():
            return [_finite(item) for item in value]  # pyright: ignore[reportUnknownVariableType]
        case _:
            return value


def console_for_tables() -> Console:
    return Console(highlight=False, markup=False, soft_wrap=True)


def show_budget(result: Budget, here: Machine) -> None:
    """Prints how the memory is used, and whether vLLM would start."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    for name, size in (
        ("weights", result.weights_bytes),
        ("activations", result.activation_bytes),
        ("CUDA graphs", result.graph_bytes),
        ("overhead", result.overhead_bytes),
        ("KV cache", result.kv_bytes),
        ("requested", result.requested_bytes),
    ):
        table.add_row(name, f"{gib(size)} GiB")
    table.add_row("KV cache per token", f"{result.kv_bytes_per_token:,} bytes")
    table.add_row("KV tokens", f"{result.kv_tokens:,}")
    if result.concurrency is not None:
        table.add_row("concurrent requests of max_model_len", f"{result.concurrency:,.2f}")
    if result.lowest_utilization is not None:
        table.add_row("lowest gpu_memory_utilization", f"{result.lowest_utilization:.3f}")
    if result.highest_utilization is not None:
        table.add_row("highest gpu_memory_utilization", f"{result.highest_utilization:.3f}")
    table.add_row("based on", result.rung.description)
    table.add_row("uncertainty of the estimate", f"{gib(result.margin_bytes)} GiB")
    if not result.exact_layout:
        table.add_row("KV cache", "a guess: the formulas do not cover all of the model's layers")
    console = console_for_tables()
    console.print(machine_line(here))
    console.print(table)
    console.print(f"{'starts' if result.starts else 'does not start'}: {result.reason}")


def machine_line(here: Machine) -> str:
    """The machine in one line."""
    return f"machine: {here.kind}, {gib(here.free_bytes)} of {gib(here.total_bytes)} GiB free ({here.source})"
