"""Compares ordinary and forked starts of real vLLM, and checks that many forked starts leave nothing behind."""

import dataclasses
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from sidecar.config.schema import Config
from sidecar.engine.engine import Engine, EngineProcesses, Launch
from sidecar.format import Say
from vllm_sloguard.agent.fork_client import ForkServer
from vllm_sloguard.agent.ports import any_free_port
from vllm_sloguard.agent.process_group import socket_folder
from vllm_sloguard.starts.fork_protocol import ServerUsage


@dataclass(frozen=True)
class Left:
    """What is left after many starts and stops; the pairs are for the fork server, early and at the end."""

    starts: int
    processes: int
    socket_folders: int
    shared_memory: int
    descriptors: tuple[int, int]
    threads: tuple[int, int]
    resident_bytes: tuple[int, int]


@dataclass(frozen=True)
class StartTimes:
    """Seconds from the start to the first token; ``warm_up_s`` is the first forked start, including imports."""

    ordinary_s: tuple[float, ...]
    forked_s: tuple[float, ...]
    warm_up_s: float
    left: Left | None

    @property
    def times_faster(self) -> float:
        """Median against median."""
        return statistics.median(self.ordinary_s) / statistics.median(self.forked_s)


def measure_starts(config: Config, times: int, in_a_row: int, say: Say) -> StartTimes:
    """``times`` starts each way, alternating, then ``in_a_row`` forked ones.

    Raises EngineCrashed, ForkServerError, OSError.
    """
    with tempfile.TemporaryDirectory(prefix="sloguard-bench-") as name:
        folder = Path(name)
        environment = {**os.environ, **config.engine.env}
        server = ForkServer(config.engine.python, environment, folder, folder / "fork-server.log")
        try:
            # Two: the first teaches the server what engines import.
            warm_up_s = start(config, folder, server).seconds
            start(config, folder, server)
            say(f"first forked start, imports included: {warm_up_s:.1f} s")
            ordinary: list[float] = []
            forked: list[float] = []
            for number in range(times):
                ordinary.append(start(config, folder, None).seconds)
                forked.append(start(config, folder, server).seconds)
                say(f"{number + 1} of {times}: ordinary {ordinary[-1]:.2f} s, forked {forked[-1]:.2f} s")
            left = _row(config, folder, server, in_a_row, say) if in_a_row else None
            return StartTimes(tuple(ordinary), tuple(forked), warm_up_s, left)
        finally:
            server.close()


@dataclass(frozen=True)
class Ended:
    """One start and its stop."""

    seconds: float
    group: EngineProcesses
    shared_memory: frozenset[str]  # files mapped by its processes


def start(config: Config, folder: Path, server: ForkServer | None) -> Ended:
    """Starts ``config``'s engine, forked if there is a ``server``, to its first token, and ends it.

    Raises EngineCrashed, ForkServerError, OSError.
    """
    engine_id = os.urandom(6).hex()
    env = {**config.engine.env, "SLOGUARD_IMPORTS": str(folder)}
    host, log = "127.0.0.1", folder / f"{engine_id}.log"
    args = dict(config.engine.args)
    launch = Launch(engine_id, config.engine.python, config.model, args, host, any_free_port(), env, log)
    began = time.monotonic()
    engine = Engine.start(launch, server)
    try:
        engine.wait_ready(config.engine.start_timeout_s, lambda: False)
        seconds = time.monotonic() - began
        mapped = frozenset(path for member in engine.group.members() for path in _mapped(member))
    finally:
        engine.group.kill()
    return Ended(seconds, engine.group, mapped)


def _mapped(process: psutil.Process) -> set[str]:
    try:
        return {region.path for region in process.memory_maps() if region.path.startswith("/dev/shm/")}  # noqa: S108
    except psutil.Error:
        return set()


def _row(config: Config, folder: Path, server: ForkServer, count: int, say: Say) -> Left:
    ended = [start(config, folder, server)]
    early, tenth = server.usage, max(count // 10, 1)
    for number in range(1, count):
        ended.append(start(config, folder, server))
        if (number + 1) % tenth == 0:
            say(f"{number + 1} of {count} forked starts: {_shown(server.usage)}")
    now = server.usage
    assert early is not None
    assert now is not None
    return Left(
        starts=count,
        processes=sum(len(one.group.members()) for one in ended),
        socket_folders=sum(socket_folder(one.group.identity.engine_id).exists() for one in ended),
        shared_memory=sum(Path(path).exists() for one in ended for path in one.shared_memory),
        descriptors=(early.descriptors, now.descriptors),
        threads=(early.threads, now.threads),
        resident_bytes=(early.resident_bytes, now.resident_bytes),
    )


def _shown(usage: ServerUsage | None) -> str:
    if usage is None:
        return "nothing was forked"
    return f"{usage.descriptors} descriptors, {usage.resident_bytes / 2**20:.0f} MiB in the fork server"


def as_dict(starts: StartTimes) -> dict[str, object]:
    """With the ratio of the medians."""
    return {**dataclasses.asdict(starts), "times_faster": starts.times_faster}


def as_text(starts: StartTimes) -> str:
    """A few lines."""
    lines = [
        f"{name}: median {statistics.median(values):.2f} s, {min(values):.2f} to {max(values):.2f} s"
        for name, values in (("ordinary", starts.ordinary_s), ("forked", starts.forked_s))
    ]
    lines.append(f"forked is {starts.times_faster:.1f} times faster to the first token")
    if (left := starts.left) is not None:
        memory = " → ".join(f"{size / 2**20:.0f}" for size in left.resident_bytes)
        lines.append(
            f"after {left.starts} forked starts and stops: {left.processes} processes, {left.socket_folders} folders"
            f" with sockets, {left.shared_memory} pieces of shared memory left; in the fork server"
            f" {left.descriptors[0]} → {left.descriptors[1]} descriptors, {left.threads[1]} thread, {memory} MiB"
        )
    return "\n".join(lines)
