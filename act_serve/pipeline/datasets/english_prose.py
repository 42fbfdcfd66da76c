"""Plain English paragraphs, to see whether an ability costs the model its general English.

`python_reference` comes with every Python (the topics of `help()`, PSF licence). `debian_handbook` is a book from a
Debian package (GPL-2+ or CC-BY-SA-3.0) and is only ever used as a test.
"""

import html
import random
import re
from collections.abc import Iterable

from act_serve.models.examples import Example
from act_serve.pipeline.datasets.debian_package import unpacked_package
from act_serve.pipeline.datasets.splits import Split, split_of

HANDBOOK = "usr/share/doc/debian-handbook/html/en-US"


def python_reference(split: Split, count: int, seed: int) -> list[Example]:
    """Returns up to `count` paragraphs of the Python language reference; topics are split, not paragraphs."""
    from pydoc_data.topics import topics

    chosen = [text for name, text in sorted(topics.items()) if split_of(name) == split]
    found = [paragraph for text in chosen for paragraph in text.split("\n\n")]
    return _draw(found, count, f"{seed}/{split}/python_reference")


def debian_handbook(split: Split, count: int, seed: int) -> list[Example]:
    """Returns up to `count` paragraphs of the Debian Administrator's Handbook, whatever the split."""
    folder = unpacked_package("debian-handbook", HANDBOOK) / HANDBOOK
    pages = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.html"))]
    found = [
        html.unescape(re.sub(r"<[^>]+>", "", block))
        for page in pages
        for block in re.findall(r'<div class="para">(.*?)</div>', page, flags=re.DOTALL)
    ]
    return _draw(found, count, f"{seed}/debian_handbook")


def _draw(paragraphs: Iterable[str], count: int, seed: str) -> list[Example]:
    clean = dict.fromkeys(re.sub(r"\s+", " ", text).strip() for text in paragraphs if not text.startswith("   "))
    usable = [text for text in clean if _is_prose(text)]
    random.Random(seed).shuffle(usable)
    return [Example(None, text) for text in usable[:count]]


def _is_prose(text: str) -> bool:
    words = text.split()
    letters = sum(character.isalpha() or character == " " for character in text)
    return 25 <= len(words) <= 90 and letters / len(text) > 0.9 and text[0].isupper() and text[-1] in ".:"
