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
from act_serve.pipeline.datasets.splits import LATER, Split, drawn, split_of

HANDBOOK = "usr/share/doc/debian-handbook/html/en-US"


def python_reference(split: Split, count: int, seed: int) -> list[Example]:
    """Returns up to `count` paragraphs of the Python language reference.

    Topics are split, not paragraphs; of those that topics share, validation has none that the test has, and training
    none that either has.
    """
    held_out = {text for later in LATER[split] for text in _topics(later)}
    found = _topics(split)
    random.Random(f"{seed}/{split}/python_reference").shuffle(found)
    # Left out after the draw, so that what is held out changes nothing for the others.
    return [Example(None, text) for text in found if text not in held_out][:count]


def _topics(split: Split) -> list[str]:
    from pydoc_data.topics import topics

    chosen = [text for name, text in sorted(topics.items()) if split_of(name) == split]
    return _prose(paragraph for text in chosen for paragraph in text.split("\n\n"))


def debian_handbook(split: Split, count: int, seed: int) -> list[Example]:
    """Returns up to `count` paragraphs of the Debian Administrator's Handbook for a test.

    Raises DataError for another split than test, or when the package can't be had.
    """
    return drawn("debian_handbook", split, _handbook, count, seed)


def _handbook() -> list[Example]:
    folder = unpacked_package("debian-handbook", HANDBOOK) / HANDBOOK
    pages = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.html"))]
    found = [
        html.unescape(re.sub(r"<[^>]+>", "", block))
        for page in pages
        for block in re.findall(r'<div class="para">(.*?)</div>', page, flags=re.DOTALL)
    ]
    return [Example(None, text) for text in _prose(found)]


def _prose(paragraphs: Iterable[str]) -> list[str]:
    clean = dict.fromkeys(re.sub(r"\s+", " ", text).strip() for text in paragraphs if not text.startswith("   "))
    return [text for text in clean if _is_prose(text)]


def _is_prose(text: str) -> bool:
    words = text.split()
    letters = sum(character.isalpha() or character == " " for character in text)
    return 25 <= len(words) <= 90 and letters / len(text) > 0.9 and text[0].isupper() and text[-1] in ".:"
