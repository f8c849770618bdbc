"""Mistakes in the operator's file, as messages: all at once, each with its line, field and an example. Pure."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticUndefined

from sidecar.config.slo import ALLOWED_NAMES
from sidecar.config.yaml_file import Place, YamlLines

# The offending value may be long; the error message must not be.
_LONGEST_LINE = 1000
_MOST_MISTAKES = 30
_ALIKE = 0.6
# Examples of what has no default.
_EXAMPLES: Mapping[str, str] = {
    "model": "model: Qwen/Qwen3-0.6B",
    "slo": "slo: {ttft_p99_ms: 500, itl_p99_ms: 50}",
    "workload": "workload: {rate: 4}",
    "workload.rate": "rate: 4",
    "workload.highest_rate": "highest_rate: 64",
    "workload.requests": "requests: 200",
    "workload.dataset_path": "dataset_path: prompts.jsonl",
    "search": "search: {budget: 15}",
    "engine": "engine: {args: {max-num-seqs: 64}}",
    "engine.env": 'env: {HF_HUB_OFFLINE: "1"}',
    "window.cron": 'cron: "0 3 * * 1-5"',
    "window.duration": "duration: 45m",
    "window": "window: {duration: 45m}",
    "promotion": "promotion: {min_gain: 0.05}",
    "promotion.pairs": "pairs: [3, 5, 8]",
    "slo.error_rate": "error_rate: 0.01",
    "slo.goodput": "goodput: 0.99",
    "search.knobs": "knobs: {max_num_seqs: {low: 8, high: 256}}",
}
_WANTED = {
    "int_parsing": "a whole number is needed",
    "int_type": "a whole number is needed",
    "int_from_float": "a whole number is needed",
    "float_parsing": "a number is needed",
    "float_type": "a number is needed",
    "bool_type": "true or false is needed",
    "bool_parsing": "true or false is needed",
    "string_type": "a text is needed",
    "model_type": "a mapping of fields is needed",
    "dict_type": "a mapping is needed",
    "list_type": "a list is needed",
    "missing": "missing",
}


@dataclass(frozen=True)
class Mistake:
    """One mistake: where it is in the file, and what is wrong with it. ``place`` is empty for the whole file."""

    place: Place
    text: str


class MisplacedValues(ValueError):  # noqa: N818 - it names what is wrong
    """Raised by a section's validator for several mistakes, each at a place below the section."""

    def __init__(self, mistakes: Sequence[Mistake]) -> None:
        super().__init__("; ".join(mistake.text for mistake in mistakes))
        self.mistakes = tuple(mistakes)


class ConfigError(ValueError):
    """The file or an option can't be used. One line for each mistake; several follow a line that counts them."""

    def __init__(self, text: str, lines: Sequence[str] = ()) -> None:
        super().__init__("\n".join([_one_line(text), *(f"  {_one_line(line)}" for line in lines)]))


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_LINE else f"{line[: _LONGEST_LINE - 3]}..."


def file_error(path: object, mistakes: Sequence[Mistake], lines: YamlLines) -> ConfigError:
    """The error for a file with ``mistakes``, in the file's order."""
    found = sorted(dict.fromkeys(mistakes), key=lambda mistake: lines.of(mistake.place) or 0)
    texts = [located(mistake, lines) for mistake in found]
    if len(texts) == 1:
        return ConfigError(f"{path}: {texts[0]}")
    more = [f"and {len(texts) - _MOST_MISTAKES} more"] if len(texts) > _MOST_MISTAKES else []
    return ConfigError(f"{path}: {len(texts)} mistakes", [*texts[:_MOST_MISTAKES], *more])


def located(mistake: Mistake, lines: YamlLines) -> str:
    """The mistake in one line: "line 4: slo.p99: unknown field; …"."""
    line = lines.of(mistake.place)
    where = f"line {line}: " if line is not None else ""
    field = ".".join(map(str, mistake.place))
    return f"{where}{field}: {mistake.text}" if field else f"{where}{mistake.text}"


def repeated_keys(lines: YamlLines) -> list[Mistake]:
    """Keys that a mapping of the file has twice: YAML readers silently take the last."""
    return [Mistake(again.place, f"given twice, first in line {again.first_line}; keep one") for again in lines.repeats]


def schema_mistakes(error: ValidationError, content: object, root: type[BaseModel]) -> list[Mistake]:
    """The mistakes in ``content`` that pydantic found: one for each place, however many types a value may have."""
    found: dict[Place, Mistake] = {}
    problems = error.errors(include_url=False)
    unknown = [problem["loc"] for problem in problems if problem["type"] == "extra_forbidden"]
    for problem in problems:
        if problem["type"] == "missing" and any(_misspells(name, problem["loc"]) for name in unknown):
            continue
        for mistake in _placed_mistakes(problem, content, root):
            found.setdefault(mistake.place, mistake)
    return list(found.values())


