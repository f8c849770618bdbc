"""How commands select a sidecar: by configuration file or state folder."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Annotated, cast

import typer
from pydantic import ValidationError

from sidecar.config.schema import Config, ConfigError, LoadedConfig, checked_config, load_config
from sidecar.config.yaml_file import YamlLines
from sidecar.record.journal import JOURNAL_FILE, Journal
from sidecar.record.row_validation import problem


def state_folders(incomplete: str) -> list[str]:
    """Shell completion: state folders, configuration files, and folders that may contain some."""
    typed = Path(incomplete)
    folder = typed if incomplete.endswith("/") else typed.parent
    start = "" if incomplete.endswith("/") else typed.name
    with suppress(OSError):
        found = sorted(path for path in folder.iterdir() if path.name.startswith(start) and path.name[0] != ".")
        states = [str(path) for path in found if (path / JOURNAL_FILE).is_file()]
        files = [str(path) for path in found if path.suffix in (".yaml", ".yml") and path.is_file()]
        return [*states, *files, *(f"{path}/" for path in found if path.is_dir() and str(path) not in states)]
    return []


ConfigOption = Annotated[Path | None, typer.Option("--config", "-c", help="The configuration file.", metavar="FILE")]
RequiredState = Annotated[
    Path,
    typer.Argument(
        help="The state folder, or the configuration file that names it.",
        metavar="STATE",
        autocompletion=state_folders,
    ),
]
FileArgument = Annotated[
    Path | None,
    typer.Argument(
        help="The configuration file, or a state folder where one is recorded.",
        metavar="[FILE]",
        autocompletion=state_folders,
        show_default=False,
    ),
]
StateFolder = Annotated[
    Path | None,
    typer.Argument(
        help="The state folder, or the configuration file that names it.",
        metavar="[STATE]",
        autocompletion=state_folders,
        show_default=False,
    ),
]


def place_of(state: Path | None, config_file: Path | None) -> Path:
    """The one of the two that was given. Raises ConfigError."""
    if state is not None and config_file is not None:
        raise ConfigError("give either STATE or -c FILE, not both")
    if (place := config_file or state) is None:
        raise ConfigError("the state folder or the configuration file is missing: give STATE or -c FILE")
    return place


def folder_of(state: Path | None, config_file: Path | None) -> Path:
    """The state folder. ``state`` may also be the journal in it, or a configuration file. Raises ConfigError."""
    place = place_of(state, config_file)
    if place.name == JOURNAL_FILE:
        return place.parent
    is_folder = config_file is None and (place.is_dir() or not place.exists())
    return place if is_folder else load_config(place).state


def loaded_of(place: Path | None, config_file: Path | None) -> LoadedConfig:
    """The configuration to start engines with, and the warnings of its file. Raises ConfigError, JournalError."""
    chosen = place_of(place, config_file)
    if config_file is not None or not chosen.is_dir():
        return checked_config(chosen)
    return LoadedConfig(config_of(chosen, None), (), YamlLines())


def config_of(state: Path | None, config_file: Path | None) -> Config:
    """The configuration in the file, or the one last recorded in the state folder. Raises ConfigError, JournalError."""
    place = place_of(state, config_file)
    if config_file is not None or place.is_file():
        return load_config(place)
    configs = Journal(place, read_only=True).run_configs()
    if not configs:
        raise ConfigError(f"{place}: no tuning run is recorded there: give the configuration file, -c FILE")
    content = {name: part for name, part in configs[max(configs)].items() if name in Config.model_fields}
    engine = cast("dict[str, object]", content.get("engine") or {})
    if engine.get("agents"):  # these are the agent's own, and refused in a file
        content["engine"] = {name: part for name, part in engine.items() if name not in {"python", "env"}}
    try:
        return Config.model_validate_json(json.dumps({**content, "state": str(place.absolute())}))
    except ValidationError as error:
        reason = problem(error)
        raise ConfigError(f"{place}: its recorded configuration can't be read: {reason}: give -c FILE") from None
