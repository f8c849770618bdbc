"""The page over real HTTP, with a real journal, hub and control socket behind it."""

import http.client
import json
import os
import socket
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from engine_bench import write_config
from page_bench import OOM, PageBench, events, fetch, measured, page_bench, page_config, page_json, result

from sidecar import http_server
from sidecar.config.schema import ConfigError, PageConfig, load_config
from sidecar.page import event_stream
from sidecar.page.app import MAX_STREAMS
from sidecar.page.server import allowed_hosts
from sidecar.record.states import State
from sidecar.record.trial import Result, Role

JSON = {"Content-Type": "application/json"}
KNOWN_HOSTS = (
    "localhost", "localhost:9465", "LOCALHOST:1", "127.0.0.1:9465", "[::1]:9465", "tuner.example:443", "10.0.0.5",
    "[fe80::1]:9465",
)  # fmt: skip
UNKNOWN_HOSTS = (
    "evil.example", "evil.example:9465", "localhost.evil.example", "127.0.0.1.evil.example", "127.0.0.1:9465@x",
    "x@127.0.0.1", "[evil]", "localhost:9465/", "127.0.0.1, evil.example", "tuner.example.evil", "10.0.0.6",
)  # fmt: skip
ACTIONS = ("retune", "pause", "resume", "abort", "rollback")


def act(bench: PageBench, name: str, token: str | None = "", **body: Any) -> tuple[int, dict[str, Any]]:
    """Performs an action with the page's token, another one, or None."""
    headers = dict(JSON)
    if token is not None:
        headers["Authorization"] = f"Bearer {token or bench.token}"
    content = {"epoch": bench.requests.epoch, **body}
    status, _, answer = fetch(f"{bench.url}/api/{name}", json.dumps(content).encode(), **headers)
    return status, json.loads(answer)


def state_of_actions(bench: PageBench) -> tuple[Any, ...]:
    """Everything that an action can change."""
    paused, current = bench.operations.paused(), bench.operations.current()
    return paused and paused.at, current and current.id, bench.requests.abort.is_set(), bench.requests.retune.is_set()


def promote(bench: PageBench) -> None:
    bench.journal.promote(None, bench.config.base_digest(), {**bench.config.engine.args, "max_num_seqs": 23})


# The view


def test_the_view_agrees_with_status(bench: PageBench) -> None:
    run = bench.tune(600)
    bench.tried(run, Role.BASELINE, "baseline", result(measured()))
    bench.tried(run, Role.UNGUARDED, "unguarded", Result(crash=OOM))
    command = [sys.executable, "-m", "sidecar", "status", str(bench.config.state), "--json"]
    status = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=300).stdout)
    page = page_json(bench.url)

    view = page["view"]
    assert (view["state"]["word"], view["state"]["why"]) == (status["state"], status["reason"])
    assert (view["epoch"], view["run"]["id"]) == (status["epoch"], status["run"])
    assert len(view["run"]["trials"]) == status["trials"] == 2
    assert abs(view["state"]["since"] - status["since"]) < 1
    assert abs(page["heartbeat"]["at"] + page["heartbeat"]["window_left_s"] - status["until"]) < 10


def test_changes_are_pushed(bench: PageBench) -> None:
    with ExitStack() as stack:
        stream = events(stack.enter_context(_opened(bench)))
        assert next(stream)[1]["state"]["word"] == "serving"
        assert next(stream)[0] == "heartbeat"
        run = bench.tune(600)
        trial = bench.begin(run, Role.SEARCH, "anneal")
        # The page may refresh between any two of these records.
        view = next(s for s in _stories(stream) if s["state"]["word"] == "tuning" and s["run"]["trials"])
        assert [row["state"]["label"] for row in view["run"]["trials"]] == ["running"]

        bench.journal.end_trial(trial, Result(crash=OOM))
        [row] = next(_stories(stream))["run"]["trials"]
        assert (row["state"]["label"], row["crash"]) == ("crashed", "out of memory")
        # Without changes there are only heartbeats.
        assert [next(stream)[0] for _ in range(2)] == ["heartbeat", "heartbeat"]


