"""Checks that two models are close enough for rows of one to fit into the other."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from act_serve.errors import PairMismatchError
from act_serve.models.families import channel_modules, read_config
from act_serve.models.loading import load_tokenizer
from act_serve.models.row_reader import open_rows

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

    The shapes are those of the modules that hold channels, `include` as for `channel_modules`.
    """
    left, right = read_config(base), read_config(source)
    for field in _SAME:
        mine, other = _value(left, field), _value(right, field)
        if mine != other:
            raise PairMismatchError(
                f"base and ability model differ in {field}: {mine!r} in {base}, {other!r} in "
                f"{source}; a delta needs two models of one architecture"
            )
    _check_shapes(base, source, include)
    _check_tokenizers(base, source)


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
