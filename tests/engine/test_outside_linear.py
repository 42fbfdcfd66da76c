"""Norms, lm_head and embedding: what is served is what transformers computes on the exported, untied checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from act_serve.abilities.store import Store
from act_serve.delta.channels import kind_of
from act_serve.pipeline.compose import artifacts_of, compose
from act_serve.pipeline.export import export_hf
from tests.abilities_for_tests import pinned, publish_random
from tests.engine.conftest import running_engine
from tests.engine.mixed_batch import PROMPTS, check_answers, serve_mixed
from tests.engine.test_exactness import Requests, forced
from tests.engine.test_families import SHAPE, _compiled, serve_in_turn
from tests.tiny_models import make_tokenizer

pytestmark = pytest.mark.slow
# `plain` changes linear modules alone, so that layers in which only others have rows are met, too.
COMPOSITIONS = ["", "r1", "plain", "r2", "r1*0.5+r2*-1.5", "plain+r1*0.7"]
TOKENS = 16


def make(folder: Path, family: str) -> Path:
    """A random tied checkpoint whose norms are no ones; Qwen3 has norms of heads."""
    torch.manual_seed(0)
    options: dict[str, Any] = {**SHAPE, "num_key_value_heads": 2, "tie_word_embeddings": True}
    model: Any = (
        Qwen3ForCausalLM(Qwen3Config(**options, head_dim=32))
        if family == "qwen3"
        else LlamaForCausalLM(LlamaConfig(**options))
    )
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def exported(base: Path, store: Store, text: str, folder: Path) -> Any:
    """The composition as `act-serve export --to hf` writes it, in float32, loaded by transformers."""
    export_hf(base=base, deltas=compose(artifacts_of(text, store.root), base), folder=folder, dtype="float32")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("qwen3", {"enforce_eager": False}),
        ("qwen3", {"tensor_parallel_size": 2}),
        ("llama", {"pipeline_parallel_size": 2}),
    ],
    ids=["llama", "qwen3 compiled", "two workers", "two stages"],
)
def test_mixed_batch_equals_the_exported_checkpoints(
    family: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if options.keys() & {"tensor_parallel_size", "pipeline_parallel_size"}:
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    base, store = make(tmp_path / "base", family), Store(tmp_path / "store")
    compiled = not options.get("enforce_eager", True)
    for seed in (1, 2):
        publish_random(store, base, f"r{seed}", seed=seed, share=0.1, scale=0.1, outside=True)
    publish_random(store, base, "plain", seed=3, share=0.1, scale=0.1)
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # for the question below
    with running_engine(base, store, dtype="float32", max_model_len=256, **options) as llm:
        answers = serve_mixed(llm, store, COMPOSITIONS)
        assert set(llm.collective_rpc(_compiled)) == {compiled}
        (modules, *_) = llm.collective_rpc("ability_modules")
        assert {kind_of(name) for name in modules} == {"linear", "lm_head", "embedding", "norms"}
        if compiled:  # steps with rows of norms run no compiled code, those before and after them do
            answers += serve_in_turn(llm, store, [(["plain"], True), (["r1"], False), ([""], False), (["plain"], True)])
    check_answers(answers, lambda text: exported(base, store, text, tmp_path / f"merged {text}"))
    said = {(answer.text, *answer.prompt): tuple(answer.tokens) for answer in answers}
    assert len(set(said.values())) == len(said) == len(COMPOSITIONS) * len(PROMPTS), "each says another thing"


def test_the_base_of_a_compiled_engine_keeps_its_bits(tmp_path: Path) -> None:
    from vllm import SamplingParams

    base, store = make(tmp_path / "base", "llama"), Store(tmp_path / "store")
    publish_random(store, base, "norms-too", seed=1, share=0.1, scale=0.1, outside=True)
    publish_random(store, base, "plain", seed=3, share=0.1, scale=0.1)
    requests, compiled = Requests(store), {"dtype": "bfloat16", "max_model_len": 256, "enforce_eager": False}

    def answers(llm: Any, texts: list[str]) -> list[list[tuple[int, float]]]:
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in PROMPTS for _ in texts],
            SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True, logprobs=0),
            lora_request=[requests(text) for _ in PROMPTS for text in texts],
            use_tqdm=False,
        )
        return [
            [(token, step[token].logprob) for step, token in zip(served.logprobs, served.token_ids, strict=True)]
            for served in (output.outputs[0] for output in outputs)
        ]

    with running_engine(base, **compiled) as llm:
        without = answers(llm, ["", ""])
    with running_engine(base, store, **compiled) as llm:
        before = answers(llm, ["", ""])
        mixed = answers(llm, ["plain", ""])
        answers(llm, ["norms-too", "plain"])
        after = answers(llm, ["", ""])
    assert before == without
    assert mixed[1::2] == without[1::2], "beside others"
    assert mixed[::2] != without[::2]
    assert after == without


def test_log_probabilities_base_bits_and_prompts_of_others(tmp_path: Path) -> None:
    from vllm import SamplingParams

    base, store = make(tmp_path / "base", "llama"), Store(tmp_path / "store")
    publish_random(store, base, "r1", seed=1, share=0.1, scale=0.1, outside=True)
    publish_random(store, base, "plain", seed=3, share=0.1, scale=0.1)
    requests = Requests(store)
    greedy: dict[str, Any] = {"max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "logprobs": 0}
    inputs = [{"prompt_token_ids": prompt} for prompt in PROMPTS]

    def answers(llm: Any, texts: list[str], **more: Any) -> list[tuple[list[int], list[float], Any]]:
        outputs = llm.generate(
            [prompt for prompt in inputs for _ in texts],
            [SamplingParams(**greedy, **(more if text != "r1" else {})) for _ in inputs for text in texts],
            lora_request=[requests(text) for _ in inputs for text in texts],
            use_tqdm=False,
        )
        found = []
        for output in outputs:
            served = output.outputs[0]
            tokens = list(served.token_ids)
            logprobs = [step[token].logprob for step, token in zip(served.logprobs, tokens, strict=True)]
            found.append((tokens, logprobs, output.prompt_logprobs))
        return found

    texts = ["r1", "", "plain"]
    with running_engine(base, dtype="float32", max_model_len=256) as llm:
        without = answers(llm, ["", "", ""], prompt_logprobs=0)
    with running_engine(base, store, dtype="float32", max_model_len=256) as llm:
        mixed = answers(llm, texts, prompt_logprobs=0)
        by_base = answers(llm, ["", "", ""], prompt_logprobs=0)
        keys = [(name, 1, store.manifest(name, 1).digest) for name in ("r1", "plain")]
        llm.collective_rpc("load_abilities", args=([], keys))
        after = answers(llm, ["", "", ""], prompt_logprobs=0)
    assert by_base == without, "bit for bit"
    assert after == without, "bit for bit, with the abilities gone again"
    assert mixed[1::3] == without[1::3], "bit for bit, beside others too"
    assert not pinned(store, "r1*0"), "an ability of weight 0 is the base"
    models = {text: exported(base, store, text, tmp_path / f"merged {text}") for text in texts}
    for number, (tokens, logprobs, of_prompt) in enumerate(mixed):
        prompt, text = PROMPTS[number // 3], texts[number % 3]
        choices, expected = forced(models[text], prompt, tokens)
        assert tokens == choices, text
        torch.testing.assert_close(torch.tensor(logprobs), expected, atol=1e-3, rtol=0)
        if text != "r1":  # those of prompts, which others' rows of lm_head must not reach
            got = [step[token].logprob for step, token in zip(of_prompt[1:], prompt[1:], strict=True)]
            expected = forced(models[text], prompt[:1], prompt[1:])[1]
            torch.testing.assert_close(torch.tensor(got), expected, atol=1e-3, rtol=0)
