"""A model as vLLM builds it: the weights of each pipeline stage, and the groups of its KV cache."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class GroupKind(StrEnum):
    """What the layers of a group cache for a request."""

    FULL = "full"  # keys and values of every token
    WINDOW = "window"  # those of the last tokens
    CHUNK = "chunk"  # those of the current chunk
    ENCODER = "encoder"  # those of the encoder's output
    STATE = "state"  # a state of fixed size


@dataclass(frozen=True)
class BuiltGroup:
    """Layers that share a block table.

    ``tokens`` is the length of the window or chunk; for a state it is the number of blocks. ``ranks`` is how many
    context-parallel ranks share the tokens of a request.
    """

    kind: GroupKind
    block_size: int
    tokens: int = 0
    ranks: int = 1


@dataclass(frozen=True)
class BuiltStage:
    """One rank of a pipeline stage. Sizes are bytes; ``bytes_per_block`` is 0 if nothing is cached.

    ``embedding_bytes`` is the largest embedding matrix, ``bytes_per_token`` counts the layers whose cache grows.
    """

    weights_bytes: int
    embedding_bytes: int
    bytes_per_block: int
    bytes_per_token: int


@dataclass(frozen=True)
class BuiltModel:
    """A model built by vLLM's classes with given arguments; ``platform`` is the platform vLLM ran on."""

    stages: tuple[BuiltStage, ...]
    groups: tuple[BuiltGroup, ...]
    platform: str
    max_model_len: int
    hidden: int
    vocab: int
    block_size: int

    @property
    def weights_bytes(self) -> int:
        """The weights of the heaviest stage."""
        return max(stage.weights_bytes for stage in self.stages)


def built_model_fields(model: BuiltModel) -> dict[str, Any]:
    """``model`` as JSON fields."""
    return asdict(model)


_STAGE = ("weights_bytes", "embedding_bytes", "bytes_per_block", "bytes_per_token")
_GROUP = ("block_size", "tokens", "ranks")


def read_built_model(fields: Mapping[str, Any]) -> BuiltModel:
    """A model from JSON fields; unknown fields are ignored.

    Raises:
        ValueError: a field is missing or has a wrong type.
    """
    try:
        stages = tuple(BuiltStage(**{name: _size(stage[name]) for name in _STAGE}) for stage in fields["stages"])
        groups = tuple(
            BuiltGroup(GroupKind(group["kind"]), **{name: _size(group[name]) for name in _GROUP if name in group})
            for group in fields["groups"]
        )
        sizes = {name: _size(fields[name]) for name in ("max_model_len", "hidden", "vocab", "block_size")}
        platform = fields["platform"]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a built model: {type(error).__name__}: {error}") from None
    if not stages or not isinstance(platform, str):
        raise ValueError("not a built model: no stages or no platform")
    return BuiltModel(stages, groups, platform, **sizes)


def _size(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"not a built model: {str(value)[:60]} is not a size")
    return value
