"""When a window may open."""

import time
from collections.abc import Iterator
from datetime import datetime

import pytest

from sidecar.config.window import WindowConfig
from sidecar.record.events import Event, EventKind, WindowOutcome
from sidecar.record.states import State
from sidecar.service.mailbox import Mailbox, busy_reason
from sidecar.service.window_policy import window_refusal

NOW = 1_000_000.0
PAUSED = Event(NOW - 5, EventKind.PAUSED, {"reason": "release week"})


def ended(outcome: WindowOutcome, ago_s: float = 3600.0) -> Event:
    return Event(NOW - ago_s, EventKind.WINDOW_ENDED, {"outcome": outcome, "reason": "no disk"})


def why_not(
    paused: Event | None = None,
    last: Event | None = None,
    rate: float | None = None,
    *,
    force: bool = False,
    **window: float | str,
) -> str:
    return window_refusal(WindowConfig.model_validate(window), NOW, paused, last, rate, force)


def test_nothing_speaks_against_it() -> None:
    assert why_not() == ""


@pytest.mark.parametrize("force", [False, True])
def test_not_while_paused_even_by_force(force: bool) -> None:
    assert "(release week): `sloguard resume`" in why_not(PAUSED, force=force)


def test_not_soon_after_a_failed_one_but_by_force() -> None:
    assert "failed (no disk): none before" in why_not(last=ended(WindowOutcome.FAILED))
    assert why_not(last=ended(WindowOutcome.FAILED), force=True) == ""
    assert why_not(last=ended(WindowOutcome.FAILED), after_failure="1h") == ""
    assert why_not(last=ended(WindowOutcome.FAILED, 86401)) == ""


@pytest.mark.parametrize("outcome", sorted(set(WindowOutcome) - {WindowOutcome.FAILED}))
def test_any_other_end_is_no_failure(outcome: WindowOutcome) -> None:
    assert why_not(last=ended(outcome)) == ""


def test_not_above_the_rate_nor_without_knowing_it_but_by_force() -> None:
    assert why_not(rate=2.0, max_rate=2.0) == ""
    assert why_not(rate=2.5, max_rate=2.0) == "2.5 requests/s are more than window.max_rate 2"
    assert "less than a minute of traffic data" in why_not(rate=None, max_rate=2.0)
    assert why_not(rate=2.5, max_rate=2.0, force=True) == ""
    assert why_not(rate=2.5) == ""


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (State.SERVING, ""),
        (State.STARTING, "vLLM is not serving yet: the sidecar is starting"),
        (State.RESTORING, "vLLM is not serving yet: the sidecar is restoring"),
        (State.DRAINING, "a window is open already: the sidecar is draining"),
        (State.PROMOTING, "a window is open already: the sidecar is promoting"),
        (State.HALTED, "the sidecar is not up yet"),
    ],
)
def test_what_leaves_no_room_for_a_window_is_named(state: State, said: str) -> None:
    assert busy_reason(Mailbox(state=state)).startswith(said)
    assert bool(busy_reason(Mailbox(state=state))) == bool(said)


def test_the_hint_that_an_order_may_wait_refuses_none() -> None:
    """The hint is set at startup and after each window; the journal knows whether a retune is pending."""
    requests = Mailbox(state=State.SERVING)
    requests.retune.set()
    assert busy_reason(requests) == ""


def test_an_engine_that_does_not_match_the_journal_leaves_no_room_for_a_window() -> None:
    assert busy_reason(Mailbox(state=State.SERVING, mismatch="an older copy")) == "an older copy"


@pytest.fixture
def in_berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("in_berlin")
@pytest.mark.parametrize(
    ("cron", "now", "opens"),
    [
        ("0 3 * * *", "2026-11-22 12:00+01:00", "2026-11-23 03:00+01:00"),
        # The clocks go forward from 2 to 3 at night, and back from 3 to 2.
        ("0 3 * * *", "2026-03-28 12:00+01:00", "2026-03-29 03:00+02:00"),
        ("0 3 * * *", "2026-10-24 12:00+02:00", "2026-10-25 03:00+01:00"),
        ("30 2 * * *", "2026-10-25 00:00+02:00", "2026-10-25 02:30+02:00"),
        ("30 2 * * *", "2026-10-25 02:10+01:00", "2026-10-26 02:30+01:00"),
    ],
)
def test_a_window_opens_by_the_clock_on_the_wall(cron: str, now: str, opens: str) -> None:
    found = WindowConfig(cron=cron).next_opening(datetime.fromisoformat(now).timestamp())

    assert found == datetime.fromisoformat(opens).timestamp()


def test_no_window_opens_by_itself_without_cron() -> None:
    assert WindowConfig().next_opening(NOW) is None
