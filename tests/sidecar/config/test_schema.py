"""The configuration file: parsing, and a one-line error that names the field for each mistake."""

import subprocess
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from sidecar_cases import GOOD, changed, configured, write

from sidecar.config.schema import Config, ConfigError, Objective, load_config

DEMO = Path(__file__).parents[3] / "deploy" / "demo" / "sloguard.yaml"
SLOGUARD = Path(sys.executable).with_name("sloguard")


def test_demo_file_is_good() -> None:
    config = load_config(DEMO)

    assert Path(config.model) == DEMO.parent / "model"
    assert config.objective is Objective.LATENCY
    assert config.engine.args["max_num_seqs"] == 2
    assert config.window.duration == 30 * 60
    assert config.window.notice == 1
    assert config.state == DEMO.parents[2] / "demo-state"
    assert config.socket.parent == config.state
    assert config.search.unguarded == [{"kv_cache_memory_bytes": 2**46}]
    ranges = {knob.name: (knob.low, knob.high) for knob in config.search.space_knobs()}
    assert ranges["max_num_seqs"] == (1, 64)


def test_state_is_relative_to_the_file_and_not_to_where_the_command_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    path = write(tmp_path, changed("state", "state"))
    monkeypatch.chdir(tmp_path / "elsewhere")

    assert load_config(path).state == tmp_path / "state"
    assert load_config(Path("..") / path.name).state == tmp_path / "state"


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("45m", 2700), ("2h", 7200), ("1.5h", 5400), ("0.5s", 0.5)])
def test_durations(tmp_path: Path, text: object, seconds: float) -> None:
    assert configured(tmp_path, "window.duration", text).window.duration == seconds


def test_both_spellings_of_an_argument_are_one(tmp_path: Path) -> None:
    dashes = configured(tmp_path, "engine.args", {"--max-num-seqs": 4})
    underscores = configured(tmp_path, "engine.args", {"max_num_seqs": 4})

    assert dashes.engine.args == underscores.engine.args == {"max_num_seqs": 4}
    assert dashes.digest() == underscores.digest()


@pytest.mark.parametrize("place", ["state", "metrics.port", "page.port", "window.cron"])
def test_digest_does_not_depend_on_what_no_trial_depends_on(tmp_path: Path, place: str) -> None:
    value = {"state": "other", "metrics.port": 1234, "page.port": 1235, "window.cron": "0 3 * * *"}[place]

    assert configured(tmp_path, place, value).digest() == configured(tmp_path).digest()


@pytest.mark.parametrize(
    ("place", "value", "base_too"),
    [
        ("model", "other/model", True),
        ("engine.args", {"max_num_seqs": 5}, True),
        ("slo.itl_p99_ms", 50, False),
        ("workload.rate", 5, False),
        ("search.seed", 1, False),
        ("promotion.min_gain", 0.1, False),
    ],
)
def test_digest_depends_on_what_trials_depend_on(tmp_path: Path, place: str, value: Any, base_too: bool) -> None:
    before, after = configured(tmp_path), configured(tmp_path, place, value)

    assert before.digest() != after.digest()
    assert (before.base_digest() != after.base_digest()) is base_too


