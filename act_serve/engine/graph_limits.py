"""How large a step may be that runs inside a CUDA graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.config import CUDAGraphMode

from act_serve.errors import EngineError, RequestError

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass(frozen=True, slots=True)
class GraphLimits:
    """What the tables that graphs read have room for.

    Only the number of abilities per request can be exceeded, and a request that does is refused before it runs.

    Attributes:
        tokens: of the largest graph; longer steps run in none.
        requests: in one step.
        abilities_per_request: in one composition.
    """

    tokens: int
    requests: int
    abilities_per_request: int

    @property
    def abilities(self) -> int:
        """The most that one step can have, each request its own."""
        return self.requests * self.abilities_per_request

    @classmethod
    def of(cls, config: VllmConfig, abilities_per_request: int) -> GraphLimits | None:
        """The limits under vLLM's settings; None where it makes no CUDA graphs.

        vLLM settles ``max_cudagraph_capture_size`` before a worker starts (vllm/config/vllm.py), and later only lowers
        it or turns graphs off (``resolve_cudagraph_mode_and_sizes``, vllm/config/compilation.py). Steps beyond that
        many tokens run without a graph: vllm/v1/cudagraph_dispatcher.py for the V1 runner, the candidates of
        vllm/v1/worker/gpu/cudagraph_utils.py for V2.

        Raises:
            EngineError: there is no room for one ability.
        """
        compilation = config.compilation_config
        tokens = compilation.max_cudagraph_capture_size
        if compilation.cudagraph_mode == CUDAGraphMode.NONE or not tokens:
            return None
        if abilities_per_request < 1:
            raise EngineError(f"abilities_per_request is {abilities_per_request}; it must be at least 1")
        return cls(tokens, config.scheduler_config.max_num_seqs, abilities_per_request)


def check_count(abilities: int, most: int | None) -> None:
    """Refuses a composition of more abilities than one request may name.

    Args:
        most: ``abilities_per_request`` of the engine's limits; None is no limit.

    Raises:
        RequestError: it has too many.
    """
    if most is not None and abilities > most:
        raise RequestError(
            f"the request names {abilities} abilities, and this engine, which runs in CUDA graphs, takes at most "
            f"{most}; use fewer, or start it with a larger abilities_per_request or with enforce_eager",
            param="abilities",
        )
