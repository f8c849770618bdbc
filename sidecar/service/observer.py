"""The interface through which the service notifies its observers, such as /metrics."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from sidecar.observe.telemetry import EngineTelemetry
from sidecar.promote.probation import ProbationVerdict
from sidecar.record.decisions import Decision
from sidecar.record.events import WindowOutcome
from sidecar.record.states import Cause, State
from sidecar.record.trial import Trial
from vllm_sloguard.crash import Crash
from vllm_sloguard.wire import telemetry_pb2 as pb


class ServiceObserver(Protocol):
    """Called on the loop's thread, except ``on_events``, which gRPC's threads call. Must not block or raise."""

    def traffic(self, engine_id: str, traffic: str) -> None:
        """Labels the requests of ``engine_id`` as "serving" or "trial" traffic."""
        ...

    def on_events(self, request: pb.PublishRequest, engine: EngineTelemetry) -> None:
        """A batch of telemetry, and its engine's accumulated telemetry."""
        ...

    def controller(self, epoch: int) -> None:
        """This sidecar controls the state folder, with ``epoch``."""
        ...

    def entered(self, state: State, *, ready: bool, cause: Cause | None = None) -> None:
        """The service has entered ``state``."""
        ...

    def engine_answers(self, *, up: bool) -> None:
        """Whether the serving engine is running and answering."""
        ...

    def serving(self, args: Mapping[str, object], promotion: int | None = None) -> None:
        """The arguments now serving, and their promotion; None for the file's own arguments."""
        ...

    def promoted(self, args: Mapping[str, object], promotion: int | None) -> None:
        """The current configuration, whether or not it is up yet."""
        ...

    def pausing(self, *, paused: bool) -> None:
        """Whether the operator has paused tuning."""
        ...

    def window_ended(self, outcome: WindowOutcome) -> None:
        """A window has ended, or was refused."""
        ...

    def trial(self, trial: Trial, trials: Sequence[Trial]) -> None:
        """A trial has started or ended; ``trials`` are all trials of its run."""
        ...

    def crashed(self, crash: Crash, traffic: str) -> None:
        """An engine with "serving" or "trial" traffic has crashed."""
        ...

    def decided(self, decision: Decision) -> None:
        """A run has ended with ``decision``."""
        ...

    def rolled_back(self, verdict: ProbationVerdict) -> None:
        """A promotion was rolled back."""
        ...

    def clock_window(self, remaining_s: Callable[[], float], overrun_s: Callable[[], float]) -> None:
        """Callbacks for the window's remaining time and overrun; callable from any thread."""
        ...

    def clock_probation(self, remaining_s: Callable[[], float]) -> None:
        """Callback for the probation's remaining time; callable from any thread."""
        ...

    def clock_restore(self, expected_s: Callable[[], float]) -> None:
        """Callback for the expected duration of a restore; callable from any thread."""
        ...
