"""The change that a fine-tuned checkpoint makes to its base."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from act_serve.models.families import channel_modules
from act_serve.models.pairs import check_pair, differing_maths, others_that_differ
from act_serve.models.row_reader import RowReader, open_rows
from act_serve.pipeline.import_rows import Change, Given

_log = logging.getLogger(__name__)


@contextmanager
def checkpoint_change(base: Path, source: Path) -> Iterator[Given]:
    """Gives W(source) - W(base) of every linear module of the layers, read when asked for.

    Raises PairMismatchError when the two do not fit together, ModelError when one can't be read or is quantised.
    """
    check_pair(base, source)
    if differing := differing_maths(base, source):
        _log.warning("%s", differing)
    with open_rows(base) as left, open_rows(source) as right:
        names = [module.name for module in channel_modules(base)]
        changes = {name: partial(_change, left, right, name) for name in names}
        yield Given("checkpoint", changes, others_that_differ(base, source))


def _change(left: RowReader, right: RowReader, name: str) -> Change:
    bias = f"{name}.bias"
    has_bias = bias in left.names() and bias in right.names()
    return _minus(left, right, f"{name}.weight"), _minus(left, right, bias) if has_bias else None


def _minus(left: RowReader, right: RowReader, name: str) -> torch.Tensor:
    return right.tensor(name).float() - left.tensor(name).float()
