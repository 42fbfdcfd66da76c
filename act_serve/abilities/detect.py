"""``"abilities": "auto"``: which abilities does the text of a request ask for?

By the language the prompt is written in, told by py3langid (https://pypi.org/project/py3langid): a naive
Bayes classifier over byte n-grams, 97 languages plus "no language", 0.03 ms for a prompt and half a second to
load. Its probabilities are calibrated over lengths, so one threshold serves short and long prompts. On 6,000
fragments of LibreOffice's help in four languages, 3 to 20 words long, at most 0.4 % of those in another language
were taken for French, and 73 % (3 to 5 words) to 91 % (6 to 10) of the French ones were recognized; the rest
choose nothing. lingua's confidences of right and wrong answers overlap on such short texts, and it takes
seconds and hundreds of megabytes to load.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

from act_serve.abilities.catalogue import CatalogueView
from act_serve.delta.composition import WeightedAbility
from act_serve.delta.manifest import Manifest

MIN_CONFIDENCE = 0.15
MAX_CHARS = 1000
_NO_LANGUAGE = "zxx"


@dataclass(frozen=True, slots=True)
class Guess:
    """A language by its ISO 639 code, and the probability that it is this one."""

    language: str
    confidence: float


class Identifier(Protocol):
    """Tells the language of a text."""

    def __call__(self, text: str) -> Guess: ...


@dataclass(frozen=True, slots=True)
class Choice:
    """What ``auto`` chose, perhaps nothing, and why in one short sentence."""

    abilities: tuple[WeightedAbility, ...]
    reason: str


def identify_language(text: str) -> Guess:
    """The most likely language of ``text``; the first call loads the model (0.5 s)."""
    language, confidence = _classifier().classify(text)
    return Guess(str(language), round(float(confidence), 3))


def choose(text: str, view: CatalogueView, identify: Identifier = identify_language) -> Choice:
    """Picks the ability that serves the language of ``text``, or none of them when in doubt."""
    if not text.strip():
        return Choice((), "the request has no text to choose by")
    guess = identify(text[:MAX_CHARS])
    if guess.language == _NO_LANGUAGE or guess.confidence < MIN_CONFIDENCE:
        return Choice((), f"no language recognized with confidence (best {guess.language}, {guess.confidence:g})")
    serving = serving_language(guess.language, view)
    if not serving:
        return Choice((), f"no ability serves the language {guess.language} ({guess.confidence:g})")
    return Choice(
        (WeightedAbility(serving[0].name),), f"the text is in the language {guess.language} ({guess.confidence:g})"
    )


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


def prompt_text(body: Mapping[str, Any]) -> str:
    """The text that a request is about: the last user message, the prompt, or the input, at most 1,000 characters.

    Understands the bodies of chat completions, completions, responses and messages; anything else is "".
    """
    turns = body.get("messages", body.get("input", body.get("prompt")))
    if isinstance(turns, str):
        return turns[:MAX_CHARS]
    if not isinstance(turns, list):
        return ""
    for turn in reversed(turns):
        if isinstance(turn, str):
            return turn[:MAX_CHARS]
        if isinstance(turn, dict) and turn.get("role", "user") == "user":
            return _content_text(turn.get("content"))[:MAX_CHARS]
    return ""


def _content_text(content: object) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    return "\n".join(part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str))


def _primary(tag: str) -> str:
    return tag.partition("-")[0]


@cache
def _classifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # type: ignore[import-untyped]

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
