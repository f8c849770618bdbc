"""`sloguard init`: 40 public ways of starting vLLM become files that load, and what can't be kept is said."""

import io
import json
import os
import shlex
import subprocess
import sys
import threading
from contextlib import redirect_stdout
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml
from launch_cases import LAUNCH_CASES, LaunchCase
from typer.testing import CliRunner

from sidecar.adopt.command_line import parsed_arguments
from sidecar.cli.main import app
from sidecar.cli.operator import CommandRefused
from sidecar.config.schema import Config, ConfigError, load_config
from vllm_sloguard.agent.serve_command import flags


def init(*words: object, output: Path) -> tuple[Config, str]:
    done = CliRunner().invoke(app, ["init", *map(str, words), "-o", str(output)])
    if done.exception is not None:
        raise done.exception
    return load_config(output), done.stdout


def refusal(*words: object, output: Path) -> str:
    with pytest.raises(ConfigError) as raised:
        init(*words, output=output)
    assert not output.exists()
    return str(raised.value)


def test_there_are_40_cases() -> None:
    assert len(LAUNCH_CASES) == 40


@pytest.mark.parametrize("name", list(LAUNCH_CASES))
def test_a_launch_becomes_a_file_with_the_same_arguments(name: str, tmp_path: Path) -> None:
    case: LaunchCase = LAUNCH_CASES[name]
    output = tmp_path / "sloguard.yaml"

    config, said = init(case.option, case.source(tmp_path), "--rate", 3, output=output)

    model, *words = shlex.split(case.words)
    assert config.model == model
    given = {n: v for n, v in config.engine.args.items() if n not in case.foreign}
    assert parsed_arguments(tuple(flags(given))).args == parsed_arguments(tuple(words)).args
    assert set(case.foreign) <= set(config.engine.args)
    assert config.engine.port == (case.port or 8000)
    assert set(config.engine.env) == set(case.env)
    written = output.read_text()
    for secret in case.secrets:
        assert f"secret: set {secret} in the environment of sloguard" in said
        assert f"Secret, not in this file: set {secret}" in written
    for text in ("token-abc", "hf_x", "HF_TOKEN=abc"):
        assert text not in written
    for note in case.said:
        assert note in said
        assert note in written
    assert config.workload.rate == 3


