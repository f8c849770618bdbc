"""What vLLM demands of its arguments, as rules by subject; ``ALL`` in the order in which they are asked.

``values`` (single arguments), ``layout`` (arguments against the model and the devices), ``scheduling`` (lengths and
batches against each other), ``room`` (memory), each on a ``case.Case``. No rule changes anything: it says what is
broken, and which single arguments would fix it.
"""

from vllm_sloguard.guard.rules import batching, memory, model_and_devices, single_argument
from vllm_sloguard.guard.rules.rule import Rule

ALL: tuple[Rule, ...] = (
    *single_argument.ARGUMENT_RULES,
    *model_and_devices.MODEL_RULES,
    *batching.BATCHING_RULES,
    *memory.MEMORY_RULES,
)
