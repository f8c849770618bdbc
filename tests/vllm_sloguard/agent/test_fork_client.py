"""The fork server with real processes on both ends; a tiny package stands in for vLLM."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path

import psutil
import pytest

from vllm_sloguard.agent.fork_client import Forked, ForkServer, ForkServerError, unforkable
from vllm_sloguard.agent.process_group import ProcessGroup
from vllm_sloguard.agent.process_identity import Identity, engines_writing_to, log_of
from vllm_sloguard.starts import import_list
from vllm_sloguard.starts.fork_protocol import ForkRequest, ServerReady, decode_answer, encode_message

MODULE = "vllm.entrypoints.openai.api_server"
ENGINE = """
import multiprocessing, os, sys, threading, time
from vllm.utils.system_utils import get_mp_context

def core():
    print("core", os.getpid(), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    print("main", os.getpid(), os.getsid(0), sys.argv[1:], os.environ.get("FLAVOUR"), "late" in sys.modules, flush=True)
    match sys.argv[1]:
        case "serve":
            process = get_mp_context().Process(target=core)
            process.start()
            process.join()
        case "raise":
            raise ValueError("no such model")
        case code:
            sys.exit(int(code))
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The environment of a Python that imports the stand-in."""
    files = {
        "vllm/__init__.py": '__version__ = "0.32.0"',
        "vllm/utils/__init__.py": "",
        "vllm/utils/system_utils.py": "import multiprocessing\n\n\ndef get_mp_context():\n"
        '    return multiprocessing.get_context("spawn")\n',
        "vllm/entrypoints/__init__.py": "",
        "vllm/entrypoints/openai/__init__.py": "",
        "vllm/entrypoints/openai/api_server.py": ENGINE,
        "late.py": "",
        "threaded.py": "import threading, time\n"
        "threading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n",
        "managed.py": "import threaded\n"
        "from pathlib import Path\n"
        "for task in Path('/proc/self/task').iterdir():\n"
        "    if task.name != str(threaded.threading.main_thread().native_id):\n"
        "        (task / 'comm').write_text('cuda00001800007')\n",
    }
    for name, text in files.items():
        path = tmp_path / "site" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path / "site"), *sys.path))}


@pytest.fixture
def server(environment: dict[str, str], tmp_path: Path) -> Generator[ForkServer]:
    """A server with its own folder."""
    server = ForkServer(sys.executable, environment, tmp_path, tmp_path / "fork-server.log")
    yield server
    server.close()


def fork(server: ForkServer, folder: Path, *argv: str) -> Forked:
    """An engine whose output goes to ``folder/log``."""
    return server.fork(MODULE, list(argv), {**os.environ, "FLAVOUR": "plain"}, folder / "log", folder)


def lines(path: Path, count: int) -> list[list[str]]:
    """Waits for a log's first lines, and returns their words."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = [line.split() for line in path.read_text().splitlines()] if path.is_file() else []
        if len(found) >= count:
            return found
        time.sleep(0.02)
    raise AssertionError(f"{path}: {path.read_text() if path.is_file() else 'not there'}")


def gone(pid: int) -> bool:
    """Whether the process ends and is reaped within a while."""
    deadline = time.monotonic() + 60
    while psutil.pid_exists(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not psutil.pid_exists(pid)


@pytest.mark.parametrize(("argument", "code"), [("0", 0), ("3", 3), ("raise", 1)])
def test_an_engine_has_its_own_session_log_environment_and_exit_code(
    server: ForkServer, tmp_path: Path, argument: str, code: int
) -> None:
    forked = fork(server, tmp_path, argument)

    assert forked.wait(60) == forked.poll() == code
    said = lines(tmp_path / "log", 1)[0]
    assert said[:5] == ["main", str(forked.pid), str(forked.pid), f"['{argument}']", "plain"]
    assert ("no such model" in (tmp_path / "log").read_text()) is (argument == "raise")


def test_a_killed_engine_is_seen_to_end_and_its_core_is_forked_and_goes_with_it(
    server: ForkServer, tmp_path: Path
) -> None:
    forked = fork(server, tmp_path, "serve")
    group = ProcessGroup.of_child(forked, "one")
    core = int(lines(tmp_path / "log", 2)[1][1])

    assert os.getsid(core) == forked.pid
    assert psutil.Process(core).cmdline() == psutil.Process(forked.pid).cmdline()  # forked without exec
    os.kill(forked.pid, signal.SIGKILL)
    assert forked.wait(60) == -signal.SIGKILL
    assert not group.leader_alive()
    assert group.exit_code() == -signal.SIGKILL
    group.kill()
    # Its parent had died: if nothing reaped it, it would remain a zombie.
    assert gone(core)


def test_the_end_of_the_server_ends_its_engines(server: ForkServer, tmp_path: Path) -> None:
    forked = fork(server, tmp_path, "serve")
    lines(tmp_path / "log", 2)

    server.close()

    assert gone(forked.pid)


def started_alone(environment: dict[str, str], folder: Path) -> tuple[socket.socket, "subprocess.Popen[bytes]"]:
    """A ready server, and the socket that a killed sidecar would leave behind."""
    ours, theirs = socket.socketpair()
    with theirs, (folder / "fork-server.log").open("ab") as log:
        command = [sys.executable, "-m", "vllm_sloguard.starts.fork_server", str(folder)]
        process = subprocess.Popen(command, stdin=theirs.fileno(), stdout=log, stderr=log, env=environment)
    ours.settimeout(60)
    assert isinstance(decode_answer(ours.recv(4096)), ServerReady)
    return ours, process


def test_an_engine_whose_sidecar_was_killed_before_it_heard_of_it_ends(
    environment: dict[str, str], tmp_path: Path
) -> None:
    ours, process = started_alone(environment, tmp_path)
    ours.sendall(
        encode_message(ForkRequest(MODULE, ("serve",), dict(os.environ), str(tmp_path / "log"), str(tmp_path)))
    )
    pid = int(lines(tmp_path / "log", 2)[0][1])  # the answer was sent and never read
    ours.close()

    assert process.wait(60) == 0
    assert gone(pid)


def test_half_a_request_is_the_end(environment: dict[str, str], tmp_path: Path) -> None:
    ours, process = started_alone(environment, tmp_path)
    ours.sendall(b'{"module": ')
    ours.close()

    assert process.wait(60) == 0
    assert (tmp_path / "fork-server.log").read_text() == ""


def test_what_an_engine_taught_is_imported_before_the_next(server: ForkServer, tmp_path: Path) -> None:
    fork(server, tmp_path, "0").wait(60)
    (import_list.list_path(tmp_path, "0.32.0")).write_text("late\nno.such.module\n")
    fork(server, tmp_path, "0").wait(60)

    assert [words[-1] for words in lines(tmp_path / "log", 2)] == ["False", "True"]


def test_a_module_that_leaves_a_thread_is_left_out_by_the_next_server(
    server: ForkServer, environment: dict[str, str], tmp_path: Path
) -> None:
    import_list.list_path(tmp_path, "0.32.0").write_text("threaded\n")

    with pytest.raises(ForkServerError, match="importing threaded left a thread running"):
        fork(server, tmp_path, "0")
    assert fork(server, tmp_path, "0").wait(60) == 0


def test_the_thread_that_nvml_leaves_is_no_hindrance(server: ForkServer, tmp_path: Path) -> None:
    import_list.list_path(tmp_path, "0.32.0").write_text("managed\n")

    assert fork(server, tmp_path, "0").wait(60) == 0
    assert server.usage is not None
    assert server.usage.threads == 2


@pytest.mark.parametrize("version", ["0.25.1", "0.33.0", "1.0", "nightly"])
def test_another_version_of_vllm_is_not_forked(
    server: ForkServer, environment: dict[str, str], tmp_path: Path, version: str
) -> None:
    (tmp_path / "site" / "vllm" / "__init__.py").write_text(f'__version__ = "{version}"')

    with pytest.raises(ForkServerError, match=f"0.26 to 0.32, this is {version}"):
        fork(server, tmp_path, "0")


def test_a_server_that_was_killed_is_replaced(server: ForkServer, tmp_path: Path) -> None:
    first = fork(server, tmp_path, "0")
    first.wait(60)
    parent = psutil.Process(fork(server, tmp_path, "serve").pid).parent()
    assert parent is not None
    parent.kill()
    parent.wait(60)

    assert fork(server, tmp_path, "0").wait(60) == 0


def test_a_python_without_vllm_or_none_at_all(tmp_path: Path) -> None:
    for python, said in ((sys.executable, "this is none"), ("/bin/true", "has ended")):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if "site-packages" not in p)}
        if python == sys.executable:
            (tmp_path / "empty").mkdir()
            (tmp_path / "empty" / "vllm.py").write_text("raise ImportError('none here')")
            environment["PYTHONPATH"] = os.pathsep.join((str(tmp_path / "empty"), *sys.path))
        server = ForkServer(python, environment, tmp_path, tmp_path / "fork-server.log")
        with pytest.raises(ForkServerError, match=said):
            fork(server, tmp_path, "0")
        server.close()


