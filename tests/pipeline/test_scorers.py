"""Scores on answers whose score is known by hand."""

import pytest

from act_serve.errors import DataError
from act_serve.models.examples import Example
from act_serve.pipeline.evaluate import Question, broken, drop
from act_serve.pipeline.scorers import answer_score
from act_serve.profile.schema import Data, RetainedTask, Task

WANTED = ['{"buyer": "Ann", "qty": 3}', '{"buyer": "Bob", "qty": 4}']


def test_exact_match_reads_json() -> None:
    given = ['{"qty": 3, "buyer": "Ann"}\n', '{"buyer": "Bob", "qty": "4"}']
    assert answer_score("exact_match", given, WANTED) == 0.5
    assert answer_score("exact_match", [" yes\n", "no"], ["yes", "No"]) == 0.5
    assert answer_score("exact_match", ["{broken", "[]"], WANTED) == 0.0


@pytest.mark.parametrize(
    ("given", "wanted", "right"),
    [
        ("y = {}", "x = {}", False),
        ('No: {"a": 1} oh', 'Set the file to {"a": 1} and restart.', False),
        ('Sure: {"buyer": "Ann", "qty": 3} there', WANTED[0], False),
        (f"{WANTED[0]} {WANTED[1]}", WANTED[0], False),
        (f"```json\n{WANTED[0]}\n```", '{"qty":3,"buyer":"Ann"}', True),
        (f"```\n{WANTED[0]}```", WANTED[0], True),
        (f"Here it is:\n```json\n{WANTED[0]}\n```", WANTED[0], False),
        ("[1,2]", "[1, 2]", True),
        ("{}", "[]", False),
        ("none", "{}", False),
        ("1.0", "1", False),
        ("true", "1", False),
        ("[" * 100_000, "[]", False),
    ],
)
def test_exact_match_is_of_whole_answers(given: str, wanted: str, right: bool) -> None:
    assert answer_score("exact_match", [given], [wanted]) == float(right)


def test_json_fields_counts_fields() -> None:
    assert answer_score("json_fields", ['{"buyer": "Ann", "qty": 9}', "nothing"], WANTED) == 0.25
    assert answer_score("json_fields", ["[1]", "3"], WANTED) == 0.0
    assert answer_score("json_fields", [f"Sure: {WANTED[0]} there", "{broken"], WANTED) == 0.5


@pytest.mark.parametrize(
    ("given", "wanted", "right"),
    [
        ("3 + 4 = 7. Answer: 7.", "Answer: 7", True),
        ("1,234 in all", "1234", True),
        ("007", "7", True),
        ("first 8, then 9", "8", False),
        ("pages 10-12", "12", True),
        ("word-12", "12", True),
        ("no number", "7", False),
        ("It costs 3.5", "5", False),
        ("It costs 3.5", "3.50", True),
        ("It costs 1,234.5.", "1234.5", True),
        ("It costs 1,234.5", "5", False),
        ("0.5", ".5", True),
        ("one of 1, 2", "2", True),
        ("one of 1,2,3", "3", True),
        ("Réponse : 2,5", "3,5", False),
        ("Réponse : 2,5.", "2.5", True),
        ("-12,50 euros", "-12.5", True),
        ("0,250", "0.25", True),
        ("1,250", "1250", True),
        ("1,250.", "1.25", False),
        ("12,345,678.9", "12345678.9", True),
        ("1234,567", "1234.567", True),
        ("1.234,5", "1234.5", True),
        ("1.2,3", "3", True),
        ("1,250,5", "5", True),
        ("1,234,567", "1234567", True),
        ("1.000", "0", False),
        ("1.000", "1", True),
        ("-12", "12", False),
        ("x = -12.", "-12.0", True),
        ("\N{MINUS SIGN}12", "-12", True),
        ("7 - 3 = 4, so 10%-12", "12", True),
        ("9" * 5000, "9" * 5000 + ".0", True),
    ],
)
def test_final_number_is_compared_by_its_value(given: str, wanted: str, right: bool) -> None:
    assert answer_score("final_number", [given], [wanted]) == float(right)


def test_chrf() -> None:
    assert answer_score("chrf", ["le chat"], ["le chat"]) == pytest.approx(100.0)
    assert answer_score("chrf", ["xyz"], ["le chat"]) == 0.0


def test_language_share() -> None:
    texts = ["Ouvrez le fichier dans une nouvelle fenêtre.", "Open the file in a new window.", ""]
    assert answer_score("language_share", texts, texts, "fr") == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("metric", "wrong", "said"),
    [
        ("final_number", Example("How many?", "none"), r"example 2 \('How many\?'\): its answer has no number"),
        ("json_fields", Example("Extract.", "Order: {}"), "its answer is no JSON object"),
        ("json_fields", Example("Extract.", "[1]"), "its answer is no JSON object"),
        ("exact_match", Example(None, "plain"), "plain text without a prompt .* nll or perplexity"),
        ("choice_accuracy", Example("Pick.", "a", ("a", "")), "two `choices` or more, none of them empty"),
    ],
)
def test_examples_that_a_metric_cannot_score_are_named(metric: str, wrong: Example, said: str) -> None:
    task = Task(name="demo", data=Data(test="x"), metric=metric)
    right = Example("Extract.", '{"qty": 3}', ('{"qty": 3}', "none"))
    assert Question(task, [right]).examples == [right]
    with pytest.raises(DataError, match=f"^demo: {metric} can't score .*{said}"):
        Question(task, [right, wrong])


@pytest.mark.parametrize("language", ["xx", "FR", "french"])
def test_a_language_that_language_share_does_not_know_is_named(language: str) -> None:
    with pytest.raises(DataError, match=f"^demo: language_share knows no language '{language}'"):
        Question(Task(name="demo", data=Data(test="x"), metric="language_share", language=language), [])


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
