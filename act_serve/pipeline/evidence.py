"""What a finished delta does, measured: itself beside base, source and transfer alone, and beside its neighbours."""

import math
from collections.abc import Collection, Mapping

from act_serve.abilities.store import Store
from act_serve.delta.artifact import as_stored
from act_serve.errors import GainError, ModelError, RetentionError
from act_serve.pipeline.candidate import Candidate, Origin, scored_rows
from act_serve.pipeline.conflict import conflict
from act_serve.pipeline.evaluate import broken
from act_serve.pipeline.job import Job
from act_serve.pipeline.kept_gain import Kept, gain_shows, kept_gain, lost_gain
from act_serve.pipeline.measure import (
    Scores,
    asked_of,
    examples_of,
    load_intervals,
    load_results,
    manifest_scores,
    questions_of,
)
from act_serve.pipeline.neighbours import neighbours
from act_serve.pipeline.parent import Parent
from act_serve.pipeline.publish import Evidence
from act_serve.pipeline.scored_stage import scored
from act_serve.pipeline.search import Curve
from act_serve.pipeline.stage_files import load_deltas


def gather_evidence(candidate: Candidate, origin: Origin | Parent, store: Store, curve: Curve | None) -> Evidence:
    """Measures everything on held-out data and shows it.

    Raises ModelError when a score is not finite, RetentionError when the ability costs too much, and GainError when it
    keeps less of the ability model's gain than the search (`curve`) asked for, beyond what chance explains.
    """
    job, profile = candidate.job, candidate.job.profile
    questions = questions_of(profile)
    variants = {"base": scored(job, "evaluate-base", job.base, job.base_key, [], questions)}
    if isinstance(origin, Origin):
        variants["source"] = scored(job, "evaluate-source", origin.source, origin.source_key, [], questions)
        variants["transfer"] = scored_rows(job, "evaluate-transfer", candidate.transferred, questions)
    variants["delta"] = scored_rows(job, "evaluate-delta", candidate.final, questions)
    measured = list(variants)
    if isinstance(origin, Parent):
        variants |= origin.scores(questions)
    _refuse_not_finite(profile.name, variants)
    intervals = {variant: load_intervals(job.work / f"evaluate-{variant}") for variant in measured}
    scores = manifest_scores(questions, variants)
    job.screen.show_scores(profile.name, scores, intervals["delta"])
    _refuse_costly(job, variants["base"], variants["delta"])
    kept, shown = _kept(job) if isinstance(origin, Origin) else ({}, set())
    if curve:
        _refuse_lost_gain(job, kept, curve.keep, shown)
    tuned = as_stored(load_deltas(candidate.final.folder), profile.stored)
    others = neighbours(store, job.base, profile.name, job.screen.warn)
    form = f"{job.base_key} {profile.stored} {candidate.final.key}"
    pairs = {
        other.label: scored(
            job, f"evaluate-with-{other.label}", job.base, form + other.key, [tuned, other.deltas], questions
        )
        for other in others
    }
    _refuse_not_finite(profile.name, {f"delta with {label}": scores for label, scores in pairs.items()})
    details = {
        "examples": examples_of(questions),
        "asked": asked_of(questions),
        "scores": [score.model_dump() for score in scores],
        "intervals": intervals,
        "share_kept": {
            task: {"value": share[0], "interval": share[1]} for task, share in kept.items() if share is not None
        },
        "composed_with": pairs,
        "composed_intervals": {label: load_intervals(job.work / f"evaluate-with-{label}") for label in pairs},
        "conflicts": {other.label: conflict(tuned, other.deltas) for other in others},
        "strengths_on_validation": candidate.strengths,
        "search": curve.as_json() if curve else None,
        "peak_bytes": dict(job.peak_bytes),
    }
    return Evidence(scores, details)


def _kept(job: Job) -> tuple[dict[str, Kept | None], set[str]]:
    """The share of the ability model's gain that the delta keeps, by task, and the tasks that show a gain at all."""
    base, source, delta = (load_results(job.work / f"evaluate-{variant}") for variant in ("base", "source", "delta"))
    names = [task.name for task in job.profile.score]
    kept = {name: kept_gain(base[name], source[name], delta[name]) for name in names}
    return kept, {name for name in names if gain_shows(base[name], source[name])}


def _refuse_lost_gain(job: Job, kept: Mapping[str, Kept | None], wanted: float, shown: Collection[str]) -> None:
    """The search saw validation data alone; here are the test examples. Warns where these can't tell."""
    missed, by_chance = lost_gain(kept, wanted, shown)
    said = f"of the source's gain on the test examples, where {wanted:.0%} was asked for: {'; '.join(missed)}"
    if not by_chance:
        raise GainError(
            f"{job.profile.name} was not published: it keeps too little {said}. Allow a larger p, train the rows for "
            "more steps, search on more items, or ask for less (--keep)."
        )
    if missed:
        job.screen.warn(f"less is kept {said}; chance may explain that")
    if not any(kept.values()):
        job.screen.warn(
            "the source model is no better than the base on any task's test examples, only on validation data"
        )


def _refuse_not_finite(name: str, variants: Mapping[str, Scores]) -> None:
    for variant, scores in variants.items():
        for task, score in scores.items():
            if not math.isfinite(score):
                raise ModelError(
                    f"{name} was not published, because the {variant} scores {score} on {task}: its weights or outputs "
                    "are not finite. Check the model folders of base and source; where these score well, lower "
                    "transfer.strength or finetune.learning_rate"
                )


def _refuse_costly(job: Job, base: Scores, delta: Scores) -> None:
    problems = broken(job.profile.retain, base, delta)
    if problems:
        raise RetentionError(
            f"{job.profile.name} was not published, because it costs retained tasks too much:\n  "
            + "\n  ".join(problems)
            + "\nRaise finetune.retention.weight, lower localize.p or transfer.strength, or allow more in the profile."
        )
