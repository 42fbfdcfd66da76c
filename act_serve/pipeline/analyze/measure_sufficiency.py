"""Runs the measurements of sufficiency: transfers, light fine-tunings and their scores over several p."""

from collections.abc import Sequence
from dataclasses import replace

from act_serve.pipeline.analyze.subject import Subject
from act_serve.pipeline.analyze.sufficiency import CHOSEN, CHOSEN_TUNED, RANDOM, RANDOM_TUNED, Sufficiency, curve
from act_serve.pipeline.candidate import Candidate, Origin, make_candidate, scored_rows
from act_serve.pipeline.evaluate import Question
from act_serve.pipeline.job import Job
from act_serve.pipeline.measure import Scores, questions_of
from act_serve.pipeline.scored_stage import scored
from act_serve.pipeline.scorers import HIGHER_IS_BETTER
from act_serve.profile.schema import Localize

RANDOM_WORK = "random-rows"


def measure_sufficiency(
    subject: Subject, shares: Sequence[float], *, finetuned: bool, items: int | None
) -> list[Sufficiency]:
    """Scores the profile's own tasks, on at most `items` examples each, with the top p of the rows for every p."""
    profile = subject.job.profile
    asked = questions_of(profile.model_copy(update={"retain": ()}))
    questions = [Question(each.task, each.examples[:items]) for each in asked]
    chosen = subject.job if finetuned else _untrained(subject.job)
    ways = ((chosen, CHOSEN, CHOSEN_TUNED), (_at_random(chosen), RANDOM, RANDOM_TUNED))
    curves: dict[str, dict[float, Scores]] = {}
    for p in shares:
        for job, raw, tuned in ways:
            made = _candidate(subject, job, p)
            curves.setdefault(raw, {})[p] = _scores(made, raw, questions)
            if made.final != made.transferred:
                curves.setdefault(tuned, {})[p] = _scores(made, tuned, questions)
    base = scored(subject.job, "score-base", subject.job.base, subject.job.base_key, [], questions)
    source = scored(subject.job, "score-source", subject.source, subject.source_key, [], questions)
    return [_record(subject.name, question, base, source, curves) for question in questions]


def _record(
    ability: str, question: Question, base: Scores, source: Scores, curves: dict[str, dict[float, Scores]]
) -> Sufficiency:
    task = question.task
    return Sufficiency(
        ability=ability,
        task=task.name,
        metric=task.metric,
        higher_is_better=HIGHER_IS_BETTER[task.metric],
        items=len(question.examples),
        base=base[task.name],
        source=source[task.name],
        curves={name: curve({p: scores[task.name] for p, scores in at.items()}) for name, at in curves.items()},
    )


def _candidate(subject: Subject, job: Job, p: float) -> Candidate:
    """What the build makes at p: its kept stages where it has been there."""
    origin = Origin(subject.source, subject.source_key, list(subject.calibration))
    own = p == job.profile.localize.p and job.profile.search is None  # a search keeps each p apart
    return make_candidate(job if own else job.with_p(p), origin)


def _scores(made: Candidate, way: str, questions: list[Question]) -> Scores:
    rows = made.final if way in (CHOSEN_TUNED, RANDOM_TUNED) else made.transferred
    return scored_rows(made.job, f"score-{rows.folder.name}", rows, questions)


def _untrained(job: Job) -> Job:
    settings = job.profile.finetune.model_copy(update={"steps": 0})
    return replace(job, profile=job.profile.model_copy(update={"finetune": settings}))


def _at_random(job: Job) -> Job:
    """The control: as many parameters in random rows, in a folder of its own so that no stage of the build is lost."""
    settings = Localize(**{**job.profile.localize.model_dump(), "ranking": "random"})
    profile = job.profile.model_copy(update={"localize": settings})
    return replace(job, profile=profile, work=job.work / RANDOM_WORK)
