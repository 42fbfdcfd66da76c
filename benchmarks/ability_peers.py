"""Rows against LoRA, SHiRA and random rows at equal stored bytes, and merging methods against the composed sum.

    python -m benchmarks.ability_peers --ability extract --json peers-extract.json
    python -m benchmarks.ability_peers --ability fr --steps 400 --rate lora=1e-3 --json peers-fr.json
    python -m benchmarks.ability_peers --ability fr --steps 0 --methods rows,gradient,random_rows --json transfers.json
    python -m benchmarks.ability_peers --ability extract --finetune '{retention: null}' --json forgetting.json
    python -m benchmarks.ability_peers --merge fr+extract --json peers-merge.json

All methods are trained by the same transformers Trainer on the same batches in the same order, with the same
schedule, loss and retention term (KL to the base on retained text; a peer's base is the model with its adapter
disabled), and measured on the same held-out examples. What differs: `rows` and `random_rows` begin with what was
transferred from the source model, `lora_svd` with the best approximation of that model at its rank; `rows_from_zero`,
`lora` and `shira` begin with no change. A ranking of act-serve as a method (`gradient`, `activation_relative`) is
`rows` chosen by it at the same p. With --steps 0 rows are transferred and not trained. Stored bytes: rows as --stored
with their places; LoRA's factors in bfloat16; SHiRA's values in bfloat16 with one 4-byte place each (PEFT itself writes
twice as much). The rank of a peer is the one whose bytes come nearest to those of the rows. --finetune changes the
profile's fine-tuning for all methods: without retention, distilled from the source. --beside fr measures every method
once more with that ability of the store added, on the tasks of both.
The source model must have been built (`act-serve build-delta`). A method that the JSON file holds for the same
settings is not measured again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from act_serve.delta.artifact import ModuleDelta, as_stored, read_artifact, serialize_modules
from act_serve.delta.fingerprint import fingerprint_model
from act_serve.delta.manifest import read_manifest
from act_serve.home import cache_home
from act_serve.models.loading import load_model, resolve_model
from act_serve.pipeline.compose import artifacts_of
from act_serve.pipeline.datasets.catalogue import load_examples
from act_serve.pipeline.evaluate import Question
from act_serve.pipeline.finetune import Lessons, finetune
from act_serve.pipeline.measure import measure_items
from act_serve.pipeline.measured import difference
from act_serve.pipeline.tuned_rows import retained_text
from act_serve.profile.load import load_profile
from act_serve.profile.schema import FineTune, Profile, Ranking
from benchmarks.ability_bench import (
    Figure,
    fallen,
    figure,
    gain_kept,
    ranked_rows,
    scored,
    source_folder,
    transferred,
)
from benchmarks.ability_tables import percent, score
from benchmarks.merge_peers import merges
from benchmarks.peer_results import Kept, Made, Results
from benchmarks.peft_peers import Beside, Peer, train_peer

METHODS = ("rows", "rows_from_zero", "random_rows", "lora", "lora_svd", "shira")
RANKINGS: dict[str, Ranking] = {"random_rows": "random", **{ranking: ranking for ranking in get_args(Ranking)}}
TRANSFERRED = ("rows", *RANKINGS)  # what is something without training, too


@dataclass(frozen=True, slots=True)
class Contest:
    """What all methods share."""

    profile: Profile
    base: Path
    source: Path
    lessons: Lessons
    questions: list[Question]
    beside: Beside
    seed: int
    rates: dict[str, float]

    def settings(self, method: str) -> FineTune:
        """The profile's fine-tuning, at the method's own learning rate where one was given."""
        update = {"learning_rate": self.rates[method]} if method in self.rates else {}
        return self.profile.finetune.model_copy(update=update)

    def rows(self, method: str) -> dict[str, torch.Tensor]:
        """The rows that the profile's ranking gives the method, or its own where it is one; chance for random_rows."""
        ranking = RANKINGS.get(method, self.profile.localize.ranking)
        return ranked_rows(self.profile, ranking, base=self.base, source=self.source, seed=self.seed)

    def budget(self) -> int:
        """The bytes of the ability's rows as stored; the same for any values in them."""
        return len(serialize_modules(self.transferred("rows"), self.profile.stored))

    def transferred(self, method: str) -> dict[str, ModuleDelta]:
        """The method's rows with the differences of the source model."""
        return transferred(self.profile, self.rows(method), base=self.base, source=self.source)


def measured(contest: Contest, model: Path, deltas: Sequence[Mapping[str, ModuleDelta]] = ()) -> Results:
    """What a model with deltas scores, alone and beside the abilities of the contest."""
    alone = measure_items(model, deltas, contest.questions)
    beside = contest.beside
    if not beside.questions:
        return alone
    return {**alone, **measure_items(model, [*deltas, *beside.deltas], beside.questions)}


