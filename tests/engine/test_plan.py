"""Which of a vLLM model's layers abilities may change, and where a checkpoint module's rows lie in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed.parallel_state import (
    destroy_distributed_environment,
    destroy_model_parallel,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from act_serve.engine.plan import plan_layers

HIDDEN, HEAD = 64, 16


class Router(ReplicatedLinear):
    """Multiplies without its quant_method, as vLLM's expert routers do on GPUs."""

    def forward(self, x: torch.Tensor) -> Any:
        return x @ self.weight.t()


class Block(torch.nn.Module):
    """One layer of each kind."""

    def __init__(self, fused: Mapping[str, Sequence[str]]) -> None:
        super().__init__()
        self.packed_modules_mapping = fused
        self.qkv_proj = QKVParallelLinear(HIDDEN, HEAD, 4, 2, bias=True)
        self.o_proj = RowParallelLinear(HIDDEN, HIDDEN, bias=False)
        self.gate = Router(HIDDEN, 8, bias=False)
        self.kv_b_proj = ColumnParallelLinear(HIDDEN, HIDDEN, bias=False)


@pytest.fixture(scope="module", autouse=True)
def one_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    meeting = Path(tmp_path_factory.mktemp("meeting")) / "point"
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{meeting}", 0, "gloo")
        initialize_model_parallel(1, 1)
        yield
        destroy_model_parallel()
        destroy_distributed_environment()


def test_only_layers_that_multiply_through_their_method_are_planned() -> None:
    plans = plan_layers(Block({"qkv_proj": ["q_proj", "k_proj", "v_proj"]}))
    assert [plan.name for plan in plans] == ["qkv_proj", "o_proj"]
    assert [(part.module, part.rows, part.start) for part in plans[0].parts] == [
        ("q_proj", range(64), 0),
        ("k_proj", range(32), 64),
        ("v_proj", range(32), 96),
    ]
    assert [part.shape.bias for plan in plans for part in plan.parts] == [True, True, True, False]


def test_a_layer_that_the_checkpoint_stores_in_other_parts_is_left_out() -> None:
    assert [plan.name for plan in plan_layers(Block({"qkv_proj": ["qkv_proj"]}))] == ["o_proj"]
