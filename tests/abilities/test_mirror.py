"""Stores in an object store, on fsspec's memory file system; test_s3.py does the same on S3."""

from __future__ import annotations

import errno
import hashlib
import logging
import threading
from pathlib import Path
from typing import Any

import pytest

from act_serve.abilities.catalogue import Catalogue
from act_serve.abilities.changes import activate, add, incoming, pin, remove, sweep
from act_serve.abilities.remote import Remote
from act_serve.abilities.store import Store
from act_serve.delta.manifest import MANIFEST_FILE, TENSORS_FILE, Counts, Manifest, dump_manifest, read_manifest
from act_serve.errors import ArtifactDamagedError, ExistsError, StoreError, UnknownAbilityError
from tests.abilities.manifests import manifest
from tests.abilities.object_stores import ObjectStore, memory_url, state_of


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    return ObjectStore(memory_url(), tmp_path, monkeypatch)


def content(name: str, version: int, size: int = 1000) -> bytes:
    return f"{name} {version} ".encode().ljust(size, b".")


def publish(store: Store, name: str, version: int = 1, size: int = 1000, **options: Any) -> Manifest:
    data = content(name, version, size)
    counts = Counts(channels=1, parameters=1, bytes=size)
    made = manifest(name, version, counts=counts, tensors_sha256=hashlib.sha256(data).hexdigest())
    with incoming(store) as folder:
        (folder / TENSORS_FILE).write_bytes(data)
        (folder / MANIFEST_FILE).write_text(dump_manifest(made))
        return add(store, folder, read_manifest, **options)


def blobs(store: Store) -> list[Path]:
    return [path for path in (store.root / ".blobs").glob("*") if not path.name.endswith(".lock")]


