"""Builds a model with vLLM's own classes on the meta device, which takes no memory, and reports its sizes.

A script for the Python that has vLLM, where this project may not be installed: it loads meta_device.py by its path.
Each line of stdin is a request, each line of stdout its answer, both JSON. It exits when stdin closes, or after
``--idle-s`` without a request. Parallel ranks are simulated in turn: process groups exist so that layers can query
their rank, but nothing communicates. vLLM is imported only after the environment is set.
"""

import argparse
import dataclasses
import importlib
import importlib.util
import json
import os
import select
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_PLUGINS": "",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
_WATCH_INTERVAL_S = 0.2
_OUT_OF_MEMORY = 9
# More than any cache. vLLM gives every rank as many blocks as the one with room for the fewest, so one rank's block
# size is found by giving far more memory to all others.
_MUCH, _FAR_MORE = 2**70, 2**90


def _sibling(name: str) -> Any:
    """A module beside this script, by its path."""
    spec = importlib.util.spec_from_file_location(f"_sloguard_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


_meta_device = _sibling("meta_device")
_from = _meta_device.part_of_vllm


def answer_requests(memory_bytes: int, idle_s: float) -> None:
    """Answers requests until stdin closes or ``idle_s`` pass; exits when the process outgrows ``memory_bytes``."""
    os.environ.update(_ENVIRONMENT)
    # Output of vLLM and its libraries must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    threading.Thread(target=_watch_memory, args=(memory_bytes,), daemon=True).start()
    while select.select([sys.stdin], [], [], idle_s)[0]:
        line = sys.stdin.readline()
        if not line:
            return
        answer = _answer(json.loads(line))
        # A context on the device takes memory that the engine needs: the caller starts another process.
        ends = _holds_device()
        answers.write(json.dumps({**answer, "ends": ends}) + "\n")
        answers.flush()
        if ends:
            return


def _holds_device() -> bool:
    torch = sys.modules.get("torch")
    return bool(torch is not None and torch.cuda.is_initialized())


def _watch_memory(most: int) -> None:
    page = os.sysconf("SC_PAGE_SIZE")
    while True:
        resident = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * page
        if resident > most:
            os._exit(_OUT_OF_MEMORY)
        time.sleep(_WATCH_INTERVAL_S)


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    began = time.monotonic()
    try:
        built = Built(request["model"], request["args"])
        found = built.facts() if request.get("kv_bytes") is None else built.capacity(request["kv_bytes"])
    except Exception as error:  # noqa: BLE001 - the boundary to vLLM: whatever it raises is the answer
        text = " ".join(str(error).split())
        found = {"error": f"{type(error).__name__}: {text[:500]}"}
    return {**found, "seconds": round(time.monotonic() - began, 3)}


@dataclass
class StageBuild:
    """One built pipeline stage: bytes of its parameters by name, KV-cache specs by layer, bytes of LoRA adapters."""

    parameters: dict[str, int]
    specs: dict[str, Any]
    adapters: int


class Built:
    """A model built with ``args``, vLLM's own arguments."""

    def __init__(self, model: str, args: dict[str, Any]) -> None:
        self._offload = float(args.get("cpu_offload_gb") or 0)
        args = {name: value for name, value in args.items() if name != "cpu_offload_gb"}
        first = self.config = _engine_config(model, args)
        more = range(1, first.parallel_config.pipeline_parallel_size)
        # A configuration records the layers built with it, so each stage has its own.
        self.stages = [_build(first, 0), *(_build(_engine_config(model, args), stage) for stage in more)]
        _resolve_layout(first, [self.stages[0].specs])

    def _caches(self, available: list[int]) -> list[Any]:
        """The engine core's KV-cache configuration for the specs of all stages."""
        get_kv_cache_configs = _from("vllm.v1.core.kv_cache_utils", "get_kv_cache_configs")

        specs: list[dict[str, Any]] = [dict(stage.specs) for stage in self.stages]
        return list(get_kv_cache_configs(self.config, specs, available))

    def facts(self) -> dict[str, Any]:
        """Everything that the guard's arithmetic needs, as fields of ``built_model.BuiltModel``."""
        current_platform = _from("vllm.platforms", "current_platform")

        sized = self.config.model_config
        groups = self._caches([_MUCH] * len(self.stages))[0].kv_cache_groups
        return {
            "stages": [self._stage(at) for at in range(len(self.stages))],
            "groups": [_group_facts(self.config, group.kv_cache_spec) for group in groups],
            "platform": str(current_platform.device_type),
            "max_model_len": int(sized.max_model_len),
            "hidden": int(sized.get_hidden_size()),
            "vocab": int(sized.get_vocab_size()),
            "block_size": int(self.config.cache_config.block_size or 0),
        }

    def _stage(self, at: int) -> dict[str, int]:
        stage = self.stages[at]
        available = [_MUCH if other == at else _FAR_MORE for other in range(len(self.stages))]
        blocks = self._caches(available)[at].num_blocks if stage.specs else 0
        embeddings = [size for name, size in stage.parameters.items() if "embed" in name or "lm_head" in name]
        return {
            "weights_bytes": sum(stage.parameters.values()) - self._offloaded(stage) + stage.adapters,
            "embedding_bytes": max(embeddings, default=0),
            "bytes_per_block": _MUCH // blocks if blocks else 0,
            "bytes_per_token": _bytes_per_token(stage.specs),
        }

    def _offloaded(self, stage: StageBuild) -> int:
        """Whole parameters are moved to host memory until ``cpu_offload_gb`` is used up (offloader/uva.py)."""
        offloaded, most = 0, int(self._offload * 2**30)
        for name, size in stage.parameters.items():
            if offloaded < most and ".layers." in f".{name}":
                offloaded += size
        return offloaded

    def capacity(self, kv_bytes: int) -> dict[str, Any]:
        """What vLLM would print with ``kv_bytes`` left for the cache on each rank: the reference for tests."""
        kv_cache_utils = _from("vllm.v1.core", "kv_cache_utils")

        caches = self._caches([kv_bytes] * len(self.stages))
        scheduler = kv_cache_utils.generate_scheduler_kv_cache_config(caches)
        if not scheduler.kv_cache_groups:
            return {"blocks": 0, "groups": 0, "tokens": 0, "concurrency": 0.0}
        tokens, concurrency = kv_cache_utils.get_kv_cache_capacity(self.config, scheduler)
        groups = len(scheduler.kv_cache_groups)
        return {"blocks": scheduler.num_blocks, "groups": groups, "tokens": tokens, "concurrency": concurrency}


def _engine_config(model: str, args: dict[str, Any]) -> Any:
    """vLLM's configuration for ``args``, as the API server creates it."""
    engine_args = _from("vllm.engine.arg_utils", "EngineArgs")
    usage = _from("vllm.usage.usage_lib", "UsageContext")

    asked = {"skip_tokenizer_init": True, "load_format": "dummy", "enforce_eager": True, **args}
    if max(int(args.get(f"{kind}_parallel_size", 1)) for kind in ("tensor", "pipeline")) > 1:
        asked["distributed_executor_backend"] = "mp"
    load_model_classes(model)
    config: Any = engine_args(model=model, **asked).create_engine_config(usage.OPENAI_API_SERVER)
    return config


def load_model_classes(model: str) -> None:
    """Registers the model's class as loaded: vLLM would start a process per architecture to inspect it."""
    registry = _from("vllm.model_executor.models", "ModelRegistry")

    fields = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    architectures: list[str] = fields.get("architectures") or []
    for architecture in architectures:
        known = registry.models.get(architecture)
        if hasattr(known, "load_model_cls"):
            registry.register_model(architecture, known.load_model_cls())


def _build(config: Any, stage: int) -> StageBuild:
    torch = importlib.import_module("torch")
    initialize_model = _from("vllm.model_executor.model_loader.utils", "initialize_model")
    set_default_torch_dtype = _from("vllm.utils.torch_utils", "set_default_torch_dtype")

    draft = config.speculative_config and getattr(config.speculative_config, "draft_model_config", None)
    with _meta_device.as_rank(config, stage):
        with torch.device("meta"), _meta_device.without_device(), set_default_torch_dtype(config.model_config.dtype):
            model = initialize_model(config)
            parameters = _parameter_bytes(model)
            if draft is not None and stage == config.parallel_config.pipeline_parallel_size - 1:
                drafting = initialize_model(config, model_config=draft, prefix="draft_model")
                parameters |= {f"draft_model.{name}": size for name, size in _parameter_bytes(drafting).items()}
        _choose_block_size(config)
        return StageBuild(parameters, _specs(config), _adapter_bytes(config, model))


def _choose_block_size(config: Any) -> None:
    """The block size that suits the attention backend and the states of a hybrid, chosen after the model is loaded."""
    current_platform = _from("vllm.platforms", "current_platform")

    # Before 0.19 the configuration chose it.
    update = getattr(current_platform, "update_block_size_for_backend", None)
    if update is not None:
        update(config)


def _parameter_bytes(model: Any) -> dict[str, int]:
    """Bytes by name, as loaded. Named once, a parameter that modules share counts once."""
    online = {
        id(part): _meta_device.online_width(module)
        for module in model.modules()
        for part in _meta_device.quantized_on_load(module)
    }
    return {
        name: int(part.numel() * online.get(id(part), part.element_size())) for name, part in model.named_parameters()
    }


def _specs(config: Any) -> dict[str, Any]:
    """The KV-cache specs by layer as the model runner collects them; layers without a cache have none."""
    set_current_vllm_config = _from("vllm.config", "set_current_vllm_config")
    get_layers_from_vllm_config = _from("vllm.config.vllm", "get_layers_from_vllm_config")
    attention_layer = _from("vllm.model_executor.layers.attention_layer_base", "AttentionLayerBase")

    found: dict[str, Any] = {}
    with set_current_vllm_config(config):
        for name, layer in get_layers_from_vllm_config(config, attention_layer).items():
            shared = getattr(layer, "kv_sharing_target_layer_name", None)
            spec: Any = None if shared else layer.get_kv_cache_spec(config)
            if spec is not None:
                found[name] = _customized(layer, spec)
    return found


def _customized(layer: Any, spec: Any) -> Any:
    """The spec as customized by the attention backend; vLLM before 0.30 only notes whether its pages may be padded."""
    attention_spec = _from("vllm.v1.kv_cache_interface", "AttentionSpec")

    if not isinstance(spec, attention_spec):
        return spec
    backend = layer.get_attn_backend()
    try:
        customize_attention_spec = _from("vllm.v1.worker.utils", "customize_attention_spec")
    except ImportError:
        padded = getattr(backend, "indexes_kv_by_block_stride", None)
        return spec if padded is None else dataclasses.replace(spec, indexes_kv_by_block_stride=padded())
    return customize_attention_spec(backend, spec)


def _resolve_layout(config: Any, stages: list[dict[str, Any]]) -> None:
    """The order of the cache's dimensions, as the engine core resolves it; before 0.31 there is only one."""
    try:
        get_supported_kv_cache_layouts = _from("vllm.v1.attention.backends.utils", "get_supported_kv_cache_layouts")
        resolve_kv_cache_layout = _from("vllm.v1.attention.backends.utils", "resolve_kv_cache_layout")
        get_current_attn_backends = _from(
            "vllm.distributed.kv_transfer.kv_connector.utils", "get_current_attn_backends"
        )
    except ImportError:
        return
    layouts = [layout.name for layout in get_supported_kv_cache_layouts(get_current_attn_backends(config))]
    resolve_kv_cache_layout(config, [layouts], [spec for specs in stages for spec in specs.values()])


def _group_facts(config: Any, spec: Any) -> dict[str, Any]:
    """How many blocks of a group a request takes, as fields of ``built_model.BuiltGroup``."""
    kv = _from("vllm.v1", "kv_cache_interface")

    layers: Any = getattr(spec, "kv_cache_specs", None)
    if layers:
        # Layers of one group take the same number of blocks, whatever their page sizes.
        return _group_facts(config, next(iter(layers.values())))
    facts: dict[str, Any] = {"kind": "full", "block_size": spec.block_size, "tokens": 0}
    if isinstance(spec, kv.SlidingWindowSpec):
        facts |= {"kind": "window", "tokens": spec.sliding_window - 1 + getattr(spec, "extra_retained_tokens", 0)}
    elif isinstance(spec, kv.ChunkedLocalAttentionSpec):
        facts |= {"kind": "chunk", "tokens": spec.attention_chunk_size}
    elif isinstance(spec, kv.CrossAttentionSpec):
        facts["kind"] = "encoder"
    elif not isinstance(spec, kv.FullAttentionSpec):
        # Mamba's states and anything else that does not grow with the request.
        facts |= {"kind": "state", "tokens": -(-spec.max_memory_usage_bytes(config) // spec.page_size_bytes)}
    elif getattr(spec, "dcp_sharded", True):
        facts["ranks"] = getattr(config.parallel_config, "decode_context_parallel_size", 1)
    return facts


def _bytes_per_token(specs: dict[str, Any]) -> int:
    """One token in all layers whose cache grows with the request."""
    kv = _from("vllm.v1", "kv_cache_interface")

    growing = (kv.FullAttentionSpec, kv.SlidingWindowSpec, kv.ChunkedLocalAttentionSpec)
    return int(sum(spec.page_size_bytes / spec.block_size for spec in specs.values() if isinstance(spec, growing)))


def _adapter_bytes(config: Any, model: Any) -> int:
    """The slots for LoRA adapters: two matrices for each part of each linear layer (lora/layers)."""
    lora = config.lora_config
    if lora is None:
        return 0
    linear = _from("vllm.model_executor.layers.linear", "LinearBase")
    replicated = _from("vllm.model_executor.layers.linear", "ReplicatedLinear")
    row_parallel = _from("vllm.model_executor.layers.linear", "RowParallelLinear")

    elements = 0
    for layer in model.modules():
        if isinstance(layer, linear) and not isinstance(layer, replicated):
            parts = len(getattr(layer, "output_sizes", [0]))
            by_row = isinstance(layer, row_parallel)
            into = layer.input_size_per_partition if by_row else layer.input_size
            out = layer.output_size if by_row else layer.output_size_per_partition
            elements += parts * into + out
    width = getattr(lora.lora_dtype, "itemsize", 2)
    return int(elements * lora.max_lora_rank * lora.max_loras * width)


def main() -> None:
    """Reads the limits from the command line and answers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory-bytes", type=int, default=8 * 2**30)
    parser.add_argument("--idle-s", type=float, default=120.0)
    options = parser.parse_args()
    answer_requests(options.memory_bytes, options.idle_s)


if __name__ == "__main__":
    main()
