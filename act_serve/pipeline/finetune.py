"""Light fine-tuning: trains only the transferred rows, so that what comes out is still a sparse delta."""

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from act_serve.delta.artifact import ModuleDelta
from act_serve.errors import BuildError
from act_serve.models.examples import Example, encode_answered
from act_serve.models.loading import load_model, load_tokenizer
from act_serve.models.row_delta import RowDeltas
from act_serve.pipeline.row_lesson import Course, RowLesson
from act_serve.pipeline.row_trainer import RowTrainer, training_arguments
from act_serve.pipeline.training import Report, Schedule
from act_serve.profile.schema import FineTune


@dataclass(frozen=True, slots=True)
class Lessons:
    """What is learnt (`ability`) and on what the model must go on answering as the base does (`retained`)."""

    ability: list[Example]
    retained: list[Example]


def finetune(
    *,
    base: Path,
    deltas: Mapping[str, ModuleDelta],
    lessons: Lessons,
    settings: FineTune,
    seed: int,
    report: Report,
    source: Path | None = None,
    checkpoints: Path | None = None,
    company: Sequence[Mapping[str, ModuleDelta]] = (),
) -> dict[str, ModuleDelta]:
    """Returns the deltas after `settings.steps` steps on the rows alone; biases stay as transferred.

    The loss is that of `RowLesson`; `source` is needed where it distils. With `checkpoints`, a folder, an interrupted
    run goes on from its last tenth. `company` are abilities on top of which steps take turns. Raises DataError for an
    example without an answer token, BuildError when the loss is not finite.
    """
    with tempfile.TemporaryDirectory() as unused:
        folder = checkpoints or Path(unused)
        arguments = training_arguments(folder, settings, seed, checkpoints=checkpoints is not None)
        torch.manual_seed(seed)
        model, tokenizer = load_model(base), load_tokenizer(base)
        teacher = load_model(_needed(source)) if settings.loss == "distill" else None
        tuned, others = RowDeltas(deltas), [RowDeltas(other) for other in company]
        for other in others:
            other.freeze()
        course = make_course(tokenizer, lessons, settings, seed, processes=arguments.world_size, turns=1 + len(others))
        schedule = Schedule(settings.steps, settings.learning_rate)
        lesson = RowLesson(model, teacher, tuned, settings, others)
        with ExitStack() as stack:
            for rows in (*others, tuned):
                stack.enter_context(rows.attached(model))
            RowTrainer(lesson, course, arguments, schedule).run(report)
    return tuned.export()


def make_course(
    tokenizer: Any, lessons: Lessons, settings: FineTune, seed: int, *, processes: int, turns: int = 1
) -> Course:
    """The batches of a run of `settings.steps` steps, for so many training processes together.

    Raises DataError for an example without an answer token.
    """
    return Course(
        encode_answered(tokenizer, lessons.ability, "the training data"),
        encode_answered(tokenizer, lessons.retained, "the retained tasks' training text") if settings.retention else [],
        settings=settings,
        pad_id=tokenizer.pad_token_id or 0,
        seed=seed,
        batches=settings.steps * settings.gradient_accumulation * processes,
        turns=turns,
    )


def _needed(source: Path | None) -> Path:
    if source is None:
        raise BuildError("finetune.loss is `distill`, which needs the source model")
    return source
