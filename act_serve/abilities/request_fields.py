"""Reads the fields of a request body that ask for abilities: ``abilities``, ``language`` and ``skill``.

``scale`` is another name for an ability's ``weight``, as in vLLM and llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NoReturn

from act_serve.abilities.catalogue import CatalogueView, offer
from act_serve.abilities.detect import Choice, serving_language
from act_serve.abilities.merged_adapters import as_weight
from act_serve.delta.composition import MAX_ABILITIES, Composition, WeightedAbility
from act_serve.errors import RequestError, UnknownAbilityError

_SHAPES = (
    '"abilities" is a list of names such as ["fr"], a list of objects such as '
    '[{"name": "fr", "weight": 0.5, "version": 1}], "auto" or "none"'
)

Asked = tuple[WeightedAbility, ...] | Literal["auto"]


def read_abilities(value: object) -> Asked:
    """The field ``abilities`` in any of its shapes.

    Raises:
        RequestError: it has none of them.
    """
    if value == "auto":
        return "auto"
    if value == "none":
        return ()
    if not isinstance(value, list):
        _refuse(value)
    if len(value) > MAX_ABILITIES:
        raise RequestError(
            f"{len(value)} abilities in one request; at most {MAX_ABILITIES} are possible", param="abilities"
        )
    return tuple(map(_item, value))


def read_text(text: str) -> Asked:
    """What stands after the colon of ``model``, or the server's default: auto, none or a composition.

    Raises:
        RequestError: it is none of them.
    """
    if text == "auto":
        return "auto"
    return () if text == "none" else Composition.parse(text).abilities


def read_shorthand(body: Mapping[str, Any], view: CatalogueView) -> Choice:
    """What ``language`` and ``skill`` ask for.

    Raises:
        RequestError: one of them is not a string.
        UnknownAbilityError: no ability declares that language or skill.
    """
    chosen: list[WeightedAbility] = []
    language, skill = body.get("language"), body.get("skill")
    if language is not None:
        chosen.append(_language(language, view))
    if skill is not None:
        chosen.append(_skill(skill, view))
    unique = dict.fromkeys(chosen)
    return Choice(tuple(unique), "asked for by language or skill")


def _item(item: object) -> WeightedAbility:
    if isinstance(item, str):
        return WeightedAbility(item)
    if not isinstance(item, dict):
        _refuse(item)
    unknown = sorted(set(item) - {"name", "weight", "scale", "version"})
    if unknown:
        raise RequestError(f"unknown key {unknown[0][:80]!r} in an ability; {_SHAPES}", param="abilities")
    name, version = item.get("name"), item.get("version")
    if not isinstance(name, str):
        _refuse(item)
    if "weight" in item and "scale" in item:
        raise RequestError(f'ability {name[:80]!r} has both "weight" and "scale"; give one of them', param="abilities")
    weight = item.get("weight", item.get("scale", 1.0))
    if version is not None and (isinstance(version, bool) or not isinstance(version, int) or version < 1):
        raise RequestError(
            f"the version of ability {name[:80]!r} must be a whole number from 1, not {str(version)[:80]!r}",
            param="abilities",
        )
    return WeightedAbility(name, version, None, as_weight(weight, f"the weight of ability {name[:80]!r}", "abilities"))


def _language(language: object, view: CatalogueView) -> WeightedAbility:
    if not isinstance(language, str):
        raise RequestError('"language" must be a BCP 47 tag such as "fr"', param="language")
    serving = serving_language(language, view)
    if not serving:
        known = {tag for manifest in view.manifests() for tag in manifest.languages}
        raise UnknownAbilityError(
            f"no ability serves the language {language[:80]!r} on this server{offer(language, known)}", param="language"
        )
    return WeightedAbility(serving[0].name)


def _skill(skill: object, view: CatalogueView) -> WeightedAbility:
    if not isinstance(skill, str):
        raise RequestError('"skill" must be the name of a skill', param="skill")
    known = {manifest.name for manifest in view.manifests() if manifest.kind == "skill"}
    if skill not in known:
        raise UnknownAbilityError(f"no skill {skill[:80]!r} on this server{offer(skill, known)}", param="skill")
    return WeightedAbility(skill)


def _refuse(value: object) -> NoReturn:
    raise RequestError(f"cannot read {str(value)[:80]!r}: {_SHAPES}", param="abilities")
