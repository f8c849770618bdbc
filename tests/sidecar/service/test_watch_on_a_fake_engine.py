"""`sloguard serve` with ``engine.watch_only``, beside a fake vLLM that someone else has started."""

import json
import os
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from agent_process import fake_command, served_seqs
from own_ports import own_port
from service_process import SLOGUARD, ended, ready, sloguard, started, state_of, wait_for

from sidecar.config.schema import Config, ConfigError, load_config
from sidecar.observe.slo_compliance import SloCompliance
from sidecar.observe.watch_report import WATCH_REPORT, WATCH_REPORT_FILE, WatchAdvice, WatchReport

RATE = 100


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """All that a sidecar needs that only watches."""
    path = tmp_path / "sloguard.yaml"
    content = {
        "model": "fake",
        "engine": {"watch_only": True, "port": own_port()},
        "slo": {"ttft_p99_ms": 50},
        "state": "state",
        "metrics": {"port": own_port()},
        "page": {"enabled": False},
    }
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def config(config_file: Path) -> Config:
    return load_config(config_file)


def foreign_vllm(config: Config, folder: Path) -> "subprocess.Popen[bytes]":
    """vLLM with the plugin, and users, as someone else starts it. Its TTFTs are between 67 and 97 ms."""
    port = str(config.engine.port)
    own = {"FAKE_TELEMETRY": "whole", "FAKE_TRAFFIC": str(RATE), "FAKE_SERVING_PORT": port}
    with (folder / "vllm.log").open("ab") as log:
        return subprocess.Popen(
            fake_command(config.engine.port),
            stdout=log,
            stderr=log,
            env={**os.environ, **own, "SLOGUARD_SOCKET": str(config.socket)},
        )


@pytest.fixture
def vllm(config: Config, tmp_path: Path) -> Iterator["subprocess.Popen[bytes]"]:
    process = foreign_vllm(config, tmp_path)
    wait_for(lambda: served_seqs(config.engine.port), "vLLM serves")
    yield process
    process.kill()
    process.wait()


def report(config: Config) -> WatchReport | None:
    with suppress(FileNotFoundError):
        return WATCH_REPORT.validate_json((config.state / WATCH_REPORT_FILE).read_bytes())
    return None


def test_it_is_watched_and_it_is_said_why_it_is_not_tuned(
    config_file: Path, config: Config, vllm: "subprocess.Popen[bytes]"
) -> None:
    serve = started(config_file)

    found = wait_for(
        lambda: (r := report(config)) and r.compliance.compliance is SloCompliance.MISSED and r, "a report"
    )

    assert found.advice == (WatchAdvice.SLOW_PREFILL, WatchAdvice.TUNING_MAY_HELP)
    shown = sloguard("status", "-c", config_file).stdout
    why = f"the vLLM at http://127.0.0.1:{config.engine.port} is only watched and can't be tuned: neither this sidecar"
    assert why in shown
    assert "SLO: missed: " in shown
    assert "TTFT p99 96.7 ms (limit 50 ms)" in shown
    assert "advice: first tokens are too slow" in shown
    assert ready(config) == 200
    with urllib.request.urlopen(f"http://127.0.0.1:{config.metrics.port}/metrics", timeout=10) as page:
        metrics = page.read().decode()
    counted = [line for line in metrics.splitlines() if line.startswith('sloguard_slo_misses_total{objective="ttft"}')]
    assert float(counted[0].split()[-1]) > RATE

    refused = sloguard("retune", "--now", "-c", config_file)
    assert (refused.returncode, why in refused.stderr) == (1, True)
    assert "the watched vLLM is not affected" in ended(serve, signal.SIGINT)  # Ctrl-C ends the sidecar's own
    assert (vllm.poll(), served_seqs(config.engine.port)) == (None, 8)
    assert json.loads(sloguard("status", "--json", "-c", config_file).stdout)["watched"] is None


def test_it_may_go_and_come_back(config_file: Path, config: Config, tmp_path: Path) -> None:
    serve = subprocess.Popen([*SLOGUARD, "serve", "-c", str(config_file)], stdout=subprocess.PIPE, text=True)
    wait_for(lambda: state_of(config) == "restoring", "vLLM is found missing")
    assert "nothing listens there" in sloguard("status", "-c", config_file).stdout
    assert ready(config) == 503
    vllm = foreign_vllm(config, tmp_path)
    try:
        wait_for(lambda: state_of(config) == "serving", "vLLM is found")
        wait_for(lambda: (r := report(config)) is not None and r.telemetry, "telemetry")
    finally:
        vllm.kill()
        vllm.wait()
    wait_for(lambda: state_of(config) == "restoring", "vLLM is found missing again")
    serve.terminate()
    assert "it has to be restarted by whatever runs it" in serve.communicate(timeout=60)[0]


def test_tune_is_refused(config_file: Path) -> None:
    refused = sloguard("tune", "-c", config_file)
    assert refused.returncode == 2
    assert "engine.watch_only: a vLLM that is only watched can't be tuned" in refused.stderr


def test_it_is_not_for_an_agent(config_file: Path) -> None:
    content = yaml.safe_load(config_file.read_text())
    content["engine"]["agents"] = ["unix:///run/agent.sock"]
    config_file.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match="watch_only: not with agents"):
        load_config(config_file)
