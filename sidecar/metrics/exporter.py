"""Serves /metrics for Prometheus and /ready for load balancers."""

import re
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import cast

from prometheus_client import CollectorRegistry, Gauge, Info, disable_created_metrics, make_asgi_app  # pyright: ignore[reportUnknownVariableType]

from sidecar.config.schema import Config
from sidecar.format import Say
from sidecar.http_server import BACKLOG, AsgiApplication, HttpApplication, HttpReceive, HttpScope, HttpSend, HttpServer
from sidecar.metrics.engine import EngineMetrics
from sidecar.metrics.trials import TrialMetrics
from sidecar.metrics.window import WindowMetrics
from sidecar.observe.telemetry import EngineTelemetry
from sidecar.promote.probation import ProbationVerdict
from sidecar.record.decisions import Decision
from sidecar.record.events import WindowOutcome
from sidecar.record.states import Cause, State
from sidecar.record.trial import Trial
from vllm_sloguard import __version__
from vllm_sloguard.agent.ports import port_owner
from vllm_sloguard.crash import Crash
from vllm_sloguard.wire import telemetry_pb2 as pb

_LONGEST_VALUE = 200
# The promotion's label value while the file's own arguments are served.
_NONE = "none"

_TRYING = (State.TUNING, State.VALIDATING)
# In these states, no engine is serving.
_WITHOUT_SERVING = (*_TRYING, State.PROMOTING, State.RESTORING)

ShownArgs = Mapping[str, object]


