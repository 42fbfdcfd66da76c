"""Fused layers, biases, tensor and pipeline parallelism: every row lands where the merged checkpoint has it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from vllm.lora.request import LoRARequest

from act_serve.abilities.store import Store
from tests.abilities_for_tests import merged_model, publish_random
from tests.engine.conftest import running_engine
from tests.engine.mixed_batch import Answer, check_answers, serve_mixed
from tests.tiny_models import make_tokenizer

pytestmark = pytest.mark.slow

SHAPE: dict[str, Any] = {
    "vocab_size": 259, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 512, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip


def make(folder: Path, family: str, kv_heads: int) -> Path:
    """A random checkpoint with heads of 32, the smallest that vLLM's CPU attention takes, and non-zero biases.

    Qwen2 has them on q, k and v, the biased Llama on all seven projections.
    """
    torch.manual_seed(0)
    if family == "qwen2":
        model: Any = Qwen2ForCausalLM(Qwen2Config(**SHAPE, num_key_value_heads=kv_heads))
    else:
        biased = family == "biased llama"
        config = LlamaConfig(**SHAPE, num_key_value_heads=kv_heads, attention_bias=biased, mlp_bias=biased)
        model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    model.to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def _compiled(worker: Any) -> bool:
    """Whether vLLM's worker runs a compiled model."""
    return bool(getattr(worker.get_model().model, "compiled", False))


def _count_calls(worker: Any) -> int:
    """How often compiled code has called the operator that adds rows on vLLM's worker since the last question."""
    from act_serve.engine import layers

    if not hasattr(worker, "calls"):
        worker.calls, call = 0, layers._OPERATOR._op

        def counted(*args: Any) -> None:
            worker.calls += 1
            call(*args)

        layers._OPERATOR._op = counted
    calls, worker.calls = worker.calls, 0
    return int(calls)


@pytest.mark.parametrize(
    ("family", "kv_heads", "options"),
    [
        ("qwen2", 2, {}),
        ("llama", 2, {"enforce_eager": False}),
        ("llama", 2, {"model_impl": "transformers"}),
        ("biased llama", 2, {"tensor_parallel_size": 2}),
        ("biased llama", 2, {"tensor_parallel_size": 2, "enforce_eager": False}),
        ("qwen2", 1, {"tensor_parallel_size": 2}),
        ("biased llama", 2, {"pipeline_parallel_size": 2}),
    ],
    ids=[
        "biases",
        "compiled",
        "transformers' own model",
        "two workers and biases",
        "two compiled workers and biases",
        "two workers with one kv head and biases",
        "two stages",
    ],
)
def test_mixed_batch_equals_the_merged_checkpoints(
    family: str, kv_heads: int, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if options.keys() & {"tensor_parallel_size", "pipeline_parallel_size"}:
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    base = make(tmp_path / "base", family, kv_heads)
    store = Store(tmp_path / "store")
    for seed in (1, 2):
        # Norms of transformers' own models are no vLLM layers.
        kinds = ["lm_head", "embedding"] if "model_impl" in options else []
        publish_random(store, base, f"r{seed}", seed=seed, share=0.1, scale=0.1, outside=kinds)
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # for the question below
    compiles = not options.get("enforce_eager", True)
    with running_engine(base, store, dtype="float32", max_model_len=256, **options) as llm:
        # What every worker refuses must leave no answer behind that vLLM would take for one to its next call.
        with pytest.raises(Exception, match="is not the ability store this engine was started with"):
            llm.llm_engine.add_lora(LoRARequest("smol:r1@1~000000000000", 999, "/nowhere"))
        answers = serve_mixed(llm, store)
        compiled = llm.collective_rpc(_compiled)
        if compiles:
            # Steps without abilities must run code that has nothing of them in it.
            answers += serve_in_turn(llm, store, [([""], False), (["", "r1"], True), ([""], False)])
    assert set(compiled) == {compiles}
    check_answers(answers, lambda text: merged_model(base, store, text))


def serve_in_turn(llm: Any, store: Store, turns: Sequence[tuple[list[str], bool]]) -> list[Answer]:
    """Serves batches one after the other and checks of each whether its steps ran the code that has rows' operators."""
    llm.collective_rpc(_count_calls)
    answers = []
    for compositions, called in turns:
        answers += serve_mixed(llm, store, compositions)
        assert {bool(calls) for calls in llm.collective_rpc(_count_calls)} == {called}, compositions
    return answers
