"""The states of the service and the changes between them."""

from itertools import product
from pathlib import Path

import pytest

from sidecar.record.states import TRANSITIONS, IllegalTransition, State, check_transition, states_markdown


def reached_from(start: State) -> set[State]:
    reached, front = {start}, [start]
    while front:
        for after in set(TRANSITIONS[front.pop()].successors) - reached:
            reached.add(after)
            front.append(after)
    return reached


@pytest.mark.parametrize("start", list(State))
def test_every_state_can_be_reached_from_every_other(start: State) -> None:
    assert reached_from(start) == set(State)


@pytest.mark.parametrize("state", sorted(set(State) - {State.HALTED}))
def test_a_stop_is_possible_in_every_state(state: State) -> None:
    check_transition(state, State.HALTED)


@pytest.mark.parametrize("state", [State.DRAINING, State.TUNING, State.VALIDATING, State.PROMOTING])
def test_every_step_of_a_window_may_end_with_what_served_before(state: State) -> None:
    check_transition(state, State.RESTORING)
    check_transition(State.RESTORING, State.SERVING)


@pytest.mark.parametrize(
    ("before", "after"), [(b, a) for b, a in product(State, State) if a not in TRANSITIONS[b].successors]
)
def test_an_illegal_change_raises(before: State, after: State) -> None:
    with pytest.raises(IllegalTransition, match=f"illegal transition: {before} to {after}"):
        check_transition(before, after)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (State.SERVING, State.TUNING),  # no window without a drain
        (State.TUNING, State.SERVING),  # nothing serves that was not started for it
        (State.DRAINING, State.PROMOTING),
        (State.HALTED, State.SERVING),
    ],
)
def test_no_step_is_left_out(before: State, after: State) -> None:
    with pytest.raises(IllegalTransition):
        check_transition(before, after)


def test_the_operations_page_has_the_table() -> None:
    assert states_markdown() in (Path(__file__).parents[3] / "docs" / "operations.md").read_text(encoding="utf-8")


def test_ready_while_it_serves_alone() -> None:
    assert [state for state, row in TRANSITIONS.items() if row.ready] == [State.SERVING]
