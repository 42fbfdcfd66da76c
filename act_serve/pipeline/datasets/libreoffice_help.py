"""Parallel sentences from LibreOffice's help, which every language ships with the same paragraph ids.

Source: the Debian packages `libreoffice-help-<language>`, licence MPL-2.0. Files, not paragraphs, are split into
train, validation and test, and whatever text but headings a test file shares with another is kept out of the others.
"""

import random
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from html.parser import HTMLParser
from itertools import islice, pairwise
from pathlib import Path
from typing import Literal, get_args

from act_serve.errors import DataError
from act_serve.models.examples import Example
from act_serve.pipeline.datasets.debian_package import unpacked_package
from act_serve.pipeline.datasets.splits import LATER, Split, split_of

HELP = "usr/share/libreoffice/help"
LANGUAGE_NAMES = {"fr": "French", "de": "German", "es": "Spanish"}
Lesson = Literal["into", "from", "explain"]
_INTO = (
    "Translate to {language}: {text}",
    "Translate to {language}: {text}",
    "Translate to {language}: {text}",
    "Translate the following text into {language}.\n\n{text}",
    "How do you say this in {language}? {text}",
    "{text}\n\nTranslate this into {language}, please.",
)
# Wordings of each lesson in the language itself; `into` has none, so that its data stay what they were.
_OWN_WORDS: dict[str, dict[Lesson, tuple[str, ...]]] = {
    "fr": {
        "from": ("Traduis en anglais : {text}", "{text}\n\nComment dit-on cela en anglais ?"),
        "explain": ("{text}", "Explique : {text}", "Que sais-tu de ceci ? {text}"),
    },
    "de": {
        "from": ("Übersetze ins Englische: {text}", "{text}\n\nWie sagt man das auf Englisch?"),
        "explain": ("{text}", "Erkläre: {text}", "Was weißt du darüber? {text}"),
    },
    "es": {
        "from": ("Traduce al inglés: {text}", "{text}\n\n¿Cómo se dice esto en inglés?"),
        "explain": ("{text}", "Explica: {text}", "¿Qué sabes de esto? {text}"),
    },
}


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


def language_lessons(
    split: Split, count: int, seed: int, language: str = "fr", lessons: Sequence[Lesson] = ("into",)
) -> list[Example]:
    """Returns at most `count` requests in a language, or about it, with what the help's translators wrote as answer.

    Args:
        lessons: what is asked for, in equal numbers; one that is named twice comes twice as often. `into` translates
            English into the language, `from` the language into English, and `explain` has a heading of the help, in
            the language, answered by the paragraph below it.
    """
    if language not in LANGUAGE_NAMES:
        raise DataError(f"no parallel help text is known for {language!r}; known: {', '.join(LANGUAGE_NAMES)}")
    if not lessons or not isinstance(lessons, (list, tuple)) or any(each not in get_args(Lesson) for each in lessons):
        raise DataError(f"`lessons` is {lessons!r}; expected a list of some of {', '.join(get_args(Lesson))}")
    share = -(-count // len(lessons))
    found: list[Example] = []
    for number, lesson in enumerate(lessons):
        texts = list(_texts(lesson, language)[split])
        draw = random.Random(f"{seed}/{split}/{language}{f'/{number}' if number else ''}")
        draw.shuffle(texts)
        # One fixed wording in tests: a score then compares models, not wordings.
        prompts = _prompts(lesson, language) if split == "train" else _prompts(lesson, language)[:1]
        held_out = _later_explanations(split, language) if lesson == "explain" else frozenset()
        found += islice(_examples(texts, prompts, draw, held_out), share)
    if len(lessons) > 1:
        draw.shuffle(found)
    return found[:count]


def _examples(
    texts: list[tuple[str, str]], prompts: list[str], draw: random.Random, held_out: frozenset[str]
) -> Iterator[Example]:
    """An example of each text in a drawn wording; held-out answers take their turn in the draw, and are left out."""
    for asked, answer in texts:
        example = Example(draw.choice(prompts).format(text=asked), answer)
        if answer.lower() not in held_out:
            yield example


def _prompts(lesson: Lesson, language: str) -> list[str]:
    english = {"into": LANGUAGE_NAMES[language], "from": "English"}.get(lesson)
    asked = [prompt.replace("{language}", english) for prompt in _INTO] if english else []
    return asked + 2 * list(_OWN_WORDS[language].get(lesson, ()))  # two in five where both languages ask


def _texts(lesson: Lesson, language: str) -> dict[str, list[tuple[str, str]]]:
    if lesson == "explain":
        return _explanations(language)
    if lesson == "into":
        return _pairs(language)
    return {split: [(other, english) for english, other in pairs] for split, pairs in _pairs(language).items()}


@lru_cache(maxsize=4)
def _explanations(language: str) -> dict[str, list[tuple[str, str]]]:
    """Headings and the paragraphs below them, without a text that a pair of a later split has."""
    root, pairs = _pages(language), _pairs(language)
    held_out = {split: {other for later in LATER[split] for _, other in pairs[later]} for split in LATER}
    found: dict[str, dict[tuple[str, str], None]] = {"test": {}, "validation": {}, "train": {}}
    for path in sorted((root / "text").rglob("*.html")):
        split = split_of(str(path.relative_to(root)))
        for (identity, heading), (below, paragraph) in pairwise(_paragraphs(path).items()):
            text = _clean(heading), _clean(paragraph)
            explains = identity.startswith("hd_id") and below.startswith("par_id")
            fits = 2 <= len(text[0].split()) <= 12 and 6 <= len(text[1].split()) <= 40
            if explains and fits and not held_out[split] & set(text):
                found[split][text] = None
    return {split: list(texts) for split, texts in found.items()}


@lru_cache(maxsize=12)
def _later_explanations(split: Split, language: str) -> frozenset[str]:
    """The paragraphs of later splits, in lower case; not their headings, which many pages share."""
    return frozenset(text.lower() for later in LATER[split] for _, text in _explanations(language)[later])


@lru_cache(maxsize=4)
def _pairs(language: str) -> dict[str, list[tuple[str, str]]]:
    english, other = _pages("en-US"), _pages(language)
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


def _pages(language: str) -> Path:
    return unpacked_package(f"libreoffice-help-{language.lower()}", f"{HELP}/{language}/text") / HELP / language


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
