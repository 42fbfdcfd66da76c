"""Writes a base with abilities added as an ordinary checkpoint."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from act_serve.delta.artifact import read_artifact
from act_serve.delta.fingerprint import check_base, fingerprint_model
from act_serve.delta.manifest import ModelFingerprint
from act_serve.errors import ModelError
from act_serve.models.families import read_config
from act_serve.models.loading import load_model, load_tokenizer


def export_hf(*, base: Path, abilities: Sequence[tuple[Path, float]], folder: Path, dtype: str | None = None) -> Path:
    """Saves `base` with each ability's rows added, `W + Σ weight·delta`, as a checkpoint that transformers loads.

    `abilities` are artifact folders with their weights; sums are made in float32 and rounded once to `dtype`, by
    default the base's. Raises BaseMismatchError when an artifact belongs to another base, ArtifactError when it is
    damaged, ModelError when `folder` exists already.
    """
    if folder.exists():
        raise ModelError(f"{folder} exists already; name a folder that does not")
    model = load_model(base, dtype="float32")
    fingerprint = fingerprint_model(base)
    for artifact, weight in abilities:
        _add(model, artifact, weight, fingerprint)
    staging = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        model.to(getattr(torch, dtype or _dtype_of(base))).save_pretrained(staging)
        load_tokenizer(base).save_pretrained(staging)
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def _add(model: Any, artifact: Path, weight: float, fingerprint: ModelFingerprint) -> None:
    manifest, deltas = read_artifact(artifact)
    check_base(manifest.base_fingerprint, fingerprint, what=f"{manifest.name}@{manifest.version}")
    with torch.no_grad():
        for name, delta in deltas.items():
            module = model.get_submodule(name)
            rows = delta.rows.long().to(module.weight.device)
            module.weight.index_add_(0, rows, weight * delta.delta.to(module.weight))
            if delta.bias_delta is not None:
                module.bias.index_add_(0, rows, weight * delta.bias_delta.to(module.bias))


def _dtype_of(base: Path) -> str:
    config = read_config(base)
    return str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
