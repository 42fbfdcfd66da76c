"""What vLLM's model runner asks of its ``lora_manager``, answered with compositions of resident abilities.

The names of the methods are vLLM's (vllm/lora/worker_manager.py): an "adapter" there is a composition here, and
costs nothing but an entry in a table; only abilities take memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import parent_process
from typing import Any

import torch
from vllm.config import CompilationMode
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest

from act_serve.abilities.store import Store
from act_serve.delta.artifact import ReadBuffer, read_artifact
from act_serve.delta.channels import Kind
from act_serve.delta.composition import Composition
from act_serve.delta.fingerprint import check_base
from act_serve.delta.fit import ModuleShape, check_modules
from act_serve.delta.manifest import ModelFingerprint
from act_serve.engine.ability_key import AbilityKey
from act_serve.engine.batch import BatchTable, StepCode
from act_serve.engine.compiled_model import CompiledModel
from act_serve.engine.graph_limits import GraphLimits, check_count
from act_serve.engine.graph_tables import GraphDeltaLayer, GraphTables
from act_serve.engine.layers import DeltaLayer, attach
from act_serve.engine.plan import Part, kinds_left_out, plan_layers, whole_modules
from act_serve.engine.residents import PreparedAbility, ResidentAbilities
from act_serve.errors import ArtifactDamagedError, EngineError
from act_serve.home import cache_home
from act_serve.kernels.dispatch import choose_add_rows

logger = init_logger("vllm.act_serve")

# About what an ability of 10 MB takes, and less than a step of a loaded engine.
_CPU_PATIENCE_S = 0.04
# Of requests that do not exist, in vLLM's warm-up and in steps of engines that have none while others do
# (vllm/v1/worker/lora_model_runner_mixin.py); their ids may be those of real ones.
_WARM_UP_PATH = "/not/a/real/path"
# Channels that no CUDA graph changes, and those that no compiled code does.
_OUTSIDE_GRAPHS, _UNCOMPILED = frozenset[Kind]({"norms", "embedding"}), frozenset[Kind]({"norms"})


@dataclass(frozen=True, slots=True)
class _Resolved:
    """A composition whose abilities' content is known: weights by ability."""

    name: str
    weights: dict[AbilityKey, float]


def _one_thread() -> ThreadPoolExecutor:
    """An executor whose thread competes with the running step as little as can be: it has none of torch's helpers."""
    threads = torch.get_num_threads()
    loader = ThreadPoolExecutor(1, "ability-loader")
    # torch keeps the number per thread. A thread gets the one that was set last when it first asks, so asking comes
    # first here, and the last one set is the one that was.
    loader.submit(torch.get_num_threads).result()
    loader.submit(torch.set_num_threads, 1).result()
    torch.set_num_threads(threads)
    # On CPUs vLLM binds this process to the cores that steps compute on, but not the process that started it
    # (vllm/utils/ompmultiprocessing.py): the other cores are its scheduler's, which has time to spare.
    parent = parent_process()
    alone = not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1  # else they are others'
    if alone and parent is not None and parent.pid is not None and hasattr(os, "sched_setaffinity"):
        others = os.sched_getaffinity(parent.pid) - os.sched_getaffinity(0)
        if others:
            loader.submit(os.sched_setaffinity, 0, others).result()
    return loader


