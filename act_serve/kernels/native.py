"""The operation on CPUs: ``add_rows.cpp``, compiled for this very machine when it is first needed.

Decoding multiplies few tokens with few rows, where a call of torch's matrix product costs more than the arithmetic:
the C++ loop makes all of a layer's products at once, on the threads that torch and vLLM use. From ``MANY`` tokens of
one ability on, torch multiplies and the loop only scales and scatters, unless the CPU has a matrix unit (``tiles.h``).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch

from act_serve.kernels.rows import ActiveRows, NativeCall, TokenWeights

DTYPES = {torch.float32: "float", torch.bfloat16: "bf16"}
COMPILER_VARIABLE = "CXX"
_FLAGS = ["-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-Wno-psabi"]
_SOURCES = ("add_rows.cpp", "tiles.h")  # the second is included
_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64


class NativeRows:
    """The compiled operation for one dtype; calling it does what ``add_rows_reference`` does.

    Args:
        library: from :func:`compile_native`.
        dtype: of activations and deltas, one of ``DTYPES``.
    """

    def __init__(self, library: Path, dtype: torch.dtype) -> None:
        functions = ctypes.CDLL(str(library))
        self.dtype = dtype
        self._add_rows = functions[f"add_rows_{DTYPES[dtype]}"]
        self._scatter = functions[f"scatter_{DTYPES[dtype]}"]
        self._add_rows.argtypes = [_POINTER, *(_POINTER, _SIZE), *(_POINTER, _SIZE)]
        self._scatter.argtypes = [*(_POINTER, _SIZE), *(_POINTER, _POINTER, _SIZE), _POINTER, *(_POINTER, _SIZE)]
        self._add_rows.restype = self._scatter.restype = None
        self._multiplies_many = dtype == torch.bfloat16 and bool(functions.has_tiles())
        self._scratch = torch.empty(0, dtype=dtype)

    def __call__(self, x_TI: torch.Tensor, y_TO: torch.Tensor, active: ActiveRows, weights: TokenWeights) -> None:
        """Products that torch makes are rounded once to the dtype before they are weighted; all else is fp32."""
        (x_stride, x_step), (y_stride, y_step) = x_TI.stride(), y_TO.stride()
        assert x_step == y_step == 1, "the features of a token must lie side by side"
        call = active.call
        if call is None or call.weights is not weights:
            call = active.call = self._prepared(x_TI, y_TO, active, weights)
        if call.address:
            self._add_rows(call.address, x_TI.data_ptr(), x_stride, y_TO.data_ptr(), y_stride)
        if not self._multiplies_many:
            self._add_many(x_TI, y_TO, active, weights)

    def _prepared(
        self, x_TI: torch.Tensor, y_TO: torch.Tensor, active: ActiveRows, weights: TokenWeights
    ) -> NativeCall:
        if not x_TI.dtype == y_TO.dtype == self.dtype:
            raise TypeError(f"compiled for {self.dtype}, and the layer computes {x_TI.dtype} to {y_TO.dtype}")
        uses = weights.every if self._multiplies_many else weights.few
        if uses is None:
            return NativeCall(weights, None, 0)
        sizes = (x_TI.shape[1], y_TO.shape[1], len(weights.weight_TA))
        table = np.array([active.address, len(active.abilities), *uses.addresses, *sizes], dtype=np.int64)
        return NativeCall(weights, table, int(table.ctypes.data))

    def _add_many(self, x_TI: torch.Tensor, y_TO: torch.Tensor, active: ActiveRows, weights: TokenWeights) -> None:
        for number, use in weights.many:
            ability = active.abilities[number]
            if not len(ability.rows_N):
                continue
            x_PI = x_TI[use.run] if use.run else x_TI.index_select(0, torch.from_numpy(use.tokens_P))
            value_PN = ability.products(x_PI, out=self._memory(len(x_PI), len(ability.rows_N)))
            self._scatter(
                ability.rows_N.data_ptr(), len(ability.rows_N),
                use.tokens_P.ctypes.data, use.weight_P.ctypes.data, len(use.tokens_P),
                value_PN.data_ptr(), y_TO.data_ptr(), y_TO.stride(0),
            )  # fmt: skip

    def _memory(self, tokens: int, rows: int) -> torch.Tensor:
        """``[P, N]``, whose content the next call may overwrite."""
        if self._scratch.numel() < tokens * rows:
            self._scratch = torch.empty(tokens * rows, dtype=self.dtype)
        return self._scratch[: tokens * rows].view(tokens, rows)


def compile_native(folder: Path) -> Path:
    """Compiles the operation into ``folder`` unless it is there; a second or two, once per machine and version.

    The compiler is ``$CXX``, or c++.

    Raises:
        OSError: there is no compiler, or the folder cannot be written.
        subprocess.CalledProcessError: it could not compile; ``stderr`` says why.
    """
    sources = Path(str(files("act_serve.kernels")))
    source = b"".join((sources / name).read_bytes() for name in _SOURCES)
    compiler = os.environ.get(COMPILER_VARIABLE, "c++")
    if shutil.which(compiler) is None:
        raise FileNotFoundError(f"the C++ compiler {compiler} is not installed")
    # The flags of one CPU may not run on another that shares the folder.
    machine = [line for line in _read("/proc/cpuinfo").splitlines() if line.startswith(("flags", "Features"))][:1]
    key = hashlib.sha256(repr((source, _FLAGS, compiler, machine)).encode()).hexdigest()[:16]
    library = folder / f"add_rows-{key}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as staging:
            made = Path(staging) / library.name
            command = [compiler, *_FLAGS, str(sources / _SOURCES[0]), "-o", str(made)]
            subprocess.run(command, capture_output=True, check=True)
            made.rename(library)
    return library


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
