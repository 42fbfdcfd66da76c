"""Answers are greedy, whatever a model's folder says of sampling and penalties."""

import json
from pathlib import Path

from act_serve.models.answering import answers
from act_serve.models.examples import Example
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
