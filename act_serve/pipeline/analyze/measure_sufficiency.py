"""Runs the measurements of sufficiency: transfers, light fine-tunings and their scores over several p."""

from collections.abc import Sequence
from pathlib import Path

from act_serve.delta.fingerprint import fingerprint_model
from act_serve.pipeline.analyze.subject import Subject
from act_serve.pipeline.analyze.sufficiency import CHOSEN, CHOSEN_TUNED, RANDOM, RANDOM_TUNED, Sufficiency, curve
from act_serve.pipeline.datasets.catalogue import examples_hash
from act_serve.pipeline.evaluate import Question
from act_serve.pipeline.finetune import Lessons, finetune
from act_serve.pipeline.measure import Deltas, Scores, load_scores, measure, questions_key, questions_of, save_scores
from act_serve.pipeline.run import _retained_text
from act_serve.pipeline.scorers import HIGHER_IS_BETTER
from act_serve.pipeline.stage_files import load_deltas, save_deltas
from act_serve.pipeline.stages import Stage
from act_serve.pipeline.training import Report
from act_serve.pipeline.transfer import transfer
from act_serve.profile.schema import Ranking


def measure_sufficiency(
    subject: Subject, shares: Sequence[float], *, finetuned: bool, items: int | None
) -> list[Sufficiency]:
    """Scores the profile's own tasks, on at most `items` examples each, with the top p of the rows for every p."""
    profile = subject.job.profile
    questions = [
        Question(each.task, each.examples[:items]) for each in questions_of(profile.model_copy(update={"retain": ()}))
    ]
    base, source = _ends(subject, questions)
    curves: dict[str, dict[float, Scores]] = {}
    for p in shares:
        for ranking, raw, tuned in ((profile.localize.ranking, CHOSEN, CHOSEN_TUNED), ("random", RANDOM, RANDOM_TUNED)):
            moved = _transferred(subject, ranking, p)
            curves.setdefault(raw, {})[p] = _scored(subject, moved, questions)
            if finetuned and profile.finetune.steps:
                curves.setdefault(tuned, {})[p] = _scored(subject, _tuned(subject, moved), questions)
    return [
        Sufficiency(
            ability=subject.name,
            task=task.name,
            metric=task.metric,
            higher_is_better=HIGHER_IS_BETTER[task.metric],
            items=len(question.examples),
            base=base[task.name],
            source=source[task.name],
            curves={name: curve({p: scores[task.name] for p, scores in at.items()}) for name, at in curves.items()},
        )
        for question in questions
        for task in (question.task,)
    ]


def _transferred(subject: Subject, ranking: Ranking, p: float) -> Stage:
    settings, strength = subject.job.profile.localize, subject.job.profile.transfer.strength
    text = examples_hash(subject.calibration)
    inputs = {"base": _base_key(subject), "source": subject.source_key, "examples": text, "p": p, "ranking": ranking}
    inputs |= {"settings": settings.model_dump(), "seed": subject.job.profile.seed, "strength": strength}

    def make(folder: Path, _report: Report) -> None:
        scores = {} if ranking == "random" else subject.differences(subject.calibration, ranking)
        rows = subject.mask(scores, ranking, p)
        save_deltas(folder, transfer(base=subject.job.base, source=subject.source, rows=rows, strength=strength))

    return subject.job.keep(f"transfer-{ranking}-{p:g}", inputs, make)


def _tuned(subject: Subject, moved: Stage) -> Stage:
    profile, settings = subject.job.profile, subject.job.profile.finetune
    lessons = Lessons(subject.job.examples("train", settings.items), _retained_text(profile))
    inputs = {"transfer": moved.key, "settings": settings.model_dump(), "lessons": _lessons_key(lessons)}

    def make(folder: Path, report: Report) -> None:
        deltas = load_deltas(moved.folder)
        tuned = finetune(
            base=subject.job.base, deltas=deltas, lessons=lessons, settings=settings, seed=profile.seed, report=report
        )
        save_deltas(folder, tuned)

    return subject.job.keep(moved.folder.name.replace("transfer", "finetune"), inputs, make)


def _ends(subject: Subject, questions: Sequence[Question]) -> tuple[Scores, Scores]:
    """Scores of the base and of the ability model."""
    pair = {"base": (subject.job.base, _base_key(subject)), "source": (subject.source, subject.source_key)}
    base, source = (_measured(subject, name, model, key, [], questions) for name, (model, key) in pair.items())
    return base, source


def _scored(subject: Subject, stage: Stage, questions: Sequence[Question]) -> Scores:
    deltas = [load_deltas(stage.folder)]
    return _measured(subject, stage.folder.name, subject.job.base, stage.key, deltas, questions)


def _measured(
    subject: Subject, name: str, model: Path, key: str, deltas: Sequence[Deltas], questions: Sequence[Question]
) -> Scores:
    def make(folder: Path, _report: Report) -> None:
        save_scores(folder, measure(model, deltas, questions))

    inputs = {"model": key, "questions": questions_key(questions)}
    return load_scores(subject.job.keep(f"score-{name}", inputs, make).folder)


def _base_key(subject: Subject) -> str:
    return fingerprint_model(subject.job.base).model_dump_json()


def _lessons_key(lessons: Lessons) -> list[str]:
    return [examples_hash(lessons.ability), examples_hash(lessons.retained)]
