"""The tables that kernels on a GPU read."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from act_serve.kernels import row_table
from act_serve.kernels.row_table import ModelRows, ModelRowTable, RowTable, starts_of
from act_serve.kernels.rows import AbilityRows, ActiveRows, TokenWeights
from act_serve.kernels.step_table import StepTable, table_of

CPU = torch.device("cpu")


def random_weights(tokens: int, abilities: int) -> np.ndarray:
    rng = np.random.default_rng()
    return rng.normal(size=(tokens, abilities)) * (rng.random((tokens, abilities)) < 0.4)


@pytest.mark.parametrize(("tokens", "abilities"), [(1, 1), (3, 5), (63, 4), (133, 9)])
def test_every_use_has_one_place_in_a_block_of_its_ability(tokens: int, abilities: int) -> None:
    weight_TA = random_weights(tokens, abilities).astype(np.float32)
    table = table_of(TokenWeights(weight_TA), CPU, block=16)
    most = table.uses_per_token
    found, abilities_U, weights_U = np.zeros_like(weight_TA), table.ability_U.tolist(), table.weight_U.tolist()
    for place, use in enumerate(table.use_P.tolist()):
        if use >= 0:
            assert place // 16 < table.blocks_1.item()
            assert abilities_U[use] == table.ability_B[place // 16]
            found[use // most, abilities_U[use]] += weights_U[use]
    assert np.array_equal(found, weight_TA)
    assert (table.ability_U >= 0).sum() == (table.use_P >= 0).sum() == (weight_TA != 0).sum()
    assert (table.ability_B >= 0).sum() == table.blocks_1.item()
    # A kernel stops at a token's first place without an ability.
    used_TR = (table.ability_U >= 0).view(tokens, most)
    assert torch.equal(used_TR, used_TR.sort(1, descending=True).values)


def test_uses_have_slots_without_gaps_token_after_token() -> None:
    table = table_of(TokenWeights(random_weights(133, 9)), CPU, block=16)
    slots = table.slot_U[table.ability_U >= 0]
    assert torch.equal(slots, torch.arange(len(slots)))


@pytest.mark.parametrize("shape", [(4, 2), (3, 5), (3, 3)])
def test_a_step_beyond_the_capacity_is_refused(shape: tuple[int, int]) -> None:
    table = StepTable(CPU, tokens=3, abilities=4, uses_per_token=2, block=16)
    with pytest.raises(ValueError, match="in a table for"):
        table.fill(TokenWeights(np.ones(shape)))


def test_rows_beyond_the_capacity_or_unaligned_are_refused() -> None:
    delta = torch.zeros(3, 4)
    one = ActiveRows([AbilityRows(torch.arange(2, dtype=torch.int32), delta[:2])])
    with pytest.raises(ValueError, match="up to 2 rows"):
        RowTable(CPU, abilities=1, max_rows=1).fill(one, 8)
    unaligned = torch.zeros(9)[1:].view(2, 4)
    with pytest.raises(ValueError, match="16 bytes"):
        row_table.table_of(ActiveRows([AbilityRows(one.abilities[0].rows_N, unaligned)]), 8, CPU)
    with pytest.raises(ValueError, match="2 abilities in a table for 1"):
        ModelRowTable(CPU, abilities=1, out_features=[8]).fill([ModelRows.of(one.abilities, [8])] * 2)


@pytest.mark.parametrize(("tokens", "abilities", "most"), [(1, 1, 1), (7, 5, 3), (12, 9, 2)])
def test_everything_starts_at_a_multiple_of_16_bytes(tokens: int, abilities: int, most: int) -> None:
    """Triton compiles a kernel once for addresses that do, and once more for others."""
    step = StepTable(CPU, tokens=tokens, abilities=abilities, uses_per_token=most, block=16)
    table = ModelRowTable(CPU, abilities=abilities, out_features=[8] * tokens)
    parts = [step.blocks_1, step.ability_B, step.use_P, step.ability_U, step.slot_U, step.weight_U]
    parts += [layer.address_AC for layer in table.layers]
    assert not any(part.data_ptr() % 16 for part in parts)


def test_starts_count_the_rows_before_each_range_of_outputs() -> None:
    rows_N = torch.tensor([1, 4, 2047, 2048, 6000], dtype=torch.int32)
    assert starts_of(rows_N, 6001).tolist() == [0, 3, 4, 5]
    assert starts_of(rows_N[:0], 2048).tolist() == [0, 0]


def test_a_layer_has_the_most_rows_of_the_abilities_it_has_now() -> None:
    def rows(counts: list[int]) -> ModelRows:
        layers = [AbilityRows(torch.arange(n, dtype=torch.int32), torch.zeros(n, 4)) for n in counts]
        return ModelRows.of(layers, [8] * len(counts))

    table = ModelRowTable(CPU, abilities=3, out_features=[8, 8])
    table.fill([rows([1, 5]), rows([3, 2])])
    assert [layer.address_AC[0, row_table.MOST].item() for layer in table.layers] == [3, 5]
    table.fill([rows([1, 5])])
    assert [layer.address_AC[0, row_table.MOST].item() for layer in table.layers] == [1, 5]
