"""Abilities on a base whose weights and activations are int8 (compressed-tensors, W8A8)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from act_serve.abilities.store import Store
from act_serve.delta.artifact import read_artifact
from act_serve.engine.ability_key import AbilityKey
from act_serve.engine.layers import DeltaLinearMethod
from act_serve.models.loading import computing_dtype
from tests.abilities_for_tests import linear_shapes, pinned, publish_random
from tests.engine.conftest import running_engine
from tests.engine.mixed_batch import COMPOSITIONS, serve_mixed
from tests.engine.test_families import make

pytestmark = pytest.mark.slow

INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
WEIGHTS = {"r1": 0.5, "r2": -1.5}
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def quantise(folder: Path) -> None:
    """Rewrites a checkpoint as compressed-tensors int8: a scale per row, and per token when it is served."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight_OI = tensors[name].float()
        scale_O1 = weight_OI.abs().amax(1, keepdim=True) / 127
        tensors[name], tensors[f"{name}_scale"] = (weight_OI / scale_O1).round().to(torch.int8), scale_O1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "all": {
                "targets": ["Linear"],
                "weights": {**INT8, "strategy": "channel", "dynamic": False},
                "input_activations": {**INT8, "strategy": "token", "dynamic": True},
            }
        },
    }
    (folder / "config.json").write_text(json.dumps(config))


@torch.inference_mode()
def layer_outputs(model: torch.nn.Module) -> dict[str, list[Any]]:
    """In the worker: of every layer an input, vLLM's own output, and that with the resident abilities; as lists."""
    from vllm.model_executor.layers.linear import LinearBase

    found = {}
    for name, layer in model.named_modules():
        method: Any = getattr(layer, "quant_method", None)
        if isinstance(layer, LinearBase) and isinstance(method, DeltaLinearMethod):
            delta = method.delta_layer
            x_TI = torch.randn(5, layer.input_size, generator=torch.Generator().manual_seed(0)).to(layer.params_dtype)
            y_TO = method.wrapped_apply(layer, x_TI, layer.bias)
            delta.batch.fill([1] * 5, {1: {key: WEIGHTS[key.name] for key in delta.resident}})
            found[name] = [each.tolist() for each in (x_TI, y_TO, method.apply(layer, x_TI, layer.bias))]
            delta.batch.clear()
    return found


def test_rows_are_added_to_the_quantised_layers_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Lets a function of this file run in the worker.
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    base = make(tmp_path / "base", "qwen2", 2)
    quantise(base)
    store = Store(tmp_path / "store")
    for seed, name in enumerate(WEIGHTS):
        publish_random(store, base, name, seed=seed, share=0.1, scale=0.1)
    # vLLM multiplies int8 matrices by the matrix unit where there is one, and that gives no float32.
    dtype = computing_dtype()
    tolerance = 1e-5 if dtype == torch.float32 else 2**-6
    with running_engine(base, store, dtype=str(dtype).removeprefix("torch."), max_model_len=256) as llm:
        answers = serve_mixed(llm, store)
        alone = serve_mixed(llm, store, [""])
        (outputs,) = llm.apply_model(layer_outputs)

    assert len({tuple(answer.tokens) for answer in answers}) > len(answers) / len(COMPOSITIONS)
    assert [answer for answer in answers if not answer.text] == alone

    shapes = linear_shapes(base)
    keys = [AbilityKey.of(pinned(store, name).abilities[0]) for name in WEIGHTS]
    deltas = {key: read_artifact(store.path(key.name, key.version))[1] for key in keys}
    compared = 0
    for layer, listed in outputs.items():
        x_TI, y_TO, with_abilities_TO = (torch.tensor(each, dtype=torch.float64) for each in listed)
        prefix, _, leaf = layer.rpartition(".")
        expected_TO, start = y_TO.clone(), 0
        for module in (f"{prefix}.{part}" for part in FUSED.get(leaf, [leaf])):
            for key, modules in deltas.items():
                rows = modules[module].rows.long() + start
                products_TK = x_TI @ modules[module].delta.double().T
                bias_K = modules[module].bias_delta
                expected_TO[:, rows] += WEIGHTS[key.name] * (products_TK + (0 if bias_K is None else bias_K.double()))
                compared += len(rows)
            start += shapes[module][0]
        assert start == y_TO.shape[1]
        assert not torch.allclose(y_TO, with_abilities_TO, atol=0.1)
        assert torch.allclose(with_abilities_TO, expected_TO, rtol=tolerance, atol=tolerance), layer
    assert compared == sum(module.rows.numel() for modules in deltas.values() for module in modules.values())
