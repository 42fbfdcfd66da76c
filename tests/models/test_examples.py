"""Only answer tokens count, and a prompt is encoded as a chat server encodes it."""

import pytest

from act_serve.errors import DataError, ModelError
from act_serve.models.examples import MAX_TOKENS, Encoded, Example, batches, collate, encode, encode_answered
from tests.tiny_models import make_tokenizer


def test_answer_positions() -> None:
    tokenizer = make_tokenizer()
    item = encode(tokenizer, Example("hi", "ok"))
    text = tokenizer.decode(item.ids[: item.answer_start])
    assert text.replace(" ", "") == "<s>user:hi</s><s>assistant:"
    assert tokenizer.decode(item.ids[item.answer_start :]) == "ok</s>"
    batch = collate([item, encode(tokenizer, Example("a longer question", "x"))], pad_id=2)
    assert batch.targets_N.tolist() == [*item.ids[item.answer_start :], *tokenizer("x")["input_ids"], 2]


def test_plain_text_counts_all_but_its_first_token() -> None:
    item = encode(make_tokenizer(), Example(None, "abc"))
    assert (item.answer_start, item.answer_tokens) == (1, 2)


def test_a_tokenizer_without_an_end_token_is_named() -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token, tokenizer.name_or_path = None, "models/endless"
    assert encode(tokenizer, Example(None, "abc")).answer_tokens == 2
    with pytest.raises(ModelError, match=r"tokenizer of models/endless has no token .* tokenizer_config\.json"):
        encode(tokenizer, Example("hi", "ok"))


def test_an_example_without_an_answer_token_is_named() -> None:
    tokenizer = make_tokenizer()
    room = MAX_TOKENS - encode(tokenizer, Example("", "")).answer_start
    fits, full = Example("x" * (room - 1), "yes"), Example("x" * room, "yes")
    assert [item.answer_tokens for item in encode_answered(tokenizer, [fits], "demo")] == [1]
    with pytest.raises(DataError, match=r"^demo: example 2 \('x{40}'\) has a prompt of 320 tokens, .* cut at 320"):
        encode_answered(tokenizer, [fits, full], "demo")
    with pytest.raises(DataError, match=r"^demo: example 1 \('a'\) has no second token"):
        encode_answered(tokenizer, [Example(None, "a")], "demo")


@pytest.mark.parametrize("size", [1, 3, 7])
def test_batches_hold_every_item_once(size: int) -> None:
    items = [Encoded(tuple(range(length)), 1) for length in (5, 2, 9, 4, 3)]
    seen = [int(mask.sum()) for batch in batches(items, size, 0) for mask in batch.mask_BT]
    assert sorted(seen) == [2, 3, 4, 5, 9]


def test_batches_have_few_lengths() -> None:
    items = [Encoded(tuple(range(length)), 1) for length in range(2, 40)]
    found = [batch.ids_BT.shape[1] for batch in batches(items, 3, 0)]
    assert set(found) == {16, 32, 48}
    assert all(batch.mask_BT.sum(1).max() > batch.ids_BT.shape[1] - 16 for batch in batches(items, 3, 0))
