"""One build: what it is to make, where its stages lie, and how a stage is run and shown."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from act_serve.models.content import content_key
from act_serve.models.examples import Example
from act_serve.pipeline.datasets.catalogue import load_examples
from act_serve.pipeline.datasets.splits import Split
from act_serve.pipeline.neighbours import Companion
from act_serve.pipeline.progress import Screen
from act_serve.pipeline.stages import Stage, run_stage, stage_key
from act_serve.pipeline.training import Report
from act_serve.profile.schema import Profile, Transfer

# What depends on the budget and the strength, and so is kept apart for each of them in a search.
VARIED_STAGES = frozenset({"localize", "transfer", "finetune"})


@dataclass(frozen=True, slots=True)
class Job:
    """One build: its profile, the base's folder, the folder of its stage records and what the user sees.

    `company` are the abilities that the rows are trained to work with, `variant` names the point of a search that this
    job is for, and `peak_bytes` collects each stage's own peak memory.
    """

    profile: Profile
    base: Path
    work: Path
    screen: Screen
    company: tuple[Companion, ...] = ()
    variant: str = ""
    peak_bytes: dict[str, int] = field(default_factory=dict)

    @property
    def base_key(self) -> str:
        """Names the base in stage records, with its tokenizer; another one after every change of its files."""
        return content_key(self.base)

    def keep(
        self, name: str, inputs: dict[str, Any], make: Callable[[Path, Report], None], *, together: bool = False
    ) -> Stage:
        """Runs a stage with a progress bar, or takes it from an earlier run; `together` as in `run_stage`."""
        named = name + self.variant if name in VARIED_STAGES else name
        with self.screen.stage(named) as report:
            stage = run_stage(self.work, named, inputs, lambda folder: make(folder, report), together=together)
        self.peak_bytes[named] = stage.peak_bytes
        shutil.rmtree(self.unfinished(inputs), ignore_errors=True)
        memory = f", {stage.peak_bytes / 2**20:,.0f} MiB of memory more" if stage.peak_bytes else ""
        took = "kept from an earlier run" if stage.resumed else f"{stage.seconds:.0f} s{memory}"
        self.screen.note(f"[green]✓[/green] {named:<22} {took}")
        return stage

    def unfinished(self, inputs: dict[str, Any]) -> Path:
        """A folder for what an interrupted stage has done so far; it goes when the stage is finished."""
        return self.work / f".unfinished-{stage_key(inputs)[:16]}"

    def examples(self, split: Split, count: int) -> list[Example]:
        """Examples of the ability's own data."""
        return load_examples(self.profile.data, split, count, self.profile.seed)

    def with_p(self, p: float) -> "Job":
        """The same build with another share of channels."""
        localize = self.profile.localize.model_copy(update={"p": p})
        profile = self.profile.model_copy(update={"localize": localize})
        return replace(self, profile=profile, variant=f"{self.variant}-p{p:g}")

    def with_strength(self, strength: float) -> "Job":
        """The same build with one of the strengths that the profile lists."""
        profile = self.profile.model_copy(update={"transfer": Transfer(strength=strength)})
        variant = f"{self.variant}-x{strength:g}" if len(self.profile.transfer.strengths) > 1 else self.variant
        return replace(self, profile=profile, variant=variant)
