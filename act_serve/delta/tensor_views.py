"""The tensors of a safetensors file as views of its bytes. Heavy: imports torch.

safetensors itself copies every tensor out of bytes that it is given, and copies nothing only from a file that it maps,
where an unreadable page ends the process. Copying took 2 to 9 ms for an artifact of 10 MB.
"""

from __future__ import annotations

import json
from math import prod
from typing import Any

import torch

# Format: https://huggingface.co/docs/safetensors/index#format
_LENGTH_BYTES = 8
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


def view_tensors(data: bytearray | memoryview) -> dict[str, torch.Tensor]:
    """Every tensor of the file by name; they hold ``data``, and change with it.

    Raises:
        ValueError: these are not the bytes of a safetensors file, or one with a dtype that is not known here.
    """
    start = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")
    if start > len(data):
        raise ValueError("it is shorter than its header says")
    try:
        header = json.loads(bytes(data[_LENGTH_BYTES:start]))
        header.pop("__metadata__", None)
        spans = sorted((*entry["data_offsets"], name) for name, entry in header.items())
        found, end = {}, 0
        for begin, stop, name in spans:
            if begin != end:
                raise ValueError(f"{name!r} does not begin where the tensor before it ends")
            end = stop
            found[name] = _view(data, start + begin, start + stop, header[name])
    except (AttributeError, KeyError, TypeError, RecursionError) as exc:
        raise ValueError(f"its header is no table of tensors: {exc!r}") from exc
    if start + end != len(data):
        raise ValueError("its tensors do not fill it")
    return found


def _view(data: bytearray | memoryview, start: int, stop: int, entry: dict[str, Any]) -> torch.Tensor:
    dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
    if any(type(size) is not int or size < 0 for size in shape) or stop - start != prod(shape) * dtype.itemsize:
        raise ValueError(f"a tensor of {entry['dtype']} {shape} does not take {stop - start} bytes")
    if stop > len(data):
        raise ValueError("it is shorter than its header says")
    if start == stop:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype, count=prod(shape), offset=start).view(shape)
