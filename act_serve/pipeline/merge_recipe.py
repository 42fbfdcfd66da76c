"""What a user writes to merge abilities: a YAML recipe with mergekit's keys, or a composition on the command line."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from act_serve.delta.composition import Composition, WeightedAbility, check_weight
from act_serve.errors import ProfileError, RequestError
from act_serve.pipeline.merge_methods import METHODS
from act_serve.profile.load import Place, explain, read_mapping

# The same methods under mergekit's names.
ALIASES = {"task_arithmetic": "sum", "dare_linear": "dare"}


def _known_method(name: object) -> str:
    method = ALIASES.get(str(name), str(name))
    if method not in METHODS:
        raise ValueError(f"unknown method {name!r}; known: {', '.join([*METHODS, *ALIASES])}")
    return method


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Parameters(_Section):
    """`weight` is a strength, as in a composition; `density` the share of an ability's own values that is kept."""

    weight: float = 1.0
    density: Annotated[float, Field(gt=0, le=1)] | None = None


class Ingredient(_Section):
    """One ability: `model` is NAME or NAME@VERSION in the store."""

    model: str
    parameters: Parameters = Parameters()


class Recipe(_Section):
    """A merge. `parameters.density` holds where an ability says none.

    `base_model` and `dtype` are for a merged checkpoint; a merged ability has its parents' base.
    """

    merge_method: Annotated[str, BeforeValidator(_known_method)]
    models: Annotated[tuple[Ingredient, ...], Field(min_length=1)]
    parameters: Parameters = Parameters()
    base_model: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    seed: int = 0

    @model_validator(mode="after")
    def _density_fits(self) -> "Recipe":
        given = [self.parameters.density, *(model.parameters.density for model in self.models)]
        if METHODS[self.merge_method].thin is None and any(density is not None for density in given):
            raise ValueError(f"the method {self.merge_method} keeps every value; leave density out")
        if self.parameters.weight != 1.0:
            raise ValueError("give each of `models` its own weight")
        return self

    def abilities(self) -> list[tuple[WeightedAbility, float]]:
        """Each ability with its weight, and the density that it gets, in the recipe's order.

        Raises RequestError for a name, version or weight that can't be, and for an ability that is named twice.
        """
        named = [_ability(model) for model in self.models]
        Composition.of(named)
        default = self.parameters.density or METHODS[self.merge_method].density
        return [
            (ability, model.parameters.density or default) for ability, model in zip(named, self.models, strict=True)
        ]


def parse_recipe(composition: str, *, method: str, density: float | None = None, seed: int = 0) -> Recipe:
    """Reads a composition such as `fr*0.5+extract@1` as a recipe; the order counts for `priority`.

    Raises ProfileError for an unknown method or a density that doesn't fit it, RequestError for a malformed text.
    """
    models = []
    for part in composition.split("+"):
        ability = next(iter(Composition.parse(part).abilities), None)
        if ability is None:
            raise RequestError(
                f"{part!r} in {composition!r} is no ability with a weight; write for example fr+math*0.5"
            )
        models.append({"model": part.split("*")[0].strip(), "parameters": {"weight": ability.weight}})
    fields = {"merge_method": method, "models": models, "parameters": {"density": density}, "seed": seed}
    return _validated(fields, "merge", {})


def load_recipe(path: Path) -> Recipe:
    """Reads a recipe file; raises ProfileError with file, line, key and what is expected there."""
    content, lines = read_mapping(path, "recipe", "merge_method")
    return _validated(content, f"{path}:1", lines)


def _validated(content: object, where: str, lines: Mapping[Place, str]) -> Recipe:
    try:
        return Recipe.model_validate(content)
    except ValidationError as exc:
        raise ProfileError(explain(exc, where, lines, "recipe")) from exc


def _ability(model: Ingredient) -> WeightedAbility:
    found = Composition.parse(model.model).abilities
    if len(found) != 1 or found[0].weight != 1.0:
        raise RequestError(f"{model.model!r} is not NAME or NAME@VERSION; a weight goes into its parameters")
    weight = check_weight(model.parameters.weight, found[0].name)
    if not weight:
        raise RequestError(f"the weight of {found[0].name} is 0; leave the ability out")
    return replace(found[0], weight=weight)
