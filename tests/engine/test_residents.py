"""Loading, evicting and applying abilities, against dense arithmetic, without an engine."""

from __future__ import annotations

import random
import weakref
from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from act_serve.delta.artifact import ModuleDelta
from act_serve.delta.fit import ModuleShape
from act_serve.engine.ability_key import AbilityKey
from act_serve.engine.batch import BatchTable
from act_serve.engine.layers import DeltaLayer, HeadLayer
from act_serve.engine.plan import LayerPlan, Part, whole_modules
from act_serve.engine.residents import ResidentAbilities
from act_serve.errors import EngineError
from act_serve.home import cache_home
from act_serve.kernels.dispatch import choose_add_rows
from act_serve.kernels.rows import AbilityRows
from act_serve.kernels.torch_impl import add_rows_torch

IN, OUT = 12, {"q": 10, "k": 6}


class Bench:
    """One fused layer of two modules, with as many abilities as asked for, and the dense truth beside it."""

    def __init__(self, abilities: int, max_bytes: int) -> None:
        self.batch = BatchTable()
        cpu = torch.device("cpu")
        self.layer = DeltaLayer("layer", self.batch, choose_add_rows(cpu, torch.float32, cache_home() / "kernels"))
        shapes = {name: ModuleShape(size, IN, bias=True) for name, size in OUT.items()}
        parts = (Part("q", shapes["q"], range(10), 0), Part("k", shapes["k"], range(6), 10))
        linear: Any = SimpleNamespace(input_size=IN, params_dtype=torch.float32)
        plans = [LayerPlan("layer", linear, parts, slice(None), adds_bias=True)]
        self.residents = ResidentAbilities(plans, [self.layer], cpu, max_bytes)
        self.keys = [AbilityKey(f"a{i}", 1, "0" * 12) for i in range(abilities)]
        self.modules = {key: self._random() for key in self.keys}

    def _random(self) -> dict[str, ModuleDelta]:
        modules = {}
        for name, size in OUT.items():
            rows = torch.randperm(size)[: random.randint(1, size)].sort().values.int()
            bias = torch.randn(len(rows)) if random.random() < 0.5 else None
            modules[name] = ModuleDelta(rows, torch.randn(len(rows), IN), bias)
        return modules

    def load(self, key: AbilityKey, in_use: Collection[AbilityKey] = ()) -> None:
        self.residents.install(key, self.residents.prepare(key, self.modules[key]), in_use)

    def dense(self, key: AbilityKey) -> tuple[torch.Tensor, torch.Tensor]:
        weight, bias = torch.zeros(16, IN), torch.zeros(16)
        for start, name in ((0, "q"), (10, "k")):
            module = self.modules[key][name]
            weight[module.rows.long() + start] = module.delta
            if module.bias_delta is not None:
                bias[module.rows.long() + start] = module.bias_delta
        return weight, bias

    def step(self, compositions: dict[int, dict[AbilityKey, float]], ids_T: list[int]) -> None:
        """Runs one step as the manager does, and compares."""
        keys = {key for i in ids_T if i for key in compositions[i]}
        for key in keys:
            if key not in self.residents:
                self.load(key, keys)
        self.batch.clear()
        if keys:
            self.residents.touch(keys)
            self.batch.fill(tuple(ids_T), {i: compositions[i] for i in set(ids_T) if i})
        x_TI, y_TO = torch.randn(len(ids_T), IN), torch.randn(len(ids_T), 16)
        expected = y_TO.clone()
        for t, i in enumerate(ids_T):
            for key, weight in compositions.get(i, {}).items():
                dense, bias = self.dense(key)
                expected[t] += weight * (dense @ x_TI[t] + bias)
        self.layer.add(x_TI, y_TO)
        assert torch.allclose(y_TO, expected, atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_random_traffic_equals_dense_arithmetic(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)
    bench = Bench(abilities=8, max_bytes=5 * 16 * (IN * 4 + 12))
    for _ in range(60):
        compositions = {
            i: {key: random.choice([1.0, 0.5, -1.0]) for key in random.sample(bench.keys, random.randint(1, 2))}
            for i in (1, 2)
        }
        bench.step(compositions, [random.randint(0, 2) for _ in range(random.randint(1, 9))])
    assert bench.residents.bytes <= 5 * 16 * (IN * 4 + 12)


def test_padding_tokens_get_nothing() -> None:
    bench = Bench(abilities=1, max_bytes=1 << 20)
    bench.step({1: {bench.keys[0]: 1.0}}, [1, 1])
    y_TO = torch.zeros(5, 16)
    bench.layer.add(torch.randn(5, IN), y_TO)
    assert not torch.equal(y_TO[:2], torch.zeros(2, 16))
    assert torch.equal(y_TO[2:], torch.zeros(3, 16))


def test_memory_is_that_of_the_tensors() -> None:
    bench = Bench(abilities=6, max_bytes=1 << 20)
    for key in bench.keys:
        bench.load(key)
    tensors = [part for rows in bench.layer.resident.values() for part in (rows.rows_N, rows.delta_NI, rows.bias_N)]
    sizes = {part.data_ptr(): part.nbytes for part in tensors if part is not None}
    assert sum(sizes.values()) == bench.residents.bytes


def test_a_gone_ability_leaves_nothing_behind() -> None:
    bench = Bench(abilities=1, max_bytes=1 << 20)
    (key,) = bench.keys
    bench.step({1: {key: 1.0}}, [1])
    rows = weakref.ref(bench.layer.resident[key].delta_NI)
    bench.residents.evict(key)
    assert rows() is None
    bench.step({1: {key: 1.0}}, [1])


def test_least_recently_used_idle_abilities_leave_first() -> None:
    bench = Bench(abilities=4, max_bytes=1 << 20)
    one, two, three, four = bench.keys
    for key in (one, two, three):
        bench.load(key)
    bench.residents.touch([one])
    full = bench.residents.bytes
    bench.residents._max_bytes = full  # whatever comes next must push something out
    bench.modules[four] = {"k": ModuleDelta(torch.tensor([1], dtype=torch.int32), torch.randn(1, IN))}
    bench.load(four, in_use={two})
    assert two in bench.residents
    assert one in bench.residents
    assert three not in bench.residents
    assert bench.residents.bytes <= full


def test_what_does_not_fit_the_budget_or_the_model_is_refused() -> None:
    bench = Bench(abilities=2, max_bytes=100)
    with pytest.raises(EngineError, match="raise max_resident_bytes"):
        bench.load(bench.keys[0])
    bench = Bench(abilities=1, max_bytes=1 << 20)
    bench.modules[bench.keys[0]] = {"q": ModuleDelta(torch.tensor([3, 10], dtype=torch.int32), torch.randn(2, IN))}
    with pytest.raises(EngineError, match="only 1 of 2 rows"):
        bench.load(bench.keys[0])
    assert len(bench.residents) == 0


def test_the_stages_of_a_pipeline_share_out_the_rows() -> None:
    torch.manual_seed(0)
    whole = {name: ModuleShape(size, IN) for name, size in OUT.items()}
    modules = {name: ModuleDelta(torch.tensor([0, 5], dtype=torch.int32), torch.randn(2, IN)) for name in whole}
    linear: Any = SimpleNamespace(input_size=IN, params_dtype=torch.float32)
    key = AbilityKey("a", 1, "0" * 12)
    for here, there in (("q", "k"), ("k", "q")):
        plan = LayerPlan(here, linear, (Part(here, whole[here], range(OUT[here]), 0),), slice(None), adds_bias=True)
        layer = DeltaLayer(
            here, BatchTable(), choose_add_rows(torch.device("cpu"), torch.float32, cache_home() / "kernels")
        )
        alone = ResidentAbilities([plan], [layer], torch.device("cpu"), 1 << 20)
        with pytest.raises(EngineError, match="only 2 of 4 rows"):
            alone.prepare(key, modules)
        staged = ResidentAbilities([plan], [layer], torch.device("cpu"), 1 << 20, other_stages=[there])
        (rows,) = staged.prepare(key, modules).rows
        assert torch.equal(rows.delta_NI, modules[here].delta)


def test_lm_head_has_the_weights_of_what_is_sampled_once_a_step() -> None:
    key, batch = AbilityKey("a", 1, "0" * 12), BatchTable()
    head = HeadLayer("lm_head", batch, add_rows_torch)
    head.resident[key] = AbilityRows(torch.tensor([2], dtype=torch.int32), torch.ones(1, IN))
    x_SI = torch.ones(2, IN)

    def added(positions: int = 2) -> list[float]:
        y_SO = torch.zeros(positions, 4)
        head.add(x_SI[:positions], y_SO)
        return y_SO[:, 2].tolist()

    batch.begin_step()
    batch.fill((1, 1, 1, 0, 2, 2), {1: {key: 1.0}, 2: {key: 0.5}}, sampled_ids=(1, 2))
    assert added() == [IN, IN / 2]
    assert added() == [0, 0], "logits of a prompt, and it isn't known whose"
    batch.begin_step()
    assert added() == [IN, IN / 2], "the same tables serve the next step"
    batch.begin_step()
    with pytest.raises(EngineError, match="logits of 1 positions and announced 2"):
        added(1)
    batch.begin_step()
    batch.fill((2, 1), {1: {key: 1.0}, 2: {key: 0.5}}, sampled_ids=(2, 1))
    assert added() == [IN / 2, IN]
    batch.begin_step()
    batch.clear()
    assert added() == [0, 0]


def test_a_layer_without_rows_of_the_step_s_abilities_is_left_alone() -> None:
    key, batch, calls = AbilityKey("a", 1, "0" * 12), BatchTable(), []
    layer = DeltaLayer("norm", batch, lambda *_: calls.append(1))
    layer.resident[key] = AbilityRows(torch.empty(0, dtype=torch.int32), torch.empty(0, 1))
    batch.fill((1,), {1: {key: 1.0}})
    layer.add(torch.ones(1, 4), torch.ones(1, 4))
    assert not calls


def test_modules_are_those_that_the_workers_have_together() -> None:
    shape = ModuleShape(10, IN)
    halves = [[Part("q", shape, range(5), 0)], [Part("q", shape, range(5, 10), 0)]]
    assert whole_modules([*halves, [Part("k", shape, range(10), 0)]]) == {"q": shape, "k": shape}
    with pytest.raises(EngineError, match="q has 10 rows, and the workers have 5 of them"):
        whole_modules(halves[:1])
