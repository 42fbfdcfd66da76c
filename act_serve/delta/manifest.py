"""What ``ability.json`` holds: where a delta comes from, what it fits, what it contains, what it was measured to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from act_serve.delta.composition import DIGEST_CHARS, MAX_VERSION, NAME_PATTERN
from act_serve.errors import ArtifactDamagedError

MANIFEST_FILE = "ability.json"
TENSORS_FILE = "channel_delta.safetensors"
EVALUATION_FILE = "evaluation.json"

Name = Annotated[str, Field(pattern=rf"^{NAME_PATTERN}$")]
Version = Annotated[int, Field(ge=1, le=MAX_VERSION)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Kind = Literal["language", "skill", "other"]
Stored = Literal["bfloat16", "int8"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelFingerprint(_Strict):
    """Identity of a model's weights and maths, the same on every machine.

    Attributes:
        architecture: first entry of ``architectures`` in config.json.
        config: the fields of config.json that change shapes or maths.
        tensors: sha256 over the sorted names, dtypes and shapes of all tensors.
        sample: sha256 over a fixed sample of the weights' bytes.
    """

    architecture: str
    config: dict[str, Any]
    tensors: Sha256
    sample: Sha256


class Localization(_Strict):
    """How the channels were chosen (arXiv 2601.09398, section 3): enough to choose them again.

    Attributes:
        ranking: name of the ranking, such as ``activation_per_module``.
        p: share of the channels, or of the budget's unit, that was kept, in (0, 1].
        strength: λ, the factor on the transferred difference.
        seed: seed of sampling and training.
        calibration: sha256 of the calibration texts.
        fine_tune_steps: optimizer steps that trained the masked rows after the transfer; 0 for transfer only.
        include: kinds of channels that were ranked beside those of the linear modules, such as ``norms``.
    """

    ranking: str
    p: Annotated[float, Field(gt=0, le=1)]
    strength: float
    seed: int
    calibration: Sha256
    fine_tune_steps: NonNegativeInt
    include: tuple[str, ...] = ()


class Parent(_Strict):
    """One ability that went into a merge; ``density`` is the share of its values that was kept."""

    name: Name
    version: Version
    tensors_sha256: Sha256
    weight: float
    density: Annotated[float, Field(gt=0, le=1)]


class Merge(_Strict):
    """How an ability was merged out of others: enough to merge it again.

    Attributes:
        method: such as ``sum`` or ``ties``.
        seed: of the random methods.
        parents: in the order that was named, which ``priority`` goes by.
    """

    method: str
    seed: int
    parents: Annotated[tuple[Parent, ...], Field(min_length=1)]


class Import(_Strict):
    """What an ability was made from, where this project did not build it.

    Attributes:
        form: ``checkpoint`` (a fine-tuned model), ``lora`` or ``shira`` (PEFT adapters).
        exact: whether every changed row of the layers' linear modules was kept.
        relative_error: Frobenius norm of (what was given - what is stored), over that of what was given.
        left_out: number of tensors that differ and are no such module (embeddings, norms); not in the error.
    """

    form: Literal["checkpoint", "lora", "shira"]
    exact: bool
    relative_error: Annotated[float, Field(ge=0)]
    left_out: NonNegativeInt = 0


class ModuleEntry(_Strict):
    """One module's share of the delta.

    Attributes:
        rows: number of changed channels, k.
        out_features: number of channels of the module; rows are int32.
        in_features: length of one row.
        bias: whether ``<module>.bias_delta`` is stored.
    """

    rows: PositiveInt
    out_features: Annotated[int, Field(ge=1, le=2**31)]
    in_features: PositiveInt
    bias: bool = False


class Counts(_Strict):
    """Size of the delta: changed channels, changed parameters, bytes of the tensors file (not of memory)."""

    channels: PositiveInt
    parameters: PositiveInt
    bytes: PositiveInt


class Score(_Strict):
    """One task's result, each on the same ``items`` held-out examples.

    Attributes:
        task: name of the task.
        metric: name of its metric, such as ``chrf`` or ``exact_match``.
        higher_is_better: direction of the metric.
        items: number of examples.
        base: the base model alone; ``source``: the ability model; ``transfer``: transferred rows before
            fine-tuning; ``delta``: the artifact as stored. None where it was not measured.
        retained: whether this is a task that must be kept, rather than the ability itself.
    """

    task: str
    metric: str
    higher_is_better: bool
    items: PositiveInt
    base: float
    source: float | None = None
    transfer: float | None = None
    delta: float
    retained: bool = False


class Manifest(_Strict):
    """The whole of ``ability.json``; unknown keys are refused.

    Attributes:
        name, version: identity in the store; versions count up from 1.
        kind: what the ability is for; ``languages`` are BCP 47 tags that a language ability serves.
        exemplars: prompts that should be routed to this ability.
        base: id and fingerprint of the model that the delta fits; ``source`` likewise of the ability model.
        localization, merge, imported: where the rows come from: a build, other abilities, another format.
        modules: per module of the model, in the checkpoint's names.
        stored: the form of the rows in the tensors file; int8 comes with a scale per row, and is served in bfloat16.
        tensors_sha256: sha256 of ``channel_delta.safetensors``.
    """

    schema_version: Literal[1] = 1
    name: Name
    version: Version
    kind: Kind
    languages: tuple[str, ...] = ()
    description: str
    exemplars: tuple[str, ...] = ()
    license: str
    created: str
    base: str
    base_fingerprint: ModelFingerprint
    source: str | None = None
    source_fingerprint: ModelFingerprint | None = None
    localization: Localization | None = None
    merge: Merge | None = None
    imported: Import | None = None
    modules: dict[str, ModuleEntry]
    stored: Stored = "bfloat16"
    counts: Counts
    tensors_sha256: Sha256
    scores: tuple[Score, ...] = ()

    @property
    def digest(self) -> str:
        """The content's short name in compositions: head of the tensors' sha256."""
        return self.tensors_sha256[:DIGEST_CHARS]


def read_manifest(folder: Path, what: str | None = None) -> Manifest:
    """Reads and checks ``ability.json`` of an artifact folder.

    Args:
        folder: the artifact.
        what: its name in messages, where clients must not learn the folder.

    Raises:
        ArtifactDamagedError: it is missing, not JSON, or not a manifest of schema version 1.
    """
    path = folder / MANIFEST_FILE
    named = f"{what}: {MANIFEST_FILE}" if what else str(path)
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except OSError as exc:
        raise ArtifactDamagedError(f"{named} cannot be read ({exc.strerror}); is this an ability folder?") from exc
    except ValidationError as exc:
        first, more = exc.errors()[0], exc.error_count() - 1
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ArtifactDamagedError(
            f"{named} is not a valid ability manifest: {where}: {first['msg']}{f' (and {more} more)' if more else ''}; "
            "rebuild or restore the artifact"
        ) from exc


def dump_manifest(manifest: Manifest) -> str:
    """The text of ``ability.json``: indented, keys in the schema's order."""
    return json.dumps(manifest.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"
