"""Scores a base with any composition on tasks of lm-evaluation-harness, by its own prompts, metrics and data."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from act_serve.errors import DataError, MissingExtraError
from act_serve.pipeline.compose import composed_model


@dataclass(frozen=True, slots=True)
class TaskScore:
    """What the harness found.

    Attributes:
        task: its name, or a group's.
        metric: as the harness names it, with its filter where there is one, such as `exact_match,strict-match`.
        score: the value; `stderr`: its standard error, where the harness has one.
        items: examples scored; None for groups of which the harness doesn't say.
    """

    task: str
    metric: str
    score: float
    stderr: float | None
    items: int | None


def score_harness_tasks(
    *,
    base: str,
    composition: str,
    store: str | Path,
    tasks: Sequence[str],
    include: Path | None = None,
    items: int | None = None,
) -> list[TaskScore]:
    """Returns the harness's scores of `base` with the composition's abilities added as in serving.

    Args:
        tasks: names of the harness's tasks, groups or tags.
        include: folder with further task files, https://github.com/EleutherAI/lm-evaluation-harness.
        items: only the first so many examples of each task.

    Raises MissingExtraError without the harness, DataError for an unknown task or one whose data can't be had, and
    the artifact's and store's errors.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as exc:
        raise MissingExtraError("lm_eval", "lm-eval") from exc
    manager = TaskManager(include_path=None if include is None else str(include))
    unknown = sorted(set(tasks) - set(manager.all_tasks))
    if unknown or not tasks:
        raise DataError(
            f"lm-evaluation-harness {f'has no task {unknown}' if unknown else 'was given no task'}; `lm-eval ls tasks` "
            "lists them, and --lm-eval-include takes a folder of further ones"
        )
    try:
        manager.load(list(tasks))
    except Exception as exc:  # whatever a task's own code, the datasets library or the network raises
        raise DataError(
            f"the data of {', '.join(tasks)} can't be had: {type(exc).__name__}: {exc}; lm-evaluation-harness fetches "
            "it with the datasets library, from the hub or from the files that the task names"
        ) from exc
    with composed_model(base, composition, store) as (model, tokenizer):
        found: Any = simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8, device=str(model.device)),
            tasks=list(tasks),
            task_manager=manager,
            limit=items,
            log_samples=False,
            bootstrap_iters=1000,
        )
    counts = {name: count["effective"] for name, count in found["n-samples"].items()}
    return [score for name, values in found["results"].items() for score in _scores(name, values, counts.get(name))]


def _scores(task: str, values: dict[str, Any], items: int | None) -> list[TaskScore]:
    scores = []
    for key, value in values.items():
        metric, _, kind = key.partition(",")
        if metric.endswith("_stderr") or isinstance(value, bool) or not isinstance(value, int | float) or not kind:
            continue
        stderr = values.get(f"{metric}_stderr,{kind}")
        name = metric if kind == "none" else key
        scores.append(TaskScore(task, name, float(value), stderr if isinstance(stderr, float) else None, items))
    return scores
