"""Tensors as views of a file's bytes are those that safetensors gives; what safetensors refuses is refused."""

from __future__ import annotations

import json
import random
from contextlib import suppress

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from act_serve.delta.tensor_views import view_tensors

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8, torch.int32, torch.int64]


def random_tensors(draw: random.Random) -> dict[str, torch.Tensor]:
    return {
        f"é{number}.delta": torch.randn([draw.randrange(5) for _ in range(draw.randrange(3))]).to(draw.choice(DTYPES))
        for number in range(draw.randrange(6))
    }


@pytest.mark.parametrize("seed", range(20))
def test_tensors_are_those_of_safetensors(seed: int) -> None:
    data = save(random_tensors(random.Random(seed)), {"format": "pt"})
    views, copies = view_tensors(bytearray(data)), load(data)
    assert views.keys() == copies.keys()
    for name, copy in copies.items():
        assert views[name].dtype == copy.dtype
        assert torch.equal(views[name], copy)


def test_views_lie_in_the_data() -> None:
    data = bytearray(save({"a": torch.zeros(4), "b": torch.ones(2, 3)}))
    views = view_tensors(data)
    data[-24:] = bytes(24)
    assert not views["b"].any()


def with_header(header: object, tensors: bytes = bytes(16)) -> bytearray:
    text = json.dumps(header).encode()
    return bytearray(len(text).to_bytes(8, "little") + text + tensors)


def entry(begin: int, end: int, shape: object = (4,), dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


WRONG = {
    "empty": bytearray(),
    "no header": bytearray(4),
    "header longer than the file": bytearray((1 << 60).to_bytes(8, "little") + b"{}"),
    "no JSON": bytearray((2).to_bytes(8, "little") + b"{]"),
    "no UTF-8": bytearray((2).to_bytes(8, "little") + b"\xff\xff"),
    "a list": with_header([1]),
    "no offsets": with_header({"a": {"dtype": "F32", "shape": [4]}}),
    "offsets of text": with_header({"a": {**entry(0, 16), "data_offsets": ["0", "16"]}}),
    "three offsets": with_header({"a": {**entry(0, 16), "data_offsets": [0, 8, 16]}}),
    "entry is a number": with_header({"a": 1}),
    "unknown dtype": with_header({"a": entry(0, 16, dtype="X32")}),
    "shape of text": with_header({"a": entry(0, 16, shape="4")}),
    "negative shape": with_header({"a": entry(0, 16, shape=(-2, -2))}),
    "shape of fractions": with_header({"a": entry(0, 16, shape=(4.0,))}),
    "shape too large": with_header({"a": entry(0, 16, shape=(2**70,))}),
    "more than there is": with_header({"a": entry(0, 32, shape=(8,))}),
    "less than there is": with_header({"a": entry(0, 8, shape=(2,))}),
    "a hole": with_header({"a": entry(4, 16, shape=(3,))}),
    "an overlap": with_header({"a": entry(0, 16), "b": entry(0, 16)}),
    "end before begin": with_header({"a": entry(16, 0)}),
    "nested too deep": bytearray((200_000).to_bytes(8, "little") + b"[" * 200_000),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_safetensors_refuses_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        view_tensors(WRONG[name])
    with pytest.raises(SafetensorError):
        load(bytes(WRONG[name]))


def test_a_damaged_file_gives_tensors_or_a_reason() -> None:
    draw = random.Random(0)
    whole, read = save({"a": torch.randn(3, 4), "b": torch.ones(2).int()}), 0
    for _ in range(1000):
        data = bytearray(whole)
        for _ in range(draw.randrange(1, 4)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        with suppress(ValueError):
            view_tensors(data)
            read += 1
    assert 0 < read < 1000
