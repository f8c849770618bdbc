"""What the service tells whoever watches it; /metrics is one that does."""

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
    """Called by the loop on its thread, except ``heard``, which gRPC's threads call. No call may block or raise."""

    def traffic(self, engine_id: str, traffic: str) -> None:
        """The requests of ``engine_id`` are "serving" or "trial" ones."""
        ...

    def heard(self, request: pb.PublishRequest, engine: EngineTelemetry) -> None:
        """One batch of telemetry, and everything its engine has reported so far."""
        ...

    def controller(self, epoch: int) -> None:
        """This sidecar controls the state folder, as number ``epoch``."""
        ...

    def entered(self, state: State, *, ready: bool, cause: Cause | None = None) -> None:
        """The service has changed its state."""
        ...

    def engine_answers(self, *, up: bool) -> None:
        """Whether the serving engine runs and answers."""
        ...

    def serving(self, args: Mapping[str, object], promotion: int | None = None) -> None:
        """What is served from now on, of ``promotion``; None for the file's own arguments."""
        ...

    def promoted(self, args: Mapping[str, object], promotion: int | None) -> None:
        """What is to serve."""
        ...

    def pausing(self, *, paused: bool) -> None:
        """Whether the operator lets no window open."""
        ...

    def window_ended(self, outcome: WindowOutcome) -> None:
        """A window has ended, or was refused."""
        ...

    def trial(self, trial: Trial, trials: Sequence[Trial]) -> None:
        """A trial has started or ended; ``trials`` are all of its run."""
        ...

    def crashed(self, crash: Crash, traffic: str) -> None:
        """The "serving" engine or a "trial" one has crashed."""
        ...

    def decided(self, decision: Decision) -> None:
        """A run has ended with ``decision``."""
        ...

    def rolled_back(self, verdict: ProbationVerdict) -> None:
        """A promotion was rolled back."""
        ...

    def clock_window(self, remaining_s: Callable[[], float], overrun_s: Callable[[], float]) -> None:
        """Where to read how long the window still is, and by how much it was overrun; from any thread."""
        ...

    def clock_probation(self, remaining_s: Callable[[], float]) -> None:
        """Where to read how long the probation still is; from any thread."""
        ...

    def clock_restore(self, expected_s: Callable[[], float]) -> None:
        """Where to read how long a restore is expected to take; from any thread."""
        ...
