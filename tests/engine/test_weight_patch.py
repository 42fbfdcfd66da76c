"""The exported patch, applied by vLLM's own loader, turns the base's weights into the merged checkpoint's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from act_serve.abilities.store import Store
from act_serve.errors import ArtifactDamagedError
from act_serve.pipeline.compose import artifacts_of, compose
from act_serve.pipeline.export import export_hf
from act_serve.pipeline.export_patch import export_patch
from tests.abilities_for_tests import publish_random
from tests.tiny_models import make_llama, make_qwen
from tests.vllm_models import load_vllm_model

pytestmark = pytest.mark.slow


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Callable[[Path], Any]]:
    """Loads a checkpoint into vLLM's model class, before any worker packs its weights."""
    from vllm.distributed import destroy_distributed_environment, destroy_model_parallel

    yield lambda folder: load_vllm_model(folder, tmp_path / "meeting")
    destroy_model_parallel()
    destroy_distributed_environment()


@pytest.mark.parametrize("make", [make_llama, make_qwen])
def test_patched_base_is_the_merged_model(
    make: Callable[..., Path], load: Callable[[Path], Any], tmp_path: Path
) -> None:
    from vllm.model_executor.model_loader.checkpoint_weight_patch import load_checkpoint_weight_patches

    from act_serve.engine.weight_patch import read_weight_patch

    base = make(tmp_path / "base")
    store = Store(tmp_path / "store")
    publish_random(store, base, "one", seed=1, share=0.3, outside=True)
    publish_random(store, base, "two", seed=2, share=0.3)
    deltas = compose(artifacts_of("one+two*0.5", store.root), base)
    export_hf(base=base, deltas=deltas, folder=tmp_path / "merged")
    export_patch(base=base, deltas=deltas, folder=tmp_path / "patch")
    model, merged = load(base), dict(load(tmp_path / "merged").named_parameters())
    differing = [name for name, weight in model.named_parameters() if not torch.equal(weight, merged[name])]
    patches = read_weight_patch(tmp_path / "patch")
    load_checkpoint_weight_patches(model, patches)
    assert any("qkv_proj" in name for name in differing)
    assert any("gate_up_proj" in name for name in differing)
    assert {"model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"} <= set(differing)
    assert all(torch.equal(weight, merged[name]) for name, weight in model.named_parameters())
    assert len(patches) == len(deltas) + sum(module.bias_delta is not None for module in deltas.values())


def test_a_damaged_patch_is_refused(tmp_path: Path) -> None:
    from act_serve.engine.weight_patch import read_weight_patch

    base = make_llama(tmp_path / "base")
    publish_random(Store(tmp_path / "store"), base, "one", seed=1)
    folder = export_patch(
        base=base, deltas=compose(artifacts_of("one", tmp_path / "store"), base), folder=tmp_path / "patch"
    )
    data = (folder / "weight_patch.safetensors").read_bytes()
    (folder / "weight_patch.safetensors").write_bytes(data[:-8])
    with pytest.raises(ArtifactDamagedError, match="holds no readable weight patch"):
        read_weight_patch(folder)
