from __future__ import annotations

import logging

import pytest

from act_serve.abilities import skills as skills_module
from act_serve.abilities.catalogue import AbilityEntry, CatalogueView, VersionEntry
from act_serve.abilities.detect import choose
from act_serve.abilities.skills import Skills, background, fit_skills, skills_key
from act_serve.delta.manifest import Manifest
from tests.abilities.manifests import WORD_PROBLEMS, manifest

MATH = manifest("math", kind="skill", exemplars=WORD_PROBLEMS)
DE = manifest("de", kind="language", languages=("de",), exemplars=("Wie speichere ich ein Dokument?",))


def view(*manifests: Manifest) -> CatalogueView:
    return CatalogueView({m.name: AbilityEntry(m.name, (VersionEntry(m.version, m),)) for m in manifests})


@pytest.fixture(scope="module")
def skills() -> Skills:
    return fit_skills(view(MATH, DE))


PROBLEMS = ["Omar has 80 euros and buys 4 shirts at 15 euros each. How much money has he left?",
            "A bus ride takes 2 hours and 10 minutes. How many minutes is that?",
            "Paul a 6 boîtes de 8 stylos et en donne 9. Combien de stylos lui reste-t-il ?"]  # fmt: skip
NONE = ["What is the capital of Norway?", "Write a poem about 3 cats.", "ok", "print('hello')", "", "   ",
        "In 1815 Napoleon lost a battle. Where was it?", "Give me 7 ideas for a birthday present."]  # fmt: skip


@pytest.mark.parametrize("text", PROBLEMS)
def test_problems_unlike_the_exemplars_in_words_and_numbers_choose_the_skill(text: str, skills: Skills) -> None:
    guess = skills.guess(text)
    assert guess is not None
    assert guess.skill == "math"
    assert skills.least <= guess.confidence <= 1


@pytest.mark.parametrize("text", NONE)
def test_anything_else_chooses_no_skill(text: str, skills: Skills) -> None:
    assert skills.guess(text) is None


def test_language_and_skill_are_chosen_together_and_both_are_explained(skills: Skills) -> None:
    both = view(MATH, DE)
    choice = choose("Answer in German: " + PROBLEMS[0], both, skills=skills)
    assert [a.name for a in choice.abilities] == ["de", "math"]
    assert "asks for the language de" in choice.reason
    assert "skill math" in choice.reason


def test_a_text_to_translate_is_no_task(skills: Skills) -> None:
    choice = choose("Translate to German: " + PROBLEMS[0], view(MATH, DE), skills=skills)
    assert [a.name for a in choice.abilities] == ["de"]


def test_a_skill_that_is_damaged_or_gone_since_the_fit_is_not_chosen(skills: Skills) -> None:
    torn = CatalogueView({"math": AbilityEntry("math", (VersionEntry(1, None, "half a file"),))})
    assert choose(PROBLEMS[0], torn, skills=skills).abilities == ()
    assert choose(PROBLEMS[0], view(DE), skills=skills).abilities == ()


def test_without_exemplars_there_is_nothing_to_choose_by() -> None:
    few = view(manifest("math", kind="skill", exemplars=WORD_PROBLEMS[:2]))
    assert fit_skills(few).guess(PROBLEMS[0]) is None
    assert fit_skills(view()).guess(PROBLEMS[0]) is None


def test_the_key_changes_with_what_skills_are_told_by_and_with_nothing_else() -> None:
    key = skills_key(view(MATH, DE))
    assert skills_key(view(MATH, DE, manifest("tone", kind="other"))) == key
    assert skills_key(view(manifest("math", 2, kind="skill", exemplars=WORD_PROBLEMS), DE)) == key
    assert skills_key(view(MATH)) != key
    assert skills_key(view(manifest("math", kind="skill", exemplars=WORD_PROBLEMS[1:]), DE)) != key


def test_a_store_of_very_many_skills_fits_the_first_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(skills_module, "MAX_SKILLS", 1)
    with caplog.at_level(logging.WARNING):
        fitted = fit_skills(view(MATH, manifest("zebra", kind="skill", exemplars=("Draw a zebra.",) * 6)))
    assert "the other 1 must be named" in caplog.text
    assert fitted.guess("Draw a zebra.") is None


def test_the_background_is_shipped_and_has_no_duplicates() -> None:
    assert len(background()) == len(set(background())) > 300
