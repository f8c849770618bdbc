"""The faults between a sidecar and its agent: functions of a rig, which return whether the fault has taken effect."""

import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from agent_invariants import BACK_WITHIN_S, HeldBy
from agent_process import AgentProcess, served_seqs
from service_process import SLOGUARD, at_agent, configured
from weak_link import LinkState, WeakLink

from sidecar.config.schema import Config, load_config
from sidecar.engine.agent_client import journal_id_of
from sidecar.record.journal import Journal, JournalError
from sidecar.record.trial import Trial
from vllm_sloguard.wire import agent_pb2 as pb
from vllm_sloguard.wire.agent_pb2_grpc import AgentServiceStub

LEASE_S = 10.0
BEYOND_THE_LEASE_S = LEASE_S + 4.0
FROZEN_S = 30.0
SLOW_S = 2.0
_LOOK_EVERY_S = 0.2


class LeaseObserver:
    """Notes who has an agent's lease, for as long as the agent can be asked."""

    def __init__(self, agent: AgentProcess) -> None:
        self._agent = agent
        self._ended = threading.Event()
        self.holders: list[HeldBy] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with grpc.insecure_channel(self._agent.address.replace("unix://", "unix:")) as channel:
            stub = AgentServiceStub(channel)
            while not self._ended.wait(_LOOK_EVERY_S):
                try:
                    found = stub.Describe(pb.DescribeRequest(), timeout=5)
                except grpc.RpcError:
                    continue
                if found.lease_left_seconds > 0:
                    holder = HeldBy(found.controller.journal_id, found.controller.epoch)
                    if self.holders[-1:] != [holder]:
                        self.holders.append(holder)

    def close(self) -> None:
        self._ended.set()
        self._thread.join(10)


@dataclass
class AgentRig:
    """A sidecar with its agent; after a fault, ``current`` is the configuration of the sidecar that has to serve."""

    config_file: Path
    config: Config
    agent: AgentProcess
    link: WeakLink
    sidecar: "subprocess.Popen[bytes]"
    current: Config
    others: list["subprocess.Popen[bytes]"] = field(default_factory=list["subprocess.Popen[bytes]"])

    def start_sidecar(self, config_file: Path) -> "subprocess.Popen[bytes]":
        log = config_file.parent / "sidecar.log"
        with log.open("ab") as output:
            command = [*SLOGUARD, "serve", "-c", str(config_file)]
            return subprocess.Popen(command, stdout=output, stderr=output)

    def restart_sidecar(self) -> None:
        self.sidecar = self.start_sidecar(self.config_file)

    def kill_sidecar(self) -> bool:
        self.sidecar.kill()
        return self.sidecar.wait(30) == -signal.SIGKILL

    def kill_agent(self) -> bool:
        return self.agent.end(signal.SIGKILL) == -signal.SIGKILL

    def second_config(self) -> Path:
        """The configuration of another sidecar, with its own state folder, for the same service."""
        folder = self.config_file.parent / "second"
        folder.mkdir(exist_ok=True)
        return at_agent(configured(folder, budget=3), self.agent.address, agent_lease_s=LEASE_S, port=self.port)

    @property
    def port(self) -> int:
        return self.config.engine.port

    @property
    def expected_holder(self) -> str:
        return journal_id_of(self.current.state)

    def trials(self) -> list[Trial]:
        try:
            return Journal(self.config.state, read_only=True).trials()
        except JournalError:
            return []

    def close(self) -> None:
        for process in (self.sidecar, *self.others):
            process.kill()
            process.wait()
        self.agent.clean_up()
        self.link.close()


AgentFault = Callable[[AgentRig, random.Random], bool]


def until(holds: Callable[[], object], within_s: float) -> float | None:
    """Seconds until ``holds``; None if it does not."""
    began = time.monotonic()
    while time.monotonic() - began < within_s:
        if holds():
            return time.monotonic() - began
        time.sleep(0.1)
    return None


def _sidecar_killed(rig: AgentRig, rng: random.Random) -> bool:
    struck = rig.kill_sidecar()
    time.sleep(rng.uniform(0, 1))
    rig.restart_sidecar()
    return struck


def _sidecar_gone(rig: AgentRig, _rng: random.Random) -> bool:
    struck = rig.kill_sidecar()
    until(lambda: served_seqs(rig.port), BACK_WITHIN_S)
    rig.restart_sidecar()
    return struck


def _agent_killed(rig: AgentRig, rng: random.Random) -> bool:
    struck = rig.kill_agent()
    time.sleep(rng.uniform(0, 1))
    rig.agent.start()
    return struck


