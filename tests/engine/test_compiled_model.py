"""Which code the parts of a compiled model run; with vLLM's own in `test_outside_linear.py`."""

from __future__ import annotations

from typing import Any

import torch

from act_serve.engine.batch import BatchTable, StepCode
from act_serve.engine.compiled_model import CompiledModel


class Part(torch.nn.Module):
    """What vLLM's decorator gives a compiled class, as far as it matters here."""

    do_not_compile = False
    compiled = was_aot_compile_fn_loaded_from_disk = True
    aot_compiled_fn: Any = "with rows"


def compiling(model: torch.nn.Module) -> Any:
    """A warm-up that compiles what is not compiled."""

    def compile_model() -> None:
        for part in model.modules():
            if isinstance(part, Part) and part.aot_compiled_fn is None and not part.compiled:
                part.aot_compiled_fn = "without rows"

    return compile_model


def test_each_step_runs_the_code_that_it_needs() -> None:
    model = torch.nn.ModuleList([Part(), torch.nn.Linear(2, 2), Part()])
    compiled, batch = CompiledModel(model), BatchTable()
    batch.choose = compiled.choose
    compiled.compile_without_rows(compiling(model))

    def runs() -> set[str]:
        parts = [part for part in model if isinstance(part, Part)]
        return {"none" if part.do_not_compile else part.aot_compiled_fn for part in parts}

    assert runs() == {"without rows"}
    key: Any = ("a", 1, "digest")
    for code, wanted in (
        (StepCode.ROWS, "with rows"),
        (StepCode.UNCOMPILED, "none"),
        (StepCode.ROWS, "with rows"),
        (StepCode.UNCOMPILED, "none"),
    ):
        batch.fill([1], {1: {key: 1.0}}, code=code)
        assert runs() == {wanted}
    batch.clear()
    assert runs() == {"without rows"}


def test_what_is_not_compiled_ahead_of_time_is_not_compiled_twice() -> None:
    part = Part()
    part.aot_compiled_fn = None
    calls: list[str] = []
    for model in (part, torch.nn.Linear(2, 2)):
        compiled = CompiledModel(model)
        compiled.compile_without_rows(lambda: calls.append("compiled"))
        compiled.choose(StepCode.UNCOMPILED)
        compiled.choose(StepCode.ROWS)
    assert not calls
    assert part.aot_compiled_fn is None
    assert not part.do_not_compile
