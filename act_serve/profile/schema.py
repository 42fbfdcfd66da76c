"""What a user writes in `profiles/abilities/NAME.yaml`: one ability, how to build it and what it may cost."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, field_validator, model_validator

Ranking = Literal[
    "activation_global",
    "activation_per_module",
    "activation_relative",
    "activation_channel_relative",
    "activation_weight",
    "gradient",
    "weight_relative",
    "weight_per_module",
    "weight_channel_relative",
    "random",
]
Memory = Literal["auto", "together", "layerwise"]
Metric = Literal[
    "exact_match",
    "json_fields",
    "final_number",
    "choice_accuracy",
    "chrf",
    "language_share",
    "nll",
    "perplexity",
]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
Strength = Annotated[float, Field(gt=0.0, le=4.0)]
Count = Annotated[int, Field(ge=1)]
LearningRate = Annotated[float, Field(gt=0.0, le=0.1)]
StoredAbility = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}(@[1-9][0-9]{0,8})?$")]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Data(_Section):
    """Where examples come from: a data set that act-serve can make, or JSONL files.

    A JSONL line is `{"prompt": ..., "answer": ...}` or `{"text": ...}`. `train` and `test` are paths relative to the
    profile's folder; so is `validation`, without which 5 % of the training lines are held out. Examples are cut at 320
    tokens; one whose prompt is as long is refused where its answer is to be scored by likelihood or trained on.
    """

    maker: str | None = None
    options: dict[str, Any] = {}
    train: str | None = None
    validation: str | None = None
    test: str | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> "Data":
        if (self.maker is None) == (self.test is None):
            raise ValueError("name either a `maker` or a `test` file (with a `train` file where training needs one)")
        return self


class TrainSource(_Section):
    """Dense training of an ability model, for when none exists yet."""

    items: Count
    steps: Count
    learning_rate: LearningRate = 2e-4
    batch_size: Count = 8


class Source(_Section):
    """Where the rows come from.

    An ability model, ready-made (`model`, a folder or hub id) or trained here from the profile's data (`train`); or
    `ability`, a published one such as `es` or `es@1`, whose rows are trained further and no model is needed; under
    another name it becomes the beginning of another ability. Of several, such as `[fr@1, fr@2]`, the rows are their
    mean (arXiv 2203.05482 averages whole models so), which needs no training to be another ability.
    """

    model: str | None = None
    train: TrainSource | None = None
    ability: tuple[StoredAbility, ...] = ()

    @field_validator("ability", mode="before")
    @classmethod
    def _one_or_several(cls, ability: Any) -> Any:
        return (ability,) if isinstance(ability, str) else ability

    @model_validator(mode="after")
    def _one_origin(self) -> "Source":
        if len(set(self.ability)) < len(self.ability):
            raise ValueError("`ability` names one of them twice; name it once")
        if sum(bool(origin) for origin in (self.model, self.train, self.ability)) != 1:
            raise ValueError(
                "give one of `model` (a folder or hub id), `train` (how to train one from the data) and `ability` (a "
                "published one to go on from)"
            )
        return self


class Localize(_Section):
    """Which channels are transferred: the best by `ranking`, as many as the budget allows.

    The budget is one of `p`, a share of the parameters of the modules that are ranked; `channels`, a share of every
    module's channels; and `bytes`, the most that the tensors file may take, such as 10MB. Every ranking spends the same
    on it. `memory` says whether both models are compared whole or one layer of each at a time; `auto` does the second
    when they don't fit. `include` has channels outside the linear modules ranked, too: scales of norms, rows of lm_head
    and columns of the embedding.
    """

    ranking: Ranking = "weight_relative"
    p: Share = 0.05
    channels: Share | None = None
    bytes: ByteSize | None = None
    calibration_items: Count = 64
    memory: Memory = "auto"
    include: tuple[Literal["norms", "lm_head", "embedding"], ...] = ()

    @field_validator("include")
    @classmethod
    def _in_one_order(cls, include: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(sorted(set(include)))  # so that stages are kept when it is written otherwise

    @model_validator(mode="after")
    def _one_budget(self) -> "Localize":
        given = [name for name in ("p", "channels", "bytes") if name in self.model_fields_set and getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"give one budget, not {' and '.join(given)}")
        return self

    @model_validator(mode="after")
    def _ranking_fits_memory(self) -> "Localize":
        if self.memory == "layerwise" and self.ranking == "gradient":
            raise ValueError(
                "the ranking gradient needs the whole base model and can't go with `memory: layerwise`; choose another "
                "ranking or `memory: together`"
            )
        if self.memory == "layerwise" and self.include:
            raise ValueError(
                f"channels of {' and '.join(self.include)} can't be ranked with `memory: layerwise`, which sees "
                "the linear modules of the layers alone; choose `memory: together`"
            )
        return self


class Transfer(_Section):
    """`strength` is the λ of W + λ·ΔW, or a list, of which the best on validation data is taken.

    Best `by` the NLL of the first `score` task, or by its own `metric`, on `validation_items` examples, before the
    rows are trained.
    """

    strength: Strength | Annotated[tuple[Strength, ...], Field(min_length=1)] = 1.0
    by: Literal["nll", "metric"] = "nll"
    validation_items: Count = 100

    @property
    def strengths(self) -> tuple[float, ...]:
        return self.strength if isinstance(self.strength, tuple) else (self.strength,)


class Retention(_Section):
    """A pull towards the base's own answers on the retained tasks' training text while the rows are trained."""

    weight: float = Field(default=1.0, ge=0.0)
    items_per_step: Count = 3
    items_per_task: Count = 250


class FineTune(_Section):
    """Light training of the transferred rows alone; `steps: 0` leaves the transfer as it is.

    `loss: data` is the NLL of the data's answers; `distill` mixes in the KL divergence from the source model on the
    same answers: (1 - distill_weight)·NLL + distill_weight·KL(source ‖ tuned).

    `company` names compositions of stored abilities, as requests do: `fr`, `fr@2`, `extract+fr*0.5`. Steps take turns:
    the rows alone, then on top of each of these, which stay as they are; so the ability learns to work composed with
    them. Retention then holds to the base with the company. An ability without a version is the one
    that requests get.
    """

    steps: int = Field(default=100, ge=0)
    items: Count = 2000
    learning_rate: LearningRate = 5e-4
    batch_size: Count = 8
    gradient_accumulation: Count = 1
    loss: Literal["data", "distill"] = "data"
    distill_weight: Share = 0.5
    retention: Retention | None = None
    company: tuple[str, ...] = ()


class Search(_Section):
    """The smallest `p` that keeps the share `keep` of the source's gain on every `score` task, on validation data.

    The gain is (delta - base) / (source - base), by the task's metric and by its NLL, on `items` examples each. The
    search ends at the first p that keeps it, or with `whole_curve` goes through all.
    """

    keep: Share = 0.95
    p: Annotated[tuple[Share, ...], Field(min_length=1)] = (0.01, 0.02, 0.05, 0.1)
    items: Count = 100
    whole_curve: bool = False


class Task(_Section):
    """A held-out test: `items` examples of `data`, one `metric`; answers are cut after `max_new_tokens`."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")
    data: Data
    metric: Metric
    items: Count = 200
    max_new_tokens: Count = 96
    language: str | None = None

    @model_validator(mode="after")
    def _names_language(self) -> "Task":
        if self.metric == "language_share" and self.language is None:
            raise ValueError("the metric language_share needs a `language` such as fr")
        return self


