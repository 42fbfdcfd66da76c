"""Throughput of the engine with abilities, as ratios to the base model, all sides measured in turn in one run.

    python -m benchmarks.engine_throughput [--rounds 5] [--starts 1] [--json FILE] [--check] [--cases base idle one ...]

Every engine that a case needs is up at the same time, each in its own processes: the base model, the base model with
abilities, stock vLLM with the same deltas written as exact LoRA adapters, the checkpoint that an ability is merged
into, and both of the first two in vLLM's compiled mode (``compiled_...``). Every round measures every case once (stock
LoRA only the first one), so that noise of the machine meets all cases alike; a case's ratio is the median over rounds
of (its tok/s / that of the case that it is compared with in that round). An engine keeps what its processes got at
their start, such as the place of their memory, and two starts of the same engine differ by up to 5 %: what is to be
told apart by less takes several `--starts`, each with all rounds. ``compiled_norms`` is an ability that changes norms,
too, on all requests, which has steps run uncompiled.

``limit`` is what memory traffic allows in decoding: bytes read per step by the base, over those with the case's active
delta rows added (each read once per step, whatever the number of tokens). In prefill it is what arithmetic allows:
multiplications of a prompt's token by the base, over those with its ability's rows. ``merged`` is the bound of ``one``:
the same answers from a server that can give no others. ``switching`` is what another ability costs
(benchmarks/switching.py). ``base`` is always measured.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from benchmarks.engines import ABILITIES, PROMPT_TOKENS, REQUESTS, Engines, composition

SHARE = 0.05


class Case(NamedTuple):
    """The engine that a case runs on, and the case that it is compared with."""

    engine: str
    against: str


CASES = {
    "base": Case("base", "base"),
    "idle": Case("abilities", "base"),
    "one": Case("abilities", "base"),
    "merged": Case("merged", "base"),
    "four_mixed": Case("abilities", "base"),
    "compose_3_of_8": Case("abilities", "base"),
    "base_prefill": Case("base", "base_prefill"),
    "prefill_four": Case("abilities", "base_prefill"),
    "compiled_base": Case("compiled_base", "base"),
    "compiled_idle": Case("compiled_abilities", "compiled_base"),
    "compiled_one": Case("compiled_abilities", "compiled_base"),
    "compiled_four_mixed": Case("compiled_abilities", "compiled_base"),
    "compiled_compose_3_of_8": Case("compiled_abilities", "compiled_base"),
    "compiled_norms": Case("compiled_abilities", "compiled_base"),
    "stock_lora": Case("stock_lora", "base"),
}
AGAINST_LORA, OF_LIMIT = "four_mixed against stock_lora", "compose_3_of_8 of its limit"
# On CPUs vLLM compiles no model that it serves with LoRA, so that this is the fastest of either.
COMPILED_AGAINST_LORA = "compiled_four_mixed against stock_lora"
FLOORS = {
    "idle": 0.98,
    "one": 0.90,
    "four_mixed": 0.80,
    OF_LIMIT: 0.90,
    "prefill_four": 0.85,
    "compiled_idle": 0.98,
    AGAINST_LORA: 12.0,  # what a machine without a matrix unit hardly reaches; one with it has 19
    COMPILED_AGAINST_LORA: 20.0,  # not measured without a matrix unit
}
SWITCHING = "switching"  # has figures of its own, no ratio
EVERY = [*CASES, SWITCHING]
SLACK = 0.85
MORE_ROUNDS = 5
WARM_UP_TOKENS = 4

Summary = dict[str, dict[str, float]]


def prepare(base: Path, work: Path) -> dict[str, int]:
    """Writes the abilities of random rows, and of the same deltas LoRA adapters and a merged checkpoint.

    Returns:
        the abilities' sizes in bytes.
    """
    from act_serve.abilities.store import Store
    from act_serve.delta.artifact import read_artifact
    from act_serve.pipeline.export import export_hf
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
            if number == 0:  # the ability of the case "one"
                export_hf(base=base, deltas=deltas, folder=work / "merged")
    publish_random(store, base, "norms", seed=ABILITIES, share=SHARE, outside=["norms"])
    return sizes


def limits(base: Path, sizes: dict[str, int]) -> dict[str, float]:
    """Per case with abilities, the ratio to base that memory traffic allows, or in prefill arithmetic."""
    base_bytes = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    found = {}
    for case in ("idle", "one", "four_mixed", "compose_3_of_8"):
        used = {part.split("*")[0] for i in range(REQUESTS) for part in composition(case, i).split("+") if part}
        found[case] = found[f"compiled_{case}"] = base_bytes / (base_bytes + sum(sizes[name] for name in used))
    return {**found, "prefill_four": _prefill_limit(base)}


def _prefill_limit(base: Path) -> float:
    """A prompt's token is multiplied with every linear weight, its ability's rows, and the tokens before it."""
    from transformers import AutoConfig

    from act_serve.models.families import channel_modules

    config = AutoConfig.from_pretrained(base)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    linear = sum(module.out_features * module.in_features for module in channel_modules(base))
    # Queries with keys and scores with values; half of the prompt comes before a token on average.
    attention = config.num_hidden_layers * config.num_attention_heads * head_size * PROMPT_TOKENS
    return (linear + attention) / (linear + attention + SHARE * linear)


def switching(base: Path, dtype: str) -> dict[str, float]:
    """What `benchmarks/switching.py` measures, in milliseconds, in a process of its own."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, "-m", "benchmarks.switching", "--base", str(base), "--dtype", dtype]
        command += ["--json", file.name]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found: dict[str, float] = json.load(file)
    return found


