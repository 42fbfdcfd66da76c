"""How much memory a build takes at its peak, reckoned from the shapes of the model: for the plan, before anything runs.

Weights alone say little: for a small model the logits of a batch are several times as large. Reckoned are batches whose
examples are all as long as they can be, so that stages take less: those of SmolLM2-135M's abilities took 0.55 to 0.95.
"""

from pathlib import Path

from act_serve.models.answering import NLL_BATCH
from act_serve.models.examples import MAX_TOKENS
from act_serve.models.families import channel_modules, read_config
from act_serve.models.loading import computing_dtype
from act_serve.pipeline.memory_use import model_bytes
from act_serve.profile.schema import FineTune, TrainSource

# Beside the logits in the computing dtype: as float32, their logarithms, and gradients of these or a copy on the way.
_LOGITS = 4 + 4 + 4
# The base's answers to retained text, and both answers' logarithms.
_RETAINED_LOGITS = _LOGITS + 4 + 4 + 4
# What allocators and compiled code of oneDNN take on top.
_SLACK = 1.25
# What of a layer waits for the backward pass, in hidden and in inner sizes: norms keep float32 copies of their input.
_KEPT_HIDDEN, _KEPT_INNER = 16, 4
# Bytes per trained value: float32 master, gradient, and Adam's two moments. Dense training holds weights and gradients
# of the linear layers in the computing dtype, too.
_TRAINED = 4 + 4 + 8


def evaluating(base: Path) -> int:
    """Bytes at the peak of scoring a model, its weights included."""
    logits = NLL_BATCH * MAX_TOKENS * _vocabulary(base) * (computing_dtype().itemsize + _LOGITS)
    return int(_SLACK * (model_bytes(base) + logits))


def training_source(base: Path, settings: TrainSource) -> int:
    """Bytes at the peak of training the ability model densely."""
    trained = _linear_values(base) * (_TRAINED + 2 * computing_dtype().itemsize)
    return int(_SLACK * (model_bytes(base) + trained + _step(base, settings.batch_size)))


def tuning_rows(base: Path, settings: FineTune, p: float) -> int:
    """Bytes at the peak of training a share p of the linear layers' rows: of these alone there is optimizer state."""
    rows = int(_linear_values(base) * p)
    held = rows * (_TRAINED + 4 * len(settings.company))  # others' rows lie beneath as float32
    if settings.retention is not None:
        held += _step(base, settings.retention.items_per_step, _RETAINED_LOGITS)
    models = 2 if settings.loss == "distill" else 1
    return int(_SLACK * (models * model_bytes(base) + held + _step(base, settings.batch_size)))


def _step(base: Path, items: int, logits: int = _LOGITS) -> int:
    """What a step of so many items holds until its gradients are there."""
    config, size = read_config(base), computing_dtype().itemsize
    layer = _KEPT_HIDDEN * config["hidden_size"] + _KEPT_INNER * config["intermediate_size"]
    token = config["num_hidden_layers"] * layer * size + _vocabulary(base) * (size + logits)
    return items * MAX_TOKENS * token


def _linear_values(base: Path) -> int:
    return sum(module.out_features * module.in_features for module in channel_modules(base))


def _vocabulary(base: Path) -> int:
    return int(read_config(base)["vocab_size"])
