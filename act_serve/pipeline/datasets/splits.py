"""Which of the three parts of a data set a piece of it belongs to."""

import hashlib
from typing import Literal

Split = Literal["train", "validation", "test"]


def split_of(key: str) -> Split:
    """Assigns `key` to a part by its hash: 10 % test, 5 % validation, the rest train, the same on every machine."""
    share = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4]) / 2**32
    if share < 0.10:
        return "test"
    return "validation" if share < 0.15 else "train"
