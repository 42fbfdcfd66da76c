"""What of a request decides where it is answered best, and whose turn it takes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from act_serve.delta.composition import Composition
from act_serve.engine.ability_key import AbilityKey

_MAX_PIECES = 64
_PIECE_CHARACTERS, _PIECE_TOKENS = 256, 64


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request would find what it needs.

    Attributes:
        abilities: as engines report them (:class:`~act_serve.engine.ability_key.AbilityKey` as text).
        prefix: a key per beginning of the prompt, the longest last; of requests with equal keys an engine has cached
            the same.
    """

    abilities: frozenset[str] = frozenset()
    prefix: tuple[int, ...] = ()

    @property
    def group(self) -> str:
        """Requests of one group wait for each other; groups take turns.

        It leaves weights out, so that a client that varies them takes one turn like any other.
        """
        return "+".join(sorted(self.abilities))


ANYWHERE = Route()


def route_of(composition: Composition, body: Mapping[str, Any]) -> Route:
    """The route of a request for a pinned composition.

    Args:
        composition: pinned.
        body: of the request, in which ``model`` names the composition.
    """
    abilities = frozenset(str(AbilityKey.of(ability)) for ability in composition.abilities)
    keys, key = list[int](), hash(body.get("model"))
    for piece in _pieces(body):
        key = hash((key, piece))
        keys.append(key)
        if len(keys) == _MAX_PIECES:
            break
    return Route(abilities, tuple(keys))


def _pieces(body: Mapping[str, Any]) -> Iterator[str]:
    prompt = body.get("messages", body.get("prompt", body.get("input")))
    if isinstance(prompt, str):
        for end in range(_PIECE_CHARACTERS, len(prompt) + 1, _PIECE_CHARACTERS):
            yield prompt[end - _PIECE_CHARACTERS : end]
    elif isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
        for end in range(_PIECE_TOKENS, len(prompt) + 1, _PIECE_TOKENS):
            yield str(prompt[end - _PIECE_TOKENS : end])
    elif isinstance(prompt, list):
        for message in prompt:
            yield message if isinstance(message, str) else json.dumps(message, sort_keys=True)
