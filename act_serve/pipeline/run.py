"""The whole build of one ability, stage by stage (arXiv 2601.09398, section 3)."""

from pathlib import Path

from act_serve.abilities.store import Store
from act_serve.models.loading import resolve_model
from act_serve.models.pairs import check_pair
from act_serve.pipeline.budget import settle_budget
from act_serve.pipeline.candidate import Origin, make_candidate
from act_serve.pipeline.evidence import gather_evidence
from act_serve.pipeline.job import Job
from act_serve.pipeline.neighbours import company
from act_serve.pipeline.plan import make_plan
from act_serve.pipeline.progress import Screen
from act_serve.pipeline.publish import publish
from act_serve.pipeline.search import smallest_candidate
from act_serve.pipeline.source_model import source_model
from act_serve.pipeline.stage_files import load_deltas
from act_serve.profile.schema import Profile

PLAN_EXAMPLES = 8


def build(profile: Profile, *, store: Store, work: Path, screen: Screen) -> Path:
    """Builds the ability of `profile` and returns the folder of its new version in `store`.

    Finished stages lie in `work` and are used again by the next build with the same inputs. Raises RetentionError
    when a retained task falls too far and GainError when a search finds no share of channels that keeps enough
    (nothing is published then), and any other ActServeError with what to do.
    """
    base = resolve_model(profile.base)
    job = Job(settle_budget(profile, base), base, work, screen, company(profile, store, base))
    if profile.source.model is not None:
        check_pair(job.base, resolve_model(profile.source.model))
    _show_plan(job)
    source, source_key = source_model(job)
    origin = Origin(source, source_key, job.examples("train", profile.localize.calibration_items))
    if profile.search is None:
        candidate, curve = make_candidate(job, origin), None
    else:
        candidate, curve = smallest_candidate(job, origin, profile.search)
    evidence = gather_evidence(candidate, origin, store, curve)
    deltas, settled = load_deltas(candidate.final.folder), candidate.job.profile
    folder = publish(profile=settled, base=job.base, source=source, deltas=deltas, evidence=evidence, store=store)
    screen.note(f"published [bold]{profile.name}@{folder.name}[/bold] in {folder}")
    return folder


def show_plan(profile: Profile, screen: Screen) -> None:
    """Shows what building `profile` would do, and does none of it."""
    base = resolve_model(profile.base)
    _show_plan(Job(settle_budget(profile, base), base, Path(), screen))


def _show_plan(job: Job) -> None:
    sample = job.examples("train", PLAN_EXAMPLES)
    job.screen.show_plan(job.profile.name, make_plan(job.profile, job.base, sample))
