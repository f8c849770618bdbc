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
from sidecar.preflight.engine_memory import Own, running
from sidecar.preflight.facts import (
    SHM,
    Devices,
    HostFacts,
    Imports,
    ModelFacts,
    Port,
    Scrape,
    Shm,
    SidecarFacts,
    StateFolderFacts,
    VllmFacts,
)
from sidecar.preflight.python_env import UnusablePythonError, answer, packages
from sidecar.record import lock
from sidecar.record.journal import JOURNAL_FILE, Journal, JournalError
from sidecar.service import remote_rpc
from vllm_sloguard import __version__
from vllm_sloguard.agent.engine_http import address, reached_at
from vllm_sloguard.agent.fork_client import ForkServer, ForkServerError
from vllm_sloguard.agent.grpc_server import EPOCH_METADATA
from vllm_sloguard.agent.ports import port_free, port_owner
from vllm_sloguard.guard import gpus, machine, model_shape
from vllm_sloguard.guard.rules.arguments import misspelt
from vllm_sloguard.guard.start_history import ranks_of
from vllm_sloguard.wire import control_pb2 as pb
from vllm_sloguard.wire.control_pb2_grpc import ControlServiceStub

_IMPORT_TIMEOUT_S, _ANSWER_TIMEOUT_S = 300.0, 5.0
_PROBE_BYTES = 2**20
_MAX_ANSWER_BYTES = 2**24
# No controller has this epoch: each refuses the call and reports its own in the trailing metadata.
_NO_EPOCH = 2**63
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "tekken.json")
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
_OFFLINE, _TRUE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"), ("1", "ON", "YES", "TRUE")
# Local addresses are never reached through a proxy.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_IMPORT = """
import json, time
began, errors = time.monotonic(), {}
for name in ("vllm", "vllm.benchmarks.serve"):
    try: __import__(name)
    except BaseException as error: errors[name] = f"{type(error).__name__}: {error}"
print("\\n" + json.dumps({"seconds": time.monotonic() - began, "errors": errors}))
"""


def gather(config: Config | None, prometheus: str, say: Say, *, quick: bool) -> HostFacts:
    """The facts for ``config``, or only about this machine without one; ``quick`` skips importing vLLM."""
    say("looking at the machine")
    if config is None:
        vllm = _vllm(sys.executable, dict(os.environ), say, quick=quick, forks=False)
        scrape = Scrape("", False, "", prometheus, _targets(prometheus)[1]) if prometheus else None
        return HostFacts(None, vllm, _devices(dict(os.environ), Own()), _shm(1), scrape=scrape)
    environment = {**os.environ, **config.engine.env}
    forks = config.engine.forked_trials or config.engine.forked_serving
    journal, error = _journal(config)
    own = _own(journal)
    return HostFacts(
        config_error="",
        vllm=_vllm(config.engine.python, environment, say, quick=quick, forks=forks),
        devices=_devices(environment, own),
        shm=_shm(ranks_of(config.engine.args)),
        ports=_ports(config, own),
        state=_state(config.state, error),
        link=_link(config, journal),
        scrape=_scrape(config, prometheus),
        model=_model(config, environment),
        hooks=_hooks(config),
        next_window=_next_window(config),
        misspelt=tuple(misspelt(config.engine.args).items()),
    )


def _vllm(python: str, environment: dict[str, str], say: Say, *, quick: bool, forks: bool) -> VllmFacts:
    plugins = environment.get("VLLM_PLUGINS")
    try:
        found = packages(python)
    except UnusablePythonError as error:
        return VllmFacts(python, None, str(error), plugins, __version__)
    if quick or not found.vllm:
        return VllmFacts(python, found, "", plugins, __version__)
    say("importing vLLM and its benchmark client")
    imports = _imports(python, environment)
    forked = None
    if forks and not imports.vllm_error:
        say("starting a fork server, and ending it")
        forked = _fork_error(python, environment)
    return VllmFacts(python, found, "", plugins, __version__, imports, forked)


def _imports(python: str, environment: dict[str, str]) -> Imports:
    try:
        found = answer(python, _IMPORT, _IMPORT_TIMEOUT_S, environment)
    except UnusablePythonError as error:
        return Imports(_IMPORT_TIMEOUT_S, str(error), "")
    errors = {name: " ".join(text.split())[:300] for name, text in found["errors"].items()}
    return Imports(found["seconds"], errors.get("vllm", ""), errors.get("vllm.benchmarks.serve", ""))


def _fork_error(python: str, environment: dict[str, str]) -> str:
    """Why engines can't be forked; empty if they can."""
    with tempfile.TemporaryDirectory() as folder:
        server = ForkServer(python, environment, Path(folder), Path(folder) / "log")
        try:
            server.ready()
        except ForkServerError as error:
            return str(error)
        finally:
            server.close()
    return ""