def _agent_and_sidecar_killed(rig: AgentRig, rng: random.Random) -> bool:
    struck = rig.kill_agent() and rig.kill_sidecar()
    time.sleep(rng.uniform(0, 1))
    rig.agent.start()
    rig.restart_sidecar()
    return struck


def _engine_killed(rig: AgentRig, _rng: random.Random) -> bool:
    return until(lambda: _signalled(rig.agent.engine_pids()[:1], signal.SIGKILL), 20.0) is not None


def _signalled(pids: list[int], number: signal.Signals) -> bool:
    """Whether all of ``pids``, and at least one, were there to be signalled."""
    try:
        for pid in pids:
            os.kill(pid, number)
    except ProcessLookupError:
        return False
    return bool(pids)


def _link(state: LinkState) -> AgentFault:
    def strike(rig: AgentRig, rng: random.Random) -> bool:
        before = rig.link.lost
        rig.link.become(state)
        time.sleep(rng.choice((1.0, BEYOND_THE_LEASE_S)))
        # Whatever the sidecar is doing, it renews the lease.
        struck = until(lambda: rig.link.lost > before, LEASE_S) is not None
        rig.link.become(LinkState.WHOLE)
        return struck

    return strike


def _link_slow(rig: AgentRig, _rng: random.Random) -> bool:
    before = rig.link.delayed
    rig.link.delay_s = SLOW_S
    time.sleep(10)
    rig.link.delay_s = 0.0
    return rig.link.delayed > before


def _frozen(pids: list[int], seconds: float) -> bool:
    struck = _signalled(pids, signal.SIGSTOP)
    time.sleep(seconds)
    for pid in pids:
        _signalled([pid], signal.SIGCONT)
    return struck


def _agent_frozen(rig: AgentRig, _rng: random.Random) -> bool:
    return _frozen([rig.agent.pid], FROZEN_S)


def _host_frozen(rig: AgentRig, _rng: random.Random) -> bool:
    return _frozen([rig.agent.pid, *rig.agent.engine_pids()], FROZEN_S)


def _sidecar_stale(rig: AgentRig, _rng: random.Random) -> bool:
    return _frozen([rig.sidecar.pid], BEYOND_THE_LEASE_S)


def _sidecar_replaced(rig: AgentRig, _rng: random.Random) -> bool:
    """Another state folder's sidecar takes the agent of a stale one, which then comes back."""
    stale = rig.sidecar
    _signalled([stale.pid], signal.SIGSTOP)
    time.sleep(BEYOND_THE_LEASE_S)
    path = rig.second_config()
    rig.current = load_config(path)
    rig.others.append(stale)
    rig.sidecar = rig.start_sidecar(path)
    took = until(lambda: _state_folder_serves(rig.current), 60.0) is not None
    _signalled([stale.pid], signal.SIGCONT)
    time.sleep(5.0)  # what it would do, it does at once
    stale.terminate()
    try:
        stale.wait(60)
    except subprocess.TimeoutExpired:
        return False
    return took


def _state_folder_serves(config: Config) -> bool:
    try:
        record = Journal(config.state, read_only=True).state()
    except JournalError:
        return False
    return record is not None and record.state == "serving"


def _second_sidecar_refused(rig: AgentRig, _rng: random.Random) -> bool:
    """Another state folder's sidecar comes while the first one has the agent."""
    second = rig.start_sidecar(rig.second_config())
    try:
        refused = second.wait(60) == 1
    except subprocess.TimeoutExpired:
        second.kill()
        second.wait()
        return False
    said = (rig.config_file.parent / "second" / "sidecar.log").read_text()
    return refused and "the sidecar of another state folder has the agent" in said


AGENT_FAULTS: dict[str, AgentFault] = {
    "sidecar killed": _sidecar_killed,
    "sidecar gone": _sidecar_gone,
    "agent killed": _agent_killed,
    "agent and sidecar killed": _agent_and_sidecar_killed,
    "engine killed": _engine_killed,
    "link cut": _link(LinkState.CUT),
    "link silent": _link(LinkState.SILENT),
    "link half-closed": _link(LinkState.HALF_CLOSED),
    "link slow": _link_slow,
    "agent frozen": _agent_frozen,
    "host frozen": _host_frozen,
    "stale sidecar": _sidecar_stale,
    "stale sidecar replaced": _sidecar_replaced,
    "second sidecar": _second_sidecar_refused,
}
