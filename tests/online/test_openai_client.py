"""The official client against the running server."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai import APIStatusError, OpenAI

from tests.online.conftest import BASE

pytestmark = pytest.mark.slow

FRENCH = "Quelle est la capitale de la France ?"
ENGLISH = "What is the capital of France?"


def ask(client: OpenAI, prompt: str = ENGLISH, model: str = BASE, abilities: Any = None, **options: Any) -> Any:
    extra = options.pop("extra_body", {}) | ({} if abilities is None else {"abilities": abilities})
    return client.chat.completions.create(
        **{
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": 12,
            "extra_body": extra,
            **options,
        }
    )


def used(answer: Any) -> dict[str, float]:
    return {ability["name"]: ability["weight"] for ability in answer.model_extra["act"]["abilities"]}


def test_an_answer_of_the_base(client: OpenAI) -> None:
    answer = ask(client)
    assert answer.choices[0].message.content
    assert answer.usage.completion_tokens > 0
    assert used(answer) == {}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"abilities": ["fr"]}, {"fr": 1.0}),
        ({"abilities": ["math", "fr"]}, {"fr": 1.0, "math": 1.0}),
        ({"abilities": [{"name": "fr", "weight": 0.5}, "math"]}, {"fr": 0.5, "math": 1.0}),
        ({"abilities": [{"name": "fr", "version": 1}]}, {"fr": 1.0}),
        ({"abilities": []}, {}),
        ({"abilities": "none"}, {}),
        ({"abilities": "auto"}, {}),
        ({"abilities": "auto", "prompt": FRENCH}, {"fr": 1.0}),
        ({"extra_body": {"language": "fr"}}, {"fr": 1.0}),
        ({"extra_body": {"skill": "math"}}, {"math": 1.0}),
        ({"extra_body": {"language": "fr", "skill": "math"}}, {"fr": 1.0, "math": 1.0}),
        ({"model": f"{BASE}:fr+math*0.25"}, {"fr": 1.0, "math": 0.25}),
        ({"model": f"{BASE}:auto", "prompt": FRENCH}, {"fr": 1.0}),
    ],
)
def test_abilities_in_every_shape(client: OpenAI, options: dict[str, Any], expected: dict[str, float]) -> None:
    answer = ask(client, **options)
    assert used(answer) == expected
    assert answer.choices[0].message.content is not None


def test_the_header_says_what_was_used(client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=BASE,
        messages=[{"role": "user", "content": "Hi"}],
        max_tokens=1,
        extra_body={"abilities": [{"name": "math", "weight": 0.5}, "fr"]},
    )
    assert raw.headers["x-act-abilities"] == "fr@1*1,math@1*0.5"


@pytest.mark.parametrize("abilities", [[], ["fr"], [{"name": "fr", "weight": 0.5}, "math"]])
def test_a_stream_gives_what_one_answer_gives(client: OpenAI, abilities: list[Any]) -> None:
    whole = ask(client, abilities=abilities)
    chunks = list(ask(client, abilities=abilities, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[0].model_extra["act"]["abilities"] == whole.model_extra["act"]["abilities"]
    assert all("act" not in (chunk.model_extra or {}) for chunk in chunks[1:])
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert sum(len(chunk.choices) for chunk in chunks) > 3, "tokens must come one by one"


def test_abilities_change_the_answer_and_never_leak(client: OpenAI) -> None:
    def logprobs(abilities: list[str]) -> list[float]:
        answer = ask(client, "Tell me a long story about a river. " * 20, abilities=abilities, logprobs=True)
        return [token.logprob for token in answer.choices[0].logprobs.content]

    order = [["fr"], ["math"], ["fr"], [], ["fr", "math"], [], ["math"]]
    seen: dict[str, list[float]] = {}
    for abilities in order:
        name = "+".join(abilities)
        assert logprobs(abilities) == pytest.approx(seen.setdefault(name, logprobs(abilities)), abs=0.05)
    assert len({tuple(round(p, 3) for p in probabilities) for probabilities in seen.values()}) == 4


def test_several_choices_logprobs_and_stop_words(client: OpenAI) -> None:
    answer = ask(client, abilities=["fr"], n=2, temperature=1.0, seed=1, logprobs=True, top_logprobs=2)
    assert len(answer.choices) == 2
    assert all(len(t.top_logprobs) == 2 for c in answer.choices for t in c.logprobs.content)
    word = next(w for w in ask(client).choices[0].message.content.split() if len(w) > 2)
    stopped = ask(client, stop=[word])
    assert stopped.choices[0].finish_reason == "stop"
    assert word not in stopped.choices[0].message.content


def test_a_tool_call(client: OpenAI) -> None:
    parameters = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
    tool = {"type": "function", "function": {"name": "weather", "parameters": parameters}}
    choice = {"type": "function", "function": {"name": "weather"}}
    answer = ask(client, "Weather in Paris?", abilities=["math"], tools=[tool], tool_choice=choice, max_tokens=60)
    call = answer.choices[0].message.tool_calls[0].function
    assert call.name == "weather"
    json.loads(call.arguments)  # what is in it is the model's doing: this one was not trained on tools


def test_structured_output(client: OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"color": {"enum": ["red", "green"]}, "n": {"enum": [1, 2]}},
        "required": ["color", "n"],
        "additionalProperties": False,
    }
    shape = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": True}}
    content = ask(client, "A color.", abilities=["fr"], response_format=shape, max_tokens=60).choices[0].message.content
    parsed = json.loads(content)
    assert parsed.keys() == {"color", "n"}
    assert parsed["color"] in ("red", "green")


def test_completions_and_responses(client: OpenAI) -> None:
    completion: Any = client.completions.create(
        model=BASE, prompt="One two three", max_tokens=4, extra_body={"abilities": ["fr"]}
    )
    assert used(completion) == {"fr": 1.0}
    response: Any = client.responses.create(
        model=BASE, input="Say hi.", max_output_tokens=8, extra_body={"skill": "math"}
    )
    assert used(response) == {"math": 1.0}
    assert response.output_text


def test_models(client: OpenAI) -> None:
    cards: dict[str, Any] = {card.id: card for card in client.models.list()}
    assert cards.keys() == {BASE, *(f"{BASE}:{name}" for name in ("flipped", "foreign", "fr", "math"))}
    assert cards[f"{BASE}:fr"].parent == BASE


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ({"abilities": ["maths"]}, 404, "did you mean 'math'"),
        ({"abilities": [{"name": "fr", "version": 7}]}, 404, "no version 7"),
        ({"extra_body": {"language": "ja"}}, 404, "no ability serves the language 'ja'"),
        ({"extra_body": {"skill": "cooking"}}, 404, "no skill 'cooking'"),
        ({"model": "gpt-4"}, 404, f"it serves '{BASE}'"),
        ({"model": f"{BASE}:fr", "abilities": ["math"]}, 400, "use one of them"),
        ({"abilities": ["fr"], "extra_body": {"language": "fr"}}, 400, "use one of them"),
        ({"abilities": ["fr", "fr"]}, 400, "named twice"),
        ({"abilities": "fr"}, 400, "is a list"),
        ({"abilities": [{"name": "fr", "weight": -1}]}, 400, "negative"),
        ({"abilities": [{"name": "fr", "weight": 1e9}]}, 400, "finite"),
        ({"abilities": [f"n{i}" for i in range(1000)]}, 400, "at most 32"),
        ({"abilities": ["flipped"]}, 422, "flipped"),
        ({"abilities": ["foreign"]}, 409, "foreign"),
        ({"abilities": ["fr", "foreign"]}, 409, "foreign"),
        ({"max_tokens": -1}, 400, "max_tokens"),
    ],
)
def test_every_error(client: OpenAI, options: dict[str, Any], status: int, message: str) -> None:
    with pytest.raises(APIStatusError) as caught:
        ask(client, **options)
    assert caught.value.status_code == status
    assert message in caught.value.body["message"]  # type: ignore[index, call-overload]
    assert ask(client, max_tokens=1).choices
