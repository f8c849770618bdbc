"""The fault matrix: real faults injected into a running sidecar and its engines.

A fault does its damage, performs the recovery that an operator or supervisor would (restarts a killed sidecar, frees a
full disk), and returns what was wrong with the sidecar's reaction.
"""

import os
import random
import resource
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import clock
import psutil
from rig import Rig, Settings
from zygote import Process

from local_agents import local_agent_pid  # isort: skip - the rig makes it importable

ANY = ("starting", "serving", "draining", "tuning", "validating", "promoting", "restoring")
WITH_ENGINE = ("starting", "serving", "tuning", "validating", "promoting", "restoring")
IN_WINDOW = ("draining", "tuning", "validating")
TRIALS = ("tuning", "validating")
STARTS = ("tuning", "validating", "promoting", "restoring")

# A supervisor's stop timeout, longer than a full restore.
GRACE_S = 60.0
ANSWER_S = 10.0
DISK_BYTES = 24 * 2**20

_PLAIN = Settings()

Harm = Callable[[Rig, random.Random], list[str]]


@dataclass(frozen=True)
class Fault:
    """One fault; ``row`` is the name of its row in the matrix."""

    name: str
    row: str
    states: tuple[str, ...]
    harm: Harm
    settings: Settings = _PLAIN
    # Must not disturb a serving engine.
    spares_engine: bool = False
    # Runs the sidecar on a clock that can be made to jump.
    own_clock: bool = False
    # A hook or a client is the fault: the service must be back a second after the engine's own start.
    quick: bool = False


# Processes


def sidecar_killed(rig: Rig, rng: random.Random) -> list[str]:
    kill(rig)
    time.sleep(rng.uniform(0, 0.3))
    rig.start()
    return []


def sidecar_killed_again_and_again(rig: Rig, rng: random.Random) -> list[str]:
    for _ in range(3):
        kill(rig)
        rig.start()
        time.sleep(rng.uniform(0, 0.8))
    return []


def sidecar_stopped(rig: Rig, rng: random.Random) -> list[str]:
    """SIGSTOP: every peer of the sidecar finds its link stalled, and the engine must keep serving."""
    stopped = sidecar(rig)
    served = rig.answers()
    stopped.signal(signal.SIGSTOP)
    began = time.monotonic()
    time.sleep(rng.uniform(0.5, 3))
    still = rig.answers(20) if served and rig.last_state()[1] == "serving" else served
    stopped.signal(signal.SIGCONT)
    if served and not still:
        return [f"the engine did not answer while its sidecar was stopped for {time.monotonic() - began:.1f} s"]
    return []


def terminated(rig: Rig, rng: random.Random) -> list[str]:
    return _terminated(rig, rng, times=1)


def terminated_twice(rig: Rig, rng: random.Random) -> list[str]:
    return _terminated(rig, rng, times=2)


def server_killed(rig: Rig, rng: random.Random) -> list[str]:
    if (engine := rig.engine()) is not None:
        with suppress(psutil.Error):
            engine.kill()
    return []


def core_killed(rig: Rig, rng: random.Random) -> list[str]:
    for process in _below(rig.engine()):
        with suppress(psutil.Error):
            process.kill()
    return []


def engine_stopped(rig: Rig, rng: random.Random) -> list[str]:
    """Stops the whole engine, or only its core, in which case /health stays green."""
    engine = rig.engine()
    stopped = [*_below(engine), *([engine] if engine is not None and rng.random() < 0.5 else [])]
    for process in stopped:
        with suppress(psutil.Error):
            process.suspend()
    return []


def client_killed(rig: Rig, rng: random.Random) -> list[str]:
    agent = local_agent_pid(rig.state)
    for process in psutil.Process(agent or sidecar(rig).pid).children():
        with suppress(psutil.Error):
            if "vllm_sloguard.starts.load_generator" in process.cmdline():
                process.kill()
    return []


# Engines that fail


