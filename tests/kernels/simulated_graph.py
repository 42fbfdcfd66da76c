"""What a CUDA graph does, without a GPU: it remembers the launches of its capture, and repeats them as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from act_serve.kernels import triton_impl

_SCRATCH = "scratch"


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel launch."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]

    @property
    def scratch(self) -> torch.Tensor:
        """The buffer that a graph takes from its own pool."""
        return self.arguments[self.kernel.arg_names.index(_SCRATCH)]

    @property
    def signature(self) -> tuple[Any, ...]:
        """All that a graph would bake in; of the scratch buffer the size only."""
        found: list[Any] = [self.kernel.__name__, self.grid, sorted(self.constants.items())]
        for name, value in zip(self.kernel.arg_names, self.arguments, strict=False):
            tensor = isinstance(value, torch.Tensor)
            place = value.data_ptr() if tensor and name != _SCRATCH else None
            found.append((name, place, tuple(value.shape), value.stride()) if tensor else (name, value))
        return tuple(found)


@dataclass(slots=True)
class SimulatedGraph:
    """The launches of one capture."""

    launches: list[Launch] = field(default_factory=list)

    @property
    def signature(self) -> list[tuple[Any, ...]]:
        """Of all launches."""
        return [launch.signature for launch in self.launches]

    def replay(self) -> None:
        """Repeats them; what earlier replays left in the scratch buffers is gone."""
        for launch in self.launches:
            launch.scratch.fill_(float("nan"))
        for launch in self.launches:
            launch.kernel[launch.grid](*launch.arguments, **launch.constants)


class _Recorder:
    def __init__(self, kernel: Any, graph: SimulatedGraph, execute: bool) -> None:
        self._kernel, self._graph, self._execute = kernel, graph, execute

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **constants: Any) -> None:
            self._graph.launches.append(Launch(self._kernel, grid, arguments, constants))
            if self._execute:
                self._kernel[grid](*arguments, **constants)

        return launch


@contextmanager
def capture(*, execute: bool = False) -> Iterator[SimulatedGraph]:
    """Remembers the kernels that are launched inside; like a capture, it doesn't run them unless asked to."""
    graph = SimulatedGraph()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_products", "_scatter"):
            patch.setattr(triton_impl, name, _Recorder(getattr(triton_impl, name), graph, execute))
        yield graph
