"""URLs of stores: what they may name, and what is printed of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from act_serve.abilities.location import absolute, cache_limit, parse_url, shown
from act_serve.abilities.store import Store, open_store
from act_serve.errors import StoreError
from act_serve.server.config import ServerSettings

SECRET = "wJalrX/utn"
URL = f"s3://AKIA123:{SECRET.replace('/', '%2F')}@shelf/team/a"


@pytest.mark.parametrize(
    "url",
    [
        *("s3://shelf/../other", "s3://shelf/a/..", "s3://shelf/%2e%2e/other", "s3://shelf/a//b", "s3://", "s3:///a"),
        *("s3://shelf/a?x=1", "s3://shelf/a#b", "S3 shelf://a", "s3://shelf/a\\..\\b", "s3://shelf/*", "s3://k:v@/a"),
        "file:///srv/../etc",
    ],
)
def test_urls_that_lead_out_of_their_prefix_or_say_more_are_refused(url: str) -> None:
    with pytest.raises(StoreError):
        open_store(url)


def test_a_folder_stays_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_store(tmp_path) == open_store(str(tmp_path)) == open_store(f"file://{tmp_path}") == Store(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert absolute("abilities") == str(tmp_path / "abilities")
    assert absolute("s3://shelf/a") == "s3://shelf/a"
    assert ServerSettings(store=tmp_path).store == str(tmp_path)


def test_secrets_of_a_url_reach_fsspec_and_nothing_that_is_printed() -> None:
    location = parse_url(URL)
    assert location.options == {"key": "AKIA123", "secret": SECRET}
    assert location.opened == location.shown == shown(URL) == "s3://shelf/team/a"
    settings = ServerSettings(store=URL)
    for text in (repr(location), str(open_store(URL)), repr(settings), location.redacted(f"no {SECRET}! {URL}")):
        assert SECRET not in text
        assert SECRET.replace("/", "%2F") not in text


def test_a_url_without_its_password_names_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACT_SERVE_HOME", str(tmp_path))
    assert open_store(URL).root == open_store("s3://shelf/team/a").root
    assert open_store("s3://shelf/team/b").root != open_store("s3://shelf/team/a").root


def test_the_cache_limit_is_a_number_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACT_SERVE_STORE_CACHE_BYTES", "1000")
    assert cache_limit() == 1000
    monkeypatch.setenv("ACT_SERVE_STORE_CACHE_BYTES", "1 GB")
    with pytest.raises(StoreError, match="not a number of bytes"):
        cache_limit()
