"""Writes docs/knobs.md and docs/crashes.md from the code; ``--check`` says whether they are as it would write them."""

# ruff: noqa: E501 - the pages' own lines

import argparse
import random
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vllm_sloguard import crash
from vllm_sloguard.crash import Category, classify
from vllm_sloguard.guard.machine import Machine
from vllm_sloguard.guard.memory import GIB
from vllm_sloguard.guard.model_shape import ModelShape, from_config
from vllm_sloguard.guard.repair import Limits, repair
from vllm_sloguard.guard.rules import ALL
from vllm_sloguard.knobs import KNOBS, Knob, KnobKind

HERE = Path(__file__).resolve().parent
LOGS = HERE.parent / "tests" / "vllm_sloguard" / "crash_logs"
DO_NOT_EDIT = "<!-- Written by docs/generate.py; change that, or the code that it reads. -->"

# Configurations whose repair is looked at, to say which rules change which argument.
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


def knobs_page() -> str:
    """Every knob: what it is, its range, whether it is live, and the rules that were seen to change it."""
    lines = [
        "# Knobs",
        "",
        DO_NOT_EDIT,
        "",
        "Every argument of vLLM that a search may change. An argument that is not here is never touched. `search.knobs`",
        "in the configuration names those to use; a range may be narrowed or widened there, and choices replaced:",
        "",
        "```yaml",
        "search:",
        "  knobs:",
        "    max_num_seqs: {low: 8, high: 512}",
        "    kv_cache_dtype: {choices: [auto, fp8]}",
        "    enable_prefix_caching:             # as in the table",
        "```",
        "",
        "A *cold* knob is read by vLLM at its start: another value is another start. A *live* one changes between two",
        "steps of a running engine, within what that was started with; with a version of vLLM outside those named it is",
        "cold. `sloguard plan -c FILE` says which values the guard rules out on your machine.",
        "",
        "| knob | what it is | values | |",
        "| --- | --- | --- | --- |",
        *(
            f"| [`{k.name}`](#{k.name}) | {k.about} | {_values(k)} | {'live' if k.live else 'cold'} |"
            for k in KNOBS.values()
        ),
    ]
    seen = mended()
    for knob in KNOBS.values():
        lines += ["", f"## {knob.name}", "", *_knob(knob, seen.get(knob.name, {}))]
    return "\n".join(lines) + "\n"


def _values(knob: Knob) -> str:
    if knob.kind is KnobKind.CATEGORICAL:
        return ", ".join(str(choice).lower() for choice in knob.choices)
    low, high = (f"{end:,.0f}" if knob.kind is KnobKind.INT else f"{end:.2f}" for end in (knob.low, knob.high))
    return f"{low} to {high}{', logarithmic' if knob.log else ''}"


def _knob(knob: Knob, rules: dict[str, str]) -> Iterator[str]:
    yield f"{knob.about[0].upper()}{knob.about[1:]}. Values: {_values(knob)}."
    for name, value in knob.requires.items():
        yield f"It matters only with `{name}` {str(value).lower()}, and is left out otherwise."
    yield ""
    if knob.live is None:
        yield "- **Cold**: each change is a start of the engine."
    else:
        since, until = (".".join(map(str, version)) for version in (knob.live.since, knob.live.until))
        yield f"- **Live** in vLLM {since} to {until}: {knob.live.ceiling}."
        yield f"- What shows a change at work: {knob.live.verified_by}."
    yield (
        f"- Rules that repair it (as seen in {_REPAIRS:,} random configurations):" if rules else "- No rule repairs it."
    )
    for name, demand in rules.items():
        yield f"  - `{name}`: {demand}"


def mended() -> dict[str, dict[str, str]]:
    """By argument, the rules that changed it in random configurations, with what each demands; in the rules' order."""
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
            vllm_version=draw.choice(((0, 26), (0, 32))),
        )
        for change in result.changes:
            seen.setdefault(change.name, set()).update(change.rules)
    return {name: {rule.name: rule.demand for rule in ALL if rule.name in rules} for name, rules in seen.items()}


