"""The Triton kernel on an NVIDIA GPU: microseconds of one layer beside its floor and beside LoRA's two products.

    python -m benchmarks.kernels_gpu [--quick] [--json FILE]

**Not yet run**: it was written on a machine without a GPU. It needs torch, triton and numpy, nothing else.

Every figure is the median of some replays of a CUDA graph that holds ``COPIES`` calls on different layers' deltas, so
that the second level cache is about as cold as in a model. ``floor`` is the larger of the bytes that must move (used
rows, inputs, changed outputs) over the bandwidth, and the multiplications over the tensor cores' speed; both speeds are
measured on the same GPU first. ``lora`` are the same deltas as exact LoRA (rank = rows, A = the rows, B = one-hot
columns) as torch computes them: per ability, two products of its tokens, the second into all outputs. Each token has
one ability.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from act_serve.kernels import row_table, step_table
from act_serve.kernels.row_table import RowTable
from act_serve.kernels.rows import AbilityRows, ActiveRows, TokenWeights

# I, O of the linear layers of Llama 3's 8B and 70B.
LAYERS = {
    "8b_qkv": (4096, 6144),
    "8b_o": (4096, 4096),
    "8b_gate_up": (4096, 28672),
    "8b_down": (14336, 4096),
    "70b_qkv": (8192, 10240),
    "70b_o": (8192, 8192),
    "70b_gate_up": (8192, 57344),
    "70b_down": (28672, 8192),
}
TOKENS, ABILITIES, MIXES = (1, 16, 64, 256, 1024, 8192), (1, 4, 16, 64), ("distinct", "uniform", "zipf")
SHARE, REPLAYS, CACHE_BYTES = 0.05, 20, 64 << 20
DTYPE = torch.bfloat16


def graph_us(call: Callable[[int], None], copies: int) -> float:
    """Microseconds of one ``call(copy)``."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, and warms the libraries up
        for _ in range(2):
            call(0)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for copy in range(copies):
            call(copy)
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / copies)
    return statistics.median(times)


def speeds() -> tuple[float, float]:
    """Bytes and multiplications per microsecond of this GPU, measured."""
    big = torch.zeros(1 << 28, dtype=torch.uint8, device="cuda")
    other = torch.empty_like(big)
    square = torch.randn(8192, 8192, dtype=DTYPE, device="cuda")
    moved = 2 * big.nbytes / graph_us(lambda _: other.copy_(big), 4)
    return moved, 8192**3 / graph_us(lambda _: torch.mm(square, square), 4)


def owners(mix: str, tokens: int, abilities: int) -> np.ndarray:
    """``[T]``: each token's ability."""
    if mix == "distinct":
        return np.arange(tokens) % abilities
    share = np.ones(abilities) if mix == "uniform" else 1 / np.arange(1, abilities + 1)
    return np.random.default_rng(0).choice(abilities, tokens, p=share / share.sum())


def random_rows(abilities: int, in_features: int, out_features: int) -> ActiveRows:
    """Abilities of ``SHARE`` of a layer's rows."""
    count, found = int(out_features * SHARE), []
    for _ in range(abilities):
        rows_N = torch.randperm(out_features, device="cuda")[:count].sort().values.int()
        delta_NI = torch.randn(count, in_features, dtype=DTYPE, device="cuda")
        found.append(AbilityRows(rows_N, delta_NI, place_O=row_table.places_of(rows_N, out_features)))
    return ActiveRows(found)


def lora(
    x_TI: torch.Tensor, y_TO: torch.Tensor, active: ActiveRows, use: list[torch.Tensor], up_NO: torch.Tensor
) -> None:
    """Shrink and expand, ability after ability; ``up_NO`` stands for any ability's second factor."""
    for ability, tokens_P in zip(active.abilities, use, strict=True):
        if len(tokens_P):
            y_TO.index_add_(0, tokens_P, torch.mm(torch.mm(x_TI[tokens_P], ability.delta_NI.t()), up_NO))


def measure(layer: str, tokens: int, abilities: int, mix: str, moved: float, multiplied: float) -> dict[str, object]:
    """One line of the table."""
    from act_serve.kernels.triton_impl import (
        ROUND_BLOCK,
        SCRATCH_TOKENS,
        SPLIT_BLOCK,
        add_rows_rounds,
        add_rows_split,
    )

    in_features, out_features = LAYERS[layer]
    owner_T = owners(mix, tokens, abilities)
    used, device = len(np.unique(owner_T)), torch.device("cuda")
    rows = int(out_features * SHARE)
    delta_bytes = used * rows * in_features * 2
    copies = max(2, min(8, CACHE_BYTES // delta_bytes + 1))
    actives = [random_rows(abilities, in_features, out_features) for _ in range(copies)]
    tables: list[RowTable] = [row_table.table_of(active, out_features, device) for active in actives]
    x_TI = torch.randn(tokens, in_features, dtype=DTYPE, device=device)
    y_TO = torch.zeros(tokens, out_features, dtype=DTYPE, device=device)
    weight_TA = np.zeros((tokens, abilities), dtype=np.float32)
    weight_TA[np.arange(tokens), owner_T] = 1
    few = tokens <= SCRATCH_TOKENS
    block, add_rows = (SPLIT_BLOCK, add_rows_split) if few else (ROUND_BLOCK, add_rows_rounds)
    step = step_table.table_of(TokenWeights(weight_TA), device, block=block, by_rounds=not few)
    use = [torch.from_numpy(np.flatnonzero(owner_T == a)).to(device) for a in range(abilities)]
    up_NO = torch.zeros(rows, out_features, dtype=DTYPE, device=device)
    floor = max((delta_bytes + x_TI.nbytes + tokens * rows * 4) / moved, tokens * rows * in_features / multiplied)
    ours = graph_us(lambda copy: add_rows(x_TI, y_TO, tables[copy], step), copies)
    theirs = graph_us(lambda copy: lora(x_TI, y_TO, actives[copy], use, up_NO), copies)
    case: dict[str, object] = {"layer": layer, "tokens": tokens, "abilities": abilities, "mix": mix}
    return case | {"us": round(ours, 1), "floor_us": round(floor, 1), "lora_us": round(theirs, 1)}


def main() -> None:
    """Measures, prints a table, and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="two layers only")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("there is no CUDA device; this benchmark needs one", file=sys.stderr)
        sys.exit(2)
    moved, multiplied = speeds()
    print(f"{torch.cuda.get_device_name()}: {moved / 1e6:.2f} TB/s, {2 * multiplied / 1e6:.0f} TFLOP/s measured")
    print(f"{'layer':12}{'tokens':>7}{'abilities':>10} {'mix':9}{'us':>9}{'floor':>9}{'/ floor':>8}{'lora':>9}")
    cases = []
    for layer in list(LAYERS)[1:3] if options.quick else LAYERS:
        for tokens, abilities, mix in ((t, a, m) for t in TOKENS for a in ABILITIES for m in MIXES):
            if abilities == 1 and mix != MIXES[0]:
                continue
            case = measure(layer, tokens, abilities, mix, moved, multiplied)
            cases.append(case)
            us, floor = float(str(case["us"])), float(str(case["floor_us"]))
            print(
                f"{layer:12}{tokens:7}{abilities:10} {mix:9}{us:9.1f}{floor:9.1f}{us / max(floor, 0.1):8.1f}"
                f"{case['lora_us']:>9}"
            )
            torch.cuda.empty_cache()
    if options.json:
        device = torch.cuda.get_device_name()
        options.json.write_text(json.dumps({"device": device, "cases": cases}, indent=2) + "\n")


if __name__ == "__main__":
    main()
