"""Filters proposals by what vLLM, the workload and the guard allow.

Machine-independent rules apply even without a guard. The guard's arithmetic has an error, so proposals keep a margin
from its limits unless a configuration just as close has already run.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sidecar.search.contract import Context, Observation, ObservedStatus, Projection
from sidecar.search.space import Space
from vllm_sloguard.guard.repair import RepairStatus, repair
from vllm_sloguard.knobs import KnobValues, Value

_SHARE, _LENGTH = "gpu_memory_utilization", "max_model_len"
_SPARE_SHARE = 0.03  # CUDA graphs come on top of the share that vLLM claims
_REQUESTS_THAT_FIT = 2.0  # of maximum length, in the KV cache that the guard predicts
_TOLERANCE = 0.95
_RECENT = 20  # latest observations searched for configurations that ran


@dataclass(frozen=True)
class FeasibilityFilter:
    """Turns proposals into runnable ones. ``most_share`` and ``least_room`` are the limits, margin included."""

    space: Space
    context: Context
    rules: bool
    most_share: float = math.inf
    least_room: float = 0.0

    @classmethod
    def after(
        cls, space: Space, context: Context, history: Sequence[Observation], centre: KnobValues, *, rules: bool
    ) -> "FeasibilityFilter":
        """With the guard's limits around ``centre``; without a guard there are none."""
        if context.project is None:
            return cls(space, context, rules)
        served = [
            o.config for o in history[-_RECENT:] if o.outcome in (ObservedStatus.FEASIBLE, ObservedStatus.INFEASIBLE)
        ]
        projections = [context.project(config) for config in served]
        rooms = [room for p in projections if (room := _room(p)) is not None]
        least = min(_REQUESTS_THAT_FIT, *rooms, math.inf) * _TOLERANCE
        return cls(space, context, rules, _most_share(space, context, centre, served), least)

    def admitted(self, config: KnobValues) -> dict[str, Value] | None:
        """The configuration that would run; None if it is refused or too close to a limit."""
        config = self._long_enough(config)
        if self.rules and (repaired := repair(config, None, None)).status is not RepairStatus.UNCHANGED:
            config = repaired.args
        if self.context.project is None:
            return self.space.project(config)
        projection = self.context.project(self.space.project(config))
        share, room = projection.config.get(_SHARE), _room(projection)
        too_much = isinstance(share, float) and share > self.most_share
        if projection.refusal or too_much or (room is not None and room < self.least_room):
            return None
        return self.space.project(projection.config)

    def _long_enough(self, config: KnobValues) -> KnobValues:
        """Raises a max_model_len that is too short for the workload's longest request."""
        needed, length = self.context.longest_request_tokens, config.get(_LENGTH)
        if needed is None or not isinstance(length, int) or length >= needed:
            return config
        return {**config, _LENGTH: needed}


def _room(projection: Projection) -> float | None:
    """How many requests of maximum length fit the KV cache; None if unknown."""
    length = projection.config.get(_LENGTH)
    if projection.kv_tokens is None or not isinstance(length, int) or length <= 0:
        return None
    return projection.kv_tokens / length


def _most_share(space: Space, context: Context, centre: KnobValues, served: Sequence[KnobValues]) -> float:
    """The largest share to try: a margin below what the guard lowers the largest one to."""
    knob = space.by_name.get(_SHARE)
    if knob is None or context.project is None or _SHARE not in centre:
        return math.inf
    lowered = context.project({**centre, _SHARE: knob.high})
    limit = lowered.config.get(_SHARE)
    if lowered.refusal or not isinstance(limit, float) or limit >= knob.high:
        return math.inf
    proven = [share for config in served if isinstance(share := config.get(_SHARE), float)]
    return max(limit - _SPARE_SHARE, *proven, 0.0)
