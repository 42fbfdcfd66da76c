"""Activation differences are means over answer tokens alone."""

from pathlib import Path
from typing import Any

import pytest
import torch

from act_serve.errors import DataError, ModelError
from act_serve.models.activations import activation_differences, watch_models
from act_serve.models.examples import Encoded, batches
from act_serve.models.loading import load_model
from tests.tiny_models import make_llama, plant

MODULE = "model.layers.0.self_attn.q_proj"


def test_against_one_item_at_a_time(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    plant(base, tmp_path / "source", p=0.1, scale=0.3)
    models = load_model(base, dtype="float32"), load_model(tmp_path / "source", dtype="float32")
    items = [Encoded(tuple(range(10, 10 + length)), start) for length, start in ((9, 4), (5, 1), (7, 6))]
    read = list(batches(items, 2, 2))
    pooled = activation_differences(read, watch_models(models, read, [MODULE]), {MODULE: 32})[MODULE]
    wanted, count = torch.zeros(32, dtype=torch.float64), 0
    for item in items:
        # In layer 0, q_proj sees the embedding alone: its output is a product that can be written out.
        hidden = models[0].model.layers[0].input_layernorm(models[0].model.embed_tokens(torch.tensor(item.ids)))
        difference = models[1].get_submodule(MODULE)(hidden) - models[0].get_submodule(MODULE)(hidden)
        wanted += difference[item.answer_start - 1 : -1].abs().sum(0).double()
        count += item.answer_tokens
    torch.testing.assert_close(pooled, wanted / count, rtol=1e-5, atol=1e-7)


def test_no_answers_and_broken_models(tmp_path: Path) -> None:
    model = load_model(make_llama(tmp_path / "base"))
    with pytest.raises(DataError, match="no answer token"):
        differences(model, model, Encoded((1, 2), 2))
    broken = load_model(tmp_path / "base")
    broken.get_submodule(MODULE).weight[3] = float("nan")
    with pytest.raises(ModelError, match="NaN"):
        differences(model, broken, Encoded((1, 2, 3), 1))


def differences(base: Any, source: Any, item: Encoded) -> dict[str, torch.Tensor]:
    read = list(batches([item], 1, 2))
    return activation_differences(read, watch_models((base, source), read, [MODULE]), {MODULE: 32})
