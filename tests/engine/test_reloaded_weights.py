"""vLLM may read other weights into a running engine (`reload_weights`); abilities are added to those then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from act_serve.abilities.store import Store
from tests.abilities_for_tests import merged_model, publish_random
from tests.engine.conftest import running_engine
from tests.engine.mixed_batch import check_answers, serve_mixed
from tests.engine.test_families import make

pytestmark = pytest.mark.slow


def test_answers_are_those_of_the_weights_that_were_read_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, store = make(tmp_path / "base", "llama", 2), Store(tmp_path / "store")
    for seed in (1, 2):
        publish_random(store, base, f"r{seed}", seed=seed, share=0.1, scale=0.1)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    other = tmp_path / "other"
    model.to(torch.bfloat16).save_pretrained(other)
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    with running_engine(base, store, dtype="float32", max_model_len=256) as llm:
        before = serve_mixed(llm, store)
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
        llm.reset_prefix_cache()
        after = serve_mixed(llm, store)
    check_answers(before, lambda text: merged_model(base, store, text))
    check_answers(after, lambda text: merged_model(other, store, text))
    assert [answer.tokens for answer in before] != [answer.tokens for answer in after]
