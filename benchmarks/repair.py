"""Checks the repair pass against vLLM itself, on configurations drawn from a wide space.

    python benchmarks/repair.py [--count 2000] [--seed 0] [--json]

Run with a Python that has vLLM (the CPU build is enough) and this project. Every configuration goes to vLLM's own
``EngineArgs(**args).create_engine_config``, as ``vllm serve`` calls it: as drawn, and as repaired. Right means: vLLM
accepts what repair passes or changes, and what repair refuses is either refused by vLLM too, or cannot start for a
reason outside create_engine_config (memory, kernels), which is checked separately. Any disagreement is listed and makes
the exit code 1. All calls share one process, whose environment is restored after each; some are repeated in reverse at
the end, to check that the order does not matter.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_sloguard.guard import memory, model_shape
from vllm_sloguard.guard.machine import Machine
from vllm_sloguard.guard.memory import GIB
from vllm_sloguard.guard.model_shape import ModelShape
from vllm_sloguard.guard.repair import Repair, RepairStatus, repair
from vllm_sloguard.guard.rules import ALL
from vllm_sloguard.guard.rules.arguments import display, typed_arguments
from vllm_sloguard.guard.rules.rule import Stage

DEMO = Path(__file__).parents[1] / "deploy/demo/model"
# Fixed, so that a seed gives the same verdicts on every host; create_engine_config ignores memory.
MACHINE = Machine("cpu", 16 * GIB, 15 * GIB, 0, "16 GiB, as stated")
# Each model's config.json, as changes to the demo model's.
MODELS: Mapping[str, Mapping[str, Any]] = {
    "qwen2": {},
    "mistral, windowed": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": 1024,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "hidden_size": 192,
        "max_position_embeddings": 32768,
    },
    "llama, 8 billion parameters": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
    },
    "deepseek_v2, MLA and experts": {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "q_lora_rank": None,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "num_key_value_heads": 4,
        "max_position_embeddings": 4096,
    },
}

_NAN, _INF = float("nan"), float("inf")
# Per argument: sensible values, and values on or beyond an edge.
SPACE: Mapping[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    "max_num_seqs": ((1, 8, 64, 128, 256, 1024), (2, 2048, 2049, 4097, 100_000, 10**9)),
    "max_num_batched_tokens": ((512, 2048, 8192, 16384), (1, 7, 64, 127, 2047, 131_072, 10**7, 10**12)),
    "max_model_len": ((512, 1024, 2048, 4096, 8192), (-1, 1, 2, 2049, 4097, 32_768, 131_073, 10**8)),
    "block_size": ((16, 32, 64, 128), (1, 7, 17, 33, 48, 100, 4096, 10**6, 10**15)),
    "kv_cache_memory_bytes": ((2**24, 2**28, 2**30, 2**32), (1, 4096, 10**6, 2**34, 2**50)),
    "long_prefill_token_threshold": ((0, 256, 512, 2048), (1, 2049, 40_000, 10**9)),
    "stream_interval": ((1, 2, 4, 8), (10**6,)),
    "tensor_parallel_size": ((1, 2, 4), (3, 5, 6, 7, 8, 64, 10**6)),
    "pipeline_parallel_size": ((1, 2, 4), (3, 16, 10**6)),
    "gpu_memory_utilization": ((0.25, 0.5, 0.8, 0.9, 0.92), (1e-300, 0.001, 0.04, 0.05, 0.935, 0.94, 0.999, 1, 1.0)),
    "enforce_eager": ((True, False), ()),
    "enable_chunked_prefill": ((True, False), ()),
    "enable_prefix_caching": ((True, False), ()),
    "kv_cache_dtype": (("auto", "fp8", "fp8_e4m3", "bfloat16"), ("fp8_e5m2", "fp8_ds_mla", "nvfp4", "ultraquant_4bit")),
    "dtype": (("auto", "bfloat16", "float16", "float32"), ("half", "float")),
    "quantization": (
        ("fp8", "fp8_per_block", "int8_per_channel_weight_only"),
        ("awq", "gptq", "compressed-tensors", "FP8", "mxfp4", "gpt_oss_mxfp4", "fbgemm_fp8", "online", "torchao"),
    ),
}
# For any argument. For some arguments EngineArgs takes None as "default".
ABSURD: tuple[Any, ...] = (
    *(0, -1, -2, -(10**12), 2**31, 2**63, 10**30, 10**400, 1.5, 7.0, -0.5, 1e30, _NAN, _INF, -_INF, True, False, None),
    *("8", " 16 ", "+32", "1_024", "64.0", "1e3", "0x20", "0.5", "nan", "true", "off", "", "x", "auto", "FP16", "8G"),
    *("int4", "gguf", "\n", "ü", [1], [], {}, {"a": 1}),
)


@dataclass(frozen=True)
class Draw:
    """One configuration, and the other inputs of repair."""

    model: str
    args: Mapping[str, Any]
    pinned: frozenset[str]
    workload_max_len: int | None


@dataclass
class Tally:
    """The counts of a run; ``disagreements`` must stay empty."""

    count: int = 0
    accepted_raw: int = 0
    accepted_repaired: int = 0
    outcomes: Counter[str] = field(default_factory=Counter[str])
    refusals: Counter[str] = field(default_factory=Counter[str])
    broken_rules: Counter[str] = field(default_factory=Counter[str])
    disagreements: list[str] = field(default_factory=list[str])
    seconds: float = 0.0


def draws(seed: int) -> Iterator[Draw]:
    """An endless stream of configurations, from sensible to absurd."""
    chance = random.Random(seed)  # noqa: S311 - no secret
    while True:
        names = chance.sample(sorted(SPACE), chance.choice((1, 2, 3, 4, 6, 8, 12, len(SPACE))))
        wild = chance.choice((0.0, 0.0, 0.05, 0.3))
        pinned = chance.sample(sorted(SPACE), chance.choice((0, 0, 0, 1, 2, 5)))
        yield Draw(
            chance.choice(sorted(MODELS)),
            {name: _value(chance, name, wild) for name in names},
            frozenset(pinned),
            chance.choice((None, None, None, 1024, 4096)),
        )


def _value(chance: random.Random, name: str, wild: float) -> Any:
    sensible, edges = SPACE[name]
    if chance.random() < wild:
        return chance.choice(ABSURD)
    return chance.choice(edges if edges and chance.random() < 0.35 else sensible)


def write_models(folder: Path) -> dict[str, str]:
    """Model folders by name."""
    found: dict[str, str] = {}
    for number, (name, fields) in enumerate(MODELS.items()):
        target = folder / str(number)
        shutil.copytree(DEMO, target)
        config = json.loads((target / "config.json").read_text(encoding="utf-8"))
        (target / "config.json").write_text(json.dumps({**config, **fields}), encoding="utf-8")
        found[name] = str(target)
    return found


def asker() -> Callable[[str, Mapping[str, Any]], str]:
    """vLLM's answer: "" if it accepts, else its error in one line."""
    # Errors only, or its log would drown the answer. The plugin must not repair what is being judged.
    os.environ |= {"VLLM_LOGGING_LEVEL": "CRITICAL", "VLLM_PLUGINS": "", "HF_HUB_OFFLINE": "1"}
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    environ = dict(os.environ)

    def ask(model: str, args: Mapping[str, Any]) -> str:
        try:
            EngineArgs(model=model, **args).create_engine_config(UsageContext.OPENAI_API_SERVER)
        except Exception as error:  # noqa: BLE001 - the boundary to vLLM: whatever it raises is its answer
            return f"{type(error).__name__}: {' '.join(_text(error).split())[:300]}"
        finally:
            os.environ.clear()
            os.environ.update(environ)
        return ""

    return ask


