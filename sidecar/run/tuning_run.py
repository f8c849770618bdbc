"""One tuning run: observe, guard, propose, run, judge, learn, record; then validate the best in A/B restarts; decide.

The journal holds the state: ``Tuner`` reads it before each step, so a killed run continues where it stopped.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from sidecar.config.schema import Config
from sidecar.engine.engine import Launch
from sidecar.guard.guard import Args, Guard
from sidecar.measure.early_stop import NO_NEEDS, SearchNeeds
from sidecar.measure.load_client import LoadError
from sidecar.promote import decision as promotion
from sidecar.promote import provenance
from sidecar.promote.candidate import SearchedSpace, candidate, leader
from sidecar.promote.nearest_miss import nearest_miss
from sidecar.record.decisions import Decision, Evidence, Outcome
from sidecar.record.durations import reserved_pairs
from sidecar.record.events import Operations
from sidecar.record.journal import Journal, Run
from sidecar.record.trial import AFTER_THE_SEARCH, VALIDATING, Plan, Result, Role, StartKind, Trial, TrialStatus
from sidecar.run.judging import explained, judged_result, load_schedule, needs_after
from sidecar.run.raw_trial import RawTrial
from sidecar.run.trial_runner import TrialRunner
from sidecar.search.contract import Context, Observation, Proposal
from sidecar.search.failed_configs import MAX_REFUSALS_IN_A_ROW
from sidecar.search.recommendation import may_repeat
from sidecar.search.registry import make
from sidecar.search.space import Space
from vllm_sloguard import __version__
from vllm_sloguard.crash import Crash
from vllm_sloguard.knobs import Value

Begin = Callable[[Plan], None]
Notify = Callable[[Trial], None]
Fits = Callable[[int, int], bool]
IsCancelled = Callable[[], bool]
# Consecutive trials without a measurement after which the machine is considered unfit to measure.
_MAX_UNMEASURED = 3
# The search for a lower rate sends several loads, so it needs the time of this many trials.
_LOWER_RATES_TRIALS = 3
# Time that must be left, in trials, before a promising load is stopped to be repeated later.
_TRIALS_TO_REPEAT = 5
_UNCOUNTED = (TrialStatus.REFUSED, TrialStatus.ABORTED)


class Learn(Protocol):
    """Stores an engine's memory report: sidecar.run.engine_manager.EngineManager.learn."""

    def __call__(self, launch: Launch, crash: Crash | None = None, *, started: bool = True) -> None:
        """``started``: the engine was started for this run, not kept from an earlier one."""


def incumbent_args(config: Config, journal: Journal) -> Args:
    """The current configuration: the last promotion applied to the file's arguments, or these."""
    return journal.promoted(config.base_digest()) or config.engine.args


def open_run(config: Config, journal: Journal) -> Run:
    """The unfinished run of exactly this configuration, or a new one. A trial in flight is marked as aborted."""
    last = journal.last_run()
    journal.abort_running()
    if last is not None and last.ended_at is None:
        if last.digest == config.digest():
            return last
        journal.end_run(last.id, Decision(Outcome.ABANDONED, "the configuration was changed"))
    incumbent = dict(incumbent_args(config, journal))
    device, driver = provenance.device_of(config)
    machine = {"sloguard": __version__, "device": device, "driver": driver}
    content = {**machine, **config.model_dump(mode="json", exclude={"engine": {"env"}})}
    return journal.begin_run(config.digest(), json.dumps(content), incumbent)