@pytest.mark.parametrize("name", list(LAUNCH_CASES))
def test_plan_gives_back_the_command_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a local model is missing here, an empty one stands in: the arguments are what counts."""
    case: LaunchCase = LAUNCH_CASES[name]
    output = tmp_path / "sloguard.yaml"
    for secret in case.secrets:
        monkeypatch.setenv(secret, "in the environment")
    config, _ = init(case.option, case.source(tmp_path), output=output)
    if config.model.startswith("/"):
        output.write_text(output.read_text().replace(config.model, str(tmp_path)), encoding="utf-8")

    done = CliRunner().invoke(app, ["plan", "-c", str(output), "--json"])

    # A model can be too large for this machine; a mistake in the file is another exception.
    assert done.exception is None or isinstance(done.exception, CommandRefused), done.output
    serve, verb, _, *planned = shlex.split(json.loads(done.stdout)["command"])
    assert (serve, verb) == ("vllm", "serve")
    _, *words = shlex.split(case.words)
    kept = parsed_arguments(tuple(planned)).args
    assert {n: v for n, v in kept.items() if n not in case.foreign} == parsed_arguments(tuple(words)).args


def test_the_file_is_commented_and_its_json_are_mappings(tmp_path: Path) -> None:
    output = tmp_path / "sloguard.yaml"
    command = """vllm serve org/m -O3 --compilation-config '{"mode": 3}' --no-enable-prefix-caching --api-key k"""
    config, _ = init("--from", command, output=output)
    text = output.read_text()
    assert yaml.safe_load(text)["engine"]["args"] == {
        "optimization-level": 3,
        "compilation-config": {"mode": 3},
        "enable-prefix-caching": False,
    }
    assert "# requests per second: an example, write that of your busiest hour" in text
    assert "ttft_p99_ms: 500                # time to the first token, 99th percentile, in milliseconds" in text
    assert {knob.name for knob in config.search.space_knobs()} >= {"max_num_seqs", "max_num_batched_tokens"}


def test_ranges_include_the_current_values_and_the_load_fits_the_model_length(tmp_path: Path) -> None:
    command = "vllm serve org/m --max-num-seqs 2048 --max-num-batched-tokens 64k --max-model-len 512"
    config, said = init("--from", command, output=tmp_path / "sloguard.yaml")
    assert "outside the range" not in said
    assert {knob.name: knob.high for knob in config.search.space_knobs()}["max_num_seqs"] == 2048
    assert config.workload.longest_request_tokens <= 512


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--from", "ls -l"], "--from: no `vllm serve` in it, nor a start of vllm.entrypoints.openai.api_server"),
        (["--from", "vllm serve --max-num-seqs 4"], "--from: the command names no model"),
        (["--from", "vllm serve $MODEL"], "the command names no model"),
        (["--from", "vllm serve 'org/m"], "its quotes are not balanced"),
        ([], "init: give one of --from, --from-pid"),
        (["--from", "vllm serve a/b", "--from-pid", "1"], "init: give one of --from, --from-pid"),
        (["--from-pid", "999999999"], "process 999999999: No such file or directory"),
        (["--from-unit", "/absent.service"], "/absent.service: No such file or directory"),
    ],
)
def test_what_can_not_be_read_is_one_line(words: list[str], message: str, tmp_path: Path) -> None:
    said = refusal(*words, output=tmp_path / "sloguard.yaml")
    assert message in said
    assert len(said.splitlines()) == 1


def test_several_services_must_be_named(tmp_path: Path) -> None:
    case = LAUNCH_CASES["compose with several services"]
    path = Path(case.source(tmp_path).removesuffix(":embedding"))
    output = tmp_path / "sloguard.yaml"
    assert "several services run vLLM: llm, embedding; name one:" in refusal("--from", path, output=output)
    assert "no service 'x'; there are llm, embedding, db" in refusal("--from-compose", f"{path}:x", output=output)


def test_a_file_is_not_replaced_unasked(tmp_path: Path) -> None:
    output = tmp_path / "sloguard.yaml"
    output.write_text("mine")
    done = CliRunner().invoke(app, ["init", "--from", "vllm serve a/b", "-o", str(output)])
    assert "exists already; --force replaces it" in str(done.exception)
    assert output.read_text() == "mine"
    assert CliRunner().invoke(app, ["init", "--from", "vllm serve a/b", "-o", str(output), "--force"]).exit_code == 0


def test_nothing_of_a_command_line_is_executed(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    command = f"vllm serve a/b --max-num-seqs $(touch {trap}) --seed `touch {trap}`; touch {trap}"
    _, said = init("--from", command, output=tmp_path / "sloguard.yaml")
    assert not trap.exists()
    assert "is not kept" in said


def test_a_running_process_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "vllm" / "entrypoints" / "openai"
    folder.mkdir(parents=True)
    (folder / "api_server.py").write_text("input()")
    words = [
        sys.executable,
        str(folder / "api_server.py"),
        "--model",
        "org/$m",
        "--max-num-seqs",
        "4",
        "--port",
        "8077",
    ]
    environment = {**os.environ, "VLLM_USE_V1": "1", "VLLM_API_KEY": "secret", "UNRELATED": "1"}
    with subprocess.Popen(words, stdin=subprocess.PIPE, env=environment) as process:
        config, said = init("--from-pid", process.pid, output=tmp_path / "sloguard.yaml")
        process.communicate(b"\n", timeout=20)
    assert (config.model, config.engine.args, config.engine.port) == ("org/$m", {"max_num_seqs": 4}, 8077)
    assert config.engine.python == sys.executable
    assert dict(config.engine.env).get("VLLM_USE_V1") == "1"
    assert "UNRELATED" not in config.engine.env
    assert "set VLLM_API_KEY in the environment" in said
    assert "secret" not in (tmp_path / "sloguard.yaml").read_text().replace("a secret", "").replace("Secret", "")


PAGE = """\
# HELP vllm:request_success_total finished
process_start_time_seconds {started}
vllm:request_success_total{{finished_reason="stop"}} 6000.0
vllm:request_success_total{{finished_reason="length"}} 1200.0
vllm:request_prompt_tokens_sum{{a="b"}} 7200000.0
vllm:request_prompt_tokens_count{{a="b"}} 7200.0
vllm:request_generation_tokens_sum 1440000.0
vllm:request_generation_tokens_count 7200.0
"""


def test_the_load_is_taken_from_the_metrics_of_the_engine(tmp_path: Path) -> None:
    import time

    page = PAGE.format(started=time.time() - 3600).encode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/metrics"
        with redirect_stdout(io.StringIO()):
            config, _ = init("--from", "vllm serve a/b", "--metrics", url, output=tmp_path / "sloguard.yaml")
        server.shutdown()
    assert config.workload.rate == pytest.approx(2.0, rel=0.01)
    assert (config.workload.input_tokens, config.workload.output_tokens) == (1000, 200)
    assert "the mean of 7,200 requests in 1.0 h" in (tmp_path / "sloguard.yaml").read_text()
    assert "--metrics http://127.0.0.1:1/" in refusal(
        "--from", "vllm serve a/b", "--metrics", "http://127.0.0.1:1/", output=tmp_path / "other.yaml"
    )
