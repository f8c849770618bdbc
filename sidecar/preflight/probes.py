"""Collects the facts that sidecar.preflight.doctor judges. Leaves no process or file behind."""

import http.client
import json
import os
import shutil
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import cast

import grpc
import psutil

from sidecar.config.schema import LONGEST_SOCKET_PATH, Config, ConfigError
from sidecar.format import Say, when
from sidecar.preflight.engine_host import engine_host
from sidecar.preflight.engine_memory import Own, running
from sidecar.preflight.facts import AgentReach, HostFacts, Port, Scrape, SidecarFacts, StateFolderFacts
from sidecar.record import lock
from sidecar.record.journal import JOURNAL_FILE, Journal, JournalError
from sidecar.service import remote_rpc
from vllm_sloguard.agent.engine_http import address, reached_at
from vllm_sloguard.agent.environment_facts import EnvironmentFacts
from vllm_sloguard.agent.environment_probe import ProbeRequest, probe_environment
from vllm_sloguard.agent.grpc_server import EPOCH_METADATA
from vllm_sloguard.agent.ports import port_free, port_owner
from vllm_sloguard.guard.rules.arguments import misspelt
from vllm_sloguard.wire import control_pb2 as pb
from vllm_sloguard.wire.control_pb2_grpc import ControlServiceStub

_ANSWER_TIMEOUT_S = 5.0
_PROBE_BYTES = 2**20
_MAX_ANSWER_BYTES = 2**24
# No controller has this epoch: each refuses the call and reports its own in the trailing metadata.
_NO_EPOCH = 2**63
# Local addresses are never reached through a proxy.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def gather(config: Config | None, prometheus: str, say: Say, *, quick: bool) -> HostFacts:
    """The facts for ``config``, or only about this machine without one; ``quick`` skips importing vLLM."""
    say("looking at the machine")
    if config is None:
        here = probe_environment(ProbeRequest(imports=not quick), sys.executable, os.environ, (), say)
        scrape = Scrape("", False, "", prometheus, _targets(prometheus)[1]) if prometheus else None
        return HostFacts(None, here.vllm, here.devices, here.shm, scrape=scrape)
    journal, error = _journal(config)
    own = _own(journal)
    engines, agent = _engines(config, own, say, quick=quick)
    return HostFacts(
        config_error="",
        vllm=engines and engines.vllm,
        devices=engines and engines.devices,
        shm=engines and engines.shm,
        agent=agent,
        ports=_ports(config, own),
        state=_state(config.state, error),
        link=_link(config, journal),
        scrape=_scrape(config, prometheus),
        model=engines and engines.model,
        hooks=_hooks(config),
        next_window=_next_window(config),
        misspelt=tuple(misspelt(config.engine.args).items()),
    )


def _engines(config: Config, own: Own, say: Say, *, quick: bool) -> tuple[EnvironmentFacts | None, AgentReach | None]:
    """The environment of the engines, and the agent that reports it; neither for a vLLM that is only watched."""
    if config.engine.watch_only:
        return None, None
    agent = config.engine.agent_address
    try:
        with engine_host(config) as host:
            return host.inspect(own, say, imports=not quick), AgentReach(agent) if agent else None
    except (ConfigError, OSError) as error:
        if not agent:
            raise
        return None, AgentReach(agent, str(error))


def _journal(config: Config) -> tuple[Journal | None, str]:
    try:
        return Journal(config.state, read_only=True) if (config.state / JOURNAL_FILE).exists() else None, ""
    except (JournalError, OSError) as error:
        return None, str(error)


def _own(journal: Journal | None) -> Own:
    with suppress(JournalError):
        return running(journal)
    return Own()


def _ports(config: Config, own: Own) -> tuple[Port, ...]:
    holder = _holder(config)
    places = [("metrics.port", config.metrics.host, config.metrics.port)]
    if not config.engine.agent_address and not config.engine.watch_only:  # otherwise it is not for this sidecar
        places.insert(0, ("engine.port", config.engine.host, config.engine.port))
    if config.page.enabled:
        places.append(("page.port", config.page.host, config.page.port))
    if config.remote is not None:
        host, _, port = config.remote.address.rpartition(":")
        places.append(("remote.address", host.strip("[]"), int(port)))
    found: list[Port] = []
    for name, host, port in places:
        if port == 0:  # any free one
            continue
        pids = _listeners(port)
        ours = bool(pids) and pids <= own.pids | ({holder} if holder is not None else set())
        found.append(Port(name, host, port, port_free(host, port), ours, port_owner(port)))
    return tuple(found)


def _listeners(port: int) -> set[int]:
    with suppress(psutil.Error, OSError):
        return {
            c.pid
            for c in psutil.net_connections("tcp")
            if c.laddr and c.laddr[1] == port and c.status == psutil.CONN_LISTEN and c.pid is not None
        }
    return set()


def _holder(config: Config) -> int | None:
    with suppress(OSError):
        return lock.holder(config.state)
    return None


