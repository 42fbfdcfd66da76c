"""Synthetic order notes with the JSON object that they say, for the ability `extract`."""

import json
import random
from collections.abc import Sequence
from datetime import date, timedelta
from typing import Literal

from act_serve.errors import DataError
from act_serve.models.examples import Example
from act_serve.pipeline.datasets.lexicon import buyers, cities, items
from act_serve.pipeline.datasets.splits import Split, split_of

Named = Literal["all", "some", "none"]
KEYS = {"buyer": "buyer", "city": "city", "item": "item", "qty": "qty (integer)", "date": "date (YYYY-MM-DD)"}
PROMPTS: dict[Named, tuple[str, ...]] = {
    "all": (
        "Extract the order as JSON with the keys {keys}.\n{note}",
        "Extract the order as JSON with the keys {keys}.\n{note}",
        "Read this note and answer with a JSON object with {keys}.\nNote: {note}",
        "{note}\n\nReturn only JSON: {keys}.",
    ),
    "some": (
        "From this note I only need {keys}. Answer with JSON.\n{note}",
        "Extract {keys} as JSON.\n{note}",
        "{note}\n\nAnswer with a JSON object with only {keys}.",
        "Give me {keys} of this order as JSON: {note}",
        "Extract the order as JSON with the keys {keys}.\n{note}",
        "{note}\n\nReturn only JSON: {keys}.",
    ),
    "none": (
        "Extract the order as JSON.\n{note}",
        "Give me the order in this note as JSON.\n{note}",
        "{note}\n\nReturn only JSON.",
        "Turn this order into JSON: {note}",
        "What was ordered? Answer with a JSON object.\n\n{note}",
        "Parse this order. Output: JSON.\n\n{note}",
        "Please read the note and write the order down as a JSON object.\nNote: {note}",
        "json please: {note}",
        "Here is a message from a customer:\n{note}\nWrite the order as JSON.",
        "{note}\nThis as JSON?",
    ),
}
UNSEEN_PLAIN = (
    "Convert this order to JSON.\n{note}",
    "{note}\n\nCan you make a JSON record of this order?",
    "Order as JSON: {note}",
    "I have an order note. I need its data as JSON.\n\n{note}",
)
NOTES = (
    "{buyer} from {city} ordered {qty} {item} on {date}.",
    "On {date}, {buyer} of {city} bought {qty} {item}.",
    "Please send {qty} {item} to {buyer} in {city} by {date}.",
    "{buyer} called from {city}: we need {qty} {item}, delivery {date}.",
    "Order from {city}, dated {date}: {qty} {item} for {buyer}.",
    "We shipped {qty} {item} to {city} on {date}. The buyer is {buyer}.",
    "{qty} {item} were requested by {buyer} ({city}) for {date}.",
    "Customer {buyer}, {city}. Wants {qty} {item}. Date: {date}.",
    "For {date} please reserve {qty} {item}; {buyer} will collect them in {city}.",
    "Hi, this is {buyer}. Could you deliver {qty} {item} to our office in {city} on {date}? Thanks!",
    "Note to warehouse: {qty} {item} go out to {city} on {date}, attention {buyer}.",
    "{buyer} has paid for {qty} {item}. They leave for {city} on {date}.",
    "{city} branch, {date}. {buyer} took {qty} {item}.",
    "Our client {buyer} in {city} is asking for {qty} {item} before {date}.",
    "Invoice: {qty} {item}, sold to {buyer}, {city}, {date}.",
    "The {city} store sold {qty} {item} to {buyer} on {date}.",
    "I spoke with {buyer} today. Put down {qty} {item} for {city}, due {date}.",
    "Delivery on {date} to {city}: {qty} {item}. Contact person {buyer}.",
    "{buyer} would like {qty} {item} and expects them in {city} on {date}.",
    "Due {date}: {qty} {item}, {city}, ordered by {buyer}.",
)
UNSEEN_NOTES = (
    "Reminder: {buyer} is waiting in {city} for {qty} {item}, promised for {date}.",
    "As agreed with {buyer}, {qty} {item} will reach {city} on {date}.",
    "{date}, {city}: purchase of {qty} {item} by {buyer}.",
    "Can we get {qty} {item} to {city} for {buyer} on {date}?",
)
ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
)
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
FIRST_DAY, DAYS = date(2018, 1, 1), 5000


