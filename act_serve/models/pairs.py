"""Checks that two models are close enough for rows of one to fit into the other."""

from pathlib import Path

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
)


def check_pair(base: Path, source: Path) -> None:
    """Raises PairMismatchError, saying what differs, unless both share architecture, shapes and tokenizer."""
    left, right = read_config(base), read_config(source)
    for field in _SAME:
        if left.get(field) != right.get(field):
            raise PairMismatchError(
                f"base and ability model differ in {field}: {left.get(field)!r} in {base}, {right.get(field)!r} in "
                f"{source}; a delta needs two models of one architecture"
            )
    _check_shapes(base, source)
    vocabulary, other = load_tokenizer(base).get_vocab(), load_tokenizer(source).get_vocab()
    if vocabulary != other:
        odd = sorted({token for token, _ in set(vocabulary.items()) ^ set(other.items())})[:5]
        raise PairMismatchError(f"the tokenizers of {base} and {source} differ, for example in {', '.join(odd)}")


def _check_shapes(base: Path, source: Path) -> None:
    with open_rows(base) as left, open_rows(source) as right:
        for module in channel_modules(base):
            name = f"{module.name}.weight"
            expected = (module.out_features, module.in_features)
            for folder, shape in ((base, left.shape(name)), (source, right.shape(name))):
                if shape != expected:
                    raise PairMismatchError(f"{name} has shape {shape} in {folder}; its config says {expected}")
