"""Reads what the page tells, while anybody looks, and hands each news to all who do."""

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
from sidecar.page.heartbeat import Beat, live
from sidecar.page.view_model import PageFacts, PageView, page_view
from sidecar.record.events import EventKind, Operations
from sidecar.record.journal import Journal, JournalError
from sidecar.record.run_snapshot import Setup, setup_of
from sidecar.record.states import State
from sidecar.service.mailbox import Mailbox
from sidecar.service.state_machine import Standing, StateMachine

# What is measured meanwhile runs on this machine too.
_EVERY_S = 2.0

_STORY = TypeAdapter(PageView)
_BEAT = TypeAdapter(Beat)


@dataclass(frozen=True)
class Sources:
    """Where a story comes from, beside the journal: the loop's own threads change these."""

    config: Config
    hub: TelemetryHub
    requests: Mailbox
    progress: StateMachine


class Feed:
    """One story and one beat, as JSON, for all ``viewers``. Everything but the sources belongs to the page's thread."""

    def __init__(self, sources: Sources, say: Say, *, version: str, orders: str) -> None:
        self._sources = sources
        self._say = say
        self._tell: Callable[[PageFacts], PageView] = lambda facts: page_view(
            sources.config, facts, version=version, orders=orders
        )
        self._journal: Journal | None = None
        self._seen: tuple[Any, ...] = ()
        self._facts: PageFacts | None = None
        self._trouble = ""
        self._due = asyncio.Event()
        self._news = asyncio.Event()
        self._ended = False
        self.viewers = 0
        self.story: bytes = b""
        self.beat: bytes = b""

    async def run(self) -> None:
        """Looks every few seconds while there are viewers, and whenever it is asked to, until it is ended."""
        with closing(self):
            while not self._ended:
                if self.viewers:
                    self.look()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._due.wait(), _EVERY_S)
                self._due.clear()

    def close(self) -> None:
        """Closes the journal."""
        if self._journal is not None:
            self._journal.close()

    def end(self) -> None:
        """Tells the last news, and ends the streams."""
        self.look()
        self._ended = True
        self.look_soon()
        self._announce()

    def look_soon(self) -> None:
        """Does not wait for the next time: something was changed."""
        self._due.set()

    def look(self) -> None:
        """Reads what there is; what can't be read is said once, and shown beside what was read last."""
        try:
            self._read()
        except JournalError as error:
            self._troubled(str(error))
        except Exception as error:  # noqa: BLE001 - the boundary of the page: the service goes on without it
            self._troubled(f"the page: {type(error).__name__}: {error}")
        self._announce()

    def _read(self) -> None:
        config, requests, progress = self._sources.config, self._sources.requests, self._sources.progress
        standing, left_s = progress.standing, progress.time_left()
        told = live(self._sources.hub.traffic(requests.engine_id), time.monotonic(), config.slo)
        self.beat = _BEAT.dump_json(
            Beat(
                at=time.time(),
                window_left_s=left_s if progress.window_end is not None else None,
                next_window_at=config.window.next_opening(time.time()),
                live=told if standing.state is State.SERVING else None,
            )
        )
        if self._journal is None:
            self._journal = Journal(config.state, read_only=True)
        seen = (standing, requests.epoch, self._journal.changes())
        if seen == self._seen and not self._trouble:
            return
        facts = _facts(config, self._journal, standing, requests.epoch)
        self.story = _STORY.dump_json(self._tell(facts))
        # Only what could be told is told again, when there is trouble.
        self._facts, self._seen, self._trouble = facts, seen, ""

    def _troubled(self, text: str) -> None:
        if text != self._trouble:
            self._say(text)
        self._trouble = text
        # The loop's own standing is known without the journal.
        standing, epoch = self._sources.progress.standing, self._sources.requests.epoch
        facts = replace(self._facts, standing=standing) if self._facts else PageFacts(standing, epoch)
        self.story = _STORY.dump_json(replace(self._tell(facts), problem=text))

    def _announce(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    async def events(self) -> AsyncGenerator[bytes]:
        """Server-sent events: the story, again whenever it has changed, and beats."""
        self.look()
        told = b""
        while True:
            news, ended = self._news, self._ended
            if self.story != told:
                told = self.story
                yield _event("story", told)
            yield _event("beat", self.beat)
            if ended:
                return
            await news.wait()


def _event(name: str, data: bytes) -> bytes:
    """JSON has no line ends, so one line of data is enough."""
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
    """What the run was started with, or why nobody knows: the rest of the page goes on without it."""
    try:
        return setup_of(journal.run_configs()[run], run), ""
    except JournalError as error:
        return None, str(error)


def _probation_until(config: Config, operations: Operations, promotion: int) -> float | None:
    served_since = operations.served_since(promotion)
    if served_since is None or operations.probation_over(promotion):
        return None
    return served_since + config.promotion.probation.duration
