"""Where a decision was measured and with what, for the journal's promotions and promoted.yaml."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from sidecar.config.schema import Config
from sidecar.record.decisions import Provenance
from sidecar.record.trial import Trial
from vllm_sloguard import __version__
from vllm_sloguard.guard import gpus
from vllm_sloguard.guard.bounded_read import read_small_file

_UNKNOWN = "unknown"


def of(config: Config, trials: Sequence[Trial], *, proc_root: Path = Path("/proc")) -> Provenance:
    """What the result may depend on; the vLLM version is the one that the engines of ``trials`` reported."""
    versions = [t.result.vllm_version for t in trials if t.result is not None and t.result.vllm_version]
    device, driver = device_of(config, proc_root=proc_root)
    return Provenance(
        sloguard=__version__,
        vllm=", ".join(dict.fromkeys(versions)) or _UNKNOWN,
        device=device,
        driver=driver,
        model=config.model,
        model_config_sha256=_digest(Path(config.model) / "config.json"),
        objective=config.objective,
        slo=config.slo,
        workload=config.workload,
        promotion=config.promotion,
    )


def device_of(config: Config, *, proc_root: Path = Path("/proc")) -> tuple[str, str | None]:
    """The names of this machine's GPUs that the engine may use, and their driver; without any, its processor."""
    devices = gpus.visible(config.engine.env.get("CUDA_VISIBLE_DEVICES"))
    name = " + ".join(gpu.name for gpu in devices) or f"CPU: {_cpu(proc_root)}"
    return name, gpus.driver() if devices else None


def _cpu(proc_root: Path) -> str:
    """The processor's name in /proc/cpuinfo."""
    try:
        lines = (proc_root / "cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return _UNKNOWN
    pairs = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in pairs if name.strip() == "model name"), _UNKNOWN)


def _digest(path: Path) -> str | None:
    """None unless the model is a local folder: the engine manages the hub's cache."""
    try:
        return hashlib.sha256(read_small_file(path)).hexdigest()
    except OSError:
        return None