def test_live_latencies_of_the_serving_engine(bench: PageBench) -> None:
    assert page_json(bench.url)["heartbeat"]["live"] is None
    bench.hub.expect("one")
    bench.requests.engine_id = "one"
    bench.tell("one", *[(2500.0, 20.0, 2900.0)] * 4)
    found = page_json(bench.url)["heartbeat"]["live"]

    assert (found["requests"], found["missed"], found["few"]) == (4, 4, True)
    assert [(f["measured"], f["limit"], f["met"]) for f in found["meters"]] == [
        ("2500 ms", "2000 ms", False),
        ("-", "60.0 ms", None),
        ("20.0 ms", "", None),
        ("2900 ms", "3000 ms", True),
    ]
    bench.tune(600)
    assert page_json(bench.url)["heartbeat"]["live"] is None  # the engine is gone


@pytest.mark.parametrize("names", [("-wal", "-shm"), ("", "-wal", "-shm")])
def test_the_page_follows_a_journal_whose_deleted_files_were_restored(bench: PageBench, names: tuple[str, ...]) -> None:
    assert page_json(bench.url)["view"]["paused"] is None
    for name in names:
        (bench.config.state / f"journal.sqlite{name}").unlink()
    assert bench.journal.missing()
    with bench.requests.journal_connections:
        bench.journal.restore_files()
    assert act(bench, "pause", reason="after the restore")[0] == 200

    view = page_json(bench.url)["view"]
    assert (view["paused"]["text"], view["problem"]) == ("after the restore", "")


def test_a_damaged_journal_is_reported_once_and_the_page_stays_up(bench: PageBench) -> None:
    run = bench.tune(600)
    assert page_json(bench.url)["view"]["problem"] == ""
    said = len(bench.said)
    with sqlite3.connect(bench.config.state / "journal.sqlite") as db:
        db.execute("UPDATE runs SET incumbent = 'no object'")
    first, second = page_json(bench.url)["view"], page_json(bench.url)["view"]

    assert "the journal is damaged" in first["problem"]
    assert first["problem"] == second["problem"]
    assert first["run"]["id"] == run.id  # the last one that was read
    assert len(bench.said) == said + 1
    bench.enter(State.RESTORING, "the window was aborted")
    assert page_json(bench.url)["view"]["state"]["word"] == "restoring"

    with sqlite3.connect(bench.config.state / "journal.sqlite") as db:
        db.execute("UPDATE runs SET incumbent = '{}'")
    assert page_json(bench.url)["view"]["problem"] == ""


def test_a_run_whose_configuration_cannot_be_read_is_left_out(bench: PageBench) -> None:
    promote(bench)
    run = bench.tune(600)
    with sqlite3.connect(bench.config.state / "journal.sqlite") as db:
        db.execute("UPDATE runs SET config = '{}' WHERE id = ?", (run.id,))
    view = page_json(bench.url)["view"]

    assert f"run {run.id}: its configuration can't be read" in view["problem"]
    assert (view["run"], view["configuration"]["promotion"]) == (None, 1)


def test_an_error_in_the_view_does_not_end_the_page(bench: PageBench) -> None:
    run = bench.tune(600)
    assert page_json(bench.url)["view"]["run"]["id"] == run.id
    said = len(bench.said)
    damaged = json.dumps({"outcome": "kept", "reason": "", "gain": "much"})
    bench.journal.write("UPDATE runs SET ended_at = 9, decision = ? WHERE id = ?", (damaged, run.id))
    for _ in range(2):
        view = page_json(bench.url)["view"]
        assert "decision: gain: " in view["problem"]
        assert view["run"]["decision"] is None  # the last view that could be made
    assert len(bench.said) == said + 1


def test_a_failure_of_the_page_is_reported_once(bench: PageBench, monkeypatch: pytest.MonkeyPatch) -> None:
    said = len(bench.said)

    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("of the page's own")

    monkeypatch.setattr(event_stream, "_facts", fail)
    promote(bench)
    for _ in range(3):
        assert "ZeroDivisionError" in page_json(bench.url)["view"]["problem"]
    assert bench.said[said:] == ["the page: ZeroDivisionError: of the page's own"]


# Actions


