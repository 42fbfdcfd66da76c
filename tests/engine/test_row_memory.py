"""An ability's tensors lie side by side, take the memory that they fill, and give it back."""

import gc

import psutil
import torch

from act_serve.engine.row_memory import RowMemory, rounded_up


def resident_memory() -> int:
    gc.collect()
    return psutil.Process().memory_info().rss


def test_tensors_are_apart_and_aligned() -> None:
    shapes = [((3, 5), torch.bfloat16), ((7,), torch.int32), ((0, 4), torch.float32), ((1, 1), torch.float32)]
    memory = RowMemory(1000)
    tensors = [memory.empty(shape, dtype) for shape, dtype in shapes]
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    for number, (tensor, (shape, dtype)) in enumerate(zip(tensors, shapes, strict=True)):
        assert (tuple(tensor.shape), tensor.dtype, tensor.is_contiguous()) == (shape, dtype, True)
        assert tensor.data_ptr() % 64 == 0
        assert (tensor == number).all()


def test_only_what_is_filled_takes_memory_and_only_as_long_as_a_tensor_lives() -> None:
    size, count = 11_000_000, 8
    before = resident_memory()
    tensors = []
    for _ in range(count):
        memory = RowMemory(4 * rounded_up(size // 4))
        tensors.append([memory.empty((size // 4,), torch.uint8).zero_() for _ in range(4)])
        del memory
    assert 0.9 < (resident_memory() - before) / (count * size) < 1.1
    kept = tensors[0][1]
    tensors.clear()
    assert 0.5 < (resident_memory() - before) / size < 2
    assert not kept.any()
