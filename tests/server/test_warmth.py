"""Requests go where their abilities and their prompt's beginning are, until that replica is busier than others."""

from __future__ import annotations

import pytest

from act_serve.delta.composition import Composition
from act_serve.server.route import Route, route_of
from act_serve.server.warmth import Warmth

FR, DE = "fr@1~aaaaaaaaaaaa", "de@1~bbbbbbbbbbbb"


def route(text: str, **body: object) -> Route:
    return route_of(Composition.parse(text), {"model": f"base:{text}", **body})


def chat(*texts: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text} for text in texts]


@pytest.fixture
def now() -> list[float]:
    return [100.0]


@pytest.fixture
def warmth(now: list[float]) -> Warmth:
    return Warmth(lambda: now[0])


IDLE = {"one": 0, "two": 0, "three": 0}


def test_without_knowledge_every_replica_is_as_good(warmth: Warmth) -> None:
    assert warmth.rank(route(FR), IDLE, {}) == [["one", "two", "three"]]
    assert warmth.rank(route(FR), {}, {}) == []


def test_replicas_with_all_abilities_come_first(warmth: Warmth) -> None:
    resident = {"one": [FR], "two": [DE, FR], "three": []}
    assert warmth.rank(route(f"{FR}*0.5+{DE}"), IDLE, resident)[0] == ["two"]
    assert warmth.rank(route(FR), IDLE, resident)[0] == ["one", "two"]
    assert warmth.rank(route(FR), IDLE, resident)[-1] == ["one", "two", "three"], "where those are full"


def test_the_base_alone_prefers_nobody(warmth: Warmth) -> None:
    assert warmth.rank(Route(), IDLE, {"one": [FR]}) == [["one", "two", "three"]]


def test_a_hot_ability_spreads(warmth: Warmth) -> None:
    resident = {"one": [FR]}
    assert warmth.rank(route(FR), {"one": 4, "two": 0}, resident)[0] == ["one"]
    assert warmth.rank(route(FR), {"one": 5, "two": 0}, resident) == [["one", "two"]]


def test_what_was_just_sent_counts_until_the_replica_reports(warmth: Warmth, now: list[float]) -> None:
    warmth.sent(route(FR), "two")
    assert warmth.rank(route(FR), IDLE, {})[0] == ["two"]
    now[0] += 5.0
    assert warmth.rank(route(FR), IDLE, {}) == [["one", "two", "three"]], "it has reported, and not that"
    warmth.sent(route(DE), "one")
    assert len(warmth._recent) == 1


def test_a_conversation_returns_to_its_replica(warmth: Warmth, now: list[float]) -> None:
    resident = {"one": [FR], "two": [FR]}
    warmth.sent(route(FR, messages=chat("Bonjour")), "two")
    now[0] += 60.0
    next_turn = route(FR, messages=chat("Bonjour", "Salut", "Ça va ?"))
    assert warmth.rank(next_turn, IDLE, resident)[0] == ["two"]
    assert warmth.rank(next_turn, {**IDLE, "two": 5}, resident)[0] == ["one"], "unless it is busy"
    assert warmth.rank(route(FR, messages=chat("Autre chose")), IDLE, resident)[0] == ["one", "two"]
    other = route(f"{FR}*0.5", messages=chat("Bonjour"))
    assert warmth.rank(other, IDLE, resident)[0] == ["one", "two"], "another composition has another cache"


def test_the_longest_common_beginning_decides(warmth: Warmth) -> None:
    warmth.sent(route(FR, messages=chat("system")), "one")
    warmth.sent(route(FR, messages=chat("system", "a", "b")), "two")
    resident = {"one": [FR], "two": [FR]}
    assert warmth.rank(route(FR, messages=chat("system", "a", "b", "c")), IDLE, resident)[0] == ["two"]
    assert warmth.rank(route(FR, messages=chat("system", "z")), IDLE, resident)[0] == ["one", "two"]


@pytest.mark.parametrize(
    ("shorter", "longer"),
    [
        ({"prompt": "a" * 300}, {"prompt": "a" * 300 + "b" * 300}),
        ({"prompt": [1] * 64}, {"prompt": [1] * 64 + [2] * 64}),
        ({"input": "a" * 256}, {"input": "a" * 512}),
        ({"messages": chat("a")}, {"messages": chat("a", "b")}),
    ],
)
def test_a_beginning_has_the_keys_of_the_whole(shorter: dict[str, object], longer: dict[str, object]) -> None:
    first, second = route(FR, **shorter).prefix, route(FR, **longer).prefix
    assert first
    assert second[: len(first)] == first
    assert len(second) > len(first)


@pytest.mark.parametrize("body", [{}, {"prompt": []}, {"prompt": None}, {"messages": 3}, {"prompt": "a" * 10**6}])
def test_any_body_has_a_route(body: dict[str, object]) -> None:
    assert len(route(FR, **body).prefix) <= 64


def test_weights_make_no_groups() -> None:
    assert route(f"{FR}*0.5").group == route(FR).group != route(f"{FR}+{DE}").group


def test_what_is_remembered_is_bounded(warmth: Warmth, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("act_serve.server.warmth._MAX_KEYS", 10)
    for n in range(30):
        warmth.sent(route(FR, messages=chat(str(n))), "one")
    assert len(warmth._prefixes) == 10
