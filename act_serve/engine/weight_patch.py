"""Reads what ``act-serve export --to vllm-patch`` wrote as vLLM's own patches.

For example, on a running engine whose worker keeps plain weights (not vLLM's CPU worker, which packs them)::

    patches = read_weight_patch(Path("patch"))
    llm.apply_model(lambda model: load_checkpoint_weight_patches(model, patches))
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from vllm.model_executor.model_loader.checkpoint_weight_patch import CheckpointWeightPatch

from act_serve.errors import ArtifactDamagedError


def read_weight_patch(folder: Path) -> list[CheckpointWeightPatch]:
    """The patches in ``folder``, for ``load_checkpoint_weight_patches``.

    Raises:
        ArtifactDamagedError: a file is missing, or is not what the export wrote.
    """
    try:
        listed = json.loads((folder / "weight_patch.json").read_bytes())["patches"]
        tensors = load_file(folder / "weight_patch.safetensors")
        return [
            CheckpointWeightPatch(
                name=entry["name"],
                shape=tuple(entry["shape"]),
                dtype=getattr(torch, entry["dtype"]),
                values=tensors[f"{entry['name']}.values"],
                indices=tensors[f"{entry['name']}.indices"],
            )
            for entry in listed
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as exc:
        raise ArtifactDamagedError(f"{folder} holds no readable weight patch ({exc}); export it again") from exc
