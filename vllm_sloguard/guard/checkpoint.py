"""The size of a checkpoint's tensors, from its headers: safetensors, their index, and GGUF. No tensor is read."""

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

# The headers of the largest published models are about 10 MB.
_MAX_HEADER = 200 * 2**20
_MAX_FILES = 2000
_GGUF_MAGIC = b"GGUF"


def checkpoint_bytes(model: Path) -> int | None:
    """Bytes of all tensors that vLLM would load from ``model``, a folder or a GGUF file; None if no header has it."""
    try:
        if model.is_file():
            return _gguf_bytes(model)
        return _indexed_bytes(model) or _safetensors_bytes(model)
    except (OSError, ValueError, struct.error):
        return None


def _indexed_bytes(folder: Path) -> int | None:
    """The total size stated by the index, if all of its files exist."""
    path = folder / "model.safetensors.index.json"
    if not path.is_file() or path.stat().st_size > _MAX_HEADER:
        return None
    index = _json_object(path.read_bytes())
    files = set(cast("dict[str, str]", index.get("weight_map") or {}).values())
    total = cast("dict[str, Any]", index.get("metadata") or {}).get("total_size")
    # Some tools write wrong totals (tied tensors twice, elements instead of bytes), so headers are preferred.
    if files and len(files) <= _MAX_FILES and all((folder / name).is_file() for name in files):
        return sum(_header_bytes(folder / name) for name in files)
    return total if isinstance(total, int) and not isinstance(total, bool) and total > 0 else None


def _safetensors_bytes(folder: Path) -> int | None:
    files = sorted(folder.glob("*.safetensors"))
    # Mistral also publishes the same weights as one consolidated file.
    files = [file for file in files if not file.name.startswith("consolidated")] or files
    return sum(_header_bytes(file) for file in files[:_MAX_FILES]) or None


def _header_bytes(path: Path) -> int:
    """Bytes of the tensors of one file: eight bytes of length, then a JSON object with the offsets of each."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(_MAX_HEADER, os.fstat(file.fileno()).st_size):
            raise ValueError(f"{path}: no safetensors header")
        header = _json_object(file.read(length))
    ends = [fields["data_offsets"] for name, fields in header.items() if name != "__metadata__"]
    return sum(int(end) - int(begin) for begin, end in ends)


def _json_object(content: bytes) -> dict[str, Any]:
    try:
        loaded: object = json.loads(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(loaded, dict):
        raise ValueError("not a JSON object")  # noqa: TRY004 - one kind of error for a bad file
    return cast("dict[str, Any]", loaded)


# Elements and bytes per block, by type number (ggml.h).
_GGML_BLOCKS = {
    **{0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 36)},
    **{10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292)},
    **{16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82)},
    **{23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2)},
}
# Bytes of a metadata value, by type number; 8 is a string and 9 an array.
_GGUF_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_GGUF_TEXT, _GGUF_LIST = 8, 9


def _gguf_bytes(path: Path) -> int | None:
    with path.open("rb") as file:
        if file.read(4) != _GGUF_MAGIC:
            return None
        _version, tensors, values = struct.unpack("<IQQ", file.read(20))
        if tensors > 100_000 or values > 100_000:
            return None
        for _ in range(values):
            _skip_text(file)
            _skip_value(file, _number(file, 4))
        return sum(_gguf_tensors(file, tensors))


def _gguf_tensors(file: BinaryIO, count: int) -> Iterator[int]:
    for _ in range(count):
        _skip_text(file)
        elements = 1
        for _ in range(_number(file, 4)):
            elements *= _number(file, 8)
        kind = _number(file, 4)
        if kind not in _GGML_BLOCKS:
            raise ValueError(f"an unknown type of tensor, {kind}")
        block, size = _GGML_BLOCKS[kind]
        file.seek(8, os.SEEK_CUR)
        yield -(-elements // block) * size


def _number(file: BinaryIO, width: int) -> int:
    content = file.read(width)
    if len(content) < width:
        raise ValueError("the file ends inside its header")
    return int.from_bytes(content, "little")


def _skip_text(file: BinaryIO) -> None:
    file.seek(_number(file, 8), os.SEEK_CUR)


def _skip_value(file: BinaryIO, kind: int) -> None:
    if kind == _GGUF_TEXT:
        _skip_text(file)
    elif kind == _GGUF_LIST:
        inner, count = _number(file, 4), _number(file, 8)
        if inner in _GGUF_WIDTHS:
            file.seek(count * _GGUF_WIDTHS[inner], os.SEEK_CUR)
        else:
            for _ in range(count):
                _skip_value(file, inner)
    else:
        file.seek(_GGUF_WIDTHS.get(kind, 0), os.SEEK_CUR)