def out_of_memory_at_start(rig: Rig, rng: random.Random) -> list[str]:
    return _fails(rig, "start.oom", rng.randint(1, 2))


def out_of_memory_under_load(rig: Rig, rng: random.Random) -> list[str]:
    rig.fail("trial.load.oom")
    return []


def dies_under_load(rig: Rig, rng: random.Random) -> list[str]:
    rig.fail("trial.load.die")
    return []


def hangs_at_start(rig: Rig, rng: random.Random) -> list[str]:
    return _fails(rig, "start.hang", 1)


def crash_loop(rig: Rig, rng: random.Random) -> list[str]:
    """The promotion crashes after every restart, until it is rolled back automatically."""
    if not rig.await_serving(rig.settings.duration_s + GRACE_S):
        return ["it did not come up"]
    promoted = rig.answers()
    if promoted == rig.settings.incumbent:
        return ["nothing was promoted"]
    deadline = time.monotonic() + 2 * GRACE_S
    while rig.answers() != rig.settings.incumbent and time.monotonic() < deadline:
        if rig.answers() == promoted:
            server_killed(rig, rng)
        time.sleep(0.05)
    undone = rig.rows("SELECT reason FROM rollbacks")
    return [] if undone else ["it was not rolled back"]


def restore_fails(rig: Rig, rng: random.Random) -> list[str]:
    """Three consecutive starts on the operator's port fail."""
    rig.fail("serving.start.fail", 3)
    return server_killed(rig, rng)


# Files and disks


def disk_full(rig: Rig, rng: random.Random) -> list[str]:
    """Fills the file system of the state folder, which also holds the sidecar's own output."""
    fill = _filled(rig)
    time.sleep(rng.uniform(0.5, 3))
    fill.unlink()
    return _started_again_if_it_ended(rig)


def killed_on_a_full_disk(rig: Rig, rng: random.Random) -> list[str]:
    """The serving engine was started without a journal entry; the next sidecar must still find it."""
    fill = _filled(rig)
    if rig.last_state()[1] == "serving":
        server_killed(rig, rng)
    deadline = time.monotonic() + rng.uniform(1, 4)
    while not rig.answers() and time.monotonic() < deadline:
        time.sleep(0.05)
    kill(rig)
    fill.unlink()
    rig.start()
    return []


def no_byte_written(rig: Rig, rng: random.Random) -> list[str]:
    """Every file write fails (EFBIG, an I/O error to SQLite), in newly started engines too."""
    pid = sidecar(rig).pid
    with suppress(ProcessLookupError):
        before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (1, before[1]))
        time.sleep(rng.uniform(0.5, 3))
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)
    return _started_again_if_it_ended(rig)


def record_torn(rig: Rig, rng: random.Random) -> list[str]:
    """Killed during a write: the journal's write-ahead log ends in a partial record."""
    kill(rig)
    log = rig.state / "journal.sqlite-wal"
    if log.is_file() and (content := log.read_bytes()):
        with log.open("ab") as file:
            file.write(content[-4120:][: rng.randint(1, 4119)])
    rig.start()
    return []


def killed_while_writing(rig: Rig, rng: random.Random) -> list[str]:
    """Killed while writing promoted.yaml."""
    new, deadline = rig.state / ".promoted.yaml.new", time.monotonic() + 20
    while not new.exists() and time.monotonic() < deadline and rig.last_state()[1] in TRIALS:
        stop = time.monotonic() + 0.02
        while not new.exists() and time.monotonic() < stop:
            pass
    return sidecar_killed(rig, rng)


# Mistakes, names that would be flags, secrets, and YAML that grows without end.
_BAD_CONFIGURATIONS = (
    "nonsense: 1\n",
    "slo: {\n",
    "engine: {port: -1}\n",
    "model: --trust-remote-code\n",
    'model: ""\n',
    'model: "a\\nb"\n',
    "engine: {args: {api_ke: secret}}\n",
    "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40)),
    "#" * (4 << 20) + "\n",
)


