"""Mistakes that operators make in the file: the whole message, with the line, the field and what to write instead."""

from pathlib import Path

import pytest

from sidecar.config.schema import ConfigError, checked_config, load_config

# Line 1 is the model; the part under test replaces or follows the others.
MODEL = "model: some/model\n"
SLO = "slo: {ttft_p99_ms: 500}\n"
WORKLOAD = "workload: {rate: 4}\n"
SEARCH = "search: {knobs: {max_num_seqs: {low: 4, high: 64}}}\n"
REST = SLO + WORKLOAD + SEARCH
MAPPING = "`args: {max-num-seqs: 64, enforce-eager: true}`"
CONVERTS = '`sloguard init --from "vllm serve …"` converts a command line'
KNOBS = (
    "max_num_seqs, max_num_batched_tokens, gpu_memory_utilization, max_model_len, enforce_eager,"
    " enable_chunked_prefill, enable_prefix_caching, block_size, kv_cache_memory_bytes, kv_cache_dtype,"
    " long_prefill_token_threshold, scheduler_reserve_full_isl, stream_interval"
)
SECTIONS = "model, engine, slo, objective, workload, search, promotion, window, state, metrics, page, remote"
LIMITS = (
    "ttft, itl, tpot or e2e, then p50, p90, p95, p99 or mean, then ms (ttft_p99_ms: 500, tpot_mean_ms: 30),"
    " error_rate (0.01), and goodput (0.99)"
)


def args(*lines: str) -> str:
    """A file with these lines in ``engine.args``, from line 7 on."""
    return MODEL + REST + "engine:\n  args:\n" + "".join(f"    {line}\n" for line in lines)


CASES: dict[str, tuple[str, str]] = {
    "a key twice": (
        MODEL + WORKLOAD + SEARCH + "slo:\n  ttft_p99_ms: 100\n  itl_p99_ms: 50\n  ttft_p99_ms: 2000\n",
        "line 7: slo.ttft_p99_ms: given twice, first in line 5; keep one",
    ),
    "a section twice": (
        MODEL + REST + "slo:\n  ttft_p99_ms: 100\n",
        "line 5: slo: given twice, first in line 2; keep one",
    ),
    "both spellings of an argument": (
        args("max-num-seqs: 4", "max_num_seqs: 8"),
        "line 8: engine.args.max_num_seqs: the same argument as max-num-seqs in line 7; keep one",
    ),
    "a prefix of an argument": (
        args("max-num-seq: 1"),
        "line 7: engine.args.max-num-seq: not an argument of vLLM, which would read it as max-num-seqs;"
        " write `max-num-seqs: 1`",
    ),
    "a prefix of several arguments": (
        args("max-num: 1"),
        "line 7: engine.args.max-num: not an argument of vLLM, which could read it as max-num-seqs,"
        " max-num-batched-tokens, max-num-active-seqs, max-num-queued-reqs and 2 more; write the full name",
    ),
    "an alias": (
        args("device-memory-utilization: 0.8"),
        "line 7: engine.args.device-memory-utilization: another name of gpu-memory-utilization;"
        " write `gpu-memory-utilization: 0.8`",
    ),
    "a short name": (args("tp: 2"), "line 7: engine.args.tp: write `tensor-parallel-size: 2`"),
    "a negated switch": (
        args("no-enable-prefix-caching: true"),
        "line 7: engine.args.no-enable-prefix-caching: write `enable-prefix-caching: false`",
    ),
    "an empty value": (
        args("max-model-len:"),
        'line 7: engine.args.max-model-len: has no value: a whole number, or a text such as "8k" is needed,'
        " such as `max-model-len: 8192`",
    ),
    "a text for a switch": (
        args("enforce-eager: 'yes'"),
        "line 7: engine.args.enforce-eager: 'yes': true or false is needed, such as `enforce-eager: true`",
    ),
    "a text for a number": (
        args("max-num-seqs: many"),
        "line 7: engine.args.max-num-seqs: 'many': a whole number is needed, such as `max-num-seqs: 8`",
    ),
    "arguments as a list": (
        MODEL + REST + "engine:\n  args: [--max-num-seqs, '4']\n",
        f"line 6: engine.args: a mapping is needed, not a list, such as {MAPPING}; {CONVERTS}",
    ),
    "arguments as a text": (
        MODEL + REST + "engine:\n  args: --max-num-seqs 4\n",
        f"line 6: engine.args: a mapping is needed, not a text, such as {MAPPING}; {CONVERTS}",
    ),
    "a misspelt section": (
        MODEL + SLO + SEARCH + "worklod: {rate: 4}\n",
        f"line 4: worklod: unknown field; did you mean workload? allowed: {SECTIONS}",
    ),
    "no SLO": (MODEL + WORKLOAD, "slo: missing, such as `slo: {ttft_p99_ms: 500, itl_p99_ms: 50}`"),
    "no rate": (MODEL + SLO + "workload: {requests: 50}\n", "line 3: workload.rate: missing, such as `rate: 4`"),
    "seconds for milliseconds": (
        MODEL + WORKLOAD + "slo: {ttft_p99_ms: 2s}\n",
        "line 3: slo.ttft_p99_ms: '2s': a number is needed, in milliseconds: write `ttft_p99_ms: 2000`",
    ),
    "percent for a share": (
        MODEL + WORKLOAD + "slo:\n  ttft_p99_ms: 500\n  error_rate: 1%\n",
        "line 5: slo.error_rate: '1%': a number is needed, as a share between 0 and 1: write `error_rate: 0.01`",
    ),
    "a unit after a rate": (
        MODEL + SLO + "workload: {rate: 12/s}\n",
        "line 3: workload.rate: '12/s': a number is needed, in requests per second: write `rate: 12`",
    ),
    "a percentile that is not measured": (
        MODEL + WORKLOAD + "slo: {ttft_p75_ms: 500}\n",
        f"line 3: slo.ttft_p75_ms: unknown field; allowed: {LIMITS}",
    ),
    "a knob with dashes": (
        MODEL + SLO + WORKLOAD + "search: {knobs: {max-num-seqs: }}\n",
        f"line 4: search.knobs.max-num-seqs: not a knob; did you mean max_num_seqs? allowed: {KNOBS}",
    ),
    "a model folder that is not there": (
        "model: /absent/model\n" + REST,
        "line 1: model: '/absent/model': there is no such folder; a name on Hugging Face is written"
        " `model: Qwen/Qwen3-0.6B`",
    ),
}


