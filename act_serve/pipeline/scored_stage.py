"""A scored variant of a model as a stage of a build."""

from collections.abc import Sequence
from pathlib import Path

from act_serve.pipeline.evaluate import Question
from act_serve.pipeline.job import Job
from act_serve.pipeline.measure import Deltas, Scores, load_scores, measure_items, questions_key, save_results
from act_serve.pipeline.training import Report


def scored(
    job: Job, name: str, model: Path, key: str, deltas: Sequence[Deltas], questions: Sequence[Question]
) -> Scores:
    """Scores the model in a folder with `deltas` on it in the stage `name`; `key` names model and deltas together."""

    def make(folder: Path, _report: Report) -> None:
        save_results(folder, measure_items(model, deltas, questions))

    inputs = {"model": key, "questions": questions_key(questions)}
    return load_scores(job.keep(name, inputs, make).folder)
