"""Checks the guard against vLLM's own classes over many architectures: weights, KV cache, verdicts. Starts no engine.

    python benchmarks/architectures.py [--only NAME] [--into benchmarks/README.md]

Run with a Python that has vLLM (the CPU build is enough) and this project. vLLM builds each configuration of
architectures.json on the meta device. Its KV cache groups, blocks and capacity are compared with the guard's
computation from its facts about the model, and with formulas alone. Exits with 1 if a number differs, or if the guard
refuses what vLLM would start.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_sloguard.agent.build_helper import BuildHelper
from vllm_sloguard.guard.built_model import read_built_model
from vllm_sloguard.guard.evidence import ModelEvidence
from vllm_sloguard.guard.known_model import shape_of_built
from vllm_sloguard.guard.machine import Machine
from vllm_sloguard.guard.memory import GIB, estimate
from vllm_sloguard.guard.model_shape import ModelShape, from_config
from vllm_sloguard.guard.repair import RepairStatus, repair
from vllm_sloguard.knobs import KnobValues

CONFIGS = Path(__file__).with_name("architectures.json")
# Enough for any model here, so that nothing is refused for lack of memory.
MACHINE = Machine("cpu", 2**44, 2**44, 0, "large enough")
KV_BYTES = 64 * GIB
# Lengths that are and are not whole blocks, and steps below and above most sliding windows.
ASKED: tuple[KnobValues, ...] = ({"max_num_batched_tokens": 2048}, {"max_num_batched_tokens": 512})
BEGIN, END = "<!-- architectures -->", "<!-- /architectures -->"


@dataclass(frozen=True)
class Row:
    """One architecture. Errors are relative, None without a comparison; ``problem`` is empty if everything agrees."""

    name: str
    weights_gib: float = 0.0
    formula_weights_error: float | None = None
    kv_bytes_per_token: int = 0
    formula_kv: int | None = None
    keeps: str = ""
    tokens: int = 0
    seconds: float = 0.0
    problem: str = ""
    unbuilt: str = ""


def compared(helper: BuildHelper, name: str, model: Path, config: dict[str, Any]) -> Row:
    """vLLM's and the guard's results for one configuration."""
    answer = helper.ask(model, {})
    if "error" in answer:
        return Row(name, unbuilt=answer["error"])
    facts = read_built_model(answer)
    shape = _shape(config)
    problems: list[str] = []
    tokens = 0
    for asked in ASKED:
        expected = helper.ask(model, asked, KV_BYTES)
        args: KnobValues = {**asked, "kv_cache_memory_bytes": KV_BYTES}
        budget = estimate(shape or shape_of_built(facts), args, MACHINE, evidence=ModelEvidence(facts))
        if "error" not in expected and budget.kv_tokens != expected["tokens"]:
            problems.append(f"{budget.kv_tokens} KV tokens, vLLM has {expected['tokens']}")
        tokens = expected.get("tokens", 0)
        problems += _refusals(shape, args, facts_say=ModelEvidence(facts)) if "error" not in expected else []
    formula = estimate(shape, {}, MACHINE) if shape is not None else None
    return Row(
        name,
        facts.weights_bytes / GIB,
        formula.weights_bytes / facts.weights_bytes - 1 if formula is not None else None,
        max(stage.bytes_per_token for stage in facts.stages),
        formula.kv_bytes_per_token if formula is not None else None,
        ", ".join(sorted({str(group.kind) for group in facts.groups})) or "nothing",
        tokens,
        answer["seconds"],
        "; ".join(dict.fromkeys(problems)),
    )


def _shape(config: dict[str, Any]) -> ModelShape | None:
    try:
        return from_config(config)
    except ValueError:
        return None


def _refusals(shape: ModelShape | None, args: KnobValues, facts_say: ModelEvidence) -> list[str]:
    """Why the guard refuses ``args``, with vLLM's facts and by formulas alone; empty if it does not."""
    found: list[str] = []
    for evidence in (facts_say, ModelEvidence()):
        verdict = repair(
            args, shape, MACHINE, estimate=lambda s, a, m, evidence=evidence: estimate(s, a, m, evidence=evidence)
        )
        if verdict.status is RepairStatus.REFUSED:
            found.append(f"refused ({evidence.rung.description}): {verdict.refusal}")
    return found


def table(rows: list[Row]) -> str:
    """The results as Markdown."""
    lines = [
        "| architecture | weights, GiB | by formula | KV bytes a token | by formula | layers keep"
        " | KV tokens in 64 GiB | build, s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        error = "not read" if row.formula_weights_error is None else f"{row.formula_weights_error:+.1%}"
        kv = "not read" if row.formula_kv is None else "same"
        if row.formula_kv is not None and row.formula_kv != row.kv_bytes_per_token:
            kv = f"{row.formula_kv:,}"
        tokens = f"{row.tokens:,}" + (f" **{row.problem}**" if row.problem else "")
        cells = (row.name, f"{row.weights_gib:.2f}", error, f"{row.kv_bytes_per_token:,}", kv, row.keeps, tokens)
        lines.append(f"| {' | '.join(cells)} | {row.seconds:.2f} |")
    return "\n".join(lines)


def summary(built: list[Row], unbuilt: list[Row]) -> str:
    """The summary lines."""
    wrong = [row for row in built if row.problem]
    slow = max((row.seconds for row in built[1:]), default=0.0)
    read = [row for row in built if row.formula_weights_error is not None]
    close = [row for row in read if abs(row.formula_weights_error or 0) <= 0.01]
    lines = [
        f"{len(built)} architectures built by vLLM on the meta device; {len(wrong)} where the guard's KV tokens differ"
        f" from vLLM's or it refuses; the slowest build took {slow:.2f} s.",
        f"By formulas alone: {len(read)} read, weights within 1% for {len(close)}.",
    ]
    lines += [f"Not built here: {row.name}: {row.unbuilt[:150]}" for row in unbuilt]
    return "\n".join(lines)


def main() -> int:
    """Compares all architectures, or the one given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="one architecture")
    parser.add_argument("--into", type=Path, help="a Markdown file with the table's markers")
    options = parser.parse_args()
    configs: dict[str, dict[str, Any]] = json.loads(CONFIGS.read_text(encoding="utf-8"))
    helper = BuildHelper(sys.executable, timeout_s=300)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, config in configs.items():
            if options.only in ("", name):
                model = Path(folder) / name
                model.mkdir()
                (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
                rows.append(compared(helper, name, model, config))
                print(rows[-1], file=sys.stderr, flush=True)
    helper.close()
    built, unbuilt = [row for row in rows if not row.unbuilt], [row for row in rows if row.unbuilt]
    text = f"{summary(built, unbuilt)}\n\n{table(built)}"
    print(text)
    if options.into is not None:
        whole = options.into.read_text(encoding="utf-8")
        before, after = whole[: whole.index(BEGIN)], whole[whole.index(END) :]
        options.into.write_text(f"{before}{BEGIN}\n{text}\n{after}", encoding="utf-8")
    return 1 if any(row.problem for row in built) else 0


if __name__ == "__main__":
    sys.exit(main())
