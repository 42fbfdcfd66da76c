"""One meaning, one canonical text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from act_serve.delta.composition import Composition, WeightedAbility
from act_serve.errors import RequestError

names = st.from_regex(r"[a-z0-9][a-z0-9_-]{0,10}", fullmatch=True)
abilities = st.builds(
    WeightedAbility,
    name=names,
    version=st.one_of(st.none(), st.integers(1, 999)),
    weight=st.floats(-8, 8, allow_nan=False),
)
lists = st.lists(abilities, max_size=8, unique_by=lambda ability: ability.name)


@given(lists)
def test_text_and_back(some: list[WeightedAbility]) -> None:
    composition = Composition.of(some)
    assert Composition.parse(str(composition)) == composition


@given(lists, st.randoms())
def test_order_does_not_matter(some: list[WeightedAbility], random: object) -> None:
    shuffled = list(some)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert str(Composition.of(shuffled)) == str(Composition.of(some))


def test_canonical_form() -> None:
    composition = Composition.parse("math*0.50004+fr+old*0")
    assert str(composition) == "fr*1+math*0.5"
    assert Composition.parse("") == Composition()
    pinned = Composition.parse("fr@3~9f86d081884c*0.5+math@1~60303ae22b99")
    assert pinned.pinned
    assert pinned.header() == "fr@3*0.5,math@1*1"
    assert not Composition.parse("fr@3").pinned


@pytest.mark.parametrize(
    "text",
    ["fr+fr", "fr*nan", "fr*inf", "fr*1e9", "fr*-9", "Fr", "-fr", "fr@0", "fr@x", "fr*", "fr**2", "+", "fr+", "fr,math",
     "../fr", "fr/../x", "fr\n", "fr@1~abc", "a" * 65, "fr*0x10", "fr\x00", "+".join(f"a{i}" for i in range(33))],
)  # fmt: skip
def test_malformed_compositions_are_refused(text: str) -> None:
    with pytest.raises(RequestError):
        Composition.parse(text)
