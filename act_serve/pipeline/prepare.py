"""Finds and checks all that a build will read, before the first minute is spent."""

from pathlib import Path

from act_serve.abilities.store import Store
from act_serve.models.loading import resolve_model
from act_serve.models.pairs import check_pair, differing_maths, differing_templates, left_out, others_that_differ
from act_serve.pipeline.budget import settle_budget
from act_serve.pipeline.candidate import strength_question
from act_serve.pipeline.job import Job
from act_serve.pipeline.measure import questions_of
from act_serve.pipeline.neighbours import company
from act_serve.pipeline.parent import Parent, find_parent
from act_serve.pipeline.progress import Screen
from act_serve.pipeline.search import search_questions
from act_serve.pipeline.tuned_rows import retained_text
from act_serve.profile.schema import Profile


def prepare(profile: Profile, *, store: Store, work: Path, screen: Screen) -> tuple[Job, Parent | None]:
    """Returns the job of a build and the ability that it goes on from, if any.

    Shows what of a ready-made ability model no row carries. Raises ModelError or PairMismatchError for models that
    can't be used, UnknownAbilityError or BaseMismatchError for the ability to go on from, BuildError for company or a
    budget that can't be had, ProfileError for a budget beside a search, and DataError for examples that are missing,
    malformed or none.
    """
    base = resolve_model(profile.base)
    job = Job(settle_budget(profile, base), base, work, screen, company(profile, store, base))
    parent = find_parent(profile.source.ability, store, base) if profile.source.ability else None
    if profile.source.model is not None:
        _check_source(job, resolve_model(profile.source.model))
    _check_data(job)
    return job, parent


def _check_source(job: Job, source: Path) -> None:
    include = job.profile.localize.include
    check_pair(job.base, source, include)
    for differing in (differing_maths(job.base, source), differing_templates(job.base, source)):
        if differing:
            job.screen.warn(differing)
    if count := others_that_differ(job.base, source, include):
        job.screen.note(left_out(count))


def _check_data(job: Job) -> None:
    """Reads what later stages read; the makers of large data keep it for them."""
    profile = job.profile
    job.examples("train", 1)
    if profile.search is not None:
        search_questions(profile, profile.search)
    if len(profile.transfer.strengths) > 1:
        strength_question(profile)
    if profile.finetune.steps:
        retained_text(profile)
    questions_of(profile)
