from __future__ import annotations

import json
from typing import Any

import pytest

from act_serve.abilities.catalogue import AbilityEntry, CatalogueView, VersionEntry
from act_serve.abilities.language import Guess
from act_serve.abilities.resolve import Policy, Resolution, resolve
from act_serve.errors import ArtifactDamagedError, RequestError, UnknownAbilityError
from tests.abilities.manifests import manifest

_MANIFESTS = [
    manifest("fr", 1, kind="language", languages=("fr",)),
    manifest("fr", 2, kind="language", languages=("fr",)),
    manifest("math", 1, kind="skill"),
]
FR1, FR2, MATH = (f"{m.name}@{m.version}~{m.digest}" for m in _MANIFESTS)
VIEW = CatalogueView(
    {
        "fr": AbilityEntry("fr", tuple(VersionEntry(m.version, m) for m in _MANIFESTS[:2])),
        "math": AbilityEntry("math", (VersionEntry(1, _MANIFESTS[2]),)),
        "torn": AbilityEntry("torn", (VersionEntry(1, None, "half a file"),)),
    }
)
POLICY = Policy("base")


def run(body: dict[str, Any], policy: Policy = POLICY, language: str = "fr", confidence: float = 0.9) -> Resolution:
    return resolve(body, view=VIEW, policy=policy, identify=lambda _: Guess(language, confidence))


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({}, ""),
        ({"model": "base"}, ""),
        ({"model": None, "abilities": None}, ""),
        ({"abilities": []}, ""),
        ({"abilities": "none"}, ""),
        ({"abilities": ["fr"]}, f"{FR2}*1"),
        ({"abilities": ["math", "fr"]}, f"{FR2}*1+{MATH}*1"),
        ({"abilities": [{"name": "fr"}]}, f"{FR2}*1"),
        ({"abilities": [{"name": "fr", "weight": 0.5, "version": 1}]}, f"{FR1}*0.5"),
        ({"abilities": [{"name": "fr", "weight": 2}, "math"]}, f"{FR2}*2+{MATH}*1"),
        ({"abilities": [{"name": "fr", "weight": 0}, "math"]}, f"{MATH}*1"),
        ({"abilities": [{"name": "fr", "weight": 0.30000000004}]}, f"{FR2}*0.3"),
        ({"abilities": [{"name": "fr", "scale": 0.5}]}, f"{FR2}*0.5"),
        ({"merged_adapters": {"ids": ["math", "fr"]}}, f"{FR2}*1+{MATH}*1"),
        ({"merged_adapters": {"ids": ["fr"], "weights": [], "merge_strategy": None, "density": 0.0}}, f"{FR2}*1"),
        (
            {"merged_adapters": {"ids": ["fr", "math"], "weights": [2, 0.5], "merge_strategy": "linear"}},
            f"{FR2}*2+{MATH}*0.5",
        ),
        ({"language": "fr"}, f"{FR2}*1"),
        ({"language": "fr-CA"}, f"{FR2}*1"),
        ({"skill": "math"}, f"{MATH}*1"),
        ({"language": "fr", "skill": "math"}, f"{FR2}*1+{MATH}*1"),
        ({"model": "base:fr"}, f"{FR2}*1"),
        ({"model": "base:fr+math*0.5"}, f"{FR2}*1+{MATH}*0.5"),
        ({"model": f"base:{FR1}*1"}, f"{FR1}*1"),
        ({"model": "base:none"}, ""),
        ({"model": "base:"}, ""),
    ],
)
def test_every_accepted_shape(body: dict[str, Any], text: str) -> None:
    resolution = run(body)
    assert str(resolution.composition) == text
    assert resolution.composition.pinned
    assert not resolution.auto
    assert resolution.model("base") == (f"base:{text}" if text else "base")


