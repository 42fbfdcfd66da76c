"""The change that a fine-tuned checkpoint makes to its base."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from act_serve.models.families import channel_modules
from act_serve.models.pairs import check_pair
from act_serve.models.row_reader import RowReader, open_rows
from act_serve.pipeline.import_rows import Change, Given


@contextmanager
def checkpoint_change(base: Path, source: Path) -> Iterator[Given]:
    """Gives W(source) - W(base) of every linear module of the layers, read when asked for.

    Raises PairMismatchError when the two do not fit together, ModelError when one can't be read.
    """
    check_pair(base, source)
    with open_rows(base) as left, open_rows(source) as right:
        names = [module.name for module in channel_modules(base)]
        changes = {name: partial(_change, left, right, name) for name in names}
        covered = {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}
        others = (set(left.names()) | set(right.names())) - covered
        yield Given("checkpoint", changes, sum(not _same(left, right, name) for name in others))


def _change(left: RowReader, right: RowReader, name: str) -> Change:
    bias = f"{name}.bias"
    has_bias = bias in left.names() and bias in right.names()
    return _minus(left, right, f"{name}.weight"), _minus(left, right, bias) if has_bias else None


def _minus(left: RowReader, right: RowReader, name: str) -> torch.Tensor:
    return right.tensor(name).float() - left.tensor(name).float()


def _same(left: RowReader, right: RowReader, name: str) -> bool:
    if name not in left.names() or name not in right.names() or left.shape(name) != right.shape(name):
        return False
    return torch.equal(left.tensor(name).float(), right.tensor(name).float())
