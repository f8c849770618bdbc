"""The plugin's entry point: hooks that observe vLLM and repair its arguments, and never fail it.

vLLM calls ``register`` in each of its processes; a forked process inherits the hooks of its parent. Exceptions in a
hook are counted, logged once, and kept from vLLM.
"""

import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec

from vllm_sloguard.hooks import stack_dump
from vllm_sloguard.hooks.process_role import current_role, is_model_inspection
from vllm_sloguard.hooks.settings import SETTING_NAMES, Settings, SettingsError, unknown
from vllm_sloguard.hooks.telemetry_client import TelemetryClient
from vllm_sloguard.starts import import_list
from vllm_sloguard.wire import telemetry_pb2 as pb

P = ParamSpec("P")

# vLLM sets up logging for its own name only; below it, the plugin's lines look like vLLM's.
logger = logging.getLogger("vllm.sloguard")

_LONGEST_MESSAGE = 4096
_MAX_CRASH_REPORTS = 8  # a minute
_LAST_WORDS_S = 1.0

_link: TelemetryClient | None = None
_said: set[str] = set()
_engine_core: Any = None


def register() -> None:
    """Installs the hooks. Idempotent; never raises."""
    global _link  # noqa: PLW0603 - vLLM gives the entry point nothing to keep state in
    if _link is not None or is_model_inspection():
        return
    try:
        settings = Settings.from_environ(os.environ)
    except SettingsError as error:
        logger.warning("sloguard is not active: %s", error)
        return
    for name in unknown(os.environ):
        logger.warning("sloguard: %s is not a setting and is ignored; there are %s", name, ", ".join(SETTING_NAMES))
    _link = TelemetryClient(settings)
    harmless(_install)(_link, settings)
    harmless(stack_dump.show_when_asked)()


def link() -> TelemetryClient | None:
    """The process's link, once registered."""
    return _link


def record_imports() -> None:
    """Adds this process's imports to the file for the fork server, if one is configured."""
    import vllm

    if _link is not None and _link.settings.imports:
        import_list.save_imports(import_list.list_path(Path(_link.settings.imports), vllm.__version__))


