"""Metrics of a task, as sums over its items: each item gives a few numbers, and their sums give the score.

So the score of any resample of the items is one more sum; see `measured.py`. Shapes: N items, S numbers of each.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from functools import lru_cache
from typing import Any

import numpy as np

from act_serve.errors import DataError
from act_serve.models.examples import Example

HIGHER_IS_BETTER = {
    "exact_match": True,
    "json_fields": True,
    "final_number": True,
    "choice_accuracy": True,
    "chrf": True,
    "language_share": True,
    "nll": False,
    "perplexity": False,
}
RIVALS = ("ca", "de", "en", "es", "fr", "it", "la", "nl", "pt", "ro")
LIKELIHOOD_METRICS = frozenset({"nll", "perplexity"})
Numbers = list[float]
_NUMBER = re.compile(
    r"(?:(?<![\w)%])[-−])?"
    r"(?:[1-9]\d{0,2}(?:,\d{3})+(?!\d|,\d)(?:\.\d+)?"
    r"|(?P<decimals>(?<!\d,)(?:[1-9]\d{0,2}(?:\.\d{3})+|\d+),\d+(?!\d|[.,]\d))"
    r"|\d+(?:\.\d+)?|(?<![\d.])\.\d+)"
)
_FENCED = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL | re.IGNORECASE)
_REVISIONS = {
    "exact_match": ["whole answers"],
    "final_number": ["signs, decimals and thousands", "decimal commas"],
}


def revision(metric: str) -> list[str]:
    """What a metric has learnt since scores were first kept; part of what kept scores are found by."""
    return _REVISIONS.get(metric, [])


def check_scorable(task: str, metric: str, examples: Sequence[Example], language: str | None) -> None:
    """Raises DataError, naming `task`, when `metric` can't score one of the examples or knows no such `language`."""
    if metric == "language_share" and language not in _languages():
        raise DataError(f"{task}: language_share knows no language {language!r}; give an ISO 639-1 code such as fr")
    for number, example in enumerate(examples, start=1):
        if (problem := _problem(metric, example)) is not None:
            raise DataError(f"{task}: {metric} can't score example {number} ({example.beginning!r}): {problem}")


def score_of(metric: str, sums_S: Sequence[float]) -> float:
    """The score by `metric` of items whose numbers sum up to `sums_S`; 0 for no items."""
    if metric == "chrf":
        return float(_chrf()._compute_score_from_stats([int(value) for value in sums_S]).score)
    part, whole = sums_S
    ratio = part / whole if whole else 0.0
    return math.exp(min(ratio, 700.0)) if metric == "perplexity" else float(ratio)


def answer_numbers(metric: str, given: Sequence[str], wanted: Sequence[str], language: str | None) -> list[Numbers]:
    """Each generated answer's numbers for `metric`, one of those that need answers.

    `exact_match`: share of answers equal to the wanted ones, as parsed JSON where the wanted one is a JSON object or
    list, else as text; with a code fence around the JSON or without, but nothing else. `json_fields`: share of the
    wanted objects' fields that the answers have with the same value, whatever is said around the first object.
    `final_number`: share of answers whose last number equals the wanted one's last. `chrf`: corpus chrF (character
    n-grams up to 6, beta 2), 0 to 100, by sacrebleu. `language_share`: share of answers that lingua takes for
    `language` (ISO 639-1), among it and the languages of `RIVALS`.
    """
    if metric == "language_share":
        identify = _identifier(language or "")
        return [[float(identify(text) == language), 1.0] for text in given]
    if metric == "chrf":
        return [[float(number) for number in item] for item in _chrf()._extract_corpus_statistics(given, [wanted])]
    compare: dict[str, Callable[[str, str], list[bool]]]
    compare = {"exact_match": _equal, "json_fields": _fields, "final_number": _same_end}
    found = [compare[metric](left, right) for left, right in zip(given, wanted, strict=True)]
    return [[float(sum(values)), float(len(values))] for values in found]


def choice_numbers(likelihoods: Sequence[float], choices: Sequence[str], answer: str) -> Numbers:
    """Whether the likeliest choice per character is the right one, as lm-evaluation-harness's `acc_norm`.

    Without the division a question would be decided by the choices' lengths, most of all HellaSwag's.
    """
    per_character = [nats / len(choice) for nats, choice in zip(likelihoods, choices, strict=True)]
    return [float(choices[int(np.argmax(per_character))] == answer), 1.0]


def answer_score(metric: str, given: Sequence[str], wanted: Sequence[str], language: str | None = None) -> float:
    """Scores generated answers by `metric`, one of those that `answer_numbers` knows."""
    return score_of(metric, np.sum(answer_numbers(metric, given, wanted, language), axis=0).tolist())


def _problem(metric: str, example: Example) -> str | None:
    """Why `metric` can't score the example, and what to do."""
    if metric in LIKELIHOOD_METRICS:
        return None
    if metric == "choice_accuracy":
        fits = example.prompt and len(example.choices) > 1 and all(example.choices)
        return None if fits else "it needs a prompt and two `choices` or more, none of them empty"
    if example.prompt is None:
        return "it is plain text without a prompt to answer; score it by nll or perplexity"
    if metric == "json_fields" and not _is_object(example.answer):
        return "its answer is no JSON object; correct it or take another metric"
    if metric == "final_number" and _last_number(example.answer) is None:
        return "its answer has no number; correct it or take another metric"
    return None


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def _equal(given: str, wanted: str) -> list[bool]:
    asked = _whole_json(wanted)
    same_text = given.strip() == wanted.strip()
    return [same_text or (asked is not None and _whole_json(given) == asked)]


def _fields(given: str, wanted: str) -> list[bool]:
    answer = _first_object(given)
    has = answer if isinstance(answer, dict) else {}
    return [key in has and has[key] == value for key, value in json.loads(wanted).items()]


def _same_end(given: str, wanted: str) -> list[bool]:
    return [_last_number(given) == _last_number(wanted)]


@lru_cache
def _chrf() -> Any:
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()


@lru_cache
def _languages() -> frozenset[str]:
    from lingua import Language

    return frozenset(language.iso_code_639_1.name.lower() for language in Language.all())


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


def _last_number(text: str) -> Decimal | None:
    """The last of `12`, `1,234`, `-3.5`, `2,5`; in `10-12` the hyphen is no sign, and a full stop ends a sentence.

    A comma is one of decimals unless it parts thousands, as in `1,250`, or items, as in `1,2,3`.
    """
    found = list(_NUMBER.finditer(text))
    if not found:
        return None
    number = found[-1][0].replace("−", "-")
    return Decimal(number.replace(".", "").replace(",", ".") if found[-1]["decimals"] else number.replace(",", ""))


def _first_object(text: str) -> Any:
    """The first JSON object in `text`, so that chatter around it does no harm; None where there is none."""
    start = text.find("{")
    try:
        return json.JSONDecoder().raw_decode(text[start:])[0] if start >= 0 else None
    except (ValueError, RecursionError):
        return None


def _whole_json(text: str) -> Any:
    """The JSON object or list that the whole `text` is, or the whole of a code fence; None where it is neither."""
    fenced = _FENCED.fullmatch(text.strip())
    try:
        found = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, (dict, list)) else None
