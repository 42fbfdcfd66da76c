"""Steps inside CUDA graphs, with vLLM's own code around them; `test_graphs.py` runs this file under the interpreter.

The graphs are simulated (tests/kernels/simulated_graph.py). What is vLLM's here: the layers, the made-up adapters of a
capture, the mapping of a step's tokens, and the choice of a step's graph, of both of its GPU model runners.
"""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import pytest
import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.config.lora import LoRAConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager
from vllm.v1.worker.gpu.lora_utils import (
    LoraState,
    create_lora_capture_hook,
    get_lora_capture_cases,
    get_num_active_loras_for_dispatch,
)
from vllm.v1.worker.gpu_input_batch import InputBatch
from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

from act_serve.abilities.store import Store
from act_serve.delta.fingerprint import fingerprint_model
from act_serve.engine import manager as manager_module
from act_serve.engine.ability_key import AbilityKey
from act_serve.engine.graph_limits import GraphLimits
from act_serve.engine.graph_tables import GraphDeltaLayer
from act_serve.engine.layers import DeltaLinearMethod
from act_serve.engine.manager import AbilityManager
from act_serve.engine.outside_graphs import StepsOutsideGraphs
from act_serve.engine.resolver import adapter_request
from act_serve.errors import EngineError, RequestError
from act_serve.kernels.reference import add_rows_reference
from act_serve.kernels.rows import ActiveRows, TokenWeights
from act_serve.kernels.triton_impl import TritonRows
from tests.abilities_for_tests import pinned, publish_random
from tests.kernels.simulated_graph import SimulatedGraph, capture
from tests.vllm_models import load_vllm_model

SIZES, MAX_SEQS, PER_REQUEST, ABILITIES = [1, 4, 12], 4, 2, 5
# Of each request in a step its composition and how many tokens it has.
Step = Sequence[tuple[str, int]]


class Seam(Protocol):
    """One of vLLM's two ways to tell the manager of a step and to choose its graph."""

    lora_config: LoRAConfig | None

    def maybe_remove_all_loras(self, lora_config: LoRAConfig | None) -> None: ...

    def maybe_select_dummy_loras(
        self, lora_config: LoRAConfig | None, num_scheduled_tokens: np.ndarray, *, num_active_loras: int
    ) -> AbstractContextManager[None]: ...

    def captures(self) -> Iterator[tuple[object, int, AbstractContextManager[None]]]:
        """Every graph, its padded tokens, and the context that its capture runs in."""
        ...

    def begin(self, step: Step, requests: Mapping[str, LoRARequest]) -> tuple[object, int]:
        """Tells the manager of a step; its graph, or None, and its padded tokens."""
        ...


def scheduler_output(step: Step, requests: Mapping[str, LoRARequest]) -> Any:
    """A step of new requests, as vLLM's scheduler names them."""
    names = [f"request{number}" for number in range(len(step))]
    return SimpleNamespace(
        finished_req_ids=set(),
        scheduled_new_reqs=[
            SimpleNamespace(req_id=name, lora_request=requests.get(text))
            for name, (text, _) in zip(names, step, strict=True)
        ],
        num_scheduled_tokens=dict(zip(names, (tokens for _, tokens in step), strict=True)),
    )


class _Runner(LoRAModelRunnerMixin):
    def __init__(self, config: VllmConfig, manager: AbilityManager) -> None:
        self.config, self.lora_config, self.lora_manager = config, config.lora_config, manager  # type: ignore[assignment]
        self.outside_graphs = StepsOutsideGraphs(self, manager.leave_graphs)


