"""What the documents say of profiles and settings is so."""

import re
from pathlib import Path

import yaml

from act_serve.profile.load import load_profile
from act_serve.server.config import ServerSettings

ROOT = Path(__file__).parents[2]


def test_the_readme_s_profile_is_one(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for name in ("tone", "tickets"):
        (tmp_path / name).mkdir()
        for file in ("train", "test"):
            (tmp_path / name / f"{file}.jsonl").write_text('{"prompt": "hello", "answer": "good day"}\n')
    (tmp_path / "tone.yaml").write_text(text)
    profile = load_profile(tmp_path / "tone.yaml")
    assert profile.name == "tone"
    assert profile.data.train == str(tmp_path / "tone" / "train.jsonl")
    assert [task.name for task in profile.retain] == ["tickets_nll"]


def test_every_setting_is_in_the_table() -> None:
    section = (ROOT / "docs/operating.md").read_text().partition("## Settings")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| `")]
    documented = {name: default for names, default in rows for name in re.findall(r"`(\w+)`", names)}
    assert documented.keys() == ServerSettings.model_fields.keys()
    for names, default in rows:
        if re.fullmatch(r"[\d., ]+", default):  # plain numbers, in the order of the names
            found = [ServerSettings.model_fields[name].default for name in re.findall(r"`(\w+)`", names)]
            assert found == [yaml.safe_load(value) for value in default.split(",")], names
