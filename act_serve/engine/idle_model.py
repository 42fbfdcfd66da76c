"""The compiled model once more, without anything of an ability in it: for steps that use none.

Compiled code that has the operator of :mod:`act_serve.engine.layers` behind every layer calls it in every step. On a
CPU each call costs, even where it has nothing to add: what it looks at has left the cache by then, pushed out by the
layer's weights. So the model is compiled a second time without them, into the code that vLLM would run alone, and each
step takes the one it needs. Weights are those of the one model; what this costs is a second compilation at the start.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from act_serve.engine.batch import BatchTable
from act_serve.engine.layers import left_out_of_graphs


def compile_without_rows(model: torch.nn.Module, batch: BatchTable, compile_model: Callable[[], None]) -> None:
    """Compiles the parts of ``model`` that are compiled already a second time, without rows.

    Nothing is done where nothing is compiled, or not ahead of time (``VLLM_USE_AOT_COMPILE=0``).

    Args:
        model: its compiled parts are those with an ``aot_compiled_fn`` (vllm/compilation/decorators.py).
        batch: the step's table; a step without weights runs without rows.
        compile_model: compiles what is not compiled yet, such as by vLLM's warm-up.
    """
    parts: list[Any] = [part for part in model.modules() if getattr(part, "aot_compiled_fn", None) is not None]
    if not parts:
        return
    with_rows = [part.aot_compiled_fn for part in parts]
    for part in parts:
        part.aot_compiled_fn, part.compiled, part.was_aot_compile_fn_loaded_from_disk = None, False, False
    with left_out_of_graphs():
        compile_model()
    without_rows = [part.aot_compiled_fn for part in parts]

    # In place, between steps: called through a function that chose in every step, the code without rows decoded at 0.95
    # of its speed (SmolLM2-135M on one core).
    def choose(rows: bool) -> None:
        for part, chosen in zip(parts, with_rows if rows else without_rows, strict=True):
            part.aot_compiled_fn = chosen

    choose(batch.weights is not None)
    batch.choose = choose
