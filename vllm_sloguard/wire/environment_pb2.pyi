from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Mapping as _Mapping, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class InspectEnvironmentRequest(_message.Message):
    __slots__ = ("model", "arguments", "imports", "forks")
    class ArgumentsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    IMPORTS_FIELD_NUMBER: _ClassVar[int]
    FORKS_FIELD_NUMBER: _ClassVar[int]
    model: str
    arguments: _containers.ScalarMap[str, str]
    imports: bool
    forks: bool
    def __init__(self, model: _Optional[str] = ..., arguments: _Optional[_Mapping[str, str]] = ..., imports: bool = ..., forks: bool = ...) -> None: ...

class InspectEnvironmentResponse(_message.Message):
    __slots__ = ("facts",)
    FACTS_FIELD_NUMBER: _ClassVar[int]
    facts: str
    def __init__(self, facts: _Optional[str] = ...) -> None: ...

class DescribeModelRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class DescribeModelResponse(_message.Message):
    __slots__ = ("files", "checkpoint_bytes", "problem")
    class FilesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    FILES_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_BYTES_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    files: _containers.ScalarMap[str, bytes]
    checkpoint_bytes: int
    problem: str
    def __init__(self, files: _Optional[_Mapping[str, bytes]] = ..., checkpoint_bytes: _Optional[int] = ..., problem: _Optional[str] = ...) -> None: ...

class BuildModelRequest(_message.Message):
    __slots__ = ("model", "arguments")
    class ArgumentsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    model: str
    arguments: _containers.ScalarMap[str, str]
    def __init__(self, model: _Optional[str] = ..., arguments: _Optional[_Mapping[str, str]] = ...) -> None: ...

class BuildModelResponse(_message.Message):
    __slots__ = ("built",)
    BUILT_FIELD_NUMBER: _ClassVar[int]
    built: str
    def __init__(self, built: _Optional[str] = ...) -> None: ...
