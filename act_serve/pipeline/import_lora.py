"""What a PEFT LoRA adds to a weight: scaling·B·A (peft/tuners/lora/layer.py)."""

import math
import re
from collections.abc import Mapping
from typing import Any

from act_serve.errors import ModelError
from act_serve.pipeline.adapted_module import AdaptedModule
from act_serve.pipeline.import_rows import Change

TENSOR_NAMES = re.compile(r"base_model\.model\.(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias)")
# Options with which a LoRA is more than B·A times a factor.
_NOT_PLAIN = (
    "use_dora",
    "alora_invocation_tokens",
    "layer_replication",
    "use_bdlora",
    "use_qalora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
# Initialisations that leave the base's own weights alone. Others (pissa, olora, corda, loftq, lora_ga) take their first
# B·A off them, and what a later version of PEFT adds may do so, too.
_LEAVES_BASE = (True, False, None, "gaussian", "eva", "orthogonal")


def oddities(config: Mapping[str, Any]) -> list[str]:
    """Why the adapter is not B·A alone; empty for a plain LoRA."""
    odd = [f"{option}={config[option]!r}" for option in _NOT_PLAIN if config.get(option)]
    start = config.get("init_lora_weights")
    if (start.lower() if isinstance(start, str) else start) not in _LEAVES_BASE:
        odd.append(f"init_lora_weights={start!r}, which may have changed the base's own weights")
    return odd


def change(adapted: AdaptedModule) -> Change:
    """The weight's change `[out, in]`, and the bias's; raises ModelError or PairMismatchError when that can't be."""
    module, config = adapted.module, adapted.config
    rank = _number(adapted, "rank_pattern", "r")
    a = adapted.tensor("lora_A.weight", int(rank), module.in_features)
    b = adapted.tensor("lora_B.weight", module.out_features, int(rank))
    scaling = _number(adapted, "alpha_pattern", "lora_alpha") / (math.sqrt(rank) if config.get("use_rslora") else rank)
    if "lora_B.bias" not in adapted.parts:
        return scaling * (b @ a), None
    bias = adapted.tensor("lora_B.bias", module.out_features)
    if bool(bias.any()) and not adapted.biased:
        raise ModelError(f"{adapted.folder} gives {module.name} a bias, which the base has not; rows can't hold it")
    return scaling * (b @ a), scaling * bias if adapted.biased else None


def _number(adapted: AdaptedModule, patterns: str, default: str) -> float:
    """The module's own number, or the adapter's (get_pattern_key in peft/utils/other.py)."""
    config, said = adapted.config, f"{adapted.folder}: its config has no usable {default}"
    try:
        own = (
            number
            for key, number in (config.get(patterns) or {}).items()
            if re.match(rf"(.*\.)?({key})$", adapted.module.name)
        )
        number = float(next(own, config.get(default)))  # type: ignore[arg-type]
    except (AttributeError, TypeError, ValueError, re.error) as exc:
        raise ModelError(f"{said} or {patterns} ({exc})") from exc
    if not number > 0 or not math.isfinite(number):
        raise ModelError(f"{said}: {number:g} for {adapted.module.name}")
    return number
