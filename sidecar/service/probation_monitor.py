"""Monitors a promotion on probation, and rolls it back when sidecar.promote.probation says so."""

import time

from pydantic import ValidationError

from sidecar.config.schema import Config
from sidecar.observe.user_requests import RECORD, Record
from sidecar.promote.probation import ProbationVerdict, judge
from sidecar.record.events import EventKind, Operations
from sidecar.record.states import Cause
from sidecar.service.observer import ServiceObserver
from sidecar.service.serving_engine import ServingEngine
from sidecar.service.state_machine import StateMachine


class ProbationMonitor:
    """Judges one promotion at a time, from its first start; a restarted sidecar resumes the probation."""

    def __init__(
        self,
        config: Config,
        operations: Operations,
        serving: ServingEngine,
        progress: StateMachine,
        metrics: ServiceObserver,
    ) -> None:
        self._config = config
        self._operations = operations
        self._serving = serving
        self._progress = progress
        self._promotion: int | None = None
        self._before: Record | None = None
        self._ends_at: float | None = None
        metrics.clock_probation(self.left_s)

    def left_s(self) -> float:
        """Seconds left of the probation, 0 without one; also called from scrape threads."""
        end = self._ends_at
        return 0.0 if end is None else max(end - time.monotonic(), 0.0)

    def look(self) -> None:
        """Judges the serving promotion if it is on probation. Raises JournalError."""
        if self._serving.promotion != self._promotion:
            self._begin(self._serving.promotion)
        if self._promotion is None or self._ends_at is None:
            return
        rule, serving = self._config.promotion.probation, self._serving
        requests, rate = serving.requests(), serving.rate()
        ruling = judge(self._before, requests, rate, self._config.slo, rule, self.left_s())
        if ruling.verdict is ProbationVerdict.GOES_ON:
            return
        self._ends_at = None
        if ruling.rolls_back:
            serving.roll_back(self._promotion, ruling)
            serving.replace(Cause.ROLLED_BACK, f"promotion {self._promotion} was rolled back: {ruling.reason}")
            return
        self._progress.say(f"promotion {self._promotion} has passed its probation: {ruling.reason}")
        self._operations.record(EventKind.PROBATION, promotion=self._promotion, reason=ruling.reason)

    def _begin(self, promotion: int | None) -> None:
        current = None if promotion is None else next(p for p in self._operations.promotions() if p.id == promotion)
        self._ends_at = None
        if current is not None and not self._operations.probation_over(current.id):
            duration_s = self._config.promotion.probation.duration
            since = self._operations.served_since(current.id) or time.time()
            # The wall clock may have been changed since.
            passed_s = min(max(time.time() - since, 0.0), duration_s)
            self._ends_at = time.monotonic() + duration_s - passed_s
            self._before = self._record_before(current.at)
        self._promotion = promotion

    def _record_before(self, at: float) -> Record | None:
        try:
            return RECORD.validate_python(self._operations.record_before(at))
        except ValidationError:  # missing, or written by another version
            return None