def train(contest: Contest, method: str) -> Made:
    """Trains one method, where there are steps, and scores it as it would be stored."""
    if method in ("lora", "lora_svd", "shira"):
        return _train_peer(contest, method)
    deltas = contest.transferred(method)
    if method == "rows_from_zero":
        deltas = {name: ModuleDelta(each.rows, torch.zeros_like(each.delta)) for name, each in deltas.items()}
    settings = contest.settings(method)
    if settings.steps:
        deltas = finetune(
            base=contest.base,
            source=contest.source,
            deltas=deltas,
            lessons=contest.lessons,
            settings=settings,
            seed=contest.seed,
            report=_report,
        )
    stored = contest.profile.stored
    return Made(
        len(serialize_modules(deltas, stored)),
        sum(each.delta.numel() for each in deltas.values()),
        measured(contest, contest.base, [as_stored(deltas, stored)]),
    )


def _train_peer(contest: Contest, method: str) -> Made:
    settings = contest.settings(method)
    peer = Peer(method, contest.budget(), contest.base, contest.source)
    teacher = load_model(contest.source) if settings.loss == "distill" else None
    results, size, parameters = train_peer(
        peer, contest.lessons, contest.questions, settings, contest.seed, teacher, _report, contest.beside
    )
    return Made(size, parameters, results)


def _report(done: int, steps: int, remark: str) -> None:
    if done % 20 == 0 or done == steps:
        print(f"    step {done}/{steps} {remark}", flush=True)


def compare(contest: Contest, methods: tuple[str, ...], file: Path, said: Figure) -> Figure:
    """Trains and measures what the file has not yet, and puts all methods beside base, source and rows."""
    kept = Kept(file, said)
    references: dict[str, Callable[[], Made]] = {
        "base": lambda: Made(0, 0, measured(contest, contest.base)),
        "source": lambda: Made(0, 0, measured(contest, contest.source)),
    }
    made = {name: kept.get(name, work) for name, work in references.items()}
    for method in methods:
        made[method] = kept.get(method, lambda: train(contest, method))  # noqa: B023
    base, source = made["base"].results, made["source"].results
    own = {name for task in contest.profile.score for name in (task.name, contest.beside.name_of(task.name))}
    return {
        name: {
            "bytes": found.stored_bytes,
            "parameters": found.parameters,
            "tasks": {
                task: {
                    **scored(result),
                    "share_kept": gain_kept(base[task], source[task], result) if task in own else None,
                    "drop": None if task in own else fallen(base[task], result),
                    "minus_rows": figure(*difference(result, made["rows"].results[task])) if "rows" in made else None,
                }
                for task, result in found.results.items()
            },
        }
        for name, found in made.items()
    }


def _questions(profile: Profile, options: argparse.Namespace, *, own: bool) -> list[Question]:
    tasks = profile.score if own else (*profile.score, *profile.retain)
    return [
        Question(task, load_examples(task.data, "test", options.items or task.items, profile.seed)) for task in tasks
    ]


def _beside(profile: Profile, options: argparse.Namespace) -> Beside:
    if not options.beside:
        return Beside("", [], [])
    artifacts = artifacts_of(options.beside, options.store)
    if unweighted := [path for path, weight in artifacts if weight != 1]:
        raise SystemExit(f"--beside {options.beside}: give {unweighted[0].parent.name} no weight")
    others = [load_profile(options.profiles / f"{path.parent.name}.yaml") for path, _ in artifacts]
    found = Beside(options.beside, [read_artifact(path)[1] for path, _ in artifacts], [])
    asked = [question for each in (profile, *others) for question in _questions(each, options, own=True)]
    renamed = [
        Question(question.task.model_copy(update={"name": found.name_of(question.task.name)}), question.examples)
        for question in asked
    ]
    return replace(found, questions=renamed)


def _versions(composition: str, store: Path) -> dict[str, str]:
    manifests = {path.parent.name: read_manifest(path) for path, _ in artifacts_of(composition, store)}
    return {name: f"{manifest.version}~{manifest.digest}" for name, manifest in manifests.items()}


