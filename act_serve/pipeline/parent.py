"""Published abilities whose rows a build goes on from: one that is trained further, or the mean of several.

Versions of an ability that were trained from one another have the same rows, and their mean can be better than each at
what it was made for, and cost the rest less ("model soups", arXiv 2203.05482).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from act_serve.abilities.store import Store
from act_serve.delta.composition import Composition
from act_serve.delta.manifest import EVALUATION_FILE, Manifest
from act_serve.pipeline.compose import check_bases, compose
from act_serve.pipeline.evaluate import Question
from act_serve.pipeline.job import Job
from act_serve.pipeline.measure import Scores, asked_of, examples_of
from act_serve.pipeline.publish import Descent
from act_serve.pipeline.stage_files import save_deltas
from act_serve.pipeline.stages import Stage
from act_serve.pipeline.training import Report
from act_serve.profile.schema import Profile


@dataclass(frozen=True, slots=True)
class Parent:
    """Published abilities, by their manifests and the folders of their files; the first one's past stands for all."""

    manifests: tuple[Manifest, ...]
    folders: tuple[Path, ...]

    def rows(self, job: Job) -> Stage:
        """Their rows, of several the mean, as the stage that fine-tuning begins with."""

        def make(folder: Path, _report: Report) -> None:
            weight = 1 / len(self.folders)
            save_deltas(folder, compose([(artifact, weight) for artifact in self.folders], job.base))

        digests = [manifest.tensors_sha256 for manifest in self.manifests]
        # Rows of one artifact are the same on every base, and what is trained of them is not.
        inputs = {"base": job.base_key, "ability": digests[0] if len(digests) == 1 else digests}
        return job.keep("transfer", inputs, make)

    def scores(self, questions: Sequence[Question]) -> dict[str, Scores]:
        """What the first one's build measured of `source` and `transfer`, which are not at hand any more.

        Only tasks by the same metric on the same examples, asked in the same way where the evaluation says how; none of
        a version whose evaluation does not say on what it was measured.
        """
        try:
            evaluation = json.loads((self.folders[0] / EVALUATION_FILE).read_bytes())
            before, asked_before = evaluation["examples"], evaluation.get("asked", {})
        except (OSError, ValueError, KeyError):
            return {}
        now, asked, metrics = (
            examples_of(questions),
            asked_of(questions),
            {q.task.name: q.task.metric for q in questions},
        )
        same = [
            score
            for score in self.manifests[0].scores
            if score.metric == metrics.get(score.task)
            and before.get(score.task) == now[score.task]
            and asked_before.get(score.task) in (None, asked.get(score.task))
        ]
        return {
            "source": {score.task: score.source for score in same if score.source is not None},
            "transfer": {score.task: score.transfer for score in same if score.transfer is not None},
        }

    def descent(self, settled: Profile, base: Path) -> Descent:
        """What the manifest says of rows that come from here; their steps are those of the longest way to them."""
        localization = self.manifests[0].localization
        if localization is not None:
            before = max(each.localization.fine_tune_steps for each in self.manifests if each.localization)
            steps = before + settled.finetune.steps
            localization = localization.model_copy(update={"fine_tune_steps": steps})
        parents = ", ".join(f"{each.name}@{each.version}~{each.digest}" for each in self.manifests)
        whence = f"the mean of {parents}" if len(self.manifests) > 1 else parents
        source = f"trained on from {whence}" if settled.finetune.steps else whence
        return Descent(source, self.manifests[0].source_fingerprint, localization)


def find_parent(abilities: Sequence[str], store: Store, base: Path) -> Parent:
    """The abilities that a profile goes on from, each `NAME` or `NAME@VERSION`.

    Raises UnknownAbilityError when the store lacks one, BaseMismatchError when one was built for another base than the
    one in the folder `base`.
    """
    wanted = [ability for text in abilities for ability in Composition.parse(text).abilities]
    manifests = tuple(map(store.named, wanted))
    check_bases(manifests, base)
    return Parent(manifests, tuple(store.fetch(manifest.name, manifest.version) for manifest in manifests))
