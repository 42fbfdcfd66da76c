"""Answers are greedy, whatever a model's folder says of sampling and penalties, in batches that fit in memory."""

import json
from pathlib import Path

import pytest
import torch

from act_serve.models.answering import answers, nll_sums
from act_serve.models.choosing import choice_likelihoods
from act_serve.models.examples import Example, encode_answered
from act_serve.models.loading import load_model, load_tokenizer
from tests.tiny_models import make_llama

PENALTIES = {"repetition_penalty": 1.8, "no_repeat_ngram_size": 2, "num_beams": 3, "do_sample": True, "min_length": 99}


def test_settings_of_the_folder_change_no_answer(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "base")
    examples = [Example("say a", ""), Example("hello", "")]
    plain = answers(load_model(folder), load_tokenizer(folder), examples, max_new_tokens=12)
    (folder / "generation_config.json").write_text(json.dumps(PENALTIES))
    model = load_model(folder)
    assert answers(model, load_tokenizer(folder), examples, max_new_tokens=12) == plain
    assert model.generation_config.repetition_penalty == 1.8, "the model keeps its own settings for others"


@pytest.mark.parametrize("fits", [1, 3])
def test_batches_that_do_not_fit_are_halved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fits: int) -> None:
    folder = make_llama(tmp_path / "base")
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    examples = [Example(f"say {letter}", letter * 5) for letter in "abcdefg"]
    items = encode_answered(tokenizer, examples, "task")
    choices = [Example("say", "a", choices=("a", letter)) for letter in "bcdefgh"]
    wanted = (
        answers(model, tokenizer, examples, max_new_tokens=4),
        nll_sums(model, items, pad_id=0),
        choice_likelihoods(model, tokenizer, choices),
    )
    decoder, sizes = model.get_decoder(), []

    def limited(_module: object, _args: object, options: dict[str, torch.Tensor]) -> None:
        sizes.append(len(options["input_ids"]))
        if sizes[-1] > fits:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )

    handle = decoder.register_forward_pre_hook(limited, with_kwargs=True)
    assert answers(model, tokenizer, examples, max_new_tokens=4) == wanted[0]
    assert [count for _, count in nll_sums(model, items, pad_id=0)] == [count for _, count in wanted[1]]
    torch.testing.assert_close(nll_sums(model, items, pad_id=0), wanted[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(choice_likelihoods(model, tokenizer, choices), wanted[2], rtol=1e-4, atol=1e-4)
    assert max(sizes) == 7
    assert fits in sizes
    handle.remove()

    def broken(*_: object) -> None:
        raise RuntimeError("something else")

    decoder.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="something else"):
        nll_sums(model, items, pad_id=0)
