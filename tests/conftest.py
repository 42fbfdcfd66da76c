"""Tiny real models that every part of the suite shares."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tiny_models import make_llama, make_qwen

# With more threads than free cores, torch waits for its slowest thread in every operation.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint folder of a two-layer random Llama."""
    return make_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def tiny_qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint folder of a random Qwen2, whose q, k and v projections have biases."""
    return make_qwen(tmp_path_factory.mktemp("tiny-qwen"))
