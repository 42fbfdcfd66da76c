"""One section of the report: a picture, what it says in two sentences, and its numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["holds", "holds partly", "does not hold", "not judged"]
_WORST_FIRST: tuple[Verdict, ...] = ("does not hold", "holds partly", "holds", "not judged")


@dataclass(frozen=True, slots=True)
class Finding:
    """`verdict` is judged by `criterion`; None where a picture only shows, and judges nothing."""

    key: str
    title: str
    verdict: Verdict | None
    criterion: str
    sentences: tuple[str, str]
    picture: bytes | None
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def picture_name(self) -> str:
        """File name of the picture."""
        return f"{self.key}.png"


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    """The least favourable of several verdicts."""
    return min(verdicts, key=_WORST_FIRST.index, default="not judged")


def judged(value: float, *, holds: float, partly: float) -> Verdict:
    """`holds` from one threshold on, `holds partly` from a lower one on."""
    if value >= holds:
        return "holds"
    return "holds partly" if value >= partly else "does not hold"


def exact(p: float) -> str:
    """`0.125` as `12.5 %`, for shares that someone chose."""
    return f"{100 * p:g}\u00a0%"


def percent(share: float) -> str:
    """`0.1234` as `12 %`; one digit more below ten."""
    number = 100 * share
    return f"{number:.0f}\u00a0%" if abs(number) >= 9.95 or number == round(number) else f"{number:.1f}\u00a0%"
