"""Only the given rows are trained, and adding them to outputs is the same as adding them to weights."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from act_serve.delta.artifact import ModuleDelta
from act_serve.errors import BuildError, DataError
from act_serve.models.answering import answer_logits
from act_serve.models.examples import Encoded, Example, collate
from act_serve.models.families import channel_modules
from act_serve.models.loading import load_model
from act_serve.models.row_delta import RowDeltas
from act_serve.pipeline.finetune import Lessons, finetune
from act_serve.pipeline.train_source import optimise, train_source
from act_serve.pipeline.training import Schedule
from act_serve.profile.schema import FineTune, Retention, TrainSource
from tests.tiny_models import make_llama, make_qwen

UP = "model.layers.0.mlp.up_proj"
KEY = "model.layers.0.self_attn.k_proj"
LESSONS = [Example("say", "abcabcabcabc")]


def delta(rows: list[int], width: int = 32, *, bias: bool = False) -> ModuleDelta:
    draw = torch.Generator().manual_seed(1)
    values = 0.3 * torch.randn(len(rows), width + 1, generator=draw)
    return ModuleDelta(torch.tensor(rows, dtype=torch.int32), values[:, :width], values[:, width] if bias else None)


def silent(_done: int, _total: int, _remark: str) -> None:
    pass


@pytest.mark.parametrize("weight", [1.0, 0.5, -0.25])
def test_outputs_equal_those_of_changed_weights(tmp_path: Path, weight: float) -> None:
    folder = make_qwen(tmp_path / "model")
    deltas = {UP: delta([0, 5, 63]), KEY: delta([1, 15], bias=True)}
    model, merged = load_model(folder, dtype="float32"), load_model(folder, dtype="float32")
    for name, given in deltas.items():
        merged.get_submodule(name).weight[given.rows.long()] += weight * given.delta
        if given.bias_delta is not None:
            merged.get_submodule(name).bias[given.rows.long()] += weight * given.bias_delta
    batch = collate([Encoded(tuple(range(20, 40)), 1), Encoded((9, 8, 7), 2)], 2)
    rows = RowDeltas(deltas, weight)
    plain = answer_logits(model, batch)
    with rows.attached(model):
        torch.testing.assert_close(answer_logits(model, batch), answer_logits(merged, batch), rtol=1e-4, atol=1e-5)
        with rows.bare():
            assert torch.equal(answer_logits(model, batch), plain)
    assert torch.equal(answer_logits(model, batch), plain)
    assert not torch.allclose(answer_logits(merged, batch), plain)


def test_rows_learn(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    losses: list[str] = []
    settings = FineTune(steps=40, batch_size=1, learning_rate=3e-2)
    given = {UP: delta(list(range(32))), KEY: delta(list(range(16)))}
    tuned = finetune(
        base=base,
        deltas=given,
        lessons=Lessons(LESSONS, []),
        settings=settings,
        seed=0,
        report=lambda _done, _total, remark: losses.append(remark),
    )
    assert float(losses[-1].split()[1]) < 0.7 * float(losses[0].split()[1])
    assert tuned.keys() == given.keys()
    assert all(torch.equal(tuned[name].rows, given[name].rows) for name in given)
    assert all(not torch.equal(tuned[name].delta, given[name].delta) for name in given)


def test_retention_pulls_back_to_the_base(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    size = {}
    for weight in (0.0, 100.0):
        tuned = finetune(
            base=base,
            deltas={UP: delta(list(range(32)))},
            lessons=Lessons(LESSONS, [Example("say", "abcabcabcabc")]),
            settings=FineTune(
                steps=20,
                batch_size=1,
                learning_rate=1e-2,
                retention=Retention(weight=weight, items_per_step=1),
            ),
            seed=0,
            report=silent,
        )
        size[weight] = float(tuned[UP].delta.norm())
    assert size[100.0] < size[0.0]


def test_examples_without_an_answer_token_are_refused_before_the_first_step(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    long, steps = Example("x" * 400, "yes"), []

    def report(done: int, _total: int, _remark: str) -> None:
        steps.append(done)

    for lessons, said in (
        (Lessons([*LESSONS, long], []), "^the training data: example 2 .* prompt of 4.. tokens"),
        (Lessons(LESSONS, [long]), "^the retained tasks' training text: example 1 .* prompt of 4.. tokens"),
    ):
        settings = FineTune(steps=1, retention=Retention())
        with pytest.raises(DataError, match=said):
            finetune(base=base, deltas={UP: delta([0])}, lessons=lessons, settings=settings, seed=0, report=report)
    with pytest.raises(DataError, match=r"^the training data: example 1"):
        train_source(
            base=base,
            examples=[long],
            settings=TrainSource(items=1, steps=1),
            seed=0,
            folder=tmp_path / "source",
            report=report,
        )
    assert not steps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_what_a_dense_training_leaves_alone_is_the_base_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    base, folder = make_llama(tmp_path / "base"), tmp_path / "source"
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.001)  # values that bfloat16 has not
    model.to(dtype).save_pretrained(base)
    before = load_file(base / "model.safetensors")

    def changed(rate: float) -> set[str]:
        settings = TrainSource(items=2, steps=1, learning_rate=rate, batch_size=1)
        train_source(base=base, examples=LESSONS, settings=settings, seed=0, folder=folder, report=silent)
        after = load_file(folder / "model.safetensors")
        assert {tensor.dtype for tensor in after.values()} == {dtype}
        return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}

    assert changed(1e-12) == set()
    assert changed(1e-2) == {f"{module.name}.weight" for module in channel_modules(base)}


def test_loss_that_explodes_is_an_error() -> None:
    parameter = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(BuildError, match="learning rate"):
        optimise([parameter], lambda: torch.tensor(float("nan")), Schedule(3, 1.0), silent)


def test_schedule_warms_up_and_falls() -> None:
    rates = [Schedule(100, 1.0).rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 8)
    assert max(rates) == rates[7]
    assert 0.04 < rates[-1] < 0.07
