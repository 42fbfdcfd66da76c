"""Manifests without tensors: all that the catalogue, the resolution and the router read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from act_serve.delta.manifest import MANIFEST_FILE, Counts, Localization, Manifest, ModelFingerprint, dump_manifest

_ZEROS = "0" * 64
WORD_PROBLEMS = (
    "Anna buys 4 boxes of 6 pencils and gives 5 away. How many pencils are left?",
    "A train ride takes 3 hours and 25 minutes. How many minutes is that?",
    "Tom has 50 euros and buys 3 books at 12 euros each. How much money remains?",
    "Leo is 14 and his sister is 5 years older. How old are they together?",
    "If a worker makes 15 parts a day, how many parts are made in 4 days?",
    "Three brothers share 72 sweets equally and each eats 10. How many sweets has each of them left?",
    "Julie a 4 boîtes de 6 crayons et en donne 5. Combien de crayons lui reste-t-il ?",
    "Marc a 50 euros et achète 3 livres à 12 euros pièce. Combien d'argent lui reste-t-il ?",
)


def manifest(name: str, version: int = 1, **changes: Any) -> Manifest:
    """A valid manifest whose content digest tells name and version apart."""
    fields: dict[str, Any] = {
        "name": name,
        "version": version,
        "kind": "other",
        "description": f"the ability {name}",
        "license": "Apache-2.0",
        "created": "2026-01-01T00:00:00Z",
        "base": "base",
        "base_fingerprint": ModelFingerprint(architecture="A", config={}, tensors=_ZEROS, sample=_ZEROS),
        "localization": Localization(
            ranking="random", p=0.05, strength=1.0, seed=0, calibration=_ZEROS, fine_tune_steps=0
        ),
        "modules": {},
        "counts": Counts(channels=1, parameters=1, bytes=1),
        "tensors_sha256": f"{sum(name.encode()):x}{version:04x}".ljust(64, "a"),
    }
    return Manifest(**fields | changes)


def publish(root: Path, name: str, version: int = 1, **changes: Any) -> Manifest:
    """Writes a manifest where the store looks for it."""
    made = manifest(name, version, **changes)
    folder = root / name / str(version)
    folder.mkdir(parents=True)
    (folder / MANIFEST_FILE).write_text(dump_manifest(made))
    return made
