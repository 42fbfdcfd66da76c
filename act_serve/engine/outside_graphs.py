"""Steps that run outside vLLM's CUDA graphs, because an ability of theirs changes what no graph holds.

Graphs hold what almost every ability changes, linear layers. Kernels for norms and the embedding would be launched in
every step with abilities, of which hardly one has any, and in compiled graphs they would stand between operations that
the compiler has fused. vLLM chooses the graph of a step before it tells the ability manager of the step's adapters
(``_determine_batch_execution_and_padding`` in vllm/v1/worker/gpu_model_runner.py, ``dispatch_cg_and_sync_dp`` in
vllm/v1/worker/gpu/dp_utils.py), so these steps are recognised by the requests that the scheduler names. Under data
parallelism vLLM lets all ranks run a step without graphs when one of them does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vllm.lora.request import LoRARequest

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput


class StepsOutsideGraphs:
    """Has vLLM's model runner find no graph for some steps.

    Args:
        runner: vLLM's, V1 or V2.
        leave_graphs: whether a step with these adapters is one of them.
    """

    def __init__(self, runner: Any, leave_graphs: Callable[[set[LoRARequest]], bool]) -> None:
        self._runner, self._leave_graphs = runner, leave_graphs
        self._adapters: dict[str, LoRARequest] = {}  # of the requests that have one

    @contextmanager
    def during(self, step: SchedulerOutput) -> Iterator[None]:
        """Runs a step; all of vLLM's steps must come here, as each says only what is new.

        Raises:
            ActServeError: an ability of the step cannot be made resident.
        """
        for name in step.finished_req_ids:
            self._adapters.pop(name, None)
        for new in step.scheduled_new_reqs:
            self._adapters.pop(new.req_id, None)
            if new.lora_request is not None:
                self._adapters[new.req_id] = new.lora_request
        adapters = {self._adapters[name] for name in step.num_scheduled_tokens if name in self._adapters}
        if adapters and self._leave_graphs(adapters):
            with without_graphs(self._runner):
                yield
        else:
            yield


@contextmanager
def without_graphs(runner: Any) -> Iterator[None]:
    """The runner chooses no graph meanwhile, as before it has captured any."""
    if hasattr(runner, "cudagraph_dispatcher"):
        chooses, has_graphs = runner.cudagraph_dispatcher, "keys_initialized"  # V1
    else:
        chooses, has_graphs = runner.cudagraph_manager, "_graphs_captured"
    had = getattr(chooses, has_graphs)
    setattr(chooses, has_graphs, False)
    try:
        yield
    finally:
        setattr(chooses, has_graphs, had)
