"""The engines that `benchmarks/engine_throughput.py` compares, each in its own process, and what they are asked."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Collection
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

REQUESTS, TOKENS, ABILITIES = 16, 48, 8
PROMPT_TOKENS = 512  # of the cases that read prompts

_WITH_ABILITIES = {
    "enable_lora": True, "max_loras": REQUESTS, "max_lora_rank": 8,
    "worker_cls": "act_serve.engine.worker.AbilityWorker",
}  # fmt: skip
# What each engine's vLLM gets beside what all get.
OPTIONS: dict[str, dict[str, Any]] = {
    "base": {},
    "abilities": _WITH_ABILITIES,
    "stock_lora": {"enable_lora": True, "max_loras": 4, "max_cpu_loras": 8, "max_lora_rank": 128},
    "merged": {},
    "compiled_base": {"enforce_eager": False},
    "compiled_abilities": _WITH_ABILITIES | {"enforce_eager": False},
}


def composition(case: str, request: int) -> str:
    """What one of the 16 requests of a case uses."""
    case = case.removeprefix("compiled_")
    if case == "one":
        return "a0"
    if case == "norms":
        return case
    if case in ("four_mixed", "prefill_four", "stock_lora"):
        return f"a{request % 4}"
    if case == "compose_3_of_8":
        return "+".join(f"a{(request + step) % ABILITIES}*{0.25 * (1 + step):g}" for step in (0, 3, 5))
    return ""


def serve(kind: str, base: Path, work: Path, dtype: str, pipe: Connection) -> None:
    """One engine's process: answers a case's name and the length of its answers with the tokens per second.

    Args:
        kind: a key of ``OPTIONS``; work: the store of the abilities, with ``lora/`` and ``merged/`` of the same deltas.
    """
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    from act_serve.abilities.store import Store
    from act_serve.engine.app import served_dtype
    from act_serve.engine.resolver import adapter_request
    from tests.abilities_for_tests import pinned

    options = OPTIONS[kind]
    if "worker_cls" in options:
        options = options | {"additional_config": {"act_serve": {"store": str(work)}}}
    llm = LLM(
        str(work / "merged" if kind == "merged" else base),
        dtype=served_dtype(dtype),
        enable_prefix_caching=False,
        **{"max_model_len": 1024, "max_num_seqs": REQUESTS, "enforce_eager": True} | options,
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
    vocabulary = llm.model_config.get_vocab_size()
    long = [
        {"prompt_token_ids": [(i * 37 + t * 11) % (vocabulary - 100) + 100 for t in range(PROMPT_TOKENS)]}
        for i in range(REQUESTS)
    ]
    pipe.send("ready")
    while (asked := pipe.recv()) is not None:
        case, tokens = asked
        prefill = "prefill" in case
        params = SamplingParams(max_tokens=1 if prefill else tokens, temperature=0, ignore_eos=True)
        adapters = [adapter(case, i) for i in range(REQUESTS)]
        start = time.perf_counter()
        llm.generate(long if prefill else short, params, lora_request=adapters, use_tqdm=False)
        pipe.send(REQUESTS * (PROMPT_TOKENS if prefill else tokens) / (time.perf_counter() - start))
    llm.llm_engine.engine_core.shutdown()


class Engines:
    """Some of the engines; a context that stops them at its end."""

    def __init__(self, kinds: Collection[str], base: Path, work: Path, dtype: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: dict[str, Connection] = {}
        self._processes = []
        for kind in kinds:
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

    def tokens_per_second(self, kind: str, case: str, tokens: int = TOKENS) -> float:
        """Measures a case once on an engine, with so many tokens per answer."""
        self._pipes[kind].send((case, tokens))
        return float(self._pipes[kind].recv())
