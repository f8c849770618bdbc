"""What running a plan yields, before anything is judged."""

from dataclasses import dataclass

from sidecar.engine.engine import Launch
from sidecar.measure.load_schedule import RateLoad
from sidecar.record.trial import RepairChange, StartKind
from vllm_sloguard.crash import Crash


@dataclass(frozen=True)
class PluginCrash:
    """An exception that the plugin reported from inside vLLM."""

    exception_type: str
    message: str
    context: str


@dataclass(frozen=True)
class PluginReport:
    """What the plugin reported of an engine."""

    repairs: tuple[RepairChange, ...] = ()
    kv_cache_tokens: int | None = None
    vllm_version: str = ""
    crashes: tuple[PluginCrash, ...] = ()


@dataclass(frozen=True)
class EngineRun:
    """One engine and the loads that it got.

    ``launch`` is None where no engine was started. ``exact`` tells that it was started with the plan's very arguments,
    ``settings_held`` that a live change of it was not undone: otherwise the loads are of no known configuration.
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
        """Whether the run tells of the configuration itself, and need not be repeated on an engine of its own."""
        return self.exact or (self.crash is None and self.settings_held and bool(self.loads))


@dataclass(frozen=True)
class RawTrial:
    """The engines that one plan was run on: the last one counts.

    ``warm_start_s`` is how long an unmeasured start before them took, where there was one.
    """

    runs: tuple[EngineRun, ...]
    warm_start_s: float | None = None

    @property
    def last(self) -> EngineRun:
        """The one that counts."""
        return self.runs[-1]
