"""Measures on calibration text how much each channel of the ability model differs from the base's."""

from pathlib import Path

from torch import Tensor

from act_serve.models.activations import activation_differences
from act_serve.models.examples import Example, batches, encode
from act_serve.models.families import channel_modules
from act_serve.models.loading import load_model, load_tokenizer
from act_serve.models.row_reader import open_rows

BATCH_SIZE = 8


def calibrate(*, base: Path, source: Path, examples: list[Example]) -> dict[str, Tensor]:
    """Returns Δa, float64 `[O]` per module name, over the answer tokens of `examples` (paper, equation 1)."""
    tokenizer = load_tokenizer(base)
    items = [encode(tokenizer, example) for example in examples]
    names = [module.name for module in channel_modules(base)]
    stream = batches(items, BATCH_SIZE, tokenizer.pad_token_id or 0)
    return activation_differences(load_model(base), load_model(source), stream, names)


def weight_differences(*, base: Path, source: Path) -> dict[str, Tensor]:
    """Returns the root mean square of each row's difference, float64 `[O]` per module name."""
    found = {}
    with open_rows(base) as left, open_rows(source) as right:
        for module in channel_modules(base):
            name = f"{module.name}.weight"
            difference_OI = right.tensor(name).double() - left.tensor(name).double()
            found[module.name] = difference_OI.square().mean(1).sqrt()
    return found