def _text(error: Exception) -> str:
    try:
        return str(error)
    except ValueError:  # a number with too many digits inside
        return ""


def run(count: int, seed: int) -> Tally:
    """Draws, checks and compares."""
    tally, began = Tally(), time.monotonic()
    stages = {rule.name: rule.stage for rule in ALL}
    with tempfile.TemporaryDirectory() as folder:
        models = write_models(Path(folder))
        shapes = {name: model_shape.read_shape(Path(path)) for name, path in models.items()}
        ask = asker()
        answers: list[tuple[Draw, str]] = []
        for draw in itertools.islice(draws(seed), count):
            shape = shapes[draw.model]
            outcome = repair(draw.args, shape, MACHINE, pinned=draw.pinned, workload_max_len=draw.workload_max_len)
            raw = ask(models[draw.model], draw.args)
            after = ask(models[draw.model], outcome.args) if outcome.status is RepairStatus.REPAIRED else raw
            answers.append((draw, raw))
            _count(tally, outcome, raw, after, stages)
            for problem in problems(draw, outcome, raw, after, shape):
                tally.disagreements.append(f"{problem}: {_described(draw, outcome)}")
        for draw, raw in reversed(answers[-100:]):
            if bool(ask(models[draw.model], draw.args)) != bool(raw):
                tally.disagreements.append(f"vLLM answers differently the second time: {draw}")
    tally.seconds = time.monotonic() - began
    return tally


def _count(tally: Tally, outcome: Repair, raw: str, after: str, stages: Mapping[str, Stage]) -> None:
    tally.count += 1
    tally.accepted_raw += not raw
    tally.accepted_repaired += outcome.status is not RepairStatus.REFUSED and not after
    tally.outcomes[outcome.status] += 1
    if outcome.status is RepairStatus.REFUSED:
        tally.refusals[f"{stages.get(outcome.rule, Stage.CONFIG)}: {outcome.rule}"] += 1
    tally.broken_rules.update(rule for change in outcome.changes for rule in change.rules)


