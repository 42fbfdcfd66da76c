"""Which of the three parts of a data set a piece of it belongs to, and sets that are all test."""

import hashlib
import random
from collections.abc import Callable, Iterable
from typing import Literal

from act_serve.errors import DataError
from act_serve.models.examples import Example

Split = Literal["train", "validation", "test"]
# The splits that come after each, whose texts it must not have.
LATER: dict[Split, tuple[Split, ...]] = {"train": ("validation", "test"), "validation": ("test",), "test": ()}


def split_of(key: str) -> Split:
    """Assigns `key` to a part by its hash: 10 % test, 5 % validation, the rest train, the same on every machine."""
    share = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4]) / 2**32
    if share < 0.10:
        return "test"
    return "validation" if share < 0.15 else "train"


def drawn(name: str, split: Split, examples: Callable[[], Iterable[Example]], count: int, seed: int) -> list[Example]:
    """Up to `count` of the examples called `name`; raises DataError for another split than test."""
    if split != "test":
        raise DataError(f"{name} is only for tests; give the task `train_data` to train or choose settings on")
    found = list(examples())
    random.Random(f"{seed}/{name}").shuffle(found)
    return found[:count]
