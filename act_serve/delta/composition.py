"""A request's weighted abilities in their one canonical form.

The canonical text is the routing key, the name of the vLLM adapter and so the prefix-cache key::

    composition := ability ("+" ability)*
    ability     := name ["@" version ["~" digest]] ["*" weight]

``fr@3~9f86d081884c*0.5+math@1~60303ae22b99*1`` reads: half of version 3 of ``fr``, all of version 1 of
``math``; each digest is the head of the sha256 of the ability's tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from act_serve.errors import RequestError

NAME_PATTERN = r"[a-z0-9][a-z0-9_-]{0,63}"
DIGEST_CHARS = 12
MAX_VERSION = 999_999_999  # what the grammar above can say
MAX_WEIGHT = 8.0
MAX_ABILITIES = 32
_NAME = re.compile(NAME_PATTERN)
_ABILITY = re.compile(
    rf"(?P<name>{NAME_PATTERN})"
    rf"(?:@(?P<version>[1-9][0-9]{{0,8}})(?:~(?P<digest>[0-9a-f]{{{DIGEST_CHARS}}}))?)?"
    r"(?:\*(?P<weight>[^+*@~]{1,32}))?"
)


@dataclass(frozen=True, slots=True, order=True)
class WeightedAbility:
    """One ability of a composition.

    Attributes:
        name: the ability's name, ``[a-z0-9][a-z0-9_-]{0,63}``.
        version: its version, or None for "the one that the server has active".
        digest: first 12 hexadecimal digits of the sha256 of its tensors, or None when not pinned.
        weight: factor on its delta, finite, rounded to 1e-3, never 0 in a composition.
    """

    name: str
    version: int | None = None
    digest: str | None = None
    weight: float = 1.0

    def __str__(self) -> str:
        version = "" if self.version is None else f"@{self.version}"
        digest = "" if self.digest is None else f"~{self.digest}"
        return f"{self.name}{version}{digest}*{self.weight:g}"

    @property
    def pinned(self) -> bool:
        """Whether version and content are fixed."""
        return self.version is not None and self.digest is not None


@dataclass(frozen=True, slots=True)
class Composition:
    """Several weighted abilities: sorted by name, no duplicates, no zero weights.

    Make one with :meth:`of` or :meth:`parse`, which canonicalize; two requests that mean the same
    give equal compositions and equal texts.
    """

    abilities: tuple[WeightedAbility, ...] = ()

    @classmethod
    def of(cls, abilities: Iterable[WeightedAbility]) -> Composition:
        """Canonicalizes: rounds weights to 1e-3, drops zeros, sorts, refuses duplicates.

        Raises:
            RequestError: a name appears twice, is not a name, a weight is not finite or too large, or there are
                more than 32 abilities.
        """
        kept: dict[str, WeightedAbility] = {}
        seen: set[str] = set()
        for ability in abilities:
            check_name(ability.name)
            if ability.name in seen:
                raise RequestError(f"ability '{ability.name}' is named twice; name it once", param="abilities")
            if len(seen) == MAX_ABILITIES:
                raise RequestError(f"more than {MAX_ABILITIES} abilities in one request", param="abilities")
            seen.add(ability.name)
            weight = check_weight(ability.weight, ability.name)
            if weight:
                kept[ability.name] = WeightedAbility(ability.name, ability.version, ability.digest, weight)
        return cls(tuple(kept[name] for name in sorted(kept)))

    @classmethod
    def parse(cls, text: str) -> Composition:
        """Reads the canonical text or any looser spelling of it; the empty text is the base model.

        Raises:
            RequestError: the text does not follow the grammar on top of this module.
        """
        if not text:
            return cls()
        return cls.of(_parse_ability(part, text) for part in text.split("+"))

    @property
    def pinned(self) -> bool:
        """Whether every ability's version and content are fixed."""
        return all(ability.pinned for ability in self.abilities)

    def header(self) -> str:
        """The value of the response header ``x-act-abilities``: ``fr@3*1,math@1*0.5``."""
        return ",".join(f"{a.name}@{a.version}*{a.weight:g}" for a in self.abilities)

    def __str__(self) -> str:
        return "+".join(map(str, self.abilities))

    def __bool__(self) -> bool:
        return bool(self.abilities)


def check_name(name: str) -> str:
    """Returns ``name`` if it may name an ability.

    Raises:
        RequestError: it does not match ``[a-z0-9][a-z0-9_-]{0,63}``.
    """
    if not _NAME.fullmatch(name):
        rule = "use 1 to 64 of a-z, 0-9, '_' and '-', not starting with '_' or '-'"
        if "@" in name or "*" in name:
            rule = 'version and weight are fields beside it: {"name": "fr", "version": 2, "weight": 0.5}'
        raise RequestError(f"{name[:80]!r} is not an ability name: {rule}", param="abilities")
    return name


def check_weight(weight: float, name: str) -> float:
    """Returns ``weight`` rounded to 1e-3.

    Raises:
        RequestError: it is not finite, or its size is over 8.
    """
    if not math.isfinite(weight) or abs(weight) > MAX_WEIGHT:
        raise RequestError(
            f"the weight of ability '{name}' is {weight:g}; it must be a finite number between "
            f"{-MAX_WEIGHT:g} and {MAX_WEIGHT:g} (1 is the ability as built)",
            param="abilities",
        )
    return round(float(weight), 3) + 0.0


def _parse_ability(part: str, text: str) -> WeightedAbility:
    match = _ABILITY.fullmatch(part)
    if match is None:
        raise RequestError(
            f"cannot read {part[:80]!r} in the composition {text[:200]!r}; write NAME, NAME*WEIGHT or "
            "NAME@VERSION*WEIGHT, joined by '+', for example fr+math*0.5",
            param="model",
        )
    try:
        weight = float(match["weight"] or 1)
    except ValueError:
        raise RequestError(f"{match['weight']!r} is not a number, in {part[:80]!r}", param="model") from None
    return WeightedAbility(match["name"], int(match["version"]) if match["version"] else None, match["digest"], weight)
