"""What must hold for any abilities and any batch, through a layer as vLLM calls it, without an engine."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear

from act_serve.delta.artifact import ModuleDelta
from act_serve.delta.fit import ModuleShape
from act_serve.engine.ability_key import AbilityKey
from act_serve.engine.batch import BatchTable
from act_serve.engine.layers import DeltaLayer, DeltaLinearMethod
from act_serve.engine.plan import LayerPlan, Part
from act_serve.engine.residents import ResidentAbilities
from act_serve.home import cache_home
from act_serve.kernels.dispatch import AddRows, choose_add_rows
from act_serve.kernels.rows import MANY

IN, Q, K = 24, 20, 8
CPU = torch.device("cpu")
Weights = Mapping[AbilityKey, float]


@functools.cache
def add_rows(dtype: torch.dtype) -> AddRows:
    return choose_add_rows(CPU, dtype, cache_home() / "kernels")


@dataclass(frozen=True, slots=True)
class Ability:
    """Rows of the two fused modules, and the seed of their values."""

    q: frozenset[int]
    k: frozenset[int]
    bias: bool
    seed: int

    def modules(self, width: int = IN, dtype: torch.dtype = torch.float32) -> dict[str, ModuleDelta]:
        draw = torch.Generator().manual_seed(self.seed)
        return {
            name: ModuleDelta(
                torch.tensor(sorted(rows), dtype=torch.int32),
                torch.randn(len(rows), width, generator=draw).to(dtype),
                torch.randn(len(rows), generator=draw).to(dtype) if self.bias else None,
            )
            for name, rows in (("q", self.q), ("k", self.k))
            if rows
        }


class Layer:
    """A fused layer with a bias, as vLLM's linear layers call theirs."""

    def __init__(self, abilities: Sequence[Ability], width: int = IN, dtype: torch.dtype = torch.float32) -> None:
        draw, self.shape = torch.Generator().manual_seed(0), (width, dtype)
        self.weight_OI = torch.randn(Q + K, width, generator=draw).to(dtype)
        self.bias_O = torch.randn(Q + K, generator=draw).to(dtype)
        self.batch = BatchTable()
        layer = DeltaLayer("laws", self.batch, add_rows(dtype))
        parts = (
            Part("q", ModuleShape(Q, width, True), range(Q), 0),
            Part("k", ModuleShape(K, width, True), range(K), Q),
        )
        described: Any = SimpleNamespace(input_size=width, params_dtype=dtype)
        plan = LayerPlan("laws", described, parts, slice(None), adds_bias=True)
        self.residents = ResidentAbilities([plan], [layer], CPU, 1 << 20)
        wrapped = SimpleNamespace(apply=lambda _layer, x, bias: linear(x, self.weight_OI, bias))
        self.method = DeltaLinearMethod(wrapped, layer)
        self.abilities = {AbilityKey(f"a{i}", 1, "0" * 12): ability for i, ability in enumerate(abilities)}
        self.keys = list(self.abilities)

    def load(self, keys: Sequence[AbilityKey]) -> None:
        for key in keys:
            self.residents.install(key, self.residents.prepare(key, self.abilities[key].modules(*self.shape)))

    def merged(self, weights: Weights) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias with a composition's rows added, in float64."""
        weight_OI, bias_O = self.weight_OI.double(), self.bias_O.double()
        for key, weight in weights.items():
            for name, delta in self.abilities[key].modules(*self.shape).items():
                rows = delta.rows.long() + (Q if name == "k" else 0)
                weight_OI[rows] += weight * delta.delta.double()
                if delta.bias_delta is not None:
                    bias_O[rows] += weight * delta.bias_delta.double()
        return weight_OI, bias_O

    def base(self, x_TI: torch.Tensor) -> torch.Tensor:
        return linear(x_TI, self.weight_OI, self.bias_O)

    def step(self, x_TI: torch.Tensor, ids_T: Sequence[int], compositions: Mapping[int, Weights]) -> torch.Tensor:
        """Runs one step as the manager does."""
        self.batch.clear()
        if compositions:
            self.batch.fill(ids_T, compositions)
        return self.method.apply(torch.nn.Module(), x_TI, self.bias_O)

    def changes(self, x_TI: torch.Tensor, compositions: Sequence[Weights]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The base's output, and what each composition adds to it when all tokens use it."""
        base_TO, ids_T = self.base(x_TI), [1] * len(x_TI)
        return base_TO, [self.step(x_TI, ids_T, {1: composition}) - base_TO for composition in compositions]


ABILITY = st.builds(
    Ability,
    q=st.frozensets(st.integers(0, Q - 1), max_size=Q),
    k=st.frozensets(st.integers(0, K - 1), max_size=K),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
WEIGHT = st.sampled_from([-2.0, -0.5, 0.25, 1.0, 3.0]) | st.floats(-4, 4, width=32)
ABILITIES = st.lists(ABILITY, min_size=1, max_size=4)
# Both sides of the number of tokens from which torch multiplies.
TOKENS = st.integers(1, 9) | st.integers(MANY - 2, MANY + 2)


def tokens_of(count: int, seed: int, width: int = IN) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(abilities=ABILITIES, tokens=TOKENS, seed=st.integers(0, 2**31))
def test_weight_zero_is_the_base_bit_for_bit(abilities: list[Ability], tokens: int, seed: int) -> None:
    layer, x_TI = Layer(abilities), tokens_of(tokens, seed)
    layer.load(layer.keys)
    y_TO = layer.step(x_TI, [1] * tokens, {1: dict.fromkeys(layer.keys, 0.0)})
    assert torch.equal(y_TO, layer.base(x_TI))


@settings(max_examples=60, deadline=None)
@given(abilities=ABILITIES, weights=st.lists(WEIGHT, min_size=4, max_size=4), tokens=TOKENS, data=st.data())
def test_no_order_matters(abilities: list[Ability], weights: list[float], tokens: int, data: st.DataObject) -> None:
    first, second = Layer(abilities), Layer(abilities)
    order = data.draw(st.permutations(first.keys))
    first.load(first.keys)
    second.load(order)
    weight_of = dict(zip(first.keys, weights, strict=False))
    ids_T = data.draw(st.lists(st.integers(0, 1), min_size=tokens, max_size=tokens))
    x_TI = tokens_of(tokens, 1)
    one = first.step(x_TI, ids_T, {1: weight_of})
    two = second.step(x_TI, ids_T, {1: {key: weight_of[key] for key in order}})
    assert torch.equal(one, two)


@settings(max_examples=60, deadline=None)
@given(abilities=ABILITIES, weights=st.lists(WEIGHT, min_size=4, max_size=4), tokens=TOKENS, seed=st.integers(0, 2**31))
def test_a_composition_is_the_sum_of_its_parts(
    abilities: list[Ability], weights: list[float], tokens: int, seed: int
) -> None:
    layer, x_TI = Layer(abilities), tokens_of(tokens, seed)
    layer.load(layer.keys)
    weight_of = dict(zip(layer.keys, weights, strict=False))
    base_TO, parts = layer.changes(x_TI, [{key: 1.0} for key in layer.keys])
    expected = base_TO + sum(weight * part for weight, part in zip(weight_of.values(), parts, strict=True))
    size = base_TO.abs().max() + sum(abs(w) * p.abs().max() for w, p in zip(weight_of.values(), parts, strict=True))
    got = layer.step(x_TI, [1] * tokens, {1: weight_of})
    assert torch.allclose(got, expected, rtol=0, atol=float(size) * 1e-5)


@settings(max_examples=60, deadline=None)
@given(abilities=ABILITIES, weights=st.lists(WEIGHT, min_size=8, max_size=8), tokens=TOKENS, seed=st.integers(0, 2**31))
def test_the_sum_of_compositions_is_the_composition_of_sums(
    abilities: list[Ability], weights: list[float], tokens: int, seed: int
) -> None:
    layer, x_TI = Layer(abilities), tokens_of(tokens, seed)
    layer.load(layer.keys)
    one, two = (dict(zip(layer.keys, part, strict=False)) for part in (weights[:4], weights[4:]))
    base_TO, parts = layer.changes(x_TI, [one, two])
    got = layer.step(x_TI, [1] * tokens, {1: {key: one[key] + two[key] for key in layer.keys}})
    size = sum(abs(weight) for weight in weights) * 40 * IN**0.5 + base_TO.abs().max()
    assert torch.allclose(got, base_TO + parts[0] + parts[1], rtol=0, atol=float(size) * 1e-6)


# Rounding of a sum, and in bfloat16 of the output for the layer and once per ability.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 5 * 2**-8}


@settings(max_examples=120, deadline=None)
@given(
    abilities=ABILITIES,
    weights=st.lists(WEIGHT | st.just(1.0), min_size=4, max_size=4),
    width=st.integers(1, 80),
    dtype=st.sampled_from(list(ROUNDING)),
    tokens=TOKENS,
    data=st.data(),
)
def test_every_token_gets_what_its_merged_layer_gives(
    abilities: list[Ability], weights: list[float], width: int, dtype: torch.dtype, tokens: int, data: st.DataObject
) -> None:
    layer, x_TI = Layer(abilities, width, dtype), tokens_of(tokens, 3, width).to(dtype)
    layer.load(layer.keys)
    every = dict(zip(layer.keys, weights, strict=False))
    compositions: dict[int, Weights] = {0: {}, 1: every, 2: {layer.keys[-1]: 1.0}}
    ids_T = data.draw(st.lists(st.integers(0, 2), min_size=tokens, max_size=tokens))
    got = layer.step(x_TI, ids_T, {i: compositions[i] for i in set(ids_T) - {0}})
    for i, composition in compositions.items():
        used_T = torch.tensor(ids_T) == i
        weight_OI, bias_O = layer.merged(composition)
        expected = linear(x_TI[used_T].double(), weight_OI, bias_O)
        size = x_TI.double().abs() @ weight_OI.abs().t() + bias_O.abs()
        size += sum(abs(w) for w in composition.values()) * 30 * width**0.5  # what may cancel in the sums
        assert bool(((got[used_T].double() - expected).abs() <= ROUNDING[dtype] * size[used_T]).all())


@settings(max_examples=60, deadline=None)
@given(abilities=ABILITIES, tokens=TOKENS, data=st.data())
def test_loading_and_evicting_leave_the_base_bit_for_bit(
    abilities: list[Ability], tokens: int, data: st.DataObject
) -> None:
    layer, x_TI = Layer(abilities), tokens_of(tokens, 2)
    base_TO = layer.base(x_TI)
    for _ in range(3):
        layer.load(layer.keys)
        ids_T = data.draw(st.lists(st.integers(0, 2), min_size=tokens, max_size=tokens))
        used = {1: dict.fromkeys(layer.keys, 1.0), 2: {layer.keys[0]: -0.5}}
        y_TO = layer.step(x_TI, ids_T, {i: used[i] for i in set(ids_T) - {0}})
        bare_T = torch.tensor(ids_T) == 0
        assert torch.equal(y_TO[bare_T], base_TO[bare_T])
        for key in data.draw(st.permutations(layer.keys)):
            layer.batch.clear()
            layer.residents.evict(key)
        assert torch.equal(layer.step(x_TI, [0] * tokens, {}), base_TO)
        assert layer.residents.bytes == 0
