"""Runs the Triton form's tests, and compiles its kernels for GPUs, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
FOLDER = Path(__file__).parent


def run(arguments: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=FOLDER.parents[1],
        env={key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_agrees_with_the_reference() -> None:
    environment = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    assert "passed" in run(["-m", "pytest", str(FOLDER / "triton_cases.py")], environment)


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "dtype"), [("80", "fp32"), ("90", "bf16"), ("90", "fp32")])
def test_compiles_for_gpus_and_reads_16_bytes_at_a_time(capability: str, dtype: str, tmp_path: Path) -> None:
    """Needs no GPU: Triton's own assembler is enough."""
    environment = {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(FOLDER.parents[1])}
    ptx = run([str(FOLDER / "triton_compile.py"), capability, dtype], environment)
    assert f".target sm_{capability}" in ptx
    waits = 1 if capability == "90" else 0
    for both in ptx.split("// products ")[1:]:
        products, scatter = both.split("// scatter")
        assert products.count("cp.async.cg.shared.global") == int(products.split(maxsplit=1)[0])
        assert products.count("griddepcontrol.launch_dependents") == waits
        assert products.count("griddepcontrol.wait") == scatter.count("griddepcontrol.wait") == 2 * waits
