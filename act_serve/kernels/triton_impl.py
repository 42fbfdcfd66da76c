"""The operation in Triton, for NVIDIA GPUs: two launches in decoding, one per round in long steps.

It is tested under Triton's interpreter against the reference. **It has not run on a GPU yet**: whether it compiles
there, and how fast it is, ``benchmarks/kernels_gpu.py`` is to say. The dispatch therefore compares it with the torch
form before it is used.

* **Decoding** (:func:`add_rows_split`): ``_products`` multiplies every use's token with its ability's rows, over one
  slice of the input per program, into a scratch buffer; ``_scatter`` owns a token and a range of columns, sums slices
  and abilities in registers in a fixed order, and writes each output once. No atomics: the same bits every time.
* **Long steps** (:func:`add_rows_rounds`): ``_products`` adds to the output itself. In one round no token has two
  abilities, and rounds follow one another on the stream, so no two programs meet in an element. No scratch buffer.

The first is safe in a CUDA graph: its grid depends on the tables' capacity only, all that a step changes lies in the
tables' device buffers, and programs without work return at once. The engine does not make use of that yet: it
allocates tables per step, and refuses CUDA graphs (``act_serve/engine/worker.py``).

Shapes are those of :mod:`act_serve.kernels.step_table`.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl

from act_serve.kernels import row_table, step_table
from act_serve.kernels.row_table import RowTable
from act_serve.kernels.rows import ActiveRows, TokenWeights
from act_serve.kernels.step_table import StepTable

TritonError = triton.TritonError

# Steps up to so many tokens use a scratch buffer; beyond, it would take more memory than it saves time.
SCRATCH_TOKENS = 512
# Up to so many tokens there are too few programs to draw the whole bandwidth, so the input is split among more.
SPLIT_TOKENS, SPLIT_FEATURES, MAX_SPLITS = 32, 1024, 8
# Programs along the rows; they loop, so that a layer's capacity costs no launch of empty programs.
MAX_ROW_PROGRAMS = 256
SPLIT_BLOCK, ROUND_BLOCK = 16, 64
_SCATTER_COLUMNS = 1024
# The interpreter's product takes bfloat16 for integers, so there the operands are widened first, which is exact.
_INTERPRETED: bool = triton.knobs.runtime.interpret


# What changes from step to step is not specialised: a server must not compile while it serves.
@triton.jit(do_not_specialize=["first_block"])  # type: ignore[untyped-decorator]
def _products(
    x_TI: tl.tensor,
    y_TO: tl.tensor,
    scratch_SUN: tl.tensor,
    address_AC: tl.tensor,
    ability_B: tl.tensor,
    token_U: tl.tensor,
    weight_U: tl.tensor,
    first_block: tl.tensor,
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
    """x · delta of a block of uses and of every so many rows, over a slice of the input.

    ``direct``: weighted, with the bias, and added to the output; else left in ``scratch_SUN[slice, place, n]``.
    """
    block = first_block + tl.program_id(1)
    ability = tl.load(ability_B + block)
    if ability < 0:
        return
    entry = address_AC + ability.to(tl.int64) * 5
    count = tl.load(entry + 3).to(tl.int32)
    rows_N = tl.load(entry).to(tl.pointer_type(tl.int32))
    delta_NI = tl.multiple_of(tl.load(entry + 1), 16).to(tl.pointer_type(x_TI.dtype.element_ty))
    bias_address = tl.load(entry + 2)
    bias_N = bias_address.to(tl.pointer_type(x_TI.dtype.element_ty))

    place_P = block * block_uses + tl.arange(0, block_uses)
    token_P = tl.load(token_U + place_P)
    used_P = token_P >= 0
    x_P = x_TI + token_P.to(tl.int64)[:, None] * x_stride
    split = tl.program_id(2)
    start = split * split_features
    stop = tl.minimum(start + split_features, in_features)

    for chunk in range(tl.program_id(0), tl.cdiv(count, block_rows), tl.num_programs(0)):
        n = chunk * block_rows + tl.arange(0, block_rows)
        within_N = n < count
        delta_N = delta_NI + n.to(tl.int64)[None, :] * in_features
        sum_PN = tl.zeros((block_uses, block_rows), dtype=tl.float32)
        for begin in range(start, stop, block_features):
            i = begin + tl.arange(0, block_features)
            within_I = i < stop
            x_PI = tl.load(x_P + i[None, :], mask=used_P[:, None] & within_I[None, :], other=0.0)
            delta_IN = tl.load(delta_N + i[:, None], mask=within_I[:, None] & within_N[None, :], other=0.0)
            if interpreted:
                x_PI, delta_IN = x_PI.to(tl.float32), delta_IN.to(tl.float32)
            sum_PN = tl.dot(x_PI, delta_IN, sum_PN, input_precision="ieee")
        within_PN = used_P[:, None] & within_N[None, :]
        if direct:
            weight_P = tl.load(weight_U + place_P, mask=used_P, other=0.0)
            if bias_address != 0:
                sum_PN += tl.load(bias_N + n, mask=within_N, other=0.0).to(tl.float32)[None, :]
            row_N = tl.load(rows_N + n, mask=within_N, other=0)
            y_PN = y_TO + token_P.to(tl.int64)[:, None] * y_stride + row_N[None, :]
            old_PN = tl.load(y_PN, mask=within_PN, other=0.0).to(tl.float32)
            new_PN = old_PN + weight_P[:, None] * sum_PN
            tl.store(y_PN, new_PN.to(y_TO.dtype.element_ty), mask=within_PN)
        else:
            use_P = split.to(tl.int64) * scratch_uses + place_P
            tl.store(scratch_SUN + use_P[:, None] * scratch_rows + n[None, :], sum_PN, mask=within_PN)


@triton.jit(do_not_specialize=["uses_per_token"])  # type: ignore[untyped-decorator]
def _scatter(
    y_TO: tl.tensor,
    scratch_SUN: tl.tensor,
    address_AC: tl.tensor,
    ability_B: tl.tensor,
    weight_U: tl.tensor,
    place_TR: tl.tensor,
    y_stride: tl.tensor,
    out_features: tl.tensor,
    scratch_uses: tl.tensor,
    scratch_rows: tl.tensor,
    uses_per_token: tl.tensor,
    splits: tl.constexpr,
    block_uses: tl.constexpr,
    block_columns: tl.constexpr,
) -> None:
    """Adds the products of one token's uses to a range of its columns; the others keep their bits."""
    token = tl.program_id(0).to(tl.int64)
    places = place_TR + token * uses_per_token
    if tl.load(places) < 0:
        return
    o = tl.program_id(1) * block_columns + tl.arange(0, block_columns)
    within_O = o < out_features
    sum_O = tl.zeros((block_columns,), dtype=tl.float32)
    touched_O = tl.zeros((block_columns,), dtype=tl.int32)
    for number in range(uses_per_token):
        place = tl.load(places + number)
        if place >= 0:
            entry = address_AC + tl.load(ability_B + place // block_uses).to(tl.int64) * 5
            bias_address = tl.load(entry + 2)
            n_O = tl.load(tl.load(entry + 4).to(tl.pointer_type(tl.int32)) + o, mask=within_O, other=-1)
            has_O = n_O >= 0
            bias_N = bias_address.to(tl.pointer_type(y_TO.dtype.element_ty))
            value_O = tl.zeros((block_columns,), dtype=tl.float32)
            if bias_address != 0:
                value_O += tl.load(bias_N + n_O, mask=has_O, other=0.0).to(tl.float32)
            for split in range(splits):
                product_N = scratch_SUN + (place.to(tl.int64) + scratch_uses.to(tl.int64) * split) * scratch_rows
                value_O += tl.load(product_N + n_O, mask=has_O, other=0.0)
            sum_O += tl.load(weight_U + place) * value_O
            touched_O |= has_O.to(tl.int32)
    y_O = y_TO + token * y_stride + o
    old_O = tl.load(y_O, mask=touched_O != 0, other=0.0).to(tl.float32)
    tl.store(y_O, (old_O + sum_O).to(y_TO.dtype.element_ty), mask=touched_O != 0)


def add_rows_split(x_TI: torch.Tensor, y_TO: torch.Tensor, rows: RowTable, step: StepTable) -> None:
    """The operation in two launches, whose grids depend on shapes and on the tables' capacity only.

    Args:
        x_TI: ``[T, I]`` bf16, fp16 or fp32; a token's features lie side by side.
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
    uses, scratch_rows = step.blocks * step.block, triton.cdiv(rows.max_rows, 16) * 16
    scratch_SUN = torch.empty(splits, uses, scratch_rows, dtype=torch.float32, device=x_TI.device)
    _products[_row_programs(rows, 16), step.blocks, splits](
        x_TI, y_TO, scratch_SUN, rows.address_AC, step.ability_B, step.token_U, step.weight_U, 0,
        x_TI.stride(0), y_TO.stride(0), in_features,
        triton.cdiv(triton.cdiv(in_features, splits), block_features) * block_features, uses, scratch_rows,
        direct=False, block_uses=SPLIT_BLOCK, block_rows=16, block_features=block_features,
        interpreted=_INTERPRETED, num_warps=4, num_stages=3,
    )  # fmt: skip
    _scatter[tokens, triton.cdiv(out_features, _SCATTER_COLUMNS)](
        y_TO, scratch_SUN, rows.address_AC, step.ability_B, step.weight_U, step.place_TR,
        y_TO.stride(0), out_features, uses, scratch_rows, step.uses_per_token,
        splits=splits, block_uses=SPLIT_BLOCK, block_columns=_SCATTER_COLUMNS, num_warps=4,
    )  # fmt: skip


def add_rows_rounds(x_TI: torch.Tensor, y_TO: torch.Tensor, rows: RowTable, step: StepTable) -> None:
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
            x_TI, y_TO, y_TO, rows.address_AC, step.ability_B, step.token_U, step.weight_U, first,
            x_TI.stride(0), y_TO.stride(0), in_features, whole, 0, 0,
            direct=True, block_uses=ROUND_BLOCK, block_rows=64, block_features=block_features,
            interpreted=_INTERPRETED, num_warps=4, num_stages=3,
        )  # fmt: skip


class TritonRows:
    """The operation on a GPU; calling it does what ``add_rows_reference`` does.

    Tables are made once per step, and once per layer and set of abilities.
    """

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


def _row_programs(rows: RowTable, block_rows: int) -> int:
    return min(MAX_ROW_PROGRAMS, triton.cdiv(rows.max_rows, block_rows))


def _check(x_TI: torch.Tensor, y_TO: torch.Tensor, step: StepTable, block: int, *, by_rounds: bool) -> None:
    assert x_TI.stride(1) == 1, "the features of a token must lie side by side"
    assert y_TO.stride(1) == 1, "the features of a token must lie side by side"
    assert len(x_TI) == len(y_TO) <= step.tokens, "the table is for fewer tokens"
    assert (step.block, step.by_rounds) == (block, by_rounds), "the table is for the other form"