class Metrics:
    """Every metric of the sidecar, in a registry of its own. ``clock`` is in monotonic seconds."""

    def __init__(self, config: Config, clock: Callable[[], float] = time.monotonic) -> None:
        disable_created_metrics()  # otherwise each counter has another series, which nothing uses
        self.registry = CollectorRegistry()
        self._config = config
        self._ready = False
        self._window = WindowMetrics(self.registry, clock)
        self._trials = TrialMetrics(self.registry, config.search.budget, config.objective)
        self._engine = EngineMetrics(self.registry, config.slo)
        self._define_configuration()

    def _define_configuration(self) -> None:
        reg, config = self.registry, self._config
        Info("sloguard_build", "Version of the sidecar.", registry=reg).info({"version": __version__})
        Info("sloguard_model", "The model, by its name in vLLM, and the objective.", registry=reg).info(
            {"model": _model_name(config), "objective": str(config.objective)}
        )
        Gauge(
            "sloguard_next_window_timestamp_seconds",
            "When window.cron opens the next window unless paused, in Unix time; 0 if none is scheduled.",
            registry=reg,
        ).set_function(lambda: config.window.next_opening(time.time()) or 0.0)
        self._engine_up = Gauge(
            "sloguard_engine_up", "Whether the serving engine is running and responding.", registry=reg
        )
        self._serving: tuple[int | None, dict[str, object]] | None = None
        self._serving_info = Info(
            "sloguard_serving_configuration",
            "Engine arguments of the current configuration, after repairs.",
            registry=reg,
        )
        self._serving_since = Gauge(
            "sloguard_serving_configuration_timestamp_seconds",
            "When this sidecar first served the current configuration, in Unix time.",
            registry=reg,
        )
        self._promoted: dict[str, str] = {}
        self._promoted_info = Info(
            "sloguard_promoted_configuration",
            "Engine arguments to serve: the current promotion, or the file's own arguments.",
            registry=reg,
        )

    # Called by the telemetry, on server threads

    def traffic(self, engine_id: str, traffic: str) -> None:
        """Announces an engine, whose requests are "serving" or "trial" traffic."""
        self._engine.expect(engine_id, traffic)

    def on_events(self, request: pb.PublishRequest, engine: EngineTelemetry) -> None:
        """Takes a batch of the telemetry; ``engine`` is what is known of its engine."""
        self._engine.on_events(request, engine)

    # Called by the loop

    def entered(self, state: State, *, ready: bool, cause: Cause | None = None) -> None:
        """Takes a change of state."""
        self._window.entered(state, cause)
        if state in _WITHOUT_SERVING:
            self._engine.ended("serving")
        if state not in _TRYING:
            self._engine.ended("trial")
        self._ready = ready

    def serving(self, args: ShownArgs, promotion: int | None = None) -> None:
        """Takes the configuration that is served from now on; ``promotion`` is None for the file's own arguments."""
        now = (promotion, dict(args))
        if now == self._serving:  # restarted after a crash
            return
        self._serving_info.info(_labels(args, promotion))
        self._serving_since.set_to_current_time()
        if self._serving is not None:
            self._engine.another_serves()
        self._trials.serving(args)
        self._serving = now

    def promoted(self, args: ShownArgs, promotion: int | None) -> None:
        """Takes the configuration to serve."""
        labels = _labels(args, promotion)
        if labels != self._promoted:
            self._promoted_info.info(labels)
        self._promoted = labels

    def trial(self, trial: Trial, trials: Sequence[Trial]) -> None:
        """Takes a trial that has started or ended; ``trials`` are all of its run."""
        self._window.trial(trial)
        self._trials.trial(trial, trials)
        if trial.ended_at is not None:
            for change in trial.plan.changes:
                self._engine.repaired(change.rules)

    def crashed(self, crash: Crash, traffic: str) -> None:
        """Takes a crash of the "serving" engine or of a "trial" one."""
        self._trials.crashed(crash, traffic)

    def decided(self, decision: Decision) -> None:
        """Takes the decision of a run."""
        self._window.decided(decision)

    def controller(self, epoch: int) -> None:
        """Takes the number of this controller."""
        self._window.epoch.set(epoch)

    def engine_answers(self, *, up: bool) -> None:
        """Takes whether the serving engine runs and answers."""
        self._engine_up.set(up)

    def pausing(self, *, paused: bool) -> None:
        """Takes whether windows are paused."""
        self._window.paused.set(paused)

    def window_ended(self, outcome: WindowOutcome) -> None:
        """Takes how a window ended."""
        self._window.windows.labels(str(outcome)).inc()

    def rolled_back(self, verdict: ProbationVerdict) -> None:
        """Takes why a promotion was rolled back."""
        self._window.rollbacks.labels(str(verdict)).inc()

    # Read at each scrape, on its thread

    def clock_window(self, remaining_s: Callable[[], float], overrun_s: Callable[[], float]) -> None:
        """Takes functions that return the window's time left and its overrun."""
        self._window.remaining.set_function(remaining_s)
        self._window.overrun.set_function(overrun_s)

    def clock_probation(self, remaining_s: Callable[[], float]) -> None:
        """Takes a function that returns the probation's time left."""
        self._window.probation_remaining.set_function(remaining_s)

    def clock_restore(self, expected_s: Callable[[], float]) -> None:
        """Takes a function that returns the expected duration of a restore."""
        self._window.restore_expected.set_function(expected_s)

    # HTTP

    def serve(self, say: Say) -> HttpServer:
        """Starts the HTTP server. Raises OSError for a port that is taken."""
        where = self._config.metrics
        family = socket.AF_INET6 if ":" in where.host else socket.AF_INET
        try:
            listener = socket.create_server((where.host, where.port), family=family, backlog=BACKLOG)
        except OSError as error:
            why = str(error.strerror).partition(" (")[0]  # then it repeats the address
            raise OSError(f"metrics: {where.host}:{where.port}: {why}{port_owner(where.port)}") from None
        server = HttpServer("metrics", listener, self._application, say)
        server.start()
        return server

    def _application(self) -> HttpApplication:
        from starlette.responses import PlainTextResponse

        exposition = cast("AsgiApplication", make_asgi_app(self.registry, disable_compression=True))

        async def app(scope: HttpScope, receive: HttpReceive, send: HttpSend) -> None:
            if scope["path"] == "/metrics":
                await exposition(scope, receive, send)
                return
            status, text = 404, "Not Found"
            if scope["path"] == "/ready":
                status, text = (200, "OK") if self._ready else (503, "Service Unavailable")
            await PlainTextResponse(f"{status} {text}\n", status)(scope, receive, send)

        return HttpApplication(app)


def _model_name(config: Config) -> str:
    """As in vLLM's label "model_name": the first served name, or the model."""
    given = config.engine.args.get("served_model_name", config.model)
    return str(given[0] if isinstance(given, list) and given else given)


def _labels(args: ShownArgs, promotion: int | None) -> dict[str, str]:
    """One label per argument; Prometheus 2 allows letters, digits and _ in label names."""
    shown = {re.sub(r"\W", "_", name, flags=re.ASCII): str(value)[:_LONGEST_VALUE] for name, value in args.items()}
    return {**shown, "promotion": _NONE if promotion is None else str(promotion)}
