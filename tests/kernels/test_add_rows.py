"""The fast forms of the operation against the plain one, on fresh random inputs."""

from __future__ import annotations

import pytest
import torch

from act_serve.kernels.dispatch import AddRows, choose_add_rows
from act_serve.kernels.numba_impl import add_rows_numba
from act_serve.kernels.packed import PackedRows
from act_serve.kernels.reference import add_rows_reference
from act_serve.kernels.torch_impl import add_rows_torch

SIZES = [(1, 8, 8), (3, 33, 17), (63, 64, 129), (133, 96, 40), (300, 64, 80)]  # T, I, O; small ones are fused
MIXES = ["distinct", "uniform", "zipf", "identical", "idle", "composed"]


def traffic(mix: str, tokens: int, abilities: int) -> torch.Tensor:
    """``weight_TA`` of a named traffic mix."""
    weight_TA = torch.zeros(tokens, abilities)
    if mix == "idle":
        return weight_TA
    if mix == "composed":
        return torch.where(torch.rand(tokens, abilities) < 0.5, torch.randn(tokens, abilities), weight_TA)
    share = torch.ones(abilities) if mix == "uniform" else 1 / torch.arange(1, abilities + 1)
    owner_T = torch.multinomial(share, tokens, replacement=True)
    if mix == "distinct":
        owner_T = torch.arange(tokens) % abilities
    if mix == "identical":
        owner_T = torch.zeros(tokens, dtype=torch.int64)
    weight_TA[torch.arange(tokens), owner_T] = 1.0
    return weight_TA


@pytest.mark.parametrize("kernel", [add_rows_torch, add_rows_numba])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_agrees_with_the_reference(
    kernel: AddRows, mix: str, size: tuple[int, int, int], bias: bool, dtype: torch.dtype
) -> None:
    tokens, in_features, out_features = size
    rows = [torch.randperm(out_features)[:count].sort().values for count in (1, 0, 3, out_features)]
    packed = PackedRows(
        delta_NI=torch.randn(sum(map(len, rows)), in_features).to(dtype),
        rows_N=torch.cat(rows),
        counts=tuple(map(len, rows)),
        bias_N=torch.randn(sum(map(len, rows))).to(dtype) if bias else None,
    )
    owner_N = torch.arange(4).repeat_interleave(torch.tensor(packed.counts))
    x_TI, y_TO = torch.randn(tokens, in_features).to(dtype), torch.randn(tokens, out_features).to(dtype)
    weight_TA = traffic(mix, tokens, abilities=4)
    # The yardstick in fp64: the reference itself is compared with it too.
    value_TN = x_TI.double() @ packed.delta_NI.double().t() + (0 if packed.bias_N is None else packed.bias_N.double())
    expected = y_TO.double().index_add_(1, packed.rows_N, value_TN * weight_TA[:, owner_N].double())

    reference, got = y_TO.clone(), y_TO.clone()
    add_rows_reference(x_TI, reference, packed, weight_TA)
    kernel(x_TI, got, packed, weight_TA)

    scale = value_TN.abs().max().item() * max(1.0, weight_TA.abs().max().item()) + y_TO.abs().max().item()
    tolerance = scale * (2**-7 if dtype == torch.bfloat16 else 1e-6)
    assert torch.allclose(reference.double(), expected, atol=tolerance, rtol=0)
    assert torch.allclose(got.double(), expected, atol=tolerance, rtol=0)
    untouched = torch.ones_like(y_TO, dtype=torch.bool)
    for t in range(tokens):
        untouched[t, packed.rows_N[weight_TA[t, owner_N] != 0]] = False
    assert torch.equal(got[untouched], y_TO[untouched])


@pytest.mark.parametrize("kernel", [add_rows_reference, add_rows_torch, add_rows_numba])
def test_padding_is_left_alone_and_equal_rows_add_up(kernel: AddRows) -> None:
    x_TI, y_TO = torch.randn(5, 6), torch.zeros(5, 7)
    packed = PackedRows(torch.randn(3, 6), torch.tensor([0, 3, 3]), (2, 1))
    kernel(x_TI, y_TO, packed, torch.ones(4, 2))
    assert torch.equal(y_TO[4], torch.zeros(7))
    assert torch.allclose(y_TO[:4, 3], x_TI[:4] @ (packed.delta_NI[1] + packed.delta_NI[2]), atol=1e-5)


def test_bfloat16_rounds_as_torch_does_and_keeps_nan() -> None:
    x_TI = torch.randn(64, 1).bfloat16()
    x_TI[0] = float("nan")
    packed = PackedRows(torch.ones(1, 1).bfloat16(), torch.tensor([0]), (1,))
    y_TO = torch.randn(64, 1).bfloat16()
    expected = (y_TO.float() + 0.7 * x_TI.float()).bfloat16()
    add_rows_numba(x_TI, y_TO, packed, torch.full((64, 1), 0.7))
    assert torch.equal(y_TO[1:], expected[1:])
    assert y_TO[0].isnan()


def test_the_fast_form_is_chosen() -> None:
    assert choose_add_rows(torch.device("cpu"), torch.bfloat16) is add_rows_numba
    assert choose_add_rows(torch.device("cpu"), torch.float16) is add_rows_torch
