from __future__ import annotations

from typing import Any

import pytest

from act_serve.abilities.catalogue import AbilityEntry, CatalogueView, VersionEntry
from act_serve.abilities.detect import choose, serving_language
from act_serve.abilities.language import MIN_CONFIDENCE, Guess, identify_language
from act_serve.abilities.prompt_text import prompt_text
from tests.abilities.manifests import manifest


def view_with(**languages: tuple[str, ...]) -> CatalogueView:
    manifests = [manifest(name, kind="language", languages=tags) for name, tags in languages.items()]
    return CatalogueView({m.name: AbilityEntry(m.name, (VersionEntry(m.version, m),)) for m in manifests})


FRENCH = ["Bonjour, comment allez-vous ?", "Quelle est la capitale de la France ?", "Merci beaucoup",
          "Explique-moi la photosynthèse en deux phrases.", "Traduis cette phrase en anglais.", "Il pleut",
          "Écris un court poème sur la mer.", "Je voudrais réserver une table pour deux personnes."]  # fmt: skip
OTHER = ["Hello, how are you?", "Write a poem about the sea", "Translate to English: Où est la bibliothèque ?",
         "¿Dónde está la biblioteca?", "Wie spät ist es?", "Obrigado pela ajuda", "こんにちは",
         "Extract the fields as JSON: Marie Dupont, Paris, 3 mars 2021"]  # fmt: skip
NOTHING = ["ok", "12345 + 678", '{"a": 1}', "def f(x): return x+1", "SELECT * FROM users;", "asdf qwer zxcv", "???"]


@pytest.mark.parametrize("text", FRENCH)
def test_french_prompts_choose_the_french_ability(text: str) -> None:
    choice = choose(text, view_with(fr=("fr",), de=("de",)))
    assert [a.name for a in choice.abilities] == ["fr"]
    assert "fr" in choice.reason


@pytest.mark.parametrize("text", [*OTHER, *NOTHING, "", "  \n"])
def test_other_prompts_choose_nothing(text: str) -> None:
    choice = choose(text, view_with(fr=("fr",)))
    assert choice.abilities == ()
    assert choice.reason


def test_an_unsure_guess_chooses_nothing() -> None:
    assert choose("hm", view_with(fr=("fr",)), lambda _: Guess("fr", MIN_CONFIDENCE - 0.01)).abilities == ()
    assert choose("hm", view_with(fr=("fr",)), lambda _: Guess("fr", MIN_CONFIDENCE + 0.01)).abilities != ()


def test_only_the_head_of_a_long_text_is_identified() -> None:
    seen: list[int] = []

    def spy(text: str) -> Guess:
        seen.append(len(text))
        return Guess("fr", 1.0)

    choose("x" * 1_000_000, view_with(), spy)
    assert seen == [1000]


def test_regional_tags_match_by_primary_subtag_and_exact_ones_first() -> None:
    view = view_with(a=("fr-FR",), b=("fr-CA",))
    assert [m.name for m in serving_language("fr-CA", view)] == ["b", "a"]
    assert [m.name for m in serving_language("FR", view)] == ["a", "b"]
    assert serving_language("f", view) == []


def test_an_ability_that_merely_names_the_language_comes_last() -> None:
    skill = manifest("aaa", kind="skill", languages=("fr",))
    view = view_with(fr=("fr",))
    entries = {**view.entries, "aaa": AbilityEntry("aaa", (VersionEntry(1, skill),))}
    assert [m.name for m in serving_language("fr", CatalogueView(entries))] == ["fr", "aaa"]


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]}, "one"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}]}, "a"),
        ({"prompt": "p"}, "p"),
        ({"prompt": ["p", "q"]}, "p"),
        ({"prompt": [1, 2, 3]}, ""),
        ({"input": "i"}, "i"),
        ({"input": [{"role": "user", "content": [{"type": "input_text", "text": "i"}]}]}, "i"),
        ({"messages": [{"role": "system", "content": "s"}]}, ""),
        ({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": " "}, {"content": "t"}]}, "t"),
        ({"messages": "text"}, "text"),
        ({"messages": [None, 3, {"role": "user", "content": {"odd": 1}}]}, ""),
        ({}, ""),
    ],
)
def test_prompt_text_of_every_kind_of_body(body: dict[str, Any], text: str) -> None:
    assert prompt_text(body) == text


def test_identification_tells_language_and_confidence() -> None:
    guess = identify_language("Quelle est la capitale de la France ?")
    assert guess.language == "fr"
    assert 0.5 < guess.confidence <= 1
