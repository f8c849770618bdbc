"""`sloguard-agent -- COMMAND` in place of COMMAND, on the fake engine: real processes."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from agent_process import AGENT, agent_process, fake_command, served_seqs
from certificates import certificate

from vllm_sloguard.agent.ports import any_free_port

SHELL = ("/bin/sh", "-c")


def agent(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    line = [*AGENT, "--state", str(folder / "agent"), *words]
    own = {**os.environ, **environment}
    return subprocess.run(line, capture_output=True, text=True, timeout=60, check=False, env=own)


@pytest.mark.parametrize("code", [0, 1, 3, 42])
def test_it_exits_with_the_service_s_code_and_prints_what_it_prints(tmp_path: Path, code: int) -> None:
    ended = agent(tmp_path, "--", *SHELL, f"echo out; echo err >&2; exit {code}")
    assert (ended.returncode, ended.stdout) == (code, "out\nerr\n")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_it_ends_by_the_signal_that_ended_the_service(tmp_path: Path, number: signal.Signals) -> None:
    assert agent(tmp_path, "--", *SHELL, f"kill -{int(number)} $$").returncode == -number


def test_a_command_that_can_not_be_started_has_the_shell_s_codes(tmp_path: Path) -> None:
    missing = agent(tmp_path, "--", "no-such-command")
    assert (missing.returncode, "no-such-command: command not found" in missing.stderr) == (127, True)
    file = tmp_path / "file"
    file.touch()
    assert agent(tmp_path, "--", str(file)).returncode == 126


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--listen", "agent.sock"], "--listen: 'agent.sock': unix:///a/path or host:port is needed"),
        (["--listen", "0.0.0.0:9470"], "needs mutual TLS: --certificate, --key, --ca is missing"),
        (["--listen", "unix://relative"], "--listen: 'unix://relative': an absolute path"),
        (["--allow", "a b"], "--allow: 'a b' is not an argument of vLLM"),
        (["--python", "/no"], "--python: '/no': the Python of vLLM's environment is needed"),
        (["--"], "--: a command line is needed after it"),
    ],
)
def test_bad_options_are_one_line_and_code_2(tmp_path: Path, options: list[str], error: str) -> None:
    ended = agent(tmp_path, *options)
    assert ended.returncode == 2
    assert error in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_an_argument_that_vllm_does_not_have_can_not_be_allowed(tmp_path: Path) -> None:
    source = tmp_path / "site" / "vllm" / "engine" / "arg_utils.py"
    source.parent.mkdir(parents=True)
    (source.parents[1] / "__init__.py").write_text("raise ImportError('the agent must not import it')")
    source.write_text("class EngineArgs:\n    load_format: str = 'auto'\n    max_num_seqs: int = 1\n")
    paths = {"PYTHONPATH": os.pathsep.join([str(source.parents[2]), os.environ.get("PYTHONPATH", "")])}

    refused = agent(tmp_path, "--allow", "load-format,load_formats", **paths)

    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)
    assert "--allow: 'load_formats' is not an argument of the vLLM of" in refused.stderr
    assert refused.stderr.endswith("; did you mean load_format?\n")
    unlike = agent(tmp_path, "--allow", "no_such", **paths)
    assert unlike.stderr.endswith("; `vllm serve --help=all` lists them\n")
    assert agent(tmp_path, "--allow", "load-format", "--", "true", **paths).returncode == 0


def test_a_key_that_others_can_read_is_one_line_and_code_2(tmp_path: Path) -> None:
    for name in ("ca", "agent"):
        certificate(tmp_path, name)
    (tmp_path / "agent.key").chmod(0o644)
    files = [f"--certificate={tmp_path}/agent.pem", f"--key={tmp_path}/agent.key", f"--ca={tmp_path}/ca.pem"]
    ended = agent(tmp_path, "--listen", f"127.0.0.1:{any_free_port()}", *files)
    assert ended.returncode == 2
    assert ended.stderr.endswith(
        f" sloguard-agent: --key: {tmp_path}/agent.key is accessible to others; chmod 600 it\n"
    )
    assert len(ended.stderr.splitlines()) == 1


def test_the_service_gets_its_flags_as_they_are_and_the_agent_s_environment(tmp_path: Path) -> None:
    script = 'import os, sys; print(sys.argv[1:], os.environ["COLOUR"], os.environ["SLOGUARD_REPAIR"])'
    ended = agent(tmp_path, "--", sys.executable, "-c", script, "--a", "b c", "--", "$HOME", COLOUR="s")
    assert ended.stdout == "['--a', 'b c', '--', '$HOME'] s off\n"


def test_sigterm_drains(tmp_path: Path) -> None:
    port = any_free_port()
    with agent_process(tmp_path, command=fake_command(port, drain_timeout_s=10)) as started:
        started.wait_until(lambda: served_seqs(port) == 8, "serving")
        with ThreadPoolExecutor(1) as pool:
            slow = pool.submit(complete, port, seconds=1.0)
            time.sleep(0.3)
            assert started.end() == 0
            assert slow.result() == 200
    assert "serving with 8" in started.output.read_text()


def complete(port: int, *, seconds: float = 0.0) -> int:
    body = b'{"max_tokens": 1, "seconds": %f}' % seconds
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/completions", data=body, timeout=30) as answer:
        answer.read()
        return int(answer.status)


def test_every_process_of_the_service_ends_with_it(tmp_path: Path) -> None:
    script = "sleep 600 & echo $! > child; exit 5"
    ended = subprocess.run(
        [*AGENT, "--state", str(tmp_path / "agent"), "--", *SHELL, script], cwd=tmp_path, timeout=60, check=False
    )
    assert ended.returncode == 5
    child = Path(f"/proc/{(tmp_path / 'child').read_text().strip()}/stat")
    assert not child.exists() or b") Z " in child.read_bytes()


def test_a_killed_agent_leaves_the_service_and_the_next_one_adopts_it(tmp_path: Path) -> None:
    port = any_free_port()
    with agent_process(tmp_path, command=fake_command(port)) as started:
        started.wait_until(lambda: served_seqs(port) == 8, "serving")
        started.end(signal.SIGKILL)
        assert complete(port) == 200
        started.start()
        assert complete(port) == 200
        assert "the service runs already" in started.log.read_text()
        assert len(started.engine_ids()) == 1
        # It passes signals on to a service that it has not started itself.
        started.send(signal.SIGTERM)
        assert started.process is not None
        started.process.wait(30)
        assert served_seqs(port) == 0


def test_a_second_agent_is_refused_and_the_folder_is_private(tmp_path: Path) -> None:
    port = any_free_port()
    with agent_process(tmp_path, command=fake_command(port)) as started:
        assert started.process is not None
        second = agent(tmp_path, "--", "true")
        assert second.returncode == 1
        assert f"belongs to a running agent (process {started.process.pid})" in second.stderr
        assert {path.stat().st_mode & 0o077 for path in [started.state, *started.state.glob("*")]} == {0}


def test_as_process_1_it_reaps_orphans_and_passes_signals_on(tmp_path: Path) -> None:
    script = "(sleep 0.2 &) ; trap 'exit 7' TERM; echo up; while :; do sleep 0.1; done"
    line = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc", "--kill-child=SIGKILL"]
    with (tmp_path / "out").open("wb") as output:
        outer = subprocess.Popen(
            [*line, *AGENT, "--state", str(tmp_path / "agent"), "--", *SHELL, script], stdout=output, stderr=output
        )
    try:
        deadline = time.monotonic() + 60
        while "up" not in (tmp_path / "out").read_text():
            if outer.poll() is not None or time.monotonic() > deadline:
                pytest.skip(f"no namespaces here: {(tmp_path / 'out').read_text()}")
            time.sleep(0.05)
        inner = int(Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()[0])
        deadline = time.monotonic() + 30
        time.sleep(1)
        while zombies(inner):
            assert time.monotonic() < deadline, "the orphan is not reaped"
            time.sleep(0.1)
        os.kill(inner, signal.SIGTERM)
        assert outer.wait(30) == 7
    finally:
        outer.kill()
        outer.wait()


def zombies(parent: int) -> list[str]:
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [pid for pid in children if b") Z " in Path(f"/proc/{pid}/stat").read_bytes()]
