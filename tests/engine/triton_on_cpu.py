"""A pytest plugin that has vLLM's V2 model runner run on a CPU, its Triton kernels under the interpreter.

vLLM asks which backends Triton has when it is imported (vllm/triton_utils/importing.py), so this must come first:
``pytest -p tests.engine.triton_on_cpu``, with ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

from types import SimpleNamespace

from triton.backends import backends

backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)  # type: ignore[assignment]
