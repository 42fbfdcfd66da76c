"""Stock vLLM, with none of this project in it, serves the exported LoRA with the merged model's tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from act_serve.abilities.store import Store
from act_serve.pipeline.compose import artifacts_of, compose
from act_serve.pipeline.export_peft import export_peft
from act_serve.pipeline.publish import channel_counts
from tests.abilities_for_tests import merged_model, publish_random
from tests.tiny_models import make_llama

pytestmark = pytest.mark.slow

PROMPT, TOKENS = [5, 80, 140, 31, 9, 200], 16


def test_tokens_equal_the_merged_model_s(engine: Callable[..., Any], tmp_path: Path) -> None:
    import torch
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    base, store = make_llama(tmp_path / "base", hidden=128), Store(tmp_path / "store")
    publish_random(store, base, "one", seed=1, share=0.06, scale=0.3)
    publish_random(store, base, "two", seed=2, share=0.03, scale=0.3)
    deltas = compose(artifacts_of("one*0.5+two", store.root), base)
    export_peft(base=str(base), deltas=deltas, channels=channel_counts(base), folder=tmp_path / "lora")
    expected = [
        merged_model(base, store, text)
        .generate(torch.tensor([PROMPT]), max_new_tokens=TOKENS, do_sample=False)[0, len(PROMPT) :]
        .tolist()
        for text in ("one*0.5+two", "")
    ]
    assert expected[0] != expected[1]
    settings = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
    options = {"dtype": "float32", "max_model_len": 64, "max_num_seqs": 2, "enable_lora": True, "max_lora_rank": 32}
    with engine(base, **options) as llm:
        for adapter, tokens in zip((LoRARequest("lora", 1, str(tmp_path / "lora")), None), expected, strict=True):
            prompt = [{"prompt_token_ids": PROMPT}]
            done = llm.generate(prompt, settings, lora_request=adapter, use_tqdm=False)
            assert list(done[0].outputs[0].token_ids) == tokens
