"""What is wrong with a composition is said before the engine is touched."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path

import pytest

from act_serve.abilities.changes import activate, remove
from act_serve.abilities.store import Store
from act_serve.delta.composition import Composition
from act_serve.delta.fingerprint import fingerprint_model
from act_serve.delta.fit import ModuleShape
from act_serve.delta.manifest import TENSORS_FILE
from act_serve.engine.admission import Admission, split_model
from act_serve.errors import ArtifactDamagedError, BaseMismatchError, RequestError, StoreError, UnknownAbilityError
from tests.abilities_for_tests import bias_names, linear_shapes, outside_shapes, publish_random


@pytest.fixture
def store(tmp_path: Path, tiny_llama: Path) -> Store:
    store = Store(tmp_path / "store")
    publish_random(store, tiny_llama, "fr", seed=1)
    publish_random(store, tiny_llama, "fr", seed=2, version=2)
    return store


def modules_of(base: Path) -> dict[str, ModuleShape]:
    return {name: ModuleShape(*shape, name in bias_names(base)) for name, shape in linear_shapes(base).items()}


@pytest.fixture
def admission(store: Store, tiny_llama: Path) -> Admission:
    return Admission(store, fingerprint_model(tiny_llama), modules_of(tiny_llama))


async def test_versions_and_contents_are_pinned(admission: Admission, store: Store) -> None:
    pinned = await admission.pin(Composition.parse("fr*0.5"))
    assert str(pinned) == f"fr@2~{store.manifest('fr').digest}*0.5"
    assert (await admission.pin(Composition.parse("fr@1"))).abilities[0].version == 1
    assert await admission.pin(pinned) == pinned


async def test_while_the_store_is_away_only_what_was_verified_passes(admission: Admission, store: Store) -> None:
    digests = {version: store.manifest("fr", version).digest for version in (1, 2)}
    await admission.pin(Composition.parse("fr@1"))
    store.root.rename(store.root.with_name("away"))
    known = Composition.parse(f"fr@1~{digests[1]}*0.5")
    assert await admission.pin(known) == known
    with pytest.raises(StoreError, match="is not there"):
        await admission.pin(Composition.parse(f"fr@2~{digests[2]}"))


async def test_a_new_version_is_another_composition(admission: Admission, store: Store, tiny_llama: Path) -> None:
    before = await admission.pin(Composition.parse("fr"))
    publish_random(store, tiny_llama, "fr", seed=3, version=3)
    assert await admission.pin(Composition.parse("fr")) != before
    assert await admission.pin(before) == before


async def test_the_engine_follows_a_roll_back_and_serves_what_began_before_a_removal(
    admission: Admission, store: Store
) -> None:
    before = await admission.pin(Composition.parse("fr"))
    activate(store, "fr", 1)
    assert (await admission.pin(Composition.parse("fr"))).abilities[0].version == 1
    remove(store, "fr", 2)
    assert await admission.pin(before) == before


async def test_unknown_abilities_versions_and_contents(admission: Admission) -> None:
    for text in ("es", "fr@3", "fr@1~0123456789ab"):
        with pytest.raises(UnknownAbilityError):
            await admission.pin(Composition.parse(text))


async def test_another_base_is_refused(store: Store, tiny_qwen: Path) -> None:
    with pytest.raises(BaseMismatchError, match="Qwen2ForCausalLM"):
        await Admission(store, fingerprint_model(tiny_qwen)).pin(Composition.parse("fr"))


async def test_modules_the_engine_cannot_change_are_refused(store: Store, tiny_llama: Path) -> None:
    modules = modules_of(tiny_llama)
    missing = {name: shape for name, shape in modules.items() if "up_proj" not in name}
    with pytest.raises(BaseMismatchError, match="no delta layer for"):
        await Admission(store, fingerprint_model(tiny_llama), missing).pin(Composition.parse("fr"))
    wider = {name: ModuleShape(shape.out_features, shape.in_features + 1) for name, shape in modules.items()}
    with pytest.raises(BaseMismatchError, match="in the served model"):
        await Admission(store, fingerprint_model(tiny_llama), wider).pin(Composition.parse("fr"))


async def test_norms_head_and_embedding_are_checked_as_all_others(tmp_path: Path, tiny_llama: Path) -> None:
    store, fingerprint = Store(tmp_path / "whole"), fingerprint_model(tiny_llama)
    publish_random(store, tiny_llama, "all", seed=1, outside=True)
    shapes = {name: ModuleShape(*shape) for name, shape in outside_shapes(tiny_llama).items()}
    modules = modules_of(tiny_llama) | shapes
    assert (await Admission(store, fingerprint, modules).pin(Composition.parse("all"))).pinned
    for name, (rows, length, _) in ((name, astuple(shape)) for name, shape in shapes.items()):
        other = modules | {name: ModuleShape(rows, length + 1)}
        with pytest.raises(BaseMismatchError, match=f"{name} is {rows} x {length} in the artifact"):
            await Admission(store, fingerprint, other).pin(Composition.parse("all"))
        without = {module: shape for module, shape in modules.items() if module != name}
        with pytest.raises(BaseMismatchError, match=f"changes {name}, .* localize.include"):
            await Admission(store, fingerprint, without).pin(Composition.parse("all"))


async def test_damage_is_found_and_the_other_version_still_serves(admission: Admission, store: Store) -> None:
    path = store.path("fr", 2) / TENSORS_FILE
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ArtifactDamagedError):
        await admission.pin(Composition.parse("fr"))
    assert (await admission.pin(Composition.parse("fr@1"))).pinned


async def test_where_the_workers_read_the_tensors_admission_does_not(store: Store, tiny_llama: Path) -> None:
    light = Admission(store, fingerprint_model(tiny_llama), modules_of(tiny_llama), tensors=False)
    flipped = store.path("fr", 1) / TENSORS_FILE
    flipped.write_bytes(flipped.read_bytes()[:-1] + b"?")
    assert (await light.pin(Composition.parse("fr@1"))).pinned
    cut = store.path("fr", 2) / TENSORS_FILE
    cut.write_bytes(cut.read_bytes()[:-4])
    with pytest.raises(ArtifactDamagedError, match="bytes, the manifest says"):
        await light.pin(Composition.parse("fr"))
    cut.unlink()
    with pytest.raises(ArtifactDamagedError, match="cannot be read"):
        await light.pin(Composition.parse("fr"))


async def test_more_abilities_than_the_engine_has_room_for_are_refused(store: Store, tiny_llama: Path) -> None:
    publish_random(store, tiny_llama, "math", seed=3)
    limited = Admission(store, fingerprint_model(tiny_llama), most_abilities=1)
    assert (await limited.pin(Composition.parse("fr"))).pinned
    with pytest.raises(RequestError, match="at most 1; use fewer") as refused:
        await limited.pin(Composition.parse("fr+math"))
    assert refused.value.http_status == 400


def test_model_names() -> None:
    assert split_model("smol:fr*0.5", ["smol"]) == Composition.parse("fr*0.5")
    assert split_model("smol:", ["smol"]) == Composition()
    assert split_model("smol", ["smol"]) is None
    assert split_model("other:fr", ["smol"]) is None
    with pytest.raises(RequestError):
        split_model("smol:fr+", ["smol"])
