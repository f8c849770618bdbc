"""`sloguard budget` and `sloguard repair`, as an operator calls them."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from sidecar.cli import main
from sidecar.config.schema import ConfigError
from vllm_sloguard.guard.memory import GIB
from vllm_sloguard.guard.start_history import Learned, ReportedStart, model_key, to_json

MODEL = Path(__file__).parents[3] / "deploy/demo/model"
CARD = ("--gpu-total-gib", "24", "--gpu-free-gib", "22.5")
BUDGET_KEYS = {
    *("weights_bytes", "activation_bytes", "graph_bytes", "overhead_bytes", "kv_bytes", "kv_bytes_per_token"),
    *("kv_tokens", "starts", "reason"),
}


def ask(*words: str, model: Path = MODEL) -> Result:
    return CliRunner().invoke(main.app, [words[0], "--model", str(model), *words[1:]])


def args(**values: object) -> list[str]:
    return [word for name, value in values.items() for word in ("--arg", f"{name}={value}")]


def answer(*words: str) -> dict[str, Any]:
    result = ask(*words, "--json")
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return json.loads(result.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_budget() -> None:
    found = answer("budget", *CARD, *args(gpu_memory_utilization=0.5, max_model_len=1024))
    assert found.keys() >= BUDGET_KEYS
    assert found["starts"] is True
    assert found["requested_bytes"] == 12 * GIB
    assert found["machine"]["source"] == "as stated"
    more = answer("budget", *CARD, *args(gpu_memory_utilization=0.6, max_model_len=1024))
    assert more["kv_tokens"] > found["kv_tokens"]


def test_budget_that_does_not_start_is_an_answer() -> None:
    result = ask("budget", *CARD, *args(gpu_memory_utilization=0.99))
    assert result.exit_code == 0
    assert "machine: cuda, 22.50 of 24.00 GiB free (as stated)" in result.stdout
    assert "does not start: requested 23.76 GiB exceed the 22.50 GiB that are free" in result.stdout
    assert "based on" in result.stdout


def test_this_machine_is_asked_where_none_is_stated() -> None:
    found = answer("repair")
    assert found["machine"]["total_bytes"] > 0
    assert found["machine"]["source"] != "as stated"


def test_repair() -> None:
    found = answer("repair", *CARD, *args(max_num_seqs=256, max_num_batched_tokens=128, gpu_memory_utilization=0.5))
    assert found["status"] == "repaired"
    assert found["refusal"] == ""
    assert found["args"] == {"max_num_seqs": 256, "max_num_batched_tokens": 256, "gpu_memory_utilization": 0.5}
    assert found["changes"] == [
        {
            "name": "max_num_batched_tokens",
            "from": 128,
            "to": 256,
            "reason": "max_num_batched_tokens 128 is below max_num_seqs 256",
        }
    ]
    pinned = answer(
        *("repair", *CARD, "--pin", "max-num-batched-tokens"),
        *args(max_num_seqs=256, max_num_batched_tokens=128, gpu_memory_utilization=0.5),
    )
    assert pinned["args"]["max_num_seqs"] == 128


def test_repair_in_words() -> None:
    result = ask("repair", *CARD, *args(max_num_seqs=256, max_num_batched_tokens=128, gpu_memory_utilization=0.5))
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "machine: cuda, 22.50 of 24.00 GiB free (as stated)",
        "repaired",
        "max_num_batched_tokens: 128 → 256: max_num_batched_tokens 128 is below max_num_seqs 256",
    ]


def test_exit_codes_of_repair() -> None:
    fine = ask("repair", *CARD, *args(gpu_memory_utilization=0.5))
    assert (fine.exit_code, fine.stdout.splitlines()[1]) == (0, "unchanged")
    refused = ask("repair", *CARD, "--workload-max-len", "4096", *args(max_model_len=4096, gpu_memory_utilization=0.5))
    assert refused.exit_code == 1
    assert refused.stdout.splitlines()[1:] == [
        "refused: max_model_len 4096 is above the model's longest, 2048; the workload needs 4096"
    ]


@pytest.mark.parametrize(
    ("given_arg", "expected"),
    [
        ("max-num-seqs=8", 8),
        ("--max-num-seqs=8", 8),
        ("max_num_batched_tokens=2K", 2048),
        ("max_num_batched_tokens=2k", 2000),
        ("max_num_batched_tokens=2.5k", 2500),
        ("max_model_len=1K", 1024),
        ("max_model_len=auto", -1),
        ("enforce_eager=true", True),
        ('kv_cache_dtype="auto"', "auto"),
        ("kv_cache_dtype=auto", "auto"),
        ("gpu_memory_utilization=5e-1", 0.5),
    ],
)
def test_values_are_read_as_on_the_command_line_of_vllm(given_arg: str, expected: object) -> None:
    found = answer("repair", *CARD, "--arg", given_arg, "--arg", "long_prefill_token_threshold=0")
    name = given_arg.partition("=")[0].removeprefix("--").replace("-", "_")
    assert found["args"][name] == expected
    assert type(found["args"][name]) is type(expected)


def test_null_is_the_default() -> None:
    assert answer("repair", *CARD, *args(max_num_seqs="null", gpu_memory_utilization=0.5))["args"] == {
        "gpu_memory_utilization": 0.5
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("repair", "--arg", "max_seqs=8"),
            "--arg: 'max_seqs' is not an argument that the guard knows; did you mean max_num_seqs",
        ),
        (
            ("repair", "--arg", "zzz=8"),
            "--arg: 'zzz' is not an argument that the guard knows; known are max_num_seqs, ",
        ),
        (("repair", "--pin", "seqs"), "--pin: 'seqs' is not an argument that the guard knows"),
        (("repair", "--arg", "max_num_seqs"), "--arg 'max_num_seqs': NAME=VALUE is required"),
        (("repair", "--arg", "block_size=16", "--arg", "block-size=32"), "--arg: block_size is given twice"),
        (("budget", "--gpu-total-gib", "24"), "--gpu-total-gib and --gpu-free-gib must be given together"),
        (
            ("budget", "--gpu-total-gib", "24", "--gpu-free-gib", "25"),
            "0 <= free <= total is required, got 25.0 of 24.0",
        ),
        (("budget", "--gpu-total-gib", "nan", "--gpu-free-gib", "nan"), "0 <= free <= total is required"),
        (("budget", "--arg", "max_num_seqs=many"), "--arg: max_num_seqs must be a whole number, got 'many'"),
        (
            ("budget", "--arg", "gpu_memory_utilization=1.5"),
            "--arg: gpu_memory_utilization must lie in (0, 1], got 1.5",
        ),
    ],
)
def test_bad_input_is_one_line(words: tuple[str, ...], message: str) -> None:
    result = ask(*words)
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)
    assert len(str(result.exception).splitlines()) == 1


def test_a_bad_model_is_one_line(tmp_path: Path) -> None:
    for command in ("budget", "repair"):
        missing = ask(command, *CARD, model=tmp_path)
        assert isinstance(missing.exception, ConfigError)
        assert "no config.json of " in str(missing.exception)
    for text in ("", "[]", '{"hidden_size": "x"}', "{}"):
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
        result = ask("budget", *CARD, "--formula", model=tmp_path)
        assert isinstance(result.exception, ConfigError), text
        assert str(result.exception).startswith("--model: ")
        assert len(str(result.exception).splitlines()) == 1
        passed = ask("repair", *CARD, "--formula", model=tmp_path)
        assert passed.exit_code == 0
        assert "warning: memory is not checked: " in passed.stdout


def test_a_hub_name_is_looked_up_in_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "models--some--model"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("abc")
    (cache / "snapshots" / "abc").mkdir(parents=True)
    (cache / "snapshots" / "abc" / "config.json").write_text((MODEL / "config.json").read_text())
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    result = CliRunner().invoke(main.app, ["budget", "--model", "some/model", *CARD, "--formula", "--json"])
    assert json.loads(result.stdout)["weights_bytes"] == answer("budget", *CARD, "--formula")["weights_bytes"]
    words = ("repair", *CARD, "--formula", "--json", *args(max_model_len=4096))
    by_name = CliRunner().invoke(main.app, [words[0], "--model", "some/model", *words[1:]])
    assert json.loads(by_name.stdout) == answer(*words[:-3], *args(max_model_len=4096))


def test_main_ends_with_one_line_and_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["sloguard", "repair", "--model", str(MODEL), "--arg", "max_seqs=8"])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        "sloguard: --arg: 'max_seqs' is not an argument that the guard knows; did you mean max_num_seqs?"
    ]


@settings(max_examples=150)
@given(
    command=st.sampled_from(["budget", "repair"]),
    name=st.sampled_from(["max_num_seqs", "max_model_len", "kv_cache_memory_bytes", "gpu_memory_utilization", "dtype"]),
    value=st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
    | st.integers().map(str)
    | st.floats().map(str)
    | st.sampled_from(
        ["NaN", "-Infinity", "1e999", "9" * 5000, "9" * 5000 + "K", "9" * 400 + "k", "[" * 5000, "8G", "{}"]
    ),
    as_json=st.booleans(),
)
def test_any_value_has_an_answer(command: str, name: str, value: str, as_json: bool) -> None:
    result = ask(command, *CARD, "--arg", f"{name}={value}", *(["--json"] if as_json else []))
    if isinstance(result.exception, ConfigError):
        assert len(str(result.exception).splitlines()) == 1
        return
    assert result.exception is None or isinstance(result.exception, SystemExit), value
    assert result.exit_code in (0, 1)
    if as_json:
        json.loads(result.stdout, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))


def test_what_a_state_folder_learned_corrects_the_estimate(tmp_path: Path) -> None:
    asked = (*CARD, "--vllm-version", "0.26.0", *args(gpu_memory_utilization=0.5, max_model_len=1024))
    plain = answer("budget", *asked)
    start = ReportedStart(
        {"gpu_memory_utilization": 0.5}, "cuda", 24 * GIB, plain["kv_bytes"] - GIB // 2, vllm_version="0.26.0"
    )
    (tmp_path / "learned.json").write_text(to_json(Learned((start,) * 9, model=model_key(str(MODEL)))))
    corrected = answer("budget", *asked, "--state", str(tmp_path))
    assert 0.45 * GIB < plain["kv_bytes"] - corrected["kv_bytes"] < 0.5 * GIB
    (tmp_path / "learned.json").write_text("{")
    damaged = ask("budget", *asked, "--state", str(tmp_path))
    assert isinstance(damaged.exception, ConfigError)
    assert "learned.json: damaged" in str(damaged.exception)


@pytest.mark.parametrize(("total", "free"), [("1e308", "1"), ("1e-12", "0"), ("nan", "1"), ("24", "25")])
def test_cards_that_cannot_be(total: str, free: str) -> None:
    for command in ("budget", "repair"):
        result = ask(command, "--gpu-total-gib", total, "--gpu-free-gib", free)
        assert isinstance(result.exception, ConfigError)
        assert "0 <= free <= total" in str(result.exception)


def test_versions_differ_in_what_they_count() -> None:
    asked = (*CARD, *args(gpu_memory_utilization=0.5, max_model_len=1024))
    old, new = (answer("budget", *asked, "--vllm-version", version) for version in ("0.26.0", "0.32"))
    assert new == answer("budget", *asked)
    assert new["graph_bytes"] > old["graph_bytes"] == 0
    assert isinstance(ask("budget", *asked, "--vllm-version", "new").exception, ConfigError)


def test_numbers_of_tokens_have_one_format() -> None:
    words = ask("budget", *CARD, "--formula", *args(max_model_len=1024)).stdout
    tokens = f"{answer('budget', *CARD, '--formula', *args(max_model_len=1024))['kv_tokens']:,}"
    assert words.count(tokens) == 2  # in the table and in the verdict


@pytest.mark.parametrize(
    ("model", "engine", "reason"),
    [
        ("{}/broken", "", "broken/config.json: not JSON"),
        ("acme/other", "", "no config.json of acme/other on this machine"),
        (str(MODEL), ", hf_overrides: '{\"num_hidden_layers\": 4}'", "these arguments change the model"),
    ],
)
def test_plan_says_why_there_is_no_estimate(model: str, engine: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "sloguard.yaml").write_text(
        f"model: {model.format(tmp_path)}\nstate: {tmp_path}/state\n"
        f"engine: {{python: /usr/bin/false, args: {{max_model_len: 1024{engine}}}}}\n"
        "workload: {rate: 2}\nslo: {ttft_p99_ms: 500}\nsearch: {knobs: {max_num_seqs: {low: 8, high: 64}}}\n"
    )
    result = CliRunner().invoke(main.app, ["plan", "-c", str(tmp_path / "sloguard.yaml")])
    assert result.stdout.startswith("verdict: a window could run as configured\n")
    assert f"memory: not computed: {tmp_path if 'broken' in model else ''}" in result.stdout
    assert reason in result.stdout
