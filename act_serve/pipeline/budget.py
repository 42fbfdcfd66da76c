"""Turns a budget in channels or bytes into the share of the parameters that every ranking spends."""

from pathlib import Path

from act_serve.delta.manifest import Stored
from act_serve.errors import BuildError, ProfileError
from act_serve.models.families import ChannelModule, channel_modules
from act_serve.models.row_reader import open_rows
from act_serve.profile.schema import Profile

# Beside its values: the int32 row number and, in the form int8, a float32 scale; then a bfloat16 bias entry.
_VALUE_BYTES = {"bfloat16": 2, "int8": 1}
_ROW_BYTES = {"bfloat16": 4, "int8": 8}
_BIAS_BYTES = 2
# At most what the header of the tensors file spends on one tensor beside its name, and on itself.
_ENTRY_BYTES, _HEADER_BYTES = 120, 64
_STEPS = 1_000_000


def settle_budget(profile: Profile, base: Path) -> Profile:
    """Returns the profile with its budget as `localize.p` alone.

    5 % of every module's channels are 5 % of the parameters. A number of bytes becomes the largest p whose tensors
    file can't be larger, whatever the ranking. Raises ProfileError when a search is to find the budget, BuildError
    when the bytes don't suffice for anything.
    """
    settings = profile.localize
    if settings.channels is None and settings.bytes is None:
        return profile
    if profile.search is not None:
        raise ProfileError(f"{profile.name}: a search tries its own shares `search.p`; leave the localize budget out")
    modules = channel_modules(base, settings.include)
    p = settings.channels or _share_of_bytes(int(settings.bytes or 0), base, modules, profile.stored)
    settled = settings.model_copy(update={"p": p, "channels": None, "bytes": None})
    return profile.model_copy(update={"localize": settled})


def _share_of_bytes(budget: int, base: Path, modules: list[ChannelModule], stored: Stored) -> float:
    with open_rows(base) as reader:
        names = set(reader.names())
    biased = {module.name for module in modules if f"{module.name}.bias" in names}
    header = _HEADER_BYTES + sum(4 * (len(module.name) + _ENTRY_BYTES) for module in modules)
    left = budget - header

    def cost(module: ChannelModule) -> int:
        bias = _BIAS_BYTES if module.name in biased else 0
        return module.in_features * _VALUE_BYTES[stored] + _ROW_BYTES[stored] + bias

    def price(module: ChannelModule) -> float:
        return cost(module) / module.in_features

    def fits(p: float) -> bool:
        """Whether neither the same share of every module nor any other choice of as many parameters is too large."""
        evenly = sum(round(p * module.out_features) * cost(module) for module in modules)
        left_over, dearest = p * sum(module.out_features * module.in_features for module in modules), 0.0
        for module in by_price:  # the choice that takes most bytes for these parameters
            spent = min(left_over, module.out_features * module.in_features)
            dearest += spent * price(module)
            left_over -= spent
        return max(evenly, dearest) <= left

    by_price = sorted(modules, key=price, reverse=True)

    low, high = 0, _STEPS
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle / _STEPS) else (low, middle - 1)
    if low == 0:
        raise BuildError(
            f"localize.bytes: {budget} bytes are too few for any rows of {base.name}: the tensors file's header alone "
            f"may take {header}; allow more"
        )
    return low / _STEPS
