"""From the fields of a request to the pinned composition that the engine applies."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from act_serve.abilities.allowed import Allowed, check_allowed, visible
from act_serve.abilities.catalogue import CatalogueView
from act_serve.abilities.detect import NOT_READY, Choice, choose
from act_serve.abilities.language import Identifier, identify_language
from act_serve.abilities.merged_adapters import read_merged_adapters
from act_serve.abilities.prompt_text import prompt_text
from act_serve.abilities.request_fields import Asked, read_abilities, read_shorthand, read_text
from act_serve.abilities.skills import Skills
from act_serve.delta.composition import Composition
from act_serve.errors import RequestError, UnknownAbilityError

FIELDS = ("abilities", "merged_adapters", "language", "skill")


@dataclass(frozen=True, slots=True)
class Policy:
    """What the server decides for every request.

    Attributes:
        base_model: the name that clients give as ``model``.
        default: what a request gets that asks for nothing: "none", "auto" or a composition's text.
        allow_negative_weights: whether a request may subtract an ability.
    """

    base_model: str
    default: str = "none"
    allow_negative_weights: bool = False


@dataclass(frozen=True, slots=True)
class Resolution:
    """What a request will be served with.

    Attributes:
        composition: pinned; empty for the base model alone.
        auto: whether the server chose it from the request's text.
        reason: who or what chose it, in one sentence.
    """

    composition: Composition
    auto: bool
    reason: str

    def model(self, base_model: str) -> str:
        """The engine's ``model``: the base's name, then the composition if there is one."""
        return f"{base_model}:{self.composition}" if self.composition else base_model

    def report(self) -> dict[str, Any]:
        """The ``act`` object of the response."""
        abilities = [
            {"name": a.name, "version": a.version, "digest": a.digest, "weight": a.weight}
            for a in self.composition.abilities
        ]
        return {"abilities": abilities, "auto": self.auto, "reason": self.reason}


def resolve(
    body: Mapping[str, Any],
    *,
    view: CatalogueView,
    policy: Policy,
    skills: Skills = NOT_READY,
    identify: Identifier = identify_language,
    allowed: Allowed = None,
) -> Resolution:
    """Reads ``model`` and the :data:`FIELDS` of a request body.

    Args:
        body: of the request.
        view: of the catalogue.
        policy: of the server.
        skills, identify: what "auto" chooses by.
        allowed: names that the request's sender may use; "auto" chooses among them alone.

    Raises:
        RequestError: a field is malformed, or two of them ask for abilities.
        PermissionDeniedError: the request names an ability that is not allowed.
        UnknownAbilityError: the model, ability, version, language or skill is not on this server.
        ArtifactDamagedError: a chosen ability's manifest is damaged.
    """
    usable = visible(view, allowed)
    suffix = _model_suffix(body.get("model"), policy.base_model, usable)
    given = [name for name in FIELDS if body.get(name) is not None]
    if suffix is not None and given:
        raise RequestError(
            f'"model" names abilities after the colon and "{given[0]}" asks for some too; use one of them',
            param=given[0],
        )
    if len(given) > 1 and given != ["language", "skill"]:
        raise RequestError(f'"{given[0]}" and "{given[1]}" are both given; use one of them', param=given[1])
    asked = _asked(body, suffix, view, usable, policy)
    choice = asked if asked is not None else choose(prompt_text(body), usable, identify, skills)
    composition = Composition.of(choice.abilities)
    check_allowed((ability.name for ability in composition.abilities), allowed)
    return Resolution(_pinned(composition, usable, policy), asked is None, choice.reason)


def _asked(
    body: Mapping[str, Any], suffix: str | None, view: CatalogueView, usable: CatalogueView, policy: Policy
) -> Choice | None:
    """What the request names, or the server's default; None for "auto"."""
    if suffix is not None:
        asked: Asked = read_text(suffix)
        reason = "named by the request's model"
    elif body.get("abilities") is not None:
        asked = read_abilities(body["abilities"])
        reason = "named by the request"
    elif body.get("merged_adapters") is not None:
        asked, reason = read_merged_adapters(body["merged_adapters"]), "named by the request's merged_adapters"
    elif body.get("language") is not None or body.get("skill") is not None:
        return _shorthand(body, view, usable)
    else:
        asked, reason = read_text(policy.default), "the server's default"
    return None if asked == "auto" else Choice(asked, reason)


def _shorthand(body: Mapping[str, Any], view: CatalogueView, usable: CatalogueView) -> Choice:
    try:
        return read_shorthand(body, usable)
    except UnknownAbilityError:
        with contextlib.suppress(UnknownAbilityError):
            return read_shorthand(body, view)  # an ability that is not allowed, which the caller says
        raise


def _pinned(composition: Composition, view: CatalogueView, policy: Policy) -> Composition:
    for ability in composition.abilities:
        if ability.weight < 0 and not policy.allow_negative_weights:
            raise RequestError(
                f"the weight of ability '{ability.name}' is {ability.weight:g}; this server refuses negative weights",
                param="abilities",
            )
    return Composition.of(map(view.pin, composition.abilities))


def _model_suffix(model: object, base_model: str, view: CatalogueView) -> str | None:
    if model is None or model == base_model:
        return None
    if not isinstance(model, str):
        raise RequestError(f'"model" must be a string such as {base_model!r}', param="model")
    name, colon, suffix = model[: len(base_model)], model[len(base_model) :][:1], model[len(base_model) + 1 :]
    if name != base_model or colon != ":":
        raise UnknownAbilityError(
            f"no model {model[:120]!r} on this server; it serves {base_model!r}{_near(model, base_model, view)}; for "
            f'abilities, ask for {base_model + ":NAME"!r} or give "abilities": ["NAME"]; GET /v1/models lists all',
            param="model",
        )
    return suffix


def _near(model: str, base_model: str, view: CatalogueView) -> str:
    """Offers what the client may have meant: a misspelt model, or an ability's name alone."""
    models = {m.name: f"{base_model}:{m.name}" for m in view.manifests()}
    tail = model[:120].rpartition(":")[2]
    near = difflib.get_close_matches(model[:120], [base_model, *models.values()], n=3, cutoff=0.8)
    near += [models[name] for name in difflib.get_close_matches(tail, models, n=3, cutoff=0.8)]
    return f" (did you mean {' or '.join(map(repr, dict.fromkeys(near)))}?)" if near else ""