def _misspells(name: Place, missing: Place) -> bool:
    return name[:-1] == missing[:-1] and bool(_close(str(name[-1]), [str(missing[-1])]))


def _close(name: str, names: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name[:80], list(names), 1, _ALIKE)), None)


def _placed_mistakes(problem: ErrorDetails, content: object, root: type[BaseModel]) -> list[Mistake]:
    place = problem["loc"] if problem["type"] == "missing" else _existing(problem["loc"], content)
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, MisplacedValues):
        return [Mistake((*place, *one.place), one.text) for one in cause.mistakes]
    if problem["type"] == "extra_forbidden":
        return [Mistake(place, _unknown_field(place, root))]
    return [Mistake(place, _wrong_value(problem, place, root))]


def _existing(place: Place, content: object) -> Place:
    """The part of ``place`` that is in ``content``: pydantic adds which type of a union it tried."""
    for depth, part in enumerate(place):
        try:
            content = cast("Any", content)[part]
        except (KeyError, IndexError, TypeError):
            return place[:depth]
    return place


def _unknown_field(place: Place, root: type[BaseModel]) -> str:
    *section, name = map(str, place)
    if section == ["slo"]:
        return f"unknown field; allowed: {ALLOWED_NAMES}"
    names = list(_model_at(tuple(section), root).model_fields)
    close = _close(name, names)
    meant = f"did you mean {close}? " if close else ""
    return f"unknown field; {meant}allowed: {', '.join(names)}"


def _model_at(place: Place, root: type[BaseModel]) -> type[BaseModel]:
    model = root
    for part in place:
        field = model.model_fields.get(str(part))
        below = _models_in(field.annotation) if field is not None else []
        model = below[0] if below else model
    return model


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [model for part in getattr(annotation, "__args__", ()) for model in _models_in(part)]


def _wrong_value(problem: ErrorDetails, place: Place, root: type[BaseModel]) -> str:
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    wanted = _WANTED.get(problem["type"], message)
    given: object = problem["input"]
    # The environment is the place for secrets: its values are never printed.
    hidden = isinstance(given, dict | list | BaseModel) or problem["type"] == "missing" or "env" in place
    if isinstance(given, dict | list) and problem["type"] in _WANTED and problem["type"] != "missing":
        wanted = f"{wanted}, not a {'list' if isinstance(given, list) else 'mapping'}"
    shown = "" if hidden else f"{given!r}: "
    example = _example(place, root) if problem["type"] in _WANTED else ""
    unit = _unit(place, cast("object", given))
    return f"{shown}{wanted}{unit or (f', such as `{example}`' if example else '')}"


def _unit(place: Place, given: object) -> str:
    """What the text ``given`` is in the field's own unit: "2s" of ttft_p99_ms is 2000."""
    if not isinstance(given, str) or not place:
        return ""
    name, text = str(place[-1]), given.strip().lower().replace(" ", "")
    scales = (
        [("ms", 1.0, "milliseconds"), ("s", 1000.0, "milliseconds"), ("m", 60_000.0, "milliseconds")]
        if name.endswith("_ms")
        else [("ms", 0.001, "seconds"), ("s", 1.0, "seconds"), ("m", 60.0, "seconds"), ("h", 3600.0, "seconds")]
        if name.endswith("_s")
        else [("%", 0.01, "a share between 0 and 1")]
        if name in {"error_rate", "goodput", "min_gain", "confidence", "slo_confidence", "tolerance", "noise", "spread"}
        else [(end, 1.0, "requests per second") for end in ("requests/s", "req/s", "/s", "rps")]
        if name in {"rate", "highest_rate", "max_rate"}
        else []
    )
    for end, scale, unit in scales:
        number = _number(text.removesuffix(end)) if text.endswith(end) else None
        if number is not None:
            return f", in {unit}: write `{name}: {number * scale:.6g}`".replace("in a share", "as a share")
    return ""


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _example(place: Place, root: type[BaseModel]) -> str:
    names = ".".join(str(part) for part in place)
    if names in _EXAMPLES:
        return _EXAMPLES[names]
    if not place:
        return ""
    name = str(place[-1])
    if place[0] == "slo" and name.endswith("_ms"):
        return f"{name}: 500"
    field = _model_at(place[:-1], root).model_fields.get(name)
    default = field.default if field is not None else PydanticUndefined
    if isinstance(default, bool):
        return f"{name}: {str(default).lower()}"
    return f"{name}: {default:g}" if isinstance(default, int | float) else ""
