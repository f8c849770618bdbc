"""`sloguard tune` and `sloguard serve` on real vLLM, as an operator runs them."""

import http.client
import json
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from dashboard_queries import DASHBOARDS, Variables, panel_queries
from engine_bench import write_config
from prometheus_server import BINARY, PrometheusServer

from sidecar.config.schema import load_config
from sidecar.record.journal import Journal, JournalError
from sidecar.record.states import State
from sidecar.record.trial import VALIDATING, Role, StartKind, TrialStatus
from sidecar.record.wording import OUTCOMES
from vllm_sloguard.agent.process_group import ProcessGroup
from vllm_sloguard.agent.process_identity import Identity

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

SLOGUARD = [sys.executable, "-m", "sidecar"]
SEARCH: dict[str, Any] = {"unguarded": [], "knobs": {"max_num_seqs": {"low": 4, "high": 64}}}


def trials(state: Path) -> list[dict[str, Any]]:
    """The output of `sloguard trials --json`; empty before there is a journal."""
    output = subprocess.run([*SLOGUARD, "trials", str(state), "--json"], capture_output=True, text=True, check=False)
    return json.loads(output.stdout) if output.returncode == 0 else []


def wait_for(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Polls until ``condition`` holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"timed out: {what}"
        time.sleep(0.25)


def searches(state: Path) -> bool:
    """Whether a search trial runs on an engine. Reads the journal: the command takes seconds to start."""
    with suppress(JournalError):
        journal = Journal(state, read_only=True)
        running = [t.plan.role for t in journal.trials() if t.status == TrialStatus.RUNNING]
        return running == [Role.SEARCH] and len(journal.engines()) == 1
    return False


def nothing_left(state: Path, engine_ids: set[str]) -> None:
    """Asserts that no process of any of the engines is left."""
    assert engine_ids
    assert Journal(state, read_only=True).engines() == []
    for engine_id in engine_ids:
        assert ProcessGroup(Identity(-1, 0.0, engine_id)).members() == []


def engine_ids(state: Path) -> set[str]:
    """Every engine that was started, by its log."""
    return {log.stem.removeprefix("engine-") for log in (state / "logs").glob("engine-*.log")}


def test_a_killed_run_continues_and_writes_a_file_that_vllm_accepts(tmp_path: Path) -> None:
    config_file = write_config(
        tmp_path,
        search={**SEARCH, "budget": 2},
        workload={"requests": 40},
        # No trial meets this limit, so no engines are started for a validation: the window's test has one.
        slo={"ttft_p99_ms": 0.1},
    )
    state = load_config(config_file).state
    command = [*SLOGUARD, "tune", "-c", str(config_file)]

    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        wait_for(lambda: searches(state), 400, "a trial of the search")
        first.send_signal(signal.SIGKILL)
    *before, cut = trials(state)
    assert cut["status"] == "running"
    # The baseline is repeated where vLLM did not answer.
    assert before[-1]["status"] in ("feasible", "infeasible"), before

    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    after = trials(state)
    assert after[: len(before)] == before
    assert after[len(before)]["status"] == "aborted"
    roles = [t["plan"]["role"] for t in after if t["status"] in ("feasible", "infeasible")]
    assert roles.count("baseline") == roles.count("search") == 1, after
    assert {t["run"] for t in after} == {1}
    nothing_left(state, engine_ids(state))

    assert any(f"{words}: " in again.stdout for words in OUTCOMES.values())
    promoted = state / "promoted.yaml"
    assert vllm_accepts(promoted)["max_num_seqs"] == yaml.safe_load(promoted.read_text())["max-num-seqs"]
    assert "# Decision: " in promoted.read_text()


def vllm_accepts(path: Path) -> dict[str, Any]:
    """The arguments that vLLM's own parser reads from ``vllm serve --config path``."""
    script = (
        "import json, sys\n"
        "from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args\n"
        "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
        "args = make_arg_parser(FlexibleArgumentParser()).parse_args(['--config', sys.argv[1]])\n"
        "validate_parsed_serve_args(args)\n"
        "print(json.dumps({k: v for k, v in vars(args).items() if isinstance(v, (int, float, str, bool))}))\n"
    )
    parsed = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=False)
    assert parsed.returncode == 0, parsed.stderr
    return json.loads(parsed.stdout.splitlines()[-1])