def test_what_is_not_forked() -> None:
    assert unforkable({"max_num_seqs": 4, "distributed_executor_backend": "mp"}) == ""
    assert unforkable({"numa_bind": True}) == "numa_bind True"
    assert unforkable({"distributed_executor_backend": "ray"}) == "distributed_executor_backend ray"


def test_an_engine_that_was_let_go_outlives_the_server_and_is_still_found_whole(
    server: ForkServer, tmp_path: Path
) -> None:
    forked = fork(server, tmp_path, "serve")
    core = int(lines(tmp_path / "log", 2)[1][1])
    group = ProcessGroup(ProcessGroup.of_child(forked, "let-go").identity)
    server.detach(forked.pid)
    server.close()

    assert group.leader_alive()
    assert {process.pid for process in group.members()} == {forked.pid, core}
    os.kill(forked.pid, signal.SIGKILL)  # it need not have been reaped
    deadline = time.monotonic() + 60
    while group.leader_alive() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert core in {process.pid for process in group.members()}
    group.kill()
    assert not group.members()


def test_an_engine_of_which_nothing_was_recorded_is_found_by_its_log(server: ForkServer, tmp_path: Path) -> None:
    log = log_of(tmp_path, "unheard-of")
    forked = server.fork(MODULE, ["serve"], dict(os.environ), log, tmp_path)
    core = int(lines(log, 2)[1][1])
    log.unlink()

    assert engines_writing_to(tmp_path) == {"unheard-of"}
    group = ProcessGroup(Identity(-1, 0.0, "unheard-of"))
    assert {process.pid for process in group.members()} == {forked.pid, core}
    group.kill()
    assert engines_writing_to(tmp_path) == set()


def test_what_was_not_let_go_ends_with_the_server(server: ForkServer, tmp_path: Path) -> None:
    forked = fork(server, tmp_path, "serve")
    lines(tmp_path / "log", 2)
    server.close()

    assert gone(forked.pid)
    with pytest.raises(ForkServerError, match="has ended"):
        server.detach(forked.pid)
