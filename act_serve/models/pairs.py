"""Checks that two models are close enough for rows of one to fit into the other."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from act_serve.delta.fingerprint import fingerprint_model
from act_serve.errors import ModelError, PairMismatchError
from act_serve.models.families import channel_modules, read_config
from act_serve.models.loading import load_tokenizer
from act_serve.models.row_reader import RowReader, open_rows

_SAME = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
    "hidden_act",
    "attention_bias",
    "mlp_bias",
)


def check_pair(base: Path, source: Path, include: Sequence[str] = ()) -> None:
    """Raises PairMismatchError, saying what differs, unless both share architecture, shapes and tokenizer.

    The shapes are those of the modules that hold channels, `include` as for `channel_modules`. Raises ModelError when
    one of the two is quantised.
    """
    left, right = read_config(base), read_config(source)
    for folder, config in ((base, left), (source, right)):
        if config.get("quantization_config"):
            raise ModelError(
                f"{folder} is quantised (quantization_config in its config.json), and rows of quantised weights can't "
                "be compared; use the unquantised checkpoint"
            )
    for field in _SAME:
        mine, other = _value(left, field), _value(right, field)
        if mine != other:
            raise PairMismatchError(
                f"base and ability model differ in {field}: {mine!r} in {base}, {other!r} in "
                f"{source}; a delta needs two models of one architecture"
            )
    _check_shapes(base, source, include)
    _check_tokenizers(base, source)


def differing_maths(base: Path, source: Path) -> str:
    """Says by which settings of config.json a pair that fits still computes differently; empty where by none.

    Such as another rope_theta: the rows are then transferred into other surroundings than they were trained in.
    """
    left, right = _maths(base), _maths(source)
    differing = [
        f"{name} ({left.get(name)} in the base, {right.get(name)} in the ability model)"
        for name in sorted(left.keys() | right.keys())
        if left.get(name) != right.get(name)
    ]
    if not differing:
        return ""
    return (
        f"base and ability model compute differently, by {', '.join(differing)}; no row carries that, so the ability "
        "may fall short of its model"
    )


def others_that_differ(base: Path, source: Path, include: Sequence[str] = ()) -> int:
    """The number of tensors that differ and lie in no module that holds channels; reads them all."""
    with open_rows(base) as left, open_rows(source) as right:
        modules = channel_modules(base, include)
        covered = {f"{module.name}.{kind}" for module in modules for kind in ("weight", "bias")}
        others = (set(left.names()) | set(right.names())) - covered
        return sum(not _same(left, right, name) for name in others)


def left_out(count: int) -> str:
    """Says that `count` tensors that differ are no part of an ability."""
    return f"not kept: {count} other tensors that differ (embeddings, norms)"


def _maths(folder: Path) -> dict[str, Any]:
    """The settings that change the maths, those of the rotary embedding by their own names."""
    found = fingerprint_model(folder).config
    if set(found["layer_types"] or ()) == {"full_attention"}:
        found = {**found, "layer_types": None}  # older checkpoints leave out what is the same for all layers
    return {**found, **found["rope"], "rope": None}


def _same(left: RowReader, right: RowReader, name: str) -> bool:
    if name not in left.names() or name not in right.names() or left.shape(name) != right.shape(name):
        return False
    return torch.equal(left.tensor(name).float(), right.tensor(name).float())


def _value(config: Mapping[str, Any], field: str) -> Any:
    """The field's value, or what a config that leaves it out means by that."""
    heads = config.get("num_attention_heads")
    if field == "num_key_value_heads":
        return config.get(field) or heads
    if field == "head_dim" and heads:
        return config.get(field) or config.get("hidden_size", 0) // heads
    return config.get(field) or None  # a switch that is left out is off


def _check_tokenizers(base: Path, source: Path) -> None:
    left, right = load_tokenizer(base).get_vocab(), load_tokenizer(source).get_vocab()
    for folder, tokens in ((base, left.keys() - right.keys()), (source, right.keys() - left.keys())):
        if tokens:
            raise PairMismatchError(
                f"the tokenizers of {base} and {source} differ: {len(tokens)} tokens are in {folder} alone, such as "
                f"{', '.join(sorted(tokens)[:5])}; a delta needs two models of one vocabulary"
            )
    moved = sorted(token for token, index in left.items() if right[token] != index)
    if moved:
        raise PairMismatchError(
            f"the tokenizers of {base} and {source} differ: {len(moved)} tokens have another id, for example "
            f"{', '.join(moved[:5])}; a delta needs two models of one vocabulary"
        )


def _check_shapes(base: Path, source: Path, include: Sequence[str]) -> None:
    with open_rows(base) as left, open_rows(source) as right:
        for module in channel_modules(base, include):
            expected = (module.out_features, module.in_features)
            for folder, reader in ((base, left), (source, right)):
                if (shape := reader.matrix_shape(module.name)) != expected:
                    raise PairMismatchError(
                        f"{module.name}.weight has shape {shape} in {folder}; its config says {expected}"
                    )
