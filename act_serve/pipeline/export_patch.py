"""Writes a base with deltas added as vLLM's sparse checkpoint weight patches: new values at flat places of a tensor.

The fields are those of `CheckpointWeightPatch` (vllm/model_executor/model_loader/checkpoint_weight_patch.py), which
vLLM has in memory only. On disk: `weight_patch.json` lists `name`, `shape` and `dtype` of every patch, and
`weight_patch.safetensors` holds `<name>.indices`, int32 or int64, and `<name>.values`. `engine/weight_patch.py` reads
them. A patch overwrites: it holds W + delta, so it fits this base alone and doesn't compose.
"""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save_file

from act_serve.delta.artifact import ModuleDelta
from act_serve.errors import RequestError
from act_serve.models.row_reader import open_rows
from act_serve.pipeline.export import changes_tied, check_changes, tensor_changes, tensor_rows
from act_serve.pipeline.new_folder import new_folder


def export_patch(*, base: Path, deltas: Mapping[str, ModuleDelta], folder: Path) -> Path:
    """Saves the patches that turn `base` into the base with the deltas added, in each tensor's own dtype.

    Raises ModelError when `folder` exists already or can't be written, BaseMismatchError when the base has no such
    rows, RequestError when they change lm_head or the embedding where these are one tensor.
    """
    changes = tensor_changes(deltas)
    check_changes(base, changes)
    if changes_tied(base, deltas):
        raise RequestError(
            f"{base} ties lm_head to the embedding, and a patch of one of them would change the other, too; write the "
            "merged checkpoint with --to hf, which unties them"
        )
    listed, tensors = [], {}
    with open_rows(base) as reader:
        for name, (rows, added) in sorted(changes.items()):
            old = tensor_rows(name, reader.tensor(name))
            shape, values = reader.shape(name), (old[rows].float() + added).to(old.dtype)
            row_step, *steps = old.stride()  # a column of the embedding is a row here, but lies apart in the tensor
            within = torch.arange(values[0].numel()) * (steps[0] if steps else 1)
            places = (rows[:, None] * row_step + within).flatten()
            # vLLM's transfer over NCCL takes int32 alone; its loader takes both.
            small = prod(shape) < 2**31
            tensors[f"{name}.indices"] = places.int() if small else places
            tensors[f"{name}.values"] = values.flatten()
            listed.append({"name": name, "shape": list(shape), "dtype": str(old.dtype).removeprefix("torch.")})
    with new_folder(folder) as staging:
        save_file(tensors, staging / "weight_patch.safetensors", metadata={"format": "pt"})
        text = json.dumps({"format": "vllm.CheckpointWeightPatch", "patches": listed}, indent=2) + "\n"
        (staging / "weight_patch.json").write_text(text, encoding="utf-8")
    return folder
