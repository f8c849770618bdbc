#!/usr/bin/env python3
"""The random chaos campaign: every fault of the matrix, at random moments in every state, on fake engines.

    python tests/chaos/campaign.py --runs 200 --seed 0 --jobs 3

Each run has its own state folder and ports. Prints ``report``; the exit code is 1 if an invariant was violated, or if
the windows held less than a trial a run.
``--only SEED`` repeats a run with the same fault, state and delay.
"""

import argparse
import itertools
import math
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, replace

import clock
import invariants
from faults import Fault
from matrix import FAULTS
from rig import PROMISED, Bounds, Rig, Settings, new_folder
from zygote import Zygote

_TOLD_EVERY = 50
LEAST_TRIALS = 1.0
_ENOUGH_RUNS = 50  # of fewer, chance may have aimed most at states without a window
# If the target state is not reached in this time, the fault is injected in whatever state the sidecar is.
_REACH_S = 45.0
# Longer than the invariants allow, so that they can report the actual outage.
_SETTLED_S = 120.0
_LONGEST_DELAY_S = {"starting": 0.5, "serving": 0.5, "draining": 0.3, "tuning": 3.0, "validating": 0.8}


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run. ``outage_s`` runs from the fault to the last unanswered request."""

    seed: int
    fault: str
    aimed: str
    hit: str
    took_s: float
    outage_s: float
    restore_s: float
    trials: int
    lost: tuple[str, ...]
    doubles: tuple[str, ...]
    killed: tuple[str, ...]
    windows: tuple[str, ...]
    late: tuple[str, ...]
    wrong: tuple[str, ...]
    folder: str
    repeated: bool = False

    @property
    def fine(self) -> bool:
        """Whether every invariant held."""
        return not self.violations

    @property
    def violations(self) -> tuple[str, ...]:
        """What was violated."""
        return (*self.lost, *self.doubles, *self.killed, *self.windows, *self.late, *dict.fromkeys(self.wrong))


@dataclass(frozen=True)
class Plan:
    """Which fault is injected in which state; everything else random follows from the seed."""

    seed: int
    fault: Fault
    state: str


def planned(seed: int) -> Plan:
    """The run for a seed; consecutive seeds cover all pairs of fault and state, in random order."""
    pairs = [(fault, state) for fault in FAULTS for state in fault.states]
    random.Random(seed // len(pairs)).shuffle(pairs)
    return Plan(seed, *pairs[seed % len(pairs)])


def run_one(zygote: Zygote, plan: Plan, *, keep: bool = False, bounds: Bounds = PROMISED) -> Outcome:
    """One run, from an empty folder to an empty process table."""
    fault, state, rng = plan.fault, plan.state, random.Random(plan.seed)
    began = time.monotonic()
    rig = Rig(zygote, _settings(fault, state, rng), new_folder(), bounds)
    wrong: list[str] = []
    struck_at, hit, fine = time.monotonic(), "", False
    try:
        if _reach(rig, fault, state, rng, wrong):
            hit = rig.last_state()[1]
            rig.look_at_trials()
            struck_at, starts = time.monotonic(), _serving_starts(rig)
            wrong += fault.harm(rig, rng)
            struck_at = rig.struck_at or struck_at
            _settle(rig, struck_at, wrong)
            if fault.spares_engine and hit == "serving" and _serving_starts(rig) != starts:
                wrong.append("the serving engine was restarted")
        outage_s = max(rig.seen.unanswered_at - struck_at, 0.0)
        wrong += _stopped(rig)
        rig.look_at_trials()
        wrong += invariants.wrong(rig)
        outcome = Outcome(
            plan.seed,
            fault.name,
            state,
            hit,
            time.monotonic() - began,
            outage_s,
            0.0 if fault.own_clock else invariants.worst_restore_s(rig),  # the journal's times jump with the clock
            len(rig.seen.trials),
            tuple(dict.fromkeys(rig.seen.lost)),
            tuple(invariants.double_controllers(rig)),
            tuple(invariants.killed_bystanders(rig)),
            tuple(invariants.wrong_windows(rig)),
            tuple(_late(rig, fault, outage_s)),
            tuple(wrong),
            str(rig.folder),
        )
        fine = outcome.fine
        return outcome
    finally:
        rig.close(keep=keep or not fine)


def _late(rig: Rig, fault: Fault, outage_s: float) -> list[str]:
    """An outage that is longer than promised."""
    if outage_s > rig.bounds.outage_s:
        return [f"{outage_s:.1f} s of outage"]
    own_s = invariants.own_start_s(rig)
    if fault.quick and outage_s > own_s + rig.bounds.beyond_start_s:
        return [f"{outage_s:.1f} s of outage, with an engine that starts within {own_s:.1f} s"]
    return []


def _settings(fault: Fault, state: str, rng: random.Random) -> Settings:
    settings = fault.settings
    # Without a better configuration the window ends in a restore.
    improves = {"promoting": True, "restoring": False}.get(state, fault.name == "killed while writing")
    return replace(settings, improves=improves or (state not in ("promoting", "restoring") and rng.random() < 0.5))


def _reach(rig: Rig, fault: Fault, state: str, rng: random.Random, wrong: list[str]) -> bool:
    """Takes the sidecar to a random moment of ``state``; returns whether it came up at all."""
    environment = None
    if fault.own_clock:
        clock.set_seconds(rig.clock, 0)
        environment = clock.environment(rig.clock)
    rig.start(environment)
    delay_s = rng.uniform(0, _LONGEST_DELAY_S.get(state, 0.4))
    if state == "starting":
        rig.await_state("starting", 0, 60)
        rig.watch()
        time.sleep(delay_s)
        return True
    if not rig.await_serving(90):
        wrong.append("it did not come up at first")
        return False
    rig.watch()
    rig.begin_stretch()
    if state != "serving":
        before = rig.last_state()[0]
        # With a schedule, a window may be open already.
        if (said := rig.retune()) and not rig.settings.cron:
            wrong.append(f"no window: {said.strip()}")
            return False
        # A window that has ended does not come to that state any more; the next one of a schedule may.
        rig.await_state(state, before, _REACH_S, before="" if rig.settings.cron else "serving")
    time.sleep(delay_s)
    return True


def _settle(rig: Rig, struck_at: float, wrong: list[str]) -> None:
    """Waits until it serves steadily again; restarts and records a sidecar that exits unexpectedly."""
    deadline = struck_at + _SETTLED_S
    while time.monotonic() < deadline:
        if rig.await_serving(deadline - time.monotonic()):
            # A hung engine is not detected at once.
            time.sleep(0.8)
            if rig.serves():
                return
            continue
        if rig.sidecar is not None and (code := rig.sidecar.poll()) is not None:
            wrong.append(f"the sidecar ended with {code}: {rig.said().splitlines()[-1:]}")
            rig.start()
    wrong.append(f"not serving {_SETTLED_S:.0f} s after the fault: {rig.last_state()[1]}")


def _serving_starts(rig: Rig) -> int:
    return sum(start["role"] == "serving" for start in rig.starts())


def _stopped(rig: Rig) -> list[str]:
    """Ctrl-C must end the sidecar and its engine."""
    assert rig.sidecar is not None
    rig.served = rig.answers(20)
    rig.end_stretch()
    rig.sidecar.signal(signal.SIGINT)
    code = rig.sidecar.wait(90)
    wrong = [] if code == 0 else [f"exit code {code} after Ctrl-C"]
    if left := rig.processes():
        wrong.append(f"{len(left)} engine processes are left behind")
    return wrong


def report(outcomes: Sequence[Outcome], took_s: float) -> str:
    """The campaign's report."""
    lines = [f"{'fault':28} runs  worst without service  states"]
    for name in dict.fromkeys(fault.name for fault in FAULTS):
        runs = [o for o in outcomes if o.fault == name]
        if runs:
            hit = ", ".join(f"{state} {count}" for state, count in sorted(Counter(o.hit for o in runs).items()))
            lines.append(f"{name:28} {len(runs):4}  {max(o.outage_s for o in runs):17.1f} s  {hit}")
    longest = max(outcomes, key=lambda o: o.outage_s)
    trials, per_run = sum(o.trials for o in outcomes), trials_per_run(outcomes)
    lines += [
        f"runs                                  {len(outcomes)} in {took_s / 60:.1f} min",
        f"trials recorded                       {trials} ({per_run:.2f} a run)",
        f"recorded trials lost                  {sum(len(o.lost) for o in outcomes)}",
        f"double controllers                    {sum(len(o.doubles) for o in outcomes)}",
        f"foreign processes killed              {sum(len(o.killed) for o in outcomes)}",
        f"windows late, twice or lost           {sum(len(o.windows) for o in outcomes)}",
        f"runs repeated alone for their outage  {sum(o.repeated for o in outcomes)}",
        f"outages longer than promised          {sum(len(o.late) for o in outcomes)}",
        f"longest without service after a fault {longest.outage_s:.1f} s ({longest.fault}, {longest.hit})",
        f"worst restore                         {max(o.restore_s for o in outcomes):.1f} s",
        f"runs with a violation                 {sum(not o.fine for o in outcomes)}",
    ]
    return "\n".join(lines)


