"""The whole build of one ability, stage by stage (arXiv 2601.09398, section 3)."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from act_serve.abilities.store import Store
from act_serve.delta.artifact import as_stored, read_artifact
from act_serve.delta.fingerprint import fingerprint_model
from act_serve.errors import RetentionError
from act_serve.models.examples import Example
from act_serve.models.families import channel_modules
from act_serve.models.loading import resolve_model
from act_serve.models.pairs import check_pair
from act_serve.pipeline.calibrate import calibrate, weight_differences
from act_serve.pipeline.conflict import conflict
from act_serve.pipeline.datasets.catalogue import examples_hash, load_examples
from act_serve.pipeline.evaluate import broken
from act_serve.pipeline.finetune import Lessons, finetune
from act_serve.pipeline.localize import localize
from act_serve.pipeline.measure import (
    Deltas,
    Scores,
    load_scores,
    manifest_scores,
    measure,
    questions_key,
    questions_of,
    save_scores,
)
from act_serve.pipeline.plan import make_plan
from act_serve.pipeline.progress import Screen
from act_serve.pipeline.publish import Evidence, publish
from act_serve.pipeline.stage_files import load_deltas, load_tensors, save_deltas, save_tensors
from act_serve.pipeline.stages import Stage, run_stage
from act_serve.pipeline.train_source import train_source
from act_serve.pipeline.training import Report
from act_serve.pipeline.transfer import transfer
from act_serve.profile.schema import Profile

PLAN_EXAMPLES = 8


@dataclass(frozen=True, slots=True)
class Job:
    """One build: its profile, the base's folder, the folder of its stage records and what the user sees."""

    profile: Profile
    base: Path
    work: Path
    screen: Screen

    def keep(self, name: str, inputs: dict[str, Any], make: Callable[[Path, Report], None]) -> Stage:
        """Runs a stage with a progress bar, or takes it from an earlier run."""
        with self.screen.stage(name) as report:
            stage = run_stage(self.work, name, inputs, lambda folder: make(folder, report))
        took = "kept from an earlier run" if stage.resumed else f"{stage.seconds:.0f} s"
        self.screen.note(f"[green]✓[/green] {name:<22} {took}")
        return stage

    def examples(self, split: Any, count: int) -> list[Example]:
        """Examples of the ability's own data."""
        return load_examples(self.profile.data, split, count, self.profile.seed)


def build(profile: Profile, *, store: Store, work: Path, screen: Screen) -> Path:
    """Builds the ability of `profile` and returns the folder of its new version in `store`.

    Finished stages lie in `work` and are used again by the next build with the same inputs. Raises RetentionError
    when a retained task falls too far (nothing is published then), and any other ActServeError with what to do.
    """
    job = Job(profile, resolve_model(profile.base), work, screen)
    if profile.source.model is not None:
        check_pair(job.base, resolve_model(profile.source.model))
    _show_plan(job)
    source, source_key = _source(job)
    calibration = job.examples("train", profile.localize.calibration_items)
    transferred = _transferred(job, source, source_key, calibration)
    final = _finetuned(job, transferred, source)
    evidence = _evidence(job, source, source_key, transferred, final, store, examples_hash(calibration))
    deltas = load_deltas(final.folder)
    folder = publish(profile=profile, base=job.base, source=source, deltas=deltas, evidence=evidence, store=store)
    screen.note(f"published [bold]{profile.name}@{folder.name}[/bold] in {folder}")
    return folder


def show_plan(profile: Profile, screen: Screen) -> None:
    """Shows what building `profile` would do, and does none of it."""
    _show_plan(Job(profile, resolve_model(profile.base), Path(), screen))


def _show_plan(job: Job) -> None:
    sample = job.examples("train", PLAN_EXAMPLES)
    job.screen.show_plan(job.profile.name, make_plan(job.profile, job.base, sample))


def _source(job: Job) -> tuple[Path, str]:
    wanted = job.profile.source
    if wanted.model is not None:
        folder = resolve_model(wanted.model)
        return folder, fingerprint_model(folder).model_dump_json()
    assert wanted.train is not None  # the profile has exactly one of the two
    settings = wanted.train
    examples = job.examples("train", settings.items)
    inputs = {
        "base": fingerprint_model(job.base).model_dump_json(),
        "settings": settings.model_dump(),
        "examples": examples_hash(examples),
        "seed": job.profile.seed,
    }

    def make(folder: Path, report: Report) -> None:
        train_source(
            base=job.base,
            examples=examples,
            settings=settings,
            seed=job.profile.seed,
            folder=folder / "model",
            report=report,
        )

    stage = job.keep("source", inputs, make)
    return stage.folder / "model", stage.key


