"""What vLLM demands of its arguments, as rules by subject; ``ALL`` in the order in which they are asked.

``values`` (single arguments), ``layout`` (arguments against the model and the devices), ``scheduling`` (lengths and
batches against each other), ``room`` (memory), each on a ``case.Case``. No rule changes anything: it says what is
broken, and which single arguments would mend it.
"""

from vllm_sloguard.rules import layout, room, scheduling, values
from vllm_sloguard.rules.case import Rule

ALL: tuple[Rule, ...] = (*values.RULES, *layout.RULES, *scheduling.RULES, *room.RULES)
