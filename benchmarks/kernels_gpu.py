"""The Triton kernels on an NVIDIA GPU: microseconds of one layer beside its floor and beside vLLM's LoRA kernels.

    python -m benchmarks.kernels_gpu [--quick] [--json FILE]

It needs torch, triton and numpy; LoRA's column needs vLLM, too.

Every figure is the median of some replays of a CUDA graph with calls on different layers' deltas, so that the second
level cache is about as cold as in a model. The tables are the engine's: for as many abilities per token as it allows by
default, and for abilities that change every row. Each token has one ability, of 5 % of the layer's rows.

* ``floor`` is the larger of two times: the bytes that must move (used rows, inputs, and the outputs' 32-byte sectors
  that change, read and written) over the bandwidth of reading, and the multiplications over the speed of a large matrix
  product. Both speeds are measured on the same GPU first. An empty launch takes about a microsecond beside that.
* ``lora`` are the same deltas as exact LoRA (rank = rows, A = the rows, B = one-hot columns) by vLLM's
  ``lora_shrink`` and ``lora_expand``, untuned, as vLLM runs them for most models. Where its 32-bit offsets do not reach
  the adapters there is no figure.
* ``error`` is of ours, against float32: the norm of the difference over that of the change. Outputs that no row changes
  must keep their bits, or the benchmark ends.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from act_serve.kernels import step_table
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
SHARE, REPLAYS, CACHE_BYTES, SECTOR = 0.05, 10, 100 << 20, 32
ABILITIES_PER_TOKEN = 8
DTYPE = torch.bfloat16
Case = dict[str, Any]


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
    """Bytes read and multiplications done per microsecond by this GPU, measured."""
    big = torch.randint(0, 100, (1 << 27,), dtype=torch.int32, device="cuda")
    square = torch.randn(8192, 8192, dtype=DTYPE, device="cuda")
    read = big.nbytes / graph_us(lambda _: torch.amax(big), 4)
    return read, 8192**3 / graph_us(lambda _: torch.mm(square, square), 4)


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
        delta_NI = torch.randn(count, in_features, dtype=DTYPE, device="cuda") / in_features**0.5
        found.append(AbilityRows(rows_N, delta_NI))
    return ActiveRows(found)


def lora_of(x_TI: torch.Tensor, y_TO: torch.Tensor, actives: list[ActiveRows], owner_T: np.ndarray) -> Any:
    """vLLM's two kernels on the deltas as adapters; the first layer's second factor stands for all; or None."""
    abilities, rows = len(actives[0].abilities), len(actives[0].abilities[0].rows_N)
    try:
        from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink
    except ImportError:
        return None
    if abilities * y_TO.shape[1] * rows >= 2**31:
        return None
    tokens, device = len(x_TI), x_TI.device
    meta = LoRAKernelMeta.make(abilities, tokens, device)
    meta.prepare_tensors(torch.from_numpy(owner_T.astype(np.int32)).to(device))
    down = [torch.stack([ability.delta_NI for ability in active.abilities])[:, None] for active in actives[:4]]
    up = torch.zeros(abilities, 1, y_TO.shape[1], rows, dtype=DTYPE, device=device)
    for number, ability in enumerate(actives[0].abilities):
        up[number, 0, ability.rows_N.long(), torch.arange(rows, device=device)] = 1
    between = torch.zeros(1, tokens, rows, dtype=torch.float32, device=device)
    arguments = meta.meta_args(tokens, True)

    def call(copy: int) -> None:
        lora_shrink(x_TI, [down[copy % len(down)]], between, *arguments, 1.0)
        lora_expand(between, [up], y_TO, *arguments, 0, True)

    return call


def forget_adapters() -> None:
    """vLLM keeps the address of every adapter that it has seen, and the adapter with it."""
    from vllm.lora.ops.triton_ops import utils

    utils._LORA_A_PTR_DICT.clear()
    utils._LORA_B_PTR_DICT.clear()


def check(
    call: Callable[[int], None], x_TI: torch.Tensor, y_TO: torch.Tensor, active: ActiveRows, owner_T: np.ndarray
) -> float:
    """The relative error of ``call(0)``, which changes ``y_TO``; raises AssertionError for a change elsewhere."""
    y_TO.normal_()
    before_TO, exact_TO = y_TO.clone(), y_TO.float()
    for number, ability in enumerate(active.abilities):
        tokens_P = torch.from_numpy(np.flatnonzero(owner_T == number)).to(y_TO.device)
        added_PN = x_TI[tokens_P].float() @ ability.delta_NI.float().t()
        exact_TO[tokens_P[:, None], ability.rows_N.long()[None]] += added_PN
    call(0)
    assert not ((y_TO != before_TO) & (exact_TO == before_TO.float())).any(), "an output changed that no row changes"
    return float((y_TO.float() - exact_TO).norm() / (exact_TO - before_TO.float()).norm())


def measure(layer: str, tokens: int, abilities: int, mix: str, read: float, multiplied: float) -> Case:
    """One line of the table."""
    from act_serve.kernels.triton_impl import add_rows

    in_features, out_features = LAYERS[layer]
    owner_T, device = owners(mix, tokens, abilities), torch.device("cuda")
    rows = int(out_features * SHARE)
    delta_bytes = len(np.unique(owner_T)) * rows * in_features * 2
    copies = max(2, min(16, CACHE_BYTES // delta_bytes + 1))
    actives = [random_rows(abilities, in_features, out_features) for _ in range(copies)]
    tables = [RowTable(device, abilities=abilities, max_rows=out_features) for _ in actives]
    for table, active in zip(tables, actives, strict=True):
        table.fill(active, out_features)
    x_TI = torch.randn(tokens, in_features, dtype=DTYPE, device=device)
    y_TO = torch.randn(tokens, out_features, dtype=DTYPE, device=device)
    weight_TA = np.zeros((tokens, abilities), dtype=np.float32)
    weight_TA[np.arange(tokens), owner_T] = 1
    step = step_table.StepTable(
        device, tokens=tokens, abilities=abilities, block=step_table.block_for(tokens),
        uses_per_token=ABILITIES_PER_TOKEN if tokens <= step_table.SHORT_TOKENS else 1,
    )  # fmt: skip
    step.fill(TokenWeights(weight_TA))
    sectors = [(ability.rows_N.long() * 2 // SECTOR).unique().numel() for ability in actives[0].abilities]
    changed = int(np.array(sectors)[owner_T].sum()) * SECTOR * 2
    floor = max((delta_bytes + x_TI.nbytes + changed) / read, tokens * rows * in_features / multiplied)

    def call(copy: int) -> None:
        add_rows(x_TI, y_TO, tables[copy], step)

    error = check(call, x_TI, y_TO, actives[0], owner_T)
    ours = graph_us(call, copies)
    lora = lora_of(x_TI, y_TO, actives, owner_T)
    theirs = None
    if lora is not None:
        assert check(lora, x_TI, y_TO, actives[0], owner_T) < 0.02, "the adapters do not what the rows do"
        theirs = round(graph_us(lora, copies), 1)
        forget_adapters()
    case: Case = {"layer": layer, "tokens": tokens, "abilities": abilities, "mix": mix}
    return case | {"us": round(ours, 1), "floor_us": round(floor, 1), "lora_us": theirs, "error": round(error, 5)}


def main() -> None:
    """Measures, prints a table, and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="the layers of the 8B model, without mixes")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("there is no CUDA device; this benchmark needs one", file=sys.stderr)
        sys.exit(2)
    read, multiplied = speeds()
    print(f"{torch.cuda.get_device_name()}: reads {read / 1e6:.2f} TB/s, {2 * multiplied / 1e6:.0f} TFLOP/s measured")
    names = "".join(f"{name:>9}" for name in ("us", "floor", "floor/us", "lora", "error"))
    print(f"{'layer':12}{'tokens':>7}{'abilities':>10} {'mix':9}{names}")
    cases = []
    layers = [layer for layer in LAYERS if layer.startswith("8b")] if options.quick else list(LAYERS)
    for layer in layers:
        for tokens, abilities, mix in ((t, a, m) for t in TOKENS for a in ABILITIES for m in MIXES):
            if mix != MIXES[0] and (abilities == 1 or tokens < abilities or options.quick):
                continue
            case = measure(layer, tokens, abilities, mix, read, multiplied)
            cases.append(case)
            print(
                f"{layer:12}{tokens:7}{abilities:10} {mix:9}{case['us']:9.1f}{case['floor_us']:9.1f}"
                f"{case['floor_us'] / case['us']:9.2f}{case['lora_us'] or '-':>9}{case['error']:9.4f}", flush=True,
            )  # fmt: skip
            torch.cuda.empty_cache()
            if options.json:
                found = {"device": torch.cuda.get_device_name(), "read_tb_s": read / 1e6, "cases": cases}
                options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
