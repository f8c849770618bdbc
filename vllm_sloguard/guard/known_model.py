"""What is known about one model: its shape, its checkpoint, and its sizes as built by vLLM's own classes."""

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from vllm_sloguard.guard.bounded_read import read_small_file
from vllm_sloguard.guard.built_model import BuiltModel, built_model_fields, read_built_model
from vllm_sloguard.guard.checkpoint import checkpoint_bytes
from vllm_sloguard.guard.evidence import ModelEvidence
from vllm_sloguard.guard.machine import Machine
from vllm_sloguard.guard.model_shape import DTYPE_BYTES, ModelShape, beyond_arithmetic, read_shape, stated

# Version of the questions to vLLM: increased when they change, which invalidates the cache.
_CACHE_FORMAT = 1
# The arguments that change the built model, each with vLLM's default. Lengths, batches and shares only enter the
# arithmetic. tests/real_vllm/test_structural_arguments.py fails if vLLM has an argument that is not classified.
STRUCTURAL_ARGUMENTS: Mapping[str, object] = {
    **{f"{kind}_parallel_size": 1 for kind in ("tensor", "pipeline", "data")},
    "decode_context_parallel_size": 1,
    "enable_expert_parallel": False,
    "dtype": "auto",
    "quantization": None,
    "kv_cache_dtype": "auto",
    "block_size": None,
    "enable_prefix_caching": None,
    "mamba_cache_dtype": "auto",
    "mamba_ssm_cache_dtype": "auto",
    "mamba_block_size": None,
    "mamba_cache_mode": "none",
    "disable_hybrid_kv_cache_manager": None,
    "hf_overrides": None,
    "speculative_config": None,
    "enable_lora": False,
    "max_loras": 1,
    "max_lora_rank": 16,
    "lora_dtype": "auto",
    "cpu_offload_gb": 0,
    "limit_mm_per_prompt": None,
    "language_model_only": False,
    "attention_backend": None,
    "runner": "auto",
    "convert": "auto",
    "trust_remote_code": False,
    "prefill_context_parallel_size": 1,
    "dcp_kv_cache_interleave_size": 1,
    "disable_sliding_window": False,
    "kv_cache_dtype_skip_layers": None,
    "quantization_config": None,
    "num_gpu_blocks_override": None,
    "fully_sharded_loras": False,
    "lora_target_modules": None,
    "enable_moe_shared_loras": False,
    "enable_eplb": False,
    "model_impl": "auto",
    "moe_backend": "auto",
    "linear_backend": "auto",
    "spec_method": None,
    "spec_model": None,
    "spec_tokens": None,
    "mm_encoder_only": False,
    "mm_processor_kwargs": None,
    "hf_config_path": None,
    "use_replayssm": False,
    "replayssm_buffer_len": 16,
    "enable_mamba_shared_prefix_checkpoint": False,
    "prefix_match_unit": None,
    "swa_bounded_replay": True,
    "offload_backend": "auto",
    "offload_group_size": 0,
    "offload_num_in_group": 1,
}

# With any other, vLLM can be asked nothing.
_DTYPES = frozenset({"auto", *DTYPE_BYTES})
_JSON_ARGUMENTS = {"hf_overrides", "speculative_config", "limit_mm_per_prompt"}
# Supported by CUDA's attention backends, but not by the CPU's.
_CUDA_BLOCK = 16


def structural(args: Mapping[str, object]) -> dict[str, Any]:
    """Those of ``args`` that change what vLLM builds; JSON strings are parsed, as vLLM's command line does."""
    known = STRUCTURAL_ARGUMENTS
    found: dict[str, Any] = {name: args[name] for name in known if name in args and args[name] != known[name]}
    for name in _JSON_ARGUMENTS & found.keys():
        if isinstance(found[name], str):
            with suppress(ValueError, RecursionError):
                found[name] = json.loads(found[name])
    return {name: value for name, value in found.items() if value not in ({}, [], "", None)}


def local_folder(model: str) -> Path | None:
    """The local files of ``model``: a folder, or the snapshot of a name in the hub's cache."""
    folder = Path(model)
    if (folder / "config.json").is_file() or folder.suffix == ".gguf":
        return folder
    parts = model.split("/")
    if len(parts) > 2 or not all(part and part not in (".", "..") for part in parts):
        return None
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / f"models--{model.replace('/', '--')}"
    try:
        commit = (cache / "refs" / "main").read_text(encoding="utf-8").strip()
        snapshots = [cache / "snapshots" / commit]
    except (OSError, ValueError):
        snapshots = sorted((cache / "snapshots").glob("*")) if (cache / "snapshots").is_dir() else []
    return next((snapshot for snapshot in snapshots if (snapshot / "config.json").is_file()), None)


class ModelBuilds(Protocol):
    """Builds models with vLLM's own classes."""

    def built(self, folder: Path, args: Mapping[str, Any]) -> BuiltModel | None:
        """The model of ``folder`` with structural ``args``; None if it cannot be built."""
        ...


