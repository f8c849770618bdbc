"""The command `sloguard init`: writes the configuration file from how vLLM is started today."""

import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from sidecar.adopt.adoption import adopted
from sidecar.adopt.files import from_compose, from_deployment, from_systemd_unit, is_compose
from sidecar.adopt.launch import NotReadable, Started
from sidecar.adopt.observed_load import ObservedLoad, observed_load
from sidecar.adopt.running import from_process
from sidecar.adopt.shell_words import started_in
from sidecar.adopt.written_file import GivenLoad, written_file
from sidecar.config.schema import ConfigError, loaded_config, missing_model
from sidecar.record.atomic_write import write_whole
from vllm_sloguard.guard import machine

_METRICS_TIMEOUT_S = 10.0
_MOST_METRICS_BYTES = 8 * 2**20
_YAML = (".yaml", ".yml")


def register(app: typer.Typer) -> None:
    """Adds the command to ``app``."""
    app.command()(init)


def init(  # noqa: PLR0917 - the options of a command
    from_: Annotated[
        str,
        typer.Option(
            "--from",
            help='The command line, such as "vllm serve MODEL --max-num-seqs 64"; or a file as below.',
            metavar="COMMAND",
        ),
    ] = "",
    from_pid: Annotated[int, typer.Option("--from-pid", help="A running vLLM server.", metavar="PID")] = 0,
    from_compose_: Annotated[
        str, typer.Option("--from-compose", help="A Compose file, with its service.", metavar="FILE[:SERVICE]")
    ] = "",
    from_unit_: Annotated[str, typer.Option("--from-unit", help="A systemd unit.", metavar="FILE")] = "",
    from_deployment_: Annotated[
        str,
        typer.Option("--from-deployment", help="A Kubernetes manifest, with its container.", metavar="FILE[:NAME]"),
    ] = "",
    rate: Annotated[
        float, typer.Option("--rate", help="Requests per second of your busiest hour.", min=0, metavar="R")
    ] = 0.0,
    metrics: Annotated[
        str, typer.Option("--metrics", help="Take the load from this /metrics of the engine.", metavar="URL")
    ] = "",
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.", metavar="FILE")] = Path(
        "sloguard.yaml"
    ),
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
) -> None:
    """Write a configuration file from how vLLM is started today.

    Nothing is started or executed. Secrets are not written: the file names the variables that must be set instead.

    Example: sloguard init --from "vllm serve Qwen/Qwen3-0.6B --max-num-seqs 64" --rate 4
    """
    sources = {
        "--from": from_,
        "--from-pid": str(from_pid or ""),
        "--from-compose": from_compose_,
        "--from-unit": from_unit_,
        "--from-deployment": from_deployment_,
    }
    given = {option: text for option, text in sources.items() if text}
    if len(given) != 1:
        raise ConfigError(
            'init: give one of --from, --from-pid, --from-compose, --from-unit, --from-deployment, such as --from "vllm'
            ' serve Qwen/Qwen3-0.6B --max-num-seqs 64"'
        )
    if output.exists() and not force:
        raise ConfigError(f"{output}: exists already; --force replaces it, -o FILE writes another")
    ((option, text),) = given.items()
    try:
        launch = adopted(_started(option, text))
        load = GivenLoad(rate or None, _observed(metrics) if metrics else None)
    except NotReadable as error:
        raise ConfigError(f"{option}: {error}") from None
    source = f"process {text}" if option == "--from-pid" else "a command line" if option == "--from" else text
    write_whole(output, written_file(launch, source, load, on_gpu=machine.observe(ranks=1).kind == "cuda"))
    _report(output, launch.secrets, launch.notes)


def _started(option: str, text: str) -> Started:
    path, name = _file_and_name(text)
    is_yaml = path.suffix in _YAML and path.is_file()
    if option == "--from-pid":
        return from_process(int(text))
    if option == "--from-unit" or (option == "--from" and path.suffix == ".service" and path.is_file()):
        return from_systemd_unit(path)
    if option == "--from-compose" or (option == "--from" and is_yaml and is_compose(path)):
        return from_compose(path, name)
    return from_deployment(path, name) if option == "--from-deployment" or is_yaml else started_in(text)


def _file_and_name(text: str) -> tuple[Path, str]:
    """ "compose.yaml:service" as its parts."""
    path, colon, name = text.rpartition(":")
    return (Path(path), name) if colon and not Path(text).exists() else (Path(text), "")


def _observed(url: str) -> ObservedLoad:
    try:
        with urllib.request.urlopen(url, timeout=_METRICS_TIMEOUT_S) as answer:  # noqa: S310 - the operator's own URL
            page = answer.read(_MOST_METRICS_BYTES).decode("utf-8", errors="replace")
    except (OSError, ValueError) as error:
        raise NotReadable(f"--metrics {url}: {error}") from None
    try:
        return observed_load(page, time.time())
    except NotReadable as error:
        raise NotReadable(f"--metrics {url}: {error}") from None


def _report(output: Path, secrets: Mapping[str, str], notes: tuple[str, ...]) -> None:
    print(f"{output}: written")
    for name, why in secrets.items():
        print(f"secret: set {name} in the environment of sloguard; it is not in the file ({why})")
    for note in notes:
        print(f"note: {note}")
    loaded = loaded_config(output)
    for warning in loaded.warnings:
        print(f"warning: {warning}")
    if mistake := missing_model(loaded.config):
        print(f"warning: model: {mistake.text}")
    print(f"next: correct slo and workload in {output}; then sloguard plan -c {output}")
