"""A real vLLM engine with real and random abilities."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from act_serve.abilities.store import Store
from act_serve.engine.settings import EngineSettings
from act_serve.models.loading import embedded_base
from tests.abilities_for_tests import publish_random

SHIPPED = Path(os.environ.get("ACT_SERVE_TEST_STORE", Path(__file__).parents[2] / "abilities"))


@pytest.fixture(scope="session")
def base() -> Path:
    """The embedded base model."""
    return embedded_base()


@pytest.fixture(scope="session")
def store(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The shipped abilities and two of random rows, ``r1`` and, stored as int8, ``r2``."""
    root = tmp_path_factory.mktemp("store")
    shutil.copytree(SHIPPED, root, dirs_exist_ok=True)
    store = Store(root)
    publish_random(store, base, "r1", seed=1)
    publish_random(store, base, "r2", seed=2, stored="int8")
    return store


@contextmanager
def running_engine(model: Path, store: Store | None = None, **options: Any) -> Iterator[Any]:
    """vLLM's ``LLM``, with abilities if a store is given; its worker has ended when the block ends.

    Only the worker has a process of its own, which is where abilities are; the engine core runs here, which saves its
    start. Tests over HTTP have the core in a process, too.
    """
    from vllm import LLM

    if store is not None:
        options |= {
            "enable_lora": True,
            "max_loras": 64,
            "max_lora_rank": 8,
            "worker_cls": "act_serve.engine.worker.AbilityWorker",
            "additional_config": {"act_serve": {"store": str(store.root)}},
        }
    shape = {"max_model_len": 1024, "max_num_seqs": 64, "enforce_eager": True, "distributed_executor_backend": "mp"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        llm = LLM(str(model), **{**shape, **options})
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()


def settings_with_room(base: Path, store: Store, room: int, **options: Any) -> EngineSettings:
    """An engine in float32 that keeps so many abilities of the size of the store's ``r0`` resident."""
    counts = store.manifest("r0").counts
    return EngineSettings(
        model=str(base),
        served_model_name="smol",
        store=store.root,
        dtype="float32",
        max_resident_bytes=room * (counts.parameters * 4 + counts.channels * 8),
        **options,
    )


@pytest.fixture
def engine() -> Callable[..., Any]:
    """The function that starts an engine."""
    return running_engine
