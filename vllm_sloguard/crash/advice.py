"""What a crash means and what to change, from its evidence."""

from collections.abc import Mapping

from vllm_sloguard.crash.crash_rules import CRASH_RULES, CrashAdvice
from vllm_sloguard.crash.kinds import Category, Crash


def advice_for(crash: Crash) -> CrashAdvice:
    """The advice for this kind of crash, or for its category if the kind is unknown."""
    for rule in CRASH_RULES:
        if rule.category is crash.category and (found := rule.advice(crash.evidence)):
            return found
    meaning, change = _GENERAL[crash.category]
    return CrashAdvice(crash.category.value, crash.category.value, meaning, (change,))


_GENERAL: Mapping[Category, tuple[str, str]] = {
    Category.OUT_OF_MEMORY: ("Memory did not suffice.", "`sloguard budget` shows where it goes"),
    Category.CUDA_ERROR: ("The GPU, its driver or a library on it failed.", "look for `Xid` in `dmesg`"),
    Category.STARTUP_FAILURE: (
        "The engine exited before it answered its first request.",
        "the evidence names the argument or the file; `sloguard doctor -c FILE` checks the machine",
    ),
    Category.TIMEOUT: (
        "A process of the engine did not answer in time.",
        "read the last lines of the process that did not answer; a first start compiles, and may need a higher"
        " engine.start_timeout_s",
    ),
    Category.ENGINE_DEATH: (
        "The engine died while serving.",
        "read the traceback in front of this line; report it to vLLM with the request that was running",
    ),
}
