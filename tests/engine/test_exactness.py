"""What the engine serves is what transformers computes on the merged checkpoint."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from act_serve.abilities.store import Store
from act_serve.engine.resolver import adapter_request
from tests.abilities_for_tests import merged_model, pinned, publish_random
from tests.engine.conftest import running_engine

pytestmark = pytest.mark.slow

COMPOSITIONS = ["", "fr", "extract", "extract+fr", "extract*0.6+fr*1.3", "r1*0.7+r2*-0.4"]
PROMPTS = [f"Translate to French: The file number {i} could not be opened." for i in range(8)]
PROMPTS += [
    f"Order: {name} from Lyon wants {i + 2} red chairs on 4 May 2031. Give JSON." for i, name in enumerate("ABCDEFGH")
]
PROMPTS += [f"Write one sentence about the number {i}." for i in range(8)]
PROMPTS += [f"What is {i} times {i + 3}? Explain." for i in range(8)]
TOKENS = 32


class Requests:
    """Makes the adapter of a composition, with one id per distinct name, as vLLM's server does."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.ids: dict[str, int] = {}

    def __call__(self, text: str) -> Any:
        if not text:
            return None
        composition = pinned(self.store, text)
        return adapter_request(
            "base", composition, self.ids.setdefault(str(composition), len(self.ids) + 1), self.store
        )


def encode(base: Path, prompts: list[str]) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(base)
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]


@torch.inference_mode()
def forced(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> tuple[list[int], torch.Tensor]:
    """transformers' greedy choice at every position of a given answer, and the answer's log-probabilities.

    An answer that equals the choices is transformers' own greedy answer, by induction over its positions; one pass
    shows it, where generating would take one pass per token.
    """
    logits = model(torch.tensor([prompt + answer]), logits_to_keep=len(answer) + 1).logits
    logprobs = logits[0, :-1].log_softmax(-1)
    return logprobs.argmax(-1).tolist(), logprobs.gather(1, torch.tensor(answer)[:, None])[:, 0]


def served_forced(llm: Any, prompts: list[list[int]], answers: list[list[int]], request: Any) -> torch.Tensor:
    """Log-probabilities of given answers, by vLLM; ``[prompts * TOKENS]``."""
    from vllm import SamplingParams

    inputs = [{"prompt_token_ids": p + a} for p, a in zip(prompts, answers, strict=True)]
    outputs = llm.generate(
        inputs, SamplingParams(max_tokens=1, prompt_logprobs=0), lora_request=request, use_tqdm=False
    )
    values = [
        out.prompt_logprobs[len(prompt) + i][token].logprob
        for out, prompt, answer in zip(outputs, prompts, answers, strict=True)
        for i, token in enumerate(answer)
    ]
    return torch.tensor(values)


def test_float32_tokens_and_logprobs_equal_the_merged_checkpoints(base: Path, store: Store) -> None:
    from vllm import SamplingParams

    prompts = encode(base, PROMPTS)
    requests = Requests(store)
    jobs = [(text, prompt) for prompt in prompts for text in COMPOSITIONS]  # neighbours in the batch all differ
    params = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True, logprobs=0)
    with running_engine(base, store, dtype="float32") as llm:
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for _, prompt in jobs],
            params,
            lora_request=[requests(text) for text, _ in jobs],
            use_tqdm=False,
        )
    answers = set()
    for text in COMPOSITIONS:
        model = merged_model(base, store, text)
        for (job, prompt), output in zip(jobs, outputs, strict=True):
            if job != text:
                continue
            served = output.outputs[0]
            tokens = list(served.token_ids)
            choices, logprobs = forced(model, prompt, tokens)
            assert tokens == choices, f"composition {text!r}"
            got = torch.tensor([step[token].logprob for step, token in zip(served.logprobs, tokens, strict=True)])
            assert len(tokens) == TOKENS
            assert torch.allclose(got, logprobs, atol=1e-3, rtol=0), f"composition {text!r}"
            answers.add((text, tuple(tokens)))
    # The compositions must differ in what they say, or the comparison above proves nothing.
    distinct = {tokens for _, tokens in answers}
    assert len(distinct) > 0.5 * len(jobs)


def test_bfloat16_is_as_close_to_float32_as_the_merged_checkpoint(base: Path, store: Store, tmp_path: Path) -> None:
    from vllm import SamplingParams

    text = "extract+fr"
    prompts = encode(base, PROMPTS[::4])  # CPUs without bfloat16 instructions are very slow here
    model = merged_model(base, store, text)
    merged = tmp_path / "merged"
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(merged)
    AutoTokenizer.from_pretrained(base).save_pretrained(merged)
    params = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
    with running_engine(merged, dtype="bfloat16") as llm:
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        answers = [list(output.outputs[0].token_ids) for output in outputs]
        by_checkpoint = served_forced(llm, prompts, answers, None)
    with running_engine(base, store, dtype="bfloat16") as llm:
        by_delta = served_forced(llm, prompts, answers, Requests(store)(text))
    exact = torch.cat([forced(model, prompt, answer)[1] for prompt, answer in zip(prompts, answers, strict=True)])
    error_checkpoint = (by_checkpoint - exact).abs().mean()
    error_delta = (by_delta - exact).abs().mean()
    print(f"\nbfloat16 mean |logprob error|: merged {error_checkpoint:.5f}, delta {error_delta:.5f}")
    assert error_delta <= 1.2 * error_checkpoint


def test_prefix_cache_never_crosses_compositions_or_versions(base: Path, store: Store) -> None:
    from vllm import SamplingParams

    requests = Requests(store)
    # Many blocks of cache, and nothing to copy: a text that repeats itself is continued alike by any composition.
    words = ", ".join(f"word{i * 7919 % 1000} {chr(97 + i % 26)}{i}" for i in range(80))
    prompt = encode(base, [f"Write a story that mentions each of these words: {words}"])[0]
    params = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
    for name, seed in {"strong1": 13, "strong2": 14, "changing": 11}.items():  # strong enough to change any answer
        publish_random(store, base, name, seed=seed, scale=0.06)

    with running_engine(base, store, dtype="float32", enable_prefix_caching=True) as llm:

        def answer(text: str) -> list[int]:
            output = llm.generate({"prompt_token_ids": prompt}, params, lora_request=requests(text), use_tqdm=False)
            return list(output[0].outputs[0].token_ids)

        sequence = ["strong1", "strong2", "strong1", "", "strong1*0.5", "strong1", "changing"]
        served = [answer(text) for text in sequence]
        publish_random(store, base, "changing", seed=12, version=2, scale=0.06)
        served.append(answer("changing"))
    for text, tokens in zip([*sequence[:-1], "changing@1", "changing@2"], served, strict=True):
        assert tokens == forced(merged_model(base, store, text), prompt, tokens)[0], text
    assert served[-1] != served[-2]
    assert len({tuple(tokens) for tokens in served}) == 6
