"""What a ranking looks at, and what it answers."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from act_serve.errors import DataError
from act_serve.models.activations import Seen, watch_models
from act_serve.models.examples import Batch, Example, batches, encode
from act_serve.models.families import ChannelModule, channel_modules
from act_serve.models.layerwise import watch_layers
from act_serve.models.loading import load_model, load_tokenizer

BATCH_SIZE = 8
# Fewer say nothing about a channel: a single word's activation would decide.
MIN_ANSWER_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Pair:
    """Two checkpoints of one architecture, the ability's calibration examples, and a seed for the random control.

    With `layerwise`, one layer of each model is in memory at a time. `include` names kinds of channels beside those of
    the linear modules.
    """

    base: Path
    source: Path
    examples: tuple[Example, ...] = ()
    seed: int = 0
    layerwise: bool = False
    include: tuple[str, ...] = ()

    @property
    def modules(self) -> list[ChannelModule]:
        return channel_modules(self.base, self.include)

    @property
    def channels(self) -> dict[str, int]:
        """The number of channels per module name."""
        return {module.name: module.out_features for module in self.modules}

    @property
    def names(self) -> list[str]:
        """Names of the modules that hold channels, in the order of the layers."""
        return [module.name for module in self.modules]

    def batches(self) -> list[Batch]:
        """The calibration examples as tokens of the base's tokenizer; raises DataError with too few answer tokens."""
        tokenizer: Any = load_tokenizer(self.base)
        items = [encode(tokenizer, example) for example in self.examples]
        found = sum(max(item.answer_tokens, 0) for item in items)
        if found < MIN_ANSWER_TOKENS:
            raise DataError(
                f"the {len(items)} calibration examples hold {found or 'no'} answer token{'s' * (found > 1)}, and a "
                f"ranking by activations or gradients needs {MIN_ANSWER_TOKENS}; give longer answers, shorter "
                "prompts, more examples, or raise localize.calibration_items"
            )
        return list(batches(items, BATCH_SIZE, tokenizer.pad_token_id or 0))

    def watch(self, batches: list[Batch], *folders: Path, inputs: bool = False) -> Iterator[Seen]:
        """Shows what the modules of the models in `folders` give (or take) on `batches`; loads them when asked."""
        if self.layerwise:
            yield from watch_layers(folders, batches, self.names, inputs=inputs)
        else:
            yield from watch_models([load_model(folder) for folder in folders], batches, self.names, inputs=inputs)


class Score(Protocol):
    """Scores every channel of a pair: float64 `[O]` per module name; the higher, the sooner it is transferred."""

    __name__: str

    def __call__(self, pair: Pair) -> dict[str, Tensor]: ...
