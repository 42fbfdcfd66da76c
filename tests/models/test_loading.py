"""The embedded base is converted once and is the model that the shipped abilities were built for."""

from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from act_serve.abilities.store import Store
from act_serve.delta.fingerprint import fingerprint_model
from act_serve.errors import MissingExtraError, ModelError
from act_serve.home import HOME_VARIABLE
from act_serve.models import loading
from tests.tiny_models import make_llama

SHIPPED = Path(__file__).parents[2] / "abilities"


def test_ready_folder_is_used_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    make_llama(tmp_path / "models" / loading.EMBEDDED_NAME)
    assert loading.resolve_model(loading.EMBEDDED) == tmp_path / "models" / loading.EMBEDDED_NAME


def test_package_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    monkeypatch.setattr(loading, "distribution", missing)
    with pytest.raises(MissingExtraError, match=r"act-serve\[build\]"):
        loading.embedded_base()
    assert not list((tmp_path / "models").glob(".smollm*"))


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/model", "just-a-word"])
def test_no_model_there(name: str) -> None:
    with pytest.raises(ModelError, match="no model folder"):
        loading.resolve_model(name)


def test_damaged_model(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ModelError, match="can't be loaded"):
        loading.load_model(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fr", "extract"])
def test_shipped_abilities_fit_the_embedded_base(name: str) -> None:
    assert Store(SHIPPED).manifest(name).base_fingerprint == fingerprint_model(loading.embedded_base())


@pytest.mark.slow
def test_conversion_is_the_same_every_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fingerprint_model(loading.embedded_base())
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    folder = loading.embedded_base()
    assert folder.is_relative_to(tmp_path)
    assert fingerprint_model(folder) == first
    assert loading.load_tokenizer(folder).chat_template
    assert not list(folder.parent.glob(".smollm*"))
