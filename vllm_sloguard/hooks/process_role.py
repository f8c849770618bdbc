"""Which of vLLM's processes this is."""

import multiprocessing
import sys

from vllm_sloguard.wire import telemetry_pb2 as pb


def current_role() -> pb.ProcessRole:
    """The role, by the name that vLLM gives to each process that it starts."""
    name = multiprocessing.current_process().name
    if name.startswith("EngineCore"):
        return pb.PROCESS_ROLE_ENGINE_CORE
    if "Worker" in name:
        return pb.PROCESS_ROLE_WORKER
    return pb.PROCESS_ROLE_API_SERVER


def is_model_inspection() -> bool:
    """Whether this is the short-lived process in which vLLM looks at a model's class: nothing is hooked there."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return getattr(spec, "name", None) == "vllm.model_executor.models.registry"
