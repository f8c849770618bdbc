"""How far above a trial's own values its engine is started, so that later trials need no restart. Pure.

A live knob cannot exceed the value that its engine was started with (vllm_sloguard.knobs.Ceiling). Higher values cost
memory: vLLM profiles the largest step, and what that takes is missing from the KV cache. So ceilings are raised only
while the KV cache, according to the guard, shrinks insignificantly.
"""

from collections.abc import Callable, Iterable, Mapping

from vllm_sloguard.guard.repair import Repair, RepairStatus
from vllm_sloguard.knobs import Ceiling, Knob, Value

# The loss of KV cache stays within the run-to-run spread of one configuration.
_MIN_OF_KV_TOKENS = 0.99
_SHARES = (1.0, 0.75, 0.5, 0.25)  # of the way up, on a logarithmic scale


def ceilings(
    knobs: Iterable[Knob], args: Mapping[str, Value], repaired: Callable[[Mapping[str, Value]], Repair]
) -> dict[str, Value]:
    """Start values that replace those in ``args``; empty if ``args`` are already as high as is safe.

    ``knobs`` are the search's, with their ranges; ``repaired`` runs the guard.
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
        if own is None or found.budget is None or found.budget.kv_tokens >= _MIN_OF_KV_TOKENS * own.kv_tokens:
            return higher
    return {}


def _raised(knob: Knob, value: Value | None, share: float) -> Value | None:
    """``value`` moved up, or unchanged at the top of the range."""
    ceiling = knob.live.ceiling if knob.live is not None else None
    if ceiling is Ceiling.STARTED_ON and value is False and True in knob.choices:
        return True
    if ceiling is Ceiling.STARTED and isinstance(value, int) and 0 < value < knob.high:
        return int(value * (knob.high / value) ** share)
    return value