def measure(engines: Engines, results: dict[str, list[float]], rounds: int) -> None:
    """Adds the tokens per second of every case in so many rounds."""
    for _ in range(rounds):
        number = len(results["base"]) + 1
        for case in results:
            if case == "stock_lora" and results[case]:
                continue  # once is enough: very slow, and far enough from every other case
            results[case].append(engines.tokens_per_second(CASES[case].engine, case))
            print(f"round {number} {case}: {results[case][-1]:.1f} tok/s", file=sys.stderr, flush=True)


def summarize(results: dict[str, list[float]], limit: dict[str, float]) -> Summary:
    """Per case the medians of its tokens per second and of its ratios, its limit, and its share of that."""
    cases: Summary = {}
    for case, speeds in results.items():
        ratios = [speed / other for speed, other in zip(speeds, results[CASES[case].against], strict=False)]
        cases[case] = {"tok_s": round(statistics.median(speeds), 1), "ratio": round(statistics.median(ratios), 4)}
        if case in limit:
            share = cases[case]["ratio"] / limit[case]
            cases[case] |= {"limit": round(limit[case], 4), "of_limit": round(share, 4)}
    return cases


def against_floors(cases: Summary) -> dict[str, float]:
    """What has a floor and was measured."""
    found = {name: case["ratio"] for name, case in cases.items() if name in FLOORS}
    if composed := cases.get("compose_3_of_8"):
        found[OF_LIMIT] = composed["of_limit"]
    if cases.keys() >= {"four_mixed", "stock_lora"}:
        found[AGAINST_LORA] = cases["four_mixed"]["ratio"] / cases["stock_lora"]["ratio"]
    if cases.keys() >= {"compiled_four_mixed", "stock_lora"}:
        found[COMPILED_AGAINST_LORA] = cases["compiled_four_mixed"]["tok_s"] / cases["stock_lora"]["tok_s"]
    return found


def below_floor(cases: Summary) -> list[str]:
    """The measured ratios that are far below their floor; the slack is for the noise of a busy machine."""
    return [
        f"{name} {ratio:.3f} (floor {FLOORS[name]})"
        for name, ratio in against_floors(cases).items()
        if ratio < SLACK * FLOORS[name]
    ]


def chosen(wanted: Collection[str]) -> list[str]:
    """The cases to measure: those wanted, with those that they are compared with."""
    needed = {"base", *wanted, *(CASES[case].against for case in wanted if case in CASES)}
    return [case for case in CASES if case in needed]


def main() -> None:
    """Measures, prints a table, and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--starts", type=int, default=1, help="of all engines, each with so many rounds")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true", help="exit 1 where a measured ratio is far below its floor")
    parser.add_argument("--dtype", default="auto", help="of all sides; auto as the server's")
    parser.add_argument("--base", type=Path, help="checkpoint folder; default: the embedded model")
    parser.add_argument("--cases", nargs="+", choices=EVERY, default=EVERY, help="default: all")
    options = parser.parse_args()
    names = chosen(options.cases)
    if options.check and FLOORS.keys().isdisjoint(names):
        parser.error(
            f"none of the cases has a floor to check; add one of {', '.join(sorted(FLOORS.keys() & CASES.keys()))}"
        )

    from act_serve.models.loading import embedded_base

    base = options.base or embedded_base()
    work = Path(tempfile.mkdtemp(prefix="act-serve-bench-"))
    results: dict[str, list[float]] = {case: [] for case in names}
    try:
        limit = limits(base, prepare(base, work))
        switch = switching(base, options.dtype) if SWITCHING in options.cases else {}
        for start in range(1, options.starts + 1):
            with Engines(dict.fromkeys(CASES[case].engine for case in names), base, work, options.dtype) as engines:
                for case in names:
                    engines.tokens_per_second(CASES[case].engine, case, WARM_UP_TOKENS)
                measure(engines, results, options.rounds)
                if options.check and start == options.starts and (low := below_floor(summarize(results, limit))):
                    print(f"below the floor: {', '.join(low)}; measuring {MORE_ROUNDS} rounds more", file=sys.stderr)
                    measure(engines, results, MORE_ROUNDS)
    finally:
        shutil.rmtree(work)
    cases = summarize(results, limit)
    for case, row in cases.items():
        print(f"{case:16} {row['tok_s']:8.1f} tok/s   ratio {row['ratio']:.3f}   " + (
            f"limit {row['limit']:.3f}   {row['of_limit']:.2f} of it" if "limit" in row else ""))  # fmt: skip
    floors = {name: {"ratio": round(r, 4), "floor": FLOORS[name]} for name, r in against_floors(cases).items()}
    for name, row in floors.items():
        print(f"{name}: {row['ratio']:.3g}, floor {row['floor']:g}")
    if switch:
        print("switching, ms: " + ", ".join(f"{name} {value:.2f}" for name, value in switch.items()))
    if options.json:
        options.json.write_text(json.dumps({"cases": cases, "floors": floors, "switching_ms": switch}, indent=2) + "\n")
    if options.check and (low := below_floor(cases)):
        sys.exit("below the floor: " + ", ".join(low))


if __name__ == "__main__":
    main()
