"""The operator's one YAML file, checked as a whole before anything starts."""

import hashlib
import ipaddress
import json
import os
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, cast

import yaml
from pydantic import (
    AfterValidator,
    Field,
    ValidationError,
    model_validator,
)

from sidecar.config.argument_mistakes import argument_mistakes
from sidecar.config.engine_section import AgentTls, EngineConfig
from sidecar.config.mistakes import (
    ConfigError,
    MisplacedValues,
    Mistake,
    file_error,
    located,
    repeated_keys,
    schema_mistakes,
)
from sidecar.config.search_section import SearchConfig
from sidecar.config.slo import Slo
from sidecar.config.suspicious_values import suspicious_values
from sidecar.config.window import Promotion, Section, WindowConfig
from sidecar.config.workload_section import Workload
from sidecar.config.yaml_file import YamlContent, YamlLines, YamlTooLarge, read_yaml

# The kernel limits a Unix socket's path to 108 bytes, including the terminating zero.
LONGEST_SOCKET_PATH = 107
SOCKET_NAME = "sidecar.sock"


class Objective(StrEnum):
    """What is optimised among the configurations that meet the SLO."""

    GOODPUT = "goodput"  # requests per second that meet the SLO; higher is better
    LATENCY = "latency"  # mean end-to-end latency; lower is better
    CAPACITY = "capacity"  # the highest request rate that meets the SLO; higher is better


def _address(text: str) -> str:
    if not re.fullmatch(r"[^\s:]+:[0-9]{1,5}|\[[0-9a-fA-F:.]+\]:[0-9]{1,5}", text):
        raise ValueError('a host and a port are needed, such as "10.0.0.5:9465"')
    return text


class MetricsConfig(Section):
    """Where /metrics and /ready are served; port 0 for any free one."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 9464


class PageConfig(Section):
    """Where the live page is served: on localhost unless ``host`` is set; port 0 for any free one.

    ``hosts`` are additional names under which browsers reach it, e.g. through a proxy. Actions need the token in the
    file ``token``, by default STATE/page.token, which is created if missing.
    """

    enabled: bool = True
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 9465
    hosts: list[str] = Field(default=[])
    token: Path | None = Field(default=None, strict=False)

    @property
    def takes_orders(self) -> bool:
        """Localhost only: the page has no TLS; for remote access there is ``remote``."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


class Remote(Section):
    """The control service over TCP, for clients with a certificate signed by ``ca`` and the ``token``.

    All but ``address`` ("host:port") are files; a client needs the same, with its own certificate.
    """

    address: Annotated[str, AfterValidator(_address)]
    certificate: Path = Field(strict=False)
    key: Path = Field(strict=False)
    ca: Path = Field(strict=False)
    token: Path = Field(strict=False)


def _model_name(text: str) -> str:
    if not text or text != text.strip() or not text.isprintable() or text.startswith("-"):
        raise ValueError("a folder or a name such as Qwen/Qwen3-0.6B is needed")
    return text


class Config(Section):
    """The whole file."""

    model: Annotated[str, AfterValidator(_model_name)]
    engine: EngineConfig = EngineConfig()
    slo: Slo
    objective: Objective = Field(default=Objective.LATENCY, strict=False)
    workload: Workload
    search: SearchConfig = Field(default_factory=SearchConfig)
    promotion: Promotion = Promotion()
    window: WindowConfig = WindowConfig()
    state: Path = Field(default=Path("sloguard-state"), strict=False)
    metrics: MetricsConfig = MetricsConfig()
    page: PageConfig = PageConfig()
    remote: Remote | None = None

    @model_validator(mode="before")
    @classmethod
    def _watched(cls, content: object) -> object:
        """Where vLLM is only watched, no load is sent, so the section may be left out."""
        if not isinstance(content, dict):
            return content
        fields = cast("dict[str, object]", content)
        engine = fields.get("engine")
        if not isinstance(engine, dict) or cast("dict[str, object]", engine).get("watch_only") is not True:
            return fields
        return {"workload": {"rate": 1.0}, **fields}

    @property
    def socket(self) -> Path:
        """The sidecar's private socket."""
        return self.state / SOCKET_NAME

    def digest(self) -> str:
        """Identifies everything a run depends on: only the same configuration resumes a run."""
        content = self.model_dump(mode="json", exclude={"state", "metrics", "page", "window", "remote"})
        # Where the engines run is not what they run.
        for name in ("agents", "agent_tls", "agent_lease_s", "watch_only"):
            content["engine"].pop(name, None)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def base_digest(self) -> str:
        """Identifies the file's model and arguments: a promotion is valid only while these are unchanged."""
        content = self.model_dump(mode="json", include={"model": True, "engine": {"args"}})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class LoadedConfig:
    """A configuration, and what is suspicious in its file, one line each."""

    config: Config
    warnings: tuple[str, ...]
    lines: YamlLines


