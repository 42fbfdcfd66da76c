"""The keys file and the rates, without a server; tests/server/test_router_keys.py has the rest."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

import pytest

from act_serve.errors import AuthenticationError, PermissionDeniedError, ProfileError, RateLimitError
from act_serve.server import keys as keys_module
from act_serve.server.config import read_settings
from act_serve.server.keys import Keys, TokenBucket
from act_serve.server.keys_file import new_key, read_keys_file

A, B = (hashlib.sha256(text.encode()).hexdigest() for text in ("a", "b"))
ONE = f"- {{id: a, sha256: {A}, roles: [infer]}}\n"


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_keys_file_is_yaml_or_json(tmp_path: Path) -> None:
    yaml = write(tmp_path / "y", f"# ours\n- id: a\n  sha256: {A}\n  roles: [admin]\n  abilities: [fr]\n  burst: 2\n"
                 "  requests_per_minute: 1\n")  # fmt: skip
    json = write(tmp_path / "j", f'[{{"id": "a", "sha256": "{A}", "roles": ["admin"], "abilities": ["fr"], '
                 '"burst": 2, "requests_per_minute": 1}]')  # fmt: skip
    assert read_keys_file(yaml) == read_keys_file(json)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "a list with an entry"),
        ("[]", "a list with an entry"),
        ("keys: []", "a list with an entry"),
        ("- a", "entry 1: "),
        ("- {", ":1: the keys file is not valid YAML"),
        ("\x00", "not valid YAML"),
        ("- 2026-99-99", "not valid YAML"),
        ("- " + "[" * 100_000, "not valid YAML"),
        (f"- {{id: a, sha256: {A}}}", "entry 1, roles"),
        (f"- {{id: a, sha256: {A}, roles: []}}", "entry 1, roles"),
        (f"- {{id: a, sha256: {A}, roles: [root]}}", "entry 1, roles"),
        (f"- {{id: a b, sha256: {A}, roles: [infer]}}", "entry 1, id"),
        (f"- {{id: a, sha256: {A.upper()}, roles: [infer]}}", "entry 1, sha256"),
        (f"- {{id: a, sha256: {A[:-1]}, roles: [infer]}}", "entry 1, sha256"),
        (f"- {{id: a, sha256: {A}, roles: [infer], abilities: }}", "entry 1, abilities: is empty"),
        (f"- {{id: a, sha256: {A}, roles: [infer], abilities: fr}}", "entry 1, abilities"),
        (f"- {{id: a, sha256: {A}, roles: [infer], abilities: ['*']}}", "entry 1, abilities"),
        (f"- {{id: a, sha256: {A}, roles: [infer], burst: 2}}", "burst needs requests_per_minute"),
        (f"- {{id: a, sha256: {A}, roles: [infer], requests_per_minute: 0}}", "entry 1, requests_per_minute"),
        (f"- {{id: a, sha256: {A}, roles: [infer], requests_per_minute: .inf}}", "entry 1, requests_per_minute"),
        (f"- {{id: a, sha256: {A}, roles: [infer], rate: 1}}", "entry 1, rate"),
        (f"- id: a\n  sha256: {A}\n  roles: [infer]\n  roles: [admin]", ":4: a field stands twice in one entry"),
        (ONE + f"- {{id: a, sha256: {B}, roles: [infer]}}", "the same id"),
        (ONE + f"- {{id: b, sha256: {A}, roles: [infer]}}", "the same sha256"),
        (ONE + "#" * (1 << 20), "at most"),
    ],
    ids=lambda text: text[:60],
)
def test_a_wrong_keys_file_is_explained_and_not_quoted(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ProfileError) as caught:
        Keys(write(tmp_path / "keys.yaml", text))
    assert said in str(caught.value)
    assert A[:12] not in str(caught.value)


def test_a_key_in_the_place_of_a_fields_name_is_not_shown(tmp_path: Path) -> None:
    key, _ = new_key()
    with pytest.raises(ProfileError) as caught:
        Keys(write(tmp_path / "keys.yaml", f"{ONE}- {{id: b, sha256: {B}, roles: [infer], {key}: x}}"))
    assert key[:30] not in str(caught.value)


@pytest.mark.parametrize("presented", ["a", "b", "c", "", "é", "\udcff"])
def test_every_key_is_compared_whichever_is_presented(
    tmp_path: Path, presented: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = []

    def compare(left: bytes, right: bytes) -> bool:
        compared.append(left)
        return hmac_compare(left, right)

    hmac_compare = hmac.compare_digest
    keys = Keys(write(tmp_path / "keys.yaml", ONE + f"- {{id: b, sha256: {B}, roles: [admin]}}"))
    monkeypatch.setattr(keys_module.hmac, "compare_digest", compare)
    if presented in ("a", "b"):
        assert keys.check(bearer(presented), None).id == presented
    else:
        with pytest.raises(AuthenticationError):
            keys.check(bearer(presented), None)
    assert compared == ([bytes.fromhex(A), bytes.fromhex(B)] if presented else [])


def test_an_open_server_lets_everybody_ask_and_nobody_change() -> None:
    keys = Keys()
    assert keys.check({}, "infer").may_use("anything")
    assert not keys.has_admin
    with pytest.raises(PermissionDeniedError):
        keys.check(bearer("a"), "admin")


def test_admin_exists_only_while_a_key_has_the_role(tmp_path: Path) -> None:
    keys = Keys(path := write(tmp_path / "keys.yaml", ONE))
    assert not keys.has_admin
    write(path, f"- {{id: root, sha256: {B}, roles: [admin]}}")
    keys.refresh()
    assert keys.has_admin
    assert keys.check(bearer("b"), "admin").id == "root"
    with pytest.raises(PermissionDeniedError, match="'infer'"):
        keys.check(bearer("b"), "infer")


def test_a_bucket_lets_the_burst_pass_and_then_the_rate() -> None:
    bucket = TokenBucket(per_minute=6, burst=3, clock=(clock := Clock()))
    assert [bucket.take() for _ in range(4)] == [0, 0, 0, 10]
    passed = 0
    for _ in range(600):
        clock.now += 1
        passed += bucket.take() == 0
    assert passed == 60
    clock.now += 1e6
    assert [bucket.take() == 0 for _ in range(4)] == [True, True, True, False]


def test_reading_the_file_again_gives_no_new_allowance_but_another_rate_does(tmp_path: Path) -> None:
    def entry(rate: str, more: str = "") -> str:
        return f"- {{id: a, sha256: {A}, roles: [infer], requests_per_minute: {rate}}}\n{more}"

    keys = Keys(path := write(tmp_path / "keys.yaml", entry("1")), Clock())
    keys.check(bearer("a"), None)
    write(path, entry("1", f"- {{id: b, sha256: {B}, roles: [infer]}}"))
    keys.refresh()
    assert keys.check(bearer("b"), None).id == "b"
    with pytest.raises(RateLimitError) as caught:
        keys.check(bearer("a"), None)
    assert caught.value.retry_after_s == 60
    write(path, entry("2.5"))
    keys.refresh()
    assert [keys.check(bearer("a"), None).id for _ in range(3)] == ["a", "a", "a"], (
        "the burst is a minute's, rounded up"
    )
    with pytest.raises(RateLimitError):
        keys.check(bearer("a"), None)


def test_a_refused_role_takes_nothing_from_the_allowance(tmp_path: Path) -> None:
    text = f"- {{id: a, sha256: {A}, roles: [infer], requests_per_minute: 1}}"
    keys = Keys(write(tmp_path / "keys.yaml", text), Clock())
    for _ in range(3):
        with pytest.raises(PermissionDeniedError):
            keys.check(bearer("a"), "admin")
    assert keys.check(bearer("a"), "infer").id == "a"


def test_the_engines_own_key_is_not_a_setting() -> None:
    with pytest.raises(ProfileError, match="use the setting keys"):
        read_settings({"engine_args": {"api_key": "x"}})
