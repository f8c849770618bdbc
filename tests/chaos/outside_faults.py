"""Faults from outside the engine and the sidecar: clients, hooks, files, other processes, clocks, operators."""

import json
import random
import resource
import shutil
import sqlite3
import sys
import threading
import time
from contextlib import closing, suppress
from dataclasses import dataclass, field

import clock
import grpc
import invariants
import psutil
from faults import ANY, GRACE_S, Fault, engine_killed, kill, sidecar
from foreign_server import HANDLER
from rig import MODEL, Rig, Settings

from vllm_sloguard.agent.process_identity import boot_id, started_s
from vllm_sloguard.hooks.telemetry_client import unix_target
from vllm_sloguard.wire import control_pb2 as pb
from vllm_sloguard.wire.control_pb2_grpc import ControlServiceStub

AFTER_A_WINDOW = ("serving", "tuning", "validating", "promoting", "restoring")

_SLOW_CLIENTS = 1100
_DESCRIPTORS = 1024
# Connects argv[2] clients to port argv[1]; each sends a byte every four seconds, and connects again when it is dropped.
SLOW = """
import pathlib, resource, socket, sys, time
port, count, done = int(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3])
resource.setrlimit(resource.RLIMIT_NOFILE, (4096, max(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1])))
clients = [None] * count
while True:
    began = time.monotonic()
    for at in range(count):
        try:
            if clients[at] is None:
                clients[at] = socket.create_connection(("127.0.0.1", port), 2)
            clients[at].sendall(b"G")
        except OSError:
            clients[at] = None
    done.touch()
    time.sleep(max(began + 4 - time.monotonic(), 0.5))
"""
# A foreign server on port argv[1], once that is free.
FOREIGN = f"""{HANDLER}
import pathlib, time
deadline = time.monotonic() + 8
while time.monotonic() < deadline:
    try:
        server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
    except OSError:
        time.sleep(0.005)
        continue
    pathlib.Path(sys.argv[3]).touch()
    server.serve_forever()
pathlib.Path(sys.argv[3]).with_suffix(".late").touch()
time.sleep(600)
"""


# Clients and hooks: the service must be back within the engine's own start and a second


def slow_clients(rig: Rig, rng: random.Random) -> list[str]:
    """1,100 slow connections to /metrics, with 1,024 descriptors for the sidecar; then the engine is killed."""
    pid, done = sidecar(rig).pid, rig.folder / "connected"
    with suppress(ProcessLookupError):
        hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)[1]
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (_DESCRIPTORS, hard))
    rig.bystander(sys.executable, "-c", SLOW, str(rig.metrics_port), str(_SLOW_CLIENTS), str(done))
    if not rig.await_true(done.exists, GRACE_S) or not rig.await_serving(GRACE_S):
        return ["it does not serve while clients are slow"]
    engine_killed(rig)
    wrong = [] if rig.await_true(rig.ready, GRACE_S) else ["/ready does not answer while clients are slow"]
    return [*wrong, *_orders_work(rig)]


def restore_hook_hangs(rig: Rig, rng: random.Random) -> list[str]:
    """The engine is killed while ``after_restore`` hangs."""
    # The hook of the last window may be about to run; another window would be down as planned.
    idle = rig.last_state()[1] == "serving" and not rig.await_true(lambda: bool(rig.hook_processes()), 1.0)
    if idle and (said := rig.retune()):
        return [f"no window: {said}"]
    if not rig.await_true(lambda: bool(rig.hook_processes()), 2 * GRACE_S) or not rig.await_serving(GRACE_S):
        return ["after_restore did not run"]
    time.sleep(rng.uniform(0, 1))
    engine_killed(rig)
    return []


def drain_hook_hangs(rig: Rig, rng: random.Random) -> list[str]:
    """``before_drain`` hangs: the window is refused, or the engine is killed meanwhile and restarted."""
    if not rig.await_true(lambda: bool(rig.hook_processes()), GRACE_S):
        return ["before_drain did not run"]
    if rng.random() < 0.5:
        engine_killed(rig)
        return []
    ended = rig.await_true(lambda: bool(_window_outcomes(rig)), GRACE_S)
    return [] if ended and _window_outcomes(rig) == ["refused"] else [f"windows ended {_window_outcomes(rig)}"]


