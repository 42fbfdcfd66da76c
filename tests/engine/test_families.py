"""Fused layers, biases and tensor parallelism: every row lands where the merged checkpoint has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from act_serve.abilities.store import Store
from act_serve.engine.resolver import adapter_request
from tests.abilities_for_tests import merged_model, pinned, publish_random
from tests.engine.conftest import running_engine
from tests.tiny_models import make_tokenizer

pytestmark = pytest.mark.slow

SHAPE: dict[str, Any] = {
    "vocab_size": 259, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 512, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip


def make(folder: Path, family: str, kv_heads: int) -> Path:
    """A random checkpoint with heads of 32, the smallest that vLLM's CPU attention takes, and non-zero biases."""
    torch.manual_seed(0)
    if family == "llama":
        model: Any = LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=kv_heads))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**SHAPE, num_key_value_heads=kv_heads))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.2)
    model.to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("family", "kv_heads", "workers", "eager"),
    [("qwen2", 2, 1, True), ("llama", 2, 1, False), ("llama", 2, 2, True), ("qwen2", 1, 2, True)],
    ids=["biases", "compiled", "two workers", "two workers with one kv head and biases"],
)
def test_mixed_batch_equals_the_merged_checkpoints(
    family: str, kv_heads: int, workers: int, eager: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm import SamplingParams

    if workers > 1:
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "|".join(map(str, range(workers))))
    base = make(tmp_path / "base", family, kv_heads)
    store = Store(tmp_path / "store")
    for seed in (1, 2):
        publish_random(store, base, f"r{seed}", seed=seed, share=0.1, scale=0.1)
    texts = ["", "r1", "r2", "r1*0.5+r2*-1.5"]
    prompts = [[5 + i, 9, 30 + i, 77] for i in range(4)]
    jobs = [(text, prompt) for prompt in prompts for text in texts]
    params = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
    options = {"tensor_parallel_size": workers, "enforce_eager": eager, "max_model_len": 256}
    with running_engine(base, store, dtype="float32", **options) as llm:
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for _, prompt in jobs],
            params,
            lora_request=[
                adapter_request("base", pinned(store, text), texts.index(text), store) if text else None
                for text, _ in jobs
            ],
            use_tqdm=False,
        )
    answers = set()
    for text in texts:
        model = merged_model(base, store, text)
        for (job, prompt), output in zip(jobs, outputs, strict=True):
            if job == text:
                tokens = list(output.outputs[0].token_ids)
                with torch.inference_mode():
                    logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
                assert logits.argmax(-1).tolist() == tokens, text
                answers.add(tuple(tokens))
    assert len(answers) > len(prompts)
