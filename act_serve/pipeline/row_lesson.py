"""What light fine-tuning optimises, as a module whose only parameters are the rows, and the data it goes through."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

from act_serve.models.answering import answer_logits
from act_serve.models.examples import Batch, Encoded, collate
from act_serve.models.row_delta import RowDeltas
from act_serve.pipeline.training import divergence, training_groups
from act_serve.profile.schema import FineTune


class RowLesson(nn.Module):
    """The loss of one batch under rows on a frozen base: NLL, the teacher's logits, and drift on retained text.

    `loss = (1 - w)·NLL + w·KL(teacher ‖ tuned) + r·KL(base ‖ tuned)`: the first two on the ability's answers (w is 0
    without a teacher), the last on retained text. `company` are frozen rows that may be on beneath. The frozen models
    are not sub-modules, so that state dict, gradients, optimiser and checkpoints hold the rows alone.
    """

    def __init__(
        self,
        base: Any,
        teacher: Any | None,
        tuned: RowDeltas,
        settings: FineTune,
        company: Sequence[RowDeltas] = (),
    ) -> None:
        super().__init__()
        self.rows = nn.ParameterList(tuned.parameters())
        self._frozen = (base, teacher)
        self._tuned, self._company = tuned, company
        self._distilled = settings.distill_weight if teacher is not None else 0.0
        self._retained = settings.retention.weight if settings.retention is not None else 0.0

    def forward(self, ability: Batch, retained: Batch | None = None, companion: int = 0) -> dict[str, Tensor]:
        """Returns `{"loss": scalar}`; `companion` n puts the rows on top of the n-th of the company, 0 on the base."""
        for number, other in enumerate(self._company, start=1):
            other.on = number == companion
        loss = self._taught(ability)
        if retained is not None:
            loss = loss + self._retained * self._drift(retained)
        return {"loss": loss}

    def _taught(self, batch: Batch) -> Tensor:
        base, teacher = self._frozen
        logits_NV = answer_logits(base, batch)
        loss = cross_entropy(logits_NV, batch.targets_N.to(logits_NV.device))
        if teacher is None:
            return loss
        with torch.no_grad():
            wanted_NV = answer_logits(teacher, batch)
        return (1 - self._distilled) * loss + self._distilled * divergence(wanted_NV, logits_NV)

    def _drift(self, batch: Batch) -> Tensor:
        base, _ = self._frozen
        with torch.no_grad(), self._tuned.bare():
            wanted_NV = answer_logits(base, batch)
        return divergence(wanted_NV, answer_logits(base, batch))


@dataclass(frozen=True, slots=True)
class _Groups:
    ability: list[list[Encoded]]
    retained: list[list[Encoded]]


class Course(Dataset[dict[str, Batch | int]]):
    """The batches of a training run by their number, so that a resumed run goes on with the right one.

    `turns` is 1 and the number of the company: the batches take turns between the base and each of it.
    """

    def __init__(
        self,
        ability: Sequence[Encoded],
        retained: Sequence[Encoded],
        *,
        settings: FineTune,
        pad_id: int,
        seed: int,
        batches: int,
        turns: int = 1,
    ) -> None:
        per_step = settings.retention.items_per_step if settings.retention else 1
        kept = list(islice(training_groups(retained, per_step, seed), batches)) if retained else []
        self._groups = _Groups(list(islice(training_groups(ability, settings.batch_size, seed), batches)), kept)
        self._pad_id, self._turns = pad_id, turns

    def __len__(self) -> int:
        return len(self._groups.ability)

    def __getitem__(self, number: int) -> dict[str, Batch | int]:
        batch: dict[str, Batch | int] = {"ability": collate(self._groups.ability[number], self._pad_id)}
        batch["companion"] = number % self._turns
        if self._groups.retained:
            batch["retained"] = collate(self._groups.retained[number], self._pad_id)
        return batch
