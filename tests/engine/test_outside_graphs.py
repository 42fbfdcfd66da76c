"""Which steps leave vLLM's CUDA graphs, over a scheduler's sequence; in real graphs: `graph_cases.py`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.lora.request import LoRARequest

from act_serve.engine.outside_graphs import StepsOutsideGraphs
from act_serve.errors import EngineError

INSIDE, OUTSIDE = LoRARequest("base:in", 1, "store"), LoRARequest("base:out", 2, "store")


def step(scheduled: str, new: dict[str, LoRARequest | None] | None = None, finished: str = "") -> Any:
    """A step of requests that are named by a letter each."""
    return SimpleNamespace(
        finished_req_ids=set(finished),
        scheduled_new_reqs=[SimpleNamespace(req_id=name, lora_request=of) for name, of in (new or {}).items()],
        num_scheduled_tokens=dict.fromkeys(scheduled, 1),
    )


@pytest.fixture(params=["v1", "v2"])
def runner(request: pytest.FixtureRequest) -> Any:
    if request.param == "v1":
        return SimpleNamespace(cudagraph_dispatcher=SimpleNamespace(keys_initialized=True))
    return SimpleNamespace(cudagraph_manager=SimpleNamespace(_graphs_captured=True))


def has_graphs(runner: Any) -> bool:
    (chooses,) = vars(runner).values()
    (flag,) = vars(chooses).values()
    return bool(flag)


def test_steps_leave_while_a_scheduled_request_has_such_an_adapter(runner: Any) -> None:
    steps = StepsOutsideGraphs(runner, lambda adapters: OUTSIDE in adapters)

    def in_graph(of: Any) -> bool:
        with steps.during(of):
            found = has_graphs(runner)
        assert has_graphs(runner), "a step changes no other"
        return found

    assert in_graph(step("ab", {"a": None, "b": INSIDE}))
    assert not in_graph(step("abc", {"c": OUTSIDE}))
    assert not in_graph(step("abc")), "the scheduler names a request's adapter once"
    assert in_graph(step("ab")), "c waits"
    assert not in_graph(step("ca"))
    assert in_graph(step("ac", {"c": None}, finished="c")), "another request of the same name"
    assert not in_graph(step("a", {"a": OUTSIDE}, finished="abc"))
    assert in_graph(step("", finished="a"))
    assert not steps._adapters, "nothing is kept of what has finished"


def test_a_step_that_fails_leaves_the_graphs_to_the_next(runner: Any) -> None:
    steps = StepsOutsideGraphs(runner, lambda _: True)
    with pytest.raises(EngineError), steps.during(step("a", {"a": OUTSIDE})):
        raise EngineError("the step failed")
    assert has_graphs(runner)