def harmless(hook: Callable[P, object]) -> Callable[P, None]:
    """``hook``, with its exceptions counted, logged once, and kept from vLLM."""

    @functools.wraps(hook)
    def call(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            hook(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - the boundary to vLLM
            hook_failed(getattr(hook, "__name__", "hook"), error)

    return call


def hook_failed(name: str, error: Exception) -> None:
    """Counts what a hook raised, and logs each hook's first failure."""
    if _link is not None:
        _link.hook_errors += 1
    if name not in _said:
        _said.add(name)
        logger.warning("sloguard: %s failed and is ignored: %s: %s", name, type(error).__name__, error)


def _install(link: TelemetryClient, settings: Settings) -> None:
    logging.getLogger("vllm").addHandler(CrashHandler(link))
    link.emit(_phase(pb.PHASE_PLUGIN_LOADED))
    if current_role() == pb.PROCESS_ROLE_API_SERVER:
        _hook_engine_arguments(link, settings)
    elif current_role() == pb.PROCESS_ROLE_ENGINE_CORE:
        _hook_engine_core(link, settings)


def _hook_engine_arguments(link: TelemetryClient, settings: Settings) -> None:
    from vllm.engine.arg_utils import EngineArgs

    from vllm_sloguard.hooks.engine_args import repair_engine_args

    original = EngineArgs.create_engine_config

    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        harmless(repair_engine_args)(self, link, settings)
        try:
            config = original(self, *args, **kwargs)
        except Exception as error:
            harmless(_report_crash)(link, error, "The engine arguments were refused.")
            harmless(link.flush)(_LAST_WORDS_S)
            raise
        harmless(link.emit)(_phase(pb.PHASE_CONFIG_READY))
        # The engine core may be forked from this process, without loading the plugin again.
        harmless(_hook_engine_core)(link, settings)
        return config

    EngineArgs.create_engine_config = create_engine_config


def _hook_engine_core(link: TelemetryClient, settings: Settings) -> None:
    from vllm.v1.engine.core import EngineCore

    original = EngineCore._initialize_kv_caches  # pyright: ignore[reportPrivateUsage]
    if getattr(original, "sloguard", False):
        return

    @functools.wraps(original)
    def initialize_kv_caches(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        harmless(link.emit)(_phase(pb.PHASE_MODEL_LOADED))
        harmless(_hook_profiling)(link, self)
        result = original(self, vllm_config, *args, **kwargs)
        harmless(lambda: link.emit(_phase(pb.PHASE_KV_CACHE_READY, _kv_cache_tokens(vllm_config))))()
        # The workers are running, so this process will not fork again.
        harmless(link.open)()
        harmless(_hook_scheduler)(settings, self)
        harmless(record_imports)()
        return result

    setattr(initialize_kv_caches, "sloguard", True)  # noqa: B010 - a type checker knows no attributes of functions
    EngineCore._initialize_kv_caches = initialize_kv_caches  # pyright: ignore[reportPrivateUsage]


def _hook_scheduler(settings: Settings, engine_core: Any) -> None:
    """Adds live knobs to the scheduler that ``engine_core`` is about to create."""
    import vllm
    from vllm.v1.core.sched.scheduler import Scheduler

    from vllm_sloguard.guard.start_history import version
    from vllm_sloguard.hooks.live_client import LiveLink
    from vllm_sloguard.hooks.live_scheduler import LiveScheduler

    global _engine_core  # noqa: PLW0603 - the class is hooked once, and a process may make one engine after another
    _engine_core = engine_core
    init = Scheduler.__init__
    schedule: Any = Scheduler.schedule
    if not settings.socket or getattr(init, "sloguard", False):
        return

    def attach(scheduler: Any) -> None:
        if scheduler.__class__.schedule is not schedule:
            return  # a subclass with its own schedule()
        encoder = scheduler.vllm_config.model_config.is_multimodal_model
        reset_encoder = _engine_core.reset_encoder_cache if encoder else None
        live = LiveScheduler(scheduler, version(vllm.__version__), reset_encoder, harmless)
        scheduler.sloguard_live = live
        LiveLink(settings, live, scheduler.parallel_config.data_parallel_index, vllm.__version__).open()

    @functools.wraps(init)
    def initialized(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        harmless(attach)(self)

    setattr(initialized, "sloguard", True)  # noqa: B010 - a type checker knows no attributes of functions
    Scheduler.__init__ = initialized


def _hook_profiling(link: TelemetryClient, engine_core: Any) -> None:
    """Reports the result of the profiling pass before the start can fail on it."""
    executor = engine_core.model_executor
    original = executor.determine_available_memory

    def determine_available_memory(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        harmless(_report_memory)(link, executor, found)
        return found

    executor.determine_available_memory = determine_available_memory


def _report_memory(link: TelemetryClient, executor: Any, available: list[int]) -> None:
    import vllm

    # The worker itself where it lives in this process; its fields are those of vllm/v1/worker/gpu_worker.py.
    worker = getattr(getattr(executor, "driver_worker", None), "worker", None)
    runner = getattr(worker, "model_runner", None)
    snapshot = getattr(worker, "init_snapshot", None)
    profiled = pb.MemoryProfiled(
        kv_cache_bytes=min(available),
        total_bytes=_bytes(getattr(snapshot, "total_memory", None)),
        weights_bytes=_bytes(getattr(runner, "model_memory_usage", None)),
        activation_bytes=_bytes(getattr(worker, "peak_activation_memory", None)),
        graph_bytes=_bytes(getattr(worker, "cudagraph_memory_estimate", None)),
        vllm_version=vllm.__version__,
    )
    link.emit(pb.Event(memory_profiled=profiled))


def _bytes(value: Any) -> int | None:
    return None if value is None else max(0, int(value))


def _kv_cache_tokens(vllm_config: Any) -> int:
    cache = vllm_config.cache_config
    # Newer versions work it out themselves, hybrid models included.
    tokens = getattr(cache, "kv_cache_size_tokens", None)
    return int(tokens or (cache.num_gpu_blocks or 0) * cache.block_size)


def _phase(phase: pb.Phase, kv_cache_tokens: int | None = None) -> pb.Event:
    return pb.Event(phase_reached=pb.PhaseReached(phase=phase, kv_cache_tokens=kv_cache_tokens))


def _report_crash(link: TelemetryClient, error: BaseException, context: str) -> None:
    kind = type(error)
    name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
    report = pb.CrashReport(
        exception_type=name, message=str(error)[:_LONGEST_MESSAGE], context=context[:_LONGEST_MESSAGE]
    )
    link.emit(pb.Event(crash_report=report))


class CrashHandler(logging.Handler):
    """Reports errors that vLLM logs with an exception: each process logs why it fails that way."""

    def __init__(self, link: TelemetryClient) -> None:
        super().__init__(logging.ERROR)
        self._link = link
        self._reports = 0
        self._minute = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        """Takes one log record."""
        if record.created - self._minute > 60:
            self._minute, self._reports = record.created, 0
        error = record.exc_info[1] if record.exc_info else None
        if error is None or self._reports >= _MAX_CRASH_REPORTS:
            return
        self._reports += 1
        harmless(_report_crash)(self._link, error, record.getMessage())
        if current_role() != pb.PROCESS_ROLE_API_SERVER:
            # These processes exit soon after such a line, perhaps before the sending thread runs again.
            harmless(self._link.flush)(_LAST_WORDS_S)
