"""Scores are what their formulas say."""

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch.nn.functional import cross_entropy

from act_serve.delta.channels import OUTSIDE
from act_serve.errors import BuildError, DataError, ModelError, PairMismatchError
from act_serve.models.examples import Example
from act_serve.models.loading import load_model, untie
from act_serve.models.row_reader import as_rows
from act_serve.pipeline.calibrate import score_channels
from act_serve.pipeline.rankings.catalogue import RANKINGS
from act_serve.pipeline.rankings.score import Pair
from act_serve.profile.schema import Ranking
from tests.tiny_models import make_llama, plant

TEXTS = [Example("question", "the answer is " + letter * 9) for letter in "abc"]
MODULE = "model.layers.1.mlp.up_proj"


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    base = make_llama(tmp_path / "base")
    plant(base, tmp_path / "source", p=0.125, scale=0.3)
    return Pair(base, tmp_path / "source", tuple(TEXTS))


def scores(ranking: Ranking, pair: Pair) -> dict[str, torch.Tensor]:
    return score_channels(ranking, base=pair.base, source=pair.source, examples=list(pair.examples))


def test_every_ranking_has_a_method() -> None:
    assert set(RANKINGS) == set(get_args(Ranking))


def test_gradient_is_the_derivative_towards_the_source(pair: Pair) -> None:
    found = scores("gradient", pair)[MODULE]
    base, source = (load_model(folder, dtype="float32") for folder in (pair.base, pair.source))
    weight = base.get_submodule(MODULE).weight
    difference = source.get_submodule(MODULE).weight - weight
    (batch,) = pair.batches()
    with torch.enable_grad():
        weight.requires_grad_(True)
        logits = base(input_ids=batch.ids_BT, attention_mask=batch.mask_BT).logits
        cross_entropy(logits[batch.predicts_BT], batch.targets_N).backward()
    wanted = (weight.grad * difference).sum(1).abs().double()
    assert wanted.max() > 0
    torch.testing.assert_close(found, wanted, rtol=0.1, atol=0.05 * float(wanted.max()))


def test_own_effect_leaves_upstream_changes_out(pair: Pair) -> None:
    found, differences = scores("activation_weight", pair)[MODULE], scores("activation_global", pair)[MODULE]
    weights = scores("weight_relative", pair)[MODULE]
    assert torch.equal(found > 0, weights > 0)
    assert (differences > 0).sum() > (weights > 0).sum()


def test_relative_differs_by_one_factor_per_module(pair: Pair) -> None:
    relative, plain = scores("activation_relative", pair), scores("activation_global", pair)
    factors = {name: (plain[name] / relative[name]).nan_to_num() for name in (MODULE, "model.layers.0.mlp.down_proj")}
    for factor in factors.values():
        positive = factor[factor > 0]
        torch.testing.assert_close(positive, positive[:1].expand_as(positive))


@pytest.mark.parametrize("kind", ["activation", "weight"])
def test_relative_to_the_channel_is_a_share_of_its_own_size(pair: Pair, kind: str) -> None:
    """A row that grows tenfold in both models has the same share of change."""
    plain: Ranking = "activation_global" if kind == "activation" else "weight_relative"
    relative: Ranking = "activation_channel_relative" if kind == "activation" else "weight_channel_relative"
    before = scores(plain, pair)[MODULE], scores(relative, pair)[MODULE]
    row = int(before[0].argmax())
    for folder in (pair.base, pair.source):
        model = load_model(folder, dtype="float32")
        model.get_submodule(MODULE).weight.data[row] *= 10
        model.save_pretrained(folder)
    after = scores(plain, pair)[MODULE], scores(relative, pair)[MODULE]
    torch.testing.assert_close(after[0][row], 10 * before[0][row], rtol=0.02, atol=0)
    torch.testing.assert_close(after[1][row], before[1][row], rtol=0.02, atol=0)


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def whole_pair(tmp_path: Path, request: pytest.FixtureRequest) -> Pair:
    """Two models that differ in norms, lm_head and embedding, too."""
    base = make_llama(tmp_path / "base", tied=request.param)
    plant(base, tmp_path / "source", p=0.125, scale=0.3, include=OUTSIDE)
    return Pair(base, tmp_path / "source", tuple(TEXTS), include=OUTSIDE)


def whole_scores(ranking: Ranking, pair: Pair) -> dict[str, torch.Tensor]:
    examples = list(pair.examples)
    return score_channels(ranking, base=pair.base, source=pair.source, examples=examples, include=pair.include)


