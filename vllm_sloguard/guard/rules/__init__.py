"""vLLM's requirements on its arguments, as rules by subject; ``ALL`` has them in the order in which they are checked.

Each module has the rules of one subject, each a check of a ``rule.Case``. Rules change nothing: they report what is
broken, and which changes of a single argument would fix it.
"""

from vllm_sloguard.guard.rules import batching, memory, model_and_devices, single_argument
from vllm_sloguard.guard.rules.rule import Rule

ALL: tuple[Rule, ...] = (
    *single_argument.ARGUMENT_RULES,
    *model_and_devices.MODEL_RULES,
    *batching.BATCHING_RULES,
    *memory.MEMORY_RULES,
)
