"""The systemd unit: systemd's own checks, and the behaviour that the unit relies on."""

import configparser
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fake_service import fake_config, serving, sloguard

from sidecar import http_server
from sidecar.config.schema import EngineConfig, load_config
from sidecar.record.journal import Journal

UNIT = Path(__file__).parents[2] / "deploy" / "systemd" / "sloguard.service"
_KILL_S = 60  # vllm_sloguard.agent.process_group waits this long after a kill


@pytest.fixture(scope="module")
def service() -> configparser.SectionProxy:
    """The unit's [Service]."""
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # pyright: ignore[reportAttributeAccessIssue] - systemd's names have capitals
    unit.read(UNIT)
    return unit["Service"]


def analyze(tmp_path: Path, *command: str, **changes: str) -> str:
    """The output of systemd-analyze for the unit, with a command that exists on this machine."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed: apt-get install systemd")
    text = UNIT.read_text().replace("/opt/vllm-sloguard/bin/sloguard", sys.executable)
    for before, after in changes.items():
        assert before in text
        text = text.replace(before, after)
    path = tmp_path / UNIT.name
    path.write_text(text)
    ended = subprocess.run(
        ["systemd-analyze", *command, path], capture_output=True, text=True, check=False, timeout=300
    )
    return ended.stdout + ended.stderr


def test_systemd_has_nothing_to_say_against_it(tmp_path: Path) -> None:
    said = analyze(tmp_path, "verify", "--man=no")
    assert [line for line in said.splitlines() if UNIT.name in line] == []


def test_systemd_would_say_something_against_a_mistake(tmp_path: Path) -> None:
    assert "kill mode" in analyze(tmp_path, "verify", "--man=no", **{"KillMode=process": "KillMode=proces"})
    assert "Unknown key" in analyze(tmp_path, "verify", "--man=no", **{"OOMPolicy": "OOMPolice"})


def test_its_exposure_is_ok_by_systemds_measure(tmp_path: Path) -> None:
    if "unrecognized option" in (said := analyze(tmp_path, "security", "--offline=yes")):
        pytest.skip("this systemd can't judge a unit offline")
    level = float(said.split("Overall exposure level for sloguard.service:")[1].split()[0])
    assert level < 5


def test_a_bad_configuration_ends_with_the_code_that_is_not_started_again(
    tmp_path: Path, service: configparser.SectionProxy
) -> None:
    config_file = fake_config(tmp_path)
    config_file.write_text(config_file.read_text() + "\nno_such_field: 1\n")
    assert service["Restart"] == "on-failure"
    assert str(sloguard("serve", "-c", config_file).returncode) == service["RestartPreventExitStatus"] == "2"


def test_a_start_that_fails_ends_with_a_code_that_is_started_again(
    tmp_path: Path, service: configparser.SectionProxy
) -> None:
    from fake_vllm import OUT_OF_MEMORY

    config_file = fake_config(tmp_path, engine={"args": {"max-num-seqs": OUT_OF_MEMORY}})
    code = sloguard("serve", "-c", config_file).returncode
    assert code not in (0, int(service["RestartPreventExitStatus"]))


def test_a_stop_leaves_the_engine_and_a_start_takes_it_over(tmp_path: Path, service: configparser.SectionProxy) -> None:
    assert (service["KillMode"], service["OOMPolicy"]) == ("process", "continue")
    config_file = fake_config(tmp_path)
    state = load_config(config_file).state
    with serving(config_file) as process:
        [engine] = Journal(state, read_only=True).engines()
        process.send_signal(signal.Signals[service["KillSignal"]])
        assert process.wait(120) == 0
        with serving(config_file) as again:
            assert [record.identity for record in Journal(state, read_only=True).engines()] == [engine.identity]
            again.send_signal(signal.SIGINT)
            assert again.wait(120) == 0
        assert Journal(state, read_only=True).engines() == []


def test_a_stop_may_take_as_long_as_a_restore(service: configparser.SectionProxy) -> None:
    assert int(service["TimeoutStopSec"]) >= _KILL_S + EngineConfig().start_timeout_s + EngineConfig().drain_timeout_s


def test_secrets_come_by_a_file_and_the_engines_sockets_outlive_the_sidecar(service: configparser.SectionProxy) -> None:
    assert "EnvironmentFile" in service
    assert "Environment" not in service
    assert "PrivateTmp" not in service
    assert (service["StateDirectoryMode"], service["UMask"]) == ("0700", "0077")


def test_descriptors_suffice_for_engines_beside_all_clients(service: configparser.SectionProxy) -> None:
    clients = http_server.MAX_AT_ONCE + http_server.BACKLOG
    assert int(service["LimitNOFILE"]) > 10 * clients
