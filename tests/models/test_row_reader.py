"""Rows read one by one equal the rows of the whole tensor, over several shards too."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from act_serve.errors import ModelError
from act_serve.models.row_reader import open_rows
from tests.tiny_models import make_llama


def test_rows_of_a_sharded_checkpoint(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "one")
    LlamaForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    name = "model.layers.1.mlp.up_proj.weight"
    with open_rows(folder) as one, open_rows(tmp_path / "many") as many:
        assert one.names() == many.names()
        assert one.shape(name) == many.shape(name) == (64, 32)
        assert torch.equal(many.rows(name, [5, 0, 63]), one.tensor(name)[[5, 0, 63]])


def test_missing_and_damaged(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no \.safetensors"), open_rows(tmp_path):
        pass
    folder = make_llama(tmp_path / "model")
    with open_rows(folder) as rows, pytest.raises(ModelError, match="no tensor"):
        rows.tensor("model.layers.9.mlp.up_proj.weight")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelError, match="can't be read"), open_rows(folder):
        pass


@pytest.mark.parametrize("text", ['{"weight_map": {"model.la', "[]", "{}", '{"weight_map": null}', "\xff"])
def test_an_index_whose_download_broke_off_is_named(tmp_path: Path, text: str) -> None:
    folder = make_llama(tmp_path / "model")
    (folder / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    with (
        pytest.raises(ModelError, match=r"model\.safetensors\.index\.json is no index .*; download the model again"),
        open_rows(folder),
    ):
        pass
