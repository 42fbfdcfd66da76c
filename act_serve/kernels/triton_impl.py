"""The operation in Triton, for NVIDIA GPUs: two launches in decoding, one per round in long steps.

It is tested under Triton's interpreter against the reference. **It has not run on a GPU yet**: whether it compiles
there, and how fast it is, ``benchmarks/kernels_gpu.py`` is to say. The dispatch therefore compares it with the torch
form before it is used.

* **Decoding** (:func:`add_rows_split`): ``_products`` multiplies every use's token with its ability's rows, over one
  slice of the input per program, into a scratch buffer; ``_scatter`` owns a token and a range of columns, sums slices
  and abilities in registers in a fixed order, and writes each output once. No atomics: the same bits every time.
* **Long steps** (:func:`add_rows_rounds`): ``_products`` adds to the output itself. In one round no token has two
  abilities, and rounds follow one another on the stream, so no two programs meet in an element. No scratch buffer.

The first is safe in a CUDA graph: its grids depend on shapes and on the tables' capacity only, all that a step changes
lies in the tables' device buffers, and programs without work return at once. ``act_serve/engine/graph_tables.py`` uses
it so; steps that no graph holds take tables of their own.

Shapes are those of :mod:`act_serve.kernels.step_table`.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl

from act_serve.kernels import row_table, step_table
from act_serve.kernels.row_table import RowAddresses, RowTable
from act_serve.kernels.rows import ActiveRows, TokenWeights
from act_serve.kernels.step_table import StepTable

TritonError = triton.TritonError

# Steps up to so many tokens use a scratch buffer; beyond, it would take more memory than it saves time.
SCRATCH_TOKENS = 512
# Up to so many tokens there are too few programs to draw the whole bandwidth, so the input is split among more.
SPLIT_TOKENS, SPLIT_FEATURES, MAX_SPLITS = 32, 1024, 8
# Programs along the rows and along the blocks; they loop, so that what a table could hold costs no empty programs. In
# decoding they are together no more than a large GPU runs at once: most have nothing to do, and leave at once.
MAX_ROW_PROGRAMS, MAX_BLOCK_PROGRAMS, MAX_PROGRAMS = 256, 8, 2048
SPLIT_BLOCK, ROUND_BLOCK = step_table.GRAPH_BLOCK, 64
_SCATTER_COLUMNS = 1024
# The interpreter's product takes bfloat16 for integers, so there the operands are widened first, which is exact.
_INTERPRETED: bool = triton.knobs.runtime.interpret


# What changes from step to step is not specialised: a server must not compile while it serves.
@triton.jit(do_not_specialize=["first_block", "blocks", "address_stride", "uses_per_token"])  # type: ignore[untyped-decorator]
def _products(
    x_TI: tl.tensor,
    y_TO: tl.tensor,
    scratch_SUN: tl.tensor,
    address_AC: tl.tensor,
    blocks_1: tl.tensor,
    ability_B: tl.tensor,
    use_P: tl.tensor,
    weight_U: tl.tensor,
    first_block: tl.tensor,
    blocks: tl.tensor,
    address_stride: tl.tensor,
    uses_per_token: tl.tensor,
    x_stride: tl.tensor,
    y_stride: tl.tensor,
    in_features: tl.tensor,
    split_features: tl.tensor,
    scratch_uses: tl.tensor,
    scratch_rows: tl.tensor,
    direct: tl.constexpr,
    block_uses: tl.constexpr,
    block_rows: tl.constexpr,
    block_features: tl.constexpr,
    interpreted: tl.constexpr,
) -> None:
    """x · delta of every so many blocks of uses and of every so many rows, over a slice of the input.

    ``direct``: of ``blocks`` blocks, weighted, with the bias, and added to the output; else of all blocks that the
    table has now, left in ``scratch_SUN[slice, use, n]``.
    """
    split = tl.program_id(2)
    start = split * split_features
    stop = tl.minimum(start + split_features, in_features)
    last_block = first_block + (blocks if direct else tl.load(blocks_1))
    for block in range(first_block + tl.program_id(1), last_block, tl.num_programs(1)):
        entry = address_AC + tl.load(ability_B + block).to(tl.int64) * address_stride
        count = tl.load(entry + 3).to(tl.int32)
        rows_N = tl.load(entry).to(tl.pointer_type(tl.int32))
        delta_NI = tl.multiple_of(tl.load(entry + 1), 16).to(tl.pointer_type(x_TI.dtype.element_ty))
        bias_address = tl.load(entry + 2)
        bias_N = bias_address.to(tl.pointer_type(x_TI.dtype.element_ty))

        use_Q = tl.load(use_P + block * block_uses + tl.arange(0, block_uses))  # of the block's places
        used_Q = use_Q >= 0
        token_Q = (use_Q // uses_per_token).to(tl.int64)
        x_Q = x_TI + token_Q[:, None] * x_stride

        for chunk in range(tl.program_id(0), tl.cdiv(count, block_rows), tl.num_programs(0)):
            n = chunk * block_rows + tl.arange(0, block_rows)
            within_N = n < count
            delta_N = delta_NI + n.to(tl.int64)[None, :] * in_features
            sum_QN = tl.zeros((block_uses, block_rows), dtype=tl.float32)
            for begin in range(start, stop, block_features):
                i = begin + tl.arange(0, block_features)
                within_I = i < stop
                x_QI = tl.load(x_Q + i[None, :], mask=used_Q[:, None] & within_I[None, :], other=0.0)
                delta_IN = tl.load(delta_N + i[:, None], mask=within_I[:, None] & within_N[None, :], other=0.0)
                if interpreted:
                    x_QI, delta_IN = x_QI.to(tl.float32), delta_IN.to(tl.float32)
                sum_QN = tl.dot(x_QI, delta_IN, sum_QN, input_precision="ieee")
            within_QN = used_Q[:, None] & within_N[None, :]
            if direct:
                weight_Q = tl.load(weight_U + use_Q, mask=used_Q, other=0.0)
                if bias_address != 0:
                    sum_QN += tl.load(bias_N + n, mask=within_N, other=0.0).to(tl.float32)[None, :]
                row_N = tl.load(rows_N + n, mask=within_N, other=0)
                y_QN = y_TO + token_Q[:, None] * y_stride + row_N[None, :]
                old_QN = tl.load(y_QN, mask=within_QN, other=0.0).to(tl.float32)
                new_QN = old_QN + weight_Q[:, None] * sum_QN
                tl.store(y_QN, new_QN.to(y_TO.dtype.element_ty), mask=within_QN)
            else:
                place_Q = split.to(tl.int64) * scratch_uses + use_Q
                tl.store(scratch_SUN + place_Q[:, None] * scratch_rows + n[None, :], sum_QN, mask=within_QN)


@triton.jit(do_not_specialize=["address_stride", "uses_per_token"])  # type: ignore[untyped-decorator]
def _scatter(
    y_TO: tl.tensor,
    scratch_SUN: tl.tensor,
    address_AC: tl.tensor,
    ability_U: tl.tensor,
    weight_U: tl.tensor,
    address_stride: tl.tensor,
    uses_per_token: tl.tensor,
    y_stride: tl.tensor,
    out_features: tl.tensor,
    scratch_uses: tl.tensor,
    scratch_rows: tl.tensor,
    splits: tl.constexpr,
    block_columns: tl.constexpr,
) -> None:
    """Adds the products of one token's uses to a range of its columns; the others keep their bits."""
    token = tl.program_id(0).to(tl.int64)
    first_use = token * uses_per_token
    if tl.load(ability_U + first_use) < 0:
        return
    o = tl.program_id(1) * block_columns + tl.arange(0, block_columns)
    within_O = o < out_features
    sum_O = tl.zeros((block_columns,), dtype=tl.float32)
    touched_O = tl.zeros((block_columns,), dtype=tl.int32)
    for number in range(uses_per_token):
        use = first_use + number
        ability = tl.load(ability_U + use)
        if ability >= 0:
            entry = address_AC + ability.to(tl.int64) * address_stride
            bias_address = tl.load(entry + 2)
            n_O = tl.load(tl.load(entry + 4).to(tl.pointer_type(tl.int32)) + o, mask=within_O, other=-1)
            has_O = n_O >= 0
            bias_N = bias_address.to(tl.pointer_type(y_TO.dtype.element_ty))
            value_O = tl.zeros((block_columns,), dtype=tl.float32)
            if bias_address != 0:
                value_O += tl.load(bias_N + n_O, mask=has_O, other=0.0).to(tl.float32)
            for split in range(splits):
                product_N = scratch_SUN + (use + scratch_uses.to(tl.int64) * split) * scratch_rows
                value_O += tl.load(product_N + n_O, mask=has_O, other=0.0)
            sum_O += tl.load(weight_U + use) * value_O
            touched_O |= has_O.to(tl.int32)
    y_O = y_TO + token * y_stride + o
    old_O = tl.load(y_O, mask=touched_O != 0, other=0.0).to(tl.float32)
    tl.store(y_O, (old_O + sum_O).to(y_TO.dtype.element_ty), mask=touched_O != 0)


