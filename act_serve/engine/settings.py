"""What an engine needs to know to start; light, so that the router and the command line can fill it in."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# The router names the composition here, so that the engine need not parse the body a second time.
MODEL_HEADER = "x-act-model"

STORE_ENV = "ACT_SERVE_STORE"
BASE_ENV = "ACT_SERVE_BASE"
RESIDENT_ENV = "ACT_SERVE_MAX_RESIDENT_BYTES"
DEFAULT_RESIDENT_BYTES = 2 << 30
DEFAULT_ABILITIES_PER_REQUEST = 8
WORKER_CLS = "act_serve.engine.worker.AbilityWorker"


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """One engine.

    Attributes:
        model: folder of the base checkpoint.
        served_model_name: the name that clients use.
        store: folder or URL of the ability store.
        dtype: of weights and activations, as vLLM spells it; auto is the checkpoint's, but float32 on a CPU without
            bfloat16 instructions.
        max_model_len: tokens of prompt and answer together.
        max_num_seqs: requests in one batch; compositions cost nothing, so each may have its own.
        enforce_eager: skip torch.compile, which makes the start minutes shorter, and CUDA graphs.
        kv_cache_gib: memory of the KV cache on the CPU backend, in whole GiB.
        max_resident_bytes: budget of the resident abilities' tensors, in bytes.
        abilities_per_request: the most abilities that one request may name where steps run in CUDA graphs, whose
            buffers have that size; no limit of its own elsewhere.
        engine_args: further vLLM engine arguments, by their Python names.
    """

    model: str
    served_model_name: str
    store: str | Path
    dtype: str = "auto"
    max_model_len: int = 2048
    max_num_seqs: int = 16
    enforce_eager: bool = True
    kv_cache_gib: int = 1
    max_resident_bytes: int = DEFAULT_RESIDENT_BYTES
    abilities_per_request: int = DEFAULT_ABILITIES_PER_REQUEST
    engine_args: dict[str, Any] = field(default_factory=dict)