# The mistake, and three texts that the error must contain: the field, the given value, the allowed ones.
BAD: list[tuple[str, Any, tuple[str, ...]]] = [
    ("modle", "x", ("modle", "allowed: model, engine")),
    ("engine.prot", 1, ("engine.prot", "args, host, port")),
    ("slo.p99", 1, ("slo.p99", "ttft, itl, tpot or e2e, then p50")),
    ("workload.qps", 1, ("workload.qps", "rate, requests")),
    ("search.trials", 1, ("search.trials", "optimizer, budget")),
    ("search.knobs.max_num_seqs.lo", 1, ("search.knobs.max_num_seqs.lo", "low, high, choices")),
    ("promotion.gain", 1, ("promotion.gain", "confidence, min_gain")),
    ("window.length", 1, ("window.length", "cron, duration, notice")),
    ("metrics.prot", 1, ("metrics.prot", "host, port")),
    ("model", 5, ("model", "5", "a text is needed")),
    ("engine.port", "http", ("engine.port", "'http'", "a whole number", "`port: 8000`")),
    ("engine.port", 70000, ("engine.port", "70000", "65535")),
    ("engine.env", {"A": 1}, ("engine.env.A", "a text")),
    ("engine.args", [], ("engine.args", "a mapping is needed, not a list")),
    ("workload.rate", "fast", ("workload.rate", "'fast'", "number")),
    ("workload.rate", 0, ("workload.rate", "0", "greater than 0")),
    ("workload.requests", 3, ("workload.requests", "3", "10")),
    ("workload.spread", 1.0, ("workload.spread", "1.0", "less than 1")),
    ("slo.error_rate", True, ("slo.error_rate", "True", "number")),
    ("slo.ttft_p99_ms", -1, ("slo.ttft_p99_ms", "-1", "greater than 0")),
    ("slo", "fast", ("slo", "'fast'", "a mapping of fields")),
    ("slo", {}, ("slo", "at least one latency limit")),
    ("slo", {"error_rate": 0.1}, ("slo", "at least one latency limit")),
    ("objective", "speed", ("objective", "'speed'", "'goodput', 'latency' or 'capacity'")),
    ("search.optimizer", "grid", ("search.optimizer", "'grid'", "random, tpe, gp, tba, tba-tpe, sloguard")),
    ("search.budget", 0, ("search.budget", "0", "1")),
    ("search.knobs", {}, ("search", "knobs", "at least one")),
    ("search.knobs", {"tempo": None}, ("search.knobs.tempo", "not a knob", "max_num_seqs")),
    ("search.knobs", {"max_num_seqs": {"low": 9, "high": 3}}, ("knobs.max_num_seqs", "9 and 3", "low must be below")),
    ("search.knobs", {"max_num_seqs": {"low": -5}}, ("knobs.max_num_seqs", "-5", "must not be negative")),
    ("search.knobs", {"max_num_seqs": {"choices": [1]}}, ("knobs.max_num_seqs", "low and high, not choices")),
    ("search.knobs", {"block_size": {"low": 1}}, ("knobs.block_size", "choices, not low and high")),
    ("search.knobs", {"block_size": {"choices": []}}, ("knobs.block_size", "choices", "empty")),
    ("search.unguarded", [{"tempo": 1}], ("search.unguarded.0.tempo", "not a knob", "max_num_seqs")),
    ("engine.args", {"port": 1}, ("engine.args.port", "engine.port")),
    ("engine.args", {"--host": "a"}, ("engine.args.--host", "engine.host")),
    ("engine.args", {"api-key": "a"}, ("engine.args.api-key", "VLLM_API_KEY")),
    ("engine.args", {"model": "a"}, ("engine.args.model", "field model")),
    ("promotion.confidence", 0.5, ("promotion.confidence", "0.5", "greater than 0.5")),
    ("promotion.pairs", [], ("promotion.pairs", "at least 1 item")),
    ("promotion.pairs", [1, 3], ("promotion.pairs.0", "1", "greater than or equal to 2")),
    ("promotion.pairs", [3, 3], ("promotion", "pairs", "[3, 3]", "above the one before")),
    ("promotion.noise", 0, ("promotion.noise", "0", "greater than 0")),
    ("window.cron", "0 3 * *", ("window.cron", "'0 3 * *'", "0 3 * * 1-5")),
    ("window.cron", "61 3 * * *", ("window.cron", "'61 3 * * *'", "0 3 * * 1-5")),
    ("window.cron", "every night", ("window.cron", "'every night'", "0 3 * * 1-5")),
    ("window.duration", "45 minutes", ("window.duration", "'45 minutes'", '"45m"')),
    ("window.duration", 30, ("window.duration", "30:", '"45m"')),
    ("promotion.probation.duration", 0.5, ("promotion.probation.duration", "0.5:", '"45m"')),
    ("window.duration", "", ("window.duration", "''", '"45m"')),
    ("window.duration", "999999999h", ("window.duration", "'999999999h'", '"168h" at most')),
    ("window.notice", "-1s", ("window.notice", "'-1s'", '"45m"')),
    ("metrics.port", -1, ("metrics.port", "-1", "0")),
]


@pytest.mark.parametrize(("place", "value", "texts"), BAD, ids=[f"{b[0]}={b[1]}"[:50] for b in BAD])
def test_a_mistake_is_one_line_with_field_given_and_allowed(
    tmp_path: Path, place: str, value: Any, texts: tuple[str, ...]
) -> None:
    path = write(tmp_path, changed(place, value))

    said = complaint(path)

    assert said.startswith(f"{path}: ")
    for text in texts:
        assert text in said


@pytest.mark.parametrize(
    ("missing", "example"),
    [
        ("model", "model: Qwen/Qwen3-0.6B"),
        ("slo", "slo: {ttft_p99_ms: 500, itl_p99_ms: 50}"),
        ("workload", "workload: {rate: 4}"),
    ],
)
def test_a_missing_section_is_named_with_an_example(tmp_path: Path, missing: str, example: str) -> None:
    path = write(tmp_path, {name: value for name, value in GOOD.items() if name != missing})

    assert complaint(path) == f"{path}: {missing}: missing, such as `{example}`"


def test_knobs_have_a_default_set(tmp_path: Path) -> None:
    path = write(tmp_path, {name: value for name, value in GOOD.items() if name != "search"})

    assert {knob.name for knob in load_config(path).search.space_knobs()} == {
        "max_num_seqs",
        "max_num_batched_tokens",
        "enable_prefix_caching",
        "enable_chunked_prefill",
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: [", "not YAML"),
        ("a: b: c", "not YAML"),
        ("x: !!python/object/apply:os.abort []", "not YAML"),
        ("", "a mapping of fields is needed, got an empty file"),
        ("- model", "a mapping of fields is needed, got list"),
        ("just words", "a mapping of fields is needed, got str"),
    ],
)
def test_what_is_no_mapping_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = write(tmp_path, text)

    assert complaint(path).startswith(f"{path}: {said}")


