"""Which of a vLLM model's layers abilities may change, and where a checkpoint module's rows lie in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import CompilationMode, VllmConfig, set_current_vllm_config
from vllm.distributed.parallel_state import (
    destroy_distributed_environment,
    destroy_model_parallel,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.utils import set_weight_attrs

from act_serve.delta.fit import ModuleShape
from act_serve.engine.plan import kinds_left_out, plan_layers

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


class Model(torch.nn.Module):
    """What lies outside the linear modules, and norms that are not the checkpoint's or not plain."""

    def __init__(self, tokens: int = 100, added: int = 0) -> None:
        super().__init__()
        self.model = torch.nn.Module()
        self.model.embed_tokens = VocabParallelEmbedding(tokens + added, HIDDEN, org_num_embeddings=tokens)
        self.model.norm = RMSNorm(HIDDEN)
        self.model.k_norm = RMSNorm(HIDDEN, var_hidden_size=HEAD)
        self.model.q_norm = RMSNorm(HIDDEN, has_weight=False)
        self.model.input_layernorm = GemmaRMSNorm(HIDDEN)
        self.model.kv_a_layernorm = RMSNorm(HIDDEN)
        self.model.post_attention_layernorm = RMSNorm(HIDDEN)
        set_weight_attrs(self.model.post_attention_layernorm.weight, {"weight_loader": lambda *_: None})
        self.lm_head = ParallelLMHead(tokens, HIDDEN)
        self.logits_processor = LogitsProcessor(tokens)


def test_plain_norms_head_and_embedding_are_planned() -> None:
    plans = {plan.name: plan for plan in plan_layers(Model())}
    assert {name: (plan.kind, plan.parts[0].shape, plan.width) for name, plan in plans.items()} == {
        "model.embed_tokens": ("embedding", ModuleShape(HIDDEN, 100), 100),
        "model.norm": ("norms", ModuleShape(HIDDEN, 1), 1),
        "lm_head": ("lm_head", ModuleShape(100, HIDDEN), HIDDEN),
    }
    assert all(part.module == name and part.start == 0 for name, plan in plans.items() for part in plan.parts)


def test_head_and_embedding_are_left_out_where_their_product_or_lookup_is_another_s() -> None:
    assert [plan.name for plan in plan_layers(Model(), {"lm_head", "embedding"})] == ["model.norm"]
    other_dtype = Model()
    other_dtype.logits_processor.head_dtype = torch.float64
    assert "lm_head" not in {plan.name for plan in plan_layers(other_dtype)}
    assert "model.embed_tokens" not in {plan.name for plan in plan_layers(Model(added=4))}


def test_settings_under_which_layers_see_other_tokens_than_the_step_s_leave_their_kinds_out() -> None:
    config: Any = VllmConfig()
    assert not kinds_left_out(config)
    config.compilation_config.mode = CompilationMode.STOCK_TORCH_COMPILE
    config.parallel_config.enable_batch_sharded_sampling = True
    assert kinds_left_out(config) == {"norms", "lm_head"}
    config.model_config = SimpleNamespace(enable_prompt_embeds=True)
    assert kinds_left_out(config) == {"norms", "lm_head", "embedding"}
    drafting: Any = VllmConfig()
    drafting.speculative_config = SimpleNamespace()
    assert kinds_left_out(drafting) == {"lm_head", "embedding"}


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
