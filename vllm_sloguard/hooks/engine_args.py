"""The repair pass on vLLM's own ``EngineArgs``, before vLLM checks them."""

import json
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import vllm
from vllm import envs

from vllm_sloguard.guard import machine
from vllm_sloguard.guard.known_model import STRUCTURAL_ARGUMENTS, CachedBuilds, KnownModel, known_model
from vllm_sloguard.guard.repair import TUNED, Repair
from vllm_sloguard.guard.rules.arguments import ARGUMENTS
from vllm_sloguard.guard.rules.single_argument import QUANTIZATION
from vllm_sloguard.guard.start_history import Learned, LimitKind, ranks_of, read_history
from vllm_sloguard.hooks.settings import Settings
from vllm_sloguard.hooks.telemetry_client import TelemetryClient
from vllm_sloguard.wire import telemetry_pb2 as pb

logger = logging.getLogger("vllm.sloguard")


def repair_engine_args(engine_args: Any, link: TelemetryClient, settings: Settings) -> None:
    """Changes arguments that vLLM would reject or could not start with, and logs each change with its reason.

    Arguments that cannot be repaired are left as they are: vLLM decides.
    """
    given, known = _given(engine_args), _learned(settings, engine_args.model)
    model, seen = _known_model(engine_args), machine.observe(ranks=ranks_of(given))
    # Free memory was measured just now; less of it at an earlier start must not keep the service from starting.
    repaired = known.without(LimitKind.FREE_BYTES).repairer(
        model, seen, time.time(), pinned=settings.pinned, workload_max_len=settings.workload_max_len or None
    )
    result = repaired({**_beyond(engine_args), **given})
    if result.warning:
        logger.warning("sloguard: %s", result.warning)
    if result.refusal:
        logger.warning("sloguard: these arguments can't work: %s", result.refusal)
    for change in result.changes:
        verb = "changes" if settings.repair else "would change"
        logger.warning("sloguard %s %s: %s → %s: %s", verb, change.name, change.before, change.after, change.reason)
        if settings.repair:
            setattr(engine_args, change.name, change.after)
    link.emit(pb.Event(repair_report=_report(result, settings.repair)))


def _learned(settings: Settings, model: str) -> Learned:
    try:
        learned = read_history(Path(settings.learned), model) if settings.learned else Learned()
    except ValueError as error:
        logger.warning("sloguard: the history of earlier starts is ignored: %s", error)
        learned = Learned()
    return learned.of_version(vllm.__version__)


def _given(engine_args: Any) -> dict[str, Any]:
    """The arguments that rules check; None only if vLLM does not accept it."""
    given = {name: getattr(engine_args, name) for name in TUNED if hasattr(engine_args, name)}
    given = {name: v for name, v in given.items() if v is not None or ARGUMENTS[name].default is not None}
    if "dtype" in given and not isinstance(given["dtype"], str):
        # Python callers may pass torch's own.
        given["dtype"] = str(given["dtype"]).removeprefix("torch.")
    if _registered(given.get("quantization")):
        del given["quantization"]
    return given


def _registered(method: Any) -> bool:
    """Whether another plugin has registered this quantization."""
    if method is None or method in QUANTIZATION:
        return False
    # Imported here, as vLLM itself imports it only with the model's configuration.
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    return method in QUANTIZATION_METHODS


def _known_model(engine_args: Any) -> KnownModel:
    """The model's files, and its sizes from the cache of builds; nothing is built in this process."""
    known = known_model(str(engine_args.model), CachedBuilds(vllm.__version__))
    if known.shape is not None and engine_args.max_model_len is not None and envs.VLLM_ALLOW_LONG_MAX_MODEL_LEN:
        return replace(known, shape=replace(known.shape, max_model_len=None))
    return known


def _beyond(engine_args: Any) -> dict[str, Any]:
    """The arguments that change the model but are not checked by any rule."""
    found = {name: getattr(engine_args, name) for name in STRUCTURAL_ARGUMENTS if hasattr(engine_args, name)}
    return {
        name: value for name, value in found.items() if isinstance(value, bool | int | float | str | dict) and value
    }


def _report(result: Repair, applied: bool) -> pb.RepairReport:
    changes = [
        pb.Change(
            name=c.name,
            from_value=json.dumps(c.before, default=str),
            to_value=json.dumps(c.after, default=str),
            reason=c.reason,
            rules=c.rules,
        )
        for c in (result.changes if applied else ())
    ]
    tokens = result.budget.kv_tokens if result.budget else None
    return pb.RepairReport(changes=changes, refusal=result.refusal, predicted_kv_cache_tokens=tokens)
