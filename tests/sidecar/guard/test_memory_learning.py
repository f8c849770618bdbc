"""What the sidecar learns from starts and crashes, using real messages."""

import json
from pathlib import Path

import pytest
from guard_models import QWEN
from sidecar_cases import configured

from sidecar.guard.guard import Guard
from sidecar.guard.memory_learning import Learning, rule_of
from sidecar.observe.telemetry import EngineTelemetry
from sidecar.record.journal import Journal
from sidecar.record.trial import Role
from sidecar.report.repairs import interventions
from sidecar.run.tuning_run import open_run
from sidecar.search.contract import Proposal
from vllm_sloguard.crash import Category, Crash
from vllm_sloguard.guard.machine import Machine
from vllm_sloguard.guard.memory import GIB
from vllm_sloguard.guard.start_history import Learned, LearnedLimit, LimitKind, read_history
from vllm_sloguard.wire import telemetry_pb2 as pb

H200 = Machine("cuda", 140 * GIB, 139 * GIB, 1, "NVML: NVIDIA H200")
ARGS = {"max_num_seqs": 64, "gpu_memory_utilization": 0.9}
TOO_LONG = (
    "ValueError: To serve at least one request with the model's max seq len (4096), (0.0 GiB KV cache is needed, which"
    " is larger than the available KV cache memory (0.0 GiB). Based on the available memory, the estimated maximum"
    " model length is 1792. Try increasing `gpu_memory_utilization`"
)
TENANT = (
    "ValueError: Free memory on device cuda:0 (38.69/139.8 GiB) on startup is less than desired GPU memory utilization"
    " (0.95, 132.81 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes."
)
UNDER_LOAD = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of"


def crash(evidence: str, phase: str = "starting", category: Category = Category.OUT_OF_MEMORY) -> Crash:
    return Crash(category, evidence, "EngineCore", phase, 1)


def taught(found: Crash, known: Learned = Learned()) -> LearnedLimit | None:  # noqa: B008 - it is frozen
    return rule_of(found, ARGS, H200, known, "0.26.0", 1000.0)


@pytest.mark.parametrize(
    ("found", "kind", "value", "days"),
    [
        (crash(TOO_LONG), LimitKind.MAX_MODEL_LEN, 1792, 30),
        (crash(TENANT), LimitKind.FREE_BYTES, int(38.69 * GIB), 1 / 96),
        (crash(UNDER_LOAD, "serving"), LimitKind.HEADROOM_BYTES, int(2.8 * GIB), 7),
    ],
)
def test_a_crash_becomes_a_rule(found: Crash, kind: LimitKind, value: int, days: float) -> None:
    rule = taught(found)
    assert rule is not None
    assert (rule.kind, rule.value, rule.args) == (kind, value, ARGS)
    assert rule.expires_at - rule.learned_at == days * 86400


def test_other_crashes_teach_no_limit() -> None:
    assert taught(crash("Killed", category=Category.ENGINE_DEATH)) is None
    assert taught(crash("ValueError: No available memory for the cache blocks.")) is None


def test_head_room_grows_up_to_a_tenth_of_the_card() -> None:
    rules: tuple[LearnedLimit, ...] = ()
    while (rule := taught(crash(UNDER_LOAD, "serving"), Learned((), rules))) is not None:
        rules = (*rules, rule)
    assert len(rules) == 5
    assert abs(sum(rule.value for rule in rules) - 14 * GIB) < 100


def profiled(kv_bytes: int) -> EngineTelemetry:
    heard = EngineTelemetry()
    heard.add(pb.Event(memory_profiled=pb.MemoryProfiled(kv_cache_bytes=kv_bytes, vllm_version="0.26.0")))
    return heard


def test_starts_and_rules_reach_the_journal_the_file_and_the_next_plan(tmp_path: Path) -> None:
    config = configured(tmp_path)
    journal = Journal(config.state)
    learning = Learning(journal, config.state, config.model, lambda _: H200)
    guard = Guard(config, lambda _: H200, learning.current)
    proposal = Proposal({"gpu_memory_utilization": 0.97}, "anneal", "because")
    assert guard.plan({}, proposal, Role.SEARCH).args["gpu_memory_utilization"] == 0.97

    learning.started({**ARGS, "served_model_name": ["a"]}, profiled(100 * GIB))
    for _ in range(2):
        learning.started(ARGS, profiled(100 * GIB))
        learning.crashed(ARGS, profiled(100 * GIB), crash(UNDER_LOAD, "serving"))
    learning.started(ARGS, EngineTelemetry())

    known = read_history(learning.path, config.model)
    assert known == learning.current()
    assert [(start.kv_bytes, start.args) for start in known.starts] == [(100 * GIB, ARGS)] * 3
    assert [rule.kind for rule in known.rules] == [LimitKind.HEADROOM_BYTES] * 2
    plan = guard.plan({}, proposal, Role.SEARCH)
    share = plan.args["gpu_memory_utilization"]
    assert isinstance(share, float)
    assert share <= (139 - 2 * 2.8) / 140
    assert "learned" in plan.changes[0].reason


def test_why_a_plan_may_not_start_is_in_the_journal(tmp_path: Path) -> None:
    """Formulas do not cover the layers of this model, and there is no vLLM to ask: it passes with a warning."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({**QWEN, "model_type": "qwen3_next", "full_attention_interval": 4}))
    config = configured(tmp_path, "model", str(model))
    card = Machine("cuda", 8 * GIB, 7 * GIB, 1, "NVML: a small card")
    guard = Guard(config, lambda _: card)
    plan = guard.plan({}, Proposal({"gpu_memory_utilization": 0.3}, "anneal", "because"), Role.SEARCH)
    assert plan.refusal == ""
    assert plan.warning.startswith("it may not start: ")
    journal = Journal(config.state)
    journal.begin_trial(open_run(config, journal).id, plan)
    assert journal.trials()[0].plan.warning == plan.warning
    assert [(row.what, row.reason) for row in interventions(journal.trials())] == [
        ("passed with a warning", plan.warning)
    ]
