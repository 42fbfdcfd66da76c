"""The kernels' forms on one layer shape after the other, in turn: microseconds per call beside the layer's own product.

    python -m benchmarks.kernels [--json FILE] [--threads 1]

Shapes are those of SmolLM2-135M's four linear layers, with 5 % of the rows per ability. Then all 120 layers of a step
that decodes 16 requests, in milliseconds, with as much other memory read before every layer as an engine's weights are:
the case `one` of the engine's benchmark has one ability, `four_mixed` four, `compose_3_of_8` eight, three per request.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from act_serve.delta.composition import Composition
from act_serve.home import cache_home
from act_serve.kernels.native import NativeRows, compile_native
from act_serve.kernels.rows import AbilityRows, ActiveRows, TokenWeights
from act_serve.kernels.torch_impl import add_rows_torch
from act_serve.models.loading import computing_dtype
from benchmarks.engines import REQUESTS, composition

LAYERS = {"qkv": (576, 960), "o": (576, 576), "gate_up": (576, 3072), "down": (1536, 576)}  # I, O
CALLS, ROUNDS = 20, 40
BLOCKS, STEPS = 30, 12
Kernel = Callable[[torch.Tensor, torch.Tensor, ActiveRows, TokenWeights], None]


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


def step_weights(case: str) -> TokenWeights:
    """The weights of a step's tokens, one per request, in one of the engine's cases."""
    requests = [Composition.parse(composition(case, request)).abilities for request in range(REQUESTS)]
    names = sorted({ability.name for abilities in requests for ability in abilities})
    weight_TA = np.zeros((REQUESTS, len(names)), dtype=np.float32)
    for token, abilities in enumerate(requests):
        for ability in abilities:
            weight_TA[token, names.index(ability.name)] = ability.weight
    return TokenWeights(weight_TA)


def step_ms(kernels: dict[str, Kernel], weights: TokenWeights, dtype: torch.dtype) -> dict[str, float]:
    """Milliseconds of all layers of one step by kernel, in turn; only the kernels' calls count."""
    layers = list(LAYERS.values()) * BLOCKS
    rows = [random_rows(weights.weight_TA.shape[1], *layer, dtype) for layer in layers]
    others = [torch.ones(layer[0] * layer[1], dtype=dtype) for layer in layers]
    x_TI = {layer: torch.randn(REQUESTS, layer[0]).to(dtype) for layer in layers}
    y_TO = {layer: torch.zeros(REQUESTS, layer[1], dtype=dtype) for layer in layers}
    steps: dict[str, list[float]] = {name: [] for name in kernels}
    for _ in range(STEPS):
        for name, kernel in kernels.items():
            taken = 0.0
            for layer, active, other in zip(layers, rows, others, strict=True):
                other.sum()
                y_TO[layer].zero_()
                start = time.perf_counter()
                kernel(x_TI[layer], y_TO[layer], active, weights)
                taken += time.perf_counter() - start
            steps[name].append(taken)
    return {name: statistics.median(taken) * 1e3 for name, taken in steps.items()}


def main() -> None:
    """Measures, prints a table, and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: what this machine computes in")
    parser.add_argument("--threads", type=int, help="default: torch's; vLLM's worker has one on two cores")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
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
    steps = {}
    for case in ("one", "four_mixed", "compose_3_of_8"):
        found = steps[case] = step_ms({"torch": add_rows_torch, "native": native}, step_weights(case), dtype)
        print(f"all layers of a step, {case:16} torch {found['torch']:6.1f} ms   native {found['native']:6.1f} ms")
    if options.json:
        options.json.write_text(json.dumps({"cases": cases, "steps_ms": steps}, indent=2) + "\n")


if __name__ == "__main__":
    main()
