"""vLLM's V2 model runner, the default on GPUs, with abilities; `test_graphs.py` runs this file with its plugin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from act_serve.abilities.store import Store
from act_serve.engine import manager, outside_graphs, worker
from act_serve.engine.graph_limits import GraphLimits
from act_serve.kernels import triton_impl
from tests.abilities_for_tests import merged_model, publish_random
from tests.engine.conftest import running_engine
from tests.engine.mixed_batch import check_answers, serve_mixed
from tests.engine.test_families import make


@pytest.mark.parametrize("tables", [None, GraphLimits(24, 16, 2)], ids=["by step", "of graphs"])
def test_mixed_batch_equals_the_merged_checkpoints(
    tables: GraphLimits | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``of graphs``: with the kernels and tables of CUDA graphs, though no graph can be captured here."""
    launches, left = list[int](), list[Any]()
    if tables is not None:
        monkeypatch.setattr(worker.GraphLimits, "of", lambda *_: tables)
        monkeypatch.setattr(manager, "choose_add_rows", lambda *_: triton_impl.TritonRows())
        original = triton_impl.TritonRows.from_tables

        def counted(x_TI: Any, *others: Any) -> None:
            launches.append(len(x_TI))
            original(x_TI, *others)

        monkeypatch.setattr(triton_impl.TritonRows, "from_tables", staticmethod(counted))
        leave = outside_graphs.without_graphs
        monkeypatch.setattr(outside_graphs, "without_graphs", lambda of: left.append(of) or leave(of))
    base = make(tmp_path / "base", "qwen2", 2)
    store = Store(tmp_path / "store")
    for seed in (1, 2):
        publish_random(store, base, f"r{seed}", seed=seed, share=0.1, scale=0.1)
    publish_random(store, base, "out", seed=3, share=0.1, scale=0.1, outside=True)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    options = {"distributed_executor_backend": "uni", "dtype": "float32", "max_model_len": 64, "max_num_seqs": 16}
    with running_engine(base, store, **options) as llm:
        runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        assert isinstance(runner, GPUModelRunner)
        answers = serve_mixed(llm, store, max_tokens=4)
        assert not left
        answers += serve_mixed(llm, store, ["out", "r1*0.5+out"], max_tokens=4)
        assert set(left) == ({runner} if tables is not None else set())
    assert bool(launches) == (tables is not None)
    check_answers(answers, lambda text: merged_model(base, store, text))