def load_config(path: Path) -> Config:
    """Reads and validates ``path``; relative paths in it are relative to its folder. Raises ConfigError."""
    return loaded_config(path).config


def checked_config(path: Path) -> LoadedConfig:
    """The same with warnings, for what starts engines: their model must be there, too."""
    loaded = loaded_config(path)
    if mistake := missing_model(loaded.config):
        raise file_error(path, [mistake], loaded.lines)
    return loaded


def missing_model(config: Config) -> Mistake | None:
    """The mistake if the model is a path that is not on this machine, whose engines need it."""
    is_path = config.model.startswith(("/", "./", "../", "~"))
    if not is_path or config.engine.agent_address or Path(config.model).exists():
        return None
    text = f"{config.model!r}: there is no such folder; a name on Hugging Face is written `model: Qwen/Qwen3-0.6B`"
    return Mistake(("model",), text)


def loaded_config(path: Path) -> LoadedConfig:
    """The configuration with its warnings. All mistakes are in one error. Raises ConfigError."""
    read = _read(path)
    value = read.value
    if not isinstance(value, dict):
        given = "an empty file" if value is None else type(value).__name__
        raise ConfigError(f"{path}: a mapping of fields is needed, got {given}")
    content = cast("dict[object, object]", value)
    mistakes = [*repeated_keys(read.lines)]
    engine = content.get("engine")
    if isinstance(engine, dict):
        sections = cast("dict[object, object]", engine)
        if wrong := argument_mistakes(sections.get("args"), read.lines):
            mistakes += wrong
            content = {**content, "engine": {name: part for name, part in sections.items() if name != "args"}}
    config = None
    try:
        config = _placed(Config.model_validate(content), path.resolve().parent)
    except ValidationError as error:
        mistakes += schema_mistakes(error, content, Config)
    except MisplacedValues as error:
        mistakes += error.mistakes
    if config is None or mistakes:
        raise file_error(path, mistakes, read.lines)
    suspicious = suspicious_values(config.slo, config.engine, config.workload, config.window, config.search)
    return LoadedConfig(config, tuple(located(found, read.lines) for found in suspicious), read.lines)


def _read(path: Path) -> YamlContent:
    try:
        return read_yaml(path)
    except YamlTooLarge as error:
        raise ConfigError(f"{path}: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        # PyYAML's text quotes the line, which may contain a secret.
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(f"{path}: not YAML: {where}{error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        # These are PyYAML's own errors first; it lets the others escape for some inputs.
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None


def _placed(config: Config, folder: Path) -> Config:
    state = _resolved("state", folder, config.state)
    if len(os.fsencode(state / SOCKET_NAME)) > LONGEST_SOCKET_PATH:
        raise MisplacedValues(
            [Mistake(("state",), f"{state} is too long a path for a Unix socket in it; choose a shorter one")]
        )
    local = folder / Path(config.model).expanduser() if config.model.startswith("~/") else folder / config.model
    model = str(local.resolve()) if local.exists() else config.model
    engine = _placed_engine(config.engine, folder)
    files = ("certificate", "key", "ca", "token")
    remote = config.remote and config.remote.model_copy(
        update={name: _resolved(f"remote.{name}", folder, getattr(config.remote, name)) for name in files}
    )
    token = config.page.token and _resolved("page.token", folder, config.page.token)
    page = config.page.model_copy(update={"token": token})
    workload = config.workload
    if workload.dataset_path is not None:
        dataset = _resolved("workload.dataset_path", folder, workload.dataset_path)
        if not dataset.is_file():
            raise MisplacedValues([Mistake(("workload", "dataset_path"), f"{dataset}: there is no such file")])
        workload = workload.model_copy(update={"dataset_path": dataset})
    placed = {"state": state, "model": model, "engine": engine, "remote": remote, "page": page, "workload": workload}
    return config.model_copy(update=placed)


def _placed_engine(engine: EngineConfig, folder: Path) -> EngineConfig:
    python = folder / engine.python
    if python.is_file():
        engine = engine.model_copy(update={"python": str(python.absolute())})
    if engine.agent_tls is not None:
        files = {name: getattr(engine.agent_tls, name) for name in AgentTls.model_fields}
        placed = {name: _resolved(f"engine.agent_tls.{name}", folder, path) for name, path in files.items()}
        engine = engine.model_copy(update={"agent_tls": AgentTls(**placed)})
    return engine


def _resolved(field: str, folder: Path, path: Path) -> Path:
    try:
        resolved = (folder / path.expanduser()).resolve()
        os.fsencode(resolved)
    except (ValueError, RuntimeError, OSError) as error:
        raise MisplacedValues([Mistake(tuple(field.split(".")), f"{str(path)!r} is not a path: {error}")]) from None
    return resolved
