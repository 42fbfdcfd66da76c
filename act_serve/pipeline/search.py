"""The smallest share of channels that keeps a stated share of what the ability model gained."""

from dataclasses import asdict, dataclass

from rich.table import Table

from act_serve.errors import GainError
from act_serve.pipeline.candidate import Candidate, Origin, make_candidate, scored_rows
from act_serve.pipeline.datasets.catalogue import task_examples
from act_serve.pipeline.evaluate import Question
from act_serve.pipeline.job import Job
from act_serve.pipeline.measure import Scores
from act_serve.pipeline.scored_stage import scored
from act_serve.pipeline.search_tasks import search_tasks
from act_serve.pipeline.stage_files import load_deltas
from act_serve.profile.schema import Profile, Search

Shares = dict[str, float | None]


@dataclass(frozen=True, slots=True)
class Point:
    """One p of the curve: scores and shares of the gain kept, by task, `transfer` alone and after fine-tuning."""

    p: float
    strength: float
    rows: int
    transfer: Scores
    delta: Scores
    kept_by_transfer: Shares
    kept: Shares


@dataclass(frozen=True, slots=True)
class Curve:
    """All points tried on validation data, beside the base's and the ability model's scores there."""

    keep: float
    base: Scores
    source: Scores
    points: tuple[Point, ...]

    def as_json(self) -> dict[str, object]:
        """For evaluation.json."""
        return asdict(self)


def smallest_candidate(job: Job, origin: Origin, search: Search) -> tuple[Candidate, Curve]:
    """Builds at each p, smallest first, until one keeps the wanted share on every task, and returns that one.

    Raises GainError, after the curve is shown, when none does, or when the ability model gained nothing.
    """
    questions = search_questions(job.profile, search)
    base = scored(job, "validate-base", job.base, job.base_key, [], questions)
    source = scored(job, "validate-source", origin.source, origin.source_key, [], questions)
    points: list[Point] = []
    found: Candidate | None = None
    for p in sorted(set(search.p)):
        candidate = make_candidate(job.with_p(p), origin)
        points.append(_point(candidate, p, questions, base, source))
        if found is None and keeps(points[-1].kept, search.keep):
            found = candidate
        if found is not None and not search.whole_curve:
            break
    curve = Curve(search.keep, base, source, tuple(points))
    job.screen.console.print(curve_table(curve))
    if found is None:
        raise GainError(_refusal(job.profile.name, curve))
    return found, curve


def kept_share(base: float, source: float, delta: float, *, higher_is_better: bool) -> float | None:
    """(delta - base) / (source - base); None where the ability model is no better than the base."""
    gain = source - base
    return (delta - base) / gain if (gain > 0) == higher_is_better and gain else None


def keeps(kept: Shares, share: float) -> bool:
    """Whether every task on which there was something to gain keeps at least `share` of it."""
    known = [value for value in kept.values() if value is not None]
    return bool(known) and all(value >= share for value in known)


def curve_table(curve: Curve) -> Table:
    """One row per p: the share of the gain kept on each task, after fine-tuning and (by transfer alone)."""
    table = Table(title=f"share of the gain kept, on validation data; {curve.keep:.0%} wanted", title_justify="left")
    for heading in ("p", "λ", "rows", *curve.base):
        table.add_column(heading, justify="right")
    for point in curve.points:
        kept = (f"{_percent(point.kept[task])} ({_percent(point.kept_by_transfer[task])})" for task in curve.base)
        table.add_row(f"{point.p:.1%}", f"{point.strength:g}", str(point.rows), *kept)
    return table


def search_questions(profile: Profile, search: Search) -> list[Question]:
    """What is scored at every p, on validation data; raises DataError where there is none."""
    tasks = search_tasks(profile)
    return [Question(task, task_examples(task, task.data, "validation", search.items, profile.seed)) for task in tasks]


def _point(candidate: Candidate, p: float, questions: list[Question], base: Scores, source: Scores) -> Point:
    job = candidate.job
    moved = scored_rows(job, f"validate-p{p:g}-transfer", candidate.transferred, questions)
    tuned = scored_rows(job, f"validate-p{p:g}-delta", candidate.final, questions)

    def shares(scores: Scores) -> Shares:
        return {
            question.task.name: kept_share(
                base[question.task.name],
                source[question.task.name],
                scores[question.task.name],
                higher_is_better=question.task.metric not in ("nll", "perplexity"),
            )
            for question in questions
        }

    rows = sum(len(delta.rows) for delta in load_deltas(candidate.final.folder).values())
    return Point(p, job.profile.transfer.strengths[0], rows, moved, tuned, shares(moved), shares(tuned))


def _refusal(name: str, curve: Curve) -> str:
    if all(share is None for share in curve.points[-1].kept.values()):
        return f"{name} was not published: its source model is no better than the base on any of its tasks"
    last = curve.points[-1]
    kept = ", ".join(f"{task} {_percent(share)}" for task, share in last.kept.items() if share is not None)
    return (
        f"{name} was not published: no p of the search keeps {curve.keep:.0%} of the source's gain on every task; "
        f"p = {last.p:g} keeps {kept}. Allow a larger p, train the rows for more steps, or ask for less (--keep)."
    )


def _percent(share: float | None) -> str:
    return "no gain" if share is None else f"{share:.0%}"
