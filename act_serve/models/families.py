"""Which modules of a model hold channels, by their names in the checkpoint.

Llama- and Qwen-family decoders share one layout: seven linear modules in each of `num_hidden_layers` layers.
A channel is one output dimension of such a module: a row of its weight matrix, with its bias entry where it has one.
Norms, lm_head and the embedding hold channels, too (`act_serve.delta.channels`), and are listed where asked for.
A mixture of experts has the same attention; its experts and router are no channels, since a delta can't change them
per request.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from act_serve.delta.channels import EMBEDDING, LM_HEAD, kind_of
from act_serve.errors import ModelError

FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
MIXTURES = frozenset({"mixtral", "qwen2_moe", "qwen3_moe"})
_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
PROJECTIONS = (*_ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_WITH_HEAD_NORMS = frozenset({"qwen3", "qwen3_moe"})
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
_SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
_NAME = re.compile(r"^model\.layers\.(\d+)\.(.+)$")


@dataclass(frozen=True, slots=True)
class ChannelModule:
    """A module of `out_features` channels, each a row of `in_features` weights."""

    name: str
    out_features: int
    in_features: int


def channel_modules(folder: Path, include: Sequence[str] = ()) -> list[ChannelModule]:
    """Lists the modules of the model in `folder` that hold channels, layer by layer, from its config alone.

    These are the linear ones, of a mixture of experts those of its attention, and of `act_serve.delta.channels.OUTSIDE`
    the kinds that `include` names. Raises ModelError for a family whose layout is not known, and for a config.json that
    leaves out a size.
    """
    config = read_config(folder)
    family = config.get("model_type")
    mixture = is_mixture(config)
    known = MIXTURES if mixture else FAMILIES
    if family not in known:
        kind = "mixture of experts" if mixture else "model family"
        raise ModelError(f"{folder}: {kind} {family!r} is not supported; known: {', '.join(sorted(known))}")
    sizes = (*_SIZES, *(["vocab_size"] if {"lm_head", "embedding"} & set(include) else []))
    if missing := [size for size in sizes if not isinstance(config.get(size), int)]:
        raise ModelError(f"{folder}: config.json gives no number for {', '.join(missing)}; download the model's again")
    linear = _ATTENTION if mixture else PROJECTIONS
    in_layer = (*linear, *_NORMS, *(_HEAD_NORMS if family in _WITH_HEAD_NORMS else ()))
    layers = (f"model.layers.{layer}.{name}" for layer in range(config["num_hidden_layers"]) for name in in_layer)
    names = (EMBEDDING, *layers, "model.norm", LM_HEAD)
    return [ChannelModule(name, *_shape(name, config)) for name in names if kind_of(name) in ("linear", *include)]


def is_mixture(config: dict[str, Any]) -> bool:
    """Whether a model with this config has several experts."""
    return config.get("model_type") in MIXTURES or any((config.get(field) or 0) > 1 for field in _EXPERT_COUNTS)


def layer_and_projection(name: str) -> tuple[int, str]:
    """Splits `model.layers.3.mlp.up_proj` into `(3, "up_proj")`; raises ModelError for another kind of name."""
    found = _NAME.match(name)
    if found is None:
        raise ModelError(f"{name} is not a module of a decoder layer")
    return int(found[1]), found[2].rsplit(".", 1)[-1]


def read_config(folder: Path) -> dict[str, Any]:
    """Reads `config.json`; raises ModelError when it is missing or not JSON."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise ModelError(f"{folder}: config.json can't be read ({exc})") from exc
    if not isinstance(config, dict):
        raise ModelError(f"{folder}: config.json is not an object")
    return config


def _shape(name: str, config: dict[str, Any]) -> tuple[int, int]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or hidden // heads
    queries, keys = heads * size, (config.get("num_key_value_heads") or heads) * size
    shapes = {"q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden)}
    shapes |= {"o_proj": (hidden, queries), "gate_proj": (inner, hidden), "up_proj": (inner, hidden)}
    shapes |= {"down_proj": (hidden, inner), "q_norm": (size, 1), "k_norm": (size, 1)}
    shapes |= dict.fromkeys((*_NORMS, "norm"), (hidden, 1))
    if kind_of(name) in ("lm_head", "embedding"):
        vocabulary = config["vocab_size"]
        shapes |= {"lm_head": (vocabulary, hidden), "embed_tokens": (hidden, vocabulary)}
    return shapes[name.rsplit(".", 1)[-1]]
