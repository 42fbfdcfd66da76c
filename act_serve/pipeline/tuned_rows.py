"""The fine-tuning stage of a build."""

from pathlib import Path

from act_serve.models.examples import Example
from act_serve.pipeline.datasets.catalogue import examples_hash, task_examples
from act_serve.pipeline.finetune import Lessons, finetune
from act_serve.pipeline.job import Job
from act_serve.pipeline.processes import count
from act_serve.pipeline.stage_files import load_deltas, save_deltas
from act_serve.pipeline.stages import Stage
from act_serve.pipeline.training import Report
from act_serve.profile.schema import Profile


def tuned_rows(job: Job, transferred: Stage, source: Path | None = None, source_key: str = "") -> Stage:
    """Trains the transferred rows as the profile says; the transfer itself where that is no step at all.

    The ability model `source` is needed where the profile distils from it.
    """
    profile, settings = job.profile, job.profile.finetune
    if settings.steps == 0:
        return transferred
    lessons = Lessons(job.examples("train", settings.items), retained_text(profile))
    inputs = {
        "transfer": transferred.key,
        "source": source_key if settings.loss == "distill" else None,
        "settings": settings.model_dump(),
        "ability": examples_hash(lessons.ability),
        "retained": examples_hash(lessons.retained),
        "seed": profile.seed,
        "company": [other.key for other in job.company],
        **({"processes": count()} if count() > 1 else {}),  # a step takes a batch for each
    }

    def make(folder: Path, report: Report) -> None:
        tuned = finetune(
            base=job.base,
            source=source,
            deltas=load_deltas(transferred.folder),
            lessons=lessons,
            settings=settings,
            seed=profile.seed,
            report=report,
            checkpoints=job.unfinished(inputs),
            company=[other.deltas for other in job.company],
        )
        save_deltas(folder, tuned)

    return job.keep("finetune", inputs, make, together=True)


def retained_text(profile: Profile) -> list[Example]:
    """Training text of the retained tasks; tasks over the same data count once."""
    retention = profile.finetune.retention
    if retention is None:
        return []
    sources = {(task.train_data or task.data).model_dump_json(): task for task in profile.retain}
    return [
        example
        for task in sources.values()
        for example in task_examples(
            task, task.train_data or task.data, "train", retention.items_per_task, profile.seed
        )
    ]
