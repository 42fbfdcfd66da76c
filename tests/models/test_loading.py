"""The embedded base is converted once and is the model that the shipped abilities were built for."""

import errno
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import HFValidationError, HTTPError

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


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer.json", '{"model": null, "added_tokens": []}'),
        ("tokenizer.json", "["),
        ("tokenizer_config.json", "[]"),
    ],
)
def test_damaged_tokenizer(tmp_path: Path, file: str, text: str) -> None:
    folder = make_llama(tmp_path / "model")
    (folder / file).write_text(text)
    with pytest.raises(ModelError, match=r"model has no usable tokenizer: .*; if its files are damaged, download"):
        loading.load_tokenizer(folder)


def test_model_larger_than_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def starved(*_: object, **__: object) -> torch.Tensor:
        return torch.empty(10**15)

    folder = make_llama(tmp_path / "model")
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", starved)
    with pytest.raises(ModelError, match="does not fit in memory"):
        loading.load_model(folder)


@pytest.mark.parametrize("kind", ["ConnectError", "ReadError", "ReadTimeout", "RemoteProtocolError"])
def test_download_that_breaks_off(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = pytest.importorskip(HTTPError.__module__.partition(".")[0])  # the one that the hub's client is built on

    def breaks_off(*_: object, **__: object) -> str:
        raise getattr(client, kind)("")

    monkeypatch.setattr("huggingface_hub.snapshot_download", breaks_off)
    with pytest.raises(ModelError, match=rf"owner/model: could not be fetched from the hub \({kind}: "):
        loading.resolve_model("owner/model")


def test_id_that_the_hub_refuses() -> None:
    with pytest.raises(ModelError, match="could not be fetched") as caught:
        loading.resolve_model("owner/mo..del")
    assert isinstance(caught.value.__cause__, HFValidationError)


def test_conversion_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        assert list((tmp_path / "home" / "models").glob(".smollm*/*.safetensors"))
        raise OSError(errno.ENOSPC, "No space left on device")

    tiny = loading.load_model(make_llama(tmp_path / "tiny"))
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "home"))
    monkeypatch.setattr(loading, "_embedded_gguf", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: tiny)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", full)
    with pytest.raises(ModelError, match=f"No space left on device.*{HOME_VARIABLE}"):
        loading.embedded_base()
    assert [path.suffix for path in (tmp_path / "home" / "models").iterdir()] in ([], [".lock"])


def test_home_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "file"))
    with pytest.raises(ModelError, match=HOME_VARIABLE):
        loading.embedded_base()


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