def hook_leaves_a_child(rig: Rig, rng: random.Random) -> list[str]:
    """``before_drain`` succeeds and leaves a child that holds its output open; later the engine is killed."""
    if not rig.await_true(lambda: bool(_window_outcomes(rig)), 2 * GRACE_S) or not rig.await_serving(GRACE_S):
        return ["the window did not end"]
    wrong = ["the window was refused"] if "refused" in _window_outcomes(rig) else []
    [child] = rig.hook_processes()
    engine_killed(rig)
    if not rig.await_serving(GRACE_S) or not psutil.pid_exists(child):
        wrong.append("the hook's child was killed")
    return wrong


# Files


def journal_locked(rig: Rig, rng: random.Random) -> list[str]:
    """Another process holds the journal's lock for a while, and the engine may crash meanwhile."""
    crash = rig.last_state()[1] == "serving" and rng.random() < 0.7
    with closing(sqlite3.connect(rig.state / "journal.sqlite", isolation_level=None, timeout=20)) as other:
        other.execute("BEGIN EXCLUSIVE")
        if crash:
            engine_killed(rig)
        time.sleep(rng.uniform(1, 10))
        other.execute("ROLLBACK")
    recorded = not crash or rig.await_true(lambda: bool(rig.rows("SELECT 1 FROM events WHERE kind = 'crash'")), GRACE_S)
    wrong = [] if recorded else ["the crash was never recorded"]
    rig.await_serving(2 * GRACE_S)
    return [*wrong, *(["the window failed"] if "failed" in _window_outcomes(rig) else [])]


def journal_restored(rig: Rig, rng: random.Random) -> list[str]:
    """The journal is replaced by an older copy, or by its main file alone: the serving engine must live."""
    older = rig.folder / "older.sqlite"
    how = rng.choice(("backup", "main file", "none"))
    if how == "backup":
        said = rig.folder / "backup.txt"
        code = rig.command("backup", str(rig.state), str(older), output=said).wait(60)
        if code != 0:
            return [f"sloguard backup: {said.read_text()[:200]}"]
        time.sleep(rng.uniform(0, 3))
    before, engine = rig.last_state()[1], rig.engine()
    kill(rig)
    served = rig.answers() if before == "serving" else 0
    with rig.journal_changed_by_the_operator(loses=True):
        if how == "main file":
            shutil.copy(rig.state / "journal.sqlite", older)
        for path in rig.state.glob("journal.sqlite*"):
            path.unlink()
        if how != "none":
            shutil.copy(older, rig.state / "journal.sqlite")
    rig.start()
    if not rig.await_serving(2 * GRACE_S):
        return []  # which is reported below, with the rest
    wrong: list[str] = []
    if served and engine is not None and (not engine.is_running() or rig.answers() != served):
        wrong.append(f"{how}: the engine that served was ended")
    if rig.answers() != invariants.expected_seqs(rig) and (running := _on_port(rig.port)) is not None:
        # As `sloguard status` asks for: the operator ends the engine that the journal does not know.
        running.terminate()
    return wrong


def log_deleted(rig: Rig, rng: random.Random) -> list[str]:
    """The write-ahead log and its index are deleted while they are in use."""
    restored = rig.said().count("the journal is restored")
    with rig.journal_changed_by_the_operator(loses=False):
        names = [name for name in ("journal.sqlite-wal", "journal.sqlite-shm") if (rig.state / name).exists()]
        for name in names:
            (rig.state / name).unlink()
        if names and not rig.await_true(lambda: rig.said().count("the journal is restored") > restored, GRACE_S):
            return [f"{names} deleted: nothing in the log"]
        time.sleep(0.2)
    return _orders_work(rig)


def row_of_another_process(rig: Rig, rng: random.Random) -> list[str]:
    """A recorded engine's pid is now somebody else's session, after a reboot or a reused pid."""
    kill(rig)
    other = rig.bystander("sleep", "600")
    proof = rng.choice(
        (
            (started_s(other.pid), "the boot before"),
            (started_s(other.pid) * rng.uniform(0.1, 0.9), boot_id()),
            (started_s(other.pid), ""),  # of an older version, which did not record the boot
        )
    )
    role = rng.choice(("serving", "trial"))
    launch = json.dumps({"log": str(rig.state / "logs" / "engine-00000000000a.log")})
    with closing(sqlite3.connect(rig.state / "journal.sqlite", isolation_level=None, timeout=20)) as journal:
        journal.execute(
            "INSERT INTO engines (engine_id, role, pid, started_at, launch, boot_id) VALUES (?, ?, ?, ?, ?, ?)",
            ("00000000000a", role, other.pid, proof[0], launch, proof[1]),
        )
    rig.start()
    rig.await_serving(2 * GRACE_S)
    return []