# What it means, what the sidecar does, and what an operator can do.
ADVICE: dict[Category, tuple[str, str, tuple[str, ...]]] = {
    Category.OUT_OF_MEMORY: (
        "Memory of the GPU, or of the host on the CPU build, did not suffice: before loading, after profiling, or under load.",
        "In a trial: an observation; the search keeps away. The limit that the text states is learned: the longest length"
        " that fits (30 days), what was free on the card (15 minutes), or head-room kept after an allocation that failed"
        " (a week). `sloguard status` lists what was learned.",
        (
            "`sloguard budget --model DIR --arg ...` shows where the memory goes, `sloguard repair` the nearest"
            " configuration that fits.",
            "Another process on the card? `sloguard doctor` names it. Lower `gpu_memory_utilization`, or end it.",
            "While it served: leave more free, by a lower `gpu_memory_utilization` or `max_num_batched_tokens`.",
        ),
    ),
    Category.CUDA_ERROR: (
        "The GPU, its driver or a library on it failed.",
        "In a trial: an observation. While it serves: the engine is killed whole and started again; a promotion that"
        " crashes three times in ten minutes is rolled back.",
        (
            "Look for `Xid` in `dmesg`: a number there is the driver's or the hardware's word.",
            'An "illegal memory access" that follows one configuration is a bug of a kernel: report it, and take the'
            " value out of `search.knobs`.",
            "`CUDA driver error`, `cudaErrorInsufficientDriver`: the driver is older than vLLM's CUDA.",
        ),
    ),
    Category.STARTUP_FAILURE: (
        "The engine ended before it answered its first token, for another reason than memory: a value that vLLM does not"
        " take, a model that is not there, a port that is taken.",
        "In a trial: an observation. The file's own arguments, at the very first start: `serve` ends with that line and"
        " code 1. A promotion that does not start is rolled back and quarantined at once, a taken port excepted.",
        (
            "The evidence names the argument: `sloguard repair` knows what vLLM 0.26 to 0.32 demand.",
            "`sloguard doctor -c FILE` looks at the port, the model's folder and vLLM itself.",
            "The whole output is in `STATE/logs/engine-*.log`.",
        ),
    ),
    Category.TIMEOUT: (
        "A deadline passed without an answer: `engine.start_timeout_s`, or one of vLLM's own between its processes.",
        "In a trial: an observation. While it serves: an engine that makes no token for `engine.hang_timeout_s` is killed"
        " and started again.",
        (
            "A first start compiles, and may download: raise `engine.start_timeout_s`.",
            "`RPC call to ... timed out`: a worker hangs; its own lines come before.",
            "What is killed for not answering first writes the stacks of all its threads to its log.",
        ),
    ),
    Category.ENGINE_DEATH: (
        "It had served, and ended for a reason that is none of the others, or without a word. vLLM's API server then ends with"
        " exit code 0: the code says nothing.",
        "Whatever the code, an exit that nobody asked for is a crash. The evidence is then vLLM's word for the death, with"
        " the exit code; or what the plugin reported from inside.",
        (
            'SIGKILL: mostly the kernel, when the host\'s memory ran out. `dmesg` has "Out of memory: Killed process"; a'
            " container's limit shows in its memory.events.",
            "An exception's name: the worker's lines in `STATE/logs/engine-*.log` have its traceback.",
        ),
    ),
}

# Lines of real failures: of vLLM 0.26 on an H200 and of 0.32 on the CPU build; others are texts of its sources.
SEEN: tuple[tuple[str, str, str], ...] = (
    ("H200, 0.26", "starting", "ValueError: Free memory on device cuda:0 (38.69/139.8 GiB) on startup is less than desired GPU memory utilization (0.95, 132.81 GiB)."),
    ("H200, 0.26", "starting", "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when initializing the engine"),
    ("CPU, 0.32", "starting", "ValueError: To serve at least one request with the model's max seq len (4096), (0.0 GiB KV cache is needed, which is larger than the available KV cache memory (0.0 GiB)."),
    ("CPU, 0.32, injected", "starting", "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139.81 GiB of which 1.00 GiB is free."),
    ("a text of vLLM's", "serving", "torch.AcceleratorError: CUDA error: an illegal memory access was encountered"),
    ("a text of vLLM's", "serving", "RuntimeError: NCCL error: unhandled cuda error (run with NCCL_DEBUG=INFO for details)"),
    ("H200, 0.26", "starting", "ValueError: Selected backend AttentionBackendEnum.FLASHINFER is not valid for this configuration. Reason: ['ImportError']"),
    ("CPU, 0.32", "starting", "api_server.py: error: unrecognized arguments: --no-such-flag"),
    ("CPU, 0.32", "starting", "OSError: [Errno 98] Address already in use"),
    ("CPU, 0.32", "starting", "huggingface_hub.errors.HFValidationError: Repo id must be in the form 'repo_name' or 'namespace/repo_name': '/nonexistent/model'."),
    ("a text of vLLM's", "serving", "TimeoutError: RPC call to execute_model timed out."),
    ("a text of vLLM's", "starting", "TimeoutError: Timed out waiting for engine core processes to start."),
    ("a text of vLLM's", "serving", "EngineDeadError: EngineCore encountered an issue. See stack trace (above) for the root cause."),
)  # fmt: skip


