"""Where each engine replica stands with each version of an ability."""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from act_serve.abilities.catalogue import AbilityEntry
from act_serve.engine.held import Held


class State(StrEnum):
    """From first to last; what each means to an operator is in docs/control-plane.md."""

    UNLOADED = "UNLOADED"
    LOADING = "LOADING"
    READY = "READY"
    DRAINING = "DRAINING"
    GONE = "GONE"
    UNREACHABLE = "UNREACHABLE"


def state_of(held: Held, active: int, served: bool) -> State:
    """The state of one version on one replica.

    Args:
        active: the version that requests get which name none; 0 where there is none any more.
        served: whether requests may have this content at all.
    """
    wanted = served and held.version == active
    if held.requests and (held.leaving or not wanted):
        return State.DRAINING
    if held.waiting:
        return State.LOADING
    if not served or held.version < active:
        return State.GONE
    return State.READY if held.resident_bytes and not held.leaving else State.UNLOADED


def replica_rows(entry: AbilityEntry | None, answers: Mapping[str, str | None]) -> list[dict[str, Any]]:
    """One row per replica and version: the versions of the store, and those that only replicas still have.

    Args:
        entry: what the store has of the ability; None where it has nothing any more.
        answers: by replica, what it holds of the ability, as JSON; None where it does not answer.
    """
    versions = entry.versions if entry else ()
    served = {(v.version, v.manifest.digest if v.manifest else "") for v in versions}
    there = {replica: [Held(**row) for row in json.loads(text)] for replica, text in answers.items() if text}
    held_by_any = {(held.version, held.digest) for helds in there.values() for held in helds}
    known = served | held_by_any
    known |= {(n, "") for n in (entry.wanted.removed if entry else ()) if n not in {v for v, _ in known}}
    active = entry.active.version if entry else 0
    rows = []
    for replica in sorted(answers):
        of = {(held.version, held.digest): held for held in there.get(replica, ())}
        for key in sorted(known):
            held = of.get(key, Held(*key))
            state = state_of(held, active, key in served) if replica in there else State.UNREACHABLE
            rows.append(_row(replica, held, state))
    return rows


def _row(replica: str, held: Held, state: State) -> dict[str, Any]:
    use = {"requests": held.requests, "waiting": held.waiting, "resident_bytes": held.resident_bytes}
    return {"replica": replica, "version": held.version, "state": state, **(use if state != State.UNREACHABLE else {})}
