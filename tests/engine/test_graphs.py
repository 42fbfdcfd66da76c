"""Runs the tests of CUDA graphs and of vLLM's V2 runner, which need Triton's interpreter, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
FOLDER = Path(__file__).parent


def run(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=FOLDER.parents[1],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    assert "passed" in done.stdout


@pytest.mark.slow
def test_graphs_replay_the_steps_of_both_model_runners() -> None:
    run(str(FOLDER / "graph_cases.py"))


@pytest.mark.slow
def test_the_v2_model_runner_serves_abilities() -> None:
    run("-p", "tests.engine.triton_on_cpu", str(FOLDER / "v2_cases.py"))