class Tuner:
    """Takes one run from its recorded state to its decision.

    ``begin`` is called with every plan before its trial, ``notify`` with every trial as it starts and ends. ``fits``
    tells whether that many more search trials and validation measurements can finish within the window, ``cancelled``
    whether to abort the current one.
    """

    def __init__(
        self,
        config: Config,
        run: Run,
        journal: Journal,
        runner: TrialRunner,
        guard: Guard,
        *,
        learn: Learn,
        begin: Begin = lambda _plan: None,
        notify: Notify,
        fits: Fits,
        cancelled: IsCancelled,
    ) -> None:
        self._config = config
        self._run = run
        self._journal = journal
        self._runner = runner
        self._guard = guard
        self._learn = learn
        self._begin = begin
        self._notify = notify
        self._fits = fits
        self._cancelled = cancelled
        self._knobs = tuple(config.search.knobs)
        self._space = Space(config.search.space_knobs())
        rolled_back = Operations(journal, config.base_digest()).quarantined()
        self._warm_sides: set[Role] = set()
        self._quarantined = [_values(p.args, self._knobs) for p in rolled_back]
        self._prior = _earlier(config, run, journal, self._knobs, self._quarantined)

    def tune(self) -> Decision:
        """Runs the rest of the search and the validation, and decides. Raises IsCancelled, LoadError."""
        try:
            while (plan := self._next()) is not None and self._fits(1, self._reserved()):
                self._attempt(plan)
        finally:
            self._runner.release()
        if (plan := self._lower_rates()) is not None and self._fits(_LOWER_RATES_TRIALS, 0):
            self._attempt(plan)
        # Neither half a pair nor fewer pairs than the first interim analysis needs is evidence.
        while (plan := self._validation()) is not None and self._fits(0, self._missing()):
            self._attempt(plan)
        return self._decided()

    def _decided(self) -> Decision:
        decision = promotion.decide(self._trials(), self._config)
        if decision.outcome is Outcome.PROMOTED:
            args = self._args_of(decision.trial)
            if _values(args, self._knobs) in self._quarantined:  # rolled back since it was tried
                reason = f"trial {decision.trial} is quarantined: it was rolled back after a promotion"
                decision = dataclasses.replace(decision, outcome=Outcome.KEPT, reason=reason)
        if decision.outcome is Outcome.PROMOTED:
            args = self._args_of(decision.trial)
            evidence = Evidence(decision, provenance.of(self._config, self._trials()))
            self._journal.promote(self._run.id, self._config.base_digest(), args, evidence)
        self._journal.end_run(self._run.id, decision)
        return decision

    def _args_of(self, number: int) -> dict[str, bool | int | float | str | list[str]]:
        return next(t.plan.args for t in self._trials() if t.number == number)

    def _trials(self) -> list[Trial]:
        return self._journal.trials(self._run.id)

    def _next(self) -> Plan | None:
        """The next plan of the search; None when its budget is used up. An aborted trial is repeated."""
        trials = [t for t in self._trials() if t.status is not TrialStatus.ABORTED]
        baselines = [t for t in trials if t.plan.role is Role.BASELINE]
        # The incumbent can crash by accident too, and without its measurement there is nothing to compare with.
        if not baselines or (len(baselines) == 1 and baselines[0].status is TrialStatus.CRASHED):
            return self._incumbent(Role.BASELINE, "the current configuration")
        tried = [t.plan.proposed for t in trials if t.plan.role is Role.UNGUARDED]
        for args in self._config.search.unguarded[len(tried) :]:
            knobs = {name: value for name, value in args.items() if not isinstance(value, list)}
            proposal = Proposal(knobs, "unguarded", "requested in the configuration file, without the guard")
            return self._guard.plan(self._run.incumbent, proposal, Role.UNGUARDED)
        if any(t.plan.role in AFTER_THE_SEARCH for t in self._trials()):
            return None
        ran = [t for t in trials if t.status is not TrialStatus.REFUSED]
        if len(ran) >= self._config.search.budget or _refused_in_a_row(trials) >= MAX_REFUSALS_IN_A_ROW:
            return None
        observations = (t.observation(self._knobs, self._config.slo) for t in trials)
        plan = self._guard.plan(
            self._run.incumbent, self._asked([o for o in observations if o is not None]), Role.SEARCH
        )
        return self._unless_quarantined(plan)

    def _unless_quarantined(self, plan: Plan) -> Plan:
        """Refuses a configuration that was rolled back before."""
        if plan.refusal or _values(plan.args, self._knobs) not in self._quarantined:
            return plan
        return dataclasses.replace(plan, refusal="quarantined: it was rolled back after a promotion")

    def _asked(self, history: list[Observation]) -> Proposal:
        """The optimizer's proposal, given the trials of this and earlier runs and the memory that is free now."""
        search = self._config.search
        context = Context(
            incumbent=self._incumbent_knobs(),
            longest_request_tokens=self._config.workload.longest_request_tokens,
            project=self._guard.projector(self._run.incumbent),
            limits=self._config.slo.upper_limits,
            is_cold=lambda config: self._runner.is_cold({**self._run.incumbent, **config}),
        )
        return make(search.optimizer, self._space, search.seed, search.budget, context).ask([*self._prior, *history])

    def _incumbent_knobs(self) -> dict[str, Value]:
        return {
            name: value
            for name, value in self._run.incumbent.items()
            if name in self._knobs and not isinstance(value, list)
        }

    def _incumbent(self, role: Role, reason: str) -> Plan:
        return self._guard.plan(self._run.incumbent, Proposal(self._incumbent_knobs(), str(role), reason), role)

    def _validation(self) -> Plan | None:
        """The next measurement of the validation; None when enough is known or there is nothing to validate."""
        trials = self._trials()
        role, best = promotion.next_role(trials, self._config), candidate(trials, SearchedSpace.of(self._config))
        if role is None or best is None:
            return None
        if role is Role.REFERENCE:
            return self._incumbent(role, f"the incumbent, paired with trial {best.number}")
        return dataclasses.replace(best.plan, role=role, phase=str(role), reason=f"trial {best.number} again")

    def _lower_rates(self) -> Plan | None:
        """The nearest miss at lower request rates; None if a configuration met the SLO, or it was done."""
        trials = [t for t in self._trials() if t.status is not TrialStatus.ABORTED]
        nearest = nearest_miss(trials, self._config.slo)
        if nearest is None or any(t.plan.role is Role.LOWER_RATE for t in trials):
            return None
        plan = next(t.plan for t in trials if t.number == nearest.trial)
        reason = f"the highest request rate at which trial {nearest.trial} meets the SLO"
        return dataclasses.replace(plan, role=Role.LOWER_RATE, phase=str(Role.LOWER_RATE), reason=reason)

    def _missing(self) -> int:
        return promotion.missing(self._trials(), self._config)

    def _reserved(self) -> int:
        """How many validation measurements a search trial must leave room for: the minimum during its first half."""
        ran = sum(t.status not in _UNCOUNTED for t in self._trials())
        return 2 * reserved_pairs(ran, self._config)

    def _needs(self, plan: Plan) -> SearchNeeds:
        """What the search needs from the load of ``plan``."""
        if plan.role is not Role.SEARCH:
            return NO_NEEDS
        trials = self._trials()
        best = leader(trials, SearchedSpace.of(self._config))
        # A repeat is to be measured to its end.
        repeated = any(t.plan.args == plan.args for t in trials if t.status is TrialStatus.FEASIBLE)
        compared = best if best is not None and best.worth_beating and not repeated else None
        ran, budget = sum(t.status not in _UNCOUNTED for t in trials), self._config.search.budget
        repeatable = may_repeat(ran, budget) and self._fits(_TRIALS_TO_REPEAT, self._reserved())
        return needs_after(trials, self._config.objective, compared, may_repeat=repeatable)

    def _attempt(self, plan: Plan) -> None:
        self._begin(plan)
        trial = self._journal.begin_trial(self._run.id, plan)
        self._notify(trial)
        result: Result | None = None
        try:
            if not plan.refusal:
                schedule = load_schedule(self._config, plan.role, self._needs(plan))
                warm_start = self._needs_warm_start(plan)
                raw = self._runner.run(plan, schedule, self._cancelled, warm_start=warm_start)
                self._learn_from(raw, plan.role)
                result = judged_result(raw, plan.role, self._config)
        finally:
            self._notify(self._journal.end_trial(trial, result))
        self._check_measured()

    def _needs_warm_start(self, plan: Plan) -> bool:
        """Whether this is the first ordinary start of its side in this process.

        It reads from a cold page cache and fills the compile caches, so it measures slower than later ones.
        """
        if plan.role not in VALIDATING or plan.role in self._warm_sides:
            return False
        self._warm_sides.add(plan.role)
        return True

    def _learn_from(self, raw: RawTrial, role: Role) -> None:
        for run in raw.runs:
            if run.launch is not None:
                # An unguarded trial is expected to crash, so the guard learns nothing from it.
                crash = explained(run.crash, run.report) if run.crash and role is not Role.UNGUARDED else None
                self._learn(run.launch, crash, started=run.start is not StartKind.LIVE)

    def _check_measured(self) -> None:
        """Raises LoadError after repeated trials without a measurement, which another configuration would not fix."""
        reasons = [t.result.unmeasured for t in self._trials() if t.result is not None and t.result.unmeasured]
        if len(reasons) >= _MAX_UNMEASURED:
            raise LoadError(f"{len(reasons)} trials could not be measured: {reasons[-1]}")


