"""Makes abilities of random rows for any checkpoint, and merges them with transformers: the tests' own yardstick."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel

from act_serve.abilities.store import Store
from act_serve.delta.artifact import (
    ModuleDelta,
    count_modules,
    entries_of,
    read_artifact,
    serialize_modules,
    write_artifact,
)
from act_serve.delta.channels import OUTSIDE, kind_of
from act_serve.delta.composition import Composition, WeightedAbility
from act_serve.delta.fingerprint import fingerprint_model
from act_serve.delta.manifest import Localization, Manifest, Stored


def linear_shapes(base: Path) -> dict[str, tuple[int, int]]:
    """``(out_features, in_features)`` of the projections of a Llama- or Qwen-family checkpoint."""
    shapes: dict[str, tuple[int, int]] = {}
    for path in sorted(base.glob("*.safetensors")):
        with safe_open(str(path), "pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is not a mapping
                if name.endswith("_proj.weight"):
                    out_features, in_features = file.get_slice(name).get_shape()
                    shapes[name.removesuffix(".weight")] = (out_features, in_features)
    return shapes


def outside_shapes(base: Path) -> dict[str, tuple[int, int]]:
    """Channels and length of their rows of norms, lm_head (where it is tied, too) and embedding."""
    shapes: dict[str, tuple[int, int]] = {}
    for path in sorted(base.glob("*.safetensors")):
        with safe_open(str(path), "pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is not a mapping
                if name.endswith("norm.weight"):
                    shapes[name.removesuffix(".weight")] = (file.get_slice(name).get_shape()[0], 1)
                if name == "model.embed_tokens.weight":
                    vocabulary, hidden = file.get_slice(name).get_shape()
                    shapes["model.embed_tokens"], shapes["lm_head"] = (hidden, vocabulary), (vocabulary, hidden)
    return shapes


def bias_names(base: Path) -> set[str]:
    """Modules of the checkpoint that have a bias."""
    names: set[str] = set()
    for path in sorted(base.glob("*.safetensors")):
        with safe_open(str(path), "pt") as file:
            names |= {n.removesuffix(".bias") for n in file.keys() if n.endswith("_proj.bias")}  # noqa: SIM118
    return names


def random_modules(
    base: Path, seed: int, share: float = 0.05, scale: float = 0.02, outside: bool | Collection[str] = False
) -> dict[str, ModuleDelta]:
    """Random rows in every projection, and in the biases where there are any.

    With ``outside`` in norms, lm_head and embedding as well, or in those of these kinds.
    """
    generator = torch.Generator().manual_seed(seed)
    biases = bias_names(base)
    modules = {}
    kinds = OUTSIDE if outside is True else outside or ()
    more = {name: shape for name, shape in outside_shapes(base).items() if kind_of(name) in kinds}
    for name, (out_features, in_features) in {**linear_shapes(base), **more}.items():
        k = max(1, round(out_features * share))
        rows = torch.randperm(out_features, generator=generator)[:k].sort().values.int()
        delta = (torch.randn(k, in_features, generator=generator) * scale).bfloat16()
        bias = (torch.randn(k, generator=generator) * scale).bfloat16() if name in biases else None
        modules[name] = ModuleDelta(rows, delta, bias)
    return modules


def manifest_for(
    base: Path,
    name: str,
    version: int,
    modules: dict[str, ModuleDelta],
    tensors: bytes,
    stored: Stored = "bfloat16",
) -> Manifest:
    """A manifest that fits the tensors and the base."""
    shapes = linear_shapes(base) | outside_shapes(base)
    return Manifest(
        name=name,
        version=version,
        kind="other",
        description="random rows",
        license="Apache-2.0",
        created="2026-01-01T00:00:00Z",
        base=base.name,
        base_fingerprint=fingerprint_model(base),
        localization=Localization(
            ranking="random", p=0.05, strength=1.0, seed=0, calibration="0" * 64, fine_tune_steps=0
        ),
        modules=entries_of(modules, {module: shapes.get(module, (8, 8))[0] for module in modules}),
        stored=stored,
        counts=count_modules(modules, len(tensors)),
        tensors_sha256=hashlib.sha256(tensors).hexdigest(),
    )


def publish_random(
    store: Store, base: Path, name: str, seed: int, version: int = 1, stored: Stored = "bfloat16", **options: Any
) -> Path:
    """Publishes an ability of random rows."""
    modules = random_modules(base, seed, **options)
    tensors = serialize_modules(modules, stored)
    manifest = manifest_for(base, name, version, modules, tensors, stored)
    return write_artifact(store.path(name, version), manifest, tensors)


def pinned(store: Store, text: str) -> Composition:
    """The composition with the versions and digests that the store has now."""
    abilities = []
    for ability in Composition.parse(text).abilities:
        manifest = store.manifest(ability.name, ability.version)
        abilities.append(WeightedAbility(manifest.name, manifest.version, manifest.digest, ability.weight))
    return Composition.of(abilities)


def merged_model(base: Path, store: Store, text: str) -> PreTrainedModel:
    """The base in float32, its lm_head untied, with the weighted deltas added to its rows, by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    for ability in Composition.parse(text).abilities:
        version = store.manifest(ability.name, ability.version).version
        _, modules = read_artifact(store.path(ability.name, version))
        for name, module in modules.items():
            changed, rows, added = model.get_submodule(name), module.rows.long(), ability.weight * module.delta.float()
            if name == "model.embed_tokens":
                changed.weight.data[:, rows] += added.t()
            else:
                changed.weight.data[rows] += added[:, 0] if name.endswith("norm") else added
            if module.bias_delta is not None:
                changed.bias.data[rows] += ability.weight * module.bias_delta.float()
    return model