def _devices(environment: dict[str, str], own: Own) -> Devices:
    driver_files = Path("/proc/driver/nvidia/version").exists()
    try:
        here = machine.observe(environment)
    except OSError as error:
        return Devices("", (), False, 0, 0, driver_files, (), str(error))
    cards = gpus.visible(environment.get("CUDA_VISIBLE_DEVICES"))
    tenants = gpus.tenants(cards)
    others = None if tenants is None else tuple((t.pid, t.used_bytes) for t in tenants if t.pid not in own.pids)
    mig = any(card.uuid.startswith("MIG-") for card in cards)
    names = tuple(card.name for card in cards)
    return Devices(here.kind, names, mig, here.total_bytes, here.free_bytes, driver_files, others)


def _shm(ranks: int) -> Shm | None:
    with suppress(OSError):
        usage = shutil.disk_usage(SHM)
        return Shm(usage.total, usage.free, ranks)
    return None


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
    places = [
        ("engine.port", config.engine.host, config.engine.port),
        ("metrics.port", config.metrics.host, config.metrics.port),
    ]
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


def _model(config: Config, environment: dict[str, str]) -> ModelFacts:
    folder = Path(config.model)
    local = folder.is_dir()
    error = ""
    if local:
        try:
            model_shape.read_shape(folder)
        except (OSError, ValueError) as failed:
            error = str(failed)
    args = config.engine.args
    tokenizer = bool({"tokenizer", "skip_tokenizer_init"} & set(args)) or any(
        (folder / n).is_file() for n in _TOKENIZERS
    )
    weights = args.get("load_format") == "dummy" or any(next(folder.glob(p), None) for p in _WEIGHTS)
    path = config.model.startswith((".", "/", "~")) or config.model.count("/") > 1
    offline = "" if local or _cached(config, environment) else _offline(environment)
    return ModelFacts(config.model, local, path, error, tokenizer, weights, offline)


def _offline(environment: dict[str, str]) -> str:
    """The variable that forbids downloads, as huggingface_hub/constants.py reads it."""
    return next((name for name in _OFFLINE if environment.get(name, "").upper() in _TRUE), "")


def _cached(config: Config, environment: dict[str, str]) -> bool:
    """Whether the Hugging Face cache has a snapshot of the model."""
    base = environment.get("XDG_CACHE_HOME") or "~/.cache"
    hub = environment.get("HF_HUB_CACHE") or f"{environment.get('HF_HOME') or f'{base}/huggingface'}/hub"
    folder = Path(str(config.engine.args.get("download_dir") or hub)).expanduser()
    return (folder / f"models--{config.model.replace('/', '--')}" / "snapshots").is_dir()


def _hooks(config: Config) -> tuple[tuple[str, str, bool], ...]:
    hooks = config.window.hooks
    commands = (("window.hooks.before_drain", hooks.before_drain), ("window.hooks.after_restore", hooks.after_restore))
    return tuple((name, words[0], shutil.which(words[0]) is not None) for name, words in commands if words)


def _next_window(config: Config) -> str | None:
    at = config.window.next_opening(time.time())
    if at is None:
        return None
    return f'"{config.window.cron}": the next window opens {when(at)}'
