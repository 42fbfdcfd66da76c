"""Which checkpoint a server serves, under what name, and with which abilities by default."""

from __future__ import annotations

from pathlib import Path

from act_serve.abilities.catalogue import Catalogue
from act_serve.abilities.resolve import Policy, resolve
from act_serve.abilities.store import open_store
from act_serve.errors import ArtifactError, ModelError, ProfileError, RequestError
from act_serve.server.config import ServerSettings

EMBEDDED_NAME = "smollm2-135m-instruct"


def model_source(settings: ServerSettings) -> tuple[Path | None, str]:
    """Folder and name; the folder is None for the embedded model, which :func:`model_folder` prepares.

    Raises:
        ModelError: the folder holds no checkpoint.
    """
    if settings.model is None:
        return None, settings.served_model_name or EMBEDDED_NAME
    if not (settings.model / "config.json").is_file():
        raise ModelError(f"{settings.model} has no config.json; give the folder of a Hugging Face checkpoint")
    return settings.model.absolute(), settings.served_model_name or settings.model.name


def check_default_abilities(settings: ServerSettings) -> None:
    """Refuses a default that no request could be served with.

    Raises:
        ProfileError: it names what the store does not have or cannot use.
        StoreError: the store cannot be listed.
    """
    if settings.default_abilities in ("none", "auto"):
        return
    policy = Policy("", settings.default_abilities, settings.allow_negative_weights)
    try:
        resolve({}, view=Catalogue(open_store(settings.store)).refresh(), policy=policy)
    except (RequestError, ArtifactError) as exc:
        raise ProfileError(f"server setting 'default_abilities': {exc}") from exc


def model_folder(folder: Path | None) -> Path:
    """The folder itself, or that of the embedded model, converted on first use (half a minute)."""
    if folder is not None:
        return folder
    from act_serve.models.loading import embedded_base

    return embedded_base()
