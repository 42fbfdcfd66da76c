"""Mixtures of experts: abilities on attention rows are served exactly, those on experts and routers are refused."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from act_serve.abilities.store import Store
from act_serve.delta.artifact import ModuleDelta, serialize_modules, write_artifact
from act_serve.delta.channels import kind_of
from act_serve.delta.composition import Composition
from act_serve.delta.fingerprint import fingerprint_model
from act_serve.delta.fit import ModuleShape
from act_serve.engine.admission import Admission
from act_serve.errors import BaseMismatchError
from act_serve.models.families import channel_modules
from tests.abilities_for_tests import manifest_for, merged_model, publish_random
from tests.engine.conftest import running_engine
from tests.engine.mixed_batch import check_answers, serve_mixed
from tests.engine.test_families import SHAPE
from tests.tiny_models import make_tokenizer

pytestmark = pytest.mark.slow


def make_mixtral(folder: Path) -> Path:
    torch.manual_seed(0)
    config = MixtralConfig(
        **SHAPE | {"num_hidden_layers": 2}, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2
    )
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def publish_one_row(store: Store, base: Path, name: str, module: str) -> None:
    deltas = {module: ModuleDelta(torch.tensor([1], dtype=torch.int32), torch.ones(1, 128).bfloat16())}
    tensors = serialize_modules(deltas, "bfloat16")
    write_artifact(store.path(name, 1), manifest_for(base, name, 1, deltas, tensors), tensors)


def test_attention_rows_are_served_and_experts_refused(tmp_path: Path) -> None:
    base = make_mixtral(tmp_path / "base")
    store = Store(tmp_path / "store")
    for seed in (1, 2):
        publish_random(store, base, f"r{seed}", seed=seed, share=0.2, scale=0.2)
    publish_one_row(store, base, "expert", "model.layers.0.block_sparse_moe.experts.0.w1")
    publish_one_row(store, base, "router", "model.layers.0.block_sparse_moe.gate")
    with running_engine(base, store, dtype="float32", max_model_len=256) as llm:
        answers = serve_mixed(llm, store)
        shapes: dict[str, Any] = llm.collective_rpc("ability_modules")[0]
    check_answers(answers, lambda text: merged_model(base, store, text))
    modules = {name: ModuleShape(*shape) for name, shape in shapes.items()}
    assert {name.rpartition(".")[2] for name in modules if kind_of(name) == "linear"} == {
        "q_proj", "k_proj", "v_proj", "o_proj"
    }  # fmt: skip
    assert {name for name in modules if kind_of(name) == "linear"} == {each.name for each in channel_modules(base)}
    admission = Admission(store, fingerprint_model(base), modules)
    asyncio.run(admission.pin(Composition.parse("r1+r2")))
    with pytest.raises(BaseMismatchError, match=r"experts\.0\.w1, an expert of a mixture"):
        asyncio.run(admission.pin(Composition.parse("expert")))
    with pytest.raises(BaseMismatchError, match=r"changes .*gate, which the engine has no delta layer for"):
        asyncio.run(admission.pin(Composition.parse("router")))
