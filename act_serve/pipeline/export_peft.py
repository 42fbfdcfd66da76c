"""Writes deltas as the PEFT LoRA that equals them, for any server or library that loads LoRA.

k changed rows D of a weight are B·A with A = D `[k, I]` and B `[O, k]` that puts each row in its place. Every module
gets its own rank k and alpha k, so the scaling is 1 everywhere and nothing is padded.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from act_serve.delta.artifact import ModuleDelta
from act_serve.delta.channels import kind_of
from act_serve.errors import RequestError
from act_serve.pipeline.new_folder import new_folder


def export_peft(
    *, base: str, deltas: Mapping[str, ModuleDelta], channels: Mapping[str, int], folder: Path, dtype: str | None = None
) -> Path:
    """Saves an adapter folder that `PeftModel.from_pretrained` loads.

    `base` is the base's folder or hub id, for the adapter's config; `channels` gives each module's number of output
    channels. `dtype` is by default bfloat16 where that is exact, else float32. Raises ModelError when `folder` exists
    already or can't be written, RequestError when something else than linear modules of the layers changes.
    """
    if outside := sorted(name for name in deltas if kind_of(name) != "linear"):
        raise RequestError(
            f"{outside[0]} changes, and what is written here is a LoRA of the layers' linear modules, which can't hold "
            "changes of norms, lm_head or the embedding; write the merged checkpoint with --to hf"
        )
    kept = getattr(torch, dtype) if dtype else _exact(deltas)
    with_bias = any(module.bias_delta is not None and bool(module.bias_delta.any()) for module in deltas.values())
    tensors = {}
    for name, module in deltas.items():
        prefix, rows = f"base_model.model.{name}", module.rows.long()
        tensors[f"{prefix}.lora_A.weight"] = module.delta.to(kept).contiguous()
        selection = torch.zeros(channels[name], len(rows), dtype=kept)
        selection[rows, torch.arange(len(rows))] = 1
        tensors[f"{prefix}.lora_B.weight"] = selection
        if with_bias:
            tensors[f"{prefix}.lora_B.bias"] = _full_bias(module, channels[name]).to(kept)
    with new_folder(folder) as staging:
        save_file(tensors, staging / "adapter_model.safetensors", metadata={"format": "pt"})
        config = {"base_model_name_or_path": base, **_config(deltas, with_bias)}
        (staging / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


def _config(deltas: Mapping[str, ModuleDelta], with_bias: bool) -> dict[str, object]:
    ranks = {name: len(module.rows) for name, module in sorted(deltas.items())}
    largest = max(ranks.values())
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "target_modules": list(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "lora_bias": with_bias,
    }


def _full_bias(module: ModuleDelta, channels: int) -> Tensor:
    bias = torch.zeros(channels)
    if module.bias_delta is not None:
        bias[module.rows.long()] = module.bias_delta.float()
    return bias


def _exact(deltas: Mapping[str, ModuleDelta]) -> torch.dtype:
    given = [values for module in deltas.values() for values in (module.delta, module.bias_delta) if values is not None]
    rounds = any(not torch.equal(values.bfloat16().float(), values.float()) for values in given)
    return torch.float32 if rounds else torch.bfloat16
