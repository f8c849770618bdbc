"""A landscape: the outcome of a trial as a function. Defines the interface of landscape files and validates them.

A file defines ``LANDSCAPES``, name to object (an instance, a class or a module). Each object has ``space()``,
``host()``, ``slo()``, ``incumbent()``, and ``serve(config, rng)`` or ``evaluate(config, rng)``; benchmarks/README.md
describes them.
"""

import hashlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
from pydantic import ValidationError

from sidecar.bench.played_load import ServedLoad, served_from
from sidecar.config.schema import ConfigError
from sidecar.config.slo import Slo
from sidecar.measure.verdict import Limit
from sidecar.search.contract import ObservedStatus
from sidecar.search.space import Space
from vllm_sloguard.knobs import KNOBS, Knob, KnobKind, KnobValues, Value

_METHODS = ("space", "host", "slo", "incumbent")


class LandscapeError(ConfigError):
    """An invalid landscape; the text is one line that names the file, the landscape and the problem."""


@dataclass(frozen=True)
class Host:
    """The machine and the model, as the guard sees them before a start. ``None``: not stated by the landscape."""

    gpu_total_gib: float | None
    gpu_free_gib: float | None
    weights_gib: float | None
    kv_bytes_per_token: int | None
    max_len_needed: int | None


@dataclass(frozen=True)
class LandscapeVerdict:
    """The outcome of one trial. ``latency_ms`` is the objective, lower is better; ``None`` if not measured.

    ``violation`` and ``margins`` are defined as in ``Observation``.
    """

    outcome: ObservedStatus
    crash_kind: str
    latency_ms: float | None
    violation: float
    margins: Mapping[str, float] | None
    cost_s: float


@dataclass(frozen=True)
class Landscape:
    """One landscape, ready to run. ``fast_ms`` is the study's threshold for a "fast" trial, if it defines one."""

    name: str
    about: str
    space: Space
    host: Host
    slo: Mapping[str, float]
    incumbent: KnobValues
    fast_ms: float | None
    best_known_ms: float | None
    source: Any

    @property
    def serves(self) -> bool:
        """Whether it returns single requests; otherwise it returns a verdict per trial."""
        return callable(getattr(self.source, "serve", None))

    @cached_property
    def objectives(self) -> Slo:
        """``slo`` as the sidecar's type. Raises LandscapeError."""
        try:
            return Slo.model_validate(dict(self.slo))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise LandscapeError(f"{self.name}: slo {where}: {first['msg']}") from None

    def serve(self, config: KnobValues, rng: np.random.Generator) -> ServedLoad:
        """The requests of one trial. Raises LandscapeError."""
        try:
            return served_from(self.name, self.source.serve(dict(config), rng))
        except (Exception, SystemExit) as error:  # noqa: BLE001 - the boundary to a file that others wrote
            raise LandscapeError(f"{self.name}: serve({dict(config)}) raised {error!r}") from None

    def evaluate(self, config: KnobValues, rng: np.random.Generator) -> LandscapeVerdict:
        """Runs one trial. Raises LandscapeError if the landscape raises or returns an invalid result."""
        try:
            answer: object = self.source.evaluate(dict(config), rng)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - the boundary to a file that others wrote
            raise LandscapeError(f"{self.name}: evaluate({dict(config)}) raised {error!r}") from None
        if not isinstance(answer, Mapping):
            raise LandscapeError(f"{self.name}: evaluate() must return a mapping, got {answer!r}")
        return landscape_verdict(self.name, cast("Mapping[str, Any]", answer), self.slo)


def landscape_verdict(name: str, answer: Mapping[str, Any], slo: Mapping[str, float]) -> LandscapeVerdict:
    """Judges the result of ``evaluate``: its own status, and each limit of ``slo``. Unmeasured is never feasible."""
    known = (ObservedStatus.FEASIBLE, ObservedStatus.INFEASIBLE, ObservedStatus.CRASHED)
    status: object = answer.get("status")
    if status not in known:
        raise LandscapeError(f"{name}: status must be one of {', '.join(known)}, got {status!r}")
    cost_s = finite_or_none(answer.get("cost_s")) or 0.0
    if status == ObservedStatus.CRASHED:
        kind = str(answer.get("crash_kind") or "unknown")
        return LandscapeVerdict(ObservedStatus.CRASHED, kind, None, math.inf, None, cost_s)
    latency_ms = finite_or_none(answer.get("latency_ms"))
    limits = [Limit(key, limit, finite_or_none(answer.get(key))) for key, limit in slo.items()]
    excesses = [limit.excess for limit in limits]
    if status != ObservedStatus.FEASIBLE and not any(excesses):
        excesses.append(1.0)  # it missed a limit that it does not report
    if latency_ms is None:
        excesses.append(1.0)
    margins = {li.name: 1.0 if li.measured is None else (li.measured - li.limit) / li.limit for li in limits}
    violation = sum(excesses) / len(excesses) if excesses else 0.0
    outcome = ObservedStatus.INFEASIBLE if violation else ObservedStatus.FEASIBLE
    return LandscapeVerdict(outcome, "", latency_ms, violation, margins, cost_s)


def finite_or_none(value: object) -> float | None:
    """A finite number, or None for anything else."""
    plain = _plain(value)
    if isinstance(plain, bool) or not isinstance(plain, int | float):
        return None
    number = float(plain)
    return number if math.isfinite(number) else None


