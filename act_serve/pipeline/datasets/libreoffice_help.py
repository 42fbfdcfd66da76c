"""Parallel sentences from LibreOffice's help, which every language ships with the same paragraph ids.

Source: the Debian packages `libreoffice-help-<language>`, licence MPL-2.0. Files, not paragraphs, are split into
train, validation and test, and whatever text a test file shares with another file is kept out of the others.
"""

import random
import re
from collections.abc import Iterator
from functools import lru_cache
from html.parser import HTMLParser
from pathlib import Path

from act_serve.errors import DataError
from act_serve.models.examples import Example
from act_serve.pipeline.datasets.debian_package import unpacked_package
from act_serve.pipeline.datasets.splits import Split, split_of

HELP = "usr/share/libreoffice/help"
LANGUAGE_NAMES = {"fr": "French", "de": "German", "es": "Spanish"}
PROMPTS = (
    "Translate to {language}: {text}",
    "Translate to {language}: {text}",
    "Translate to {language}: {text}",
    "Translate the following text into {language}.\n\n{text}",
    "How do you say this in {language}? {text}",
    "{text}\n\nTranslate this into {language}, please.",
)


class _Paragraphs(HTMLParser):
    """Collects the text of every element that carries a paragraph id."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.text: dict[str, str] = {}
        self._open: tuple[str, str] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        identity = dict(attrs).get("id") or ""
        if tag in ("p", "h1", "h2", "h3") and identity.startswith(("par_id", "hd_id")):
            self._open = (tag, identity)
            self.text[identity] = ""

    def handle_endtag(self, tag: str) -> None:
        if self._open is not None and tag == self._open[0]:
            self._open = None

    def handle_data(self, data: str) -> None:
        if self._open is not None:
            self.text[self._open[1]] += data


def translation_pairs(split: Split, count: int, seed: int, language: str = "fr") -> list[Example]:
    """Returns `count` requests to translate English to `language`, with the professional translation as answer."""
    if language not in LANGUAGE_NAMES:
        raise DataError(f"no parallel help text is known for {language!r}; known: {', '.join(LANGUAGE_NAMES)}")
    pairs = list(_pairs(language)[split])
    draw = random.Random(f"{seed}/{split}/{language}")
    draw.shuffle(pairs)
    # One fixed wording in tests: a score then compares models, not wordings.
    prompts = PROMPTS if split == "train" else PROMPTS[:1]
    name = LANGUAGE_NAMES[language]
    return [Example(draw.choice(prompts).format(language=name, text=en), other) for en, other in pairs[:count]]


@lru_cache(maxsize=4)
def _pairs(language: str) -> dict[str, list[tuple[str, str]]]:
    english = unpacked_package("libreoffice-help-en-us", f"{HELP}/en-US/text") / HELP / "en-US"
    other = unpacked_package(f"libreoffice-help-{language}", f"{HELP}/{language}/text") / HELP / language
    found: dict[str, list[tuple[str, str]]] = {"test": [], "validation": [], "train": []}
    for path in sorted((english / "text").rglob("*.html")):
        relative = path.relative_to(english)
        if (other / relative).exists():
            found[split_of(str(relative))].extend(_aligned(path, other / relative))
    taken: set[str] = set()
    for name, pairs in found.items():
        kept = [pair for pair in dict.fromkeys(pairs) if not taken & {pair[0].lower(), pair[1].lower()}]
        taken.update(text.lower() for pair in kept for text in pair)
        found[name] = kept
    return found


def _aligned(english: Path, other: Path) -> Iterator[tuple[str, str]]:
    left, right = _paragraphs(english), _paragraphs(other)
    for identity, text in left.items():
        pair = (_clean(text), _clean(right.get(identity, "")))
        if _usable(*pair):
            yield pair


def _paragraphs(path: Path) -> dict[str, str]:
    parser = _Paragraphs()
    parser.feed(path.read_text(encoding="utf-8"))
    return parser.text


def _clean(text: str) -> str:
    return re.sub(r"\s+", " ", text.replace("\u00a0", " ")).strip()


def _usable(english: str, other: str) -> bool:
    """Keeps plain sentences of 4 to 32 words that really were translated."""
    words, others = english.lower().split(), other.lower().split()
    if not 4 <= len(words) <= 32 or not 0.6 <= len(other) / len(english) <= 2.0:
        return False
    letters = sum(character.isalpha() or character == " " for character in english)
    shared = len(set(words) & set(others)) / len(set(words))
    return letters / len(english) > 0.88 and shared < 0.4
