"""The forms for norms and embedding against the plain ones, and those against the arithmetic of changed weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import embedding, rms_norm

from act_serve.kernels.reference import add_columns_reference, add_scales_reference
from act_serve.kernels.rows import AbilityRows, ActiveRows, TokenWeights
from act_serve.kernels.torch_impl import add_columns_torch, add_scales_torch

EPS = 1e-3  # large enough that leaving it out is seen
CASES = {
    "tokens": st.integers(1, 9),
    "padding": st.integers(0, 3),
    "channels": st.integers(1, 17),
    "counts": st.lists(st.integers(0, 17), min_size=1, max_size=4),
    "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
    "seed": st.integers(0, 2**31),
}


def rows_of(counts: list[int], channels: int, length: int, dtype: torch.dtype) -> ActiveRows:
    return ActiveRows(
        [
            AbilityRows(
                torch.randperm(channels)[: min(count, channels)].sort().values.int(),
                torch.randn(min(count, channels), length).to(dtype),
            )
            for count in counts
        ]
    )


def weights_of(tokens: int, abilities: int) -> TokenWeights:
    weight_TA = torch.randn(tokens, abilities) * (torch.rand(tokens, abilities) < 0.5)
    return TokenWeights(weight_TA.numpy())


def untouched(active: ActiveRows, weights: TokenWeights, tokens: int, channels: int) -> torch.Tensor:
    """``[T, C]``: where no weighted row falls."""
    touched = torch.zeros(tokens, channels, dtype=torch.bool)
    for number, ability in enumerate(active.abilities):
        used = np.flatnonzero(weights.weight_TA[:, number])
        touched[torch.from_numpy(used)[:, None], ability.rows_N.long()] = True
    return ~touched


@settings(max_examples=80, deadline=None)
@given(**CASES, heads=st.sampled_from([None, 1, 3]))
def test_scales(
    tokens: int, padding: int, channels: int, counts: list[int], dtype: torch.dtype, seed: int, heads: int | None
) -> None:
    torch.manual_seed(seed)
    active, weights = rows_of(counts, channels, 1, dtype), weights_of(tokens, len(counts))
    shape = (tokens + padding, channels) if heads is None else (tokens + padding, heads, channels)
    x_TC, before = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    got, expected = before.clone(), before.clone()
    add_scales_torch(x_TC, got, active, weights, eps=EPS)
    add_scales_reference(x_TC, expected, active, weights, eps=EPS)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-5
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)
    kept = untouched(active, weights, tokens + padding, channels)
    kept = kept if heads is None else kept[:, None].expand(-1, heads, -1)
    assert torch.equal(got[kept], before[kept])
    assert torch.equal(expected[kept], before[kept])


@settings(max_examples=80, deadline=None)
@given(**CASES, vocabulary=st.integers(1, 30))
def test_columns(
    tokens: int, padding: int, channels: int, counts: list[int], dtype: torch.dtype, seed: int, vocabulary: int
) -> None:
    torch.manual_seed(seed)
    active, weights = rows_of(counts, channels, vocabulary, dtype), weights_of(tokens, len(counts))
    ids_T = torch.randint(vocabulary, (tokens + padding,))
    before = torch.randn(tokens + padding, channels).to(dtype)
    got, expected = before.clone(), before.clone()
    add_columns_torch(ids_T, got, active, weights)
    add_columns_reference(ids_T, expected, active, weights)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-5
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)
    kept = untouched(active, weights, tokens + padding, channels)
    assert torch.equal(got[kept], before[kept])


@pytest.mark.parametrize("weight", [1.0, -0.5])
def test_what_is_added_is_the_difference_that_changed_weights_make(weight: float) -> None:
    gamma, x_TC, ids_T, table = torch.randn(12), torch.randn(5, 12), torch.tensor([3, 0, 6, 3, 1]), torch.randn(7, 12)
    weights = TokenWeights(np.full((5, 1), weight))
    scales, columns = rows_of([4], 12, 1, torch.float32), rows_of([4], 12, 7, torch.float32)
    y_TC, (changed,) = rms_norm(x_TC, (12,), gamma, EPS), scales.abilities
    add_scales_reference(x_TC, y_TC, scales, weights, eps=EPS)
    gamma[changed.rows_N.long()] += weight * changed.delta_NI[:, 0]
    torch.testing.assert_close(y_TC, rms_norm(x_TC, (12,), gamma, EPS))
    y_TC, (changed,) = embedding(ids_T, table), columns.abilities
    add_columns_reference(ids_T, y_TC, columns, weights)
    table[:, changed.rows_N.long()] += weight * changed.delta_NI.t()
    torch.testing.assert_close(y_TC, embedding(ids_T, table))
