"""The Triton form against the reference; `test_triton.py` runs this file in a process of its own.

Triton's interpreter has to be asked for before triton is imported, and vLLM imports it too. Where there is a GPU the
compiled kernels are tested.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from act_serve.kernels import row_table, step_table, triton_impl
from act_serve.kernels.dispatch import agrees_with_torch
from act_serve.kernels.reference import add_rows_reference
from act_serve.kernels.row_table import RowTable
from act_serve.kernels.rows import AbilityRows, ActiveRows, TokenWeights
from act_serve.kernels.step_table import StepTable
from act_serve.kernels.triton_impl import ROUND_BLOCK, SPLIT_BLOCK, TritonRows, add_rows_rounds, add_rows_split
from tests.kernels.test_add_rows import abilities_of, compare, traffic

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# T, I, O: odd sizes, an input of three slices, several ranges of columns.
SIZES = [(1, 8, 8), (3, 33, 17), (63, 40, 29), (133, 65, 40), (2, 3100, 20), (3, 16, 1500)]
Form = Callable[[torch.Tensor, torch.Tensor, ActiveRows, TokenWeights], None]


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan() -> Iterator[None]:
    """torch fills what ``torch.empty`` returns, so that an unwritten product shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def by_rounds(x_TI: torch.Tensor, y_TO: torch.Tensor, active: ActiveRows, weights: TokenWeights) -> None:
    tokens = len(weights.weight_TA)
    step = step_table.table_of(weights, x_TI.device, block=ROUND_BLOCK, by_rounds=True)
    add_rows_rounds(x_TI[:tokens], y_TO[:tokens], row_table.table_of(active, y_TO.shape[1], x_TI.device), step)


def poisoned(values: torch.Tensor) -> torch.Tensor:
    """The same values amid NaNs, at a wider stride."""
    wide = torch.full((len(values) + 2, values.shape[1] + 5), float("nan"), dtype=values.dtype, device=DEVICE)
    wide[: len(values), : values.shape[1]] = values
    return wide[: len(values), : values.shape[1]]


def on_device(active: ActiveRows) -> ActiveRows:
    """The rows, each tensor followed by what must never be read: NaNs, or columns that do not exist."""

    def amid(values: torch.Tensor, poison: float) -> torch.Tensor:
        more = torch.full((len(values) + 70, *values.shape[1:]), poison, dtype=values.dtype, device=DEVICE)
        more[: len(values)] = values
        return more[: len(values)]

    nan = float("nan")
    return ActiveRows(
        [
            AbilityRows(amid(a.rows_N, 2**30), amid(a.delta_NI, nan), None if a.bias_N is None else amid(a.bias_N, nan))
            for a in active.abilities
        ]
    )


def inputs(
    size: tuple[int, int, int], dtype: torch.dtype, bias: bool = True
) -> tuple[torch.Tensor, torch.Tensor, ActiveRows]:
    tokens, in_features, out_features = size
    active = on_device(
        abilities_of([1, 0, min(19, out_features), out_features], in_features, out_features, dtype, bias)
    )
    return (
        # Products of about 1 beside outputs of about 1: neither hides the other.
        poisoned((torch.randn(tokens, in_features) / in_features**0.5).to(dtype)),
        poisoned(torch.randn(tokens, out_features).to(dtype)),
        active,
    )


@pytest.mark.parametrize("form", [TritonRows(), by_rounds], ids=["split", "rounds"])
@pytest.mark.parametrize("mix", ["distinct", "uniform", "zipf", "identical", "idle", "composed"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("dtype", "bias"), [(torch.float32, False), (torch.bfloat16, True)], ids=str)
def test_agrees_with_the_reference(
    form: Form, mix: str, size: tuple[int, int, int], dtype: torch.dtype, bias: bool
) -> None:
    x_TI, y_TO, active = inputs(size, dtype, bias)
    weights = traffic(mix, size[0], 4)
    if mix == "idle":
        before = y_TO.clone()
        form(x_TI, y_TO, active, weights)
        assert torch.equal(y_TO, before)
    else:
        compare(form, x_TI, y_TO, active, weights)


@pytest.mark.parametrize("form", [TritonRows(), by_rounds], ids=["split", "rounds"])
def test_rows_that_abilities_share_add_up_the_same_way_every_time(form: Form) -> None:
    x_TI, y_TO, _ = inputs((63, 40, 29), torch.float32)
    active = on_device(abilities_of([29, 29, 29], 40, 29, torch.float32, bias=True))
    weights = TokenWeights(np.random.default_rng().normal(size=(61, 3)))
    expected, first, again = y_TO.clone(), y_TO.clone(), y_TO.clone()
    add_rows_reference(x_TI, expected, active, weights)
    form(x_TI, first, active, weights)
    form(x_TI, again, active, weights)
    assert torch.allclose(first, expected, atol=1e-4)
    assert torch.equal(first, again)
    assert torch.equal(first[61:], y_TO[61:]), "padding tokens"


def test_long_steps_take_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_impl, "SCRATCH_TOKENS", 5)
    x_TI, y_TO, active = inputs((6, 33, 17), torch.float32)
    monkeypatch.setattr(triton_impl, "add_rows_split", None)
    compare(TritonRows(), x_TI, y_TO, active, traffic("composed", 6, 4))


def test_more_rows_than_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_impl, "MAX_ROW_PROGRAMS", 2)
    x_TI, y_TO, active = inputs((3, 8, 150), torch.float32)
    compare(TritonRows(), x_TI, y_TO, active, traffic("composed", 3, 4))


def test_tables_are_refilled_in_place() -> None:
    """What a captured graph does: the same tensors and the same grid, step after step, until all are idle."""
    step = StepTable(DEVICE, tokens=7, abilities=4, uses_per_token=3, block=SPLIT_BLOCK)
    rows = RowTable(DEVICE, abilities=4, max_rows=17)
    x_TI, y_TO, active = inputs((7, 33, 17), torch.float32)
    tensors = [step.ability_B, step.token_U, step.weight_U, step.place_TR, rows.address_AC]
    addresses = [tensor.data_ptr() for tensor in tensors]
    for tokens, abilities in [(7, 3), (2, 1), (5, 2)]:
        chosen = ActiveRows(active.abilities[-abilities:])
        weights = traffic("composed", tokens, abilities)
        expected, got = y_TO.clone(), y_TO.clone()
        step.fill(weights)
        rows.fill(chosen, 17)
        add_rows_reference(x_TI, expected, chosen, weights)
        add_rows_split(x_TI, got, rows, step)
        assert torch.allclose(got, expected, atol=1e-4)
    step.fill(None)
    got = y_TO.clone()
    add_rows_split(x_TI, got, rows, step)
    assert torch.equal(got, y_TO)
    assert [tensor.data_ptr() for tensor in tensors] == addresses


def test_the_check_before_use_sees_a_kernel_that_is_wrong() -> None:
    def loses_the_last_token(x_TI: torch.Tensor, y_TO: torch.Tensor, active: ActiveRows, weights: TokenWeights) -> None:
        add_rows_reference(x_TI, y_TO, active, TokenWeights(weights.weight_TA[:-1]))

    for dtype in (torch.float32, torch.bfloat16):
        assert agrees_with_torch(TritonRows(), DEVICE, dtype)
        assert not agrees_with_torch(loses_the_last_token, DEVICE, dtype)
