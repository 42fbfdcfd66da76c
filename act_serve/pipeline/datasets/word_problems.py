"""Word problems of two or three exact steps, with units and dates, for the ability `reason`; in English and in French.

An answer is a short chain of steps, each `LEFT OP RIGHT = RESULT.`, that ends in the marker and the number.
"""

import random
import re
from dataclasses import dataclass
from functools import lru_cache

from act_serve.errors import DataError
from act_serve.models.examples import Example
from act_serve.pipeline.datasets.lexicon import first_names, goods
from act_serve.pipeline.datasets.problem_texts import FRENCH_GOODS, PROBLEMS, UNSEEN_PROBLEMS, Problem
from act_serve.pipeline.datasets.splits import Split, split_of

PROMPTS = {
    "en": (
        "{text} Show the steps, then the answer.",
        "{text}",
        "Solve this problem step by step. {text}",
        "{text}\n\nWork it out step by step and give the answer as a number.",
    ),
    "fr": ("{text} Montre les étapes, puis la réponse.",),
}
MARKERS = {"en": "Answer: {result}", "fr": "Réponse : {result}"}
LARGEST = 999
_STEP = re.compile(r"(\w+)([-+*/])(\w+)")


@dataclass(frozen=True, slots=True)
class Solution:
    """The steps as written, and the last one's result."""

    steps: tuple[str, ...]
    result: int


def word_problems(split: Split, count: int, seed: int, language: str = "en") -> list[Example]:
    """Returns `count` problems; names and goods of one split never occur in another, nor do problems without a name.

    A fifth of the validation and test problems are of kinds that training has none of. `language` is en or fr.
    Raises DataError for another one.
    """
    if language not in PROMPTS:
        raise DataError(f"word problems are written in {' and '.join(PROMPTS)}, not in {language!r}")
    draw = random.Random(f"{seed}/{split}/word_problems")
    # Numbers of another split are drawn again from a stream of their own, so that all other problems stay as they are.
    again = random.Random(f"{seed}/{split}/word_problems/again")
    return [_problem(split, draw, again, language) for _ in range(count)]


def solve(steps: tuple[str, ...], numbers: dict[str, int]) -> Solution | None:
    """Computes steps such as `a*b` and `_+c`, where `_` is the result before; None where one is not a small natural.

    A name stands for a number of `numbers`, `r1` for the result of the first step, digits for themselves.
    """
    known, written = dict(numbers), []
    for place, step in enumerate(steps, start=1):
        matched = _STEP.fullmatch(step)
        assert matched is not None, step
        left, right = (int(word) if word.isdigit() else known[word] for word in matched.group(1, 3))
        result = _result(left, matched[2], right)
        if result is None:
            return None
        known["_"] = known[f"r{place}"] = result
        written.append(f"{left} {matched[2]} {right} = {result}.")
    return Solution(tuple(written), known["_"])


def _result(left: int, sign: str, right: int) -> int | None:
    if sign == "/":
        return left // right if left % right == 0 else None
    value = {"+": left + right, "-": left - right, "*": left * right}[sign]
    return value if 0 < value <= LARGEST else None


def _problem(split: Split, draw: random.Random, again: random.Random, language: str) -> Example:
    unseen = split != "train" and draw.random() < 0.2
    problem = draw.choice(UNSEEN_PROBLEMS if unseen else PROBLEMS)
    numbers, solution = _numbers(problem, draw)
    while not _belongs(problem, solution, split):
        numbers, solution = _numbers(problem, again)
    name, other = draw.sample(first_names(split), 2)
    # Goods have a stream of their own: both languages then have the same problems.
    thing, second = random.Random(draw.random()).sample(_goods(split, language), 2)
    text = getattr(problem, language).format(name=name, other=other, goods=thing, second=second, **numbers)
    prompts = PROMPTS[language]
    prompt = draw.choice(prompts) if split == "train" else prompts[0]
    answer = " ".join((*solution.steps, MARKERS[language].format(result=solution.result)))
    return Example(prompt.format(text=text), answer)


def _belongs(problem: Problem, solution: Solution, split: Split) -> bool:
    """Whether a problem may be in `split`: by the names in it, or else by its steps, which both languages share."""
    return "{name}" in problem.en or split_of(" ".join(solution.steps)) == split


def _numbers(problem: Problem, draw: random.Random) -> tuple[dict[str, int], Solution]:
    while True:
        numbers = {name: draw.randint(low, high) for name, (low, high) in problem.numbers.items()}
        solution = solve(problem.steps, numbers)
        if solution is not None:
            return numbers, solution


@lru_cache
def _goods(split: Split, language: str) -> list[str]:
    if language == "en":
        return goods(split)
    return [word for word in FRENCH_GOODS if split_of(word) == split]