def test_auto_chooses_by_language_and_says_so() -> None:
    body = {"abilities": "auto", "messages": [{"role": "user", "content": "Bonjour à vous trois"}]}
    resolution = run(body)
    assert str(resolution.composition) == f"{FR2}*1"
    assert resolution.auto
    assert resolution.report()["reason"] == "the text is in the language fr (0.9); skills cannot be recognized yet"
    assert run(body, language="de").composition.abilities == ()
    assert run({**body, "abilities": None, "model": "base:auto"}).auto


@pytest.mark.parametrize(
    ("default", "text"), [("none", ""), ("auto", f"{FR2}*1"), ("math*0.5", f"{MATH}*0.5"), ("fr@1", f"{FR1}*1")]
)
def test_the_default_serves_requests_that_ask_for_nothing(default: str, text: str) -> None:
    policy = Policy("base", default)
    assert str(run({"prompt": "Bonjour"}, policy).composition) == text
    assert str(run({"prompt": "Bonjour", "abilities": []}, policy).composition) == ""


MALFORMED: list[tuple[dict[str, Any], str]] = [
    ({"abilities": "fr"}, '"abilities" is a list'),
    ({"abilities": {"name": "fr"}}, '"abilities" is a list'),
    ({"abilities": 3}, '"abilities" is a list'),
    ({"abilities": True}, '"abilities" is a list'),
    ({"abilities": [None]}, '"abilities" is a list'),
    ({"abilities": [["fr"]]}, '"abilities" is a list'),
    ({"abilities": [{"weight": 1}]}, '"abilities" is a list'),
    ({"abilities": [{"name": "fr", "strength": 1}]}, "unknown key 'strength'"),
    ({"abilities": [{"name": "fr", "scale": 1, "weight": 1}]}, 'both "weight" and "scale"'),
    ({"abilities": [{"name": "fr", "scale": "1"}]}, "must be a number"),
    ({"merged_adapters": ["fr"]}, '"merged_adapters" is an object'),
    ({"merged_adapters": {}}, '"ids" must be a list of names'),
    ({"merged_adapters": {"ids": []}}, '"ids" must be a list of names'),
    ({"merged_adapters": {"ids": ["fr", 3]}}, '"ids" must be a list of names'),
    ({"merged_adapters": {"ids": ["fr"] * 40}}, "40 ids"),
    ({"merged_adapters": {"ids": ["fr", "fr"]}}, "named twice"),
    ({"merged_adapters": {"ids": ["../x"]}}, "not an ability name"),
    ({"merged_adapters": {"ids": ["fr"], "weights": [1, 1]}}, "as many numbers as there are ids"),
    ({"merged_adapters": {"ids": ["fr"], "weights": ["1"]}}, "weight 1 must be a number"),
    ({"merged_adapters": {"ids": ["fr"], "weights": [10**400]}}, "must be a finite number"),
    ({"merged_adapters": {"ids": ["fr"], "weights": [-1]}}, "refuses negative weights"),
    ({"merged_adapters": {"ids": ["fr"], "merge_strategy": "ties"}}, "act-serve merge"),
    ({"merged_adapters": {"ids": ["fr"], "revision": "main"}}, "unknown key 'revision'"),
    ({"merged_adapters": {"ids": ["fr"]}, "abilities": ["fr"]}, "use one of them"),
    ({"merged_adapters": {"ids": ["fr"]}, "language": "fr"}, "use one of them"),
    ({"merged_adapters": {"ids": ["fr"]}, "model": "base:fr"}, "use one of them"),
    ({"abilities": [{"name": "fr", "weight": "1"}]}, "must be a number"),
    ({"abilities": [{"name": "fr", "weight": True}]}, "must be a number"),
    ({"abilities": [{"name": "fr", "weight": None}]}, "must be a number"),
    ({"abilities": [{"name": "fr", "weight": float("nan")}]}, "must be a finite number"),
    ({"abilities": [{"name": "fr", "weight": float("inf")}]}, "must be a finite number"),
    ({"abilities": [{"name": "fr", "weight": 1e9}]}, "must be a finite number"),
    ({"abilities": [{"name": "fr", "weight": 10**400}]}, "must be a finite number"),
    ({"abilities": [{"name": "fr", "weight": -1}]}, "refuses negative weights"),
    ({"abilities": [{"name": "fr", "version": 0}]}, "whole number from 1"),
    ({"abilities": [{"name": "fr", "version": "1"}]}, "whole number from 1"),
    ({"abilities": ["fr", "fr"]}, "named twice"),
    ({"abilities": ["fr", {"name": "fr", "weight": 0}]}, "named twice"),
    ({"abilities": [f"n{i}" for i in range(1000)]}, "1000 abilities"),
    ({"abilities": ["../../etc/passwd"]}, "not an ability name"),
    ({"abilities": ["fr/../math"]}, "not an ability name"),
    ({"abilities": ["fr\x00"]}, "not an ability name"),
    ({"abilities": ["fr\n"]}, "not an ability name"),
    ({"abilities": [""]}, "not an ability name"),
    ({"abilities": ["FR"]}, "not an ability name"),
    ({"abilities": ["fr@2"]}, "version and weight are fields"),
    ({"abilities": ["a" * 65]}, "not an ability name"),
    ({"abilities": ["fr*0.5"]}, "not an ability name"),
    ({"language": 3}, "BCP 47"),
    ({"skill": ["math"]}, "name of a skill"),
    ({"model": 3}, '"model" must be a string'),
    ({"model": "base:fr*nan"}, "must be a finite number"),
    ({"model": "base:fr**2"}, "cannot read"),
    ({"model": "base:fr+"}, "cannot read"),
    ({"model": "base:../x"}, "cannot read"),
    ({"model": "base:fr", "abilities": ["math"]}, "use one of them"),
    ({"model": "base:fr", "abilities": []}, "use one of them"),
    ({"model": "base:fr", "language": "fr"}, "use one of them"),
    ({"abilities": ["fr"], "language": "fr"}, "use one of them"),
    ({"abilities": ["fr"], "skill": "math"}, "use one of them"),
]


