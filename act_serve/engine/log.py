"""Where an engine process writes what act-serve has to say."""

from __future__ import annotations

import logging


def share_log() -> None:
    """Has act-serve's loggers write as vLLM's do: same handlers, same level, so ``VLLM_LOGGING_LEVEL`` is for both.

    vLLM's app imports a library for SageMaker that sets the root logger to ERROR
    (vllm/entrypoints/serve/sagemaker/api_router.py), and warnings such as that the store cannot be read would be lost.
    Where vLLM's logging is switched off (``VLLM_CONFIGURE_LOGGING=0``) this changes nothing.
    """
    ours, theirs = logging.getLogger("act_serve"), logging.getLogger("vllm")
    if theirs.handlers:
        ours.setLevel(theirs.level)
        ours.handlers = [*theirs.handlers]
