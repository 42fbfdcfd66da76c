"""The sections of `benchmarks/ability_quality.py`: each returns figures ready for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from act_serve.delta.artifact import ModuleDelta, read_artifact
from act_serve.delta.composition import Composition
from act_serve.delta.manifest import Score
from act_serve.pipeline.conflict import conflict
from act_serve.pipeline.datasets.general_ability import SUITES
from act_serve.pipeline.evaluate import Question
from act_serve.pipeline.measured import Measured, difference
from act_serve.profile.schema import Data, Task
from benchmarks.ability_bench import (
    Bench,
    Figure,
    fallen,
    figure,
    gain_kept,
    name_of,
    scored,
)

GENERAL_ITEMS = 300
# Two compositions that differ by 0.05 of their exact answers need some 600 problems to be told apart.
FRENCH_ITEMS = 600
# fr@2 learned to answer in French; fr@1 only translated, and later ones are half of it. The weight was chosen on
# validation problems.
FRENCH = "fr@2"
FRENCH_REASONING = (f"{FRENCH}*0.5+reason", "fr*0.5+reason", "fr+reason")


def quality(bench: Bench) -> Figure:
    """Per ability: base, source, transfer alone and delta; the share of the source's gain kept; retained drops."""
    return {name: _quality(bench, name) for name in bench.manifests}


def _quality(bench: Bench, name: str) -> Figure:
    manifest, source = bench.manifests[name], bench.source(name)
    own, retained = bench.own(name), bench.retained(name)
    base, delta = (bench.measure(composition, [*own, *retained]) for composition in ("", name))
    measured = bench.measure("", own, model=source) if source else {}
    stored = {} if bench.draws_other_examples(name) else {score.task: score for score in manifest.scores}
    tasks = []
    for question in own:
        task = question.task.name
        entry = {**_stored(stored.get(task)), **asked(question), "base": scored(base[task])}
        if task in measured:
            entry["source"] = scored(measured[task])
            entry["share_kept"] = gain_kept(base[task], measured[task], delta[task])
        elif "source" in entry:
            entry["share_kept"] = _share_of_stored(base[task], entry["source"]["score"], delta[task])
        tasks.append({**entry, "delta": scored(delta[task])})
    kept = [
        {
            **_stored(stored.get(question.task.name)),
            **asked(question),
            "base": scored(base[question.task.name]),
            "delta": scored(delta[question.task.name]),
            "drop": fallen(base[question.task.name], delta[question.task.name]),
        }
        for question in retained
    ]
    how = manifest.localization
    return {
        "version": manifest.version,
        "digest": manifest.digest,
        "stored": manifest.stored,
        "bytes": manifest.counts.bytes,
        "parameters": manifest.counts.parameters,
        "p": how.p if how else None,
        "ranking": how.ranking if how else None,
        "fine_tune_steps": how.fine_tune_steps if how else None,
        "source": bench.source_state(name) if source else "not at hand",
        "tasks": tasks,
        "retained": kept,
    }


def asked(question: Question) -> Figure:
    """What a task is, for JSON."""
    return {"task": question.task.name, "metric": question.task.metric, "items": len(question.examples)}


def _stored(score: Score | None) -> Figure:
    """What only the build could measure, from the artifact's manifest, marked as such."""
    if score is None:
        return {}
    found = {"source": score.source, "transfer": score.transfer}
    return {
        name: {"score": value, "stored_figure_on_items": score.items}
        for name, value in found.items()
        if value is not None
    }


def _share_of_stored(base: Measured, source: float, delta: Measured) -> Figure | None:
    """The share against the stored figure of the source, which has no items to resample."""
    gain = source - base.score
    return {"value": round((delta.score - base.score) / gain, 4), "stored_source": True} if gain else None


def general(bench: Bench) -> Figure:
    """ARC-easy, PIQA and HellaSwag by likelihood per character: base, each ability, and all of them composed."""
    profile = next(iter(bench.profiles.values()))
    tasks = [
        Task(
            name=suite,
            metric="choice_accuracy",
            items=GENERAL_ITEMS,
            data=Data(maker="general_ability", options={"suite": suite}),
        )
        for suite in SUITES
    ]
    questions = bench.questions(profile, tasks)
    base = bench.measure("", questions)
    found: Figure = {"base": {suite: scored(result) for suite, result in base.items()}}
    every = "+".join(bench.profiles)
    for composition in dict.fromkeys((*bench.manifests, every)):
        results = bench.measure(composition, questions)
        found[composition] = {suite: _beside(base[suite], results[suite]) for suite in SUITES}
    return found


def _beside(base: Measured, result: Measured) -> Figure:
    low, high = base.interval
    change = figure(*difference(result, base))
    return {**scored(result), "change": change, "within_interval_of_base": low <= result.score <= high}


def pairs(bench: Bench) -> Figure:
    """Every two abilities composed: what each keeps of its own gain, and how much their rows conflict."""
    found = {}
    for left, right in combinations(bench.manifests, 2):
        if name_of(left) != name_of(right):
            clash = conflict(*(stored_deltas(bench, ability) for ability in (left, right)))
            clash.pop("modules")
            composition = f"{left}+{right}"
            found[composition] = {"conflict": clash, "abilities": composed(bench, composition)}
    return found