class CachedBuilds:
    """A cache of answers in ``folder``, keyed by the model's configuration, the arguments and vLLM's version."""

    def __init__(self, vllm_version: str, folder: Path | None = None) -> None:
        self._version = vllm_version
        self._folder = folder or cache_folder()

    def path(self, folder: Path, args: Mapping[str, Any]) -> Path:
        """The file of an answer. Raises OSError if the model's configuration can't be read."""
        content = [str(_CACHE_FORMAT), self._version, json.dumps(args, sort_keys=True, default=str)]
        for name in ("config.json", "hf_quant_config.json"):
            path = folder / name
            content.append(read_small_file(path).decode("utf-8", errors="replace") if path.exists() else "")
        digest = hashlib.sha256("\0".join(content).encode()).hexdigest()
        return self._folder / f"{digest[:32]}.json"

    def built(self, folder: Path, args: Mapping[str, Any]) -> BuiltModel | None:
        """The stored answer."""
        try:
            return read_built_model(json.loads(self.path(folder, args).read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError, TypeError):
            return None

    def keep(self, folder: Path, args: Mapping[str, Any], model: BuiltModel) -> None:
        """Stores an answer; errors of the disk are ignored."""
        try:
            path = self.path(folder, args)
            path.parent.mkdir(parents=True, exist_ok=True)
            new = path.with_suffix(f".{os.getpid()}")
            new.write_text(json.dumps(built_model_fields(model)), encoding="utf-8")
            new.replace(path)
        except OSError:
            return


def cache_folder() -> Path:
    """The folder of the cache, shared by all projects of this user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sloguard" / "models"


@dataclass(frozen=True)
class KnownModel:
    """One model on this machine. ``problem`` is the reason why its configuration can't be read, if it can't."""

    shape: ModelShape | None = None
    folder: Path | None = None
    problem: str = ""
    checkpoint_bytes: int | None = None
    builds: ModelBuilds | None = None

    @property
    def why_unknown(self) -> str:
        """Why there is no estimate of its memory, where there is none."""
        return self.problem or "these arguments change the model, and there is no vLLM here that builds it"

    def evidence(self, args: Mapping[str, object], machine: Machine | None = None) -> ModelEvidence:
        """What is known about the model with ``args`` beyond its shape, for an engine on ``machine``."""
        built = self._built(args)
        if built is not None and built.platform == "cpu" and machine is not None and machine.kind == "cuda":
            # vLLM runs on the CPU here but is asked about a GPU, where its blocks are smaller.
            built = self._built({"block_size": _CUDA_BLOCK, **args}) or built
        changed = built is None and beyond_arithmetic(args)
        return ModelEvidence(built, None if changed else self._loaded_bytes(args))

    def _built(self, args: Mapping[str, object]) -> BuiltModel | None:
        if self.folder is None or self.builds is None or args.get("dtype", "auto") not in _DTYPES:
            return None
        return self.builds.built(self.folder, structural(args))

    def _loaded_bytes(self, args: Mapping[str, object]) -> int | None:
        """The checkpoint's size is meaningless if weights change their width when loaded."""
        changed = args.get("quantization") or args.get("dtype", "auto") not in ("auto", "bfloat16", "float16", "half")
        return None if changed else self.checkpoint_bytes

    def shape_with(self, args: Mapping[str, object]) -> ModelShape | None:
        """The shape for the rules; None if nothing is known about the model with ``args``."""
        if args.get("hf_overrides") or self.shape is None:
            built = self._built(args)
            return None if built is None else shape_of_built(built)
        return self.shape

    def unknown(self, args: Mapping[str, object]) -> bool:
        """Whether an estimate would be worthless: arguments change the model, and vLLM was not asked."""
        return beyond_arithmetic(args) and self._built(args) is None


def shape_of_built(built: BuiltModel) -> ModelShape:
    """A substitute shape, for the activations of the profile run, which are guessed from the weights."""
    per_token = max((stage.bytes_per_token for stage in built.stages), default=0)
    rough = stated(built.weights_bytes, max(1, per_token), built.max_model_len)
    # vLLM has built it, so the heads suit the layout, whatever their number.
    return replace(rough, heads=0, vocab=max(1, built.vocab))


def known_model(model: str, builds: ModelBuilds | None = None) -> KnownModel:
    """What the local files of ``model`` say; nothing if there are none."""
    folder = local_folder(model)
    if folder is None:
        return KnownModel(problem=f"no config.json of {model} on this machine{_download(model)}")
    if folder.suffix == ".gguf":
        return KnownModel(problem="a GGUF file has no config.json", checkpoint_bytes=checkpoint_bytes(folder))
    try:
        shape, problem = read_shape(folder), ""
    except ValueError as error:
        shape, problem = None, str(error)
    return KnownModel(shape, folder, problem, checkpoint_bytes(folder), _Remembered(builds) if builds else None)


def _download(model: str) -> str:
    return f"; `hf download {model} config.json` brings it" if model.count("/") == 1 and model[0] not in "./~" else ""


class _Remembered:
    """Memoizes answers: the repair pass asks about the same arguments many times."""

    def __init__(self, builds: ModelBuilds) -> None:
        self._builds = builds
        self._answers: dict[str, BuiltModel] = {}

    def built(self, folder: Path, args: Mapping[str, Any]) -> BuiltModel | None:
        """The memoized answer."""
        key = json.dumps([str(folder), args], sort_keys=True, default=str)
        answer = self._answers.get(key) or self._builds.built(folder, args)
        if answer is not None:
            self._answers[key] = answer
        return answer