# PyYAML's constructors raise arbitrary exceptions on these.
@pytest.mark.parametrize(
    "text", ["a: 2026-99-99", "a: !!bool maybe", "a: !!timestamp soon", "a: !!int ''", "a: 0x_", "a: " + "[" * 3000]
)
def test_a_value_that_yaml_can_not_construct_is_refused(tmp_path: Path, text: str) -> None:
    assert "not YAML" in complaint(write(tmp_path, text))


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "sloguard.yaml"
    path.write_bytes(b"model: \xff\xfe\n")

    assert "not YAML" in complaint(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    assert complaint(tmp_path / "none.yaml") == f"{tmp_path / 'none.yaml'}: No such file or directory"
    assert complaint(tmp_path) == f"{tmp_path}: Is a directory"


def test_a_state_folder_too_deep_for_a_socket_is_refused(tmp_path: Path) -> None:
    said = complaint(write(tmp_path, changed("state", "s" * 120)))

    assert "state" in said
    assert "s" * 120 in said
    assert "too long a path for a Unix socket" in said


# These never make sense, and would otherwise go unnoticed until the search or the socket uses them.
@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("state", "a\0b"),
        ("state", "~no-such-user-here/state"),
        ("search.knobs", {"max_num_seqs": {"high": float("inf")}}),
        ("search.knobs", {"max_num_seqs": {"low": 1.2, "high": 1.8}}),
    ],
)
def test_a_value_that_would_fail_later_is_refused_now(tmp_path: Path, place: str, value: Any) -> None:
    assert place.rpartition(".")[2] in complaint(write(tmp_path, changed(place, value)))


def complaint(path: Path) -> str:
    with pytest.raises(ConfigError) as raised:
        load_config(path)
    first, *others = str(raised.value).split("\n")
    assert not others or first.endswith(f": {len(others)} mistakes") or others[-1].startswith("  and ")
    assert all(other.startswith("  ") for other in others)
    return str(raised.value)


def loaded(path: Path) -> Config | None:
    try:
        return load_config(path)
    except ConfigError:
        return None


FIELDS = [*GOOD, "engine", "args", "port", "state", "window", "cron", "knobs", "low", "unguarded", "max_num_seqs"]
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["a\0b", "~aa/b", "2h\n", "²s", "²", "\u2028"])
)
JUNK = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=5) | st.integers(), inner, max_size=4)
    ),
    max_leaves=12,
)
PLACES = [
    "model", "engine", "engine.args", "engine.env", "engine.python", "engine.host", "slo", "slo.itl_p99_ms",
    "workload", "workload.spread", "search", "search.knobs", "search.knobs.block_size", "search.unguarded",
    "promotion", "window", "window.cron", "window.duration", "state", "metrics", "metrics.port", "page", "page.hosts",
    "page.token", "objective", "more",
]  # fmt: skip


@settings(max_examples=250)
@given(st.one_of(JUNK, st.builds(changed, st.sampled_from(PLACES), JUNK), st.text(max_size=60)))
def test_junk_is_a_configuration_or_one_line(content: object) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), content if isinstance(content, str) else yaml.safe_dump(content))
        assert isinstance(loaded(path), Config) or len(complaint(path)) > len(str(path))


def run_command(*arguments: str | Path, mark: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SLOGUARD, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={"SLOGUARD_TEST": mark, "PYTHONPATH": str(DEMO.parents[2])},
    )


def marked(mark: str) -> list[int]:
    """The processes with ``mark`` in their environment."""
    found: list[int] = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("SLOGUARD_TEST") == mark:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def test_tune_with_a_mistake_says_one_line_and_starts_nothing(tmp_path: Path) -> None:
    path, mark = write(tmp_path, changed("slo.p99", 5)), uuid.uuid4().hex

    ended = run_command("tune", "-c", path, mark=mark)

    assert ended.returncode == 2
    assert ended.stdout == ""
    assert len(ended.stderr.splitlines()) == 1
    assert ended.stderr.startswith(
        f"sloguard: {path}: line 8: slo.p99: unknown field; allowed: ttft, itl, tpot or e2e, then p50"
    )
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert marked(mark) == []


def test_retune_with_a_bad_duration_says_one_line(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)

    for text in ("soon", "²s"):
        ended = run_command("retune", "--now", "--for", text, "-c", path)

        assert ended.returncode == 2, ended.stderr
        assert len(ended.stderr.splitlines()) == 1
        assert f"--for: '{text}': a duration such as" in ended.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_status_without_a_journal_says_one_line_and_writes_nothing(tmp_path: Path) -> None:
    ended = run_command("status", tmp_path)

    assert ended.returncode == 1
    assert ended.stderr == (
        f"sloguard: {tmp_path}: no journal.sqlite in it; `sloguard serve` and `sloguard tune` make one\n"
    )
    assert list(tmp_path.iterdir()) == []
