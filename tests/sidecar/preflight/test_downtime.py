"""How long the service will be down, in words, with the source of each figure."""

from sidecar.preflight.downtime import abort_downtime, retune_downtime, rollback_downtime
from sidecar.preflight.window_forecast import Durations, Known

TAKES = Durations(
    drain=Known(4.6, "the mean of 3 drains"),
    start=Known(41.2, "the longest start of the serving engine"),
    trial=Known(60, "assumed"),
    longest_trial=Known(70, "assumed"),
    validation=Known(80, "assumed"),
    warm_start=Known(50, "assumed"),
)


def test_a_window_names_its_end_and_what_it_consists_of() -> None:
    said = retune_downtime(TAKES, 1_790_000_000.0, 2700)
    assert said.startswith("vLLM will be down for up to 45 min, until 2026-09-2")
    assert said.endswith(
        "at the latest: it drains (5 s, the mean of 3 drains), is tuned, and starts again"
        " (41 s, the longest start of the serving engine)"
    )


def test_a_rollback_takes_a_drain_and_a_start() -> None:
    assert rollback_downtime(TAKES) == (
        "vLLM will be down for about 46 s: it drains (5 s, the mean of 3 drains) and starts with the previous"
        " configuration (41 s, the longest start of the serving engine)"
    )


def test_an_abort_takes_a_start() -> None:
    assert abort_downtime(TAKES) == ("vLLM will serve again in about 41 s (the longest start of the serving engine)")