def add_rows_split(x_TI: torch.Tensor, y_TO: torch.Tensor, rows: RowAddresses, step: StepTable) -> None:
    """The operation in two launches, whose grids depend on shapes and on the tables' capacity only.

    Args:
        x_TI: ``[T, I]`` bf16, fp16 or fp32; a token's features lie side by side. In a CUDA graph T may be more than
            the step's tokens: those beyond are padding.
        y_TO: ``[T, O]``, same dtype, changed in place, each element rounded once.
        rows: of the layer, in the order of the step's abilities; same dtype.
        step: for at least T tokens, without rounds, in blocks of ``SPLIT_BLOCK``.
    """
    _check(x_TI, y_TO, step, SPLIT_BLOCK, by_rounds=False)
    if not rows.max_rows:
        return
    (tokens, in_features), out_features = x_TI.shape, y_TO.shape[1]
    splits = min(MAX_SPLITS, max(1, in_features // SPLIT_FEATURES)) if tokens <= SPLIT_TOKENS else 1
    block_features = 256 // x_TI.element_size()
    # Every use has its own part of the scratch buffer: that takes no more for many abilities than for one.
    uses, scratch_rows = tokens * step.uses_per_token, triton.cdiv(rows.max_rows, 16) * 16
    block_programs = min(MAX_BLOCK_PROGRAMS, uses)
    row_programs = min(MAX_PROGRAMS // (block_programs * splits), _row_programs(rows, 16))
    scratch_SUN = torch.empty(splits, uses, scratch_rows, dtype=torch.float32, device=x_TI.device)
    _products[row_programs, block_programs, splits](
        x_TI, y_TO, scratch_SUN, rows.address_AC, step.blocks_1, step.ability_B, step.use_P, step.weight_U, 0, 0,
        rows.address_AC.stride(0), step.uses_per_token, x_TI.stride(0), y_TO.stride(0), in_features,
        triton.cdiv(triton.cdiv(in_features, splits), block_features) * block_features, uses, scratch_rows,
        direct=False, block_uses=SPLIT_BLOCK, block_rows=16, block_features=block_features,
        interpreted=_INTERPRETED, num_warps=4, num_stages=3,
    )  # fmt: skip
    _scatter[tokens, triton.cdiv(out_features, _SCATTER_COLUMNS)](
        y_TO, scratch_SUN, rows.address_AC, step.ability_U, step.weight_U, rows.address_AC.stride(0),
        step.uses_per_token, y_TO.stride(0), out_features, uses, scratch_rows,
        splits=splits, block_columns=_SCATTER_COLUMNS, num_warps=4,
    )  # fmt: skip


def add_rows_rounds(x_TI: torch.Tensor, y_TO: torch.Tensor, rows: RowAddresses, step: StepTable) -> None:
    """The operation in a launch per round, each of as many programs as the step needs; not for CUDA graphs.

    Args:
        x_TI, y_TO, rows: as :func:`add_rows_split`; an output is rounded once per ability.
        step: for at least T tokens, by rounds, in blocks of ``ROUND_BLOCK``.
    """
    _check(x_TI, y_TO, step, ROUND_BLOCK, by_rounds=True)
    if not rows.max_rows:
        return
    in_features, block_features = x_TI.shape[1], 128 // x_TI.element_size()
    whole = triton.cdiv(in_features, block_features) * block_features
    for first, blocks in step.rounds:
        _products[_row_programs(rows, 64), blocks, 1](
            x_TI, y_TO, y_TO, rows.address_AC, step.blocks_1, step.ability_B, step.use_P, step.weight_U, first, blocks,
            rows.address_AC.stride(0), step.uses_per_token, x_TI.stride(0), y_TO.stride(0), in_features, whole, 0, 0,
            direct=True, block_uses=ROUND_BLOCK, block_rows=64, block_features=block_features,
            interpreted=_INTERPRETED, num_warps=4, num_stages=3,
        )  # fmt: skip


class TritonRows:
    """The operation on a GPU; calling it does what ``add_rows_reference`` does.

    Tables are made once per step, and once per layer and set of abilities.

    Attributes:
        from_tables: the same from tables that the caller keeps, for CUDA graphs.
    """

    from_tables = staticmethod(add_rows_split)

    def __init__(self) -> None:
        self._weights: TokenWeights | None = None
        self._step: StepTable | None = None
        self._rows: WeakKeyDictionary[ActiveRows, RowTable] = WeakKeyDictionary()

    def __call__(self, x_TI: torch.Tensor, y_TO: torch.Tensor, active: ActiveRows, weights: TokenWeights) -> None:
        """A decoding step's outputs are rounded once, a long step's once per ability."""
        few = len(weights.weight_TA) <= SCRATCH_TOKENS
        if self._step is None or self._weights is not weights:
            block = SPLIT_BLOCK if few else ROUND_BLOCK
            self._step = step_table.table_of(weights, x_TI.device, block=block, by_rounds=not few)
            self._weights = weights
        rows = self._rows.get(active)
        if rows is None:
            self._rows[active] = rows = row_table.table_of(active, y_TO.shape[1], x_TI.device)
        tokens = len(weights.weight_TA)
        add_rows = add_rows_split if few else add_rows_rounds
        add_rows(x_TI[:tokens], y_TO[:tokens], rows, self._step)


def _row_programs(rows: RowAddresses, block_rows: int) -> int:
    return min(MAX_ROW_PROGRAMS, triton.cdiv(rows.max_rows, block_rows))


def _check(x_TI: torch.Tensor, y_TO: torch.Tensor, step: StepTable, block: int, *, by_rounds: bool) -> None:
    assert x_TI.stride(1) == 1, "the features of a token must lie side by side"
    assert y_TO.stride(1) == 1, "the features of a token must lie side by side"
    assert len(x_TI) == len(y_TO) <= step.tokens, "the table is for fewer tokens"
    assert (step.block, step.by_rounds) == (block, by_rounds), "the table is for the other form"
