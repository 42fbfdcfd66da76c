"""In which language does a prompt speak? By py3langid, with care for short texts, quotations and what is passed along.

py3langid (https://pypi.org/project/py3langid) is a naive Bayes classifier over byte n-grams: 0.1 ms for a prompt, half
a second to load. Its probabilities are calibrated over lengths, but all its languages are equally likely to it, which
few words cannot outweigh: "dime algo bonito" is then Portuguese, and "ca va" anything. So languages that prompts are
rarely written in count a tenth. Greetings and the like are too short even so, and are listed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

MIN_CONFIDENCE = 0.3
CLEAR = 0.5
NO_LANGUAGE = "zxx"
_COMMON = "ar cs da de el en es fi fr he hi hu id it ja ko nl no pl pt ro ru sv th tr uk vi zh zxx"
_RARE = 0.1
_SAID = {
    "fr": "bonjour|bonsoir|bonne nuit|bonne journée|salut|coucou|merci|merci beaucoup|merci bien|oui|oui merci"
    "|non merci|d'accord|au revoir|à bientôt|a bientot|ça va|ca va|salut ça va|salut ca va|s'il te plaît"
    "|s'il vous plaît|svp|stp|pourquoi|comment|bien sûr|enchanté|à demain|bonjour à tous"
    "|bonjour madame|bonjour monsieur|de rien",
    "de": "hallo|hallo zusammen|guten tag|guten morgen|guten abend|gute nacht|danke|danke schön|danke sehr|vielen dank"
    "|bitte|bitte schön|ja|ja bitte|nein danke|tschüss|tschüß|auf wiedersehen|servus|moin|grüß gott|wie geht's"
    "|wie geht es dir|bis morgen|bis bald|warum|wieso|genau|weiter|alles klar|na klar|entschuldigung",
    "es": "hola|hola a todos|buenos días|buenos dias|buenas tardes|buenas noches|buenas|gracias|muchas gracias"
    "|mil gracias|sí|sí por favor|si por favor|por favor|vale|adiós|adios|hasta luego|hasta mañana|qué tal|que tal"
    "|cómo estás|como estas|de nada|por qué|claro|perdón|hola qué tal|hola que tal",
}
_PHRASES = {phrase: language for language, phrases in _SAID.items() for phrase in phrases.split("|")}
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|https?://\S+|(?<!\S)[^\s@]+@\S+", re.DOTALL)
_QUOTED = re.compile(r"\"[^\"\n]*\"|“[^”\n]*”|„[^“”\n]*[“”]|«[^»\n]*»|(?<!\w)['‘][^'\n]{2,}?['’](?!\w)")
_LOOKS_LIKE_CODE = re.compile(r"\w\(['\"]|[;{}]\s*$|^\s*[{\[<]|=>|::|\bdef \w+\(|\bimport \w+ as\b", re.MULTILINE)
_EDGES = re.compile(r"^\W+|\W+$")


@dataclass(frozen=True, slots=True)
class Guess:
    """A language by its ISO 639 code, and the probability that it is this one."""

    language: str
    confidence: float


class Identifier(Protocol):
    """Tells the language of a text."""

    def __call__(self, text: str) -> Guess: ...


def identify_language(text: str) -> Guess:
    """The most likely language of ``text``; the first call loads the model (0.5 s)."""
    ranked = _classifier().rank(text)
    weighed = [(float(p) * (1.0 if language in _common() else _RARE), str(language)) for language, p in ranked]
    best, language = max(weighed)
    return Guess(language, round(best / max(sum(p for p, _ in weighed), 1e-9), 3))


def speaking_language(text: str, identify: Identifier = identify_language) -> Guess:
    """The language in which ``text`` asks: of its instruction, if that is clear, else of all that is not quoted."""
    phrase = " ".join(re.sub(r"[,.!?¿¡:;…]", " ", text.lower().replace("’", "'")).split())
    if phrase in _PHRASES:
        return Guess(_PHRASES[phrase], 1.0)
    if _LOOKS_LIKE_CODE.search(text):
        return Guess(NO_LANGUAGE, 1.0)
    own = without_quotations(text)
    instruction = instruction_of(own)
    if instruction:
        guess = identify(instruction)
        if guess.confidence >= CLEAR:
            return guess
    return identify(own) if _EDGES.sub("", own) else Guess(NO_LANGUAGE, 1.0)


def without_quotations(text: str) -> str:
    """``text`` without what it quotes, code and addresses; all of it where nothing else is there."""
    plain = _CODE.sub(" ", text)
    own = _QUOTED.sub(' "" ', plain)
    return own if re.search(r"\w{2,}", own) else plain


def instruction_of(text: str) -> str:
    """What comes before the material that a prompt passes along, or after it; "" where they are not apart."""
    head, colon, tail = text.partition(":")
    if colon and len(head) <= 160 and len(tail.split()) > 1 and "\n\n" not in head:
        return head
    lines = [line for line in text.strip().splitlines() if line.strip()]
    if len(lines) < 2:
        return ""
    return lines[0] if len(lines[0]) <= len(lines[-1]) else lines[-1]


@cache
def _common() -> frozenset[str]:
    return frozenset(_COMMON.split())


@cache
def _classifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # type: ignore[import-untyped]

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
