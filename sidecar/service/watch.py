"""The loop of `sloguard serve` with ``engine.watch_only``: it reports on a vLLM that someone else runs."""

import os
import time
from collections import deque

from sidecar.config.schema import Config, ConfigError
from sidecar.format import Say
from sidecar.observe.slo_compliance import SloCompliance, compliance_report
from sidecar.observe.watch_report import (
    WATCH_REPORT,
    WATCH_REPORT_FILE,
    EngineLoadSample,
    WatchReport,
    advice,
)
from sidecar.record.action_queue import ActionQueue
from sidecar.record.atomic_write import write_whole
from sidecar.record.journal import JournalError
from sidecar.record.states import Cause, State
from sidecar.service.parts import ServiceParts
from sidecar.service.state_machine import StateMachine
from vllm_sloguard.agent.engine_http import EngineHttp
from vllm_sloguard.agent.ports import port_owner

# The plugin of an engine that neither a sidecar nor an agent has started reports without an id.
_FOREIGN_ENGINE_ID = ""
_LOOK_EVERY_S, _LOOK_AGAIN_S = 5.0, 1.0
_REPORT_OVER_S = 900.0
_SAMPLES = round(_REPORT_OVER_S / _LOOK_EVERY_S)
# Failed health checks until vLLM counts as down.
_MISSES_TO_DOWN = 2


class WatchService:
    """The loop; single-threaded, on the thread that calls ``run``."""

    def __init__(self, config: Config, parts: ServiceParts, *, say: Say) -> None:
        self._config = config
        self._parts = parts
        self._say = say
        self.progress = self._progress = StateMachine(parts.journal, parts.metrics, parts.requests, say)
        self._http = EngineHttp(config.engine.host, config.engine.port)
        self._samples: deque[EngineLoadSample] = deque(maxlen=_SAMPLES)
        self._misses = 0
        self._compliance = SloCompliance.UNKNOWN
        self._trouble = ""

    def run(self) -> None:
        """Watches until a stop is requested. Raises ConfigError, JournalError, Superseded."""
        self._begin()
        self._look()
        while not self._parts.requests.stop_sidecar.wait(_LOOK_AGAIN_S if self._misses else _LOOK_EVERY_S):
            self._look()
        (self._config.state / WATCH_REPORT_FILE).unlink(missing_ok=True)
        self._progress.enter(State.HALTED, Cause.ENGINE_LEFT, "stopped; the watched vLLM is not affected")

    def _begin(self) -> None:
        parts = self._parts
        if (pid := parts.engines.serving_process()) is not None:
            raise ConfigError(
                f"engine.watch_only: this state folder's own vLLM is running (process {pid}): stop it (remove"
                " watch_only, `sloguard serve`, Ctrl-C), or use another state folder"
            )
        parts.requests.epoch = parts.journal.take_over(os.getpid())
        parts.metrics.controller(parts.requests.epoch)
        ActionQueue(parts.journal).take_over()
        parts.hub.expect(_FOREIGN_ENGINE_ID)
        parts.metrics.traffic(_FOREIGN_ENGINE_ID, "serving")
        parts.requests.engine_id = _FOREIGN_ENGINE_ID
        parts.requests.mismatch = self._why_untunable()
        self._progress.enter(State.STARTING, Cause.STARTED, "the sidecar has started")

    def _why_untunable(self) -> str:
        return (
            f"the vLLM at {self._http.base_url} is only watched and can't be tuned: neither this sidecar nor an agent"
            " started it, so it can't be drained, restarted or restored; to tune it, start it with"
            " `sloguard-agent -- COMMAND` and set engine.agents instead of engine.watch_only"
        )

    def _look(self) -> None:
        """One health check, and the report. Raises Superseded."""
        up = self._http.healthy()
        self._misses = 0 if up else self._misses + 1
        self._parts.metrics.engine_answers(up=up)
        if up:
            self._progress.enter(State.SERVING, Cause.ENGINE_TAKEN_OVER, self._why_untunable())
        elif self._progress.state is State.STARTING or self._misses >= _MISSES_TO_DOWN:
            owner = port_owner(self._config.engine.port)
            state = f"the port is taken{owner}" if owner else "nothing listens there"
            self._progress.enter(
                State.RESTORING,
                Cause.ENGINE_CRASHED,
                f"the watched vLLM at {self._http.base_url} does not answer ({state}); it has to be restarted by"
                " whatever runs it",
            )
        try:
            self._parts.journal.flush()
            self._parts.journal.still_mine()
            self._report(up=up)
        except (JournalError, OSError) as error:
            if str(error) != self._trouble:
                self._say(str(error))
            self._trouble = str(error)

    def _report(self, *, up: bool) -> None:
        """Writes the report for `sloguard status`. Raises OSError."""
        hub, config = self._parts.hub, self._config
        telemetry = hub.of(_FOREIGN_ENGINE_ID)
        levels = telemetry.levels
        self._samples.append(EngineLoadSample(levels.waiting_requests, levels.kv_cache_usage, telemetry.preemptions))
        found = compliance_report(
            hub.traffic(_FOREIGN_ENGINE_ID),
            time.monotonic(),
            config.slo,
            over_s=_REPORT_OVER_S,
            min_requests=config.promotion.probation.min_requests,
        )
        reported = bool(telemetry.sequences)
        advised = advice(found, tuple(self._samples), telemetry=reported)
        report = WatchReport(time.time(), self._http.base_url, up, reported, found, advised)
        if found.compliance is not self._compliance:
            self._say(f"SLO of the last {found.over_s / 60:.0f} minutes: {found.compliance}")
            self._compliance = found.compliance
        write_whole(config.state / WATCH_REPORT_FILE, WATCH_REPORT.dump_json(report).decode(), 0o600)
