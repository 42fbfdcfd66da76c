"""Scores on answers whose score is known by hand."""

import pytest

from act_serve.pipeline.evaluate import broken, drop
from act_serve.pipeline.scorers import answer_score
from act_serve.profile.schema import Data, RetainedTask

WANTED = ['{"buyer": "Ann", "qty": 3}', '{"buyer": "Bob", "qty": 4}']


def test_exact_match_reads_json() -> None:
    given = ['Sure: {"qty": 3, "buyer": "Ann"} there', '{"buyer": "Bob", "qty": "4"}']
    assert answer_score("exact_match", given, WANTED) == 0.5
    assert answer_score("exact_match", [" yes\n", "no"], ["yes", "No"]) == 0.5
    assert answer_score("exact_match", ["{broken", "[]"], WANTED) == 0.0


def test_json_fields_counts_fields() -> None:
    assert answer_score("json_fields", ['{"buyer": "Ann", "qty": 9}', "nothing"], WANTED) == 0.25
    assert answer_score("json_fields", ["[1]", "3"], WANTED) == 0.0


def test_chrf() -> None:
    assert answer_score("chrf", ["le chat"], ["le chat"]) == pytest.approx(100.0)
    assert answer_score("chrf", ["xyz"], ["le chat"]) == 0.0


def test_language_share() -> None:
    texts = ["Ouvrez le fichier dans une nouvelle fenêtre.", "Open the file in a new window.", ""]
    assert answer_score("language_share", texts, texts, "fr") == pytest.approx(1 / 3)


def task(metric: str, max_drop: float) -> RetainedTask:
    return RetainedTask(name="kept", data=Data(test="x"), metric=metric, max_drop=max_drop)


def test_drop_knows_the_metric_s_direction() -> None:
    assert drop(task("nll", 0), 2.0, 2.1) == pytest.approx(0.05)
    assert drop(task("chrf", 0), 20.0, 19.0) == pytest.approx(0.05)
    assert drop(task("chrf", 0), 20.0, 30.0) < 0
    assert drop(task("exact_match", 0), 0.0, 0.0) == 0.0


@pytest.mark.parametrize(("delta", "refused"), [(2.05, False), (2.2, True), (float("nan"), True), (1.0, False)])
def test_gate(delta: float, refused: bool) -> None:
    assert bool(broken([task("nll", 0.03)], {"kept": 2.0}, {"kept": delta})) is refused
