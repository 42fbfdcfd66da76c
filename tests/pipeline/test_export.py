"""A merged checkpoint is the base with the deltas added, and loads in transformers."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from act_serve.abilities.store import Store
from act_serve.delta.artifact import ModuleDelta, serialize_modules, write_artifact
from act_serve.delta.fingerprint import fingerprint_model
from act_serve.errors import BaseMismatchError, ModelError, RequestError, UnknownAbilityError
from act_serve.pipeline.compose import artifacts_of, compose, score_composition
from act_serve.pipeline.datasets.catalogue import Example
from act_serve.pipeline.export import export_hf
from act_serve.pipeline.export_patch import export_patch
from act_serve.pipeline.export_peft import export_peft
from act_serve.pipeline.publish import channel_counts
from tests.abilities_for_tests import manifest_for, merged_model, publish_random
from tests.tiny_models import make_llama, make_qwen

UP = "model.layers.0.mlp.up_proj"
KEY = "model.layers.0.self_attn.k_proj"


def publish(store: Path, base: Path, name: str, deltas: dict[str, ModuleDelta]) -> Path:
    tensors = serialize_modules(deltas)
    manifest = manifest_for(base, name, 1, deltas, tensors)
    return write_artifact(Store(store).path(name, 1), manifest, tensors)


def delta(rows: list[int], *, bias: bool = False) -> ModuleDelta:
    values = torch.randn(len(rows), 33, generator=torch.Generator().manual_seed(len(rows))).bfloat16()
    return ModuleDelta(torch.tensor(rows, dtype=torch.int32), values[:, :32], values[:, 32] if bias else None)


def test_weighted_sum_on_shared_rows_and_biases(tmp_path: Path) -> None:
    base = make_qwen(tmp_path / "base")
    one, two = {UP: delta([1, 4]), KEY: delta([0, 3, 9], bias=True)}, {UP: delta([4, 9, 60])}
    publish(tmp_path / "store", base, "one", one)
    publish(tmp_path / "store", base, "two", two)
    chosen = artifacts_of("one+two*0.5", tmp_path / "store")
    folder = export_hf(base=base, deltas=compose(chosen, base), folder=tmp_path / "merged", dtype="float32")
    before = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
    after = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    for deltas, weight in ((one, 1.0), (two, 0.5)):
        for name, given in deltas.items():
            before[f"{name}.weight"][given.rows.long()] += weight * given.delta.float()
            if given.bias_delta is not None:
                before[f"{name}.bias"][given.rows.long()] += weight * given.bias_delta.float()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sharded", [False, True])
def test_norms_head_and_embedding_of_a_tied_base(tmp_path: Path, sharded: bool) -> None:
    base, store = make_llama(tmp_path / "base", tied=True), Store(tmp_path / "store")
    if sharded:
        AutoModelForCausalLM.from_pretrained(base).save_pretrained(base, max_shard_size="20KB")
        (base / "model.safetensors").unlink()
    publish_random(store, base, "all", seed=1, share=0.2, scale=0.3, outside=True)
    deltas = compose(artifacts_of("all*0.5", store.root), base)
    folder = export_hf(base=base, deltas=deltas, folder=tmp_path / "merged", dtype="float32")
    before, after = merged_model(base, store, "all*0.5"), AutoModelForCausalLM.from_pretrained(folder)
    assert not after.config.tie_word_embeddings
    assert after.lm_head.weight is not after.model.embed_tokens.weight
    changed, plain = before.state_dict(), AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
    for name, tensor in after.state_dict().items():
        torch.testing.assert_close(tensor, changed[name], rtol=1e-6, atol=1e-6)
        assert not torch.equal(tensor, plain[name]), name
    if sharded:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in after.state_dict().values())
    for export in (export_patch, partial(export_peft, channels=channel_counts(base))):
        with pytest.raises(RequestError, match="--to hf"):
            export(base=base, deltas=deltas, folder=tmp_path / "none")
    only_norms = {name: delta for name, delta in deltas.items() if name.endswith("norm")}
    tied = export_hf(base=base, deltas=only_norms, folder=tmp_path / "tied")
    assert AutoModelForCausalLM.from_pretrained(tied).config.tie_word_embeddings


def test_dtype_is_the_base_s_and_the_folder_is_new(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    folder = export_hf(base=base, deltas={}, folder=tmp_path / "merged")
    assert fingerprint_model(folder) == fingerprint_model(base)
    with pytest.raises(ModelError, match="exists already"):
        export_hf(base=base, deltas={}, folder=folder)


def test_other_base_is_refused(tmp_path: Path) -> None:
    base, other = make_llama(tmp_path / "base"), make_llama(tmp_path / "other", seed=1)
    artifact = publish(tmp_path / "store", base, "one", {UP: delta([1, 4])})
    with pytest.raises(BaseMismatchError):
        compose([(artifact, 1.0)], other)
    wide = make_llama(tmp_path / "wide", hidden=64)
    for export in (export_hf, export_patch):
        with pytest.raises(BaseMismatchError, match=r"mlp.up_proj.weight, \(32,\) long; in .* \(128, 64\)"):
            export(base=wide, deltas={UP: delta([1, 4])}, folder=tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "other", "wide", "store"}


def test_shards_and_dtype_are_kept_or_changed_everywhere(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    (tmp_path / "sharded" / "model.safetensors").unlink(missing_ok=True)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    deltas = {UP: delta([1, 4]), KEY: delta([0, 3])}
    whole = export_hf(base=base, deltas=deltas, folder=tmp_path / "whole", dtype="float16")
    parts = export_hf(base=tmp_path / "sharded", deltas=deltas, folder=tmp_path / "parts", dtype="float16")
    assert len(list(parts.glob("*.safetensors"))) == len(list((tmp_path / "sharded").glob("*.safetensors")))
    left, right = (AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict() for folder in (whole, parts))
    assert left[f"{UP}.weight"].dtype == torch.float16
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_scores_of_a_composition_equal_those_of_its_export(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    publish(tmp_path / "store", base, "one", {UP: delta(list(range(0, 64, 3)))})
    chosen = artifacts_of("one*6", tmp_path / "store")
    merged = export_hf(base=base, deltas=compose(chosen, base), folder=tmp_path / "merged")
    examples, store = [Example("hello", "there you are")], tmp_path / "store"
    metrics = ("nll", "chrf")
    added = score_composition(base=str(base), composition="one*6", store=store, examples=examples, metrics=metrics)
    whole = score_composition(base=str(merged), composition="", store=store, examples=examples, metrics=metrics)
    plain = score_composition(base=str(base), composition="", store=store, examples=examples, metrics=metrics)
    assert added["nll"].score == pytest.approx(whole["nll"].score, abs=0.02)
    assert abs(plain["nll"].score - added["nll"].score) > 0.1
    with pytest.raises(UnknownAbilityError):
        artifacts_of("none", store)
