"""What the worker makes of vLLM's settings before it loads a model."""

from __future__ import annotations

from dataclasses import astuple
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from vllm.config import CUDAGraphMode, VllmConfig

from act_serve.engine.ability_key import AbilityKey
from act_serve.engine.batch import BatchTable
from act_serve.engine.graph_limits import GraphLimits
from act_serve.engine.graph_tables import GraphDeltaLayer, GraphTables
from act_serve.engine.worker import AbilityWorker, check_whole_steps, mark_compiled_model
from act_serve.errors import EngineError
from act_serve.kernels.torch_impl import add_rows_torch


def with_graphs(tokens: int, max_num_seqs: int) -> VllmConfig:
    config = VllmConfig()
    config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    config.compilation_config.max_cudagraph_capture_size = tokens
    config.scheduler_config.max_num_seqs = max_num_seqs
    return config


@pytest.mark.parametrize(("tokens", "max_num_seqs", "abilities"), [(512, 64, 512), (8, 64, 512)])
def test_the_tables_have_room_for_the_abilities_of_every_step(tokens: int, max_num_seqs: int, abilities: int) -> None:
    limits = GraphLimits.of(with_graphs(tokens, max_num_seqs), 8)
    assert limits is not None
    assert (limits.tokens, limits.abilities) == (tokens, abilities)


def test_without_graphs_there_are_no_limits() -> None:
    config = VllmConfig()
    assert config.compilation_config.cudagraph_mode == CUDAGraphMode.NONE  # as vLLM has it on CPUs
    assert GraphLimits.of(config, 8) is None
    with pytest.raises(EngineError, match="must be at least 1"):
        GraphLimits.of(with_graphs(8, 8), 0)


def test_a_kernel_that_reads_the_step_on_the_host_is_refused_in_graphs() -> None:
    tables = GraphTables(GraphLimits(8, 8, 2))
    with pytest.raises(EngineError, match="only with the Triton kernel"):
        GraphDeltaLayer("layer", BatchTable(), add_rows_torch, tables)


@pytest.mark.parametrize(
    "option", ["enable_dbo", "prefill_context_parallel_size", "kv_sharing_fast_prefill", "data_parallel_size"]
)
def test_what_splits_a_steps_tokens_is_refused(option: str) -> None:
    config = VllmConfig()
    check_whole_steps(config)
    section = config.cache_config if option == "kv_sharing_fast_prefill" else config.parallel_config
    setattr(section, option, 2 if option.endswith("size") else True)
    with pytest.raises(EngineError, match="abilities do not run with"):
        check_whole_steps(config)


def test_compiled_models_are_kept_apart_from_those_of_other_workers() -> None:
    config, other = VllmConfig(), VllmConfig()
    assert config.compute_hash() == other.compute_hash()
    config.additional_config = {"act_serve": {"store": "s"}, "another": 1}
    other.additional_config = dict(config.additional_config)
    assert mark_compiled_model(config) == {"store": "s"}
    assert config.compute_hash() != other.compute_hash()
    assert config.additional_config["another"] == 1
    assert config.additional_config["act_serve"]["store"] == "s"
    with_rows = config.compute_hash()
    mark_compiled_model(config, "without rows")
    assert config.compute_hash() not in (with_rows, other.compute_hash())
    mark_compiled_model(config)
    assert config.compute_hash() == with_rows


def test_whatever_a_load_raises_is_the_request_s_error() -> None:
    """An exception would end the engine, or leave the other workers' answers unread."""
    evicted: list[AbilityKey] = []

    def load(_keys: list[AbilityKey]) -> bool:
        raise torch.OutOfMemoryError("CUDA out of memory")

    here = AbilityKey("here", 1, "0" * 64)
    manager = SimpleNamespace(evict=evicted.append, load=load, resident=lambda: [here])
    worker = cast(AbilityWorker, SimpleNamespace(ability_manager=manager))
    new, old = ("new", 2, "1" * 64), ("old", 1, "2" * 64)
    ready, error, message, resident = AbilityWorker.load_abilities(worker, [new], [old])
    assert not ready
    assert error == "EngineError"
    assert message == "new@2 could not be loaded: OutOfMemoryError: CUDA out of memory"
    assert resident == [astuple(here)]
    assert evicted == [AbilityKey(*old)]


def test_steps_longer_than_any_graph_take_the_same_rows_and_a_table_of_their_own() -> None:
    batch, tables = BatchTable(), GraphTables(GraphLimits(tokens=2, requests=4, abilities_per_request=2))
    tables.serve(torch.device("cpu"), [], [])
    keys = [AbilityKey(f"r{number}", 1, "0" * 64) for number in range(8)]
    batch.fill([1, 2, 3, 4], {i: {keys[2 * i - 2]: 1.0, keys[2 * i - 1]: 0.5} for i in (1, 2, 3, 4)})
    tables.prepare(batch)
    assert (tables.long_step.tokens, tables.long_step.uses_per_token) == (4, 2)
    assert tables.long_step.blocks_1.item() == 8
    assert tables.step.blocks_1.item() == 0
    batch.fill([1, 0], {1: {keys[0]: 1.0}})
    tables.prepare(batch)
    assert tables.step.blocks_1.item() == 1


def test_only_steps_with_adapters_have_layers_launch_their_kernels() -> None:
    """Layers do nothing where a step has no weights; the made-up adapters of a capture give it some, of no token."""
    batch = BatchTable()
    tables = GraphTables(GraphLimits(8, 8, 2))
    tables.serve(torch.device("cpu"), [], [])
    tables.prepare(batch)
    assert batch.weights is None
    tables.prepare_made_up(batch)
    assert batch.weights is not None
    assert not batch.weights.weight_TA.size
