"""Everything that `sloguard status` is about, read from the state folder."""

import time
from contextlib import closing
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from pydantic import ValidationError

from sidecar.config.schema import Config
from sidecar.observe.served_slo import ServedSlo, read_served_slo
from sidecar.observe.watch_report import WATCH_REPORT, WATCH_REPORT_FILE, WatchReport
from sidecar.record import lock
from sidecar.record.events import Event, EventKind, Operations
from sidecar.record.journal import Journal, Promoted, Run, StateRecord
from sidecar.record.row_validation import JournalError
from sidecar.record.run_snapshot import Setup, read_run, setup_of
from sidecar.record.states import COMING_UP
from sidecar.record.trial import Trial
from sidecar.report.advice import run_advice
from vllm_sloguard.agent.engine_http import address
from vllm_sloguard.agent.process_group import ProcessGroup
from vllm_sloguard.guard.start_history import LearnedLimit

# A sidecar that watches reports every five seconds, one that serves every half a minute.
_WATCHED_WITHIN_S = 60.0
_SERVED_WITHIN_S = 120.0


class ProbationStage(StrEnum):
    """How far the probation of the current promotion is."""

    NONE = "none"  # the file's arguments are current
    NOT_BEGUN = "begins when it is first served"
    IN_PROGRESS = "in progress"
    PASSED = "passed"


@dataclass(frozen=True)
class ServingNow:
    """The engine that is up: its promotion (None for the file's arguments), since when, and its address."""

    promotion: int | None
    since: float
    address: str

    @property
    def name(self) -> str:
        """ "promotion 2", "the file's arguments"."""
        return "the file's arguments" if self.promotion is None else f"promotion {self.promotion}"


@dataclass(frozen=True)
class ServiceFacts:
    """As of ``now``, seconds since the epoch; ``pid`` is None if no sidecar is running.

    ``setup`` is what ``run``, the last one, was started with, and ``advice`` what its report recommends.
    ``probation`` is that of ``promotion``. ``next_window_at`` is None without a schedule, or if the file is not known
    (``config_known``).
    """

    now: float
    pid: int | None
    epoch: int
    state: StateRecord | None
    serving: ServingNow | None
    run: Run | None
    setup: Setup | None
    trials: tuple[Trial, ...]
    advice: tuple[str, ...]
    paused: Event | None
    last_window: Event | None
    promotion: Promoted | None
    last_rollback: Promoted | None
    probation: ProbationStage
    probation_until: float | None
    config_known: bool
    next_window_at: float | None
    cron: str | None
    rules: tuple[LearnedLimit, ...]
    served_slo: ServedSlo | None
    watched: WatchReport | None


def read_service_facts(folder: Path, config: Config | None) -> ServiceFacts:
    """The facts of the state folder; ``config`` is None if no file and no run tell it. Raises JournalError."""
    now = time.time()
    with closing(Journal(folder, read_only=True)) as journal:
        operations = Operations(journal, config.base_digest() if config else "")
        record, run, pid = journal.state(), journal.last_run(), lock.holder(folder)
        windows, promotions = operations.events([EventKind.WINDOW_ENDED], 1), operations.promotions()
        undone = [p for p in promotions if p.rolled_back_at is not None]
        current = operations.current()
        stage, until = _probation(config, operations, current.id if current else None, now)
        return ServiceFacts(
            now=now,
            pid=pid,
            epoch=journal.epoch(),
            state=record,
            serving=_serving(journal, operations, record),
            run=run,
            setup=_setup(journal, run) if run else None,
            trials=tuple(journal.trials(run.id)) if run else (),
            advice=_advice(folder) if run else (),
            paused=operations.paused(),
            last_window=windows[-1] if windows else None,
            promotion=current,
            last_rollback=max(undone, key=lambda p: p.rolled_back_at or 0.0, default=None),
            probation=stage,
            probation_until=until,
            config_known=config is not None,
            next_window_at=config.window.next_opening(now) if config else None,
            cron=config.window.cron if config else None,
            rules=journal.rules(now),
            served_slo=read_served_slo(folder, now, _SERVED_WITHIN_S) if pid is not None else None,
            watched=_watched(folder, now) if pid is not None else None,
        )


def _serving(journal: Journal, operations: Operations, record: StateRecord | None) -> ServingNow | None:
    serving = [engine for engine in journal.engines() if engine.role == "serving"]
    engines = [e for e in serving if e.identity.remote or ProcessGroup(e.identity).leader_alive()]
    starts = operations.events([EventKind.START], 1)
    # The start of an engine is only recorded once it is up.
    if not engines or not starts or record is None or record.state in COMING_UP:
        return None
    launch = engines[-1].launch
    return ServingNow(starts[-1].content["promotion"], starts[-1].at, address(launch["host"], launch["port"]))


def _setup(journal: Journal, run: Run) -> Setup | None:
    """None if the recorded configuration can't be read, as of a newer version."""
    try:
        return setup_of(journal.run_configs()[run.id], run.id)
    except JournalError:
        return None


def _advice(folder: Path) -> tuple[str, ...]:
    """What the report of the last run recommends; empty if its configuration can't be read."""
    try:
        return run_advice(read_run(folder))
    except JournalError:
        return ()


def _probation(
    config: Config | None, operations: Operations, promotion: int | None, now: float
) -> tuple[ProbationStage, float | None]:
    """The stage, and until when a probation in progress lasts."""
    if promotion is None or config is None:
        return ProbationStage.NONE, None
    served_since = operations.served_since(promotion)
    if served_since is None:
        return ProbationStage.NOT_BEGUN, None
    until = served_since + config.promotion.probation.duration
    if operations.probation_over(promotion) or until <= now:
        return ProbationStage.PASSED, None
    return ProbationStage.IN_PROGRESS, until


def _watched(folder: Path, now: float) -> WatchReport | None:
    """The report of a sidecar that only watches; None without one, or if it is an earlier sidecar's."""
    try:
        report = WATCH_REPORT.validate_json((folder / WATCH_REPORT_FILE).read_bytes())
    except (OSError, ValidationError):
        return None
    return report if now - report.at < _WATCHED_WITHIN_S else None
