from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class LiveState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LIVE_STATE_UNSPECIFIED: _ClassVar[LiveState]
    LIVE_STATE_ACCEPTED: _ClassVar[LiveState]
    LIVE_STATE_APPLIED: _ClassVar[LiveState]
    LIVE_STATE_REFUSED: _ClassVar[LiveState]
    LIVE_STATE_EXPIRED: _ClassVar[LiveState]

class LiveVerdict(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LIVE_VERDICT_UNSPECIFIED: _ClassVar[LiveVerdict]
    LIVE_VERDICT_OPEN: _ClassVar[LiveVerdict]
    LIVE_VERDICT_OBEYED: _ClassVar[LiveVerdict]
    LIVE_VERDICT_SHOWN: _ClassVar[LiveVerdict]
LIVE_STATE_UNSPECIFIED: LiveState
LIVE_STATE_ACCEPTED: LiveState
LIVE_STATE_APPLIED: LiveState
LIVE_STATE_REFUSED: LiveState
LIVE_STATE_EXPIRED: LiveState
LIVE_VERDICT_UNSPECIFIED: LiveVerdict
LIVE_VERDICT_OPEN: LiveVerdict
LIVE_VERDICT_OBEYED: LiveVerdict
LIVE_VERDICT_SHOWN: LiveVerdict

class AwaitRequest(_message.Message):
    __slots__ = ("engine_id", "engine_index", "vllm_version", "knobs", "cold", "report", "wait_seconds")
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    ENGINE_INDEX_FIELD_NUMBER: _ClassVar[int]
    VLLM_VERSION_FIELD_NUMBER: _ClassVar[int]
    KNOBS_FIELD_NUMBER: _ClassVar[int]
    COLD_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    WAIT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    engine_id: str
    engine_index: int
    vllm_version: str
    knobs: _containers.RepeatedCompositeFieldContainer[LiveKnob]
    cold: _containers.RepeatedCompositeFieldContainer[ColdKnob]
    report: LiveReport
    wait_seconds: float
    def __init__(self, engine_id: _Optional[str] = ..., engine_index: _Optional[int] = ..., vllm_version: _Optional[str] = ..., knobs: _Optional[_Iterable[_Union[LiveKnob, _Mapping]]] = ..., cold: _Optional[_Iterable[_Union[ColdKnob, _Mapping]]] = ..., report: _Optional[_Union[LiveReport, _Mapping]] = ..., wait_seconds: _Optional[float] = ...) -> None: ...

class AwaitResponse(_message.Message):
    __slots__ = ("epoch", "change")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CHANGE_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    change: LiveChange
    def __init__(self, epoch: _Optional[int] = ..., change: _Optional[_Union[LiveChange, _Mapping]] = ...) -> None: ...

class LiveKnob(_message.Message):
    __slots__ = ("name", "started", "current", "lowest", "highest")
    NAME_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    CURRENT_FIELD_NUMBER: _ClassVar[int]
    LOWEST_FIELD_NUMBER: _ClassVar[int]
    HIGHEST_FIELD_NUMBER: _ClassVar[int]
    name: str
    started: int
    current: int
    lowest: int
    highest: int
    def __init__(self, name: _Optional[str] = ..., started: _Optional[int] = ..., current: _Optional[int] = ..., lowest: _Optional[int] = ..., highest: _Optional[int] = ...) -> None: ...

class ColdKnob(_message.Message):
    __slots__ = ("name", "reason")
    NAME_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    name: str
    reason: str
    def __init__(self, name: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class LiveChange(_message.Message):
    __slots__ = ("epoch", "change_id", "targets", "settle", "lease_seconds")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CHANGE_ID_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    SETTLE_FIELD_NUMBER: _ClassVar[int]
    LEASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    change_id: int
    targets: _containers.RepeatedCompositeFieldContainer[LiveTarget]
    settle: bool
    lease_seconds: float
    def __init__(self, epoch: _Optional[int] = ..., change_id: _Optional[int] = ..., targets: _Optional[_Iterable[_Union[LiveTarget, _Mapping]]] = ..., settle: bool = ..., lease_seconds: _Optional[float] = ...) -> None: ...

class LiveTarget(_message.Message):
    __slots__ = ("name", "value")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    name: str
    value: int
    def __init__(self, name: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...

class LiveReport(_message.Message):
    __slots__ = ("epoch", "change_id", "state", "refusal", "applied_seconds", "settled_seconds", "effects", "counters")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CHANGE_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    APPLIED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    SETTLED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    EFFECTS_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    change_id: int
    state: LiveState
    refusal: str
    applied_seconds: float
    settled_seconds: float
    effects: _containers.RepeatedCompositeFieldContainer[LiveEffect]
    counters: LiveCounters
    def __init__(self, epoch: _Optional[int] = ..., change_id: _Optional[int] = ..., state: _Optional[_Union[LiveState, str]] = ..., refusal: _Optional[str] = ..., applied_seconds: _Optional[float] = ..., settled_seconds: _Optional[float] = ..., effects: _Optional[_Iterable[_Union[LiveEffect, _Mapping]]] = ..., counters: _Optional[_Union[LiveCounters, _Mapping]] = ...) -> None: ...

class LiveEffect(_message.Message):
    __slots__ = ("name", "before", "target", "verdict", "seconds", "seen")
    NAME_FIELD_NUMBER: _ClassVar[int]
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    SEEN_FIELD_NUMBER: _ClassVar[int]
    name: str
    before: int
    target: int
    verdict: LiveVerdict
    seconds: float
    seen: str
    def __init__(self, name: _Optional[str] = ..., before: _Optional[int] = ..., target: _Optional[int] = ..., verdict: _Optional[_Union[LiveVerdict, str]] = ..., seconds: _Optional[float] = ..., seen: _Optional[str] = ...) -> None: ...

class LiveCounters(_message.Message):
    __slots__ = ("steps", "most_running_requests", "most_scheduled_tokens", "prefix_cache_queries", "prefix_cache_hits")
    STEPS_FIELD_NUMBER: _ClassVar[int]
    MOST_RUNNING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    MOST_SCHEDULED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_CACHE_QUERIES_FIELD_NUMBER: _ClassVar[int]
    PREFIX_CACHE_HITS_FIELD_NUMBER: _ClassVar[int]
    steps: int
    most_running_requests: int
    most_scheduled_tokens: int
    prefix_cache_queries: int
    prefix_cache_hits: int
    def __init__(self, steps: _Optional[int] = ..., most_running_requests: _Optional[int] = ..., most_scheduled_tokens: _Optional[int] = ..., prefix_cache_queries: _Optional[int] = ..., prefix_cache_hits: _Optional[int] = ...) -> None: ...
