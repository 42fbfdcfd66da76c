"""vLLM's model of a checkpoint without an engine around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load_vllm_model(folder: Path, meeting: Path, dtype: str = "auto") -> Any:
    """The model as vLLM's loader leaves it, before a worker packs the weights.

    Args:
        meeting: a file that does not exist yet, by which this process opens its group of one, at the first call.
    """
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    config = EngineArgs(model=str(folder), dtype=dtype, enforce_eager=True, max_model_len=64).create_engine_config()
    with set_current_vllm_config(config), set_default_torch_dtype(config.model_config.dtype), torch.device("cpu"):
        if not torch.distributed.is_initialized():
            init_distributed_environment(1, 0, f"file://{meeting}", 0, "gloo")
            initialize_model_parallel()
        model = initialize_model(vllm_config=config)
        get_model_loader(config.load_config).load_weights(model, config.model_config)
    return model