class RetainedTask(Task):
    """A task that the ability must not cost more than `max_drop` (0.03 is 3 %) of the base's score.

    `train_data` names other text than `data` for the retention term, where the test text must stay unknown.
    """

    max_drop: float = Field(default=0.03, ge=0.0, le=1.0)
    train_data: Data | None = None


class Profile(_Section):
    """One ability profile. Field by field it mirrors the YAML file; unknown keys are refused.

    `stored: int8` keeps the rows in half the bytes; everything is measured as stored. `extends: OTHER.yaml`, a file in
    the same folder, takes the keys from there that this one lacks; a key with nothing behind it is left out.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")
    kind: Literal["language", "skill", "other"] = "skill"
    languages: tuple[str, ...] = ()
    description: str = Field(min_length=1)
    license: str = Field(min_length=1)
    exemplars: tuple[str, ...] = ()
    base: str = "embedded"
    seed: int = 0
    stored: Literal["bfloat16", "int8"] = "bfloat16"
    source: Source
    data: Data
    localize: Localize = Localize()
    transfer: Transfer = Transfer()
    finetune: FineTune = FineTune()
    search: Search | None = None
    score: tuple[Task, ...] = Field(min_length=1)
    retain: tuple[RetainedTask, ...] = ()

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> "Profile":
        if not self.source.ability:
            return self
        chosen = [name for name in ("localize", "transfer", "search") if name in self.model_fields_set]
        if chosen or self.finetune.loss == "distill":
            what = chosen[0] if chosen else "finetune.loss: distill"
            raise ValueError(f"`{what}` needs an ability model; `source.ability` brings its rows and no model")
        if not self.finetune.steps and len(self.source.ability) == 1:
            raise ValueError("with one `source.ability`, finetune.steps must be at least 1, or nothing would change")
        return self

    @model_validator(mode="after")
    def _source_differs_in_what_is_included(self) -> "Profile":
        if self.localize.include and self.source.train is not None:
            raise ValueError(
                f"`source.train` trains the linear modules alone, so {' and '.join(self.localize.include)} would not "
                "differ from the base; name a `source.model`, or leave `localize.include` out"
            )
        return self

    @model_validator(mode="after")
    def _retention_has_tasks(self) -> "Profile":
        if self.finetune.retention is not None and not self.retain:
            raise ValueError(
                "finetune.retention holds to the base on the text of the `retain` tasks, and there are none; add some, "
                "or leave finetune.retention out"
            )
        return self

    @model_validator(mode="after")
    def _names_differ(self) -> "Profile":
        names = [task.name for task in (*self.score, *self.retain)]
        if len(set(names)) != len(names):
            raise ValueError("two tasks in `score` and `retain` have the same name")
        return self
