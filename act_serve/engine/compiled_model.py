"""Which code of a compiled model a step runs.

Compiled code that has the operator of :mod:`act_serve.engine.layers` behind every layer calls it in every step. On a
CPU each call costs, even where it has nothing to add: what it looks at has left the cache by then, pushed out by the
layer's weights. So the model is compiled a second time without them, into the code that vLLM would run alone, and each
step takes the one it needs. Weights are those of the one model; what this costs is a second compilation at the start.

Norms have no operator: the compiler fuses them with what stands before and behind them, and every step with abilities
would pay for what hardly an ability has. A step with such rows runs the model uncompiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from act_serve.engine.batch import StepCode
from act_serve.engine.layers import left_out_of_graphs


class CompiledModel:
    """The parts of a model that vLLM compiles, and what runs in their place.

    Codes are exchanged between steps, and not chosen by a function around them: called through one, the code without
    rows decoded at 0.95 of its speed (SmolLM2-135M on one core).

    Args:
        model: its compiled parts are those whose ``do_not_compile`` is false (vllm/compilation/decorators.py).
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._parts: list[Any] = [part for part in model.modules() if getattr(part, "do_not_compile", True) is False]
        self._codes: dict[StepCode, list[Any]] = {}

    def compile_without_rows(self, compile_model: Callable[[], None]) -> None:
        """Compiles the parts that are compiled already a second time, without rows.

        Nothing is done where nothing is compiled, or not ahead of time (``VLLM_USE_AOT_COMPILE=0``).

        Args:
            compile_model: compiles what is not compiled yet, such as by vLLM's warm-up.
        """
        if not self._parts or any(getattr(part, "aot_compiled_fn", None) is None for part in self._parts):
            return
        with_rows = [part.aot_compiled_fn for part in self._parts]
        for part in self._parts:
            part.aot_compiled_fn, part.compiled, part.was_aot_compile_fn_loaded_from_disk = None, False, False
        with left_out_of_graphs():
            compile_model()
        self._codes = {StepCode.ROWS: with_rows, StepCode.BASE: [part.aot_compiled_fn for part in self._parts]}

    def choose(self, code: StepCode) -> None:
        """Has the coming steps run ``code``."""
        for part in self._parts:
            part.do_not_compile = code is StepCode.UNCOMPILED
        if code in self._codes:
            for part, compiled in zip(self._parts, self._codes[code], strict=True):
                part.aot_compiled_fn = compiled
