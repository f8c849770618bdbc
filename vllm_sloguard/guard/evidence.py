"""The sources of a memory estimate, ranked as rungs of a ladder, and the error band assumed for each."""

from dataclasses import dataclass
from enum import IntEnum

from vllm_sloguard.guard.built_model import BuiltModel

_GIB = 2**30


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
class ErrorBand:
    """How far off an estimate may be: a share of the weights, a share of the activations, and a constant."""

    weights: float
    activations: float
    beside_bytes: int

    def error_bytes(self, weights: int, activations: int, others: int) -> int:
        """The error band for an estimate of these sizes."""
        return int(self.weights * (weights + others) + self.activations * activations) + self.beside_bytes


# Assumed, not measured: chosen by judgement until the errors of each rung have been recorded. (benchmarks/README.md,
# "The ladder", compares weights and KV tokens with vLLM's classes, but no activations.) UNMEASURED_ACTIVATIONS, also
# assumed, applies to model families whose profile run was never measured.
ERROR_BANDS = {
    Rung.REPORTED: ErrorBand(0.01, 0.02, 0),
    Rung.BUILT: ErrorBand(0.01, 0.02, 0),
    Rung.CHECKPOINT: ErrorBand(0.02, 0.05, 0),
    Rung.FORMULA: ErrorBand(0.01, 0.01, 0),
}
UNMEASURED_ACTIVATIONS = 0.3
