"""Every merge method equals plain arithmetic on dense matrices, on shared rows and on others."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from act_serve.delta.artifact import ModuleDelta
from act_serve.errors import DataError
from act_serve.pipeline.conflict import conflict
from act_serve.pipeline.merge import Share, merge_deltas

CHANNELS, INPUTS, NAMES = 12, 7, ("a", "b")
Dense = dict[str, NDArray[np.float64]]


def share(seed: int, rows: int, weight: float, density: float = 1.0, bias: bool = False) -> Share:
    draw = torch.Generator().manual_seed(seed)
    deltas = {}
    for name in NAMES:
        index = torch.randperm(CHANNELS, generator=draw)[:rows].sort().values.int()
        values = torch.randn(rows, INPUTS + 1, generator=draw)
        deltas[name] = ModuleDelta(index, values[:, :INPUTS], values[:, INPUTS] if bias else None)
    return Share(deltas, weight, density)


def dense(deltas: dict[str, ModuleDelta], name: str) -> NDArray[np.float64]:
    """`[CHANNELS, INPUTS]`, or `[CHANNELS, 1]` for `NAME.bias`."""
    module = deltas[name.removesuffix(".bias")]
    values = module.delta if name in NAMES else module.bias_delta[:, None]
    whole = np.zeros((CHANNELS, values.shape[1]))
    whole[module.rows.numpy()] = values.double().numpy()
    return whole


def owned(part: Share, name: str) -> set[int]:
    return set(part.deltas[name.removesuffix(".bias")].rows.tolist())


def cell(method: str, values: list[float], owners: list[bool]) -> float:
    """One value of the merged matrix, from each ability's weighted value there and whether it changes the row."""
    mine = [value for value, owner in zip(values, owners, strict=True) if owner]
    if method == "sum" or not mine:
        return sum(values)
    if method == "mean":
        return sum(mine) / len(mine)
    if method == "priority":
        return mine[0]
    agreeing = [value for value in mine if value * sum(mine) > 0]
    return sum(agreeing) / len(agreeing) if agreeing else 0.0


def trimmed(values: NDArray[np.float64], rows: set[int], density: float) -> NDArray[np.float64]:
    """Zeroes all but the share `density` of the changed rows' values, smallest first."""
    places = sorted(itertools.product(rows, range(values.shape[1])), key=lambda place: abs(values[place]))
    kept = values.copy()
    for place in places[: len(places) - int(np.ceil(density * len(places)))]:
        kept[place] = 0
    return kept


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("method", ["sum", "mean", "priority", "ties"])
def test_equals_the_plain_reference(method: str, bias: bool) -> None:
    density = 0.6 if method == "ties" else 1.0
    parts = [share(1, 5, 1.0, density, bias), share(2, 6, -0.5, density, bias), share(3, 7, 2.0, density)]
    merged = merge_deltas(parts, method)
    for name in (*NAMES, *(f"{name}.bias" for name in NAMES if bias)):
        given = [part for part in parts if not name.endswith(".bias") or part.deltas["a"].bias_delta is not None]
        layers = [dense(dict(part.deltas), name) * part.weight for part in given]
        if method == "ties":
            layers = [trimmed(layer, owned(part, name), density) for layer, part in zip(layers, given, strict=True)]
        if len(given) < len(parts):  # the third has no bias: it changes these rows by nothing
            given, layers = [*given, parts[2]], [*layers, np.zeros_like(layers[0])]
        expected = np.zeros_like(layers[0])
        for row, column in np.ndindex(*expected.shape):
            owners = [row in owned(part, name) for part in given]
            expected[row, column] = cell(method, [layer[row, column] for layer in layers], owners)
        np.testing.assert_allclose(dense(merged, name), expected, rtol=1e-5, atol=1e-6)
    for module in merged.values():
        assert module.rows.dtype == torch.int32
        assert bool((module.rows[1:] > module.rows[:-1]).all())
        assert (module.bias_delta is not None) == bias


def test_modules_that_one_ability_has_stay_as_they_are() -> None:
    one, two = share(1, 5, 1.0), share(2, 6, 1.0)
    alone = Share({"a": one.deltas["a"]})
    for method in ("sum", "mean", "priority", "ties"):
        merged = merge_deltas([alone, Share({"b": two.deltas["b"]})], method)
        assert torch.equal(merged["a"].delta, one.deltas["a"].delta)
        assert torch.equal(merged["b"].rows, two.deltas["b"].rows)


