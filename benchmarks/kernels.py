"""The kernels' forms on one layer shape after the other, in turn: microseconds per call beside the layer's own product.

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

from act_serve.home import cache_home
from act_serve.kernels.native import NativeRows, compile_native
from act_serve.kernels.rows import AbilityRows, ActiveRows, TokenWeights
from act_serve.kernels.torch_impl import add_rows_torch
from act_serve.models.loading import computing_dtype

LAYERS = {"qkv": (576, 960), "o": (576, 576), "gate_up": (576, 3072), "down": (1536, 576)}  # I, O
CALLS, ROUNDS = 20, 40


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


def random_rows(abilities: int, in_features: int, out_features: int, dtype: torch.dtype) -> ActiveRows:
    """Abilities of 5 % of a layer's rows."""
    count = out_features // 20
    rows = [torch.randperm(out_features)[:count].sort().values.int() for _ in range(abilities)]
    return ActiveRows([AbilityRows(each, torch.randn(count, in_features).to(dtype)) for each in rows])


def main() -> None:
    """Measures, prints a table, and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: what this machine computes in")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype) if options.dtype else computing_dtype()
    native = NativeRows(compile_native(cache_home() / "kernels"), dtype)
    cases = {}
    for layer, (in_features, out_features) in LAYERS.items():
        for tokens in (1, 16, 512):
            for abilities in (1, 4):
                name = f"{layer}_{tokens}_tokens_{abilities}_abilities"
                active = random_rows(abilities, in_features, out_features, dtype)
                x_TI = torch.randn(tokens, in_features).to(dtype)
                y_TO = torch.randn(tokens, out_features).to(dtype)
                weight_TO = torch.randn(out_features, in_features).to(dtype)
                owner_T = torch.arange(tokens) * abilities // tokens
                weights = TokenWeights(torch.nn.functional.one_hot(owner_T, abilities).float().numpy())
                base = best_us(lambda: torch.mm(x_TI, weight_TO.t()))  # noqa: B023
                by_torch = best_us(lambda: add_rows_torch(x_TI, y_TO, active, weights))  # noqa: B023
                by_native = best_us(lambda: native(x_TI, y_TO, active, weights))  # noqa: B023
                cases[name] = {
                    "base_us": round(base, 1),
                    "torch_us": round(by_torch, 1),
                    "native_us": round(by_native, 1),
                }
                print(
                    f"{name:32} layer {base:7.1f} us   torch {by_torch:7.1f} us   native {by_native:7.1f} us   "
                    f"{by_torch / by_native:5.1f} times"
                )
    if options.json:
        options.json.write_text(json.dumps({"cases": cases}, indent=2) + "\n")


if __name__ == "__main__":
    main()
