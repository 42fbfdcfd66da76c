"""LoRAX's field ``merged_adapters``, so that its users can switch without changing what they send.

Its shape (https://loraexchange.ai/guides/merging_adapters): ``{"ids": [...], "weights": [...], "merge_strategy":
"linear", "density": ..., "majority_sign_method": ...}``. A linear merge is what a composition is.
"""

from __future__ import annotations

from typing import Any, NoReturn

from act_serve.delta.composition import MAX_ABILITIES, WeightedAbility
from act_serve.errors import RequestError

# The last two belong to LoRAX's other strategies; its client sends them with every request, and "linear" ignores them.
_KEYS = frozenset({"ids", "weights", "merge_strategy", "density", "majority_sign_method"})
_SHAPE = '"merged_adapters" is an object such as {"ids": ["fr", "extract"], "weights": [1, 0.5]}'


def read_merged_adapters(value: object) -> tuple[WeightedAbility, ...]:
    """The abilities of ``ids`` with their ``weights``, or with weight 1 each.

    Raises:
        RequestError: it has another shape, or asks for a strategy that is not linear.
    """
    if not isinstance(value, dict):
        _refuse(f"cannot read {str(value)[:80]!r}")
    if unknown := sorted(set(value) - _KEYS):
        _refuse(f"unknown key {unknown[0][:80]!r}")
    if value.get("merge_strategy") not in (None, "linear"):
        raise RequestError(
            f"merge_strategy {str(value['merge_strategy'])[:80]!r} is not linear, so no request can have it; "
            "merge once with `act-serve merge fr+extract NAME --method ties` and ask for the new ability NAME",
            param="merged_adapters",
        )
    ids = value.get("ids")
    if not isinstance(ids, list) or not ids or not all(isinstance(name, str) for name in ids):
        _refuse('"ids" must be a list of names')
    if len(ids) > MAX_ABILITIES:
        _refuse(f"{len(ids)} ids in one request; at most {MAX_ABILITIES} are possible")
    weights = _weights(value.get("weights"), len(ids))
    return tuple(WeightedAbility(name, weight=weight) for name, weight in zip(ids, weights, strict=True))


def _weights(value: Any, count: int) -> list[float]:
    if value is None or value == []:
        return [1.0] * count
    if not isinstance(value, list) or len(value) != count:
        _refuse('"weights" must be a list of as many numbers as there are ids')
    return [as_weight(weight, f"weight {number}", "merged_adapters") for number, weight in enumerate(value, 1)]


def as_weight(weight: object, what: str, param: str) -> float:
    """A JSON number as a weight; one of hundreds of digits is infinite, which a composition refuses.

    Raises:
        RequestError: it is not a number; ``what`` it is, and the field ``param`` that it stands in.
    """
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):
        raise RequestError(f"{what} must be a number, not {str(weight)[:80]!r}", param=param)
    try:
        return float(weight)
    except OverflowError:
        return float("inf")


def _refuse(message: str) -> NoReturn:
    raise RequestError(f"{message}; {_SHAPE}", param="merged_adapters")