class AbilityManager:
    """Turns vLLM's adapter calls into loaded abilities and the step's :class:`BatchTable`.

    Args:
        fingerprint: of the served base checkpoint; every artifact must have been built for it.
        store: the only place that abilities are read from; None is none.
        max_resident_bytes: budget for resident abilities.
        gather: takes the modules' parts on this worker, and returns those on every worker.
        graph_limits: where steps run inside CUDA graphs, how large such a step may be.

    Attributes:
        max_resident_bytes: as given.
        modules: the checkpoint modules that deltas may change, with their whole shapes, whichever worker has them.
        batch: the step's table.
        compiled_model: where vLLM compiles the model, which code the steps run.
    """

    def __init__(
        self,
        fingerprint: ModelFingerprint,
        store: Store | None,
        max_resident_bytes: int,
        gather: Callable[[list[Part]], list[list[Part]]] = lambda mine: [mine],
        graph_limits: GraphLimits | None = None,
    ) -> None:
        self._fingerprint, self._gather, self._store = fingerprint, gather, store
        self._graph_limits, self._graphs = graph_limits, None if graph_limits is None else GraphTables(graph_limits)
        self.max_resident_bytes = max_resident_bytes
        self.batch = BatchTable()
        self.compiled_model: CompiledModel | None = None
        self._compositions: dict[int, _Resolved] = {}
        self._removed: set[int] = set()  # ids of compositions that vLLM has forgotten; it never gives one again
        self._last_mapping: tuple[tuple[int, ...], tuple[int, ...]] | None = None
        self._loader, self._read_buffer = _one_thread(), ReadBuffer()
        self._loading: dict[AbilityKey, Future[PreparedAbility]] = {}
        self._patience_s, self._loaded = 0.0, False
        self.modules: dict[str, ModuleShape] = {}
        self._residents: ResidentAbilities

    # -- what act-serve asks ---------------------------------------------------------------------------------------

    def load(self, keys: Iterable[AbilityKey]) -> bool:
        """Reads, checks and converts abilities in a thread, while steps go on; makes them resident once all are ready.

        On a CPU the call that starts this waits a little: a step would share its cores with the thread, so that small
        abilities would be ready no sooner than after two steps, both longer by as much as is waited here.

        What was begun for others and never taken is dropped, so that requests that gave up hold no memory.

        Returns:
            whether all are resident; ask again until they are.

        Raises:
            ActServeError: an artifact is missing, damaged, does not fit, or has another content than was asked for.
        """
        keys = list(keys)
        started = {key: self._loading.get(key) for key in keys if key not in self._residents}
        for key in self._loading.keys() - started.keys():
            self._loading[key].cancel()  # what has not begun keeps nobody waiting
        self._loading = {key: future or self._loader.submit(self._prepare, key) for key, future in started.items()}
        if not all(started.values()):
            wait(self._loading.values(), self._patience_s)
        if not all(future.done() for future in self._loading.values()):
            return False
        ready, self._loading = self._loading, {}
        prepared = {key: future.result() for key, future in ready.items()}
        for key, ability in prepared.items():
            # Who asks keeps the budget and says what leaves (engine/seats.py); no step has used these yet, so that
            # they would look idle here.
            self._residents.install(key, ability, over_budget=True)
        self._loaded = self._loaded or bool(prepared)
        return True

    def evict(self, key: AbilityKey) -> None:
        """Forgets an ability and every composition with it; nothing in flight may use it."""
        begun = self._loading.pop(key, None)
        if begun is not None:
            begun.cancel()
        for adapter_id in [i for i, resolved in self._compositions.items() if key in resolved.weights]:
            del self._compositions[adapter_id]
        self._last_mapping = None
        if key in self._residents:
            self._forget_step()
            self._residents.evict(key)

    def resident(self) -> list[AbilityKey]:
        """All resident abilities."""
        return list(self._residents)

    # -- what vLLM asks --------------------------------------------------------------------------------------------

    def create_lora_manager(self, model: torch.nn.Module, vllm_config: Any = None) -> torch.nn.Module:
        """Puts a delta layer behind every layer of the model that abilities can change, and returns the model.

        Raises:
            EngineError: rows of a module are on no worker, or the kernel does not run inside CUDA graphs as it must.
        """
        plans = plan_layers(model, () if vllm_config is None else kinds_left_out(vllm_config))
        mode = CompilationMode.NONE if vllm_config is None else vllm_config.compilation_config.mode
        if mode not in (CompilationMode.NONE, CompilationMode.STOCK_TORCH_COMPILE):
            self.compiled_model = CompiledModel(model)
            self.batch.choose = self.compiled_model.choose
        device = next(model.parameters()).device
        dtypes = {plan.dtype for plan in plans}
        kernels = {dtype: choose_add_rows(device, dtype, cache_home() / "kernels") for dtype in dtypes}
        make_linear: Callable[..., Any] = DeltaLayer
        if self._graphs is not None:
            make_linear = partial(GraphDeltaLayer, tables=self._graphs)
        layers: list[Any] = [attach(plan, self.batch, kernels[plan.dtype], make_linear) for plan in plans]
        parts = [part for plan in plans for part in plan.parts]
        self.modules = whole_modules(self._gather(parts))
        if self._graphs is not None:
            inside = [pair for pair in zip(plans, layers, strict=True) if pair[0].kind == "linear"]
            self._graphs.serve(device, [layer for _, layer in inside], [plan.out_features for plan, _ in inside])
        other_stages = self.modules.keys() - {part.module for part in parts}
        self._residents = ResidentAbilities(plans, layers, device, self.max_resident_bytes, other_stages)
        self._patience_s = _CPU_PATIENCE_S if device.type == "cpu" else 0.0
        return model

    def add_adapter(self, request: LoRARequest) -> bool:
        """Makes a composition's abilities resident; False when all was there already.

        Raises:
            ActServeError: an artifact is missing, damaged, does not fit, or has another content than was asked for.
        """
        known = self._known(request)
        resolved = known or self._resolve(request)
        self._last_mapping = None  # also where the load is refused: what has left by then, a step may still need
        loaded = self._load(resolved, in_use=self._in_use() | resolved.weights.keys())
        self._compositions[request.lora_int_id] = resolved
        return loaded or known is None

    def leave_graphs(self, requests: Iterable[LoRARequest]) -> bool:
        """Whether a step with these compositions must run outside CUDA graphs; makes them resident.

        Raises:
            ActServeError: as :meth:`add_adapter`.
        """
        requests = list(requests)
        self._meet(request for request in requests if self._known(request) is None)
        keys = self._load_all(self._compositions[request.lora_int_id] for request in requests)
        return self._residents.change(_OUTSIDE_GRAPHS, keys)

    def remove_adapter(self, adapter_id: int) -> bool:
        """Forgets a composition; its abilities stay until their memory is needed."""
        self._last_mapping = None
        self._removed.add(adapter_id)
        return self._compositions.pop(adapter_id, None) is not None

    def remove_all_adapters(self) -> None:
        """Forgets all compositions."""
        self._compositions.clear()
        self._forget_step()

    def list_adapters(self) -> set[int]:
        """Ids of the known compositions."""
        return set(self._compositions)

    def pin_adapter(self, adapter_id: int) -> bool:
        """Whether the composition is known; compositions need no pinning."""
        return adapter_id in self._compositions

    def set_active_adapters(self, requests: set[LoRARequest], mapping: Any) -> None:
        """Prepares the tables for the coming step.

        Args:
            requests: the compositions in the batch.
            mapping: vLLM's ``LoRAMapping``; ``index_mapping`` holds one adapter id per token, ``prompt_mapping`` one
                per position that a token is sampled from; 0 for the base.
        """
        self.batch.begin_step()
        if self._loaded:  # in the shadow of a step, and not in the way of the one that waited for the ability
            self._loader.submit(self._residents.prepare_memory)
            self._loaded = False
        if any(request.lora_path == _WARM_UP_PATH for request in requests):
            self.batch.clear()
            if self._graphs is not None:
                self._graphs.prepare_made_up(self.batch)
            self._last_mapping = None
            return
        unmet = [request for request in requests if self._known(request) is None]
        ids_T: tuple[int, ...] = mapping.index_mapping
        if (ids_T, mapping.prompt_mapping) == self._last_mapping:
            return
        self._meet(unmet)
        for adapter_id in (self._removed & self._compositions.keys()) - set(ids_T):  # the few first
            del self._compositions[adapter_id]
        active = {i: self._compositions[i] for i in set(ids_T) if i in self._compositions}
        unknown = set(ids_T) - active.keys() - {0}
        if unknown:
            raise EngineError(f"tokens name adapters that were never added: {sorted(unknown)}")
        self._fill(ids_T, active, mapping.prompt_mapping)
        if self._graphs is not None:
            self._graphs.prepare(self.batch)
        self._last_mapping = (ids_T, mapping.prompt_mapping)

    @contextmanager
    def dummy_lora_cache(self) -> Iterator[None]:
        """Nothing to cache: warm-up runs the base model."""
        yield

    def get_dummy_lora_warmup_rank(self, default_rank: int) -> int:
        """As given: there are no ranks here."""
        return default_rank

    def add_dummy_lora(self, request: LoRARequest, rank: int) -> bool:
        """Accepted and ignored."""
        return True

    def supports_tower_connector_lora(self) -> bool:
        """Abilities change the language model only."""
        return False

    # ---------------------------------------------------------------------------------------------------------------

    def _forget_step(self) -> None:
        """Empties the tables, and has the next step fill them again even where its tokens are the last one's."""
        self.batch.clear()
        if self._graphs is not None:
            self._graphs.reset()
        self._last_mapping = None

    def _known(self, request: LoRARequest) -> _Resolved | None:
        known = self._compositions.get(request.lora_int_id)
        if known is not None and known.name != request.lora_name:
            raise EngineError(f"adapter id {request.lora_int_id} names both {known.name} and {request.lora_name}")
        return known

    def _resolve(self, request: LoRARequest) -> _Resolved:
        if self._store is None or request.lora_path != str(self._store.root):
            raise EngineError(
                f"adapter {request.lora_name}: {request.lora_path} is not the ability store this engine was started "
                f"with ({self._store.root if self._store else 'none'}); abilities are only read from there"
            )
        composition = Composition.parse(request.lora_name.rpartition(":")[2])
        if not composition or not composition.pinned:
            raise EngineError(f"adapter {request.lora_name} does not pin the versions of its abilities")
        if self._graph_limits is not None:
            check_count(len(composition.abilities), self._graph_limits.abilities_per_request)
        return _Resolved(
            request.lora_name,
            {AbilityKey.of(a): a.weight for a in composition.abilities},
        )

    def _in_use(self) -> set[AbilityKey]:
        """Whatever a known composition needs stays: a step must never have to read a file.

        But for those that vLLM has forgotten, which a request may still run with: whether it does is not said.
        """
        known = (each for adapter_id, each in self._compositions.items() if adapter_id not in self._removed)
        return {key for each in known for key in each.weights}

    def _meet(self, requests: Iterable[LoRARequest]) -> None:
        for request in requests:
            self._compositions[request.lora_int_id] = self._resolve(request)

    def _load_all(self, compositions: Iterable[_Resolved]) -> set[AbilityKey]:
        """Says what a step needs, and makes resident what is not.

        All is, unless a request was still in a step after its client had left and its abilities were let go. Nothing
        leaves for these: others may wait for it that no step has met yet.
        """
        compositions = list(compositions)
        for resolved in compositions:
            self._load(resolved, over_budget=True)
        return {key for resolved in compositions for key in resolved.weights}

    def _load(self, resolved: _Resolved, in_use: Collection[AbilityKey] = (), over_budget: bool = False) -> bool:
        missing = [key for key in resolved.weights if key not in self._residents]
        for key in missing:
            started = self._loading.pop(key, None) or self._loader.submit(self._prepare, key)
            self._residents.install(key, started.result(), in_use, over_budget)
        return bool(missing)

    def _prepare(self, key: AbilityKey) -> PreparedAbility:
        """In the loader's thread only: what is read lies in its buffer until the rows are where they belong."""
        return self._residents.prepare(key, self._read(key))

    def _read(self, key: AbilityKey) -> Any:
        """The delta of a stored ability, checked against this model."""
        assert self._store is not None
        what = f"ability {key.name}@{key.version}"
        manifest, modules = read_artifact(self._store.fetch(key.name, key.version), what, self._read_buffer)
        if manifest.digest != key.digest or manifest.name != key.name:
            raise ArtifactDamagedError(f"{what} in the store is {manifest.name}~{manifest.digest}, not {key}")
        check_base(manifest.base_fingerprint, self._fingerprint, what=what)
        check_modules(manifest, self.modules, what=what)
        logger.info("Loaded %s: %d rows of %d modules", what, manifest.counts.channels, len(modules))
        return modules

    def _fill(self, ids_T: tuple[int, ...], active: dict[int, _Resolved], sampled_ids: tuple[int, ...]) -> None:
        if not active:
            self.batch.clear()
            return
        keys = self._load_all(active.values())
        self._residents.touch(keys)
        code = StepCode.UNCOMPILED if self._residents.change(_UNCOMPILED, keys) else StepCode.ROWS
        self.batch.fill(ids_T, {i: resolved.weights for i, resolved in active.items()}, sampled_ids, code)