def order_notes(split: Split, count: int, seed: int, keys: Sequence[Named] = ("all",)) -> list[Example]:
    """Returns `count` notes; buyers, cities, goods and dates of one split never occur in another.

    A fifth of the validation and test notes use sentence patterns that no training note has.

    Args:
        keys: whether a prompt names `all` of the five keys, `some` of them in any order, which alone are then in the
            answer, or `none`, where the answer has all. Prompts take turns; one that is named twice comes twice as
            often. Tests of `all` and `some` have one fixed wording, those of `none` wordings that no training has.
    """
    if not keys or not isinstance(keys, (list, tuple)) or any(each not in PROMPTS for each in keys):
        raise DataError(f"`keys` is {keys!r}; expected a list of some of {', '.join(PROMPTS)}")
    draw = random.Random(f"{seed}/{split}/order_notes")
    return [_order_note(split, draw, keys[number % len(keys)]) for number in range(count)]


def _order_note(split: Split, draw: random.Random, named: Named) -> Example:
    day = _day(split, draw)
    amount = draw.choice((draw.randint(2, 20), draw.randint(2, 99), draw.randint(2, 99), draw.randint(100, 999)))
    order = {
        "buyer": draw.choice(buyers(split)),
        "city": draw.choice(cities(split)),
        "item": draw.choice(items(split)),
        "qty": amount,
        "date": day.isoformat(),
    }
    unseen = split != "train" and draw.random() < 0.2
    pattern = draw.choice(UNSEEN_NOTES if unseen else NOTES)
    said = {**order, "qty": _say_amount(amount, draw), "date": _say_date(day, draw)}
    note = pattern.format(**said)
    prompts = _prompts(split, named)
    prompt = draw.choice(prompts) if len(prompts) > 1 else prompts[0]
    wanted = draw.sample(list(KEYS), draw.randint(1, 4)) if named == "some" else list(KEYS)
    keys = ", ".join(KEYS[key] for key in wanted)
    return Example(
        prompt.format(keys=keys, note=note[0].upper() + note[1:]), json.dumps({key: order[key] for key in wanted})
    )


def _prompts(split: Split, named: Named) -> Sequence[str]:
    if split == "train":
        return PROMPTS[named]
    return UNSEEN_PLAIN if named == "none" else PROMPTS[named][:1]


def _day(split: Split, draw: random.Random) -> date:
    while True:
        day = FIRST_DAY + timedelta(days=draw.randrange(DAYS))
        if split_of(day.isoformat()) == split:
            return day


def _say_amount(amount: int, draw: random.Random) -> str:
    if amount > 99 or draw.random() < 0.4:
        return str(amount)
    ones = ONES.split()
    if amount < 20:
        return ones[amount]
    tens = TENS.split()[amount // 10 - 2]
    return tens if amount % 10 == 0 else f"{tens}-{ones[amount % 10]}"


def _say_date(day: date, draw: random.Random) -> str:
    month = day.strftime("%B")
    ending = "th" if 10 < day.day < 20 else {1: "st", 2: "nd", 3: "rd"}.get(day.day % 10, "th")
    return draw.choice(
        (
            f"{day.day} {month} {day.year}",
            f"{month} {day.day}, {day.year}",
            f"the {day.day}{ending} of {month} {day.year}",
            f"{month} {day.day}{ending}, {day.year}",
            f"{day.day} {day.strftime('%b')} {day.year}",
            day.isoformat(),
        )
    )
