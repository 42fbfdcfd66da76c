"""Changes to a store: each is seen by every reader, undone by none, and never half done."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from act_serve.abilities.catalogue import Catalogue, CatalogueView, summary
from act_serve.abilities.changes import activate, add, incoming, pin, remove, sweep
from act_serve.abilities.desired_state import STATE_FILE, AbilityState, DesiredState, locked, read_state, write_state
from act_serve.abilities.store import Store
from act_serve.delta.composition import WeightedAbility
from act_serve.delta.manifest import MANIFEST_FILE, Manifest, dump_manifest, read_manifest
from act_serve.errors import (
    ArtifactDamagedError,
    BaseMismatchError,
    ExistsError,
    RequestError,
    StoreError,
    UnknownAbilityError,
)
from tests.abilities.manifests import manifest, publish


@pytest.fixture
def store(tmp_path: Path) -> Store:
    for version in (1, 2, 3):
        publish(tmp_path, "fr", version)
    publish(tmp_path, "math")
    return Store(tmp_path)


def view_of(store: Store) -> CatalogueView:
    return Catalogue(store).refresh()


def add_new(store: Store, ability: str, version: int, **options: Any) -> Manifest:
    with incoming(store) as folder:
        (folder / MANIFEST_FILE).write_text(dump_manifest(manifest(ability, version)))
        return add(store, folder, read_manifest, **options)


def hidden(store: Store) -> list[str]:
    return [entry for entry in os.listdir(store.root) if entry.startswith((".incoming", ".gone", f".{STATE_FILE}"))]


def test_an_activated_version_is_what_requests_get_until_another_one_is(store: Store) -> None:
    activate(store, "fr", 1)
    assert view_of(store).pin(WeightedAbility("fr")).version == store.active("fr") == 1
    assert view_of(store).pin(WeightedAbility("fr", 3)).version == 3
    assert store.manifest("fr").version == 1
    add_new(store, "fr", 4)
    assert store.active("fr") == 1, "publishing must not undo a roll-back"
    add_new(store, "fr", 5, activate=True)
    assert view_of(store).ability("fr").active.version == store.active("fr") == 5


def test_a_watching_catalogue_follows_the_state(store: Store) -> None:
    catalogue = Catalogue(store)
    before = catalogue.refresh()
    activate(store, "fr", 2)
    pin(store, "fr", True)
    assert catalogue.refresh().ability("fr").active.version == 2
    assert summary(catalogue.view.ability("fr"))["pinned"] is True
    assert before.pin(WeightedAbility("fr")).version == 3, "a request in flight keeps the view that it began with"


def test_a_removed_version_is_not_served_and_its_files_stay_until_it_has_drained(store: Store) -> None:
    assert remove(store, "fr", 2) == [2]
    entry = view_of(store).ability("fr")
    assert [version.version for version in entry.versions] == [1, 3]
    assert summary(entry)["draining"] == [2]
    assert store.manifest("fr", 2).version == 2, "an engine may still have to load it for a request in flight"
    with pytest.raises(ExistsError, match="being removed"):
        add_new(store, "fr", 2)
    sweep(store, 60)
    assert store.versions("fr") == [1, 2, 3]
    sweep(store, 0)
    assert store.versions("fr") == [1, 3]
    assert read_state(store.root) == DesiredState()
    add_new(store, "fr", 2)
    assert store.versions("fr") == [1, 2, 3]
    assert hidden(store) == []


def test_the_active_version_goes_only_with_the_whole_ability(store: Store) -> None:
    with pytest.raises(ExistsError, match="activate another"):
        remove(store, "fr", 3)
    activate(store, "fr", 1)
    with pytest.raises(ExistsError, match="activate another"):
        remove(store, "fr", 1)
    remove(store, "fr", 3)
    assert remove(store, "fr") == [1, 2]
    assert remove(store, "math", 1) == [1]
    assert view_of(store).entries == {}
    with pytest.raises(UnknownAbilityError):
        remove(store, "fr")
    with pytest.raises(UnknownAbilityError):
        store.active("fr")
    sweep(store, 0)
    assert store.names() == []
    assert read_state(store.root) == DesiredState()


def test_an_active_version_whose_files_are_gone_is_damaged_and_not_another_one(store: Store) -> None:
    activate(store, "fr", 1)
    (store.path("fr", 1) / MANIFEST_FILE).unlink()
    with pytest.raises(ArtifactDamagedError, match="files are gone"):
        view_of(store).pin(WeightedAbility("fr"))
    with pytest.raises(UnknownAbilityError):
        store.manifest("fr")


@pytest.mark.parametrize(("name", "version"), [("fr", 9), ("none", 1)])
def test_what_is_not_there_cannot_be_activated_pinned_or_removed(store: Store, name: str, version: int) -> None:
    with pytest.raises(UnknownAbilityError, match=r"has no version 9; it has 1, 2, 3|no ability 'none'"):
        activate(store, name, version)
    with pytest.raises(UnknownAbilityError):
        remove(store, name, version)
    with pytest.raises(UnknownAbilityError):
        pin(store, "none", True)
    assert not (store.root / STATE_FILE).exists()


def test_a_damaged_version_is_not_activated(store: Store) -> None:
    (store.path("fr", 1) / MANIFEST_FILE).write_text("{")
    with pytest.raises(ArtifactDamagedError):
        activate(store, "fr", 1)


@pytest.mark.parametrize("error", [BaseMismatchError("other base"), ArtifactDamagedError("torn"), KeyboardInterrupt()])
def test_nothing_is_left_of_an_ability_that_is_refused(store: Store, error: BaseException) -> None:
    def refuse(folder: Path) -> Manifest:
        raise error

    with pytest.raises(type(error)), incoming(store) as folder:
        add(store, folder, refuse)
    assert hidden(store) == []
    assert store.names() == ["fr", "math"]


def test_a_version_that_exists_and_another_name_are_refused(store: Store) -> None:
    with pytest.raises(ExistsError, match="has a version 1"):
        add_new(store, "math", 1)
    with pytest.raises(RequestError, match="not 'fr'"):
        add_new(store, "de", 1, name="fr")
    assert hidden(store) == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"abilities": {"fr": {"active": 0}}}', '{"abilities": {"../x": {}}}'])
def test_a_damaged_state_stops_the_catalogue_where_it_was(store: Store, text: str) -> None:
    catalogue = Catalogue(store)
    activate(store, "fr", 1)
    catalogue.refresh()
    (store.root / STATE_FILE).write_text(text)
    with pytest.raises(StoreError, match=STATE_FILE):
        catalogue.refresh()
    assert catalogue.view.pin(WeightedAbility("fr")).version == 1


def test_a_write_that_fails_leaves_the_former_state(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    activate(store, "fr", 1)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left"):
        activate(store, "fr", 2)
    assert store.active("fr") == 1
    assert hidden(store) == []


def test_writers_in_threads_and_processes_lose_nothing(tmp_path: Path) -> None:
    names = [f"a{n}" for n in range(24)]
    for name in names:
        publish(tmp_path, name)
    program = (
        "import sys; from pathlib import Path\n"
        "from act_serve.abilities.changes import pin; from act_serve.abilities.store import Store\n"
        "for name in sys.argv[2:]: pin(Store(Path(sys.argv[1])), name, True)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    others = [subprocess.Popen([*command, *names[start:16:2]]) for start in (0, 1)]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda name: pin(Store(tmp_path), name, True), names[16:]))
    assert [other.wait() for other in others] == [0, 0]
    assert read_state(tmp_path) == DesiredState(abilities=dict.fromkeys(names, AbilityState(pinned=True)))


def test_of_many_that_add_the_same_version_one_succeeds(tmp_path: Path) -> None:
    def attempt(_: int) -> bool:
        try:
            add_new(Store(tmp_path), "fr", 1)
        except ExistsError:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(attempt, range(16))) == 1
    assert hidden(Store(tmp_path)) == []


def test_what_a_dead_process_left_is_swept_once_it_is_old(store: Store) -> None:
    for name in (".incoming-old", ".incoming-new", ".gone-fr-1-1"):
        (store.root / name).mkdir()
    os.utime(store.root / ".incoming-old", (1, 1))
    sweep(store, 60)
    assert hidden(store) == [".incoming-new"]


def test_the_state_is_written_under_the_lock_and_read_back(tmp_path: Path) -> None:
    state = DesiredState(abilities={"fr": AbilityState(active=3, pinned=True, removed={2: 5.0})})
    with locked(tmp_path):
        write_state(tmp_path, state)
    assert read_state(tmp_path) == state
