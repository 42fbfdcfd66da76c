"""`make abilities` rebuilds the shipped abilities with the versions that their profiles name."""

import re
import subprocess
from collections import Counter
from pathlib import Path

from act_serve.delta.composition import Composition
from act_serve.profile.load import load_profile

ROOT = Path(__file__).parents[2]


def test_rebuilding_makes_every_version_before_a_profile_names_it(tmp_path: Path) -> None:
    """`make abilities`, in an empty store, where each profile publishes the next version of its ability."""
    store = tmp_path / "empty"
    command = ["make", "--dry-run", "abilities", f"REBUILD={store}"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    builds = [line for line in said.splitlines() if "build-delta" in line]
    assert builds
    assert all(f"--store {store} " in line for line in builds)
    versions: Counter[str] = Counter()
    for path in re.findall(r"profiles/abilities/\S+\.yaml", "\n".join(builds)):
        profile = load_profile(ROOT / path)
        named = [*profile.finetune.company, *profile.source.ability]
        for ability in (each for text in named for each in Composition.parse(text).abilities):
            assert versions[ability.name] >= (ability.version or 1), f"{path} names {ability.name} {ability.version}"
        versions[profile.name] += 1
