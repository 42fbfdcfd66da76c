"""One way to build the ability: a share of channels and a strength, as transferred and after fine-tuning."""

from dataclasses import dataclass
from pathlib import Path

from act_serve.delta.artifact import as_stored
from act_serve.delta.fingerprint import fingerprint_model
from act_serve.delta.manifest import Localization
from act_serve.models.examples import Example
from act_serve.pipeline.datasets.catalogue import examples_hash, task_examples
from act_serve.pipeline.evaluate import Question
from act_serve.pipeline.job import Job
from act_serve.pipeline.measure import Scores
from act_serve.pipeline.publish import Descent
from act_serve.pipeline.scored_stage import scored
from act_serve.pipeline.scorers import HIGHER_IS_BETTER
from act_serve.pipeline.stage_files import load_deltas
from act_serve.pipeline.stages import Stage
from act_serve.pipeline.transferred_rows import transferred_rows
from act_serve.pipeline.tuned_rows import tuned_rows
from act_serve.profile.schema import Profile


@dataclass(frozen=True, slots=True)
class Origin:
    """What every candidate is made from: the ability model, its key for records, and calibration text."""

    source: Path
    source_key: str
    calibration: list[Example]

    def descent(self, settled: Profile, base: Path) -> Descent:
        """What the manifest says of the rows that a profile with its p and λ settled has taken from here."""
        localization = Localization(
            ranking=settled.localize.ranking,
            p=settled.localize.p,
            strength=settled.transfer.strengths[0],
            seed=settled.seed,
            calibration=examples_hash(self.calibration),
            fine_tune_steps=settled.finetune.steps,
            include=settled.localize.include,
        )
        source = settled.source.model or f"trained from {base.name} on the profile's data"
        return Descent(source, fingerprint_model(self.source), localization)


@dataclass(frozen=True, slots=True)
class Candidate:
    """`job` holds the profile with its p and λ settled; `strengths` maps each λ that was tried to its score."""

    job: Job
    transferred: Stage
    final: Stage
    strengths: dict[str, float]


def make_candidate(job: Job, origin: Origin) -> Candidate:
    """Localizes, transfers at the best of the profile's strengths, and trains the rows."""
    settled, transferred, tried = _best_strength(job, origin)
    return Candidate(settled, transferred, tuned_rows(settled, transferred, origin.source, origin.source_key), tried)


def scored_rows(job: Job, name: str, rows: Stage, questions: list[Question]) -> Scores:
    """Scores the rows of a stage on the base, as they are stored."""
    deltas = as_stored(load_deltas(rows.folder), job.profile.stored)
    return scored(job, name, job.base, f"{job.base_key} {job.profile.stored} {rows.key}", [deltas], questions)


def _best_strength(job: Job, origin: Origin) -> tuple[Job, Stage, dict[str, float]]:
    """The strength that scores best on validation data of the first task; on a tie the one listed first."""
    made = [
        (settled, transferred_rows(settled, origin.source, origin.source_key, origin.calibration))
        for settled in (job.with_strength(strength) for strength in job.profile.transfer.strengths)
    ]
    if len(made) == 1:
        return *made[0], {}
    question = strength_question(job.profile)
    name = question.task.name
    tried = {
        f"{settled.profile.transfer.strength:g}": scored_rows(
            settled, f"validate-transfer{settled.variant}", stage, [question]
        )[name]
        for settled, stage in made
    }
    values = list(tried.values())
    best = max(values) if HIGHER_IS_BETTER[question.task.metric] else min(values)
    return *made[values.index(best)], tried


def strength_question(profile: Profile) -> Question:
    """What several strengths are compared by, on validation data; raises DataError where there is none."""
    settings, task = profile.transfer, profile.score[0]
    if settings.by == "nll":
        task = task.model_copy(update={"metric": "nll"})
    return Question(task, task_examples(task, task.data, "validation", settings.validation_items, profile.seed))
