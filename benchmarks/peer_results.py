"""What a method of `benchmarks/ability_peers.py` came to, kept in a file so that it is measured once."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from act_serve.pipeline.measured import Measured
from benchmarks.ability_bench import Figure

Results = dict[str, Measured]


@dataclass(frozen=True, slots=True)
class Made:
    """A trained method: its bytes as stored, its trained parameters, and what it scores."""

    stored_bytes: int
    parameters: int
    results: Results


class Kept:
    """Results by method in the file `FILE.items.json`, as long as the settings stay the same."""

    def __init__(self, file: Path, said: Figure) -> None:
        self._file = file.with_suffix(".items.json")
        found = json.loads(self._file.read_text()) if self._file.exists() else {}
        self._content: Figure = found if found.get("settings") == said else {"settings": said, "methods": {}}

    def get(self, name: str, work: Callable[[], Made]) -> Made:
        methods = self._content["methods"]
        if name not in methods:
            print(f"  {name} ...", flush=True)
            start, made = time.perf_counter(), work()
            items = {task: [each.metric, each.items_NS] for task, each in made.results.items()}
            methods[name] = [made.stored_bytes, made.parameters, items]
            self._file.write_text(json.dumps(self._content))
            print(f"  {name} took {time.perf_counter() - start:.0f} s", flush=True)
        size, parameters, items = methods[name]
        return Made(size, parameters, {task: Measured(*found) for task, found in items.items()})
