"""The operation in Triton, for NVIDIA GPUs: two launches, whatever the step.

* ``_products`` multiplies every use's token with its ability's rows, into a scratch buffer. Its programs share the
  items of the step, one item being a block of uses, some rows, and where there are too few of these to occupy the GPU,
  a slice of the input: how many slices, each launch reckons from the tables.
* ``_scatter`` owns a token and a range of outputs. Ability after ability, it sums the slices in a fixed order and adds
  them to the outputs. No atomics: the same bits every time.

Both are safe in a CUDA graph: their grids depend on shapes and on the tables' capacity only, all that a step changes
lies in the tables' device buffers, and programs without work return at once. ``act_serve/engine/graph_tables.py`` uses
them so; steps that no graph holds take tables of their own, in larger blocks.

From Hopper on, launches overlap (programmatic dependent launch): a kernel is there before the one ahead of it has
ended, and reads the tables, which no kernel writes, before it waits for the others' results. How fast all this is
stands in docs/performance.md; ``benchmarks/kernels_gpu.py`` measures it. The dispatch compares the operation with the
torch form before it is used.

Shapes are those of :mod:`act_serve.kernels.step_table`.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl

from act_serve.kernels import row_table, step_table
from act_serve.kernels.row_table import RowAddresses, RowTable
from act_serve.kernels.rows import ActiveRows, TokenWeights
from act_serve.kernels.step_table import GRAPH_BLOCK, StepTable

TritonError = triton.TritonError

# At most so many bytes of products at once: a step with more takes several pairs of launches, rows after rows.
SCRATCH_BYTES = 256 << 20
# So many programs fit on one processor of a GPU at once. Two of them draw its bandwidth: the input is cut until each
# processor has two items, and no further, because every slice costs another line of products.
PROGRAMS_PER_PROCESSOR, SLICED_PER_PROCESSOR, MAX_SLICES = 3, 2, 16
WARPS = 4
# Programs take the blocks in groups of so many, which they multiply with the same rows while the cache has both.
GROUP = 16
# Where there is no GPU: what Triton's interpreter goes through one after the other.
_PROCESSORS_OF_NONE = 4
_ROWS: tl.constexpr = tl.constexpr(row_table.ROWS)
_DELTA: tl.constexpr = tl.constexpr(row_table.DELTA)
_BIAS: tl.constexpr = tl.constexpr(row_table.BIAS)
_COUNT: tl.constexpr = tl.constexpr(row_table.COUNT)
_STARTS: tl.constexpr = tl.constexpr(row_table.STARTS)
_MOST: tl.constexpr = tl.constexpr(row_table.MOST)
# The interpreter's product takes bfloat16 for integers, so there the operands are widened first, which is exact.
_INTERPRETED: bool = triton.knobs.runtime.interpret


@triton.jit  # type: ignore[untyped-decorator]
def _rows_of(address_AC: tl.tensor, first_row: tl.tensor, stop_row: tl.tensor) -> tl.tensor:
    """The most rows of an ability that lie in the window of a pair of launches."""
    return tl.maximum(tl.minimum(tl.load(address_AC + _MOST).to(tl.int32), stop_row) - first_row, 0)


@triton.jit  # type: ignore[untyped-decorator]
def _slices(blocks: tl.tensor, chunks: tl.tensor, most_sliced: tl.constexpr, most: tl.constexpr) -> tl.tensor:
    """Into how many slices the input is cut, so that there are no more items than ``most_sliced``."""
    return tl.minimum(tl.maximum(most_sliced // tl.maximum(blocks * chunks, 1), 1), most)


# What changes from step to step is not specialised: a server must not compile while it serves.
@triton.jit(do_not_specialize=["first_row", "stop_row", "address_stride", "uses_per_token"])  # type: ignore[untyped-decorator]
def _products(
    x_TI: tl.tensor,
    scratch: tl.tensor,
    address_AC: tl.tensor,
    blocks_1: tl.tensor,
    ability_B: tl.tensor,
    use_P: tl.tensor,
    slot_U: tl.tensor,
    first_row: tl.tensor,
    stop_row: tl.tensor,
    address_stride: tl.tensor,
    uses_per_token: tl.tensor,
    x_stride: tl.tensor,
    in_features: tl.tensor,
    most_sliced: tl.constexpr,
    most_slices: tl.constexpr,
    group: tl.constexpr,
    block_uses: tl.constexpr,
    block_rows: tl.constexpr,
    block_features: tl.constexpr,
    even: tl.constexpr,
    overlap: tl.constexpr,
    interpreted: tl.constexpr,
) -> None:
    """delta · x of the window's rows, left in ``scratch[slice, slot, n]``, whose sizes are the step's.

    ``even``: the input is a multiple of ``block_features``.
    """
    blocks = tl.load(blocks_1)
    rows = _rows_of(address_AC, first_row, stop_row)
    chunks = tl.cdiv(rows, block_rows)
    slices = _slices(blocks, chunks, most_sliced, most_slices)
    slice_features = tl.cdiv(tl.cdiv(in_features, slices), block_features) * block_features
    scratch_rows = (tl.cdiv(rows, 16) * 16).to(tl.int64)
    for item in range(tl.program_id(0), blocks * chunks * slices, tl.num_programs(0)):
        group_items = group * chunks * slices
        group_start = item // group_items * group
        group_size = tl.minimum(blocks - group_start, group)
        block = group_start + item % group_items % group_size
        part = item % group_items // group_size
        piece, chunk = part % slices, part // slices
        entry = address_AC + tl.load(ability_B + block).to(tl.int64) * address_stride
        count = tl.minimum(tl.load(entry + _COUNT).to(tl.int32), stop_row)
        delta_NI = tl.multiple_of(tl.load(entry + _DELTA).to(tl.pointer_type(x_TI.dtype.element_ty)), 16)
        use_Q = tl.load(use_P + block * block_uses + tl.arange(0, block_uses))  # of the block's places
        used_Q = use_Q >= 0
        slot_Q = tl.load(slot_U + use_Q, mask=used_Q, other=0)
        if overlap:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()

        n = chunk * block_rows + tl.arange(0, block_rows)
        within_N = first_row + n < count
        if first_row + chunk * block_rows < count:
            x_Q = x_TI + (use_Q // uses_per_token).to(tl.int64) * x_stride
            delta_N = delta_NI + (first_row + n).to(tl.int64) * in_features
            sum_NQ = tl.zeros((block_rows, block_uses), dtype=tl.float32)
            start = piece * slice_features
            for begin in range(start, tl.minimum(start + slice_features, in_features), block_features):
                i = begin + tl.arange(0, block_features)
                if even:
                    x_QI = tl.load(x_Q[:, None] + i[None, :], mask=used_Q[:, None], other=0.0)
                    delta_NF = tl.load(delta_N[:, None] + i[None, :], mask=within_N[:, None], other=0.0)
                else:
                    within_I = (i < in_features)[None, :]
                    x_QI = tl.load(x_Q[:, None] + i[None, :], mask=used_Q[:, None] & within_I, other=0.0)
                    delta_NF = tl.load(delta_N[:, None] + i[None, :], mask=within_N[:, None] & within_I, other=0.0)
                if interpreted:
                    x_QI, delta_NF = x_QI.to(tl.float32), delta_NF.to(tl.float32)
                # Rows come first: the largest products of tensor cores have many of these, and need not have many uses.
                sum_NQ = tl.dot(delta_NF, tl.trans(x_QI), sum_NQ, input_precision="ieee")
            line_Q = scratch + (piece.to(tl.int64) * blocks * block_uses + slot_Q) * scratch_rows
            tl.store(line_Q[None, :] + n[:, None], sum_NQ, mask=used_Q[None, :] & within_N[:, None])
    if overlap:  # no program ends before what it could not have waited for yet: others rely on that
        tl.extra.cuda.gdc_wait()


@triton.jit(do_not_specialize=["first_row", "stop_row", "address_stride", "uses_per_token", "ranges"])  # type: ignore[untyped-decorator]
def _scatter(
    y_TO: tl.tensor,
    scratch: tl.tensor,
    address_AC: tl.tensor,
    blocks_1: tl.tensor,
    ability_U: tl.tensor,
    slot_U: tl.tensor,
    weight_U: tl.tensor,
    first_row: tl.tensor,
    stop_row: tl.tensor,
    address_stride: tl.tensor,
    uses_per_token: tl.tensor,
    y_stride: tl.tensor,
    ranges: tl.tensor,
    most_sliced: tl.constexpr,
    most_slices: tl.constexpr,
    block_uses: tl.constexpr,
    block_rows: tl.constexpr,
    ranges_per_program: tl.constexpr,
    rows_at_once: tl.constexpr,
    overlap: tl.constexpr,
) -> None:
    """Adds a token's products to its outputs in some ranges; the others keep their bits.

    What it has in common with ``_products`` must be the same.
    """
    token = tl.program_id(0).to(tl.int64)
    use = token * uses_per_token
    last_use = use + uses_per_token
    ability = tl.load(ability_U + use)
    first_range = tl.program_id(1) * ranges_per_program
    stop_range = tl.minimum(first_range + ranges_per_program, ranges)
    blocks = tl.load(blocks_1)
    rows = _rows_of(address_AC, first_row, stop_row)
    slices = _slices(blocks, tl.cdiv(rows, block_rows), most_sliced, most_slices)
    scratch_rows = (tl.cdiv(rows, 16) * 16).to(tl.int64)
    slice_stride = blocks * block_uses * scratch_rows
    line = scratch + tl.load(slot_U + use).to(tl.int64) * scratch_rows - first_row
    y_O = y_TO + token * y_stride
    while ability >= 0:
        entry = address_AC + ability.to(tl.int64) * address_stride
        weight = tl.load(weight_U + use)
        use += 1
        next_ability = tl.load(ability_U + use, mask=use < last_use, other=-1)
        rows_N = tl.load(entry + _ROWS).to(tl.pointer_type(tl.int32))
        start_J = tl.load(entry + _STARTS).to(tl.pointer_type(tl.int32))
        bias_address = tl.load(entry + _BIAS)
        bias_N = bias_address.to(tl.pointer_type(y_TO.dtype.element_ty))
        stop = tl.minimum(tl.load(start_J + stop_range), stop_row)
        for begin in range(tl.maximum(tl.load(start_J + first_range), first_row), stop, rows_at_once):
            n = begin + tl.arange(0, rows_at_once)
            within_N = n < stop
            y_N = y_O + tl.load(rows_N + n, mask=within_N, other=0)
            value_N = tl.zeros((rows_at_once,), dtype=tl.float32)
            if bias_address != 0:
                value_N += tl.load(bias_N + n, mask=within_N, other=0.0).to(tl.float32)
            if overlap:
                tl.extra.cuda.gdc_wait()
            old_N = tl.load(y_N, mask=within_N, other=0.0).to(tl.float32)
            for piece in range(0, slices, 4):  # four loads at a time are under way
                for more in tl.static_range(4):
                    there_N = n < tl.where(piece + more < slices, stop, 0)
                    product_N = line + (piece + more) * slice_stride
                    value_N += tl.load(product_N + n, mask=there_N, other=0.0)
            tl.store(y_N, (old_N + weight * value_N).to(y_TO.dtype.element_ty), mask=within_N)
        line += scratch_rows  # a token's uses have slots that follow one another
        ability = next_ability
        if ability >= 0:
            tl.debug_barrier()  # the next ability may change the same outputs, in other threads
    if overlap:
        tl.extra.cuda.gdc_wait()


class _Shape(NamedTuple):
    """What one program does at once, in steps of one size of blocks.

    Attributes:
        rows, features: what ``_products`` multiplies a block with.
        stages: of its pipeline.
        ranges: of outputs, that ``_scatter`` adds to.
        rows_at_once: products that it adds at once.
    """

    rows: int
    features: int
    stages: int
    ranges: int
    rows_at_once: int

    @classmethod
    def of(cls, block: int, element_size: int) -> _Shape:
        """For blocks of so many uses.

        Outputs of long steps come from the GPU's memory, whose bandwidth needs long runs; those of short ones lie in
        the cache.
        """
        if block == GRAPH_BLOCK:
            return cls(64, 256 // element_size, stages=3, ranges=1, rows_at_once=128)
        rows = 64 if element_size > 2 else 128  # float32 has no tensor cores, and more rows no registers
        return cls(rows, 128 // element_size, stages=4 if block == 64 else 3, ranges=8, rows_at_once=512)


def add_rows(
    x_TI: torch.Tensor, y_TO: torch.Tensor, rows: RowAddresses, step: StepTable, most_rows: int | None = None
) -> None:
    """The operation, in launches whose grids depend on shapes and on the tables' capacity only.

    Args:
        x_TI: ``[T, I]`` bf16, fp16 or fp32; a token's features lie side by side. In a CUDA graph T may be more than
            the step's tokens: those beyond are padding.
        y_TO: ``[T, O]``, same dtype, changed in place; an output is rounded once per ability.
        rows: of the layer, in the order of the step's abilities; same dtype.
        step: for at least T tokens, in blocks of 16, 64 or 128.
        most_rows: the most rows that an ability of the step has, where no graph will repeat the launches.
    """
    assert x_TI.stride(1) == 1, "the features of a token must lie side by side"
    assert y_TO.stride(1) == 1, "the features of a token must lie side by side"
    assert len(x_TI) == len(y_TO) <= step.tokens, "the table is for fewer tokens"
    most_rows = rows.max_rows if most_rows is None else most_rows
    if not most_rows:
        return
    (tokens, in_features), out_features = x_TI.shape, y_TO.shape[1]
    shape, overlap = _Shape.of(step.block, x_TI.element_size()), _overlaps(x_TI.device)
    processors = _processors(x_TI.device)
    most_sliced = SLICED_PER_PROCESSOR * processors
    # Every use has its own line of products: that takes no more for many abilities than for one.
    uses = tokens * step.uses_per_token
    window = min(triton.cdiv(most_rows, 16) * 16, max(SCRATCH_BYTES // (4 * uses) // 128 * 128, 128))
    size = max(uses * window, most_sliced * step.block * shape.rows)  # without slices, and with them
    scratch = torch.empty(size, dtype=torch.float32, device=x_TI.device)
    ranges = triton.cdiv(out_features, row_table.RANGE)
    launch: dict[str, Any] = {"num_warps": WARPS} | ({"launch_pdl": True} if overlap else {})
    for first in range(0, most_rows, window):
        _products[(PROGRAMS_PER_PROCESSOR * processors,)](
            x_TI, scratch, rows.address_AC, step.blocks_1, step.ability_B, step.use_P, step.slot_U, first,
            first + window, rows.address_AC.stride(0), step.uses_per_token, x_TI.stride(0), in_features,
            most_sliced=most_sliced, most_slices=MAX_SLICES, group=GROUP, block_uses=step.block, block_rows=shape.rows,
            block_features=shape.features, even=in_features % shape.features == 0, overlap=overlap,
            interpreted=_INTERPRETED, num_stages=shape.stages, **launch,
        )  # fmt: skip
        _scatter[(tokens, triton.cdiv(ranges, shape.ranges))](
            y_TO, scratch, rows.address_AC, step.blocks_1, step.ability_U, step.slot_U, step.weight_U, first,
            first + window, rows.address_AC.stride(0), step.uses_per_token, y_TO.stride(0), ranges,
            most_sliced=most_sliced, most_slices=MAX_SLICES, block_uses=step.block, block_rows=shape.rows,
            ranges_per_program=shape.ranges, rows_at_once=shape.rows_at_once, overlap=overlap, **launch,
        )  # fmt: skip


class TritonRows:
    """The operation on a GPU; calling it does what ``add_rows_reference`` does.

    Tables are made once per step, and once per layer and set of abilities.

    Attributes:
        from_tables: the same from tables that the caller keeps, for CUDA graphs.
    """

    from_tables = staticmethod(add_rows)

    def __init__(self) -> None:
        self._weights: TokenWeights | None = None
        self._step: StepTable | None = None
        self._rows: WeakKeyDictionary[ActiveRows, RowTable] = WeakKeyDictionary()

    def __call__(self, x_TI: torch.Tensor, y_TO: torch.Tensor, active: ActiveRows, weights: TokenWeights) -> None:
        """An output is rounded once per ability."""
        tokens = len(weights.weight_TA)
        if self._step is None or self._weights is not weights:
            self._step = step_table.table_of(weights, x_TI.device)
            self._weights = weights
        rows = self._rows.get(active)
        if rows is None:
            self._rows[active] = rows = row_table.table_of(active, y_TO.shape[1], x_TI.device)
        add_rows(x_TI[:tokens], y_TO[:tokens], rows, self._step)


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return _PROCESSORS_OF_NONE
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def _overlaps(device: torch.device) -> bool:
    """Whether the GPU has programmatic dependent launch, which came with Hopper."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9