@dataclass
class Client:
    """Sends one completion after another, as a user does, and keeps each result."""

    base_url: str
    max_tokens: int
    answers: list[tuple[float, float, int | str]] = field(default_factory=list[tuple[float, float, int | str]])
    stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Until stopped."""
        model = json.loads(urllib.request.urlopen(f"{self.base_url}/v1/models", timeout=30).read())["data"][0]["id"]
        body = {"model": model, "prompt": "a", "max_tokens": self.max_tokens, "ignore_eos": True}
        while not self.stop.is_set():
            began = time.time()
            request = urllib.request.Request(
                f"{self.base_url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            try:
                with urllib.request.urlopen(request, timeout=300) as response:
                    tokens = json.loads(response.read())["usage"]["completion_tokens"]
            except (OSError, http.client.HTTPException) as error:
                self.answers.append((began, time.time(), str(error)))
                self.stop.wait(0.2)
                continue
            self.answers.append((began, time.time(), tokens))


def every_panel_has_data(prometheus: PrometheusServer) -> None:
    """Asserts that the dashboards' queries of vLLM's own metrics return data; failure counts may be empty.

    tests/deploy covers the sidecar's metrics.
    """
    variables = Variables(interval="5s", rate_interval="1m", range="30m")
    panels = dict.fromkeys(query for path in DASHBOARDS for _, query in panel_queries(path, variables))
    queries = [query for query in panels if "vllm:" in query]
    assert queries
    for query in (query for query in queries if not query.endswith("> 0")):
        wait_for(lambda query=query: bool(prometheus.query(query)), 120, f"no data: {query}")


def test_a_window_opens_by_itself_and_the_service_comes_back(tmp_path: Path) -> None:
    # Cron knows whole minutes. The first start may take longer than what is left: a window may open late.
    opening = datetime.now().astimezone() + timedelta(seconds=80)
    config_file = write_config(
        tmp_path,
        # Blocks of 16 tokens are for GPUs: each trial of the search has something to repair.
        search={**SEARCH, "budget": 2, "knobs": {**SEARCH["knobs"], "block_size": {"choices": [16]}}},
        workload={"requests": 40},
        window={"cron": f"{opening.minute} {opening.hour} * * *", "duration": "20m", "notice": "0s"},
        promotion={"pairs": [2]},
        engine={"forked_serving": True},
    )
    config = load_config(config_file)
    client = Client(f"http://127.0.0.1:{config.engine.port}", max_tokens=300)
    # Two users, so that a request is in flight at any moment.
    users = [threading.Thread(target=client.run) for _ in range(2)]

    def state() -> str:
        record = None
        with suppress(JournalError):  # it may not be there yet
            record = Journal(config.state, read_only=True).state()
        return record.state if record else ""

    targets = {"sloguard": config.metrics.port, "vllm": config.engine.port}
    prometheus = PrometheusServer({job: f"127.0.0.1:{port}" for job, port in targets.items()}) if BINARY else None
    with (
        subprocess.Popen([*SLOGUARD, "serve", "-c", str(config_file)], stdout=subprocess.PIPE, text=True) as serve,
        prometheus or nullcontext(),
    ):
        try:
            wait_for(lambda: state() == State.SERVING, 180, "serving before the window")
            for user in users:
                user.start()
            wait_for(lambda: state() == State.TUNING, 240, "the window")
            wait_for(lambda: state() == State.SERVING, 600, "serving after the window")
            served_again = time.time()
            wait_for(lambda: any(isinstance(a[2], int) and a[0] > served_again for a in client.answers), 240, "answers")
            if prometheus is not None:
                every_panel_has_data(prometheus)
        finally:
            client.stop.set()
            for user in users:
                if user.ident is not None:
                    user.join(300)
            serve.send_signal(signal.SIGINT)
            output = serve.stdout.read() if serve.stdout is not None else ""
    assert serve.returncode == 0, output

    journal = Journal(config.state, read_only=True)
    states = journal.states()
    assert [s.state for s in states if s.state != State.VALIDATING] in (
        ["starting", "serving", "draining", "tuning", "promoting", "serving", "halted"],
        ["starting", "serving", "draining", "tuning", "restoring", "serving", "halted"],
    )
    draining = next(s.at for s in states if s.state == State.DRAINING)
    before = [a for a in client.answers if a[0] < draining]
    assert any(a[1] > draining for a in before), "a request was in flight when the window opened"
    # Requests sent before the drain were answered completely, except in its last moment: there is no notice here, and
    # vLLM's server drops requests that have not reached its engine yet.
    sent = draining - statistics.median(a[1] - a[0] for a in before) / 2
    assert {a[2] for a in before if a[0] < sent} == {300}
    compared = [t.result.start for t in journal.trials() if t.plan.role in VALIDATING and t.result is not None]
    assert set(compared) <= {StartKind.FORKED}, compared  # as the service is started
    nothing_left(config.state, engine_ids(config.state))
    if prometheus is None:
        pytest.skip("the dashboards' queries were not checked: prometheus is not installed (Debian: prometheus)")
