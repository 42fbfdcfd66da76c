"""An ability's tensors lie side by side, take the memory that they fill, and give it back."""

import gc

import psutil
import torch

from act_serve.engine.row_memory import RowMemory, SpareMemory, rounded_up


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


def test_a_copy_in_one_piece_has_every_tensor() -> None:
    memory = RowMemory(10_000)
    tensors = [
        memory.empty((3, 5), torch.bfloat16),
        memory.empty((0,), torch.int32),
        memory.empty((7, 2), torch.float32),
    ]
    tensors.append(tensors[-1].t())
    for tensor in tensors:
        tensor.copy_(torch.randn(tensor.shape))
    copied = memory.copy_to(torch.device("cpu"))
    copies = [copied(tensor) for tensor in tensors]
    expected = [tensor.clone() for tensor in tensors]
    for tensor in tensors:
        tensor.zero_()
    for copy, tensor, what in zip(copies, tensors, expected, strict=True):
        assert (copy.dtype, copy.stride()) == (tensor.dtype, tensor.stride())
        assert torch.equal(copy, what)


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


def test_spare_memory_is_there_before_it_is_taken_and_no_more_than_was_taken() -> None:
    size = 9_000_000
    spare = SpareMemory(most=2 * size)
    taken = spare.take(size)
    before = resident_memory()
    spare.renew()
    spare.renew()
    assert 0.9 < (resident_memory() - before) / size < 1.1
    smaller = spare.take(size // 2)
    assert 0.4 < (resident_memory() - before) / size < 0.6
    assert smaller.nbytes == size // 2
    assert smaller.empty((size // 2,), torch.uint8).data_ptr() != taken.empty((1,), torch.uint8).data_ptr()


def test_spare_memory_that_is_too_small_or_would_be_too_large_is_not_kept() -> None:
    spare = SpareMemory(most=9_000_000)
    spare.take(3_000_000)
    spare.renew()
    assert spare.take(6_000_000).nbytes == 6_000_000
    spare.take(20_000_000)
    before = resident_memory()
    spare.renew()
    assert resident_memory() - before < 1_000_000
