"""Whether a delta's modules are those of the served model, decided from names and shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from act_serve.delta.channels import kind_of
from act_serve.delta.manifest import Manifest
from act_serve.errors import BaseMismatchError


@dataclass(frozen=True, slots=True)
class ModuleShape:
    """A module of the checkpoint: ``out_features`` channels, rows of length ``in_features``, with or without a bias.

    Of a linear module that is the shape of the weight; ``act_serve.delta.channels`` says what it is of the others.
    """

    out_features: int
    in_features: int
    bias: bool = False


def check_modules(manifest: Manifest, modules: Mapping[str, ModuleShape], *, what: str) -> None:
    """Refuses a delta that names a module the engine cannot change, or of another shape.

    Args:
        manifest: the ability's.
        modules: what the engine can change, by the checkpoint's names.
        what: the artifact, for the message.

    Raises:
        BaseMismatchError: the first module that does not fit, and why.
    """
    for name, entry in manifest.modules.items():
        shape = modules.get(name)
        if shape is None and ".experts." in f"{name}.":
            raise BaseMismatchError(
                f"{what} changes {name}, an expert of a mixture; experts can't be changed per request: rebuild the "
                f"ability without the experts' modules"
            )
        if shape is None and kind_of(name) != "linear":
            raise BaseMismatchError(
                f"{what} changes {name}, which this engine can't change per request: it changes norms that are a plain "
                "RMSNorm, and lm_head and embedding where there is no speculative decoding and logits have the model's "
                "dtype, the embedding not with prompt embeddings, lm_head not with batch-sharded sampling; rebuild the "
                "ability without it in localize.include, or start the engine without these"
            )
        if shape is None:
            raise BaseMismatchError(
                f"{what} changes {name}, which the engine has no delta layer for; it can change "
                f"{', '.join(sorted({m.rpartition('.')[2] for m in modules}))}: rebuild the ability without that module"
            )
        if (entry.out_features, entry.in_features) != (shape.out_features, shape.in_features):
            raise BaseMismatchError(
                f"{what}: {name} is {entry.out_features} x {entry.in_features} in the artifact and "
                f"{shape.out_features} x {shape.in_features} in the served model; rebuild it for this base"
            )
        if entry.bias and not shape.bias:
            raise BaseMismatchError(f"{what} changes the bias of {name}, which has none in the served model")
