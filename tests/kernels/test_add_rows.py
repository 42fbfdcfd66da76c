"""The fast forms of the operation against the plain one, on fresh random inputs."""

from __future__ import annotations

import functools
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from act_serve.home import cache_home
from act_serve.kernels.dispatch import AddRows, choose_add_rows
from act_serve.kernels.native import NativeRows, compile_native
from act_serve.kernels.reference import add_rows_reference
from act_serve.kernels.rows import MANY, AbilityRows, ActiveRows, TokenWeights
from act_serve.kernels.torch_impl import add_rows_torch

FORMS = ["torch", "native"]
# T, I, O: single tokens, odd sizes, and both sides of the number from which torch multiplies.
SIZES = [(1, 8, 8), (3, 33, 17), (5, 31, 40), (17, 576, 300), (MANY - 1, 64, 129), (MANY, 96, 40), (301, 65, 80)]
# Enough for two threads, which share the columns of the first and the tokens of the second.
SIZES += [(40, 576, 600), (300, 100, 600)]
MIXES = ["distinct", "uniform", "zipf", "identical", "runs", "idle", "composed"]


@functools.cache
def native(dtype: torch.dtype) -> NativeRows:
    return NativeRows(compile_native(cache_home() / "kernels"), dtype)


def form(name: str, dtype: torch.dtype) -> AddRows:
    return native(dtype) if name == "native" else add_rows_torch


def traffic(mix: str, tokens: int, abilities: int) -> TokenWeights:
    """The weights of a named traffic mix."""
    weight_TA = torch.zeros(tokens, abilities)
    if mix == "composed":
        weight_TA = torch.where(torch.rand(tokens, abilities) < 0.5, torch.randn(tokens, abilities), weight_TA)
    elif mix != "idle":
        share = torch.ones(abilities) if mix == "uniform" else 1 / torch.arange(1, abilities + 1)
        owner_T = torch.multinomial(share, tokens, replacement=True)
        if mix == "distinct":
            owner_T = torch.arange(tokens) % abilities
        if mix == "identical":
            owner_T = torch.zeros(tokens, dtype=torch.int64)
        if mix == "runs":
            owner_T = owner_T.sort().values
        weight_TA[torch.arange(tokens), owner_T] = 1.0
    return TokenWeights(weight_TA.numpy())


def abilities_of(counts: list[int], in_features: int, out_features: int, dtype: torch.dtype, bias: bool) -> ActiveRows:
    """Abilities of random rows, which they may share."""
    return ActiveRows(
        [
            AbilityRows(
                torch.randperm(out_features)[:count].sort().values.int(),
                torch.randn(count, in_features).to(dtype),
                torch.randn(count).to(dtype) if bias else None,
            )
            for count in counts
        ]
    )


def compare(kernel: AddRows, x_TI: torch.Tensor, y_TO: torch.Tensor, active: ActiveRows, weights: TokenWeights) -> None:
    """The form and the reference against fp64; and no element but the weighted rows' has another bit.

    A form may round each ability's product, with and without its bias, and the output after each ability: every time by
    half a unit in the last place at most.
    """
    expected, size = y_TO.double(), torch.zeros_like(y_TO, dtype=torch.float64)
    tokens = len(weights.weight_TA)
    for number, ability in enumerate(active.abilities):
        weight_T1 = torch.from_numpy(weights.weight_TA).to(y_TO.device)[:, number, None].double()
        product_TN = x_TI[:tokens].double() @ ability.delta_NI.double().t()
        bias_N = torch.zeros(()) if ability.bias_N is None else ability.bias_N.double()
        expected[:tokens].index_add_(1, ability.rows_N, weight_T1 * (product_TN + bias_N))
        size[:tokens].index_add_(1, ability.rows_N, weight_T1.abs() * (product_TN.abs() + bias_N.abs()))
    reference, got = y_TO.clone(), y_TO.clone()
    add_rows_reference(x_TI, reference, active, weights)
    kernel(x_TI, got, active, weights)
    magnitude = size + y_TO.abs().double()
    rounding = torch.finfo(y_TO.dtype).eps / 2 * (len(active.abilities) + 2)
    tolerance = rounding * magnitude + 1e-6 * magnitude.max()  # the latter is for sums in fp32
    for found in (reference, got):
        assert bool(((found.double() - expected).abs() <= tolerance).all())
    assert torch.equal(got[size == 0], y_TO[size == 0])


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_agrees_with_the_reference(
    name: str, mix: str, size: tuple[int, int, int], bias: bool, dtype: torch.dtype
) -> None:
    tokens, in_features, out_features = size
    active = abilities_of([1, 0, 3, out_features], in_features, out_features, dtype, bias)
    x_TI, y_TO = torch.randn(tokens, in_features).to(dtype), torch.randn(tokens, out_features).to(dtype)
    compare(form(name, dtype), x_TI, y_TO, active, traffic(mix, tokens, 4))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_float16_agrees_with_the_reference(size: tuple[int, int, int]) -> None:
    tokens, in_features, out_features = size
    active = abilities_of([1, 0, 3, out_features], in_features, out_features, torch.float16, bias=True)
    x_TI, y_TO = torch.randn(tokens, in_features).half(), torch.randn(tokens, out_features).half()
    kernel = choose_add_rows(torch.device("cpu"), torch.float16, cache_home())
    compare(kernel, x_TI, y_TO, active, traffic("composed", tokens, 4))


