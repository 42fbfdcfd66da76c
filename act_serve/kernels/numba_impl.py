"""The operation on CPUs: torch multiplies, a compiled loop scales and scatters.

``index_add_`` along the columns costs torch about 5 ns per element and needs the weights spread over all rows; this
loop costs 1 to 2 ns, reads each token's own weights, and skips the abilities that a token does not use. Few tokens and
rows, as in decoding for one client, are multiplied here too: a call of torch's matrix product alone costs 20 us.
numba comes with vLLM's CPU build.
"""

from __future__ import annotations

import numba
import numpy as np
import torch

from act_serve.kernels.packed import PackedRows

DTYPES = (torch.bfloat16, torch.float32)
# Up to this many multiply-adds one core is done before torch's matrix product has begun.
_FUSED_SIZE = 150_000


def add_rows_numba(x_TI: torch.Tensor, y_TO: torch.Tensor, packed: PackedRows, weight_TA: torch.Tensor) -> None:
    """As :func:`act_serve.kernels.reference.add_rows_reference`, for contiguous bf16 and fp32 on a CPU.

    Products are accumulated in fp32; those that torch computes are rounded once to the dtype of ``x_TI``. Scaling and
    addition are done in fp32.
    """
    x_TI = x_TI[: weight_TA.shape[0]]
    rows_N, counts_A, weights = packed.rows_N.numpy(), np.asarray(packed.counts), weight_TA.numpy()
    if y_TO.dtype == torch.float32:
        _scatter_fp32(y_TO.numpy(), packed.products(x_TI).numpy(), rows_N, counts_A, weights)
    elif packed.bias_N is None and x_TI.numel() * len(rows_N) <= _FUSED_SIZE:
        _multiply_bf16(_bits(y_TO), _bits(x_TI), _bits(packed.delta_NI), rows_N, counts_A, weights)
    else:
        _scatter_bf16(_bits(y_TO), _bits(packed.products(x_TI)), rows_N, counts_A, weights)


def _bits(tensor: torch.Tensor) -> np.ndarray:
    """numba has no bfloat16: these values are the upper 16 bits of an fp32."""
    return tensor.view(torch.uint16).numpy()


@numba.njit(nogil=True, cache=True)
def _scatter_fp32(y_TO, value_TN, rows_N, counts_A, weight_TA):  # type: ignore[no-untyped-def]
    for t in range(weight_TA.shape[0]):
        n = 0
        for a in range(counts_A.shape[0]):
            weight = weight_TA[t, a]
            if weight != 0:
                for m in range(n, n + counts_A[a]):
                    y_TO[t, rows_N[m]] += weight * value_TN[t, m]
            n += counts_A[a]


@numba.njit(nogil=True, cache=True)
def _scatter_bf16(y_TO, value_TN, rows_N, counts_A, weight_TA):  # type: ignore[no-untyped-def]
    word = np.empty(1, np.uint32)
    for t in range(weight_TA.shape[0]):
        n = 0
        for a in range(counts_A.shape[0]):
            weight = weight_TA[t, a]
            if weight != 0:
                for m in range(n, n + counts_A[a]):
                    word[0] = np.uint32(value_TN[t, m]) << np.uint32(16)
                    _add_bf16(y_TO, t, rows_N[m], weight * word.view(np.float32)[0], word)
            n += counts_A[a]


# Sums may be reordered, which is what lets them use the vector unit; NaN and infinity keep their meaning.
@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def _multiply_bf16(y_TO, x_TI, delta_NI, rows_N, counts_A, weight_TA):  # type: ignore[no-untyped-def]
    tokens, size = x_TI.shape
    wide_TI, wide_I, word = np.empty((tokens, size), np.uint32), np.empty(size, np.uint32), np.empty(1, np.uint32)
    for t in range(tokens):
        for i in range(size):
            wide_TI[t, i] = np.uint32(x_TI[t, i]) << np.uint32(16)
    x, delta = wide_TI.view(np.float32), wide_I.view(np.float32)
    n = 0
    for a in range(counts_A.shape[0]):
        for m in range(n, n + counts_A[a]):
            for i in range(size):
                wide_I[i] = np.uint32(delta_NI[m, i]) << np.uint32(16)
            for t in range(tokens):
                if weight_TA[t, a] != 0:
                    value = np.float32(0)
                    for i in range(size):
                        value += x[t, i] * delta[i]
                    _add_bf16(y_TO, t, rows_N[m], weight_TA[t, a] * value, word)
        n += counts_A[a]


@numba.njit(nogil=True, cache=True, inline="always")
def _add_bf16(y_TO, t, row, added, word):  # type: ignore[no-untyped-def]
    """Adds an fp32 to one element, rounding to nearest, ties to even, as torch does; NaN stays NaN."""
    number = word.view(np.float32)
    word[0] = np.uint32(y_TO[t, row]) << np.uint32(16)
    number[0] += added
    if number[0] == number[0]:
        word[0] += np.uint32(0x7FFF) + ((word[0] >> np.uint32(16)) & np.uint32(1))
    else:
        word[0] = np.uint32(0x7FC00000)
    y_TO[t, row] = np.uint16(word[0] >> np.uint32(16))
