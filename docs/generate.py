"""Writes docs/knobs.md and docs/crashes.md from the code; ``--check`` exits with 1 where one is stale."""

# ruff: noqa: E501 - the pages' own lines

import argparse
import random
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from vllm_sloguard.crash import Category, classify_file
from vllm_sloguard.crash.crash_rules import CRASH_RULES, CrashRule
from vllm_sloguard.guard.evidence import ModelEvidence
from vllm_sloguard.guard.machine import Machine
from vllm_sloguard.guard.memory import GIB, Budget, estimate, weights_bytes
from vllm_sloguard.guard.model_shape import ModelShape, from_config
from vllm_sloguard.guard.repair import Limits, repair
from vllm_sloguard.guard.rules import ALL
from vllm_sloguard.knobs import KNOBS, Knob, KnobKind, KnobValues

HERE = Path(__file__).resolve().parent
LOGS = HERE.parent / "tests" / "vllm_sloguard" / "crash" / "logs"
DO_NOT_EDIT = "<!-- Written by docs/generate.py; change that, or the code that it reads. -->"

# Random configurations that are repaired, to list which rules change which argument.
_REPAIRS = 3000
_DEMO_SIZED = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 2048,
    "torch_dtype": "bfloat16",
}
_7B_SIZED = {
    **_DEMO_SIZED,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
}
_MACHINES = (
    Machine("cuda", 24 * GIB, 22 * GIB, 1, "a card of 24 GiB"),
    Machine("cuda", 80 * GIB, 30 * GIB, 2, "a shared card of 80 GiB"),
    Machine("cpu", 16 * GIB, 12 * GIB, 0, "a CPU host"),
)
_VALUES: dict[str, tuple[Any, ...]] = {
    "max_num_seqs": (0, 4, 64, 1024, 100_000),
    "max_num_batched_tokens": (0, 16, 512, 16384, 10_000_000),
    "gpu_memory_utilization": (0.0, 0.3, 0.6, 0.9, 0.99, 1.5),
    "max_model_len": (-2, 512, 8192, 32768, 1_000_000),
    "enforce_eager": (True, False),
    "enable_chunked_prefill": (True, False, "false"),
    "enable_prefix_caching": (True, False),
    "block_size": (0, 7, 16, 32, 128, 100_000),
    "kv_cache_memory_bytes": (0, 2**20, 2**30, 2**34, 2**40),
    "kv_cache_dtype": ("auto", "fp8", "int3"),
    "long_prefill_token_threshold": (-1, 0, 2048, 100_000),
    "scheduler_reserve_full_isl": (True, False),
    "stream_interval": (0, 1, 8),
}


_ADDING_A_KNOB = (
    "",
    "## Adding a knob",
    "",
    "1. Add a row to `KNOBS` in `vllm_sloguard/knobs.py`, with vLLM's own name of the argument. The search, the command line,",
    "   the journal, the report and this page take it from there.",
    "2. If a value can crash vLLM, or depends on another argument, add a rule to a module of `vllm_sloguard/guard/rules/`.",
    "3. If it changes the memory that vLLM needs, extend the estimate in `vllm_sloguard/guard/memory.py`.",
    "4. If it can change in a running engine, name its versions and its check in the row (`Live`), give it a name in",
    "   `vllm_sloguard/live_knobs.py`, and add how it is applied to `_BUILDERS` in `vllm_sloguard/hooks/live_scheduler.py`.",
    "5. If its effect on latency is known beforehand, add it to `sidecar/search/latency_priors.py`.",
    "6. Add its values to `_VALUES` in `docs/generate.py`, and run that. Then `make bench-repair` compares the guard's answers",
    "   with vLLM's own.",
)


def knobs_page() -> str:
    """Every knob: what it is, its range, whether it is live, and the rules that repair it."""
    lines = [
        "# Knobs",
        "",
        DO_NOT_EDIT,
        "",
        "Every vLLM argument that a search may change; other arguments are never touched. `search.knobs` in the",
        "configuration names the knobs to use. It may narrow or widen a range, and replace choices:",
        "",
        "```yaml",
        "search:",
        "  knobs:",
        "    max_num_seqs: {low: 8, high: 512}",
        "    kv_cache_dtype: {choices: [auto, fp8]}",
        "    enable_prefix_caching:             # as in the table",
        "```",
        "",
        "vLLM reads a *cold* knob at startup: another value needs another start. A *live* knob changes between two steps of",
        "a running engine, up to the value that the engine was started with; with a vLLM version outside the named range it",
        "is cold. `sloguard plan -c FILE` lists the values that the guard rules out on your machine.",
        "",
        "| knob | what it is | values | |",
        "| --- | --- | --- | --- |",
        *(
            f"| [`{k.name}`](#{k.name}) | {k.about} | {_values(k)} | {'live' if k.live else 'cold'} |"
            for k in KNOBS.values()
        ),
    ]
    seen = repairing_rules()
    for knob in KNOBS.values():
        lines += ["", f"## {knob.name}", "", *_knob(knob, seen.get(knob.name, {}))]
    return "\n".join([*lines, *_ADDING_A_KNOB]) + "\n"


