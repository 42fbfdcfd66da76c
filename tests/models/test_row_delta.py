"""Rows on a frozen model are the merged checkpoint's, and are trained as its weights would be."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from act_serve.abilities.store import Store
from act_serve.delta.artifact import ModuleDelta, read_artifact
from act_serve.kernels.reference import add_rows_reference
from act_serve.kernels.rows import AbilityRows, ActiveRows, TokenWeights
from act_serve.models.answering import answer_logits
from act_serve.models.examples import Encoded, collate
from act_serve.models.loading import load_model
from act_serve.models.row_delta import RowDeltas
from act_serve.models.row_reader import as_rows
from tests.abilities_for_tests import merged_model, publish_random
from tests.models.test_layerwise import CONFIGS
from tests.tiny_models import make_llama, make_tokenizer

BATCH = collate([Encoded((5, 80, 14, 31, 9, 20), 2), Encoded((7, 8, 9, 10), 1)], 2)


def make_tied_qwen3(folder: Path) -> Path:
    """With norms of heads."""
    torch.manual_seed(0)
    config = CONFIGS["qwen3"].__class__(**{**CONFIGS["qwen3"].to_dict(), "tie_word_embeddings": True})
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_tied_llama(folder: Path) -> Path:
    return make_llama(folder, tied=True)


@pytest.mark.parametrize("make", [make_tied_llama, make_tied_qwen3])
def test_logits_and_gradients_are_the_merged_model_s(make: Any, tmp_path: Path) -> None:
    base, store = make(tmp_path / "base"), Store(tmp_path / "store")
    publish_random(store, base, "one", seed=1, share=0.2, scale=0.1, outside=True)
    merged, plain = merged_model(base, store, "one*0.5"), load_model(base, dtype="float32")
    deltas = read_artifact(store.path("one", 1))[1]
    rows = RowDeltas(deltas, weight=0.5)
    with torch.enable_grad():
        wanted = answer_logits(merged, BATCH)
        wanted.square().mean().backward()
        with rows.attached(plain):
            got = answer_logits(plain, BATCH)
            got.square().mean().backward()
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(answer_logits(plain, BATCH), wanted, atol=0.01)
    assert {"model.norm", "lm_head", "model.embed_tokens"} < deltas.keys()
    for (name, delta), parameter in zip(deltas.items(), rows.parameters(), strict=True):
        gradient = as_rows(name, merged.get_submodule(name).weight.grad)[delta.rows.long()]
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, 0.5 * gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_trained_is_what_is_served(dtype: torch.dtype) -> None:
    """The operation of training beside that of the engine, on the same layer."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(96, 40, bias=False).to(dtype)
    rows = torch.tensor([0, 3, 4, 39], dtype=torch.int32)
    delta, bias = torch.randn(4, 96).to(dtype), torch.randn(4).to(dtype)
    x_TI = torch.randn(9, 96).to(dtype)
    served = linear(x_TI).detach()
    ability = AbilityRows(rows, delta, bias)
    add_rows_reference(x_TI, served, ActiveRows([ability]), TokenWeights(np.full((9, 1), 0.5, dtype=np.float32)))
    model = torch.nn.ModuleDict({"up_proj": linear})
    with RowDeltas({"up_proj": ModuleDelta(rows, delta, bias)}, weight=0.5).attached(model):
        trained = model["up_proj"](x_TI[None])[0].detach()
    # Training rounds the product, its sum with the bias, half of it and the result; serving the result alone.
    largest = (served.float() - linear(x_TI).float()).abs().max() * 2 + served.float().abs().max()
    assert (trained.float() - served.float()).abs().max() <= 4 * torch.finfo(dtype).eps * largest
    assert (trained[:, [1, 2, 5]] == served[:, [1, 2, 5]]).all()
