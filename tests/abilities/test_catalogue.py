from __future__ import annotations

import os
from pathlib import Path

import pytest

from act_serve.abilities.catalogue import Catalogue, CatalogueView, offer, summary
from act_serve.abilities.store import Store
from act_serve.delta.composition import WeightedAbility
from act_serve.delta.manifest import MANIFEST_FILE
from act_serve.errors import ArtifactDamagedError, StoreError, UnknownAbilityError
from tests.abilities.manifests import publish


def view_of(root: Path) -> CatalogueView:
    return Catalogue(Store(root)).refresh()


def test_a_missing_store_is_empty(tmp_path: Path) -> None:
    assert view_of(tmp_path / "none").entries == {}


def test_the_latest_version_is_active_and_all_are_listed(tmp_path: Path) -> None:
    for version in (1, 2, 10):
        publish(tmp_path, "fr", version)
    entry = view_of(tmp_path).ability("fr")
    assert entry.active.version == 10
    assert [v.version for v in entry.versions] == [1, 2, 10]
    assert summary(entry)["versions"] == [1, 2, 10]


def test_pin_fills_in_version_and_content(tmp_path: Path) -> None:
    first, second = publish(tmp_path, "fr", 1), publish(tmp_path, "fr", 2)
    view = view_of(tmp_path)
    assert view.pin(WeightedAbility("fr", weight=0.5)) == WeightedAbility("fr", 2, second.digest, 0.5)
    assert view.pin(WeightedAbility("fr", 1)) == WeightedAbility("fr", 1, first.digest, 1.0)


def test_pin_refuses_another_content_under_the_same_version(tmp_path: Path) -> None:
    publish(tmp_path, "fr")
    with pytest.raises(UnknownAbilityError, match="has the content"):
        view_of(tmp_path).pin(WeightedAbility("fr", 1, "f" * 12))


def test_an_unknown_ability_is_answered_with_near_names(tmp_path: Path) -> None:
    publish(tmp_path, "french")
    with pytest.raises(UnknownAbilityError, match="did you mean 'french'"):
        view_of(tmp_path).ability("frensh")


def test_an_unknown_version_is_answered_with_those_there_are(tmp_path: Path) -> None:
    publish(tmp_path, "fr", 3)
    with pytest.raises(UnknownAbilityError, match=r"no version 4 .* it has 3"):
        view_of(tmp_path).pin(WeightedAbility("fr", 4))


@pytest.mark.parametrize("damage", ["{", "", '{"schema_version": 1}', "null", "\x00"])
def test_a_damaged_manifest_is_listed_and_hides_nothing_else(tmp_path: Path, damage: str) -> None:
    publish(tmp_path, "good")
    publish(tmp_path, "bad")
    (tmp_path / "bad" / "1" / MANIFEST_FILE).write_text(damage)
    view = view_of(tmp_path)
    assert [m.name for m in view.manifests()] == ["good"]
    assert summary(view.ability("bad"))["status"] == "damaged"
    with pytest.raises(ArtifactDamagedError, match="'bad' version 1 is damaged"):
        view.pin(WeightedAbility("bad"))


def test_a_damaged_latest_version_leaves_the_others_usable(tmp_path: Path) -> None:
    publish(tmp_path, "fr", 1)
    publish(tmp_path, "fr", 2)
    (tmp_path / "fr" / "2" / MANIFEST_FILE).write_text("{")
    view = view_of(tmp_path)
    with pytest.raises(ArtifactDamagedError, match="in order: 1"):
        view.pin(WeightedAbility("fr"))
    assert view.pin(WeightedAbility("fr", 1)).version == 1


def test_a_manifest_in_the_wrong_folder_is_damaged(tmp_path: Path) -> None:
    publish(tmp_path, "fr")
    (tmp_path / "fr").rename(tmp_path / "de")
    assert summary(view_of(tmp_path).ability("de"))["status"] == "damaged"


def test_refresh_sees_new_changed_and_removed_abilities(tmp_path: Path) -> None:
    catalogue = Catalogue(Store(tmp_path))
    publish(tmp_path, "fr")
    publish(tmp_path, "de")
    assert set(catalogue.refresh().entries) == {"fr", "de"}
    publish(tmp_path, "fr", 2)
    (tmp_path / "de" / "1" / MANIFEST_FILE).unlink()
    former = catalogue.view
    assert {name: e.active.version for name, e in catalogue.refresh().entries.items()} == {"fr": 2}
    assert set(former.entries) == {"fr", "de"}, "a view must not change under a request"


def test_a_store_that_is_gone_hides_nothing_and_says_since_when(tmp_path: Path) -> None:
    root, away = tmp_path / "store", tmp_path / "away"
    publish(root, "fr")
    catalogue = Catalogue(Store(root))
    before = catalogue.refresh()
    assert catalogue.stale_s is None
    root.rename(away)
    for _ in range(2):
        with pytest.raises(StoreError, match="is not there; put it back"):
            catalogue.refresh()
    assert catalogue.view is before
    assert catalogue.stale_s is not None
    with pytest.raises(StoreError, match="is not there"):
        Store(root).manifest("fr", 1)
    with pytest.raises(StoreError, match="is not there"):
        Store(root).fetch("fr", 1)
    away.rename(root)
    assert catalogue.refresh().ability("fr") == before.ability("fr")
    assert catalogue.stale_s is None


def test_refresh_reads_only_what_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b", "c"):
        publish(tmp_path, name)
    catalogue = Catalogue(Store(tmp_path))
    catalogue.refresh()
    read: list[str] = []
    original = Store.manifest

    def spy(self: Store, name: str, version: int | None = None) -> object:
        read.append(name)
        return original(self, name, version)

    monkeypatch.setattr(Store, "manifest", spy)
    catalogue.refresh()
    assert read == []
    path = tmp_path / "b" / "1" / MANIFEST_FILE
    os.utime(path, ns=(1, 1))
    catalogue.refresh()
    assert read == ["b"]


def test_an_offer_is_near_or_whole_or_says_that_there_is_nothing() -> None:
    assert "did you mean 'maths'" in offer("math", ["fr", "maths"])
    assert offer("zzz", ["fr", "de"]) == "; it has de, fr"
    assert "and 30 more" in offer("zzz", [f"n{i:02}" for i in range(50)])
    assert offer("zzz", []) == "; it has none yet"
