"""The knob table: every vLLM argument that may be tuned, in one place.

Names are vLLM's own (``EngineArgs`` fields, so ``max_num_seqs`` for ``--max-num-seqs``). The table is also the
allowlist: an argument that is not here is never changed by a search. What else a new knob needs: docs/knobs.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias

Value: TypeAlias = bool | int | float | str
KnobValues: TypeAlias = Mapping[str, Value]


class KnobKind(StrEnum):
    """How a knob's values are drawn."""

    INT = "int"
    FLOAT = "float"
    CATEGORICAL = "categorical"


class Ceiling(StrEnum):
    """What a live knob may be set to, given what the engine was started with."""

    STARTED = "at most what the engine was started with"
    MODEL_LENGTH = "0, or at most max_model_len"
    STARTED_ON = "off, and on where the engine was started with it on"
    FREE = "on or off, whatever the engine was started with"


@dataclass(frozen=True)
class Live:
    """How a knob changes in a running engine, without a restart.

    ``since`` and ``until`` are the first and the last vLLM (major, minor) whose scheduler was read and tried for it; in
    any other it counts as cold. ``verified_by`` says what is seen of the engine that shows the new value at work.
    """

    ceiling: Ceiling
    verified_by: str
    since: tuple[int, int] = (0, 26)
    until: tuple[int, int] = (0, 32)

    def in_version(self, version: tuple[int, int]) -> bool:
        """Whether the knob is live in this vLLM."""
        return self.since <= version <= self.until


@dataclass(frozen=True)
class Knob:
    """One tunable argument.

    ``low`` and ``high`` are inclusive and belong to INT and FLOAT; ``choices`` to CATEGORICAL. ``log`` draws on a
    logarithmic scale. ``requires`` names values that other knobs must have for this one to matter: where they do
    not hold, the knob is left out of the configuration. ``live`` is None where a change needs a restart.
    """

    name: str
    kind: KnobKind
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    choices: tuple[Value, ...] = ()
    requires: Mapping[str, Value] = field(default_factory=dict[str, Value])
    about: str = ""
    live: Live | None = None

    def __post_init__(self) -> None:
        if self.kind is KnobKind.CATEGORICAL:
            if not self.choices:
                raise ValueError(f"{self.name}: choices must not be empty")
        elif not self.low < self.high:
            raise ValueError(f"{self.name}: low must be below high, got {self.low} and {self.high}")
        elif self.log and self.low <= 0:
            raise ValueError(f"{self.name}: low must be above 0 on a logarithmic scale, got {self.low}")

    def holds(self, value: Value) -> bool:
        """Whether ``value`` is one that this knob may take."""
        if self.kind is KnobKind.CATEGORICAL:
            return any(value == c and isinstance(value, bool) == isinstance(c, bool) for c in self.choices)
        if isinstance(value, bool) or not isinstance(value, int if self.kind is KnobKind.INT else int | float):
            return False
        return self.low <= value <= self.high


# Ranges of the first six are those of the SLO-Guard study (arXiv 2604.17627), widened where today's GPUs ask for it.
KNOBS: Mapping[str, Knob] = {
    knob.name: knob
    for knob in (
        Knob(
            "max_num_seqs",
            KnobKind.INT,
            4,
            1024,
            log=True,
            about="requests that run at once",
            live=Live(Ceiling.STARTED, "requests that run in a step: never more, and more than before if raised"),
        ),
        Knob(
            "max_num_batched_tokens",
            KnobKind.INT,
            512,
            16384,
            log=True,
            about="tokens in one step, prompts included",
            live=Live(Ceiling.STARTED, "tokens scheduled in a step: never more, and more than before if raised"),
        ),
        Knob("gpu_memory_utilization", KnobKind.FLOAT, 0.60, 0.95, about="share of the memory that vLLM may take"),
        Knob("max_model_len", KnobKind.INT, 512, 32768, log=True, about="longest request, prompt and output, tokens"),
        Knob("enforce_eager", KnobKind.CATEGORICAL, choices=(False, True), about="no compilation and no CUDA graphs"),
        Knob(
            "enable_chunked_prefill",
            KnobKind.CATEGORICAL,
            choices=(True, False),
            about="long prompts are split over steps",
        ),
        Knob(
            "enable_prefix_caching",
            KnobKind.CATEGORICAL,
            choices=(True, False),
            about="shared prompt heads are kept",
            live=Live(Ceiling.STARTED_ON, "whether the requests that are admitted look into the prefix cache"),
        ),
        Knob("block_size", KnobKind.CATEGORICAL, choices=(16, 32, 64, 128), about="tokens in one KV-cache block"),
        Knob(
            "kv_cache_memory_bytes", KnobKind.INT, 2**24, 2**38, log=True, about="KV cache, bytes, instead of a share"
        ),
        Knob("kv_cache_dtype", KnobKind.CATEGORICAL, choices=("auto", "fp8"), about="type of the KV cache"),
        Knob(
            "long_prefill_token_threshold",
            KnobKind.INT,
            0,
            8192,
            about="longer prompts count as long; 0: none do",
            live=Live(Ceiling.MODEL_LENGTH, "the longest piece of a prompt in a step"),
        ),
        Knob(
            "scheduler_reserve_full_isl",
            KnobKind.CATEGORICAL,
            choices=(True, False),
            requires={"enable_chunked_prefill": True},
            about="a request waits until its whole prompt fits into the KV cache",
            live=Live(Ceiling.FREE, "what the scheduler asks of the KV cache for a request that it admits"),
        ),
        Knob("stream_interval", KnobKind.CATEGORICAL, choices=(1, 2, 4, 8), about="tokens sent in one piece"),
    )
}