def _values(knob: Knob) -> str:
    if knob.kind is KnobKind.CATEGORICAL:
        return ", ".join(str(choice).lower() for choice in knob.choices)
    low, high = (f"{end:,.0f}" if knob.kind is KnobKind.INT else f"{end:.2f}" for end in (knob.low, knob.high))
    return f"{low} to {high}{', logarithmic' if knob.log else ''}"


def _knob(knob: Knob, rules: dict[str, str]) -> Iterator[str]:
    yield f"{knob.about[0].upper()}{knob.about[1:]}. Values: {_values(knob)}."
    for name, value in knob.requires.items():
        yield f"It applies only with `{name}: {str(value).lower()}`, and is left out otherwise."
    yield ""
    if knob.live is None:
        yield "- **Cold**: each change needs a start of the engine."
    else:
        since, until = (".".join(map(str, version)) for version in (knob.live.since, knob.live.until))
        yield f"- **Live** in vLLM {since} to {until}: {knob.live.ceiling}."
        yield f"- How a change is verified: {knob.live.verified_by}."
    yield (
        f"- Rules that repair it (found in {_REPAIRS:,} random configurations):" if rules else "- No rule repairs it."
    )
    for name, demand in rules.items():
        yield f"  - `{name}`: {demand}"


@cache
def _checkpoint(shape: ModelShape) -> int:
    return weights_bytes(shape, {})


def _with_checkpoint(shape: ModelShape, args: KnobValues, machine: Machine) -> Budget:
    """The estimate for a model whose checkpoint is there: formulas alone refuse nothing."""
    return estimate(shape, args, machine, evidence=ModelEvidence(checkpoint_bytes=_checkpoint(shape)))


def repairing_rules() -> dict[str, dict[str, str]]:
    """By argument, the rules that changed it in random configurations and what each requires, in the rules' order."""
    draw = random.Random(0)  # noqa: S311 - the same each time
    shapes: list[ModelShape | None] = [None, from_config(_DEMO_SIZED), from_config(_7B_SIZED)]
    limits = (Limits(), Limits(max_model_len=5000), Limits(free_bytes=20 * GIB, headroom_bytes=2 * GIB))
    seen: dict[str, set[str]] = {}
    for _ in range(_REPAIRS):
        names = draw.sample(sorted(_VALUES), draw.randint(1, 5))
        args = {name: draw.choice(_VALUES[name]) for name in names}
        result = repair(
            args,
            draw.choice(shapes),
            draw.choice(_MACHINES),
            pinned=frozenset(draw.sample(names, draw.choice((0, 0, 1)))),
            workload_max_len=draw.choice((None, 200, 4000)),
            limits=draw.choice(limits),
            estimate=_with_checkpoint,
            vllm_version=draw.choice(((0, 26), (0, 32))),
        )
        for change in result.changes:
            seen.setdefault(change.name, set()).update(change.rules)
    return {name: {rule.name: rule.demand for rule in ALL if rule.name in rules} for name, rules in seen.items()}


