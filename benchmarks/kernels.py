"""The kernels' forms on one layer shape after the other, in turn: microseconds per call and their ratio.

    python -m benchmarks.kernels [--json FILE]

Shapes are those of SmolLM2-135M's four linear layers, with 5 % of the rows per ability.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from act_serve.kernels.numba_impl import add_rows_numba
from act_serve.kernels.packed import PackedRows
from act_serve.kernels.torch_impl import add_rows_torch

LAYERS = {"qkv": (576, 960), "o": (576, 576), "gate_up": (576, 3072), "down": (1536, 576)}  # I, O
CALLS, ROUNDS = 20, 15


def best_us(call: Callable[[], None]) -> float:
    """Microseconds of one call in the best of some rounds: the round that met the least noise."""
    call()
    rounds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        rounds.append((time.perf_counter() - start) / CALLS)
    return min(rounds) * 1e6


def main() -> None:
    """Measures, prints a table, and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    cases = {}
    for layer, (in_features, out_features) in LAYERS.items():
        for tokens in (1, 16, 512):
            for abilities in (1, 4):
                count = out_features // 20
                rows = [torch.randperm(out_features)[:count].sort().values for _ in range(abilities)]
                delta_NI = torch.randn(count * abilities, in_features).bfloat16()
                packed = PackedRows(delta_NI, torch.cat(rows), (count,) * abilities)
                x_TI = torch.randn(tokens, in_features).bfloat16()
                y_TO = torch.randn(tokens, out_features).bfloat16()
                weight_TA = torch.nn.functional.one_hot(torch.arange(tokens) % abilities, abilities).float()
                by_torch = best_us(lambda: add_rows_torch(x_TI, y_TO, packed, weight_TA))  # noqa: B023
                by_numba = best_us(lambda: add_rows_numba(x_TI, y_TO, packed, weight_TA))  # noqa: B023
                name = f"{layer}_{tokens}_tokens_{abilities}_abilities"
                cases[name] = {"torch_us": round(by_torch, 1), "numba_us": round(by_numba, 1)}
                print(
                    f"{name:34} torch {by_torch:8.1f} us   numba {by_numba:8.1f} us   {by_torch / by_numba:5.1f} times"
                )
    if options.json:
        options.json.write_text(json.dumps({"cases": cases}, indent=2) + "\n")


if __name__ == "__main__":
    main()