def _state(folder: Path, journal_error: str) -> StateFolderFacts:
    # os.path.exists treats what this user may not see as absent; Path.exists raises.
    nearest = folder
    while not os.path.exists(nearest) and nearest != nearest.parent:  # noqa: PTH110 - as above
        nearest = nearest.parent
    facts = nearest.stat()
    return StateFolderFacts(
        path=str(folder),
        exists=nearest == folder,
        folder=nearest.is_dir(),
        owner=facts.st_uid,
        user=os.geteuid(),
        mode=facts.st_mode & 0o7777,
        write_error=_write_error(nearest),
        free_bytes=shutil.disk_usage(nearest).free,
        journal_error=journal_error,
        socket_bytes=len(os.fsencode(folder / "sidecar.sock")),
        most_socket_bytes=LONGEST_SOCKET_PATH,
    )


def _write_error(folder: Path) -> str:
    """Why a test file of a megabyte can't be written; empty if it can."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _link(config: Config, journal: Journal | None) -> SidecarFacts:
    pid, epoch = _holder(config), 0
    with suppress(JournalError):
        epoch = journal.epoch() if journal is not None else 0
    if pid is None:
        return SidecarFacts(None, epoch, None, "")
    try:
        with remote_rpc.channel(config) as (channel, metadata):
            request = pb.ResumeRequest(epoch=_NO_EPOCH)
            ControlServiceStub(channel).Resume(request, timeout=_ANSWER_TIMEOUT_S, metadata=metadata)
    except grpc.RpcError as error:
        if not isinstance(error, grpc.Call):
            return SidecarFacts(pid, epoch, None, str(error))
        return SidecarFacts(pid, epoch, _own_epoch(error), error.details() or str(error.code()))
    except ConfigError as error:
        return SidecarFacts(pid, epoch, None, str(error))
    return SidecarFacts(pid, epoch, None, "it accepted a call for another controller")


def _own_epoch(refused: grpc.Call) -> int | None:
    """The controller's own epoch, which it sends with its refusal of another one."""
    metadata = cast("Sequence[tuple[str, str]]", refused.trailing_metadata() or ())
    return next((int(value) for key, value in metadata if key == EPOCH_METADATA and value.isdecimal()), None)


def _scrape(config: Config, prometheus: str) -> Scrape:
    url = f"{address(reached_at(config.metrics.host), config.metrics.port)}/metrics"
    # Only `serve` has a metrics page; port 0 is any free port.
    expected = _holder(config) is not None and config.metrics.port != 0
    error = ""
    if expected:
        _, error = _fetched(url, _DIRECT)
    if not prometheus:
        return Scrape(url, expected, error)
    targets, why = _targets(prometheus)
    if why:
        return Scrape(url, expected, error, prometheus, why)
    ours = [(at, health) for at, port, health in targets if port == config.metrics.port]
    if not ours:
        return Scrape(url, expected, error, prometheus)
    # Sidecars on other hosts may have the same port: one that is up is enough.
    at, health = next((target for target in ours if target[1] == "up"), ours[0])
    return Scrape(url, expected, error, prometheus, "", at, health)


def _targets(prometheus: str) -> tuple[list[tuple[str, int | None, str]], str]:
    """Prometheus' targets: address, port and health of each; or why they are unknown."""
    text, why = _fetched(f"{prometheus.rstrip('/')}/api/v1/targets?state=active")
    if why:
        return [], why
    try:
        targets: list[dict[str, str]] = json.loads(text)["data"]["activeTargets"]
        return [(t["scrapeUrl"], urllib.parse.urlsplit(t["scrapeUrl"]).port, _health(t)) for t in targets], ""
    except (ValueError, LookupError, TypeError, AttributeError):
        return [], "the response is not from Prometheus"


def _health(target: dict[str, str]) -> str:
    return f"{target['health']} ({target['lastError']})" if target.get("lastError") else target["health"]


def _fetched(url: str, by: urllib.request.OpenerDirector | None = None) -> tuple[str, str]:
    """The response of ``url``, or why there is none; ``by`` the environment's proxies unless given."""
    if not url.startswith(("http://", "https://")):
        return "", "an address that begins with http:// or https:// is needed"
    try:
        opener = by or urllib.request.build_opener()
        with opener.open(url, timeout=_ANSWER_TIMEOUT_S) as response:
            return response.read(_MAX_ANSWER_BYTES).decode(errors="replace"), ""
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        return "", str(reason)


def _hooks(config: Config) -> tuple[tuple[str, str, bool], ...]:
    hooks = config.window.hooks
    commands = (("window.hooks.before_drain", hooks.before_drain), ("window.hooks.after_restore", hooks.after_restore))
    return tuple((name, words[0], shutil.which(words[0]) is not None) for name, words in commands if words)


def _next_window(config: Config) -> str | None:
    at = config.window.next_opening(time.time())
    if at is None:
        return None
    return f'"{config.window.cron}": the next window opens {when(at)}'
