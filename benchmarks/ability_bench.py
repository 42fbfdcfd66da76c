"""What the benchmarks of abilities share: results of any model with any abilities, each measured once and kept."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from act_serve.abilities.store import Store
from act_serve.delta.artifact import ModuleDelta, read_artifact, serialize_modules
from act_serve.delta.composition import Composition
from act_serve.delta.fingerprint import fingerprint_model
from act_serve.delta.manifest import Manifest
from act_serve.errors import ModelError
from act_serve.models.families import channel_modules
from act_serve.models.loading import load_model, load_tokenizer, resolve_model
from act_serve.models.row_delta import RowDeltas
from act_serve.pipeline.budget import settle_budget
from act_serve.pipeline.calibrate import score_channels
from act_serve.pipeline.compose import artifacts_of
from act_serve.pipeline.datasets.catalogue import examples_hash, load_examples
from act_serve.pipeline.evaluate import Question, evaluate
from act_serve.pipeline.kept_gain import kept_gain
from act_serve.pipeline.localize import localize
from act_serve.pipeline.measured import Measured, combined
from act_serve.pipeline.scorers import HIGHER_IS_BETTER, revision
from act_serve.pipeline.transfer import transfer
from act_serve.profile.load import load_profile
from act_serve.profile.schema import Profile, Ranking, Task

Figure = dict[str, Any]
Loaded = tuple[Any, Any]


class Bench:
    """Measures compositions of a store's abilities on the base or on an ability model.

    Every item's numbers are kept in the file `kept`, under the digests of all they depend on: a run that is started
    again, or another section, takes them from there. With `rebuilt_sources`, an ability model that was built again
    stands in for the one that the ability was made from.
    """

    def __init__(
        self,
        *,
        store: Path,
        profiles: Path,
        builds: Path,
        kept: Path,
        items: int | None,
        seed: int | None = None,
        rebuilt_sources: bool = False,
    ) -> None:
        self.store, self._builds, self._kept_file, self._items, self._seed = store, builds, kept, items, seed
        self._rebuilt_sources = rebuilt_sources
        self.profiles = {
            name: load_profile(profiles / f"{name}.yaml")
            for name in Store(store).names()
            if (profiles / f"{name}.yaml").exists()
        }
        self.manifests = {
            label: manifest for name in self.profiles for label, manifest in _measured_versions(Store(store), name)
        }
        self.base = resolve_model(next(iter(self.profiles.values())).base)
        self._kept: dict[str, Figure] = json.loads(kept.read_text()) if kept.exists() else {}

    def profile(self, ability: str) -> Profile:
        """The profile of the name of an ability such as `fr` or `fr@2`."""
        return self.profiles[name_of(ability)]

    def own(self, ability: str) -> list[Question]:
        """The ability's own tasks: those of its name, whichever the version."""
        profile = self.profile(ability)
        return self.questions(profile, profile.score)

    def retained(self, ability: str) -> list[Question]:
        """The tasks that the ability must keep."""
        profile = self.profile(ability)
        return self.questions(profile, profile.retain)

    def questions(self, profile: Profile, tasks: Sequence[Task]) -> list[Question]:
        """The tasks with as many test examples as was asked for, drawn with the bench's seed or the profile's."""
        seed = profile.seed if self._seed is None else self._seed
        return [Question(task, load_examples(task.data, "test", self._items or task.items, seed)) for task in tasks]

    def draws_other_examples(self, ability: str) -> bool:
        """Whether the test examples are not those that the ability's stored figures were measured on."""
        return self._seed not in (None, self.profile(ability).seed)

    def source(self, ability: str) -> Path | None:
        """The folder of the model that the ability was built from, where it is at hand; else None.

        One that was built again counts where the bench accepts these.
        """
        accepted = ("as built", "rebuilt") if self._rebuilt_sources else ("as built",)
        return self._source_folder(ability) if self.source_state(ability) in accepted else None

    def source_state(self, ability: str) -> str:
        """`as built`, `missing`, or `rebuilt`: a model is there, and not the one that the ability was built from."""
        folder = self._source_folder(ability)
        if folder is None:
            return "missing"
        (wanted,) = Composition.parse(ability).abilities
        built_from = Store(self.store).manifest(wanted.name, wanted.version).source_fingerprint
        return "as built" if fingerprint_model(folder) == built_from else "rebuilt"

    def _source_folder(self, ability: str) -> Path | None:
        try:
            return source_folder(self.profile(ability), self._builds)
        except ModelError:  # a ready-made one that is not on this machine
            return None

    def sources_said(self) -> list[str]:
        """In words, which abilities' source models are missing or are other ones."""
        states = {ability: self.source_state(ability) for ability in self.manifests}
        taken = "accepted as such" if self._rebuilt_sources else "not used; --rebuilt-sources accepts them"
        said = {
            "missing": f"not at hand: act-serve build-delta makes them in {self._builds}",
            "rebuilt": f"other ones than the abilities were built from: {taken}",
        }
        return [
            f"source models of {', '.join(those)} are {words}"
            for state, words in said.items()
            if (those := [ability for ability in states if states[ability] == state])
        ]

    def measure(
        self, composition: str, questions: Sequence[Question], *, model: Path | None = None
    ) -> dict[str, Measured]:
        """Results by task of `model` (by default the base) with the composition's abilities added as in serving."""
        abilities = artifacts_of(composition, self.store) if composition else []
        folder = model or self.base
        facts = [_fingerprint(folder), sorted((self._digest(path), weight) for path, weight in abilities)]
        what = f"{composition or 'no ability'} on {folder if model else 'the base'}"
        deltas = ((_deltas(path), weight) for path, weight in abilities)  # read when they are needed
        return self._measured(what, facts, questions, lambda: _with_deltas(folder, deltas))

    def measure_deltas(
        self, what: str, deltas: Mapping[str, ModuleDelta], questions: Sequence[Question]
    ) -> dict[str, Measured]:
        """Results by task of the base with deltas that no store holds, added as they are: give them `as_stored`."""
        facts = [_fingerprint(self.base), [(hashlib.sha256(serialize_modules(deltas)).hexdigest(), 1.0)]]
        return self._measured(f"{what} on the base", facts, questions, lambda: _with_deltas(self.base, [(deltas, 1.0)]))

    def measure_mean(self, what: str, models: Sequence[Path], questions: Sequence[Question]) -> dict[str, Measured]:
        """Results by task of the model whose every weight is the mean of those of `models`."""
        facts = ["mean", sorted(map(_fingerprint, models))]
        return self._measured(what, facts, questions, lambda: _mean_model(models))

    def _measured(
        self,
        what: str,
        facts: Sequence[Any],
        questions: Sequence[Question],
        opened: Callable[[], AbstractContextManager[Loaded]],
    ) -> dict[str, Measured]:
        keys = {question.task.name: _key(facts, question) for question in questions}
        missing = [question for question in questions if keys[question.task.name] not in self._kept]
        if missing:
            print(f"  measuring {what}", flush=True)
            with opened() as (model, tokenizer):
                found = evaluate(model, tokenizer, missing)
            self._keep({keys[name]: {"metric": each.metric, "items": each.items_NS} for name, each in found.items()})
        return {name: Measured(self._kept[key]["metric"], self._kept[key]["items"]) for name, key in keys.items()}

    def _digest(self, artifact: Path) -> str:
        return Store(self.store).manifest(artifact.parent.name, int(artifact.name)).tensors_sha256

    def _keep(self, results: dict[str, Figure]) -> None:
        self._kept.update(results)
        staging = self._kept_file.with_name(f".{self._kept_file.name}.{os.getpid()}")
        staging.write_text(json.dumps(self._kept))
        staging.replace(self._kept_file)


