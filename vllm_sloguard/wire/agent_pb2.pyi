from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EngineRole(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ENGINE_ROLE_UNSPECIFIED: _ClassVar[EngineRole]
    ENGINE_ROLE_TRIAL: _ClassVar[EngineRole]
    ENGINE_ROLE_SERVING: _ClassVar[EngineRole]

class StartFailureKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    START_FAILURE_KIND_UNSPECIFIED: _ClassVar[StartFailureKind]
    START_FAILURE_KIND_PORT_TAKEN: _ClassVar[StartFailureKind]
    START_FAILURE_KIND_NOT_FORKED: _ClassVar[StartFailureKind]
    START_FAILURE_KIND_NO_PROCESS: _ClassVar[StartFailureKind]
    START_FAILURE_KIND_BUSY: _ClassVar[StartFailureKind]

class EngineLife(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ENGINE_LIFE_UNSPECIFIED: _ClassVar[EngineLife]
    ENGINE_LIFE_RUNNING: _ClassVar[EngineLife]
    ENGINE_LIFE_EXITED: _ClassVar[EngineLife]
    ENGINE_LIFE_STOPPED: _ClassVar[EngineLife]
    ENGINE_LIFE_EXPIRED: _ClassVar[EngineLife]
    ENGINE_LIFE_LOST: _ClassVar[EngineLife]
ENGINE_ROLE_UNSPECIFIED: EngineRole
ENGINE_ROLE_TRIAL: EngineRole
ENGINE_ROLE_SERVING: EngineRole
START_FAILURE_KIND_UNSPECIFIED: StartFailureKind
START_FAILURE_KIND_PORT_TAKEN: StartFailureKind
START_FAILURE_KIND_NOT_FORKED: StartFailureKind
START_FAILURE_KIND_NO_PROCESS: StartFailureKind
START_FAILURE_KIND_BUSY: StartFailureKind
ENGINE_LIFE_UNSPECIFIED: EngineLife
ENGINE_LIFE_RUNNING: EngineLife
ENGINE_LIFE_EXITED: EngineLife
ENGINE_LIFE_STOPPED: EngineLife
ENGINE_LIFE_EXPIRED: EngineLife
ENGINE_LIFE_LOST: EngineLife

class Controller(_message.Message):
    __slots__ = ("journal_id", "epoch")
    JOURNAL_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    journal_id: str
    epoch: int
    def __init__(self, journal_id: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ("ranks", "held", "versions")
    RANKS_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    ranks: int
    held: bool
    versions: bool
    def __init__(self, ranks: _Optional[int] = ..., held: bool = ..., versions: bool = ...) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("agent_id", "agent_version", "vllm_version", "machine", "engines", "restored", "command", "untunable", "controller", "lease_left_seconds", "unforkable", "held_bytes")
    AGENT_ID_FIELD_NUMBER: _ClassVar[int]
    AGENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    VLLM_VERSION_FIELD_NUMBER: _ClassVar[int]
    MACHINE_FIELD_NUMBER: _ClassVar[int]
    ENGINES_FIELD_NUMBER: _ClassVar[int]
    RESTORED_FIELD_NUMBER: _ClassVar[int]
    COMMAND_FIELD_NUMBER: _ClassVar[int]
    UNTUNABLE_FIELD_NUMBER: _ClassVar[int]
    CONTROLLER_FIELD_NUMBER: _ClassVar[int]
    LEASE_LEFT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    UNFORKABLE_FIELD_NUMBER: _ClassVar[int]
    HELD_BYTES_FIELD_NUMBER: _ClassVar[int]
    agent_id: str
    agent_version: str
    vllm_version: str
    machine: MachineFacts
    engines: _containers.RepeatedCompositeFieldContainer[EngineState]
    restored: EngineSpec
    command: _containers.RepeatedScalarFieldContainer[str]
    untunable: str
    controller: Controller
    lease_left_seconds: float
    unforkable: str
    held_bytes: int
    def __init__(self, agent_id: _Optional[str] = ..., agent_version: _Optional[str] = ..., vllm_version: _Optional[str] = ..., machine: _Optional[_Union[MachineFacts, _Mapping]] = ..., engines: _Optional[_Iterable[_Union[EngineState, _Mapping]]] = ..., restored: _Optional[_Union[EngineSpec, _Mapping]] = ..., command: _Optional[_Iterable[str]] = ..., untunable: _Optional[str] = ..., controller: _Optional[_Union[Controller, _Mapping]] = ..., lease_left_seconds: _Optional[float] = ..., unforkable: _Optional[str] = ..., held_bytes: _Optional[int] = ...) -> None: ...

class MachineFacts(_message.Message):
    __slots__ = ("kind", "total_bytes", "free_bytes", "gpus", "source")
    KIND_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    GPUS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    kind: str
    total_bytes: int
    free_bytes: int
    gpus: int
    source: str
    def __init__(self, kind: _Optional[str] = ..., total_bytes: _Optional[int] = ..., free_bytes: _Optional[int] = ..., gpus: _Optional[int] = ..., source: _Optional[str] = ...) -> None: ...

class AcquireRequest(_message.Message):
    __slots__ = ("controller", "lease_seconds")
    CONTROLLER_FIELD_NUMBER: _ClassVar[int]
    LEASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    controller: Controller
    lease_seconds: float
    def __init__(self, controller: _Optional[_Union[Controller, _Mapping]] = ..., lease_seconds: _Optional[float] = ...) -> None: ...

class AcquireResponse(_message.Message):
    __slots__ = ("agent_id",)
    AGENT_ID_FIELD_NUMBER: _ClassVar[int]
    agent_id: str
    def __init__(self, agent_id: _Optional[str] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("controller",)
    CONTROLLER_FIELD_NUMBER: _ClassVar[int]
    controller: Controller
    def __init__(self, controller: _Optional[_Union[Controller, _Mapping]] = ...) -> None: ...

class ReleaseResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class EngineSpec(_message.Message):
    __slots__ = ("model", "arguments", "host", "port", "role", "drain_timeout_seconds", "repair", "longest_request_tokens")
    class ArgumentsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    DRAIN_TIMEOUT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    REPAIR_FIELD_NUMBER: _ClassVar[int]
    LONGEST_REQUEST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    model: str
    arguments: _containers.ScalarMap[str, str]
    host: str
    port: int
    role: EngineRole
    drain_timeout_seconds: int
    repair: bool
    longest_request_tokens: int
    def __init__(self, model: _Optional[str] = ..., arguments: _Optional[_Mapping[str, str]] = ..., host: _Optional[str] = ..., port: _Optional[int] = ..., role: _Optional[_Union[EngineRole, str]] = ..., drain_timeout_seconds: _Optional[int] = ..., repair: bool = ..., longest_request_tokens: _Optional[int] = ...) -> None: ...

class StartEngineRequest(_message.Message):
    __slots__ = ("controller", "request_id", "engine_id", "spec", "fork", "learned")
    CONTROLLER_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    FORK_FIELD_NUMBER: _ClassVar[int]
    LEARNED_FIELD_NUMBER: _ClassVar[int]
    controller: Controller
    request_id: str
    engine_id: str
    spec: EngineSpec
    fork: bool
    learned: bytes
    def __init__(self, controller: _Optional[_Union[Controller, _Mapping]] = ..., request_id: _Optional[str] = ..., engine_id: _Optional[str] = ..., spec: _Optional[_Union[EngineSpec, _Mapping]] = ..., fork: bool = ..., learned: _Optional[bytes] = ...) -> None: ...

class StartEngineResponse(_message.Message):
    __slots__ = ("started", "failure")
    STARTED_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    started: EngineState
    failure: StartFailure
    def __init__(self, started: _Optional[_Union[EngineState, _Mapping]] = ..., failure: _Optional[_Union[StartFailure, _Mapping]] = ...) -> None: ...

class StartFailure(_message.Message):
    __slots__ = ("kind", "reason")
    KIND_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    kind: StartFailureKind
    reason: str
    def __init__(self, kind: _Optional[_Union[StartFailureKind, str]] = ..., reason: _Optional[str] = ...) -> None: ...

class EngineState(_message.Message):
    __slots__ = ("engine_id", "spec", "pid", "started_at", "life", "exit_code", "foreign_on_port", "owns_port", "forked", "by_agent")
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    STARTED_AT_FIELD_NUMBER: _ClassVar[int]
    LIFE_FIELD_NUMBER: _ClassVar[int]
    EXIT_CODE_FIELD_NUMBER: _ClassVar[int]
    FOREIGN_ON_PORT_FIELD_NUMBER: _ClassVar[int]
    OWNS_PORT_FIELD_NUMBER: _ClassVar[int]
    FORKED_FIELD_NUMBER: _ClassVar[int]
    BY_AGENT_FIELD_NUMBER: _ClassVar[int]
    engine_id: str
    spec: EngineSpec
    pid: int
    started_at: float
    life: EngineLife
    exit_code: int
    foreign_on_port: bool
    owns_port: bool
    forked: bool
    by_agent: bool
    def __init__(self, engine_id: _Optional[str] = ..., spec: _Optional[_Union[EngineSpec, _Mapping]] = ..., pid: _Optional[int] = ..., started_at: _Optional[float] = ..., life: _Optional[_Union[EngineLife, str]] = ..., exit_code: _Optional[int] = ..., foreign_on_port: bool = ..., owns_port: bool = ..., forked: bool = ..., by_agent: bool = ...) -> None: ...

class StopEngineRequest(_message.Message):
    __slots__ = ("controller", "request_id", "engine_id", "drain")
    CONTROLLER_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    controller: Controller
    request_id: str
    engine_id: str
    drain: bool
    def __init__(self, controller: _Optional[_Union[Controller, _Mapping]] = ..., request_id: _Optional[str] = ..., engine_id: _Optional[str] = ..., drain: bool = ...) -> None: ...

class StopEngineResponse(_message.Message):
    __slots__ = ("engine",)
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    engine: EngineState
    def __init__(self, engine: _Optional[_Union[EngineState, _Mapping]] = ...) -> None: ...

class GetEngineRequest(_message.Message):
    __slots__ = ("engine_id", "ports")
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    PORTS_FIELD_NUMBER: _ClassVar[int]
    engine_id: str
    ports: bool
    def __init__(self, engine_id: _Optional[str] = ..., ports: bool = ...) -> None: ...

class GetEngineResponse(_message.Message):
    __slots__ = ("engine",)
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    engine: EngineState
    def __init__(self, engine: _Optional[_Union[EngineState, _Mapping]] = ...) -> None: ...

class DumpStacksRequest(_message.Message):
    __slots__ = ("controller", "request_id", "engine_id")
    CONTROLLER_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    controller: Controller
    request_id: str
    engine_id: str
    def __init__(self, controller: _Optional[_Union[Controller, _Mapping]] = ..., request_id: _Optional[str] = ..., engine_id: _Optional[str] = ...) -> None: ...

class DumpStacksResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReadOutputRequest(_message.Message):
    __slots__ = ("engine_id", "most_bytes")
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    MOST_BYTES_FIELD_NUMBER: _ClassVar[int]
    engine_id: str
    most_bytes: int
    def __init__(self, engine_id: _Optional[str] = ..., most_bytes: _Optional[int] = ...) -> None: ...

class ReadOutputResponse(_message.Message):
    __slots__ = ("output", "total_bytes")
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    output: bytes
    total_bytes: int
    def __init__(self, output: _Optional[bytes] = ..., total_bytes: _Optional[int] = ...) -> None: ...

class FollowRequest(_message.Message):
    __slots__ = ("engine_id", "offset")
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    engine_id: str
    offset: int
    def __init__(self, engine_id: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...

class FollowResponse(_message.Message):
    __slots__ = ("output", "offset", "ended")
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    output: bytes
    offset: int
    ended: EngineState
    def __init__(self, output: _Optional[bytes] = ..., offset: _Optional[int] = ..., ended: _Optional[_Union[EngineState, _Mapping]] = ...) -> None: ...

class AskEngineRequest(_message.Message):
    __slots__ = ("controller", "engine_id", "path", "body", "timeout_seconds")
    CONTROLLER_FIELD_NUMBER: _ClassVar[int]
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    BODY_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    controller: Controller
    engine_id: str
    path: str
    body: bytes
    timeout_seconds: float
    def __init__(self, controller: _Optional[_Union[Controller, _Mapping]] = ..., engine_id: _Optional[str] = ..., path: _Optional[str] = ..., body: _Optional[bytes] = ..., timeout_seconds: _Optional[float] = ...) -> None: ...

class AskEngineResponse(_message.Message):
    __slots__ = ("body", "unanswered")
    BODY_FIELD_NUMBER: _ClassVar[int]
    UNANSWERED_FIELD_NUMBER: _ClassVar[int]
    body: bytes
    unanswered: str
    def __init__(self, body: _Optional[bytes] = ..., unanswered: _Optional[str] = ...) -> None: ...

class PrepareForksRequest(_message.Message):
    __slots__ = ("controller",)
    CONTROLLER_FIELD_NUMBER: _ClassVar[int]
    controller: Controller
    def __init__(self, controller: _Optional[_Union[Controller, _Mapping]] = ...) -> None: ...

class PrepareForksResponse(_message.Message):
    __slots__ = ("unforkable",)
    UNFORKABLE_FIELD_NUMBER: _ClassVar[int]
    unforkable: str
    def __init__(self, unforkable: _Optional[str] = ...) -> None: ...

class EndForksRequest(_message.Message):
    __slots__ = ("controller",)
    CONTROLLER_FIELD_NUMBER: _ClassVar[int]
    controller: Controller
    def __init__(self, controller: _Optional[_Union[Controller, _Mapping]] = ...) -> None: ...

class EndForksResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PrepareLoadsRequest(_message.Message):
    __slots__ = ("controller",)
    CONTROLLER_FIELD_NUMBER: _ClassVar[int]
    controller: Controller
    def __init__(self, controller: _Optional[_Union[Controller, _Mapping]] = ...) -> None: ...

class PrepareLoadsResponse(_message.Message):
    __slots__ = ("client_id",)
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    client_id: str
    def __init__(self, client_id: _Optional[str] = ...) -> None: ...

class SendToLoadClientRequest(_message.Message):
    __slots__ = ("controller", "request_id", "client_id", "run", "end")
    CONTROLLER_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    controller: Controller
    request_id: str
    client_id: str
    run: LoadOrder
    end: LoadEnd
    def __init__(self, controller: _Optional[_Union[Controller, _Mapping]] = ..., request_id: _Optional[str] = ..., client_id: _Optional[str] = ..., run: _Optional[_Union[LoadOrder, _Mapping]] = ..., end: _Optional[_Union[LoadEnd, _Mapping]] = ...) -> None: ...

class LoadOrder(_message.Message):
    __slots__ = ("engine_id", "argv", "request_timeout_seconds", "warmup_requests")
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    ARGV_FIELD_NUMBER: _ClassVar[int]
    REQUEST_TIMEOUT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    WARMUP_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    engine_id: str
    argv: _containers.RepeatedScalarFieldContainer[str]
    request_timeout_seconds: float
    warmup_requests: int
    def __init__(self, engine_id: _Optional[str] = ..., argv: _Optional[_Iterable[str]] = ..., request_timeout_seconds: _Optional[float] = ..., warmup_requests: _Optional[int] = ...) -> None: ...

class LoadEnd(_message.Message):
    __slots__ = ("how",)
    HOW_FIELD_NUMBER: _ClassVar[int]
    how: str
    def __init__(self, how: _Optional[str] = ...) -> None: ...

class SendToLoadClientResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReadLoadClientRequest(_message.Message):
    __slots__ = ("client_id", "after", "wait_seconds")
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    WAIT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    client_id: str
    after: int
    wait_seconds: float
    def __init__(self, client_id: _Optional[str] = ..., after: _Optional[int] = ..., wait_seconds: _Optional[float] = ...) -> None: ...

class ReadLoadClientResponse(_message.Message):
    __slots__ = ("messages", "ended")
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedScalarFieldContainer[str]
    ended: bool
    def __init__(self, messages: _Optional[_Iterable[str]] = ..., ended: bool = ...) -> None: ...

class EndLoadsRequest(_message.Message):
    __slots__ = ("controller",)
    CONTROLLER_FIELD_NUMBER: _ClassVar[int]
    controller: Controller
    def __init__(self, controller: _Optional[_Union[Controller, _Mapping]] = ...) -> None: ...

class EndLoadsResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RelayRequest(_message.Message):
    __slots__ = ("controller", "call", "answer", "error_code", "error")
    CONTROLLER_FIELD_NUMBER: _ClassVar[int]
    CALL_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    ERROR_CODE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    controller: Controller
    call: int
    answer: bytes
    error_code: int
    error: str
    def __init__(self, controller: _Optional[_Union[Controller, _Mapping]] = ..., call: _Optional[int] = ..., answer: _Optional[bytes] = ..., error_code: _Optional[int] = ..., error: _Optional[str] = ...) -> None: ...

class RelayResponse(_message.Message):
    __slots__ = ("call", "method", "request", "timeout_seconds")
    CALL_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    call: int
    method: str
    request: bytes
    timeout_seconds: float
    def __init__(self, call: _Optional[int] = ..., method: _Optional[str] = ..., request: _Optional[bytes] = ..., timeout_seconds: _Optional[float] = ...) -> None: ...