@pytest.mark.parametrize("name", ACTIONS)
@pytest.mark.parametrize("token", [None, "0" * 32, "é" * 32])
def test_an_action_without_the_token_changes_nothing(bench: PageBench, name: str, token: str | None) -> None:
    promote(bench)
    bench.tune(600)
    before = state_of_actions(bench)

    assert act(bench, name, token, promotion=1)[0] == 401
    assert state_of_actions(bench) == before


@pytest.mark.parametrize("name", ACTIONS)
def test_an_action_for_another_controller_changes_nothing(bench: PageBench, name: str) -> None:
    promote(bench)
    bench.tune(600)
    before = state_of_actions(bench)

    status, answer = act(bench, name, promotion=1, epoch=2)
    assert (status, answer["detail"]) == (409, "epoch: 2 is not this controller's, which is 1")
    assert act(bench, name, promotion=1, epoch=0)[0] == 422  # the socket accepts 0 as any controller
    assert state_of_actions(bench) == before


def test_a_superseded_sidecar_refuses_actions(bench: PageBench) -> None:
    with sqlite3.connect(bench.config.state / "journal.sqlite") as db:
        db.execute("INSERT INTO epochs (at, pid) VALUES (1, 1)")

    status, answer = act(bench, "pause")
    assert status == 409
    assert "another sidecar has taken over" in answer["detail"]


def test_pause_and_resume_are_idempotent(bench: PageBench) -> None:
    assert act(bench, "pause", reason="release  week") == (200, {"message": "paused: no window will open"})
    assert page_json(bench.url)["view"]["paused"]["text"] == "release week"
    assert act(bench, "pause", reason="release week") == (200, {"message": "already paused"})
    said = 'already paused; the reason is now "audit", was "release week"'
    assert act(bench, "pause", reason="audit") == (200, {"message": said})
    assert page_json(bench.url)["view"]["paused"]["text"] == "audit"
    assert act(bench, "resume") == (200, {"message": "resumed: windows can open again"})
    assert act(bench, "resume") == (200, {"message": "not paused"})
    assert page_json(bench.url)["view"]["paused"] is None


def test_abort_is_for_a_window(bench: PageBench) -> None:
    assert act(bench, "abort") == (200, {"message": "no window is open: the sidecar is serving"})
    assert not bench.requests.abort.is_set()
    bench.tune(600)
    assert act(bench, "abort")[0] == 200
    assert bench.requests.abort.is_set()


def test_rollback_names_the_promotion(bench: PageBench) -> None:
    promote(bench)
    assert page_json(bench.url)["view"]["configuration"]["promotion"] == 1
    assert act(bench, "rollback", promotion=2)[0] == 409
    assert act(bench, "rollback", promotion=1)[0] == 200
    assert bench.operations.current() is None
    serves = page_json(bench.url)["view"]["configuration"]
    assert (serves["promotion"], serves["name"]) == (None, "the configuration file's arguments")
    assert serves["rolled_back"] == "promotion 1 was rolled back: requested by the operator"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 422), (b"{", 422), (b"[]", 422), (b'{"epoch": "1"}', 422), (b'{"epoch": 1, "more": 1}', 422),
        (b'{"epoch": -1}', 422), (b'{"epoch": 1e400}', 422), (b'{"epoch": 18446744073709551616}', 422),
        (b'{"epoch": 1, "reason": "' + b"x" * 300 + b'"}', 422), (b'{"epoch": 1, "reason": "' + b"x" * 5000, 413),
    ],
)  # fmt: skip
def test_an_invalid_action_is_refused(bench: PageBench, body: bytes, status: int) -> None:
    headers = {**JSON, "Authorization": f"Bearer {bench.token}"}

    assert fetch(f"{bench.url}/api/pause", body, **headers)[0] == status
    assert state_of_actions(bench) == (None, None, False, False)
    assert not [line for line in bench.said if line.startswith("the page: ")]


@pytest.mark.parametrize("path", ["/api/tune", "/api/nothing", "/nothing", "/static/page.js", "/docs"])
def test_other_paths_are_not_found(bench: PageBench, path: str) -> None:
    assert fetch(bench.url + path)[0] in (404, 405)
    headers = {**JSON, "Authorization": f"Bearer {bench.token}"}
    assert fetch(bench.url + path, b'{"epoch": 1}', **headers)[0] in (404, 405, 422)


