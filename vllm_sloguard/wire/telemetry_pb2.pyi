from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ProcessRole(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PROCESS_ROLE_UNSPECIFIED: _ClassVar[ProcessRole]
    PROCESS_ROLE_API_SERVER: _ClassVar[ProcessRole]
    PROCESS_ROLE_ENGINE_CORE: _ClassVar[ProcessRole]
    PROCESS_ROLE_WORKER: _ClassVar[ProcessRole]

class Phase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PHASE_UNSPECIFIED: _ClassVar[Phase]
    PHASE_PLUGIN_LOADED: _ClassVar[Phase]
    PHASE_CONFIG_READY: _ClassVar[Phase]
    PHASE_MODEL_LOADED: _ClassVar[Phase]
    PHASE_KV_CACHE_READY: _ClassVar[Phase]
    PHASE_ENGINE_READY: _ClassVar[Phase]
PROCESS_ROLE_UNSPECIFIED: ProcessRole
PROCESS_ROLE_API_SERVER: ProcessRole
PROCESS_ROLE_ENGINE_CORE: ProcessRole
PROCESS_ROLE_WORKER: ProcessRole
PHASE_UNSPECIFIED: Phase
PHASE_PLUGIN_LOADED: Phase
PHASE_CONFIG_READY: Phase
PHASE_MODEL_LOADED: Phase
PHASE_KV_CACHE_READY: Phase
PHASE_ENGINE_READY: Phase

class PublishRequest(_message.Message):
    __slots__ = ("engine_id", "process", "sequence", "dropped_events", "hook_errors", "events")
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    PROCESS_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    DROPPED_EVENTS_FIELD_NUMBER: _ClassVar[int]
    HOOK_ERRORS_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    engine_id: str
    process: Process
    sequence: int
    dropped_events: int
    hook_errors: int
    events: _containers.RepeatedCompositeFieldContainer[Event]
    def __init__(self, engine_id: _Optional[str] = ..., process: _Optional[_Union[Process, _Mapping]] = ..., sequence: _Optional[int] = ..., dropped_events: _Optional[int] = ..., hook_errors: _Optional[int] = ..., events: _Optional[_Iterable[_Union[Event, _Mapping]]] = ...) -> None: ...

class PublishResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Process(_message.Message):
    __slots__ = ("role", "pid")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    role: ProcessRole
    pid: int
    def __init__(self, role: _Optional[_Union[ProcessRole, str]] = ..., pid: _Optional[int] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("time_unix_seconds", "request_finished", "step_stats", "phase_reached", "crash_report", "repair_report", "memory_profiled", "admission_counts")
    TIME_UNIX_SECONDS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FINISHED_FIELD_NUMBER: _ClassVar[int]
    STEP_STATS_FIELD_NUMBER: _ClassVar[int]
    PHASE_REACHED_FIELD_NUMBER: _ClassVar[int]
    CRASH_REPORT_FIELD_NUMBER: _ClassVar[int]
    REPAIR_REPORT_FIELD_NUMBER: _ClassVar[int]
    MEMORY_PROFILED_FIELD_NUMBER: _ClassVar[int]
    ADMISSION_COUNTS_FIELD_NUMBER: _ClassVar[int]
    time_unix_seconds: float
    request_finished: RequestFinished
    step_stats: StepStats
    phase_reached: PhaseReached
    crash_report: CrashReport
    repair_report: RepairReport
    memory_profiled: MemoryProfiled
    admission_counts: AdmissionCounts
    def __init__(self, time_unix_seconds: _Optional[float] = ..., request_finished: _Optional[_Union[RequestFinished, _Mapping]] = ..., step_stats: _Optional[_Union[StepStats, _Mapping]] = ..., phase_reached: _Optional[_Union[PhaseReached, _Mapping]] = ..., crash_report: _Optional[_Union[CrashReport, _Mapping]] = ..., repair_report: _Optional[_Union[RepairReport, _Mapping]] = ..., memory_profiled: _Optional[_Union[MemoryProfiled, _Mapping]] = ..., admission_counts: _Optional[_Union[AdmissionCounts, _Mapping]] = ...) -> None: ...

class RequestFinished(_message.Message):
    __slots__ = ("ttft_seconds", "inter_token_seconds", "e2e_seconds", "queue_seconds", "prefill_seconds", "decode_seconds", "prompt_tokens", "output_tokens", "finish_reason", "largest_gap_seconds", "gap_p50_seconds", "gap_p90_seconds", "gap_p95_seconds", "gap_p99_seconds")
    TTFT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    INTER_TOKEN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    E2E_SECONDS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    DECODE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    LARGEST_GAP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    GAP_P50_SECONDS_FIELD_NUMBER: _ClassVar[int]
    GAP_P90_SECONDS_FIELD_NUMBER: _ClassVar[int]
    GAP_P95_SECONDS_FIELD_NUMBER: _ClassVar[int]
    GAP_P99_SECONDS_FIELD_NUMBER: _ClassVar[int]
    ttft_seconds: float
    inter_token_seconds: float
    e2e_seconds: float
    queue_seconds: float
    prefill_seconds: float
    decode_seconds: float
    prompt_tokens: int
    output_tokens: int
    finish_reason: str
    largest_gap_seconds: float
    gap_p50_seconds: float
    gap_p90_seconds: float
    gap_p95_seconds: float
    gap_p99_seconds: float
    def __init__(self, ttft_seconds: _Optional[float] = ..., inter_token_seconds: _Optional[float] = ..., e2e_seconds: _Optional[float] = ..., queue_seconds: _Optional[float] = ..., prefill_seconds: _Optional[float] = ..., decode_seconds: _Optional[float] = ..., prompt_tokens: _Optional[int] = ..., output_tokens: _Optional[int] = ..., finish_reason: _Optional[str] = ..., largest_gap_seconds: _Optional[float] = ..., gap_p50_seconds: _Optional[float] = ..., gap_p90_seconds: _Optional[float] = ..., gap_p95_seconds: _Optional[float] = ..., gap_p99_seconds: _Optional[float] = ...) -> None: ...

class StepStats(_message.Message):
    __slots__ = ("engine_index", "running_requests", "waiting_requests", "kv_cache_usage", "preemptions", "steps", "generated_tokens", "gap_buckets", "gap_counts")
    ENGINE_INDEX_FIELD_NUMBER: _ClassVar[int]
    RUNNING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    WAITING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    KV_CACHE_USAGE_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GAP_BUCKETS_FIELD_NUMBER: _ClassVar[int]
    GAP_COUNTS_FIELD_NUMBER: _ClassVar[int]
    engine_index: int
    running_requests: int
    waiting_requests: int
    kv_cache_usage: float
    preemptions: int
    steps: int
    generated_tokens: int
    gap_buckets: _containers.RepeatedScalarFieldContainer[int]
    gap_counts: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, engine_index: _Optional[int] = ..., running_requests: _Optional[int] = ..., waiting_requests: _Optional[int] = ..., kv_cache_usage: _Optional[float] = ..., preemptions: _Optional[int] = ..., steps: _Optional[int] = ..., generated_tokens: _Optional[int] = ..., gap_buckets: _Optional[_Iterable[int]] = ..., gap_counts: _Optional[_Iterable[int]] = ...) -> None: ...

class AdmissionCounts(_message.Message):
    __slots__ = ("admitted",)
    ADMITTED_FIELD_NUMBER: _ClassVar[int]
    admitted: int
    def __init__(self, admitted: _Optional[int] = ...) -> None: ...

class PhaseReached(_message.Message):
    __slots__ = ("phase", "kv_cache_tokens")
    PHASE_FIELD_NUMBER: _ClassVar[int]
    KV_CACHE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    phase: Phase
    kv_cache_tokens: int
    def __init__(self, phase: _Optional[_Union[Phase, str]] = ..., kv_cache_tokens: _Optional[int] = ...) -> None: ...

class MemoryProfiled(_message.Message):
    __slots__ = ("kv_cache_bytes", "total_bytes", "weights_bytes", "activation_bytes", "graph_bytes", "vllm_version")
    KV_CACHE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_BYTES_FIELD_NUMBER: _ClassVar[int]
    ACTIVATION_BYTES_FIELD_NUMBER: _ClassVar[int]
    GRAPH_BYTES_FIELD_NUMBER: _ClassVar[int]
    VLLM_VERSION_FIELD_NUMBER: _ClassVar[int]
    kv_cache_bytes: int
    total_bytes: int
    weights_bytes: int
    activation_bytes: int
    graph_bytes: int
    vllm_version: str
    def __init__(self, kv_cache_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ..., weights_bytes: _Optional[int] = ..., activation_bytes: _Optional[int] = ..., graph_bytes: _Optional[int] = ..., vllm_version: _Optional[str] = ...) -> None: ...

class CrashReport(_message.Message):
    __slots__ = ("exception_type", "message", "context")
    EXCEPTION_TYPE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    exception_type: str
    message: str
    context: str
    def __init__(self, exception_type: _Optional[str] = ..., message: _Optional[str] = ..., context: _Optional[str] = ...) -> None: ...

class RepairReport(_message.Message):
    __slots__ = ("changes", "refusal", "predicted_kv_cache_tokens")
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_KV_CACHE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    changes: _containers.RepeatedCompositeFieldContainer[Change]
    refusal: str
    predicted_kv_cache_tokens: int
    def __init__(self, changes: _Optional[_Iterable[_Union[Change, _Mapping]]] = ..., refusal: _Optional[str] = ..., predicted_kv_cache_tokens: _Optional[int] = ...) -> None: ...

class Change(_message.Message):
    __slots__ = ("name", "from_value", "to_value", "reason", "rules")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FROM_VALUE_FIELD_NUMBER: _ClassVar[int]
    TO_VALUE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    RULES_FIELD_NUMBER: _ClassVar[int]
    name: str
    from_value: str
    to_value: str
    reason: str
    rules: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., from_value: _Optional[str] = ..., to_value: _Optional[str] = ..., reason: _Optional[str] = ..., rules: _Optional[_Iterable[str]] = ...) -> None: ...
