"""The raw outcome of running a plan, before judging."""

from dataclasses import dataclass

from sidecar.engine.engine import Launch
from sidecar.measure.load_schedule import RateLoad
from sidecar.record.trial import RepairChange, StartKind
from vllm_sloguard.crash import Crash


@dataclass(frozen=True)
class PluginCrash:
    """An exception from inside vLLM, reported by the plugin."""

    exception_type: str
    message: str
    context: str


@dataclass(frozen=True)
class PluginReport:
    """The plugin's reports from one engine."""

    repairs: tuple[RepairChange, ...] = ()
    kv_cache_tokens: int | None = None
    vllm_version: str = ""
    crashes: tuple[PluginCrash, ...] = ()


@dataclass(frozen=True)
class EngineRun:
    """One engine and its loads.

    ``launch`` is None if no engine was started. ``exact``: it was started with exactly the plan's arguments.
    ``settings_held``: no live change was lost; otherwise the loads belong to no known configuration.
    """

    launch: Launch | None
    start: StartKind
    exact: bool
    start_s: float | None = None
    loads: tuple[RateLoad, ...] = ()
    loads_s: float = 0.0
    stop_s: float | None = None
    crash: Crash | None = None
    settings_held: bool = True
    report: PluginReport = PluginReport()

    @property
    def conclusive(self) -> bool:
        """Whether the run is representative of the configuration, and need not be repeated on a new engine."""
        return self.exact or (self.crash is None and self.settings_held and bool(self.loads))


@dataclass(frozen=True)
class RawTrial:
    """The engines that a plan was run on; the last one counts.

    ``warm_start_s`` is the duration of an unmeasured start before them, if there was one.
    """

    runs: tuple[EngineRun, ...]
    warm_start_s: float | None = None

    @property
    def last(self) -> EngineRun:
        """The one that counts."""
        return self.runs[-1]
