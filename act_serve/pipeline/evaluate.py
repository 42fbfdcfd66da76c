"""Scores a model on a profile's tasks."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from act_serve.models.answering import answers, mean_nll
from act_serve.models.examples import Example, encode
from act_serve.pipeline.scorers import HIGHER_IS_BETTER, LIKELIHOOD_METRICS, answer_score
from act_serve.profile.schema import RetainedTask, Task


@dataclass(frozen=True, slots=True)
class Question:
    """A task with its held-out examples."""

    task: Task
    examples: list[Example]


def evaluate(model: Any, tokenizer: Any, questions: Iterable[Question]) -> dict[str, float]:
    """Returns the score of each task by its name. Tasks over the same examples share one set of answers."""
    seen: dict[tuple[Any, ...], list[str]] = {}
    return {question.task.name: _score(model, tokenizer, question, seen) for question in questions}


def drop(task: Task, base: float, delta: float) -> float:
    """By what share of the base's score `delta` is worse; negative where it is better, 0 where the base has none."""
    worse = base - delta if HIGHER_IS_BETTER[task.metric] else delta - base
    return worse / abs(base) if base else 0.0


def broken(tasks: Sequence[RetainedTask], base: Mapping[str, float], delta: Mapping[str, float]) -> list[str]:
    """Says for each retained task that fell by more than its `max_drop` by how much it fell."""
    found = []
    for task in tasks:
        fall = drop(task, base[task.name], delta[task.name])
        if not fall <= task.max_drop:  # so that NaN is refused too
            found.append(
                f"{task.name} ({task.metric}) went from {base[task.name]:.4g} to {delta[task.name]:.4g}: "
                f"{fall:.1%} worse, {task.max_drop:.1%} allowed"
            )
    return found


def _score(model: Any, tokenizer: Any, question: Question, seen: dict[tuple[Any, ...], list[str]]) -> float:
    task, examples = question.task, question.examples
    if task.metric in LIKELIHOOD_METRICS:
        items = [encode(tokenizer, example) for example in examples]
        nll = mean_nll(model, items, pad_id=tokenizer.pad_token_id or 0)
        return nll if task.metric == "nll" else math.exp(min(nll, 700.0))
    key = (task.max_new_tokens, *(example.prompt for example in examples))
    if key not in seen:
        seen[key] = answers(model, tokenizer, examples, max_new_tokens=task.max_new_tokens)
    return answer_score(task.metric, seen[key], [example.answer for example in examples], task.language)
