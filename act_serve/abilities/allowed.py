"""What a request sees of the catalogue when its sender may use only some abilities."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from types import MappingProxyType

from act_serve.abilities.catalogue import CatalogueView
from act_serve.errors import PermissionDeniedError

# Names of abilities; None is all of them.
Allowed = frozenset[str] | None


def visible(view: CatalogueView, allowed: Allowed) -> CatalogueView:
    """The part of ``view`` that may be used, in its order."""
    if allowed is None:
        return view
    entries = {name: entry for name, entry in view.entries.items() if name in allowed}
    return dataclasses.replace(view, entries=MappingProxyType(entries))


def check_allowed(names: Iterable[str], allowed: Allowed) -> None:
    """Checks that all of ``names`` may be used; whether they exist makes no difference to the answer.

    Raises:
        PermissionDeniedError: one may not; the message names it, and what may be used instead.
    """
    if allowed is None:
        return
    for name in names:
        if name not in allowed:
            may = ", ".join(sorted(allowed)[:20]) or "the base model alone"
            raise PermissionDeniedError(
                f"this API key may not use the ability '{name[:80]}'; it may use {may}", param="abilities"
            )
