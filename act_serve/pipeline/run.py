"""The whole build of one ability, stage by stage (arXiv 2601.09398, section 3)."""

from pathlib import Path

from rich.markup import escape

from act_serve.abilities.store import Store
from act_serve.pipeline.candidate import Candidate, Origin, make_candidate
from act_serve.pipeline.evidence import gather_evidence
from act_serve.pipeline.job import Job
from act_serve.pipeline.neighbours import neighbour_labels
from act_serve.pipeline.parent import Parent
from act_serve.pipeline.plan import make_plan
from act_serve.pipeline.prepare import prepare
from act_serve.pipeline.processes import is_first
from act_serve.pipeline.progress import Screen
from act_serve.pipeline.publish import publish, published
from act_serve.pipeline.search import Curve, smallest_candidate
from act_serve.pipeline.source_model import source_model
from act_serve.pipeline.stage_files import load_deltas
from act_serve.pipeline.tuned_rows import tuned_rows
from act_serve.pipeline.work_lock import alone_in
from act_serve.profile.schema import Profile

PLAN_EXAMPLES = 8


def build(profile: Profile, *, store: Store, work: Path, screen: Screen) -> Path:
    """Builds the ability of `profile` and returns the folder of its new version in `store`.

    Of several processes (`accelerate launch`) the first one publishes; the others return the folder of the rows.
    Finished stages lie in `work` and are used again by the next build with the same inputs; one build at a time works
    there. Raises RetentionError when a retained task falls too far and GainError when a search finds no share of
    channels that keeps enough (nothing is published then), and any other ActServeError with what to do.
    """
    job, parent = prepare(profile, store=store, work=work, screen=screen)
    _show_plan(job, store)
    with alone_in(work, lambda said: screen.note(escape(said))):
        return _build(job, parent, store)


def _build(job: Job, parent: Parent | None, store: Store) -> Path:
    candidate, origin, curve = _continued(job, parent) if parent else _made(job)
    if not is_first():
        return candidate.final.folder
    evidence = gather_evidence(candidate, origin, store, curve)
    deltas, settled = load_deltas(candidate.final.folder), candidate.job.profile
    descent = origin.descent(settled, job.base)
    folder = publish(profile=settled, base=job.base, descent=descent, deltas=deltas, evidence=evidence, store=store)
    job.screen.note(escape(published(settled.name, folder, store)))
    return folder


def _made(job: Job) -> tuple[Candidate, Origin, Curve | None]:
    source, source_key = source_model(job)
    origin = Origin(source, source_key, job.examples("train", job.profile.localize.calibration_items))
    if job.profile.search is None:
        return make_candidate(job, origin), origin, None
    candidate, curve = smallest_candidate(job, origin, job.profile.search)
    return candidate, origin, curve


def _continued(job: Job, parent: Parent) -> tuple[Candidate, Parent, None]:
    rows = parent.rows(job)
    return Candidate(job, rows, tuned_rows(job, rows), {}), parent, None


def show_plan(profile: Profile, store: Store, screen: Screen) -> None:
    """Shows what building `profile` would do, and does none of it; raises what `prepare` does where it can't."""
    job, _ = prepare(profile, store=store, work=Path(), screen=screen)
    _show_plan(job, store)


def _show_plan(job: Job, store: Store) -> None:
    sample = job.examples("train", PLAN_EXAMPLES)
    others = neighbour_labels(store, job.base, job.profile.name)
    job.screen.show_plan(job.profile.name, make_plan(job.profile, job.base, sample, others))
