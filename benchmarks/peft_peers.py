"""LoRA and SHiRA by PEFT, trained exactly as rows are: same trainer, batches, schedule, loss and retention term."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, ShiraConfig, get_peft_model
from torch import Tensor, nn

from act_serve.delta.artifact import ModuleDelta
from act_serve.models.families import ChannelModule, channel_modules
from act_serve.models.loading import load_model, load_tokenizer
from act_serve.models.row_delta import RowDeltas
from act_serve.models.row_reader import open_rows
from act_serve.pipeline.evaluate import Question, evaluate
from act_serve.pipeline.finetune import Lessons, make_course
from act_serve.pipeline.measured import Measured
from act_serve.pipeline.row_lesson import RowLesson
from act_serve.pipeline.row_trainer import RowTrainer, training_arguments
from act_serve.pipeline.training import Report, Schedule
from act_serve.profile.schema import FineTune

BYTES_PER_VALUE = {"lora": 2, "lora_svd": 2, "shira": 2 + 4}  # SHiRA's values each need their place


@dataclass(frozen=True, slots=True)
class Peer:
    """`method` is lora, lora_svd or shira; its rank is the one that comes nearest to `stored_bytes`."""

    method: str
    stored_bytes: int
    base: Path
    source: Path


@dataclass(frozen=True, slots=True)
class Beside:
    """Abilities, called `composition`, that are added to every method, and what is asked then."""

    composition: str
    deltas: Sequence[Mapping[str, ModuleDelta]]
    questions: Sequence[Question]

    def name_of(self, task: str) -> str:
        """The name of a task that is measured with these abilities, too."""
        return f"{task}_with_{self.composition}"


class _Adapter:
    """The adapter in the place that the rows have in a lesson: its parameters, and the model without it."""

    def __init__(self, model: PeftModel) -> None:
        self._model = model

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self._model.parameters() if parameter.requires_grad]

    @contextmanager
    def bare(self) -> Iterator[None]:
        with self._model.disable_adapter():
            yield


def train_peer(
    peer: Peer,
    lessons: Lessons,
    questions: list[Question],
    settings: FineTune,
    seed: int,
    teacher: Any | None,
    report: Report,
    beside: Beside | None = None,
) -> tuple[dict[str, Measured], int, int]:
    """Returns the results of the adapter in bfloat16, its bytes and its parameters."""
    torch.manual_seed(seed)
    model, tokenizer = load_model(peer.base), load_tokenizer(peer.base)
    modules = channel_modules(peer.base)
    rank = fitting_rank(peer, modules)
    adapted = get_peft_model(model, _config(peer.method, rank, modules, seed))
    if peer.method == "lora_svd":
        _start_from_source(adapted, peer, modules, rank)
    tuned = _Adapter(adapted)
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(Path(folder), settings, seed, checkpoints=False)
        course = make_course(tokenizer, lessons, settings, seed, processes=arguments.world_size)
        lesson = RowLesson(model, teacher, tuned, settings)  # type: ignore[arg-type]
        RowTrainer(lesson, course, arguments, Schedule(settings.steps, settings.learning_rate)).run(report)
    parameters = sum(each.numel() for each in tuned.parameters())
    with torch.no_grad():
        for each in tuned.parameters():
            each.copy_(each.bfloat16())
    adapted.eval()
    results = evaluate(model, tokenizer, questions)
    if beside is not None and beside.questions:
        with ExitStack() as stack:
            for deltas in beside.deltas:
                stack.enter_context(RowDeltas(deltas).attached(model))
            results |= evaluate(model, tokenizer, beside.questions)
    return results, parameters * BYTES_PER_VALUE[peer.method], parameters


def fitting_rank(peer: Peer, modules: list[ChannelModule]) -> int:
    """SHiRA has as many values as a LoRA of the same rank (peft's ShiraConfig)."""
    per_rank = BYTES_PER_VALUE[peer.method] * sum(each.in_features + each.out_features for each in modules)
    return max(1, round(peer.stored_bytes / per_rank))


def _config(method: str, rank: int, modules: list[ChannelModule], seed: int) -> LoraConfig | ShiraConfig:
    targets = [module.name for module in modules]
    if method == "shira":
        return ShiraConfig(r=rank, random_seed=seed, target_modules=targets, task_type="CAUSAL_LM")
    return LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM")


def _start_from_source(adapted: PeftModel, peer: Peer, modules: list[ChannelModule], rank: int) -> None:
    """Sets B·A of every module to the best approximation, at this rank, of W(source) - W(base)."""
    with open_rows(peer.base) as left, open_rows(peer.source) as right, torch.no_grad():
        for module in modules:
            every = list(range(module.out_features))
            tensor = f"{module.name}.weight"
            b_OR, a_RI = _factors(right.rows(tensor, every).float() - left.rows(tensor, every).float(), rank)
            layer = adapted.get_submodule(f"base_model.model.{module.name}")
            layer.lora_A["default"].weight.copy_(a_RI)
            layer.lora_B["default"].weight.copy_(b_OR)


def _factors(difference_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    u_OR, s_R, v_IR = torch.svd_lowrank(difference_OI, q=min(rank + 8, min(difference_OI.shape)), niter=4)
    root_R = s_R[:rank].sqrt()
    return u_OR[:, :rank] * root_R, (v_IR[:, :rank] * root_R).T
