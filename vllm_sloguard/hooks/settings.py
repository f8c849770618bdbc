"""The plugin's settings: ``SLOGUARD_*`` environment variables, read once in each process."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

SETTING_NAMES = tuple(
    f"SLOGUARD_{name}"
    for name in ("SOCKET", "ENGINE_ID", "REPAIR", "PINNED", "WORKLOAD_MAX_LEN", "LEARNED", "IMPORTS", "QUEUE_EVENTS")
)


class SettingsError(ValueError):
    """A variable has an invalid value; the text names the variable, the value and the allowed values."""


@dataclass(frozen=True)
class Settings:
    """The plugin's settings.

    ``socket`` is the sidecar's Unix socket (empty: no telemetry), ``engine_id`` identifies this start of the engine,
    ``repair`` allows changes to engine arguments, ``pinned`` are arguments that are never changed, and
    ``workload_max_len`` is the longest request, in tokens, that a repair must leave possible (0: unknown). ``learned``
    is the sidecar's file of measurements from earlier starts, ``imports`` the folder where imports are recorded for the
    fork server (both empty: none). ``queue_events`` bounds the number of unsent events.
    """

    socket: str = ""
    engine_id: str = ""
    repair: bool = True
    pinned: frozenset[str] = frozenset()
    workload_max_len: int = 0
    learned: str = ""
    imports: str = ""
    queue_events: int = 10_000

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> "Settings":
        """Reads ``environ``. Raises SettingsError for the first bad variable."""
        default = cls()

        def read(name: str, parse: Callable[[str], T], fallback: T, allowed: str) -> T:
            text = environ.get(name, "").strip()
            if not text:
                return fallback
            try:
                return parse(text)
            except (KeyError, ValueError):
                raise SettingsError(f"{name}: {text!r} is not {allowed}") from None

        return cls(
            socket=read("SLOGUARD_SOCKET", str, default.socket, "a path"),
            engine_id=read("SLOGUARD_ENGINE_ID", str, default.engine_id, "a name"),
            repair=read("SLOGUARD_REPAIR", {"on": True, "off": False}.__getitem__, default.repair, "on or off"),
            pinned=read("SLOGUARD_PINNED", _names, default.pinned, "a list of arguments with commas between"),
            workload_max_len=read("SLOGUARD_WORKLOAD_MAX_LEN", _at_least(0), 0, "a whole number from 0 up"),
            learned=read("SLOGUARD_LEARNED", str, default.learned, "a path"),
            imports=read("SLOGUARD_IMPORTS", str, default.imports, "a path"),
            queue_events=read("SLOGUARD_QUEUE_EVENTS", _at_least(1), default.queue_events, "a whole number from 1 up"),
        )


def _names(text: str) -> frozenset[str]:
    names = [name.strip().replace("-", "_") for name in text.split(",")]
    if not all(name.isidentifier() for name in names):
        raise ValueError
    return frozenset(names)


def _at_least(low: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        number = int(text)
        if number < low:
            raise ValueError
        return number

    return parse


def unknown(environ: Mapping[str, str]) -> list[str]:
    """Unknown ``SLOGUARD_*`` names: typing errors, or the variables Kubernetes sets for a service named "sloguard"."""
    return sorted(name for name in environ if name.startswith("SLOGUARD_") and name not in SETTING_NAMES)