def bad_configuration(rig: Rig, rng: random.Random) -> list[str]:
    """Must be refused in one line without touching the serving engine; the file is then corrected."""
    good = rig.config_file.read_text()
    kill(rig)
    served = rig.answers()
    rig.config_file.write_text(good + rng.choice(_BAD_CONFIGURATIONS))
    refused = rig.folder / "refused.txt"
    code = rig.command("serve", "-c", str(rig.config_file), output=refused).wait(60)
    wrong = _refused(refused, code, 2)
    if served and not rig.answers(20):
        wrong.append("a bad configuration cost the service")
    rig.config_file.write_text(good)
    rig.start()
    return wrong


def bad_state_files(rig: Rig, rng: random.Random) -> list[str]:
    """A kill, with the sidecar's files other than the journal replaced by noise."""
    kill(rig)
    for name in ("learned.json", "promoted.yaml"):
        if (path := rig.state / name).exists():
            path.write_bytes(rng.randbytes(200))
    rig.start()
    return []


# Sockets, ports and clocks


def socket_removed(rig: Rig, rng: random.Random) -> list[str]:
    """The private socket is deleted: neither telemetry nor operators' requests arrive any more."""
    (rig.state / "sidecar.sock").unlink(missing_ok=True)
    return []


def socket_stale(rig: Rig, rng: random.Random) -> list[str]:
    """A stale socket without a listener is in the next sidecar's place."""
    kill(rig)
    path = rig.state / "sidecar.sock"
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    rig.start()
    return []


def answers_cut(rig: Rig, rng: random.Random) -> list[str]:
    """For a while every engine's responses are cut off halfway."""
    cut = rig.fake / "cut_answers"
    cut.touch()
    time.sleep(rng.uniform(0.3, 2))
    cut.unlink()
    return []


def port_taken(rig: Rig, rng: random.Random) -> list[str]:
    """Another process takes the operator's port for a while, as soon as it is free."""
    if rig.last_state()[1] == "serving":
        server_killed(rig, rng)
    deadline = time.monotonic() + 1
    with socket.socket() as taker:
        taker.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        while time.monotonic() < deadline:
            try:
                taker.bind(("127.0.0.1", rig.port))
            except OSError:
                time.sleep(0.005)
                continue
            # Never accepts, so clients get no answer.
            taker.listen()
            time.sleep(rng.uniform(0.5, 4))
            break
    return _refused_the_port(rig)


def clock_jumps(rig: Rig, rng: random.Random) -> list[str]:
    """One hour forwards or backwards, permanently or for a while."""
    clock.set_seconds(rig.clock, rng.choice((-3600, 3600)))
    time.sleep(rng.uniform(0.5, 2))
    if rng.random() < 0.5:
        clock.set_seconds(rig.clock, 0)
    return []


def second_sidecar(rig: Rig, rng: random.Random) -> list[str]:
    refused = rig.folder / "second.txt"
    command = rng.choice(("serve", "tune"))
    code = rig.command(command, "-c", str(rig.config_file), output=refused).wait(60)
    first = str(sidecar(rig).pid)
    wrong = _refused(refused, code, 2)
    if first not in refused.read_text():
        wrong.append(f"the refusal does not name process {first}: {refused.read_text()[:200]!r}")
    return wrong


def two_sidecars_at_once(rig: Rig, rng: random.Random) -> list[str]:
    """A kill, then two sidecars are started at once: one must be refused."""
    kill(rig)
    both = [rig.start(), rig.start()]
    deadline = time.monotonic() + 60
    while all(one.poll() is None for one in both) and time.monotonic() < deadline:
        time.sleep(0.02)
    left = [one for one in both if one.poll() is None]
    rig.sidecar = left[0] if left else both[0]
    codes = sorted(str(one.poll()) for one in both)
    return [] if codes == ["2", "None"] else [f"of two sidecars at once, exit codes {codes}"]


