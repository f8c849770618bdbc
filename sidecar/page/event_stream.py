"""Reads what the page shows while it has viewers, and sends changes to all of them."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from typing import Any

from pydantic import TypeAdapter

from sidecar.config.schema import Config
from sidecar.format import Say
from sidecar.observe.telemetry import TelemetryHub
from sidecar.page.heartbeat import Heartbeat, live
from sidecar.page.view_model import PageFacts, PageView, page_view
from sidecar.record.events import EventKind, Operations
from sidecar.record.journal import Journal, JournalError
from sidecar.record.journal_file import last_written
from sidecar.record.run_snapshot import Setup, setup_of
from sidecar.record.states import State
from sidecar.service.mailbox import Mailbox
from sidecar.service.state_machine import Standing, StateMachine

# Polling must not disturb the measurements on this machine.
_EVERY_S = 2.0

_VIEW = TypeAdapter(PageView)
_HEARTBEAT = TypeAdapter(Heartbeat)


@dataclass(frozen=True)
class Sources:
    """The inputs of a view apart from the journal; the service's threads update them."""

    config: Config
    hub: TelemetryHub
    requests: Mailbox
    progress: StateMachine


class Feed:
    """One view and one heartbeat, as JSON, for all ``viewers``. All but the sources belongs to the page's thread."""

    def __init__(self, sources: Sources, say: Say, *, version: str, token_file: str) -> None:
        self._sources = sources
        self._say = say
        self._make_view: Callable[[PageFacts], PageView] = lambda facts: page_view(
            sources.config, facts, version=version, token_file=token_file
        )
        self._seen: tuple[Any, ...] = ()
        self._facts: PageFacts | None = None
        self._problem = ""
        self._due = asyncio.Event()
        self._changed = asyncio.Event()
        self._ended = False
        self.viewers = 0
        self.view: bytes = b""
        self.heartbeat: bytes = b""

    async def run(self) -> None:
        """Refreshes every few seconds while there are viewers, and on request, until stopped."""
        while not self._ended:
            if self.viewers:
                self.refresh()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._due.wait(), _EVERY_S)
            self._due.clear()

    def end(self) -> None:
        """Sends the last changes and ends the streams."""
        self.refresh()
        self._ended = True
        self.refresh_soon()
        self._announce()

    def refresh_soon(self) -> None:
        """Refreshes without waiting for the next time."""
        self._due.set()

    def refresh(self) -> None:
        """Reads the sources; an error is logged once, and shown with what was read last."""
        try:
            self._read()
        except JournalError as error:
            self._report_problem(str(error))
        except Exception as error:  # noqa: BLE001 - the boundary of the page: the service continues without it
            self._report_problem(f"the page: {type(error).__name__}: {error}")
        self._announce()

    def _read(self) -> None:
        config, requests, progress = self._sources.config, self._sources.requests, self._sources.progress
        standing, left_s = progress.standing, progress.time_left()
        recent = live(self._sources.hub.traffic(requests.engine_id), time.monotonic(), config.slo)
        self.heartbeat = _HEARTBEAT.dump_json(
            Heartbeat(
                at=time.time(),
                window_left_s=left_s if progress.window_end is not None else None,
                next_window_at=config.window.next_opening(time.time()),
                live=recent if standing.state is State.SERVING else None,
            )
        )
        seen = (standing, requests.epoch, last_written(config.state))
        if seen == self._seen and not self._problem:
            return
        # Not kept open: the service must be able to restore the journal's files.
        with requests.journal_connections, closing(Journal(config.state, read_only=True)) as journal:
            facts = _facts(config, journal, standing, requests.epoch)
        self.view = _VIEW.dump_json(self._make_view(facts))
        # Only after a view was made: with a problem, the last one is shown again.
        self._facts, self._seen, self._problem = facts, seen, ""

    def _report_problem(self, text: str) -> None:
        if text != self._problem:
            self._say(text)
        self._problem = text
        # The state of the service is known without the journal.
        standing, epoch = self._sources.progress.standing, self._sources.requests.epoch
        facts = replace(self._facts, standing=standing) if self._facts else PageFacts(standing, epoch)
        self.view = _VIEW.dump_json(replace(self._make_view(facts), problem=text))

    def _announce(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def events(self) -> AsyncGenerator[bytes]:
        """Server-sent events: the view, again whenever it has changed, and heartbeats."""
        self.refresh()
        sent = b""
        while True:
            changed, ended = self._changed, self._ended
            if self.view != sent:
                sent = self.view
                yield _event("view", sent)
            yield _event("heartbeat", self.heartbeat)
            if ended:
                return
            await changed.wait()


def _event(name: str, data: bytes) -> bytes:
    """JSON has no line breaks, so one line of data is enough."""
    return b"event: %s\ndata: %s\n\n" % (name.encode(), data)


def _facts(config: Config, journal: Journal, standing: Standing, epoch: int) -> PageFacts:
    operations = Operations(journal, config.base_digest())
    run, promotions = journal.last_run(), operations.promotions()
    current = next((p for p in reversed(promotions) if p.rolled_back_at is None), None)
    newest = promotions[-1] if promotions else None
    windows = operations.events([EventKind.WINDOW_ENDED], 1)
    setup, problem = _setup(journal, run.id) if run else (None, "")
    return PageFacts(
        standing=standing,
        epoch=epoch,
        run=run,
        setup=setup,
        trials=tuple(journal.trials(run.id)) if run else (),
        paused=operations.paused(),
        window=operations.open_window(),
        last_window=windows[-1] if windows else None,
        promotion=current,
        rolled_back=newest if newest and newest.rolled_back_at is not None else None,
        probation_until=_probation_until(config, operations, current.id) if current else None,
        problem=problem,
    )


def _setup(journal: Journal, run: int) -> tuple[Setup | None, str]:
    """What the run was started with, or why that can't be read: the page then leaves the run out."""
    try:
        return setup_of(journal.run_configs()[run], run), ""
    except JournalError as error:
        return None, str(error)


def _probation_until(config: Config, operations: Operations, promotion: int) -> float | None:
    served_since = operations.served_since(promotion)
    if served_since is None or operations.probation_over(promotion):
        return None
    return served_since + config.promotion.probation.duration