def crashes_page() -> str:
    """Every category: what it is, the texts that show it, real evidence, and what to do."""
    lines = [
        "# Crashes",
        "",
        DO_NOT_EDIT,
        "",
        "Why an engine ended is read from its log: one category, and one line of evidence. The whole log is read, as the",
        "last line is never the cause: a failed start prints it once where it happened, and then wraps it in every process",
        "on the way up. Each line that may be a cause gets a rank, and the first of the best rank wins:",
        "",
        "1. a text that names its cause (below); 2. another exception, of the start or of the engine's own processes; 3. a",
        "timeout between vLLM's processes; 4. what a wrapper quotes; 5. vLLM's word that the engine is dead.",
        "",
        'Lines of the levels DEBUG, INFO and WARNING, tracebacks\' frames and wrappers ("See root cause above") are no',
        "causes. An exception without a text of its own is a `startup_failure` until the first token, an `engine_death`",
        "after. A crash in a trial is an observation; the other trials go on.",
    ]
    for category in Category:
        lines += ["", f"## {category}", "", *_category(category)]
    lines += [
        "",
        "## Whole excerpts",
        "",
        "The tests read these logs of vLLM 0.32 (CPU build); what is said of each:",
        "",
    ]
    lines += ["| log | category | evidence |", "| --- | --- | --- |", *_excerpts()]
    return "\n".join(lines) + "\n"


def _category(category: Category) -> Iterator[str]:
    about, done, advice = ADVICE[category]
    yield about
    yield ""
    if texts := _texts(category):
        yield "**Texts that show it.**"
        yield ""
        yield from (f"- `{text}`" for text in texts)
        yield ""
    yield "**Seen.**"
    yield ""
    for where, phase, line in SEEN:
        found = classify(line, phase=phase, exit_code=0)
        if found.category is category:
            yield f"- {where}: `{line.replace('`', '')}`"
    if category is Category.ENGINE_DEATH:
        yield f"- nothing in the log: `{classify('', phase='serving', exit_code=-9).evidence}`"
    yield ""
    yield f"**What the sidecar does.** {done}"
    yield ""
    yield "**What to do.**"
    yield ""
    yield from (f"- {line}" for line in advice)


def _texts(category: Category) -> list[str]:
    """The alternatives of the patterns that are the category's, readable."""
    patterns = [pattern for name, pattern in crash.KNOWN if name is category]
    patterns += {Category.TIMEOUT: [crash.TIMEOUTS], Category.ENGINE_DEATH: [crash.DEATHS]}.get(category, [])
    return [_readable(part) for pattern in patterns for part in pattern.pattern.split("|")]


_WORDS: tuple[tuple[str, str], ...] = (
    (r"\.\{0,\d+\}", "... "),
    (r"\[\\w\./ -\]\{1,80\}", "PROGRAM"),
    (r"\\d\+|\\d\*", "N"),
    (r"\[A-Z\](\\w\+)?", "..."),
    (r"\[\^\}\]", "..."),
    (r"\\w\+", "NAME"),
    (r"\\b|\^|\$", ""),
    (r"(\w) \?", r"\1 "),
    (r"s\?", "(s)"),
    (r"\\(.)", r"\1"),
)


def _readable(pattern: str) -> str:
    for expression, word in _WORDS:
        pattern = re.sub(expression, word, pattern)
    return " ".join(pattern.split())


def _excerpts() -> Iterator[str]:
    for log in sorted(LOGS.glob("*.log")):
        phase = "serving" if log.stem.endswith("killed") else "starting"
        found = classify(log.read_text(encoding="utf-8"), phase=phase, exit_code=0)
        evidence = found.evidence.replace("|", "\\|").replace("`", "")
        yield f"| `{log.name}` | {found.category} | `{evidence[:200]}{'…' if len(evidence) > 200 else ''}` |"


PAGES: dict[str, Callable[[], str]] = {"knobs.md": knobs_page, "crashes.md": crashes_page}


def main() -> int:
    """Writes the pages, or says which are stale."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a page is stale")
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