@pytest.mark.parametrize("case", list(CASES))
def test_the_message_names_the_line_the_field_and_what_to_write(case: str, tmp_path: Path) -> None:
    text, message = CASES[case]
    path = tmp_path / "sloguard.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        checked_config(path)
    assert str(raised.value) == f"{path}: {message}"


def test_only_what_starts_engines_needs_the_model(tmp_path: Path) -> None:
    path = tmp_path / "sloguard.yaml"
    path.write_text("model: /absent/model\n" + REST)
    assert load_config(path).model == "/absent/model"


def test_all_mistakes_are_in_one_message_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "sloguard.yaml"
    path.write_text(
        MODEL
        + "slo:\n  ttft_p99_ms: 2s\n  error_rate: 1%\n"
        + "worklod:\n  rate: 4\n"
        + "engine:\n  port: http\n  args:\n    max-num-seq: 1\n    trust-remote-code:\n    api-key: abc\n"
        + "search:\n  knobs:\n    tempo:\n    max_num_seqs: {low: 9, high: 3}\n"
    )
    with pytest.raises(ConfigError) as raised:
        load_config(path)
    assert str(raised.value).splitlines() == [
        f"{path}: 8 mistakes",
        "  line 3: slo.ttft_p99_ms: '2s': a number is needed, in milliseconds: write `ttft_p99_ms: 2000`",
        "  line 4: slo.error_rate: '1%': a number is needed, as a share between 0 and 1: write `error_rate: 0.01`",
        f"  line 5: worklod: unknown field; did you mean workload? allowed: {SECTIONS}",
        "  line 8: engine.port: 'http': a whole number is needed, such as `port: 8000`",
        "  line 10: engine.args.max-num-seq: not an argument of vLLM, which would read it as max-num-seqs;"
        " write `max-num-seqs: 1`",
        "  line 12: engine.args.api-key: can't be set: use the environment variable VLLM_API_KEY: arguments show in"
        " the process list",
        f"  line 15: search.knobs.tempo: not a knob; allowed: {KNOBS}",
        "  line 16: search.knobs.max_num_seqs: low must be below high, got 9 and 3",
    ]


