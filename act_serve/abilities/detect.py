"""``"abilities": "auto"``: which abilities does the text of a request ask for? A language, a skill, both, or none.

Language: the one that the prompt asks the answer to be in, else the one it is written in. Skill: by a classifier fitted
on the skills' exemplars. Measured in docs/auto.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from act_serve.abilities.catalogue import CatalogueView
from act_serve.abilities.language import (
    MIN_CONFIDENCE,
    NO_LANGUAGE,
    Identifier,
    identify_language,
    instruction_of,
    speaking_language,
    without_quotations,
)
from act_serve.abilities.prompt_text import MAX_CHARS
from act_serve.abilities.requested_language import Wish, requested_language
from act_serve.abilities.skills import Skills
from act_serve.delta.composition import WeightedAbility
from act_serve.delta.manifest import Manifest

NOT_READY = Skills()


@dataclass(frozen=True, slots=True)
class Choice:
    """What ``auto`` chose, perhaps nothing, and why in one short sentence."""

    abilities: tuple[WeightedAbility, ...]
    reason: str


def choose(
    text: str, view: CatalogueView, identify: Identifier = identify_language, skills: Skills = NOT_READY
) -> Choice:
    """Picks the abilities for the language and the skill that ``text`` asks for; none when in doubt.

    Reads the first 1,000 characters; :func:`prompt_text` takes head and tail of longer ones.
    """
    text = text[:MAX_CHARS]
    if not text.strip():
        return Choice((), "the request has no text to choose by")
    wish = requested_language(without_quotations(text))
    language, why_language = _language(text, wish, view, identify)
    skill, why_skill = _skill(text, wish, view, skills)
    return Choice(tuple(dict.fromkeys([*language, *skill])), f"{why_language}; {why_skill}")


def serving_language(tag: str, view: CatalogueView) -> list[Manifest]:
    """Abilities whose manifest declares the language, best first.

    An exact BCP 47 match beats one of the primary subtag (``fr-CA`` asks for ``fr``), and an ability that is
    for a language beats one that merely names it.
    """
    wanted = tag.lower()
    ranked = []
    for manifest in view.manifests():
        tags = [t.lower() for t in manifest.languages]
        if wanted in tags or _primary(wanted) in map(_primary, tags):
            ranked.append(((wanted not in tags, manifest.kind != "language", manifest.name), manifest))
    return [manifest for _, manifest in sorted(ranked, key=lambda pair: pair[0])]


def _language(
    text: str, wish: Wish | None, view: CatalogueView, identify: Identifier
) -> tuple[list[WeightedAbility], str]:
    if wish is not None and (serving := serving_language(wish.language, view)):
        return [WeightedAbility(serving[0].name)], f"the text asks for the language {wish.language}"
    if wish is not None:  # what it passes along does not count then: "Translate to English: Où est la gare ?"
        text = instruction_of(text) or text
    guess = speaking_language(text, identify)
    if guess.language == NO_LANGUAGE or guess.confidence < MIN_CONFIDENCE:
        return [], f"no language recognized with confidence (best {guess.language}, {guess.confidence:g})"
    serving = serving_language(guess.language, view)
    if not serving:
        return [], f"no ability serves the language {guess.language} ({guess.confidence:g})"
    return [WeightedAbility(serving[0].name)], f"the text is in the language {guess.language} ({guess.confidence:g})"


def _skill(text: str, wish: Wish | None, view: CatalogueView, skills: Skills) -> tuple[list[WeightedAbility], str]:
    if wish is not None and wish.translation:
        return [], "a translation needs no skill"
    if skills is NOT_READY:
        return [], "skills cannot be recognized yet"
    guess = skills.guess(text)
    if guess is None or not _usable(guess.skill, view):
        return [], "no skill recognized with confidence"
    return [WeightedAbility(guess.skill)], f"it asks for the skill {guess.skill} ({guess.confidence:g})"


def _usable(name: str, view: CatalogueView) -> bool:
    entry = view.entries.get(name)
    return entry is not None and entry.active.manifest is not None


def _primary(tag: str) -> str:
    return tag.partition("-")[0]
