"""Scores a model on a profile's tasks."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from act_serve.models.answering import answers, nll_sums
from act_serve.models.choosing import choice_likelihoods
from act_serve.models.examples import Example, encode_answered
from act_serve.pipeline.measured import Measured
from act_serve.pipeline.scorers import (
    HIGHER_IS_BETTER,
    LIKELIHOOD_METRICS,
    answer_numbers,
    check_scorable,
    choice_numbers,
)
from act_serve.profile.schema import RetainedTask, Task


@dataclass(frozen=True, slots=True)
class Question:
    """A task with its held-out examples; raises DataError when its metric can't score them."""

    task: Task
    examples: list[Example]

    def __post_init__(self) -> None:
        check_scorable(self.task.name, self.task.metric, self.examples, self.task.language)


def evaluate(model: Any, tokenizer: Any, questions: Iterable[Question]) -> dict[str, Measured]:
    """Returns the result of each task by its name. Tasks over the same examples share one set of answers.

    Raises DataError when a likelihood is asked for of an example that has no answer token.
    """
    seen: dict[tuple[Any, ...], list[str]] = {}
    return {
        question.task.name: Measured(question.task.metric, _numbers(model, tokenizer, question, seen))
        for question in questions
    }


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


def _numbers(
    model: Any, tokenizer: Any, question: Question, seen: dict[tuple[Any, ...], list[str]]
) -> list[list[float]]:
    task, examples = question.task, question.examples
    if task.metric in LIKELIHOOD_METRICS:
        items = encode_answered(tokenizer, examples, task.name)
        return [list(sums) for sums in nll_sums(model, items, pad_id=tokenizer.pad_token_id or 0)]
    if task.metric == "choice_accuracy":
        return _choices(model, tokenizer, question)
    key = (task.max_new_tokens, *(example.prompt for example in examples))
    if key not in seen:
        seen[key] = answers(model, tokenizer, examples, max_new_tokens=task.max_new_tokens)
    return answer_numbers(task.metric, seen[key], [example.answer for example in examples], task.language)


def _choices(model: Any, tokenizer: Any, question: Question) -> list[list[float]]:
    examples = question.examples
    likelihoods = choice_likelihoods(model, tokenizer, examples)
    return [
        choice_numbers(found, example.choices, example.answer)
        for found, example in zip(likelihoods, examples, strict=True)
    ]
