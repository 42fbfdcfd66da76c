"""One ability under analysis: its pair of models and what its build has kept already."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from act_serve.delta.fingerprint import fingerprint_model
from act_serve.errors import ProfileError
from act_serve.models.examples import Example
from act_serve.models.families import ChannelModule, channel_modules
from act_serve.models.loading import resolve_model
from act_serve.models.pairs import check_pair
from act_serve.pipeline.analyze.overlap import Mask
from act_serve.pipeline.budget import settle_budget
from act_serve.pipeline.calibrate import score_channels, score_name
from act_serve.pipeline.datasets.catalogue import examples_hash
from act_serve.pipeline.job import Job
from act_serve.pipeline.localize import localize
from act_serve.pipeline.memory_use import memory_use
from act_serve.pipeline.progress import Screen
from act_serve.pipeline.rankings.catalogue import RANKINGS
from act_serve.pipeline.source_model import source_model
from act_serve.pipeline.stage_files import load_tensors, save_tensors
from act_serve.profile.schema import Localize, Profile, Ranking


@dataclass(frozen=True, slots=True)
class Subject:
    """`job` keeps stages where the build of the same profile does, so that both share them."""

    job: Job
    source: Path
    source_key: str
    modules: tuple[ChannelModule, ...]
    calibration: tuple[Example, ...]
    _read: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.job.profile.name

    @property
    def _text(self) -> str:
        return examples_hash(self.calibration)

    @property
    def channels(self) -> dict[str, int]:
        """Number of channels per module."""
        return {module.name: module.out_features for module in self.modules}

    @property
    def text_ranking(self) -> Ranking:
        """The profile's ranking, or the nearest one that reads text where the profile's doesn't."""
        ranking = self.job.profile.localize.ranking
        return ranking if RANKINGS[ranking].reads_text else "activation_per_module"

    @property
    def layerwise(self) -> bool:
        """Whether its models are compared one layer at a time."""
        settings = self.job.profile.localize
        return memory_use(self.text_ranking, settings.memory, self.job.base, settings.include).layerwise

    def differences(self, examples: Sequence[Example], ranking: Ranking) -> dict[str, Tensor]:
        """What `ranking` ranks by, `[O]` per module; on `examples` unless it reads weights alone."""
        include = self.job.profile.localize.include
        score = score_name(ranking, include)
        text = examples_hash(examples)
        inputs = {
            "base": self.job.base_key,
            "source": self.source_key,
            "score": score,
            "examples": text,
        }
        of_build = score == score_name(self.job.profile.localize.ranking, include) and text == self._text
        stage = "calibrate" if of_build else f"{score}-{text[:8]}"

        def measure(folder: Path, _report: object) -> None:
            found = score_channels(
                ranking,
                base=self.job.base,
                source=self.source,
                examples=list(examples),
                seed=self.job.profile.seed,
                memory=self.job.profile.localize.memory,
                include=include,
            )
            save_tensors(folder, found)

        if stage not in self._read:
            self._read[stage] = load_tensors(self.job.keep(stage, inputs, measure).folder)
        return self._read[stage]

    def mask(self, scores: Mapping[str, Tensor], ranking: Ranking, p: float) -> Mask:
        """The channels that `ranking` chooses at `p` of the parameters."""
        return localize(list(self.modules), scores, Localize(ranking=ranking, p=p), self.job.profile.seed)


def refuse_unfit(profiles: Sequence[Profile]) -> None:
    """Raises ProfileError when two profiles have the same name, or one has no ability model; reads nothing else."""
    for profile in profiles:
        if profile.source.ability:
            whence = ", ".join(profile.source.ability)
            raise ProfileError(
                f"{profile.name} goes on from the ability {whence} and has no ability model to compare with the base; "
                "analyze a profile with source.model or source.train, such as the one it extends"
            )
    names = [profile.name for profile in profiles]
    if len(set(names)) < len(names):
        raise ProfileError(f"two profiles have the same name: {', '.join(sorted(names))}; give each ability once")


def open_subjects(profiles: Sequence[Profile], builds: Path, screen: Screen) -> list[Subject]:
    """Makes or finds the ability models of several profiles whose builds lie in `builds`.

    Raises ProfileError when two profiles have the same name or another base, or one has no ability model,
    PairMismatchError for a bad pair.
    """
    refuse_unfit(profiles)
    bases = {profile.name: resolve_model(profile.base) for profile in profiles}
    if len({fingerprint_model(base).model_dump_json() for base in bases.values()}) > 1:
        said = ", ".join(f"{name}: {base}" for name, base in bases.items())
        raise ProfileError(f"masks can be compared on one base only, and these profiles have several ({said})")
    return [_open(Job(profile, bases[profile.name], builds / profile.name, screen)) for profile in profiles]


def _open(job: Job) -> Subject:
    job = replace(job, profile=settle_budget(job.profile, job.base))
    include = job.profile.localize.include
    if job.profile.source.model is not None:
        check_pair(job.base, resolve_model(job.profile.source.model), include)
    source, key = source_model(job)
    calibration = job.examples("train", job.profile.localize.calibration_items)
    return Subject(job, source, key, tuple(channel_modules(job.base, include)), tuple(calibration))
