"""Throughput of the engine with abilities, as ratios to the base model, all sides measured in turn in one run.

    python -m benchmarks.engine_throughput [--rounds 5] [--json FILE]

Three engines are up at the same time, each in its own processes: the base model, the base model with abilities, and
stock vLLM with the same deltas written as exact LoRA adapters. Every round measures every case once, so that noise of
the machine meets all cases alike; a case's ratio is the median over rounds of (its tok/s / the base's in that round).

``limit`` is what memory traffic allows: bytes read per decoding step by the base, over those with the case's active
delta rows added (each read once per step, whatever the number of tokens).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

REQUESTS, TOKENS, ABILITIES, SHARE = 16, 48, 8, 0.05
CASES = ["base", "idle", "one", "four_mixed", "compose_3_of_8", "base_prefill", "prefill_four", "stock_lora"]
FLOORS = {"idle": 0.97, "four_mixed": 0.68, "four_mixed against stock_lora": 12.0}
SLACK = 0.85
MORE_ROUNDS = 5
SERVED_BY = {"base": "base", "base_prefill": "base", "stock_lora": "stock_lora"}  # the rest: the engine with abilities


def composition(case: str, request: int) -> str:
    """What one of the 16 requests of a case uses."""
    if case == "one":
        return "a0"
    if case in ("four_mixed", "prefill_four", "stock_lora"):
        return f"a{request % 4}"
    if case == "compose_3_of_8":
        return "+".join(f"a{(request + step) % ABILITIES}*{0.25 * (1 + step):g}" for step in (0, 3, 5))
    return ""


def serve(kind: str, base: Path, work: Path, dtype: str, pipe: Connection) -> None:
    """One engine's process: answers each case's name with its tokens per second."""
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    from act_serve.abilities.store import Store
    from act_serve.engine.app import served_dtype
    from act_serve.engine.resolver import adapter_request
    from tests.abilities_for_tests import pinned

    options: dict[str, Any] = {}
    if kind == "abilities":
        options = {
            "enable_lora": True, "max_loras": REQUESTS, "max_lora_rank": 8,
            "worker_cls": "act_serve.engine.worker.AbilityWorker",
            "additional_config": {"act_serve": {"store": str(work)}},
        }  # fmt: skip
    if kind == "stock_lora":
        options = {"enable_lora": True, "max_loras": 4, "max_cpu_loras": 8, "max_lora_rank": 128}
    llm = LLM(
        str(base),
        max_model_len=1024,
        max_num_seqs=REQUESTS,
        dtype=served_dtype(dtype),
        enforce_eager=True,
        enable_prefix_caching=False,
        **options,
    )
    ids: dict[str, int] = {}

    def adapter(case: str, request: int) -> LoRARequest | None:
        text = composition(case, request)
        if not text:
            return None
        number = ids.setdefault(text, len(ids) + 1)
        if kind == "stock_lora":
            return LoRARequest(text, number, str(work / "lora" / text))
        store = Store(work)
        return adapter_request("base", pinned(store, text), number, store)

    short = [f"Tell me {i} things about the city of Paris." for i in range(REQUESTS)]
    long = [{"prompt_token_ids": [(i * 37 + t * 11) % 40_000 + 100 for t in range(512)]} for i in range(REQUESTS)]
    pipe.send("ready")
    while (case := pipe.recv()) is not None:
        prefill = "prefill" in case
        params = SamplingParams(max_tokens=1 if prefill else TOKENS, temperature=0, ignore_eos=True)
        adapters = [adapter(case, i) for i in range(REQUESTS)]
        start = time.perf_counter()
        llm.generate(long if prefill else short, params, lora_request=adapters, use_tqdm=False)
        pipe.send(REQUESTS * (512 if prefill else TOKENS) / (time.perf_counter() - start))
    llm.llm_engine.engine_core.shutdown()


def prepare(base: Path, work: Path) -> dict[str, int]:
    """Writes the abilities of random rows and the same deltas as LoRA; returns their sizes in bytes."""
    from act_serve.abilities.store import Store
    from act_serve.delta.artifact import read_artifact
    from act_serve.pipeline.export_peft import export_peft
    from act_serve.pipeline.publish import channel_counts
    from tests.abilities_for_tests import publish_random

    store = Store(work)
    sizes = {}
    for number in range(ABILITIES):
        folder = publish_random(store, base, f"a{number}", seed=number, share=SHARE)
        sizes[f"a{number}"] = (folder / "channel_delta.safetensors").stat().st_size
        if number < 4:
            deltas = read_artifact(folder)[1]
            lora = work / "lora" / f"a{number}"
            export_peft(base=str(base), deltas=deltas, channels=channel_counts(base), folder=lora)
    return sizes


def limits(base: Path, sizes: dict[str, int]) -> dict[str, float]:
    """Per decoding case, the ratio to base that memory traffic allows."""
    base_bytes = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    found = {}
    for case in ("idle", "one", "four_mixed", "compose_3_of_8"):
        used = {part.split("*")[0] for i in range(REQUESTS) for part in composition(case, i).split("+") if part}
        found[case] = base_bytes / (base_bytes + sum(sizes[name] for name in used))
    return found


class Engines:
    """The three engines, each in a process of its own; a context that stops them at its end."""

    def __init__(self, base: Path, work: Path, dtype: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: dict[str, Connection] = {}
        self._processes = []
        for kind in ("base", "abilities", "stock_lora"):
            self._pipes[kind], theirs = context.Pipe()
            self._processes.append(context.Process(target=serve, args=(kind, base, work, dtype, theirs)))
            self._processes[-1].start()
            theirs.close()
            print(f"starting the {kind} engine ...", file=sys.stderr, flush=True)
            self._pipes[kind].recv()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe, process in zip(self._pipes.values(), self._processes, strict=True):
            if process.is_alive():
                pipe.send(None)
            process.join()

    def tokens_per_second(self, case: str) -> float:
        """Measures a case once."""
        pipe = self._pipes[SERVED_BY.get(case, "abilities")]
        pipe.send(case)
        return float(pipe.recv())


def measure(engines: Engines, results: dict[str, list[float]], rounds: int) -> None:
    """Adds the tokens per second of every case in so many rounds."""
    for _ in range(rounds):
        number = len(results["base"]) + 1
        for case in CASES:
            if case == "stock_lora" and number > 2:
                continue  # very slow, and far enough from every other case
            results[case].append(engines.tokens_per_second(case))
            print(f"round {number} {case}: {results[case][-1]:.1f} tok/s", file=sys.stderr, flush=True)


def summarize(results: dict[str, list[float]], limit: dict[str, float]) -> dict[str, dict[str, float]]:
    """Per case the medians of its tokens per second and of its ratios to the base, and its limit if it has one."""
    cases: dict[str, dict[str, float]] = {}
    for case, speeds in results.items():
        against = results["base_prefill" if "prefill" in case else "base"]
        ratios = [speed / other for speed, other in zip(speeds, against, strict=False)]
        cases[case] = {"tok_s": round(statistics.median(speeds), 1), "ratio": round(statistics.median(ratios), 4)}
        if case in limit:
            cases[case]["limit"] = round(limit[case], 4)
    return cases


def below_floor(cases: dict[str, dict[str, float]]) -> list[str]:
    """The ratios that are far below their floor; the slack is for the noise of a busy machine."""
    found = {name: cases[name]["ratio"] for name in ("idle", "four_mixed")}
    found["four_mixed against stock_lora"] = cases["four_mixed"]["ratio"] / cases["stock_lora"]["ratio"]
    return [
        f"{name} {found[name]:.3f} (floor {floor})" for name, floor in FLOORS.items() if found[name] < SLACK * floor
    ]


def main() -> None:
    """Measures, prints a table, and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true", help="exit 1 where a ratio is far below its floor")
    parser.add_argument("--dtype", default="auto", help="of all sides; auto as the server's")
    parser.add_argument("--base", type=Path, help="checkpoint folder; default: the embedded model")
    options = parser.parse_args()

    from act_serve.models.loading import embedded_base

    base = options.base or embedded_base()
    work = Path(tempfile.mkdtemp(prefix="act-serve-bench-"))
    results: dict[str, list[float]] = {case: [] for case in CASES}
    try:
        limit = limits(base, prepare(base, work))
        with Engines(base, work, options.dtype) as engines:
            measure(engines, {case: [] for case in CASES}, 1)  # warms up
            measure(engines, results, options.rounds)
            if options.check and (low := below_floor(summarize(results, limit))):
                print(f"below the floor: {', '.join(low)}; measuring {MORE_ROUNDS} rounds more", file=sys.stderr)
                measure(engines, results, MORE_ROUNDS)
    finally:
        shutil.rmtree(work)
    cases = summarize(results, limit)
    for case, row in cases.items():
        print(f"{case:16} {row['tok_s']:8.1f} tok/s   ratio {row['ratio']:.3f}   " + (
            f"limit {row['limit']:.3f}" if "limit" in row else ""))  # fmt: skip
    print(f"four_mixed against stock LoRA: {cases['four_mixed']['ratio'] / cases['stock_lora']['ratio']:.1f} times")
    if options.json:
        options.json.write_text(json.dumps({"cases": cases}, indent=2) + "\n")
    if options.check and (low := below_floor(cases)):
        sys.exit("below the floor: " + ", ".join(low))


if __name__ == "__main__":
    main()
