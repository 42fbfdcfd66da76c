"""transformers' Trainer, set up for rows: a checkpoint holds the rows and their optimiser state alone."""

import logging
import shutil
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, TrainerState

from act_serve.errors import BuildError
from act_serve.pipeline.processes import is_first
from act_serve.pipeline.row_lesson import Course, RowLesson
from act_serve.pipeline.training import BETAS, CLIP_NORM, Report, Schedule
from act_serve.profile.schema import FineTune

CHECKPOINTS_PER_RUN = 10
_STATE = "trainer_state.json"
_FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", _STATE)

_log = logging.getLogger(__name__)


def training_arguments(folder: Path, settings: FineTune, seed: int, *, checkpoints: bool) -> TrainingArguments:
    """What Trainer is told; a batch of a `Course` counts as one item, and nothing is logged but to the progress bar."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=settings.gradient_accumulation,
        max_grad_norm=CLIP_NORM,
        save_strategy="steps" if checkpoints else "no",
        save_steps=max(1, settings.steps // CHECKPOINTS_PER_RUN),
        save_total_limit=2,  # where power fails, the last one may be torn
        logging_strategy="no",
        logging_nan_inf_filter=False,  # a loss that is not finite ends the build instead
        use_cpu=not torch.cuda.is_available(),  # else several processes without a GPU do not know of each other
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        seed=seed,
    )
    # One process trains on one device; more devices are used by one process each (accelerate launch).
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


class RowTrainer(Trainer):
    """Trains a `RowLesson` on a `Course` in its order; raises BuildError when the loss is not finite."""

    def __init__(self, lesson: RowLesson, course: Course, arguments: TrainingArguments, schedule: Schedule) -> None:
        lesson.to(arguments.device)
        rows = torch.optim.AdamW(lesson.parameters(), lr=1.0, betas=BETAS, weight_decay=0.0)
        super().__init__(
            model=lesson,
            args=arguments,
            train_dataset=course,
            data_collator=lambda batches: batches[0],
            optimizers=(rows, LambdaLR(rows, schedule.rate)),
        )
        self.remove_callback(PrinterCallback)
        self.losses: list[float] = []

    def run(self, report: Report) -> None:
        """Trains to the end, from the last whole checkpoint where there is one."""
        self.add_callback(_Progress(self.losses, report))
        self.train(resume_from_checkpoint=_last_whole(Path(str(self.args.output_dir))))

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)
        self.losses.append(self.args.gradient_accumulation_steps * float(loss))
        if not torch.isfinite(loss):
            raise BuildError(
                f"fine-tuning stopped: the loss became {self.losses[-1]} at step {self.state.global_step + 1}; "
                "lower finetune.learning_rate or transfer.strength. Earlier stages are kept"
            )
        return loss

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._save_checkpoint(*args, **kwargs)
        except (OSError, RuntimeError, SafetensorError) as exc:  # torch says a full disk by RuntimeError
            raise BuildError(
                f"fine-tuning could not keep a checkpoint in {self.args.output_dir}: {exc}; make room there"
            ) from exc

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)


def _last_whole(folder: Path) -> str | None:
    """The newest checkpoint that can be read to its end; newer ones go, or Trainer would keep them and not its own."""
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name[11:]), reverse=True):
        damage = _damage(checkpoint)
        if damage is None:
            return str(checkpoint)
        _log.warning("%s is damaged (%s); the checkpoint before it is taken, if there is one", checkpoint, damage)
        if is_first():
            shutil.rmtree(checkpoint, ignore_errors=True)
    return None


def _damage(checkpoint: Path) -> str | None:
    """What of a checkpoint is missing or was written in part, as when power failed."""
    for path in sorted({checkpoint / name for name in _FILES} | set(checkpoint.glob("*.pth"))):
        try:
            _check_whole(path)
        except (OSError, ValueError, TypeError, BadZipFile, SafetensorError) as exc:
            return f"{path.name}: {exc}"
    return None


def _check_whole(path: Path) -> None:
    if path.name == _STATE:
        TrainerState.load_from_json(str(path))
    elif path.suffix == ".safetensors":
        with safe_open(path, framework="pt"):
            return
    else:
        with ZipFile(path) as parts:  # as torch.save writes, with a checksum of every part
            if torn := parts.testzip():
                raise BadZipFile(f"{torn} has another checksum")


class _Progress(TrainerCallback):
    def __init__(self, losses: list[float], report: Report) -> None:
        self._losses, self._report = losses, report

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_more: Any) -> None:
        last = self._losses[-10:]
        self._report(state.global_step, state.max_steps, f"loss {sum(last) / len(last):.3f}")