def _earlier(
    config: Config, run: Run, journal: Journal, knobs: tuple[str, ...], quarantined: list[dict[str, Any]]
) -> list[Observation]:
    """The trials of earlier runs of the same model, workload, SLO, objective and other arguments.

    Quarantined configurations are left out, however good they were.
    """
    same = ("model", "workload", "slo", "objective")
    now = config.model_dump(mode="json", include=set(same))
    alike = {
        number
        for number, recorded in journal.run_configs().items()
        if number < run.id and {key: recorded.get(key) for key in same} == now
    }
    fixed = {name: value for name, value in run.incumbent.items() if name not in knobs}
    trials = [t for t in journal.trials() if t.run in alike and _beside(t.plan, knobs) == fixed]
    trials = [t for t in trials if _values(t.plan.args, knobs) not in quarantined]
    # A validation repeats one configuration: it would outweigh the others.
    kept = [t for t in trials if t.status is not TrialStatus.REFUSED and t.plan.role not in AFTER_THE_SEARCH]
    observations = [o for t in kept if (o := t.observation(knobs, config.slo)) is not None]
    return [dataclasses.replace(o, prior=True) for o in observations]


def _values(args: Mapping[str, Any], knobs: tuple[str, ...]) -> dict[str, Any]:
    """The knobs in ``args``: other arguments that the guard repairs depend on free memory."""
    return {name: args.get(name) for name in knobs}


def _beside(plan: Plan, knobs: tuple[str, ...]) -> dict[str, Any]:
    """The arguments of ``plan`` that are not knobs, as they were before the guard repaired them."""
    args = {**plan.args, **{change.name: change.before for change in plan.changes}}
    return {name: value for name, value in args.items() if name not in knobs and value is not None}


def _refused_in_a_row(trials: Sequence[Trial]) -> int:
    count = 0
    for trial in reversed(trials):
        if trial.status is not TrialStatus.REFUSED:
            break
        count += 1
    return count
