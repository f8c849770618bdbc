"""Lets vLLM build a model on the meta device without a GPU, as any of several ranks. Loaded by meta_build.py."""

import contextlib
import importlib
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any


def part_of_vllm(module: str, name: str) -> Any:
    """An object of vLLM, untyped. Raises ImportError."""
    found = importlib.import_module(module)
    try:
        return getattr(found, name)
    except AttributeError:
        return importlib.import_module(f"{module}.{name}")


@dataclass
class _SizeOnlyGroup:
    """A torch process group that only knows its size."""

    ranks: int

    def size(self) -> int:
        return self.ranks

    def rank(self) -> int:
        return 0


def _group(ranks: list[int]) -> Any:
    """vLLM's process group of ``ranks``, seen from the first."""
    torch = importlib.import_module("torch")
    group_class = part_of_vllm("vllm.distributed.parallel_state", "GroupCoordinator")

    group: Any = object.__new__(group_class)
    group.unique_name = "sloguard"
    group.rank = group.local_rank = group.device_index = ranks[0]
    group.ranks = ranks
    group.world_size = len(ranks)
    group.rank_in_group = 0
    group.cpu_group = group.device_group = _SizeOnlyGroup(len(ranks))
    group.device_communicator = group.mq_broadcaster = None
    group.use_device_communicator = group.use_custom_op_call = group.use_cpu_custom_send_recv = False
    group.device = torch.device("cpu")
    return group


@contextlib.contextmanager
def as_rank(config: Any, stage: int) -> Generator[None]:
    """Makes this process the first tensor-parallel rank of a pipeline stage."""
    parallel_state = part_of_vllm("vllm.distributed", "parallel_state")

    parallel = config.parallel_config
    tp, pp = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    rank, data = stage * tp, parallel.data_parallel_size
    peers = list(range(rank, rank + tp))
    stages = _group([at * tp for at in range(pp)])
    stages.rank, stages.rank_in_group = rank, stage
    groups = {
        **{name: _group(peers) for name in ("_TP", "_ETP")},
        **{name: _group(list(range(rank, rank + tp * data))) for name in ("_EP", "_EPLB")},
        "_WORLD": _group(list(range(rank, rank + tp * pp))),
        "_DCP": _group(peers[: getattr(parallel, "decode_context_parallel_size", 1)]),
        "_DP": _group(list(range(rank, rank + data))),
        "_PP": stages,
        **{name: _group([rank]) for name in ("_PCP", "_ENGRAM_DP", "_INNER_DP_WORLD")},
    }
    before = {name: getattr(parallel_state, name) for name in groups if hasattr(parallel_state, name)}
    for name in before:
        setattr(parallel_state, name, groups[name])
    try:
        yield
    finally:
        for name, group in before.items():
            setattr(parallel_state, name, group)


class _Placeholder:
    """Takes the place of a stream or an event, which only a forward pass uses."""

    def __init__(self, *_args: object, **_kwargs: object) -> None:
        return


@contextlib.contextmanager
def without_device() -> Generator[None]:
    """Keeps layers that name a device from taking memory on it."""
    torch = importlib.import_module("torch")
    function_mode = part_of_vllm("torch.overrides", "TorchFunctionMode")

    def moved(value: Any) -> Any:
        kind = value.type if isinstance(value, torch.device) else str(value).partition(":")[0]
        return value if kind in {"cpu", "meta"} else torch.device("meta")

    class OnMeta(function_mode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            given: dict[str, Any] = dict(kwargs or {})
            if given.get("device") is not None:
                given["device"] = moved(given["device"])
            if func is torch.Tensor.to:
                args = tuple(moved(each) if isinstance(each, str | torch.device) else each for each in args)
            return args[0] if func is torch.Tensor.cuda else func(*args, **given)

    before = torch.cuda.Stream, torch.cuda.Event
    torch.cuda.Stream = torch.cuda.Event = _Placeholder
    try:
        with OnMeta():
            yield
    finally:
        torch.cuda.Stream, torch.cuda.Event = before


def quantized_on_load(module: Any) -> list[Any]:
    """The weights of a layer that are built in the model's dtype and quantized while they are loaded."""
    method = getattr(module, "quant_method", None)
    serialized = getattr(getattr(method, "quant_config", None), "is_checkpoint_fp8_serialized", True)
    if method is None or not (serialized is False or "Online" in type(method).__name__):
        return []
    return [part for part in module.parameters(recurse=False) if part.dim() > 1 and part.is_floating_point()]


def online_width(module: Any) -> float:
    """Bytes of an element after quantization, with its share of the scales."""
    name = type(module.quant_method).__name__
    widths = {"Mxfp4": 0.5 + 1 / 32, "Nvfp4": 0.5 + 1 / 16, "Mxfp8": 1 + 1 / 32, "Fp8PerBlock": 1 + 4 / 128**2}
    return next((width for kind, width in widths.items() if kind in name), 1.0)
