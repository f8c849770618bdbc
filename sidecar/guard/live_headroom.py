"""With how much more than a trial wants its engine is started, so that later trials need no restart. Pure.

A live knob goes no higher than its engine was started with (vllm_sloguard.knobs.Ceiling). Starting higher costs memory:
vLLM profiles the largest step, and what that takes is not there for the KV cache. So the ceilings rise only as far as
the guard finds the KV cache no smaller than the trial's own but by a little.
"""

from collections.abc import Callable, Iterable, Mapping

from vllm_sloguard.guard.repair import Repair, RepairStatus
from vllm_sloguard.knobs import Ceiling, Knob, Value

# What is lost of the KV cache stays within what starts of one configuration differ by.
_LEAST_OF_KV_TOKENS = 0.99
_SHARES = (1.0, 0.75, 0.5, 0.25)  # of the way up, on a logarithmic scale


def ceilings(
    knobs: Iterable[Knob], args: Mapping[str, Value], repaired: Callable[[Mapping[str, Value]], Repair]
) -> dict[str, Value]:
    """The arguments to start with instead of those in ``args``; empty where ``args`` are as high as is safe.

    ``knobs`` are those of the search, with its ranges; ``repaired`` is the guard.
    """
    own = repaired(args).budget
    for share in _SHARES:
        raised = {
            knob.name: value for knob in knobs if (value := _raised(knob, args.get(knob.name), share)) is not None
        }
        higher = {name: value for name, value in raised.items() if value != args.get(name)}
        if not higher:
            return {}
        found = repaired({**args, **higher})
        if found.status is not RepairStatus.UNCHANGED:
            continue
        if own is None or found.budget is None or found.budget.kv_tokens >= _LEAST_OF_KV_TOKENS * own.kv_tokens:
            return higher
    return {}


def _raised(knob: Knob, value: Value | None, share: float) -> Value | None:
    """``value`` moved up, or as it is where nothing is above it."""
    ceiling = knob.live.ceiling if knob.live is not None else None
    if ceiling is Ceiling.STARTED_ON and value is False and True in knob.choices:
        return True
    if ceiling is Ceiling.STARTED and isinstance(value, int) and 0 < value < knob.high:
        return int(value * (knob.high / value) ** share)
    return value