@pytest.mark.parametrize(("body", "message"), MALFORMED)
def test_malformed_requests_are_refused_with_what_to_send_instead(body: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        run(body)
    assert message in str(caught.value)
    assert caught.value.http_status == 400
    assert caught.value.param in ("abilities", "merged_adapters", "language", "skill", "model")
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"abilities": ["mathe"]}, "did you mean 'math'"),
        ({"abilities": [{"name": "fr", "version": 9}]}, "it has 1, 2"),
        ({"language": "de"}, "serves the language 'de' on this server; it has fr"),
        ({"skill": "fr"}, "no skill 'fr'"),
        ({"model": "gpt-4"}, "it serves 'base'"),
        ({"model": "base2"}, "it serves 'base'"),
        ({"model": "fr"}, "it serves 'base'"),
        ({"model": f"base:fr@1~{'f' * 12}"}, "has the content"),
    ],
)
def test_what_is_not_there_is_404_and_says_what_is(body: dict[str, Any], message: str) -> None:
    with pytest.raises(UnknownAbilityError) as caught:
        run(body)
    assert message in str(caught.value)


def test_a_damaged_ability_is_not_served() -> None:
    with pytest.raises(ArtifactDamagedError, match="half a file"):
        run({"abilities": ["torn"]})


def test_negative_weights_where_the_server_allows_them() -> None:
    resolution = run({"abilities": [{"name": "fr", "weight": -0.5}]}, Policy("base", allow_negative_weights=True))
    assert str(resolution.composition) == f"{FR2}*-0.5"


def test_a_base_name_with_a_colon() -> None:
    assert str(run({"model": "org:base:math"}, Policy("org:base")).composition) == f"{MATH}*1"
    with pytest.raises(UnknownAbilityError):
        run({"model": "org"}, Policy("org:base"))


def test_the_report_is_json_that_names_version_and_content() -> None:
    report = json.loads(json.dumps(run({"abilities": [{"name": "fr", "weight": 0.5}]}).report()))
    assert report["abilities"] == [{"name": "fr", "version": 2, "digest": _MANIFESTS[1].digest, "weight": 0.5}]
    assert report["auto"] is False