def load_landscapes(path: Path, only: str | None = None) -> dict[str, Landscape]:
    """The landscapes of a file, or only ``only``. Raises LandscapeError."""
    found: object = getattr(_module(path), "LANDSCAPES", None)
    if not isinstance(found, Mapping) or not found:
        raise LandscapeError(f"{path}: LANDSCAPES must be a mapping from name to landscape, got {found!r}")
    sources = {str(name): source for name, source in cast("Mapping[Any, Any]", found).items()}
    if only is not None and only not in sources:
        raise LandscapeError(f"{path}: no landscape is called {only!r}; there are {', '.join(sources)}")
    return {name: _landscape(name, source) for name, source in sources.items() if only in (None, name)}


def _module(path: Path) -> ModuleType:
    """Imports the file as a module; it can import its neighbours."""
    if not path.is_file():
        raise LandscapeError(f"{path}: there is no such file")
    full = path.resolve()
    name = f"landscape_{hashlib.sha256(str(full).encode()).hexdigest()[:8]}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, full)
    if spec is None or spec.loader is None:
        raise LandscapeError(f"{path}: must be a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if str(full.parent) not in sys.path:
        sys.path.append(str(full.parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # noqa: BLE001 - the boundary to a file that others wrote
        raise LandscapeError(f"{path}: cannot be loaded: {error!r}") from None
    return module


def _landscape(name: str, source: Any) -> Landscape:
    missing = [method for method in _METHODS if not callable(getattr(source, method, None))]
    if missing:
        raise LandscapeError(f"{name}: has no {missing[0]}()")
    if not any(callable(getattr(source, method, None)) for method in ("serve", "evaluate")):
        raise LandscapeError(f"{name}: has neither serve() nor evaluate()")
    try:
        source = source() if inspect.isclass(source) else source
        knobs = {key: _knob(key, stated) for key, stated in _mapping(source.space()).items()}
        slo = {key: _limit(key, limit) for key, limit in _mapping(source.slo()).items() if limit is not None}
        incumbent = {k: _value(v, knobs.get(k) or KNOBS.get(k)) for k, v in _mapping(source.incumbent()).items()}
        return Landscape(
            name=name,
            about=(inspect.getdoc(source) or "").strip(),
            space=Space(tuple(knobs.values())),
            host=_host(_mapping(source.host())),
            slo=slo,
            incumbent=incumbent,
            fast_ms=finite_or_none(getattr(source, "fast_ms", None)),
            best_known_ms=finite_or_none(source.best_known()) if hasattr(source, "best_known") else None,
            source=source,
        )
    except LandscapeError:
        raise
    except Exception as error:  # noqa: BLE001 - the boundary to a file that others wrote
        raise LandscapeError(f"{name}: {error!r}") from None


def _limit(name: str, stated: Any) -> float:
    limit = finite_or_none(stated)
    if limit is None or limit <= 0:
        raise LandscapeError(f"slo: {name} must be a number above 0, got {stated!r}")
    return limit


def _scalar(value: Any) -> Value:
    plain = _plain(value)
    if not isinstance(plain, bool | int | float | str):
        raise LandscapeError(f"expected a number, a string, true or false, got {value!r}")
    return plain


def _mapping(answer: Any) -> dict[str, Any]:
    """A method's result; None means that nothing is stated."""
    if answer is not None and not isinstance(answer, Mapping):
        raise TypeError(f"expected a mapping, got {answer!r}")
    return {str(key): value for key, value in cast("Mapping[Any, Any]", answer or {}).items()}


def _knob(name: str, stated: Mapping[str, Any]) -> Knob:
    """One entry of ``space()``. ``requires`` is optional, as in the knob table."""
    requires = dict(stated.get("requires") or {})
    try:
        kind = KnobKind(stated["type"])
    except (KeyError, ValueError):
        wanted = ", ".join(KnobKind)
        raise LandscapeError(f"{name}: type must be one of {wanted}, got {stated.get('type')!r}") from None
    if kind is KnobKind.CATEGORICAL:
        return Knob(name, kind, choices=tuple(_scalar(choice) for choice in stated["choices"]), requires=requires)
    low, high = float(stated["low"]), float(stated["high"])
    if low == high:
        return Knob(name, KnobKind.CATEGORICAL, choices=(int(low) if kind is KnobKind.INT else low,), requires=requires)
    return Knob(name, kind, low, high, log=bool(stated.get("log", False)), requires=requires)


def _plain(value: Any) -> Any:
    """numpy scalars as plain Python values."""
    return cast("Any", value.item()) if isinstance(value, np.generic) else value


def _value(value: Any, knob: Knob | None) -> Value:
    """Converts a whole number to int for an integer knob: 256.0 becomes 256."""
    plain = _scalar(value)
    if knob is not None and knob.kind is KnobKind.INT and isinstance(plain, float) and plain.is_integer():
        return int(plain)
    return plain


def _host(stated: Mapping[str, Any]) -> Host:
    numbers = {key: finite_or_none(_plain(stated.get(key))) for key in Host.__dataclass_fields__}
    if bad := [key for key, number in numbers.items() if number is not None and number <= 0]:
        raise LandscapeError(f"host: {bad[0]} must be above 0, got {numbers[bad[0]]}")
    kv, length = numbers["kv_bytes_per_token"], numbers["max_len_needed"]
    return Host(
        gpu_total_gib=numbers["gpu_total_gib"],
        gpu_free_gib=numbers["gpu_free_gib"],
        weights_gib=numbers["weights_gib"],
        kv_bytes_per_token=None if kv is None else round(kv),
        max_len_needed=None if length is None else math.ceil(length),
    )
