"""One training or test item, and its tokens.

Shapes: B items in a batch, T tokens of the longest, rounded up.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from act_serve.errors import DataError, ModelError

# Examples are cut here, so that a few long ones don't decide how much memory and time a batch takes.
MAX_TOKENS = 320
# Batches are as long as a multiple of this: oneDNN, which multiplies in bfloat16 on CPUs, compiles code for every new
# shape, and would spend most of its time on that if all batches had lengths of their own.
LENGTH_MULTIPLE = 16


@dataclass(frozen=True, slots=True)
class Example:
    """A user's request with its answer, or plain text where `prompt` is None.

    Where there are `choices`, `answer` is one of them, and `prompt` is the plain text that each of them continues.
    """

    prompt: str | None
    answer: str
    choices: tuple[str, ...] = ()

    @property
    def beginning(self) -> str:
        """Its first characters, by which messages name it."""
        return (self.prompt or self.answer)[:40]


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids; those from `answer_start` on are the answer, which alone is scored and trained."""

    ids: tuple[int, ...]
    answer_start: int

    @property
    def answer_tokens(self) -> int:
        return len(self.ids) - self.answer_start


@dataclass(frozen=True, slots=True)
class Batch:
    """`ids_BT` and `mask_BT` int64, padded on the right; `predicts_BT` bool marks positions whose next token counts."""

    ids_BT: Tensor
    mask_BT: Tensor
    predicts_BT: Tensor

    @property
    def targets_N(self) -> Tensor:
        """The tokens that follow the marked positions, in row order, `[N]`."""
        return self.ids_BT.roll(-1, dims=1)[self.predicts_BT]


def encode(tokenizer: Any, example: Example) -> Encoded:
    """Encodes with the model's own chat template, exactly as a chat server does; plain text counts from token two.

    What goes beyond `MAX_TOKENS` is cut off: with a longer prompt, no answer token is left. Raises ModelError for an
    answer where the tokenizer has no token that ends one.
    """
    if example.prompt is None:
        ids = tokenizer(example.answer, add_special_tokens=False)["input_ids"]
        return Encoded(tuple(ids[:MAX_TOKENS]), 1)
    prompt = encode_prompt(tokenizer, example.prompt)
    answer = tokenizer(example.answer, add_special_tokens=False)["input_ids"]
    return Encoded(tuple([*prompt, *answer, _end_of_answer(tokenizer)][:MAX_TOKENS]), len(prompt))


def encode_answered(tokenizer: Any, examples: Iterable[Example], where: str) -> list[Encoded]:
    """Encodes examples that must each be scored or trained on.

    Raises DataError, which begins with `where` they are from, for one without an answer token: its likelihood would be
    0 / 0, and no number that stands for it would be true. Raises ModelError as `encode` does.
    """
    return [_answered(tokenizer, number, example, where) for number, example in enumerate(examples, start=1)]


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a chat with one user turn, up to where the model starts to answer."""
    if not tokenizer.chat_template:
        return list(tokenizer(prompt + "\n", add_special_tokens=False)["input_ids"])
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _end_of_answer(tokenizer: Any) -> int:
    """The token that ends an answer: without one, a model would never learn to stop."""
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {tokenizer.name_or_path or 'the model'} has no token that ends an answer; name it in "
            "its tokenizer_config.json, as eos_token"
        )
    return int(tokenizer.eos_token_id)


def _answered(tokenizer: Any, number: int, example: Example, where: str) -> Encoded:
    item = encode(tokenizer, example)
    if item.answer_tokens > 0:
        return item
    named = f"{where}: example {number} ({example.beginning!r})"
    if example.prompt is None:
        raise DataError(f"{named} has no second token, and the first is never predicted; give a longer text")
    raise DataError(
        f"{named} has a prompt of {item.answer_start} tokens, and examples are cut at {MAX_TOKENS}: nothing is left of "
        "its answer; shorten the prompt or leave the example out"
    )


def padded_length(lengths: Iterable[int]) -> int:
    """The length T that a batch of such items is padded to."""
    return -(-max(lengths) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE


def collate(items: Sequence[Encoded], pad_id: int) -> Batch:
    """Pads on the right and marks the answer-predicting positions."""
    length = padded_length(len(item.ids) for item in items)
    ids = torch.full((len(items), length), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    predicts = torch.zeros_like(ids, dtype=torch.bool)
    for row, item in enumerate(items):
        ids[row, : len(item.ids)] = torch.tensor(item.ids)
        mask[row, : len(item.ids)] = 1
        predicts[row, item.answer_start - 1 : len(item.ids) - 1] = True
    return Batch(ids, mask, predicts)


def batches(items: Sequence[Encoded], size: int, pad_id: int) -> Iterator[Batch]:
    """Yields the items in batches of alike length, shortest first, so that little is spent on padding."""
    ordered = sorted(items, key=lambda item: len(item.ids))
    for start in range(0, len(ordered), size):
        yield collate(ordered[start : start + size], pad_id)
