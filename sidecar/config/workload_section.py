"""The section ``workload`` of the configuration file."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from sidecar.config.window import Section

# Twice what a load without any miss needs at the default confidence; see sidecar.measure.early_stop.
_MAX_REQUESTS = 500
_COMPARED_REQUESTS = 200


class Dataset(StrEnum):
    """The source of the prompts: vLLM's own readers, named as in `vllm bench`."""

    RANDOM = "random"
    SHAREGPT = "sharegpt"  # a JSON file of conversations
    CUSTOM = "custom"  # a file of JSON lines, each with prompt and output_tokens


class Workload(Section):
    """The load of a trial: open loop, Poisson arrivals, random prompts; lengths vary by ``spread`` around their mean.

    With another ``dataset_name``, prompts and output lengths come from ``dataset_path``; ``input_tokens`` and
    ``output_tokens`` are then the maxima, for which every trial leaves room. ``highest_rate`` bounds the capacity
    search, if that is the objective; 16 times ``rate`` by default. Without ``requests``, as many are sent as the
    verdict needs (sidecar.measure.early_stop), at most ``most_requests``. At least ``warmup_requests`` are sent before
    the load, until step times settle (vllm_sloguard.starts.warmup); 0 disables the warm-up.
    """

    rate: PositiveFloat
    highest_rate: PositiveFloat | None = None
    requests: Annotated[int, Field(ge=10)] | None = None
    input_tokens: PositiveInt = 512
    output_tokens: PositiveInt = 128
    spread: Annotated[float, Field(ge=0, lt=1)] = 0.0
    warmup_requests: Annotated[int, Field(ge=0)] = 8
    request_timeout_s: PositiveFloat = 60.0
    seed: Annotated[int, Field(ge=0)] = 0
    dataset_name: Dataset = Field(default=Dataset.RANDOM, strict=False)
    dataset_path: Path | None = Field(default=None, strict=False)

    @model_validator(mode="after")
    def _whole_dataset(self) -> "Workload":
        random = self.dataset_name is Dataset.RANDOM
        if random != (self.dataset_path is None):
            needed = "is required for any" if self.dataset_path is None else "is only for a"
            raise ValueError(f"dataset_path: a file {needed} dataset_name other than random, got {self.dataset_name}")
        if not random and not {"input_tokens", "output_tokens"} <= self.model_fields_set:
            raise ValueError("input_tokens and output_tokens: required with a dataset, of the longest request")
        return self

    @model_validator(mode="after")
    def _rates_in_order(self) -> "Workload":
        if self.highest_rate is not None and self.highest_rate < self.rate:
            raise ValueError(f"highest_rate: {self.highest_rate:g} is below rate {self.rate:g}")
        return self

    @property
    def prompts(self) -> str:
        """A description of the prompts."""
        if self.dataset_path is None:
            return f"about {self.input_tokens} + {self.output_tokens} tokens"
        return f"{self.dataset_name} {self.dataset_path}, {self.input_tokens} + {self.output_tokens} tokens at most"

    @property
    def fixed_requests(self) -> int:
        """Number of measured requests if loads are compared, which requires equal sizes."""
        return self.requests or _COMPARED_REQUESTS

    @property
    def most_requests(self) -> int:
        """Maximum number of measured requests."""
        return self.requests or _MAX_REQUESTS

    @property
    def longest_request_tokens(self) -> int:
        """Prompt plus output of the longest request."""
        return int((self.input_tokens + self.output_tokens) * (1 + self.spread)) + 1
