"""Finding 4: other samples, seeds and prompts choose the same channels (arXiv 2601.09398, section 3.1)."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from act_serve.models.examples import Example
from act_serve.pipeline.analyze.overlap import Mask, overlap

WORDINGS = ("Please help me with this task.\n\n{}", "{}\n\nGive only the answer, without any comment.")
SEEDS = 3


@dataclass(frozen=True, slots=True)
class Stability:
    """Mean and lowest overlap between the masks that an ability gets when one thing is `varied`.

    `items`: calibration examples behind each mask; `masks`: how many were compared, each with each.
    """

    ability: str
    varied: str
    ranking: str
    p: float
    share: float
    lowest: float
    chance: float
    masks: int
    items: int


def stability(
    ability: str, varied: str, masks: Sequence[Mask], channels: Mapping[str, int], *, ranking: str, p: float, items: int
) -> Stability:
    """Compares masks that should be the same, each with each."""
    found = [overlap(left, right, channels) for left, right in combinations(masks, 2)]
    return Stability(
        ability=ability,
        varied=varied,
        ranking=ranking,
        p=p,
        share=sum(each.share for each in found) / len(found),
        lowest=min(each.share for each in found),
        chance=sum(each.chance for each in found) / len(found),
        masks=len(masks),
        items=items,
    )


def halves(examples: Sequence[Example]) -> list[list[Example]]:
    """Two disjoint halves, drawn at random but always alike; nothing when there is only one example."""
    order = list(examples)
    random.Random(0).shuffle(order)
    middle = len(order) // 2
    return [order[:middle], order[middle : 2 * middle]] if middle else []


def samples(pool: Sequence[Example], count: int) -> list[list[Example]]:
    """One sample of `count` examples, or of half the pool when that is fewer, for each of `SEEDS` seeds."""
    size = min(count, len(pool) // 2)
    return [random.Random(seed).sample(list(pool), size) for seed in range(1, SEEDS + 1)] if size else []


def rewordings(examples: Sequence[Example]) -> list[list[Example]]:
    """The examples as they are, then with each of `WORDINGS` around the prompt; nothing for plain text."""
    if any(example.prompt is None for example in examples):
        return []
    reworded = [[Example(form.format(each.prompt), each.answer) for each in examples] for form in WORDINGS]
    return [list(examples), *reworded]
