"""The sources of a memory estimate, ranked as rungs of a ladder, and the recorded error of each."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from vllm_sloguard.guard.built_model import BuiltModel


class Rung(IntEnum):
    """The source of an estimate, most reliable first."""

    REPORTED = 1  # an earlier start on this host
    BUILT = 2  # vLLM's own classes, built on the meta device
    CHECKPOINT = 3  # the headers of the checkpoint
    FORMULA = 4  # arithmetic on config.json

    @property
    def description(self) -> str:
        """Human-readable name."""
        return {
            Rung.REPORTED: "an earlier start on this host",
            Rung.BUILT: "vLLM's own classes",
            Rung.CHECKPOINT: "the checkpoint's headers",
            Rung.FORMULA: "formulas only",
        }[self]


@dataclass(frozen=True)
class ModelEvidence:
    """What is known about a model with given arguments, beyond its config.json.

    ``checkpoint_bytes`` is the size of all tensors in the checkpoint; ``reported_weights_bytes`` is what vLLM reported
    for loading the model, per rank. ``reported`` is set if an earlier start with the same model, quantization, dtypes,
    layout and version corrects the estimate.
    """

    built: BuiltModel | None = None
    checkpoint_bytes: int | None = None
    reported_weights_bytes: int | None = None
    reported: bool = False

    @property
    def rung(self) -> Rung:
        """The most reliable source available."""
        if self.reported:
            return Rung.REPORTED
        if self.built is not None:
            return Rung.BUILT
        return Rung.FORMULA if self.checkpoint_bytes is None else Rung.CHECKPOINT


NO_EVIDENCE = ModelEvidence()


@dataclass(frozen=True)
class RecordedErrors:
    """The worst errors of estimates against starts of vLLM, as recorded by ``benchmarks/guard.py bands``.

    ``shares`` are shares of the memory that is not the KV cache, by rung; ``unusual_share`` is that of models built
    by vLLM that are more than attention and MLPs, whose profile run no formula covers as well. In a family that has
    never been started, what the profile run takes is less certain: by the given share of it for ordinary decoders,
    and for other models.
    """

    shares: Mapping[Rung, float]
    unusual_share: float
    families: frozenset[str]
    unknown_family: float
    unknown_architecture: float

    def error_bytes(self, rung: Rung, fixed_bytes: int, *, ordinary: bool = True) -> int:
        """The error band of an estimate of ``fixed_bytes`` from this rung."""
        share = self.shares[rung] if ordinary or rung is not Rung.BUILT else self.unusual_share
        return int(share * fixed_bytes)

    def profile_error_bytes(self, model_type: str, activation_bytes: int, *, ordinary: bool) -> int:
        """What the formula for the profile run may lack in addition."""
        if model_type in self.families:
            return 0
        return int((self.unknown_family if ordinary else self.unknown_architecture) * activation_bytes)


def read_errors(path: Path) -> RecordedErrors:
    """Reads the recorded errors."""
    found = json.loads(path.read_text(encoding="utf-8"))
    return RecordedErrors(
        {rung: float(found["rungs"][rung.name.lower()]["share"]) for rung in Rung},
        float(found["unusual"]["share"]),
        frozenset(found["families"]),
        float(found["unknown_family"]),
        float(found["unknown_architecture"]),
    )


RECORDED_ERRORS = read_errors(Path(__file__).with_name("error_bands.json"))