def name_of(ability: str) -> str:
    """The name in an ability such as `fr`, `fr@2` or `fr@2*0.5`."""
    (wanted,) = Composition.parse(ability).abilities
    return wanted.name


def source_folder(profile: Profile, builds: Path) -> Path | None:
    """The profile's ability model, or the one that its build trained; None where there is none."""
    if profile.source.model:
        return resolve_model(profile.source.model)
    folder = builds / profile.name / "source" / "model"
    return folder if (folder / "config.json").exists() else None


def ranked_rows(profile: Profile, ranking: Ranking, *, base: Path, source: Path, seed: int) -> dict[str, Tensor]:
    """The rows that a ranking gives the profile's budget; the seed is that of chance."""
    wanted = settle_budget(profile, base).localize.model_copy(update={"ranking": ranking})
    calibration = load_examples(profile.data, "train", wanted.calibration_items, profile.seed)
    scores = score_channels(ranking, base=base, source=source, examples=calibration, seed=seed, include=wanted.include)
    return localize(channel_modules(base, wanted.include), scores, wanted, seed)


def transferred(profile: Profile, rows: Mapping[str, Tensor], *, base: Path, source: Path) -> dict[str, ModuleDelta]:
    """The rows with the differences of the source model, at the profile's first strength."""
    return transfer(base=base, source=source, rows=rows, strength=profile.transfer.strengths[0])


def gain_kept(base: Measured, whole: Measured, part: Measured) -> Figure | None:
    """(part - base) / (whole - base) with its interval; None where `whole` is no better than the base."""
    kept = kept_gain(base, whole, part)
    return None if kept is None else figure(*kept)


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


def _measured_versions(store: Store, name: str) -> list[tuple[str, Manifest]]:
    """The active version and the latest, `fr@1` and `fr@2`; `fr` where they are the same."""
    versions = sorted({store.active(name), store.latest(name)})
    labels = [name] if len(versions) == 1 else [f"{name}@{version}" for version in versions]
    return [(label, store.manifest(name, version)) for label, version in zip(labels, versions, strict=True)]


def _key(facts: Sequence[Any], question: Question) -> str:
    task = question.task
    asked = [task.metric, *revision(task.metric), task.language, task.max_new_tokens]
    every = [*facts, asked, examples_hash(question.examples)]
    return hashlib.sha256(json.dumps(every).encode()).hexdigest()[:24]


@contextmanager
def _with_deltas(folder: Path, deltas: Iterable[tuple[Mapping[str, ModuleDelta], float]]) -> Iterator[Loaded]:
    model, tokenizer = _model(folder)
    with ExitStack() as stack:
        for each, weight in deltas:
            stack.enter_context(RowDeltas(each, weight).attached(model))
        yield model, tokenizer


@contextmanager
def _mean_model(folders: Sequence[Path]) -> Iterator[Loaded]:
    mean, *others = (load_model(folder) for folder in folders)
    with torch.no_grad():
        for parameter, *parts in zip(mean.parameters(), *(other.parameters() for other in others), strict=True):
            parameter.copy_(sum((part.float() for part in parts), parameter.float()) / len(folders))
    yield mean, load_tokenizer(folders[0])


@lru_cache(maxsize=2)
def _model(folder: Path) -> Loaded:
    return load_model(folder), load_tokenizer(folder)


@lru_cache(maxsize=8)
def _deltas(artifact: Path) -> dict[str, ModuleDelta]:
    return read_artifact(artifact)[1]


@lru_cache
def _fingerprint(model: Path) -> str:
    return fingerprint_model(model).model_dump_json()
