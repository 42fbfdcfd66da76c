"""Choices that share one sequence are as likely as each of them alone."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from act_serve.models.choosing import choice_likelihoods
from act_serve.models.examples import Example
from tests.tiny_models import make_llama, make_tokenizer

EXAMPLES = (
    Example("Water boils", "at heat", ("at heat", "on Sundays because of it", "never", "x")),
    Example("A much longer question than the first one, so that it is padded. Answer:", "no", ("yes", "no")),
)


def alone(model: torch.nn.Module, prompt: str, choice: str) -> float:
    """The choice's log-likelihood in a plain causal pass over prompt and choice."""
    tokenizer = make_tokenizer()
    start, whole = (tokenizer(text, return_tensors="pt")["input_ids"] for text in (prompt, f"{prompt} {choice}"))
    with torch.inference_mode():
        log_TV = model(whole).logits[0, :-1].float().log_softmax(-1)
    picked = log_TV.gather(1, whole[0, 1:, None])[start.shape[1] - 1 :]
    return float(picked.sum())


@pytest.mark.parametrize("batch_size", [1, 2])
def test_packed_choices_equal_plain_sequences(tmp_path: Path, batch_size: int) -> None:
    folder = make_llama(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    found = choice_likelihoods(model, make_tokenizer(), EXAMPLES, batch_size=batch_size)
    for example, values in zip(EXAMPLES, found, strict=True):
        wanted = [alone(model, example.prompt or "", choice) for choice in example.choices]
        assert values == pytest.approx(wanted, abs=1e-3)
        assert max(wanted) - min(wanted) > 1.0
