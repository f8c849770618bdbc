"""Which windows open and which are missed, including when the clock jumps."""

from datetime import datetime

import pytest

from sidecar.config.window import WindowConfig
from sidecar.service.window_schedule import WindowSchedule

HOURLY = WindowConfig.model_validate({"cron": "0 * * * *", "duration": "40m"})  # 40 minutes; a quarter is 10


def at(text: str) -> float:
    return datetime.fromisoformat(f"2026-03-0{text}").timestamp()


def scheduled(after: str, now: str, window: WindowConfig = HOURLY) -> WindowSchedule:
    return WindowSchedule(window, at(after), at(now))


def test_a_window_opens_once_at_its_time() -> None:
    schedule = scheduled("2 02:30", "2 02:30")

    assert schedule.due(at("2 02:59:59")) == (None, None)
    due, missed = schedule.due(at("2 03:00:01"))
    assert due is not None
    assert (due.at, due.duration_s, missed) == (at("2 03:00"), 2399.0, None)
    assert schedule.due(at("2 03:00:02")) == (None, None)


def test_one_that_opens_late_still_ends_in_time_and_one_that_is_too_late_is_missed() -> None:
    due, missed = scheduled("2 02:30", "2 02:30").due(at("2 03:10"))
    assert due is not None
    assert (due.duration_s, missed) == (1800.0, None)

    due, missed = scheduled("2 02:30", "2 02:30").due(at("2 03:10:01"))
    assert due is None
    assert missed is not None
    assert (missed.first, missed.last, missed.count) == (at("2 03:00"), at("2 03:00"), 1)


def test_a_clock_that_jumps_six_hours_opens_only_what_is_due_then() -> None:
    due, missed = scheduled("2 02:30", "2 02:30").due(at("2 08:31"))
    assert due is None
    assert missed is not None
    assert (missed.first, missed.last, missed.count) == (at("2 03:00"), at("2 08:00"), 6)

    due, missed = scheduled("2 02:30", "2 02:30").due(at("2 09:05"))
    assert due is not None
    assert missed is not None
    assert (due.at, missed.last, missed.count) == (at("2 09:00"), at("2 08:00"), 6)


def test_a_clock_that_was_a_year_ahead_at_the_start_opens_windows_once_it_is_right() -> None:
    ahead = at("2 02:30") + 365 * 86400
    schedule = WindowSchedule(HOURLY, ahead, ahead)
    assert schedule.due(ahead + 1) == (None, None)

    assert schedule.due(at("2 02:30")) == (None, None)
    due, _ = schedule.due(at("2 03:00"))
    assert due is not None


def test_an_hour_that_comes_twice_opens_one_window() -> None:
    schedule = scheduled("2 02:30", "2 02:30")
    assert schedule.due(at("2 03:01"))[0] is not None

    assert schedule.due(at("2 02:10")) == (None, None)
    assert schedule.due(at("2 03:01")) == (None, None)
    assert schedule.due(at("2 04:00"))[0] is not None


def test_what_was_due_while_no_sidecar_ran_is_missed_or_opens_late() -> None:
    due, missed = scheduled("2 01:30", "2 04:05").due(at("2 04:05"))
    assert due is not None
    assert missed is not None
    assert (due.at, missed.count) == (at("2 04:00"), 2)


@pytest.mark.parametrize(("given", "lateness_s"), [(None, 600.0), ("5m", 300.0), ("0s", 0.0), ("24h", 2400.0)])
def test_the_latest_start_is_a_quarter_of_the_duration_unless_given(given: str | None, lateness_s: float) -> None:
    content = {"cron": "0 * * * *", "duration": "40m", **({"latest_start": given} if given else {})}

    assert WindowConfig.model_validate(content).lateness_s == lateness_s


def test_a_year_of_every_minute_is_counted_with_a_bound() -> None:
    window = WindowConfig.model_validate({"cron": "* * * * *", "duration": "10m"})
    due, missed = WindowSchedule(window, at("2 02:30"), at("2 02:30")).due(at("2 02:30") + 365 * 86400)

    assert due is not None
    assert missed is not None
    assert missed.count == 1000


def test_without_cron_nothing_is_due() -> None:
    assert WindowSchedule(WindowConfig(), 0.0, at("2 02:30")).due(at("3 02:30")) == (None, None)


def test_what_has_a_record_of_an_earlier_sidecar_is_neither_opened_again_nor_missed() -> None:
    handled = [(at("2 03:00"), at("2 03:00")), (at("2 05:00"), at("2 06:00"))]
    due, missed = WindowSchedule(HOURLY, at("2 02:50"), at("2 08:30"), handled).due(at("2 08:30"))

    assert due is None
    assert missed is not None
    assert (missed.first, missed.last, missed.count) == (at("2 04:00"), at("2 08:00"), 3)
