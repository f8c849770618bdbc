"""The default optimizer: model-based search outward from the incumbent, within what is predicted to be safe.

The framework is that of arXiv 2604.17627: find something feasible first, then improve the objective, with crashes as
observations. Thermal Budget Annealing explores only until a trial has run. From then on each trial maximises expected
improvement weighted by the probabilities of meeting the SLO and of not crashing (Gardner et al. 2014, "Bayesian
optimization with inequality constraints"), within a trust region around the best (Eriksson & Poloczek 2021, "Scalable
constrained Bayesian optimization"). When local steps stall, a few trials explore as far from all others as seems safe,
because single steps cannot find knobs that only help in combination.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from sidecar.search.candidates import around, by_choice
from sidecar.search.contract import Context, Observation, ObservedStatus, Proposal
from sidecar.search.crash_risk import CrashRisk, threshold
from sidecar.search.encoding import Array, Encoding
from sidecar.search.failed_configs import FailedConfigs, failed
from sidecar.search.feasibility_filter import FeasibilityFilter
from sidecar.search.latency_priors import eager_effect
from sidecar.search.recommendation import Recommendation, recommended
from sidecar.search.space import Space
from sidecar.search.surrogate import Surrogate, learn
from sidecar.search.tba import Annealing
from vllm_sloguard.knobs import KnobValues, Value

_ADMITTED = 24  # candidates checked with the guard, best first
_ROUNDS, _ORIGINS = 2, 3  # combining other choices with the best candidates
_CRASH_WEIGHT = 4.0  # a crash is less informative than a trial that ran, and costs more
# Repeats of the leader: in the last fifth of the budget, if its probability of meeting the SLO again is in this range.
_REPEATS, _DOUBTFUL = 5, (0.4, 0.98)
_CONFIRMATIONS = 2  # trials left when the best must be measured to the end
_PER_CHANGE = 0.01  # leave knobs without effect unchanged
_BARRED = 50.0
# A restart must promise a third more: about its cost relative to the load, on a forked engine.
_COLD = math.log(4 / 3)
_OUTSIDE = 20.0  # per range of a knob beyond the trust region
_TRUST_GUARDED, _TRUST_ALONE = 1.0, 0.25  # see CrashRisk
# Long-range exploration: at most one in seven trials, from 400 draws, when the next step promises less than 2%.
_EXPLORATIONS, _DRAWN, _LITTLE_GAIN = 7, 400, math.log(0.02)
# Requirements on an exploration: meet the SLO, start, and be at most this much worse than the best (logarithms).
_MEETS, _SERVES, _HOPE = math.log(0.5), math.log(0.8), 0.4
# The trust region, in units of a knob's range. A step in a single knob may go twice as far, initially the full range.
_RADIUS, _SMALLEST, _GROWTH, _SHRINKING, _PATIENCE = 0.5, 0.08, 1.5, 0.7, 3


@dataclass(frozen=True)
class SearchFeatures:
    """The parts of the design in use; an ablation leaves one out."""

    incumbent: bool = True
    guard: bool = True
    crash_model: bool = True
    priors: bool = True
    estimates: bool = True  # of stopped loads; otherwise only lower bounds are used
    repeats: bool = True  # of the leader, while it is uncertain to meet the SLO again
    luckiest: bool = False  # choose the best single measurement as the candidate


@dataclass(frozen=True)
class _View:
    """The state of one ask: the search centre, the models, and the admissible configurations."""

    history: Sequence[Observation]
    centre: Array
    model: Surrogate
    admitting: FeasibilityFilter

    @cached_property
    def radius(self) -> float:
        """The trust region's."""
        return radius(self.history)

    @cached_property
    def least_serves(self) -> float:
        """Log of the required probability of not crashing."""
        return math.log(threshold(self.history))