def window_ends(rig: Rig, rng: random.Random) -> list[str]:
    """A window shorter than its trial: the trial must be cancelled and service restored within the window."""
    ends = rig.rows("SELECT until FROM states WHERE until IS NOT NULL ORDER BY id DESC LIMIT 1")
    if ends:  # until then the service is down as planned
        rig.struck_at = time.monotonic() + ends[0][0] - time.time()
    rig.await_state("serving", rig.last_state()[0], GRACE_S)
    at = rig.rows("SELECT at FROM states WHERE state = 'serving' ORDER BY id DESC LIMIT 1")
    late_s = at[0][0] - ends[0][0] if ends and at else 0.0
    return [f"restored {late_s:.1f} s after the end of the window"] if late_s > rig.bounds.late_s else []


# Building blocks


def sidecar(rig: Rig) -> Process:
    assert rig.sidecar is not None
    return rig.sidecar


def kill(rig: Rig) -> None:
    sidecar(rig).signal(signal.SIGKILL)
    sidecar(rig).wait(60)


def engine_killed(rig: Rig) -> None:
    """Kills the serving engine's first process; the outage counts from here."""
    rig.struck_at = time.monotonic()
    if (engine := rig.engine()) is not None:
        with suppress(psutil.Error):
            engine.kill()


def _below(engine: psutil.Process | None) -> list[psutil.Process]:
    if engine is None:
        return []
    try:
        return engine.children(recursive=True)
    except psutil.Error:
        return []