def test_ties_keeps_no_more_than_its_density_of_equal_values() -> None:
    part = Share({"a": ModuleDelta(torch.arange(4).int(), torch.full((4, 10), 0.5), None)}, 1.0, 0.1)
    merged = merge_deltas([part], "ties", seed=0)["a"]
    assert int(merged.delta.count_nonzero()) == 4


def test_dare_keeps_the_mean_is_seeded_and_rescales() -> None:
    parts = [share(1, 5, 1.0, 0.25), share(2, 6, 1.0, 1.0)]
    merged = merge_deltas(parts, "dare", seed=4)
    again, other = merge_deltas(parts, "dare", seed=4), merge_deltas(parts, "dare", seed=5)
    assert all(torch.equal(merged[name].delta, again[name].delta) for name in NAMES)
    assert not all(np.array_equal(dense(merged, name), dense(other, name)) for name in NAMES)
    name = "a"
    first, second = (dense(dict(part.deltas), name) for part in parts)
    rest = dense(merged, name) - second
    kept = np.abs(rest) > 1e-6
    np.testing.assert_allclose(rest[kept], 4 * first[kept], rtol=1e-4)
    assert 0 < kept.sum() < (first != 0).sum()
    runs = [dense(merge_deltas(parts, "dare", seed=seed), name) for seed in range(800)]
    np.testing.assert_allclose(np.mean(runs, axis=0), first + second, atol=0.45)


def test_dare_ties_has_no_value_against_the_elected_sign() -> None:
    parts = [share(1, 9, 1.0, 0.5), share(2, 9, 1.0, 0.5)]
    merged = merge_deltas(parts, "dare_ties", seed=1)
    layers = [dense(dict(part.deltas), "a") for part in parts]
    result = dense(merged, "a")
    for place in zip(*np.nonzero(result), strict=True):
        options = {2 * layers[0][place], 2 * layers[1][place], layers[0][place] + layers[1][place]}
        assert min(abs(result[place] - option) for option in options) < 1e-5
    opposed = layers[0] * layers[1] < 0
    larger = np.where(np.abs(layers[0]) > np.abs(layers[1]), layers[0], layers[1])
    only_one = (result != 0) & opposed
    assert only_one.any()
    assert not np.allclose(result[only_one], 2 * larger[only_one])  # an ability alone may win where the other dropped


def test_rows_that_cancel_are_left_out() -> None:
    one = share(1, 5, 1.0)
    with pytest.raises(DataError, match="leaves no row"):
        merge_deltas([one, Share(one.deltas, -1.0)], "sum")


def module(rows: list[int], values: list[list[float]]) -> ModuleDelta:
    return ModuleDelta(torch.tensor(rows, dtype=torch.int32), torch.tensor(values))


def test_conflict_counts_shared_rows_and_their_angle() -> None:
    left = {"m": module([0, 2, 5], [[1, 0], [1, 1], [3, 4]]), "n": module([1], [[1, 0]])}
    right = {"m": module([2, 5, 7, 9], [[-2, -2], [4, -3], [1, 1], [1, 1]]), "o": module([1], [[1, 0]])}
    found = conflict(left, right)
    assert found["modules"] == {"m": {"rows": 2, "share": round(2 / 3, 4), "cosine": -0.5}}
    assert (found["rows"], found["share"], found["cosine"]) == (2, 0.5, -0.5)
    assert conflict(left, {"o": right["o"]}) == {"rows": 0, "share": 0.0, "cosine": None, "modules": {}}
    assert conflict(left, left)["cosine"] == 1.0


def test_nothing_of_the_parents_changes(tmp_path: Path) -> None:
    parts = [share(1, 5, 1.0, 0.5), share(2, 6, 1.0, 0.5)]
    before = [part.deltas["a"].delta.clone() for part in parts]
    for method in ("sum", "mean", "priority", "ties", "dare", "dare_ties"):
        merge_deltas(parts, method)
    assert all(torch.equal(part.deltas["a"].delta, old) for part, old in zip(parts, before, strict=True))
