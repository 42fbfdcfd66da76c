"""The language that a prompt asks the answer to be in: "Translate to French: ...", "Antworte auf Deutsch"."""

from __future__ import annotations

import re
from dataclasses import dataclass

from act_serve.abilities.language_names import TAGS, meant

_NAME = rf"(?P<name>{'|'.join(sorted(TAGS, key=len, reverse=True))})"
_TO = r"(?:to|too|into|in|en|au|auf|ins|im|al|a|vers le)"
_TRANSLATE = (
    r"(?:tran?s?n?l\w*|trasn?l\w*|trans\w?l\w*|tradui\w*|traduct\w*|traduc\w*|traduz\w*|übersetz\w*|uebersetz\w*|vertaal\w*"
    r"|render|convert|turn|put|rewrite|say|saying|said|spell|dit|dire|dis|sag|sagt|sage|sagen|heißt|heisst|dice|decir|dime)"
)
_ANSWER = (
    r"(?:answer|reply|respond|write|speak|talk|explain|tell|describe|continue|give|summari[sz]e|list|make|compose|draft"
    r"|show|chat|greet|réponds?|répond\w*|repond\w*|écri\w*|ecri\w*|expliqu\w*|parl\w*|résum\w*|resum\w*|antwort\w*"
    r"|schreib\w*|sprich|erklär\w*|beschreib\w*|respond\w*|contest\w*|escrib\w*|explic\w*|habl\w*|describ\w*)"
)
_PLEASE = r"please|pls|plz|bitte|por favor|s'il|svp"
_ENDS = rf"(?=\s*(?:$|[,.;:!?\n)\"-]|{_PLEASE}|from now|only|asap|for me|to me|now|and\b|how|what|wh(?:y|o)\b))"
_WORK = (
    r"(?:poem|sentence|sentences|story|song|letter|text|paragraph|e-?mail|haiku|greeting|note|essay|message|summary)\b"
)
_TRANSLATIONS = tuple(
    re.compile(pattern)
    for pattern in (
        rf"\b{_TRANSLATE}\b[^:\n]{{0,120}}\b{_TO}(?: the)? {_NAME}\b",
        rf"\b{_NAME} (?:translation|equivalent|word|term|phrase|expression|name)s?\b(?=\s*(?:for|of|$|[?:,.]|please))",
        rf"(?:^|\b(?:give|need|want|like|provide|send|show|have)\b[^:\n]{{0,40}}) ?{_NAME} version\b",
        rf"(?:^|\bthe ){_NAME} for\b",
        rf"\bwhat(?:'s| is|s)\b[^?:\n]{{0,60}}\bin {_NAME}(?=\s*(?:$|[?.!,]|please))",
        rf"\b(?:like|need|want|have|get|see)\b[^:\n]{{0,60}}\bin {_NAME}\b{_ENDS}",
    )
)
_ANSWERS = tuple(
    re.compile(pattern)
    for pattern in (
        rf"\b{_ANSWER}\b[^:\n]{{0,120}}\b(?:in|en|auf) {_NAME}\b{_ENDS}",
        rf"\b{_ANSWER}\b[^:\n]{{0,40}}?\b(?:in|en|auf) {_NAME}\b(?= \w)",
        rf"\b(?:write|compose|draft)\b[^:.?\n]{{0,30}}\b{_NAME} {_WORK}",
        rf"\b(?:speak|use) {_NAME}\b(?! (?:speaker|class|teacher))(?=\s*(?:to|with|please|only|$|[.!,]))",
        rf"(?:^|[.!?,:\n] ?)(?:please |but |now )?(?:in|auf|en) {_NAME}\b(?=\s*(?:$|[,.:!]|{_PLEASE}))",
    )
)
_SLIP = re.compile(r"\b(?:tran\w*|tras\w*)\b[^:\n]{0,60}?\b(?:to|into|in) (?P<name>\w{5,12})(?=\s*(?:$|[:,.?!\n]|pl))")
_WORDS = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Wish:
    """The language wanted, an ISO 639 code, and whether the rest is only text to translate, not a task."""

    language: str
    translation: bool


def requested_language(text: str) -> Wish | None:
    """What ``text``, without its quotations, asks for; None where it names no language to answer in."""
    lowered = text.lower().replace("’", "'")
    if not TAGS.keys().isdisjoint(_WORDS.findall(lowered)):
        for patterns, translation in ((_TRANSLATIONS, True), (_ANSWERS, False)):
            for pattern in patterns:
                if found := pattern.search(lowered):
                    return Wish(TAGS[found["name"]], translation)
    slip = _SLIP.search(lowered)
    language = meant(slip["name"]) if slip else None
    return Wish(language, True) if language else None