def _filled(rig: Rig) -> Path:
    fill = rig.state / "fill"
    with suppress(OSError), fill.open("wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 4096)
    return fill


def _fails(rig: Rig, fault: str, times: int) -> list[str]:
    """Makes the next starts fail; kills the serving engine if no start is expected."""
    rig.fail(f"serving.{fault}", times)
    rig.fail(f"trial.{fault}", times)
    if rig.last_state()[1] == "serving" and (engine := rig.engine()) is not None:
        with suppress(psutil.Error):
            engine.kill()
    return []


def _terminated(rig: Rig, rng: random.Random, *, times: int) -> list[str]:
    asked = sidecar(rig)
    for _ in range(times):
        asked.signal(signal.SIGTERM)
        time.sleep(rng.uniform(0, 0.5))
    wrong: list[str] = []
    code = asked.wait(GRACE_S)
    if code != 0:
        wrong.append(f"exit code {code} {GRACE_S:.0f} s after SIGTERM")
        asked.signal(signal.SIGKILL)
        asked.wait(60)
    elif not rig.answers(20):
        wrong.append("no engine serves after SIGTERM")
    time.sleep(rng.uniform(0, 0.3))
    rig.start()
    return wrong


def _started_again_if_it_ended(rig: Rig) -> list[str]:
    """Restarts the sidecar as a supervisor would; it may have exited with one line if it could write nothing."""
    if sidecar(rig).poll() is None:
        return []
    wrong = [f"the sidecar ended with {sidecar(rig).poll()}"]
    rig.start()
    return wrong


def _refused_the_port(rig: Rig) -> list[str]:
    """A first start must fail at once, with one line that names the port's owner; a supervisor then retries."""
    if rig.await_serving(ANSWER_S) or sidecar(rig).poll() is None:
        return []
    last = rig.said().splitlines()[-1]
    owner = f"process {os.getpid()}"
    # If the port was taken after the sidecar's check, vLLM reports it and can't name the owner.
    named = (owner in last and str(rig.port) in last) or rig.starts()
    wrong = [] if named else [f"{last!r} does not name {owner} and port {rig.port}"]
    if rig.rows("SELECT 1 FROM states WHERE state = 'serving'"):
        wrong.append(f"the sidecar ended with {sidecar(rig).poll()}")
    rig.start()
    return wrong


def _refused(said: Path, code: int | None, expected: int) -> list[str]:
    said_lines = said.read_text(errors="replace").splitlines() if said.exists() else []
    lines = [line for line in said_lines if "warning: " not in line]
    wrong = [] if code == expected else [f"exit code {code} instead of {expected}"]
    # Several mistakes of a file have an indented line each.
    unexpected = [line for line in lines[1:] if not line.startswith("  ")]
    return [*wrong, f"more than one line: {unexpected}"] if unexpected or not lines else wrong


_DISK = Settings(disk_bytes=DISK_BYTES)
_LINKED = Settings(telemetry=True)
_SHORT = Settings(duration_s=40.0, load_s=60.0)
_DEAF = Settings(ignore_sigterm=True)
# Long enough for a promotion on a busy machine; the window ends early after its last trial.
_LONG = Settings(duration_s=240.0)

MATRIX = (
    Fault("sidecar killed", "kill -9 of the sidecar", ANY, sidecar_killed, spares_engine=True),
    Fault(
        "sidecar killed three times", "kill -9 of the sidecar", ANY, sidecar_killed_again_and_again, spares_engine=True
    ),
    Fault("API server killed", "kill -9 of EngineCore or a worker", WITH_ENGINE, server_killed),
    Fault("core killed", "kill -9 of EngineCore or a worker", WITH_ENGINE, core_killed),
    Fault("out of memory at start", "out of memory", ("serving", *STARTS), out_of_memory_at_start),
    Fault("out of memory under load", "out of memory", TRIALS, out_of_memory_under_load),
    Fault("dies under load", "kill -9 of EngineCore or a worker", TRIALS, dies_under_load),
    Fault("engine stopped", "hung engine", WITH_ENGINE, engine_stopped),
    Fault("hangs at start", "hung engine", ("serving", *STARTS), hangs_at_start),
    Fault("ignores SIGTERM", "hung engine", ("draining", "tuning"), sidecar_killed, _DEAF),
    Fault("disk full", "disk full, I/O error", ANY, disk_full, _DISK, spares_engine=True),
    Fault("killed on a full disk", "disk full, I/O error", ("serving", *TRIALS), killed_on_a_full_disk, _DISK),
    Fault("I/O error", "disk full, I/O error", ANY, no_byte_written, spares_engine=True),
    Fault("record torn", "torn last record", ANY, record_torn, spares_engine=True),
    Fault("socket removed", "telemetry link cut", ANY, socket_removed, _LINKED, spares_engine=True),
    Fault("sidecar stopped", "telemetry link cut", ANY, sidecar_stopped, _LINKED, spares_engine=True),
    Fault("answers cut", "telemetry link cut", ANY, answers_cut),
    Fault("load client killed", "telemetry link cut", TRIALS, client_killed),
    Fault("clock jump", "clock jump of an hour", ANY, clock_jumps, own_clock=True, spares_engine=True),
    Fault("port taken", "port in use, stale socket", ANY, port_taken),
    Fault("stale socket", "port in use, stale socket", ANY, socket_stale, spares_engine=True),
    Fault("window ends", "window ends during a trial", TRIALS[:1], window_ends, _SHORT),
    Fault("bad configuration", "bad configuration or state file", ANY, bad_configuration, spares_engine=True),
    Fault("bad state files", "bad configuration or state file", ANY, bad_state_files, spares_engine=True),
    Fault("SIGTERM", "SIGTERM in any state", ANY, terminated, spares_engine=True),
    Fault("SIGTERM twice", "SIGTERM in any state", ANY, terminated_twice, spares_engine=True),
    Fault("second sidecar", "a second sidecar", ANY, second_sidecar, spares_engine=True),
    Fault("two sidecars at once", "a second sidecar", ANY, two_sidecars_at_once, spares_engine=True),
    Fault("crash loop", "crash loop after promotion", ("promoting",), crash_loop, _LONG),
    Fault("restore fails", "the restore itself fails", ("serving", "promoting", "restoring"), restore_fails),
    Fault("killed while writing", "kill while a configuration is written", ("validating",), killed_while_writing),
)
