"""Every fault of the matrix once, at a random moment; `make chaos` covers all of them in every state."""

import os
import random
import signal
from pathlib import Path

import clock
import pytest
from campaign import Outcome, Plan, campaign, told
from faults import Fault
from matrix import FAULTS
from rig import Bounds, Rig, Settings, new_folder
from zygote import Zygote

pytestmark = pytest.mark.timeout(1800)

ROOT = os.geteuid() == 0
# Begun first, so that none of them is left at the end.
SLOWEST = ("crash loop", "restore hook hangs", "clock over windows", "killed while writing", "restore fails")


def skipped(fault: Fault) -> str:
    """Why a fault can't be injected here; empty if it can."""
    if fault.settings.disk_bytes and not ROOT:
        return "only root can mount a small file system"
    if fault.own_clock and clock.COMPILER is None:
        return "no C compiler for a clock that jumps"
    return ""


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    """One run of each fault, several at a time."""
    rng = random.Random(6)
    faults = [fault for fault in FAULTS if not skipped(fault)]
    plans = [Plan(seed, fault, rng.choice(fault.states)) for seed, fault in enumerate(faults)]
    plans.sort(key=lambda plan: plan.fault.name not in SLOWEST)
    # Most of a run is waiting, so many go at the same time. Loose bounds, as other tests run in parallel; `make chaos`
    # checks the promised ones.
    return {
        outcome.fault: outcome
        for outcome in campaign(plans, jobs=10, bounds=Bounds(outage_s=90.0, late_s=10.0, beyond_start_s=30.0))
    }


def test_a_damaged_journal_is_refused_and_the_engine_keeps_serving(tmp_path: Path) -> None:
    zygote = Zygote()
    rig = Rig(zygote, Settings(), new_folder())
    try:
        first = rig.start()
        assert rig.await_serving(90), rig.said()
        first.signal(signal.SIGKILL)
        first.wait(60)
        for path in rig.state.glob("journal.sqlite*"):
            path.write_bytes(b"not a journal, " * 100)
        said = tmp_path / "said.txt"
        refused = rig.command("serve", "-c", str(rig.config_file), output=said)

        assert refused.wait(60) == 1
        [line] = [text for text in said.read_text().splitlines() if " warning: " not in text]
        assert "journal.sqlite" in line
        assert rig.answers() == rig.settings.incumbent
    finally:
        rig.close()
        zygote.close()


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_the_service_is_back_and_nothing_is_lost(fault: Fault, outcomes: dict[str, Outcome]) -> None:
    if why := skipped(fault):
        pytest.skip(why)
    outcome = outcomes[fault.name]

    assert outcome.fine, told(outcome)
