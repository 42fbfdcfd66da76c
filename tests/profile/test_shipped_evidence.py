"""What the shipped abilities promise: small together, measured on enough examples, and within what they may cost.

It reads what their builds stored; `benchmarks/ability_quality.py` measures it again.
"""

import json
from pathlib import Path

import pytest

from act_serve.abilities.store import Store
from act_serve.delta.manifest import EVALUATION_FILE, Score
from act_serve.pipeline.search import kept_share

ROOT = Path(__file__).parents[2]
STORE = Store(ROOT / "abilities")
SERVED = sorted(STORE.names())
MOST_BYTES, FEWEST_ITEMS, SHARE, MOST_DROP = 60e6, 200, 0.85, 0.03


def scores(ability: str) -> tuple[Score, ...]:
    manifest = STORE.manifest(ability)
    assert manifest.scores
    return manifest.scores


def test_five_abilities_in_60_megabytes() -> None:
    assert {"fr", "de", "es", "extract", "reason"} <= set(SERVED)
    assert sum(file.stat().st_size for file in STORE.root.rglob("*") if file.is_file()) <= MOST_BYTES


@pytest.mark.parametrize("ability", SERVED)
def test_every_task_has_enough_examples(ability: str) -> None:
    assert min(score.items for score in scores(ability)) >= FEWEST_ITEMS


@pytest.mark.parametrize("ability", SERVED)
def test_most_of_the_source_s_gain_is_kept(ability: str) -> None:
    shares = {
        score.task: kept_share(score.base, score.source, score.delta, higher_is_better=score.higher_is_better)
        for score in scores(ability)
        if not score.retained and score.source is not None
    }
    assert {"nll"} < {score.metric for score in scores(ability) if score.task in shares}, (
        "by the NLL and another metric"
    )
    assert all(share is not None and share >= SHARE for share in shares.values()), shares


@pytest.mark.parametrize("ability", SERVED)
def test_no_retained_task_falls_further_than_allowed(ability: str) -> None:
    retained = [score for score in scores(ability) if score.retained]
    assert len(retained) >= 4
    for score in retained:
        worse = score.base - score.delta if score.higher_is_better else score.delta - score.base
        assert worse <= MOST_DROP * abs(score.base), score


@pytest.mark.parametrize("ability", SERVED)
def test_the_neighbours_that_it_was_measured_beside_are_stored(ability: str) -> None:
    folder = STORE.path(ability, STORE.manifest(ability).version)
    evaluation = json.loads((folder / EVALUATION_FILE).read_text())
    assert len(evaluation["composed_with"]) >= 3
    assert evaluation["composed_with"].keys() == evaluation["conflicts"].keys()
