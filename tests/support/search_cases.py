"""A search space, and one-line constructors of observations."""

import math
from dataclasses import replace

from sidecar.search.contract import Observation, ObservedStatus
from sidecar.search.space import Space
from vllm_sloguard.knobs import Knob, KnobKind, KnobValues

SPACE = Space(
    (
        # Before the knob that it requires, so that no test leans on the order.
        Knob("enable_chunked_prefill", KnobKind.CATEGORICAL, choices=(True, False), requires={"enforce_eager": False}),
        Knob("max_num_seqs", KnobKind.INT, 4, 128, log=True),
        Knob("max_num_batched_tokens", KnobKind.INT, 512, 8192, log=True),
        Knob("gpu_memory_utilization", KnobKind.FLOAT, 0.60, 0.95),
        Knob("enforce_eager", KnobKind.CATEGORICAL, choices=(False, True)),
        Knob("block_size", KnobKind.CATEGORICAL, choices=(16, 32, 64)),
    )
)
ONE_INT = Space((Knob("max_num_seqs", KnobKind.INT, 1, 3),))
ONE_CHOICE = Space((Knob("kv_cache_dtype", KnobKind.CATEGORICAL, choices=("auto",)),))
ONE_SWITCH = Space((Knob("enforce_eager", KnobKind.CATEGORICAL, choices=(False, True)),))
SPACES = {"study": SPACE, "one int": ONE_INT, "one choice": ONE_CHOICE, "one switch": ONE_SWITCH}


def feasible(config: KnobValues, value: float) -> Observation:
    return Observation(config, ObservedStatus.FEASIBLE, 0.0, value)


def infeasible(config: KnobValues, violation: float) -> Observation:
    return Observation(config, ObservedStatus.INFEASIBLE, violation, 1.0)


def crashed(config: KnobValues) -> Observation:
    return Observation(config, ObservedStatus.CRASHED, math.inf, None)


def refused(config: KnobValues) -> Observation:
    return Observation(config, ObservedStatus.REFUSED, math.inf, None)


INCUMBENT: KnobValues = {
    "max_num_seqs": 32,
    "max_num_batched_tokens": 2048,
    "gpu_memory_utilization": 0.75,
    "enforce_eager": False,
    "enable_chunked_prefill": True,
    "block_size": 16,
}


def with_margins(observation: Observation, **margins: float) -> Observation:
    return replace(observation, margins=margins)
