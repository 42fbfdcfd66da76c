"""From two checkpoints to served tokens: the planted ability is found, stored, and speaks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from act_serve.abilities.store import Store
from act_serve.delta.artifact import read_artifact
from act_serve.engine.resolver import adapter_request
from tests.abilities_for_tests import pinned
from tests.engine.conftest import running_engine
from tests.pipeline.test_run import build, profile_file
from tests.tiny_models import make_llama, plant

pytestmark = pytest.mark.slow
# Few rows: each changed row moves the activations of all channels behind it, which hides weaker planted ones.
P = 0.03125


def test_the_planted_ability_is_built_and_served(tmp_path: Path) -> None:
    from vllm import SamplingParams

    base = make_llama(tmp_path / "base", hidden=128)
    planted = plant(base, tmp_path / "source", p=P, scale=1.0)
    localize = {"p": P, "calibration_items": 5}
    folder, _ = build(tmp_path, profile_file(tmp_path, localize=localize, finetune={"steps": 0}))
    _, modules = read_artifact(folder)
    found = sum(len(set(rows) & set(modules[name].rows.tolist())) for name, rows in planted.items())
    assert found / sum(map(len, planted.values())) >= 0.95

    store = Store(tmp_path / "store")
    prompts = [[5 + i, 9, 30 + i, 77] for i in range(16)]
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    adapter = adapter_request("base", pinned(store, "demo"), 1, store)
    with running_engine(base, store, dtype="float32", max_model_len=256) as llm:
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts for _ in range(2)]
        outputs = llm.generate(inputs, params, lora_request=[adapter, None] * len(prompts), use_tqdm=False)
    source = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32).eval()
    same, by_base = 0, 0
    for i, prompt in enumerate(prompts):
        tokens = list(outputs[2 * i].outputs[0].token_ids)
        with torch.inference_mode():
            choices = source(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].argmax(-1).tolist()
        same += sum(a == b for a, b in zip(tokens, choices, strict=True))
        by_base += list(outputs[2 * i + 1].outputs[0].token_ids) == tokens
    assert same >= 0.95 * 8 * len(prompts)  # the source's own words, up to the rounding of its rows to bf16
    assert by_base < len(prompts) / 2
