"""Live changes at vLLM's own scheduler, whose assertions watch, without a model: steps take no time here."""

import random
from pathlib import Path
from typing import Any

import pytest

from vllm_sloguard.learned import version
from vllm_sloguard.live import LONG_PREFILL, PREFIX_CACHING, RESERVE, SEQS, TOKENS, Change
from vllm_sloguard.live_scheduler import LiveScheduler

pytestmark = pytest.mark.engine

MODEL = str(Path(__file__).resolve().parents[2] / "deploy" / "demo" / "model")


class Steps:
    """A scheduler of real vLLM with live knobs; what a model would answer is made up."""

    def __init__(self, *, async_scheduling: bool) -> None:
        import torch
        import vllm
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.structured_output import StructuredOutputManager

        args = EngineArgs(
            model=MODEL,
            load_format="dummy",
            dtype="bfloat16",
            max_model_len=512,
            max_num_seqs=16,
            max_num_batched_tokens=512,
            enable_prefix_caching=True,
            enforce_eager=True,
            block_size=32,
            async_scheduling=async_scheduling,
        )
        config = args.create_engine_config()
        spec = FullAttentionSpec(block_size=32, num_kv_heads=1, head_size=16, dtype=torch.bfloat16)
        cache = KVCacheConfig(num_blocks=150, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
        config.cache_config.num_gpu_blocks = cache.num_blocks
        init_none_hash(hash)
        self.hasher = get_request_block_hasher(32, hash)
        self.scheduler = config.scheduler_config.get_scheduler_cls()(
            vllm_config=config,
            kv_cache_config=cache,
            structured_output_manager=StructuredOutputManager(config),
            block_size=32,
            hash_block_size=32,
            log_stats=True,
        )
        self.live = LiveScheduler(self.scheduler, version(vllm.__version__), None)
        self.finished = self.added = 0

    def submit(self, prompt: list[int], output_tokens: int) -> None:
        """Adds a request."""
        from vllm import SamplingParams
        from vllm.v1.request import Request

        self.added += 1
        params = SamplingParams(max_tokens=output_tokens, ignore_eos=True)
        params.update_from_generation_config({}, eos_token_id=1)
        request = Request(str(self.added), prompt, params, None, block_hasher=self.hasher)
        self.scheduler.add_request(request)

    def step(self) -> Any:
        """Schedules, makes up the answers, and takes them in; returns what was scheduled."""
        from vllm.v1.outputs import ModelRunnerOutput

        self.live.before_step()
        output = self.scheduler.schedule()
        self.live.after_step(output)
        names = list(output.num_scheduled_tokens)
        requests = [self.scheduler.requests[name] for name in names]
        # A prompt that is not through yet has no answer.
        tokens = [[7] if r.num_computed_tokens >= r.num_tokens else [] for r in requests]
        answers = ModelRunnerOutput(names, {name: i for i, name in enumerate(names)}, tokens)
        for outputs in self.scheduler.update_from_output(output, answers).values():
            self.finished += sum(o.finish_reason is not None for o in outputs.outputs)
        return output


@pytest.fixture(params=[False, True], ids=["scheduler", "async"])
def steps(request: pytest.FixtureRequest) -> Steps:
    """Both of vLLM's schedulers."""
    return Steps(async_scheduling=request.param)


def test_every_knob_of_the_table_is_live_there(steps: Steps) -> None:
    assert steps.live.record.cold == {}
    assert steps.live.current() == {SEQS: 16, TOKENS: 512, LONG_PREFILL: 0, PREFIX_CACHING: 1, RESERVE: 1}


def test_a_thousand_random_changes_lose_no_request(steps: Steps) -> None:
    draw = random.Random(11)
    shared = [draw.randrange(2, 900) for _ in range(400)]
    changes = settled = 0
    for number in range(4000):
        if number % 4 == 0:
            seqs = draw.randint(1, 16)
            targets = {
                SEQS: seqs,
                TOKENS: draw.randint(seqs, 512),
                LONG_PREFILL: draw.choice((0, draw.randint(1, 512))),
                PREFIX_CACHING: draw.randint(0, 1),
                RESERVE: draw.randint(0, 1),
            }
            changes += 1
            steps.live.record.receive(Change(1, changes, targets, settle=draw.random() < 0.3), 0.0)
        if number % 400 < 100:  # and time to run empty
            for _ in range(draw.choice((0, 0, 1, 2))):
                head = draw.randint(0, 400)
                steps.submit(shared[:head] + [draw.randrange(2, 900) for _ in range(8)], draw.randint(1, 40))
        if steps.scheduler.has_requests():
            steps.step()
            held = steps.live.record.in_force()
            assert held is not None
            settled += held.settled_s is not None
            assert len(steps.scheduler.running) <= max(steps.live.current()[SEQS], 1)
    for _ in range(20_000):
        if not steps.scheduler.has_unfinished_requests():
            break
        steps.step()

    assert steps.live.record.ranges  # nothing went wrong
    assert settled > 0
    assert steps.finished == steps.added > 500


def test_settled_a_prompt_is_not_found_again(steps: Steps) -> None:
    prompt = list(range(2, 202))

    def found() -> int:
        """Prompt tokens that the next request finds in the prefix cache."""
        steps.submit(prompt, 2)
        hit = 0
        while steps.scheduler.has_unfinished_requests():
            hit += sum(new.num_computed_tokens for new in steps.step().scheduled_new_reqs)
        return hit

    assert found() == 0
    assert found() == 192
    steps.live.record.receive(Change(1, 1, {}, settle=True), 0.0)
    assert found() == 0
    assert found() == 192
    steps.live.record.receive(Change(1, 2, {PREFIX_CACHING: 0}), 0.0)
    assert found() == 0
    steps.live.record.receive(Change(1, 3, {}), 0.0)
    assert found() == 192
