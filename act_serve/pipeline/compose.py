"""Scores a base with any composition of stored abilities."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pydantic import ValidationError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from act_serve.abilities.store import open_store
from act_serve.delta.artifact import ModuleDelta, read_artifact
from act_serve.delta.composition import Composition
from act_serve.delta.fingerprint import check_base, fingerprint_model
from act_serve.delta.manifest import Manifest
from act_serve.errors import DataError
from act_serve.models.examples import Example
from act_serve.models.loading import load_model, load_tokenizer, resolve_model
from act_serve.models.row_delta import RowDeltas
from act_serve.pipeline.evaluate import Question, evaluate
from act_serve.pipeline.measured import Measured
from act_serve.pipeline.merge import Share, merge_deltas
from act_serve.profile.schema import Data, Task


def artifacts_of(composition: str, store: str | Path) -> list[tuple[Path, float]]:
    """The artifact folder and weight of each ability in a composition such as `fr+extract@1*0.5`.

    An ability without a version means the one that requests get. Raises RequestError for a malformed composition and
    UnknownAbilityError for an ability that the store lacks, or has with other content than a digest says.
    """
    shelf = open_store(store)
    found = []
    for ability in Composition.parse(composition).abilities:
        manifest = shelf.named(ability)
        found.append((shelf.fetch(ability.name, manifest.version), ability.weight))
    return found


def compose(abilities: Sequence[tuple[Path, float]], base: Path) -> dict[str, ModuleDelta]:
    """Returns Σ weight·delta of artifact folders with their weights, float32; nothing for no abilities.

    Raises BaseMismatchError when an artifact belongs to another base than the one in the folder `base`, and
    ArtifactDamagedError when it can't be used.
    """
    read = [(*read_artifact(artifact), weight) for artifact, weight in abilities]
    check_bases((manifest for manifest, _, _ in read), base)
    return merge_deltas([Share(deltas, weight) for _, deltas, weight in read], "sum") if read else {}


def check_bases(manifests: Iterable[Manifest], base: Path) -> None:
    """Raises BaseMismatchError unless all of them were built for the model in the folder `base`."""
    fingerprint = fingerprint_model(base)
    for manifest in manifests:
        check_base(manifest.base_fingerprint, fingerprint, what=f"{manifest.name}@{manifest.version}")


def score_composition(
    *,
    base: str,
    composition: str,
    store: str | Path,
    examples: list[Example],
    metrics: Sequence[str],
    language: str | None = None,
    max_new_tokens: int = 96,
) -> dict[str, Measured]:
    """Returns the result by metric of `base` with the composition's abilities added as in serving.

    Raises DataError for an unknown metric, for no examples or some that it can't score, and the artifact's and
    store's errors.
    """
    if not examples:
        raise DataError("the task file holds no examples")
    questions = [Question(_task(metric, language, max_new_tokens), examples) for metric in metrics]
    with composed_model(base, composition, store) as (model, tokenizer):
        return evaluate(model, tokenizer, questions)


@contextmanager
def composed_model(
    base: str, composition: str, store: str | Path
) -> Iterator[tuple[PreTrainedModel, PreTrainedTokenizerBase]]:
    """While it is open, a model of `base` has the composition's abilities added as in serving; with its tokenizer.

    Raises the artifact's and store's errors.
    """
    folder = resolve_model(base)
    fingerprint = fingerprint_model(folder)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    with ExitStack() as stack:
        for artifact, weight in artifacts_of(composition, store):
            manifest, deltas = read_artifact(artifact)
            check_base(manifest.base_fingerprint, fingerprint, what=f"{manifest.name}@{manifest.version}")
            stack.enter_context(RowDeltas(deltas, weight).attached(model))
        yield model, tokenizer


def _task(metric: str, language: str | None, max_new_tokens: int) -> Task:
    fields = {"name": metric, "metric": metric, "language": language, "max_new_tokens": max_new_tokens}
    try:
        return Task.model_validate({**fields, "data": Data(test="given")})
    except ValidationError as exc:
        raise DataError(f"metric {metric!r}: {exc.errors()[0]['msg'].removeprefix('Value error, ')}") from exc
