"""What vLLM itself says of models: KV-cache specs, blocks and parameters. A process of its own, told what in JSON.

Models are built whole on the meta device, where they take no memory, in the ranks of each parallel layout: forked
processes that have only what vLLM's workers would be told. Reads {"models": {name: config.json}, "layouts": [[tp, pp]],
"kinds": [kv_cache_dtype], "budgets": [[arguments, bytes for KV]]} from stdin, writes one JSON list to stdout.
"""

import gc
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_PLUGINS": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.vllm import get_layers_from_vllm_config
from vllm.distributed import (
    destroy_distributed_environment,
    destroy_model_parallel,
    ensure_model_parallel_initialized,
    init_distributed_environment,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models import ModelRegistry
from vllm.usage.usage_lib import UsageContext
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.core import kv_cache_utils

FORK = multiprocessing.get_context("fork")


def engine_config(model: str, tp: int, pp: int, **args: Any) -> VllmConfig:
    args = {"skip_tokenizer_init": True, "load_format": "dummy", "enforce_eager": True, **args}
    args |= {"tensor_parallel_size": tp, "pipeline_parallel_size": pp, "distributed_executor_backend": "mp"}
    config = EngineArgs(model=model, **args).create_engine_config(UsageContext.OPENAI_API_SERVER)
    # What the CPU backend's attention asks for; the engine core asks it.
    config.cache_config.kv_cache_layout = "LBHNC"
    return config


def built(config: VllmConfig) -> dict[str, Any]:
    """The part of the model that this rank has: its specs by layer, and the bytes of its parameters."""
    with torch.device("meta"), set_default_torch_dtype(config.model_config.dtype):
        model = initialize_model(config)
    with set_current_vllm_config(config):
        layers = get_layers_from_vllm_config(config, AttentionLayerBase)
        specs = {name: layer.get_kv_cache_spec(config) for name, layer in layers.items()}
    parts = {name: part.numel() * part.element_size() for name, part in model.named_parameters()}
    embeddings = sum(size for name, size in parts.items() if "embed" in name or "lm_head" in name)
    return {"specs": specs, "weights": sum(parts.values()), "embeddings": embeddings}


@dataclass(frozen=True)
class Job:
    """Folders of models by name, dtypes of the KV cache, and a folder to meet in."""

    models: dict[str, str]
    kinds: list[str]
    folder: str


def rank_main(rank: int, tp: int, pp: int, job: Job, pipe: Any) -> None:
    """One rank of a layout: the first of each stage builds all models, the others are there for the groups alone."""
    # Ranks that don't share this name share no memory: none is left behind.
    os.environ["VLLM_DIST_IDENT"] = str(os.getpid())
    expert = next(iter(job.models.values()))
    with set_current_vllm_config(engine_config(expert, tp, pp)):
        init_distributed_environment(tp * pp, rank, f"file://{job.folder}/{tp}x{pp}", rank, "gloo")
        ensure_model_parallel_initialized(tp, pp)
    answer: dict[tuple[str, str], Any] = {}
    if rank % tp == 0:
        for name, path in job.models.items():
            for kind in job.kinds:
                try:
                    answer[name, kind] = built(engine_config(path, tp, pp, kv_cache_dtype=kind))
                except (ValueError, NotImplementedError) as error:
                    answer[name, kind] = str(error)
    pipe.send(answer)
    pipe.recv()
    destroy_model_parallel()
    destroy_distributed_environment()
    gc.collect()  # the queues of the groups give their shared memory back


def ranks(tp: int, pp: int, job: Job) -> list[dict[tuple[str, str], Any]]:
    """The answers of the first rank of each stage."""
    pipes: list[Any] = []
    processes: list[Any] = []
    for rank in range(tp * pp):
        mine, theirs = FORK.Pipe()
        process = FORK.Process(target=rank_main, args=(rank, tp, pp, job, theirs), daemon=True)
        process.start()
        theirs.close()
        pipes.append(mine)
        processes.append(process)
    answers = [pipe.recv() for pipe in pipes]
    for pipe in pipes:
        pipe.send("end")
    for process in processes:
        process.join()
    return answers[::tp]


def blocks(config: VllmConfig, stages: list[Any], available: int) -> dict[str, Any]:
    """What the engine core makes of the specs of all stages."""
    try:
        caches = kv_cache_utils.get_kv_cache_configs(
            config, [dict(stage["specs"]) for stage in stages], [available] * len(stages)
        )
    except ValueError as error:
        return {"error": str(error)}
    whole = kv_cache_utils.generate_scheduler_kv_cache_config(caches)
    tokens, concurrency = kv_cache_utils.get_kv_cache_capacity(config, whole)
    return {"blocks": whole.num_blocks, "groups": len(whole.kv_cache_groups), "tokens": tokens, "times": concurrency}


def main() -> None:
    asked = json.loads(sys.stdin.read())
    folder = tempfile.mkdtemp()
    models: dict[str, str] = {}
    # Mixtures of experts first: vLLM makes the groups that they need for the first model.
    for name, fields in sorted(asked["models"].items(), key=lambda model: "experts" not in str(model[1])):
        path = Path(folder) / name
        path.mkdir()
        (path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
        models[name] = str(path)
        # In this process: vLLM would start another one for each architecture to look at it.
        architecture = fields["architectures"][0]
        ModelRegistry.register_model(architecture, ModelRegistry.models[architecture].load_model_cls())
    found: list[dict[str, Any]] = []
    for tp, pp in asked["layouts"]:
        parts = ranks(tp, pp, Job(models, asked["kinds"], folder))
        for name, kind in parts[0]:
            stages = [part[name, kind] for part in parts]
            refused = [stage for stage in stages if isinstance(stage, str)]
            config = engine_config(models[name], tp, pp, kv_cache_dtype=kind)
            answer = {"model": name, "kind": kind, "tp": tp, "pp": pp, "refused": "".join(refused)}
            answer |= counts(config)
            answer["stages"] = [] if refused else [sizes(stage) for stage in stages]
            answer["budgets"] = (
                []
                if refused
                else [
                    blocks(engine_config(models[name], tp, pp, kv_cache_dtype=kind, **budget[0]), stages, budget[1])
                    for budget in asked["budgets"]
                ]
            )
            found.append(answer)
    shutil.rmtree(folder)
    sys.stdout.write(json.dumps(found))


def counts(config: VllmConfig) -> dict[str, Any]:
    """What the configuration alone says of one rank."""
    sized, parallel = config.model_config, config.parallel_config
    return {
        "kv_heads": sized.get_num_kv_heads(parallel),
        "head_size": sized.get_head_size(),
        "layers": sized.get_num_layers(parallel),
        "mla": sized.use_mla,
        "max_model_len": sized.max_model_len,
        "block_size": config.cache_config.block_size,
    }


def sizes(stage: dict[str, Any]) -> dict[str, Any]:
    """The sizes of one built stage."""
    return {
        "bytes_per_token": sum(spec.page_size_bytes / spec.block_size for spec in stage["specs"].values()),
        "layers": len(stage["specs"]),
        "weights": stage["weights"],
        "embeddings": stage["embeddings"],
    }


if __name__ == "__main__":
    main()
