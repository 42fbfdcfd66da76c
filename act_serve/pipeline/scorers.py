"""Metrics of a task. Each takes the answers given and the answers wanted and returns one number."""

import json
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

HIGHER_IS_BETTER = {
    "exact_match": True,
    "json_fields": True,
    "final_number": True,
    "chrf": True,
    "language_share": True,
    "nll": False,
    "perplexity": False,
}
RIVALS = ("ca", "de", "en", "es", "fr", "it", "la", "nl", "pt", "ro")
LIKELIHOOD_METRICS = frozenset({"nll", "perplexity"})


def exact_match(given: Sequence[str], wanted: Sequence[str]) -> float:
    """Share of answers equal to the wanted ones: as parsed JSON where the wanted one is JSON, else as text."""
    return _mean([_parsed(left) == _parsed(right) for left, right in zip(given, wanted, strict=True)])


def json_fields(given: Sequence[str], wanted: Sequence[str]) -> float:
    """Share of the wanted objects' fields that the answers have with the same value."""
    found: list[bool] = []
    for left, right in zip(given, wanted, strict=True):
        answer, order = _parsed(left), json.loads(right)
        has = answer if isinstance(answer, dict) else {}
        found += [key in has and has[key] == value for key, value in order.items()]
    return _mean(found)


def final_number(given: Sequence[str], wanted: Sequence[str]) -> float:
    """Share of answers whose last whole number is the wanted one's last."""
    return _mean([_last_number(left) == _last_number(right) for left, right in zip(given, wanted, strict=True)])


def chrf(given: Sequence[str], wanted: Sequence[str]) -> float:
    """Corpus chrF (character n-grams up to 6, beta 2), 0 to 100, by sacrebleu."""
    from sacrebleu.metrics.chrf import CHRF

    return float(CHRF().corpus_score(list(given), [list(wanted)]).score)


def language_share(given: Sequence[str], language: str) -> float:
    """Share of answers that lingua takes for `language` (ISO 639-1), among it and the languages of `RIVALS`."""
    identify = _identifier(language)
    found = [identify(text) for text in given]
    return _mean([name == language for name in found])


def answer_score(metric: str, given: Sequence[str], wanted: Sequence[str], language: str | None) -> float:
    """Scores generated answers by `metric`, one of those that need answers."""
    if metric == "language_share":
        return language_share(given, language or "")
    by_name: dict[str, Callable[[Sequence[str], Sequence[str]], float]]
    by_name = {"exact_match": exact_match, "json_fields": json_fields, "chrf": chrf, "final_number": final_number}
    return by_name[metric](given, wanted)


@lru_cache
def _identifier(language: str) -> Callable[[str], str | None]:
    from lingua import IsoCode639_1, LanguageDetectorBuilder

    # All 75 languages of lingua take a minute to load; these are the ones that a model drifts into.
    codes = {IsoCode639_1.from_str(code.upper()) for code in (*RIVALS, language)}
    detector = LanguageDetectorBuilder.from_iso_codes_639_1(*codes).build()

    def identify(text: str) -> str | None:
        found = detector.detect_language_of(text)
        return None if found is None else found.iso_code_639_1.name.lower()

    return identify


def _last_number(text: str) -> str | None:
    found = re.findall(r"\d+", text.replace(",", ""))
    return found[-1].lstrip("0") or "0" if found else None


def _parsed(text: str) -> Any:
    """The first JSON object in `text`, so that chatter around it does no harm; the bare text where there is none."""
    start = text.find("{")
    if start >= 0:
        try:
            return json.JSONDecoder().raw_decode(text[start:])[0]
        except ValueError:
            pass
    return text.strip()


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values) if values else 0.0