# Ports, clocks and actions


def foreign_server(rig: Rig, rng: random.Random) -> list[str]:
    """Another server binds the port before the engine does, and answers as vLLM would."""
    bound, old = rig.folder / "foreign", rig.engine()
    if rig.last_state()[1] == "serving":
        engine_killed(rig)
        if rng.random() < 0.6:  # between the sidecar's check and the engine's bind
            rig.await_true(lambda: (new := rig.engine()) is not None and (old is None or new.pid != old.pid), 5)
    name = str(MODEL) if rng.random() < 0.5 else "another"
    foreign = rig.bystander(sys.executable, "-c", FOREIGN, str(rig.port), name, str(bound))
    if not rig.await_true(bound.exists, 10):
        return []
    last, deadline, wrong = rig.last_state()[0], time.monotonic() + rng.uniform(0.5, 4), list[str]()
    while time.monotonic() < deadline:
        number, state = rig.last_state()
        if number > last and state == "serving" and rig.ready():
            wrong.append("serving while a foreign server holds the port")
            break
        time.sleep(0.05)
    if foreign.poll() is not None:
        wrong.append("the foreign server was killed")
    rig.bystanders.remove(foreign)
    foreign.kill()
    foreign.wait()
    return wrong


def clock_over_windows(rig: Rig, rng: random.Random) -> list[str]:
    """The clock jumps to, over and away from times at which windows are due, or the service is busy then."""
    action = rng.choice((_hours_ahead, _hours_back, _half_a_day_and_back, _to_a_window, _busy, _asked_for, _away))
    action(rig, rng)
    rig.await_serving(2 * GRACE_S)
    return []


def _hours_ahead(rig: Rig, rng: random.Random) -> None:
    rig.jump(6 * 3600 + rng.uniform(0, 60))


def _hours_back(rig: Rig, rng: random.Random) -> None:
    rig.jump(-3600 + rng.uniform(0, 60))


def _half_a_day_and_back(rig: Rig, rng: random.Random) -> None:
    rig.jump(12 * 3600, counts=False)
    time.sleep(rng.uniform(0, 4))
    rig.jump(-12 * 3600)


def _to_a_window(rig: Rig, rng: random.Random) -> None:
    """From just before one is due to when it is too late."""
    rig.jump(60 - rig.wall() % 60 + rng.uniform(-3, 12))
    time.sleep(4)


def _busy(rig: Rig, rng: random.Random) -> None:
    """A restart runs when one is due."""
    rig.fail("serving.start.fail", rng.randint(0, 2))
    rig.jump(60 - rig.wall() % 60 - 1)
    engine_killed(rig)
    time.sleep(4)


def _asked_for(rig: Rig, rng: random.Random) -> None:
    """A window that an operator asked for runs when one is due."""
    rig.jump(60 - rig.wall() % 60 - 2)
    rig.retune()
    time.sleep(3)


def _away(rig: Rig, rng: random.Random) -> None:
    """No sidecar runs when some are due."""
    kill(rig)
    rig.jump(rng.uniform(30, 600))
    rig.start(clock.environment(rig.clock))


@dataclass
class _Answers:
    """The reasons of the pauses that were answered without a window in progress; the retunes that were accepted."""

    paused: list[str] = field(default_factory=list[str])
    retunes: int = 0


def actions_race(rig: Rig, rng: random.Random) -> list[str]:
    """Operators ask for windows, pause, resume and abort at the same time."""
    answers, deadline = _Answers(), time.monotonic() + rng.uniform(2, 5)
    with grpc.insecure_channel(unix_target(str(rig.state / "sidecar.sock"))) as channel:
        stub = ControlServiceStub(channel)
        people = [random.Random(rng.random()) for _ in range(4)]
        threads = [threading.Thread(target=_gives_orders, args=(stub, one, answers, deadline)) for one in people]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with suppress(grpc.RpcError):
            stub.Resume(pb.ResumeRequest(), timeout=20)
    open_actions = "SELECT kind FROM orders WHERE outcome IN ('pending', 'started')"
    rig.await_true(lambda: not rig.rows(open_actions), 2 * GRACE_S)
    wrong = [f"the action {kind} has no outcome" for (kind,) in rig.rows(open_actions)]
    kept = rig.rows("SELECT count(*) FROM orders WHERE kind = 'retune' AND outcome != 'refused'")[0][0]
    if kept < answers.retunes:
        wrong.append(f"{answers.retunes} windows were accepted, and {kept} are recorded")
    return [*wrong, *(f"a window opened during the pause {why!r}" for why in answers.paused if _opened_in(rig, why))]


