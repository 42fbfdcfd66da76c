"""A batch in which neighbours use different compositions, and the comparison of its answers with transformers'."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import torch
from transformers import PreTrainedModel

from act_serve.abilities.store import Store
from act_serve.engine.resolver import adapter_request
from tests.abilities_for_tests import pinned

PROMPTS = [[5 + i, 9, 30 + i, 77] for i in range(4)]
COMPOSITIONS = ["", "r1", "r2", "r1*0.5+r2*-1.5"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What was served for a prompt under a composition, as written; token ids."""

    text: str
    prompt: list[int]
    tokens: list[int]


def serve_mixed(llm: Any, store: Store, texts: Sequence[str] = COMPOSITIONS, max_tokens: int = 16) -> list[Answer]:
    """Serves every prompt under every composition in one batch, greedily."""
    from vllm import SamplingParams

    jobs = [(text, prompt) for prompt in PROMPTS for text in texts]
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for _, prompt in jobs],
        SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True),
        lora_request=[
            adapter_request("base", pinned(store, text), _adapter_id(text), store) if text else None for text, _ in jobs
        ],
        use_tqdm=False,
    )
    return [
        Answer(text, prompt, list(output.outputs[0].token_ids))
        for (text, prompt), output in zip(jobs, outputs, strict=True)
    ]


def _adapter_id(text: str) -> int:
    """One id for one composition, over several batches of one engine; vLLM's V2 model runner keeps ids in int32."""
    return 1 + (crc32(text.encode()) >> 2)


def check_answers(answers: Sequence[Answer], model_of: Callable[[str], PreTrainedModel], slack: float = 0.0) -> None:
    """Every token is the choice of the composition's model, and the compositions differ in what they say.

    Args:
        model_of: makes the model of a composition.
        slack: how far a token's logit may lie below the choice's, as a share of the logits' standard deviation.
    """
    for text in dict.fromkeys(answer.text for answer in answers):
        model = model_of(text)
        for answer in answers:
            if answer.text == text:
                with torch.inference_mode():
                    logits = model(torch.tensor([answer.prompt + answer.tokens])).logits[0, len(answer.prompt) - 1 : -1]
                got = logits.gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
                if slack:
                    assert (logits.amax(-1) - got <= slack * logits.std()).all(), text
                else:
                    assert logits.argmax(-1).tolist() == answer.tokens, text
    # They must differ, or the comparison above proves nothing.
    distinct = {tuple(answer.tokens) for answer in answers}
    assert len(distinct) > len({tuple(answer.prompt) for answer in answers})