# What it is, and what the sidecar does.
CATEGORIES: dict[Category, tuple[str, str]] = {
    Category.OUT_OF_MEMORY: (
        "Memory of the GPU or of the host did not suffice: before loading, after profiling, or under load.",
        "In a trial: an observation; the search avoids the region. The limit that the text states is learned: the longest"
        " length that fits (30 days), what was free on the GPU (15 minutes), or headroom after a failed allocation (a week)."
        " `sloguard status` lists what was learned.",
    ),
    Category.CUDA_ERROR: (
        "The GPU, its driver or a library on it failed.",
        "In a trial: an observation. While serving: the engine is killed with all its processes and started again; a"
        " promotion that crashes three times in ten minutes is rolled back.",
    ),
    Category.STARTUP_FAILURE: (
        "The engine ended before it answered its first token, for another reason than memory: a value that vLLM does not"
        " accept, a model that is not there, a port in use.",
        "In a trial: an observation. With the file's own arguments, at the very first start, `serve` ends with that line"
        " and exit code 1. A promotion that does not start is rolled back and quarantined at once, unless the port was in use.",
    ),
    Category.TIMEOUT: (
        "A deadline passed without an answer: `engine.start_timeout_s`, or one of vLLM's own between its processes.",
        "In a trial: an observation. While serving: an engine that produces no token for `engine.hang_timeout_s` is killed"
        " and started again. Before it is killed, it writes the stacks of all its threads to its log.",
    ),
    Category.ENGINE_DEATH: (
        "The engine had served, and ended for a reason that is none of the others, or without one in its log. vLLM's API"
        " server then exits with code 0: the code says nothing. Native crashes belong here in every phase.",
        "Every unexpected exit is a crash, whatever its code. The evidence is then the report of the death with the exit"
        " code, or what the plugin reported from inside the engine.",
    ),
}


def crashes_page() -> str:
    """How a crash is classified, and every category with its kinds: an example, what it means, what to change."""
    lines = [
        "# Crashes",
        "",
        DO_NOT_EDIT,
        "",
        "`sloguard diagnose LOG` reads the log of any vLLM deployment and reports one category and the line that shows why",
        "the engine ended. The sidecar classifies its trials and its serving engine with the same code.",
        "",
        "The last line of a log is rarely the cause: a failed start prints its cause once, where it happened, and every",
        "process on the way up wraps it again. So the whole log is read, and the earliest root over all processes wins:",
        "",
        "1. a root: a text that names its cause, an exception of a start or of an engine process, a native signal, a timeout.",
        "   A timeout gives way to a memory or GPU error that is found later, as a hang is reported before its cause;",
        "2. an exception quoted or re-raised by another process;",
        "3. what a process prints because another one ended (connection closed, remote process exited);",
        "4. a report that the engine is dead, without a reason;",
        "5. failing all else, the last error line.",
        "",
        "Lines of the levels DEBUG, INFO and WARNING, the source lines of tracebacks, advice, Ray's lists of possible causes",
        "and errors of single requests are never the cause. An exception that no text below names is a `startup_failure`",
        "before the engine was healthy and an `engine_death` after. Where a log holds several runs, the last one counts.",
        "A crash in a trial is an observation; the other trials go on.",
    ]
    for category in Category:
        lines += ["", f"## {category}", "", *_category(category)]
    lines += [
        "",
        "## Whole excerpts",
        "",
        "The tests read these logs of vLLM 0.32 (CPU build), and find in them:",
        "",
    ]
    lines += ["| log | category | evidence |", "| --- | --- | --- |", *_excerpts()]
    return "\n".join(lines) + "\n"


def _category(category: Category) -> Iterator[str]:
    about, done = CATEGORIES[category]
    yield about
    yield ""
    yield f"**What the sidecar does.** {done}"
    for rule in CRASH_RULES:
        if rule.category is category:
            yield from _kind(rule)


def _kind(rule: CrashRule) -> Iterator[str]:
    advice = rule.advice(rule.example)
    changes = advice.changes if advice else ()
    yield from ("", f"### {rule.title}", "", f"`{rule.example.replace('`', '')}`", "", rule.meaning, "")
    yield from (
        f"- {change}" if "_" in change.split()[0] else f"- {change[0].upper()}{change[1:]}" for change in changes
    )


def _excerpts() -> Iterator[str]:
    for log in sorted(LOGS.glob("*.log")):
        found = classify_file(log, exit_code=0)
        evidence = found.evidence.replace("|", "\\|").replace("`", "")
        yield f"| `{log.name}` | {found.category} | `{evidence[:200]}{'…' if len(evidence) > 200 else ''}` |"


PAGES: dict[str, Callable[[], str]] = {"knobs.md": knobs_page, "crashes.md": crashes_page}


def main() -> int:
    """Writes the pages, or names the stale ones."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is stale")
    check = bool(parser.parse_args().check)
    stale = [name for name, page in PAGES.items() if not (HERE / name).exists() or (HERE / name).read_text() != page()]
    for name in stale:
        if check:
            print(f"docs/{name} is stale: python docs/generate.py", file=sys.stderr)
        else:
            (HERE / name).write_text(PAGES[name](), encoding="utf-8")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
