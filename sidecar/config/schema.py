"""The operator's one YAML file, checked as a whole before anything starts."""

import hashlib
import ipaddress
import json
import os
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    FiniteFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from sidecar.config.engine_arguments import ArgsField
from sidecar.config.engine_section import AgentTls, EngineConfig
from sidecar.config.knob_ranges import check_kind, narrowed
from sidecar.config.slo import ALLOWED_NAMES, Slo
from sidecar.config.window import Promotion, Section, WindowConfig
from sidecar.config.yaml_file import YamlTooLarge, read_yaml
from sidecar.search.registry import DEFAULT as DEFAULT_OPTIMIZER
from sidecar.search.registry import OPTIMIZERS, make
from sidecar.search.space import Space
from vllm_sloguard.knobs import KNOBS, Knob

# The kernel limits a Unix socket's path to 108 bytes, including the terminating zero.
LONGEST_SOCKET_PATH = 107
SOCKET_NAME = "sidecar.sock"
# The offending value may be long; the error message must not be.
_LONGEST_LINE = 1000
# Twice what a load without any miss needs at the default confidence; see sidecar.measure.early_stop.
_MOST_REQUESTS = 500
_COMPARED_REQUESTS = 200


class ConfigError(ValueError):
    """The file can't be used; the text is one line with the field, the given value and the allowed ones."""

    def __init__(self, text: str) -> None:
        line = " ".join(text.split())
        super().__init__(line if len(line) <= _LONGEST_LINE else f"{line[: _LONGEST_LINE - 3]}...")


class Objective(StrEnum):
    """What is optimised among the configurations that meet the SLO."""

    GOODPUT = "goodput"  # requests per second that meet the SLO; higher is better
    LATENCY = "latency"  # mean end-to-end latency; lower is better
    CAPACITY = "capacity"  # the highest request rate that meets the SLO; higher is better


class Dataset(StrEnum):
    """The source of the prompts: vLLM's own readers, named as in `vllm bench`."""

    RANDOM = "random"
    SHAREGPT = "sharegpt"  # a JSON file of conversations
    CUSTOM = "custom"  # a file of JSON lines, each with prompt and output_tokens


class Workload(Section):
    """The load of a trial: open loop, Poisson arrivals, random prompts; lengths vary by ``spread`` around their mean.

    With another ``dataset_name``, prompts and output lengths come from ``dataset_path``; ``input_tokens`` and
    ``output_tokens`` are then the maxima, for which every trial leaves room. ``highest_rate`` bounds the capacity
    search, if that is the objective; 16 times ``rate`` by default. Without ``requests``, as many are sent as the
    verdict needs (sidecar.measure.early_stop), at most ``most_requests``. At least ``warmup_requests`` are sent before
    the load, until step times settle (vllm_sloguard.starts.warmup); 0 disables the warm-up.
    """

    rate: PositiveFloat
    highest_rate: PositiveFloat | None = None
    requests: Annotated[int, Field(ge=10)] | None = None
    input_tokens: PositiveInt = 512
    output_tokens: PositiveInt = 128
    spread: Annotated[float, Field(ge=0, lt=1)] = 0.0
    warmup_requests: Annotated[int, Field(ge=0)] = 8
    request_timeout_s: PositiveFloat = 60.0
    seed: Annotated[int, Field(ge=0)] = 0
    dataset_name: Dataset = Field(default=Dataset.RANDOM, strict=False)
    dataset_path: Path | None = Field(default=None, strict=False)

    @model_validator(mode="after")
    def _whole_dataset(self) -> "Workload":
        random = self.dataset_name is Dataset.RANDOM
        if random != (self.dataset_path is None):
            needed = "is required for any" if self.dataset_path is None else "is only for a"
            raise ValueError(f"dataset_path: a file {needed} dataset_name other than random, got {self.dataset_name}")
        if not random and not {"input_tokens", "output_tokens"} <= self.model_fields_set:
            raise ValueError("input_tokens and output_tokens: required with a dataset, of the longest request")
        return self

    @model_validator(mode="after")
    def _rates_in_order(self) -> "Workload":
        if self.highest_rate is not None and self.highest_rate < self.rate:
            raise ValueError(f"highest_rate: {self.highest_rate:g} is below rate {self.rate:g}")
        return self

    @property
    def prompts(self) -> str:
        """A description of the prompts."""
        if self.dataset_path is None:
            return f"about {self.input_tokens} + {self.output_tokens} tokens"
        return f"{self.dataset_name} {self.dataset_path}, {self.input_tokens} + {self.output_tokens} tokens at most"

    @property
    def fixed_requests(self) -> int:
        """Number of measured requests if loads are compared, which requires equal sizes."""
        return self.requests or _COMPARED_REQUESTS

    @property
    def most_requests(self) -> int:
        """Maximum number of measured requests."""
        return self.requests or _MOST_REQUESTS

    @property
    def longest_request_tokens(self) -> int:
        """Prompt plus output of the longest request."""
        return int((self.input_tokens + self.output_tokens) * (1 + self.spread)) + 1