def trials_per_run(outcomes: Sequence[Outcome]) -> float:
    """The mean number of trials; below LEAST_TRIALS, the campaign's windows hold too few to test anything."""
    return sum(o.trials for o in outcomes) / len(outcomes) if outcomes else 0.0


def told(outcome: Outcome) -> str:
    """A run's violations, and how to repeat it."""
    what = "; ".join(outcome.violations)
    where = f"{outcome.fault}, {outcome.hit or outcome.aimed}"
    return f"seed {outcome.seed} ({where}): {what}\n    {outcome.folder}; again: campaign.py --only {outcome.seed}"


def campaign(
    plans: Iterable[Plan], jobs: int, *, keep: bool = False, bounds: Bounds = PROMISED, until: float = math.inf
) -> list[Outcome]:
    """Runs all plans, ``jobs`` at a time; prints violations as they are found.

    None is begun after ``until``, in monotonic seconds.
    """
    zygote, outcomes = Zygote(), list[Outcome]()

    def run(plan: Plan) -> Outcome | None:
        return run_one(zygote, plan, keep=keep, bounds=bounds) if time.monotonic() < until else None

    slow: list[Plan] = []
    with ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(run, plan): plan for plan in plans}
        for done in as_completed(running):
            outcome = done.result()
            if outcome is None:
                continue
            if not outcome.fine:
                print(told(outcome), flush=True)
            if outcome.fine or outcome.violations != outcome.late:
                outcomes.append(outcome)
            else:
                slow.append(running[done])
            if len(outcomes) % _TOLD_EVERY == 0:
                print(f"{len(outcomes)} runs", flush=True)
    for plan in slow:  # the machine may have been busy, so each gets it to itself
        outcome = replace(run_one(zygote, plan, keep=keep, bounds=bounds), repeated=True)
        outcomes.append(outcome)
        again = f"{outcome.outage_s:.1f} s of outage" if outcome.fine else told(outcome)
        print(f"seed {plan.seed} alone: {again}", flush=True)
    zygote.close()
    return outcomes


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the first run; each has the next one")
    parser.add_argument("--jobs", type=int, default=3, help="runs at the same time")
    parser.add_argument("--only", type=int, help="this seed alone, and its folder is kept")
    parser.add_argument("--fault", default="", help="only the faults with this in their name")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run after that long")
    args = parser.parse_args()
    began = time.monotonic()
    seeds = [args.only] if args.only is not None else itertools.count(args.seed)
    plans = (plan for plan in map(planned, seeds) if args.fault in plan.fault.name)
    with suppress(KeyboardInterrupt):
        until = began + args.minutes * 60
        outcomes = campaign(itertools.islice(plans, args.runs), args.jobs, keep=args.only is not None, until=until)
        print(report(outcomes, time.monotonic() - began))
        if not (enough := len(outcomes) < _ENOUGH_RUNS or trials_per_run(outcomes) >= LEAST_TRIALS):
            print(f"too few trials: {LEAST_TRIALS:g} a run are needed")
        return 0 if enough and all(o.fine for o in outcomes) else 1
    return 130


if __name__ == "__main__":
    sys.exit(main())
