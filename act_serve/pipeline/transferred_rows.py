"""The stages of a build from activations to rows: calibrate, localize, transfer."""

from pathlib import Path

from act_serve.models.examples import Example
from act_serve.models.families import channel_modules
from act_serve.pipeline.calibrate import score_channels, score_name
from act_serve.pipeline.datasets.catalogue import examples_hash
from act_serve.pipeline.job import Job
from act_serve.pipeline.localize import localize
from act_serve.pipeline.stage_files import load_tensors, save_deltas, save_tensors
from act_serve.pipeline.stages import Stage
from act_serve.pipeline.training import Report
from act_serve.pipeline.transfer import transfer


def transferred_rows(job: Job, source: Path, source_key: str, calibration: list[Example]) -> Stage:
    """Ranks the channels, takes those that fit the budget, and takes their differences times the first strength."""
    settings = job.profile.localize
    modules = channel_modules(job.base, settings.include)
    score = score_name(settings.ranking, settings.include)
    pair = {"base": job.base_key, "source": source_key}

    def scores(folder: Path, _report: Report) -> None:
        found = score_channels(
            settings.ranking,
            base=job.base,
            source=source,
            examples=calibration,
            seed=job.profile.seed,
            memory=settings.memory,
            include=settings.include,
        )
        save_tensors(folder, found)

    scored = job.keep("calibrate", {**pair, "score": score, "examples": examples_hash(calibration)}, scores)

    def rows(folder: Path, _report: Report) -> None:
        save_tensors(folder, localize(modules, load_tensors(scored.folder), settings, job.profile.seed))

    budget = settings.model_dump(include={"ranking", "p", "calibration_items"})
    chosen = job.keep("localize", {"scores": scored.key, "settings": budget, "seed": job.profile.seed}, rows)
    strength = job.profile.transfer.strengths[0]

    def differences(folder: Path, _report: Report) -> None:
        save_deltas(folder, transfer(base=job.base, source=source, rows=load_tensors(chosen.folder), strength=strength))

    return job.keep("transfer", {"rows": chosen.key, "strength": strength}, differences)