@dataclass(frozen=True)
class SloGuard:
    """The optimizer. ``budget`` is the number of trials that may run, including the incumbent's."""

    space: Space
    seed: int
    budget: int
    context: Context
    parts: SearchFeatures = field(default_factory=SearchFeatures)

    def ask(self, history: Sequence[Observation]) -> Proposal:
        """The incumbent; annealing while no trial has run and there is no incumbent; then the models' choice."""
        incumbent = self.context.incumbent if self.parts.incumbent else None
        keys = [_key(self.space.active(o.config)) for o in history]
        failed_configs = FailedConfigs(frozenset(key for key, o in zip(keys, history, strict=True) if failed(o)))
        if incumbent is not None and not any(not o.prior for o in history):
            start = self.space.project(incumbent)
            if start not in failed_configs:
                return Proposal(start, "incumbent", "the current configuration, as the starting point")
        served = any(o.outcome in (ObservedStatus.FEASIBLE, ObservedStatus.INFEASIBLE) for o in history)
        if not served and incumbent is None:
            return self._annealed(history, failed_configs)
        if not self.parts.estimates:
            history = [_as_bounds(o) for o in history]
        repeat = self._repeat(history) if self.parts.repeats else None
        if repeat is not None:
            return repeat
        rng = np.random.default_rng([self.seed, len(history)])
        view = self._view(history)
        places = self._candidates(view, rng)
        this_run = [o for o in history if not o.prior]
        if stalled(this_run, self.budget // _EXPLORATIONS) and self._scores(view, places[:1])[0] < _LITTLE_GAIN:
            explored = self._explored(view, failed_configs, frozenset(keys), rng)
            if explored is not None:
                return explored
        # Repeat a configuration only if nothing else is left: repeats did not help.
        configs = self._admitted(view, places, failed_configs, frozenset(keys)) or self._admitted(
            view, places, failed_configs, frozenset()
        )
        if not configs:
            return self._annealed(history, failed_configs)
        scores = self._scores(view, self.encoding.encode(configs)) - self._cold(configs)
        return self._explained(view, configs[int(np.argmax(scores))])

    def _repeat(self, history: Sequence[Observation]) -> Proposal | None:
        """The leader again, near the end of the budget, if its load was stopped or it is still in doubt."""
        this_run = [o for o in history if not o.prior and o.outcome is not ObservedStatus.REFUSED]
        left = self.budget - len(this_run)
        if 0 < left <= max(_CONFIRMATIONS, self.budget // _REPEATS - 1):
            promising = recommended(self.space, history, stopped=True)
            if promising is not None and not history[promising.index].complete:
                return self._again(history, promising, "its load was stopped because it was better")
        if not 0 < left <= max(1, self.budget // _REPEATS):
            return None
        found = recommended(self.space, history)
        if found is None or not _DOUBTFUL[0] <= found.probability < _DOUBTFUL[1]:
            return None
        best = _key(self.space.active(history[found.index].config))
        if sum(_key(self.space.active(o.config)) == best for o in this_run) > 1:
            return None
        return self._again(history, found, f"meets the SLO again with probability {found.probability:.0%}")

    def _again(self, history: Sequence[Observation], found: Recommendation, why: str) -> Proposal | None:
        config = self.space.active(history[found.index].config)
        if not self.space.contains(config):  # an older journal's, with another range
            return None
        return Proposal(config, "repeat", f"repeat of the best: {why}")

    @cached_property
    def encoding(self) -> Encoding:
        """Of the space."""
        return Encoding(self.space)

    @cached_property
    def _known(self) -> Context:
        return self.context if self.parts.guard else replace(self.context, project=None)

    def _annealed(self, history: Sequence[Observation], failed_configs: FailedConfigs) -> Proposal:
        """Annealing's proposal as it would run; redrawn if it is not admissible or has failed."""
        proposal = Annealing(self.space, self.seed, self.budget).ask(history)
        admitting = FeasibilityFilter(self.space, self._known, rules=self.parts.priors)
        rng = np.random.default_rng([self.seed, len(history), 2])
        drawn = proposal.config
        for _ in range(_ADMITTED):
            config = admitting.admitted(drawn)
            if config is not None and config not in failed_configs:
                return replace(proposal, config=config)
            drawn = self.space.sample(rng)
        return proposal

    def _view(self, history: Sequence[Observation]) -> _View:
        """Fits the models around the best value and centres the search where they predict the best."""
        tried = [o for o in history if o.outcome is not ObservedStatus.REFUSED]
        places = self.encoding.encode([o.config for o in tried])
        start = self._start(tried, places)
        trust = _TRUST_GUARDED if self._known.project is not None else _TRUST_ALONE
        risk = CrashRisk.of(self.encoding, tried, places, start, trust) if self.parts.crash_model else None
        eager = eager_effect(tried, (self.context.limits or {}).get("itl_p99_ms"))
        model = learn(self.encoding, tried, places, start, risk=risk, priors=self.parts.priors, eager=eager)
        feasible = np.array([o.outcome is ObservedStatus.FEASIBLE for o in tried], dtype=bool)
        centre = start
        if feasible.any() and model.loss is not None:
            here = places[feasible]
            centre = here[int(np.argmin(model.loss.predict(here).mean + model.doubt(here)))]
        admitting = FeasibilityFilter.after(
            self.space, self._known, history, self.encoding.decode(centre), rules=self.parts.priors
        )
        return _View(history, centre, model, admitting)

    def _start(self, tried: Sequence[Observation], places: Array) -> Array:
        """The best feasible point, else the smallest violation, else the last trial or the incumbent."""
        if not tried:
            return self.encoding.encode([self.context.incumbent or {}])[0]
        worth = [
            (o.outcome is ObservedStatus.FEASIBLE, -o.violation, -math.inf if o.value is None else o.value, row)
            for row, o in enumerate(tried)
        ]
        return places[max(worth)[-1]]

    def _candidates(self, view: _View, rng: np.random.Generator) -> Array:
        """Candidates, best first: around the centre, then the best of these combined with other choices, since random
        draws rarely hit good combinations. Shape (places, knobs)."""
        places = around(self.encoding, view.centre, rng)
        scores = self._scores(view, places)
        for _ in range(_ROUNDS):
            best = np.argsort(-scores, kind="stable")[:_ORIGINS]
            steps = np.concatenate([by_choice(self.encoding, place) for place in places[best]])
            places, scores = np.concatenate([places, steps]), np.concatenate([scores, self._scores(view, steps)])
        return places[np.argsort(-scores, kind="stable")]

    def _explored(
        self,
        view: _View,
        failed_configs: FailedConfigs,
        tried: frozenset[frozenset[tuple[str, Value]]],
        rng: np.random.Generator,
    ) -> Proposal | None:
        """Of random draws, the plausible configuration farthest from all trials; None if none is plausible."""
        drawn = self.encoding.encode([self.space.sample(rng) for _ in range(_DRAWN)])
        far = self._distances(view, drawn)
        order = np.argsort(-far, kind="stable")
        configs = self._admitted(view, drawn[order[np.isfinite(far[order])]], failed_configs, tried)
        if not configs:
            return None
        far = self._distances(view, self.encoding.encode(configs))
        best = int(np.argmax(far))
        if not math.isfinite(far[best]):
            return None
        found = self._explained(view, configs[best])
        return replace(found, phase="model-explore", reason=f"far from all trials, local steps stalled: {found.reason}")

    def _distances(self, view: _View, places: Array) -> Array:
        """Distance to the closest trial, in ranges of numbers and changed choices; minus infinity for points likely to
        crash or miss the SLO, or expected to be far slower. Shape (places,)."""
        model = view.model
        tried = self.encoding.encode([o.config for o in view.history])
        far = np.abs(self.encoding.differences(places, tried)).sum(axis=0).min(axis=1)
        needed = max(_SERVES, view.least_serves)
        plausible = (model.log_serves(places) >= needed) & (model.log_meets(places) >= _MEETS)
        if model.loss is not None and model.best_loss is not None:
            plausible &= model.loss.predict(places).mean <= model.best_loss + _HOPE
        return np.where(plausible, far, -math.inf)

    def _scores(self, view: _View, places: Array) -> Array:
        """Log of the weighted improvement, minus penalties that keep steps small and safe. Shape (places,)."""
        serves = view.model.log_serves(places)
        scores = view.model.log_merit(places) + _CRASH_WEIGHT * serves
        scores -= _BARRED * (serves < view.least_serves)
        steps = np.abs(self.encoding.differences(places, view.centre[None])[:, :, 0])
        changes = (steps > 1e-6).sum(axis=0)
        reach = view.radius * np.where(changes <= 1, 2.0, 1.0)
        longest = steps[~self.encoding.categorical].max(axis=0, initial=0.0)
        return scores - _PER_CHANGE * changes - _OUTSIDE * np.maximum(0.0, longest - reach)

    def _cold(self, configs: Sequence[KnobValues]) -> Array:
        """The penalty for needing a restart. Shape (configs,)."""
        is_cold = self.context.is_cold
        return _COLD * np.array([is_cold is not None and is_cold(config) for config in configs])

    def _admitted(
        self, view: _View, places: Array, failed_configs: FailedConfigs, barred: frozenset[frozenset[tuple[str, Value]]]
    ) -> list[dict[str, Value]]:
        """The first of ``places`` as they would run: admitted, not failed, not barred, without duplicates."""
        found: dict[frozenset[tuple[str, Value]], dict[str, Value]] = {}
        asked: set[frozenset[tuple[str, Value]]] = set()
        for place in places:
            decoded = self.encoding.decode(place)
            if (key := _key(decoded)) in asked:
                continue
            asked.add(key)
            config = view.admitting.admitted(decoded)
            if config is not None and config not in failed_configs and _key(config) not in barred:
                found.setdefault(_key(config), config)
                if len(found) == _ADMITTED:
                    break
        return list(found.values())

    def _explained(self, view: _View, config: dict[str, Value]) -> Proposal:
        """The proposal with its phase, and a reason: the changes from the centre and the predictions."""
        place, centre = self.encoding.encode([config]), self.encoding.decode(view.centre)
        changed = [name for name in config if config[name] != centre.get(name)]
        what = ", ".join(f"{name} {centre.get(name)} -> {config[name]}" for name in changed[:3]) or "a repeat"
        what += f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        meets, serves = (math.exp(float(p[0])) for p in (view.model.log_meets(place), view.model.log_serves(place)))
        chances = f"meets the SLO {meets:.0%}, does not crash {serves:.0%}"
        if view.model.loss is None or view.model.best_loss is None:
            return Proposal(config, "feasible-first", f"{what}: {chances}")
        at = view.model.loss.predict(place)
        gain = f"gain {1 - math.exp(float(at.mean[0]) - view.model.best_loss):+.1%} ± {float(at.sd[0]):.1%}"
        return Proposal(config, "model-exploit" if changed else "repeat", f"{what}: {gain}, {chances}")


def radius(history: Sequence[Observation]) -> float:
    """The trust region's radius: grows after an improvement, shrinks after several trials without one; unlimited before
    the first feasible trial."""
    size = _RADIUS if any(o.outcome is ObservedStatus.FEASIBLE for o in history) else 1.0
    for change in _changes(history):
        size = min(1.0, size * _GROWTH) if change > 0 else max(_SMALLEST, size * _SHRINKING) if change < 0 else size
    return size


def stalled(history: Sequence[Observation], most: int) -> bool:
    """Whether the trust region has just shrunk, for one of the first ``most`` times."""
    changes = _changes(history)
    return bool(changes) and changes[-1] < 0 and sum(change < 0 for change in changes) <= most


def _changes(history: Sequence[Observation]) -> list[int]:
    """The effect of each trial after the first feasible one on the trust region: 1 grow, -1 shrink, 0 none."""
    changes: list[int] = []
    best, without = -math.inf, 0
    for observation in history:
        if (
            observation.outcome is ObservedStatus.FEASIBLE
            and observation.value is not None
            and observation.value > best
        ):
            changes += [1] if math.isfinite(best) else []
            best, without = observation.value, 0
        elif math.isfinite(best) and observation.outcome is not ObservedStatus.REFUSED:
            without = (without + 1) % _PATIENCE
            changes.append(0 if without else -1)
    return changes


def _as_bounds(seen: Observation) -> Observation:
    """A stopped load as seen without estimates: only that the missed limits are missed by at least a little."""
    if not seen.margin_sds or seen.margins is None or seen.outcome is not ObservedStatus.INFEASIBLE:
        return seen
    missed = {name: min(margin, 0.05) for name, margin in seen.margins.items() if margin > 0}
    return replace(seen, margins=missed, margin_sds=None, bounds=frozenset(missed), violation=min(seen.violation, 0.01))


def _key(config: KnobValues) -> frozenset[tuple[str, Value]]:
    return frozenset(config.items())
