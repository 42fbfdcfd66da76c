"""The benchmark of switching goes through vLLM's real model and the engine's manager as they are now."""

from pathlib import Path

import pytest

from benchmarks.switching import measure
from tests.tiny_models import make_llama


@pytest.mark.slow
def test_every_way_to_switch_is_measured(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    found = measure(make_llama(tmp_path / "base"), tmp_path / "work", repeats=2, dtype="float32")
    assert found.keys() == {"load", "switch", "read_patch", "apply_patch"}
    assert all(milliseconds > 0 for milliseconds in found.values())
