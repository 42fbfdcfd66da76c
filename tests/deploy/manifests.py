"""Reads the kustomize folders without kubectl: every file that a kustomization names, and what it holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
KUSTOMIZE = DEPLOY / "kustomize"
BASE = KUSTOMIZE / "base"
MONITORING = KUSTOMIZE / "components/monitoring"
OVERLAYS = sorted(path.parent for path in (KUSTOMIZE / "overlays").glob("*/kustomization.yaml"))
FOLDERS = [BASE, MONITORING, *OVERLAYS]


def kustomization(folder: Path) -> dict[str, Any]:
    """Its kustomization.yaml."""
    read: dict[str, Any] = yaml.safe_load((folder / "kustomization.yaml").read_text())
    return read


def named_paths(folder: Path) -> list[Path]:
    """Everything that the kustomization names: resources, components, patches and generators' files."""
    read = kustomization(folder)
    named = [*read.get("resources", []), *read.get("components", [])]
    named += [patch["path"] for patch in read.get("patches", []) if "path" in patch]
    for generator in (*read.get("configMapGenerator", []), *read.get("secretGenerator", [])):
        named += [name.partition("=")[2] or name for name in generator.get("files", [])]
    return [(folder / name).resolve() for name in named]


def documents(path: Path) -> list[dict[str, Any]]:
    """The YAML documents of a file."""
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def resources(folder: Path) -> Iterator[dict[str, Any]]:
    """The resources of a kustomization and of those that it names, patches not applied."""
    read = kustomization(folder)
    for name in (*read.get("resources", []), *read.get("components", [])):
        path = folder / name
        if path.is_dir():
            yield from resources(path)
        else:
            yield from documents(path)


def ray_service() -> dict[str, Any]:
    """The RayService of the base."""
    (found,) = documents(BASE / "ray-service.yaml")
    return found


def serve_config(folder: Path) -> str:
    """The serveConfigV2 that holds in a folder: the overlay's own, else the base's."""
    own = folder / "serve-config.yaml"
    (found,) = documents(own) if own.exists() else [ray_service()]
    text: str = found["spec"]["serveConfigV2"]
    return text