@settings(max_examples=150, deadline=None)
@given(
    tokens=st.integers(1, 70),
    padding=st.integers(0, 3),
    in_features=st.integers(1, 80),
    out_features=st.integers(1, 50),
    counts=st.lists(st.integers(0, 50), min_size=1, max_size=6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_any_shape_agrees_with_the_reference(
    tokens: int,
    padding: int,
    in_features: int,
    out_features: int,
    counts: list[int],
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    active = abilities_of([min(count, out_features) for count in counts], in_features, out_features, dtype, bias=False)
    # As in vLLM's fused buffers, tokens are farther apart than their features are many.
    x_TI = torch.randn(tokens + padding, in_features + 3).to(dtype)[:, :in_features]
    y_TO = torch.randn(tokens + padding, out_features + 5).to(dtype)[:, :out_features]
    compare(native(dtype), x_TI, y_TO, active, traffic("composed", tokens, len(counts)))


@pytest.mark.parametrize("tokens", [5, MANY + 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_rows_serve_step_after_step(tokens: int, dtype: torch.dtype) -> None:
    active = abilities_of([4, 7], 40, 30, dtype, bias=True)
    step, next_step = traffic("composed", tokens, 2), traffic("identical", tokens + 2, 2)
    for weights, apart in [(step, 0), (step, 3), (next_step, 0), (step, 1), (traffic("idle", tokens, 2), 0)]:
        x_TI = torch.randn(tokens + 2, 40 + apart).to(dtype)[:, :40]
        y_TO = torch.randn(tokens + 2, 30 + apart).to(dtype)[:, :30]
        compare(native(dtype), x_TI, y_TO, active, weights)


@pytest.mark.parametrize("name", FORMS)
def test_padding_is_left_alone_and_equal_rows_add_up(name: str) -> None:
    x_TI, y_TO = torch.randn(5, 6), torch.zeros(5, 7)
    one = AbilityRows(torch.tensor([0, 3], dtype=torch.int32), torch.randn(2, 6))
    two = AbilityRows(torch.tensor([3], dtype=torch.int32), torch.randn(1, 6))
    form(name, torch.float32)(x_TI, y_TO, ActiveRows([one, two]), TokenWeights(np.ones((4, 2))))
    assert torch.equal(y_TO[4], torch.zeros(7))
    assert torch.allclose(y_TO[:4, 3], x_TI[:4] @ (one.delta_NI[1] + two.delta_NI[0]), atol=1e-5)


@pytest.mark.parametrize("tokens", [MANY - 1, MANY + 1])
@pytest.mark.parametrize("repeated", [1, 10])
def test_what_is_not_a_number_stays_so_and_spoils_nothing_else(tokens: int, repeated: int) -> None:
    x_TI = torch.randn(tokens, 40).bfloat16()
    x_TI[1, 2], x_TI[2, 3] = float("nan"), float("inf")
    y_TO = torch.full((tokens, 6 * repeated), 1.0).bfloat16()
    y_TO[:, 5::6] = float("nan")
    changed = [column for column in range(6 * repeated) if column % 6 in (0, 4)]
    rows = AbilityRows(torch.tensor(changed, dtype=torch.int32), torch.ones(len(changed), 40).bfloat16())
    native(torch.bfloat16)(x_TI, y_TO, ActiveRows([rows]), TokenWeights(np.ones((tokens, 1))))
    assert y_TO[1, changed].isnan().all()
    assert y_TO[2, changed].isinf().all()
    rest = y_TO[torch.arange(tokens) > 2].unflatten(1, (repeated, 6))
    assert rest[:, :, :5].isfinite().all()
    assert rest[:, :, 5].isnan().all()


@pytest.mark.parametrize("rows", [1, 37])
def test_bfloat16_rounds_as_torch_does(rows: int) -> None:
    x_TI, y_TO = torch.randn(40, 1).bfloat16(), torch.randn(40, rows).bfloat16()
    ability = AbilityRows(torch.arange(rows, dtype=torch.int32), torch.ones(rows, 1).bfloat16())
    # The product is exact in fp32, so that it does not matter whether the compiler adds it in one instruction.
    expected = (y_TO.float() + 0.75 * x_TI.float()).bfloat16()
    native(torch.bfloat16)(x_TI, y_TO, ActiveRows([ability]), TokenWeights(np.full((40, 1), 0.75)))
    assert torch.equal(y_TO, expected)


def test_the_fast_form_is_chosen_and_kept(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    assert isinstance(choose_add_rows(cpu, torch.bfloat16, tmp_path), NativeRows)
    (library,) = tmp_path.glob("*.so")
    made = library.stat().st_mtime_ns
    assert isinstance(choose_add_rows(cpu, torch.float32, tmp_path), NativeRows)
    assert [(path, path.stat().st_mtime_ns) for path in tmp_path.iterdir()] == [(library, made)]
    assert choose_add_rows(cpu, torch.float16, tmp_path) is add_rows_torch


def test_without_a_compiler_torch_does_it_and_the_log_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for compiler in ("no-such-compiler", "false"):
        monkeypatch.setenv("CXX", compiler)
        with caplog.at_level(logging.WARNING):
            assert choose_add_rows(torch.device("cpu"), torch.bfloat16, tmp_path / compiler) is add_rows_torch
        assert "install g++" in caplog.records[-1].message