class SeamV1(_Runner):
    """vllm/v1/worker/gpu_model_runner.py: ``_warmup_and_capture``, ``_prepare_inputs``, and what they call."""

    def __init__(self, config: VllmConfig, manager: AbilityManager) -> None:
        super().__init__(config, manager)
        self.cudagraph_dispatcher = CudagraphDispatcher(config)
        self.cudagraph_dispatcher.initialize_cudagraph_keys(CUDAGraphMode.FULL)

    def captures(self) -> Iterator[tuple[object, int, AbstractContextManager[None]]]:
        for _, descriptors in self.cudagraph_dispatcher.get_capture_descs():
            for of in descriptors:
                scheduled = np.full(of.num_reqs, of.num_tokens // of.num_reqs, dtype=np.int32)
                scheduled[-1] += of.num_tokens % of.num_reqs
                sampled = np.ones(of.num_reqs, dtype=np.int32)
                yield (
                    of,
                    of.num_tokens,
                    self.maybe_dummy_run_with_lora(self.lora_config, scheduled, sampled, False, of.num_active_loras),
                )
        self.maybe_remove_all_loras(self.lora_config)

    def begin(self, step: Step, requests: Mapping[str, LoRARequest]) -> tuple[object, int]:
        adapters = [requests.get(text) for text, _ in step]
        ids = np.array([adapter.lora_int_id if adapter else 0 for adapter in adapters], dtype=np.int32)
        known = {adapter.lora_int_id: adapter for adapter in adapters if adapter}
        batch: Any = SimpleNamespace(request_lora_mapping=ids, num_reqs=len(step), lora_id_to_lora_request=known)
        batch.make_lora_inputs = lambda *counts: InputBatch.make_lora_inputs(batch, *counts)
        scheduled = np.array([tokens for _, tokens in step], dtype=np.int32)
        with self.outside_graphs.during(scheduler_output(step, requests)):
            self.set_active_loras(batch, scheduled)
            mode, of = self.cudagraph_dispatcher.dispatch(
                int(scheduled.sum()), has_lora=bool(known), num_active_loras=len(known)
            )
        return None if mode == CUDAGraphMode.NONE else of, of.num_tokens


class SeamV2(_Runner):
    """vllm/v1/worker/gpu/model_runner.py: ``capture_model``, ``execute_model``, and what they call."""

    def __init__(self, config: VllmConfig, manager: AbilityManager) -> None:
        super().__init__(config, manager)
        cases = get_lora_capture_cases(self.lora_config, config.compilation_config)
        cpu = torch.device("cpu")
        type(current_platform)._global_graph_pool = "there is one on GPUs"
        self.cudagraph_manager = CudaGraphManager(
            config, cpu, CUDAGraphMode.FULL, decode_query_len=1, lora_capture_cases=cases
        )
        self.state = LoraState(MAX_SEQS)

    def captures(self) -> Iterator[tuple[object, int, AbstractContextManager[None]]]:
        hook = create_lora_capture_hook(self.lora_config, self)
        with self.maybe_setup_dummy_loras(self.lora_config):
            for of in self.cudagraph_manager._capture_descs[CUDAGraphMode.FULL]:
                hook(of.num_active_loras, of.num_reqs, of.num_tokens)
                yield of, of.num_tokens, _nothing()
        self.cudagraph_manager._graphs_captured = True

    def begin(self, step: Step, requests: Mapping[str, LoRARequest]) -> tuple[object, int]:
        said = scheduler_output(step, requests)
        names = list(said.num_scheduled_tokens)
        for number, new in enumerate(said.scheduled_new_reqs):
            self.state.remove_request(new.req_id)
            self.state.add_request(new.req_id, number, new.lora_request)
        scheduled = np.array([tokens for _, tokens in step], dtype=np.int32)
        active = get_num_active_loras_for_dispatch(self.lora_config, self.state, names, False)
        with self.outside_graphs.during(said):
            of = self.cudagraph_manager.dispatch(len(step), int(scheduled.sum()), None, active)
            self._set_active_loras(*self.state.make_lora_inputs(names, np.arange(len(step)), scheduled))
        return None if of.cg_mode == CUDAGraphMode.NONE else of, of.num_tokens


class _nothing(AbstractContextManager[None]):
    def __exit__(self, *_: object) -> None:
        pass


class Model:
    """All delta layers of a vLLM model, over inputs and outputs that never move."""

    def __init__(self, model: torch.nn.Module) -> None:
        layers = [(layer, layer.quant_method) for layer in model.modules() if hasattr(layer, "quant_method")]
        self.layers = [
            (layer, method)
            for layer, method in layers
            if isinstance(method, DeltaLinearMethod) and isinstance(method.delta_layer, GraphDeltaLayer)
        ]  # all but lm_head, whose logits are computed outside the graphs
        tokens = SIZES[-1] + 5
        self.x = [torch.empty(tokens, layer.input_size) for layer, _ in self.layers]
        self.y = [torch.empty(tokens, layer.output_size) for layer, _ in self.layers]
        for (_, method), y_TO in zip(self.layers, self.y, strict=True):
            method.wrapped_apply = lambda _layer, x_TI, _bias, y_TO=y_TO: y_TO[: len(x_TI)]

    def forward(self, tokens: int) -> None:
        for (layer, method), x_TI in zip(self.layers, self.x, strict=True):
            method.apply(layer, x_TI[:tokens])


class Bench:
    """A manager as a worker makes it, behind one of the two seams, with a graph of every size captured."""

    def __init__(
        self, seam: Callable[[VllmConfig, AbilityManager], Seam], base: Path, store: Store, model: Any
    ) -> None:
        config = EngineArgs(model=str(base), dtype="float32", max_model_len=64).create_engine_config()
        config.scheduler_config.max_num_seqs = MAX_SEQS
        config.lora_config = LoRAConfig(max_lora_rank=8, max_loras=MAX_SEQS)
        compilation = config.compilation_config
        compilation.cudagraph_mode = CUDAGraphMode.FULL
        compilation.cudagraph_capture_sizes, compilation.max_cudagraph_capture_size = SIZES, SIZES[-1]
        limits = GraphLimits.of(config, PER_REQUEST)
        self.manager = AbilityManager(fingerprint_model(base), store, 1 << 30, graph_limits=limits)
        self.store, self.requests = store, dict[str, LoRARequest]()
        self.manager.create_lora_manager(model)
        self.model, self.seam = Model(model), seam(config, self.manager)
        self.graphs = dict[object, SimulatedGraph]()
        for of, tokens, context in self.seam.captures():
            with context, capture() as self.graphs[of]:
                self.model.forward(tokens)

    def step(self, step: Step) -> bool:
        """Runs a step as vLLM does, compares it with the reference, and says whether it ran in a graph."""
        for text, _ in step:
            if text and text not in self.requests:
                self.requests[text] = adapter_request(
                    "base", pinned(self.store, text), len(self.requests) + 1, self.store
                )
        of, padded = self.seam.begin(step, self.requests)
        tokens = sum(count for _, count in step)
        before = []
        for x_TI, y_TO in zip(self.model.x, self.model.y, strict=True):
            x_TI[:], y_TO[:] = torch.randn(x_TI.shape), torch.randn(y_TO.shape)
            x_TI[tokens:] = float("nan")
            before.append(y_TO.clone())
        if of is None:
            self.model.forward(padded)
        else:
            self.graphs[of].replay()
        for (_, method), x_TI, y_TO, expected in zip(
            self.model.layers, self.model.x, self.model.y, before, strict=True
        ):
            self._apply(method, x_TI, expected, step)
            assert torch.allclose(y_TO[:tokens], expected[:tokens], atol=1e-4)
            assert torch.equal(y_TO[tokens:], expected[tokens:]), "padding tokens"
        return of is not None

    def check_graphs_add_nothing(self) -> None:
        """Whichever graph ran now, the outputs would stay as they are."""
        before = [y_TO.clone() for y_TO in self.model.y]
        for graph in self.graphs.values():
            graph.replay()
        assert all(torch.equal(*pair) for pair in zip(self.model.y, before, strict=True))

    def _apply(self, method: DeltaLinearMethod, x_TI: torch.Tensor, y_TO: torch.Tensor, step: Step) -> None:
        start = 0
        for text, count in step:
            here = slice(start, start := start + count)
            if text:
                abilities = pinned(self.store, text).abilities
                rows = [method.delta_layer.resident[AbilityKey.of(ability)] for ability in abilities]
                weights = np.tile([ability.weight for ability in abilities], (count, 1))
                add_rows_reference(x_TI[here], y_TO[here], ActiveRows(rows), TokenWeights(weights))


@pytest.fixture(scope="module")
def store(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = Store(tmp_path_factory.mktemp("store"))
    for number in range(ABILITIES):
        publish_random(store, tiny_llama, f"r{number}", seed=number, share=[0.05, 0.3][number % 2], scale=0.1)
    publish_random(store, tiny_llama, "out", seed=ABILITIES, share=0.1, scale=0.1, outside=True)
    return store


@pytest.fixture
def triton_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager_module, "choose_add_rows", lambda *_: TritonRows())


@pytest.fixture(params=[SeamV1, SeamV2], ids=["v1", "v2"])
def bench(request: pytest.FixtureRequest, tiny_llama: Path, store: Store, tmp_path: Path, triton_on_cpu: None) -> Bench:
    return Bench(request.param, tiny_llama, store, load_vllm_model(tiny_llama, tmp_path / "meeting", "float32"))


def texts(rng: random.Random) -> list[str]:
    """A few compositions, of as many abilities as a request may name."""
    chosen = [rng.sample(range(ABILITIES), rng.randint(1, PER_REQUEST)) for _ in range(3)]
    return ["", *("+".join(f"r{number}*{rng.choice([1, 0.5, -1.5])}" for number in numbers) for numbers in chosen)]


def test_graphs_with_adapters_launch_everything_and_those_without_nothing(bench: Bench) -> None:
    launches = {of.num_active_loras: len(graph.launches) for of, graph in bench.graphs.items()}  # type: ignore[attr-defined]
    assert launches == {0: 0, MAX_SEQS + 1: 2 * len(bench.model.layers)}
    assert {of.num_tokens for of in bench.graphs} == set(SIZES)  # type: ignore[attr-defined]


def test_random_traffic_equals_the_reference(bench: Bench) -> None:
    rng = random.Random(1)
    signatures = {of: graph.signature for of, graph in bench.graphs.items()}
    in_graphs = []
    for number in range(24):
        if number % 6 == 0:  # other abilities; those that no composition has any more leave, as seats would have it
            for name in rng.sample(range(ABILITIES), 2):
                for ability in pinned(bench.store, f"r{name}").abilities:
                    bench.manager.evict(AbilityKey.of(ability))
            compositions = texts(rng)
        step = [(rng.choice(compositions), 1) for _ in range(rng.randint(1, MAX_SEQS))]
        if number % 3 == 1:  # a prompt beside them, which may be longer than any graph
            step[-1] = (rng.choice(compositions), rng.randint(1, SIZES[-1] + 1))
        if number % 8 == 7:
            step = [("", count) for _, count in step]
        in_graphs.append(bench.step(step))
    assert in_graphs.count(True) > 12
    assert in_graphs.count(False) > 0
    assert {of: graph.signature for of, graph in bench.graphs.items()} == signatures


@pytest.mark.parametrize("step", [[("", 1), ("", 2)], [("r1", SIZES[-1] + 1)]], ids=["of the base", "without a graph"])
def test_steps_that_graphs_with_adapters_do_not_run_leave_nothing_in_them(bench: Bench, step: Step) -> None:
    assert bench.step([("r0+r1", 3)])
    bench.step(step)
    bench.check_graphs_add_nothing()


def test_steps_that_change_norms_or_the_embedding_leave_the_graphs(bench: Bench) -> None:
    signatures = {of: graph.signature for of, graph in bench.graphs.items()}
    for text in ("r0", "out", "r1", "r0*0.5+out", "out", "r0"):
        assert bench.step([(text, 2), ("r1", 1), ("", 1)]) == ("out" not in text)
    assert {of: graph.signature for of, graph in bench.graphs.items()} == signatures


def test_steps_of_made_up_adapters_between_others_use_nothing(bench: Bench) -> None:
    """As an engine has that runs along with another one which has requests; their ids are those of real adapters."""
    for text in ("r0+r1", "out", "r0"):
        bench.step([(text, 2), ("r2", 1)])
        before = [y_TO.clone() for y_TO in bench.model.y]
        counts = np.array([2, 1], dtype=np.int32)
        with bench.seam.maybe_select_dummy_loras(bench.seam.lora_config, counts, num_active_loras=2):
            bench.model.forward(4)
            assert not bench.manager.batch.abilities
        assert all(torch.equal(*pair) for pair in zip(bench.model.y, before, strict=True))
        bench.check_graphs_add_nothing()


def test_what_was_evicted_is_gone_from_the_graphs_and_comes_back_where_it_is_now(bench: Bench) -> None:
    for text in ("r1", "r1", "r3", "r1"):
        assert bench.step([(text, 2), ("", 1)])
        (ability,) = pinned(bench.store, text).abilities
        key = AbilityKey.of(ability)
        rows = [weakref.ref(method.delta_layer.resident[key].delta_NI) for _, method in bench.model.layers]
        bench.manager.evict(key)
        assert not any(row() is not None for row in rows), "held by the tables"
        bench.check_graphs_add_nothing()


def test_buffers_that_lost_their_content_are_filled_again(bench: Bench) -> None:
    """vLLM forgets all adapters when weights come back after a sleep (``reset_lora_state``)."""
    tables = bench.manager._graphs
    assert tables is not None
    for text in ("r1+r2", "r1+r2", ""):
        bench.step([(text, 3)])
        tables.step._buffer.fill_(12345)
        tables._rows._address_ALC.fill_(12345)
        bench.seam.maybe_remove_all_loras(bench.seam.lora_config)
        bench.check_graphs_add_nothing()


def test_what_no_table_has_room_for_is_refused(bench: Bench) -> None:
    bench.step([("r0+r1", 1)])
    with pytest.raises(RequestError, match="at most 2"):
        bench.step([("r0+r1+r2", 1)])
    # Were one to come all the same, it would not be left out in silence.
    bench.manager.batch.weights = TokenWeights(np.ones((3, PER_REQUEST + 1)))
    with pytest.raises(EngineError, match="does not fit the tables of the CUDA graphs"):
        bench.manager._graphs.prepare(bench.manager.batch)  # type: ignore[union-attr]
