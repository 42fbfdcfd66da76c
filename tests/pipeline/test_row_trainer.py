"""Training of rows: resumed runs end where uninterrupted ones do, and checkpoints hold the rows alone."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from act_serve.abilities.store import Store
from act_serve.delta.artifact import ModuleDelta
from act_serve.errors import BaseMismatchError, BuildError
from act_serve.models.answering import answer_logits
from act_serve.models.examples import Example, collate, encode
from act_serve.models.loading import load_model, load_tokenizer
from act_serve.models.row_delta import RowDeltas
from act_serve.pipeline.finetune import Lessons, finetune
from act_serve.pipeline.neighbours import company
from act_serve.pipeline.training import Report, divergence
from act_serve.profile.schema import FineTune, Retention
from tests.abilities_for_tests import merged_model, publish_random
from tests.tiny_models import make_llama, plant

UP = "model.layers.0.mlp.up_proj"
DOWN = "model.layers.1.mlp.down_proj"
LESSONS = Lessons([Example("say", text) for text in ("abcabc", "xyz", "hello there")], [Example(None, "plain text")])
RETENTION = Retention(weight=0.5, items_per_step=1)


class Interrupted(Exception):
    """Stands for whatever ends a build in the middle."""


def zeros(rows: int) -> dict[str, ModuleDelta]:
    index = torch.arange(rows, dtype=torch.int32)
    return {UP: ModuleDelta(index, torch.zeros(rows, 32), None), DOWN: ModuleDelta(index, torch.zeros(rows, 64), None)}


def silent(_done: int, _total: int, _remark: str) -> None:
    pass


def stop_after(steps: int) -> Report:
    def report(done: int, _total: int, _remark: str) -> None:
        if done == steps:
            raise Interrupted

    return report


@pytest.mark.parametrize("accumulation", [1, 2])
def test_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path: Path, accumulation: int) -> None:
    base = make_llama(tmp_path / "base")
    settings = FineTune(
        steps=20, batch_size=2, learning_rate=1e-2, gradient_accumulation=accumulation, retention=RETENTION
    )
    folder = tmp_path / "checkpoints"

    def run(report: Report, checkpoints: Path | None) -> dict[str, ModuleDelta]:
        return finetune(
            base=base,
            deltas=zeros(8),
            lessons=LESSONS,
            settings=settings,
            seed=3,
            report=report,
            checkpoints=checkpoints,
        )

    whole = run(silent, None)
    with pytest.raises(Interrupted):
        run(stop_after(13), folder)
    assert {kept.name for kept in folder.iterdir()} == {"checkpoint-10", "checkpoint-12"}
    saved = load_file(folder / "checkpoint-12" / "model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == 8 * (32 + 64)
    (folder / "checkpoint-14").mkdir()  # one that was being written when the machine went down
    steps: list[int] = []
    resumed = run(lambda done, _total, _remark: steps.append(done), folder)
    assert steps == list(range(13, 21))
    assert all(torch.equal(resumed[name].delta, whole[name].delta) for name in whole)
    assert all(delta.delta.abs().sum() > 0 for delta in whole.values())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:50])


def lose(path: Path) -> None:
    path.unlink(missing_ok=True)


def blank_the_middle(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3 : len(data) // 3 + 512] = bytes(512)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("file", "tear"),
    [
        ("trainer_state.json", cut),
        ("optimizer.pt", cut),
        ("optimizer.pt", blank_the_middle),
        ("optimizer.pt", lose),
        ("rng_state.pth", cut),
        ("model.safetensors", cut),
    ],
)
def test_a_torn_checkpoint_is_passed_over(
    tmp_path: Path, file: str, tear: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    base, folder = make_llama(tmp_path / "base"), tmp_path / "checkpoints"

    def run(report: Report) -> dict[str, ModuleDelta]:
        settings = FineTune(steps=10, batch_size=2, learning_rate=1e-2)
        return finetune(
            base=base, deltas=zeros(8), lessons=LESSONS, settings=settings, seed=3, report=report, checkpoints=folder
        )

    with pytest.raises(Interrupted):
        run(stop_after(6))
    tear(folder / "checkpoint-5" / file)
    steps: list[int] = []

    def stop(done: int, _total: int, _remark: str) -> None:
        steps.append(done)
        raise Interrupted

    with pytest.raises(Interrupted):
        run(stop)
    assert steps == [5]
    assert f"checkpoint-5 is damaged ({file}: " in caplog.text
    assert {path.name for path in folder.iterdir()} == {"checkpoint-4"}
    for checkpoint in folder.iterdir():
        tear(checkpoint / file)
    with pytest.raises(Interrupted):
        run(stop_after(3))
    assert {path.name for path in folder.iterdir()} == {"checkpoint-1", "checkpoint-2"}
    tear(folder / "checkpoint-1" / file)
    tear(folder / "checkpoint-2" / file)
    run(lambda done, _total, _remark: steps.append(done))
    assert steps[1:] == list(range(1, 11))


def test_accumulated_batches_count_as_one(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    lessons = Lessons([Example("say", "abcdef")], [])
    tuned = [
        finetune(
            base=base,
            deltas=zeros(8),
            lessons=lessons,
            settings=FineTune(steps=3, batch_size=1, learning_rate=1e-2, gradient_accumulation=count),
            seed=0,
            report=silent,
        )
        for count in (1, 4)
    ]
    torch.testing.assert_close(tuned[0][UP].delta, tuned[1][UP].delta, rtol=1e-4, atol=1e-6)


def test_distilled_rows_answer_as_the_source_does(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    plant(base, tmp_path / "source", p=0.5, scale=0.5)
    model, source, tokenizer = (
        load_model(base),
        load_model(tmp_path / "source"),
        load_tokenizer(base),
    )
    batch = collate([encode(tokenizer, example) for example in LESSONS.ability], 2)
    settings = FineTune(steps=40, batch_size=3, learning_rate=1e-2, loss="distill", distill_weight=1.0)
    tuned = finetune(
        base=base,
        source=tmp_path / "source",
        deltas=zeros(32),
        lessons=LESSONS,
        settings=settings,
        seed=0,
        report=silent,
    )
    with torch.no_grad():
        wanted = answer_logits(source, batch)
        before = divergence(wanted, answer_logits(model, batch))
        with RowDeltas(tuned).attached(model):
            after = divergence(wanted, answer_logits(model, batch))
    assert after < 0.5 * before


def test_distillation_needs_the_source(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    with pytest.raises(BuildError, match="needs the source model"):
        finetune(
            base=base,
            deltas=zeros(2),
            lessons=LESSONS,
            settings=FineTune(steps=1, loss="distill"),
            seed=0,
            report=silent,
        )


def test_a_checkpoint_that_cannot_be_written_says_where(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "checkpoint-1").write_text("in the way")
    with pytest.raises(BuildError, match=r"could not keep a checkpoint in \S*kept: "):
        finetune(
            base=base,
            deltas=zeros(2),
            lessons=LESSONS,
            settings=FineTune(steps=1),
            seed=0,
            report=silent,
            checkpoints=tmp_path / "kept",
        )


def test_a_loss_that_is_not_finite_ends_the_build(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    broken = {UP: ModuleDelta(torch.tensor([0], dtype=torch.int32), torch.full((1, 32), torch.nan), None)}
    with pytest.raises(BuildError, match=r"became nan at step 1; lower finetune\.learning_rate"):
        finetune(
            base=base,
            deltas=broken,
            lessons=Lessons(LESSONS.ability, []),
            settings=FineTune(steps=2),
            seed=0,
            report=silent,
        )


def test_company_is_on_beneath_in_turn_and_stays_as_it_is(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    other = {UP: ModuleDelta(torch.tensor([3, 5], dtype=torch.int32), torch.randn(2, 32), None)}

    def run(others: list[dict[str, ModuleDelta]], steps: int) -> torch.Tensor:
        settings = FineTune(steps=steps, batch_size=2)
        tuned = finetune(
            base=base, deltas=zeros(2), lessons=LESSONS, settings=settings, seed=0, report=silent, company=others
        )
        return tuned[UP].delta

    before = other[UP].delta.clone()
    assert torch.equal(run([other], 1), run([], 1))  # the first step is on the base alone
    assert not torch.equal(run([other], 2), run([], 2))
    assert torch.equal(other[UP].delta, before)


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("missing", "company names missing,"),
        ("r1@7", "company names r1@7,"),
        ("new", "company names new,"),
        ("r1+", "cannot read ''"),
        ("r1*0", "'r1\\*0' names no ability"),
    ],
)
def test_company_that_cannot_be_is_refused(tmp_path: Path, named: str, said: str) -> None:
    base, store = make_llama(tmp_path / "base"), Store(tmp_path / "store")
    publish_random(store, base, "r1", seed=1)
    publish_random(store, base, "new", seed=1)
    profile = SimpleNamespace(name="new", finetune=FineTune(company=(named,)))
    with pytest.raises(BuildError, match=said):
        company(profile, store, base)  # type: ignore[arg-type]


def test_company_of_another_base_is_refused(tmp_path: Path) -> None:
    base, other = make_llama(tmp_path / "base"), make_llama(tmp_path / "other", seed=1)
    store = Store(tmp_path / "store")
    publish_random(store, other, "r1", seed=1)
    publish_random(store, base, "r1", seed=2, version=2)
    profile = SimpleNamespace(name="new", finetune=FineTune(company=("r1@1",)))
    with pytest.raises(BaseMismatchError, match="r1@1"):
        company(profile, store, base)  # type: ignore[arg-type]


def test_company_is_what_a_request_with_this_composition_gets(tmp_path: Path) -> None:
    base, store = make_llama(tmp_path / "base"), Store(tmp_path / "store")
    for version in (1, 2):
        publish_random(store, base, "r1", seed=version, version=version)
    publish_random(store, base, "r2", seed=3)
    profile = SimpleNamespace(name="new", finetune=FineTune(company=("r1@1*0.5+r2", "r1")))
    both, latest = company(profile, store, base)  # type: ignore[arg-type]
    bare, merged = merged_model(base, store, ""), merged_model(base, store, "r1@1*0.5+r2")
    for name, module in both.deltas.items():
        changed = bare.get_submodule(name).weight.detach().clone()
        changed[module.rows] += module.delta
        assert torch.allclose(changed, merged.get_submodule(name).weight, atol=1e-6)
    assert latest.key == ((store.manifest("r1", 2).tensors_sha256, 1.0),)
    assert len({both.key, latest.key}) == 2