def test_a_file_of_something_else_does_not_fill_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "sloguard.yaml"
    path.write_text(MODEL + REST + "".join(f"other{number}: 1\n" for number in range(40)))
    with pytest.raises(ConfigError) as raised:
        load_config(path)
    first, *others = str(raised.value).splitlines()
    assert first == f"{path}: 40 mistakes"
    assert (len(others), others[-1]) == (31, "  and 10 more")


WARNINGS: dict[str, tuple[str, str]] = {
    "seconds for milliseconds": (
        MODEL + WORKLOAD + SEARCH + "slo: {ttft_p99_ms: 0.5}\n",
        "line 4: slo.ttft_p99_ms: 0.5 ms is less than one forward pass takes; if seconds were meant,"
        " write `ttft_p99_ms: 500`",
    ),
    "percent for a share": (
        MODEL + WORKLOAD + SEARCH + "slo: {ttft_p99_ms: 500, error_rate: 0.5}\n",
        "line 4: slo.error_rate: 50% of the requests may fail; it is a share, so 1% is `error_rate: 0.01`",
    ),
    "an incumbent above the knob's range": (
        args("max-num-seqs: 128"),
        "line 4: search.knobs.max_num_seqs: max-num-seqs of the current configuration, 128, is outside the range 4 to"
        " 64, so the search can't stay near it; include it: `max_num_seqs: {low: 4, high: 128}`",
    ),
    "gibibytes for bytes": (
        args("kv-cache-memory-bytes: 4"),
        "line 7: engine.args.kv_cache_memory_bytes: 4 bytes hold no request; 4 GiB is `kv-cache-memory-bytes: 4G`",
    ),
    "percent of the GPU": (
        args("gpu-memory-utilization: 90"),
        "line 7: engine.args.gpu_memory_utilization: 90 is more than the whole GPU; it is a share, so 90% is"
        " `gpu-memory-utilization: 0.9`",
    ),
    "milliseconds for seconds": (
        MODEL + REST + "engine: {drain_timeout_s: 30000}\n",
        "line 5: engine.drain_timeout_s: 30,000 s is more than an hour; it is in seconds: `drain_timeout_s: 30`",
    ),
}


@pytest.mark.parametrize("case", list(WARNINGS))
def test_suspicious_units_are_warnings(case: str, tmp_path: Path) -> None:
    text, warning = WARNINGS[case]
    path = tmp_path / "sloguard.yaml"
    path.write_text(text)
    assert checked_config(path).warnings == (warning,)


def test_an_ordinary_file_has_no_warning(tmp_path: Path) -> None:
    path = tmp_path / "sloguard.yaml"
    path.write_text(args("max-num-seqs: 16", "gpu-memory-utilization: 0.9"))
    assert checked_config(path).warnings == ()


def test_mappings_lists_and_empty_switches_reach_vllm_as_it_takes_them(tmp_path: Path) -> None:
    path = tmp_path / "sloguard.yaml"
    path.write_text(
        args(
            "compilation-config: {level: 3, pass_config: {fuse_norm_quant: true}}",
            "trust-remote-code:",
            "cudagraph-capture-sizes: [1, 2, 4]",
            "served-model-name: [chat, chat-v2]",
            'allowed-origins: ["*"]',
            'speculative-config: \'{"method": "ngram"}\'',
            "compilation_config.mode: 3",
            "lora-modules: [{name: a, path: b}, c=d]",
        )
    )
    assert load_config(path).engine.args == {
        "compilation_config": '{"level":3,"pass_config":{"fuse_norm_quant":true}}',
        "trust_remote_code": True,
        "cudagraph_capture_sizes": ["1", "2", "4"],
        "served_model_name": ["chat", "chat-v2"],
        "allowed_origins": '["*"]',
        "speculative_config": '{"method": "ngram"}',
        "compilation_config.mode": 3,
        "lora_modules": ['{"name":"a","path":"b"}', "c=d"],
    }
