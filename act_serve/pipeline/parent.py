"""A published ability whose rows are trained further: with more steps, other text or in other company."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from act_serve.abilities.store import Store
from act_serve.delta.artifact import read_artifact
from act_serve.delta.composition import Composition
from act_serve.delta.fingerprint import check_base, fingerprint_model
from act_serve.delta.manifest import EVALUATION_FILE, Manifest
from act_serve.pipeline.evaluate import Question
from act_serve.pipeline.job import Job
from act_serve.pipeline.measure import Scores, examples_of
from act_serve.pipeline.publish import Descent
from act_serve.pipeline.stage_files import save_deltas
from act_serve.pipeline.stages import Stage
from act_serve.pipeline.training import Report
from act_serve.profile.schema import Profile


@dataclass(frozen=True, slots=True)
class Parent:
    """A published ability, by its manifest and the folder of its files."""

    manifest: Manifest
    folder: Path

    def rows(self, job: Job) -> Stage:
        """Its rows as the stage that fine-tuning begins with."""

        def make(folder: Path, _report: Report) -> None:
            save_deltas(folder, read_artifact(self.folder)[1])

        return job.keep("transfer", {"ability": self.manifest.tensors_sha256}, make)

    def scores(self, questions: Sequence[Question]) -> dict[str, Scores]:
        """What its build measured of `source` and `transfer`, which are not at hand any more.

        Only tasks by the same metric on the same examples; none of a version whose evaluation does not say on what it
        was measured.
        """
        try:
            before = json.loads((self.folder / EVALUATION_FILE).read_bytes())["examples"]
        except (OSError, ValueError, KeyError):
            return {}
        now, metrics = examples_of(questions), {question.task.name: question.task.metric for question in questions}
        same = [
            score
            for score in self.manifest.scores
            if score.metric == metrics.get(score.task) and before.get(score.task) == now[score.task]
        ]
        return {
            "source": {score.task: score.source for score in same if score.source is not None},
            "transfer": {score.task: score.transfer for score in same if score.transfer is not None},
        }

    def descent(self, settled: Profile, base: Path) -> Descent:
        """What the manifest says of rows that were trained on from here."""
        localization = self.manifest.localization
        if localization is not None:
            steps = localization.fine_tune_steps + settled.finetune.steps
            localization = localization.model_copy(update={"fine_tune_steps": steps})
        parent = f"{self.manifest.name}@{self.manifest.version}~{self.manifest.digest}"
        return Descent(f"trained on from {parent}", self.manifest.source_fingerprint, localization)


def find_parent(ability: str, store: Store, base: Path) -> Parent:
    """The ability that a profile goes on from, `NAME` or `NAME@VERSION`.

    Raises UnknownAbilityError when the store lacks it, BaseMismatchError when it was built for another base than the
    one in the folder `base`.
    """
    (wanted,) = Composition.parse(ability).abilities
    manifest = store.manifest(wanted.name, wanted.version)
    check_base(manifest.base_fingerprint, fingerprint_model(base), what=f"{manifest.name}@{manifest.version}")
    return Parent(manifest, store.fetch(manifest.name, manifest.version))