# Access


@pytest.mark.parametrize("path", ["/", "/page.js", "/api/view", "/api/events"])
def test_a_foreign_host_is_refused(bench: PageBench, path: str) -> None:
    status, _, body = fetch(bench.url + path, Host="evil.example:9465")

    assert (status, b"serving" in body) == (400, False)


def test_names_and_addresses_of_the_page(tmp_path: Path) -> None:
    with page_bench(page_config(tmp_path, page={"hosts": ["Tuner.example", "10.0.0.5", "fe80::1"]})) as bench:

        def status(host: str) -> int:
            return fetch(f"{bench.url}/", Host=host)[0]

        assert {status(host) for host in KNOWN_HOSTS} == {200}
        assert {status(host) for host in UNKNOWN_HOSTS} == {400}


def test_a_page_on_every_interface_is_reached_by_each_address() -> None:
    hosts = allowed_hosts(PageConfig(host="0.0.0.0"))  # noqa: S104 - what is tried
    own = {a.address for found in psutil.net_if_addrs().values() for a in found if a.family == socket.AF_INET}
    assert own | {"localhost", "127.0.0.1", "[::1]"} <= set(hosts)


def test_a_pattern_that_is_no_name_is_refused(tmp_path: Path) -> None:
    config_file = page_config(tmp_path, page={"hosts": ["tuner*.example"]})
    with pytest.raises(ConfigError, match=r"page\.hosts: 'tuner\*\.example': a name such as"), page_bench(config_file):
        pass


def test_a_foreign_host_can_not_act(bench: PageBench) -> None:
    headers = {**JSON, "Authorization": f"Bearer {bench.token}", "Host": "evil.example"}

    assert fetch(f"{bench.url}/api/pause", b'{"epoch": 1}', **headers)[0] == 400
    assert bench.operations.paused() is None


def test_other_pages_can_neither_read_nor_frame_it(bench: PageBench) -> None:
    for path in ("/", "/api/view", "/nothing"):
        _, headers, _ = fetch(bench.url + path, Origin="https://evil.example")
        names = {name.lower() for name in headers}
        assert "default-src 'none'; script-src 'self'" in headers["content-security-policy"]
        assert (headers["x-frame-options"], headers["cross-origin-resource-policy"]) == ("DENY", "same-origin")
        assert not names & {"set-cookie", "server", "access-control-allow-origin"}


def test_the_page_has_no_inline_script_or_style(bench: PageBench) -> None:
    _, _, page = fetch(bench.url + "/")
    _, _, script = fetch(bench.url + "/page.js")

    assert b"<style" not in page
    assert b" on" not in page.replace(b" on ", b"")
    assert page.count(b"<script ") == page.count(b"</script>") == 1
    assert not [word for word in (b"innerHTML", b"outerHTML", b"insertAdjacent", b"eval(", b"cookie") if word in script]


def test_hosts_are_configured_and_a_page_beyond_loopback_is_read_only(tmp_path: Path) -> None:
    page = {"host": "0.0.0.0", "hosts": ["tuner.example"]}  # noqa: S104 - what is tried
    with page_bench(page_config(tmp_path, page=page)) as bench:
        url = bench.url.replace("0.0.0.0", "127.0.0.1")  # noqa: S104 - as above
        assert fetch(f"{url}/", Host="tuner.example")[0] == 200
        assert page_json(url)["view"]["token_file"] == ""
        headers = {**JSON, "Authorization": "Bearer "}
        assert fetch(f"{url}/api/pause", b'{"epoch": 1}', **headers)[0] == 403
        assert not (bench.config.state / "page.token").exists()


# The token


def test_the_token_is_private_and_is_kept(tmp_path: Path) -> None:
    config_file = page_config(tmp_path)
    with page_bench(config_file) as bench:
        first = bench.token
        assert stat.S_IMODE((bench.config.state / "page.token").stat().st_mode) == 0o600
        assert len(first) == 32
        assert not [line for line in bench.said if first in line]
    with page_bench(config_file) as bench:
        assert bench.token == first
        assert act(bench, "pause")[0] == 200


