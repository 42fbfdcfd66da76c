"""Nothing is decided by scores that are no numbers, or trained for tasks that can have none."""

import math
from pathlib import Path
from typing import Any

import pytest

from act_serve.abilities.store import Store
from act_serve.errors import DataError, ModelError
from act_serve.pipeline import candidate, evidence
from act_serve.pipeline.scored_stage import scored
from tests.abilities_for_tests import publish_random
from tests.pipeline.test_run import P, build, profile_file
from tests.tiny_models import make_llama, plant


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ("evaluate-base", "the base scores nan on demo_nll"),
        ("evaluate-source", "the source scores nan on demo_nll"),
        ("evaluate-transfer", "the transfer scores nan on demo_nll"),
        ("evaluate-delta", "the delta scores nan on demo_nll"),
        ("evaluate-with-first@1", "the delta with first@1 scores nan on demo_nll"),
    ],
)
def test_scores_that_are_not_finite_are_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, said: str
) -> None:
    def broken(job: Any, name: str, *what: Any) -> dict[str, float]:
        return scored(job, name, *what) | ({"demo_nll": math.nan} if name == stage else {})

    base = make_llama(tmp_path / "base")
    plant(base, tmp_path / "source", p=P, scale=0.3)
    publish_random(Store(tmp_path / "store"), base, "first", seed=1)
    for module in (candidate, evidence):
        monkeypatch.setattr(module, "scored", broken)
    with pytest.raises(ModelError, match=f"^demo was not published, because {said}"):
        build(tmp_path, profile_file(tmp_path, finetune={"steps": 0}, retain=[]))
    assert Store(tmp_path / "store").names() == ["first"]


def test_examples_that_a_metric_cannot_score_are_found_before_anything_is_trained(tmp_path: Path) -> None:
    plant(make_llama(tmp_path / "base"), tmp_path / "source", p=P, scale=0.3)
    score = [{"name": "number", "metric": "final_number", "items": 5, "data": {"test": "ability.jsonl"}}]
    with pytest.raises(DataError, match=r"^number: final_number can't score example 1 \('say a'\)"):
        build(tmp_path, profile_file(tmp_path, score=score))
    assert not (tmp_path / "work").exists()
