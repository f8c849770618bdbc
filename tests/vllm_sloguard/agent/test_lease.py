"""Leases and epochs: one controller at a time."""

import pytest

from vllm_sloguard.agent.lease import LONGEST_LEASE_S, ControllerId, FencedError, Lease, LeaseExpiredError

OLD, NEW, OTHER = ControllerId("a", 1), ControllerId("a", 2), ControllerId("b", 9)


def test_a_lease_lasts_as_long_as_it_is_renewed() -> None:
    lease = Lease()
    assert not lease.acquire(OLD, 10, now=100)
    lease.check(OLD, now=109)
    assert not lease.acquire(OLD, 10, now=109)
    lease.check(OLD, now=118)
    with pytest.raises(LeaseExpiredError):
        lease.check(OLD, now=119)
    assert not lease.held(119)


def test_a_newer_sidecar_of_the_same_journal_takes_over_at_once_and_fences_the_old_one() -> None:
    lease = Lease()
    lease.acquire(OLD, 10, now=100)
    assert lease.acquire(NEW, 10, now=101)
    for stale in (lambda: lease.check(OLD, now=102), lambda: lease.acquire(OLD, 10, now=1000)):
        with pytest.raises(FencedError, match="epoch 2") as error:
            stale()
        assert error.value.epoch == 2


def test_another_journal_has_to_wait_for_the_end_of_the_lease() -> None:
    lease = Lease()
    lease.acquire(OLD, 10, now=100)
    with pytest.raises(FencedError, match="another state folder"):
        lease.acquire(OTHER, 10, now=109)
    assert lease.acquire(OTHER, 10, now=110)
    with pytest.raises(FencedError):
        lease.check(OLD, now=111)


def test_only_the_holder_releases_it() -> None:
    lease = Lease()
    lease.acquire(NEW, 10, now=100)
    lease.release(OLD)
    lease.check(NEW, now=101)
    lease.release(NEW)
    with pytest.raises(LeaseExpiredError):
        lease.check(NEW, now=101)
    assert lease.acquire(OTHER, 10, now=101)


def test_nobody_holds_what_was_never_acquired_and_leases_are_bounded() -> None:
    lease = Lease()
    with pytest.raises(LeaseExpiredError):
        lease.check(OLD, now=0)
    lease.acquire(OLD, 1e9, now=0)
    assert lease.left_s(0) == LONGEST_LEASE_S