def test_a_token_that_others_can_read_is_not_used(tmp_path: Path) -> None:
    config_file = page_config(tmp_path)
    with page_bench(config_file) as bench:
        path = bench.config.state / "page.token"
    path.chmod(0o644)
    with page_bench(config_file) as bench:
        assert act(bench, "pause")[0] == 401
        assert [line for line in bench.said if "open to others" in line and "actions on the page are disabled" in line]


def test_where_no_token_can_be_written_the_page_is_still_served(tmp_path: Path) -> None:
    config_file = page_config(tmp_path)
    (load_config(config_file).state / ".page.token.new").mkdir(parents=True)  # where the token would be written
    load_config(config_file).state.chmod(0o700)
    with page_bench(config_file) as bench:
        assert page_json(bench.url)["view"]["state"]["word"] == "halted"
        assert [line for line in bench.said if "actions on the page are disabled" in line]


def test_the_operators_own_token(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("operators-own-token-of-32-letters\n")
    path.chmod(0o600)
    config_file = page_config(tmp_path, page={"token": "token"})
    with page_bench(config_file) as bench:
        assert page_json(bench.url)["view"]["token_file"] == str(path)
        assert act(bench, "pause", "operators-own-token-of-32-letters")[0] == 200
    path.write_text("short")
    with pytest.raises(ConfigError, match=r"page\.token: .*token: 32 printable"), page_bench(config_file):
        pass


# Bounds


def test_streams_are_bounded_and_do_not_hold_up_the_end(tmp_path: Path) -> None:
    with ExitStack() as stack:
        with page_bench(page_config(tmp_path)) as bench:
            opened = [_opened(bench) for _ in range(MAX_STREAMS)]
            for response in opened:
                stack.callback(response.close)
                next(events(response))
            assert fetch(f"{bench.url}/api/events")[0] == 503
            assert fetch(f"{bench.url}/api/view")[0] == 200
            opened.pop().close()
            deadline = time.monotonic() + 60
            while (again := fetch_stream(bench)) is None:
                assert time.monotonic() < deadline, "a place that was given up is free again"
            stack.callback(again.close)
            ended = time.monotonic()
        assert time.monotonic() - ended < 30
        assert opened[0].read() != b"", "the last news"


def test_silent_clients_do_not_block_viewers(bench: PageBench) -> None:
    fetch(f"{bench.url}/api/view")  # it is up
    host, port = bench.url.removeprefix("http://").split(":")
    with ExitStack() as stack:
        for _ in range(2):
            for _ in range(http_server.MAX_CONNECTIONS):
                stack.enter_context(socket.create_connection((host, int(port))))
            began = time.monotonic()
            assert fetch(f"{bench.url}/api/view")[0] == 200
            assert time.monotonic() - began < http_server.REQUEST_DEADLINE_S / 2


@pytest.mark.parametrize("more", ["", "Content-Length: 10\r\n"])
@pytest.mark.parametrize("chunks", [5, 100_000])
def test_a_chunked_body_does_not_pass_the_limit(bench: PageBench, chunks: int, more: str) -> None:
    process = psutil.Process()  # the page runs in this one
    before = most = process.memory_info().rss
    host, port = bench.url.removeprefix("http://").split(":")
    head = f"POST /api/pause HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {bench.token}\r\n{more}"
    with socket.create_connection((host, int(port)), timeout=60) as client:
        client.sendall(f"{head}Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        with suppress(ConnectionError):  # the rest is not read
            for _ in range(chunks):
                client.sendall(b"3e8\r\n" + b"x" * 1000 + b"\r\n")
                most = max(most, process.memory_info().rss)
        with suppress(ConnectionError):
            assert client.recv(4096).startswith((b"HTTP/1.1 413", b"HTTP/1.1 400"))
    assert most - before < 30 * 2**20
    assert bench.operations.paused() is None


@pytest.fixture
def short_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "REQUEST_DEADLINE_S", 0.5)


@pytest.mark.usefixtures("short_deadline")
def test_a_viewer_that_does_not_read_is_dropped(bench: PageBench) -> None:
    run = bench.tune(600)
    for number in range(200):
        bench.tried(run, Role.SEARCH, "anneal", None, max_num_seqs=number + 1)
    host, port = bench.url.removeprefix("http://").split(":")
    with socket.socket() as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.connect((host, int(port)))
        lazy.sendall(b"GET /api/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        lazy.settimeout(60)
        assert lazy.recv(1) == b"H"  # the stream has begun
        deadline = time.monotonic() + 60
        while _established(int(port)):
            assert time.monotonic() < deadline, "it still waits for the viewer"
            bench.operations.record(event_stream.EventKind.PAUSED, reason=str(time.monotonic()))
            page_json(bench.url)


def _established(port: int) -> int:
    """How many connections to the server are established."""
    held = [c for c in psutil.Process().net_connections("tcp") if c.laddr and c.laddr[1] == port]
    return sum(c.status == psutil.CONN_ESTABLISHED for c in held)


# The address


def test_a_port_that_is_taken_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config_file = page_config(tmp_path, page={"port": port})
        said = f"page: 127.0.0.1:{port}: Address already in use, by process {os.getpid()}"
        with pytest.raises(OSError, match=said), page_bench(config_file):
            pass


def test_a_disabled_page_is_not_served(tmp_path: Path) -> None:
    with page_bench(write_config(tmp_path, page={"enabled": False, "port": 1}), url="") as bench:
        assert not bench.said
        assert not (bench.config.state / "page.token").exists()


def test_a_run_continues_when_the_page_section_changes(tmp_path: Path) -> None:
    config = load_config(page_config(tmp_path))
    moved = config.model_copy(update={"page": config.page.model_copy(update={"port": 1, "hosts": ["x"]})})
    assert moved.digest() == config.digest()


def test_the_default_is_this_machine_alone() -> None:
    assert (PageConfig().enabled, PageConfig().host, PageConfig().takes_orders) == (True, "127.0.0.1", True)
    hosts = ("localhost", "::1", "0.0.0.0", "::", "10.0.0.5", "x")  # noqa: S104 - a table
    assert [host for host in hosts if PageConfig(host=host).takes_orders] == ["localhost", "::1"]


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"adress": "x"}, "page.adress: unknown field; allowed: enabled, host, port, hosts, token"),
        ({"port": 99999}, "page.port: 99999:"),
        ({"hosts": "x"}, "page.hosts: 'x':"),
        ({"token": "a\0b"}, "page.token: 'a\\x00b' is not a path"),
    ],
)
def test_an_invalid_page_section_is_one_line(tmp_path: Path, section: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write_config(tmp_path, page=section))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_command_starts_without_what_the_page_needs() -> None:
    code = "import sys, sidecar.cli.main; print(*({'fastapi', 'starlette', 'uvicorn'} & set(sys.modules)))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert ended.stdout.split() == []