def _transferred(job: Job, source: Path, source_key: str, calibration: list[Example]) -> Stage:
    settings = job.profile.localize
    modules = channel_modules(job.base)
    by_weight = settings.ranking.startswith("weight")
    pair = {"base": fingerprint_model(job.base).model_dump_json(), "source": source_key}

    def scores(folder: Path, _report: Report) -> None:
        if by_weight:
            save_tensors(folder, weight_differences(base=job.base, source=source))
        else:
            save_tensors(folder, calibrate(base=job.base, source=source, examples=calibration))

    scored = job.keep("calibrate", {**pair, "by_weight": by_weight, "examples": examples_hash(calibration)}, scores)

    def rows(folder: Path, _report: Report) -> None:
        save_tensors(folder, localize(modules, load_tensors(scored.folder), settings, job.profile.seed))

    chosen = job.keep(
        "localize", {"scores": scored.key, "settings": settings.model_dump(), "seed": job.profile.seed}, rows
    )
    strength = job.profile.transfer.strength

    def differences(folder: Path, _report: Report) -> None:
        save_deltas(folder, transfer(base=job.base, source=source, rows=load_tensors(chosen.folder), strength=strength))

    return job.keep("transfer", {"rows": chosen.key, "strength": strength}, differences)


def _finetuned(job: Job, transferred: Stage, source: Path) -> Stage:
    settings, profile = job.profile.finetune, job.profile
    if settings.steps == 0:
        return transferred
    lessons = Lessons(job.examples("train", settings.items), _retained_text(profile))
    inputs = {
        "transfer": transferred.key,
        "settings": settings.model_dump(),
        "ability": examples_hash(lessons.ability),
        "retained": examples_hash(lessons.retained),
        "seed": profile.seed,
    }

    def make(folder: Path, report: Report) -> None:
        deltas = load_deltas(transferred.folder)
        tuned = finetune(
            base=job.base,
            source=source,
            deltas=deltas,
            lessons=lessons,
            settings=settings,
            seed=profile.seed,
            report=report,
        )
        save_deltas(folder, tuned)

    return job.keep("finetune", inputs, make)


def _retained_text(profile: Profile) -> list[Example]:
    """Training text of the retained tasks; tasks over the same data count once."""
    retention = profile.finetune.retention
    if retention is None:
        return []
    sources = {
        (task.train_data or task.data).model_dump_json(): task.train_data or task.data for task in profile.retain
    }
    return [
        example
        for data in sources.values()
        for example in load_examples(data, "train", retention.items_per_task, profile.seed)
    ]


def _evidence(
    job: Job, source: Path, source_key: str, transferred: Stage, final: Stage, store: Store, calibration: str
) -> Evidence:
    """Measures everything, shows it, and raises RetentionError when the ability costs too much."""
    profile = job.profile
    questions = questions_of(profile)
    base_key = fingerprint_model(job.base).model_dump_json()

    def scored(variant: str, model: Path, key: str, deltas: list[Deltas]) -> Scores:
        def make(folder: Path, _report: Report) -> None:
            save_scores(folder, measure(model, deltas, questions))

        inputs = {"model": key, "questions": questions_key(questions)}
        return load_scores(job.keep(f"evaluate-{variant}", inputs, make).folder)

    moved, tuned = (as_stored(load_deltas(stage.folder), profile.stored) for stage in (transferred, final))
    form = f"{base_key} {profile.stored} "
    variants = {
        "base": scored("base", job.base, base_key, []),
        "source": scored("source", source, source_key, []),
        "transfer": scored("transfer", job.base, form + transferred.key, [moved]),
        "delta": scored("delta", job.base, form + final.key, [tuned]),
    }
    scores = manifest_scores(questions, variants)
    job.screen.show_scores(profile.name, scores)
    problems = broken(profile.retain, variants["base"], variants["delta"])
    if problems:
        raise RetentionError(
            f"{profile.name} was not published, because it costs retained tasks too much:\n  "
            + "\n  ".join(problems)
            + "\nRaise finetune.retention.weight, lower localize.p or transfer.strength, or allow more in the profile."
        )
    neighbours = _neighbours(profile.name, job.base, store)
    pairs = {
        other: scored(f"with-{other}", job.base, form + final.key + key, [tuned, deltas])
        for other, key, deltas in neighbours
    }
    details = {
        "scores": [score.model_dump() for score in scores],
        "composed_with": pairs,
        "conflicts": {other: conflict(tuned, deltas) for other, _, deltas in neighbours},
    }
    return Evidence(scores, details, calibration)


def _neighbours(name: str, base: Path, store: Store) -> list[tuple[str, str, Deltas]]:
    """The latest version of every other ability in the store that fits the same base."""
    fingerprint = fingerprint_model(base)
    found: list[tuple[str, str, Deltas]] = []
    for other in store.names():
        version = store.latest(other)
        manifest = store.manifest(other, version)
        if other != name and manifest.base_fingerprint == fingerprint:
            deltas = read_artifact(store.path(other, version))[1]
            found.append((f"{other}@{version}", manifest.tensors_sha256, deltas))
    return found