def problems(draw: Draw, outcome: Repair, raw: str, after: str, shape: ModelShape) -> Iterator[str]:
    """Every problem with an outcome."""
    stages = {rule.name: rule.stage for rule in ALL}
    if outcome.status is RepairStatus.REFUSED:
        if not outcome.refusal or "contradict" in outcome.refusal or "\n" in outcome.refusal:
            yield "the refusal is not one meaningful line"
        yield from _wrong_refusal(draw, outcome, raw, shape, stages.get(outcome.rule, Stage.CONFIG))
        return
    if after:
        yield f"{outcome.status}, but vLLM refuses it: {after}"
    rules = {rule for change in outcome.changes for rule in change.rules}
    if rules and not raw and all(stages[rule] is Stage.CONFIG for rule in rules):
        yield "vLLM accepts what was changed"
    again = repair(outcome.args, shape, MACHINE, pinned=draw.pinned, workload_max_len=draw.workload_max_len)
    if again.status is not RepairStatus.UNCHANGED:
        yield f"not idempotent: {again.changes}{again.refusal}"
    for name in draw.pinned:
        if outcome.args.get(name) is not draw.args.get(name):
            yield f"{name} is pinned"


def _wrong_refusal(draw: Draw, outcome: Repair, raw: str, shape: ModelShape, stage: Stage) -> Iterator[str]:
    if raw:
        return
    if stage is Stage.CONFIG:
        yield f"refused ({outcome.refusal}), but vLLM accepts it"
    elif stage is Stage.MEMORY:
        if found := _that_starts(draw, shape):
            yield f"refused ({outcome.refusal}), but by the same arithmetic this starts: {found}"
    elif outcome.rule == "blocks" and _kernels_know(int(typed_arguments(draw.args)["block_size"])):
        yield f"refused ({outcome.refusal}), but vLLM's attention backend knows the block size"


def _kernels_know(block: int) -> bool:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    return bool(CPUAttentionBackend.supports_block_size(block))


def _that_starts(draw: Draw, shape: ModelShape) -> dict[str, Any] | None:
    """A similar configuration with enough memory to start, found by trying the corners instead of the rules."""
    read = typed_arguments(draw.args)
    length = draw.workload_max_len or 1
    corners: dict[str, tuple[Any, ...]] = {
        "gpu_memory_utilization": (None, 0.92, 0.89),
        "max_num_batched_tokens": (None, 1, length, int(read.get("max_num_seqs", 1))),
        "max_num_seqs": (None, 1),
        "max_model_len": (None, length),
        "kv_cache_memory_bytes": (None, 2**28),
        "enable_chunked_prefill": (None, True),
        "block_size": (None, 32),
    }
    if "gpu_memory_utilization" in draw.pinned:
        # On the CPU an explicit cache size makes the share irrelevant, so that does not honour the pin.
        del corners["kv_cache_memory_bytes"]
    free = {name: tried for name, tried in corners.items() if name not in draw.pinned}
    for corner in itertools.product(*free.values()):
        args = {**read, **{name: value for name, value in zip(free, corner, strict=True) if value is not None}}
        if "gpu_memory_utilization" in args and not 0 < float(args["gpu_memory_utilization"]) <= 1:
            continue
        outcome = repair(args, shape, MACHINE, pinned=frozenset(SPACE), workload_max_len=draw.workload_max_len)
        if outcome.status is RepairStatus.UNCHANGED and memory.estimate(shape, typed_arguments(args), MACHINE).starts:
            return dict(args)
    return None


def _described(draw: Draw, outcome: Repair) -> str:
    args = ", ".join(f"{name}={display(value)}" for name, value in draw.args.items())
    made = "; ".join(f"{c.name} {display(c.before)} -> {display(c.after)} ({c.reason[:160]})" for c in outcome.changes)
    return f"{draw.model}: {args}; pinned {sorted(draw.pinned)}; workload {draw.workload_max_len}; {made}"


def report(tally: Tally, seed: int, vllm_version: str) -> str:
    """The summary of the run."""
    count = max(1, tally.count)
    kept = tally.count - tally.outcomes[RepairStatus.REFUSED]
    lines = [
        f"{tally.count} configurations (seed {seed}, {len(MODELS)} models), vLLM {vllm_version}, {tally.seconds:.0f} s",
        f"accepted as drawn: {tally.accepted_raw} ({tally.accepted_raw / count:.1%})",
        f"after repair: {tally.accepted_repaired} of the {kept} that are not refused",
        *(f"  {name}: {number}" for name, number in sorted(tally.outcomes.items())),
        "refused, by where vLLM would say no and the rule:",
        *(f"  {name}: {number}" for name, number in tally.refusals.most_common()),
        "repaired, by rule:",
        *(f"  {name}: {number}" for name, number in tally.broken_rules.most_common()),
        f"disagreements: {len(tally.disagreements)}",
        *(f"  {line}" for line in tally.disagreements),
    ]
    return "\n".join(lines)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Asks vLLM itself whether the repair pass is right.")
    parser.add_argument("--count", type=int, default=2000, help="configurations to draw (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    if options.count < 1:
        parser.error("--count must be at least 1")
    tally = run(options.count, options.seed)
    import vllm

    if options.json:
        print(json.dumps({"seed": options.seed, "vllm": vllm.__version__, **vars(tally)}))
    else:
        print(report(tally, options.seed, vllm.__version__))
    return 1 if tally.disagreements else 0


if __name__ == "__main__":
    sys.exit(main())