def _opened(bench: PageBench) -> http.client.HTTPResponse:
    response = fetch_stream(bench)
    assert response is not None
    return response


def fetch_stream(bench: PageBench) -> http.client.HTTPResponse | None:
    """A stream; None if there are too many."""
    connection = http.client.HTTPConnection(bench.url.removeprefix("http://"), timeout=60)
    connection.request("GET", "/api/events")
    response = connection.getresponse()
    if response.status == 200:
        assert response.headers["content-type"].startswith("text/event-stream")
        return response
    assert response.status == 503
    connection.close()
    return None


def _stories(stream: Iterator[tuple[str, dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    return (content for name, content in stream if name == "view")


# The report and the history


def test_the_report_and_the_history_are_pages_of_their_own(bench: PageBench) -> None:
    status, _, body = fetch(f"{bench.url}/report")
    assert (status, b"no tuning run was recorded yet" in body) == (404, True)

    run = bench.tune(600)
    bench.tried(run, Role.BASELINE, "baseline", result(measured()))
    status, headers, body = fetch(f"{bench.url}/report")
    assert status == 200
    assert headers["content-security-policy"].count("default-src") == 1
    assert " sandbox " in headers["content-security-policy"]  # its inline scripts can't act for the page
    assert b'id="decision"' in body
    assert fetch(f"{bench.url}/report")[2] == body

    status, headers, body = fetch(f"{bench.url}/history")
    assert (status, headers["content-type"]) == (200, "text/plain; charset=utf-8")
    assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
    assert b"window" in body
