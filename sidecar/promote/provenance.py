"""Where a decision was measured, and with what: for the journal's promotions and for promoted.yaml."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sidecar.config.schema import Config
from sidecar.record.trial import Trial
from vllm_sloguard import __version__
from vllm_sloguard.guard import gpus

_UNKNOWN = "unknown"


def of(config: Config, trials: Sequence[Trial], *, proc_root: Path = Path("/proc")) -> dict[str, Any]:
    """What the result may depend on. ``vllm`` is what the engines of ``trials`` said, not what is installed here."""
    heard = [t.result.vllm_version for t in trials if t.result is not None and t.result.vllm_version]
    devices = gpus.visible(config.engine.env.get("CUDA_VISIBLE_DEVICES"))
    return {
        "sloguard": __version__,
        "vllm": ", ".join(dict.fromkeys(heard)) or _UNKNOWN,
        "device": " + ".join(gpu.name for gpu in devices) or f"CPU: {_cpu(proc_root)}",
        "driver": gpus.driver() if devices else None,
        "model": config.model,
        "model_config_sha256": _digest(Path(config.model) / "config.json"),
        "objective": str(config.objective),
        "slo": config.slo.model_dump(exclude_none=True),
        "workload": config.workload.model_dump(mode="json", exclude_none=True),
        "promotion": config.promotion.model_dump(mode="json"),
    }


def _cpu(proc_root: Path) -> str:
    """As the kernel calls it."""
    try:
        lines = (proc_root / "cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return _UNKNOWN
    pairs = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in pairs if name.strip() == "model name"), _UNKNOWN)


def _digest(path: Path) -> str | None:
    """None for a model that is not a local folder: the hub's cache is the engine's."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None
