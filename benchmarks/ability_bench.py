"""What the benchmarks of abilities share: results of any model with any abilities, each measured once and kept."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any

from act_serve.abilities.store import Store
from act_serve.delta.artifact import ModuleDelta, read_artifact
from act_serve.delta.fingerprint import fingerprint_model
from act_serve.delta.manifest import Manifest
from act_serve.models.loading import load_model, load_tokenizer, resolve_model
from act_serve.models.row_delta import RowDeltas
from act_serve.pipeline.compose import artifacts_of
from act_serve.pipeline.datasets.catalogue import examples_hash, load_examples
from act_serve.pipeline.evaluate import Question, evaluate
from act_serve.pipeline.measured import Measured, combined
from act_serve.pipeline.scorers import HIGHER_IS_BETTER
from act_serve.profile.load import load_profile
from act_serve.profile.schema import Profile, Task

Figure = dict[str, Any]


class Bench:
    """Measures compositions of a store's abilities on the base or on an ability model.

    Every item's numbers are kept in the file `kept`, under the digests of all they depend on: a run that is started
    again, or another section, takes them from there.
    """

    def __init__(
        self, *, store: Path, profiles: Path, builds: Path, kept: Path, items: int | None, seed: int | None = None
    ) -> None:
        self.store, self._builds, self._kept_file, self._items, self._seed = store, builds, kept, items, seed
        self.profiles = {
            name: load_profile(profiles / f"{name}.yaml")
            for name in Store(store).names()
            if (profiles / f"{name}.yaml").exists()
        }
        self.manifests: dict[str, Manifest] = {name: Store(store).manifest(name) for name in self.profiles}
        self.base = resolve_model(next(iter(self.profiles.values())).base)
        self._kept: dict[str, Figure] = json.loads(kept.read_text()) if kept.exists() else {}

    def own(self, name: str) -> list[Question]:
        """The ability's own tasks."""
        return self.questions(self.profiles[name], self.profiles[name].score)

    def retained(self, name: str) -> list[Question]:
        """The tasks that the ability must keep."""
        return self.questions(self.profiles[name], self.profiles[name].retain)

    def questions(self, profile: Profile, tasks: Sequence[Task]) -> list[Question]:
        """The tasks with their test examples, as many as was asked for, drawn with the bench's seed or the profile's."""
        seed = profile.seed if self._seed is None else self._seed
        return [Question(task, load_examples(task.data, "test", self._items or task.items, seed)) for task in tasks]

    def draws_other_examples(self, name: str) -> bool:
        """Whether the test examples are not those that the ability's stored figures were measured on."""
        return self._seed not in (None, self.profiles[name].seed)

    def source(self, name: str) -> Path | None:
        """The folder of the model that the ability was built from, where it is at hand and still the same."""
        folder = source_folder(self.profiles[name], self._builds)
        same = folder is not None and fingerprint_model(folder) == self.manifests[name].source_fingerprint
        return folder if same else None

    def measure(
        self, composition: str, questions: Sequence[Question], *, model: Path | None = None
    ) -> dict[str, Measured]:
        """Results by task of `model` (by default the base) with the composition's abilities added as in serving."""
        abilities = artifacts_of(composition, self.store) if composition else []
        folder = model or self.base
        keys = {question.task.name: self._key(folder, abilities, question) for question in questions}
        missing = [question for question in questions if keys[question.task.name] not in self._kept]
        if missing:
            print(f"  measuring {composition or 'no ability'} on {folder if model else 'the base'}", flush=True)
            with ExitStack() as stack:
                loaded, tokenizer = _model(folder)
                for artifact, weight in abilities:
                    stack.enter_context(RowDeltas(_deltas(artifact), weight).attached(loaded))
                found = evaluate(loaded, tokenizer, missing)
            self._keep({keys[name]: {"metric": each.metric, "items": each.items_NS} for name, each in found.items()})
        return {name: Measured(self._kept[key]["metric"], self._kept[key]["items"]) for name, key in keys.items()}

    def _key(self, model: Path, abilities: Sequence[tuple[Path, float]], question: Question) -> str:
        task = question.task
        facts = [
            _fingerprint(model),
            sorted((self._digest(path), weight) for path, weight in abilities),
            [task.metric, task.language, task.max_new_tokens],
            examples_hash(question.examples),
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]

    def _digest(self, artifact: Path) -> str:
        return Store(self.store).manifest(artifact.parent.name, int(artifact.name)).tensors_sha256

    def _keep(self, results: dict[str, Figure]) -> None:
        self._kept.update(results)
        staging = self._kept_file.with_name(f".{self._kept_file.name}.{os.getpid()}")
        staging.write_text(json.dumps(self._kept))
        staging.replace(self._kept_file)


def source_folder(profile: Profile, builds: Path) -> Path | None:
    """The profile's ability model, or the one that its build trained; None where there is none."""
    if profile.source.model:
        return resolve_model(profile.source.model)
    folder = builds / profile.name / "source" / "model"
    return folder if (folder / "config.json").exists() else None


def gain_kept(base: Measured, whole: Measured, part: Measured) -> Figure | None:
    """(part - base) / (whole - base) with its interval; None where `whole` is no better than the base."""
    gain = whole.score - base.score
    if gain == 0 or (gain > 0) != HIGHER_IS_BETTER[base.metric]:
        return None
    return figure(*combined(lambda low, high, found: (found - low) / (high - low), base, whole, part))


def fallen(before: Measured, after: Measured) -> Figure | None:
    """By what share of `before` the score got worse, with its interval; negative where it got better."""
    if before.score == 0:
        return None
    sign = 1 if HIGHER_IS_BETTER[before.metric] else -1
    return figure(*combined(lambda left, right: sign * (left - right) / abs(left), before, after))


def figure(value: float, interval: tuple[float, float]) -> Figure:
    """A derived figure for JSON."""
    return {"value": round(value, 4), "low": round(interval[0], 4), "high": round(interval[1], 4)}


def scored(result: Measured) -> Figure:
    """A result for JSON, rounded."""
    return {key: round(value, 5) for key, value in result.as_json().items()}


@lru_cache(maxsize=2)
def _model(folder: Path) -> tuple[Any, Any]:
    return load_model(folder), load_tokenizer(folder)


@lru_cache(maxsize=8)
def _deltas(artifact: Path) -> dict[str, ModuleDelta]:
    return read_artifact(artifact)[1]


@lru_cache
def _fingerprint(model: Path) -> str:
    return fingerprint_model(model).model_dump_json()
