"""What a ranking looks at, and what it answers."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from act_serve.models.examples import Batch, Example, batches, encode
from act_serve.models.families import ChannelModule, channel_modules
from act_serve.models.loading import load_tokenizer

BATCH_SIZE = 8


@dataclass(frozen=True, slots=True)
class Pair:
    """Two checkpoints of one architecture, the ability's calibration examples, and a seed for the random control."""

    base: Path
    source: Path
    examples: tuple[Example, ...] = ()
    seed: int = 0

    @property
    def modules(self) -> list[ChannelModule]:
        return channel_modules(self.base)

    @property
    def names(self) -> list[str]:
        """Names of the modules that hold channels, in the order of the layers."""
        return [module.name for module in self.modules]

    def batches(self) -> Iterator[Batch]:
        """The calibration examples as tokens of the base's tokenizer."""
        tokenizer: Any = load_tokenizer(self.base)
        items = [encode(tokenizer, example) for example in self.examples]
        return batches(items, BATCH_SIZE, tokenizer.pad_token_id or 0)


class Score(Protocol):
    """Scores every channel of a pair: float64 `[O]` per module name; the higher, the sooner it is transferred."""

    __name__: str

    def __call__(self, pair: Pair) -> dict[str, Tensor]: ...