class KnobRange(Section):
    """Restrictions on a knob for the search; missing fields default to the knob table."""

    low: FiniteFloat | int | None = None
    high: FiniteFloat | int | None = None
    choices: list[bool | int | float | str] | None = None


class SearchConfig(Section):
    """The search: knobs, number of trials, seed; ``unguarded`` trials skip the guard and the repair."""

    optimizer: str = DEFAULT_OPTIMIZER
    budget: Annotated[int, Field(ge=1)] = 15
    seed: Annotated[int, Field(ge=0)] = 0
    knobs: dict[str, KnobRange | None]
    unguarded: list[ArgsField] = Field(default=[])

    @model_validator(mode="after")
    def _known(self) -> "SearchConfig":
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer: {self.optimizer!r} is not one of {', '.join(OPTIMIZERS)}")
        if not self.knobs:
            raise ValueError("knobs: at least one is needed")
        make(self.optimizer, Space(self.space_knobs()), self.seed, self.budget)  # fails if a package is missing
        for args in self.unguarded:
            if bad := sorted(set(args) - set(KNOBS)):
                raise ValueError(f"unguarded: {bad[0]!r} is not a knob; allowed: {', '.join(KNOBS)}")
            for name, value in args.items():
                check_kind(f"unguarded: {name}", KNOBS[name], value)
        return self

    def space_knobs(self) -> tuple[Knob, ...]:
        """The knobs of the search with their ranges."""
        ranges = ((name, limits or KnobRange()) for name, limits in self.knobs.items())
        return tuple(narrowed(name, limits.low, limits.high, limits.choices) for name, limits in ranges)


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
    search: SearchConfig
    promotion: Promotion = Promotion()
    window: WindowConfig = WindowConfig()
    state: Path = Field(default=Path("sloguard-state"), strict=False)
    metrics: MetricsConfig = MetricsConfig()
    page: PageConfig = PageConfig()
    remote: Remote | None = None

    @property
    def socket(self) -> Path:
        """The sidecar's private socket."""
        return self.state / SOCKET_NAME

    def digest(self) -> str:
        """Identifies everything a run depends on: only the same configuration resumes a run."""
        content = self.model_dump(mode="json", exclude={"state", "metrics", "page", "window", "remote"})
        for name in ("agents", "agent_tls"):  # where the engines run is not what they run
            content["engine"].pop(name, None)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def base_digest(self) -> str:
        """Identifies the file's model and arguments: a promotion is valid only while these are unchanged."""
        content = self.model_dump(mode="json", include={"model": True, "engine": {"args"}})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def load_config(path: Path) -> Config:
    """Reads and validates ``path``; relative paths in it are relative to its folder. Raises ConfigError."""
    try:
        content = read_yaml(path)
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
    if not isinstance(content, dict):
        given = "an empty file" if content is None else type(content).__name__
        raise ConfigError(f"{path}: a mapping of fields is needed, got {given}")
    try:
        config = Config.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_first(error)}") from None
    return _placed(config, path.resolve().parent)


def _placed(config: Config, folder: Path) -> Config:
    state = _resolved("state", folder, config.state)
    if len(os.fsencode(state / SOCKET_NAME)) > LONGEST_SOCKET_PATH:
        raise ConfigError(f"state: {state} is too long a path for a Unix socket in it; choose a shorter one")
    local = folder / config.model
    model = str(local.resolve()) if local.is_dir() else config.model
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
            raise ConfigError(f"workload.dataset_path: {dataset}: there is no such file")
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
        raise ConfigError(f"{field}: {str(path)!r} is not a path: {error}") from None
    return resolved


def _first(error: ValidationError) -> str:
    """The first problem in one line: the field, the given value, the allowed ones."""
    problem = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in problem["loc"]) or "the file"
    if problem["type"] == "extra_forbidden":
        in_slo = problem["loc"][:-1] == ("slo",)
        allowed = ALLOWED_NAMES if in_slo else ", ".join(_fields_at(problem["loc"][:-1]))
        return f"{field}: unknown field; allowed: {allowed}"
    if problem["type"] == "model_type":
        return f"{field}: a mapping of fields is needed, got {problem['input']!r}"
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    given = problem["input"]
    # The environment is the place for secrets: its values are never printed.
    untold = isinstance(given, dict | list | BaseModel) or problem["type"] == "missing" or "env" in problem["loc"]
    shown = "" if untold else f" {given!r}:"
    more = len(error.errors()) - 1
    return f"{field}:{shown} {message}" + (f" (and {more} more)" if more else "")


def _fields_at(place: tuple[int | str, ...]) -> list[str]:
    model: type[BaseModel] = Config
    for part in place:
        annotation = model.model_fields[str(part)].annotation if str(part) in model.model_fields else None
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            model = annotation
    return list(KnobRange.model_fields) if "knobs" in place else list(model.model_fields)
