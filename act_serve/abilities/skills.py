"""Which skill does a prompt ask for, if any? A linear classifier over the skills' own exemplars and descriptions.

TF-IDF of words and of characters within words, with every number masked, plus a few counts that tell the shape of a
text, go into a logistic regression (scikit-learn). The class "none" is a list of requests that ships with the product,
and the language abilities' exemplars. The confidence that a skill needs is what cross-validation says keeps its false
choices under one in a hundred.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

from act_serve.abilities.catalogue import CatalogueView
from act_serve.delta.manifest import Manifest
from act_serve.errors import MissingExtraError

MIN_EXEMPLARS = 5
MAX_CHARS = 600
MAX_SKILLS = 64  # keeps the weights of words small, even beside a store of thousands
MAX_EXEMPLARS = 200
FALSE_CHOICES = 0.01
LEAST_CONFIDENCE = 0.5
_NONE = ""
_log = logging.getLogger(__name__)
_FOLDS = 5
_NUMBER = re.compile(r"\d+(?:[.,:/-]\d+)*")
_SHAPES = ("{", "?", ":", "\n", "(", "=")

Key = tuple[tuple[str, str, str, tuple[str, ...]], ...]


@dataclass(frozen=True, slots=True)
class SkillGuess:
    """A skill's name, and the probability that the prompt asks for it."""

    skill: str
    confidence: float


@dataclass(frozen=True, slots=True)
class _Features:
    """Texts as the classifier sees them: sparse rows, one a text. No scikit-learn union: that takes 0.3 ms a text."""

    words: Any
    chars: Any

    @classmethod
    def fit(cls, texts: list[str]) -> _Features:
        from sklearn.feature_extraction.text import TfidfVectorizer

        words = TfidfVectorizer(preprocessor=_masked, token_pattern=r"\w+|[?{]", ngram_range=(1, 2), sublinear_tf=True)
        chars = TfidfVectorizer(preprocessor=_masked, analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True)
        return cls(words.fit(texts), chars.fit(texts))

    def __call__(self, texts: list[str]) -> Any:
        from scipy.sparse import csr_matrix, hstack

        shape = csr_matrix([_counts(text[:MAX_CHARS]) for text in texts])
        return hstack([self.words.transform(texts), self.chars.transform(texts), shape], format="csr")


@dataclass(frozen=True, slots=True)
class Skills:
    """A fitted classifier; without a skill to choose, it chooses none.

    Attributes:
        key: what it was fitted on, see :func:`skills_key`.
        least: the confidence that a choice needs.
    """

    key: Key = ()
    least: float = 1.0
    _features: _Features | None = field(default=None, repr=False)
    _model: Any = field(default=None, repr=False)

    def guess(self, text: str) -> SkillGuess | None:
        """The skill that ``text`` asks for with enough confidence, or None."""
        if self._features is None or not text.strip():
            return None
        (chances,) = self._model.predict_proba(self._features([text]))
        best = int(chances.argmax())
        skill, confidence = str(self._model.classes_[best]), round(float(chances[best]), 3)
        return SkillGuess(skill, confidence) if skill != _NONE and confidence >= self.least else None


def skills_key(view: CatalogueView) -> Key:
    """What the classifier depends on: it is to be fitted again when this changes."""
    return tuple((m.name, m.kind, m.description, m.exemplars) for m in view.manifests() if m.kind != "other")


def fit_skills(view: CatalogueView) -> Skills:
    """Fits the classifier to a catalogue; half a second for a few abilities, two the first time.

    Call it in a thread.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    key = skills_key(view)
    skills = [m for m in view.manifests() if m.kind == "skill" and len(m.exemplars) >= MIN_EXEMPLARS]
    if not skills:
        return Skills(key)
    if len(skills) > MAX_SKILLS:
        _log.warning(
            "auto tells the first %d skills apart; the other %d must be named", MAX_SKILLS, len(skills) - MAX_SKILLS
        )
        skills = skills[:MAX_SKILLS]
    texts, labels = _examples(skills, [m for m in view.manifests() if m.kind == "language"])
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as exc:
        raise MissingExtraError("scikit-learn", "serve") from exc
    features = _Features.fit(texts)
    rows = features(texts)
    model = LogisticRegression(C=30.0, class_weight="balanced")
    least = _least_confidence(model, rows, labels)
    return Skills(key, least, features, model.fit(rows, labels))


@cache
def background() -> tuple[str, ...]:
    """Requests that no skill in particular serves."""
    text = files("act_serve.abilities").joinpath("background.txt").read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if line and not line.startswith("# "))


def _examples(skills: Iterable[Manifest], languages: Iterable[Manifest]) -> tuple[list[str], list[str]]:
    texts, labels = [], []
    for manifest in skills:
        own = [manifest.description, *manifest.exemplars[:MAX_EXEMPLARS]]
        texts += own
        labels += [manifest.name] * len(own)
    languages = itertools.islice(languages, MAX_SKILLS)
    others = [*background(), *(text for manifest in languages for text in manifest.exemplars[:MAX_EXEMPLARS])]
    return texts + others, labels + [_NONE] * len(others)


def _least_confidence(model: Any, rows: Any, labels: list[str]) -> float:
    """The confidence at which one in a hundred texts of the class "none" would be given a skill, out of fold."""
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    folds = StratifiedKFold(_FOLDS, shuffle=True, random_state=0)
    chances = cross_val_predict(model, rows, labels, cv=folds, method="predict_proba")
    none = sorted(set(labels)).index(_NONE)
    highest = sorted(
        (1 - row[none] for row, label in zip(chances, labels, strict=True) if label == _NONE), reverse=True
    )
    return max(LEAST_CONFIDENCE, round(float(highest[int(FALSE_CHOICES * len(highest))]), 3))


def _masked(text: str) -> str:
    return _NUMBER.sub(" 7 ", text[:MAX_CHARS].lower())


def _counts(text: str) -> list[float]:
    """Numbers, words and signs, each between 0 and 1."""
    numbers, words = len(_NUMBER.findall(text)), len(text.split())
    return [min(numbers, 4) / 4, min(words, 40) / 40, *(float(sign in text) for sign in _SHAPES)]
