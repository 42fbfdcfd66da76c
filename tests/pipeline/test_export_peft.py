"""The exported LoRA gives PEFT the logits of the merged checkpoint, on a model with biases and on one without."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from act_serve.abilities.store import Store
from act_serve.errors import ModelError, RequestError
from act_serve.pipeline.compose import artifacts_of, compose
from act_serve.pipeline.export import export_hf
from act_serve.pipeline.export_peft import export_peft
from act_serve.pipeline.publish import channel_counts
from tests.abilities_for_tests import publish_random
from tests.cli.test_offline_commands import call
from tests.tiny_models import make_llama, make_qwen

IDS = torch.tensor([[5, 80, 140, 31, 9, 200]])


@pytest.mark.parametrize("make", [make_llama, make_qwen])
@pytest.mark.parametrize("composition", ["one", "one*0.5+two"])
def test_logits_equal_the_merged_model_s(composition: str, make: Callable[..., Path], tmp_path: Path) -> None:
    base = make(tmp_path / "base")
    store = Store(tmp_path / "store")
    publish_random(store, base, "one", seed=1, share=0.3, scale=0.3)
    publish_random(store, base, "two", seed=2, share=0.1, scale=0.3)
    deltas = compose(artifacts_of(composition, store.root), base)
    export_hf(base=base, deltas=deltas, folder=tmp_path / "merged", dtype="float32")
    export_peft(base=str(base), deltas=deltas, channels=channel_counts(base), folder=tmp_path / "lora")
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with torch.no_grad():
        before = plain(IDS).logits
        adapted = PeftModel.from_pretrained(plain, tmp_path / "lora").eval()(IDS).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()(IDS).logits
    assert float((before - merged).abs().max()) > 0.1
    torch.testing.assert_close(adapted, merged, rtol=1e-4, atol=1e-4)


def test_nothing_is_padded_and_bfloat16_stays_where_it_is_exact(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    store = Store(tmp_path / "abilities")
    publish_random(store, base, "one", seed=1)
    common = ("--to", "peft", "--base", base, "--store", store.root)
    call("export", "one", tmp_path / "lora", *common)
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    for name, module in compose(artifacts_of("one", store.root), base).items():
        a, b = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        assert torch.equal(a.float(), module.delta)
        assert a.dtype == torch.bfloat16
        assert b.shape == (channel_counts(base)[name], len(module.rows))
        assert config["rank_pattern"][name] == config["alpha_pattern"][name] == len(module.rows)
    assert not config["lora_bias"]
    call("export", "one*0.3", tmp_path / "weighted", *common)
    assert next(iter(load_file(tmp_path / "weighted" / "adapter_model.safetensors").values())).dtype == torch.float32
    with pytest.raises(ModelError, match="exists already"):
        call("export", "one", tmp_path / "lora", *common)
    with pytest.raises(RequestError, match="at least one ability"):
        call("export", "", tmp_path / "none", *common)
