"""The Triton form against the reference; `test_triton.py` runs this file in a process of its own.

Triton's interpreter has to be asked for before triton is imported, and vLLM imports it too. Where there is a GPU the
compiled kernels are tested.
"""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from act_serve.kernels import row_table, step_table, triton_impl
from act_serve.kernels.dispatch import agrees_with_torch
from act_serve.kernels.reference import add_rows_reference
from act_serve.kernels.row_table import ModelRows, ModelRowTable
from act_serve.kernels.rows import AbilityRows, ActiveRows, TokenWeights
from act_serve.kernels.step_table import StepTable
from act_serve.kernels.triton_impl import GRAPH_BLOCK, TritonRows, add_rows
from tests.kernels.simulated_graph import capture
from tests.kernels.test_add_rows import abilities_of, compare, traffic

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# T, I, O: odd sizes, an input of many slices, several ranges of outputs, and sizes like those of real layers.
SIZES = [(1, 8, 8), (3, 33, 17), (63, 40, 29), (133, 65, 40), (2, 3100, 20), (3, 16, 5000), (20, 256, 80)]
Form = Callable[[torch.Tensor, torch.Tensor, ActiveRows, TokenWeights], None]


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan() -> Iterator[None]:
    """torch fills what ``torch.empty`` returns, so that an unwritten product shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def long_form(x_TI: torch.Tensor, y_TO: torch.Tensor, active: ActiveRows, weights: TokenWeights) -> None:
    """What steps of thousands of tokens take."""
    tokens = len(weights.weight_TA)
    step = step_table.table_of(weights, x_TI.device, block=128 if tokens % 2 else 64)
    add_rows(x_TI[:tokens], y_TO[:tokens], row_table.table_of(active, y_TO.shape[1], x_TI.device), step)


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


@pytest.mark.parametrize("form", [TritonRows(), long_form], ids=["short", "long"])
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


@pytest.mark.parametrize("form", [TritonRows(), long_form], ids=["short", "long"])
def test_float16_agrees_with_the_reference(form: Form) -> None:
    x_TI, y_TO, active = inputs((133, 65, 40), torch.float16)
    compare(form, x_TI, y_TO, active, traffic("composed", 133, 4))


@pytest.mark.parametrize("form", [TritonRows(), long_form], ids=["short", "long"])
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


def test_rows_that_no_layer_has_any_more_are_freed() -> None:
    form = TritonRows()
    x_TI, y_TO, active = inputs((7, 40, 29), torch.float32)
    form(x_TI, y_TO, active, traffic("composed", 7, 4))
    rows = [weakref.ref(ability.delta_NI) for ability in active.abilities]
    del active
    assert not any(ref() is not None for ref in rows)


@pytest.mark.parametrize(("tokens", "block"), [(6, 16), (7, 64), (12, 64), (13, 128)])
def test_longer_steps_take_larger_blocks(monkeypatch: pytest.MonkeyPatch, tokens: int, block: int) -> None:
    monkeypatch.setattr(step_table, "SHORT_TOKENS", 6)
    monkeypatch.setattr(step_table, "LONG_TOKENS", 12)
    assert step_table.block_for(tokens) == block
    x_TI, y_TO, active = inputs((tokens, 33, 17), torch.float32)
    compare(TritonRows(), x_TI, y_TO, active, traffic("composed", tokens, 4))


@pytest.mark.parametrize("form", [TritonRows(), long_form], ids=["short", "long"])
def test_more_items_than_programs(monkeypatch: pytest.MonkeyPatch, form: Form) -> None:
    monkeypatch.setattr(triton_impl, "PROGRAMS_PER_PROCESSOR", 1)
    x_TI, y_TO, active = inputs((63, 8, 300), torch.float32)
    compare(form, x_TI, y_TO, active, traffic("composed", 63, 4))


@pytest.mark.parametrize("form", [TritonRows(), long_form], ids=["short", "long"])
def test_what_the_scratch_buffer_cannot_hold_is_done_rows_after_rows(
    monkeypatch: pytest.MonkeyPatch, form: Form
) -> None:
    monkeypatch.setattr(triton_impl, "SCRATCH_BYTES", 1)
    x_TI, y_TO, active = inputs((5, 40, 400), torch.bfloat16)
    with capture(execute=True) as graph:
        form(x_TI, y_TO.clone(), active, traffic("composed", 5, 4))
    assert len(graph.launches) == 2 * 4  # of 128 rows each
    compare(form, x_TI, y_TO, active, traffic("composed", 5, 4))


CAPACITY = {"tokens": 40, "abilities": 12, "uses_per_token": 3}


def few_abilities(mix: str, tokens: int, abilities: int, most: int) -> TokenWeights:
    """The weights of a mix, with at most so many abilities per token."""
    weight_TA = traffic(mix, tokens, abilities).weight_TA.copy()
    weight_TA[(weight_TA != 0).cumsum(axis=1) > most] = 0
    return TokenWeights(weight_TA)


class Replayed:
    """Graphs of several sizes over buffers of their own, captured while nothing was active."""

    def __init__(self, size: tuple[int, int], dtype: torch.dtype, captured: list[int]) -> None:
        self.in_features, self.out_features = size
        tokens, self.dtype = CAPACITY["tokens"], dtype
        self.step = StepTable(DEVICE, **CAPACITY, block=GRAPH_BLOCK)
        self.table = ModelRowTable(DEVICE, abilities=CAPACITY["abilities"], out_features=[self.out_features] * 3)
        self.x_TI = poisoned(torch.zeros(tokens, self.in_features, dtype=dtype))
        self.y_TO = poisoned(torch.zeros(tokens, self.out_features, dtype=dtype))
        self.graphs = {}
        for padded in captured:
            with capture() as self.graphs[padded]:
                add_rows(self.x_TI[:padded], self.y_TO[:padded], self.table.layers[1], self.step)

    def check(self, active: ActiveRows, weights: TokenWeights, padded: int) -> None:
        """One step: new inputs, new tables, a replay; what the reference says, and nothing else."""
        tokens = len(weights.weight_TA)
        self.x_TI[:] = torch.randn(self.x_TI.shape) / self.in_features**0.5
        self.y_TO[:] = torch.randn(self.y_TO.shape)
        self.x_TI[tokens:], self.y_TO[tokens:] = float("nan"), 7.0  # padding, as its last step left it
        y_TO = self.y_TO.clone()
        nothing = AbilityRows(torch.empty(0, dtype=torch.int32), torch.empty(0, self.in_features, dtype=self.dtype))
        other = [ModelRows.of([nothing, ability, nothing], [self.out_features] * 3) for ability in active.abilities]
        self.table.fill(other)
        self.step.fill(weights if weights.weight_TA.any() else None)

        def replay(x_TI: torch.Tensor, got_TO: torch.Tensor, active: ActiveRows, weights: TokenWeights) -> None:
            self.graphs[padded].replay()
            got_TO.copy_(self.y_TO[:tokens])

        compare(replay, self.x_TI[:tokens], y_TO[:tokens], active, weights)
        assert torch.equal(self.y_TO[tokens:], y_TO[tokens:]), "padding tokens"


@pytest.mark.parametrize(
    ("size", "dtype"), [((33, 17), torch.float32), ((2100, 40), torch.bfloat16), ((16, 300), torch.float32)], ids=str
)
def test_a_captured_graph_replays_whatever_the_tables_hold(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], dtype: torch.dtype
) -> None:
    """Random traffic: the launches are those of an idle capture; only buffers change, and none of them moves."""
    monkeypatch.setattr(row_table, "RANGE", 128)  # the largest of the layers has three
    rng = random.Random(0)
    captured = [1, 8, 24, CAPACITY["tokens"]]
    replayed = Replayed(size, dtype, captured)
    counts = [rng.randint(1, size[1]) for _ in range(6)] + [0, size[1]]
    pool = on_device(abilities_of(counts, *size, dtype, bias=True)).abilities
    for number in range(16):
        active = ActiveRows(rng.sample(pool, rng.randint(1, len(pool))))
        tokens = rng.randint(1, CAPACITY["tokens"])
        mix = ["composed", "zipf", "idle", "distinct"][number % 4]
        weights = few_abilities(mix, tokens, len(active.abilities), CAPACITY["uses_per_token"])
        replayed.check(active, weights, padded=min(size for size in captured if size >= tokens))


def test_the_fullest_step_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """All tokens with as many abilities as they may have, more blocks than programs, every ability in use."""
    monkeypatch.setattr(triton_impl, "PROGRAMS_PER_PROCESSOR", 1)
    tokens, abilities, most = CAPACITY.values()
    replayed = Replayed((33, 50), torch.float32, [tokens])
    weight_TA = np.zeros((tokens, abilities), dtype=np.float32)
    for token in range(tokens):
        weight_TA[token, (token * most + np.arange(most)) % abilities] = 1 + token
    active = on_device(abilities_of([50] * abilities, 33, 50, torch.float32, bias=False))
    replayed.check(active, TokenWeights(weight_TA), padded=tokens)
    weight_TA[0] = 1
    with pytest.raises(ValueError, match="in a table for"):
        replayed.step.fill(TokenWeights(weight_TA))


def test_launches_do_not_depend_on_what_the_step_is() -> None:
    """Grid, addresses and every other argument: a graph that was captured in any step serves all."""
    replayed = Replayed((2100, 40), torch.float32, [24])
    signatures = [replayed.graphs[24].signature]
    for counts, tokens in [([40], 24), ([1, 7, 30, 0], 3), ([40] * 12, 20)]:
        active = on_device(abilities_of(counts, 2100, 40, torch.float32, bias=False))
        replayed.table.fill([ModelRows.of([ability] * 3, [40] * 3) for ability in active.abilities])
        replayed.step.fill(few_abilities("composed", tokens, len(counts), 3))
        with capture(execute=True) as graph:
            add_rows(replayed.x_TI[:24], replayed.y_TO[:24], replayed.table.layers[1], replayed.step)
        signatures.append(graph.signature)
    assert [len(signature) for signature in signatures] == [2] * 4
    assert all(signature == signatures[0] for signature in signatures)


def test_the_check_before_use_sees_a_kernel_that_is_wrong() -> None:
    def loses_the_last_token(x_TI: torch.Tensor, y_TO: torch.Tensor, active: ActiveRows, weights: TokenWeights) -> None:
        add_rows_reference(x_TI, y_TO, active, TokenWeights(weights.weight_TA[:-1]))

    for dtype in (torch.float32, torch.bfloat16):
        assert agrees_with_torch(TritonRows(), DEVICE, dtype, tokens=(3, 600))
        assert not agrees_with_torch(loses_the_last_token, DEVICE, dtype, tokens=(3, 600))
