"""Checks that two models are close enough for rows of one to fit into the other."""

from collections.abc import Iterator, Mapping, Sequence
from math import prod
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

_MAPPED_VALUES = 1 << 27
# Text on which tokenizers of one vocabulary differ when their merges, their normalisation or the way they split do.
_PROBE = """The quick brown fox's 12,345.67 jumps — over  two   spaces!
\tdef naïve_façade(x): return {"clé": [x**2, 0xFF]}  # ÄÖÜ ß ñ ¿qué?
Здравствуй, мир. 你好，世界。こんにちは 안녕하세요 مرحبا ½ ﬁ 👋🏽"""


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


def differing_templates(base: Path, source: Path) -> str:
    """Says that both models were taught another form of conversation; empty where it is the same."""
    left, right = (load_tokenizer(folder) for folder in (base, source))
    if left.chat_template == right.chat_template:
        return ""
    return (
        "base and ability model have different chat templates: the model is scored with its own, and the ability with "
        "the base's, as it is served"
    )


def others_that_differ(base: Path, source: Path, include: Sequence[str] = ()) -> int:
    """The number of tensors that differ and lie in no module that holds channels; reads them all."""
    covered = {f"{module.name}.{kind}" for module in channel_modules(base, include) for kind in ("weight", "bias")}
    with open_rows(base) as left, open_rows(source) as right:
        mine, other = set(left.names()) - covered, set(right.names()) - covered
        sizes = {name: prod(left.shape(name)) for name in sorted(mine & other)}
    return len(mine ^ other) + sum(_differing(base, source, names) for names in _groups(sizes))


def left_out(count: int) -> str:
    """Says that `count` tensors that differ are no part of an ability."""
    return f"not kept: {count} other tensors that differ (embeddings, norms)"


def _maths(folder: Path) -> dict[str, Any]:
    """The settings that change the maths, those of the rotary embedding by their own names."""
    found = fingerprint_model(folder).config
    if set(found["layer_types"] or ()) == {"full_attention"}:
        found = {**found, "layer_types": None}  # older checkpoints leave out what is the same for all layers
    return {**found, **found["rope"], "rope": None}


def _groups(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """The names in groups of about so many values as may be mapped at once."""
    group, values = list[str](), 0
    for name, size in sizes.items():
        group.append(name)
        values += size
        if values >= _MAPPED_VALUES:
            yield group
            group, values = [], 0
    yield group


def _differing(base: Path, source: Path, names: Sequence[str]) -> int:
    """How many of the tensors differ; what was read stays mapped until both checkpoints are closed."""
    with open_rows(base, names) as left, open_rows(source, names) as right:
        return sum(not _same(left, right, name) for name in names)


def _same(left: RowReader, right: RowReader, name: str) -> bool:
    return left.shape(name) == right.shape(name) and all(
        torch.equal(*(block.float() for block in blocks))
        for blocks in zip(left.blocks(name), right.blocks(name), strict=True)
    )


def _value(config: Mapping[str, Any], field: str) -> Any:
    """The field's value, or what a config that leaves it out means by that."""
    heads = config.get("num_attention_heads")
    if field == "num_key_value_heads":
        return config.get(field) or heads
    if field == "head_dim" and heads:
        return config.get(field) or config.get("hidden_size", 0) // heads
    return config.get(field) or None  # a switch that is left out is off


def _check_tokenizers(base: Path, source: Path) -> None:
    tokenizers = load_tokenizer(base), load_tokenizer(source)
    left, right = (tokenizer.get_vocab() for tokenizer in tokenizers)
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
    for line in _PROBE.splitlines():
        mine, other = (tokenizer.tokenize(line) for tokenizer in tokenizers)
        if mine != other:
            shorter = min(len(mine), len(other))
            at = next((n for n in range(shorter) if mine[n] != other[n]), shorter)
            raise PairMismatchError(
                f"the tokenizers of {base} and {source} have one vocabulary and split text differently: of {line!r} "
                f"the base makes {mine[at : at + 4]} where the ability model has {other[at : at + 4]}; a delta "
                "needs two models of one tokenizer"
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
