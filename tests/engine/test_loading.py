"""Abilities are loaded in a thread, by few questions to the workers, and errors keep their kind."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.lora.request import LoRARequest

from act_serve.abilities.changes import activate, pin
from act_serve.abilities.store import Store
from act_serve.delta.fingerprint import fingerprint_model
from act_serve.delta.fit import ModuleShape
from act_serve.delta.manifest import MANIFEST_FILE, TENSORS_FILE, Manifest
from act_serve.engine.ability_key import AbilityKey
from act_serve.engine.admission import Admission
from act_serve.engine.layers import DeltaLayer
from act_serve.engine.manager import AbilityManager, _one_thread
from act_serve.engine.plan import LayerPlan, Part, whole_modules
from act_serve.engine.registry import CompositionRegistry
from act_serve.engine.residents import ResidentAbilities
from act_serve.engine.resolver import adapter_request
from act_serve.engine.worker import AbilityWorker
from act_serve.errors import ArtifactDamagedError, EngineError, RequestError, StoreError, UnknownAbilityError
from act_serve.kernels.reference import add_rows_reference
from tests.abilities_for_tests import linear_shapes, pinned, publish_random

ROOM = 2


class Engine:
    """The manager and the worker's own method behind the one call that the registry makes of vLLM's client."""

    model_config = SimpleNamespace(dtype=torch.float32)

    def __init__(self, base: Path, store: Store, room: int) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.ability_manager = AbilityManager(fingerprint_model(base), store, room)
        plans, layers = [], []
        for name, (out_features, in_features) in linear_shapes(base).items():
            linear: Any = SimpleNamespace(input_size=in_features, params_dtype=torch.float32)
            part = Part(name, ModuleShape(out_features, in_features), range(out_features), 0)
            plans.append(LayerPlan(name, linear, (part,), slice(None), adds_bias=True))
            layers.append(DeltaLayer(name, self.ability_manager.batch, add_rows_reference))
        self.layers = layers
        self.ability_manager.modules = whole_modules([[part for plan in plans for part in plan.parts]])
        self.ability_manager._residents = ResidentAbilities(plans, layers, torch.device("cpu"), room)

    async def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        assert method == "load_abilities"
        self.calls.append(args)
        return await asyncio.shield(asyncio.ensure_future(self._call(args)))  # who gives up takes no call back

    async def _call(self, args: tuple[Any, ...]) -> list[Any]:
        await asyncio.sleep(0.05)  # a running step
        return [AbilityWorker.load_abilities(self, *args)]  # type: ignore[arg-type]

    def step(self, adapter: LoRARequest) -> torch.Tensor:
        """What two tokens of the adapter get from all layers."""
        mapping = SimpleNamespace(index_mapping=(adapter.lora_int_id,) * 2, prompt_mapping=(adapter.lora_int_id,))
        self.ability_manager.set_active_adapters({adapter}, mapping)
        outputs = []
        for layer, shape in zip(self.layers, self.ability_manager.modules.values(), strict=True):
            outputs.append(torch.zeros(2, shape.out_features))
            layer.add(torch.ones(2, shape.in_features), outputs[-1])
        return torch.cat(outputs, 1)

    @property
    def resident(self) -> set[str]:
        return {key.name for key in self.ability_manager._residents}


@pytest.fixture
def store(tmp_path: Path, tiny_llama: Path) -> Store:
    store = Store(tmp_path / "store")
    for number in range(3):
        publish_random(store, tiny_llama, f"r{number}", seed=number)
    return store


Started = Callable[[], tuple[Engine, CompositionRegistry]]


@pytest.fixture
def start(store: Store, tiny_llama: Path) -> Started:
    counts = store.manifest("r0").counts
    room = ROOM * (counts.parameters * 4 + counts.channels * 4)

    def started() -> tuple[Engine, CompositionRegistry]:
        engine = Engine(tiny_llama, store, room)
        admission = Admission(store, fingerprint_model(tiny_llama), engine.ability_manager.modules, tensors=False)
        return engine, CompositionRegistry(engine, SimpleNamespace(lora_requests={}), admission, ["smol"], room)

    return started


async def ask(registry: CompositionRegistry, store: Store, text: str) -> None:
    async with registry.hold(f"smol:{pinned(store, text)}"):
        pass


async def test_a_start_that_waits_needs_no_question(start: Started, store: Store) -> None:
    engine, registry = start()
    engine.ability_manager._patience_s = 10.0
    for name in ("r0", "r1+r0", "r2"):
        await ask(registry, store, name)
    assert [[key[0] for key in leaving] for _, leaving in engine.calls] == [[], [], ["r0"]]


async def test_a_load_is_a_start_and_a_question_and_what_leaves_goes_with_the_start(
    start: Started, store: Store
) -> None:
    engine, registry = start()
    for name in ("r0", "r1", "r2"):
        await ask(registry, store, name)
        assert name in engine.resident
    # The step between two questions is longer than a load takes.
    assert [[key[0] for key in leaving] for _, leaving in engine.calls] == [[], [], [], [], ["r0"], []]
    assert engine.resident == {"r1", "r2"}
    await ask(registry, store, "r2+r1*0.5")
    assert len(engine.calls) == 6, "a composition of resident abilities asks the workers nothing"


async def test_what_leaves_unused_takes_nothing_from_the_tokens_of_others(start: Started, store: Store) -> None:
    engine, registry = start()
    model = f"smol:{pinned(store, 'r0')}"
    async with registry.hold(model):
        before = engine.step(registry._adapters[model])
        assert before.any()
        await ask(registry, store, "r1")  # and no step uses it, because its client has left
        await ask(registry, store, "r2")
        assert engine.resident == {"r0", "r2"}
        assert torch.equal(engine.step(registry._adapters[model]), before)


async def test_what_a_step_took_back_leaves_with_the_next_load(start: Started, store: Store, tiny_llama: Path) -> None:
    """A request may still be in a step when its client has left and its abilities were let go."""
    engine, registry = start()
    model = f"smol:{pinned(store, 'r0')}"
    async with registry.hold(model):
        adapter = registry._adapters[model]
        before = engine.step(adapter)
    for name in ("r1", "r2"):
        await ask(registry, store, name)
    assert engine.resident == {"r1", "r2"}
    assert torch.equal(engine.step(adapter), before)
    assert engine.resident == {"r0", "r1", "r2"}, "nothing leaves for it that others may wait for"
    publish_random(store, tiny_llama, "r3", seed=3)
    await ask(registry, store, "r3")
    assert engine.resident == {"r2", "r3"}


async def test_what_vllm_has_forgotten_takes_no_room(start: Started, store: Store) -> None:
    """Such as the version that a name meant before, while a request still runs with it."""
    engine, _ = start()
    manager = engine.ability_manager
    old, *new = (adapter_request("smol", pinned(store, f"r{n}"), n + 1, store) for n in range(3))
    manager.add_adapter(old)
    before = engine.step(old)
    manager.remove_adapter(old.lora_int_id)
    assert torch.equal(engine.step(old), before)
    for adapter in new:
        manager.add_adapter(adapter)
    assert engine.resident == {"r1", "r2"}
    assert torch.equal(engine.step(old), before)
    assert engine.resident == {"r0", "r1", "r2"}
    engine.step(new[0])
    assert manager.list_adapters() == {adapter.lora_int_id for adapter in new}


async def test_a_refused_load_takes_nothing_from_a_request_that_runs(
    start: Started, store: Store, tiny_llama: Path
) -> None:
    """Plain vLLM: a request still runs with what its name meant before, and another one asks for too much."""
    publish_random(store, tiny_llama, "r3", seed=3)
    engine, _ = start()
    manager = engine.ability_manager
    old, other, large = (
        adapter_request("smol", pinned(store, text), number, store)
        for number, text in enumerate(("r0", "r1", "r2+r3"), start=1)
    )
    for adapter in (old, other):
        manager.add_adapter(adapter)
    manager.remove_adapter(old.lora_int_id)
    before = engine.step(old)
    with pytest.raises(EngineError, match="raise max_resident_bytes"):
        manager.add_adapter(large)
    assert torch.equal(engine.step(old), before)


async def test_downloads_of_others_keep_what_is_resident_waiting_for_nothing(
    start: Started, store: Store, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cold = [f"r{number}" for number in range(3, 3 + 40)]
    for number, name in enumerate(cold):
        publish_random(store, tiny_llama, name, seed=number)
    _, registry = start()
    await ask(registry, store, "r0")
    fetch, arrived = Store.fetch, threading.Event()

    def slow(self: Store, name: str, version: int) -> Path:
        assert name not in cold or arrived.wait(20)
        return fetch(self, name, version)

    monkeypatch.setattr(Store, "fetch", slow)
    others = [asyncio.create_task(ask(registry, store, name)) for name in cold]
    await asyncio.sleep(0.05)
    await ask(registry, store, "r0*0.5")  # other weights of what is resident
    await asyncio.to_thread(lambda: None)  # the threads of everybody else
    assert not any(task.done() for task in others)
    arrived.set()
    await asyncio.gather(*others)


async def test_a_download_keeps_nobody_else_waiting(
    start: Started, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, registry = start()
    fetch, arrived, fetched = Store.fetch, threading.Event(), list[str]()

    def slow(self: Store, name: str, version: int) -> Path:
        fetched.append(name)
        assert name != "r0" or arrived.wait(10)
        return fetch(self, name, version)

    for name in ("r0", "r1"):
        await registry._admitted(f"smol:{pinned(store, name)}")  # then the disk's cache evicts it
    monkeypatch.setattr(Store, "fetch", slow)
    waiting = [asyncio.create_task(ask(registry, store, "r0")) for _ in range(40)]
    await asyncio.sleep(0.05)
    await ask(registry, store, "r1")
    assert not any(task.done() for task in waiting)
    assert fetched.count("r0") == 1, "those who wait for the same files wait for one thread"
    arrived.set()
    await asyncio.gather(*waiting)
    assert engine.resident == {"r0", "r1"}


async def test_what_the_worker_finds_wrong_keeps_its_kind_and_can_be_repaired(start: Started, store: Store) -> None:
    engine, registry = start()
    path = store.path("r0", 1) / TENSORS_FILE
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    for _ in range(2):
        with pytest.raises(ArtifactDamagedError, match="sha256"):
            await ask(registry, store, "r0+r1")
        assert "r0" not in engine.resident
        assert not registry.seats.bytes
    path.write_bytes(whole)
    await ask(registry, store, "r0+r1")
    assert engine.resident == {"r0", "r1"}


async def test_what_is_removed_before_it_is_loaded_is_unknown_and_not_damaged(start: Started, store: Store) -> None:
    engine, registry = start()
    await ask(registry, store, "r0")
    model = f"smol:{pinned(store, 'r1')}"
    await ask(registry, store, "r1")  # admitted
    await ask(registry, store, "r2")
    await ask(registry, store, "r0")
    assert "r1" not in engine.resident
    shutil.rmtree(store.path("r1", 1))
    with pytest.raises(UnknownAbilityError, match="'r1' version 1 is not here any more"):
        async with registry.hold(model):
            pass


async def test_a_request_that_gives_up_leaves_no_memory_taken(start: Started, store: Store) -> None:
    engine, registry = start()
    gone = asyncio.create_task(ask(registry, store, "r0"))
    await asyncio.sleep(0.08)  # the second question is on its way, which makes r0 resident
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    for name in ("r1", "r2"):
        await ask(registry, store, name)
    assert engine.resident == {"r1", "r2"}


async def test_loads_that_nobody_waits_for_any_more_are_not_begun(start: Started, store: Store) -> None:
    engine, _ = start()
    manager, begun, go = engine.ability_manager, list[str](), threading.Event()
    prepare = manager._prepare

    def slow(key: AbilityKey) -> Any:
        begun.append(key.name)
        go.wait(10)
        return prepare(key)

    manager._prepare = slow  # type: ignore[method-assign]
    keys = [AbilityKey.of(pinned(store, name).abilities[0]) for name in ("r0", "r1", "r2")]
    assert not manager.load(keys[:1])
    while not begun:
        await asyncio.sleep(0.01)
    assert not manager.load(keys[1:2])
    assert not manager.load(keys[2:])
    go.set()
    while not manager.load(keys[2:]):
        await asyncio.sleep(0.01)
    assert begun == ["r0", "r2"]
    assert engine.resident == {"r2"}


async def test_requests_that_do_not_exist_use_no_ability_though_they_have_the_ids_of_others(
    start: Started, store: Store
) -> None:
    engine, registry = start()
    await ask(registry, store, "r0")
    real = adapter_request("smol", pinned(store, "r0"), 1, store)
    made_up = LoRARequest("warmup_1", 1, "/not/a/real/path")
    before = engine.step(real)
    assert before.any()
    assert not engine.step(made_up).any()
    assert torch.equal(engine.step(real), before)


async def test_pinned_abilities_are_loaded_ahead_as_far_as_there_is_room(start: Started, store: Store) -> None:
    engine, registry = start()
    for name in ("r0", "r1", "r2"):
        pin(store, name, True)
    await registry.load_pinned()
    assert engine.resident == {"r0", "r1"}
    calls = len(engine.calls)
    await registry.load_pinned()
    await ask(registry, store, "r0")
    assert len(engine.calls) == calls
    pin(store, "r0", False)
    await registry.load_pinned()
    assert engine.resident == {"r1", "r2"}


async def test_a_damaged_pinned_ability_is_left_out(start: Started, store: Store) -> None:
    path = store.path("r0", 1) / TENSORS_FILE
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    pin(store, "r0", True)
    pin(store, "r1", True)
    engine, registry = start()
    await registry.load_pinned()
    assert engine.resident == {"r1"}


@pytest.mark.parametrize("wrong", ["damaged manifest", "active version gone"])
async def test_one_pinned_ability_that_is_wrong_keeps_no_other_out(
    start: Started, store: Store, tiny_llama: Path, wrong: str
) -> None:
    publish_random(store, tiny_llama, "r0", seed=9, version=2)
    activate(store, "r0", 2)
    for name in ("r0", "r1"):
        pin(store, name, True)
    if wrong == "damaged manifest":
        (store.path("r0", 2) / MANIFEST_FILE).write_text("{}")
    else:
        shutil.rmtree(store.path("r0", 2))
    engine, registry = start()
    await registry.load_pinned()
    assert engine.resident == {"r1"}


async def test_what_is_pinned_stays_while_the_store_can_not_be_read(
    start: Started, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("r0", "r1"):
        pin(store, name, True)
    engine, registry = start()
    await registry.load_pinned()
    manifest = Store.manifest

    def failing(self: Store, name: str, version: int | None = None) -> Manifest:
        if name == "r0":
            raise StoreError("away for a moment")
        return manifest(self, name, version)

    with monkeypatch.context() as broken:
        broken.setattr(Store, "manifest", failing)
        await registry.load_pinned()
    with pytest.raises(RequestError, match="for 2 pinned ones"):
        await ask(registry, store, "r2")
    assert engine.resident == {"r0", "r1"}


async def test_a_pinned_ability_is_tried_again_where_the_store_failed(
    start: Started, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch, failures = Store.fetch, [StoreError("away for a moment"), OSError(28, "No space left on device")]

    def failing(self: Store, name: str, version: int) -> Path:
        if name == "r0" and failures:
            raise failures.pop(0)
        return fetch(self, name, version)

    for name in ("r0", "r1"):
        pin(store, name, True)
    monkeypatch.setattr(Store, "fetch", failing)
    engine, registry = start()
    for resident in ({"r1"}, {"r1"}, {"r1"}):  # what nobody expects is not tried again, and ends nothing
        await registry.load_pinned()
        assert engine.resident == resident
    failures.append(StoreError("away for a moment"))
    engine, registry = start()
    for resident in ({"r1"}, {"r0", "r1"}):
        await registry.load_pinned()
        assert engine.resident == resident


def test_the_loading_thread_takes_none_of_the_step_threads() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert _one_thread().submit(torch.get_num_threads).result() == 1
        assert torch.get_num_threads() == 2
        with ThreadPoolExecutor(1) as later:
            assert later.submit(torch.get_num_threads).result() == 2
    finally:
        torch.set_num_threads(before)


def _cores_of_the_loading_thread(core: int) -> set[int]:
    os.sched_setaffinity(0, {core})  # as vLLM does with a worker on a CPU
    return _one_thread().submit(os.sched_getaffinity, 0).result()


def test_the_loading_thread_leaves_the_cores_of_the_steps_alone() -> None:
    cores = os.sched_getaffinity(0)
    if len(cores) < 2:
        pytest.skip("there is one core")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as worker:
        assert worker.submit(_cores_of_the_loading_thread, min(cores)).result() == cores - {min(cores)}


def test_a_loaded_row_of_each_stored_ability_is_the_stored_one(start: Started, store: Store) -> None:
    from act_serve.delta.artifact import read_artifact

    engine, _ = start()
    manifest, modules = read_artifact(store.path("r0", 1))
    key = AbilityKey("r0", 1, manifest.digest)
    while not engine.ability_manager.load([key]):
        pass
    residents = engine.ability_manager._residents
    for layer, plan in zip(residents._layers, residents._plans, strict=True):
        rows, module = layer.resident[key], modules[plan.parts[0].module]
        assert torch.equal(rows.rows_N, module.rows)
        assert torch.equal(rows.delta_NI, module.delta.float())
