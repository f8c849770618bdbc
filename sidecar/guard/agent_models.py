"""What is known of a model whose files are at an agent."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from sidecar.engine.agent_environment import AgentEnvironment
from sidecar.guard.model_builds import HelperBuilds
from vllm_sloguard.guard.known_model import KnownModel, cache_folder, known_model


def model_at_agent(environment: AgentEnvironment, vllm_version: str) -> KnownModel:
    """The model by the agent's files, with its sizes by the agent's vLLM. Raises AgentLost, AgentRefused."""
    found = environment.model_files()
    size = found.checkpoint_bytes if found.HasField("checkpoint_bytes") else None
    if not found.files:
        return KnownModel(problem=found.problem, checkpoint_bytes=size)
    try:
        folder = _stored(found.files)
    except OSError as error:
        return KnownModel(problem=f"the agent's files can't be kept here: {error}", checkpoint_bytes=size)
    known = known_model(str(folder), HelperBuilds(vllm_version, environment) if vllm_version else None)
    return replace(known, problem=known.problem.replace(f"{folder}/", "at the agent: "), checkpoint_bytes=size)


def _stored(files: Mapping[str, bytes]) -> Path:
    """A folder of the cache with ``files``, which are looked up by their content. Raises OSError."""
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        digest.update(f"{name} {len(content)} ".encode() + content)
    folder = cache_folder() / f"files-{digest.hexdigest()[:32]}"
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / Path(name).name).write_bytes(content)
    return folder