def _opened_in(rig: Rig, pause: str) -> bool:
    """Whether a window opened between the pause of that reason and its end."""
    query = (
        "SELECT 1 FROM events w JOIN events p ON p.kind = 'paused' AND json_extract(p.content, '$.reason') = ?"
        " WHERE w.kind = 'window_opened' AND w.id > p.id"
        " AND w.id < coalesce((SELECT min(id) FROM events WHERE kind = 'resumed' AND id > p.id), w.id + 1)"
    )
    return bool(rig.rows(query, pause))


def _gives_orders(stub: ControlServiceStub, rng: random.Random, answers: _Answers, deadline: float) -> None:
    while time.monotonic() < deadline:
        time.sleep(rng.uniform(0, 0.3))
        with suppress(grpc.RpcError):  # a refusal
            match rng.choice(("retune", "retune", "pause", "resume", "abort")):
                case "retune":
                    stub.Retune(pb.RetuneRequest(duration_seconds=15), timeout=20)
                    answers.retunes += 1
                case "pause":
                    reason = f"release {rng.random()}"
                    said = stub.Pause(pb.PauseRequest(reason=reason), timeout=20)
                    if "in progress" not in said.summary and "already" not in said.summary:
                        answers.paused.append(reason)
                case "resume":
                    stub.Resume(pb.ResumeRequest(), timeout=20)
                case _:
                    stub.Abort(pb.AbortRequest(), timeout=20)


# Building blocks


def _orders_work(rig: Rig) -> list[str]:
    wrong: list[str] = []
    for command in ("pause", "resume"):
        said = rig.folder / f"{command}.txt"
        if (code := rig.command(command, "-c", str(rig.config_file), output=said).wait(60)) != 0:
            wrong.append(f"{command} ended with {code}: {said.read_text()[:200]}")
    return wrong


def _window_outcomes(rig: Rig) -> list[str]:
    rows = rig.rows("SELECT json_extract(content, '$.outcome') FROM events WHERE kind = 'window_ended' ORDER BY id")
    return [outcome for (outcome,) in rows]


def _on_port(port: int) -> psutil.Process | None:
    for connection in psutil.net_connections("tcp"):
        if connection.laddr and connection.laddr[1] == port and connection.status == psutil.CONN_LISTEN:
            with suppress(psutil.Error):
                return psutil.Process(connection.pid)
    return None


_HANGS = 'echo $$ > "$0/hook.pid"; exec sleep 300'
_LEAVES = 'sleep 300 & echo $! > "$0/child.pid"; echo done'
_EVERY_MINUTE = Settings(cron="* * * * *")

OUTSIDE = (
    Fault("slow clients", "slow clients", ("serving", "tuning"), slow_clients, quick=True),
    Fault(
        "restore hook hangs",
        "hooks",
        AFTER_A_WINDOW,
        restore_hook_hangs,
        Settings(after_restore=_HANGS),
        quick=True,
    ),
    Fault(
        "drain hook hangs",
        "hooks",
        ("draining",),
        drain_hook_hangs,
        Settings(before_drain=_HANGS, hook_timeout_s=4.0),
        quick=True,
    ),
    Fault(
        "hook leaves a child",
        "hooks",
        ("draining", "tuning"),
        hook_leaves_a_child,
        Settings(before_drain=_LEAVES),
        quick=True,
    ),
    Fault("journal locked", "journal locked", ANY, journal_locked),
    Fault("journal restored", "older journal", ANY, journal_restored),
    Fault("log deleted", "WAL and shm deleted", ANY, log_deleted, spares_engine=True),
    Fault("row of another process", "reused pid", ANY, row_of_another_process, spares_engine=True),
    Fault(
        "foreign server",
        "foreign server on the port",
        ("serving", "tuning", "promoting", "restoring"),
        foreign_server,
        Settings(start_s=1.0),
    ),
    Fault("clock over windows", "windows", ("serving", "tuning"), clock_over_windows, _EVERY_MINUTE, own_clock=True),
    Fault("actions race", "windows", ("serving", "draining", "tuning"), actions_race),
)