def test_norms_head_and_embedding_are_ranked_by_their_own_difference(whole_pair: Pair) -> None:
    weights, effects, gradients = (
        whole_scores(ranking, whole_pair) for ranking in ("weight_relative", "activation_weight", "gradient")
    )
    activations = whole_scores("activation_global", whole_pair)
    base, source = (untie(load_model(folder, dtype="float32")) for folder in (whole_pair.base, whole_pair.source))
    (batch,) = whole_pair.batches()
    with torch.enable_grad():
        for name in ("model.norm", "lm_head", "model.embed_tokens"):
            base.get_submodule(name).weight.requires_grad_(True)
        decoded = base.model(input_ids=batch.ids_BT, attention_mask=batch.mask_BT).last_hidden_state
        logits_NV = base.lm_head(decoded[batch.predicts_BT])
        cross_entropy(logits_NV, batch.targets_N).backward()
    hidden_NH, ids_N = decoded[batch.predicts_BT].detach(), batch.ids_BT[batch.predicts_BT]
    own = {
        "model.norm": lambda delta: hidden_NH / base.model.norm.weight.detach() * delta[:, 0],
        "lm_head": lambda delta: hidden_NH @ delta.T,
        "model.embed_tokens": lambda delta: delta[:, ids_N].T,
    }
    for name, effect in own.items():
        before, after = (as_rows(name, model.get_submodule(name).weight.detach()) for model in (base, source))
        difference = after - before
        assert difference.any()
        torch.testing.assert_close(weights[name], difference.double().square().mean(1).sqrt())
        wanted = effect(difference).abs().mean(0).double()
        torch.testing.assert_close(effects[name], wanted, rtol=0.02, atol=0.02 * float(wanted.max()))
        wanted = (as_rows(name, base.get_submodule(name).weight.grad) * difference).sum(1).abs().double()
        torch.testing.assert_close(gradients[name], wanted, rtol=0.1, atol=0.05 * float(wanted.max()))
        assert activations[name].shape == (len(difference),)
        assert activations[name].max() > 0
    moved = (source.model.embed_tokens(ids_N) - base.model.embed_tokens(ids_N)).abs().mean(0).double()
    torch.testing.assert_close(
        activations["model.embed_tokens"], moved.detach(), rtol=0.02, atol=0.02 * moved.max().item()
    )


@pytest.mark.parametrize("ranking", ["activation_relative", "activation_weight", "gradient"])
def test_without_examples(pair: Pair, ranking: Ranking) -> None:
    with pytest.raises(DataError, match="no answer token"):
        scores(ranking, Pair(pair.base, pair.source))


@pytest.mark.parametrize("ranking", ["activation_global", "activation_weight", "gradient"])
def test_too_few_answer_tokens(pair: Pair, ranking: Ranking) -> None:
    few = (Example("question", "yes"), Example("a question that is far longer than what is read " * 20, "yes"))
    with pytest.raises(DataError, match="2 calibration examples hold 4 answer tokens"):
        scores(ranking, Pair(pair.base, pair.source, few))


@pytest.mark.parametrize("ranking", get_args(Ranking))
def test_nan_in_a_model(pair: Pair, ranking: Ranking) -> None:
    if ranking == "random":
        pytest.skip("looks at no model")
    broken = load_model(pair.source)
    broken.get_submodule(MODULE).weight[3, 5] = float("nan")
    broken.save_pretrained(pair.source)
    with pytest.raises(ModelError, match="NaN or infinite"):
        scores(ranking, pair)


def test_models_that_do_not_differ(pair: Pair) -> None:
    for ranking in ("weight_relative", "activation_global", "gradient", "random"):
        with pytest.raises(PairMismatchError, match="does not differ"):
            scores(ranking, Pair(pair.base, pair.base, pair.examples))


def of_the_gpu(*_: object, **__: object) -> torch.Tensor:
    raise torch.OutOfMemoryError("too large")


def of_main_memory(*_: object, **__: object) -> torch.Tensor:
    return torch.empty(10**15)


@pytest.mark.parametrize("starved", [of_the_gpu, of_main_memory])
@pytest.mark.parametrize(
    "at", ["act_serve.pipeline.rankings.gradient.cross_entropy", "transformers.AutoModelForCausalLM.from_pretrained"]
)
def test_out_of_memory_says_what_to_do(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, at: str, starved: Callable[..., torch.Tensor]
) -> None:
    monkeypatch.setattr(at, starved)
    with pytest.raises(BuildError, match=r"out of memory while ranking by gradient: .*weight_relative"):
        scores("gradient", pair)


def test_another_failure_is_not_taken_for_a_lack_of_memory(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> torch.Tensor:
        return torch.ones(2) @ torch.ones(3)

    monkeypatch.setattr("act_serve.pipeline.rankings.gradient.cross_entropy", fails)
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        scores("gradient", pair)
