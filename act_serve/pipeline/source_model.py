"""The ability model of a build: ready-made, or trained here."""

from pathlib import Path

from act_serve.models.content import content_key
from act_serve.models.loading import resolve_model
from act_serve.pipeline.datasets.catalogue import examples_hash
from act_serve.pipeline.job import Job
from act_serve.pipeline.train_source import train_source
from act_serve.pipeline.training import Report


def source_model(job: Job) -> tuple[Path, str]:
    """Returns the folder of the ability model, trained first where the profile says so, and its key for records."""
    wanted = job.profile.source
    if wanted.model is not None:
        folder = resolve_model(wanted.model)
        return folder, content_key(folder)
    assert wanted.train is not None  # the profile has exactly one of them, and this is no continued ability
    settings, seed = wanted.train, job.profile.seed
    examples = job.examples("train", settings.items)
    inputs = {
        "base": job.base_key,
        "settings": settings.model_dump(),
        "examples": examples_hash(examples),
        "seed": seed,
    }

    def make(folder: Path, report: Report) -> None:
        train_source(
            base=job.base, examples=examples, settings=settings, seed=seed, folder=folder / "model", report=report
        )

    stage = job.keep("source", inputs, make)
    return stage.folder / "model", stage.key
