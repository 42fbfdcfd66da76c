"""What the report says about sufficiency."""

from collections.abc import Sequence

from act_serve.pipeline.analyze import pictures
from act_serve.pipeline.analyze.concentration import HEADLINE_P
from act_serve.pipeline.analyze.finding import Finding, Verdict, exact, percent, worst
from act_serve.pipeline.analyze.sufficiency import (
    CHOSEN,
    CHOSEN_TUNED,
    RANDOM,
    RANDOM_TUNED,
    Sufficiency,
    smallest_sufficient,
)

KEEP = 0.85
# A search of a build chooses on validation data; here the same scores choose and tell.
ON_TEST_DATA = "chosen and measured on the same test data"
CONTROLS = {CHOSEN: RANDOM, CHOSEN_TUNED: RANDOM_TUNED}


def sufficiency_finding(records: Sequence[Sufficiency]) -> Finding:
    """Judges all tasks of one ability by the smallest p that keeps `KEEP` of the ability model's gain."""
    ability = records[0].ability
    return Finding(
        key=f"sufficiency-{ability}",
        title=f"Sufficiency: {ability}",
        verdict=worst([_verdict(record) for record in records]),
        criterion=f"Holds when {exact(HEADLINE_P)} of the parameters or fewer keep {exact(KEEP)} of the ability "
        "model's gain in every task and random rows keep less; partly when more parameters or random rows do, too. "
        f"The smallest p is {ON_TEST_DATA}.",
        sentences=(
            f"Each curve says how well the base does with rows of the ability model, {_lines(records[0])}: blue are "
            "the chosen rows, orange is the control, as many parameters in random rows.",
            f"{'; '.join([_said(record) for record in records])}.",
        ),
        picture=pictures.draw_sufficiency(records),
        headings=("task", "metric", "items", "rows", "p", "score", "of the gain", "base", "ability model"),
        rows=tuple(
            (
                *(r.task, r.metric, str(r.items), name, exact(p), f"{score:.4g}"),
                *(_kept(r.kept(score)), f"{r.base:.4g}", f"{r.source:.4g}"),
            )
            for r in records
            for name, points in r.curves.items()
            for p, score in points
        ),
    )


def _verdict(record: Sufficiency) -> Verdict:
    if record.kept(record.base) is None:
        return "not judged"
    found = smallest_sufficient(record, KEEP)
    if found is None:
        return "does not hold"
    p, name = found
    mine, control = record.kept_at(name, p), record.kept_at(CONTROLS[name], p)
    beats = mine is not None and control is not None and mine > control
    return "holds" if p <= HEADLINE_P and beats else "holds partly"


def _said(record: Sufficiency) -> str:
    if record.kept(record.base) is None:
        return f"{record.task}: the ability model ({record.source:.4g}) is no better than the base ({record.base:.4g})"
    name = CHOSEN_TUNED if CHOSEN_TUNED in record.curves else CHOSEN
    p = _headline(record, name)
    found = smallest_sufficient(record, KEEP)
    reach = (
        f"p = {exact(found[0])} ({found[1]}, {ON_TEST_DATA}) is the smallest that keeps"
        if found
        else "no measured p keeps"
    )
    tuned = f" and {_kept(record.kept_at(name, p))} after fine-tuning" if name == CHOSEN_TUNED else ""
    return (
        f"{record.task}: at p = {exact(p)} the chosen rows keep {_kept(record.kept_at(CHOSEN, p))} of the gain"
        f"{tuned}, random rows {_kept(record.kept_at(CONTROLS[name], p))}, and {reach} {exact(KEEP)}"
    )


def _lines(record: Sufficiency) -> str:
    return "as they are (dashed) or trained lightly (full)" if CHOSEN_TUNED in record.curves else "as they are"


def _headline(record: Sufficiency, curve: str) -> float:
    """The measured p that is nearest to 5 %."""
    return min((p for p, _ in record.curves[curve]), key=lambda p: abs(p - HEADLINE_P))


def _kept(share: float | None) -> str:
    return "-" if share is None else percent(share)
