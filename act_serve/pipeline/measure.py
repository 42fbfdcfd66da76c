"""Measures the variants of a build on the same held-out examples: base, source, transfer alone, delta, compositions."""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from act_serve.delta.artifact import ModuleDelta
from act_serve.delta.manifest import Score
from act_serve.models.loading import load_model, load_tokenizer
from act_serve.models.row_delta import RowDeltas
from act_serve.pipeline.datasets.catalogue import examples_hash, task_examples
from act_serve.pipeline.evaluate import Question, evaluate
from act_serve.pipeline.measured import Interval, Measured
from act_serve.pipeline.scorers import HIGHER_IS_BETTER, LIKELIHOOD_METRICS, revision
from act_serve.profile.schema import Profile, RetainedTask

Deltas = Mapping[str, ModuleDelta]
Scores = dict[str, float]
Results = dict[str, Measured]
SCORES_FILE, ITEMS_FILE = "scores.json", "items.json"


def questions_of(profile: Profile) -> list[Question]:
    """The profile's scored and retained tasks with their held-out examples.

    Raises DataError, naming the task, when it has none or its metric can't score them.
    """
    tasks = (*profile.score, *profile.retain)
    return [Question(task, task_examples(task, task.data, "test", task.items, profile.seed)) for task in tasks]


def questions_key(questions: Sequence[Question]) -> list[list[str]]:
    """Names the tasks and every example in them, for stage records."""
    return [
        [each.task.model_dump_json(), examples_hash(each.examples), *revision(each.task.metric)] for each in questions
    ]


def examples_of(questions: Sequence[Question]) -> dict[str, str]:
    """The hash of each task's examples, for evaluation.json."""
    return {question.task.name: examples_hash(question.examples) for question in questions}


def asked_of(questions: Sequence[Question]) -> dict[str, dict[str, Any]]:
    """What else the score of each task depends on that is of answers, for evaluation.json."""
    return {
        each.task.name: each.task.model_dump(include={"max_new_tokens", "language"})
        for each in questions
        if each.task.metric not in LIKELIHOOD_METRICS
    }


def measure(model: Path, deltas: Sequence[Deltas], questions: Sequence[Question]) -> Scores:
    """Scores the model in a folder with all `deltas` added as they are: give them `as_stored`."""
    return plain_scores(measure_items(model, deltas, questions))


def measure_items(model: Path, deltas: Sequence[Deltas], questions: Sequence[Question]) -> Results:
    """As `measure`, with the numbers of every item."""
    loaded, tokenizer = load_model(model), load_tokenizer(model)
    with ExitStack() as stack:
        for delta in deltas:
            stack.enter_context(RowDeltas(delta).attached(loaded))
        return evaluate(loaded, tokenizer, questions)


def plain_scores(results: Results) -> Scores:
    """The scores without their items."""
    return {task: result.score for task, result in results.items()}


def save_results(folder: Path, results: Results) -> None:
    """Keeps scores and the numbers of every item in a stage's folder."""
    items = {task: {"metric": result.metric, "items": result.items_NS} for task, result in results.items()}
    (folder / ITEMS_FILE).write_text(json.dumps(items), encoding="utf-8")
    (folder / SCORES_FILE).write_text(json.dumps(plain_scores(results)), encoding="utf-8")


def load_scores(folder: Path) -> Scores:
    """Reads the scores that `save_results` wrote."""
    scores: Scores = json.loads((folder / SCORES_FILE).read_text(encoding="utf-8"))
    return scores


def load_intervals(folder: Path) -> dict[str, Interval]:
    """The confidence interval of each score in a stage's folder; none where the items were not kept."""
    found = load_results(folder) if (folder / ITEMS_FILE).exists() else {}
    return {task: result.interval for task, result in found.items()}


def load_results(folder: Path) -> Results:
    """The numbers of every item that `save_results` wrote."""
    items = json.loads((folder / ITEMS_FILE).read_text(encoding="utf-8"))
    return {task: Measured(found["metric"], found["items"]) for task, found in items.items()}


def manifest_scores(questions: Sequence[Question], variants: Mapping[str, Scores]) -> tuple[Score, ...]:
    """One manifest entry per task, from the scores of `base`, `source`, `transfer` and `delta`, as far as known."""
    return tuple(
        Score(
            task=task.name,
            metric=task.metric,
            higher_is_better=HIGHER_IS_BETTER[task.metric],
            items=len(question.examples),
            retained=isinstance(task, RetainedTask),
            **_rounded({name: scores[task.name] for name, scores in variants.items() if task.name in scores}),
        )
        for question in questions
        for task in (question.task,)
    )


def _rounded(values: Mapping[str, float]) -> dict[str, Any]:
    return {name: round(value, 5) for name, value in values.items()}
