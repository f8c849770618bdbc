"""The repair pass on vLLM's own ``EngineArgs``, before vLLM looks at them."""

import logging
import time
from pathlib import Path
from typing import Any

from vllm_sloguard import machine, model_shape
from vllm_sloguard.learned import Learned, ranks_of, read
from vllm_sloguard.link import Link
from vllm_sloguard.repair import TUNED, Repair, repair
from vllm_sloguard.settings import Settings
from vllm_sloguard.wire import telemetry_pb2 as pb

logger = logging.getLogger("vllm.sloguard")


def repair_engine_args(engine_args: Any, link: Link, settings: Settings) -> None:
    """Changes what vLLM would refuse or could not start with; says each change, with its reason.

    A configuration that can't work is left as it is: vLLM has the last word.
    """
    given = {name: value for name in TUNED if (value := getattr(engine_args, name, None)) is not None}
    shape, seen, known = _shape(engine_args.model), machine.observe(ranks=ranks_of(given)), _learned(settings)
    result = repair(
        given,
        shape,
        seen,
        pinned=settings.pinned,
        workload_max_len=settings.workload_max_len or None,
        estimate=known.estimate,
        limits=known.limits(shape, given, seen, time.time()),
    )
    if result.refusal:
        logger.warning("sloguard: these arguments can't work: %s", result.refusal)
    for change in result.changes:
        verb = "changes" if settings.repair else "would change"
        logger.warning("sloguard %s %s: %s → %s: %s", verb, change.name, change.before, change.after, change.reason)
        if settings.repair:
            setattr(engine_args, change.name, change.after)
    link.emit(pb.Event(repair_report=_report(result, settings.repair)))


def _learned(settings: Settings) -> Learned:
    import vllm

    try:
        return read(Path(settings.learned)).of_version(vllm.__version__) if settings.learned else Learned()
    except ValueError as error:
        logger.warning("sloguard: what earlier starts taught is left out: %s", error)
        return Learned()


def _shape(model: str) -> model_shape.ModelShape | None:
    try:
        return model_shape.of_model(model)
    except ValueError as error:
        logger.warning("sloguard: no memory budget for this model: %s", error)
        return None


def _report(result: Repair, applied: bool) -> pb.RepairReport:
    changes = [
        pb.Change(name=c.name, from_value=str(c.before), to_value=str(c.after), reason=c.reason)
        for c in (result.changes if applied else ())
    ]
    tokens = result.budget.kv_tokens if result.budget else None
    return pb.RepairReport(changes=changes, refusal=result.refusal, predicted_kv_cache_tokens=tokens)