def break_down(monkeypatch: pytest.MonkeyPatch, *methods: str) -> None:
    """The file system refuses what these methods of it do."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("no route to the store")

    from fsspec.implementations.memory import MemoryFileSystem

    for method in methods:
        monkeypatch.setattr(MemoryFileSystem, method, refuse)


def test_what_one_machine_publishes_another_one_has(remote: ObjectStore) -> None:
    one, two = remote.machine("one"), remote.machine("two")
    catalogue = Catalogue(two)
    assert catalogue.refresh().entries == {}
    publish(one, "fr")
    publish(one, "fr", 2)
    assert remote.objects() == [f"fr/{v}/{file}" for v in (1, 2) for file in (MANIFEST_FILE, TENSORS_FILE)]
    assert catalogue.refresh().ability("fr").active.version == 2
    assert not (two.path("fr", 2) / TENSORS_FILE).exists(), "tensors come when they are used"
    assert (two.fetch("fr", 2) / TENSORS_FILE).read_bytes() == content("fr", 2)
    assert two.fetch("fr", 2) == two.path("fr", 2) == two.root / "fr" / "2"
    assert sorted(path.name for path in one.root.iterdir() if not path.name.startswith(".")) == ["fr"]


def test_a_fresh_store_reads_itself(remote: ObjectStore) -> None:
    publish(remote.machine("one"), "fr", 3)
    store = remote.machine("two")
    assert (store.names(), store.active("fr")) == (["fr"], 3)
    assert store.manifest("fr").version == 3
    publish(remote.machine("one"), "fr", 4)
    assert store.manifest("fr", 4).version == 4, "a version that a router elsewhere knows already"
    with pytest.raises(UnknownAbilityError):
        store.manifest("fr", 5)


def test_changes_are_written_back(remote: ObjectStore) -> None:
    one, two = remote.machine("one"), remote.machine("two")
    for version in (1, 2, 3):
        publish(one, "fr", version)
    activate(two, "fr", 1)
    pin(two, "fr", True)
    assert state_of(remote)["fr"] == {"active": 1, "pinned": True, "removed": {}}
    entry = Catalogue(one).refresh().ability("fr")
    assert (entry.active.version, entry.wanted.pinned) == (1, True)
    assert remove(one, "fr", 2) == [2]
    assert [v.version for v in Catalogue(two).refresh().ability("fr").versions] == [1, 3]
    assert "fr/2/ability.json" in remote.objects(), "its files stay until it has drained"
    sweep(two, 0)
    assert not [key for key in remote.objects() if key.startswith("fr/2/")]
    Catalogue(one).refresh()
    assert not one.path("fr", 2).exists()
    assert "2" not in str(state_of(remote)["fr"]["removed"])


def test_changes_of_several_machines_at_once_are_all_there_at_the_end(remote: ObjectStore) -> None:
    names = [f"a{number}" for number in range(6)]
    for name in names:
        publish(remote.machine("one"), name)
    machines = [remote.machine(name) for name in names]
    threads = [threading.Thread(target=pin, args=(m, n, True)) for m, n in zip(machines, names, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(state_of(remote)) == names
    assert ".state.lock" not in remote.objects()


def test_a_lock_that_a_dead_process_left_is_broken_when_its_time_is_over(remote: ObjectStore) -> None:
    store = remote.machine()
    remote.put(".state.lock", b'{"by": "someone", "until": 1}')
    publish(store, "fr")
    assert ".state.lock" not in remote.objects()


def test_a_version_is_published_once(remote: ObjectStore) -> None:
    publish(remote.machine("one"), "fr")
    with pytest.raises(ExistsError):
        publish(remote.machine("two"), "fr", size=2000)
    assert remote.get(f"fr/1/{TENSORS_FILE}") == content("fr", 1)


def test_a_half_uploaded_ability_is_never_visible(remote: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store = remote.machine("one")
    publish(store, "math")
    with monkeypatch.context() as broken:
        create = Remote.create
        broken.setattr(Remote, "create", lambda self, key, data: create(self, key, data) if "lock" in key else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            publish(store, "fr")
    assert f"fr/1/{TENSORS_FILE}" in remote.objects()
    assert "fr" not in Catalogue(remote.machine("two")).refresh().entries
    assert "fr" not in Catalogue(store).refresh().entries
    publish(store, "fr")
    assert "fr" in Catalogue(remote.machine("two")).refresh().entries


@pytest.mark.parametrize("damage", [content("xx", 1), content("fr", 1)[:-1], content("fr", 1) + b".", None])
def test_damaged_tensors_are_refused_and_never_cached(remote: ObjectStore, damage: bytes | None) -> None:
    publish(remote.machine("one"), "fr")
    key = f"fr/1/{TENSORS_FILE}"
    if damage is None:
        remote.files.rm_file(f"{remote.root}/{key}")
    else:
        remote.put(key, damage)
    store = remote.machine("two")
    assert store.manifest("fr").version == 1
    with pytest.raises(ArtifactDamagedError, match="fr@1"):
        store.fetch("fr", 1)
    assert blobs(store) == []
    assert not (store.path("fr", 1) / TENSORS_FILE).exists()
    remote.put(key, content("fr", 1))
    store.refresh()
    assert (store.fetch("fr", 1) / TENSORS_FILE).read_bytes() == content("fr", 1)


def test_a_full_disk_is_an_error_of_the_store(remote: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(remote.machine("one"), "fr")
    store = remote.machine("two")
    assert store.versions("fr") == [1]

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("act_serve.abilities.mirror.tempfile.mkstemp", full)
    monkeypatch.setattr("act_serve.abilities.mirror.Mirror._evict", full)
    with pytest.raises(StoreError, match="No space left on device"):
        store.fetch("fr", 1)


def test_a_damaged_manifest_is_listed_as_such_and_hides_nothing(remote: ObjectStore) -> None:
    store = remote.machine("one")
    publish(store, "fr")
    publish(store, "math")
    remote.put(f"fr/1/{MANIFEST_FILE}", b"{")
    view = Catalogue(remote.machine("two")).refresh()
    assert "not a valid" in str(view.ability("fr").active.damage)
    assert view.ability("math").active.manifest


def test_keys_that_are_no_ability_reach_no_disk(remote: ObjectStore, tmp_path: Path) -> None:
    store = remote.machine()
    publish(store, "fr")
    for key in ("fr/1/../../../escaped", "fr/1/run.py", ".blobs/x", "fr/01/ability.json", "FR/1/ability.json", "x"):
        remote.put(key, b"{}")
    store.refresh()
    assert store.names() == ["fr"]
    there = {str(path.relative_to(store.root)) for path in store.root.rglob("*") if path.is_file()}
    assert {path for path in there if not path.startswith((".blobs/", ".mirror", ".index", ".state"))} == {
        f"fr/1/{MANIFEST_FILE}"
    }
    assert not list(tmp_path.rglob("escaped"))


def test_a_store_that_is_down_degrades_to_what_is_cached_and_says_so(
    remote: ObjectStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    publish(remote.machine("one"), "fr")
    publish(remote.machine("one"), "math")
    store = remote.machine("two")
    catalogue = Catalogue(store)
    catalogue.refresh()
    store.fetch("fr", 1)
    assert catalogue.stale_s is None
    with monkeypatch.context() as broken:
        break_down(broken, "find", "cat_file", "get_file", "pipe_file")
        for _ in range(3):
            assert sorted(catalogue.refresh().entries) == ["fr", "math"]
        assert (store.fetch("fr", 1) / TENSORS_FILE).is_file()
        with pytest.raises(StoreError, match="no route"):
            store.fetch("math", 1)
        with pytest.raises(StoreError, match="no route"):
            pin(store, "fr", True)
        assert catalogue.stale_s is not None
        # A process that starts now has what is cached, too.
        late = remote.machine("two")
        late.refresh()
        assert late.names() == ["fr", "math"]
        with pytest.raises(StoreError, match="no route"):
            remote.machine("three").names()
    said = [record.getMessage() for record in caplog.records if "serving what is cached" in record.getMessage()]
    assert len([line for line in said if "no route" in line]) == 2, "once for each process"
    catalogue.refresh()
    assert catalogue.stale_s is None
    assert "can be read again" in caplog.text


def test_the_cache_obeys_its_limit_and_keeps_what_is_active(
    remote: ObjectStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one = remote.machine("one")
    for version in (1, 2, 3, 4):
        publish(one, "fr", version)
    activate(one, "fr", 1)
    monkeypatch.setenv("ACT_SERVE_STORE_CACHE_BYTES", "2500")
    store = remote.machine("two")
    for version in (1, 2, 3, 4):
        assert (store.fetch("fr", version) / TENSORS_FILE).is_file()
    kept = [v for v in (1, 2, 3, 4) if (store.path("fr", v) / TENSORS_FILE).exists()]
    assert kept == [1, 4], "the active one, and the one that was asked for last"
    assert sum(path.stat().st_size for path in blobs(store)) <= 2500
    assert (store.fetch("fr", 2) / TENSORS_FILE).read_bytes() == content("fr", 2), "what was evicted comes again"
    for name in ("math", "extract"):
        publish(one, name)
    store.refresh()
    with caplog.at_level(logging.WARNING):
        for name in ("math", "extract"):
            store.fetch(name, 1)
    assert "more than the cache's limit" in caplog.text
    assert (store.path("fr", 1) / TENSORS_FILE).exists()


def test_equal_tensors_are_downloaded_once_and_by_one_thread(
    remote: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(remote.machine("one"), "fr")
    stores = [remote.machine("two") for _ in range(4)]
    stores[0].refresh()
    downloads: list[str] = []
    download = Remote.download
    monkeypatch.setattr(Remote, "download", lambda self, key, path: (downloads.append(key), download(self, key, path)))
    threads = [threading.Thread(target=store.fetch, args=("fr", 1)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert downloads == [f"fr/1/{TENSORS_FILE}"]


def test_only_new_manifests_are_read(remote: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    one = remote.machine("one")
    for name in ("fr", "math"):
        publish(one, name)
    store = remote.machine("two")
    store.refresh()
    asked: list[str] = []
    read = Remote.read
    monkeypatch.setattr(Remote, "read", lambda self, keys: (asked.extend(keys), read(self, keys))[1])
    store.refresh()
    remote.machine("two").refresh()
    assert asked == []
    publish(one, "extract")
    asked.clear()
    store.refresh()
    assert asked == [f"extract/1/{MANIFEST_FILE}"]
