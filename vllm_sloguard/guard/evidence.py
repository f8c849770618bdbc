"""What an estimate rests on: the rungs of the ladder, and how far off each of them has been."""

from dataclasses import dataclass
from enum import IntEnum

from vllm_sloguard.guard.built_model import BuiltModel

_GIB = 2**30


class Rung(IntEnum):
    """Where a number comes from, the most certain first."""

    REPORTED = 1  # an earlier start on this host
    BUILT = 2  # vLLM's own classes, built on the meta device
    CHECKPOINT = 3  # the headers of the checkpoint
    FORMULA = 4  # arithmetic on config.json

    @property
    def description(self) -> str:
        """The rung for people."""
        return {
            Rung.REPORTED: "an earlier start on this host",
            Rung.BUILT: "vLLM's own classes",
            Rung.CHECKPOINT: "the checkpoint's headers",
            Rung.FORMULA: "formulas alone",
        }[self]


@dataclass(frozen=True)
class ModelEvidence:
    """What is known of a model with certain arguments beside its config.json.

    ``checkpoint_bytes`` is the size of all tensors of the checkpoint, ``reported_weights_bytes`` what vLLM said that
    loading the model took, on one rank; ``reported`` is set where an earlier start with the same model, quantization,
    types, layout and version corrects the estimate.
    """

    built: BuiltModel | None = None
    checkpoint_bytes: int | None = None
    reported_weights_bytes: int | None = None
    reported: bool = False

    @property
    def rung(self) -> Rung:
        """The best rung that there is."""
        if self.reported:
            return Rung.REPORTED
        if self.built is not None:
            return Rung.BUILT
        return Rung.FORMULA if self.checkpoint_bytes is None else Rung.CHECKPOINT


NO_EVIDENCE = ModelEvidence()


@dataclass(frozen=True)
class ErrorBand:
    """How far an estimate may be off: shares of the weights and of the activations, and bytes beside them."""

    weights: float
    activations: float
    beside_bytes: int

    def error_bytes(self, weights: int, activations: int, others: int) -> int:
        """The band of an estimate of these sizes."""
        return int(self.weights * (weights + others) + self.activations * activations) + self.beside_bytes


# Larger than the worst error that was recorded for the rung (benchmarks/README.md, "The ladder"). Activations of
# families whose profile run was never measured are guesses: their share is in UNMEASURED_ACTIVATIONS.
ERROR_BANDS = {
    Rung.REPORTED: ErrorBand(0.01, 0.02, 0),
    Rung.BUILT: ErrorBand(0.01, 0.02, 0),
    Rung.CHECKPOINT: ErrorBand(0.02, 0.05, 0),
    Rung.FORMULA: ErrorBand(0.01, 0.01, 0),
}
UNMEASURED_ACTIVATIONS = 0.3
