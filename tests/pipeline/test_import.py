"""What others trained becomes an ability: whole where few rows change, else its largest rows with the error stated."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, ShiraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from act_serve.abilities.store import Store
from act_serve.delta.artifact import as_stored, read_artifact
from act_serve.delta.manifest import Import
from act_serve.errors import ActServeError, DataError, ModelError, PairMismatchError
from act_serve.models.families import channel_modules
from act_serve.pipeline.compose import artifacts_of, compose
from act_serve.pipeline.export_peft import export_peft
from act_serve.pipeline.import_ability import import_ability
from act_serve.pipeline.publish import channel_counts
from tests.abilities_for_tests import publish_random
from tests.cli.test_offline_commands import call
from tests.tiny_models import make_llama, make_qwen, plant

TARGETS = ["q_proj", "up_proj", "down_proj"]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_llama(tmp_path / "base")


def brought(source: Path, base: Path, **options: Any) -> tuple[dict[str, Any], Import]:
    """Imports and reads back; every call is the next version."""
    facts = {"name": "new", "kind": "other", "description": "new", "license": "unknown"}
    store = Store(base.parent / "store")
    folder, said = import_ability(
        source=str(source), base=base, store=store, **{"stored": "bfloat16"} | options, **facts
    )
    manifest, deltas = read_artifact(folder)
    assert manifest.imported == said
    return deltas, said


def weights(model: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().float() for name, tensor in model.state_dict().items()}


def difference(base: Path, merged: dict[str, Tensor]) -> dict[str, Tensor]:
    """Per linear module of the layers, what the merged weights differ by."""
    before = weights(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    names = [f"{module.name}.weight" for module in channel_modules(base)]
    return {name: merged[name] - before[name] for name in names}


def error_of(deltas: dict[str, Any], whole: dict[str, Tensor]) -> float:
    """The relative error of the stored rows, by plain arithmetic on whole matrices."""
    lost = total = 0.0
    for name, change in whole.items():
        kept = torch.zeros_like(change)
        module = deltas.get(name.removesuffix(".weight"))
        if module is not None:
            kept[module.rows.long()] = module.delta.float()
        lost += float((change - kept).double().square().sum())
        total += float(change.double().square().sum())
    return (lost / total) ** 0.5


def adapter(base: Path, folder: Path, config: Any) -> dict[str, Tensor]:
    """Saves an adapter with random weights and returns the weights that PEFT merges it to."""
    torch.manual_seed(3)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name or "shira_" in name:
                weight.normal_(std=0.1)
    model.save_pretrained(folder)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)
    return weights(again.merge_and_unload())


def test_checkpoint_that_differs_in_few_rows_is_kept_whole(base: Path, tmp_path: Path) -> None:
    planted = plant(base, tmp_path / "source", p=0.1, scale=0.3)
    deltas, said = brought(tmp_path / "source", base)
    assert {name: module.rows.tolist() for name, module in deltas.items()} == planted
    assert said.exact
    assert said.left_out == 0
    whole = difference(base, weights(AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32)))
    assert said.relative_error == pytest.approx(error_of(deltas, whole), rel=0.01)
    assert 0 < said.relative_error < 0.004


def test_checkpoint_that_differs_everywhere_keeps_its_largest_rows(base: Path, tmp_path: Path) -> None:
    plant(base, tmp_path / "noise", p=1.0, scale=0.01)
    planted = plant(tmp_path / "noise", tmp_path / "source", p=0.1, scale=0.5)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    model.model.norm.weight.data += 1
    model.save_pretrained(tmp_path / "source")
    deltas, said = brought(tmp_path / "source", base)
    linear = sum(module.out_features * module.in_features for module in channel_modules(base))
    assert 0.045 * linear < sum(module.delta.numel() for module in deltas.values()) <= 0.05 * linear
    assert all(set(module.rows.tolist()) <= set(planted[name]) for name, module in deltas.items())
    assert not said.exact
    assert said.left_out == 1
    whole = difference(base, weights(AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32)))
    assert said.relative_error == pytest.approx(error_of(deltas, whole), rel=0.01)
    everything, all_said = brought(tmp_path / "source", base, p=1.0, stored="int8")
    assert all_said.exact
    assert all_said.relative_error == pytest.approx(error_of(everything, whole), rel=0.01)
    assert all_said.relative_error < said.relative_error


@pytest.mark.parametrize("make", [make_llama, make_qwen])
def test_exported_lora_comes_back_exactly(make: Callable[..., Path], tmp_path: Path) -> None:
    base = make(tmp_path / "base")
    publish_random(Store(tmp_path / "given"), base, "one", seed=1, share=0.3)
    given = compose(artifacts_of("one", tmp_path / "given"), base)
    export_peft(base=str(base), deltas=given, channels=channel_counts(base), folder=tmp_path / "lora")
    deltas, said = brought(tmp_path / "lora", base)
    assert said == Import(form="lora", exact=True, relative_error=0.0)
    for name, module in as_stored(given, "bfloat16").items():
        assert torch.equal(deltas[name].rows, module.rows)
        assert torch.equal(deltas[name].delta, module.delta)
        assert (deltas[name].bias_delta is None) == (module.bias_delta is None)
        assert module.bias_delta is None or torch.equal(deltas[name].bias_delta, module.bias_delta)


LORA = {"r": 2, "lora_alpha": 3, "target_modules": TARGETS}


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(**LORA),
        LoraConfig(**LORA, use_rslora=True),
        LoraConfig(**LORA, rank_pattern={r"layers\.1\.mlp\.up_proj": 5}, alpha_pattern={"q_proj": 16}),
        ShiraConfig(r=2, target_modules=TARGETS),
    ],
    ids=["plain", "rank-stabilized", "patterns", "shira"],
)
def test_dense_adapter_is_what_peft_merges(config: Any, base: Path, tmp_path: Path) -> None:
    whole = difference(base, adapter(base, tmp_path / "adapter", config))
    deltas, said = brought(tmp_path / "adapter", base, p=1.0)
    assert said.exact
    assert said.relative_error == pytest.approx(error_of(deltas, whole), rel=0.02)
    assert said.relative_error < 0.004
    part, part_said = brought(tmp_path / "adapter", base, p=0.1)
    assert not part_said.exact
    assert part_said.relative_error == pytest.approx(error_of(part, whole), rel=0.02)
    assert 0.1 < part_said.relative_error < 1


def edit(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def change(folder: Path, work: Callable[[dict[str, Tensor]], Any]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    work(tensors)
    save_file(tensors, path)


def halve(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


A = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
DAMAGES: dict[str, tuple[Callable[[Path], Any], type[ActServeError], str]] = {
    "unknown type": (lambda f: edit(f, peft_type="VERA"), ModelError, "PEFT type 'VERA' can't be imported"),
    "no type": (lambda f: edit(f, peft_type=None), ModelError, "PEFT type None"),
    "dora": (lambda f: edit(f, use_dora=True), ModelError, "use_dora=True"),
    "pissa": (lambda f: edit(f, init_lora_weights="pissa_niter_4"), ModelError, "may have changed the base"),
    "lora-ga": (lambda f: edit(f, init_lora_weights="lora_ga"), ModelError, "may have changed the base"),
    "kasa": (lambda f: edit(f, kasa_config={"r": 2}), ModelError, "kasa_config"),
    "config not json": (lambda f: (f / "adapter_config.json").write_text("{"), ModelError, "can't be read"),
    "config a list": (lambda f: (f / "adapter_config.json").write_text("[]"), ModelError, "not a JSON object"),
    "no tensors": (lambda f: (f / "adapter_model.safetensors").unlink(), ModelError, "holds no adapter_model"),
    "pickled": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), ModelError, "never read"),
    "truncated": (halve, ModelError, "can't be read as safetensors"),
    "a half is missing": (lambda f: change(f, lambda t: t.pop(A)), ModelError, r"up_proj has no lora_A\.weight"),
    "trained embedding": (
        lambda f: change(f, lambda t: t.update({"base_model.model.model.embed_tokens.weight": torch.ones(2)})),
        ModelError, "no change of a linear module"),
    "not a number": (lambda f: change(f, lambda t: t[A].fill_(float("nan"))), ModelError, "NaN"),
    "other rank": (lambda f: edit(f, r=3), PairMismatchError, r"has shape \(2, 64\), not \(3, 64\)"),
    "no alpha": (lambda f: edit(f, lora_alpha=None), ModelError, "no usable lora_alpha"),
    "rank zero": (lambda f: edit(f, r=0), ModelError, "no usable r: 0"),
    "bad pattern": (lambda f: edit(f, rank_pattern={"(": 2}), ModelError, "rank_pattern"),
    "other names": (
        lambda f: change(f, lambda t: t.update({A.replace("layers.0", "layers.7"): t.pop(A)})),
        PairMismatchError, r"adapts model\.layers\.7\.mlp\.up_proj, not a linear module"),
    "nothing changes": (lambda f: change(f, lambda t: [v.zero_() for v in t.values()]), DataError, "nothing to import"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_refused_with_its_own_message(name: str, base: Path, tmp_path: Path) -> None:
    damage, kind, message = DAMAGES[name]
    adapter(base, tmp_path / "adapter", LoraConfig(**LORA))
    damage(tmp_path / "adapter")
    with pytest.raises(kind, match=message):
        brought(tmp_path / "adapter", base)
    assert not (tmp_path / "store").exists()


def test_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    adapter(base, tmp_path / "adapter", LoraConfig(**LORA))
    wide = make_llama(tmp_path / "wide", hidden=64)
    with pytest.raises(PairMismatchError, match="has shape"):
        brought(tmp_path / "adapter", wide)
    with pytest.raises(PairMismatchError, match="hidden_size"):
        brought(wide, base)


def test_checkpoint_that_is_quantised_or_computes_differently(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plant(base, tmp_path / "source", p=0.1, scale=0.3)
    path = tmp_path / "source" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    brought(tmp_path / "source", base)
    assert "rms_norm_eps (1e-06 in the base, 0.001 in the ability model)" in caplog.text
    path.write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(ModelError, match="use the unquantised checkpoint"):
        brought(tmp_path / "source", base)


def test_row_sparse_shira_is_kept_exactly(base: Path, tmp_path: Path) -> None:
    def first_rows(layer: torch.nn.Linear, r: int, **_: Any) -> Tensor:
        mask = torch.zeros(layer.weight.numel())
        mask[: r * sum(layer.weight.shape)] = 1
        return mask.view(layer.weight.shape)

    config = ShiraConfig(r=2, target_modules=TARGETS)
    config.mask_fn = first_rows
    whole = difference(base, adapter(base, tmp_path / "adapter", config))
    change(tmp_path / "adapter", lambda t: t.update({k: v.bfloat16() for k, v in t.items() if k.endswith("weight")}))
    deltas, said = brought(tmp_path / "adapter", base)
    assert said == Import(form="shira", exact=True, relative_error=0.0)
    assert {name: len(module.rows) for name, module in deltas.items() if "layers.0" in name} == {
        "model.layers.0.self_attn.q_proj": 4,
        "model.layers.0.mlp.up_proj": 6,
        "model.layers.0.mlp.down_proj": 3,
    }
    assert error_of(deltas, whole) < 0.004


@pytest.mark.parametrize("misplace", [lambda t: t.add_(40), lambda t: t.sub_(1)])
def test_misplaced_shira_is_refused(misplace: Callable[[Tensor], Tensor], base: Path, tmp_path: Path) -> None:
    adapter(base, tmp_path / "adapter", ShiraConfig(r=2, target_modules=TARGETS))
    change(tmp_path / "adapter", lambda t: [misplace(v) for k, v in t.items() if k.endswith("indices")])
    with pytest.raises(PairMismatchError, match="are not all within"):
        brought(tmp_path / "adapter", base)
    change(tmp_path / "adapter", lambda t: [t.pop(k) for k in list(t) if k.endswith("indices")])
    with pytest.raises(ModelError, match="has no shira_indices"):
        brought(tmp_path / "adapter", base)


def test_the_command_says_what_was_kept(base: Path, tmp_path: Path) -> None:
    plant(base, tmp_path / "source", p=0.1, scale=0.3)
    common = ("--base", base, "--store", tmp_path / "abilities")
    said = call("import", tmp_path / "source", "planted", *common, "--kind", "language", "--language", "fr")
    assert "published planted@1" in said
    assert "checkpoint: kept every changed row" in said
    shown = call("inspect", tmp_path / "abilities" / "planted" / "1")
    assert "checkpoint, every changed row kept, relative error" in shown
    assert "source" in shown
    assert str(tmp_path) not in shown
    with pytest.raises(DataError, match="holds no row"):
        call("import", tmp_path / "source", "none", *common, "--p", 0.000001)
