"""``promoted.yaml``: the current configuration, as a file for ``vllm serve --config``, with the evidence in comments.

Beside it ``promoted/`` keeps one numbered file for each time that the arguments changed, as it was first written.
"""

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import yaml

from sidecar.config.schema import Config
from sidecar.engine.config_yaml import config_yaml
from sidecar.format import when
from sidecar.measure.verdict import slo_limits
from sidecar.promote import provenance
from sidecar.promote.candidate import baseline
from sidecar.record.atomic_write import write_whole
from sidecar.record.decisions import Decision, Provenance
from sidecar.record.trial import Trial
from sidecar.record.wording import OUTCOMES
from vllm_sloguard import __version__
from vllm_sloguard.agent.serve_command import Args

PROMOTED_FILE = "promoted.yaml"
VERSIONS = "promoted"
_MAX_VERSIONS = 20


def write(config: Config, args: Args, decision: Decision, trials: Sequence[Trial]) -> Path:
    """Writes the file atomically and returns its path; a version with other arguments is kept."""
    path = config.state / PROMOTED_FILE
    text = config_yaml(config.model, args, comments(config, decision, trials))
    _keep(config.state / VERSIONS, text)
    write_whole(path, text)
    return path


def keep_true(config: Config, args: Args, why: str) -> None:
    """Rewrites an existing file that has other arguments, as after a rollback. Raises OSError."""
    path = config.state / PROMOTED_FILE
    if not path.is_file():
        return
    written = f"Written by sloguard {__version__}, {when(time.time())}."
    text = config_yaml(config.model, args, [written, f"Served again: {' '.join(why.split())}.", ""])
    if _arguments(path.read_text(encoding="utf-8", errors="replace")) != _arguments(text):
        _keep(config.state / VERSIONS, text)
        write_whole(path, text)


def _keep(folder: Path, text: str) -> None:
    """Adds a version unless the newest has the same arguments, and removes the oldest beyond _MAX_VERSIONS."""
    folder.mkdir(exist_ok=True, mode=0o700)
    found = (path for path in folder.glob("*.yaml") if path.stem.isdecimal())
    versions = sorted(found, key=lambda path: int(path.stem))
    if versions and _arguments(versions[-1].read_text(encoding="utf-8", errors="replace")) == _arguments(text):
        return
    number = int(versions[-1].stem) + 1 if versions else 1
    write_whole(folder / f"{number:04}.yaml", text)
    for old in versions[: max(0, len(versions) + 1 - _MAX_VERSIONS)]:
        old.unlink(missing_ok=True)


def _arguments(text: str) -> object:
    with suppress(yaml.YAMLError):
        return yaml.safe_load(text)
    return None


def comments(config: Config, decision: Decision, trials: Sequence[Trial]) -> list[str]:
    """The decision and its evidence, line by line."""
    origin = provenance.of(config, trials)
    run = trials[-1].run if trials else 0
    lines = [
        f"Written by sloguard {origin.sloguard}, {when(time.time())}.",
        f"Decision: {OUTCOMES[decision.outcome]}: {decision.reason}.",
        *_origin(origin),
        f"Load: {config.workload.rate:g} requests/s of {config.workload.prompts}; objective {config.objective}.",
    ]
    numbered = {t.number: t for t in trials}
    for name, numbers in (("incumbent", decision.incumbents), ("candidate", decision.candidates)):
        lines += [f"{name}, trial {n}: {_numbers(config, numbered[n])}" for n in numbers if n in numbered]
    first, chosen = baseline(trials), numbered.get(decision.trial)
    if not decision.incumbents and first is not None:
        lines.append(f"incumbent, trial {first.number}: {_numbers(config, first)}")
    if chosen is not None:
        lines.append(f"Served from now on: the configuration of trial {chosen.number}.")
    ran = len([t for t in trials if not t.plan.refusal])
    return [*lines, f"Run {run}, {ran} trials; `sloguard trials {config.state}` lists them.", ""]


def _origin(origin: Provenance) -> list[str]:
    digest = origin.model_config_sha256
    driver = f", driver {origin.driver}" if origin.driver else ""
    return [
        f"vLLM {origin.vllm} on {origin.device}{driver}.",
        f"Model {origin.model}" + (f" (SHA-256 of its config.json: {digest})." if digest else "."),
    ]


def _numbers(config: Config, trial: Trial) -> str:
    measurement = trial.result.measurement if trial.result else None
    if measurement is None:
        return str(trial.status)
    against = [
        f"{limit.name} {_figure(limit.measured)} of {limit.limit:g}"
        for limit in slo_limits(measurement, config.slo)
        if limit.measured is not None
    ]
    mean = "" if measurement.e2e_mean_ms is None else f", e2e_mean_ms {_figure(measurement.e2e_mean_ms)}"
    figures = f"{', '.join(against)}{mean}, goodput {measurement.goodput_rps:.4g}/s"
    return f"{trial.status}, {measurement.requests} requests, {figures}"


def _figure(value: float) -> str:
    """Without an exponent."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"
