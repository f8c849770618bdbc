"""Collects the facts about the environment of the engines. Leaves no process or file behind."""

import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vllm_sloguard import __version__
from vllm_sloguard.agent.environment_facts import SHM, Devices, EnvironmentFacts, Imports, ModelFacts, Shm, VllmFacts
from vllm_sloguard.agent.fork_client import ForkServer, ForkServerError
from vllm_sloguard.agent.python_env import UnusablePythonError, answer, packages
from vllm_sloguard.guard import gpus, machine, model_shape
from vllm_sloguard.guard.start_history import ranks_of

_IMPORT_TIMEOUT_S = 300.0
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "tekken.json")
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
_OFFLINE, _TRUE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"), ("1", "ON", "YES", "TRUE")
_IMPORT = """
import json, time
began, errors = time.monotonic(), {}
for name in ("vllm", "vllm.benchmarks.serve"):
    try: __import__(name)
    except BaseException as error: errors[name] = f"{type(error).__name__}: {error}"
print("\\n" + json.dumps({"seconds": time.monotonic() - began, "errors": errors}))
"""


@dataclass(frozen=True)
class ProbeRequest:
    """What to find out: about ``model`` with ``args``, if there is one.

    ``imports``: whether to import vLLM, which takes half a minute; ``forks``: whether to try a fork server.
    """

    model: str = ""
    args: Mapping[str, object] | None = None
    imports: bool = False
    forks: bool = False


def probe_environment(
    request: ProbeRequest,
    python: str,
    environment: Mapping[str, str],
    own_pids: Collection[int],
    say: Callable[[str], None],
) -> EnvironmentFacts:
    """The facts; ``own_pids`` are the processes of the engines that run already."""
    args = request.args or {}
    return EnvironmentFacts(
        _vllm(python, environment, say, imports=request.imports, forks=request.forks),
        _devices(environment, own_pids),
        _shm(ranks_of(args)),
        _model(request.model, args, environment) if request.model else None,
    )


def _vllm(
    python: str, environment: Mapping[str, str], say: Callable[[str], None], *, imports: bool, forks: bool
) -> VllmFacts:
    plugins = environment.get("VLLM_PLUGINS")
    try:
        found = packages(python)
    except UnusablePythonError as error:
        return VllmFacts(python, None, str(error), plugins, __version__)
    if not imports or not found.vllm:
        return VllmFacts(python, found, "", plugins, __version__)
    say("importing vLLM and its benchmark client")
    imported = _imports(python, environment)
    forked = None
    if forks and not imported.vllm_error:
        say("starting a fork server, and ending it")
        forked = _fork_error(python, environment)
    return VllmFacts(python, found, "", plugins, __version__, imported, forked)


def _imports(python: str, environment: Mapping[str, str]) -> Imports:
    try:
        found = answer(python, _IMPORT, _IMPORT_TIMEOUT_S, environment)
    except UnusablePythonError as error:
        return Imports(_IMPORT_TIMEOUT_S, str(error), "")
    errors = {name: " ".join(text.split())[:300] for name, text in found["errors"].items()}
    return Imports(found["seconds"], errors.get("vllm", ""), errors.get("vllm.benchmarks.serve", ""))


def _fork_error(python: str, environment: Mapping[str, str]) -> str:
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


def _devices(environment: Mapping[str, str], own_pids: Collection[int]) -> Devices:
    driver_files = Path("/proc/driver/nvidia/version").exists()
    try:
        here = machine.observe(environment)
    except OSError as error:
        return Devices("", (), False, 0, 0, driver_files, (), str(error))
    cards = gpus.visible(environment.get("CUDA_VISIBLE_DEVICES"))
    tenants = gpus.tenants(cards)
    others = None if tenants is None else tuple((t.pid, t.used_bytes) for t in tenants if t.pid not in own_pids)
    mig = any(card.uuid.startswith("MIG-") for card in cards)
    names = tuple(card.name for card in cards)
    return Devices(here.kind, names, mig, here.total_bytes, here.free_bytes, driver_files, others)


def _shm(ranks: int) -> Shm | None:
    with suppress(OSError):
        usage = shutil.disk_usage(SHM)
        return Shm(usage.total, usage.free, ranks)
    return None


def _model(model: str, args: Mapping[str, object], environment: Mapping[str, str]) -> ModelFacts:
    folder = Path(model)
    local = folder.is_dir()
    error = ""
    if local:
        try:
            model_shape.read_shape(folder)
        except (OSError, ValueError) as failed:
            error = str(failed)
    tokenizer = bool({"tokenizer", "skip_tokenizer_init"} & set(args)) or any(
        (folder / n).is_file() for n in _TOKENIZERS
    )
    weights = args.get("load_format") == "dummy" or any(next(folder.glob(p), None) for p in _WEIGHTS)
    path = model.startswith((".", "/", "~")) or model.count("/") > 1
    offline = "" if local or _cached(model, args, environment) else _offline(environment)
    return ModelFacts(model, local, path, error, tokenizer, weights, offline)


def _offline(environment: Mapping[str, str]) -> str:
    """The variable that forbids downloads, as huggingface_hub/constants.py reads it."""
    return next((name for name in _OFFLINE if environment.get(name, "").upper() in _TRUE), "")


def _cached(model: str, args: Mapping[str, object], environment: Mapping[str, str]) -> bool:
    """Whether the Hugging Face cache has a snapshot of the model."""
    base = environment.get("XDG_CACHE_HOME") or "~/.cache"
    hub = environment.get("HF_HUB_CACHE") or f"{environment.get('HF_HOME') or f'{base}/huggingface'}/hub"
    folder = Path(str(args.get("download_dir") or hub)).expanduser()
    return (folder / f"models--{model.replace('/', '--')}" / "snapshots").is_dir()