def stored_deltas(bench: Bench, ability: str) -> dict[str, ModuleDelta]:
    """The rows of an ability that the bench measures, by module."""
    manifest = bench.manifests[ability]
    return read_artifact(bench.store / manifest.name / str(manifest.version))[1]


def triples(bench: Bench, compositions: Sequence[str]) -> Figure:
    """Several abilities composed: what each keeps of its own gain."""
    return {each: {"abilities": composed(bench, each)} for each in compositions}


def composed(bench: Bench, composition: str) -> Figure:
    """Each ability's own tasks: base, alone, together, the share of its own gain that it keeps, and the change.

    Alone is the same version at weight 1, whatever its weight in the composition: what it can do at its best.
    """
    found: Figure = {}
    for ability in Composition.parse(composition).abilities:
        itself = ability.name if ability.version is None else f"{ability.name}@{ability.version}"
        questions = bench.own(itself)
        base, alone, together = (bench.measure(each, questions) for each in ("", itself, composition))
        found[itself] = [
            {
                **asked(question),
                "base": scored(base[task]),
                "alone": scored(alone[task]),
                "together": scored(together[task]),
                "share_kept": gain_kept(base[task], alone[task], together[task]),
                "change": figure(*difference(together[task], alone[task])),
            }
            for question in questions
            for task in (question.task.name,)
        ]
    return found


def multilingual(bench: Bench) -> Figure:
    """Word problems in French, which neither ability was trained on: base, fr, reason, and both composed."""
    data = Data(maker="word_problems", options={"language": "fr"})
    tasks = [
        Task(name="reason_in_french", metric="final_number", max_new_tokens=80, data=data, items=FRENCH_ITEMS),
        Task(name="reason_in_french_nll", metric="nll", data=data, items=FRENCH_ITEMS),
    ]
    questions = bench.questions(bench.profiles["reason"], tasks)
    alone = {each or "base": bench.measure(each, questions) for each in ("", FRENCH, "reason")}
    both = {each: bench.measure(each, questions) for each in FRENCH_REASONING}
    return {
        task: {
            **asked(question),
            **{each: scored(found[task]) for each, found in alone.items()},
            "composed": {
                each: {
                    **scored(composed[task]),
                    "minus": {
                        other: figure(*difference(composed[task], found[task])) for other, found in alone.items()
                    },
                }
                for each, composed in both.items()
            },
        }
        for question in questions
        for task in (question.task.name,)
    }


def repair(bench: Bench) -> Figure:
    """For each ability model: the ability that it lost most is given back by its delta (the paper's first experiment).

    Only for ability models that are at hand. The loss is by the lost ability's own tasks, base against ability model.
    """
    found = {}
    for name in bench.profiles:
        model = bench.source(name)
        lost = _most_lost(bench, name) if model else None
        if model and lost:
            found[f"{name} gets back {lost}"] = {
                "source": bench.source_state(name),
                "own": _own_kept(bench, name, lost),
                "lost": _given_back(bench, bench.own(lost), name, lost),
            }
    return found


def _most_lost(bench: Bench, name: str) -> str | None:
    """The other ability whose NLL rose by the largest share in this one's model; None where none rose."""
    falls = {}
    for other in bench.profiles:
        questions = [question for question in bench.own(other) if question.task.metric == "nll"][:1]
        if other != name and questions:
            task = questions[0].task.name
            before, after = (bench.measure("", questions, model=model)[task] for model in (None, bench.source(name)))
            falls[other] = (after.score - before.score) / before.score
    worst = max(falls, key=lambda other: falls[other], default=None)
    return worst if worst and falls[worst] > 0 else None


def _own_kept(bench: Bench, name: str, lost: str) -> list[Figure]:
    """The ability model's own tasks before and after the other ability's delta."""
    questions, model = bench.own(name), bench.source(name)
    before, after = (bench.measure(each, questions, model=model) for each in ("", lost))
    return [
        {
            **asked(question),
            "specialised": scored(before[task]),
            "repaired": scored(after[task]),
            "drop": fallen(before[task], after[task]),
        }
        for question in questions
        for task in (question.task.name,)
    ]


def _given_back(bench: Bench, questions: Sequence[Question], name: str, lost: str) -> list[Figure]:
    """`recovered` is of the loss against the base; `of_skill` of what lies between the model and base + delta."""
    model = bench.source(name)
    before, after = (bench.measure(each, questions, model=model) for each in ("", lost))
    base, skilled = (bench.measure(each, questions) for each in ("", lost))
    return [
        {
            **asked(question),
            "base": scored(base[task]),
            "specialised": scored(before[task]),
            "repaired": scored(after[task]),
            "base_with_delta": scored(skilled[task]),
            "recovered": gain_kept(before[task], base[task], after[task]),
            "of_skill": gain_kept(before[task], skilled[task], after[task]),
        }
        for question in questions
        for task in (question.task.name,)
    ]