def _contest(options: argparse.Namespace) -> tuple[Contest, Figure]:
    profile = load_profile(options.profiles / f"{options.ability}.yaml")
    changes = {**options.finetune, **({} if options.steps is None else {"steps": options.steps})}
    finetuning = FineTune.model_validate({**profile.finetune.model_dump(), **changes})
    profile = profile.model_copy(update={"stored": options.stored, "finetune": finetuning})
    source = source_folder(profile, options.work or cache_home() / "builds")
    if source is None:
        raise SystemExit(f"{profile.name} has no source model yet; build it first with act-serve build-delta")
    seed = profile.seed if options.seed is None else options.seed
    ability = load_examples(profile.data, "train", profile.finetune.items, profile.seed)
    contest = Contest(
        profile=profile,
        base=resolve_model(profile.base),
        source=source,
        lessons=Lessons(ability, retained_text(profile)),
        questions=_questions(profile, options, own=False),
        beside=_beside(profile, options),
        seed=seed,
        rates=dict(options.rate),
    )
    return contest, {
        "profile": profile.model_dump(mode="json"),
        "source": fingerprint_model(source).sample,
        "items": options.items,
        **({"beside": _versions(options.beside, options.store)} if options.beside else {}),
        "seed": seed,
        "rates": dict(options.rate),
    }


def _show(title: str, found: Figure) -> None:
    tasks = list(next(iter(found.values()))["tasks"])
    table = Table(title=title, title_justify="left")
    for heading in ("method", "MB", *tasks):
        table.add_column(heading)
    for name, method in found.items():
        cells = []
        for task in tasks:
            result = method["tasks"][task]
            kept, drop = result.get("share_kept"), result.get("drop")
            cells.append(
                f"{score(result)}\n{f'kept {percent(kept)}' if kept else f'drop {percent(drop)}' if drop else ''}"
            )
        table.add_row(name, f"{method['bytes'] / 1e6:.2f}", *map(escape, cells))
    Console(width=None if Console().is_terminal else 40 * len(tasks)).print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the contest or the merges, prints a table and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--ability", help="ability whose data all methods are trained on")
    what.add_argument("--merge", help="two abilities of the store, such as fr+extract, for the merging methods")
    parser.add_argument("--steps", type=int, help="training steps of every method; default the profile's")
    changed = "settings of the profile's finetune to change, as YAML: '{retention: null}', '{loss: distill}'"
    parser.add_argument("--finetune", type=yaml.safe_load, default={}, help=changed)
    of_beside = "ability of the store, or several, such as fr, that every method is measured beside, too"
    parser.add_argument("--beside", help=of_beside)
    known = f"default: {','.join(METHODS)}; or a ranking: {', '.join(get_args(Ranking))}"
    parser.add_argument("--methods", type=_methods, help=known)
    parser.add_argument("--rate", type=_rate, action="append", default=[], help="METHOD=LEARNING_RATE; repeatable")
    parser.add_argument("--stored", choices=("bfloat16", "int8"), default="bfloat16", help="form of the rows")
    parser.add_argument("--density", type=float, default=0.5, help="share of values that TIES and DARE keep")
    parser.add_argument("--seed", type=int, help="of training and chance; the examples stay those of the profile")
    parser.add_argument("--items", type=int, help="test examples per task; default the profile's")
    parser.add_argument("--store", type=Path, default=Path("abilities"))
    parser.add_argument("--profiles", type=Path, default=Path("profiles/abilities"))
    parser.add_argument("--work", type=Path, help="the builds' folder; default as build-delta's")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.merge:
        versions = _versions(options.merge, options.store)
        settings: Any = {"merge": options.merge, "abilities": versions, "density": options.density}
        profiles = {name: load_profile(options.profiles / f"{name}.yaml") for name in versions}
        questions = [question for profile in profiles.values() for question in _questions(profile, options, own=True)]
        kept = Kept(options.json, {**settings, "items": options.items})
        found = merges(
            options.merge, profiles, questions, options.store, kept, density=options.density, seed=options.seed or 0
        )
    else:
        contest, settings = _contest(options)
        found = compare(contest, _wanted(contest, options.methods), options.json, settings)
    options.json.write_text(json.dumps({"settings": settings, "methods": found}, indent=1) + "\n", encoding="utf-8")
    _show(options.merge or f"{options.ability}, {settings['profile']['finetune']['steps']} steps", found)


def _wanted(contest: Contest, given: tuple[str, ...] | None) -> tuple[str, ...]:
    """The methods asked for, or all that can be: without training, only those that take the source's differences."""
    if contest.profile.finetune.steps:
        return given or METHODS
    if given and (untrained := [method for method in given if method not in TRANSFERRED]):
        raise SystemExit(f"{', '.join(untrained)} must be trained: give --steps, or leave them out of --methods")
    return given or tuple(method for method in METHODS if method in TRANSFERRED)


def _methods(text: str) -> tuple[str, ...]:
    return tuple(_method(method) for method in text.split(","))


def _method(name: str) -> str:
    known = tuple(dict.fromkeys((*METHODS, *RANKINGS)))
    if name not in known:
        raise argparse.ArgumentTypeError(f"no method {name!r}; there are {', '.join(known)}")
    return name


def _rate(text: str) -> tuple[str, float]:
    method, _, rate = text.partition("=")
    return _method(method), float(rate)


if __name__ == "__main__":
    main()
